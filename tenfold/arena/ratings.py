"""Who is stronger, and how sure that is: Bradley-Terry strengths from games of two, with intervals.

The strength of an agent is a number θ such that it beats another one with probability 1 / (1 + exp(θ' - θ)); a draw is
half a win. Games of one seed are not independent: sides are swapped on it, and with common random numbers
an agent that is lucky on a seed is lucky against everyone. So intervals come from drawing seeds, each with all that was
played on it.

Sources: Bradley and Terry, Biometrika 39 (1952); section 7.5 of the specification of the arenas.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, shortest_path
from scipy.special import expit, log_expit

from tenfold.core.statistics import wilson
from tenfold.errors import ConfigError, DataError
from tenfold.stage.record import Figure, Series, Table

Array = NDArray[np.float64]
FEWEST_SEEDS = 6
"""Seeds that can separate anyone: to win all of fewer has a chance above 5 % between equals (2 · ½⁵ = 6 %)."""
Z = 1.959964
"""Half the width of a 95 % interval in standard errors."""


@dataclass(frozen=True)
class SeedPair:
    """Two games of one seed, with sides swapped between them.

    Args:
        first: an agent.
        second: another one.
        seed: of both games.
        score: share of the points that ``first`` made, 0 to 1; a draw is half a point.
    """

    first: str
    second: str
    seed: int
    score: float

    def __post_init__(self) -> None:
        if self.first == self.second:
            raise ConfigError(f"{self.first} plays against itself", remedy="give the two different names")
        if not 0 <= self.score <= 1:
            raise DataError(
                f"{self.first} - {self.second}, seed {self.seed}: score {self.score} is not within [0, 1]",
                remedy="give the share of the points that the first one made",
            )


def wins_matrix(pairs: Sequence[SeedPair], names: Sequence[str]) -> Array:
    """Wins of each agent (rows) over each other one (columns), ``[agents, agents]``; a draw counts half to both.

    >>> wins_matrix([SeedPair("a", "b", 0, 0.75)], ["a", "b"]).tolist()
    [[0.0, 1.5], [0.5, 0.0]]
    """
    at = {name: index for index, name in enumerate(names)}
    wins = np.zeros((len(names), len(names)))
    for pair in pairs:
        wins[at[pair.first], at[pair.second]] += 2 * pair.score
        wins[at[pair.second], at[pair.first]] += 2 * (1 - pair.score)
    return wins


def comparison_groups(wins: Any) -> list[list[int]]:
    """Agents that are connected by games, as lists of their numbers, largest group first.

    >>> comparison_groups([[0, 3, 0], [1, 0, 0], [0, 0, 0]])
    [[0, 1], [2]]
    """
    wins = _checked(wins)
    count, labels = connected_components(csr_array(wins + wins.T), directed=False)
    groups = [np.flatnonzero(labels == group).tolist() for group in range(count)]
    return sorted(groups, key=lambda group: (-len(group), group))


def bradley_terry(wins: Any, *, ridge: float = 0.01, names: Sequence[str] | None = None) -> Array:
    """Strengths that make the results most probable, by Newton's method.

    Maximises Σ wᵢⱼ ln σ(θᵢ - θⱼ) - ridge · ‖θ‖² / 2; the strengths sum to 0.

    Args:
        wins: of rows over columns, ``[agents, agents]``, 0 or more; the diagonal plays no part.
        ridge: how strongly strengths are drawn to 0, on the scale of natural logarithms; 0 or more.
        names: of the agents, for errors.

    Returns:
        Strengths ``[agents]``; a difference of 1 is odds of e to 1.

    Raises:
        DataError: agents that no games connect, who cannot be compared; without a ridge also an agent or group that
            never lost, or never won, against all others, whose strength would be infinite.

    >>> bradley_terry([[0, 30], [10, 0]], ridge=0).round(4).tolist()
    [0.5493, -0.5493]
    """
    wins = _checked(wins)
    if not (math.isfinite(ridge) and ridge >= 0):
        raise ConfigError(f"ridge: {ridge} is below 0 or not finite", remedy="give 0 or more, such as 0.01")
    named = list(names) if names is not None else [f"agent {index}" for index in range(len(wins))]
    _check_connected(wins, named, ridge)
    return _fitted(wins, ridge)


def _checked(wins: Any) -> Array:
    wins = np.array(wins, dtype=np.float64)
    if wins.ndim != 2 or wins.shape[0] != wins.shape[1] or not (np.isfinite(wins) & (wins >= 0)).all():
        raise DataError(
            f"wins: {wins.shape} with values from {wins.min(initial=0):g}",
            remedy="give a square matrix of counts, 0 or more",
        )
    np.fill_diagonal(wins, 0)
    return wins


def _check_connected(wins: Array, names: Sequence[str], ridge: float) -> None:
    groups = comparison_groups(wins)
    if len(groups) > 1:
        listed = "; ".join(", ".join(names[index] for index in group) for group in groups)
        raise DataError(
            f"{len(groups)} groups of agents never met, so that they cannot be ranked together: {listed}",
            remedy="let some of each group play against each other, or rate each group by itself",
        )
    count, labels = connected_components(csr_array(wins), directed=True, connection="strong")
    if ridge == 0 and count > 1:
        for part in range(count):
            inside = labels == part
            for word, across in (("lost", wins[~inside][:, inside]), ("won", wins[inside][:, ~inside])):
                if not across.any():
                    who = ", ".join(names[index] for index in np.flatnonzero(inside).tolist())
                    raise DataError(
                        f"{who} never {word} against the others: the difference would be infinite",
                        remedy="give a ridge above 0, or play more games",
                    )


def _fitted(wins: Array, ridge: float) -> Array:
    """Strengths ``[..., agents]`` of many matrices ``[..., agents, agents]`` at once."""
    strengths = np.zeros(wins.shape[:-1])
    value = _objective(strengths, wins, ridge)
    for _ in range(200):
        lost = wins * _beaten(strengths)
        slope = lost.sum(-1) - lost.sum(-2) - ridge * strengths
        step = np.linalg.solve(_curvature(strengths, wins, ridge), slope[..., None])[..., 0]
        if np.abs(step).max(initial=0) < 1e-11:
            break
        size = np.ones(value.shape)
        for _ in range(30):  # far from the end a whole step may overshoot
            new = strengths + size[..., None] * step
            better = _objective(new, wins, ridge)
            short = better < value - 1e-12 * np.abs(value)
            if not short.any():
                break
            size = np.where(short, size / 2, size)
        strengths, value = new, better
    return strengths - strengths.mean(-1, keepdims=True)


def _difference(strengths: Array) -> Array:
    return strengths[..., :, None] - strengths[..., None, :]


def _beaten(strengths: Array) -> Array:
    """Chance that each agent (rows) is beaten by each other one."""
    return np.asarray(expit(-_difference(strengths)))


def _objective(strengths: Array, wins: Array, ridge: float) -> Array:
    fit = (wins * log_expit(_difference(strengths))).sum((-1, -2))
    return np.asarray(fit - ridge / 2 * (strengths**2).sum(-1))


def _curvature(strengths: Array, wins: Array, ridge: float) -> Array:
    """Minus the second derivatives, plus 1/n everywhere, which fixes the sum of the strengths and nothing else."""
    agents = wins.shape[-1]
    beaten = _beaten(strengths)
    shared = (wins + np.swapaxes(wins, -1, -2)) * beaten * (1 - beaten)
    return np.eye(agents) * (shared.sum(-1)[..., None] + ridge) - shared + 1 / agents


def standard_errors(strengths: Any, wins: Any, *, ridge: float = 0.01) -> Array:
    """Standard errors of strengths ``[agents]`` from the curvature of the likelihood, as if games were independent.

    >>> standard_errors(bradley_terry([[0, 30], [10, 0]], ridge=0), [[0, 30], [10, 0]], ridge=0).round(4).tolist()
    [0.1826, 0.1826]
    """
    strengths, wins = np.asarray(strengths, dtype=np.float64), _checked(wins)
    agents = len(wins)
    centre = np.eye(agents) - 1 / agents
    return np.sqrt(np.diag(centre @ np.linalg.inv(_curvature(strengths, wins, ridge)) @ centre))


@dataclass(frozen=True)
class Ratings:
    """Strengths of agents, strongest first.

    Args:
        names: of the agents.
        strengths: natural logarithms, which sum to 0.
        intervals: 95 %, from resampled seeds; of an agent that won or lost every game from the curvature, since
            resampling cannot know how many games it would take.
        errors: standard errors from the curvature.
        ranks: the best and the worst place that an agent may have; equal where it is separated from all others. Any
            separation of equal agents among all has a chance of about 5 %.
        wins: of rows over columns.
        cycles: agents each of whom clearly beats the next, and the last one the first: no strengths can say that.
        seeds: of the agent that played on the fewest.
        ridge: of the fit.
    """

    names: tuple[str, ...]
    strengths: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...]
    errors: tuple[float, ...]
    ranks: tuple[tuple[int, int], ...]
    wins: tuple[tuple[float, ...], ...]
    cycles: tuple[tuple[str, ...], ...]
    seeds: int
    ridge: float

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the ratings must know."""
        found = [
            f"intransitive: {' beats '.join((*cycle, cycle[0]))}; one strength for each agent cannot say that, look at "
            "the matrix of wins"
            for cycle in self.cycles
        ]
        if self.seeds < FEWEST_SEEDS:
            found.append(f"{self.seeds} seeds cannot separate anyone; play {FEWEST_SEEDS} or more")
        wins = np.array(self.wins)
        for index, name in enumerate(self.names):
            if 0 in (wins[index].sum(), wins[:, index].sum()):
                word = "lost" if wins[index].sum() == 0 else "won"
                found.append(
                    f"{name} {word} every game, so that games cannot say how far it is from the others: its strength "
                    "and interval are only a cautious guess"
                )
        return tuple(found)

    def table(self) -> Table:
        """Agents, the places that they may have, strengths and points."""
        wins = np.array(self.wins)
        rows = []
        for index, name in enumerate(self.names):
            best, worst = self.ranks[index]
            low, high = self.intervals[index]
            points, games = wins[index].sum(), wins[index].sum() + wins[:, index].sum()
            rows.append(
                (
                    name,
                    str(best) if best == worst else f"{best} to {worst}, cannot separate",
                    round(self.strengths[index], 3),
                    f"{low:.2f} to {high:.2f}",
                    round(points / games, 3),
                    round(games),
                )
            )
        columns = ("agent", "place", "strength", "its 95 % interval (seeds drawn anew)", "share of points", "games")
        return Table(title="Ratings", columns=columns, rows=tuple(rows))

    def matrix(self) -> Figure:
        """The share of the points that each agent (rows) made against each other one."""
        wins = np.array(self.wins)
        games = wins + wins.T
        share = np.divide(wins, games, out=np.full_like(wins, np.nan), where=games > 0)
        series = tuple(
            Series(
                name=name,
                x=self.names,
                y=tuple(None if math.isnan(value) else float(value) for value in row),
            )
            for name, row in zip(self.names, share, strict=True)
        )
        return Figure(
            kind="heatmap",
            title="Share of points of rows against columns",
            series=series,
            full=1.0,
        )


def rate(
    pairs: Sequence[SeedPair],
    names: Sequence[str] | None = None,
    *,
    ridge: float = 0.01,
    draws: int = 1000,
    seed: int = 0,
) -> Ratings:
    """Rate agents by their games.

    Args:
        pairs: what was played. Games that do not count are none of them. Where a sequential test ended a series early,
            the winner of that series is flattered: early ends are lucky ones.
        names: of all agents; by default those who played.
        ridge: as for `bradley_terry`, above 0.
        draws: how often the seeds are drawn anew.
        seed: of the draws.

    Raises:
        DataError: agents that no games connect, named by group.

    >>> games = [SeedPair("a", "b", seed, score) for seed, score in enumerate([1, 0.5, 1, 1, 0.5, 1, 0.75, 1])]
    >>> ratings = rate(games)
    >>> ratings.names, ratings.ranks
    (('a', 'b'), ((1, 1), (2, 2)))
    """
    if not ridge > 0:
        raise ConfigError(f"ridge: {ridge} is not above 0", remedy="give a small number, such as 0.01")
    names = sorted({name for pair in pairs for name in (pair.first, pair.second)}) if names is None else list(names)
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigError(f"agents: {', '.join(names) or 'none'}", remedy="give two or more, each with its own name")
    wins = wins_matrix(pairs, names)
    strengths = bradley_terry(wins, ridge=ridge, names=names)
    errors = standard_errors(strengths, wins, ridge=ridge)
    drawn = _fitted(_resampled(pairs, names, draws, seed), ridge)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    corner = (wins.sum(0) == 0) | (wins.sum(1) == 0)
    low, high = (np.where(corner, strengths + sign * Z * errors, end) for sign, end in ((-1, low), (1, high)))
    played = {name: {pair.seed for pair in pairs if name in (pair.first, pair.second)} for name in names}
    enough = np.array([len(played[name]) >= FEWEST_SEEDS for name in names])
    # [i, j]: i is above j in all but a few of the draws, so few that 5 % cover all of these comparisons
    few = 0.05 / (len(names) * (len(names) - 1))
    above = (np.quantile(_difference(drawn), few, axis=0) > 0) & enough & enough[:, None]
    ranks = [(1 + int(above[:, index].sum()), len(names) - int(above[index].sum())) for index in range(len(names))]
    order = sorted(range(len(names)), key=lambda index: (-strengths[index], names[index]))
    return Ratings(
        names=tuple(names[index] for index in order),
        strengths=tuple(float(strengths[index]) for index in order),
        intervals=tuple((float(low[index]), float(high[index])) for index in order),
        errors=tuple(float(errors[index]) for index in order),
        ranks=tuple(ranks[index] for index in order),
        wins=tuple(tuple(float(wins[row, column]) for column in order) for row in order),
        cycles=tuple(tuple(names[index] for index in cycle) for cycle in intransitive(wins)),
        seeds=min(map(len, played.values())),
        ridge=ridge,
    )


def _resampled(pairs: Sequence[SeedPair], names: Sequence[str], draws: int, seed: int) -> Array:
    """Matrices of wins ``[draws, agents, agents]`` of seeds drawn with replacement, each with all its games."""
    by_seed: dict[int, list[SeedPair]] = {}
    for pair in pairs:
        by_seed.setdefault(pair.seed, []).append(pair)
    each = np.stack([wins_matrix(played, names) for played in by_seed.values()])
    count = len(each)
    times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
    found: Array = np.tensordot(times.astype(np.float64), each, 1)
    return found


def intransitive(wins: Any) -> list[list[int]]:
    """Cycles of agents each of whom beats the next beyond chance (Wilson's interval of its points lies above ½).

    Returns:
        Numbers of agents, one shortest cycle for each group that is caught in some, smallest number first.

    >>> intransitive([[0, 40, 5], [5, 0, 40], [40, 5, 0]])
    [[0, 1, 2]]
    """
    wins = _checked(wins)
    beats = np.array(
        [[wilson(won, won + lost)[0] > 0.5 for won, lost in zip(*row, strict=True)] for row in _both(wins)]
    )
    _, labels = connected_components(csr_array(beats), directed=True, connection="strong")
    cycles = []
    for label, size in sorted(Counter(labels.tolist()).items()):
        if size > 1:
            inside = np.flatnonzero(labels == label)
            cycles.append([int(inside[step]) for step in _shortest_cycle(beats[np.ix_(inside, inside)])])
    return sorted(cycles)


def _both(wins: Array) -> list[tuple[list[float], list[float]]]:
    return list(zip(wins.tolist(), wins.T.tolist(), strict=True))


def _shortest_cycle(beats: NDArray[np.bool_]) -> list[int]:
    steps, before = shortest_path(csr_array(beats), unweighted=True, return_predecessors=True)
    # from i to j and back by the edge from j to i
    whole = np.where(beats.T & np.isfinite(steps), steps + 1, np.inf)
    start, at = np.unravel_index(int(whole.argmin()), whole.shape)
    cycle = [int(at)]
    while cycle[-1] != start:
        cycle.append(int(before[start, cycle[-1]]))
    cycle.reverse()
    first = cycle.index(min(cycle))
    cycle = cycle[first:] + cycle[:first]
    assert all(beats[one, other] for one, other in pairwise([*cycle, cycle[0]]))
    return cycle


def elo(ratings: Mapping[str, float], first: str, second: str, score: float, *, k: float = 32) -> dict[str, float]:
    """Elo ratings after one more game, for a display while games are played; they depend on the order of the games.

    Args:
        ratings: so far; who is not among them has 1500.
        first: an agent.
        second: its opponent.
        score: of the first, 0 to 1.
        k: most that one game can move.

    >>> elo({}, "a", "b", 1.0)
    {'a': 1516.0, 'b': 1484.0}
    """
    one, other = ratings.get(first, 1500.0), ratings.get(second, 1500.0)
    moved = k * (score - 1 / (1 + 10 ** ((other - one) / 400)))
    return {**ratings, first: one + moved, second: other - moved}
