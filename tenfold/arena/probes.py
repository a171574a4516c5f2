"""Agents that note what a game asks them, and what is wrong with a question by itself."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import inf
from typing import Any

from tenfold.arena.agents import Action, Turn
from tenfold.arena.players import MOST_TOKENS, spoken_choice
from tenfold.arena.watched import plain
from tenfold.errors import TenfoldError

MOST_QUESTIONS = 100_000
"""Of one agent in one game; one with more is taken for one that does not end."""
TOLERANCE = 1e-6
"""Seconds: clocks that count frames divide."""


class ConformanceError(TenfoldError):
    """A game that does not keep what the arena relies on.

    Args:
        check: which of the checks it fails.
        problem: what was found: seed, player and question with it.
        remedy: what to change.
    """

    def __init__(self, check: str, problem: str, remedy: str) -> None:
        super().__init__(f"{check}: {problem}", remedy)
        self.check = check


@dataclass(frozen=True)
class Heard:
    """A question that was asked, and its answer; ``call`` tells those that were asked together."""

    seat: int
    call: int
    turn: Turn
    view: Any
    action: Action

    @property
    def question(self) -> tuple[Any, ...]:
        """All of it, to be compared with another one."""
        turn = self.turn
        return self.seat, turn.rules, turn.state, turn.answers, turn.seed, turn.time, turn.game, self.view

    @property
    def arrives(self) -> float:
        """When the answer is there, on the game's clock."""
        return self.turn.time + self.action.seconds


Says = Callable[[int, Turn], Action]
"""An answer to the question of a number, from 0, of an agent in a game."""


def says_any(salt: str, seconds: float, other: int | None = None) -> Says:
    """Any of the answers, the same for the same number; another one at the number ``other``."""

    def says(number: int, turn: Turn) -> Action:
        at = random.Random(f"{salt} {number}").randrange(len(turn.answers)) + (number == other)
        choice = turn.answers[at % len(turn.answers)]
        return Action(choice, choice, seconds)

    return says


def says_nothing_valid(text: str, seconds: float) -> Says:
    """No valid answer."""
    return lambda number, turn: Action(text, None, seconds)


class Probe:
    """An agent that notes what it is asked."""

    def __init__(self, seat: int, says: Says, log: list[Heard], seed: int) -> None:
        self.name, self.seat, self.says, self.log, self.seed = f"probe {seat}", seat, says, log, seed
        self.calls = self.asked = 0

    def answer(self, questions: Sequence[Turn]) -> list[Action]:
        """What ``says`` says of each."""
        found = []
        self.calls += 1
        for turn in questions:
            if self.asked == MOST_QUESTIONS:
                raise ConformanceError(
                    "ends",
                    f"seed {self.seed}, player {self.seat} was asked {MOST_QUESTIONS} times, last at {turn.time:g} s",
                    "end the game by its clock, and let every answer take time on it, if only a frame",
                )
            _check_turn(turn, f"seed {self.seed}, player {self.seat}, question {self.asked} at {turn.time:g} s")
            action = self.says(self.asked, turn)
            self.asked += 1
            self.log.append(Heard(self.seat, self.calls, turn, _shown(turn, self), action))
            found.append(action)
        return found


def _shown(turn: Turn, probe: Probe) -> Any:
    try:
        return plain(turn.view)
    except TypeError as error:
        raise ConformanceError(
            "frozen",
            f"seed {probe.seed}, player {probe.seat}: the view {type(turn.view).__name__} cannot be copied: {error}",
            "show plain data: a frozen dataclass of numbers, texts and tuples, or None",
        ) from None


def _check_turn(turn: Turn, where: str) -> None:
    """What can be said of a question by itself."""
    if not (turn.rules.strip() and turn.state.strip()):
        raise ConformanceError("turns", f"{where}: rules or state are empty", "a model reads both: put them in words")
    if not isinstance(turn.seed, int) or turn.seed < 0:
        raise ConformanceError("turns", f"{where}: seed is {turn.seed!r}", "give a whole number, 0 or more")
    if not 0 <= turn.time < inf:
        raise ConformanceError("turns", f"{where}: that cannot be a time", "give seconds on the game's clock, from 0")
    wrong = _wrong_answers(turn.answers)
    if wrong is not None:
        raise ConformanceError("answers", f"{where}: {wrong[0]}", wrong[1])


@cache
def _wrong_answers(answers: tuple[str, ...]) -> tuple[str, str] | None:
    """What is wrong with what may be answered, and the remedy."""
    if not answers or len(set(answers)) < len(answers):
        return f"offered {answers}", "offer one or more, each once"
    for answer in answers:
        words = len(re.findall(r"\w+|[^\w\s]", answer))
        if not 0 < words <= MOST_TOKENS:
            return f"{answer!r} has {words} words and marks", f"give from 1 to {MOST_TOKENS}"
        read = spoken_choice(answer, answers)
        if read != answer:
            return (
                f"{answer!r} is read as {read!r} when a model writes it",
                "let answers differ in words, not in case, marks or spaces",
            )
    return None


@dataclass(frozen=True)
class ProbedGame:
    """One that was played."""

    seed: int
    heard: tuple[Heard, ...]
    record: Any
    reward: tuple[float, ...]

    def of(self, seat: int) -> list[Heard]:
        """What one agent was asked, in order."""
        return [each for each in self.heard if each.seat == seat]

    def before(self, time: float) -> list[tuple[Any, ...]]:
        """Questions asked before a time."""
        return [each.question for each in self.heard if each.turn.time < time - TOLERANCE]

    def shown_beside(self, seat: int) -> list[tuple[Any, ...]]:
        """What the others were asked, but for the seeds."""
        return [
            (each.seat, each.turn.time, each.turn.state, each.turn.answers, each.view)
            for each in self.heard
            if each.seat != seat
        ]

    def seeds_beside(self, seat: int) -> list[int]:
        """Of the questions that the others were asked."""
        return [each.turn.seed for each in self.heard if each.seat != seat]

    def place(self, seat: int, number: int) -> str:
        """A question in words, for errors."""
        return f"seed {self.seed}, player {seat}, question {number} at {self.of(seat)[number].turn.time:g} s"
