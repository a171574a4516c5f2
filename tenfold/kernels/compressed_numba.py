"""Scores and outputs from packed codes on the CPU, compiled by numba: codes are unpacked in registers, never stored.

One call reads all blocks of a side. Work is split over pieces of some tokens, so that long blocks use all cores. Every
unpacked token is used for all queries of its group of heads. Loops run over whole planes of channels (see
`tenfold.core.formats.pack_codes`), which compile to vector instructions.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from tenfold.kernels import packed_blocks
from tenfold.kernels.packed_blocks import RAW, PackedBlocks

PIECE = 256
"""Tokens of one piece of work."""
_EMPTY = np.zeros((0, 0, 0, 0, 0), np.uint16)
_MOST: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # set when numba is loaded
_OPTIONS: dict[str, Any] = {"fastmath": True, "nogil": True, "cache": True}


def _bitcast(typingctx, bits):  # type: ignore[no-untyped-def]  # numba reads the signature
    """The float32 whose bits these are."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


_as_float: Any = intrinsic(_bitcast)


@numba.njit(**_OPTIONS)
def _half(bits):  # type: ignore[no-untyped-def]
    """A float16 from its bits. The exponent is moved by a product, which is right for subnormals as well."""
    wide = np.uint32(bits)
    moved = ((wide & np.uint32(0x7FFF)) << np.uint32(13)) | ((wide & np.uint32(0x8000)) << np.uint32(16))
    return _as_float(moved) * np.float32(2.0**112)


@numba.njit(inline="always")
def _unpack(codes, n, b, h, t, bits, channels, out):  # type: ignore[no-untyped-def]
    """The codes of one token as float32.

    It becomes part of its caller, where ``bits`` and ``channels`` are constants: that is twice as fast. numba computes
    integers in 64 bits; narrowed before they become floats, vectors hold twice as many.
    """
    if bits == 4:
        for j in range(channels // 2):
            byte = codes[n, b, h, t, j]
            out[j] = np.float32(np.int32(byte & 15))
            out[channels // 2 + j] = np.float32(np.int32(byte >> 4))
    elif bits == 2:
        quarter = channels // 4
        for j in range(quarter):
            byte = codes[n, b, h, t, j]
            out[j] = np.float32(np.int32(byte & 3))
            out[quarter + j] = np.float32(np.int32((byte >> 2) & 3))
            out[2 * quarter + j] = np.float32(np.int32((byte >> 4) & 3))
            out[3 * quarter + j] = np.float32(np.int32(byte >> 6))
    elif bits == 3:
        eighth = channels // 8
        for j in range(eighth):  # two eighths of the channels are a quarter, whose low bits lie at one shift
            even, odd, high = codes[n, b, h, t, j], codes[n, b, h, t, eighth + j], codes[n, b, h, t, 2 * eighth + j]
            out[j] = np.float32(np.int32((even & 3) | ((high & 1) << 2)))
            out[eighth + j] = np.float32(np.int32((odd & 3) | ((high & 2) << 1)))
            out[2 * eighth + j] = np.float32(np.int32(((even >> 2) & 3) | (high & 4)))
            out[3 * eighth + j] = np.float32(np.int32(((odd >> 2) & 3) | ((high & 8) >> 1)))
            out[4 * eighth + j] = np.float32(np.int32(((even >> 4) & 3) | ((high & 16) >> 2)))
            out[5 * eighth + j] = np.float32(np.int32(((odd >> 4) & 3) | ((high & 32) >> 3)))
            out[6 * eighth + j] = np.float32(np.int32((even >> 6) | ((high & 64) >> 4)))
            out[7 * eighth + j] = np.float32(np.int32((odd >> 6) | ((high & 128) >> 5)))
    else:
        for j in range(channels):
            out[j] = np.float32(np.int32(codes[n, b, h, t, j]))


@lru_cache
def _key_scores(bits: int, channels: int) -> Any:
    """``found[batch, heads, rows, N * tokens]`` for keys whose tokens share a scale."""

    @numba.njit(parallel=True, **_OPTIONS)
    def kernel(query, group, codes, scale, zero, left, right, pieces, found):  # type: ignore[no-untyped-def]
        blocks, batch, heads, tokens = codes.shape[:4]
        rows, rank = query.shape[2], left.shape[4]
        for work in numba.prange(blocks * batch * heads * pieces):
            piece, rest = work % pieces, work // pieces
            h, rest = rest % heads, rest // heads
            b, n = rest % batch, rest // batch
            buffer = np.empty(channels, np.float32)
            scaled = np.empty((rows, channels), np.float32)
            offset = np.empty(rows, np.float32)
            turned = np.zeros((rows, rank), np.float32)
            for r in range(rows):
                for j in range(channels):
                    for k in range(rank):
                        turned[r, k] += query[b, h, r, j] * _half(right[n, b, h, j, k])
            current = -1
            for t in range(piece * PIECE, min(tokens, (piece + 1) * PIECE)):
                if t // group != current:
                    current = t // group
                    for r in range(rows):
                        total = np.float32(0)
                        for j in range(channels):
                            scaled[r, j] = query[b, h, r, j] * _half(scale[n, b, h, current, j])
                            total += query[b, h, r, j] * _half(zero[n, b, h, current, j])
                        offset[r] = total
                _unpack(codes, n, b, h, t, bits, channels, buffer)
                for r in range(rows):
                    total = np.float32(0)
                    for j in range(channels):
                        total += scaled[r, j] * buffer[j]
                    for k in range(rank):
                        total += turned[r, k] * _half(left[n, b, h, t, k])
                    found[b, h, r, n * tokens + t] = total + offset[r]

    return kernel


@lru_cache
def _value_sums(bits: int, channels: int, group: int) -> Any:
    """``found[work, rows, channels]``, a part of the sum from each piece, for values whose channels share scales."""
    groups = -(-channels // group)

    @numba.njit(parallel=True, **_OPTIONS)
    def kernel(weights, codes, scale, zero, left, right, pieces, found):  # type: ignore[no-untyped-def]
        blocks, batch, heads, tokens = codes.shape[:4]
        rows, rank, shared = weights.shape[2], left.shape[4], scale.shape[2] == 1
        for work in numba.prange(blocks * batch * heads * pieces):
            piece, rest = work % pieces, work // pieces
            h, rest = rest % heads, rest // heads
            b, n = rest % batch, rest // batch
            own = 0 if shared else h
            buffer = np.empty(channels, np.float32)
            sums = np.zeros((rows, channels), np.float32)
            turned = np.zeros((rows, rank), np.float32)
            offset = np.zeros((rows, groups), np.float32)
            for t in range(piece * PIECE, min(tokens, (piece + 1) * PIECE)):
                _unpack(codes, n, b, h, t, bits, channels, buffer)
                for r in range(rows):
                    weight = weights[b, h, r, n * tokens + t]
                    for c in range(groups):
                        offset[r, c] += weight * _half(zero[n, b, own, t, c])
                        scaled = weight * _half(scale[n, b, own, t, c])
                        for j in range(c * group, min(channels, (c + 1) * group)):
                            sums[r, j] += scaled * buffer[j]
                    for k in range(rank):
                        turned[r, k] += weight * _half(left[n, b, h, t, k])
            for r in range(rows):
                for j in range(channels):
                    total = sums[r, j] + offset[r, j // group]
                    for k in range(rank):
                        total += turned[r, k] * _half(right[n, b, h, j, k])
                    found[work, r, j] = total

    return kernel


@numba.njit(parallel=True, **_OPTIONS)
def _key_outliers(query, tokens, delta, place, found):  # type: ignore[no-untyped-def]
    """Adds the keys' outliers, which are listed channel by channel."""
    blocks, batch, heads, count, channels = delta.shape
    for work in numba.prange(blocks * batch * heads):
        h, rest = work % heads, work // heads
        b, n = rest % batch, rest // batch
        for k in range(count):
            for j in range(channels):
                value = _half(delta[n, b, h, k, j])
                t = n * tokens + place[n, b, h, k, j]
                for r in range(query.shape[2]):
                    found[b, h, r, t] += query[b, h, r, j] * value


@numba.njit(parallel=True, **_OPTIONS)
def _value_outliers(weights, delta, place, pieces, found):  # type: ignore[no-untyped-def]
    """Adds the values' outliers, which are listed token by token, to what `_value_sums` found."""
    blocks, batch, heads, tokens, count = delta.shape
    for work in numba.prange(blocks * batch * heads * pieces):
        piece, rest = work % pieces, work // pieces
        h, rest = rest % heads, rest // heads
        b, n = rest % batch, rest // batch
        for t in range(piece * PIECE, min(tokens, (piece + 1) * PIECE)):
            for k in range(count):
                value, j = _half(delta[n, b, h, t, k]), place[n, b, h, t, k]
                for r in range(weights.shape[2]):
                    found[work, r, j] += weights[b, h, r, n * tokens + t] * value


@numba.njit(parallel=True, **_OPTIONS)
def _raw_scores(query, values, pieces, found):  # type: ignore[no-untyped-def]
    """Scores of bfloat16 keys, given as their bits."""
    blocks, batch, heads, tokens, channels = values.shape
    for work in numba.prange(blocks * batch * heads * pieces):
        piece, rest = work % pieces, work // pieces
        h, rest = rest % heads, rest // heads
        b, n = rest % batch, rest // batch
        for t in range(piece * PIECE, min(tokens, (piece + 1) * PIECE)):
            for r in range(query.shape[2]):
                total = np.float32(0)
                for j in range(channels):
                    total += query[b, h, r, j] * _as_float(np.uint32(values[n, b, h, t, j]) << np.uint32(16))
                found[b, h, r, n * tokens + t] = total


@numba.njit(parallel=True, **_OPTIONS)
def _raw_sums(weights, values, pieces, found):  # type: ignore[no-untyped-def]
    """Sums of bfloat16 values, given as their bits, a part from each piece."""
    blocks, batch, heads, tokens, channels = values.shape
    rows = weights.shape[2]
    for work in numba.prange(blocks * batch * heads * pieces):
        piece, rest = work % pieces, work // pieces
        h, rest = rest % heads, rest // heads
        b, n = rest % batch, rest // batch
        sums = np.zeros((rows, channels), np.float32)
        for t in range(piece * PIECE, min(tokens, (piece + 1) * PIECE)):
            for r in range(rows):
                weight = weights[b, h, r, n * tokens + t]
                for j in range(channels):
                    sums[r, j] += weight * _as_float(np.uint32(values[n, b, h, t, j]) << np.uint32(16))
        found[work] = sums


def scores(side: PackedBlocks, query: Tensor) -> Tensor:
    """As `tenfold.kernels.packed_blocks.scores`; what these kernels do not read goes there."""
    if not _reads(side, query, -2):
        return packed_blocks.scores(side, query)
    _share_threads()
    pieces = -(-side.length // PIECE)
    given = query.numpy()
    found = np.empty((*query.shape[:3], side.blocks * side.length), np.float32)
    if side.bits == RAW:
        _raw_scores(given, _bits(side.codes), pieces, found)
    else:
        _key_scores(side.bits, side.channels)(given, side.group, *_parts(side), pieces, found)
        if side.delta is not None and side.place is not None:
            _key_outliers(given, side.length, _bits(side.delta), side.place.numpy(), found)
    return torch.from_numpy(found)


def combine(side: PackedBlocks, weights: Tensor) -> Tensor:
    """As `tenfold.kernels.packed_blocks.combine`; what these kernels do not read goes there."""
    if not _reads(side, weights, -1):
        return packed_blocks.combine(side, weights)
    _share_threads()
    pieces = -(-side.length // PIECE)
    batch, heads, rows = weights.shape[:3]
    found = np.empty((side.blocks * batch * heads * pieces, rows, side.channels), np.float32)
    if side.bits == RAW:
        _raw_sums(weights.numpy(), _bits(side.codes), pieces, found)
    else:
        given = weights.numpy()
        _value_sums(side.bits, side.channels, side.group)(given, *_parts(side), pieces, found)
        if side.delta is not None and side.place is not None:
            _value_outliers(given, _bits(side.delta), side.place.numpy(), pieces, found)
    return torch.from_numpy(found).view(side.blocks, batch, heads, pieces, rows, -1).sum((0, 3))


def _reads(side: PackedBlocks, numbers: Tensor, axis: int) -> bool:
    """Whether the kernels know these formats; a format that they do not know is said once."""
    if numbers.dtype != torch.float32 or numbers.requires_grad:
        return False
    if side.bits == RAW:
        return side.codes.dtype == torch.bfloat16  # float32 is what a simulated cache holds
    kinds = (side.scale, side.zero, side.left, side.right, side.delta)
    if side.axis != axis or side.channels % 8:
        return _slowly(f"scales along dimension {side.axis} of heads of {side.channels} channels")
    if any(part is not None and part.dtype != torch.float16 for part in kinds):
        return _slowly("numbers beyond float16")
    return True


@lru_cache
def _slowly(what: str) -> bool:
    warnings.warn(f"numba does not read {what}: torch reads it, which saves memory but no time", stacklevel=2)
    return False


def _share_threads() -> None:
    """As many threads as torch uses, and torch keeps its number.

    numba would use its own. When its pool starts, at the first call, it also sets OpenMP's number, which is torch's.
    """
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, _MOST))
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _bits(tensor: Tensor) -> Any:
    """The bits of 16-bit floats."""
    return tensor.view(torch.uint16).numpy()


def _parts(side: PackedBlocks) -> tuple[Any, ...]:
    """Codes, scale, zero and the two factors, empty ones where there are none."""
    halves = (side.scale, side.zero, side.left, side.right)
    return side.codes.numpy(), *(_EMPTY if part is None else _bits(part) for part in halves)
