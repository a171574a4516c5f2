"""Which implementation reads packed blocks: torch on any device, numba on the CPU, Triton on CUDA.

Each has the two passes of `tenfold.kernels.packed_blocks`, in a file of its own that is loaded when it is chosen.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from functools import lru_cache
from typing import Literal

import torch

from tenfold.errors import ConfigError
from tenfold.kernels.packed_blocks import REFERENCE, Functions

Kernel = Literal["auto", "torch", "numba", "triton"]


def choose(kernel: Kernel, device: torch.device) -> Functions:
    """The implementation for a device: the fastest that runs, or the one that is asked for.

    Args:
        kernel: ``auto``, or a name to force.
        device: where the cache is.

    Raises:
        ConfigError: an unknown name, or one that is forced and cannot run here.

    >>> choose("torch", torch.device("cpu")).name
    'torch'
    """
    fastest = {"cpu": "numba", "cuda": "triton"}.get(device.type, "torch")
    if kernel == "auto":
        return _load(fastest, device.type) if _installed(fastest) else _without(fastest)
    if kernel not in ("torch", "numba", "triton"):
        raise ConfigError(f"kernel: unknown kernel {kernel!r}", remedy="give auto, torch, numba or triton")
    if not _installed(kernel):
        raise ConfigError(f"kernel: {kernel} is not installed", remedy=f"pip install {kernel}, or give kernel: torch")
    if kernel == "numba" and device.type != "cpu":
        raise ConfigError(f"kernel: numba runs on the CPU, the cache is on {device.type}", remedy="give kernel: auto")
    if kernel == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError("kernel: triton runs on CUDA, the cache is on cpu", remedy="give kernel: auto")
    return _load(kernel, device.type)


def _installed(name: str) -> bool:
    return name == "torch" or importlib.util.find_spec(name) is not None


@lru_cache
def _without(fastest: str) -> Functions:
    """The torch form, said once: it saves memory, not time."""
    warnings.warn(
        f"{fastest} is not installed: attention on the compressed cache runs in torch, which saves memory but no time "
        f"(pip install {fastest})",
        stacklevel=2,
    )
    return REFERENCE


@lru_cache
def _load(name: str, device: str) -> Functions:
    if name == "torch":
        return REFERENCE
    if name == "numba":
        from tenfold.kernels import compressed_numba as module
    else:
        from tenfold.kernels import compressed_triton as module  # type: ignore[no-redef]
    return Functions(name, module.scores, module.combine)
