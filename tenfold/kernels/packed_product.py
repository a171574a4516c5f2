"""Products with a packed matrix, by each kernel that there is.

* ``packed``: torch's kernels for few rows, which read each code once; inputs are rounded to bfloat16;
* ``whole``: bytes times bytes, exact in whole numbers, for any number of rows where the processor has an instruction
  for it; inputs are rounded to a byte, with a scale for each row;
* ``float32``, ``bfloat16``: the matrix expanded part by part, on any device.

`tenfold.kernels.packed_choice` measures which is the fastest. FPX specification, section 6.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from tenfold.core.weight_formats import INT8_MAX
from tenfold.kernels.packed_matrix import PackedMatrix, layout_of_torch, packed_format
from tenfold.kernels.timing import HOPELESS, in_turns

Kernel = Literal["float32", "packed", "bfloat16", "whole"]


def packed_product(x: Tensor, matrix: PackedMatrix, kernel: Kernel) -> Tensor:
    """Inputs times the transposed matrix.

    It has a gradient to the inputs.

    Args:
        x: ``[tokens, inner]``, floating. NaN and infinite values make NaN or infinite values of their row.
        matrix: the matrix.
        kernel: one of `kernels_for`.

    Returns:
        ``[tokens, out]`` in the type of ``x``.

    >>> packed_product(torch.ones(1, 3), packed_format("bf16").pack(torch.eye(2, 3)), "float32").tolist()
    [[1.0, 1.0]]
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Product.apply(x, matrix, kernel)
    return _product(x, matrix, kernel)


def _product(x: Tensor, matrix: PackedMatrix, kernel: Kernel) -> Tensor:
    if not len(x):
        return x.new_zeros(0, matrix.out)
    missing = matrix.columns - matrix.inner
    found = _KERNELS[kernel](torch.nn.functional.pad(x, (0, missing)) if missing else x, matrix)
    return (found if found.shape[1] == matrix.out else found[:, : matrix.out]).to(x.dtype)


class _Product(torch.autograd.Function):
    """The forward pass by any kernel; backwards by the expanded matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: PackedMatrix, kernel: Kernel) -> Tensor:
        ctx.matrix = matrix
        return _product(x, matrix, kernel)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        matrix: PackedMatrix = ctx.matrix
        given = gradients[0].float()
        given = torch.nn.functional.pad(given, (0, matrix.codes.shape[0] - matrix.out))
        if (scale := matrix.row_scale()) is not None:
            given = given * scale
        found = given.new_zeros(len(given), matrix.columns)
        for place, part in matrix.parts(torch.float32):
            found.addmm_(given[:, place], part.T)
        return found[:, : matrix.inner].to(gradients[0].dtype), None, None


def _expanded(x: Tensor, matrix: PackedMatrix, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    found = torch.cat([x @ part for _, part in matrix.parts(dtype)], -1)
    scale = matrix.row_scale()
    return found if scale is None else found * scale


def _packed(x: Tensor, matrix: PackedMatrix) -> Tensor:
    """Inputs of float32 would be multiplied one by one: a hundred times slower."""
    assert matrix.scales is not None
    scales = matrix.scales.view(torch.bfloat16)
    x = x.to(torch.bfloat16)
    if matrix.layout is None:
        return torch.ops.aten._weight_int8pack_mm(x, matrix.codes, scales)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, matrix.codes, matrix.group, scales)


def _whole(x: Tensor, matrix: PackedMatrix) -> Tensor:
    x, weights = x.float(), matrix.row_scale()
    assert weights is not None
    scale = x.abs().amax(-1, keepdim=True) / INT8_MAX
    codes = (x / scale.masked_fill(scale == 0, 1)).round_().to(torch.int8)
    # Not oneDNN's product of u8 and s8: where a processor has no instruction for it, that cuts sums off in silence.
    return torch._int_mm(codes, matrix.codes.T) * weights * scale


_KERNELS: Mapping[Kernel, Callable[[Tensor, PackedMatrix], Tensor]] = {
    "float32": lambda x, matrix: _expanded(x, matrix, torch.float32),
    "packed": _packed,
    "bfloat16": lambda x, matrix: _expanded(x, matrix, torch.bfloat16),
    "whole": _whole,
}


@cache
def multiplies_bytes() -> bool:
    """Whether products of bytes are worth a measurement: some processors take a hundred times as long as for floats."""
    x, y = torch.ones(32, 256), torch.ones(256, 256)
    calls = {"floats": [partial(torch.mm, x, y)] * 3, "bytes": [partial(torch._int_mm, x.char(), y.char())] * 3}
    taken = in_turns(calls, x.device)
    return taken["bytes"] < HOPELESS * taken["floats"]


@cache
def _has_int8(device: torch.device) -> bool:
    """Whether torch has its kernel for bytes and few rows there."""
    x = torch.ones(1, 32, dtype=torch.bfloat16, device=device)
    weight = torch.ones(16, 32, dtype=torch.int8, device=device)
    try:
        return bool((torch.ops.aten._weight_int8pack_mm(x, weight, x.new_ones(16)) == 32).all())
    except (AttributeError, NotImplementedError, RuntimeError):
        return False


def kernels_for(matrix: PackedMatrix) -> tuple[Kernel, ...]:
    """The kernels that can multiply with a matrix where it is, those that round less first.

    >>> kernels_for(packed_format("f32").pack(torch.eye(2))), kernels_for(packed_format("bf16").pack(torch.eye(2)))
    (('float32',), ('float32', 'bfloat16'))
    """
    found: list[Kernel] = ["float32"]
    device, kind = matrix.codes.device, packed_format(matrix.form).kind
    nibbles = device.type == "cpu" and matrix.layout is not None and matrix.layout == layout_of_torch()
    if nibbles or (kind == "bytes" and _has_int8(device)):
        found.append("packed")
    if matrix.form != "f32":
        found.append("bfloat16")
    if device.type == "cpu" and kind == "bytes" and multiplies_bytes():
        found.append("whole")
    return tuple(found)
