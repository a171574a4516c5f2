"""Tiles where weights are not made by a plain softmax, and where a key or value is not finite."""

import pytest
import torch

from tenfold.kernels import local
from tenfold.kernels.local import AttentionWindow, Softmax, dense_attention, local_attention

SPANS = [
    AttentionWindow("sliding", 1),
    AttentionWindow("sliding", 5),
    AttentionWindow("sliding", 5, sinks=2),
    AttentionWindow("sliding", 200),
    AttentionWindow("block", 8, 0),
    AttentionWindow("block", 8, 1),
    AttentionWindow("block", 8, 1, sinks=3),
    AttentionWindow("block", 160, 1),
]
SOFTMAXES = {"softcap": (2.0, False), "sink": (None, True), "both": (2.0, True)}


def inputs(queries, keys, dtype=torch.float64, batch=2):
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    q = torch.randn(batch, 6, queries, 16, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, batch, 2, keys, 16, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (q, k, v)]


def expected(q, k, v, span, softcap, sink, positions=None):
    """One query after the other, by the definition: ``exp`` over what it sees, and the sink in the denominator."""
    keys, queries = k.shape[2], q.shape[2]
    positions = torch.arange(keys).expand(len(q), -1) if positions is None else positions
    out = torch.zeros_like(q)
    for row in range(len(q)):
        for query in range(queries):
            place = keys - queries + query
            seen = (positions[row] >= 0) & span.sees(positions[row, place], positions[row])
            seen &= torch.arange(keys) <= place
            if positions[row, place] < 0 or not seen.any():
                continue
            for head in range(q.shape[1]):
                scores = k[row, head // 3, seen] @ q[row, head, query] * 0.3
                scores = scores if softcap is None else softcap * (scores / softcap).tanh()
                weights = scores.exp()
                rest = 0 if sink is None else sink[head].exp()
                out[row, head, query] = weights @ v[row, head // 3, seen] / (weights.sum() + rest)
    return out


@pytest.mark.parametrize("kind", SOFTMAXES)
@pytest.mark.parametrize("span", SPANS, ids=str)
def test_caps_and_sinks_are_those_of_the_definition(span, kind):
    softcap, with_sink = SOFTMAXES[kind]
    sink = torch.linspace(-2, 3, 6, dtype=torch.float64) if with_sink else None
    softmax = Softmax(0.3, softcap, sink)
    padded = (torch.arange(37) - torch.tensor([[0], [11]])).clamp(min=-1)
    for queries, positions in ((37, None), (37, padded), (1, None), (5, None), (5, padded)):
        q, k, v = inputs(queries, 37)
        wanted = expected(q, k, v, span, softcap, sink, positions)
        torch.testing.assert_close(local_attention(q, k, v, span, softmax, positions), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_a_few_capped_tiles_at_once_are_all_of_them(span, monkeypatch):
    q, k, v = inputs(129, 129)
    softmax = Softmax(0.3, 2.0, torch.linspace(-1, 1, 6))
    whole = local_attention(q, k, v, span, softmax)
    monkeypatch.setattr(local, "CHUNK", 1)
    torch.testing.assert_close(local_attention(q, k, v, span, softmax), whole, atol=1e-12, rtol=0)


def test_gradients_reach_the_sink():
    q, k, v = (x[:, :, :, :2].clone().requires_grad_() for x in inputs(9, 9, batch=1))
    sink = torch.linspace(-1, 1, 6, dtype=torch.float64).requires_grad_()

    def found(q, k, v, sink):
        return local_attention(q, k, v, AttentionWindow("block", 4, 1), Softmax(0.5, 3.0, sink))

    assert torch.autograd.gradcheck(found, (q, k, v, sink))


def test_half_precision_weights_are_made_in_single():
    q, k, v = inputs(40, 40)
    softmax = Softmax(0.3, 5.0, torch.linspace(-1, 1, 6, dtype=torch.float64))
    wanted = local_attention(q, k, v, AttentionWindow("sliding", 7), softmax)
    half = [x.bfloat16() for x in (q, k, v)]
    found = local_attention(*half, AttentionWindow("sliding", 7), softmax)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, atol=4e-2, rtol=0)


def test_weights_of_dense_attention():
    q, k, v = inputs(7, 9)
    seen = torch.ones(7, 9, dtype=torch.bool).tril(2)
    seen[0] = False
    output, weights = dense_attention(q, k, v, seen, Softmax(0.3, None, torch.zeros(6)))
    assert not output[:, :, 0].any()
    assert not weights[:, :, ~seen].any()
    torch.testing.assert_close(weights @ v.repeat_interleave(3, 1), output)
    assert bool((weights[:, :, 1:].sum(-1) < 1).all())  # the sink has the rest


@pytest.mark.parametrize("softmax", [Softmax(0.3), Softmax(0.3, 2.0)], ids=["plain", "capped"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["key", "value"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("span", SPANS, ids=str)
def test_what_is_not_finite_reaches_those_who_see_it_alone(span, padded, part, bad, softmax):
    """0 times NaN is NaN: a tile holds keys that some of its queries do not see."""
    q, k, v = inputs(61, 61, torch.float32)
    positions = torch.arange(61) - torch.tensor([[0], [7 if padded else 0]])
    positions = positions.clamp(min=-1)
    given = positions if padded else None
    whole = local_attention(q, k, v, span, softmax, given)
    for place in (0, 20, 36, 60):
        changed = {"key": k.clone(), "value": v.clone()}
        changed[part][1, 0, place, 3] = bad
        found = local_attention(q, changed["key"], changed["value"], span, softmax, given)
        at = positions[1, place]
        sees = span.sees(positions[1], at) & (at >= 0) & (positions[1] >= 0)
        hit = torch.zeros_like(found, dtype=torch.bool)
        channels = slice(None) if part == "key" else slice(3, 4)
        hit[1, :3, :, channels] = sees[:, None]
        assert torch.equal(found.isnan(), hit)
        torch.testing.assert_close(found[~hit], whole[~hit], atol=1e-6, rtol=0)


def test_large_numbers_are_no_reason_to_look_twice(monkeypatch):
    q, k, v = inputs(40, 40, torch.float16)
    ways = []
    monkeypatch.setattr(local, "_on_finite", lambda *given: ways.append(given) or given[0])
    local_attention(q, k + 6e4 - 1e3, v, AttentionWindow("sliding", 7), 0.3)
    assert len(ways) == 1
