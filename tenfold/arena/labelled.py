"""Questions of the games with the answers that are good, by which agents are taught and their decisions judged.

>>> question = labelled_questions("trading", first_seed=7, count=1)[0]
>>> question.turn.answers, question.good
(('buy', 'pass'), ('pass',))
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tenfold.arena.agents import Action, Agent, Turn
from tenfold.arena.by_hand import Arena
from tenfold.arena.fighting.play import play_fight
from tenfold.arena.fighting.scripted import ScriptedFighter, good_moves
from tenfold.arena.trading.market_day import market_questions
from tenfold.arena.trading.synthetic import MarketRules, draw_market

QUALITIES = (0.0, 0.3, 0.6, 0.8, 1.0)
LATENCIES = (0.0, 0.1, 0.2, 0.4, 0.8)
"""Of the scripted fighters whose fights the questions are from, in seconds."""
OF_A_FIGHT = 40
"""Questions taken from a fight, at most."""


@dataclass(frozen=True)
class LabelledTurn:
    """What an agent is asked, which answers are good, and what kind of question it is, for tables."""

    turn: Turn
    good: tuple[str, ...]
    kind: str


def labelled_questions(
    arena: Arena, first_seed: int, count: int, market: MarketRules | None = None
) -> list[LabelledTurn]:
    """The first questions from a seed on, each state once.

    Args:
        arena: ``fighting``: states of fights of scripted fighters, of several qualities and latencies, with what
            `good_moves` says of them. ``trading``: jumps of synthetic days, with what the rule says.
        first_seed: of the first fight or day; the next ones count up.
        count: how many.
        market: in trading, what its days are like.
    """
    seeds = itertools.count(first_seed)
    found: dict[str, LabelledTurn] = {}
    for question in _fights(seeds) if arena == "fighting" else _market(seeds, market or MarketRules()):
        found.setdefault(question.turn.state, question)
        if len(found) == count:
            break
    return list(found.values())


def _market(seeds: Iterator[int], rules: MarketRules) -> Iterator[LabelledTurn]:
    for seed in seeds:
        for turn in market_questions(draw_market(seed, rules)):
            jump = turn.view
            kind = f"other asset {'still' if jump.pair_still else 'moved'}, volume " + (
                "against" if jump.volume_against else "with"
            )
            yield LabelledTurn(turn, (turn.answers[0] if jump.reverts else turn.answers[-1],), kind)


class _Watched:
    """An agent, and the questions that it was asked with what would have been good."""

    def __init__(self, agent: Agent, seen: list[LabelledTurn]) -> None:
        self.agent, self.name, self.seen = agent, agent.name, seen

    def answer(self, questions: Sequence[Turn]) -> list[Action]:
        for turn in questions:  # now, because the view changes as the fight goes on
            good = tuple(dict.fromkeys(good_moves(turn.view)))
            self.seen.append(LabelledTurn(turn, good, ", ".join(good)))
        return self.agent.answer(questions)


def _fights(seeds: Iterator[int]) -> Iterator[LabelledTurn]:
    for seed in seeds:
        draw, seen = np.random.default_rng(seed), []  # type: np.random.Generator, list[LabelledTurn]
        first, second = (
            _Watched(ScriptedFighter(float(draw.choice(QUALITIES)), float(draw.choice(LATENCIES))), seen)
            for _ in range(2)
        )
        play_fight((first, second), seed)
        yield from (seen[at] for at in draw.permutation(len(seen))[:OF_A_FIGHT])
