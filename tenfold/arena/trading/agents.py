"""Traders that are written by hand: what the markets are checked with, and what models are compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tenfold.arena.agents import Action, Turn
from tenfold.errors import ConfigError


class ScriptedTrader:
    """Reads a jump of the synthetic market rightly with a given probability, whatever it is.

    Args:
        accuracy: 0 to 1; .5 guesses.
        seconds: that each answer takes.
        seed: two traders of one seed misread the same jumps, the less accurate one some more.
        name: ``scripted:0.9`` for an accuracy of .9 by default.

    Raises:
        ConfigError: an accuracy outside [0, 1].
    """

    def __init__(self, accuracy: float, seconds: float = 0.0, seed: int = 0, name: str = "") -> None:
        if not 0 <= accuracy <= 1:
            raise ConfigError(f"accuracy: must be in [0, 1], got {accuracy}", remedy="1 is always right, 0.5 guesses")
        self.name = name or f"scripted:{accuracy:g}"
        self.accuracy, self.seconds, self.seed = accuracy, seconds, seed

    def answer(self, questions: Sequence[Turn]) -> list[Action]:
        """Trade against what is read as reverting, pass otherwise."""
        found = []
        for question in questions:
            right = np.random.default_rng((self.seed, question.seed)).random() < self.accuracy
            choice = question.answers[0] if question.view.reverts == right else question.answers[-1]
            found.append(Action(choice, choice, self.seconds))
        return found


class RandomTrader:
    """Any of the answers, each as likely.

    Args:
        seconds: that each answer takes.
        seed: of the choices, beside the question's.
        name: what it is called.
    """

    def __init__(self, seconds: float = 0.0, seed: int = 0, name: str = "random") -> None:
        self.name, self.seconds, self.seed = name, seconds, seed

    def answer(self, questions: Sequence[Turn]) -> list[Action]:
        """One of the answers of each question."""
        found = []
        for question in questions:
            draw = np.random.default_rng((self.seed, question.seed)).integers(len(question.answers))
            choice = question.answers[draw]
            found.append(Action(choice, choice, self.seconds))
        return found


class RuleTrader:
    """The specification's rule for recorded markets: buy a bar of wide range, sell above what was paid.

    Sell where the high is at least ``(1 + margin)`` times the own cost; otherwise buy where the range of the bar is at
    least ``margin`` times its low. Bad prints and look-ahead make it earn without end, an honest market nothing.

    Args:
        margin: as a fraction, above 0.
        seconds: that each answer takes.
        again: whether it also buys where it holds something.
        name: ``rule:0.01`` for a margin of .01 by default.

    Raises:
        ConfigError: a margin that is not above 0, or not finite.
    """

    def __init__(self, margin: float = 0.01, seconds: float = 0.0, again: bool = True, name: str = "") -> None:
        if not 0 < margin < math.inf:
            raise ConfigError(f"margin: must be above 0, got {margin}", remedy="give a fraction, as in rule:0.01")
        self.name = name or f"rule:{margin:g}"
        self.margin, self.seconds, self.again = margin, seconds, again

    def answer(self, questions: Sequence[Turn]) -> list[Action]:
        """What the rule says of the first ticker that it says something of, else ``hold``."""
        return [Action(choice, choice, self.seconds) for choice in map(self._choice, questions)]

    def _choice(self, question: Turn) -> str:
        for each in question.view.tickers:
            if each.held and each.high >= each.cost * (1 + self.margin):
                return f"sell {each.ticker}"
            wide = (each.high - each.low) / each.low >= self.margin
            if wide and (self.again or not each.held) and f"buy {each.ticker}" in question.answers:
                return f"buy {each.ticker}"
        return question.answers[0]
