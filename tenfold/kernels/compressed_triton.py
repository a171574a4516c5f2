"""Scores and outputs from packed codes on CUDA, compiled by Triton: codes are unpacked in registers, never stored.

One launch reads all blocks of a side. Work is split over pieces of some tokens, as in flash-decoding, so that a single
long sequence keeps the whole device busy; a piece's queries, all those of its group of heads, share each unpacked tile.

A tile's columns are the channels in eight parts of ``UNIT`` channels each, every part filled up to ``WIDTH`` columns, a
power of two. Planes of any number of bits fall into these parts (see `tenfold.core.formats.pack_codes`): a byte is read
once, and what it holds lies in parts that follow from shifts alone.

With ``TRITON_INTERPRET=1`` in the environment the same kernels run on the CPU, slowly; that is how they are tested.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from tenfold.kernels import packed_blocks
from tenfold.kernels.packed_blocks import RAW, PackedBlocks

MAX_TILE = 64
"""Tokens that are unpacked at once, at most."""
MAX_TILES = 4
"""Tiles of a piece, at most."""
MAX_ENTRIES = 8192
"""Numbers of a tile, at most: wide heads have shorter tiles."""
MAX_ROWS = 32
"""Queries of a group of heads, at most: more of them fill the registers, and the torch form expands a block once."""
MIN_ROWS = 1 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5) else 16
"""Queries of a product of tiles, at least; where there are fewer, Triton before 3.5 needs empty ones."""
LISTED = 256
"""Outliers that are added at once."""
FUSED: dict[str, Any] = {"enable_fp_fusion": True}
"""Triton's own default; 3.9 warns where it is not said."""


@triton.jit
@no_type_check
def _plane(codes, line, inside, BITS: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """One plane of the tokens that start at ``line``, as ``[TILE, 8 * WIDTH]`` integers: each byte is read once."""
    column = tl.arange(0, BITS * WIDTH)
    byte = column // WIDTH * UNIT + column % WIDTH
    here = inside[:, None] & (column % WIDTH < UNIT)[None, :]
    packed = tl.load(codes + line[:, None] + byte[None, :], mask=here, other=0).to(tl.int32)
    shift = tl.arange(0, 8 // BITS) * BITS
    parts = (packed[:, None, :] >> shift[None, :, None]) & ((1 << BITS) - 1)
    return tl.reshape(parts, [TILE, 8 * WIDTH])


@triton.jit
@no_type_check
def _tile(
    codes, first, t, inside,
    BITS: tl.constexpr, CHANNELS: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Codes of the tokens ``first + t``, or their values where these are stored as they are: ``[TILE, 8 * WIDTH]``."""
    if BITS == 16:
        channel, known = _channels(CHANNELS, UNIT, WIDTH)
        line = (first + t) * CHANNELS
        found = tl.load(codes + line[:, None] + channel[None, :], mask=inside[:, None] & known[None, :], other=0)
    elif BITS == 3:
        line = (first + t) * (3 * UNIT)
        low = _plane(codes, line, inside, 2, UNIT, WIDTH, TILE)
        found = low | (_plane(codes, line + 2 * UNIT, inside, 1, UNIT, WIDTH, TILE) << 2)
    else:
        found = _plane(codes, (first + t) * (BITS * UNIT), inside, BITS, UNIT, WIDTH, TILE)
    return found.to(tl.float32)


@triton.jit
@no_type_check
def _channels(CHANNELS: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr):
    """The channel of each column, and whether there is one."""
    column = tl.arange(0, 8 * WIDTH)
    channel = column // WIDTH * UNIT + column % WIDTH
    return channel, (column % WIDTH < UNIT) & (channel < CHANNELS)


@triton.jit
@no_type_check
def _key_scores(
    query, codes, scale, zero, left, right, found, pairs, rows, length, total, group, per, groups, pieces,
    BITS: tl.constexpr, CHANNELS: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """``found[pair, rows, N * length]`` but for outliers; a pair is a head of keys of a sequence.

    A tile lies within one group of tokens, so that the scales go to the query, once for all of them.
    """
    piece, unit = tl.program_id(0) % pieces, (tl.program_id(0) // pieces).to(tl.int64)
    pair, start = unit % pairs, unit // pairs * length
    row = tl.arange(0, ROWS)
    channel, known = _channels(CHANNELS, UNIT, WIDTH)
    place = (pair * rows + row)[:, None] * CHANNELS + channel[None, :]
    asked = tl.load(query + place, mask=(row < rows)[:, None] & known[None, :], other=0)
    for step in range(TILES):
        tile = piece * TILES + step
        number = tile // per
        t = number * group + tile % per * TILE + tl.arange(0, TILE)
        inside = (t < length) & (t < (number + 1) * group)
        x = _tile(codes, unit * length, t, inside, BITS, CHANNELS, UNIT, WIDTH, TILE)
        if BITS == 16:
            scores = tl.dot(x, tl.trans(asked), input_precision="ieee")
        else:
            line = (unit * groups + tl.minimum(number, groups - 1)) * CHANNELS + channel
            factor = tl.load(scale + line, mask=known, other=0).to(tl.float32)
            offset = tl.load(zero + line, mask=known, other=0).to(tl.float32)
            scores = tl.dot(x, tl.trans(asked * factor[None, :]), input_precision="ieee")
            scores += tl.sum(asked * offset[None, :], 1)[None, :]
        for k in range(RANK):
            turn = tl.load(right + (unit * CHANNELS + channel) * RANK + k, mask=known, other=0).to(tl.float32)
            lines = tl.load(left + (unit * length + t) * RANK + k, mask=inside, other=0).to(tl.float32)
            scores += lines[:, None] * tl.sum(asked * turn[None, :], 1)[None, :]
        target = found + ((pair * rows + row) * total + start)[None, :] + t[:, None]
        tl.store(target, scores, mask=inside[:, None] & (row < rows)[None, :])


@triton.jit
@no_type_check
def _key_outliers(
    query, delta, place, found, pairs, length, total, count, pieces,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Adds the keys' outliers. They are listed channel by channel and meet at their tokens, hence the atomic sums."""
    piece, unit = tl.program_id(0) % pieces, (tl.program_id(0) // pieces).to(tl.int64)
    pair, start = unit % pairs, unit // pairs * length
    entry = piece * LISTED + tl.arange(0, LISTED)
    inside = entry < count
    value = tl.load(delta + unit * count + entry, mask=inside, other=0).to(tl.float32)
    t = tl.load(place + unit * count + entry, mask=inside, other=0).to(tl.int64)
    for row in range(ROWS):
        line = pair * ROWS + row
        asked = tl.load(query + line * CHANNELS + entry % CHANNELS, mask=inside, other=0)
        tl.atomic_add(found + line * total + start + t, asked * value, mask=inside, sem="relaxed")


@triton.jit
@no_type_check
def _value_sums(
    weights, codes, scale, zero, left, right, found, pairs, sharing, rows, length, total, pieces,
    BITS: tl.constexpr, CHANNELS: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """``found[program, rows, channels]``, a part of the sum from each piece; ``sharing`` heads have the same scales."""
    piece, unit = tl.program_id(0) % pieces, (tl.program_id(0) // pieces).to(tl.int64)
    pair, start = unit % pairs, unit // pairs * length
    row = tl.arange(0, ROWS)
    channel, known = _channels(CHANNELS, UNIT, WIDTH)
    sums = tl.zeros([ROWS, 8 * WIDTH], tl.float32)
    for step in range(TILES):
        t = (piece * TILES + step) * TILE + tl.arange(0, TILE)
        inside = t < length
        origin = weights + (pair * rows + row)[:, None] * total + start + t[None, :]
        weight = tl.load(origin, mask=(row < rows)[:, None] & inside[None, :], other=0)
        x = _tile(codes, unit * length, t, inside, BITS, CHANNELS, UNIT, WIDTH, TILE)
        if BITS == 16:
            sums += tl.dot(weight, x, input_precision="ieee")
        else:
            line = unit // sharing * length + t
            for number in tl.static_range(GROUPS):
                factor = tl.load(scale + line * GROUPS + number, mask=inside, other=0).to(tl.float32)
                offset = tl.load(zero + line * GROUPS + number, mask=inside, other=0).to(tl.float32)
                part = tl.dot(weight * factor[None, :], x, input_precision="ieee")
                part += tl.sum(weight * offset[None, :], 1)[:, None]
                sums += part if GROUPS == 1 else tl.where((channel // GROUP == number)[None, :], part, 0.0)
        for k in range(RANK):
            lines = tl.load(left + (unit * length + t) * RANK + k, mask=inside, other=0).to(tl.float32)
            turn = tl.load(right + (unit * CHANNELS + channel) * RANK + k, mask=known, other=0).to(tl.float32)
            sums += tl.sum(weight * lines[None, :], 1)[:, None] * turn[None, :]
    target = found + (tl.program_id(0).to(tl.int64) * rows + row)[:, None] * CHANNELS + channel[None, :]
    tl.store(target, sums, mask=(row < rows)[:, None] & known[None, :])


@triton.jit
@no_type_check
def _value_outliers(
    weights, delta, place, found, pairs, length, total, count, pieces, parts, span,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, COUNT: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Adds the values' outliers, which are listed token by token, to the ``parts`` sums over ``span`` tokens each."""
    piece, unit = tl.program_id(0) % pieces, (tl.program_id(0) // pieces).to(tl.int64)
    pair, start = unit % pairs, unit // pairs * length
    entry = piece * LISTED + tl.arange(0, LISTED)
    inside = entry < count
    t = entry // COUNT
    value = tl.load(delta + unit * count + entry, mask=inside, other=0).to(tl.float32)
    channel = tl.load(place + unit * count + entry, mask=inside, other=0).to(tl.int64)
    for row in range(ROWS):
        weight = tl.load(weights + (pair * ROWS + row) * total + start + t, mask=inside, other=0)
        target = found + ((unit * parts + t // span) * ROWS + row) * CHANNELS + channel
        tl.atomic_add(target, weight * value, mask=inside, sem="relaxed")


def scores(side: PackedBlocks, query: Tensor) -> Tensor:
    """As `tenfold.kernels.packed_blocks.scores`; what these kernels do not read goes there."""
    if not _reads(side, query, -2):
        return packed_blocks.scores(side, query)
    query = query.contiguous()
    batch, heads, rows, _ = query.shape
    pairs, length, total = batch * heads, side.length, side.blocks * side.length
    group = length if side.bits == RAW else side.group
    groups, tile = -(-length // group), _tile_length(side, min(group, length))
    per = -(-min(group, length) // tile)
    tiles = min(MAX_TILES, groups * per)
    pieces = -(-groups * per // tiles)
    found = query.new_empty(batch, heads, rows, total)
    with torch.cuda.device_of(query):
        _key_scores[(side.blocks * pairs * pieces,)](
            query, *_parts(side), found,
            pairs, rows, length, total, group, per, groups, pieces,
            **_form(side, rows), TILE=tile, TILES=tiles,
        )  # fmt: skip
        if side.delta is not None and side.place is not None:
            count = side.delta[0, 0, 0].numel()
            pieces = -(-count // LISTED)
            _key_outliers[(side.blocks * pairs * pieces,)](
                query, side.delta.contiguous(), side.place.contiguous(), found,
                pairs, length, total, count, pieces,
                ROWS=rows, CHANNELS=side.channels, LISTED=LISTED, **FUSED,
            )  # fmt: skip
    return found


def combine(side: PackedBlocks, weights: Tensor) -> Tensor:
    """As `tenfold.kernels.packed_blocks.combine`; what these kernels do not read goes there."""
    if not _reads(side, weights, -1):
        return packed_blocks.combine(side, weights)
    weights = weights.contiguous()
    batch, heads, rows, total = weights.shape
    tile = _tile_length(side, side.length)
    tiles = min(MAX_TILES, -(-side.length // tile))
    pieces = -(-side.length // (tile * tiles))
    programs = side.blocks * batch * heads * pieces
    found = weights.new_empty(programs, rows, side.channels)
    with torch.cuda.device_of(weights):
        _value_sums[(programs,)](
            weights, *_parts(side), found,
            batch * heads, heads if side.scale is not None and side.scale.shape[2] == 1 else 1,
            rows, side.length, total, pieces,
            **_form(side, rows), GROUP=side.group, GROUPS=-(-side.channels // side.group), TILE=tile, TILES=tiles,
        )  # fmt: skip
        if side.delta is not None and side.place is not None:
            count = side.delta[0, 0, 0].numel()
            lists = -(-count // LISTED)
            _value_outliers[(side.blocks * batch * heads * lists,)](
                weights, side.delta.contiguous(), side.place.contiguous(), found,
                batch * heads, side.length, total, count, lists, pieces, tile * tiles,
                ROWS=rows, CHANNELS=side.channels, COUNT=side.delta.shape[-1], LISTED=LISTED, **FUSED,
            )  # fmt: skip
    return found.view(side.blocks, batch, heads, pieces, rows, -1).sum((0, 3))


def _reads(side: PackedBlocks, numbers: Tensor, axis: int) -> bool:
    """Whether the kernels know these formats: float32 numbers, and floats of at most 32 bits beside the codes."""
    if numbers.dtype != torch.float32 or numbers.requires_grad or not 0 < numbers.shape[2] <= MAX_ROWS:
        return False
    if side.bits == RAW:
        return side.codes.dtype == torch.bfloat16
    kinds = (side.scale, side.zero, side.left, side.right, side.delta)
    halves = all(part is None or part.dtype in (torch.float16, torch.float32) for part in kinds)
    return halves and side.axis == axis and (side.delta is None or side.lines == axis)


def _tile_length(side: PackedBlocks, tokens: int) -> int:
    """Tokens of a tile: a power of two, of 16 at least, which is what products of tiles ask for."""
    return max(16, min(triton.next_power_of_2(tokens), MAX_TILE, MAX_ENTRIES // (8 * _width(side))))


def _width(side: PackedBlocks) -> int:
    """Columns of a part: at least 2, so that a tile has 16 of them."""
    return max(2, triton.next_power_of_2(-(-side.channels // 8)))


def _parts(side: PackedBlocks) -> tuple[Tensor, ...]:
    """Codes, scale, zero and the two factors; the codes stand in for what there is none of: Triton wants pointers."""
    parts = (side.scale, side.zero, side.left, side.right)
    return tuple((side.codes if part is None else part).contiguous() for part in (side.codes, *parts))


def _form(side: PackedBlocks, rows: int) -> dict[str, Any]:
    """What a kernel is compiled for."""
    padded = max(MIN_ROWS, triton.next_power_of_2(rows))
    return {
        "BITS": side.bits,
        "CHANNELS": side.channels,
        "UNIT": -(-side.channels // 8),
        "WIDTH": _width(side),
        "RANK": 0 if side.left is None else side.left.shape[-1],
        "ROWS": padded,
        "num_warps": 4 if padded <= 8 else 8,  # with fewer, many rows do not fit into the registers
        **FUSED,
    }
