"""What is shown of a fight, and a person in it: the keys, the time they took, and the terminal afterwards."""

import io
import itertools
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
from rich.console import Console

from tenfold.arena.agents import Action
from tenfold.arena.fighting.fight import Fight
from tenfold.arena.fighting.plans import ANSWERS
from tenfold.arena.fighting.play import Bout, Harness, frames_of, play_fight, replay
from tenfold.arena.fighting.scripted import ScriptedFighter
from tenfold.arena.human import KEYS, QUIT, HumanFighter, HumanTrader, Keyboard, answer_keys
from tenfold.arena.live import STALL, TICK, Pace, fight_screen, play_live, watch_fight
from tenfold.arena.trading.market_day import market_questions, play_market
from tenfold.arena.trading.synthetic import draw_market
from tenfold.errors import ConfigError, DataError

KEY_OF = {move: key for key, move in KEYS.items()}


class Stands:
    """Waits, and takes a while for it."""

    name = "stands"

    def __init__(self, seconds=0.1):
        self.seconds = seconds

    def answer(self, questions):
        return [Action("wait", "wait", self.seconds) for _ in questions]


class Recorded:
    """Answers as a record says, and then not any more before the bell."""

    def __init__(self, name, decisions):
        self.name, self.coming = name, iter(decisions)

    def answer(self, questions):
        one = next(self.coming, None)
        return [Action("", None, 99.0) if one is None else Action(one.said, one.move, one.seconds)]


class Hands:
    """Presses keys at their times, on a clock that goes on by waiting alone."""

    def __init__(self, *presses):
        self.presses, self.now, self.closed = list(presses), 0.0, False

    def clock(self):
        return self.now

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed = True

    def key(self, seconds):
        until = float("inf") if seconds is None else self.now + seconds
        if self.presses and self.presses[0][0] <= until:
            self.now, key = self.presses.pop(0)
            return key
        self.now = until
        return None


def terminal(file=None):
    return Console(
        file=file or io.StringIO(),
        force_terminal=True,
        width=80,
        height=24,
        _environ={"TERM": "xterm"},
        legacy_windows=False,
    )


def last_state(record):
    *_, last = replay(record.inputs, record.bell)
    return last.state_hash()


def answered_again(record):
    """The record of a fight in which the same answers are known at once."""
    agents = [Recorded(name, decisions) for name, decisions in zip(record.names, record.decisions, strict=True)]
    return play_fight(tuple(agents), record.seed, record.streams, bell=record.bell)


# the fight that goes on meanwhile


@pytest.mark.parametrize("harness", [Harness(), Harness(pipelined=True), Harness(predict=True, hold="low")])
def test_an_answer_may_come_while_the_fight_goes_on(harness):
    """Each is handed over in the frame in which it lands, and the fight is as if it had been known when asked."""
    agents, both = (ScriptedFighter(0.8, 0.17), ScriptedFighter(0.9, 0.35)), (harness, harness)
    bout = Bout(3, (0, 1), both, (agents[0].name, agents[1].name))
    thinking = []
    while not bout.fight.over:
        for side, question in bout.ask():
            answer = agents[side].answer([question])[0]
            thinking.append((bout.fight.frame + frames_of(answer.seconds), side, answer))
        for each in [each for each in thinking if each[0] == bout.fight.frame]:
            thinking.remove(each)
            assert bout.asked_at(each[1]) == each[0] - frames_of(each[2].seconds)
            bout.hear(*each[1:])
        bout.step()
    at_once = play_fight(agents, 3, harness=both)
    late = bout.record()
    assert late.inputs == at_once.inputs
    # only who was still thinking at the end has said less
    assert [len(one) - len(other) for one, other in zip(at_once.decisions, late.decisions, strict=True)] in (
        [0, 0], [0, 1], [1, 0], [1, 1]
    )  # fmt: skip


def test_an_answer_after_its_time_and_one_to_no_question_are_refused():
    bout = Bout(0)
    bout.ask()
    for _ in range(13):
        bout.step()
        assert bout.ask() == []
    with pytest.raises(DataError, match=r"0\.2 from frame 0 are over before frame 13"):
        bout.hear(0, Action("jab", "jab", 0.2))
    bout.hear(0, Action("jab", "jab", 13 / 60))
    with pytest.raises(DataError, match="player 0 was not asked"):
        bout.hear(0, Action("jab", "jab", 1.0))
    bout.step()
    assert bout.record().inputs[0] == "a" * 13 + "h"
    with pytest.raises(ConfigError, match="seed"):
        Bout(-1)


# pace


def test_pace_counts_frames_by_the_clock_but_no_stalls():
    now = [10.0]
    pace = Pace(3.0, clock=lambda: now[0])
    assert pace.frames() == 0
    now[0] += 0.1
    assert pace.frames() == pytest.approx(18)
    now[0] += 60.0
    pace.rest()
    assert pace.frames() == pytest.approx(18)
    now[0] += 60.0
    assert pace.frames() == pytest.approx(18 + 180 * STALL)
    for speed in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="speed"):
            Pace(speed)


# a person, by a clock of the test's own


def test_every_move_has_a_key_of_its_own():
    assert sorted(KEYS.values()) == sorted(ANSWERS)
    assert QUIT not in KEYS
    screen = fight_screen(Fight(), ("human", "other"), ((), ()), person=0, asked=0)
    lines = screen.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    for key, move in KEYS.items():
        assert f"{'space' if key == ' ' else key} {move}" in screen


@pytest.mark.parametrize("side", [0, 1])
def test_the_time_to_the_key_is_the_latency(side):
    """Asked at frame 0, 0.105 s at double speed are 12.6 frames; a walk takes 17, so the next is asked at frame 30."""
    hands = Hands((0.105, "d"), (0.2, "k"), (0.5, "u"), (0.7, "7"), (1.0, QUIT))
    agents = (HumanFighter(), Stands()) if side == 0 else (Stands(), HumanFighter())
    record = play_live(agents, 4, speed=2.0, console=terminal(), keyboard=hands, clock=hands.clock)
    assert hands.closed
    first, second = record.decisions[side]
    assert (first.move, first.frame, first.begins, first.seconds) == ("close", 0, 13, pytest.approx(0.21))
    # the sweep was pressed on the way, when nobody had asked; 0.5 s are 60 frames
    assert (second.move, second.frame, second.begins, second.seconds) == ("jab", 30, 60, pytest.approx(0.5))
    assert len(record.decisions[1 - side]) > 3
    assert record.names[side] == "human"
    assert record.winner == 1 - side
    assert record.frames == pytest.approx(120, abs=4)  # as shown: up to the last picture
    assert record.inputs == tuple(pressed[: record.frames] for pressed in answered_again(record).inputs)


def test_a_whole_fight_is_the_same_when_its_answers_are_known_at_once():
    rhythm = [(0.03 * n, KEY_OF[move]) for n, move in enumerate(itertools.islice(itertools.cycle(ANSWERS), 100))]
    hands = Hands(*rhythm)
    agents = (HumanFighter("Ada"), ScriptedFighter(0.9, 0.2))
    record = play_live(agents, 1, speed=10.0, console=terminal(), keyboard=hands, clock=hands.clock)
    assert record.winner == 1
    assert record.frames == len(record.inputs[0])
    assert len(record.decisions[0]) > 10
    again = answered_again(record)
    assert (again.inputs, again.health, again.winner) == (record.inputs, record.health, record.winner)
    assert last_state(again) == last_state(record)
    shown = {each.seconds for each in record.decisions[1]}
    assert shown == {0.2}


def test_what_an_agent_computes_is_charged_to_nobody():
    """A model that computes for a second says 0.1 s, and that is what passes; the person loses no time meanwhile."""
    hands = Hands((5.0, "u"), (9.0, QUIT))

    class Slow(Stands):
        def answer(self, questions):
            hands.now += 1.0
            return super().answer(questions)

    record = play_live((HumanFighter(), Slow()), 0, console=terminal(), keyboard=hands, clock=hands.clock)
    (jab,) = record.decisions[0]
    answers = [each.frame for each in record.decisions[1]]
    assert answers == [17 * n for n in range(len(answers))]  # 6 frames of thought and 11 of waiting
    asked_before = sum(frame < jab.begins for frame in answers)
    assert jab.seconds == pytest.approx(5.0 - asked_before, abs=0.02)


def test_screens_tell_who_thinks_and_what_was_done():
    sink = io.StringIO()
    hands = Hands((0.5, "k"), (1.2, QUIT))
    play_live((HumanFighter(), Stands()), 0, console=terminal(sink), keyboard=hands, clock=hands.clock)
    text = sink.getvalue()
    for part in (
        "Move 1? Press a key.",
        "thinks 0.25 s",
        "sweep after 0.50 s",
        "1 answer, median 0.50 s",
        "stands won",
    ):
        assert part in text
    assert text.index("\x1b[?1049h") < text.index("Move 1?") < text.index("\x1b[?1049l") < text.index("stands won")


def test_who_cannot_play_is_refused_by_name():
    people = (HumanFighter("Ada"), HumanFighter("Bob"))
    with pytest.raises(ConfigError, match="Ada and Bob are two people"):
        play_live(people, 0, console=terminal())
    with pytest.raises(ConfigError, match="Ada: the output does not go to a terminal"):
        play_live((people[0], Stands()), 0, console=Console(file=io.StringIO()))
    with pytest.raises(ConfigError, match="Ada: a person fights in real time"):
        play_fight((people[0], Stands()), 0)
    reads, writes = os.pipe()
    for descriptor in (reads, writes, None):  # pytest's standard input is none either
        with pytest.raises(ConfigError, match="standard input is not a terminal"), Keyboard(descriptor):
            pass
    os.close(reads)
    os.close(writes)
    with pytest.raises(ConfigError, match="standard input is not a terminal"):
        play_live((people[0], Stands()), 0, console=terminal())


def test_a_person_fights_until_the_bell():
    """Two seconds, in which nobody does harm: a draw, and the state says how much time was left."""
    hands = Hands((0.5, "a"))
    record = play_live((HumanFighter(), Stands()), 0, bell=120, console=terminal(), keyboard=hands, clock=hands.clock)
    assert (record.frames, record.bell, record.winner) == (120, 120, None)
    assert hands.now == pytest.approx(2.0, abs=2 * TICK)
    assert last_state(answered_again(record)) == last_state(record) != last_state(replace(record, bell=121))


# a terminal


class Screen:
    """The other end of a terminal: what was written to it, and the keys."""

    def __init__(self):
        self.master, self.slave = pty.openpty()
        self.seen = b""
        self.before = termios.tcgetattr(self.slave)
        self._changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        try:
            while data := os.read(self.master, 65536):
                with self._changed:
                    self.seen += data
                    self._changed.notify_all()
        except OSError:
            pass

    def wait_for(self, text, count=1):
        with self._changed:
            came = self._changed.wait_for(lambda: self.seen.count(text.encode()) >= count, 10.0)
        assert came, f"{text!r} never came"

    def press(self, keys):
        os.write(self.master, keys.encode())

    def settings_are_back(self):
        return termios.tcgetattr(self.slave) == self.before


@contextmanager
def screen():
    one = Screen()
    file = os.fdopen(os.dup(one.slave), "w")
    try:
        yield one, Keyboard(one.slave), terminal(file)
    finally:
        file.close()
        os.close(one.slave)
        time.sleep(0.01)  # for the reader to see the end
        os.close(one.master)


def type_when_asked(one, *steps):
    """Press keys, each when a text has been shown for the so manieth time."""

    def work():
        try:
            for text, count, keys in steps:
                one.wait_for(text, count)
                one.press(keys)
        except AssertionError:
            one.press(QUIT)  # or the test would wait for ever
            raise

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_keys_in_a_terminal_are_the_moves_of_the_record():
    moves = ["close", "sweep", "low guard", "wait", "bolt"]
    with screen() as (one, keyboard, console):
        one.press("kkk")  # typed before it began
        keys = [*(KEY_OF[move] for move in moves), QUIT + "jj\n"]
        typing = type_when_asked(one, *((f"Move {number}?", 1, key) for number, key in enumerate(keys, 1)))
        record = play_live((HumanFighter(), Stands()), 2, speed=8.0, console=console, keyboard=keyboard)
        typing.join(5)
        assert one.settings_are_back()
        assert not select.select([one.slave], [], [], 0)[0]  # what came after is not left for the shell
    assert [each.move for each in record.decisions[0]] == moves
    assert record.winner == 1
    assert all(each.begins >= each.frame + frames_of(each.seconds) > each.frame for each in record.decisions[0])
    again = answered_again(record)
    assert record.inputs == tuple(pressed[: record.frames] for pressed in again.inputs)
    states = list(replay(again.inputs, again.bell))
    assert states[record.frames].state_hash() == last_state(record)


def test_the_terminal_is_restored_when_an_agent_fails():
    class Fails(Stands):
        def answer(self, questions):
            if questions[0].time > 0.3:
                assert termios.tcgetattr(one.slave) != one.before
                raise RuntimeError("no more")
            return super().answer(questions)

    with screen() as (one, keyboard, console):
        with pytest.raises(RuntimeError, match="no more"):
            play_live((HumanFighter(), Fails()), 0, speed=8.0, console=console, keyboard=keyboard)
        assert one.settings_are_back()


def test_arrows_and_unknown_keys_are_no_moves():
    with screen() as (one, keyboard, _), keyboard:
        for typed, key in (("\x1b[A", None), ("7", "7"), ("A", "a"), ("\x1bOA", None), ("d", "d")):
            one.press(typed)
            assert keyboard.key(1.0) == key
        assert keyboard.key(0.0) is None


CHILD = """
import fcntl, signal, sys, termios
signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run in the background it is ignored
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from tenfold.arena.fighting.scripted import ScriptedFighter
from tenfold.arena.human import HumanFighter
from tenfold.arena.live import play_live
try:
    play_live((HumanFighter(), ScriptedFighter(0.5, 0.2)), 0)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_ctrl_c_ends_it_and_restores_the_terminal():
    with screen() as (one, _, _console):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=one.slave,
            stdout=one.slave,
            stderr=one.slave,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm"},
        )
        try:
            one.wait_for("Move 1?")
            assert not one.settings_are_back()
            one.press("\x03")
            assert child.wait(10) == 128 + signal.SIGINT
            one.wait_for("\x1b[?1049l")
            one.wait_for("\x1b[?25h")
            assert one.settings_are_back()
        finally:
            child.kill()


# watching


def test_a_record_is_shown_frame_by_frame_at_its_pace():
    record = play_fight((ScriptedFighter(0.9, 0.1, name="left"), ScriptedFighter(0.4, 0.3, name="right")), 2)
    for speed in (4.0, 20.0):
        hands, sink = Hands(), io.StringIO()
        watch_fight(record, speed, terminal(sink), hands.clock, hands.key)
        assert hands.now == pytest.approx(record.frames / 60 / speed, abs=3 * TICK)
        text = sink.getvalue()
        assert text.count("\x1b[H") == pytest.approx(record.frames / speed, abs=4)
        for part in ("left", "right", "thinks 0.", "answers, median 0.30 s", "left won after"):
            assert part in text
        picture = fight_screen(list(replay(record.inputs, record.bell))[-1], record.names, record.decisions)
        assert picture.splitlines()[1] in text


def test_a_picture_shows_nothing_of_later_frames():
    record = play_fight((ScriptedFighter(0.9, 0.1), ScriptedFighter(0.4, 0.3)), 2)
    states = list(replay(record.inputs, record.bell))
    for at in range(0, record.frames, 37):
        known = tuple(tuple(each for each in side if each.frame <= at) for side in record.decisions)
        # what is not begun by then is not known to begin
        known = tuple(
            tuple(replace(each, begins=None) if (each.begins or 0) > at else each for each in side) for side in known
        )
        assert fight_screen(states[at], record.names, known) == fight_screen(states[at], record.names, record.decisions)


def test_without_a_terminal_a_few_lines_are_told():
    agents = (ScriptedFighter(0.9, 0.2, name="[bold]one"), ScriptedFighter(0.5, 0.3, name="two"))
    sink, other = io.StringIO(), io.StringIO()
    record = play_live(agents, 1, console=Console(file=sink, width=80))
    assert record == play_fight(agents, 1)
    watch_fight(record, console=Console(file=other, width=80))
    assert other.getvalue() == sink.getvalue()
    head, *between, end = sink.getvalue().splitlines()
    assert head == "[bold]one against two, seed 1"
    assert end == f"[bold]one won after {record.frames / 60:.1f} s, health {record.health[0]} to 0"
    assert len(between) == (record.frames - 1) // 600
    state = list(replay(record.inputs, record.bell))[600]
    assert f"health {state.fighters[0][9]} / {state.fighters[1][9]}" in between[0]
    assert "\x1b" not in sink.getvalue()


def test_two_agents_are_shown_as_they_play(monkeypatch):
    hands, sink = Hands(), io.StringIO()
    monkeypatch.setattr("tenfold.arena.live.time.sleep", hands.key)
    agents = (ScriptedFighter(0.9, 0.2), ScriptedFighter(0.5, 0.3))
    record = play_live(agents, 1, speed=10.0, console=terminal(sink), clock=hands.clock)
    assert record == play_fight(agents, 1)
    assert hands.now == pytest.approx(record.frames / 600, abs=3 * TICK)
    assert "gives up" not in sink.getvalue()


# trading


def test_a_person_trades_by_keys_and_pays_for_the_time():
    """A key every half second; one that is not offered is no answer, and takes its time all the same."""
    market = draw_market(0)
    for keys, choices, times in (
        ("xp", ["pass"] * len(market.start), {1.0}),
        ("sb", [question.answers[0] for question in market_questions(market)], {0.5, 1.0}),
    ):
        presses = [(0.5 * n, key) for n, key in enumerate(itertools.islice(itertools.cycle(keys), 400), 1)]
        hands, sink = Hands(*presses), io.StringIO()
        day = play_market([HumanTrader("Ada", Console(file=sink, width=80), hands, hands.clock)], seed=0)
        assert [each.choice for each in day.decisions] == choices
        assert {each.seconds for each in day.decisions} == times
        assert day.yields["Ada"] == 0 or keys == "sb"
        assert sink.getvalue().count("You trade") == 1  # the rules once
        assert sink.getvalue().count(f"p pass   {QUIT} quits ]") == len(choices)


def test_a_trader_quits_and_the_terminal_is_restored():
    with screen() as (one, keyboard, console):
        person = HumanTrader(console=console, keyboard=keyboard)

        type_when_asked(one, ("quits ]", 1, "p"), ("quits ]", 2, QUIT))
        with pytest.raises(KeyboardInterrupt):
            play_market([person], seed=0)
        assert one.settings_are_back()


def test_answers_get_first_letters_or_else_digits():
    assert answer_keys(("buy", "pass")) == {"b": "buy", "p": "pass"}
    assert list(answer_keys(("hold", "quit"))) == ["1", "2"]
    many = [f"buy {n}" for n in range(34)]
    assert len(answer_keys(many)) == 34
    assert QUIT not in answer_keys(many)
    with pytest.raises(ConfigError, match="35 answers"):
        answer_keys([*many, "hold"])
