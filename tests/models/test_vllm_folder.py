"""Packed folders for vLLM: what transformers makes of them by compressed-tensors is the model with rounded numbers."""

import copy
import json
import logging
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tenfold import cli, fpx
from tenfold.compress.losparse.layer import install
from tenfold.config.export import ExportConfig, VllmFormat
from tenfold.core.weight_formats import weight_format
from tenfold.errors import ConfigError, MissingDependencyError, ModelError
from tenfold.models.export import save_model
from tenfold.models.open import open_model
from tenfold.models.tiny import tiny_model
from tenfold.models.vllm_folder import SCHEMES, Written, settled_formats, write_compressed_tensors

from ..runs import execute

IDS = torch.randint(6, 262, (2, 40), generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.08}
LAYER = "model.layers.0"


@pytest.fixture
def package():
    pytest.importorskip("compressed_tensors", reason="no compressed-tensors here: pip install 'tenfold[packed]'")
    logging.getLogger("transformers").setLevel(logging.ERROR)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def linears(model):
    return [name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear) and ".layers." in name]


def by_hand(model, formats):
    """Rounded by code that knows formats alone."""
    for name, form in formats.items():
        module, rounding = model.get_submodule(name), weight_format(form)
        module.weight.data = rounding.weight(module.weight.data)
        module.register_forward_pre_hook(lambda _, args, rounding=rounding: (rounding.inputs(args[0]),))
    return model


def test_all_that_is_offered_can_be_written():
    assert set(SCHEMES) == set(VllmFormat.__args__)


@pytest.mark.parametrize("form", [form for form in SCHEMES if form != "nvfp4_a16"])
def test_weights_are_those_of_the_reference_bit_for_bit(form, tmp_path, package):
    opened = tiny_model("qwen2", **SIZES)
    with torch.no_grad():
        opened.model.get_submodule(f"{LAYER}.mlp.up_proj").weight[3] = 0  # a row without a scale
    written = write_compressed_tensors(opened.model, opened.tokenizer, tmp_path / "packed", form)
    before, plain = logits(opened.model), copy.deepcopy(opened.model)
    assert set(written.formats) == set(linears(opened.model))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    after = logits(found)  # unpacks
    right = by_hand(opened.model, written.formats)
    for name in written.formats:
        assert torch.equal(found.get_submodule(name).weight, right.get_submodule(name).weight), name
    for name in ("lm_head.weight", "model.embed_tokens.weight", f"{LAYER}.self_attn.q_proj.bias"):
        assert torch.equal(found.get_parameter(name), right.get_parameter(name))
    if form == "int8_row":  # its eight bits of inputs have one code more than ours
        assert float((after - before).norm()) == pytest.approx(float((logits(right) - before).norm()), rel=0.3)
        assert not torch.equal(
            after, logits(by_hand(copy.deepcopy(plain), dict.fromkeys(written.formats, f"{form}_a16")))
        )
    else:
        torch.testing.assert_close(after, logits(right), atol=1e-3, rtol=0)
    stored = sum(one.nbytes for name, one in load_file(tmp_path / "packed/model.safetensors").items() if "proj" in name)
    whole = sum(opened.model.get_submodule(name).weight.nbytes for name in written.formats)
    assert stored < whole * (0.3 if "8" in form and "int4" not in form else 0.22)


def test_four_bit_floats_share_the_scale_of_what_is_multiplied_as_one(tmp_path, package):
    opened = tiny_model("llama", **SIZES)
    with torch.no_grad():
        opened.model.get_submodule(f"{LAYER}.self_attn.k_proj").weight.mul_(3)
    written = write_compressed_tensors(opened.model, opened.tokenizer, tmp_path / "packed", "nvfp4_a16")
    assert "all that is not packed is bfloat16" in written.notes[-1]
    stored = load_file(tmp_path / "packed/model.safetensors")
    scales = [float(stored[f"{LAYER}.self_attn.{name}_proj.weight_global_scale"]) for name in "qkvo"]
    assert scales[0] == scales[1] == scales[2] != scales[3]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    logits(found)
    for name in linears(opened.model):
        own, form = opened.model.get_submodule(name).weight.detach().bfloat16().float(), weight_format("nvfp4")
        off = (found.get_submodule(name).weight.float() - own).norm() / own.norm()
        assert off < 1.05 * (form.weight(own) - own).norm() / own.norm()


def test_a_plan_of_several_formats_opens_as_what_was_planned(tmp_path, package):
    opened = tiny_model("llama", **SIZES)
    before = logits(opened.model)
    plan = fpx.plan(opened.model, list(IDS), budget="10bits", palette=["int8_row_a16", "int4_sym_g32", "bf16"])
    plan = plan.replan(f"{plan.bytes - 4000}B")
    assert len(set(plan.by_module.values())) > 1
    written = write_compressed_tensors(opened.model, opened.tokenizer, tmp_path / "packed", plan.by_module)
    config = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]
    packed = {name: form for name, form in written.formats.items() if form in SCHEMES}
    assert {name for group in config["config_groups"].values() for name in group["targets"]} == set(packed)
    assert "lm_head" in config["ignore"]
    found = open_model(str(tmp_path / "packed"))
    assert not torch.equal(logits(found.model), before)
    torch.testing.assert_close(logits(found.model), logits(by_hand(opened.model, packed)), atol=1e-4, rtol=0)


def test_several_kinds_of_packing_in_one_folder(tmp_path, package):
    opened = tiny_model("llama", **SIZES)
    formats = dict.fromkeys(linears(opened.model), "int4_sym_g64") | {f"{LAYER}.mlp.down_proj": "fp8_row"}
    write_compressed_tensors(opened.model, opened.tokenizer, tmp_path / "packed", formats)
    config = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert {group["format"] for group in config["config_groups"].values()} == {"pack-quantized", "float-quantized"}
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    right = by_hand(opened.model, formats)
    torch.testing.assert_close(logits(found), logits(right), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("model", "formats", "said"),
    [
        ("llama", "q4_k", "'q4_k' cannot be written for vLLM"),
        ("llama", "int4_g32", "'int4_g32' cannot be written for vLLM"),
        ("llama", {"model.layers.9.mlp.up_proj": "fp8_row"}, "no layer named 'model.layers.9.mlp.up_proj'"),
        ("llama", {f"{LAYER}.mlp.up_proj": "fp8_row"}, "none for .*q_proj, of 13 in all"),
        ("llama", "int4_sym_g128", "q_proj has rows of 64, which int4_sym_g128 does not divide into 128"),
        ("gpt2", "fp8_row", "c_attn: a layer that stores its transpose"),
    ],
)
def test_what_cannot_be_packed_is_refused_by_name(model, formats, said, tmp_path):
    opened = tiny_model(model)
    with pytest.raises((ConfigError, ModelError), match=said) as caught:
        write_compressed_tensors(opened.model, opened.tokenizer, tmp_path / "packed", formats)
    assert caught.value.remedy
    assert not list(tmp_path.iterdir())


def test_models_that_are_not_plain_are_refused(tmp_path, monkeypatch):
    opened = tiny_model("llama")
    fpx.apply(opened.model, fpx.plan(opened.model, list(IDS), gamma=1))
    with pytest.raises(ConfigError, match="rounded already"):
        settled_formats(opened.model, "fp8_row")
    fpx.remove(opened.model)
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="compressed-tensors") as caught:
        write_compressed_tensors(opened.model, opened.tokenizer, tmp_path / "packed", "fp8_row")
    assert caught.value.remedy == 'pip install "tenfold[packed]"'


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "takes one of them"),
        ({"format": "fp8_row", "plan": "p.json"}, "takes one of them"),
        ({"format": "fp8_row", "form": "merged"}, "format: form: merged packs nothing"),
        ({"format": "fp8_row", "rows": 0.5}, "rows: form: compressed-tensors"),
        ({"format": "q4_k"}, "format"),
    ],
)
def test_keys_that_do_not_go_together(keys, said):
    with pytest.raises(ConfigError, match=said):
        ExportConfig.parse({"form": "compressed-tensors", **keys}, "test")


def test_on_the_command_line_and_in_a_recipe(tmp_path, package, capsys, number_rows):
    export = ["export", "tiny:llama", "--form", "compressed-tensors"]
    assert cli.main([*export, "--format", "int4_sym_g128", "--out", str(tmp_path / "no")]) == 2
    assert "rows of 64" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert cli.main([*export, "--format", "int4_sym_g32", "--out", str(tmp_path / "run")]) == 0
    model = tiny_model("llama").model
    right = by_hand(model, dict.fromkeys(linears(model), "int4_sym_g32"))
    found = open_model(str(tmp_path / "run/01-export/model")).model
    torch.testing.assert_close(logits(found), logits(right), atol=1e-4, rtol=0)
    own = tiny_model("llama", seed=1)
    save_model(own.model, own.tokenizer, tmp_path / "own")
    plan = fpx.plan(own.model, list(IDS), gamma=0.5, palette=["fp8_row", "int4_sym_g32"], fused=True)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= {each.name for each in plan.kept}
    assert settled_formats(own.model, plan.by_module) == Written(plan.by_module, ())
    plan.save(tmp_path / "plan.json")
    stages = [
        {"use": "export", "form": "compressed-tensors", "plan": str(tmp_path / "plan.json")},
        {"use": "evaluate", "tasks": ["perplexity"], "data": str(number_rows), "max_length": 48},
    ]
    execute({"model": str(tmp_path / "own"), "stages": stages}, tmp_path / "planned")
    planned = open_model(str(tmp_path / "planned/01-export/model")).model
    right = by_hand(open_model(str(tmp_path / "own")).model, plan.by_module)
    torch.testing.assert_close(logits(planned), logits(right), atol=1e-4, rtol=0)
    opened = tiny_model("llama")
    keys = {"budget": "9bits", "palette": ["q4_0", "q8_0"], "codec": "gguf", "tokenizer": opened.tokenizer}
    fpx.plan(opened.model, list(IDS), **keys).save(tmp_path / "gguf.json")
    assert cli.main([*export, "--plan", str(tmp_path / "gguf.json"), "--out", str(tmp_path / "no")]) == 2
    assert "is of types of GGUF files" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="was made for other weights"):
        execute({"model": "tiny:llama", "stages": stages[:1]}, tmp_path / "wrong")


def test_compressed_layers_are_refused():
    from tests.compose.test_compressed import factors_of

    model = tiny_model("llama", num_hidden_layers=3).model
    with pytest.raises(ModelError, match="no form for layers compressed by losparse"):
        settled_formats(install(model, factors_of(model)), "fp8_row")
