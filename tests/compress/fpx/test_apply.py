"""A plan on a model: exact where it should be, gone without a trace, and never timed."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tenfold.compress.fpx.apply import apply, remove
from tenfold.compress.fpx.plan import plan
from tenfold.compress.losparse.calibration import read
from tenfold.core.weight_formats import weight_format
from tenfold.errors import ConfigError, ModelError
from tenfold.evaluate.speed import speed
from tenfold.models.layer_map import layer_map
from tenfold.models.simulated import simulated
from tenfold.models.tiny import KINDS, tiny_model
from tests.compress.fpx.test_units import EXPERTS, experts

IDS = torch.randint(6, 262, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return read(model, IDS).logits


def all_in(model, name):
    return plan(model, list(IDS), gamma=1, palette=["fp8_row", name])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_rounded_along_their_inputs_and_come_back(kind, tied):
    model = tiny_model(kind, tie_word_embeddings=tied).model
    before, stored = logits(model), {name: (one, one.data_ptr()) for name, one in model.named_parameters()}
    form, plain = weight_format("nvfp4"), copy.deepcopy(model)
    found = all_in(model, "nvfp4")
    apply(model, found)
    planned = {weight.name: weight for unit in found.units for weight in unit.weights}
    for name, parameter in model.named_parameters():
        own = plain.get_parameter(name)
        wanted = own
        if name in planned:
            wanted = form.weight(own.T.contiguous()).T if planned[name].transposed else form.weight(own)
        assert torch.equal(parameter, wanted), name
        assert parameter is stored[name][0]
    assert not torch.equal(before, logits(model))
    assert "nvfp4" in simulated(model)
    remove(model)
    assert torch.equal(before, logits(model))
    assert simulated(model) is None
    for name, parameter in model.named_parameters():
        assert parameter is stored[name][0]
        assert parameter.data_ptr() == stored[name][1]
    remove(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_inputs_are_rounded_where_the_format_does_so():
    model, form = tiny_model("llama").model, weight_format("fp4_row")
    found = all_in(model, "fp4_row")
    weights_alone = all_in(model, "fp4_row_a16")
    seen = {}
    for slot in layer_map(model).select(["all-linear"]):
        module = model.get_submodule(slot.name)
        module.register_forward_hook(lambda module, args, output, name=slot.name: seen.update({name: args[0]}))
    for made, rounds in ((found, True), (weights_alone, False)):
        apply(model, made)
        logits(model)
        assert all(torch.equal(x, form.inputs(x)) == rounds for x in seen.values())
        assert len(seen) == 14


def test_a_tied_embedding_is_rounded_and_its_ids_are_not():
    model = tiny_model("gemma3", tie_word_embeddings=True).model
    apply(model, all_in(model, "nvfp4"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.isfinite(logits(model)).all()


def test_another_plan_takes_the_place_of_one_that_is_there():
    model = tiny_model("llama").model
    four, eight = all_in(model, "nvfp4"), plan(model, list(IDS), gamma=0)
    apply(model, eight)
    wanted = logits(model)
    apply(model, four)
    apply(model, eight)
    assert torch.equal(wanted, logits(model))
    with pytest.raises(ConfigError, match="simulates"):
        plan(model, list(IDS), gamma=0)


def adapted(seed=0):
    model = get_peft_model(tiny_model("llama").model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 8
    return model.eval()


def test_adapters_stay_exact_beside_a_planned_base():
    found = all_in(tiny_model("llama").model, "nvfp4")
    model = adapted()
    before = logits(model)
    assert all_in(model, "nvfp4").weights_hash == found.weights_hash
    apply(model, found)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    form, own = weight_format("nvfp4"), tiny_model("llama").model.model.layers[0].self_attn.q_proj.weight
    low_rank = layer.lora_B["default"].weight @ (layer.lora_A["default"].weight @ x.T) * layer.scaling["default"]
    assert torch.allclose(layer(x), form.inputs(x) @ form.weight(own).T + low_rank.T, atol=1e-5)
    with model.disable_adapter():
        alone = tiny_model("llama").model
        apply(alone, found)
        assert torch.equal(logits(alone), logits(model))
    remove(model)
    assert torch.equal(before, logits(model))
    model.merge_adapter()
    with pytest.raises(ModelError, match="merged"):
        apply(model, found)


def test_an_adapter_that_comes_later_learns_on_the_rounded_base():
    model = tiny_model("llama").model
    found = all_in(model, "nvfp4")
    apply(model, found)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    model(IDS).logits.square().mean().backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if "lora_B" in name}
    assert all(float(grad.abs().sum()) > 0 for grad in gradients.values())
    remove(model)
    assert simulated(model) is None
    assert torch.equal(logits(model), logits(tiny_model("llama").model))


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_rounded_each_by_itself(name):
    model = experts(name)
    before, own = logits(model), copy.deepcopy(model)
    found = all_in(model, "fp4_tensor_a16")
    apply(model, found)
    unit = next(unit for unit in found.units if len(unit.weights) > 1)
    for weight in unit.weights:
        for expert, plain in zip(model.get_parameter(weight.name), own.get_parameter(weight.name), strict=True):
            wanted = weight_format("fp4_tensor").weight(plain)  # one scale: the layout does not matter
            assert torch.equal(expert, wanted)
    assert unit.chosen.bytes == sum(4 * (weight.out * weight.inner // 2 + 4) for weight in unit.weights)
    assert not torch.equal(before, logits(model))
    remove(model)
    assert torch.equal(before, logits(model))


def test_a_copy_is_marked_too_and_both_come_back():
    model = tiny_model("llama", tie_word_embeddings=True).model
    before = logits(model)
    apply(model, all_in(model, "nvfp4"))
    rounded, other = logits(model), copy.deepcopy(model)
    remove(model)
    assert simulated(other)
    assert torch.equal(rounded, logits(other))
    remove(other)
    assert torch.equal(before, logits(other))
    assert torch.equal(before, logits(model))


def test_the_wrong_model_and_numbers_that_are_not_finite_change_nothing():
    model = tiny_model("llama").model
    found = all_in(model, "nvfp4")
    other = tiny_model("llama", seed=1).model
    with pytest.raises(ModelError, match="other weights"):
        apply(other, found)
    with torch.no_grad():  # one step of training is another model, too
        model.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-6
    with pytest.raises(ModelError, match="other weights"):
        apply(model, found)
    assert simulated(model) is None
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_nobody_times_it():
    opened = tiny_model("llama")
    apply(opened.model, all_in(opened.model, "nvfp4"))
    with pytest.raises(ConfigError, match=r"speed: planned: the model simulates fp8_row and nvfp4"):
        speed({"planned": opened.model}, opened.tokenizer, prompt_tokens=8, new_tokens=2, repeats=1)
