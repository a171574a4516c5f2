"""The smallest change of a metric that is called better or worse: what is certain may still be too small to matter."""

from __future__ import annotations

from dataclasses import dataclass

from tenfold.stage import numbers
from tenfold.stage.results import Metric


@dataclass(frozen=True)
class Threshold:
    """A change that matters: an amount in the metric's unit, or a share of the value before."""

    amount: float
    relative: bool = False

    def of(self, before: float) -> float:
        """The smallest change that matters, in the unit of the metric."""
        return self.amount * abs(before) if self.relative else self.amount

    def text(self, unit: str = "") -> str:
        """As a reader says it.

        >>> Threshold(0.03, relative=True).text(), Threshold(0.005).text("nats/token"), Threshold(0.01).text()
        ('3.0 %', '0.005 nats/token', '0.01')
        """
        return numbers.percent(self.amount) if self.relative else f"{self.amount:g} {unit}".rstrip()


TIMING = Threshold(0.03, relative=True)
"""A busy machine drifts by as much."""
MEMORY = Threshold(0.02, relative=True)
"""Peaks depend on the moment."""
SIZE = Threshold(0.01, relative=True)
"""Bytes that were counted: exact, but no one buys memory for less."""
NATS = Threshold(0.005)
"""Log-likelihoods: half a per cent of perplexity."""
POINT = Threshold(0.01)
"""Shares between 0 and 1 (accuracy, exact match, found): one percentage point."""
REST = Threshold(0.005, relative=True)
"""Everything else, perplexity and bits per byte among it: half a per cent of the value before."""


def threshold(before: Metric, after: Metric) -> Threshold:
    """The threshold of a metric by its kind, unit and range.

    >>> threshold(*2 * [Metric(name="accuracy", value=0.5, better="higher")]).text()
    '0.01'
    """
    if before.kind != "figure":
        return TIMING if before.kind == "timing" else MEMORY
    if is_bytes(before.unit):
        return SIZE
    if before.unit.partition("/")[0] == "nats":
        return NATS
    share = before.unit == "" and before.better == "higher" and all(0 <= one.value <= 1 for one in (before, after))
    return POINT if share else REST


def is_bytes(unit: str) -> bool:
    """Whether a unit counts bytes: ``bytes``, ``bytes/token``."""
    return unit.partition("/")[0] == "bytes"


def is_counted(metric: Metric) -> bool:
    """Whether the value has no spread because it was counted, not sampled: sizes of tensors."""
    return metric.kind == "figure" and is_bytes(metric.unit)
