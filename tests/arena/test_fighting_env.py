"""The fight as PettingZoo's environment, and as pictures."""

import numpy as np
import pytest

pytest.importorskip("pettingzoo")

from pettingzoo.test import parallel_api_test, parallel_seed_test

from tenfold.arena.fighting.fight import Fight
from tenfold.arena.fighting.moves import INPUTS
from tenfold.arena.fighting.parallel import FightingParallelEnv
from tenfold.arena.fighting.rules import FRAMES
from tenfold.errors import ConfigError


def keys(first, second):
    return {"p0": INPUTS.index(first), "p1": INPUTS.index(second)}


def test_21_pettingzoos_own_tests():
    parallel_api_test(FightingParallelEnv(), num_cycles=1000)
    parallel_seed_test(FightingParallelEnv)


def test_the_same_seed_gives_the_same_hash_at_every_frame():
    one, two = FightingParallelEnv(), FightingParallelEnv()
    for env in (one, two):
        env.reset(seed=7)
        for player in env.agents:
            env.action_space(player).seed(3)
    while one.agents:
        for env in (one, two):
            env.step({player: env.action_space(player).sample() for player in env.agents})
        assert one.state_hash() == two.state_hash()


def test_a_knock_out_terminates_and_pays():
    env = FightingParallelEnv()
    observations, infos = env.reset()
    assert observations["p0"].dtype == np.int32
    assert infos["p1"]["text"].startswith("The opponent is on your left, 96 px away: near.")
    for _ in range(18):
        env.step(keys("forward", "neutral"))
    total = {"p0": 0.0, "p1": 0.0}
    frames = 0
    while env.agents:  # one throws the other again and again
        _, rewards, terminated, truncated, infos = env.step(keys(("throw", "forward")[frames % 3 == 0], "neutral"))
        frames += 1
        assert rewards["p0"] == -rewards["p1"]
        total = {player: total[player] + rewards[player] for player in total}
        assert set(truncated.values()) == {False}
    assert terminated == {"p0": True, "p1": True}
    assert total["p0"] == pytest.approx(2.0)
    assert "last move throw" in infos["p1"]["text"]


def test_the_bell_truncates():
    env = FightingParallelEnv()
    env.reset()
    for n in range(FRAMES):
        _, rewards, terminated, truncated, _ = env.step(keys("neutral", "neutral"))
        assert truncated["p0"] == truncated["p1"] == (n == FRAMES - 1)
    assert not any(terminated.values())
    assert not any(rewards.values())
    assert env.agents == []


def test_a_bell_of_ones_own():
    """It truncates there, in every fight, and what is seen counts down to it."""
    env = FightingParallelEnv(bell=90)
    for _ in range(2):
        seen, _ = env.reset()
        assert seen["p0"][0] == 90
        for n in range(90):
            seen, _, _, truncated, _ = env.step(keys("neutral", "neutral"))
            assert truncated["p0"] == (n == 89)
        assert env.agents == []
        assert seen["p1"][0] == 0
    with pytest.raises(ConfigError, match="bell"):
        FightingParallelEnv(bell=0)


def test_pictures():
    env = FightingParallelEnv(render_mode="ansi")
    env.reset()
    before = env.render().splitlines()
    for _ in range(6):
        env.step(keys("strong", "jump back"))
    after = env.render().splitlines()
    env.step(keys("neutral", "neutral"))
    hitting = env.render()
    assert len(before) == len(after)
    assert before[0].startswith("1000 ####################")
    assert max(map(len, after)) == 64
    assert "=====" in hitting.splitlines()[7]  # the arm, only while it hits
    assert "==" not in after[7]
    env = FightingParallelEnv(render_mode="rgb_array")
    env.reset()
    image = env.render()
    assert (image.shape, image.dtype) == ((128, 384, 3), np.uint8)
    env.step(keys("forward", "neutral"))
    assert (env.render() != image).any()
    assert FightingParallelEnv().render() is None
    with pytest.raises(ConfigError, match="render_mode"):
        FightingParallelEnv(render_mode="human")


def test_pictures_of_all_that_happens():
    """Nothing that a fight comes to cannot be drawn."""
    env, text = FightingParallelEnv(render_mode="rgb_array"), FightingParallelEnv(render_mode="ansi")
    draw = np.random.default_rng(1)
    env.reset()
    text.fight = env.fight
    while env.agents and env.fight.frame < 2500:
        if env.fight.frame % 5 == 0:
            first, second = (int(key) for key in draw.integers(len(INPUTS), size=2))
        env.step({"p0": first, "p1": second})
        env.render()
        lines = text.render().splitlines()
        assert len(lines) == 11
        assert all(len(line) <= 65 for line in lines)
    assert env.fight.seen_by(0) != Fight().seen_by(0)
