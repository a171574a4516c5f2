"""Attention in tiles against a mask of all pairs: every pattern, padding, packing, pieces, gradients."""

import itertools

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tenfold.kernels import local
from tenfold.kernels.local import AttentionWindow, local_attention

SPANS = [
    *(AttentionWindow("block", size, previous) for size in (1, 8, 16, 33) for previous in (0, 1, 2)),
    *(AttentionWindow("sliding", size) for size in (1, 2, 8, 16, 33)),
    AttentionWindow("sliding", 130),
    AttentionWindow("block", 130, 1, 3),
    *(AttentionWindow("block", 8, previous, 4) for previous in (0, 1)),
    *(AttentionWindow("sliding", size, sinks=sinks) for size in (3, 16) for sinks in (1, 5)),
]


def inputs(queries, keys, batch=2, dtype=torch.float32, channels=16):
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    q = torch.randn(batch, 6, queries, channels, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, batch, 2, keys, channels, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (q, k, v)]


def dense(q, k, v, span, scale, positions=None, documents=None):
    keys, queries = k.shape[2], q.shape[2]
    positions = torch.arange(keys).expand(len(q), -1) if positions is None else positions
    documents = torch.zeros_like(positions) if documents is None else documents
    i, j = positions[:, keys - queries :, None], positions[:, None]
    seen = span.sees(i, j) & (j >= 0) & (documents[:, keys - queries :, None] == documents[:, None])
    # With padding the array order is that of positions within a document, so causality by position is enough.
    k, v = (x.repeat_interleave(3, 1) for x in (k, v))
    some = seen.any(-1, keepdim=True)[:, None]
    output = scaled_dot_product_attention(q, k, v, attn_mask=(seen[:, None] | ~some), scale=scale)
    return output.masked_fill(~some, 0)


@pytest.mark.parametrize("n", [1, 37, 64, 100, 129, 300])
@pytest.mark.parametrize("span", SPANS, ids=str)
def test_whole_rows(span, n):
    q, k, v = inputs(n, n)
    torch.testing.assert_close(local_attention(q, k, v, span, 0.3), dense(q, k, v, span, 0.3), atol=2e-6, rtol=0)
    half = [x.bfloat16() for x in (q, k, v)]
    found = local_attention(*half, span, 0.3)
    torch.testing.assert_close(found.float(), dense(q, k, v, span, 0.3), atol=4e-2, rtol=0)


@pytest.mark.parametrize("queries", [1, 2, 7, 16, 40])
@pytest.mark.parametrize("span", SPANS, ids=str)
def test_the_last_queries_of_a_longer_row(span, queries):
    q, k, v = inputs(queries, 61)
    torch.testing.assert_close(local_attention(q, k, v, span, 0.3), dense(q, k, v, span, 0.3), atol=2e-6, rtol=0)


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_padding_shifts_no_block(span):
    q, k, v = inputs(50, 50)
    positions = torch.stack([torch.arange(50), torch.arange(50) - 11])
    positions = positions.masked_fill(positions < 0, -1)
    found = local_attention(q, k, v, span, 0.3, positions)
    torch.testing.assert_close(found, dense(q, k, v, span, 0.3, positions), atol=2e-6, rtol=0)
    alone = local_attention(*(x[1:, :, 11:] for x in (q, k, v)), span, 0.3)
    torch.testing.assert_close(found[1:, :, 11:], alone, atol=2e-6, rtol=0)
    assert not found[1, :, :11].any()


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_packed_documents_are_apart(span):
    q, k, v = inputs(57, 57, batch=1)
    lengths = (20, 3, 34)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    documents = torch.cat([torch.full((n,), number) for number, n in enumerate(lengths)])[None]
    found = local_attention(q, k, v, span, 0.3, positions, documents)
    parts = [local_attention(*x, span, 0.3) for x in zip(*(y.split(lengths, 2) for y in (q, k, v)), strict=True)]
    torch.testing.assert_close(found, torch.cat(parts, 2), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    "span",
    [
        AttentionWindow("block", 4, 0),
        AttentionWindow("block", 4, 1),
        AttentionWindow("sliding", 3),
        AttentionWindow("sliding", 3, sinks=2),
    ],
    ids=str,
)
def test_gradients(span):
    q, k, v = (x.requires_grad_() for x in inputs(9, 9, batch=1, dtype=torch.float64, channels=2))
    assert torch.autograd.gradcheck(lambda *x: local_attention(*x, span, 0.5), (q, k, v))


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_a_few_tiles_at_once_are_all_of_them(span, monkeypatch):
    q, k, v = inputs(129, 129)
    whole = local_attention(q, k, v, span, 0.3)
    monkeypatch.setattr(local, "CHUNK", 1)
    torch.testing.assert_close(local_attention(q, k, v, span, 0.3), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("span", "n"), [*itertools.product(SPANS, [1, 10, 37])], ids=str)
def test_pairs_are_those_of_the_mask(span, n):
    plain = AttentionWindow(span.pattern, span.size, span.previous)
    index = torch.arange(n)
    assert plain.pairs(n) == int(plain.sees(index[:, None], index).sum())


@pytest.mark.parametrize("queries", [1, 5, 40, 150])
@pytest.mark.parametrize("span", SPANS, ids=str)
def test_keys_that_no_query_sees_may_be_left_out(span, queries):
    q, k, v = inputs(queries, 450)
    pads = torch.tensor([0, 9])
    positions = torch.arange(450) - pads[:, None]
    places = torch.cat(
        [pads[:, None] + torch.arange(span.sinks), torch.arange(450 - queries - span.reach, 450).expand(2, -1)], 1
    )
    kept = [x.take_along_dim(places[:, None, :, None], 2) for x in (k, v)]
    found = local_attention(q, *kept, span, 0.3, positions.gather(1, places))
    expected = dense(q, k, v, span, 0.3, positions)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
