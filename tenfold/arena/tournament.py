"""Everyone against everyone, on the same seeds, with sides swapped, for as long as there is something to find out.

Games are played in rounds. After each round every two agents are judged by all their pairs of games so far
(`tenfold.arena.sequential.judge`); those that are separated play no more. All play the same seeds from the same first
one, so that luck is common to all, and each seed twice with sides swapped, so that no side counts.

A pair of games counts if both of them do: what is left of a half-rated pair would favour a side.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations

from tenfold.arena.ratings import SeedPair
from tenfold.arena.sequential import Judgement, judge
from tenfold.errors import ConfigError
from tenfold.stage.record import Table
from tenfold.stage.store import Store, Tell


@dataclass(frozen=True)
class Played:
    """What a game gave.

    Args:
        score: of the first agent, 0 to 1; a draw is one half.
        rated: whether it counts; a game in which an agent never gave a valid answer does not.
        facts: further figures of it, such as frames or invalid answers.
    """

    score: float
    rated: bool = True
    facts: Mapping[str, float] = field(default_factory=dict)


Play = Callable[[str, str, int], Played]
"""Plays a game: the names of the first and the second agent, and the seed of all that the game draws."""


@dataclass(frozen=True)
class Matchup:
    """Two agents and their games.

    Args:
        first: an agent.
        second: the other one.
        games: by seed, the game in which ``first`` was first, then the other.
        verdict: which is better, as far as they say.
    """

    first: str
    second: str
    games: Mapping[int, tuple[Played, Played]]
    verdict: Judgement

    @property
    def pairs(self) -> list[SeedPair]:
        """The pairs that count."""
        return _pairs(self.first, self.second, self.games)

    @property
    def unrated(self) -> int:
        """Games that do not count by themselves."""
        return sum(not game.rated for both in self.games.values() for game in both)


def _pairs(first: str, second: str, games: Mapping[int, tuple[Played, Played]]) -> list[SeedPair]:
    return [
        SeedPair(first, second, seed, (one.score + 1 - other.score) / 2)
        for seed, (one, other) in games.items()
        if one.rated and other.rated
    ]


@dataclass(frozen=True)
class Tournament:
    """All games of some agents.

    Args:
        names: of the agents.
        matchups: of every two of them.
        most: pairs of games that every two might play.
    """

    names: tuple[str, ...]
    matchups: tuple[Matchup, ...]
    most: int

    @property
    def pairs(self) -> list[SeedPair]:
        """What counts, for `tenfold.arena.ratings.rate`."""
        return [pair for matchup in self.matchups for pair in matchup.pairs]

    @property
    def games(self) -> int:
        """Games that were played."""
        return sum(2 * len(matchup.games) for matchup in self.matchups)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the results must know."""
        found = []
        if unrated := sum(matchup.unrated for matchup in self.matchups):
            out = self.games - 2 * len(self.pairs)
            found.append(f"{unrated} of {self.games} games were unrated; {out} are left out with them")
        if early := sum(len(matchup.games) < self.most for matchup in self.matchups):
            found.append(
                f"{early} of {len(self.matchups)} series ended once somebody was better: who wins early is flattered, "
                "so play all pairs for strengths without bias"
            )
        return tuple(found)

    def table(self) -> Table:
        """What was found out about every two."""
        rows = [
            (
                matchup.verdict.text(matchup.first, matchup.second),
                2 * len(matchup.games),
                matchup.unrated,
            )
            for matchup in self.matchups
        ]
        return Table(
            title="Who is better (shares of points with bounds that hold at every look, 95 %)",
            columns=("verdict", "games", "unrated"),
            rows=tuple(rows),
        )


def play_tournament(
    names: Sequence[str],
    play: Play,
    *,
    pairs: int = 250,
    sequential: bool = True,
    batch: int = 10,
    level: float = 0.05,
    first_seed: int = 0,
    store: Store | None = None,
    workers: int = 1,
    tell: Tell = lambda done, total: None,
) -> Tournament:
    """Let every two agents play until they are separated, or have played all pairs.

    The result does not depend on ``workers``, nor on how often the tournament was interrupted.

    Args:
        names: of the agents, two or more.
        play: plays a game. With several workers a function of a module, because it is sent to other processes.
        pairs: of games of every two, at most; two games each.
        sequential: stop early where two are separated; False plays all pairs.
        batch: pairs between two looks.
        level: chance, at most, of separating anyone where all agents are equal, for the whole tournament.
        first_seed: the seeds count up from here.
        store: where finished games are kept; by default in memory.
        workers: processes.
        tell: called with games done, and games at most.

    Raises:
        ConfigError: fewer than two agents, two of one name, a number out of its range.

    >>> stronger = lambda first, second, seed: Played(float(first < second))
    >>> found = play_tournament(["a", "b", "c"], stronger, pairs=100)
    >>> [matchup.verdict.better for matchup in found.matchups], found.games
    ([0, 0, 0], 60)
    """
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigError(f"agents: {', '.join(names) or 'none'}", remedy="give two or more, each with its own name")
    for word, number in (("pairs", pairs), ("batch", batch)):
        if number < 1:
            raise ConfigError(f"{word}: {number} is below 1", remedy="give 1 or more")
    store = Store(None) if store is None else store
    rivals = list(combinations(names, 2))
    games: dict[tuple[str, str], dict[int, tuple[Played, Played]]] = {two: {} for two in rivals}
    verdicts: dict[tuple[str, str], Judgement] = {}
    playing, done = rivals, 0
    for start in range(0, pairs, batch if sequential else pairs):
        seeds = range(first_seed + start, first_seed + min(pairs, start + (batch if sequential else pairs)))
        items = {_key(*sides, seed): (*sides, seed) for two in playing for seed in seeds for sides in (two, two[::-1])}
        before, most = done, done + 2 * len(playing) * (pairs - start)
        played = store.map(
            items,
            partial(_played, play),
            of=Played,
            workers=workers,
            tell=lambda now, _, before=before, most=most: tell(before + now, most),  # type: ignore[misc]
        )
        done += len(items)
        for two in playing:
            for seed in seeds:
                games[two][seed] = (played[_key(*two, seed)], played[_key(*two[::-1], seed)])
            scores = [pair.score for pair in _pairs(*two, games[two])]
            last = seeds.stop == first_seed + pairs
            verdicts[two] = judge(scores, most=max(1, len(scores)) if last else pairs, level=level / len(rivals))
        playing = [two for two in playing if verdicts[two].better is None]
        if not playing:
            break
    return Tournament(tuple(names), tuple(Matchup(*two, games[two], verdicts[two]) for two in rivals), pairs)


def _key(first: str, second: str, seed: int) -> str:
    return f"game {json.dumps([first, second, seed])}"


def _played(play: Play, item: tuple[str, str, int]) -> Played:
    return play(*item)
