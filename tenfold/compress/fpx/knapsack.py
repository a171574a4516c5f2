"""One option for each unit, such that the losses sum to the least and the costs to no more than a budget.

The multiple-choice knapsack. Partial choices are kept that no other beats in both cost and loss, and of those only
the ones that can still end below what a greedy choice reaches: how far each could get is bounded by its units' convex
hulls. On the plans of language models few remain, so the result is exact without cutting costs into bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenfold.errors import ConfigError

KEPT = 2**12
"""Partial choices kept at most: of those whose costs share a bin the one with the best bound, at its own cost. Where
there are fewer the result is exact; else it is still within the budget, and no worse than the greedy one."""

_DIGITS = 2**50
_SLACK = 2.0**24
"""Of a bound in floating point, beside losses that sum to at most 2^61."""

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


def solve(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float) -> list[int]:
    """Choose an option for each unit.

    Of equal losses the choice with fewer changed units is taken (option 0 is to leave a unit as it is), then the
    cheaper one, then the one that changes the units that come first.

    Args:
        losses: of each unit's options; of any unit at least one.
        costs: in the same shape. Whole numbers (bytes) are summed exactly, others (milliseconds) to 11 digits.
        budget: for the sum of costs, never exceeded.

    Returns:
        The place of each unit's option.

    Raises:
        ConfigError: a budget below the cheapest choice, which is named; values that are not finite; shapes that differ.

    >>> solve([[0, 1], [0, 2], [0, 3]], [[10, 0], [1, 0], [12, 0]], budget=11)  # to save 12 of 23
    [0, 0, 1]
    """
    _check(losses, costs)
    if not losses:
        return []
    keys = _as_integers(losses)
    extras, room = _above_cheapest(costs, budget)
    steps = _hulls(keys, extras)
    greedy = _greedy(keys, extras, steps, room)
    limit = sum(int(key[option]) for key, option in zip(keys, greedy, strict=True))
    start = sum(int(key[_cheapest(key, extra)]) for key, extra in zip(keys, extras, strict=True))
    front, trail = _Front.empty(), []
    for unit, (key, extra) in enumerate(zip(keys, extras, strict=True)):
        start -= int(key[_cheapest(key, extra)])
        front, parents, options = front.extended(key, extra, room)
        kept = front.promising(_Bound.of(start, steps, unit + 1), room, limit)
        front = front.at(kept)
        trail.append((parents[kept], options[kept]))
    place, choices = len(front.keys) - 1, []  # the costliest loses least
    if place < 0 or front.keys[place] > limit:  # too many to keep them all, and the good ones were dropped
        return greedy
    for parents, options in reversed(trail):
        choices.append(int(options[place]))
        place = int(parents[place])
    return choices[::-1]


def _check(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[float]]) -> None:
    if [len(own) for own in losses] != [len(own) for own in costs]:
        raise ConfigError("losses, costs: of different shapes", remedy="give one of each for every option of a unit")
    for what, values in (("losses", losses), ("costs", costs)):
        for unit, own in enumerate(values):
            if not len(own):
                raise ConfigError(f"{what}: unit {unit} has no option", remedy="leave the unit out")
            if not np.isfinite(np.asarray(own, dtype=np.float64)).all():
                raise ConfigError(f"{what}: unit {unit} has {list(own)}", remedy="give finite numbers")


def _as_integers(losses: Sequence[Sequence[float]]) -> list[Integers]:
    """Losses above each unit's least as integers, times units + 1, plus 1 where a unit changes.

    So sums do not depend on their order, ties are ties, and fewer changes decide them.
    """
    above = [np.asarray(own, dtype=np.float64) - min(own) for own in losses]
    total = sum(float(own.max()) for own in above) or 1.0
    # A power of two: whole numbers keep their proportions.
    factor = 2.0 ** math.floor(math.log2(2**61 / (len(losses) + 1) / total))
    keys = []
    for own in above:
        key = np.rint(own * factor).astype(np.int64) * (len(losses) + 1)
        key[1:] += 1
        keys.append(key)
    return keys


def _above_cheapest(costs: Sequence[Sequence[float]], budget: float) -> tuple[list[Integers], int]:
    """Costs above each unit's least as integers, and how much of the budget is left for them."""
    whole = all(float(cost).is_integer() for own in costs for cost in own)
    least: Any = sum(int(min(own)) if whole else float(min(own)) for own in costs)
    most: Any = sum(int(max(own)) if whole else float(max(own)) for own in costs)
    unit: Any = 1 if whole else max(abs(least), abs(most)) / _DIGITS
    tolerance = 0 if whole else len(costs)  # each cost is rounded to the nearest
    room = min(budget, most) - least  # NaN stays NaN
    if not room >= -tolerance * unit:
        raise ConfigError(
            f"budget: {budget:,} is below {least:,}, what the cheapest option of every unit costs",
            remedy=f"give {least:,} or more, or add a cheaper option",
        )
    if whole:
        extras = [np.array([int(cost) - int(min(own)) for cost in own], dtype=np.int64) for own in costs]
    else:
        extras = [np.rint((np.asarray(own) - min(own)) / unit).astype(np.int64) for own in costs]
    return extras, int(room // unit) + tolerance


@dataclass(frozen=True)
class _Steps:
    """From option to option along the convex hulls of all units, those that save most for their cost first."""

    units: Integers
    options: Integers
    costs: Integers
    saved: Integers


def _hulls(keys: Sequence[Integers], extras: Sequence[Integers]) -> _Steps:
    found: list[tuple[float, int, int, int, int, int]] = []
    for unit, (key, extra) in enumerate(zip(keys, extras, strict=True)):
        hull = _hull(key, extra)
        for number, (before, after) in enumerate(pairwise(hull)):
            cost, saved = int(extra[after] - extra[before]), int(key[before] - key[after])
            found.append((-saved / cost, unit, number, after, cost, saved))
    found.sort()
    table = np.array([row[1:] for row in found], dtype=np.int64).reshape(-1, 5)
    return _Steps(table[:, 0], table[:, 2], table[:, 3], table[:, 4])


def _hull(key: Integers, extra: Integers) -> list[int]:
    """Options on the lower convex hull, from the cheapest one to the one that loses least."""
    hull: list[int] = []
    for option in map(int, np.lexsort((key, extra))):
        if hull and key[option] >= key[hull[-1]]:
            continue
        while len(hull) > 1 and _above(key, extra, hull[-2], hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _cheapest(key: Integers, extra: Integers) -> int:
    """Of equally cheap options the one that loses least."""
    return int(np.lexsort((key, extra))[0])


def _above(key: Integers, extra: Integers, left: int, middle: int, right: int) -> bool:
    """Whether the middle point is on or above the line between the others; Python's integers do not overflow."""
    rise = int(key[left] - key[middle]) * int(extra[right] - extra[left])
    return rise <= int(key[left] - key[right]) * int(extra[middle] - extra[left])


def _greedy(keys: Sequence[Integers], extras: Sequence[Integers], steps: _Steps, room: int) -> list[int]:
    """The steps that save most for their cost, as long as they fit; after one that does not a unit stays."""
    choices = [_cheapest(key, extra) for key, extra in zip(keys, extras, strict=True)]
    stuck: set[int] = set()
    for unit, option, cost in zip(steps.units.tolist(), steps.options.tolist(), steps.costs.tolist(), strict=True):
        if unit in stuck:
            continue
        if cost > room:
            stuck.add(unit)
            continue
        choices[unit] = option
        room -= cost
    return choices


@dataclass(frozen=True)
class _Bound:
    """The least that units could lose together, by what they may cost, were steps divisible."""

    costs: Floats
    keys: Floats

    @classmethod
    def of(cls, start: int, steps: _Steps, first: int) -> _Bound:
        """That of all units from one on, which lose ``start`` at their cheapest options."""
        later = steps.units >= first
        costs = np.concatenate(([0], steps.costs[later])).cumsum()
        saved = np.concatenate(([0], steps.saved[later])).cumsum()
        return cls(costs.astype(np.float64), (start - saved).astype(np.float64))


@dataclass(frozen=True)
class _Front:
    """Choices for the first units that no other beats, by ascending cost and so by descending loss.

    Args:
        costs: of each.
        keys: their losses.
        ranks: which of those with equal costs and keys comes first.
    """

    costs: Integers
    keys: Integers
    ranks: Integers

    @classmethod
    def empty(cls) -> _Front:
        nothing = np.zeros(1, dtype=np.int64)
        return cls(nothing, nothing, nothing)

    def at(self, places: Integers) -> _Front:
        return _Front(self.costs[places], self.keys[places], self.ranks[places])

    def extended(self, key: Integers, extra: Integers, room: int) -> tuple[_Front, Integers, Integers]:
        """With every option of the next unit: the front, and of each choice the one it extends and the option."""
        costs = (self.costs[:, None] + extra).ravel()
        keys = (self.keys[:, None] + key).ravel()
        preferred = (np.arange(len(key)) - 1) % len(key)  # to leave the unit as it is comes last
        ranks = (self.ranks[:, None] * len(key) + preferred).ravel()
        order = np.lexsort((ranks, keys, costs))
        order = order[costs[order] <= room]
        least = np.minimum.accumulate(keys[order])
        order = order[np.concatenate(([True], keys[order][1:] < least[:-1]))[: len(order)]]
        dense = np.empty(len(order), dtype=np.int64)
        dense[ranks[order].argsort()] = np.arange(len(order))
        return _Front(costs[order], keys[order], dense), order // len(key), order % len(key)

    def promising(self, rest: _Bound, room: int, limit: int) -> Integers:
        """The places of those that may still end at or below a limit."""
        reached = self.keys + np.interp(room - self.costs, rest.costs, rest.keys)
        places = np.flatnonzero(reached <= limit + _SLACK)
        if len(places) > KEPT:
            low, high = self.costs[places[0]], self.costs[places[-1]]
            bins = (self.costs[places] - low) // ((high - low) // KEPT + 1)
            order = np.lexsort((reached[places], bins))
            first = np.concatenate(([True], np.diff(bins[order]) > 0))
            places = np.sort(places[order[first]])
        return places
