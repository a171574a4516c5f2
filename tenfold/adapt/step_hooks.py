"""A method's work around each optimizer step, hung on torch's own hooks, so that there is nothing to call in any loop.

Torch's optimizers wrap one another (Lookahead, SAM), evaluate the loss by themselves (LBFGS) and skip steps; what is
here copes with that for every method that trains.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tenfold.errors import RunError

Replaced = tuple[Any, Any] | None
"""Arguments and keywords of ``optimizer.step`` in place of those given, or None."""


def family(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer and, after it, those that it wraps (Lookahead, SAM)."""
    found = [optimizer]
    for member in found:  # grows while it is read
        for value in vars(member).values():
            inner = value if isinstance(value, list | tuple) else [value]
            found += [other for other in inner if isinstance(other, Optimizer) and other not in found]
    return found


def replace_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], wrap: Callable[[Callable[[], Any]], Callable[[], Any]]
) -> tuple[Any, Any] | None:
    """The arguments of ``optimizer.step`` with its closure wrapped; None where there is none."""
    if callable(kwargs.get("closure")):
        return args, {**kwargs, "closure": wrap(kwargs["closure"])}
    if len(args) > 1 and callable(args[1]):
        return (args[0], wrap(args[1]), *args[2:]), kwargs
    return None


def skips(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer's step does nothing because a gradient scaler found a number that is not finite.

    The one place that waits for the device, and only where such a scaler is used (float16).
    """
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())


class StepHooks:
    """Calls a method around each step of whichever optimizer holds its tensors.

    Of optimizers that wrap others the outermost counts. A step that a gradient scaler skips is not followed by
    ``after``. State travels in the optimizer's own ``state_dict``, whatever loop saves it.

    Args:
        key: of the method's state within the optimizer's.
        tensors: gives the tensors that the method trains; one optimizer holds all of them, or none.
        before: ``(optimizer, args, kwargs)``, before a step; may replace its arguments.
        after: ``()``, after a step that was made.
        bind: ``(optimizer)``, once for each optimizer, before its first step.
        save: gives the state.
        load: takes it back.
    """

    def __init__(
        self,
        key: str,
        *,
        tensors: Callable[[], Sequence[Tensor]],
        before: Callable[[Optimizer, Any, Any], Replaced],
        after: Callable[[], None],
        bind: Callable[[Optimizer], None],
        save: Callable[[], dict[str, Any]],
        load: Callable[[dict[str, Any]], None],
    ) -> None:
        self._key, self._tensors = key, tensors
        self._before, self._after, self._bind, self._save, self._load = before, after, bind, save, load
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._stepping: weakref.ref[Optimizer] | None = None
        self._saved_by: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        # For all optimizers: which one holds the tensors is only known when it steps.
        self.handles: list[Any] = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]

    @property
    def optimizer(self) -> Optimizer | None:
        """The one that has stepped last, if it is still there."""
        return None if self._optimizer is None else self._optimizer()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Replaced:
        stepping = self._stepping() if self._stepping is not None else None
        if stepping is not None and any(inner is optimizer for inner in family(stepping)[1:]):
            return None  # a step within a step: the outer optimizer's (Lookahead, SAM) counts
        if not self._holds(optimizer):
            return None
        self._stepping = weakref.ref(optimizer)
        if self.optimizer is not optimizer:
            self._bind(optimizer)
            self._optimizer = weakref.ref(optimizer)
            self._save_with(optimizer)
        for member in family(optimizer):
            if self._key in member.state:  # left there by load_state_dict
                self._load(member.state.pop(self._key))  # type: ignore[call-overload]
        return self._before(optimizer, args, kwargs)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._stepping is None or self._stepping() is not optimizer:
            return
        self._stepping = None
        if not skips(optimizer):
            self._after()

    def _holds(self, optimizer: Optimizer) -> bool:
        if self.optimizer is optimizer:
            return True
        ours = {id(tensor) for tensor in self._tensors()}
        held = sum(id(p) in ours for group in optimizer.param_groups for p in group["params"])
        if 0 < held < len(ours):
            raise RunError(
                f"{type(optimizer).__name__} holds {held} of the adapter's {len(ours)} tensors",
                remedy="give all trainable parameters of the model to one optimizer",
            )
        return held > 0

    def _save_with(self, optimizer: Optimizer) -> None:
        for member in family(optimizer):  # whichever's state is saved
            if member not in self._saved_by:
                self._saved_by.add(member)
                self.handles += [
                    member.register_state_dict_pre_hook(self._put_state),
                    member.register_state_dict_post_hook(self._drop_state),
                ]

    def _put_state(self, optimizer: Optimizer) -> None:
        optimizer.state[self._key] = self._save()  # type: ignore[index]

    def _drop_state(self, optimizer: Optimizer, saved: Any) -> None:
        optimizer.state.pop(self._key, None)  # type: ignore[call-overload]
