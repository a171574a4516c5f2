"""Sizes of attention heads by a model's configuration."""

from __future__ import annotations

from typing import Any


def kv_heads(config: Any) -> int:
    """Heads of keys and values in a layer; those of queries where the configuration knows no others.

    Args:
        config: of one stack, as ``model.config.get_text_config(decoder=True)`` gives it.
    """
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def head_dim(config: Any) -> int:
    """Channels of one head: as stated (T5 calls it ``d_kv``), or an equal share of the hidden size.

    >>> from types import SimpleNamespace
    >>> head_dim(SimpleNamespace(hidden_size=64, num_attention_heads=4)), head_dim(SimpleNamespace(head_dim=32))
    (16, 32)
    """
    stated = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    return int(stated or config.hidden_size // config.num_attention_heads)
