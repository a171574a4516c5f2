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

from tenfold.arena.agents import Action, Agent, Turn
from tenfold.arena.fighting.fight import Fight
from tenfold.arena.fighting.moves import INPUTS, NEUTRAL
from tenfold.arena.fighting.plans import PLANS, Plan, named_move
from tenfold.arena.fighting.question import NO_MOVE, fight_question
from tenfold.arena.fighting.rules import FRAMES, FRAMES_PER_SECOND, HEALTH, MODE, RETREATING
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
        bell: frames after which it would have ended at the latest.
    """

    names: tuple[str, str]
    seed: int
    streams: tuple[int, int]
    winner: int | None
    health: tuple[int, int]
    frames: int
    inputs: tuple[str, str]
    decisions: tuple[tuple[Decision, ...], tuple[Decision, ...]]
    bell: int = FRAMES

    @property
    def score(self) -> float:
        """Of player 0: 1 won, 0.5 a draw, 0 lost."""
        return {None: 0.5, 0: 1.0, 1: 0.0}[self.winner]

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
        self.asked: tuple[Turn, int] | None = None  # and not answered, with the frames that were over
        self.awaited: Decision | None = None  # answered, and not begun
        self.lands = self.expected = 0
        self.last = NO_MOVE
        self.pressed = bytearray()
        self.decisions: list[Decision] = []

    def asks(self, fight: Fight) -> bool:
        """Whether a move is to be asked for now."""
        waits = self.asked is not None or self.awaited is not None
        return not waits and (self.harness.pipelined or self._is_idle(fight))

    def _is_idle(self, fight: Fight) -> bool:
        return self.at >= len(self.plan) and fight.fighters[self.side][MODE] <= RETREATING

    def question(self, fight: Fight, last_moves: tuple[str, str], seed: int, game: str) -> Turn:
        """What is asked now."""
        question = fight_question(
            self._predicted(fight) if self.harness.predict else fight.copy(),  # frozen: an agent may look at it later
            self.side,
            last_moves,
            seed=(seed << 32) + len(self.decisions),
            time=fight.frame / FRAMES_PER_SECOND,
            game=f"{game}:{self.side}",
        )
        self.asked = question, fight.frame
        return question

    def _predicted(self, fight: Fight) -> Fight:
        ahead = fight.copy()
        for n in range(self.expected):
            if ahead.over:
                break
            at = self.at + n
            own = self.plan[at] if at < len(self.plan) else self.hold
            ahead.step(*((own, NEUTRAL) if self.side == 0 else (NEUTRAL, own)))
        return ahead

    def hear(self, answer: Action, now: int) -> None:
        """An answer was given; it waits for its time."""
        if self.asked is None:
            raise DataError(f"answer: player {self.side} was not asked", remedy="answer each question once")
        question, frame = self.asked
        self.expected = frames_of(answer.seconds)
        self.lands = frame + self.expected
        if self.lands < now:  # what was played meanwhile would be wrong
            raise DataError(
                f"seconds: {answer.seconds} from frame {frame} are over before frame {now}",
                remedy="give an answer before its latency is over",
            )
        self.asked = None
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
        self.plan = (self.hold,) if decision.move is None else PLANS[decision.move]
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


Asked = list[tuple[int, Turn]]
"""Questions of one moment, each with the player it is for."""


class Bout:
    """A fight under way, frame by frame, which goes on while an answer is made.

    In each frame: `ask`, `hear` the answers that are there, and `step`. An answer may be heard later than it was asked
    for, but not later than its latency says; so the fight is the same as if it had been known at once.

    Args:
        seed: 0 or more; and the rest as of `play_fight`.
        streams: which draws of the seed each side uses.
        harness: how each is asked.
        names: of the two.
        bell: frames after which it ends at the latest.

    Raises:
        ConfigError: a seed below 0, or a bell below 1.

    >>> bout = Bout(seed=0)
    >>> [side for side, question in bout.ask()]
    [0, 1]
    >>> bout.step()
    >>> bout.hear(0, Action("jab", "jab", seconds=1 / 60))
    >>> bout.ask(), bout.asked_at(0), bout.asked_at(1), bout.fight.frame
    ([], None, 0, 1)
    """

    def __init__(
        self,
        seed: int,
        streams: tuple[int, int] = (0, 1),
        harness: tuple[Harness, Harness] = (Harness(), Harness()),
        names: tuple[str, str] = ("", ""),
        bell: int = FRAMES,
    ) -> None:
        if seed < 0:
            raise ConfigError(f"seed: must be 0 or more, got {seed}", remedy="give a whole number from 0")
        if bell < 1:
            raise ConfigError(f"bell: must be 1 frame or more, got {bell}", remedy=f"{FRAMES} are 99 seconds")
        self.seed, self.streams, self.names = seed, streams, names
        self.fight = Fight(bell)
        self._seats = _Seat(0, harness[0]), _Seat(1, harness[1])

    def ask(self) -> Asked:
        """Questions that are new in this frame."""
        asking = [seat for seat in self._seats if seat.asks(self.fight)]
        if not asking:
            return []
        last = (self._seats[0].last, self._seats[1].last)
        game = f"fighting:{self.names[0]}:{self.names[1]}:{self.seed}"
        seeds = [2 * self.seed + stream for stream in self.streams]
        return [(seat.side, seat.question(self.fight, last, seeds[seat.side], game)) for seat in asking]

    def hear(self, side: int, answer: Action) -> None:
        """The answer to a player's question.

        Raises:
            DataError: seconds that cannot be, or that were over in an earlier frame; nothing was asked.
        """
        self._seats[side].hear(answer, self.fight.frame)

    def step(self) -> None:
        """One frame."""
        left, right = self._seats
        self.fight.step(left.press(self.fight), right.press(self.fight))

    def asked_at(self, side: int) -> int | None:
        """Frames that were over when a player was asked what is not answered yet; None where nothing is awaited."""
        asked = self._seats[side].asked
        return None if asked is None else asked[1]

    def decisions(self, side: int) -> tuple[Decision, ...]:
        """What a player has answered so far."""
        return self._seats[side].all_decisions()

    def record(self) -> FightRecord:
        """All of it so far."""
        left, right = self._seats
        first, second = self.fight.fighters
        return FightRecord(
            names=self.names,
            seed=self.seed,
            streams=self.streams,
            winner=self.fight.leader,
            health=(first[HEALTH], second[HEALTH]),
            frames=self.fight.frame,
            inputs=(left.pressed.decode(), right.pressed.decode()),
            decisions=(left.all_decisions(), right.all_decisions()),
            bell=self.fight.bell,
        )


def fight_in_turns(
    seed: int,
    streams: tuple[int, int] = (0, 1),
    harness: tuple[Harness, Harness] = (Harness(), Harness()),
    names: tuple[str, str] = ("", ""),
    bell: int = FRAMES,
) -> Generator[Asked, list[Action], FightRecord]:
    """A fight that stops wherever somebody is asked, so that many can be played side by side.

    Yields questions, is sent their answers in the same order, and returns the record. See `play_fight`.
    """
    bout = Bout(seed, streams, harness, names, bell)
    while not bout.fight.over:
        asked = bout.ask()
        if asked:
            answers = yield asked
            for (side, _), answer in zip(asked, answers, strict=True):
                bout.hear(side, answer)
        bout.step()
    return bout.record()


def play_fight(
    agents: tuple[Agent, Agent],
    seed: int,
    streams: tuple[int, int] = (0, 1),
    harness: tuple[Harness, Harness] = (Harness(), Harness()),
    bell: int = FRAMES,
) -> FightRecord:
    """Two agents fight once.

    Args:
        agents: the first starts on the left.
        seed: 0 or more; all that is drawn depends on it and on the stream.
        streams: which draws of the seed each side uses. As they are, a side has the same luck whoever plays it, so that
            two agents that change sides meet each other's luck. Exchanged together with the agents they give the exact
            mirror image of the fight.
        harness: how each is asked.
        bell: frames after which it ends at the latest.

    Raises:
        ConfigError: a seed below 0, or a bell below 1.
        DataError: an answer with seconds that cannot be.
    """
    turns = fight_in_turns(seed, streams, harness, (agents[0].name, agents[1].name), bell)
    try:
        asked = next(turns)
        while True:
            asked = turns.send([agents[side].answer([question])[0] for side, question in asked])
    except StopIteration as end:
        record: FightRecord = end.value
        return record


def replay(inputs: Sequence[str], bell: int = FRAMES) -> Iterator[Fight]:
    """The fight of `FightRecord.inputs`, and its ``bell``, as it began and after each frame.

    >>> [fight.frame for fight in replay(("bb", "aa"))]
    [0, 1, 2]
    """
    fight = Fight(bell)
    yield fight.copy()
    for first, second in zip(*inputs, strict=True):
        fight.step(ord(first) - _FIRST_LETTER, ord(second) - _FIRST_LETTER)
        yield fight.copy()
