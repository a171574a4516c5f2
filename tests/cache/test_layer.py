"""What all layers of our caches do alike: rows are chosen and repeated, tokens taken back, handles read."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from transformers import AttentionInterface

from tenfold import gear
from tenfold.attend.attention import attention, installed, reader
from tenfold.attend.handle import CacheHandle
from tenfold.cache.gear.layer import GearLayer
from tenfold.cache.layer import ExactLayer
from tenfold.cache.span_layers import HeadSpanLayer, SpanLayer
from tenfold.config.gear import CacheConfig
from tenfold.kernels.biased import KeyBias
from tenfold.kernels.local import FULL, AttentionWindow
from tenfold.models.tiny import tiny_model

NEAR = AttentionWindow("sliding", 64, sinks=2)
PACKED = CacheConfig(bits=4, buffer=8, kernel="torch")
LAYERS = {
    "exact": partial(ExactLayer, 0),
    "span": partial(SpanLayer, NEAR, 0, lambda: True),
    "heads": partial(HeadSpanLayer, {FULL: [1], NEAR: [0, 2]}, 0, lambda: True),
    "gear": partial(GearLayer, PACKED, 0, lambda: True),
    "bare": partial(GearLayer, PACKED, 0, lambda: False),
}


def tokens(count, rows=3, seed=0):
    return torch.randn(2, rows, 3, count, 16, generator=torch.Generator().manual_seed(seed))


def dense(handed):
    """Whole tensors of what a layer hands over."""
    return torch.stack(handed[0].dense() if isinstance(handed[0], CacheHandle) else handed)


def filled(kind):
    layer = LAYERS[kind]()
    dense(layer.update(*tokens(30)))
    return layer


def held(layer):
    """What a further call attends to, without its own tokens."""
    found = dense(layer.update(*tokens(0, rows=len(layer_rows(layer)))))
    assert found.shape[3] == layer.get_seq_length()
    return found


def layer_rows(layer):
    if isinstance(layer, HeadSpanLayer):
        return layer.parts[0][1].keys
    return layer.buffer[0] if isinstance(layer, GearLayer) else layer.keys


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_and_tokens(kind):
    """On every layer: exactly what the same does to a tensor of all tokens, packed ones as they were stored."""
    whole = held(filled(kind))
    if kind not in ("gear", "bare"):
        assert torch.equal(whole, tokens(30))
    index = torch.tensor([2, 0, 2])
    for act, expected in {
        "batch_select_indices": whole[:, index],
        "reorder_cache": whole[:, index],
        "batch_repeat_interleave": whole.repeat_interleave(2, 1),
        "crop": whole[:, :, :, :27],
    }.items():
        layer = filled(kind)
        getattr(layer, act)({"batch_repeat_interleave": 2, "crop": -3}.get(act, index))
        assert torch.equal(held(layer), expected), act
    layer = filled(kind)
    for tokens_to_remove, message in ((1, "negative"), (-31, "has 30 tokens")):
        with pytest.raises(ValueError, match=message):
            layer.crop(tokens_to_remove)
    assert LAYERS[kind]().crop(-5) is None  # a layer that shares another's keys has none of its own
    assert layer.get_mask_sizes(4) == (34, 0)


@pytest.mark.parametrize("kind", LAYERS)
def test_taking_back_a_call(kind):
    layer = filled(kind)
    before = layer.mark()
    whole = held(filled(kind))
    dense(layer.update(*tokens(20, seed=1)))
    layer.take_back(before)
    assert torch.equal(held(layer), whole)
    fresh = LAYERS[kind]()
    before = fresh.mark()
    dense(fresh.update(*tokens(20, seed=1)))
    fresh.take_back(before)
    assert not fresh.is_initialized
    assert fresh.get_seq_length() == 0


def packed_handle(commits=None):
    layer = filled("gear")
    handle, _ = layer.update(*tokens(6, seed=2))
    assert layer.packed
    return layer, handle


def test_a_handle_stays_what_it_is_and_the_cache_packs_once():
    layer, handle = packed_handle()
    before, module = layer.packed_tokens, nn.Module()
    assert layer.buffer[0].shape[2] >= PACKED.buffer  # a block is due, and nothing packs it before attention
    query = torch.randn(3, 6, 6, 16)
    first, after = handle.attend(module, query, None), layer.packed_tokens
    assert after == before + PACKED.buffer
    assert torch.equal(handle.attend(module, query, None), first)
    assert layer.packed_tokens == after
    assert handle.tokens == layer.get_seq_length() == 36


@pytest.mark.parametrize("queries", [6, 24])
@pytest.mark.parametrize("padded", [False, True])
def test_biases_that_end_at_a_query_end_there_on_packed_blocks(queries, padded):
    """Against attention written out in float64: up to its row a query is biased, from there on it is not."""
    layer = filled("gear")
    handle, _ = layer.update(*tokens(queries, seed=2))
    assert not handle.exact
    total = 30 + queries
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(3, 6, queries, 16, generator=generator)
    seen = torch.ones(queries, total, dtype=torch.bool).tril(total - queries).expand(3, 1, -1, -1).clone()
    if padded:
        seen[1, :, :, :9] = False
    keys, values = (x.double().repeat_interleave(2, 1) for x in handle.view.tensors())
    scores = query.double() @ keys.mT * 0.25
    biases = []
    for heads, until in (([0, 3], [2, 0, queries]), ([3, 4], None)):
        bias = torch.randn(3, total, generator=generator)
        ends = None if until is None else torch.tensor(until)
        biases.append(KeyBias(torch.tensor(heads), bias, until=ends))
        for row in range(3):
            rows = slice(queries if until is None else until[row])
            for head in heads:
                scores[row, head, rows] += bias[row].double()
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values
    given = {"base": "sdpa", "key_bias": tuple(biases), "scaling": 0.25}
    found, _ = attention(nn.Module(), query, handle, handle, seen if padded else None, **given)
    torch.testing.assert_close(found.transpose(1, 2).double(), expected, atol=1e-5, rtol=0)


def test_whether_attention_reads_handles_is_asked_of_the_model():
    """A function that is not ours gets tensors, whatever its name is; ours gets handles."""
    model = tiny_model("llama").model
    got = []

    def other(module, query, key, value, mask, **arguments):
        got.append(type(key))
        return query.transpose(1, 2), None

    AttentionInterface.register("tenfold_other", other)
    try:
        model.config._attn_implementation = "tenfold_other"
        assert reader(model.config) is None
        with torch.no_grad():
            model(torch.arange(40)[None], past_key_values=gear.GearCache(model.config, "gear:4"))
        assert got == [torch.Tensor, torch.Tensor]
    finally:
        model.config._attn_implementation = "sdpa"
        AttentionInterface._global_mapping.pop("tenfold_other")
    assert reader(model.config) is None
    with installed(model):
        assert reader(model.config) is not None
        cache = gear.GearCache(model.config, "gear:4")
        assert isinstance(cache.update(*tokens(3), 0)[0], CacheHandle)
