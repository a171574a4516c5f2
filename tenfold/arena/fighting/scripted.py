"""A fighter written by hand, of a chosen quality: what agents are measured against, and taught by.

Source: the specification of the latency arena, 7.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tenfold.arena.agents import Action, Turn
from tenfold.arena.fighting.moves import MOVES
from tenfold.arena.fighting.plans import ANSWERS
from tenfold.arena.fighting.question import FightView, pixels_apart, pixels_to_bolt
from tenfold.arena.fighting.rules import (
    ATTACKING,
    GUARD,
    JUMPING,
    LAST_ACTIVE,
    MODE,
    MOVE,
    STAMINA,
    STUNNED,
    TIME,
)
from tenfold.errors import ConfigError

_MOVES = tuple(MOVES.values())


class ScriptedFighter:
    """With probability ``quality`` it plays by the rules of `good_moves`, else any of the 16 moves.

    What it draws depends on the question's seed alone, so that two fighters of other latencies or qualities meet the
    same luck.

    Args:
        quality: from 0, which is a player at random, to 1.
        seconds: how long each of its answers takes, 0 or more.
        name: the default tells both.

    Raises:
        ConfigError: a quality or seconds outside of that.
    """

    def __init__(self, quality: float = 1.0, seconds: float = 0.2, name: str = "") -> None:
        if not 0 <= quality <= 1:
            raise ConfigError(f"quality: must be in [0, 1], got {quality}", remedy="give a probability")
        if not 0 <= seconds < float("inf"):
            raise ConfigError(f"seconds: must be 0 or more, got {seconds}", remedy="give the latency in seconds")
        self.name = name or f"scripted:{quality:g}@{seconds:g}s"
        self.quality = quality
        self.seconds = seconds

    def answer(self, questions: Sequence[Turn]) -> list[Action]:
        """One answer for each question."""
        return [self._answer(question) for question in questions]

    def _answer(self, question: Turn) -> Action:
        draw = np.random.default_rng(question.seed)
        moves = good_moves(question.view) if draw.random() < self.quality else ANSWERS
        move = moves[int(draw.integers(len(moves)))] if len(moves) > 1 else moves[0]
        return Action(move, move, self.seconds)


def good_moves(view: FightView) -> tuple[str, ...]:
    """What is good to do in a state; all of them alike.

    >>> from tenfold.arena.fighting.fight import Fight
    >>> good_moves(FightView(Fight(), side=0))
    ('sweep', 'close')
    """
    fight, side = view.fight, view.side
    own, other = fight.fighters[side], fight.fighters[1 - side]
    pixels = pixels_apart(fight)
    if other[MODE] == STUNNED and other[TIME] > 6 and pixels <= 82:
        return ("fierce",) if pixels <= 80 and other[TIME] > 12 else ("strong",)
    if own[STAMINA] < 300:
        return ("away",) if pixels < 120 else ("stand guard", "low guard", "wait")
    if other[MODE] == JUMPING and pixels < 70:
        return ("upper",)
    if other[MODE] == ATTACKING:
        if other[TIME] > LAST_ACTIVE[other[MOVE]]:
            return ("fierce",) if pixels <= 80 else ("sweep",) if pixels <= 88 else ("close",)
        attack = _MOVES[other[MOVE]]
        if pixels <= max(attack.reach, 0) + 12:
            return ("low guard",) if attack.height == "low" else ("stand guard",)
    bolt = pixels_to_bolt(fight, side)
    if bolt is not None and bolt < 90:
        return ("stand guard",)
    if pixels > 96:
        return ("bolt", "close", "close")
    high = other[GUARD] == 0
    if pixels > 74:
        return ("sweep", "close") if high else ("close",)
    throw = ("throw",) if pixels <= 44 else ()
    return ("sweep", "short", *throw) if high else ("axe", *throw)
