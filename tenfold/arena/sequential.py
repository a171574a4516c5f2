r"""Which of two agents is better, after as few games as that takes: a test that may be looked at after every pair.

Each side-swapped pair of games gives a score within [0, 1]. Someone bets on the scores of one agent, never more than
they have, at odds that are fair where the mean is m: a score x multiplies their wealth by p·x/m + (1-p)·(1-x)/(1-m).
Averaged over all p (Dirichlet(½, ½) weights, a universal portfolio), the wealth W of many such gamblers is expected to
stay 1 where m is the true mean, and by Ville's inequality it ever reaches 1/level with a chance of at most ``level``:
for any distribution of the scores, draws included, and however often one looks. The means that have not been refuted so
far are a confidence sequence; two agents are separated once ½ is not among them.

Sources: Cover and Ordentlich, "Universal portfolios with side information" (1996), for the weights; Waudby-Smith and
Ramdas, "Estimating means of bounded random variables by betting" (JRSS B 2024), and Orabona and Jun, "Tight
concentrations and confidence sequences from the regret of universal portfolio" (2024), for the test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import logsumexp

from tenfold.errors import ConfigError, DataError

NODES = 256
"""Gamblers; their mean is the integral over all p exactly for up to twice as many pairs, and a fair game for any."""
_P = np.cos((2 * np.arange(1, NODES + 1) - 1) * np.pi / (4 * NODES)) ** 2


def log_wealth(scores: Any, mean: float = 0.5, counts: Any = 1) -> NDArray[np.float64]:
    """Ln W of the hypothesis that scores have this mean; where it is true, W is expected to be 1 at any time.

    Args:
        scores: within [0, 1], ``[..., pairs]``; their order plays no part.
        mean: of the hypothesis, within (0, 1).
        counts: how often each score was made, ``[pairs]``.

    Returns:
        ``[...]``.

    >>> float(log_wealth([]).round(6)), float(log_wealth([1] * 10).round(3))
    (0.0, 5.195)
    """
    scores = np.asarray(scores, dtype=np.float64)[..., None, :]
    steps = np.log(_P[:, None] * scores / mean + (1 - _P)[:, None] * (1 - scores) / (1 - mean))
    found: NDArray[np.float64] = logsumexp((counts * steps).sum(-1), axis=-1) - math.log(NODES)
    return found


@dataclass(frozen=True)
class Judgement:
    """What a series of pairs says so far.

    Args:
        better: 0 for the first agent, 1 for the second, None where they cannot be separated.
        final: whether no further pair is wanted: somebody is better, or ``most`` pairs are played.
        pairs: how many were played.
        score: mean share of the points of the first agent; None where nothing was played.
        interval: its means that are not refuted, at any time of looking.
    """

    better: int | None
    final: bool
    pairs: int
    score: float | None
    interval: tuple[float, float]

    def text(self, first: str, second: str) -> str:
        """The verdict in words.

        >>> judge([1.0] * 9, most=100).text("a", "b")
        'a is better than b (9 pairs, 1.00 of the points, at least 0.59)'
        """
        if self.score is None:
            return f"{first} and {second}: no games that count"
        low, high = self.interval
        if self.better is None:
            said = "cannot separate" if self.final else "not separated yet:"
            points = f"{self.score:.2f} of the points [{low:.2f}, {high:.2f}]"
            return f"{said} {first} and {second} ({self.pairs} pairs, {points})"
        one, other, share, least = first, second, self.score, low
        if self.better == 1:
            one, other, share, least = second, first, 1 - self.score, 1 - high
        return f"{one} is better than {other} ({self.pairs} pairs, {share:.2f} of the points, at least {least:.2f})"


def judge(scores: Sequence[float], *, most: int, level: float = 0.05) -> Judgement:
    """Whether the first or the second agent is better, as far as these pairs say.

    Args:
        scores: share of the points of the first agent in each pair of games that counts, 0 to 1.
        most: pairs after which the question is left open.
        level: chance, at most, of ever separating two equal agents, however often this is asked while games go on.

    Raises:
        ConfigError: ``most`` or ``level`` out of range.
        DataError: a score out of range.

    >>> judge([0.5] * 50, most=50).text("a", "b")
    'cannot separate a and b (50 pairs, 0.50 of the points [0.46, 0.54])'
    >>> judge([1.0, 0.5, 1.0], most=100).final
    False
    """
    if most < 1:
        raise ConfigError(f"most: {most} is below 1", remedy="give the number of pairs to play at most")
    if not 0 < level < 1:
        raise ConfigError(f"level: {level} is not within (0, 1)", remedy="give a small chance of error, such as 0.05")
    found = np.asarray(scores, dtype=np.float64)
    if not ((found >= 0) & (found <= 1)).all():
        raise DataError(f"scores: {list(scores)[:8]} are not within [0, 1]", remedy="give shares of the points")
    if not len(found):
        return Judgement(None, False, 0, None, (0.0, 1.0))
    mean, better = float(found.mean()), None
    if log_wealth(found) >= -math.log(level):
        better = 0 if mean > 0.5 else 1
    return Judgement(better, better is not None or len(found) >= most, len(found), mean, unrefuted(found, level))


def unrefuted(scores: Any, level: float = 0.05) -> tuple[float, float]:
    """The means that the scores have not refuted, at whatever time one looks.

    Args:
        scores: within [0, 1], ``[pairs]``, one or more.
        level: chance, at most, that the true mean is ever outside.
    """
    found, counts = np.unique(np.asarray(scores, dtype=np.float64), return_counts=True)
    middle, limit = float(found @ counts / counts.sum()), -math.log(level)

    def over(mean: float) -> float:
        return float(log_wealth(found, mean, counts)) - limit

    least = 1e-9
    inside = min(max(middle, least), 1 - least)  # ln W is at most 0 about there
    low = 0.0 if over(least) <= 0 else brentq(over, least, inside, xtol=1e-7)
    high = 1.0 if over(1 - least) <= 0 else brentq(over, inside, 1 - least, xtol=1e-7)
    return float(low), float(high)
