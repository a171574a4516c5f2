"""What torch's optimizers do around a step: wrap one another, evaluate the loss by themselves, skip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


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
