"""Every way to bias attention against the definition, in float64 where the way allows it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tenfold.kernels.biased import KeyBias, attention_with_lse, biased_mask, merge_parts, split_heads, with_key_channel

SCALE = 0.37


def problem(dtype=torch.float64, queries=12, keys=12, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw(2, 6, queries, 8), draw(2, 2, keys, 8), draw(2, 2, keys, 8)


def definition(query, key, value, mask, values, heads):
    """Probabilities by the formula, heads one by one."""
    query, key, value = query.double(), key.double(), value.double()
    output = query.new_zeros(*query.shape[:3], value.shape[3])
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head // 3].transpose(1, 2) * SCALE
        if head in heads:
            scores = scores + values.double()[:, None, :]
        output[:, head] = scores.masked_fill(~mask[:, 0], -torch.inf).softmax(-1) @ value[:, head // 3]
    return output


def strengths(keys=12):
    """Row 0: two strengths on three keys, row 1: one key; the rest is log 0.01."""
    values = torch.full((2, keys), math.log(0.01))
    values[0, 3:5], values[0, 7], values[1, 9] = 0.0, math.log(3.0), 0.0
    raised = torch.tensor([[3, 4, 7], [9, -1, -1]])
    return KeyBias(torch.tensor([0, 2, 4]), values, raised, torch.full((2,), math.log(0.01)), first=3)


def causal(queries=12, keys=12):
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None].expand(2, 1, -1, -1)


def padded():
    mask = causal().clone()
    mask[1, :, :, :4] = False
    mask[1, :, :4, 0] = True  # as transformers does, rows of padding look at something
    return mask


MASKS = {"causal": (None, causal()), "boolean": (padded(), padded())}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_every_way_equals_the_definition(mask, dtype, tolerance):
    query, key, value = problem(dtype)
    given, visible = MASKS[mask]
    bias = strengths()
    wanted = definition(query, key, value, visible, bias.values, {0, 2, 4})
    wide = [part.repeat_interleave(3, 1) for part in (key, value)]

    dense = biased_mask(given, bias.dense(6, dtype), 12, 12)
    by_mask = scaled_dot_product_attention(query, *wide, attn_mask=dense, scale=SCALE)
    merged = merge_parts(query, key, value, given, SCALE, bias)
    plain = scaled_dot_product_attention(query, *wide, attn_mask=visible, scale=SCALE)
    split = split_heads(plain, query, key, value, given, SCALE, bias)
    q, k, v = with_key_channel(query, key, value, SCALE, bias)
    k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
    channel = scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=SCALE)[..., :8]

    # log 0.01 itself is stored in float32, so the definition uses that value too
    for found in (by_mask, merged, split, channel):
        assert (found.double() - wanted).abs().max() < tolerance


def test_merge_leaves_earlier_queries_and_other_heads_exactly_alone():
    query, key, value = problem(torch.float32)
    plain = attention_with_lse(query, key, value, None, SCALE)[0]
    merged = merge_parts(query, key, value, None, SCALE, strengths())
    assert torch.equal(merged[:, :, :3], plain[:, :, :3])
    assert torch.equal(merged[:, [1, 3, 5]], plain[:, [1, 3, 5]])
    assert torch.equal(merged[1, :, :9], plain[1, :, :9])  # row 1 sees its first raised key at query 9
    assert not torch.equal(merged[0, 0, 3:], plain[0, 0, 3:])


def test_merge_needs_no_raised_key_of_the_call():
    """Chunked prefill before the mark: the raised keys lie beyond the keys of this call."""
    query, key, value = problem(torch.float32, queries=3, keys=3)
    bias = strengths().first_keys(3)
    plain = attention_with_lse(query, key, value, None, SCALE)[0]
    assert torch.equal(merge_parts(query, key, value, None, SCALE, bias), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("queries", [1, 5])
def test_normaliser(dtype, queries):
    query, key, value = problem(dtype, queries=queries)
    mask = causal(queries)
    output, lse = attention_with_lse(query, key, value, mask, SCALE)
    scores = query.double() @ key.repeat_interleave(3, 1).double().transpose(2, 3) * SCALE
    expected = scores.masked_fill(~mask, -torch.inf).logsumexp(-1)
    assert (lse.double() - expected).abs().max() < (1e-12 if dtype == torch.float64 else 1e-5)
    wanted = definition(query, key, value, mask, torch.zeros(2, 12), set())
    assert (output.double() - wanted).abs().max() < (1e-12 if dtype == torch.float64 else 2e-6)


def test_normaliser_of_a_query_that_sees_nothing_is_no_nan():
    query, key, value = problem(torch.float32)
    mask = padded()
    mask[1, :, :4] = False
    bias = strengths()
    for found in (
        *attention_with_lse(query, key, value, mask, SCALE),
        merge_parts(query, key, value, mask, SCALE, bias),
    ):
        assert found.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1e-9, 1e-13])
def test_masks_of_half_precision_stay_finite(dtype, alpha):
    bias = torch.full((1, 2, 1, 3), math.log(alpha), dtype=dtype)
    least = torch.finfo(dtype).min
    additive = torch.tensor([[[[0, least, least], [least, least, least]]]], dtype=dtype)
    for mask in (additive, additive == 0, None):
        found = biased_mask(mask, bias, queries=3 if mask is None else 2, keys=3)
        assert found.isfinite().all()
        assert found.softmax(-1).isfinite().all()
    assert torch.equal(biased_mask(additive, bias, 2, 3)[0, :, 1], torch.full((2, 3), least, dtype=dtype))


def test_two_channels_keep_alpha_in_bfloat16():
    """One channel would round log 0.01 to -4.59375, an alpha of 0.010115."""
    bias = KeyBias(torch.tensor([0]), torch.full((1, 4), math.log(0.01)))
    ones = torch.ones(1, 1, 4, 8, dtype=torch.bfloat16)
    query, key, _ = with_key_channel(0 * ones, ones, ones, 0.125, bias)
    scores = (query.float() @ key.float().transpose(2, 3) * 0.125)[0, 0, 0]
    assert torch.allclose(scores.exp(), torch.full((4,), 0.01), rtol=1e-4)
    assert (query.shape[-1] % 8, query.shape[-1]) == (0, 16)


@pytest.mark.parametrize("size", [4, 20])
def test_values_of_another_size_than_keys(size):
    """Multi-head latent attention: no fused kernel takes it, and those without a mask want one size."""
    query, key, _ = problem(torch.float32)
    value = torch.randn(2, 2, 12, size, generator=torch.Generator().manual_seed(3))
    bias = strengths()
    wanted = definition(query, key, value, causal(), bias.values, {0, 2, 4})
    merged = merge_parts(query, key, value, None, SCALE, bias)
    q, k, v = with_key_channel(query, key, value, SCALE, bias)
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
    channel = scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)[..., :size]
    for found in (merged, channel):
        assert (found.double() - wanted).abs().max() < 2e-6


def test_weights_scale_each_head_of_each_row():
    bias = KeyBias(torch.tensor([0, 2]), torch.ones(2, 3), weights=torch.tensor([[1.0, 0.5], [0.0, 2.0]]))
    assert torch.equal(bias.dense(3, torch.float32)[:, :, 0, 0], torch.tensor([[1.0, 0, 0.5], [0, 0, 2.0]]))


@pytest.mark.parametrize("queries", [1, 12])
def test_target_mass_is_hit_where_the_plain_share_is_lower(queries):
    """The share itself is read off with values that are 1 on the marked keys and 0 elsewhere."""
    query, key, _ = problem(torch.float32, queries=queries)
    raised = torch.tensor([[0, 1], [1, -1]])
    value = torch.zeros(2, 2, 12, 8)
    value[0, :, :2], value[1, :, 1] = 1.0, 1.0
    zero = torch.zeros(2)
    bias = KeyBias(torch.tensor([0, 1, 4]), torch.zeros(2, 12), raised, zero, target=0.4)
    plain = attention_with_lse(query, key, value, None, SCALE)[0][..., 0]
    share = merge_parts(query, key, value, None, SCALE, bias)[..., 0]
    raised_rows = plain[:, [0, 1, 4]].clamp(min=0.4)
    start = 1 if queries > 1 else 0  # the first query sees itself alone: its share is 0 or 1
    assert torch.allclose(share[:, [0, 1, 4], start:], raised_rows[:, :, start:], atol=1e-5)
    assert torch.equal(share[:, [2, 3, 5]], plain[:, [2, 3, 5]])
