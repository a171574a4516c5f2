"""Traders that are written by hand: what the markets are checked with, and what models are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tenfold.arena.agents import Answer, Question
from tenfold.errors import ConfigError


class ScriptedTrader:
    """Reads a jump of the synthetic market rightly with a given probability, whatever it is.

    Args:
        accuracy: 0 to 1; .5 guesses.
        seconds: that each answer takes.
        seed: two traders of one seed misread the same jumps, the less accurate one some more.
        name: the default tells accuracy and latency.

    Raises:
        ConfigError: an accuracy outside [0, 1].
    """

    def __init__(self, accuracy: float, seconds: float = 0.0, seed: int = 0, name: str = "") -> None:
        if not 0 <= accuracy <= 1:
            raise ConfigError(f"accuracy: must be in [0, 1], got {accuracy}", remedy="1 is always right, 0.5 guesses")
        self.name = name or f"scripted:{accuracy:g}@{seconds:g}s"
        self.accuracy, self.seconds, self.seed = accuracy, seconds, seed

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Trade against what is read as reverting, pass otherwise."""
        found = []
        for question in questions:
            right = np.random.default_rng((self.seed, question.seed)).random() < self.accuracy
            choice = question.answers[0] if question.view.reverts == right else question.answers[-1]
            found.append(Answer(choice, choice, self.seconds))
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

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """One of the answers of each question."""
        found = []
        for question in questions:
            draw = np.random.default_rng((self.seed, question.seed)).integers(len(question.answers))
            choice = question.answers[draw]
            found.append(Answer(choice, choice, self.seconds))
        return found
