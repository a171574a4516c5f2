"""The cache of a model, and the block within which its attention reads the packed form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tenfold.attend.attention import installed, reader
from tenfold.attend.spans import head_spans
from tenfold.cache.gear.layer import GearLayer
from tenfold.cache.gear.settings import within_budget
from tenfold.cache.reading import Reads
from tenfold.cache.whole import WholeCalls
from tenfold.config.gear import CacheConfig, parse_kv
from tenfold.errors import ConfigError, ModelError
from tenfold.kernels.local import FULL
from tenfold.models.head_sizes import head_dim, kv_heads


class GearCache(WholeCalls):
    """A cache of packed blocks for ``past_key_values=``.

    Layers of full attention are packed; sliding windows and recurrent states keep their own exact cache. Within
    `attach` (or any block that installs the attention function) attention reads the packed form. Elsewhere each layer
    hands over expanded tensors: that saves memory between the steps, and costs time.

    Args:
        config: the model's configuration.
        settings: how to store, also as a word such as ``gear:4``; or its keys by name.
        **keys: as in `tenfold.config.gear.CacheConfig`.

    Raises:
        ModelError: no layer of full attention, or some with local spans; an encoder-decoder.

    >>> from tenfold.models.tiny import tiny_model
    >>> opened = tiny_model("llama")
    >>> cache = GearCache(opened.model.config, bits=4, buffer=16)
    >>> ids = opened.tokenizer("a text of some length, so that there is something to pack", return_tensors="pt")
    >>> _ = opened.model(**ids, past_key_values=cache)
    >>> cache.report()["tokens"], cache.report()["packed tokens"]
    (57, 48)
    """

    def __init__(self, config: Any, settings: CacheConfig | str | None = None, **keys: Any) -> None:
        if settings is not None and keys:
            raise ConfigError(f"cache: settings and {', '.join(keys)}", remedy="give one or the other")
        if isinstance(settings, str):
            settings = parse_kv(settings)
        settings = settings or CacheConfig.parse(keys, "cache")
        decoder = config.get_text_config(decoder=True)
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(
                "a model of encoder and decoder has two caches", remedy="take a decoder such as Llama, Qwen or Gemma"
            )
        layers = list(DynamicCache(config=config).layers)
        full = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
        if not full:
            kinds = ", ".join(dict.fromkeys(type(layer).__name__ for layer in layers))
            raise ModelError(
                f"{decoder.model_type}: no layer of full attention alone ({kinds}), so there is nothing to pack",
                remedy="keep the model's own cache",
            )
        if local := [index for index in full if set(head_spans(decoder, index)) != {FULL}]:
            raise ModelError(
                f"layers {local} have local spans, and a packed cache holds layers of full attention",
                remedy="take tenfold.cache.spans.SpanCache(model.config, kv=...), which packs the full layers alone",
            )
        for index, layer in gear_layers(decoder, settings, full).items():
            layers[index], self.settings = layer, layer.config
        super().__init__(layers)

    @property
    def packed_layers(self) -> list[GearLayer]:
        """The layers that are packed."""
        return [layer for layer in self.layers if isinstance(layer, GearLayer)]

    def mask_padding(self, attention_mask: Tensor) -> None:
        """Say what is padding, for a bare cache: padding then takes no part in what is packed.

        transformers tells a cache no mask. Within `attach` the attention function does; a bare cache that is not told
        packs padding like any token, and at 2 bits that costs the rows that have some.

        Args:
            attention_mask: of the prompts, ``[rows, tokens]``, 0 for padding, from the first token on. What follows is
                no padding.

        Raises:
            ModelError: another shape.
        """
        if attention_mask.ndim != 2:
            raise ModelError(
                f"mask_padding: a mask of shape {tuple(attention_mask.shape)}", remedy="give one of [rows, tokens]"
            )
        for layer in self.packed_layers:
            layer.visible = attention_mask.bool()

    def report(self) -> dict[str, Any]:
        """What is stored, measured on the tensors themselves, beside what the formula says.

        Returns:
            ``mode``; ``tokens`` and ``packed tokens`` of a row; ``bytes`` of the packed layers, and by part; ``packed
            bytes``, ``exact bytes`` (first tokens and buffer); ``bits`` per packed number, measured, and ``formula
            bits``; ``bits with buffer`` per number of the cache. Under ``simulate`` nothing is packed: bytes are those
            of the plain numbers, and ``bits`` is what the formula says. ``reads``: ``views`` where attention reads
            the packed form now, ``tensors`` where layers are expanded for the moment of their attention.
        """
        return packed_report(self.packed_layers)


_PART_NAMES = ("codes", "scales", "low rank", "outliers", "exact")


def packed_report(layers: Sequence[GearLayer]) -> dict[str, Any]:
    """What `GearCache.report` says, for packed layers of any cache."""
    mode = layers[0].config.mode
    layers = [layer for layer in layers if layer.is_initialized]
    parts = {name: sum(layer.stored_bytes()[name] for layer in layers) for name in _PART_NAMES}
    packed_bytes = sum(parts.values()) - parts["exact"]
    elements = formula = total = 0.0
    for layer in layers:
        batch, kv_heads = layer.buffer[0].shape[:2]
        for number, (keys, values) in enumerate(layer.packed):
            count = batch * kv_heads * keys.blocks * keys.length * (keys.channels + values.channels)
            elements += count
            later = number > 0 or not layer.lead
            formula += count * layer.formats.element_bits(keys.length, keys.channels, kv_heads, later=later)
        channels = sum(side.shape[3] for side in layer.buffer)
        total += batch * kv_heads * layer.get_seq_length() * channels
    bits = formula / elements if mode == "simulate" and elements else None
    measured = 8 * packed_bytes / elements if elements else 0.0
    return {
        "mode": mode,
        "tokens": layers[0].get_seq_length() if layers else 0,
        "packed tokens": layers[0].packed_tokens if layers else 0,
        "bytes": packed_bytes + parts["exact"],
        "packed bytes": packed_bytes,
        "exact bytes": parts["exact"],
        "parts": parts,
        "bits": measured if bits is None else bits,
        "formula bits": formula / elements if elements else 0.0,
        "bits with buffer": 8 * (packed_bytes + parts["exact"]) / total if total else 0.0,
        "kernel": layers[0].functions.name if layers else None,
        "reads": "views" if layers and layers[0].reads() else "tensors",
    }


def gear_layers(decoder: Any, settings: CacheConfig, full: Sequence[int]) -> dict[int, GearLayer]:
    """Packed layers of a cache.

    Args:
        decoder: the configuration of the model's decoder; its attention implementation is looked up at each call.
        settings: how to store.
        full: indices of the layers of full attention.

    Returns:
        By index, each with the settings that a budget left.

    Raises:
        ModelError: ``layer_bits`` for a layer that is not among them.
    """
    unknown = sorted(set(settings.layer_bits) - set(full))
    if unknown:
        raise ModelError(
            f"layer_bits: layers {unknown} do not have full attention", remedy=f"layers that are packed: {list(full)}"
        )
    if settings.budget is not None:
        sizes = {"channels": head_dim(decoder), "kv_heads": kv_heads(decoder)}
        settings = within_budget(settings, layers=len(full), **sizes)
    reads = Reads(decoder)
    return {index: GearLayer(settings, index, reads) for index in full}


_OWN_CACHES = ("minimax",)
"""Model types whose forward refuses any other class of cache (transformers 5.23)."""

_REWORKED = ("jetmoe", "diffllama")
"""Model types that repeat or part keys and values between cache and attention (transformers 5.23)."""


def check_readable(decoder: Any) -> None:
    """Refuse attention that works on what its cache hands over before it attends, as latent attention does.

    Args:
        decoder: the configuration of the model's decoder.

    Raises:
        ModelError: latent attention (DeepSeek and its kin), keys that are worked on between cache and attention
            (JetMoE, DiffLlama), or a model that takes its own class of cache only.
    """
    if decoder.model_type in _REWORKED:
        raise ModelError(
            f"{decoder.model_type}: works on keys and values between its cache and its attention, so none is packed",
            remedy="keep the model's own cache (leave kv out), or use a bare GearCache of this very model",
        )
    if getattr(decoder, "kv_lora_rank", None):
        raise ModelError(
            f"{decoder.model_type}: its cache holds what keys and values are made of, so none is packed",
            remedy="keep the model's own cache, which is small already (leave kv out)",
        )
    if decoder.model_type in _OWN_CACHES:
        raise ModelError(
            f"{decoder.model_type}: takes no cache but one of its own class, so none is packed",
            remedy="keep the model's own cache (leave kv out)",
        )


@contextmanager
def attach(model: Any, settings: CacheConfig | str | None = None, **keys: Any) -> Iterator[GearCache]:
    """A cache for the model, whose attention reads the packed form while the block runs.

    ``cache.reset()`` empties it for another text. Leaving restores the model's attention, also after an exception.

    Args:
        model: a decoder on transformers' attention interface, on sdpa, eager or flash.
        settings: how to store, also as a word such as ``gear:4``; or its keys by name.
        **keys: as in `tenfold.config.gear.CacheConfig`.

    Yields:
        The cache.

    Raises:
        ModelError: the model is on flex attention, or off the attention interface, or has latent attention (DeepSeek).

    >>> from tenfold.models.tiny import tiny_model
    >>> opened = tiny_model("llama")
    >>> ids = opened.tokenizer("some text", return_tensors="pt")
    >>> with attach(opened.model, bits=4) as cache:
    ...     text = opened.model.generate(**ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
    >>> text.shape
    torch.Size([1, 13])
    """
    cache = GearCache(model.config, settings, **keys)
    decoder = model.config.get_text_config(decoder=True)
    check_readable(decoder)
    with installed(model):
        if reader(decoder) is None:
            raise ModelError(
                "flex attention reads no packed cache", remedy="open the model with 'sdpa', or use a bare GearCache"
            )
        yield cache
