"""Attention with a bias per (batch, head, key): the softmax of ``scores + mask + u`` where ``u`` ignores the query.

A dense mask says it all but costs ``[batch, heads, queries, keys]`` and the fused kernel. Three cheaper ways are exact:

* `merge` corrects the plain result by what a few keys add to it (PASTA's specification calls it the LSE merge),
* `split_heads` computes again only the heads that have a bias,
* `with_key_channel` hides the bias in one more pair of channels, for kernels that take no bias at all.

`biased_attention` chooses among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tenfold.errors import ModelError

BLOCK = 2**20
"""Scores that `merge` holds at once."""
FLASH_CHANNELS = 256
"""Most channels of a head that flash kernels take."""

Attention = Callable[..., tuple[Tensor, Tensor | None]]
"""From query, key, value and mask, and perhaps ``scaling=`` or ``position_bias=``, to an output ``[batch, queries,
heads, head_dim]`` and weights or None, as attention functions of transformers do."""


@dataclass(frozen=True)
class KeyBias:
    """Log-strengths of keys for some heads of a layer.

    Args:
        heads: query heads that are biased, ``[n]``, int64.
        values: ``u``, ``[batch, keys]``, float32; finite.
        raised: where ``values`` lies above ``floor``, as indices ``[batch, m]``, int64, filled up with -1; None where
            they are too many for `merge` or not known.
        floor: the smallest of ``values`` in each row, ``[batch]``, float32; None as ``raised``.
        target: instead of a fixed strength, the share of attention that the raised keys shall have in every query that
            sees one, between 0 and 1; ``values`` are then 0 and `merge` is the only way.
        limit: the largest bias that ``target`` may ask for.
        first: no query of this call before this index sees a raised key.
        weights: factors of ``values`` for each head, ``[n]`` or ``[batch, n]``; None is 1. Only `dense` and
            `with_key_channel` know them.
        until: queries of this call from this index on are not biased, by row, ``[batch]``, int64; None for all are.
            `in_parts` turns such a bias into some without.
    """

    heads: Tensor
    values: Tensor
    raised: Tensor | None = None
    floor: Tensor | None = None
    target: float | None = None
    limit: float = 10.0
    first: int = 0
    weights: Tensor | None = None
    until: Tensor | None = None

    def dense(self, heads: int, dtype: torch.dtype) -> Tensor:
        """``u`` for every head of a layer, 0 for those without bias: ``[batch, heads, 1, keys]``."""
        chosen = self.values.new_zeros(len(self.values), heads)
        given = self.values.new_ones(len(self.heads)) if self.weights is None else self.weights
        chosen = chosen.index_copy(1, self.heads, given.expand(len(self.values), -1))
        return (self.values[:, None, None, :] * chosen[:, :, None, None]).to(dtype)

    def first_keys(self, keys: int) -> KeyBias:
        """The same for the first so many keys."""
        return replace(self, values=self.values[:, :keys])


def biased_attention(
    base: str,
    plain: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    key_bias: tuple[KeyBias, ...],
    *,
    dropout: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention with biases of keys, in the fastest exact way that an implementation allows.

    Args:
        base: the implementation: ``sdpa``, a name with ``flash`` in it, ``flex_attention``, or one that adds its mask.
        plain: attention without biases, by that implementation.
        query: ``[batch, heads, queries, head_dim]``.
        key: ``[batch, kv_heads, keys, head_dim]``.
        value: as ``key``, but for the size of its heads, which may be another.
        mask: as that implementation takes it.
        scale: factor of the scores.
        key_bias: one or more, none with ``until`` (see `in_parts`); they add up. One with ``target`` stands alone.
        dropout: whether ``plain`` drops weights: only a mask brings a bias in then.

    Returns:
        Output ``[batch, queries, heads, head_dim]``, and the weights where ``plain`` gives them.

    Raises:
        ModelError: heads that with their bias are wider than flash kernels take.
    """
    if base == "sdpa" or key_bias[0].target is not None:
        return _on_sdpa(plain, query, key, value, mask, scale, key_bias, dropout=dropout), None
    if "flash" in base:
        size = value.shape[-1]
        for bias in key_bias:
            query, key, value = with_key_channel(query, key, value, scale, bias)
        _check_channels(base, query.shape[-1])
        output, weights = plain(query, key, value, mask, scaling=scale)
        return output[..., :size].contiguous(), weights
    dense, queries, keys = sum_biases(key_bias, query), query.shape[2], key.shape[2]
    if base == "flex_attention":
        return plain(query, key, value, mask, position_bias=dense.expand(-1, -1, queries, -1))
    mask = None if mask is None else mask[..., :keys]
    return plain(query, key, value, biased_mask(mask, dense, queries, keys))


def _on_sdpa(
    plain: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    key_bias: tuple[KeyBias, ...],
    *,
    dropout: bool,
) -> Tensor:
    queries = query.shape[2]
    if mask is None and 1 < queries < key.shape[2]:  # the first prefill of a static cache: the rest is not written yet
        key, value = key[:, :, :queries], value[:, :, :queries]
        key_bias = tuple(bias.first_keys(queries) for bias in key_bias)
    bias = key_bias[0]
    simple = len(key_bias) == 1 and bias.weights is None and not dropout and not torch.compiler.is_compiling()
    if bias.target is not None or (simple and queries > 1 and bias.raised is not None and has_fused(query, key, value)):
        return merge_parts(query, key, value, mask, scale, bias).transpose(1, 2).contiguous()
    if simple and queries > 1 and len(bias.heads) < query.shape[1]:
        output = plain(query, key, value, mask)[0].transpose(1, 2)
        return split_heads(output, query, key, value, mask, scale, bias).transpose(1, 2).contiguous()
    dense = biased_mask(mask, sum_biases(key_bias, query), queries, key.shape[2])
    return plain(query, key, value, dense.contiguous())[0]


def _check_channels(base: str, channels: int) -> None:
    """Raise where the channels of heads and bias are more than a flash kernel takes."""
    if channels > FLASH_CHANNELS:
        raise ModelError(
            f"with its bias a head has {channels} channels, and {base} takes up to {FLASH_CHANNELS}",
            remedy="open the model with attn_implementation='sdpa'",
        )


def sum_biases(key_bias: tuple[KeyBias, ...], query: Tensor) -> Tensor:
    """All biases of a layer together: ``[batch, heads, 1, keys]`` in the dtype of ``query``."""
    parts = [bias.dense(query.shape[1], query.dtype) for bias in key_bias]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def in_parts(
    key_bias: tuple[KeyBias, ...], attend: Callable[[tuple[KeyBias, ...]], tuple[Tensor, Tensor | None]]
) -> tuple[Tensor, Tensor | None]:
    """Attention where some biases end at a query: computed with and without them, each query from where it belongs.

    Args:
        key_bias: biases, some with ``until``.
        attend: from biases without it to an output ``[batch, queries, heads, head_dim]`` and weights ``[batch, heads,
            queries, keys]`` or None.
    """
    for index, bias in enumerate(key_bias):
        if bias.until is not None:
            before, after = key_bias[:index], key_bias[index + 1 :]
            biased, weights = in_parts((*before, replace(bias, until=None), *after), attend)
            plain, plain_weights = in_parts((*before, *after), attend)
            here = torch.arange(biased.shape[1], device=biased.device) < bias.until[:, None]
            if weights is not None and plain_weights is not None:
                weights = torch.where(here[:, None, :, None], weights, plain_weights)
            return torch.where(here[..., None, None], biased, plain), weights
    return attend(key_bias)


def biased_mask(mask: Tensor | None, bias: Tensor, queries: int, keys: int) -> Tensor:
    """One additive mask from a mask and a bias.

    The two are combined by selection, not by addition: in float16 ``finfo.min`` plus a bias overflows to -inf, and a
    row of nothing but -inf becomes NaN (PASTA specification, section 2.7).

    Args:
        mask: boolean (True where a query may look), additive, or None: causal where there are several queries.
        bias: ``[batch, heads, 1, keys]``, floating.
        queries: number of queries.
        keys: number of keys.

    Returns:
        ``[batch, heads, queries or 1, keys]`` in the dtype of ``bias``.

    >>> biased_mask(None, torch.tensor([[[[0.5, 0.25]]]]), queries=2, keys=2)[0, 0]
    tensor([[ 5.0000e-01, -3.4028e+38],
            [ 5.0000e-01,  2.5000e-01]])
    """
    least = torch.finfo(bias.dtype).min
    if mask is None:
        if queries == 1:
            return bias
        mask = bias.new_ones(queries, keys, dtype=torch.bool).tril()
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, least)
    # Adding to what is masked already would overflow; what is masked stays as it is.
    return torch.where(mask <= least / 2, mask.to(bias.dtype), mask.to(bias.dtype) + bias)


def attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention and the logarithm of its normaliser.

    Args:
        query: ``[batch, heads, queries, head_dim]``.
        key: ``[batch, kv_heads, keys, head_dim]``; ``kv_heads`` divides ``heads``.
        value: as ``key``, but for the size of its heads, which may be another.
        mask: as in `biased_mask`, with 1 or ``heads`` heads.
        scale: factor of the scores.

    Returns:
        Output ``[batch, heads, queries, head_dim]`` and log-sum-exp of the masked scores ``[batch, heads, queries]``,
        float32 (float64 for float64 inputs). A query that sees no key gives 0 and any finite value.

    >>> one = torch.zeros(1, 1, 3, 8)
    >>> attention_with_lse(one, one, one, None, 1.0)[1].exp()
    tensor([[[1., 2., 3.]]])
    """
    causal = mask is None and query.shape[2] > 1
    if has_fused(query, key, value):
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)  # as sdpa itself does
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, lse = fused(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
        return output, lse
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = (query @ key.transpose(2, 3)).to(exact) * scale
    scores = scores + biased_mask(mask, scores.new_zeros(1, 1, 1, key.shape[2]), query.shape[2], key.shape[2])
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(value.dtype) @ value, lse


def merge_parts(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, bias: KeyBias) -> Tensor:
    r"""Biased attention from the plain one: few keys are raised above the floor, and those are added once more.

    With :math:`Z` the normaliser of the plain scores and :math:`c_j = e^{u_j} - e^{u_0}` for the raised keys,
    :math:`O = (e^{u_0} Z O_{plain} + \sum_j c_j e^{s_j} v_j) / (e^{u_0} Z + \sum_j c_j e^{s_j})`. All weights are
    positive, so nothing cancels. PASTA specification, section 8.1, for any number of strengths.

    Args:
        query: ``[batch, heads, queries, head_dim]``.
        key: ``[batch, kv_heads, keys, head_dim]``.
        value: as ``key``.
        mask: as in `attention_with_lse`.
        scale: factor of the scores.
        bias: with ``raised`` and ``floor``; queries before its ``first`` get exactly the plain result.

    Returns:
        ``[batch, heads, queries, head_dim]``.
    """
    output, lse = attention_with_lse(query, key, value, mask, scale)
    queries, keys, first = query.shape[2], key.shape[2], bias.first
    if first >= queries:
        return output
    assert bias.raised is not None
    assert bias.floor is not None
    groups = query.shape[1] // key.shape[1]
    inside = (bias.raised >= 0) & (bias.raised < keys)
    index = bias.raised.where(inside, 0)
    # [batch, n, m, head_dim]: the raised keys of the heads that are biased
    picked = index[:, None, :, None].expand(-1, len(bias.heads), -1, key.shape[3])
    few_keys = key[:, bias.heads // groups].gather(2, picked)
    few_values = value[:, bias.heads // groups].gather(2, picked[..., :1].expand(-1, -1, -1, value.shape[3]))
    exact = torch.promote_types(query.dtype, torch.float32)
    added = floor = bias.values.new_zeros(1, 1)
    if bias.target is None:
        strength, floor = bias.values.to(exact).gather(1, index), bias.floor.to(exact)[:, None]
        added = strength + torch.log1p(-torch.exp(floor - strength))  # log(e^u - e^floor)
    visible = _of_heads(mask, bias.heads)
    step = max(64, BLOCK // (picked.shape[0] * picked.shape[1] * max(1, picked.shape[2])))
    for start in range(first, queries, step):
        block = slice(start, min(start + step, queries))
        scores = (query[:, bias.heads, block] @ few_keys.transpose(2, 3)).to(exact) * scale + added[:, None, None, :]
        seen = _sees(visible, index, block, queries) & inside[:, None, None, :]
        scores = torch.where(seen, scores, torch.finfo(exact).min)
        plain_lse = lse[:, bias.heads, block] + floor[:, None]
        few_lse = scores.logsumexp(-1)
        if bias.target is not None:
            few_lse = few_lse + torch.log(torch.expm1(_dose(few_lse - plain_lse, bias.target, bias.limit)))
        few = torch.softmax(scores, -1).to(value.dtype) @ few_values
        share = torch.sigmoid(few_lse - plain_lse)[..., None].to(value.dtype)
        # Where a row sees no raised key its share is exactly 0.
        output[:, bias.heads, block] = torch.lerp(output[:, bias.heads, block], few, share)
    return output


def _dose(log_mass: Tensor, target: float, limit: float) -> Tensor:
    """The bias ``d`` that lifts a share of attention to ``target``; never lowers one.

    A share psi becomes ``psi e^d / (psi e^d + 1 - psi)``, which is ``target`` for
    ``d = logit(target) - logit(psi)`` (PASTA specification, section 8.5).
    """
    mass = log_mass.exp().clamp(max=1 - 1e-6)
    return (math.log(target / (1 - target)) - log_mass + torch.log1p(-mass)).clamp(min=0, max=limit)


def lift(bias: KeyBias, heads: int, scores: Tensor) -> Tensor:
    """The bias that ``target`` asks for, where the scores are written out.

    Args:
        bias: with ``target`` and ``raised``.
        heads: query heads of the layer.
        scores: masked scores ``[batch, heads, queries, keys]``.

    Returns:
        As ``scores``: 0 everywhere but at the raised keys of the biased heads.
    """
    assert bias.raised is not None
    assert bias.target is not None
    keys = scores.shape[-1]
    inside = (bias.raised >= 0) & (bias.raised < keys)
    raised = torch.zeros(len(bias.raised), keys, dtype=torch.int64, device=scores.device)
    raised = raised.scatter_add(1, bias.raised.where(inside, 0), inside.long()) > 0
    few = scores.masked_fill(~raised[:, None, None, :], torch.finfo(scores.dtype).min).logsumexp(-1, keepdim=True)
    dose = _dose(few - scores.logsumexp(-1, keepdim=True), bias.target, bias.limit)
    chosen = torch.zeros(heads, dtype=torch.bool, device=scores.device).index_fill(0, bias.heads, True)
    return torch.where(raised[:, None, None, :] & chosen[None, :, None, None], dose, 0)


def _sees(mask: Tensor | None, index: Tensor, block: slice, queries: int) -> Tensor:
    """Which of the keys ``index`` a block of all queries may look at: ``[batch, 1 or heads, block, m]``."""
    if mask is None and queries == 1:
        return torch.ones_like(index, dtype=torch.bool)[:, None, None, :]
    if mask is None:
        rows = torch.arange(block.start, block.stop, device=index.device)
        return index[:, None, None, :] <= rows[None, None, :, None]
    allowed = mask[:, :, block]
    allowed = allowed if mask.dtype == torch.bool else allowed > torch.finfo(mask.dtype).min / 2
    allowed = allowed.expand(index.shape[0], -1, -1, -1)
    return allowed.gather(3, index[:, None, None, :].expand(-1, *allowed.shape[1:3], -1))


def _of_heads(mask: Tensor | None, heads: Tensor) -> Tensor | None:
    """The part of a mask that concerns some heads: all of it, unless it says something about each head."""
    return mask if mask is None or mask.shape[1] == 1 else mask[:, heads]


def split_heads(
    plain: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, bias: KeyBias
) -> Tensor:
    """The plain result with the biased heads computed again, under a dense mask of their own.

    Args:
        plain: ``[batch, heads, queries, head_dim]``, the result without bias.
        query: ``[batch, heads, queries, head_dim]``.
        key: ``[batch, kv_heads, keys, head_dim]``.
        value: as ``key``.
        mask: as in `attention_with_lse`.
        scale: factor of the scores.
        bias: the heads and the log-strengths.

    Returns:
        ``[batch, heads, queries, head_dim]``.
    """
    groups = query.shape[1] // key.shape[1]
    values = bias.values.to(query.dtype)[:, None, None, :]
    dense = biased_mask(_of_heads(mask, bias.heads), values, query.shape[2], key.shape[2])
    again = scaled_dot_product_attention(
        query[:, bias.heads],
        key[:, bias.heads // groups],
        value[:, bias.heads // groups],
        attn_mask=dense.expand(-1, len(bias.heads), -1, -1),
        scale=scale,
    )
    return plain.index_copy(1, bias.heads, again)


def with_key_channel(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: KeyBias
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values whose plain attention is the biased one, for kernels that take no bias.

    Biased query heads get channels of 1 (or their weight), keys the log-strength over ``scale`` in two parts: the
    second holds what the first lost to rounding, so that bfloat16 keeps alpha to 1e-5 instead of 1 %. All else is
    zeros, up to a multiple of 8, the same for keys and values: such kernels know one size.
    PASTA specification, section 8.2.

    Args:
        query: ``[batch, heads, queries, head_dim]``.
        key: ``[batch, kv_heads, keys, head_dim]``.
        value: as ``key``, but for the size of its heads, which may be another.
        scale: factor of the scores; the caller passes the same one to the kernel.
        bias: the heads and the log-strengths.

    Returns:
        The three with heads of one size, 8 to 15 above the larger; the first channels of the output, as many as
        ``value`` had, are the result.
    """
    widest = max(query.shape[3], value.shape[3])
    wide = widest + 8 + -widest % 8
    wide_query, wide_key, wide_value = (
        torch.nn.functional.pad(part, (0, wide - part.shape[3])) for part in (query, key, value)
    )
    exact = bias.values.double() / scale
    high = exact.to(key.dtype)
    low = (exact - high).to(key.dtype)
    one = torch.ones(1, len(bias.heads), device=query.device) if bias.weights is None else bias.weights
    one = one.to(query.dtype).expand(query.shape[0], -1)[:, :, None, None]
    wide_query[:, bias.heads, :, query.shape[3] : query.shape[3] + 2] = one
    wide_key[..., query.shape[3]] = high[:, None, :]
    wide_key[..., query.shape[3] + 1] = low[:, None, :]
    return wide_query, wide_key, wide_value


def has_fused(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel that returns the normaliser takes these; elsewhere `merge` is slower than a mask.

    It wants heads of one size, which those of multi-head latent attention are not, gives no gradient, and its
    normaliser is single precision.
    """
    learns = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    usual = query.dtype != torch.float64 and query.shape[-1] == value.shape[-1]
    return query.device.type == "cpu" and usual and not learns
