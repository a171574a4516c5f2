"""In which form a model leaves."""

from __future__ import annotations

from typing import Literal

from tenfold.config.base import Config


class ExportConfig(Config):
    """Write a folder that transformers or PEFT opens without tenfold."""

    form: Literal["merged", "adapter", "native"] = "merged"
    """``merged``: a complete model with the adapters folded in. ``adapter``: the last adapter alone.
    ``native``: a model with spans (MASFormer) in an architecture of transformers that knows them."""
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Number format of the merged weights. Default: that of the opened model."""
    push_to_hub: str | None = None
    """Also upload the folder to this hub id (``user/name``)."""
