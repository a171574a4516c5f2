"""Which model a packed cache belongs to, and whether that model's attention reads views now."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any
from weakref import WeakValueDictionary

from tenfold.attend.attention import PREFIX, base_implementation

_LIVE: WeakValueDictionary[int, Any] = WeakValueDictionary()
"""Configurations of models that have had a packed cache, by their id."""


class Reads:
    """Whether the attention function of the cache's model reads views now.

    A copy of a cache is for the same model: ``copy.deepcopy`` keeps the model's configuration itself, not a copy that
    nobody will ever switch, and ``torch.load`` finds it again; in another process it finds a model of equal
    configuration once our attention stands before that model's own.

    Args:
        config: of the model's decoder; its attention implementation is looked up at each call.
    """

    def __init__(self, config: Any) -> None:
        self.config: Any = config
        self.like: Mapping[str, Any] = {}
        if config is not None:
            _LIVE[id(config)] = config

    def __call__(self) -> bool:
        """Whether to hand over views; whole tensors otherwise."""
        if self.config is None:  # loaded from a file
            found = (config for config in list(_LIVE.values()) if _installed(config) and _content(config) == self.like)
            self.config = next(found, None)
        return self.config is not None and _installed(self.config)

    def __deepcopy__(self, memo: dict[int, Any]) -> Reads:
        """The same: it remembers nothing of a cache."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        content = self.like if self.config is None else _content(self.config)
        return _loaded, (os.getpid(), id(self.config), content)


def _loaded(process: int, place: int, content: Mapping[str, Any]) -> Reads:
    config = _LIVE.get(place) if process == os.getpid() else None
    reads = Reads(config if config is not None and _content(config) == content else None)
    reads.like = content
    return reads


def _installed(config: Any) -> bool:
    """Whether our attention function stands before the model's own, and takes views there."""
    name = str(config._attn_implementation)
    return name.startswith(PREFIX) and base_implementation(config) != "flex_attention"


def _content(config: Any) -> dict[str, Any]:
    """What makes two models alike as far as their caches go."""
    return {key: value for key, value in config.to_dict().items() if isinstance(value, int | str) and key[0] != "_"}
