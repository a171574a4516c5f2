"""The small cache of a model with spans: local layers and heads keep only the keys that a later query can still see.

>>> from tenfold.attend import masformer
>>> from tenfold.kernels.local import Span
>>> from tenfold.models.tiny import tiny_model
>>> opened = tiny_model("llama")
>>> handle = masformer.convert(opened.model, full_layers=[0], span=Span("sliding", 8, sinks=2))
>>> cache = SpanCache(opened.model.config)
>>> ids = opened.tokenizer("a text that is longer than the span of its local layer", return_tensors="pt")
>>> _ = opened.model(**ids, past_key_values=cache)
>>> cache.layers[0].keys.shape[2], cache.layers[1].keys.shape[2]
(54, 9)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from tenfold.attend.layers import attention_layers
from tenfold.attend.spans import FIELD, NAME, by_span, head_spans
from tenfold.cache.crop import tokens_left
from tenfold.cache.gear.cache import gear_layers, head_sizes
from tenfold.cache.gear.layer import GearLayer
from tenfold.cache.whole import WholeCalls
from tenfold.config.gear import CacheConfig
from tenfold.errors import ModelError
from tenfold.kernels.local import FULL, Held, HeldHeads, Span, first_keys, held_positions
from tenfold.models.memory import stored_bytes

DRAFTED = 64
"""Tokens that may follow a crop, in several calls, before recording is taken to be over: no draft is as long."""


class _Reads:
    """Whether a model's attention function takes `Held` now. A copy of a cache asks the same model."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self) -> bool:
        return bool(self.config._attn_implementation == NAME)

    def __deepcopy__(self, memo: Any) -> _Reads:
        return self


class SpanLayer(CacheLayerMixin):
    """Keys and values of one local layer: sinks first, then the last keys, without a gap among these.

    Nothing is dropped before the attention of a call is done: only the attention function knows the padding, and with
    it which tokens of a row are its sinks.

    Args:
        span: what a query of the layer sees.
        index: of the layer, for errors.
        reads: whether the model's attention function takes `Held` now.
    """

    is_sliding = False
    """Not to transformers: it would make a mask of its own for the layer, and nothing reads one."""
    is_compileable = False
    is_croppable = True

    def __init__(self, span: Span, index: int, reads: Callable[[], bool]) -> None:
        super().__init__()
        self.span, self.index, self.reads = span, index, reads
        self.record_past = False
        self.cropped: int | None = None
        """Tokens that the last crop of this recording left; None before the first."""
        self.tokens = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device and shapes from the first keys and values; they may have no tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.sinks = torch.empty(len(key_states), 0, dtype=torch.int64, device=self.device)
        """Places in the text of the first keys that are held, ``[batch, sinks]``; -1 where a row has fewer."""
        self.seen: Tensor | None = None
        """What is no padding, ``[batch, tokens]``, while keys are kept that are yet to be sorted out."""
        self.padded = False
        self.tokens = 0
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Append keys and values; hand over what this call attends to.

        Args:
            key_states: ``[batch, kv_heads, tokens, channels]``.
            value_states: as ``key_states``.
            *args: what else transformers passes.
            **kwargs: likewise.

        Returns:
            Twice what is held, for the attention function of spans.

        Raises:
            ModelError: the model is not converted now; another batch size than before.
        """
        if not self.reads():
            raise ModelError(
                f"layer {self.index}: a cache of {self.span}, and the model's attention is not {NAME!r}",
                remedy="convert the model (tenfold.attend.masformer.convert), or take its own cache",
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if len(key_states) != len(self.keys):
            raise ModelError(
                f"layer {self.index}: {len(key_states)} rows after {len(self.keys)}",
                remedy="one cache is for one batch: call cache.reset(), or make another",
            )
        self._end_recording(key_states.shape[2])
        # Joining copies, so that nothing keeps the storage of a larger tensor alive.
        self.keys = torch.cat([self.keys, key_states], 2)
        self.values = torch.cat([self.values, value_states], 2)
        self.tokens += key_states.shape[2]
        whole = self.keys.shape[2] == self.tokens
        held = Held(self.keys, self.values, self.span, self.tokens, None if whole else self.places(), self.finish)
        return held, held

    def mark(self) -> Mapping[str, Any]:
        """What `take_back` needs to undo the next call; where nothing is dropped, without the keys."""
        whole = self.span == FULL and self.tokens
        return {name: value for name, value in vars(self).items() if not (whole and name in ("keys", "values"))}

    def take_back(self, before: Mapping[str, Any]) -> None:
        """Be as at `mark`."""
        self.__dict__.update(before)
        if "keys" not in before:
            self.keys, self.values = (x[:, :, : self.tokens].clone() for x in (self.keys, self.values))

    def places(self) -> Tensor:
        """Of the held keys in the text, ``[batch, keys]``; -1 where a row has no key."""
        last = torch.arange(self._start, self.tokens, device=self.sinks.device)
        return torch.cat([self.sinks, last.expand(len(self.sinks), -1)], 1)

    @property
    def _start(self) -> int:
        """Place of the first of the last keys."""
        return self.tokens - (self.keys.shape[2] - self.sinks.shape[1])

    def finish(self, seen: Tensor | None) -> None:
        """Drop what no later query sees, after the attention of this call.

        Args:
            seen: what is no padding, ``[batch, tokens]``, bool; None is all.
        """
        if self.record_past:
            self.seen = seen
        else:
            self._drop(seen)

    def _drop(self, seen: Tensor | None) -> None:
        """Copies, never views: one would keep the whole prompt alive."""
        before = self.keys.shape[2] - self.span.reach
        if before <= self.span.sinks:  # so few more would be kept anyway; and what is reordered has lost something
            return
        self.padded |= seen is not None
        if not self.padded:  # the first keys that are held are the sinks
            count = self.span.sinks
            self.sinks = torch.arange(count, device=self.device).expand(len(self.keys), -1)
            self.keys, self.values = (
                torch.cat([x[:, :, :count], x[:, :, before:]], 2) for x in (self.keys, self.values)
            )
            return
        places = self.places()[:, :before]
        columns = first_keys(held_positions(places, seen), self.span.sinks)
        index = columns.clamp(min=0)
        self.sinks = torch.where(columns >= 0, places.gather(1, index), -1)
        index = index[:, None, :, None]
        self.keys = torch.cat([self.keys[:, :, :before].take_along_dim(index, 2), self.keys[:, :, before:]], 2)
        self.values = torch.cat([self.values[:, :, :before].take_along_dim(index, 2), self.values[:, :, before:]], 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Those of the whole text: a mask of padding shall arrive uncut."""
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        """All tokens seen, not only those that are held."""
        return self.tokens

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def activate_past_recording(self) -> None:
        """From now on nothing is dropped before `crop` has said which tokens stay.

        After a crop the next draft is recorded, and so on, until `DRAFTED` tokens have come in several calls without
        one: assisted decoding asks for this and never says that it has ended, and plain decoding does not crop.
        """
        self.record_past, self.cropped = True, None

    def _end_recording(self, coming: int) -> None:
        """Before a call: whether the last crop lies so far back that none will follow."""
        if not self.record_past or self.cropped is None or self.tokens == self.cropped:
            return
        if self.tokens + coming - self.cropped > DRAFTED:
            self.record_past, self.cropped = False, None
            self._drop(self.seen)
            self.seen = None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, and drop what is out of reach then.

        Args:
            tokens_to_remove: 0 or negative, as transformers gives it.

        Raises:
            ValueError: a positive number, or more tokens than there are.
            RuntimeError: keys that would be seen again were dropped.
        """
        left = tokens_left(tokens_to_remove, self.tokens)
        if not self.is_initialized:
            return
        if tokens_to_remove:
            if self._start > max(0, left - self.span.reach):
                raise RuntimeError(
                    f"crop({tokens_to_remove}): layer {self.index} has dropped keys that would be seen again. Call "
                    "activate_past_recording() before the tokens that may be removed."
                )
            self.keys, self.values = (x[:, :, :tokens_to_remove].clone() for x in (self.keys, self.values))
            self.tokens = left
        self._drop(None if self.seen is None else self.seen[:, :left])
        self.seen = None
        self.cropped = left if self.record_past else None

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return
        self.keys, self.values, self.sinks = change(self.keys), change(self.values), change(self.sinks)
        self.seen = None if self.seen is None else change(self.seen)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch by index, for beams."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def offload(self) -> None:
        """To the CPU."""
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Back to the layer's device."""
        self._map(lambda tensor: tensor.to(self.device, non_blocking=True))

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized, self.tokens, self.record_past, self.cropped = False, 0, False, None
        self.keys = self.values = self.sinks = self.seen = None  # type: ignore[assignment]


class HeadSpanLayer(CacheLayerMixin):
    """Keys and values of a layer whose KV heads see different spans: a `SpanLayer` for the heads of each.

    Args:
        groups: a span, and the KV heads that have it; those of `FULL` keep everything.
        index: of the layer, for errors.
        reads: whether the model's attention function takes `HeldHeads` now.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, groups: Mapping[Span, list[int]], index: int, reads: Callable[[], bool]) -> None:
        super().__init__()
        self.parts = [(heads, SpanLayer(span, index, reads)) for span, heads in groups.items()]

    def _each(self, act: Callable[[SpanLayer], Any]) -> None:
        for _, layer in self.parts:
            act(layer)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """As `SpanLayer.lazy_initialization`."""
        for heads, layer in self.parts:
            layer.lazy_initialization(key_states[:, heads], value_states[:, heads])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """As `SpanLayer.update`, with every head in the order of the model."""
        held = [(heads, layer.update(key_states[:, heads], value_states[:, heads])[0]) for heads, layer in self.parts]
        self.is_initialized = True
        return HeldHeads(tuple(held)), HeldHeads(tuple(held))

    def mark(self) -> Mapping[str, Any]:
        """As `SpanLayer.mark`."""
        return {"is_initialized": self.is_initialized, "parts": [layer.mark() for _, layer in self.parts]}

    def take_back(self, before: Mapping[str, Any]) -> None:
        """As `SpanLayer.take_back`."""
        self.is_initialized = before["is_initialized"]
        for (_, layer), state in zip(self.parts, before["parts"], strict=True):
            layer.take_back(state)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Those of the whole text."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """All tokens seen, not only those that are held."""
        return self.parts[0][1].get_seq_length()

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    @property
    def record_past(self) -> bool:
        """Whether a crop is waited for; transformers reads it, and sets it to False."""
        return any(layer.record_past for _, layer in self.parts)

    @record_past.setter
    def record_past(self, value: bool) -> None:
        for _, layer in self.parts:
            layer.record_past = value

    def activate_past_recording(self) -> None:
        """As `SpanLayer.activate_past_recording`."""
        self._each(SpanLayer.activate_past_recording)

    def crop(self, tokens_to_remove: int) -> None:
        """As `SpanLayer.crop`."""
        self._each(lambda layer: layer.crop(tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch by index, for beams."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        self._each(lambda layer: layer.batch_select_indices(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self._each(lambda layer: layer.batch_repeat_interleave(repeats))

    def offload(self) -> None:
        """To the CPU."""
        self._each(SpanLayer.offload)

    def prefetch(self) -> None:
        """Back to the layer's device."""
        self._each(SpanLayer.prefetch)

    def reset(self) -> None:
        """Forget everything."""
        self._each(SpanLayer.reset)
        self.is_initialized = False


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
        reads = _Reads(decoder)
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
    kv_heads, head_dim = head_sizes(decoder)
    layers = attention_layers(decoder)
    kept = len(layers) * kv_heads * tokens
    if spans:
        found = [span for layer in layers for span in head_spans(decoder, layer)]
        kept = sum(min(tokens, span.reach + span.sinks) for span in found)
    return 2 * batch * head_dim * itemsize * kept


def own_cache(model: Any, kv: CacheConfig | None = None) -> SpanCache | None:
    """The small cache of a model that has spans now; None for any other model, whose own cache will do.

    None also where layers keep a state beside their keys, and only the model's own cache holds both.

    >>> from tenfold.models.tiny import tiny_model
    >>> own_cache(tiny_model("llama").model) is None
    True
    """
    decoder = model.config.get_text_config(decoder=True)
    if getattr(decoder, FIELD, None) is None or decoder._attn_implementation != NAME:
        return None
    stock = DynamicCache(config=model.config).layers
    if kv is None and any(type(stock[layer]) is not DynamicLayer for layer in attention_layers(decoder)):
        return None
    return SpanCache(model.config, kv)
