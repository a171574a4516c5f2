"""MASFormer: full attention in a few layers, local attention in the rest (Zhang et al. 2023, arXiv 2310.12442).

* `conversion`: which layers, and the converted model;
* `native`: folders that transformers opens by itself.
"""

from tenfold.attend.masformer.conversion import (
    Converted,
    choose_heads,
    convert,
    full_attention,
    place,
    profile,
    profile_heads,
    stock_implementation,
)
from tenfold.attend.masformer.native import restore, save_native

__all__ = [
    "Converted",
    "choose_heads",
    "convert",
    "full_attention",
    "place",
    "profile",
    "profile_heads",
    "restore",
    "save_native",
    "stock_implementation",
]
