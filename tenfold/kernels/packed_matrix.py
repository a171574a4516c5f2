"""Matrices in the formats that torch multiplies with: bytes, nibbles and halves, with scales, as its kernels read them.

What is stored are whole numbers throughout (floats by their bits), so that a model's ``.to(dtype)`` leaves them alone.
FPX specification, section 6.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product as pairs
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from tenfold.core.weight_formats import INT8_MAX, refuse_infinite, weight_format
from tenfold.errors import ConfigError

PART, PART_ON_GPU = 2**19, 2**26
"""Numbers of a matrix that are expanded at a time. On a CPU few enough for a cache, so that they are never written to
memory; a GPU wants few steps."""
_PACKED_AT_ONCE = 2**22
_NIBBLES = 15

Kind = Literal["float", "bytes", "nibbles"]


class Layout(NamedTuple):
    """How nibbles lie: a block of rows together, column by column; a byte holds two rows of a column.

    Args:
        block: rows.
        paired: whether a byte holds neighbours; otherwise rows that are half a block apart, the first one low.
    """

    block: int
    paired: bool

    def lay(self, codes: Tensor) -> Tensor:
        """Codes ``[rows, columns]`` below 16, rows in whole blocks: ``[rows, columns / 2]``, uint8."""
        blocks = codes.view(-1, self.block, codes.shape[1]).transpose(1, 2)
        low, high = (blocks[..., ::2], blocks[..., 1::2]) if self.paired else blocks.chunk(2, -1)
        return (low | high << 4).reshape(len(codes), -1)

    def columns(self, laid: Tensor) -> Tensor:
        """The codes of whole blocks that `lay` laid, turned round: ``[columns, rows]``."""
        inner = 2 * laid.shape[1]
        halves = laid.view(-1, inner, self.block // 2).transpose(0, 1)
        codes = (
            laid.new_empty(*halves.shape, 2)
            if self.paired
            else laid.new_empty(inner, len(laid) // self.block, 2, self.block // 2)
        )
        low, high = codes.unbind(-1 if self.paired else 2)
        torch.bitwise_and(halves, _NIBBLES, out=low)
        torch.bitwise_right_shift(halves, 4, out=high)
        return codes.view(inner, -1)

    def rows(self, laid: Tensor, ids: Tensor) -> Tensor:
        """The codes of some rows, ``[ids, columns]``."""
        half = self.block // 2
        place = ids % self.block
        byte, high = (place // 2, place % 2) if self.paired else (place % half, place // half)
        columns = torch.arange(2 * laid.shape[1], device=laid.device)
        found = laid.view(-1, len(columns), half)[(ids // self.block)[:, None], columns, byte[:, None]]
        return found >> (4 * high[:, None]) & _NIBBLES


ELSEWHERE = Layout(64, paired=False)
"""Where torch has no kernel whose layout would matter."""
ROWS_OF_NIBBLES = 64
"""Whole blocks in all layouts there are."""


@cache
def layout_of_torch() -> Layout | None:
    """How torch's kernel for nibbles on this CPU wants them, which depends on its vectors; None of an unknown way."""
    codes = torch.randint(16, (ROWS_OF_NIBBLES, 32), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    try:
        laid = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    except (AttributeError, RuntimeError):
        return None
    known = (Layout(block, paired) for block, paired in pairs((64, 32, 16), (False, True)))
    same = (one for one in known if torch.equal(one.lay(codes.byte()), laid))
    return next(same, None)


class PackedMatrix(NamedTuple):
    """A matrix ``[out, inner]`` in a format, filled up with zeros to the rows and columns that kernels need.

    Args:
        form: name of the format.
        out: rows.
        inner: columns.
        codes: ``bf16`` and ``f32``: the bits of the numbers, ``[out, columns]``. ``int8_row``: ``[rows, columns]``.
            ``int4``: as ``layout`` has them.
        scales: bits of bfloat16, int16. ``int8_row``: ``[rows]``. ``int4``: ``[groups, rows, 2]``, scale and zero of
            :math:`(code - 8) scale + zero`.
        layout: of nibbles.
    """

    form: str
    out: int
    inner: int
    codes: Tensor
    scales: Tensor | None = None
    layout: Layout | None = None

    @property
    def columns(self) -> int:
        """That inputs have to be filled up to."""
        return self.codes.shape[1] * (1 if self.layout is None else 2)

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        assert self.scales is not None
        return self.columns // len(self.scales)

    def parts(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Some rows after others, as their place and ``[columns, rows]``; what `row_scale` says is still to be done.

        Args:
            dtype: of the numbers, a floating type.
        """
        step = max(1, (PART if self.codes.device.type == "cpu" else PART_ON_GPU) // self.columns)
        if self.layout is None:
            for start in range(0, len(self.codes), step):
                place = slice(start, min(start + step, len(self.codes)))
                yield place, self._numbers(self.codes[place]).to(dtype).T
            return
        assert self.scales is not None
        step = max(self.layout.block, step // self.layout.block * self.layout.block)
        scale, zero = self.scales.view(torch.bfloat16).float().unbind(-1)
        zero = zero - 8 * scale
        for start in range(0, len(self.codes), step):
            place = slice(start, min(start + step, len(self.codes)))
            codes = self.layout.columns(self.codes[place]).float().view(len(scale), self.group, -1)
            yield place, codes.mul_(scale[:, None, place]).add_(zero[:, None, place]).view(self.columns, -1).to(dtype)

    def row_scale(self) -> Tensor | None:
        """What a row is multiplied by after a product with its `parts`, float32 ``[rows]``; None where by nothing."""
        return self.scales.view(torch.bfloat16).float() if self.scales is not None and self.layout is None else None

    def rows(self, ids: Tensor) -> Tensor:
        """Some of the rows, ``[ids, inner]``, float32.

        Args:
            ids: their places, ``[ids]``, from 0 to ``out - 1``.
        """
        if self.layout is not None:
            assert self.scales is not None
            codes = self.layout.rows(self.codes, ids).float().view(len(ids), len(self.scales), self.group) - 8
            scale, zero = self.scales[:, ids].view(torch.bfloat16).float().transpose(0, 1)[..., None, :].unbind(-1)
            return (codes * scale + zero).view(len(ids), -1)[:, : self.inner]
        found = self._numbers(self.codes[ids]).float()
        factors = self.row_scale()
        return found[:, : self.inner] if factors is None else found[:, : self.inner] * factors[ids, None]

    def dense(self) -> Tensor:
        """The matrix, ``[out, inner]``, float32."""
        found = torch.cat([part.T for _, part in self.parts(torch.float32)])
        scale = self.row_scale()
        return (found if scale is None else found * scale[:, None])[: self.out, : self.inner]

    def _numbers(self, codes: Tensor) -> Tensor:
        return codes if codes.dtype == torch.int8 else codes.view(_FLOATS[codes.dtype])


_FLOATS = {torch.int16: torch.bfloat16, torch.int32: torch.float32}


@dataclass(frozen=True)
class PackedFormat:
    """A format that torch has kernels for; a `tenfold.core.weight_formats.WeightFormat`.

    It differs from the reference of the same name by scales in 16 bits, as kernels read them. ``int8_row`` rounds its
    inputs: kernels for many rows do so.

    Args:
        name: as plans call it.
        kind: how its numbers are stored.
        bits: of a number.
        group: columns that share a scale; 0 for the whole row.
    """

    name: str
    kind: Kind
    bits: int
    group: int = 0
    simulated = False

    def pack(self, weight: Tensor) -> PackedMatrix:
        """A matrix as kernels read it.

        Args:
            weight: ``[out, inner]``, floating.

        Raises:
            ModelError: NaN or infinite values; says where.

        >>> packed = packed_format("int4_g32").pack(torch.eye(2, 40))
        >>> packed.columns, packed.scales.shape, packed.dense()[:, :3].round().tolist()
        (64, torch.Size([2, 64, 2]), [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        """
        out, inner = weight.shape
        weight = weight.detach()
        rows = max(1, _PACKED_AT_ONCE // inner // ROWS_OF_NIBBLES) * ROWS_OF_NIBBLES
        packed = [self._packed(part) for part in weight.split(rows)]
        layout = None
        if self.kind == "nibbles":
            layout = (layout_of_torch() if weight.device.type == "cpu" else None) or ELSEWHERE
            packed = [(layout.lay(codes), scales) for codes, scales in packed]
        codes, scales = (list(each) for each in zip(*packed, strict=True))
        kept = None if self.kind == "float" else torch.cat(scales, 1 if layout else 0).view(torch.int16)
        return PackedMatrix(self.name, out, inner, torch.cat(codes), kept, layout)

    def _packed(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """Codes ``[rows, columns]``, filled up, and scales in bfloat16."""
        numbers = part.float()
        if not torch.isfinite(numbers.abs().amax()):
            refuse_infinite(part, "weight")
        rows, columns = self._filled(*part.shape)
        if self.kind == "float":
            numbers = pad(numbers, (0, columns - part.shape[1]))
            codes = numbers.bfloat16().view(torch.int16) if self.bits == 16 else numbers.view(torch.int32)
            return codes, numbers.new_empty(0)
        # The last column is repeated, as zeros could be beyond what a group holds; inputs are zero there.
        numbers = torch.cat((numbers, numbers[:, -1:].expand(-1, columns - part.shape[1])), 1)
        codes, scales = self._bytes(numbers) if self.kind == "bytes" else self._nibbles(numbers)
        fill = rows - len(part)
        scales = pad(scales, (0, fill)) if self.kind == "bytes" else pad(scales, (0, 0, 0, fill))
        return pad(codes, (0, 0, 0, fill)), scales

    def _bytes(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        scale = (numbers.abs().amax(-1) / INT8_MAX).bfloat16()
        codes = numbers / _no_zero(scale.float())[:, None]
        return codes.round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8), scale

    def _nibbles(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        groups = numbers.unflatten(-1, (-1, self.group))
        low, high = groups.amin(-1), groups.amax(-1)
        scale = ((high - low) / _NIBBLES).bfloat16()
        zero = (low + 8 * scale.float()).bfloat16()
        # Codes from what is stored: a rounded zero then costs no more than the codes' own rounding.
        codes = (groups - zero.float()[..., None]) / _no_zero(scale.float())[..., None] + 8
        pair = torch.stack((scale, zero), -1).transpose(0, 1)
        return codes.round_().clamp_(0, _NIBBLES).to(torch.uint8).flatten(-2), pair.contiguous()

    def weight(self, weight: Tensor) -> Tensor:
        """As `tenfold.core.weight_formats.WeightFormat.weight`."""
        return self.pack(weight).dense().to(weight.dtype).contiguous()

    def inputs(self, x: Tensor) -> Tensor:
        """As `tenfold.core.weight_formats.WeightFormat.inputs`."""
        return weight_format("int8_row").inputs(x) if self.kind == "bytes" else x

    def name_for(self, inner: int) -> str:
        """As `tenfold.core.weight_formats.WeightFormat.name_for`."""
        return self.name

    def bytes(self, out: int, inner: int) -> int:
        """As `tenfold.core.weight_formats.WeightFormat.bytes`, what the matrix is filled up with included."""
        rows, columns = self._filled(out, inner)
        scales = {"float": 0, "bytes": 2 * rows, "nibbles": 4 * rows * (columns // (self.group or 1))}
        return rows * columns * self.bits // 8 + scales[self.kind]

    def _filled(self, out: int, inner: int) -> tuple[int, int]:
        """Rows and columns in memory.

        Beyond others kernels read what is not theirs: of bfloat16 the next row of inputs, times zero, where there are
        tiles (AMX), so that one NaN there is a NaN here.
        """
        if self.bits == 32:
            return out, inner
        rows, columns = {"float": (1, 32), "bytes": (16, 32), "nibbles": (ROWS_OF_NIBBLES, self.group)}[self.kind]
        return -(-out // rows) * rows, -(-inner // columns) * columns


def _no_zero(scale: Tensor) -> Tensor:
    return scale.masked_fill(scale == 0, torch.inf)


PACKED: dict[str, PackedFormat] = {
    each.name: each
    for each in (
        PackedFormat("f32", "float", 32),
        PackedFormat("bf16", "float", 16),
        PackedFormat("int8_row", "bytes", 8),
        *(PackedFormat(f"int4_g{group}", "nibbles", 4, group) for group in (32, 64, 128)),
    )
}
"""The formats that are multiplied in here, by name."""


def packed_format(name: str) -> PackedFormat:
    """A format that torch has kernels for, by its name.

    Raises:
        ConfigError: another one.

    >>> packed_format("int8_row").bytes(64, 64)
    4224
    """
    if name not in PACKED:
        raise ConfigError(f"format: no kernel here multiplies in {name!r}", remedy=f"give one of {', '.join(PACKED)}")
    return PACKED[name]
