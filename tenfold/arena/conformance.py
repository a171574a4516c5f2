"""Whether a game of yours keeps what the arena relies on, found out by playing it.

A game is a function of its agents, in the order of their seats, and of a seed. It asks them with `Turn`s, charges
`Action.seconds` on a clock of its own, and returns its record, such as `tournament.Played`. What is checked:

- ``clock``: it neither reads the machine's clock, nor sleeps, nor draws from the machine.
- ``turns``: rules stay the same, time does not go back, questions have seeds.
- ``answers``: they are unique, short and can be told apart.
- ``frozen``: what an agent was shown does not change later.
- ``reward``: one finite number for each agent; they sum to 0 where that is said.
- ``repeats``: the same seed and the same answers give the same game.
- ``latency``: nobody is asked while it thinks, no answer acts before it is there, one that comes after the end never
  does, and those that take no time do.
- ``invalid``: an answer that is none costs its time and does nothing; where an agent gave no other, the record says
  that the game is unrated.
- ``ends``: also where nobody answers in time, or validly, or where answers take no time.
- ``seeds``: another seed gives another game.
- ``sides``: who sits where makes no difference, where that is said.

Compiled code is not looked into: what it does with a clock shows only where games do not repeat.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, isfinite
from typing import Any, Literal

from tenfold.arena.agents import Agent
from tenfold.arena.probes import (
    TOLERANCE,
    ConformanceError,
    Heard,
    Probe,
    ProbedGame,
    Says,
    says_any,
    says_nothing_valid,
)
from tenfold.arena.watched import plain, without_machine
from tenfold.errors import ConfigError

Game = Callable[[tuple[Agent, ...], int], Any]
"""Plays agents, in the order of their seats, on a seed, and returns its record."""

NEVER = 1e9
"""Seconds of an answer that no game waits for."""
GAMES_OF_A_MEAN = 100


def by_score(record: Any) -> tuple[float, float]:
    """Rewards of two, from the ``score`` of the first one: 1/2 for who wins, -1/2 for the other one.

    >>> from tenfold.arena.tournament import Played
    >>> by_score(Played(1.0))
    (0.5, -0.5)
    """
    return record.score - 0.5, 0.5 - record.score


@dataclass(frozen=True)
class _Checks:
    """A game under examination, and what `check_game` was told of it."""

    game: Game
    players: int
    reward: Callable[[Any], Sequence[float]]
    zero_sum: bool
    seconds: float

    def play(self, seed: int, instead: dict[int, Says] | None = None, seconds: float | None = None) -> ProbedGame:
        """A game of agents that answer at random, but for those that say something else."""
        took = self.seconds if seconds is None else seconds
        log: list[Heard] = []
        says = {seat: says_any(f"{seed} {seat}", took) for seat in range(self.players)} | (instead or {})
        record = self.game(tuple(Probe(seat, says[seat], log, seed) for seat in range(self.players)), seed)
        reward = tuple(float(value) for value in self.reward(record))
        found = ProbedGame(seed, tuple(log), record, reward)
        self._check_game(found)
        return found

    def _check_game(self, game: ProbedGame) -> None:
        """What can be said of a game by itself."""
        if len(game.reward) != self.players or not all(map(isfinite, game.reward)):
            raise ConformanceError(
                "reward", f"seed {game.seed}: {game.reward} for {self.players} agents", "give each a finite number"
            )
        if self.reward is by_score and not 0 <= game.record.score <= 1:
            raise ConformanceError("reward", f"seed {game.seed}: score {game.record.score}", "give it within [0, 1]")
        if self.zero_sum and abs(sum(game.reward)) > 1e-9 * max(1.0, *map(abs, game.reward)):
            raise ConformanceError(
                "reward", f"seed {game.seed}: {game.reward} do not sum to 0", "give what one gains as the other's loss"
            )
        for seat in range(self.players):
            heard = game.of(seat)
            if not heard:
                raise ConformanceError("turns", f"seed {game.seed}: player {seat} was never asked", "ask everybody")
            for number, (last, now) in enumerate(pairwise(heard), 1):
                self._check_order(game.place(seat, number), last, now)
            for number, each in enumerate(heard):
                if plain(each.turn.view) != each.view:
                    raise ConformanceError(
                        "frozen",
                        f"{game.place(seat, number)}: the view was another one when the game was over",
                        "show a copy of the state, which the game does not touch again",
                    )

    def _check_order(self, where: str, last: Heard, now: Heard) -> None:
        """Of two questions of one agent, one after the other."""
        for name in ("rules", "game"):
            if getattr(last.turn, name) != getattr(now.turn, name):
                raise ConformanceError("turns", f"{where}: other {name} than before", f"keep {name} all through a game")
        if now.turn.time < last.turn.time:
            raise ConformanceError("turns", f"{where}: that is before the last one", "ask in the order of time")
        if now.call != last.call and now.turn.time < last.arrives - TOLERANCE:
            check = "latency" if last.action.choice is not None else "invalid"
            raise ConformanceError(
                check,
                f"{where}: the answer to the last one is not there before {last.arrives:g} s",
                "ask an agent again once its answer has arrived, also where that was none of those offered",
            )

    def clock(self, seed: int) -> None:
        place = without_machine(lambda: self.play(seed))
        if place is not None:
            raise ConformanceError(
                "clock",
                f"seed {seed}: the game calls {place}",
                "count time by the game's own steps, charge Action.seconds, and draw from the seed",
            )

    def repeats(self, seed: int) -> None:
        one, two = self.play(seed), self.play(seed)
        remedy = "draw from a generator that is made of the seed in each game, and keep nothing from game to game"
        for number, (first, second) in enumerate(zip(one.heard, two.heard, strict=False)):
            if first.question != second.question:
                where = f"seed {seed}, player {first.seat}, question {number} of all at {first.turn.time:g} s"
                raise ConformanceError("repeats", f"{where}: another one when the game is played again", remedy)
        if (len(one.heard), one.reward) != (len(two.heard), two.reward) or plain(one.record) != plain(two.record):
            raise ConformanceError("repeats", f"seed {seed}: another end when the game is played again", remedy)

    def latency(self, seed: int) -> None:
        """Nothing is seen of an answer before it is there, or if it comes too late."""
        for seat in range(self.players):
            slow = 4 * self.seconds  # than the others, who are asked meanwhile
            one = self.play(seed, {seat: says_any(f"{seed} {seat}", slow)})
            asked = one.of(seat)
            for number in sorted({0, len(asked) // 2, len(asked) - 1}):
                two = self.play(seed, {seat: says_any(f"{seed} {seat}", slow, other=number)})
                if one.before(asked[number].arrives) != two.before(asked[number].arrives):
                    raise ConformanceError(
                        "latency",
                        f"{one.place(seat, number)}: its answer acts before it is there at {asked[number].arrives:g} s",
                        "let a decision act on the state that stands when it arrives",
                    )
            for others in (self.seconds, NEVER):
                one, two = (
                    self.play(seed, {seat: says_any(f"{seed} {seat}", NEVER, number)}, others) for number in (None, 0)
                )
                if (one.reward, one.before(inf)) != (two.reward, two.before(inf)):
                    raise ConformanceError(
                        "latency",
                        f"{one.place(seat, 0)}: an answer that takes {NEVER:g} s changes the game",
                        "let an answer that arrives after the end do nothing",
                    )

    def invalid(self, seed: int) -> None:
        for seat in range(self.players):
            one = self.play(seed, {seat: says_nothing_valid("", self.seconds)})
            two = self.play(seed, {seat: says_any("late", NEVER)})
            if one.reward != two.reward or one.shown_beside(seat) != two.shown_beside(seat):
                raise ConformanceError(
                    "invalid",
                    f"seed {seed}, player {seat}: with invalid answers {one.reward}, with none in time {two.reward}, "
                    "or the others were shown something else",
                    "charge their seconds, and let them do nothing",
                )
            if one.seeds_beside(seat) != two.seeds_beside(seat):
                raise ConformanceError(
                    "seeds",
                    f"seed {seed}: other players' seeds depend on how often player {seat} is asked",
                    "make Turn.seed of the game's seed, the side and the number of its question",
                )
            if getattr(one.record, "rated", False):
                raise ConformanceError(
                    "invalid",
                    f"seed {seed}, player {seat}: gave no valid answer, and the game is rated",
                    "return a record with rated=False where an agent gave none: it says nothing of who is better",
                )

    def ends(self, seed: int) -> None:
        """It is the count of questions that raises."""
        everybody = range(self.players)
        self.play(seed, dict.fromkeys(everybody, says_nothing_valid("no such answer", 0.0)))
        self.play(seed, dict.fromkeys(everybody, says_any("late", NEVER)))
        self.play(seed, seconds=0.0)

    def seeds(self, seeds: Sequence[int]) -> None:
        same = {seat: says_any(str(seat), self.seconds) for seat in range(self.players)}
        games = [self.play(seed, same) for seed in seeds]
        drawn = [[each.turn.seed for each in game.of(0)] for game in games]
        shown = [[(each.turn.state, each.turn.seed) for each in game.heard] for game in games]
        if all(each == shown[0] for each in shown):
            raise ConformanceError(
                "seeds", f"seeds {list(seeds)} give the same questions", "draw from the seed, and make Turn.seed of it"
            )
        if any(len(each) > 1 and len(set(each)) == 1 for each in drawn):
            raise ConformanceError(
                "seeds", "all questions of a game have the same seed", "make Turn.seed of the seed and the question"
            )

    def matters(self, seeds: Sequence[int]) -> None:
        """Answers do something when they take no time, and time is charged."""
        at_once = [self.play(seed, seconds=0.0) for seed in seeds]
        others = [
            self.play(seed, {seat: says_any(f"other {seat}", 0.0) for seat in range(self.players)}, seconds=0.0)
            for seed in seeds
        ]
        slow = [self.play(seed, {0: says_any(f"{seed} 0", self.seconds)}, seconds=0.0) for seed in seeds]
        for other, what, remedy in (
            (others, "other answers that take no time change nothing", "let an answer of 0 s act on what was shown"),
            (
                slow,
                f"answers of player 0 that take {self.seconds:g} s come to what those of 0 s do",
                "charge Action.seconds on the game's clock, or check with more seconds",
            ),
        ):
            if all(
                (one.reward, one.before(inf)) == (two.reward, two.before(inf))
                for one, two in zip(at_once, other, strict=True)
            ):
                raise ConformanceError("latency", f"seeds {list(seeds)}: {what}", remedy)

    def sides(self, seeds: Sequence[int], symmetric: str) -> None:
        remedy = "let nothing depend on who sits where, or do not say that it is symmetric: tournaments swap sides"
        if symmetric == "exactly":
            for seed in seeds:
                both = [says_any("one", self.seconds), says_any("other", self.seconds)]
                one = self.play(seed, dict(enumerate(both))).reward
                two = self.play(seed, dict(enumerate(both[::-1]))).reward
                if one != two[::-1]:
                    raise ConformanceError("sides", f"seed {seed}: {one}, and with sides swapped {two[::-1]}", remedy)
            return
        leads = [
            game.reward[0] - game.reward[1] for game in map(self.play, range(seeds[0], seeds[0] + GAMES_OF_A_MEAN))
        ]
        mean, error = statistics.fmean(leads), statistics.stdev(leads) / GAMES_OF_A_MEAN**0.5
        if abs(mean) > 4 * error + 1e-12:
            raise ConformanceError(
                "sides",
                f"of two that answer at random the first one leads by {mean:g} ± {error:g} in {GAMES_OF_A_MEAN} games",
                remedy,
            )


def check_game(
    game: Game,
    *,
    players: int = 2,
    reward: Callable[[Any], Sequence[float]] = by_score,
    zero_sum: bool = False,
    symmetric: Literal["exactly", "in the mean"] | None = None,
    seconds: float = 0.25,
    seeds: Sequence[int] = (0, 1, 2),
) -> tuple[str, ...]:
    """Play a game by agents that answer at random, late, at once or not at all, and look for what must not be.

    Some tens of games are played on each seed. A game that never asks and never ends is not found out.

    Args:
        game: a function of agents and seed, as `tenfold.arena.fighting.play.play_fight`.
        players: how many agents it takes.
        reward: of each agent, from the record.
        zero_sum: whether rewards are said to sum to 0.
        symmetric: whether two agents that change seats are said to change rewards, of games of two: ``exactly`` where
            they answer the same, ``in the mean`` over 100 seeds where they answer at random.
        seconds: of an answer that is late, but not too late.
        seeds: to play on, two or more.

    Returns:
        The names of the checks, all of which hold.

    Raises:
        ConfigError: fewer than two seeds, or sides of a game that is not of two.
        ConformanceError: the first that does not hold: which, on which seed, at which question, and what to change.

    >>> from tenfold.arena.fighting.play import play_fight
    >>> checks = check_game(lambda agents, seed: play_fight(agents, seed, bell=300), seeds=(0, 1))
    >>> checks[:3], len(checks)
    (('clock', 'turns', 'answers'), 10)
    """
    if len(seeds) < 2:
        raise ConfigError(f"seeds: {list(seeds)}", remedy="give two or more")
    if symmetric is not None and players != 2:
        raise ConfigError(f"symmetric: of {players} players", remedy="say it of games of two alone")
    checks = _Checks(game, players, reward, zero_sum, seconds)
    for seed in seeds:
        for check in (checks.clock, checks.repeats, checks.ends, checks.latency, checks.invalid):
            check(seed)
    checks.seeds(seeds)
    checks.matters(seeds)
    if symmetric is not None:
        checks.sides(seeds, symmetric)
    found = ("clock", "turns", "answers", "frozen", "reward", "repeats", "latency", "invalid", "ends", "seeds")
    return found if symmetric is None else (*found, "sides")
