"""Floating-point numbers of eight and four bits, as values: what a number becomes when it is stored as one."""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0
E2M1_MAX = 6.0


def e4m3(x: Tensor) -> Tensor:
    """The nearest eight-bit numbers of `torch.float8_e4m3fn`; ties go to the even code, what is too large to 448.

    Infinite values become NaN, which this format has, instead of 448 as torch's cast makes them on a CPU.

    Args:
        x: any shape, floating.

    >>> e4m3(torch.tensor([17.0, 19.0, 465.0, float("nan")])).tolist()
    [16.0, 20.0, 448.0, nan]
    """
    return _nearest(x, mantissa=3, smallest=2.0**-6, largest=E4M3_MAX)


def e2m1(x: Tensor) -> Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; ties go to the even code, what is too large to 6.

    Infinite values become NaN.

    Args:
        x: any shape, floating.

    >>> e2m1(torch.tensor([0.25, 0.75, 2.5, 3.5, 5.0, 7.0, -0.3])).tolist()
    [0.0, 1.0, 2.0, 4.0, 4.0, 6.0, -0.5]
    """
    return _nearest(x, mantissa=1, smallest=1.0, largest=E2M1_MAX)


def power_of_two(x: Tensor) -> Tensor:
    """The largest power of two that is not above ``|x|``, exactly; 0 of zero, infinite of NaN and infinite values.

    Args:
        x: any shape, float32.

    >>> power_of_two(torch.tensor([1.0, 7.9, -0.3, 0.0])).tolist()
    [1.0, 4.0, 0.25, 0.0]
    """
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)  # the exponent of the number, and nothing else


def _nearest(x: Tensor, *, mantissa: int, smallest: float, largest: float) -> Tensor:
    """Round to multiples of the distance between neighbours, which is a power of two: so nothing else is rounded."""
    values = x.to(torch.float32)
    distance = power_of_two(values).clamp_min_(smallest).mul_(2.0**-mantissa)
    return (values / distance).round_().mul_(distance).clamp_(-largest, largest).to(x.dtype)
