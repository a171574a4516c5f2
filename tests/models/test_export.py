"""What is written opens again with and without tenfold, and merging changes no output."""

from __future__ import annotations

import json

import huggingface_hub
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tenfold.errors import ModelError
from tenfold.models.export import merge, push_to_hub, save_adapter, save_model
from tenfold.models.layer_map import layer_map
from tenfold.models.open import open_model
from tenfold.models.tiny import tiny_model

# PEFT 0.21 asks for a property that transformers 5.23 renamed (2026-07).
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def adapted(kind="llama", seed=0, model=None, task_type="CAUSAL_LM"):
    """A tiny model with a LoRA adapter that does something."""
    opened = tiny_model(kind)
    model = model or opened.model
    config = peft.LoraConfig(
        r=4,
        target_modules=[slot.name for slot in layer_map(model).select(["all-linear"])],
        fan_in_fan_out=kind == "gpt2",
        task_type=task_type,
    )
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return wrapped.eval(), opened.tokenizer


def logits(model, tokenizer):
    with torch.no_grad():
        return model(**tokenizer("hello world", return_tensors="pt")).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merge_keeps_the_outputs_and_the_callers_model(kind):
    model, tokenizer = adapted(kind)
    expected = logits(model, tokenizer)
    with model.disable_adapter():
        assert not torch.allclose(logits(model, tokenizer), expected, atol=1e-3)
    merged = merge(model)
    torch.testing.assert_close(logits(merged, tokenizer), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(model, tokenizer), expected)
    assert type(merged) is type(tiny_model(kind).model)


def test_merge_of_a_plain_model_is_itself():
    model = tiny_model("llama").model
    assert merge(model) is model


def test_merge_refuses_broken_adapters():
    model, _ = adapted()
    next(p for n, p in model.named_parameters() if "lora_B" in n).data.fill_(float("nan"))
    with pytest.raises(ModelError, match="cannot be merged"):
        merge(model)


def test_merged_folder_opens_without_tenfold(tmp_path):
    model, tokenizer = adapted()
    folder = save_model(merge(model), tokenizer, tmp_path / "merged")
    assert not (folder / "adapter_config.json").exists()
    again = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(
        logits(again, AutoTokenizer.from_pretrained(folder)), logits(model, tokenizer), atol=1e-5, rtol=1e-5
    )


def test_adapter_round_trip_with_and_without_tenfold(tmp_path):
    model, tokenizer = adapted()
    folder = save_adapter(model, tokenizer, tmp_path / "adapter", base="tiny:llama")
    with_peft = peft.PeftModel.from_pretrained(tiny_model("llama").model, str(folder))
    by_base = open_model(folder, device="cpu")
    on_top = open_model("tiny:llama", device="cpu", adapters=[folder])
    for again in (with_peft, by_base.model, on_top.model):
        assert torch.equal(logits(again, tokenizer), logits(model, tokenizer))
    assert by_base.identity["adapters"] == on_top.identity["adapters"]
    assert by_base.identity["source"] == str(folder)


def test_a_chain_of_adapters_merges_all_but_the_last(tmp_path):
    first, tokenizer = adapted(seed=1)
    one = save_adapter(first, tokenizer, tmp_path / "one", base="tiny:llama")
    second, _ = adapted(seed=2, model=merge(first))
    two = save_adapter(second, tokenizer, tmp_path / "two", base=str(one))
    expected = logits(second, tokenizer)
    for opened in (open_model("tiny:llama", device="cpu", adapters=[one, two]), open_model(two, device="cpu")):
        torch.testing.assert_close(logits(opened.model, tokenizer), expected, atol=1e-5, rtol=1e-5)
        assert list(opened.model.peft_config) == ["default"]
        assert len(opened.identity["adapters"]) == 2
        with opened.model.disable_adapter():
            torch.testing.assert_close(logits(opened.model, tokenizer), logits(first, tokenizer), atol=1e-5, rtol=1e-5)


def test_an_adapter_on_merged_weights_does_not_claim_the_base(tmp_path):
    opened = tiny_model("llama")
    folder = save_model(opened.model, opened.tokenizer, tmp_path / "base")
    first, tokenizer = adapted(model=open_model(folder, device="cpu").model)
    one = save_adapter(first, tokenizer, tmp_path / "one")
    assert json.loads((one / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)
    second, _ = adapted(model=merge(first))
    two = save_adapter(second, tokenizer, tmp_path / "two")
    with pytest.raises(ModelError, match="names no base model"):
        open_model(two, device="cpu")


def test_an_adapter_beside_the_configuration_of_its_base(tmp_path):
    """As several trainers save it: the same model as without that file."""
    opened = tiny_model("llama")
    base = save_model(opened.model, opened.tokenizer, tmp_path / "base")
    model, tokenizer = adapted(model=open_model(base, device="cpu").model)
    folder = save_adapter(model, tokenizer, tmp_path / "adapter", base=str(base))
    model.config.save_pretrained(folder)
    (folder / "training_args.bin").write_bytes(b"")
    found = open_model(folder, device="cpu")
    assert isinstance(found.model, peft.PeftModel)
    assert torch.equal(logits(found.model, tokenizer), logits(model, tokenizer))
    assert len(found.identity["adapters"]) == 1
    torch.testing.assert_close(logits(merge(found.model), tokenizer), logits(model, tokenizer), atol=1e-5, rtol=1e-5)


def test_a_whole_model_with_an_adapter_beside_it(tmp_path):
    """transformers puts the one on the other, wherever the adapter says that it belongs."""
    model, tokenizer = adapted()
    expected = logits(model, tokenizer)
    model.save_pretrained(tmp_path / "both")
    base = tiny_model("llama").model
    base.save_pretrained(tmp_path / "both")
    tokenizer.save_pretrained(tmp_path / "both")
    found = open_model(tmp_path / "both", device="cpu")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "both"), tokenizer), expected)
    assert torch.equal(logits(found.model, tokenizer), expected)
    torch.testing.assert_close(logits(merge(found.model), tokenizer), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_of_another_name_is_saved_where_it_is_looked_for(tmp_path):
    model, tokenizer = adapted()
    other = peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model.add_adapter("french", other)
    model.set_adapter("french")
    model.eval()
    folder = save_adapter(model, tokenizer, tmp_path / "adapter", base="tiny:llama")
    assert not (folder / "french").exists()
    assert torch.equal(logits(open_model(folder, device="cpu").model, tokenizer), logits(model, tokenizer))
    model.base_model.set_adapter(["default", "french"])
    with pytest.raises(ModelError, match="several adapters are active: default, french"):
        save_adapter(model, tokenizer, tmp_path / "two")


def test_the_demo_base_is_named_and_not_its_cache(demo, tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", r=1)
    wrapped = peft.get_peft_model(demo.model, config)
    folder = save_adapter(wrapped, demo.tokenizer, tmp_path / "adapter")
    wrapped.unload()
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "demo"
    assert demo.identity["resolved"] not in (folder / "README.md").read_text()
    assert open_model(folder, device="cpu").identity["weights"] == demo.identity["weights"]


def test_errors_of_adapters(tmp_path):
    model, tokenizer = adapted()
    folder = save_adapter(model, tokenizer, tmp_path / "adapter", base="tiny:llama")
    scoring, _ = adapted(model=tiny_model("llama", task="reward").model, task_type="SEQ_CLS")
    scored = save_adapter(scoring, tokenizer, tmp_path / "scored", base="tiny:llama")
    with pytest.raises(ModelError, match="task='classification'"):
        open_model(scored, device="cpu")
    with pytest.raises(ModelError, match="does not fit a gpt2 model"):
        open_model("tiny:gpt2", device="cpu", adapters=[folder])
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        open_model("tiny:llama", device="cpu", adapters=[tmp_path])
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: truncated"):
        open_model(folder, device="cpu")


def test_each_kind_of_folder_has_its_function(tmp_path):
    model, tokenizer = adapted()
    with pytest.raises(ModelError, match="save merge"):
        save_model(model, tokenizer, tmp_path / "x")
    with pytest.raises(ModelError, match="save_model"):
        save_adapter(tiny_model("llama").model, tokenizer, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_push_needs_a_folder_and_a_token(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="no model or adapter"):
        push_to_hub(tmp_path, "me/model")
    opened = tiny_model("llama")
    folder = save_model(opened.model, opened.tokenizer, tmp_path / "model")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ModelError, match="no Hugging Face token") as caught:
        push_to_hub(folder, "me/model")
    assert caught.value.remedy == "hf auth login"


def test_push_with_a_hub_that_fails_and_one_that_works(tmp_path, monkeypatch):
    opened = tiny_model("llama")
    folder = save_model(opened.model, opened.tokenizer, tmp_path / "model")
    sent = {}

    class Hub:
        def create_repo(self, repo_id, **options):
            if repo_id == "nobody/model":
                raise ConnectionError("no route to host")
            return f"https://hub/{repo_id}"

        def upload_folder(self, **options):
            sent.update(options)

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    with pytest.raises(ModelError, match="no route to host"):
        push_to_hub(folder, "nobody/model")
    assert push_to_hub(folder, "me/model") == "https://hub/me/model"
    assert sent["folder_path"] == folder
