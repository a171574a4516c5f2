"""The typed results that every measurement returns and every report shows."""

from __future__ import annotations

from typing import Any, Literal

from tenfold.config.base import Record


class Metric(Record):
    """One number with what is needed to believe it."""

    name: str
    """What was measured, in the field's words: ``perplexity``, ``prefill``."""
    value: float
    """The value in ``unit``."""
    unit: str = ""
    """``tokens/s``, ``ms/token``, ``bytes``, ``bits/byte``; empty for pure numbers."""
    count: int | None = None
    """How many observations stand behind the value."""
    stderr: float | None = None
    """Standard error of the value, where the observations allow one."""
    interval: tuple[float, float] | None = None
    """A 95 % interval, where one is known."""
    better: Literal["lower", "higher", "neither"] = "neither"
    """Which direction is an improvement."""
    kind: Literal["figure", "timing", "memory"] = "figure"
    """``figure`` repeats exactly with the seed; ``timing`` and ``memory`` depend on the machine and the moment."""


class Result(Record):
    """What one measurement of one model gave."""

    task: str
    """``perplexity``, ``speed``, ``memory``, ``multiple_choice``, ..."""
    subject: str
    """Which model: ``before``, ``after``, or a difference such as ``after - before``."""
    metrics: tuple[Metric, ...]
    """The numbers, most important first."""
    settings: dict[str, Any] = {}
    """What the numbers depend on: data hash, lengths, batch, dtype, threads."""

    def metric(self, name: str) -> Metric:
        """The metric of that name.

        Raises:
            KeyError: when this result has none.
        """
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise KeyError(f"{self.task} has no metric {name!r}; it has {[m.name for m in self.metrics]}")
