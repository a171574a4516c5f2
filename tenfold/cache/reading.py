"""Which model a cache belongs to, and whether that model's attention reads its handles now."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakValueDictionary

from tenfold.attend.attention import reader

_LIVE: WeakValueDictionary[int, Any] = WeakValueDictionary()
"""Configurations of models that have had a cache of ours, by their id."""


class Reads:
    """Whether the attention function of the cache's model reads the handles of its layers now.

    A copy of a cache is for the same model: ``copy.deepcopy`` keeps the model's configuration itself, not a copy that
    nobody will ever switch, and ``torch.load`` finds it again; in another process it finds a model of equal
    configuration once our attention stands before that model's own.

    Args:
        config: of the model's decoder; the function that its attention runs as is looked up at each call.
        by: the function of ours that it has to be; None for any. Only what any of them reads can be handed over as
            tensors instead, so a loaded cache whose model is not known yet counts as read where ``by`` is given.
    """

    def __init__(self, config: Any, by: Callable[..., Any] | None = None) -> None:
        self.config, self.by = config, by
        self.like: Mapping[str, Any] = {}
        if config is not None:
            _LIVE[id(config)] = config

    def __call__(self) -> bool:
        """Whether to hand over handles."""
        if self.config is None:  # loaded from a file
            found = (config for config in list(_LIVE.values()) if self._reads(config) and _content(config) == self.like)
            self.config = next(found, None)
        return self.by is not None if self.config is None else self._reads(self.config)

    def _reads(self, config: Any) -> bool:
        found = reader(config)
        return found is not None and self.by in (None, found)

    def __deepcopy__(self, memo: dict[int, Any]) -> Reads:
        """The same: it remembers nothing of a cache."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        content = self.like if self.config is None else _content(self.config)
        return _loaded, (os.getpid(), id(self.config), content, self.by)


def _loaded(process: int, place: int, content: Mapping[str, Any], by: Callable[..., Any] | None) -> Reads:
    config = _LIVE.get(place) if process == os.getpid() else None
    reads = Reads(config if config is not None and _content(config) == content else None, by)
    reads.like = content
    return reads


def _content(config: Any) -> dict[str, Any]:
    """What makes two models alike as far as their caches go."""
    return {key: value for key, value in config.to_dict().items() if isinstance(value, int | str) and key[0] != "_"}
