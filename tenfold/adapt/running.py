"""How long a run is, and what it shows: asked of the transformers Trainer, and TRL's that derive from it, or given."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from tenfold.errors import ConfigError, RunError


def running_trainer(model: nn.Module | None) -> Any | None:
    """The Trainer whose loop is making the current optimizer step for this model, if one is.

    A Trainer gives a model, and the hooks of an optimizer, no way to ask how many steps the run has; without looking at
    who called, every user would have to add a callback. It is looked up once for each optimizer, reads only the
    public ``trainer.state.max_steps``, and finds nothing in other loops.

    Args:
        model: that is trained.
    """
    module = sys.modules.get("transformers.trainer")
    frame = sys._getframe(1) if module is not None and model is not None else None
    while frame is not None:
        # Only the Trainer's own frames: to look at the locals of another would keep alive what they name.
        if frame.f_code.co_filename == module.__file__:  # type: ignore[union-attr]
            candidate = frame.f_locals.get("self")
            if isinstance(candidate, module.Trainer) and candidate.model is model:  # type: ignore[union-attr]
                return candidate
        frame = frame.f_back
    return None


class LogCallback(TrainerCallback):
    """Adds a method's numbers to what the Trainer logs, apart from the loss, which stays the task's alone.

    Args:
        numbers: gives them, by name.
    """

    def __init__(self, numbers: Callable[[], dict[str, float]]) -> None:
        self.numbers = numbers

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Called by the Trainer with the numbers of the last ``logging_steps`` steps."""
        if logs is not None and "loss" in logs:
            found = self.numbers()
            logs.update(found)
            state.log_history[-1].update(found)


def find_total(trainer: Any | None, given: int | None, configured: int | None, method: str) -> int:
    """Optimizer steps of a run: the running Trainer's, those given to ``attach``, or the configuration's.

    Raises:
        ConfigError: ``attach`` was told another number than the Trainer makes.
        RunError: nobody knows.
    """
    running = trainer.state.max_steps if trainer is not None else None
    if given is not None and running is not None and given != running:
        raise ConfigError(
            f"total_steps: {given}, but the Trainer makes {running} steps",
            remedy="leave total_steps out: it is taken from the Trainer",
        )
    total = given or running or configured
    if total is None:
        raise RunError(
            f"the number of optimizer steps of this run is unknown, and the phases of {method} depend on it",
            remedy="attach(model, config, total_steps=...), or set steps in the configuration",
        )
    return int(total)


def in_steps(span: float, total: int) -> int:
    """A number of steps, an integer, or a share of all of them, a float, in steps.

    >>> in_steps(7, 200), in_steps(0.05, 200)
    (7, 10)
    """
    return round(span * total) if isinstance(span, float) else span


def check_same(own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint of a run with other settings.

    Raises:
        RunError: names what differs.
    """
    differ = [f"{key} {saved.get(key)!r}, now {own[key]!r}" for key in own if saved.get(key) != own[key]]
    if differ:
        raise RunError(
            f"the checkpoint was written with another configuration: {'; '.join(differ[:4])}",
            remedy="resume with the saved configuration, or start a fresh run in another folder",
        )
