"""Compressed models in files: the same model again, for tenfold and transformers; a plain one for those without."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import tenfold
from tenfold import cli
from tenfold.compress.losparse.dense import to_dense
from tenfold.compress.losparse.factors import Factors
from tenfold.compress.losparse.layer import LowRankRowsLinear, compressed_layers, install, trim
from tenfold.config.shape import Shape
from tenfold.errors import ConfigError, ModelError
from tenfold.models.export import merge, save_adapter, save_model
from tenfold.models.layer_map import layer_map
from tenfold.models.meta_model import meta_model
from tenfold.models.quantised import is_quantised
from tenfold.models.reference import ModelRef
from tenfold.models.shape import shape_of
from tenfold.models.tiny import tiny_model

IDS = torch.arange(5, 45).reshape(2, 20)


@torch.no_grad()
def logits(model):
    keys = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=IDS, **keys).logits


def compress(model, *, rank=6, kept=9, elastic=False, seed=0):
    """Every second matrix by its best approximation, with random rows kept."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for slot in [slot for slot in layer_map(model).slots if slot.part in ("attention", "mlp")][::2]:
        weight = model.get_submodule(slot.name).weight.detach().double()
        weight = weight.mT if slot.layout == "conv1d" else weight
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        chosen = torch.randperm(slot.out_features, generator=generator)[:kept]
        parts = (u[:, :rank] * s[:rank], v[:rank], chosen, weight[chosen])
        factors[slot.name] = Factors(*(part.float() if part.is_floating_point() else part for part in parts))
    return install(model, factors, elastic=elastic)


def opened_tiny(kind="llama", **keys):
    opened = tiny_model(kind, **keys)
    compress(opened.model)
    return opened


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "t5", "gemma3"])
def test_14_round_trip_is_bit_equal(kind, tmp_path):
    opened = opened_tiny(kind, task="seq2seq") if kind == "t5" else opened_tiny(kind)
    right, there = logits(opened.model), compressed_layers(opened.model)
    save_model(opened.model, opened.tokenizer, tmp_path / "model")
    again = tenfold.open_model(tmp_path / "model", task="seq2seq" if kind == "t5" else "causal", device="cpu")
    assert torch.equal(logits(again.model), right)
    assert {name: (one.rank, one.kept) for name, one in compressed_layers(again.model).items()} == {
        name: (one.rank, one.kept) for name, one in there.items()
    }
    assert not is_quantised(again.model)
    assert again.identity["parameters"] < tiny_model(kind).identity["parameters"]
    save_model(again.model, again.tokenizer, tmp_path / "copy")
    assert (tmp_path / "copy/model.safetensors").read_bytes() == (tmp_path / "model/model.safetensors").read_bytes()


SCRIPT = """
import sys, torch
if "with tenfold" in sys.argv:
    import tenfold.compress.losparse
from transformers import AutoModelForCausalLM
for folder in map(str, sys.argv[2:]):
    try:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
    except RuntimeError as error:
        print(type(error).__name__, folder)
        continue
    with torch.no_grad():
        torch.save(model(input_ids=torch.arange(5, 45).reshape(2, 20)).logits, folder + "/logits")
"""


def in_a_process(*arguments):
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    talkative = {key: value for key, value in os.environ.items() if not key.startswith("TRANSFORMERS_")}
    where = Path(tenfold.__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=where, env=talkative)
    assert done.returncode == 0, done.stderr
    return done


def test_14_a_fresh_process_opens_shards(tmp_path):
    opened = opened_tiny(tie_word_embeddings=True)
    opened.model.generation_config.max_new_tokens = 7
    opened.model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    in_a_process("with tenfold", tmp_path / "model")
    assert torch.equal(torch.load(tmp_path / "model/logits"), logits(opened.model))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert again.generation_config.max_new_tokens == 7


def test_14_without_tenfold_the_dense_form_opens_and_the_compressed_one_is_refused(tmp_path):
    """Rather than filled at random: the error is transformers' own, and what it prints names the method."""
    opened = opened_tiny("gpt2")
    right = logits(opened.model)
    save_model(opened.model, opened.tokenizer, tmp_path / "compressed")
    save_model(to_dense(opened.model), opened.tokenizer, tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    done = in_a_process("without", tmp_path / "compressed", tmp_path / "dense")
    assert done.stdout.strip() == f"RuntimeError {tmp_path / 'compressed'}"
    assert "Unknown quantization type, got losparse" in done.stderr
    assert "MISMATCH" in done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "dense/logits"), right, atol=1e-5, rtol=1e-5)


def test_a_layer_of_kept_rows_alone_is_a_plain_one(tmp_path):
    opened = tiny_model("llama")
    layer = opened.model.model.layers[0].mlp.up_proj
    rows, order = torch.randn(128, 64), torch.randperm(128)
    install(
        opened.model,
        {"model.layers.0.mlp.up_proj": Factors(torch.zeros(128, 0), torch.zeros(0, 64), order, rows, torch.ones(128))},
    )
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight[order], rows)
    assert torch.equal(layer.bias, torch.ones(128))
    assert not hasattr(opened.model.config, "quantization_config")


def test_a_bias_of_its_own_is_kept_and_has_no_plain_form(tmp_path):
    opened = tiny_model("llama")
    name, rows = "model.layers.0.mlp.up_proj", torch.randn(9, 64)
    factors = Factors(torch.randn(128, 3), torch.randn(3, 64), torch.arange(9), rows, torch.randn(128))
    install(opened.model, {name: factors})
    save_model(opened.model, opened.tokenizer, tmp_path / "model")
    again = tenfold.open_model(tmp_path / "model", device="cpu").model
    assert torch.equal(again.get_submodule(name).bias, factors.bias)
    assert torch.equal(logits(again), logits(opened.model))
    with pytest.raises(ModelError, match=r"up_proj: has a bias, which a plain llama model has not"):
        to_dense(again)


def test_other_heads_find_their_layers(tmp_path):
    opened = opened_tiny("gpt2")
    opened.model.save_pretrained(tmp_path / "causal")
    body = AutoModel.from_pretrained(tmp_path / "causal").eval()
    assert len(compressed_layers(body)) == len(compressed_layers(opened.model))
    with torch.no_grad():
        hidden = opened.model.transformer(input_ids=IDS).last_hidden_state
        assert torch.equal(body(input_ids=IDS).last_hidden_state, hidden)
        body.save_pretrained(tmp_path / "body")
        again = AutoModel.from_pretrained(tmp_path / "body").eval()
        assert torch.equal(again(input_ids=IDS).last_hidden_state, hidden)
    reward = tenfold.open_model(tmp_path / "causal", task="reward", device="cpu").model
    assert len(compressed_layers(reward)) == len(compressed_layers(opened.model))


def test_types_and_devices(tmp_path):
    opened = opened_tiny()
    opened.model.save_pretrained(tmp_path / "model")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    layer = next(iter(compressed_layers(half).values()))
    assert layer.rows.dtype == layer.mix.dtype == torch.bfloat16
    assert layer.place.dtype == torch.int32
    assert float((logits(half).float() - logits(opened.model)).abs().max()) < 0.1


def test_what_is_known_before_the_weights_are_read(tmp_path):
    opened = opened_tiny()
    save_model(opened.model, opened.tokenizer, tmp_path / "model")
    ref = ModelRef(str(tmp_path / "model"))
    shape = shape_of(ref)
    assert shape.compressed
    assert shape.quantised is None
    empty = meta_model(ref)
    assert {name: p.shape for name, p in empty.named_parameters()} == {
        name: p.shape for name, p in opened.model.named_parameters()
    }
    assert all(p.is_meta for p in empty.parameters())
    with pytest.raises(ConfigError, match=r"the layers of .* are compressed \(losparse\)"):
        shape_of(ModelRef(ref.source, load="4bit"))


def test_a_later_format_is_refused(tmp_path):
    opened = opened_tiny()
    save_model(opened.model, opened.tokenizer, tmp_path / "model")
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["version"] = 2
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="of format 2; this tenfold knows 1"):
        tenfold.open_model(tmp_path / "model")


def test_elastic_models_lose_rows_from_the_end(tmp_path):
    opened = tiny_model("llama")
    compress(opened.model, kept=10, elastic=True)
    save_model(opened.model, opened.tokenizer, tmp_path / "model")
    model = tenfold.open_model(tmp_path / "model", device="cpu").model
    before = {
        name: (one.dense_weight().detach(), one.place.argsort()) for name, one in compressed_layers(model).items()
    }
    for share, kept in ((1, 10), (0.5, 5), (0.4, 2), (0, 0)):
        trim(model, share)
        for name, layer in compressed_layers(model).items():
            whole, order = before[name]
            assert layer.kept == kept
            now = layer.dense_weight().detach()
            stay = torch.cat((order[: layer.rank + kept], order[layer.rank + 10 :]))
            torch.testing.assert_close(now[stay], whole[stay], rtol=1e-5, atol=1e-6)
            # What is not kept any more is what the low-rank part, here the best approximation, says of it.
            low = torch.linalg.matrix_rank(now.double(), atol=1e-4)
            assert int(low) <= layer.rank + kept
    assert logits(model).isfinite().all()
    save_model(model, opened.tokenizer, tmp_path / "smaller")
    assert torch.equal(logits(tenfold.open_model(tmp_path / "smaller", device="cpu").model), logits(model))
    with pytest.raises(ModelError, match="no layer of this model is elastic"):
        trim(opened_tiny().model, 0.5)
    with pytest.raises(ConfigError, match=r"share: must be in \[0, 1\], got 2"):
        trim(model, 2)


def test_elastic_rows_become_what_the_low_rank_part_says():
    torch.manual_seed(1)
    left, right, rows = torch.randn(9, 2), torch.randn(2, 5), torch.randn(3, 5)
    kept = torch.tensor([4, 0, 7])
    told = LowRankRowsLinear.from_factors(Factors(left, right, kept, rows), elastic=True)
    told.trim(1)
    right_one = (left @ right).index_copy(0, kept[:1], rows[:1])
    torch.testing.assert_close(told.dense_weight().detach(), right_one)
    untold = LowRankRowsLinear.from_factors(Factors(left.index_fill(0, kept, 0), right, kept, rows), elastic=True)
    untold.trim(0)
    nearest = rows @ torch.linalg.pinv(right) @ right
    torch.testing.assert_close(untold.dense_weight().detach()[kept], nearest)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_merges_into_compressed_layers(kind, tmp_path):
    opened = opened_tiny(kind)
    save_model(opened.model, opened.tokenizer, tmp_path / "base")
    base = tenfold.open_model(tmp_path / "base", device="cpu")
    before = {name: (one.rank, one.kept) for name, one in compressed_layers(base.model).items()}
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=kind == "gpt2")
    with pytest.warns(UserWarning, match="fan_in_fan_out") if kind == "gpt2" else nullcontext():
        adapted = get_peft_model(base.model, config)
    right = logits(adapted)
    assert not torch.allclose(right, logits(opened.model), atol=1e-2)
    save_adapter(adapted, base.tokenizer, tmp_path / "adapter")
    again = tenfold.open_model(tmp_path / "adapter", device="cpu")
    assert isinstance(again.model, PeftModel)
    torch.testing.assert_close(logits(again.model), right)
    merged = merge(again.model)
    torch.testing.assert_close(logits(merged), right, rtol=1e-4, atol=1e-4)
    assert {name: (one.rank, one.kept) for name, one in compressed_layers(merged).items()} == {
        name: (rank + 2, kept) for name, (rank, kept) in before.items()
    }
    save_model(merged, again.tokenizer, tmp_path / "merged")
    opened_again = tenfold.open_model(tmp_path / "merged", device="cpu").model
    assert torch.equal(logits(opened_again), logits(merged))
    dense = merge(to_dense(adapted))
    torch.testing.assert_close(logits(dense), right, rtol=1e-4, atol=1e-4)
    assert not compressed_layers(dense)


def test_what_cannot_be_merged_is_refused(tmp_path):
    opened = opened_tiny()
    adapted = get_peft_model(opened.model, LoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ModelError, match=r"q_proj: an adapter of this kind .* cannot be merged into a compressed"):
        merge(adapted)


def test_forms_of_export():
    from tenfold.config.export import ExportConfig

    with pytest.raises(ConfigError, match="form: dense: base has no compressed layers"):
        ExportConfig(form="dense").applied_to(Shape("base"))
    assert not ExportConfig(form="dense").applied_to(Shape("base", compressed=True, adapted=True)).compressed
    assert ExportConfig().applied_to(Shape("base", compressed=True)).compressed
    with pytest.raises(ConfigError, match="form: native: the layers of base are compressed"):
        ExportConfig(form="native").applied_to(Shape("base", compressed=True, spans={"size": 8}))


def test_a_smaller_model_of_an_elastic_folder(tmp_path, capsys):
    """From the command line, with what cannot be done."""
    opened = tiny_model("llama")
    save_model(opened.model, opened.tokenizer, tmp_path / "plain")
    fixed = opened_tiny()
    save_model(fixed.model, fixed.tokenizer, tmp_path / "fixed")
    compress(opened.model, kept=10, elastic=True)
    opened.model.config.quantization_config.layouts = {"here": {}}  # of these sizes
    save_model(opened.model, opened.tokenizer, tmp_path / "model")
    given = ["export", str(tmp_path / "model"), "--rows", "0.5", "--device", "cpu"]
    assert cli.main([*given, "--out", str(tmp_path / "run")]) == 0
    smaller = tenfold.open_model(tmp_path / "run/01-export/model", device="cpu").model
    assert {layer.kept for layer in compressed_layers(smaller).values()} == {5}
    assert "here" not in smaller.config.quantization_config.layouts
    assert cli.main([*given, "--form", "dense", "--out", str(tmp_path / "dense")]) == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense/01-export/model")
    torch.testing.assert_close(logits(plain), logits(smaller), rtol=1e-4, atol=1e-4)
    told = json.loads((tmp_path / "run/01-export/summary.json").read_text())["attached"]
    assert told["kept rows"] == 5 * len(compressed_layers(smaller))
    for source, rows, why in (
        ("plain", "0.5", "plain has no compressed layers"),
        ("model", "2", "--rows: must be at most 1.0, got 2.0"),
        ("fixed", "0.5", "no layer of this model is elastic"),
    ):
        asked = ["export", str(tmp_path / source), "--rows", rows, "--device", "cpu", "--out", str(tmp_path / "again")]
        assert cli.main(asked) == 2
        assert why in " ".join(capsys.readouterr().err.split())
