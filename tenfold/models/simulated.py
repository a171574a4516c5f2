"""Models that compute as if their numbers had fewer bits: what is measured of them is quality, never time."""

from __future__ import annotations

from typing import Any

from tenfold.errors import ConfigError
from tenfold.models.layer_map import plain_model

MARK = "_tenfold_simulated"
"""The attribute of a model that holds what is simulated: its text says it in few words, its ``repr`` exactly."""


def simulated(model: Any) -> str | None:
    """What formats a model simulates; None of one that computes as it would anywhere.

    >>> from tenfold.models.tiny import tiny_model
    >>> simulated(tiny_model("llama").model)
    """
    there = getattr(plain_model(model), MARK, None)
    return None if there is None else str(there)


def refuse_simulated(model: Any, what: str, remedy: str) -> None:
    """Refuse what says nothing of a model that simulates.

    Raises:
        ConfigError: it does.
    """
    if (found := simulated(model)) is not None:
        raise ConfigError(f"{what}: the model simulates {found}", remedy=remedy)
