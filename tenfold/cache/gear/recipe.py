"""GEAR's recipe for one block of keys or values: filter, quantise, low rank, difference (specification, 2.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.core.formats import dequantise, half_or_float, pack_codes, quantise
from tenfold.core.low_rank import low_rank
from tenfold.core.outliers import outlier_count, outliers
from tenfold.kernels.packed_blocks import RAW, PackedBlocks

SMALL = 256
"""Lines of up to so many entries have positions of 8 bits."""


@dataclass(frozen=True)
class Format:
    """How one side is packed.

    Args:
        bits: of a code; 16 stores bfloat16 values and nothing else.
        axis: -2 if tokens of a channel share a scale, -1 if channels of a token do.
        group: entries that share one; None is all of them.
        shared: the heads of a token share its scale (KCVT's values).
        rank: of the low-rank part of each head.
        share: of entries that are outliers, of a line.
        loop: rounds of the power iteration; None is the exact decomposition.
    """

    bits: int
    axis: int
    group: int | None = 64
    shared: bool = False
    rank: int = 0
    share: float = 0.0
    loop: int | None = 3


def compress(
    x: Tensor, form: Format, *, lines: int, keep: Tensor | None = None, metadata: torch.dtype | None = None
) -> PackedBlocks:
    """Pack one block.

    Args:
        x: ``[batch, kv_heads, tokens, channels]``, finite where it is kept.
        form: how.
        lines: -2 if outliers are those of a channel (keys), -1 if those of a token (values).
        keep: ``[batch, tokens]``, bool: tokens that anything will ever attend to; the others take part in nothing.
        metadata: dtype of scales, factors and differences; by default float16 where it holds them, else float32.

    Returns:
        The packed block; its ``N`` is 1.

    >>> x = torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(0))
    >>> side = compress(x, Format(bits=4, axis=-2, rank=2, share=0.02), lines=-2)
    >>> bool((side.dense(torch.float32) - x).norm() < 0.1 * x.norm())
    True
    """
    if form.bits == RAW:
        return PackedBlocks(RAW, x.shape[-1], form.axis, 1, lines, x.to(torch.bfloat16).contiguous()[None])
    # A copy of its own: products of views with other strides differ in the last bits (specification, item 6).
    x = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    valid = None if keep is None or bool(keep.all()) else keep[:, None, :, None]
    if valid is not None:
        x = x.masked_fill(~valid, 0)
    count = outlier_count(form.share, x.shape[lines])
    place = outliers(x, count, lines, valid) if count else None
    ordinary = _ordinary(x, place, valid, lines)
    filled = x if ordinary is None else torch.where(ordinary, x, _mean(x, ordinary, lines))
    codes, scale, zero, group = _quantised(filled, form, metadata)
    rest = dequantise(codes, scale, zero, dim=form.axis, group=group, dtype=x.dtype)
    residual = x - rest
    if ordinary is not None:
        residual = residual.masked_fill(~ordinary, 0)
    parts: dict[str, Tensor] = {}
    if form.rank:
        left, right = low_rank(residual, form.rank, form.loop)
        kind = half_or_float(left, right) if metadata is None else metadata
        parts |= {"left": left.to(kind), "right": right.to(kind)}
        rest = rest + parts["left"].to(x.dtype) @ parts["right"].to(x.dtype).mT
    if place is not None:
        delta = (x - rest).gather(lines, place)
        kind = half_or_float(delta) if metadata is None else metadata
        parts |= {"delta": delta.to(kind), "place": place.to(_index_type(x.shape[lines]))}
    parts |= {"codes": pack_codes(codes, form.bits), "scale": scale, "zero": zero}
    stored = {name: part[None].contiguous() for name, part in parts.items()}
    return PackedBlocks(form.bits, x.shape[-1], form.axis, group, lines, **stored)


def _ordinary(x: Tensor, place: Tensor | None, valid: Tensor | None, lines: int) -> Tensor | None:
    """Entries that are neither outliers nor masked, or None for all."""
    if place is None:
        return None if valid is None else valid.expand_as(x)
    mask = torch.ones_like(x, dtype=torch.bool).scatter(lines, place, False)
    return mask if valid is None else mask & valid


def _mean(x: Tensor, ordinary: Tensor, lines: int) -> Tensor:
    """The mean of a line's ordinary entries: a filler that lies within the range, as zeros would not."""
    total = (x * ordinary).sum(lines, keepdim=True)
    return total / ordinary.sum(lines, keepdim=True).clamp(min=1)


def _quantised(x: Tensor, form: Format, metadata: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor, int]:
    length = x.shape[form.axis]
    if form.shared:
        heads = x.shape[1]
        merged = x.transpose(1, 2).flatten(2)[:, None]
        codes, scale, zero = quantise(merged, form.bits, dim=-1, group=merged.shape[-1], metadata=metadata)
        return codes[:, 0].unflatten(-1, (heads, -1)).transpose(1, 2), scale, zero, length
    group = min(form.group or length, length)
    codes, scale, zero = quantise(x, form.bits, dim=form.axis, group=group, metadata=metadata)
    return codes, scale, zero, group


def _index_type(line: int) -> torch.dtype:
    if line <= SMALL:
        return torch.uint8
    return torch.int16 if line < 2**15 else torch.int32


def element_bits(
    form: Format, tokens: int, channels: int, kv_heads: int, *, lines: int, line: int | None = None, index: int = 0
) -> float:
    """Bits per stored number by the formula of the specification, section 2.4.

    Args:
        form: how the side is packed.
        tokens: of the block.
        channels: head_dim.
        kv_heads: heads of keys and values; they share a scale under ``form.shared``.
        lines: -2 for keys, -1 for values.
        line: entries of an outlier line; by default ours, ``tokens`` or ``channels``.
        index: bits of a position; by default the fewest that are stored.

    >>> element_bits(Format(2, -2, rank=4, share=0.02), 1024, 64, 3, lines=-2, index=16)
    4.25
    """
    if form.bits == RAW:
        return float(RAW)
    length = tokens if form.axis == -2 else channels
    if form.shared:
        metadata = 32 / (kv_heads * channels)
    else:
        metadata = 32 * math.ceil(length / min(form.group or length, length)) / length
    rank = min(form.rank, tokens, channels)
    factors = 16 * rank * (tokens + channels) / (tokens * channels)
    line = line or (tokens if lines == -2 else channels)
    index = index or 8 * _index_type(line).itemsize
    codes = form.bits * (-(-channels // 8) * 8) / channels  # a token's codes fill whole bytes of every plane
    return codes + metadata + factors + 2 * outlier_count(form.share, line) / line * (16 + index)
