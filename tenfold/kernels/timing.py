"""How long calls take, those that are compared taking turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from tenfold.models.inference import synchronize

ROUNDS = 4
HOPELESS = 3.0
"""Calls that take so many times as long as the fastest ones in a round are not timed again."""
_SWEPT = 2**26
_COPIES = 96

Name = TypeVar("Name", bound=str)


def copies_to_sweep(size: int) -> int:
    """How many copies of weights take turns so that they come from memory as in a model, whatever caches there are.

    Args:
        size: of one, in bytes.

    >>> copies_to_sweep(2**20), copies_to_sweep(100)
    (64, 96)
    """
    return max(3, min(_COPIES, _SWEPT // max(1, size)))


def in_turns(calls: Mapping[Name, Sequence[Callable[[], Any]]], device: torch.device) -> dict[Name, float]:
    """Seconds of one call of each kind; of several rounds the fastest.

    On the CPU, a round is the median of its calls, as other work on the machine prolongs single ones. On a GPU, a round
    is launched as a whole, as the steps of a model are.

    Args:
        calls: by kind, calls that do the same with other numbers.
        device: where they run.

    >>> sorted(in_turns({"a": [lambda: None], "b": [lambda: None]}, torch.device("cpu")))
    ['a', 'b']
    """
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        hopeless = HOPELESS * min(best.values(), default=0.0)
        for kind, own in calls.items():
            if not hopeless < best[kind] < float("inf"):
                best[kind] = min(best[kind], _round(own, device))
    return best


def _round(calls: Sequence[Callable[[], Any]], device: torch.device) -> float:
    if device.type == "cuda":
        synchronize(device)
        start = time.perf_counter()
        for call in calls:
            call()
        synchronize(device)
        return (time.perf_counter() - start) / len(calls)
    times = []
    for call in calls:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
