"""Formats that a matrix can be stored in, by name: what they make of its numbers, and how many bytes they take.

Each is the reference that kernels are compared with: plain torch on any device, float32 within. Scales lie along the
inputs (the last dimension), the one that a product sums over. Formats whose name does not end in ``_a16`` round the
inputs of the layer too, as kernels that multiply in the format do; 16-bit and int4 ones are for weights alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from tenfold.core.floats import E2M1_MAX, E4M3_MAX, e2m1, e4m3, power_of_two
from tenfold.core.formats import dequantise, quantise
from tenfold.errors import ConfigError, ModelError

INT8_MAX = 127.0
INT4_MAX = 7.0
_PART = 2**22
"""Numbers that are rounded at a time: an embedding of 10^8 needs no copies of its size."""


class WeightFormat(Protocol):
    """What a matrix becomes when it is stored in few bits, and what that takes."""

    @property
    def name(self) -> str:
        """As plans call it."""

    @property
    def simulated(self) -> bool:
        """Whether no kernel of torch multiplies in it, so that its time says nothing of its speed."""

    def weight(self, weight: Tensor) -> Tensor:
        """Round a matrix to the format and back.

        Args:
            weight: ``[out, in]``, floating.

        Returns:
            A new tensor of the same shape, type and device.

        Raises:
            ModelError: NaN or infinite values; says where.
        """

    def inputs(self, x: Tensor) -> Tensor:
        """What the layer reads: ``x`` itself where the format is for weights alone.

        Args:
            x: ``[..., in]``, floating. NaN and infinite values make NaN of all that shares their scale.
        """

    def name_for(self, inner: int) -> str:
        """What rows of this length are stored as: another format's name where one stands in for this one."""

    def bytes(self, out: int, inner: int) -> int:
        """Of a matrix with all of its scales; a last block that the inputs do not fill is stored whole."""


@dataclass(frozen=True)
class _Format:
    """A format by how it rounds.

    Args:
        name: as plans call it.
        rounded: float32 ``[rows, in]`` and the largest magnitude of the whole tensor, to the rounded rows.
        bits: of a number.
        block: numbers along the inputs that share a scale; 0 for the whole row.
        block_bytes: of the scale of a block or row.
        tensor_bytes: of the scale of the tensor.
        rounds_inputs: whether inputs are rounded too.
        simulated: as in `WeightFormat`.
    """

    name: str
    rounded: Callable[[Tensor, Tensor], Tensor]
    bits: int
    block: int = 0
    block_bytes: int = 0
    tensor_bytes: int = 0
    rounds_inputs: bool = True
    simulated: bool = False

    def weight(self, weight: Tensor) -> Tensor:
        peak = _peak(weight)
        if not torch.isfinite(peak):
            refuse_infinite(weight, "weight")
        return self._round(weight, peak)

    def inputs(self, x: Tensor) -> Tensor:
        if not self.rounds_inputs or not x.numel():  # an expert that no token reaches
            return x
        rounded = self._round(x, _peak(x))
        return _StraightThrough.apply(x, rounded) if x.requires_grad else rounded  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _round(self, x: Tensor, peak: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        result = torch.empty_like(rows)
        at_once = max(1, _PART // x.shape[-1])
        for part, into in zip(torch.split(rows, at_once), torch.split(result, at_once), strict=True):
            into.copy_(self.rounded(part.to(torch.float32), peak))
        return result.view(x.shape)

    def name_for(self, inner: int) -> str:
        return self.name

    def bytes(self, out: int, inner: int) -> int:
        blocks = -(-inner // self.block) if self.block else 1
        numbers = blocks * self.block if self.block else inner
        return out * (-(-numbers * self.bits // 8) + blocks * self.block_bytes) + self.tensor_bytes


class _StraightThrough(torch.autograd.Function):
    """Rounded numbers with the gradient of those that were rounded, so that adapters below still learn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def refuse_infinite(weight: Tensor, name: str) -> None:
    """Refuse a matrix with numbers that no scale can be made of.

    Args:
        weight: ``[out, in]``.
        name: of the matrix.

    Raises:
        ModelError: a value is NaN, infinite, or infinite as float32.

    >>> refuse_infinite(torch.ones(2, 2), "lm_head")
    """
    bad = ~torch.isfinite(weight.to(torch.float32))
    if bool(bad.any()):
        place = bad.nonzero()[0].tolist()
        raise ModelError(
            f"{name}: {float(weight[tuple(place)])} at {place}, one of {int(bad.sum())} values that cannot be rounded",
            remedy="repair the weights (a training that diverged?), or leave this matrix out of the plan",
        )


def _peak(x: Tensor) -> Tensor:
    """The largest magnitude, float32; NaN where any value is."""
    low, high = x.detach().aminmax()
    return torch.maximum(-low, high).to(torch.float32)


def _near(x: Tensor, step: Tensor, element: Callable[[Tensor], Tensor]) -> Tensor:
    """The nearest multiples of a step that the element format holds; a step of 0 is one of zeros."""
    return element(x / step.masked_fill(step == 0, torch.inf)).mul_(step)


def _by_tensor(x: Tensor, peak: Tensor, *, element: Callable[[Tensor], Tensor], largest: float) -> Tensor:
    return _near(x, peak / largest, element)


def _by_row(x: Tensor, peak: Tensor, *, element: Callable[[Tensor], Tensor], largest: float) -> Tensor:
    return _near(x, x.abs().amax(-1, keepdim=True) / largest, element)


def _nvfp4(x: Tensor, peak: Tensor) -> Tensor:
    blocks = _blocks(x, 16)
    whole = peak / (E2M1_MAX * E4M3_MAX)
    wanted = blocks.abs().amax(-1, keepdim=True) / E2M1_MAX
    step = e4m3(wanted / whole.masked_fill(whole == 0, torch.inf)) * whole
    return _near(blocks, step, e2m1).flatten(-2)[..., : x.shape[-1]]


def _mxfp4(x: Tensor, peak: Tensor, *, up: bool) -> Tensor:
    blocks = _blocks(x, 32)
    largest = blocks.abs().amax(-1, keepdim=True)
    step = power_of_two(largest) / 4  # the exponent of 6 is 2
    if up:
        step = torch.where(largest > E2M1_MAX * step, 2 * step, step)
    return _near(blocks, step, e2m1).flatten(-2)[..., : x.shape[-1]]


def _int4(x: Tensor, peak: Tensor, *, group: int, metadata: torch.dtype = torch.float32) -> Tensor:
    codes, scale, low = quantise(_padded(x, group), 4, dim=-1, group=group, metadata=metadata)
    return dequantise(codes, scale, low, dim=-1, group=group, dtype=x.dtype)[..., : x.shape[-1]]


def _int4_symmetric(x: Tensor, peak: Tensor, *, group: int) -> Tensor:
    blocks = _blocks(x, group)
    step = blocks.abs().amax(-1, keepdim=True) / INT4_MAX
    return _near(blocks, step, lambda codes: codes.round().clamp_(-INT4_MAX, INT4_MAX)).flatten(-2)[..., : x.shape[-1]]


def _whole(x: Tensor) -> Tensor:
    return x.round().clamp_(-INT8_MAX, INT8_MAX)


def _cast(x: Tensor, peak: Tensor, *, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype).to(x.dtype)


def _blocks(x: Tensor, size: int) -> Tensor:
    """``[rows, blocks, size]``."""
    return _padded(x, size).reshape(len(x), -1, size)


def _padded(x: Tensor, block: int) -> Tensor:
    missing = -x.shape[-1] % block
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


def _all() -> Iterable[_Format]:
    multiplied = [
        _Format("fp8_tensor", partial(_by_tensor, element=e4m3, largest=E4M3_MAX), 8, tensor_bytes=4),
        _Format("fp8_row", partial(_by_row, element=e4m3, largest=E4M3_MAX), 8, block_bytes=4),
        _Format("fp4_tensor", partial(_by_tensor, element=e2m1, largest=E2M1_MAX), 4, tensor_bytes=4, simulated=True),
        _Format("fp4_row", partial(_by_row, element=e2m1, largest=E2M1_MAX), 4, block_bytes=4, simulated=True),
        _Format("nvfp4", _nvfp4, 4, block=16, block_bytes=1, tensor_bytes=4, simulated=True),
        _Format("mxfp4", partial(_mxfp4, up=False), 4, block=32, block_bytes=1, simulated=True),
        _Format("mxfp4_up", partial(_mxfp4, up=True), 4, block=32, block_bytes=1, simulated=True),
        _Format("int8_row", partial(_by_row, element=_whole, largest=INT8_MAX), 8, block_bytes=4),
    ]
    for each in multiplied:
        yield each
        # Of 8-bit weights beside 16-bit inputs torch multiplies whole numbers alone.
        yield replace(each, name=f"{each.name}_a16", rounds_inputs=False, simulated=each.name != "int8_row")
    for group in (32, 64, 128):
        # Kernels store the scale and zero of a group in 16 bits each; the reference rounds neither.
        yield _Format(f"int4_g{group}", partial(_int4, group=group), 4, block=group, block_bytes=4, rounds_inputs=False)
        # Without a zero, as vLLM's files have it.
        symmetric = partial(_int4_symmetric, group=group)
        yield _Format(
            f"int4_sym_g{group}", symmetric, 4, block=group, block_bytes=2, rounds_inputs=False, simulated=True
        )
    for name, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16), ("f32", torch.float32)):
        yield _Format(name, partial(_cast, dtype=dtype), 8 * dtype.itemsize, rounds_inputs=False)


FORMATS: dict[str, WeightFormat] = {each.name: each for each in _all()}
"""The formats of table 2.2 of the FPX specification (arXiv 2505.19481 names FP8 and FP4; OCP MX v1.0 and NVIDIA's
NVFP4 the blocks), by name."""


def weight_format(name: str) -> WeightFormat:
    """A format by its name.

    ``fp8``, ``fp4`` and ``int8`` have one scale per tensor (``_tensor``) or per row (``_row``: an output of the weight,
    a token of the inputs); ``nvfp4``, ``mxfp4`` and ``int4_g32`` one per block, ``int4_sym_g32`` without a zero.
    ``mxfp4_up`` rounds its powers of two up, so that the largest number of a block is never cut off. With ``_a16`` the
    inputs stay as they are.

    Raises:
        ConfigError: an unknown name.

    >>> nvfp4 = weight_format("nvfp4")
    >>> nvfp4.weight(torch.tensor([[0.1, 0.9, 6.0]])).tolist(), nvfp4.bytes(1024, 1024) * 8 / 1024**2
    ([[0.0, 1.0, 6.0]], 4.500030517578125)
    """
    if name not in FORMATS:
        raise ConfigError(f"format: unknown format {name!r}", remedy=f"give one of {', '.join(FORMATS)}")
    return FORMATS[name]
