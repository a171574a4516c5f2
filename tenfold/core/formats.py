"""Number formats: asymmetric uniform codes of a few bits, group by group, and their packing into bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.errors import ConfigError

PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""Widths of the bit planes that a code is stored in: 3 bits are a plane of 2 and a plane of 1."""

HALF_MAX = torch.finfo(torch.float16).max


def half_or_float(*tensors: Tensor) -> torch.dtype:
    """float16 where it holds all of the values, else float32 (GEAR specification, section 9).

    >>> half_or_float(torch.tensor([1.0])), half_or_float(torch.tensor([1e5]))
    (torch.float16, torch.float32)
    """
    fits = all(not tensor.numel() or float(tensor.abs().amax()) <= HALF_MAX for tensor in tensors)
    return torch.float16 if fits else torch.float32


def quantise(
    x: Tensor, bits: int, *, dim: int, group: int, metadata: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Codes of groups of consecutive entries: ``x`` is about ``scale * code + zero``.

    :math:`\Delta = (\max - z) / (2^b - 1)` with z the rounded minimum, and the codes from the *rounded* pair: with
    metadata rounded afterwards the error would grow fivefold (GEAR specification, section 2.1 and oracle 15). A
    constant group has :math:`\Delta = 0` and is exact to the rounding of z.

    Args:
        x: ``[..., tokens, channels]``, float32 or float64.
        bits: 2, 3, 4 or 8.
        dim: -2 for groups of tokens of a channel, -1 for groups of channels of a token.
        group: entries of a group; the last one may be shorter.
        metadata: how ``scale`` and ``zero`` are stored; by default float16 where it holds them.

    Returns:
        Codes (uint8, shape of ``x``), scale and zero: ``[..., groups, channels]`` or ``[..., tokens, groups]``.

    Raises:
        ConfigError: another number of bits.

    >>> codes, scale, zero = quantise(torch.tensor([[0.0, 0.5, 1.5, 2.5, 3.0]]), 2, dim=-1, group=5)
    >>> codes.tolist(), float(scale), float(zero)
    ([[0, 0, 2, 2, 3]], 1.0, 0.0)
    """
    if bits not in PLANES:
        raise ConfigError(f"bits: unknown code width {bits}", remedy="give 2, 3, 4 or 8")
    length = x.shape[dim]
    group = min(group, length)
    grouped = _grouped(x, dim, group)
    inner = dim  # the entries of a group, in `grouped`
    low, high = grouped.amin(inner), grouped.amax(inner)  # nine times faster than aminmax, which does not vectorise
    kind = half_or_float(low, high) if metadata is None else metadata
    zero = low.to(kind)
    span = (high - zero.to(x.dtype)) / (2**bits - 1)
    scale = span.to(kind)
    step = scale.to(x.dtype).unsqueeze(inner)
    codes = (grouped - zero.to(x.dtype).unsqueeze(inner)).div_(step.masked_fill(step == 0, torch.inf))
    codes = codes.round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    return _ungrouped(codes, dim, length), scale, zero


def dequantise(codes: Tensor, scale: Tensor, zero: Tensor, *, dim: int, group: int, dtype: torch.dtype) -> Tensor:
    """``scale * code + zero``: the inverse of `quantise` up to the rounding of the codes, in ``dtype``."""
    length = codes.shape[dim]
    group = min(group, length)
    grouped = _grouped(codes, dim, group).to(dtype)
    values = grouped * scale.to(dtype).unsqueeze(dim) + zero.to(dtype).unsqueeze(dim)
    return _ungrouped(values, dim, length)


def _grouped(x: Tensor, dim: int, group: int) -> Tensor:
    """``[..., groups, group, channels]`` or ``[..., tokens, groups, group]``; a short group repeats its last entry."""
    missing = -x.shape[dim] % group
    if missing:
        last = x.narrow(dim, x.shape[dim] - 1, 1)
        shape = list(x.shape)
        shape[dim] = missing
        x = torch.cat([x, last.expand(shape)], dim)
    axis = x.ndim + dim
    return x.reshape(*x.shape[:axis], -1, group, *x.shape[axis + 1 :])


def _ungrouped(x: Tensor, dim: int, length: int) -> Tensor:
    x = x.flatten(-3, -2) if dim == -2 else x.flatten(-2)
    return x.narrow(dim, 0, length)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes of a token, packed along its channels.

    Channels are laid out in planes: a byte of width w holds channels j, j + c, j + 2c, ... with c = channels * w / 8,
    so that a kernel unpacks whole vectors by shifts. A number of channels that is not a multiple of 8 is padded.

    Args:
        codes: ``[..., channels]``, uint8, below ``2**bits``.
        bits: 2, 3, 4 or 8.

    Returns:
        ``[..., channels * bits / 8]``, uint8.

    >>> pack_codes(torch.tensor([[1, 2, 3, 0, 0, 0, 0, 1]], dtype=torch.uint8), 4).tolist()
    [[1, 2, 3, 16]]
    """
    missing = -codes.shape[-1] % 8
    if missing:
        codes = torch.nn.functional.pad(codes, (0, missing))
    planes, taken = [], 0
    for width in PLANES[bits]:
        plane = (codes >> taken) & (2**width - 1) if len(PLANES[bits]) > 1 else codes
        parts = plane.unflatten(-1, (8 // width, -1)).unbind(-2)
        packed = parts[0].clone()
        for number, part in enumerate(parts[1:], 1):
            packed |= part << (number * width)
        planes.append(packed)
        taken += width
    return planes[0] if len(planes) == 1 else torch.cat(planes, -1)


def unpack_codes(packed: Tensor, bits: int, channels: int) -> Tensor:
    """The codes that `pack_codes` packed: ``[..., channels]``, uint8.

    >>> codes = torch.randint(0, 8, (5, 24), dtype=torch.uint8)
    >>> torch.equal(unpack_codes(pack_codes(codes, 3), 3, 24), codes)
    True
    """
    padded = channels + -channels % 8
    codes, start, taken = None, 0, 0
    for width in PLANES[bits]:
        size = padded * width // 8
        plane = packed[..., start : start + size]
        parts = [(plane >> (number * width)) & (2**width - 1) for number in range(8 // width)]
        values = torch.cat(parts, -1) if len(parts) > 1 else plane
        codes = values if codes is None else codes | (values << taken)
        start, taken = start + size, taken + width
    assert codes is not None
    return codes[..., :channels]
