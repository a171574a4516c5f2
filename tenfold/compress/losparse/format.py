"""What a saved compressed model says of its layers, where transformers looks for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from tenfold.errors import ModelError

METHOD = "losparse"
Layout = Literal["fast", "small"]
VERSION = 1
"""Of the format. Readers refuse a later one."""


@register_quantization_config(METHOD)
class LowRankRowsConfig(QuantizationConfigMixin):
    """The entry ``quantization_config`` of ``config.json``.

    Args:
        modules: by name, ``rank`` and ``kept`` of each compressed layer and, where rows can be left out, ``elastic``.
        layouts: by machine, in which forms the layers multiply best (`tenfold.compress.losparse.layout`).
        layout: whether speed (``fast``) or memory (``small``) counts; of ``small`` nothing is measured.
        version: of the format.

    Raises:
        ModelError: a later version.

    >>> LowRankRowsConfig({"lm_head": {"rank": 4, "kept": 2}}).to_dict()["quant_method"]
    'losparse'
    """

    def __init__(
        self,
        modules: Mapping[str, Mapping[str, Any]],
        layouts: Mapping[str, Any] | None = None,
        layout: Layout = "fast",
        version: int = VERSION,
        **_: Any,
    ) -> None:
        if version > VERSION:
            raise ModelError(f"a compressed model of format {version}; this tenfold knows {VERSION}", "update tenfold")
        self.quant_method = METHOD
        self.version = version
        self.modules = {name: dict(entry) for name, entry in modules.items()}
        self.layouts = dict(layouts or {})
        self.layout: Layout = layout


def renaming(names: list[str]) -> WeightRenaming:
    """Between the tensors of files and those of the layers: ``weight`` of a compressed layer is its rows.

    A reader that does not know the method would pass over unknown names and fill the weights at random. A ``weight`` of
    another shape it refuses.
    """
    return WeightRenaming(rf"({'|'.join(map(re.escape, names))})\.weight", r"\1.rows")


def record_layers(model: Any, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Write into a model's configuration which layers are compressed, so that ``save_pretrained`` is all it takes.

    Args:
        model: a ``transformers`` model.
        modules: as `LowRankRowsConfig` has them; empty for a model that is dense again.
    """
    known = getattr(model.config, "quantization_config", None)
    before = getattr(model, "_weight_conversions", None)
    if before is None:
        fresh = get_model_conversion_mapping(model, add_legacy=False)
        before = [one for one in fresh if not isinstance(one, PrefixChange)]  # as transformers does when it saves
    if isinstance(known, LowRankRowsConfig):
        ours = renaming(list(known.modules))._original_source_patterns
        before = [one for one in before if one._original_source_patterns != ours]
    if modules:
        found = LowRankRowsConfig(modules)
        if isinstance(known, LowRankRowsConfig):
            found.layout = known.layout
            found.layouts = known.layouts if known.modules == found.modules else {}  # other sizes are measured anew
        model.config.quantization_config = found
        before = [*before, renaming(list(modules))]
    elif isinstance(known, LowRankRowsConfig):
        del model.config.quantization_config
    model._weight_conversions = before or None
