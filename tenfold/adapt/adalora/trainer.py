"""What the transformers Trainer, and TRL's trainers that derive from it, know and show."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState


def running_trainer(model: nn.Module | None) -> Any | None:
    """The Trainer whose loop is making the current optimizer step for this model, if one is.

    A Trainer gives a model, and the hooks of an optimizer, no way to ask how many steps the run has; without looking at
    who called, every user would have to add a callback. It is looked up once for each optimizer, reads only the
    public ``trainer.state.max_steps``, and finds nothing in other loops.

    Args:
        model: the PEFT model that is trained.
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
    """Adds AdaLoRA's numbers to what the Trainer logs, apart from the loss, which stays the task's alone.

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
