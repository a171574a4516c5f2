"""The number formats of GGUF files: what a matrix becomes in each, and its bytes.

Formats whose blocks are 32 numbers long are written by the package ``gguf``; K and IQ types, and roundings weighted by
an importance, by ggml itself (`tenfold.models.ggml`). What is read back is always ``gguf.dequantize``'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tenfold.errors import ConfigError, MissingDependencyError, ModelError

if TYPE_CHECKING:
    from torch import Tensor

PLAIN_TYPES = ("f32", "f16", "bf16")
"""Types without blocks."""

BLOCK_TYPES = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "mxfp4")
"""Types of 32 numbers a block that need nothing but the package ``gguf``."""

GGML_TYPES = (
    *("q6_k", "q5_k", "q4_k", "q3_k", "q2_k"),
    *("iq4_nl", "iq4_xs", "iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s"),
)
"""Types that ggml alone can write; the last ones are of little use, or refused, without an importance."""

_WEIGHTED = frozenset({*GGML_TYPES, "q5_1", "q5_0", "q4_1", "q4_0"})
"""Types whose rounding an importance changes."""

_FALLBACK = {
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
    **{name: "iq4_nl" for name in GGML_TYPES if name.startswith("iq") and name != "iq4_nl"},
}
"""What stands in for a type of 256 numbers a block where rows do not divide by 256: llama.cpp's choice (b11549)."""


def settled_type(name: str, inner: int) -> str:
    """The type that a matrix gets when a type is asked for.

    Args:
        name: of the type that is asked for.
        inner: length of a row.

    Returns:
        The type itself where blocks fit into a row, else llama.cpp's substitute of 32 numbers a block, else ``f16``.

    Raises:
        ConfigError: unknown type.

    >>> settled_type("q4_k", 1024), settled_type("q4_k", 576), settled_type("q4_k", 100)
    ('q4_k', 'q5_0', 'f16')
    """
    name = name.lower()
    for candidate in (name, _FALLBACK.get(name, "f16"), "f16"):
        if inner % _block(candidate)[0] == 0:
            return candidate
    raise AssertionError("f16 has no blocks")


def type_bytes(name: str, out: int, inner: int) -> int:
    """Bytes of a matrix in a type that fits its rows.

    >>> type_bytes("q8_0", 2, 64)
    136
    """
    size, width = _block(name)
    return out * (inner // size) * width


@dataclass(frozen=True)
class GgufFormat:
    """A type of GGUF files as a number format of weights; inputs stay as they are.

    Args:
        name: ``q8_0``, ``q4_k`` and so on, in small letters.
        simulated: False: llama.cpp runs it.
    """

    name: str
    simulated: bool = False

    def weight(self, weight: Tensor, importance: Tensor | None = None) -> Tensor:
        """A matrix rounded to this type (or its substitute, `settled_type`) and back.

        Args:
            weight: ``[out, in]`` floating point.
            importance: ``[in]``, how much an error of each column counts.

        Returns:
            The same shape, dtype and device. In float32 it is what a file gives back, bit for bit.

        Raises:
            ModelError: NaN or infinite numbers; a number too large for f16; no importance where the type needs one.
            MissingDependencyError: ggml is needed and absent.
        """
        import torch

        weights = None if importance is None else importance.detach().to("cpu", torch.float32).numpy()
        values = weight.detach().to("cpu", torch.float32).numpy()
        kind = settled_type(self.name, values.shape[-1])
        rounded = torch.from_numpy(decode(encode(values, kind, weights), kind).reshape(values.shape))
        return rounded.to(weight.device, weight.dtype)

    def inputs(self, x: Tensor) -> Tensor:
        """The inputs, unchanged."""
        return x

    def name_for(self, inner: int) -> str:
        """What rows of this length are written as: the type or its substitute."""
        return settled_type(self.name, inner)

    def bytes(self, out: int, inner: int) -> int:
        """Of the matrix in a file, scales included; of the substitute where rows do not divide."""
        return type_bytes(settled_type(self.name, inner), out, inner)


def gguf_format(name: str) -> GgufFormat:
    """The number format of a GGUF type.

    Raises:
        ConfigError: unknown type.

    >>> gguf_format("Q4_0").bytes(8, 64)
    288
    """
    _block(name.lower())
    return GgufFormat(name.lower())


def encode(values: np.ndarray, name: str, importance: np.ndarray | None = None) -> np.ndarray:
    """A matrix as it lies in a file.

    Args:
        values: ``[rows, inner]`` float32; rows divide by the type's block (`settled_type`).
        name: of the type.
        importance: ``[inner]``, how much an error of each column counts; types that take none ignore it.

    Returns:
        ``[rows, bytes]`` uint8; of f32 and f16 the numbers themselves.

    Raises:
        ModelError, MissingDependencyError: as `GgufFormat.weight`.
        ConfigError: unknown type, or rows that do not divide.
    """
    kind, (size, width) = _kind(name), _block(name)
    values = np.ascontiguousarray(values, dtype=np.float32)
    inner = values.shape[-1]
    if inner % size:
        raise ConfigError(
            f"{name}: rows of {inner} do not divide by {size}", remedy="ask settled_type for one that fits"
        )
    if not np.isfinite(values).all():
        raise ModelError(f"{name}: the weight holds NaN or infinite values", remedy="mend or retrain the model")
    if name not in ("f32", "bf16") and np.abs(values).max(initial=0) > 65504:  # beyond half precision, that of scales
        raise ModelError(f"{name}: the weight holds numbers beyond 65504", remedy="choose bf16 or f32")
    if importance is not None and (importance.shape != (inner,) or not (importance >= 0).all()):
        raise ConfigError(
            f"importance: shape {importance.shape} for rows of {inner}, or a number below 0 or NaN",
            remedy="give the mean square of each input",
        )
    if name in GGML_TYPES or (importance is not None and name in _WEIGHTED):
        from tenfold.models.ggml import ggml_quantize

        return ggml_quantize(values, kind, inner // size * width, importance)
    packed: np.ndarray = _gguf().quants.quantize(values, kind)
    return packed


def decode(packed: np.ndarray, name: str) -> np.ndarray:
    """What a reader makes of packed rows: ``[rows, inner]`` float32.

    >>> import numpy as np
    >>> decode(encode(np.ones((2, 32)), "q8_0"), "q8_0").shape
    (2, 32)
    """
    values: np.ndarray = _gguf().quants.dequantize(packed, _kind(name))
    return values.astype(np.float32, copy=False)


def _block(name: str) -> tuple[int, int]:
    """Numbers and bytes of one block."""
    size, width = _gguf().GGML_QUANT_SIZES[_kind(name)]
    return int(size), int(width)


def _kind(name: str) -> Any:
    known = (*PLAIN_TYPES, *BLOCK_TYPES, *GGML_TYPES)
    if name not in known:
        raise ConfigError(f"unknown GGUF type {name!r}", remedy=f"give one of: {', '.join(known)}")
    return _gguf().GGMLQuantizationType[name.upper()]


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise MissingDependencyError("GGUF files need the package gguf", remedy='pip install "gguf>=0.17"') from None
    return gguf
