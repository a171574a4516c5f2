"""A fight to watch in a terminal, and to take part in.

A fight knows frames alone. The pace at which they are shown is kept here, outside of it: what is read of the machine's
clock never reaches the fight, but for the time that a person took, which is the latency of that answer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from rich.console import Console
from rich.live import Live
from rich.text import Text

from tenfold.arena.agents import Action, Agent
from tenfold.arena.fighting.fight import Fight
from tenfold.arena.fighting.picture import WIDTH, fight_as_text
from tenfold.arena.fighting.play import Bout, Decision, FightRecord, Harness, frames_of, play_fight, replay
from tenfold.arena.fighting.rules import FRAMES, FRAMES_PER_SECOND, HEALTH, STAMINA
from tenfold.arena.human import KEYS, QUIT, HumanFighter, Keyboard, Keys
from tenfold.errors import ConfigError

TICK = 1 / 60
"""Seconds from one picture to the next."""
STALL = 0.25
"""Seconds without a picture after which a fight stands still: nobody can answer what is not shown."""
_HALF = WIDTH // 2
_TOLD = 10 * FRAMES_PER_SECOND
"""Frames from one plain line to the next."""


class Pace:
    """How many frames are over by now.

    Args:
        speed: 1 is 60 frames a second, 2 is twice as fast.
        clock: seconds, from any start.

    Raises:
        ConfigError: a speed that is not above 0 and finite.

    >>> times = iter([7.0, 7.1, 9.1])
    >>> pace = Pace(2.0, clock=lambda: next(times))
    >>> round(pace.frames(), 6), round(pace.frames(), 6)  # two seconds without a look are a stall
    (12.0, 42.0)
    """

    def __init__(self, speed: float = 1.0, clock: Callable[[], float] = time.perf_counter) -> None:
        if not 0 < speed < float("inf"):
            raise ConfigError(f"speed: must be above 0, got {speed}", remedy="1 is 60 frames a second")
        self._frames_per_second, self._clock = speed * FRAMES_PER_SECOND, clock
        self._frames, self._looked = 0.0, clock()

    def frames(self) -> float:
        """Frames since the start, with the part of the one that is under way."""
        now = self._clock()
        self._frames += min(now - self._looked, STALL) * self._frames_per_second
        self._looked = now
        return self._frames

    def rest(self) -> None:
        """What has passed since the last look does not count."""
        self._looked = self._clock()


def watch_fight(
    record: FightRecord,
    speed: float = 1.0,
    console: Console | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show a fight that is over, from its first frame to its last; in plain lines where there is no terminal.

    Args:
        record: of the fight.
        speed: 1 is 60 frames a second.
        console: where; the terminal by default. 80 columns and 24 rows are enough.
        clock: seconds, from any start.
        sleep: waits some seconds.

    Raises:
        ConfigError: a speed that is not above 0.
    """
    console, pace = console or Console(), Pace(speed, clock)
    states = list(replay(record.inputs, record.bell))
    if not _can_show(console):
        _tell_plainly(record, states, console)
        return
    with _live(console) as live:
        pace.rest()
        at = -1
        while at < record.frames:
            at = min(int(pace.frames()), record.frames)
            _show(live, fight_screen(states[at], record.names, record.decisions))
            sleep(TICK)
    _say(console, fight_screen(states[-1], record.names, record.decisions), outcome_in_words(record))


def play_live(
    agents: tuple[Agent, Agent],
    seed: int,
    streams: tuple[int, int] = (0, 1),
    harness: tuple[Harness, Harness] = (Harness(), Harness()),
    bell: int = FRAMES,
    *,
    speed: float = 1.0,
    console: Console | None = None,
    keyboard: Keys | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> FightRecord:
    """A fight that is shown as it is played, by two agents, or by an agent and a person at the keyboard.

    The fight goes on while a person thinks. From the frame in which the person was asked to the key is the latency, in
    seconds of the fight. An agent's latency is what it says it is: while it is computing, the fight stands still. A
    person who gives up (``q``) loses, and the record ends there. Without a terminal agents play unseen, and a few plain
    lines tell of it.

    Args:
        agents: the first starts on the left; one may be a `human.HumanFighter`.
        seed: of the fight, 0 or more.
        streams: which draws of the seed each side uses, as `fighting.play.play_fight`.
        harness: how each is asked.
        bell: frames after which it ends at the latest.
        speed: 1 is 60 frames a second.
        console: where; the terminal by default. 80 columns and 24 rows are enough.
        keyboard: a person's keys; those of the standard input by default.
        clock: seconds, from any start.

    Raises:
        ConfigError: two people; a person without a terminal; a seed below 0; a bell below 1; a speed not above 0.
        DataError: an answer with seconds that cannot be.
    """
    console, names = console or Console(), (agents[0].name, agents[1].name)
    people = [side for side in (0, 1) if isinstance(agents[side], HumanFighter)]
    if len(people) == 2:
        raise ConfigError(
            f"agents: {names[0]} and {names[1]} are two people, and there is one keyboard",
            remedy="let a person play against another agent, such as scripted:0.6",
        )
    if not _can_show(console):
        if people:
            raise ConfigError(
                f"{names[people[0]]}: the output does not go to a terminal, so the fight cannot be shown",
                remedy="play in a terminal, without a pipe, or let another agent play",
            )
        record = play_fight(agents, seed, streams, harness, bell)
        _tell_plainly(record, list(replay(record.inputs, record.bell)), console)
        return record
    bout = Bout(seed, streams, harness, names, bell)
    person = people[0] if people else None
    with keyboard or (Keyboard() if people else _NoKeys()) as keys, _live(console) as live:
        left = _play(bout, agents, person, keys, Pace(speed, clock), live)
    record = bout.record()
    if left:
        record = replace(record, winner=None if person is None else 1 - person)
    _say(console, fight_screen(bout.fight, names, record.decisions), outcome_in_words(record))
    return record


def _play(bout: Bout, agents: tuple[Agent, Agent], person: int | None, keyboard: Keys, pace: Pace, live: Live) -> bool:
    """To the end; True where the person left before."""
    fight, names = bout.fight, (agents[0].name, agents[1].name)
    while True:
        due = int(pace.frames())
        while not fight.over:
            for side, question in bout.ask():
                if side != person:
                    bout.hear(side, agents[side].answer([question])[0])
                    pace.rest()
            if fight.frame >= due:
                break
            bout.step()
        decisions = (bout.decisions(0), bout.decisions(1))
        asked = None if person is None or fight.over else bout.asked_at(person)
        _show(live, fight_screen(fight, names, decisions, person, asked))
        if fight.over:
            return False
        key = keyboard.key(TICK)
        if key == QUIT:
            return True
        if person is not None and asked is not None and key in KEYS:
            seconds = (pace.frames() - asked) / FRAMES_PER_SECOND
            bout.hear(person, Action(KEYS[key], KEYS[key], seconds))


class _NoKeys:
    """Where nobody plays."""

    def __enter__(self) -> _NoKeys:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        pass

    def key(self, seconds: float | None) -> str | None:
        time.sleep(seconds or 0)
        return None


def fight_screen(
    fight: Fight,
    names: tuple[str, str],
    decisions: tuple[Sequence[Decision], Sequence[Decision]],
    person: int | None = None,
    asked: int | None = None,
) -> str:
    """What is shown of a moment: at most 24 lines of 80 characters.

    Args:
        fight: as it stands.
        names: of the two.
        decisions: of each; those that are of later frames are not shown.
        person: who plays by the keyboard, 0 or 1, and needs to see the keys.
        asked: frames that were over when the person was asked; None where no key is waited for.
    """
    sides = [_player(decisions[side], fight.frame, asked if side == person else None) for side in (0, 1)]
    lines = [names, *zip(*sides, strict=True)]
    title, *below = (f"{left:<{_HALF}.{_HALF - 1}}{right:>{_HALF}.{_HALF - 1}}".rstrip() for left, right in lines)
    shown = [title, fight_as_text(fight), "", *below]
    if person is not None:
        prompt = "" if asked is None else f"Move {len(decisions[person]) + 1}? Press a key."
        shown += ["", f"{prompt:<{_HALF}}{f'{QUIT} gives up':>{_HALF}}", *_LEGEND]
    return "\n".join(shown)


def _legend() -> list[str]:
    cells = [f"{'space' if key == ' ' else key:>5} {move:<12}" for key, move in KEYS.items()]
    return ["".join(cells[row::4]).rstrip() for row in range(4)]


_LEGEND = _legend()


def _player(decisions: Sequence[Decision], frame: int, asked: int | None) -> list[str]:
    """Five lines: whether it thinks, its last three moves with the latency, and what its latency is."""
    begun = [each for each in decisions if each.begins is not None and each.begins <= frame]
    thinking = [each.frame for each in decisions if each.frame <= frame < each.frame + frames_of(each.seconds)]
    since = thinking[-1] if thinking else asked
    moves = [f"{each.move or 'no move'} after {each.seconds:.2f} s" for each in begun[:-4:-1]]
    summary = ""
    if begun:
        invalid = sum(each.move is None for each in begun)
        middle = statistics.median(each.seconds for each in begun)
        count = "1 answer" if len(begun) == 1 else f"{len(begun)} answers"
        summary = f"{count}, median {middle:.2f} s" + (f", {invalid} invalid" if invalid else "")
    return [
        "" if since is None else f"thinks {(frame - since) / FRAMES_PER_SECOND:.2f} s",
        *moves,
        *[""] * (3 - len(moves)),
        summary,
    ]


def outcome_in_words(record: FightRecord) -> str:
    """Who won, when, and with what health."""
    first, second = record.health
    ended = f"after {record.frames / FRAMES_PER_SECOND:.1f} s, health {first} to {second}"
    return f"nobody won {ended}" if record.winner is None else f"{record.names[record.winner]} won {ended}"


def _tell_plainly(record: FightRecord, states: Sequence[Fight], console: Console) -> None:
    lines = [f"{record.names[0]} against {record.names[1]}, seed {record.seed}"]
    for fight in states[_TOLD:-1:_TOLD]:
        health, stamina = ([fighter[what] for fighter in fight.fighters] for what in (HEALTH, STAMINA))
        moves = [
            [each.move or "no move" for each in side if each.begins is not None and each.begins <= fight.frame]
            for side in record.decisions
        ]
        last = " / ".join(made[-1] if made else "none" for made in moves)
        lines.append(
            f"{fight.frame / FRAMES_PER_SECOND:5.1f} s  health {health[0]} / {health[1]}"
            f"  stamina {stamina[0]} / {stamina[1]}  last move {last}"
        )
    _say(console, *lines, outcome_in_words(record))


def _can_show(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal


def _live(console: Console) -> Live:
    return Live(console=console, screen=True, auto_refresh=False)


def _show(live: Live, text: str) -> None:
    live.update(Text(text, no_wrap=True, overflow="crop"), refresh=True)


def _say(console: Console, *texts: str) -> None:
    for text in texts:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
