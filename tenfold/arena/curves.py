"""Reward as a function of latency, or of the quality of decisions, on the same seeds at every point.

>>> curve = reward_curve("late", [0.0, 0.5, 1.0], lambda latency, seed: seed % 3 - latency, range(30))
>>> curve.means
(1.0, 0.5, 0.0)
>>> curve.change(2, 0)  # each seed loses exactly as much: paired, nothing is uncertain
(-1.0, (-1.0, -1.0))
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeVar

from tenfold.core.statistics import t_quantile, wilson
from tenfold.errors import ConfigError
from tenfold.stage.record import Figure, Series, Table
from tenfold.stage.store import Store, Tell

Point = TypeVar("Point", float, str)


@dataclass(frozen=True)
class RewardCurve:
    """Rewards of one agent at some points.

    Args:
        name: of the agent.
        x: the points: seconds of latency, shares of right decisions, or names.
        rewards: at each point one for each seed, the seeds in the same order.
        bounded: whether they are scores within [0, 1], such as points of games. Their intervals are Wilson's, which
            stay wide where every game is won; others are Student's t over seeds.
    """

    name: str
    x: tuple[float | str, ...]
    rewards: tuple[tuple[float, ...], ...]
    bounded: bool = False

    @cached_property
    def means(self) -> tuple[float, ...]:
        """Of each point."""
        return tuple(statistics.fmean(values) for values in self.rewards)

    @cached_property
    def intervals(self) -> tuple[tuple[float, float], ...]:
        """95 %, of each point by itself; for the difference of two points see `change`."""
        if self.bounded:
            return tuple(wilson(sum(values), len(values)) for values in self.rewards)
        return tuple(_interval(values) for values in self.rewards)

    def change(self, at: int, since: int) -> tuple[float, tuple[float, float]]:
        """Mean reward at a point minus that at another one, paired by seed, and its 95 % interval."""
        pairs = zip(self.rewards[at], self.rewards[since], strict=True)
        changes = [one - other for one, other in pairs]
        return statistics.fmean(changes), _interval(changes)

    @cached_property
    def best(self) -> tuple[int, ...]:
        """The point of the highest mean, and those that cannot be separated from it, highest first."""
        order = sorted(range(len(self.x)), key=lambda at: -self.means[at])
        return tuple(at for at in order if at == order[0] or self.change(at, order[0])[1][1] >= 0)


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's t, 95 %; of a single value nothing is known."""
    if len(values) < 2:
        return -math.inf, math.inf
    mean, half = statistics.fmean(values), t_quantile(len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return mean - half, mean + half


def reward_curve(
    name: str,
    x: Sequence[Point],
    measure: Callable[[Point, int], float],
    seeds: Sequence[int],
    *,
    bounded: bool = False,
    store: Store | None = None,
    workers: int = 1,
    tell: Tell = lambda done, total: None,
) -> RewardCurve:
    """Measure the reward at each point on each seed.

    Args:
        name: of the agent; finished measurements are kept under it.
        x: the points, each once.
        measure: the reward at a point, on a seed. With several workers a function of a module.
        seeds: the same at every point, two or more for an interval.
        bounded: whether rewards are scores within [0, 1].
        store: where finished measurements are kept; by default in memory.
        workers: processes.
        tell: called with measurements done, and how many there are.

    Raises:
        ConfigError: no point or seed, or one that is given twice.
    """
    for word, given in (("points", x), ("seeds", seeds)):
        if not given or len(set(given)) < len(given):
            raise ConfigError(f"{name}: {word}: {list(given)}", remedy="give one or more, each once")
    keys = {(point, seed): f"reward {json.dumps([name, point, seed])}" for point in x for seed in seeds}
    store = Store(None) if store is None else store
    items = {key: item for item, key in keys.items()}
    found = store.map(items, partial(_measured, measure), of=float, workers=workers, tell=tell)
    rewards = tuple(tuple(found[keys[point, seed]] for seed in seeds) for point in x)
    return RewardCurve(name, tuple(x), rewards, bounded)


def _measured(measure: Callable[[Point, int], float], item: tuple[Point, int]) -> float:
    return measure(*item)


def curves_figure(curves: Sequence[RewardCurve], *, title: str, x_label: str, y_label: str) -> Figure:
    """Some curves with their intervals, as a figure of the report."""
    series = [
        Series(
            name=curve.name,
            x=curve.x,
            y=curve.means,
            **_ends(curve),
        )
        for curve in curves
    ]
    return Figure(
        kind="line",
        title=title,
        x_label=x_label,
        y_label=y_label,
        series=tuple(series),
        caption=" ".join(filter(None, map(_best_in_words, curves))),
    )


def _ends(curve: RewardCurve) -> dict[str, tuple[float, ...]]:
    """Error bars, where there are seeds enough for some."""
    if not all(math.isfinite(end) for ends in curve.intervals for end in ends):
        return {}
    return {"low": tuple(low for low, _ in curve.intervals), "high": tuple(high for _, high in curve.intervals)}


def _best_in_words(curve: RewardCurve) -> str:
    if len(curve.rewards[0]) < 2:
        return ""  # one seed separates nothing, and its highest point may be luck
    first, *others = (f"{curve.x[at]:g}" if isinstance(curve.x[at], float) else str(curve.x[at]) for at in curve.best)
    return f"{curve.name} is best at {first}" + (f"; cannot separate from {', '.join(others)}." if others else ".")


def _range(low: float, high: float, form: str) -> str:
    """An interval; a dash where nothing is known."""
    return f"[{low:{form}}, {high:{form}}]" if math.isfinite(low) and math.isfinite(high) else "–"


def curves_table(curves: Sequence[RewardCurve], *, title: str, x_label: str) -> Table:
    """Some curves as numbers, each point also against the first one of its curve on the same seeds."""
    rows = []
    for curve in curves:
        for at, (point, mean, (low, high)) in enumerate(zip(curve.x, curve.means, curve.intervals, strict=True)):
            change, (least, most) = curve.change(at, 0)
            beside = f"{change:+.4f} {_range(least, most, '+.4f')}" if at else ""
            rows.append((curve.name, point, round(mean, 6), _range(low, high, ".4f"), beside))
    kind = "Wilson" if all(curve.bounded for curve in curves) else "Student's t"
    columns = (
        "agent", x_label, "mean reward", f"95 % interval ({kind}, over seeds)",
        "change from the first (Student's t, paired by seed)",
    )  # fmt: skip
    return Table(title=title, columns=columns, rows=tuple(rows))
