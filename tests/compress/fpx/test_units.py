"""Units: every matrix of every architecture once, and all else in view."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tenfold.compress.fpx.units import kept_by, units_of
from tenfold.errors import ModelError
from tenfold.models.quantised import parameter_count
from tenfold.models.tiny import KINDS, tiny_model
from tests.architectures import TABLE, configuration

EXPERTS = {row.name: row for row in TABLE if row.model_type in ("mixtral", "gpt_oss", "granitemoe")}


def experts(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(configuration(EXPERTS[name])).float().eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_planned_or_kept_and_none_twice(kind, tied):
    model = tiny_model(kind, tie_word_embeddings=tied).model
    for keys in ({}, {"fused": True}, {"blocks_only": True}):
        units = units_of(model, **keys)
        kept = kept_by(model, units)
        total = sum(unit.numbers for unit in units) + sum(each.numbers for each in kept)
        buffers = sum(one.numel() for one in model.buffers()) - sum(
            value.numel()
            for module in model.modules()
            for name, value in module._buffers.items()
            if value is not None and name in module._non_persistent_buffers_set
        )
        assert total == parameter_count(model) + buffers
        assert sum(each.bytes for each in kept) == 4 * sum(each.numbers for each in kept)
        names = [weight.name for unit in units for weight in unit.weights]
        assert len(set(names)) == len(names)
        assert not {*names} & {each.name for each in kept}
        if "blocks_only" not in keys:  # a matrix of a block has 2048 numbers or more
            big = {each.name.split(".")[-2] for each in kept if each.numbers >= 2048}
            assert big <= {"wpe", "rel_embeddings"}
        else:
            assert all(".0." in unit.name or ".1." in unit.name for unit in units)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_those_of_the_weights(kind):
    model = tiny_model(kind).model
    for unit in units_of(model):
        for weight in unit.weights:
            shape = (weight.inner, weight.out) if weight.transposed else (weight.out, weight.inner)
            assert tuple(model.get_parameter(weight.name).shape) == shape
            for name in weight.modules:
                assert model.get_submodule(name).weight is model.get_parameter(weight.name)


def test_tied_weights_are_one_unit_and_untied_ones_are_two():
    tied = units_of(tiny_model("llama", tie_word_embeddings=True).model)
    assert [unit.modules for unit in tied if "lm_head" in unit.modules] == [("model.embed_tokens", "lm_head")]
    untied = units_of(tiny_model("llama", tie_word_embeddings=False).model)
    assert {unit.name for unit in untied} - {unit.name for unit in tied} == {"lm_head"}
    # Of any kind: two layers that somebody tied.
    model = tiny_model("llama").model
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    (shared,) = [unit for unit in units_of(model) if unit.name.endswith("0.mlp.up_proj")]
    assert shared.modules == ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")


def test_fused_units_are_those_that_engines_multiply_at_once():
    units = {unit.name: unit for unit in units_of(tiny_model("qwen2").model, fused=True)}
    qkv = units["model.layers.1.self_attn.q_proj+k_proj+v_proj"]
    assert [weight.out for weight in qkv.weights] == [64, 32, 32]
    assert len(units) == 2 + 2 * 4
    # T5's attention to the encoder reads its queries elsewhere, and GPT-2's matrix is one already.
    cross = [unit.name for unit in units_of(tiny_model("t5").model, fused=True) if "EncDecAttention" in unit.name]
    assert not any("+" in name for name in cross)
    assert len(cross) == 8
    assert len(units_of(tiny_model("gpt2").model, fused=True)) == len(units_of(tiny_model("gpt2").model))


@pytest.mark.parametrize("name", EXPERTS)
def test_stacked_experts_are_one_unit_of_their_block(name):
    model = experts(name)
    units = units_of(model)
    stacks = [unit for unit in units if len(unit.weights) > 1]
    assert [unit.name.split(".")[2] for unit in stacks] == ["0", "1"]
    for unit in stacks:
        inputs = {weight.name.rpartition(".")[2]: weight.inner for weight in unit.weights}
        assert inputs == {"gate_up_proj": 32, "down_proj": 48}
        assert {weight.count for weight in unit.weights} == {4}
    assert any("router" in each.name or "gate.weight" in each.name for each in kept_by(model, units))


def test_experts_of_unknown_layout_are_refused_by_name():
    model = experts("Mixtral")
    for layer in model.model.layers:
        del layer.mlp.experts.is_transposed
    with pytest.raises(ModelError, match=r"model.layers.0.mlp.experts.gate_up_proj"):
        units_of(model)


def test_packed_models_are_refused_by_name():
    from types import SimpleNamespace

    model = tiny_model("llama").model
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="gptq"))
    with pytest.raises(ModelError, match="gptq"):
        units_of(model)


def test_adapters_are_looked_through():
    from peft import LoraConfig, get_peft_model

    plain = units_of(tiny_model("llama").model)
    adapted = get_peft_model(tiny_model("llama").model, LoraConfig(target_modules=["q_proj", "down_proj"]))
    assert units_of(adapted) == plain
    assert kept_by(adapted, plain) == kept_by(tiny_model("llama").model, plain)
