"""The models that a stage looks at: before and after."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from tenfold.stage.context import Context


@dataclasses.dataclass(frozen=True)
class Subjects:
    """The models to look at, by name: ``before`` and ``after``, or ``model`` alone."""

    models: dict[str, tuple[Any, Callable[[], AbstractContextManager[Any]]]]
    """Name -> the model, and what to enter while it is used."""
    tokenizer: Any

    @contextmanager
    def use(self, name: str) -> Iterator[Any]:
        """The model of that name, while the block runs."""
        model, enter = self.models[name]
        with enter():
            yield model


def open_subjects(context: Context, baseline: bool) -> Subjects:
    """Open what the stages made and, with `baseline`, what they started from.

    When one adapter is all that lies between the two, both share one copy of the weights.
    """
    after = context.model.open()
    adapted = hasattr(after.model, "disable_adapter")
    if not baseline or (context.model == context.start and not adapted):
        return Subjects({"model": (after.model, nullcontext)}, after.tokenizer)
    one_less = dataclasses.replace(context.model, adapters=context.model.adapters[:-1])
    # An adapter folder that was opened by itself is measured beside its own base.
    if adapted and context.start in (one_less, context.model):
        before: Any = (after.model, after.model.disable_adapter)
    else:
        before = (context.start.open().model, nullcontext)
    return Subjects({"before": before, "after": (after.model, nullcontext)}, after.tokenizer)
