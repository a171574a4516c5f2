"""Intervals that several rooms need; torch-free."""

from __future__ import annotations

from statistics import NormalDist

from scipy.special import stdtrit


def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t: half the width of a 95 % interval, in standard errors.

    >>> round(t_quantile(1), 3), round(t_quantile(10), 3)
    (12.706, 2.228)
    """
    return float(stdtrit(degrees, 0.975))


def wilson(points: float, games: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate; with nothing observed it is [0, 1].

    Args:
        points: successes, 0 to ``games``; a draw counts one half.
        games: trials, 0 or more.

    >>> [round(end, 3) for end in wilson(29, 40)]
    [0.572, 0.839]
    """
    if games == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.975)
    rate = points / games
    middle = (rate + z * z / (2 * games)) / (1 + z * z / games)
    half = z / (1 + z * z / games) * (rate * (1 - rate) / games + (z / (2 * games)) ** 2) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)
