"""Folders of converted models and of adapters trained on them, in the hands of those who know nothing of spans."""

import json
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from tenfold.attend import masformer, spans
from tenfold.attend.masformer import native
from tenfold.errors import ModelError
from tenfold.kernels.local import AttentionWindow
from tenfold.models.changes import is_marked
from tenfold.models.export import merge, save_adapter, save_model
from tenfold.models.open import open_model
from tenfold.models.tiny import tiny_model

SPAN = AttentionWindow("sliding", 8, sinks=2)
IDS = torch.randint(10, 200, (2, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


def converted(kind="llama", span=SPAN):
    opened = tiny_model(kind)
    handle = masformer.convert(opened.model, full_layers=[1], span=span)
    return opened, handle


def adapted(model):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()


def test_plain_transformers_refuses_what_it_would_compute_otherwise(tmp_path):
    """In a process of its own, in which nothing of tenfold is imported."""
    for kind in ("llama", "gpt2"):
        converted(kind)[0].model.save_pretrained(tmp_path / kind)
    opened, _ = converted()
    save_model(opened.model, opened.tokenizer, tmp_path / "saved")
    code = f"""
        import sys
        from pathlib import Path
        from transformers import AutoModelForCausalLM, LlamaForCausalLM
        folder = Path({str(tmp_path)!r})
        for name in ("llama", "gpt2", "saved"):
            for builder in (AutoModelForCausalLM, *([] if name == "gpt2" else [LlamaForCausalLM])):
                try:
                    builder.from_pretrained(folder / name)
                except ValueError as error:
                    assert "tenfold_span" in str(error), error
                else:
                    sys.exit(f"{{name}} was opened")
        assert not [name for name in sys.modules if name.startswith("tenfold")]
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_a_reverted_model_is_saved_as_ever(tmp_path):
    opened, handle = converted()
    handle.revert()
    plain = logits(opened.model)
    opened.model.save_pretrained(tmp_path / "plain")
    fields = json.loads((tmp_path / "plain/config.json").read_text())
    assert not {spans.FIELD, spans.SAVED} & set(fields)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert stock.config._attn_implementation == "sdpa"
    assert torch.equal(logits(stock), plain)
    assert not is_marked(tmp_path / "plain")
    assert not opened.model.model_tags


def test_the_language_model_of_a_composite_one(tmp_path):
    text = {**tiny_model("llama").model.config.to_dict(), "model_type": "llama", "num_hidden_layers": 2}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
    config = AutoConfig.for_model("llava", text_config=text, vision_config=vision, image_token_index=5)
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    plain = logits(model)
    masformer.convert(model, full_layers=[], span=SPAN)
    local = logits(model)
    assert not torch.allclose(local, plain, atol=1e-4)
    assert model.config.vision_config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    assert is_marked(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.text_config._attn_implementation == spans.NAME
    assert torch.equal(logits(again), local)
    native.restore(again).revert()
    assert not hasattr(again.config, spans.SAVED)
    assert again.config.text_config._attn_implementation == "sdpa"
    assert torch.equal(logits(again), plain)


def test_an_adapter_says_what_it_was_trained_on_and_is_opened_so(tmp_path):
    opened, _ = converted()
    model = adapted(opened.model)
    wanted = logits(model)
    folder = save_adapter(model, opened.tokenizer, tmp_path / "adapter", base="tiny:llama")
    assert is_marked(folder)
    assert "This adapter needs tenfold" in (folder / "README.md").read_text()
    with pytest.warns(UserWarning, match="Unexpected keyword arguments .*tenfold_span"):
        stock = PeftModel.from_pretrained(tiny_model("llama").model, folder)
    assert not torch.allclose(logits(stock), wanted, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = open_model(folder, device="cpu").model
    torch.testing.assert_close(logits(again), wanted, atol=1e-6, rtol=0)
    assert again.config.tenfold_span == opened.model.config.tenfold_span
    merge(again, in_place=True).save_pretrained(tmp_path / "merged")
    assert is_marked(tmp_path / "merged")


def test_an_adapter_on_a_model_with_other_spans_is_refused(tmp_path):
    opened, _ = converted()
    folder = save_adapter(adapted(opened.model), opened.tokenizer, tmp_path / "adapter", base="tiny:llama")
    other, _ = converted(span=AttentionWindow("block", 8))
    base = save_model(other.model, other.tokenizer, tmp_path / "base")
    with pytest.raises(ModelError, match=r"trained on a model with tenfold_span .*'sliding'.*, and this one .*'block'"):
        open_model(str(base), adapters=[folder], device="cpu")


def test_peft_itself_puts_a_tag_into_the_card(tmp_path):
    opened, _ = converted()
    adapted(opened.model).save_pretrained(tmp_path)
    assert f"- {spans.NAME}" in (tmp_path / "README.md").read_text()


def test_an_adapter_of_a_plain_model_says_nothing(tmp_path):
    opened = tiny_model("llama")
    folder = save_adapter(adapted(opened.model), opened.tokenizer, tmp_path / "adapter", base="tiny:llama")
    assert not is_marked(folder)
    assert "tenfold" not in (folder / "README.md").read_text()
