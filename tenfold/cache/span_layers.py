"""Layers of a small cache: keys and values that a later query can still see, of one span or of one for each KV head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tenfold.attend.span_handle import Part, SpanHandle
from tenfold.attend.spans import NAME
from tenfold.cache.layer import CacheLayer, Change
from tenfold.errors import ModelError
from tenfold.kernels.local import FULL, AttentionWindow, first_keys, held_positions

DRAFTED = 64
"""Tokens that may follow a crop, in several calls, before recording is taken to be over: no draft is as long."""


class SpanLayer(CacheLayer):
    """Keys and values of one local layer: sinks first, then the last keys, without a gap among these.

    Nothing is dropped before attention has told the padding, and with it which tokens of a row are its sinks.

    Args:
        span: what a query of the layer sees.
        index: of the layer, for errors.
        reads: whether the model's attention function takes `SpanHandle` now.
    """

    def __init__(self, span: AttentionWindow, index: int, reads: Callable[[], bool]) -> None:
        super().__init__(index)
        self.span, self.reads = span, reads
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
            Twice a handle of what is held, for the attention function of spans.

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
        heads, places = list(range(self.keys.shape[1])), None if whole else self.places()
        part = Part(heads, self.keys, self.values, self.span, self.tokens, places)
        handle = SpanHandle(self.commit, (part,))
        return handle, handle

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

    def commit(self, mask: Tensor | None = None) -> None:
        """Drop what no later query sees.

        Args:
            mask: what is no padding, ``[batch, tokens]``, bool; None is all.
        """
        if self.record_past:
            self.seen = mask
        else:
            self._drop(mask)

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

    def get_seq_length(self) -> int:
        """All tokens seen, not only those that are held."""
        return self.tokens

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

    def keep(self, tokens: int) -> None:
        """Forget all but the first so many tokens, and drop what is out of reach then.

        Raises:
            RuntimeError: keys that would be seen again were dropped.
        """
        removed = self.tokens - tokens
        if removed:
            if self._start > max(0, tokens - self.span.reach):
                raise RuntimeError(
                    f"crop({-removed}): layer {self.index} has dropped keys that would be seen again. Call "
                    "activate_past_recording() before the tokens that may be removed."
                )
            self.keys, self.values = (x[:, :, :-removed].clone() for x in (self.keys, self.values))
            self.tokens = tokens
        self._drop(None if self.seen is None else self.seen[:, :tokens])
        self.seen = None
        self.cropped = tokens if self.record_past else None

    def change(self, change: Change) -> None:
        """Replace every tensor."""
        self.keys, self.values, self.sinks = (change(x, 0) for x in (self.keys, self.values, self.sinks))
        self.seen = None if self.seen is None else change(self.seen, 0)

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized, self.tokens, self.record_past, self.cropped = False, 0, False, None
        self.keys = self.values = self.sinks = self.seen = None  # type: ignore[assignment]


class HeadSpanLayer(CacheLayer):
    """Keys and values of a layer whose KV heads see different spans: a `SpanLayer` for the heads of each.

    Args:
        groups: a span, and the KV heads that have it; those of `FULL` keep everything.
        index: of the layer, for errors.
        reads: whether the model's attention function takes `SpanHandle` now.
    """

    def __init__(self, groups: Mapping[AttentionWindow, list[int]], index: int, reads: Callable[[], bool]) -> None:
        super().__init__(index)
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
        parts = []
        for heads, layer in self.parts:
            handle, _ = layer.update(key_states[:, heads], value_states[:, heads])
            parts += [replace(part, heads=heads) for part in handle.parts]
        self.is_initialized = True
        handle = SpanHandle(self.commit, tuple(parts))
        return handle, handle

    def commit(self, mask: Tensor | None = None) -> None:
        """As `SpanLayer.commit`."""
        self._each(lambda layer: layer.commit(mask))

    def mark(self) -> Mapping[str, Any]:
        """As `SpanLayer.mark`."""
        return {"is_initialized": self.is_initialized, "parts": [layer.mark() for _, layer in self.parts]}

    def take_back(self, before: Mapping[str, Any]) -> None:
        """As `SpanLayer.take_back`."""
        self.is_initialized = before["is_initialized"]
        for (_, layer), state in zip(self.parts, before["parts"], strict=True):
            layer.take_back(state)

    def get_seq_length(self) -> int:
        """All tokens seen, not only those that are held."""
        return self.parts[0][1].get_seq_length()

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

    def keep(self, tokens: int) -> None:
        """As `SpanLayer.keep`."""
        self._each(lambda layer: layer.keep(tokens))

    def change(self, change: Change) -> None:
        """As `SpanLayer.change`."""
        self._each(lambda layer: layer.change(change))

    def prefetch(self) -> None:
        """Back to the layer's device."""
        self._each(SpanLayer.prefetch)

    def reset(self) -> None:
        """Forget everything."""
        self._each(SpanLayer.reset)
        self.is_initialized = False
