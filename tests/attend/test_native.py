"""Converted models in files: stock transformers opens what it can run, tenfold opens the rest."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tenfold.attend import masformer, spans
from tenfold.attend.masformer import native
from tenfold.errors import ModelError, RunError
from tenfold.kernels.local import AttentionWindow
from tenfold.models.export import merge, save_model
from tenfold.models.folders import is_complete
from tenfold.models.open import open_model
from tenfold.models.opened import Opened
from tenfold.models.tiny import tiny_model, tiny_tokenizer

WRITTEN_AS = {"llama": "ministral", "mistral": "ministral", "qwen2": "qwen2", "qwen3": "qwen3", "smollm3": "smollm3"}
WINDOW = AttentionWindow("sliding", 8)
WRITING = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}


def tiny(kind, **overrides):
    """Three layers, of a kind that `tiny_model` has, or SmolLM3 (with one layer that has no rotations)."""
    if kind != "smollm3":
        return tiny_model(kind, num_hidden_layers=3, **overrides)
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    fields = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "no_rope_layers": [1, 0, 1]}
    plain = tiny_model("llama").model.config
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"]
    config = SmolLM3Config(num_hidden_layers=3, **fields, **{name: getattr(plain, name) for name in names})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Opened(SmolLM3ForCausalLM(config).eval(), tiny_tokenizer(), {})


def converted(kind, full_layers=(1,), span=WINDOW, **overrides):
    opened = tiny(kind, **overrides)
    masformer.convert(opened.model, full_layers=full_layers, span=span)
    return opened


def some_ids(rows=2, tokens=40):
    return torch.randint(10, 200, (rows, tokens), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, ids, **inputs):
    return model(input_ids=ids, use_cache=False, **inputs).logits


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("full_layers", [(0,), (1, 2), (), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("kind", WRITTEN_AS)
def test_stock_opens_it_with_equal_logits(tmp_path, kind, full_layers):
    opened = converted(kind, full_layers)
    folder = native.save_native(opened.model, opened.tokenizer, tmp_path / "native")
    stock, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert stock.config.model_type == WRITTEN_AS[kind]
    assert stock.config._attn_implementation == "sdpa"
    assert stock.config.layer_types == [
        "full_attention" if layer in full_layers else "sliding_attention" for layer in range(3)
    ]
    assert not hasattr(stock.config, spans.FIELD)
    close(logits(stock, some_ids()), logits(opened.model, some_ids()))
    assert AutoTokenizer.from_pretrained(folder).chat_template == opened.tokenizer.chat_template
    assert is_complete(folder)


@pytest.mark.parametrize("kind", WRITTEN_AS)
def test_stock_writes_the_same_with_its_own_cache(tmp_path, kind):
    opened = converted(kind)
    folder = native.save_native(opened.model, opened.tokenizer, tmp_path / "native")
    stock = AutoModelForCausalLM.from_pretrained(folder)
    ids, cache, found = some_ids(), None, []
    for part in ids.split((12, 9, *[1] * 19), 1):
        with torch.no_grad():
            output = stock(input_ids=part, past_key_values=cache, use_cache=True)
        cache, found = output.past_key_values, [*found, output.logits]
    assert [layer.is_sliding for layer in cache.layers] == [True, False, True]
    close(torch.cat(found, 1), logits(opened.model, ids))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # of a batch with padding on the left
    expected = opened.model.generate(input_ids=ids, attention_mask=mask, **WRITING)
    assert torch.equal(stock.generate(input_ids=ids, attention_mask=mask, **WRITING), expected)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_retyping_changes_no_bit(tmp_path, kind):
    opened = tiny(kind)
    before = logits(opened.model, some_ids())
    masformer.convert(opened.model, full_layers=(0, 1, 2), span=AttentionWindow("sliding", 8))
    stock = AutoModelForCausalLM.from_pretrained(native.save_native(opened.model, opened.tokenizer, tmp_path / "m"))
    assert torch.equal(logits(stock, some_ids()), before)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_model_stays_as_it_is(tmp_path, kind):
    opened = converted(kind)
    config, generation = opened.model.config.to_dict(), opened.model.generation_config.to_dict()
    weights = {name: tensor.clone() for name, tensor in opened.model.state_dict().items()}
    before = logits(opened.model, some_ids())
    native.save_native(opened.model, opened.tokenizer, tmp_path / "native")
    assert opened.model.config.to_dict() == config
    assert opened.model.generation_config.to_dict() == generation
    assert opened.model.config._attn_implementation == spans.NAME
    assert torch.equal(logits(opened.model, some_ids()), before)
    for name, tensor in opened.model.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_dtype_tied_weights_rotations_and_generation_settings_are_kept(tmp_path):
    rotations = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e4, "original_max_position_embeddings": 128}
    opened = converted("llama", tie_word_embeddings=True, rope_parameters=rotations, head_dim=24)
    opened.model.to(torch.bfloat16).generation_config.max_length = 99
    folder = native.save_native(opened.model, opened.tokenizer, tmp_path / "native")
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert stock.dtype == torch.bfloat16
    assert stock.lm_head.weight is stock.model.embed_tokens.weight
    assert stock.generation_config.max_length == 99
    assert stock.config.rope_parameters == opened.model.config.rope_parameters
    torch.testing.assert_close(logits(stock, some_ids()), logits(opened.model, some_ids()), atol=2e-2, rtol=0)
    fields = json.loads((folder / "config.json").read_text())
    assert not {"attention_bias", "mlp_bias", "pretraining_tp", spans.FIELD} & set(fields)
    assert fields["architectures"] == ["MinistralForCausalLM"]


def test_a_head_of_scores(tmp_path):
    opened = tiny_model("llama", task="classification", num_labels=3)
    masformer.convert(opened.model, full_layers=[0], span=AttentionWindow("sliding", 8))
    folder = native.save_native(opened.model, opened.tokenizer, tmp_path / "native")
    stock = AutoModelForSequenceClassification.from_pretrained(folder)
    close(logits(stock, some_ids()), logits(opened.model, some_ids()))


def test_what_is_written_can_be_converted_again(tmp_path):
    opened = converted("llama", (0, 1, 2))
    again = open_model(native.save_native(opened.model, opened.tokenizer, tmp_path / "full"), device="cpu")
    masformer.convert(again.model, full_layers=[2], span=AttentionWindow("sliding", 6))
    folder = native.save_native(again.model, again.tokenizer, tmp_path / "local")
    close(logits(AutoModelForCausalLM.from_pretrained(folder), some_ids()), logits(again.model, some_ids()))


@pytest.mark.parametrize(
    ("kind", "span", "overrides", "reason"),
    [
        ("llama", AttentionWindow("sliding", 8, sinks=4), {}, "sinks: 4"),
        ("qwen2", AttentionWindow("block", 8), {}, "pattern: 'block'"),
        ("qwen3", AttentionWindow("sliding", 1), {}, "size: 1"),
        (
            "gemma3",
            AttentionWindow("sliding", 8),
            {"layer_types": ["full_attention"] * 3},
            "model_type: 'gemma3_text'.*rotat",
        ),
        ("gpt2", AttentionWindow("sliding", 8), {}, "model_type: 'gpt2'.*it has for llama, ministral, mistral, qwen2"),
        ("llama", AttentionWindow("sliding", 8), {"attention_bias": True}, "attention_bias: True"),
        ("llama", AttentionWindow("sliding", 8), {"mlp_bias": True}, "mlp_bias: True"),
    ],
)
def test_refusals_that_tenfolds_own_form_keeps(tmp_path, kind, span, overrides, reason):
    opened = converted(kind, (1,), span, **overrides)
    with pytest.raises(ModelError, match=reason) as refusal:
        native.save_native(opened.model, opened.tokenizer, tmp_path / "native")
    assert "save_model: that folder keeps tenfold_span" in refusal.value.remedy
    assert not list(tmp_path.iterdir())
    again = open_model(save_model(opened.model, opened.tokenizer, tmp_path / "own"), device="cpu")
    close(logits(again.model, some_ids()), logits(opened.model, some_ids()))


def test_other_refusals(tmp_path):
    plain = tiny("llama")
    with pytest.raises(ModelError, match="not converted"):
        native.save_native(plain.model, plain.tokenizer, tmp_path / "native")
    opened = converted("llama")
    opened.model.config.tenfold_span["per_head"] = [1, 2]
    with pytest.raises(ModelError, match=r"per_head: \[1, 2\]"):
        native.save_native(opened.model, opened.tokenizer, tmp_path / "native")
    opened = converted("llama")
    with pytest.raises(ModelError, match="offloaded"):
        native.save_native(opened.model.to("meta"), opened.tokenizer, tmp_path / "native")
    opened = converted("qwen2")
    opened.model.model.layers[1].mlp.extra = torch.nn.Linear(2, 3, bias=False)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.extra\.weight \[3, 2\]: not in both"):
        native.save_native(opened.model, opened.tokenizer, tmp_path / "native")
    assert not list(tmp_path.iterdir())


def test_adapters_are_merged_first(tmp_path):
    from peft import LoraConfig, get_peft_model

    opened = converted("llama")
    adapted = get_peft_model(opened.model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    with pytest.raises(ModelError, match="adapters are attached"):
        native.save_native(adapted, opened.tokenizer, tmp_path / "native")
    folder = native.save_native(merge(adapted), opened.tokenizer, tmp_path / "native")
    close(logits(AutoModelForCausalLM.from_pretrained(folder), some_ids()), logits(adapted, some_ids()))


def test_a_folder_of_others_is_not_touched_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    opened = converted("llama")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(RunError, match="was not written by tenfold"):
        native.save_native(opened.model, opened.tokenizer, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    folder = native.save_native(opened.model, opened.tokenizer, tmp_path / "native")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    broken = copy.copy(opened.tokenizer)
    monkeypatch.setattr(type(broken), "save_pretrained", lambda *args: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(RunError, match="disk full"):
        native.save_native(opened.model, broken, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "native"]


@pytest.mark.parametrize("span", [AttentionWindow("block", 8, 1, 2), AttentionWindow("sliding", 8, sinks=3)], ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_own_form_round_trip(tmp_path, kind, span):
    opened = tiny(kind)
    plain = logits(opened.model, some_ids())
    masformer.convert(opened.model, full_layers=[1], span=span)
    folder = save_model(opened.model, opened.tokenizer, tmp_path / "own")
    again = open_model(folder, device="cpu")
    assert again.model.config._attn_implementation == spans.NAME
    assert again.model.config.tenfold_span == opened.model.config.tenfold_span
    assert torch.equal(logits(again.model, some_ids()), logits(opened.model, some_ids()))
    expected = opened.model.generate(input_ids=some_ids(), attention_mask=torch.ones(2, 40), **WRITING)
    found = again.model.generate(input_ids=some_ids(), attention_mask=torch.ones(2, 40), **WRITING)
    assert torch.equal(found, expected)
    assert not torch.allclose(logits(again.model, some_ids()), plain, atol=1e-4)
    # Where tenfold has been imported, transformers opens it as well, and what it saves is as guarded as before.
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(stock, some_ids()), logits(opened.model, some_ids()))
    stock.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["attn_implementation"] == spans.NAME


def test_a_model_that_was_opened_again_can_be_reverted(tmp_path):
    opened = tiny("llama")
    plain = logits(opened.model, some_ids())
    masformer.convert(opened.model, full_layers=[2], span=AttentionWindow("block", 8))
    again = open_model(save_model(opened.model, opened.tokenizer, tmp_path / "own"), device="cpu").model
    handle = native.restore(again)
    assert (handle.full_layers, handle.span) == ((2,), AttentionWindow("block", 8))
    handle.revert()
    assert torch.equal(logits(again, some_ids()), plain)
    assert not hasattr(again.config, spans.FIELD)


def test_an_adapter_opens_on_a_converted_base(tmp_path):
    from peft import LoraConfig, get_peft_model

    from tenfold.models.export import save_adapter

    opened = converted("llama", span=AttentionWindow("block", 8))
    base = save_model(opened.model, opened.tokenizer, tmp_path / "base")
    adapted = get_peft_model(opened.model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    folder = save_adapter(adapted, opened.tokenizer, tmp_path / "adapter", base=str(base))
    close(logits(open_model(folder, device="cpu").model, some_ids()), logits(adapted, some_ids()))


@pytest.mark.parametrize("table", [{"full_layers": [9], "pattern": "block", "size": 8}, {"size": 8}, [1], {"a": 1}])
def test_an_entry_that_cannot_be_read(tmp_path, table):
    opened = tiny("llama", tenfold_span=table)
    folder = save_model(opened.model, opened.tokenizer, tmp_path / "own")
    with pytest.raises(ModelError, match=r"tenfold_span in the configuration: .* cannot be read"):
        open_model(folder, device="cpu")
