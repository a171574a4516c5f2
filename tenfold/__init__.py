"""tenfold: the life of an open-weight language model under a budget.

Importing this package loads neither torch nor transformers; the names below are resolved on first use.

>>> import tenfold
>>> tenfold.__version__
'0.1.0'
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "adalora": "tenfold.adapt.adalora",
    "lora": "tenfold.adapt.lora",
    "pasta": "tenfold.attend.pasta",
    "autopasta": "tenfold.attend.autopasta",
    "gear": "tenfold.cache.gear",
    "fpx": "tenfold.compress.fpx",
    "losparse": "tenfold.compress.losparse",
    "masformer": "tenfold.attend.masformer",
    "r3m": "tenfold.align.r3m",
    "open_model": "tenfold.models.open:open_model",
    "layer_map": "tenfold.models.layer_map:layer_map",
    "read_rows": "tenfold.data.read:read_rows",
    "TenfoldError": "tenfold.errors:TenfoldError",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'tenfold' has no attribute {name!r}")
    module, _, attribute = _EXPORTS[name].partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted(__all__)
