"""A cache whose layers hold the same tokens, also after a call that failed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from tenfold.attend.handle import CacheHandle
from tenfold.cache.layer import CacheLayer
from tenfold.errors import ModelError


class WholeCalls(Cache):
    """A cache that takes back a call as a whole where one of its layers refuses it, or fails while it packs.

    The layers before that one have taken the call's keys already. Layers of ours undo it by ``mark`` and ``take_back``;
    those of transformers replace their tensors, so the old ones are put back. Recurrent states are overwritten: a cache
    with such layers is emptied where the failed call was its first, and else refuses all calls until `reset`.

    Args:
        layers: of the cache.
    """

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)
        dummies = getattr(self, "is_dummy", [False] * len(layers))
        self._last = max(
            number
            for number, (layer, dummy) in enumerate(zip(layers, dummies, strict=True))
            if isinstance(layer, CacheLayerMixin) and not dummy
        )
        self._before: dict[int, Mapping[str, Any]] = {}
        """What layers were before the call that runs now; empty between calls."""
        self._broken = False

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Cache.update`.

        Raises:
            ModelError: what a layer refuses; the cache then is as it was before the call.
        """
        if self._broken:
            raise ModelError(
                "an earlier call failed when recurrent states had changed, which cannot be put back",
                remedy="call cache.reset(), or make another cache",
            )
        if layer_idx in self._before:  # the call before broke off somewhere else
            self._before = {}
        self._before[layer_idx] = _mark(self.layers[layer_idx])
        with self._whole():
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if isinstance(keys, CacheHandle):
            keys = values = dataclasses.replace(keys, commit=partial(self._commit, layer_idx, keys.commit))
        elif layer_idx == self._last:
            self._before = {}
        return keys, values

    def _commit(self, layer_idx: int, commit: Callable[[Tensor | None], None], mask: Tensor | None) -> None:
        """The step is over in this layer."""
        with self._whole():
            commit(mask)
        if layer_idx == self._last:
            self._before = {}

    @contextmanager
    def _whole(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            first = not any(before.get("tokens", 0) for before in self._before.values())
            for index, before in self._before.items():
                _take_back(self.layers[index], before)
            self._before = {}
            recurrent = [layer for layer in self.layers if isinstance(layer, LinearAttentionCacheLayerMixin)]
            self._broken = bool(recurrent) and not first
            for layer in recurrent if first else ():
                layer.reset()
            raise

    def crop(self, tokens_to_remove: int) -> None:
        """As `transformers.Cache.crop`; a layer that cannot pack what stays does not keep the others from cropping."""
        failed = None
        for layer in self.layers:
            try:
                layer.crop(tokens_to_remove)
            except ModelError as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._before, self._broken = {}, False


def _mark(layer: Any) -> Mapping[str, Any]:
    state = layer.mark() if isinstance(layer, CacheLayer) else {**vars(layer)}
    return {"tokens": layer.get_seq_length(), "state": state}


def _take_back(layer: Any, before: Mapping[str, Any]) -> None:
    if isinstance(layer, CacheLayer):
        layer.take_back(before["state"])
    else:
        vars(layer).clear()
        vars(layer).update(before["state"])
