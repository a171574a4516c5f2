"""The compressed layer: that of its dense matrix, for every input, type and use."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from tenfold.compress.losparse.dense import to_dense
from tenfold.compress.losparse.factors import Factors, stored
from tenfold.compress.losparse.layer import LowRankRowsLinear, install
from tenfold.compress.losparse.spanning import spanning_rows
from tenfold.errors import ModelError
from tenfold.kernels.low_rank_rows import FEW, FORMS
from tenfold.models.layer_map import layer_map
from tenfold.models.tiny import tiny_model

OUT, IN = 12, 10


def factors_of(out=OUT, inner=IN, rank=3, kept=4, bias=False, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    make = {"generator": generator, "dtype": torch.float64}
    left, right = torch.randn(out, rank, **make), torch.randn(rank, inner, **make)
    chosen = torch.randperm(out, generator=generator)[:kept]
    rows = torch.randn(kept, inner, **make)
    parts = [part.to(dtype) for part in (left, right, rows)]
    return Factors(parts[0], parts[1], chosen, parts[2], torch.randn(out, **make).to(dtype) if bias else None)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(("rank", "kept"), [(3, 4), (0, 4), (3, 0), (0, 0), (0, OUT), (2, 10), (9, 3), (10, 4)])
def test_it_is_its_matrix(rank, kept):
    factors = factors_of(rank=rank, kept=kept, bias=True)
    layer = LowRankRowsLinear.from_factors(factors)
    torch.testing.assert_close(layer.dense_weight(), factors.dense(), rtol=1e-12, atol=1e-12)
    x = torch.randn(5, IN, dtype=torch.float64)
    right = nn.functional.linear(x, factors.dense(), factors.bias)
    torch.testing.assert_close(layer(x), right, rtol=1e-12, atol=1e-11)
    assert layer.rank == min(rank, OUT - kept)
    assert layer.rows.numel() + layer.mix.numel() == stored(OUT, IN, layer.rank, kept)


def test_a_rank_that_is_not_there_is_not_stored():
    factors = factors_of(rank=3, kept=2)
    left = factors.left.clone()
    left[:, 2] = left[:, 1] * 2
    lower = Factors(left, factors.right, factors.kept, factors.rows)
    layer = LowRankRowsLinear.from_factors(lower)
    assert layer.rank == 2
    torch.testing.assert_close(layer.dense_weight(), lower.dense(), rtol=1e-12, atol=1e-12)
    nothing = Factors(left * 0, factors.right, factors.kept, factors.rows)
    layer = LowRankRowsLinear.from_factors(nothing)
    assert layer.rank == 0
    assert torch.equal(layer.dense_weight(), nothing.dense())


def test_float32_loses_nothing_that_counts():
    """Of factors that are scaled as badly as can be, the combinations stay small."""
    factors = factors_of(300, 200, 60, 20)
    scale = 10.0 ** torch.linspace(-6, 6, 60, dtype=torch.float64)
    badly = Factors(factors.left * scale, factors.right / scale[:, None], factors.kept, factors.rows)
    layer = LowRankRowsLinear.from_factors(badly, dtype=torch.float32)
    right = badly.dense()
    assert float((layer.dense_weight().detach().double() - right).norm() / right.norm()) < 1e-6
    assert float(layer.mix.detach().abs().max()) < 5
    assert layer.mix.dtype == layer.rows.dtype == torch.float32


def test_rows_are_kept_bit_for_bit():
    factors = factors_of(dtype=torch.bfloat16)
    layer = LowRankRowsLinear.from_factors(factors)
    assert layer.rows.dtype == torch.bfloat16
    assert torch.equal(layer.dense_weight()[factors.kept], factors.rows)
    assert torch.equal(layer.rows[layer.rank :], factors.rows), "in the order of importance"


def test_spanning_rows_are_themselves():
    left, right = torch.randn(9, 4).double(), torch.randn(4, 7).double()
    chosen, mix = spanning_rows(left, right)
    assert torch.equal(mix[chosen], torch.eye(4).double())
    torch.testing.assert_close(mix @ (left @ right)[chosen], left @ right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_what_a_linear_layer_gives(dtype):
    factors = factors_of(bias=True, dtype=torch.float32)
    layer = LowRankRowsLinear.from_factors(factors)
    x = torch.randn(2, 3, IN)
    with torch.autocast("cpu", dtype=dtype):
        found = layer(x)
        right = nn.functional.linear(x, factors.dense(), factors.bias)
    assert found.dtype == right.dtype == dtype
    torch.testing.assert_close(found, right, rtol=3e-2, atol=6e-2)


def test_copies_and_states():
    layer = LowRankRowsLinear.from_factors(factors_of(bias=True))
    other = LowRankRowsLinear(IN, OUT, layer.rank, layer.kept, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, IN, dtype=torch.float64)
    assert torch.equal(other(x), layer(x))
    clone = copy.deepcopy(layer)
    with torch.no_grad():
        layer.rows.zero_()
    assert torch.equal(clone(x), other(x))
    assert layer.to(torch.bfloat16).place.dtype == torch.int32


@pytest.mark.parametrize("form", FORMS)
def test_it_compiles_without_a_break(form):
    torch._dynamo.reset()
    layer = LowRankRowsLinear.from_factors(factors_of(bias=True)).requires_grad_(False)
    layer.take(form, "stored")
    layer(torch.randn(IN, dtype=torch.float64))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for shape in ((IN,), (3, IN), (2, 5, IN), (20, IN)):
        x = torch.randn(*shape, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(("few", "many"), [(few, many) for few in FORMS for many in FORMS])
def test_every_form_is_the_same_matrix(few, many):
    factors = factors_of(bias=True)
    layer = LowRankRowsLinear.from_factors(factors)
    layer.take(few, many)
    for tokens in (1, FEW, FEW + 1, 40):
        x = torch.randn(1, tokens, IN, dtype=torch.float64, requires_grad=True)
        right = nn.functional.linear(x, factors.dense(), factors.bias)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), right, rtol=1e-12, atol=1e-11)
        layer.requires_grad_(False)
        (wanted,) = torch.autograd.grad(right.sum(), x)
        (found,) = torch.autograd.grad(layer(x).sum(), x)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-11)
        layer.requires_grad_(True)
    kept = {"joined": OUT * 7, "whole": OUT * IN, "stored": 0}
    assert layer.form_bytes() == 8 * sum(kept[form] for form in {few, many})
    buffers = sum(buffer.numel() for buffer in layer.buffers()) - OUT
    assert buffers == sum(kept[form] for form in {few, many}), "what they take is there to be counted"
    assert "made_whole" not in layer.state_dict()
    layer.take("stored", "stored")
    assert len(list(layer.buffers())) == 1


@pytest.mark.parametrize("form", ["joined", "whole"])
def test_a_form_follows_its_parameters(form):
    """Through training steps, loading, trimming and a change of type, of none of which it is told."""
    layer = LowRankRowsLinear.from_factors(factors_of(bias=True), elastic=True)
    layer.take(form, form)
    x = torch.randn(4, IN, dtype=torch.float64)

    def check():
        with torch.no_grad():
            weight = layer.dense_weight()
            right = nn.functional.linear(x.to(weight), weight, layer.bias)
            torch.testing.assert_close(layer(x.to(weight)), right, rtol=1e-5, atol=1e-5)

    layer = copy.deepcopy(layer)  # whose parameters' versions count from the beginning
    check()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in layer.parameters())
    optimizer.step()
    layer = copy.deepcopy(layer)  # ... and again, to where they were when its form was made
    check()
    layer.load_state_dict(LowRankRowsLinear.from_factors(factors_of(seed=3, bias=True), elastic=True).state_dict())
    check()
    layer.trim(1)
    check()
    layer.float()
    check()
    assert (layer.few, layer.many) == (form, form)
    layer.to("meta")
    assert (layer.few, layer.many) == ("stored", "stored")


def test_the_weight_is_read_but_not_written():
    factors = factors_of()
    layer = LowRankRowsLinear.from_factors(factors)
    assert isinstance(layer, nn.Linear)
    assert "weight" not in layer.state_dict()
    assert (tuple(layer.weight.shape), layer.weight.dtype) == ((OUT, IN), torch.float64)
    torch.testing.assert_close(layer.weight @ torch.eye(IN).double(), factors.dense())
    torch.testing.assert_close(layer.weight.data.clone(), factors.dense())
    for write in (lambda: layer.weight.add_(1), lambda: setattr(layer.weight, "data", factors.dense())):
        with pytest.raises(ModelError, match="cannot be written"):
            write()


def small(kind):
    """A tiny model with two of its matrices compressed, and the same as plain matrices."""
    model = tiny_model(kind).model
    slots = [slot for slot in layer_map(model).slots if slot.part in ("attention", "mlp")][::3]
    factors = {
        slot.name: factors_of(slot.out_features, slot.in_features, 5, 7, seed=at, dtype=torch.float32)
        for at, slot in enumerate(slots)
    }
    factors = {
        name: Factors(one.left / 20, one.right, one.kept, one.rows / 20, one.bias) for name, one in factors.items()
    }
    return model, factors


def logits(model):
    ids = torch.arange(5, 45).reshape(2, 20)
    keys = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **keys).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_in_a_model_it_is_its_matrix(kind):
    model, factors = small(kind)
    plain, before = copy.deepcopy(model), layer_map(model)
    for name, one in factors.items():
        layer = plain.get_submodule(name)
        layer.weight.data = one.dense().mT.contiguous() if isinstance(layer, Conv1D) else one.dense()
    install(model, factors)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), logits(tiny_model(kind).model), atol=1e-3)
    assert [(slot.role, slot.in_features) for slot in layer_map(model).slots] == [
        (slot.role, slot.in_features) for slot in before.slots
    ]
    kinds = {name: type(module) for name, module in plain.named_modules()}
    dense = to_dense(model)
    assert {name: type(module) for name, module in dense.named_modules()} == kinds
    torch.testing.assert_close(dict(dense.state_dict()), dict(plain.state_dict()), rtol=1e-5, atol=1e-6)
    assert not any(isinstance(module, LowRankRowsLinear) for module in dense.modules())


def test_a_layer_that_is_shared_stays_shared():
    once = nn.Linear(IN, OUT)
    twin = nn.Linear(IN, OUT)
    twin.weight = once.weight
    model = nn.ModuleDict({"first": once, "again": once, "twin": twin, "other": nn.Linear(IN, OUT)})
    install(model, {"first": factors_of(dtype=torch.float32)})
    assert model["first"] is model["again"]
    assert model["twin"] is not model["first"]
    assert model["twin"].rows is model["first"].rows
    assert model["twin"].bias is twin.bias
    assert type(model["other"]) is nn.Linear
    to_dense(model)
    assert model["first"] is model["again"]
    assert model["twin"].weight is model["first"].weight
    assert model["twin"].bias is twin.bias


def test_what_cannot_be_compressed_is_refused_by_name():
    model = tiny_model("gpt2").model
    embedding = factors_of(*model.lm_head.weight.shape, dtype=torch.float32)
    with pytest.raises(ModelError, match=r"lm_head: shares its weight with transformer\.wte"):
        install(model, {"lm_head": embedding})
    with pytest.raises(ModelError, match=r"transformer\.ln_f: a LayerNorm"):
        install(model, {"transformer.ln_f": embedding})
    with pytest.raises(ModelError, match="nowhere: the model has no such module"):
        install(model, {"nowhere": embedding})
    with pytest.raises(ModelError, match=r"is \(192, 64\), and its factors make \(12, 10\)"):
        install(model, {"transformer.h.0.attn.c_attn": factors_of()})


def test_peft_takes_it_for_a_linear_layer():
    model, factors = small("llama")
    install(model, factors)
    before = logits(model)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    wrapped = [name for name, module in adapted.named_modules() if name.endswith("base_layer")]
    assert {name.removeprefix("base_model.model.").removesuffix(".base_layer") for name in wrapped} >= set(factors)
    assert not torch.allclose(logits(adapted), before, atol=1e-3)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)
    loss = adapted(input_ids=torch.arange(5, 25)[None], labels=torch.arange(5, 25)[None]).loss
    loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def test_its_low_rank_part_is_the_matrix_without_its_kept_rows():
    factors = Factors(torch.randn(9, 2), torch.randn(2, 5), torch.tensor([7, 0, 3]), torch.randn(3, 5))
    layer = LowRankRowsLinear.from_factors(factors)
    left, right = layer.low_rank()
    wanted = factors.dense().index_fill(0, factors.kept, 0.0)
    torch.testing.assert_close((left @ right).float(), wanted, rtol=1e-5, atol=1e-5)
    assert right.shape == (2, 5)
