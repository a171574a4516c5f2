"""A plan for real: what packed weights say, what they take, and what is refused of them."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tenfold.compress.fpx.apply import apply, remove
from tenfold.compress.fpx.packed_layers import CodedEmbedding, CodedLinear
from tenfold.compress.fpx.packing import pack
from tenfold.compress.fpx.plan import plan
from tenfold.compress.losparse.calibration import read
from tenfold.errors import ConfigError, ModelError
from tenfold.evaluate.speed import speed
from tenfold.kernels.packed_choice import STEPS
from tenfold.kernels.packed_product import kernels_for
from tenfold.models.export import merge, save_model
from tenfold.models.layer_map import layer_map
from tenfold.models.quantised import number_format
from tenfold.models.simulated import simulated
from tenfold.models.tiny import KINDS, tiny_model
from tests.compress.fpx.test_units import EXPERTS, experts

IDS = torch.randint(6, 262, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    """Measuring takes time and is tested elsewhere: the kernel that rounds least."""
    monkeypatch.setattr("tenfold.compress.fpx.packed_layers.fastest", lambda *args: ("float32",) * len(STEPS))


def logits(model):
    with torch.no_grad():
        return read(model, IDS).logits


def planned(model, *palette):
    """Every format of the palette in turn."""
    found = plan(model, list(IDS), budget="99bits", palette=palette or None, codec="kernels", metric="token_mean")
    one = [unit.__class__(unit.name, found.palette[at % len(found.palette)], unit.weights, unit.candidates)
           for at, unit in enumerate(found.units)]  # fmt: skip
    return found.__class__(**{**vars(found), "units": tuple(one)})


def stored(model):
    """Bytes of what is saved, that which is shared once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())


def packed_layers(model):
    return [module for module in model.modules() if isinstance(module, CodedLinear | CodedEmbedding)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_the_simulated_model_says(kind, tied):
    found = planned(tiny_model(kind, tie_word_embeddings=tied).model, "int4_g32", "bf16", "int4_g64")
    wanted = tiny_model(kind, tie_word_embeddings=tied).model
    plain = logits(wanted)
    apply(wanted, found)
    model = tiny_model(kind, tie_word_embeddings=tied).model
    pack(model, found)
    torch.testing.assert_close(logits(model), logits(wanted), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits(model), plain, atol=1e-4)
    assert len({id(layer) for layer in packed_layers(model)}) >= len(found.units)
    assert stored(model) == found.bytes
    assert simulated(model) is None
    assert number_format(model) == "bf16 and int4_g32 and int4_g64, float32"
    again = copy.deepcopy(model)
    assert torch.equal(logits(again), logits(model))
    assert stored(again) == found.bytes


@pytest.mark.parametrize("name", ["f32", "bf16", "int8_row", "int4_g32"])
def test_every_kernel_in_a_model(name):
    model = tiny_model("qwen2").model  # with biases
    with torch.no_grad():
        for slot in layer_map(model).select(["q", "k", "v"]):
            model.get_submodule(slot.name).bias.normal_(generator=torch.Generator().manual_seed(0))
    wanted = logits(model)
    pack(model, planned(model, name))
    layers = [layer for layer in packed_layers(model) if isinstance(layer, CodedLinear)]
    near, said = [], []
    for kernel in kernels_for(layers[0].matrix):
        for layer in layers:
            layer.kernels = (kernel,) * len(STEPS)
        said.append(logits(model))
        near.append(float((said[-1] - wanted).norm() / wanted.norm()))
        assert near[-1] < {"f32": 1e-6, "bf16": 0.02, "int8_row": 0.05, "int4_g32": 0.4}[name], kernel
        assert float((said[-1] - said[0]).norm() / said[0].norm()) < 0.03


def test_types_and_devices_change_around_it():
    model = tiny_model("llama").model
    pack(model, planned(model))
    before, held = logits(model), [layer.codes.clone() for layer in packed_layers(model)]
    model.to(torch.bfloat16)
    assert model(IDS).logits.dtype == torch.bfloat16
    model.float()
    assert all(torch.equal(one, layer.codes) for one, layer in zip(held, packed_layers(model), strict=True))
    torch.testing.assert_close(logits(model), before, atol=0.02, rtol=0.02)  # norms were rounded


def adapted(model):
    torch.manual_seed(1)
    return get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    ).eval()


def test_adapters_stay_exact_beside_it():
    found = planned(tiny_model("llama").model, "int4_g32")
    first = adapted(tiny_model("llama").model)
    pack(first, found)  # packed beneath the adapter
    second = tiny_model("llama").model
    pack(second, found)
    alone = logits(second)
    second = adapted(second)  # and the other way round
    assert torch.equal(logits(first), logits(second))
    simulation = adapted(tiny_model("llama").model)
    apply(simulation, found)
    torch.testing.assert_close(logits(first), logits(simulation), atol=1e-5, rtol=1e-4)
    with first.disable_adapter():
        assert torch.equal(logits(first), alone)
    assert not torch.allclose(logits(first), alone, atol=1e-2)


def test_adapters_learn_on_it_as_on_the_simulated_one():
    found, gradients = planned(tiny_model("llama").model, "int4_g32"), []
    for put in (pack, apply):
        model = adapted(tiny_model("llama").model)
        put(model, found)
        model(IDS).logits.square().mean().backward()
        gradients.append({name: one.grad for name, one in model.named_parameters() if one.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-3)


def test_it_is_timed():
    opened = tiny_model("llama")
    pack(opened.model, planned(opened.model))
    (result,) = speed({"packed": opened.model}, opened.tokenizer, prompt_tokens=8, new_tokens=2, repeats=1, warmup=0)
    assert result.settings["dtype"] == "bf16 and int4_g32 and int8_row, float32"


def test_what_it_cannot_do_is_refused_by_name(tmp_path):
    opened = tiny_model("llama")
    model, found = opened.model, planned(opened.model)
    pack(model, found)
    tuned = adapted(copy.deepcopy(model))
    for refused in (
        lambda: pack(model, found),
        lambda: apply(model, found),
        lambda: remove(model),
        lambda: plan(model, list(IDS), budget="6bits"),
        lambda: save_model(model, opened.tokenizer, tmp_path / "model"),
        lambda: model.save_pretrained(tmp_path / "model"),
        lambda: copy.deepcopy(model).save_pretrained(tmp_path / "model"),
        lambda: merge(tuned),
        lambda: tuned.merge_adapter(),
        lambda: model.lm_head.weight.zero_(),
    ):
        with pytest.raises(ModelError, match=r"quantised|packed|cannot be written") as error:
            refused()
        assert "open" in error.value.remedy
    assert not (tmp_path / "model").exists()


def test_plans_and_models_that_cannot_be_packed_are_left_alone():
    model = tiny_model("llama").model
    before, found = logits(model), planned(model)
    with pytest.raises(ConfigError, match="nvfp4"):
        pack(model, plan(model, list(IDS), budget="6bits"))
    with pytest.raises(ModelError, match="other weights"):
        pack(tiny_model("llama", seed=1).model, found)
    with pytest.raises(ConfigError, match="no kernel here multiplies in 'nvfp4'"):
        plan(model, list(IDS), budget="6bits", palette=("bf16", "nvfp4"), codec="kernels")
    apply(model, found)
    with pytest.raises(ConfigError, match="pack: the model simulates"):
        pack(model, found)
    remove(model)
    assert not packed_layers(model)
    assert torch.equal(logits(model), before)

    class Doubled(torch.nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model.model.layers[1].mlp.up_proj.__class__ = Doubled
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj: a Doubled does more"):
        pack(model, found)
    assert not packed_layers(model)


@pytest.mark.parametrize("name", EXPERTS)
def test_stacked_experts_are_refused(name):
    with pytest.raises(ModelError, match=r"experts.*no kernel here"):
        plan(experts(name), list(IDS), budget="9bits", codec="kernels")
