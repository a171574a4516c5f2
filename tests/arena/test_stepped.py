"""Environments that go on step by step, played by agents that take time."""

import random

import pytest

from tenfold.arena.agents import Action
from tenfold.arena.conformance import check_game
from tenfold.arena.fighting.fight import Fight
from tenfold.arena.fighting.moves import NEUTRAL
from tenfold.arena.fighting.plans import PLANS
from tenfold.arena.fighting.play import play_fight
from tenfold.arena.probes import ConformanceError
from tenfold.arena.stepped import SteppedGame


class Says:
    """Some answers one after the other, again and again, and what was asked when."""

    def __init__(self, seconds, *texts):
        self.name, self.seconds, self.texts, self.asked = "says", seconds, texts, []

    def answer(self, questions):
        found = []
        for question in questions:
            text = self.texts[len(self.asked) % len(self.texts)]
            self.asked.append(question)
            found.append(Action(text, text if text in question.answers else None, self.seconds))
        return found


class Hill:
    """A step up or down a hill, 20 times; it is drawn how high a step is. Notes all actions."""

    luck = None  # the seed's

    def __init__(self, steps=20):
        self.steps = steps

    def reset(self, seed=None, options=None):
        self.draw = self.luck or random.Random(seed)
        self.agents, self.actions, self.height = ["left", "right"], [], {"left": [0], "right": [0]}
        return self.height, self.infos()

    def infos(self):
        return {name: {"text": f"You are {self.height[name][0]} up."} for name in self.height}

    def step(self, actions):
        self.actions.append((actions["left"], actions["right"]))
        for name in self.agents:
            self.height[name][0] += actions[name] * self.draw.randint(1, 9)
        if len(self.actions) == self.steps:
            self.agents = []
        return self.height, {name: float(actions[name]) for name in actions}, {}, {}, self.infos()


MOVES = {"up": [1], "down": [-1], "leap": [0, 1, 2]}


def on_the_hill(rate=10.0, **keys):
    hill = Hill(**keys)
    return hill, SteppedGame(lambda: hill, "Climb.", MOVES, idle=0, rate=rate)


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, 0), (0.1, 1), (0.1001, 2), (0.25, 3), (0.3, 3)])
def test_while_an_agent_thinks_its_player_idles_for_so_many_steps(seconds, steps):
    hill, game = on_the_hill()
    slow, quick = Says(seconds, "leap"), Says(0.0, "up")
    played = game((slow, quick), seed=4)
    cycle = [0] * steps + MOVES["leap"]
    assert [left for left, _ in hill.actions] == (cycle * 20)[:20]
    assert {right for _, right in hill.actions} == {1}
    assert [question.time for question in slow.asked] == pytest.approx([n / 10 for n in range(0, 20, len(cycle))])
    assert played.facts == {"steps": 20.0, "first invalid": 0.0, "second invalid": 0.0}


def test_who_has_more_reward_has_won_and_invalid_answers_are_idle_steps():
    hill, game = on_the_hill()
    assert [game((Says(0, one), Says(0, other)), 0).score for one, other in ("ud", "du", "uu")] == [0.5] * 3
    words = {"u": "up", "d": "down"}
    found = [game((Says(0, words[one]), Says(0, words[other])), 0).score for one, other in ("ud", "du", "uu")]
    assert found == [1.0, 0.0, 0.5]
    played = game((Says(0, "up", "sideways"), Says(0.1, "dance")), 0)
    assert [left for left, _ in hill.actions] == [1, 0] * 10
    assert {right for _, right in hill.actions} == {0}
    assert (played.facts["first invalid"], played.facts["second invalid"]) == (10, 10)
    assert not played.rated
    assert game((Says(0, "up", "sideways"), Says(0.1, "down")), 0).rated


def test_what_was_shown_stays_as_it_was():
    _, game = on_the_hill()
    agent = Says(0.0, "up")
    game((agent, Says(0.0, "up")), 1)
    heights = [question.view[0] for question in agent.asked]
    assert heights == sorted(set(heights))
    assert [question.state for question in agent.asked] == [f"You are {height} up." for height in heights]
    assert len({question.seed for question in agent.asked}) == 20


def test_an_environment_in_steps_conforms_if_it_keeps_to_its_seed():
    assert "latency" in check_game(on_the_hill()[1], symmetric="exactly")

    class Free(Hill):
        luck = random.Random(2)

    with pytest.raises(ConformanceError, match=r"^repeats: seed 0, player"):
        check_game(SteppedGame(Free, "Climb.", MOVES, idle=0, rate=10))


class TestPettingZoo:
    """Our own fight as an environment."""

    @pytest.fixture
    def game(self):
        pytest.importorskip("pettingzoo")
        from tenfold.arena.fighting.parallel import FightingParallelEnv

        class Short(FightingParallelEnv):
            def reset(self, seed=None, options=None):
                found = super().reset(seed, options)
                self.fight = Fight(300)
                return found

        return SteppedGame(Short, "Fight!", PLANS, NEUTRAL, rate=60)

    def test_it_conforms(self, game):
        assert "sides" in check_game(game, symmetric="exactly", seeds=(0, 1))

    def test_who_walks_and_waits_is_asked_when_the_fight_itself_asks(self, game):
        """While nobody is hit or attacks, a move is over when its inputs are."""
        texts = ("close", "wait", "away", "low guard", "dance")
        stepped, own = (
            (Says(0.11, *texts), Says(7 / 60, *texts[::-1])),
            (Says(0.11, *texts), Says(7 / 60, *texts[::-1])),
        )
        game(stepped, 3)
        play_fight(own, 3, bell=300)
        for one, other in zip(stepped, own, strict=True):
            assert [question.time for question in one.asked] == [question.time for question in other.asked]
            assert len(one.asked) > 10
