"""The small cache of a model with spans: local layers and heads keep only the keys that a later query can still see.

>>> from tenfold.attend import masformer
>>> from tenfold.kernels.local import AttentionWindow
>>> from tenfold.models.tiny import tiny_model
>>> opened = tiny_model("llama")
>>> handle = masformer.convert(opened.model, full_layers=[0], span=AttentionWindow("sliding", 8, sinks=2))
>>> cache = SpanCache(opened.model.config)
>>> ids = opened.tokenizer("a text that is longer than the span of its local layer", return_tensors="pt")
>>> _ = opened.model(**ids, past_key_values=cache)
>>> cache.layers[0].keys.shape[2], cache.layers[1].keys.shape[2]
(54, 9)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from tenfold.attend.attention import reader
from tenfold.attend.layers import attention_layers
from tenfold.attend.spans import FIELD, by_span, head_spans, spanned
from tenfold.cache.gear.cache import gear_layers
from tenfold.cache.gear.layer import GearLayer
from tenfold.cache.layer import ExactLayer
from tenfold.cache.reading import Reads
from tenfold.cache.span_layers import HeadSpanLayer, SpanLayer
from tenfold.cache.whole import WholeCalls
from tenfold.config.gear import CacheConfig
from tenfold.errors import ModelError
from tenfold.kernels.local import FULL
from tenfold.models.head_sizes import head_dim, kv_heads
from tenfold.models.memory import stored_bytes


class SpanCache(WholeCalls):
    """A cache for ``past_key_values=`` of a converted model: local layers and heads keep a constant number of keys.

    Layers without keys, of convolutions or linear attention, have their states here as in the model's own cache.

    Args:
        config: the configuration of a model that `tenfold.attend.masformer.convert` has converted.
        kv: how layers of full attention are packed; None keeps their keys and values as they are.

    Raises:
        ModelError: the model is not converted; ``kv``, and no layer has full attention; layers that keep a state
            beside their keys (Falcon H1).
    """

    def __init__(self, config: Any, kv: CacheConfig | None = None) -> None:
        decoder = config.get_text_config(decoder=True)
        if getattr(decoder, FIELD, None) is None:
            raise ModelError(
                f"{decoder.model_type}: the model has no spans",
                remedy="convert it first (tenfold.attend.masformer.convert), or take its own cache",
            )
        self.config = decoder
        reads = Reads(decoder, spanned)
        layers: list[Any] = list(DynamicCache(config=config).layers)
        full = []
        for index in attention_layers(decoder):
            if type(layers[index]) is not DynamicLayer:
                raise ModelError(
                    f"layer {index}: transformers keeps a {type(layers[index]).__name__} for it, not keys alone",
                    remedy="take the model's own cache: it holds all keys, and attention is by spans there too",
                )
            groups = by_span(head_spans(decoder, index))
            if len(groups) > 1:
                layers[index] = HeadSpanLayer(groups, index, reads)
            elif FULL in groups:
                layers[index] = ExactLayer(index)
                full.append(index)
            else:
                layers[index] = SpanLayer(next(iter(groups)), index, reads)
        if kv is not None:
            if not full:
                raise ModelError(
                    "kv: no layer of full attention, so there is nothing to pack",
                    remedy="leave kv out: local layers keep few keys, exactly",
                )
            for index, layer in gear_layers(decoder, kv, full).items():
                layers[index] = layer
        super().__init__(layers)

    def report(self) -> dict[str, Any]:
        """What is stored, measured on the tensors' storage, beside what the formula says.

        Returns:
            ``tokens`` of a row; ``bytes``, of which ``local bytes`` and ``full bytes``, by layers and heads, and
            ``state bytes`` of layers without keys; ``formula bytes`` of local and unpacked full ones (specification,
            oracle 9, with sinks); ``dense bytes`` of a cache without spans.
        """
        stores = [store for store in self._stores() if isinstance(store, CacheLayerMixin)]
        states = [layer for layer in self.layers if not isinstance(layer, CacheLayerMixin)]
        local = [store for store in stores if _is_local(store)]
        full = [store for store in stores if not _is_local(store)]
        sample = next((_sample(store) for store in stores if store.is_initialized), torch.empty(0))
        shape = {"tokens": self.get_seq_length(), "batch": len(sample), "itemsize": sample.element_size()}
        parts = {"local bytes": stored_bytes(local), "full bytes": stored_bytes(full)}
        if states:
            parts["state bytes"] = stored_bytes(states)
        return {
            "tokens": shape["tokens"],
            "bytes": sum(parts.values()),
            **parts,
            "formula bytes": formula_bytes(self.config, **shape),
            "dense bytes": formula_bytes(self.config, **shape, spans=False),
        }

    def _stores(self) -> Iterator[Any]:
        """Layers, and for those of several spans their parts."""
        for layer in self.layers:
            if isinstance(layer, HeadSpanLayer):
                yield from (part for _, part in layer.parts)
            else:
                yield layer


def _is_local(store: Any) -> bool:
    return isinstance(store, SpanLayer) and store.span != FULL


def _sample(layer: Any) -> Tensor:
    """A tensor of the batch and dtype of a layer."""
    found: Tensor = layer.buffer[0] if isinstance(layer, GearLayer) else layer.keys
    return found


def formula_bytes(config: Any, tokens: int, *, batch: int = 1, itemsize: int = 2, spans: bool = True) -> int:
    """Bytes of keys and values: all tokens in full layers and heads, what is in reach and sinks in the others.

    Args:
        config: of a converted model; of any decoder where ``spans`` is False.
        tokens: of a row.
        batch: rows.
        itemsize: bytes of a number.
        spans: False for a cache of all tokens in all layers.

    >>> from types import SimpleNamespace
    >>> qwen = SimpleNamespace(num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, hidden_size=896)
    >>> qwen.get_text_config = lambda decoder: qwen
    >>> qwen.tenfold_span = {"full_layers": [0, 1, 2, 3, 4, 5], "pattern": "sliding", "size": 1024}
    >>> formula_bytes(qwen, 32768, spans=False), formula_bytes(qwen, 32768)
    (402653184, 110091264)
    """
    decoder = config.get_text_config(decoder=True)
    layers = attention_layers(decoder)
    kept = len(layers) * kv_heads(decoder) * tokens
    if spans:
        found = [span for layer in layers for span in head_spans(decoder, layer)]
        kept = sum(min(tokens, span.reach + span.sinks) for span in found)
    return 2 * batch * head_dim(decoder) * itemsize * kept


def own_cache(model: Any, kv: CacheConfig | None = None) -> SpanCache | None:
    """The small cache of a model that has spans now; None for any other model, whose own cache will do.

    None also where layers keep a state beside their keys, and only the model's own cache holds both.

    >>> from tenfold.models.tiny import tiny_model
    >>> own_cache(tiny_model("llama").model) is None
    True
    """
    decoder = model.config.get_text_config(decoder=True)
    if getattr(decoder, FIELD, None) is None or reader(decoder) is not spanned:
        return None
    stock = DynamicCache(config=model.config).layers
    if kv is None and any(type(stock[layer]) is not DynamicLayer for layer in attention_layers(decoder)):
        return None
    return SpanCache(model.config, kv)
