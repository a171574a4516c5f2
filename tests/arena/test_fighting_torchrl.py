"""The fights as TorchRL's environment."""

import numpy as np
import pytest

pytest.importorskip("torchrl")

import torch
from torchrl.envs.utils import check_env_specs

from tenfold.arena.fighting.fight import Fight
from tenfold.arena.fighting.moves import INPUTS
from tenfold.arena.fighting.rules import FRAMES
from tenfold.arena.fighting.torchrl_env import FightingTorchEnv
from tenfold.errors import ConfigError


def test_torchrls_own_check():
    check_env_specs(FightingTorchEnv(3), seed=0)


def test_a_rollout_is_the_single_fights():
    games = 3
    env = FightingTorchEnv(games)
    actions = torch.from_numpy(np.random.default_rng(0).integers(len(INPUTS), size=(200, games, 2)))
    frame = iter(actions)

    def policy(data):
        data["players", "action"] = next(frame)
        return data

    found = env.rollout(200, policy, break_when_any_done=False)
    fights = [Fight() for _ in range(games)]
    for n in range(200):
        for game, fight in enumerate(fights):
            assert found["players", "observation"][game, n].tolist() == [fight.seen_by(0), fight.seen_by(1)]
            fight.step(*actions[n, game].tolist())
    reward = found["next", "players", "reward"]
    assert reward.shape == (games, 200, 2, 1)
    assert reward.any()
    assert not reward.sum(dim=2).any()


def test_the_bell_truncates_and_the_fight_begins_anew():
    env = FightingTorchEnv(2)
    state = env.rand_action(env.reset())
    env.batch.frames[1] = FRAMES - 1
    state["players", "action"].zero_()
    stepped, following = env.step_and_maybe_reset(state)
    assert stepped["next", "truncated"].flatten().tolist() == [False, True]
    assert not stepped["next", "terminated"].any()
    assert following["players", "observation"][1].tolist() == [Fight().seen_by(0)] * 2
    assert following["players", "observation"][0, 0, 0] == FRAMES - 1


def test_a_shorter_bell():
    found = FightingTorchEnv(2, bell=50).rollout(120, break_when_any_done=False)
    assert found["next", "truncated"][0].flatten().nonzero().flatten().tolist() == [49, 99]
    assert found["players", "observation"][0, :, 0, 0].tolist() == [50 - n % 50 for n in range(120)]


def test_what_is_refused():
    with pytest.raises(ConfigError, match="bell"):
        FightingTorchEnv(2, bell=0)
    with pytest.raises(ConfigError, match="games"):
        FightingTorchEnv(0)
