"""Which kernel multiplies with a packed matrix, by how many rows of inputs: measured, as processors differ.

Those with and without products of bytes or of bfloat16 differ by an order of magnitude, and a kernel that is the
fastest for one row may be the slowest for many. Each shape is measured once in a process.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial

import torch

from tenfold.kernels.packed_matrix import PackedMatrix, packed_format
from tenfold.kernels.packed_product import Kernel, kernels_for, packed_product
from tenfold.kernels.timing import copies_to_sweep, in_turns
from tenfold.models.inference import machine

STEPS = (1, 8, 32, 128)
"""Rows of inputs that kernels are timed with; others go by the nearest of these."""
GAIN = 0.87
"""A kernel that rounds more is taken where it needs at most this part of the time."""
_TIMED_ROWS = 4096
"""Of a matrix, at most, where many rows of inputs are timed: the time is in proportion to them."""


def step_of(tokens: int) -> int:
    """The place in `STEPS` of the nearest number of rows.

    >>> [step_of(tokens) for tokens in (0, 1, 5, 16, 17, 500)]
    [0, 0, 1, 1, 2, 3]
    """
    return 0 if tokens <= 2 else 1 if tokens <= 16 else 2 if tokens <= 64 else 3


def fastest(form: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Kernel, ...]:
    """The kernel for each of `STEPS`.

    Args:
        form: of the matrix, a name of `tenfold.kernels.packed_matrix.PACKED`.
        shape: out and inner.
        dtype: of the inputs.
        device: where.
    """
    if len(only := kernels_for(packed_format(form).pack(torch.zeros(1, 1, device=device)))) == 1:
        return only * len(STEPS)
    return tuple(_best(kernel_seconds(form, shape, tokens, dtype, device)) for tokens in STEPS)


def decode_seconds(form: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> float:
    """How long a matrix takes for one token, by the kernel that `fastest` takes for it.

    Args:
        form: of the matrix.
        shape: out and inner.
        dtype: of the inputs.
        device: where.
    """
    taken = kernel_seconds(form, shape, 1, dtype, device)
    return taken[_best(taken)]


def _best(taken: Mapping[Kernel, float]) -> Kernel:
    names = iter(taken)
    best = next(names)
    for name in names:
        if taken[name] < GAIN * taken[best]:
            best = name
    return best


def kernel_seconds(
    form: str, shape: tuple[int, int], tokens: int, dtype: torch.dtype, device: torch.device
) -> Mapping[Kernel, float]:
    """How long each kernel takes for inputs of so many rows, as `tenfold.kernels.timing.in_turns` says it.

    Args:
        form: of the matrix.
        shape: out and inner.
        tokens: rows of the inputs.
        dtype: of the inputs.
        device: where.
    """
    return _measured(form, shape, tokens, dtype, device, machine(device))


@cache
@torch.no_grad()
def _measured(
    form: str, shape: tuple[int, int], tokens: int, dtype: torch.dtype, device: torch.device, where: str
) -> Mapping[Kernel, float]:
    """By ``where`` it is measured again with another number of threads."""
    out, inner = shape
    timed = out if tokens == 1 else min(out, _TIMED_ROWS)
    draw = torch.Generator().manual_seed(0)
    packed = packed_format(form).pack(torch.randn(min(timed, 64), inner, generator=draw).to(device))
    matrix = _of_rows(packed, timed)
    size = sum(part.nbytes for part in (matrix.codes, matrix.scales) if part is not None)
    copies = [matrix, *(_copied(matrix) for _ in range((copies_to_sweep(size) if tokens == 1 else 3) - 1))]
    x = torch.randn(tokens, inner, generator=draw).to(device, dtype)
    calls = {name: [partial(packed_product, x, one, name) for one in copies] for name in kernels_for(matrix)}
    return {name: seconds * out / timed for name, seconds in in_turns(calls, device).items()}


def _of_rows(matrix: PackedMatrix, out: int) -> PackedMatrix:
    """A matrix of more rows, the same ones again."""
    times = -(-out // matrix.out)
    codes = matrix.codes.repeat(times, 1)
    scales = matrix.scales
    if scales is not None:
        scales = scales.repeat(times) if matrix.layout is None else scales.repeat(1, times, 1)
    return matrix._replace(out=out, codes=codes, scales=scales)


def _copied(matrix: PackedMatrix) -> PackedMatrix:
    return matrix._replace(codes=matrix.codes.clone(), scales=None if matrix.scales is None else matrix.scales.clone())
