"""Who is asked when, what a late answer costs, what is recorded, and what agents are told."""

import itertools
import json
import pickle
from dataclasses import asdict

import numpy as np
import pytest

from tenfold.arena.agents import Action
from tenfold.arena.fighting import rules
from tenfold.arena.fighting.fight import Fight
from tenfold.arena.fighting.moves import INPUTS
from tenfold.arena.fighting.plans import ALIASES, ANSWERS, PLANS, named_move
from tenfold.arena.fighting.play import Harness, fight_in_turns, frames_of, play_fight, replay
from tenfold.arena.fighting.question import RULES, FightView, fight_question
from tenfold.arena.fighting.scripted import ScriptedFighter, good_moves
from tenfold.errors import ConfigError, DataError

PX = 256


class Says:
    """Answers from a list, the last one again and again; seconds likewise."""

    name = "says"

    def __init__(self, *texts, seconds=(0.0,)):
        self.texts, self.seconds, self.asked = texts, seconds, []

    def answer(self, questions):
        return [self.one(question) for question in questions]

    def one(self, question):
        n = len(self.asked)
        self.asked.append(question)
        text = self.texts[min(n, len(self.texts) - 1)]
        choice = text if text in question.answers else None
        return Action(text, choice, self.seconds[min(n, len(self.seconds) - 1)])


def letters(*keys):
    return "".join(chr(ord("a") + INPUTS.index(key)) for key in keys)


def written(plan):
    return "".join(chr(ord("a") + key) for key in plan)


def test_an_answer_begins_as_many_frames_later_as_it_took():
    record = play_fight((Says("close", "wait", seconds=(0.2, 0.101)), Says("wait")), seed=0)
    first, second, *_ = record.decisions[0]
    assert (first.frame, first.begins, first.move) == (0, 12, "close")
    assert (second.frame, second.begins) == (12 + 17, 12 + 17 + 7)
    expected = letters("neutral") * 12 + written(PLANS["close"]) + letters("neutral") * 7 + written(PLANS["wait"])
    assert record.inputs[0].startswith(expected)


def test_an_answer_waits_until_the_fighter_is_free():
    """A jab lasts 14 frames and, as it misses, 4 more; the next is asked then."""
    record = play_fight((Says("jab", "wait"), Says("wait")), seed=0)
    assert [each.frame for each in record.decisions[0][:3]] == [0, 18, 29]
    # answered while the fighter lies: it begins when it is up
    hit = play_fight((Says("close", "sweep", "wait"), Says("close", "wait", seconds=(0.0, 0.7))), seed=0)
    states = list(replay(hit.inputs))
    decision = hit.decisions[1][1]
    assert decision.frame + 42 < decision.begins
    assert states[decision.begins].is_free(1)
    assert not states[decision.begins - 1].is_free(1)


def test_guard_is_kept_while_waiting_and_hold_says_what_else():
    record = play_fight((Says("low guard", seconds=(1.0,)), Says("wait")), seed=0)
    states = list(itertools.islice(replay(record.inputs), 200))
    assert [state.fighters[0][rules.GUARD] for state in states] == [0] * 61 + [1] * 139
    record = play_fight((Says("wait", seconds=(1.0,)), Says("wait")), 0, harness=(Harness(hold="back"), Harness()))
    assert record.inputs[0].startswith(letters("back") * 60 + letters("neutral") * 11 + letters("back"))


def test_an_invalid_answer_costs_its_time_does_nothing_and_is_counted():
    record = play_fight((Says("dance", "Fireball", "jab + jab", seconds=(0.5,)), Says("hm")), seed=0)
    first, second, third, *_ = record.decisions[0]
    assert (first.move, second.move, third.move) == (None, "bolt", None)
    assert (first.begins, second.frame) == (30, 31)
    assert set(record.inputs[0][:61]) == {letters("neutral")}
    assert record.inputs[0][61] == letters("bolt")
    assert record.invalid[0] == len(record.decisions[0]) - 1
    assert record.invalid[1] == len(record.decisions[1]) > 5000
    assert not record.rated
    assert play_fight((Says("dance", "jab"), Says("jab")), seed=0).rated


def test_pipelined_asks_while_the_move_is_made():
    slow = Says("close", seconds=(0.25,))
    record = play_fight((slow, Says("away")), 0, harness=(Harness(pipelined=True), Harness()))
    begins = [each.begins for each in record.decisions[0][:4]]
    assert begins == [15, 32, 49, 66]  # 17 frames each, and none of waiting after the first
    plain = play_fight((Says("close", seconds=(0.25,)), Says("away")), 0)
    assert [each.begins for each in plain.decisions[0][:3]] == [15, 47, 79]


def test_predict_shows_the_fight_when_the_answer_is_expected():
    """Walking back while it waits, 2.5 px a frame, it is told of the place where it will be."""
    harness = Harness(predict=True, hold="back")
    record = play_fight((Says("wait", seconds=(0.2,)), Says("wait")), 0, harness=(harness, Harness()))
    first, second, *_ = record.decisions[0]
    assert "96 px away" in first.saw  # nothing is expected yet
    moved = 96 + 2.5 * 12
    assert f"{moved + 30:.0f} px away" in second.saw
    states = list(replay(record.inputs))
    true = states[second.begins].fighters
    assert abs(true[0][rules.X] - true[1][rules.X]) // PX == moved + 30


def test_a_record_replays_exactly():
    agents = ScriptedFighter(0.7, 0.1), ScriptedFighter(0.9, 0.3)
    record = play_fight(agents, 5)
    assert record == play_fight(agents, 5)
    assert pickle.loads(pickle.dumps(record)) == record
    json.dumps(asdict(record))
    asked = {(each.frame, side): each.saw for side in (0, 1) for each in record.decisions[side]}
    last = ["none", "none"]
    begun = {(each.begins, side): each.move for side in (0, 1) for each in record.decisions[side]}
    seen = 0
    for fight in replay(record.inputs):
        for side in (0, 1):
            if (fight.frame, side) in asked:
                assert asked[fight.frame, side] == fight_question(fight, side, tuple(last)).state
                seen += 1
        for side in (0, 1):
            last[side] = begun.get((fight.frame, side), last[side])
    assert seen == len(record.decisions[0]) + len(record.decisions[1])
    assert fight.over
    assert (fight.frame, fight.leader) == (record.frames, record.winner)
    assert tuple(fighter[rules.HEALTH] for fighter in fight.fighters) == record.health


def test_fights_in_turns_are_the_fights():
    """Side by side, with the questions of all answered together."""
    agent = ScriptedFighter(0.8, 0.2)
    turns = [fight_in_turns(seed) for seed in range(4)]
    asked = [next(each) for each in turns]
    records = [None] * 4
    while any(asked):
        answers = iter(agent.answer([question for each in asked for _, question in each]))
        for n, each in enumerate(asked):
            if each:
                try:
                    asked[n] = turns[n].send([next(answers) for _ in each])
                except StopIteration as end:
                    records[n], asked[n] = end.value, []
    for seed, record in enumerate(records):
        alone = play_fight((agent, agent), seed)
        assert (record.inputs, record.decisions) == (alone.inputs, alone.decisions)


def test_questions_know_the_clock_and_the_game():
    slow, quick = Says("wait", seconds=(0.5,)), Says("close")
    play_fight((slow, quick), 3, harness=(Harness(predict=True), Harness()))
    assert [question.time for question in slow.asked[:3]] == pytest.approx([0, 41 / 60, 82 / 60])
    assert {question.game for question in slow.asked} == {"fighting:says:says:3:0"}
    assert {question.game for question in quick.asked} == {"fighting:says:says:3:1"}


def test_luck_belongs_to_the_seed_and_the_side():
    """The n-th question of a side has the same seed whoever plays; other sides and seeds have others."""
    seeds = {}
    for seed in (0, 1):
        agents = Says("wait"), Says("close", "jab", seconds=(0.5,))
        play_fight(agents, seed)
        other = Says("sweep"), Says("axe", seconds=(0.1,))
        play_fight(other, seed)
        for side in (0, 1):
            one, two = ([question.seed for question in each[side].asked] for each in (agents, other))
            assert all(a == b for a, b in zip(one, two, strict=False))
            seeds[seed, side] = set(one) | set(two)
    for one, two in itertools.combinations(seeds.values(), 2):
        assert not one & two


def test_a_fighter_of_quality_0_plays_all_moves_alike_and_of_quality_1_by_the_rules():
    fight = Fight()
    questions = [fight_question(fight, 0, seed=n) for n in range(3200)]
    counts = dict.fromkeys(ANSWERS, 0)
    for answer in ScriptedFighter(0.0).answer(questions):
        counts[answer.choice] += 1
    assert all(200 - 4 * 14 < count < 200 + 4 * 14 for count in counts.values())
    said = [answer.choice for answer in ScriptedFighter(1.0).answer(questions)]
    assert 1600 - 4 * 29 < said.count("sweep") == 3200 - said.count("close") < 1600 + 4 * 29
    half = [answer.choice in ("sweep", "close") for answer in ScriptedFighter(0.5).answer(questions)]
    assert np.mean(half) == pytest.approx(0.5 + 0.5 / 8, abs=4 * 0.0088)


def state(pixels, own=None, bolt=None, **other):
    fight = Fight()
    fight.fighters[0][rules.X], fight.fighters[1][rules.X] = 60 * PX, (60 + pixels) * PX
    for fields, fighter in ((other, fight.fighters[1]), (own or {}, fight.fighters[0])):
        for name, value in fields.items():
            fighter[getattr(rules, name)] = value
    if bolt is not None:
        fight.fighters[1][rules.BOLT_WAY], fight.fighters[1][rules.BOLT_X] = -1, (60 + bolt) * PX
    return fight


def attack(name, time):
    return {"MODE": rules.ATTACKING, "MOVE": list(PLANS).index(name) - 6, "TIME": time}


STUNNED, JUMPING = {"MODE": rules.STUNNED}, {"MODE": rules.JUMPING, "TIME": 9}
TIRED = {"STAMINA": 299}


@pytest.mark.parametrize(
    ("fight", "expected"),
    [
        (state(80, TIME=13, **STUNNED), "fierce"),
        (state(81, TIME=13, **STUNNED), "strong"),
        (state(80, TIME=12, **STUNNED), "strong"),
        (state(82, own=TIRED, TIME=7, **STUNNED), "strong"),
        (state(82, TIME=6, **STUNNED), "sweep close"),
        (state(83, TIME=13, **STUNNED), "sweep close"),
        (state(119, own=TIRED), "away"),
        (state(120, own=TIRED, **JUMPING), "stand guard,low guard,wait"),
        (state(70, own={"STAMINA": 300}, **JUMPING), "sweep short"),
        (state(69, **JUMPING), "upper"),
        (state(80, **attack("fierce", 14)), "fierce"),
        (state(81, **attack("fierce", 14)), "sweep"),
        (state(88, **attack("jab", 7)), "sweep"),
        (state(89, **attack("jab", 7)), "close"),
        (state(96, **attack("fierce", 13)), "stand guard"),
        (state(97, **attack("fierce", 13)), "bolt close close"),
        (state(102, **attack("sweep", 13)), "low guard"),
        (state(74, **attack("short", 1)), "low guard"),
        (state(75, **attack("short", 1)), "sweep close"),
        (state(56, **attack("throw", 1)), "stand guard"),
        (state(13, **attack("bolt", 1)), "sweep short throw"),
        (state(12, **attack("bolt", 1)), "stand guard"),
        (state(200, bolt=89), "stand guard"),
        (state(200, bolt=90), "bolt close close"),
        (state(97), "bolt close close"),
        (state(96, GUARD=1), "close"),
        (state(75, GUARD=1), "close"),
        (state(74, GUARD=1), "axe"),
        (state(45, GUARD=1), "axe"),
        (state(44, GUARD=1), "axe throw"),
        (state(45), "sweep short"),
        (state(44), "sweep short throw"),
    ],
)
def test_the_rules_of_the_scripted_fighter(fight, expected):
    found = good_moves(FightView(fight, 0))
    assert found == (tuple(expected.split(",")) if "guard" in expected else tuple(expected.split()))
    mirrored = Fight()
    for n in (0, 1):
        mirrored.fighters[n][:] = fight.fighters[1 - n]
        mirrored.fighters[n][rules.X] = rules.STAGE - mirrored.fighters[n][rules.X]
        mirrored.fighters[n][rules.BOLT_X] = rules.STAGE - mirrored.fighters[n][rules.BOLT_X]
    assert good_moves(FightView(mirrored, 1)) == found


def test_sixteen_answers_and_the_papers_names():
    assert len(ANSWERS) == 16
    assert [len(PLANS[name]) for name in ANSWERS] == [17, 17, 7, 7, 2, 11] + [2] * 10
    assert all(plan[-1] == 0 for plan in PLANS.values())
    for name in (*ANSWERS, *ALIASES):
        assert named_move(f" - {name.title()}\n") in PLANS
    assert [named_move(name) for name in ("Lower Kick", "Med Punch", "lower punch")] == ["short", "strong", "jab"]
    assert [named_move(text) for text in ("", "punch", "jab jab", "LP+LK")] == [None] * 4


def test_each_player_is_told_its_own_side_of_things():
    fight = state(120, own={"HEALTH": 700}, MODE=rules.ATTACKING, TIME=10, MOVE=1, HEALTH=900)
    first, second = (fight_question(fight, side, ("close", "strong")).state for side in (0, 1))
    assert first.startswith("The opponent is on your right, 120 px away: far.\nOpponent: recovering strong, guard high")
    assert second.startswith("The opponent is on your left, 120 px away: far.\nOpponent: standing")
    assert "You are behind by 200 health." in first
    assert "You lead by 200 health." in second
    assert "last move strong.\nYou:" in first
    assert "last move close.\nYou:" in second
    assert "bolt is 30 px" in fight_question(state(96, bolt=30), 0).state
    assert "bolt" not in fight_question(state(96, bolt=30), 1).state
    assert "stunned for 9 more frames" in fight_question(state(96, TIME=9, **STUNNED), 0).state


def test_the_rules_come_first_and_never_change():
    questions = [fight_question(fight, side, seed=n) for n, fight in enumerate((Fight(), state(50))) for side in (0, 1)]
    assert {question.rules for question in questions} == {RULES}
    assert all(f"- {name}: " in RULES for name in ANSWERS)
    assert RULES.count("Your move: ") == 3
    assert all(question.state.endswith("\nYour move:") for question in questions)
    # the examples are states in the words of the states, each with an answer
    for example in RULES.split("\n\n")[1:]:
        assert example.splitlines()[0].startswith("The opponent is on your right, ")
        assert named_move(example.rpartition(": ")[2]) in ANSWERS


def test_frames_of_seconds():
    assert [frames_of(n / 60) for n in range(600)] == list(range(600))
    assert frames_of(0.2001) == 13
    for seconds in (-0.1, float("nan"), float("inf")):
        with pytest.raises(DataError, match="seconds"):
            frames_of(seconds)


def test_what_is_refused():
    with pytest.raises(ConfigError, match="quality: must be in"):
        ScriptedFighter(1.1)
    with pytest.raises(ConfigError, match="seconds"):
        ScriptedFighter(1.0, -1)
    with pytest.raises(ConfigError, match="hold"):
        Harness(hold="jump")
    with pytest.raises(ConfigError, match="seed"):
        play_fight((Says("wait"), Says("wait")), -1)


def test_an_early_bell_ends_the_fight_and_is_told():
    record = play_fight((Says("jab", "wait"), Says("wait")), 0, bell=90)
    assert (record.frames, record.bell, record.winner) == (90, 90, None)
    *_, last = replay(record.inputs, record.bell)
    assert last.over
    assert last.seen_by(0)[0] == 0
    assert last.copy().over
    agent = Says("wait")
    play_fight((agent, Says("wait")), 0, bell=90)
    assert "after 1.5 seconds whoever has more" in agent.asked[0].rules
    assert "after 99 seconds whoever has more" in RULES
    with pytest.raises(ConfigError, match="bell"):
        play_fight((agent, agent), 0, bell=0)
