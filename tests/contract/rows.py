"""One row per method: it inherits all behaviour tests of `test_contract.py`.

Add your method here; nothing else in this folder needs to change.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """What the contract needs to know of a method."""

    name: str
    """The registered stage."""
    keys: dict[str, Any]
    """Keys of its configuration for a run of seconds on a tiny model; ``data`` is added."""
    models: tuple[str, ...]
    """Tiny models that it must work on."""
    attach: Callable[[Any, Any], Any]
    """``(model, config) -> adapted model``."""
    detach: Callable[[Any], Any]
    """``(adapted model) -> model`` without residue."""
    report: Callable[[Any], dict[str, Any]]
    """What it touched, with ``matrices``, ``trainable parameters`` and ``bytes``."""
    impossible: tuple[dict[str, Any], ...]
    """Keys with values that must be refused."""
    baseline: bool = False
    """A method of others, kept for comparison: it has no oracles, benchmark or page of its own."""


def _lora() -> Row:
    from tenfold.adapt import lora

    return Row(
        name="lora",
        keys={"rank": 2, "steps": 8, "max_length": 48, "learning_rate": 0.02, "save_every": 3, "log_every": 2},
        models=("llama", "qwen3", "gemma3", "gpt2"),
        attach=lora.attach,
        detach=lambda model: model.unload(),
        report=lora.attached,
        impossible=(
            {"rank": 0},
            {"dropout": 1.0},
            {"alpha": -1},
            {"rank": 2, "budget": "1%"},
            {"budget": "a lot"},
            {"budget": "3ms"},
        ),
        baseline=True,
    )


def _adalora() -> Row:
    from tenfold.adapt import adalora

    handles = {}

    def attach(model, config):
        handle = adalora.attach(model, config, task=None)
        handles[id(handle.model)] = handle
        return handle.model

    return Row(
        name="adalora",
        keys={"rank": 2, "steps": 12, "max_length": 48, "learning_rate": 0.02, "save_every": 3, "log_every": 2},
        models=("llama", "qwen3", "gemma3", "gpt2"),
        attach=attach,
        detach=lambda model: handles[id(model)].detach(),
        report=lambda model: handles[id(model)].attached(),
        impossible=(
            {"rank": 0},
            {"initial_rank": 0},
            {"rank": 4, "initial_rank": 2},
            {"rank": 2, "budget": "1%"},
            {"budget": "3ms"},
            {"beta1": 1.0},
            {"tfinal": 0},
            {"tinit": 0.6, "tfinal": 0.6},
            {"min_rank": 3, "rank": 2},
            {"gamma": -1},
        ),
    )


ROWS = {row.name: row for row in (_lora(), _adalora())}
