"""What a game asks, what an agent answers, and when the answer is there.

A game turns its state into a `Turn`; an agent answers with one of the texts that the question allows, and with the
seconds that this took, which the game charges on its own clock. Nothing here reads a clock of the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Turn:
    """A decision that a game wants.

    Args:
        rules: what stays the same from question to question of a game, so that a model's cache of it is reused.
        state: what stands now.
        answers: all that may be answered, each once; at most 12 tokens long.
        view: the state itself, for agents that are written by hand; never changed by them.
        seed: of whatever an agent draws, so that the same question has the same answer.
        time: seconds on the game's clock when it is asked.
        game: names the game and the side, for agents that remember something within one.
    """

    rules: str
    state: str
    answers: tuple[str, ...]
    view: Any = None
    seed: int = 0
    time: float = 0.0
    game: str = ""


@dataclass(frozen=True)
class Action:
    """What was said, and what it cost.

    Args:
        text: as it was said.
        choice: which of the turn's ``answers`` it is; None where it is another text, which is charged all the same.
        seconds: from the question to the answer, 0 or more, on the game's clock.
        prompt_tokens: that were read; 0 where no model was asked.
        tokens: that were written.
    """

    text: str
    choice: str | None
    seconds: float
    prompt_tokens: int = 0
    tokens: int = 0


class Agent(Protocol):
    """Whoever plays."""

    name: str

    def answer(self, questions: Sequence[Turn]) -> list[Action]:
        """One answer for each, in their order; turns that are asked together do not wait for each other."""
        ...
