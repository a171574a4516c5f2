"""Two agents fight: who is asked when, and when an answer begins.

An agent is asked as soon as its fighter is free and its last move is over; the answer begins as many frames later as
it took, or when the fighter is free. Until then the fighter stands. The clock is the count of frames.

Source: the specification of the latency arena, 7.3.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tenfold.arena.agents import Agent, Answer, Question
from tenfold.arena.fighting.fight import Fight
from tenfold.arena.fighting.moves import INPUTS, NEUTRAL
from tenfold.arena.fighting.plans import NOTHING, PLANS, Plan, named_move
from tenfold.arena.fighting.question import NO_MOVE, fight_question
from tenfold.arena.fighting.rules import FRAMES_PER_SECOND, HEALTH, MODE, RETREATING
from tenfold.errors import ConfigError, DataError

Hold = Literal["neutral", "back", "high", "low"]
_FIRST_LETTER = ord("a")


@dataclass(frozen=True)
class Harness:
    """How a player is asked.

    Args:
        pipelined: ask for the next move while the last one is still being made.
        predict: show the fight as it will stand when the answer is expected, taking it as long as the one before: the
            own inputs go on, the opponent stands.
        hold: what is pressed while there is nothing to do: ``back`` walks away, ``high`` and ``low`` take up a guard.

    Raises:
        ConfigError: an unknown ``hold``.
    """

    pipelined: bool = False
    predict: bool = False
    hold: Hold = "neutral"

    def __post_init__(self) -> None:
        if self.hold not in ("neutral", "back", "high", "low"):
            raise ConfigError(f"hold: unknown input {self.hold!r}", remedy="take neutral, back, high or low")


@dataclass(frozen=True)
class Decision:
    """What an agent was asked in a fight, and what came of it.

    Args:
        frame: frames that were over when it was asked.
        saw: the state it was told.
        said: its answer.
        move: what this was taken for, one of `plans.ANSWERS`; None where it was none of them.
        seconds: how long it took.
        begins: frames that were over when the move began; None where the fight ended before.
        prompt_tokens: that were read; 0 where no model was asked.
        tokens: that were written.
    """

    frame: int
    saw: str
    said: str
    move: str | None
    seconds: float
    begins: int | None
    prompt_tokens: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class FightRecord:
    """A fight from its first frame to its last; all pairs are player 0, player 1.

    Args:
        names: of the agents.
        seed: of the fight.
        streams: which draws of the seed each player used.
        winner: 0 or 1; None for a draw.
        health: at the end, 0 to 1000.
        frames: how many there were.
        inputs: what was pressed, one letter a frame: ``a`` is the first of `moves.INPUTS`.
        decisions: what each was asked, in order.
    """

    names: tuple[str, str]
    seed: int
    streams: tuple[int, int]
    winner: int | None
    health: tuple[int, int]
    frames: int
    inputs: tuple[str, str]
    decisions: tuple[tuple[Decision, ...], tuple[Decision, ...]]

    @property
    def invalid(self) -> tuple[int, int]:
        """Answers of each that were no move."""
        first, second = (sum(each.move is None for each in side) for side in self.decisions)
        return first, second

    @property
    def rated(self) -> bool:
        """Whether both gave a valid answer at least once; else the fight says nothing of who is better."""
        return all(any(each.move is not None for each in side) for side in self.decisions)


class _Seat:
    """One player's place: what it is doing, and the answer that is on its way."""

    def __init__(self, side: int, harness: Harness) -> None:
        self.side, self.harness, self.hold = side, harness, INPUTS.index(harness.hold)
        self.plan: Plan = ()
        self.at = 0  # frames of the plan that are over
        self.awaited: Decision | None = None  # asked, and not begun
        self.lands = self.expected = 0
        self.last = NO_MOVE
        self.pressed = bytearray()
        self.decisions: list[Decision] = []

    def asks(self, fight: Fight) -> bool:
        """Whether a move is to be asked for now."""
        return self.awaited is None and (self.harness.pipelined or self._is_idle(fight))

    def _is_idle(self, fight: Fight) -> bool:
        return self.at >= len(self.plan) and fight.fighters[self.side][MODE] <= RETREATING

    def question(self, fight: Fight, last_moves: tuple[str, str], seed: int, game: str) -> Question:
        """What is asked now."""
        return fight_question(
            self._predicted(fight) if self.harness.predict else fight,
            self.side,
            last_moves,
            seed=(seed << 32) + len(self.decisions),
            time=fight.frame / FRAMES_PER_SECOND,
            game=f"{game}:{self.side}",
        )

    def _predicted(self, fight: Fight) -> Fight:
        ahead = fight.copy()
        for n in range(self.expected):
            if ahead.over:
                break
            at = self.at + n
            own = self.plan[at] if at < len(self.plan) else self.hold
            ahead.step(*((own, NEUTRAL) if self.side == 0 else (NEUTRAL, own)))
        return ahead

    def hear(self, question: Question, answer: Answer, frame: int) -> None:
        """An answer was given; it waits for its time."""
        self.expected = frames_of(answer.seconds)
        self.lands = frame + self.expected
        move = named_move(answer.text if answer.choice is None else answer.choice)
        self.awaited = Decision(
            frame, question.state, answer.text, move, answer.seconds, None, answer.prompt_tokens, answer.tokens
        )

    def press(self, fight: Fight) -> int:
        """The input of the next frame."""
        if self.awaited is not None and fight.frame >= self.lands and self._is_idle(fight):
            self._begin(self.awaited, fight.frame)
        key = self.hold
        if self.at < len(self.plan):
            key = self.plan[self.at]
            self.at += 1
        self.pressed.append(_FIRST_LETTER + key)
        return key

    def _begin(self, decision: Decision, frame: int) -> None:
        self.awaited = None
        # an invalid answer is a frame of nothing: without it, one that takes no time would be asked for ever
        self.plan = NOTHING if decision.move is None else PLANS[decision.move]
        self.at = 0
        self.last = decision.move or self.last
        self.decisions.append(replace(decision, begins=frame))

    def all_decisions(self) -> tuple[Decision, ...]:
        """Also the one that was under way at the end."""
        return (*self.decisions, *([] if self.awaited is None else [self.awaited]))


def frames_of(seconds: float) -> int:
    """Frames that begin within some seconds: what an answer takes of the fight.

    >>> frames_of(0.0), frames_of(0.001), frames_of(7 / 60), frames_of(0.2)
    (0, 1, 7, 12)

    Raises:
        DataError: seconds that are negative or not finite.
    """
    if not 0 <= seconds < math.inf:
        raise DataError(f"seconds: must be 0 or more, got {seconds}", remedy="give an answer's latency in seconds")
    return math.ceil(round(FRAMES_PER_SECOND * seconds, 6))  # rounded: 60 * (7 / 60) is above 7


Asked = list[tuple[int, Question]]
"""Questions of one moment, each with the player it is for."""


def fight_in_turns(
    seed: int,
    streams: tuple[int, int] = (0, 1),
    harness: tuple[Harness, Harness] = (Harness(), Harness()),
    names: tuple[str, str] = ("", ""),
) -> Generator[Asked, list[Answer], FightRecord]:
    """A fight that stops wherever somebody is asked, so that many can be played side by side.

    Yields questions, is sent their answers in the same order, and returns the record. See `play_fight`.
    """
    game = f"fighting:{names[0]}:{names[1]}:{seed}"
    fight = Fight()
    left, right = (_Seat(side, harness[side]) for side in (0, 1))
    while not fight.over:
        asking = [seat for seat in (left, right) if seat.asks(fight)]
        if asking:
            last = (left.last, right.last)
            asked = [(seat.side, seat.question(fight, last, 2 * seed + streams[seat.side], game)) for seat in asking]
            answers = yield asked
            for seat, (_, question), answer in zip(asking, asked, answers, strict=True):
                seat.hear(question, answer, fight.frame)
        fight.step(left.press(fight), right.press(fight))
    first, second = fight.fighters
    return FightRecord(
        names=names,
        seed=seed,
        streams=streams,
        winner=fight.leader,
        health=(first[HEALTH], second[HEALTH]),
        frames=fight.frame,
        inputs=(left.pressed.decode(), right.pressed.decode()),
        decisions=(left.all_decisions(), right.all_decisions()),
    )


def play_fight(
    agents: tuple[Agent, Agent],
    seed: int,
    streams: tuple[int, int] = (0, 1),
    harness: tuple[Harness, Harness] = (Harness(), Harness()),
) -> FightRecord:
    """Two agents fight once.

    Args:
        agents: the first starts on the left.
        seed: 0 or more; all that is drawn depends on it and on the stream.
        streams: which draws of the seed each side uses. As they are, a side has the same luck whoever plays it, so that
            two agents that change sides meet each other's luck. Exchanged together with the agents they give the exact
            mirror image of the fight.
        harness: how each is asked.

    Raises:
        ConfigError: a seed below 0.
        DataError: an answer with seconds that cannot be.
    """
    if seed < 0:
        raise ConfigError(f"seed: must be 0 or more, got {seed}", remedy="give a whole number from 0")
    turns = fight_in_turns(seed, streams, harness, (agents[0].name, agents[1].name))
    try:
        asked = next(turns)
        while True:
            asked = turns.send([agents[side].answer([question])[0] for side, question in asked])
    except StopIteration as end:
        record: FightRecord = end.value
        return record


def replay(inputs: Sequence[str]) -> Iterator[Fight]:
    """The fight of `FightRecord.inputs` as it began and after each frame.

    >>> [fight.frame for fight in replay(("bb", "aa"))]
    [0, 1, 2]
    """
    fight = Fight()
    yield fight.copy()
    for first, second in zip(*inputs, strict=True):
        fight.step(ord(first) - _FIRST_LETTER, ord(second) - _FIRST_LETTER)
        yield fight.copy()
