"""A conforming game passes every check, and each way to break one is found by the check of its name."""

import gc
import logging
import random
import sys
import time
from datetime import datetime
from functools import partial
from time import sleep as pause

import numpy as np
import pytest

from tenfold.arena import probes
from tenfold.arena.agents import Turn
from tenfold.arena.conformance import check_game
from tenfold.arena.fighting.fight import Fight
from tenfold.arena.fighting.play import Harness, play_fight
from tenfold.arena.fighting.scripted import ScriptedFighter
from tenfold.arena.probes import ConformanceError
from tenfold.arena.tournament import Played
from tenfold.arena.trading.market_day import play_market
from tenfold.arena.trading.synthetic import MarketRules
from tenfold.arena.watched import plain, without_machine
from tenfold.errors import ConfigError

FREE_OF_THE_SEED = random.Random(5)
ROUNDS = 6


def quiz(agents, seed, fault=""):
    """Sums, one every 2 s: who is right first gets a point, who is wrong first gives it away."""
    draw = FREE_OF_THE_SEED if fault == "free draws" else random.Random(0 if fault == "no seed" else seed)
    if fault == "global draws":
        draw = random
    if fault == "clock":
        time.monotonic()
    if fault == "sleep":
        pause(60)
    if fault == "date":
        datetime.now()
    if fault == "machine":
        np.random.default_rng()
    points, free, valid, number = [0, 0], [0.0, 0.0], [False, False], 0
    while number < ROUNDS or (fault == "to five" and max(points) < 5):
        now, landed = 2.0 * number, []
        one, two, luck = draw.randint(10, 49), draw.randint(10, 49), draw.getrandbits(32)
        right = str(one + two)
        options = tuple(draw.sample([right, *(str(one + two + off) for off in (-1, 1, 10))], 4))
        options = {
            "twice": (*options, options[0]),
            "none": (),
            "empty": (*options, ""),
            "long": (*options, " ".join("abcdefghijklm")),
            "alike": (*options, f"{options[1]}!"),
        }.get(fault, options)
        for side, agent in enumerate(agents):
            if fault == "impatient":
                free[side] = 0.0
            if free[side] > now:
                continue
            rules = f"Round {number}" if fault == "rules" else " " if fault == "no rules" else "Sums."
            turn = Turn(
                rules,
                f"{one} + {two} = ? It stands {points[side]} to {points[1 - side]}.",
                options,
                {"live": points, "no data": (now for now in ())}.get(fault, (one, two)),
                {"one seed": seed + 7, "no seed": 3 + number, "half a seed": 0.5}.get(fault, luck),
                {"back": 20.0 - now, "before": -1.0}.get(fault, now),
                f"quiz {number if fault == 'game' else seed} {side}",
            )
            answer = agent.answer([turn])[0]
            took = 0.0 if fault == "free" else answer.seconds
            free[side] = now + took
            choice = options[0] if fault == "first" and answer.choice is None else answer.choice
            if fault == "free if invalid" and choice is None:
                free[side] = now
            if fault == "fine" and choice is None:
                points[1 - side] += 1
            if fault == "at once" and choice is not None:
                points[side if choice == right else 1 - side] += 1
            valid[side] |= choice is not None
            if choice is not None and (took <= 2 or fault == "late"):
                landed.append((took, side, choice == right or fault == "only time"))
        soonest = min(landed, default=(0,))[0]
        for took, side, was_right in landed:
            if took == soonest and fault not in ("at once", "deaf") and not (fault == "first sits" and side):
                points[side if was_right else 1 - side] += 1
        number += 1
    score = 2.0 if fault == "score" else (1 + (points[0] > points[1]) - (points[0] < points[1])) / 2
    return Played(score, rated=all(valid) or fault == "rated", facts={"points": float(points[0])})


def test_a_game_that_conforms():
    assert check_game(quiz, symmetric="exactly") == (
        *("clock", "turns", "answers", "frozen", "reward", "repeats", "latency", "invalid", "ends", "seeds", "sides"),
    )


@pytest.mark.parametrize(
    ("fault", "check", "words"),
    [
        ("clock", "clock", r"seed 0: the game calls time.monotonic at .*test_conformance.py:\d+"),
        ("sleep", "clock", "calls time.sleep at"),
        ("date", "clock", "calls datetime.now at"),
        ("machine", "clock", "calls os.urandom at"),
        ("rules", "turns", "seed 0, player 0, question 1 at 2 s: other rules than before"),
        ("game", "turns", "question 1 at 2 s: other game than before"),
        ("no rules", "turns", "question 0 at 0 s: rules or state are empty"),
        ("back", "turns", "that is before the last one"),
        ("before", "turns", "at -1 s: that cannot be a time"),
        ("half a seed", "turns", "seed is 0.5"),
        ("twice", "answers", "seed 0, player 0, question 0 at 0 s: offered"),
        ("none", "answers", r"offered \(\)"),
        ("empty", "answers", "'' has 0 words"),
        ("long", "answers", "'a b c d e f g h i j k l m' has 13 words and marks"),
        ("alike", "answers", "!' is read as"),
        ("live", "frozen", "question 0 at 0 s: the view was another one when the game was over"),
        ("no data", "frozen", "cannot be copied"),
        ("score", "reward", "seed 0: score 2.0"),
        ("free draws", "repeats", "seed 0, player 0, question 0 of all at 0 s"),
        ("global draws", "repeats", "seed 0, player 0, question 0 of all at 0 s"),
        ("impatient", "latency", r"the answer to the last one is not there before 1e\+09 s"),
        ("late", "latency", r"player \d, question 0 at 0 s: an answer that takes 1e\+09 s changes the game"),
        ("at once", "latency", "its answer acts before it is there|takes 1e.09 s changes the game"),
        ("free", "latency", "not there before|takes 1e.09 s changes|come to what those of 0 s do"),
        ("deaf", "latency", "other answers that take no time change nothing"),
        ("only time", "latency", "other answers that take no time change nothing"),
        ("first", "invalid", r"seed \d, player \d: with invalid answers"),
        ("fine", "invalid", r"seed \d, player \d: with invalid answers"),
        ("rated", "invalid", "player 0: gave no valid answer, and the game is rated"),
        ("to five", "ends", "seed 0, player 0 was asked 1000 times"),
        ("no seed", "seeds", "give the same questions"),
        ("one seed", "seeds", "all questions of a game have the same seed"),
        ("first sits", "sides", "and with sides swapped"),
    ],
)
def test_each_fault_is_found_by_its_check(fault, check, words, monkeypatch):
    monkeypatch.setattr(probes, "MOST_QUESTIONS", 1000)
    with pytest.raises(ConformanceError, match=rf"^{check}: .*({words})") as raised:
        check_game(partial(quiz, fault=fault), symmetric="exactly")
    assert raised.value.check == check
    assert raised.value.remedy


def ladder(agents, seed, step=0.5, early=False, free_if_invalid=False, one_stream=False):
    """Each answer `up` moves its player, when it is there; both see where the other stands, at every half second."""
    at, coming, draw = [0, 0], [[], []], random.Random(seed)
    free, valid = [0.0, 0.0], [False, False]
    for number in range(12):
        now = number * step
        for side in (0, 1):
            at[side] += sum(1 for when in coming[side] if when <= now)
            coming[side] = [when for when in coming[side] if when > now]
        for side, agent in enumerate(agents):
            if free[side] <= now:
                state = f"You stand at {at[side]}, the other one at {at[1 - side]}."
                luck = draw.getrandbits(30) if one_stream else 100 * seed + number
                turn = Turn("Climb.", state, ("up", "stay"), None, luck, now, f"{seed} {side}")
                answer = agent.answer([turn])[0]
                valid[side] |= answer.choice is not None
                free[side] = now + (0.0 if free_if_invalid and answer.choice is None else answer.seconds)
                if answer.choice == "up":
                    coming[side].append(now + (answer.seconds / 2 if early else answer.seconds))
    return Played((1 + (at[0] > at[1]) - (at[0] < at[1])) / 2, rated=all(valid))


def test_an_answer_that_acts_before_it_is_there_is_seen_by_the_other_player():
    assert "latency" in check_game(ladder, seconds=0.6)
    with pytest.raises(ConformanceError, match=r"^latency: .*its answer acts before it is there"):
        check_game(partial(ladder, early=True), seconds=0.6)


def test_invalid_answers_that_cost_nothing_are_found():
    with pytest.raises(ConformanceError, match=r"^invalid: .*question 1 at 0.5 s: .* not there before 0.6 s"):
        check_game(partial(ladder, free_if_invalid=True), seconds=0.6)


def test_luck_that_depends_on_how_often_the_other_is_asked_is_found():
    with pytest.raises(ConformanceError, match=r"^seeds: seed 0: other players' seeds depend on how often player 0"):
        check_game(partial(ladder, one_stream=True), seconds=0.6)


def test_what_is_said_of_rewards_and_sides_is_checked():
    names = {"reward": lambda record: (record.score, 1 - record.score)}
    check_game(quiz, seeds=(0, 1), **names)
    with pytest.raises(ConformanceError, match=r"^reward: .* do not sum to 0"):
        check_game(quiz, seeds=(0, 1), zero_sum=True, **names)
    with pytest.raises(ConformanceError, match=r"^reward: .* for 3 agents"):
        check_game(lambda agents, seed: quiz(agents[:2], seed), players=3)
    with pytest.raises(ConformanceError, match=r"^reward: .*nan"):
        check_game(quiz, reward=lambda record: (float("nan"), 0.0))
    assert check_game(quiz, seeds=(0, 1), symmetric="in the mean")[-1] == "sides"
    with pytest.raises(ConformanceError, match=r"^sides: of two that answer at random the first one leads by"):
        check_game(partial(quiz, fault="first sits"), seeds=(0, 1), symmetric="in the mean")


@pytest.mark.parametrize(
    ("keys", "words"), [({"seeds": (3,)}, "seeds: .3."), ({"players": 1, "symmetric": "exactly"}, "symmetric: of 1")]
)
def test_what_cannot_be_meant(keys, words):
    with pytest.raises(ConfigError, match=words):
        check_game(quiz, **keys)


@pytest.mark.parametrize("harness", [Harness(), Harness(pipelined=True, predict=True, hold="back")])
def test_the_fight_conforms(harness):
    """5 seconds of it: the rules are the same all through."""

    def fight(agents, seed):
        return play_fight(agents, seed, harness=(harness, harness), bell=300)

    assert "sides" in check_game(fight, zero_sum=True, symmetric="exactly", seeds=(0, 1))


def test_the_market_conforms():
    rules = MarketRules(seconds=1000, events=10)
    for players, symmetric in ((1, None), (2, "in the mean")):
        check_game(
            lambda agents, seed: play_market(agents, seed, rules),
            players=players,
            reward=lambda play: tuple(play.yields.values()),
            symmetric=symmetric,
            seeds=(0, 1),
        )


def test_what_a_fighter_saw_stays_as_it_was():
    """The check found it: an agent that kept its view saw the fight go on in it."""
    kept = []

    class Keeps(ScriptedFighter):
        def answer(self, questions):
            kept.extend((question, question.view.fight.frame) for question in questions)
            return super().answer(questions)

    play_fight((Keeps(0.5), ScriptedFighter(0.5)), 3, bell=400)
    assert len(kept) > 5
    assert all(question.view.fight.frame == frame == round(60 * question.time) for question, frame in kept)


def test_the_machine_is_left_alone_again_and_what_is_raised_goes_on():
    before = sys.getprofile()
    assert without_machine(time.perf_counter).startswith("time.perf_counter at")
    with pytest.raises(ZeroDivisionError):
        without_machine(lambda: 1 / 0)
    assert sys.getprofile() is before
    assert (
        without_machine(lambda: logging.getLogger("tenfold.test").debug("at %s", 1) or logging.makeLogRecord({}))
        is None
    )


def test_plain_values_know_types_and_arrays():
    values = [1, True, 1.0, "1", (1,), [1], {1}, {1: 1}, np.arange(2), np.arange(2.0), Fight(), Fight(9), None]
    found = [plain(value) for value in values]
    assert all((one == two) == (a == b) for a, one in enumerate(found) for b, two in enumerate(found))
    fight = Fight()
    before = plain(fight)
    fight.step(1, 0)
    assert plain(fight) != before == plain(Fight())
    assert plain(float("nan")) == plain(float("nan"))


def test_a_collection_of_garbage_that_a_library_times_is_not_the_game():
    def timed(phase, info):
        time.perf_counter()

    before = gc.get_threshold()
    gc.callbacks.append(timed)
    gc.set_threshold(1)
    try:
        assert without_machine(lambda: [[] for _ in range(1000)]) is None
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(timed)
    assert gc.isenabled()
