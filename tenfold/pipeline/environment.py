"""What a result depends on besides the recipe: versions, processor, threads, device."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import tenfold

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "safetensors", "datasets", "trl", "numpy", "gguf")


def library_versions() -> dict[str, str]:
    """Version of each library that a result depends on; absent ones are left out."""
    found = {"tenfold": tenfold.__version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """Versions and the machine, for ``environment`` in every summary and for bug reports. Imports torch."""
    import torch

    from tenfold.models.inference import processor

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "versions": library_versions(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "devices": devices or ["cpu"],
    }
