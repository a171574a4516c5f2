"""Packed blocks of a compressed cache, and how scores and outputs are read from them without expanding them.

`PackedBlocks` is the packed form of the keys or of the values of several blocks. `scores` and `combine` are the two
passes of a decode step, here in torch, for any device; `tenfold.kernels.compressed` picks a faster form of them. GEAR
specification, section 2.3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor

from tenfold.core.formats import dequantise, unpack_codes

RAW = 16
"""``bits`` of values that are stored as they are, in bfloat16."""


@dataclass(frozen=True)
class PackedBlocks:
    """Keys or values of ``N`` blocks of equal length: codes + low rank + outliers.

    All parts add up: outliers are stored as a difference to the rest.

    Args:
        bits: 2, 3, 4, 8, or 16 for bfloat16 values without scales.
        channels: head_dim.
        axis: ``-2`` if tokens of a channel share a scale, ``-1`` if channels of a token do.
        group: entries that share one.
        lines: ``-2`` if outliers are listed for each channel (keys), ``-1`` if for each token (values).
        codes: ``[N, batch, kv_heads, tokens, channels * bits / 8]``, uint8; see `tenfold.core.formats.pack_codes`.
        scale: ``[N, batch, kv_heads, groups, channels]`` or ``[N, batch, kv_heads or 1, tokens, groups]``.
        zero: as ``scale``.
        left: ``[N, batch, kv_heads, tokens, rank]``.
        right: ``[N, batch, kv_heads, channels, rank]``.
        delta: ``[N, batch, kv_heads, outliers, channels]`` or ``[N, batch, kv_heads, tokens, outliers]``.
        place: as ``delta``: the token or the channel of each, as an integer.
    """

    bits: int
    channels: int
    axis: int
    group: int
    lines: int
    codes: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    delta: Tensor | None = None
    place: Tensor | None = None

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.codes.shape[0]

    @property
    def length(self) -> int:
        """Tokens of a block."""
        return self.codes.shape[3]

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def map(self, change: Callable[[Tensor], Tensor]) -> PackedBlocks:
        """The same with every tensor changed."""
        return replace(self, **cast(Any, {name: change(tensor) for name, tensor in self.tensors().items()}))

    def some_blocks(self, start: int, stop: int) -> PackedBlocks:
        """Blocks of an interval, not copied."""
        return self.map(lambda tensor: tensor[start:stop])

    def copied(self) -> PackedBlocks:
        """The same in memory of its own: what it was cut from can be freed."""
        return self.map(lambda tensor: tensor.clone(memory_format=torch.contiguous_format))

    def like(self, other: PackedBlocks) -> bool:
        """Whether blocks of the other can be appended: equal lengths, formats and parts."""
        mine, its = self.tensors(), other.tensors()
        form = (self.bits, self.axis, self.group) == (other.bits, other.axis, other.group)
        return form and {n: (t.shape[1:], t.dtype) for n, t in mine.items()} == {
            n: (t.shape[1:], t.dtype) for n, t in its.items()
        }

    def append(self, other: PackedBlocks) -> PackedBlocks:
        """Both, in this order; the stored bytes of each stay what they are."""
        its = other.tensors()
        return replace(self, **cast(Any, {name: torch.cat([t, its[name]]) for name, t in self.tensors().items()}))

    def first_tokens(self, tokens: int) -> PackedBlocks:
        """One block cut to its first tokens: exactly what it held of them, nothing is packed again."""
        parts: dict[str, Any] = {"codes": self.codes[:, :, :, :tokens]}
        for name in ("scale", "zero"):
            part = getattr(self, name)
            if part is not None:
                parts[name] = part[:, :, :, : -(-tokens // self.group) if self.axis == -2 else tokens]
        if self.left is not None:
            parts["left"] = self.left[:, :, :, :tokens]
        if self.delta is not None and self.place is not None:
            if self.lines == -1:
                parts |= {"delta": self.delta[:, :, :, :tokens], "place": self.place[:, :, :, :tokens]}
            else:  # a line keeps its length: what lies beyond adds 0 to the first token
                beyond = self.place.long() >= tokens
                parts |= {"delta": self.delta.masked_fill(beyond, 0), "place": self.place.masked_fill(beyond, 0)}
        return replace(self, **parts).copied()

    def dense(self, dtype: torch.dtype) -> Tensor:
        """What is stored, expanded: ``[batch, kv_heads, N * tokens, channels]``."""
        if self.bits == RAW:
            x = self.codes.to(dtype)
        else:
            assert self.scale is not None
            assert self.zero is not None
            codes = unpack_codes(self.codes, self.bits, self.channels)
            x = dequantise(codes, self.scale, self.zero, dim=self.axis, group=self.group, dtype=dtype)
        if self.left is not None and self.right is not None:
            x = x + self.left.to(dtype) @ self.right.to(dtype).mT
        if self.delta is not None and self.place is not None:
            x = x.scatter_add(self.lines, self.place.long(), self.delta.to(dtype))
        return x.permute(1, 2, 0, 3, 4).flatten(2, 3)


def scores(side: PackedBlocks, query: Tensor) -> Tensor:
    """Products of queries and stored keys, block by block, in torch.

    Args:
        side: the keys.
        query: ``[batch, kv_heads, rows, channels]``, scaled, float32 or float64; a row is a query of one of its heads.

    Returns:
        ``[batch, kv_heads, rows, N * tokens]`` in the dtype of ``query``.
    """
    return torch.cat([_block_scores(_block(side, n), query) for n in range(side.blocks)], -1)


def _block(side: PackedBlocks, n: int) -> PackedBlocks:
    """One block, without the leading axis."""
    return side.map(lambda tensor: tensor[n])


def _block_scores(block: PackedBlocks, query: Tensor) -> Tensor:
    """One block, whose tensors have lost their leading axis: codes once per group, then what was added to them."""
    kind = query.dtype
    if block.bits == RAW:
        return query @ block.codes.to(kind).mT
    assert block.scale is not None
    assert block.zero is not None
    scale, zero, codes = block.scale.to(kind), block.zero.to(kind), _codes(block, kind)
    tokens = codes.shape[-2]
    if block.axis == -2:  # q * scale and q . zero are those of a group of tokens
        padded = torch.nn.functional.pad(codes, (0, 0, 0, -tokens % block.group)).unflatten(-2, (-1, block.group))
        scaled = (query.unsqueeze(-3) * scale.unsqueeze(-2)) @ padded.mT  # [batch, kv_heads, groups, rows, group]
        offset = zero @ query.mT  # [batch, kv_heads, groups, rows]
        found = (scaled + offset.unsqueeze(-1)).transpose(-3, -2).flatten(-2)[..., :tokens]
    else:
        found = query.new_zeros(*query.shape[:-1], tokens)
        for number, start in enumerate(range(0, block.channels, block.group)):
            part = query[..., start : start + block.group]
            product = part @ codes[..., start : start + block.group].mT
            found = (
                found + product * scale[..., None, :, number] + part.sum(-1, keepdim=True) * zero[..., None, :, number]
            )
    if block.left is not None and block.right is not None:
        found = found + (query @ block.right.to(kind)) @ block.left.to(kind).mT
    if block.delta is not None and block.place is not None:
        place = block.place.long()
        if block.lines == -2:
            added = query.unsqueeze(-2) * block.delta.to(kind).unsqueeze(
                -3
            )  # [batch, kv_heads, rows, outliers, channels]
            index = place.unsqueeze(-3).expand_as(added)
            found = found.scatter_add(-1, index.flatten(-2), added.flatten(-2))
        else:
            found = found + query @ torch.zeros_like(codes).scatter_add(-1, place, block.delta.to(kind)).mT
    return found


def combine(side: PackedBlocks, weights: Tensor) -> Tensor:
    """Stored values summed by attention weights, block by block, in torch.

    Args:
        side: the values; their scales are those of a token.
        weights: ``[batch, kv_heads, rows, N * tokens]``, float32 or float64.

    Returns:
        ``[batch, kv_heads, rows, channels]`` in the dtype of ``weights``.
    """
    parts = weights.split(side.length, -1)
    total = _block_combine(_block(side, 0), parts[0])
    for n in range(1, side.blocks):
        total = total + _block_combine(_block(side, n), parts[n])
    return total


def _block_combine(block: PackedBlocks, weights: Tensor) -> Tensor:
    kind = weights.dtype
    if block.bits == RAW:
        return weights @ block.codes.to(kind)
    assert block.scale is not None
    assert block.zero is not None
    scale, zero, codes = block.scale.to(kind), block.zero.to(kind), _codes(block, kind)
    parts = []
    for number, start in enumerate(range(0, block.channels, block.group)):
        scaled = weights * scale[..., None, :, number]
        offset = (weights * zero[..., None, :, number]).sum(-1, keepdim=True)
        parts.append(scaled @ codes[..., start : start + block.group] + offset)
    found = torch.cat(parts, -1)
    if block.left is not None and block.right is not None:
        found = found + (weights @ block.left.to(kind)) @ block.right.to(kind).mT
    if block.delta is not None and block.place is not None:
        added = weights.unsqueeze(-1) * block.delta.to(kind).unsqueeze(-3)  # [batch, kv_heads, rows, tokens, outliers]
        index = block.place.long().unsqueeze(-3).expand_as(added)
        found = found.scatter_add(-1, index.flatten(-2), added.flatten(-2))
    return found


def _codes(block: PackedBlocks, dtype: torch.dtype) -> Tensor:
    return unpack_codes(block.codes, block.bits, block.channels).to(dtype)


@dataclass(frozen=True)
class Functions:
    """The two passes of one implementation; their arguments are those of `scores` and `combine`."""

    name: str
    scores: Callable[[PackedBlocks, Tensor], Tensor]
    combine: Callable[[PackedBlocks, Tensor], Tensor]


REFERENCE = Functions("torch", scores, combine)
