"""Which layers of a decoder have attention, and which of these can have spans, by its configuration."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from transformers import DynamicCache


def attention_layers(config: Any) -> list[int]:
    """Layers that keep keys and values, by a decoder's configuration: not those of convolutions or linear attention.

    >>> from types import SimpleNamespace
    >>> attention_layers(SimpleNamespace(num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"]))
    [1]
    """
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [layer for layer, kind in enumerate(kinds) if kind not in ("conv", "linear_attention", "moe", "mlp")]


def odd_layer(config: Any, layers: Collection[int]) -> str | None:
    """What stands in the way of spans in some layers of attention, by the caches that transformers has for them.

    Args:
        config: of the decoder.
        layers: indices of the layers of attention.

    Returns:
        A sentence that names the layer; None where all is well.
    """
    stock = DynamicCache(config=config).layers
    for layer in layers:
        if not 0 <= layer < len(stock):
            return f"layer {layer}: the configuration counts {len(stock)} layers"
        kind = type(stock[layer]).__name__
        if kind not in ("DynamicLayer", "LinearAttentionAndFullAttentionLayer"):
            return f"layer {layer}: transformers keeps a {kind} for it, so it is not plain full attention"
    return None
