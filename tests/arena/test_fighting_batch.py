"""Many fights at once are the same fights."""

import builtins
import importlib
import sys

import numpy as np
import pytest

pytest.importorskip("numba")

from tenfold.arena.fighting.batch import FightBatch
from tenfold.arena.fighting.fight import OBSERVED, Fight
from tenfold.arena.fighting.moves import INPUTS
from tenfold.arena.fighting.rules import FRAMES, FULL, HEALTH
from tenfold.errors import DataError, MissingDependencyError


def held(draw, frames, games):
    """Inputs at random, held for one to twelve frames."""
    keys = draw.integers(len(INPUTS), size=(frames, games, 2))
    return keys[np.maximum.accumulate(np.where(draw.random(frames) < 0.3, np.arange(frames), 0))].astype(np.int32)


def lead(fight):
    return fight.fighters[0][HEALTH] - fight.fighters[1][HEALTH]


def test_equal_to_single_fights_over_thousands_of_frames():
    games, frames = 3, 6000
    actions = held(np.random.default_rng(0), frames, games)
    actions[:, 2] = 0  # to the bell
    batch, fights = FightBatch(), [Fight() for _ in range(games)]
    seen = batch.reset(range(games))
    assert (seen.shape, seen.dtype) == ((games, 2, OBSERVED), np.int32)
    ended, timed = 0, 0
    for pressed in actions:
        before = np.array([lead(fight) for fight in fights])
        stepped = batch.step(pressed)
        for fight, (first, second) in zip(fights, pressed.tolist(), strict=True):
            fight.step(first, second)
        after = np.array([lead(fight) for fight in fights])
        over = np.array([fight.over for fight in fights])
        reward = ((after - before) / FULL + np.sign(after) * over).astype(np.float32)
        assert np.array_equal(stepped.rewards, np.stack([reward, -reward], axis=1))
        knocked_out = np.array([fight.knocked_out for fight in fights])
        assert np.array_equal(stepped.knocked_out, knocked_out)
        assert np.array_equal(stepped.timed_out, over & ~knocked_out)
        for n in np.flatnonzero(over):
            assert batch.final[n].tolist() == [fights[n].seen_by(0), fights[n].seen_by(1)]
            ended, timed = ended + 1, timed + stepped.timed_out[n]
            fights[n] = Fight()
        assert batch.hashes() == [fight.state_hash() for fight in fights]
        assert stepped.observations[:, 1].tolist() == [fight.seen_by(1) for fight in fights]
    assert ended >= 4
    assert timed == 1


def test_without_automatic_reset_a_fight_that_is_over_stays():
    batch = FightBatch(automatic_reset=False)
    batch.reset(range(2))
    batch.frames[1] = FRAMES - 1
    assert batch.step(np.zeros((2, 2), np.int32)).timed_out.tolist() == [False, True]
    before = batch.hashes()
    stepped = batch.step(np.ones((2, 2), np.int32))
    assert (before[0] != batch.hashes()[0], before[1] == batch.hashes()[1]) == (True, True)
    assert stepped.timed_out.tolist() == [False, True]
    assert not stepped.rewards.any()
    batch.restart(np.array([False, True]))
    assert batch.hashes()[1] == Fight().state_hash() != batch.hashes()[0]


def test_what_is_refused():
    batch = FightBatch()
    batch.reset(range(3))
    with pytest.raises(DataError, match=r"actions: shape \(2, 2\) for 3 fights"):
        batch.step(np.zeros((2, 2), np.int32))
    with pytest.raises(DataError, match="actions: from 0 to 17"):
        batch.step(np.array([[0, 0], [0, 17], [0, 0]]))
    with pytest.raises(DataError, match="actions: numbers of type float64"):
        batch.step(np.zeros((3, 2)))
    assert batch.hashes() == [Fight().state_hash()] * 3
    with pytest.raises(DataError, match="which"):
        batch.restart(np.array([True]))


def test_without_numba_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest):
        if name.startswith("numba"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    monkeypatch.delitem(sys.modules, "tenfold.arena.fighting.batch")
    with pytest.raises(MissingDependencyError, match="tenfold\\[cpu\\]"):
        importlib.import_module("tenfold.arena.fighting.batch")
