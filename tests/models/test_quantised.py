"""Models whose weights are packed: what is refused, counted and predicted without bitsandbytes, and the real ones."""

import dataclasses
import json
import math
from importlib.util import find_spec

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model

from tenfold import open_model
from tenfold.adapt import adalora, full, lora
from tenfold.config.adalora import AdaLoraConfig
from tenfold.config.full import FullConfig
from tenfold.config.lora import LoraConfig
from tenfold.errors import ConfigError, MissingDependencyError, ModelError
from tenfold.models import quantised
from tenfold.models.export import merge, save_adapter, save_model
from tenfold.models.memory import weight_bytes
from tenfold.models.meta_model import meta_model
from tenfold.models.packed_shapes import PackedLinear, predicted_bytes
from tenfold.models.quantised import check_load, check_own, for_training, number_format, own_method, parameter_count
from tenfold.models.reference import ModelRef
from tenfold.models.shape import shape_of
from tenfold.models.tiny import tiny_model
from tenfold.pipeline.estimate import training_needs

bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
LOADS = ["4bit", "8bit"]
IDS = torch.arange(5, 69).reshape(2, 32)
GPTQ = {"quant_method": "gptq", "bits": 4}


def without(monkeypatch, *packages):
    monkeypatch.setattr(quantised, "_is_there", lambda package: package not in packages)


def test_bitsandbytes_is_asked_for_by_name(monkeypatch):
    without(monkeypatch, "bitsandbytes")
    with pytest.raises(MissingDependencyError, match="load: 4bit needs the package bitsandbytes") as found:
        open_model("tiny:llama", load="4bit")
    assert found.value.remedy == 'pip install "tenfold[bnb]"'
    check_load(None)


def test_other_loads_are_refused():
    with pytest.raises(ConfigError, match="load: must be one of 4bit, 8bit, got '3bit'"):
        check_load("3bit")


@pytest.mark.parametrize("method", sorted(quantised.PACKAGES))
def test_files_with_packed_weights_name_the_package_they_need(method, monkeypatch):
    config = {"quantization_config": {"quant_method": method}}
    without(monkeypatch, *quantised.PACKAGES[method])
    with pytest.raises(MissingDependencyError, match="there: its weights are quantised") as found:
        check_own(config, "there", packs=False)
    assert found.value.remedy.startswith("pip install ")
    without(monkeypatch)
    assert check_own(config, "there", packs=False) == method
    with pytest.raises(ConfigError, match=rf"load: the weights of there are quantised already \({method}\)"):
        check_own(config, "there", packs=True)


def test_the_methods_are_those_of_transformers():
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    assert {*quantised.PACKAGES} - {"bitsandbytes"} <= {*AUTO_QUANTIZER_MAPPING}


def test_older_files_of_bitsandbytes_say_no_method():
    assert own_method({"quantization_config": {"load_in_8bit": True}}) == "bitsandbytes"
    assert own_method({"hidden_size": 8}) is None


def test_a_folder_with_packed_weights_is_told_by_its_configuration(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": GPTQ}))
    without(monkeypatch)
    assert shape_of(ModelRef(str(tmp_path))).quantised == "gptq"
    assert shape_of(ModelRef("tiny:llama", load="8bit")).quantised == "8bit"
    assert shape_of(ModelRef("tiny:llama")).quantised is None
    without(monkeypatch, "optimum", "gptqmodel")
    with pytest.raises(MissingDependencyError, match="needs optimum and gptqmodel"):
        shape_of(ModelRef(str(tmp_path)))


def test_the_identity_of_a_model_holds_what_it_is_packed_into():
    plain, *packed = (ModelRef("tiny:llama", load=load).identity() for load in (None, *LOADS))
    assert "load" not in plain  # fingerprints of earlier versions stay what they were
    assert [one["load"] for one in packed] == LOADS
    assert all({**one, "load": None} == {**plain, "load": None} for one in packed)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("load", LOADS)
def test_predicted_sizes_are_the_closed_form(kind, load):
    task = "seq2seq" if kind == "t5" else "causal"
    plain, packed = (meta_model(ModelRef(f"tiny:{kind}", task=task, load=one)) for one in (None, load))
    assert parameter_count(packed) == parameter_count(plain)
    layers = [module for module in packed.modules() if isinstance(module, PackedLinear)]
    assert layers
    assert not any(module is packed.get_output_embeddings() for module in layers)
    saved = 0
    for layer in layers:
        count, out = layer.in_features * layer.out_features, layer.out_features
        blocks = math.ceil(count / 64)
        tables = 4 * 16 + 4 * 256 + 4
        saved += 4 * count - (
            count + 4 * out if load == "8bit" else count / 2 + blocks + 4 * math.ceil(blocks / 256) + tables
        )
    assert predicted_bytes(plain) - predicted_bytes(packed) == saved


def test_a_share_of_the_model_is_one_of_whole_weights():
    """A packed matrix counts for the numbers that it stands for, so that a budget buys the same rank."""
    config = LoraConfig(budget="3%")
    with torch.device("meta"):
        plain, packed = (lora.attach(meta_model(ModelRef("tiny:llama", load=load)), config) for load in (None, "4bit"))
    assert lora.attached(plain) == lora.attached(packed)


def test_activations_of_8_bits_are_predicted_above_those_of_4():
    """LLM.int8() keeps the inputs of its layers for the backward pass; NF4 keeps nothing."""
    config = LoraConfig(rank=2, max_length=128, targets=("down",))
    four, eight = (training_needs(lora.attach, config, ModelRef("tiny:llama", load=load)) for load in LOADS)
    assert eight["activations"] > four["activations"]
    assert eight["trainable parameters"] == four["trainable parameters"]


class Packed(torch.nn.Module):
    """As GPTQ and its kin keep a layer: no weight, codes in buffers."""

    def __init__(self, inner, out):
        super().__init__()
        self.in_features, self.out_features = inner, out
        self.register_buffer("qweight", torch.zeros(inner // 8, out, dtype=torch.int32))
        self.bias = torch.nn.Parameter(torch.zeros(out))


def test_codes_in_buffers_count_for_what_they_stand_for():
    model = torch.nn.Sequential(Packed(16, 4), torch.nn.Linear(4, 2))
    assert parameter_count(model) == 16 * 4 + 4 + 4 * 2 + 2
    assert parameter_count(model, lambda name: not name.startswith("0")) == 10


@pytest.fixture(scope="module", params=LOADS)
def packed(request):
    """The tiny model, packed; tests must not change its weights."""
    return open_model("tiny:llama", load=request.param, device="cpu"), request.param


def unpacked(layer):
    """The weight that a layer of bitsandbytes stands for, by its own functions."""
    from bitsandbytes.functional import dequantize_4bit

    if layer.weight.dtype == torch.uint8:
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return layer.weight.data.float() * scales[:, None] / 127


@bitsandbytes
def test_packed_weights_are_near_the_whole_ones(packed):
    opened, load = packed
    whole = open_model("tiny:llama", device="cpu").model
    assert opened.identity["quantised"] == load
    assert number_format(opened.model) == f"{load}, float32"
    assert opened.identity["parameters"] == whole.num_parameters()
    layers = {name: module for name, module in opened.model.named_modules() if quantised.is_packed(module)}
    assert len(layers) == 14  # all but the head
    for name, layer in layers.items():
        exact = whole.get_submodule(name).weight.detach()
        error = (unpacked(layer) - exact).norm() / exact.norm()
        assert error < {"4bit": 0.12, "8bit": 0.012}[load]
    with torch.no_grad():
        a, b = whole(IDS).logits, opened.model(IDS).logits
    assert (a - b).norm() / a.norm() < {"4bit": 0.15, "8bit": 0.02}[load]


@bitsandbytes
def test_predicted_bytes_are_those_of_the_real_model(packed):
    opened, load = packed
    assert weight_bytes(opened.model) - _buffers(opened.model) == predicted_bytes(
        meta_model(ModelRef("tiny:llama", load=load))
    )


def _buffers(model):
    return sum(buffer.nbytes for buffer in {id(b): b for b in model.buffers()}.values())


@bitsandbytes
def test_whole_weights_are_refused_by_name(packed, tmp_path):
    opened, load = packed
    with pytest.raises(ModelError, match=rf"not all of the model can be trained: the weights are quantised \({load}\)"):
        full.attach(opened.model, FullConfig())
    with pytest.raises(ModelError, match="the model cannot be saved"):
        save_model(opened.model, opened.tokenizer, tmp_path / "model")
    adapted = get_peft_model(open_model("tiny:llama", load=load).model, PeftLoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="the adapter cannot be merged"):
        merge(adapted)


@bitsandbytes
def test_a_device_map_and_a_load_are_refused():
    with pytest.raises(ConfigError, match="load: 4bit with a device_map"):
        open_model("tiny:llama", load="4bit", device_map="auto")


@bitsandbytes
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")  # PEFT sets it; GPT-2's packed layers are no Conv1D
def test_adapters_learn_on_packed_weights(kind, load, tmp_path):
    """The loss falls, nothing packed moves, and PEFT opens the adapter on the whole base."""
    opened = open_model(f"tiny:{kind}", load=load, device="cpu")
    base = for_training(opened.model)
    codes = {name: p.detach().clone() for name, p in base.named_parameters() if not p.is_floating_point()}
    adapter = adalora.attach(base, AdaLoraConfig(budget="3%", steps=12, learning_rate=1e-2))
    optimizer = torch.optim.AdamW([p for p in adapter.model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = adapter.model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert codes
    for name, parameter in base.named_parameters():
        if not parameter.is_floating_point():
            assert torch.equal(parameter, codes[name.replace(".base_layer", "")])
    folder = adapter.export(tmp_path / "adapter", base=f"tiny:{kind}")
    whole = PeftModel.from_pretrained(tiny_model(kind).model, str(folder)).eval()
    plain = tiny_model(kind).model.eval()
    with torch.no_grad():
        assert whole(input_ids=IDS, labels=IDS).loss < plain(input_ids=IDS, labels=IDS).loss - 0.1
    for again in (open_model(str(folder), device="cpu"), open_model(str(folder), load=load, device="cpu")):
        with torch.no_grad():
            logits = again.model(IDS).logits
        assert (logits - whole(IDS).logits).norm() < 0.15 * logits.norm()


def an_adapter(folder, seed, base="tiny:llama"):
    """A random adapter that changes the model visibly."""
    torch.manual_seed(seed)
    opened = open_model("tiny:llama", device="cpu")
    adapted = get_peft_model(opened.model, PeftLoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return save_adapter(adapted, opened.tokenizer, folder, base=base)


@bitsandbytes
@pytest.mark.parametrize("merged", [False, True])
def test_earlier_adapters_are_in_the_weights_before_these_are_packed(packed, tmp_path, merged):
    _, load = packed
    first, second = (str(an_adapter(tmp_path / name, seed)) for seed, name in enumerate("ab"))
    ref = ModelRef("tiny:llama", device="cpu", adapters=(first, second))
    found = dataclasses.replace(ref, load=load).open(merge=merged).model
    assert hasattr(found, "peft_config") is not merged
    base = found if merged else found.get_base_model()
    name = "model.layers.1.mlp.down_proj"
    inside = ref if merged else dataclasses.replace(ref, adapters=(first,))
    exact = inside.open(merge=True).model.get_submodule(name).weight.detach()
    layer = base.get_submodule(name)
    got = unpacked(getattr(layer, "base_layer", layer))
    assert (got - exact).norm() < {"4bit": 0.12, "8bit": 0.012}[load] * exact.norm()
    plain = tiny_model("llama").model.get_submodule(name).weight.detach()
    assert (exact - plain).norm() > 0.3 * exact.norm()  # the adapter is no rounding


@bitsandbytes
@pytest.mark.parametrize("load", LOADS)
def test_files_that_bitsandbytes_packed_open_as_they_are(load, tmp_path, packed):
    opened = open_model("tiny:llama", load=load, device="cpu")
    opened.model.save_pretrained(tmp_path)
    opened.tokenizer.save_pretrained(tmp_path)
    again = open_model(tmp_path, device="cpu")
    assert again.identity["quantised"] == load
    with torch.no_grad():
        torch.testing.assert_close(again.model(IDS).logits, opened.model(IDS).logits)
    with pytest.raises(ConfigError, match="quantised already"):
        open_model(tmp_path, load=load)
    for attach, config in ((lora.attach, LoraConfig(rank=2)), (adalora.attach, AdaLoraConfig(rank=2, steps=10))):
        model = attach(for_training(open_model(tmp_path, device="cpu").model), config)
        model = getattr(model, "model", model) if attach is adalora.attach else model
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@bitsandbytes
def test_what_is_not_packed_trains_in_float32():
    model = open_model("tiny:llama", load="4bit", dtype="bfloat16", device="cpu").model
    assert model.model.norm.weight.dtype == torch.bfloat16
    model = for_training(model)
    kinds = {parameter.dtype for parameter in model.parameters()}
    assert kinds == {torch.float32, torch.uint8}
    assert not any(parameter.requires_grad for parameter in model.parameters())
