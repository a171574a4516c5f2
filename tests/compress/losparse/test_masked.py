"""A layer while it is compressed: what it computes before and after its rows are cut, and what it comes to."""

import copy

import pytest
import torch
from torch import nn

from tenfold.adapt.cutting import cut
from tenfold.compress.losparse.masked import LoSparseLinear
from tenfold.compress.losparse.mathematics import split_off

OUT, IN, RANK = 7, 5, 2


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def layer(bias=True, frozen=False, dtype=torch.float64):
    weight = torch.randn(OUT, IN, dtype=dtype)
    made = LoSparseLinear(*split_off(weight, RANK), nn.Parameter(torch.randn(OUT, dtype=dtype)) if bias else None)
    return LoSparseLinear(made.left.data, made.right.data, made.rest.data, made.bias, frozen=frozen), weight


def kept_only(made, rows):
    made.score.copy_(torch.randn(OUT))
    made.drop(torch.isin(torch.arange(OUT), torch.tensor(rows, dtype=torch.int64)))
    return made


def cut_rows(made):
    order = made.order()
    cut(made.rest, 0, order, torch.optim.SGD(made.parameters(), lr=0.1))
    made.kept = order
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_it_starts_as_the_matrix_that_it_replaces(bias, frozen):
    made, weight = layer(bias, frozen)
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    torch.testing.assert_close(made(x), nn.functional.linear(x, weight, made.bias), rtol=1e-12, atol=1e-12)
    assert (made.bias is None) == (not bias)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("rows", [[], [4], [0, 3, 5], list(range(OUT))], ids=len)
@pytest.mark.parametrize("shape", [(IN,), (3, IN), (2, 3, IN), (1, 2, 3, IN)], ids=len)
def test_cut_equals_masked(rows, shape, frozen):
    made, _ = layer(frozen=frozen)
    masked = kept_only(made, rows)
    shorter = cut_rows(copy.deepcopy(masked)) if len(rows) < OUT else masked
    assert len(shorter.rest) == len(rows)
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    outputs = [one(x) for one, x in zip((masked, shorter), inputs, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-12, atol=1e-12)
    for y in outputs:
        y.square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-10, atol=1e-10)
    for name in ("left", "right", "bias"):
        torch.testing.assert_close(getattr(shorter, name).grad, getattr(masked, name).grad, rtol=1e-10, atol=1e-10)
    if not frozen and rows:
        torch.testing.assert_close(shorter.rest.grad, masked.rest.grad[shorter.kept], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [[], [4], [0, 3, 5], [0, 1, 2, 3, 4, 6], list(range(OUT))], ids=len)
@pytest.mark.parametrize("frozen", [True, False])
def test_its_factors_are_what_it_computes(rows, frozen):
    made = kept_only(layer(frozen=frozen)[0], rows)
    factors = made.factors()
    assert sorted(factors.kept.tolist()) == rows
    assert factors.rank <= OUT - len(rows)
    assert bool((made.score[factors.kept].diff() <= 0).all()), "the most important row comes first"
    x = torch.randn(4, IN, dtype=torch.float64)
    wanted = made.eval()(x)
    torch.testing.assert_close(nn.functional.linear(x, factors.dense(), factors.bias), wanted, rtol=1e-12, atol=1e-12)
    if len(rows) < OUT:
        again = cut_rows(made).factors()
        torch.testing.assert_close(again.dense(), factors.dense(), rtol=0, atol=0)


@pytest.mark.parametrize("rows", [[], [0, 3, 5]], ids=len)
def test_a_checkpoint_of_kept_rows_opens_in_a_layer_of_all_rows(rows):
    made = cut_rows(kept_only(layer()[0], rows))
    fresh, _ = layer()
    rest = fresh.rest
    fresh.load_state_dict(made.state_dict())
    assert fresh.rest is rest
    x = torch.randn(3, IN, dtype=torch.float64)
    assert torch.equal(fresh(x), made(x))
    assert torch.equal(fresh.mask, made.mask)
    whole, _ = layer()
    fresh.load_state_dict(whole.state_dict())  # and back: a best checkpoint from before the cut
    assert torch.equal(fresh(x), whole(x))


def test_frozen_rows_that_are_dropped_can_return():
    made, _ = layer(frozen=True)
    x = torch.randn(3, IN, dtype=torch.float64)
    before = made(x)
    made.drop(torch.zeros(OUT, dtype=torch.bool))
    assert not torch.allclose(made(x), before)
    made.drop(torch.ones(OUT, dtype=torch.bool))
    assert torch.equal(made(x), before)


def test_the_gate_of_a_dropped_row_is_still_felt():
    """Its gradient is that of the row's share in the output, whether the row is in it now or not."""
    made, _ = layer(frozen=True)
    made.drop(torch.arange(OUT) < 3)
    x, towards = torch.randn(2, 4, IN, dtype=torch.float64), torch.randn(2, 4, OUT, dtype=torch.float64)
    (made.train()(x) * towards).sum().backward()
    wanted = (towards * (x @ made.rest.detach().T)).sum((0, 1))
    torch.testing.assert_close(made.gate.grad, wanted, rtol=1e-12, atol=1e-12)


def test_a_frozen_rest_in_half_precision_is_not_kept_converted():
    made, _ = layer(frozen=True, dtype=torch.float32)
    made.rest.data = made.rest.data.bfloat16()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        made.train()(torch.randn(3, IN)).sum().backward()
    sizes = [t for t in saved if t.numel() == OUT * IN]
    assert sizes
    assert all(t.dtype == torch.bfloat16 for t in sizes)
    assert made.right.grad.dtype == torch.float32


def test_under_autocast():
    made, _ = layer(frozen=True, dtype=torch.float32)
    x = torch.randn(3, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = made.train()(x)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, (made.left @ made.right + made.rest).sum(0).expand(3, -1), rtol=0.1, atol=0.1)
    cut_rows(kept_only(made, [1, 2]))
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x).shape == (3, OUT)
