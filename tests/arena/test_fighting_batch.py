"""Many fights at once are the same fights."""

import builtins
import importlib
import sys

import numpy as np
import pytest

pytest.importorskip("numba")

from tenfold.arena.fighting.batch import FightBatch
from tenfold.arena.fighting.fight import OBSERVED, Fight
from tenfold.arena.fighting.moves import INPUTS, MOVES
from tenfold.arena.fighting.rules import (
    ARC,
    ATTACKING,
    BOLT_WAY,
    BOLT_X,
    FACING,
    FRAMES,
    FULL,
    GUARD,
    HEALTH,
    HEIGHT,
    IN_AIR,
    JUMPING,
    LYING,
    MODE,
    MOVE,
    RETREATING,
    STAGE,
    STAMINA,
    TAKE_OFF,
    TIME,
    TOUCHED,
    WALL,
    WAY,
    X,
)  # fmt: skip
from tenfold.errors import ConfigError, DataError, MissingDependencyError


def held(draw, frames, games):
    """Inputs at random, held for one to twelve frames."""
    keys = draw.integers(len(INPUTS), size=(frames, games, 2))
    return keys[np.maximum.accumulate(np.where(draw.random(frames) < 0.3, np.arange(frames), 0))].astype(np.int32)


def lead(fight):
    return fight.fighters[0][HEALTH] - fight.fighters[1][HEALTH]


def ends_beside_single_fights(actions, bell):
    """How many fights ended, and how many by the bell, where each is seen to be equal to a `Fight` in every frame."""
    games = actions.shape[1]
    batch, fights = FightBatch(bell=bell), [Fight(bell) for _ in range(games)]
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
            fights[n] = Fight(bell)
        assert batch.hashes() == [fight.state_hash() for fight in fights]
        assert stepped.observations[:, 1].tolist() == [fight.seen_by(1) for fight in fights]
    return ended, timed


def test_equal_to_single_fights_over_thousands_of_frames():
    actions = held(np.random.default_rng(0), frames=6000, games=3)
    actions[:, 2] = 0  # to the bell
    ended, timed = ends_beside_single_fights(actions, FRAMES)
    assert ended >= 4
    assert timed == 1


def test_equal_to_single_fights_with_a_shorter_bell():
    ended, timed = ends_beside_single_fights(held(np.random.default_rng(1), frames=1000, games=4), bell=300)
    assert ended == timed == 12


def test_from_any_state_a_frame_is_the_single_fights():
    """More than what inputs lead to soon: walls, bolts in flight, empty stamina, last health."""
    games, draw = 4000, np.random.default_rng(2)
    batch, fights = FightBatch(automatic_reset=False), [Fight() for _ in range(games)]
    batch.reset(range(games))
    for n, fight in enumerate(fights):
        for fighter in fight.fighters:
            any_fighter(draw, fighter)
        batch.fighters[n] = fight.fighters
    pressed = draw.integers(len(INPUTS), size=(games, 2))
    for _ in range(3):
        batch.step(pressed)
        for fight, (first, second) in zip(fights, pressed.tolist(), strict=True):
            if not fight.over:
                fight.step(first, second)
        assert batch.hashes() == [fight.state_hash() for fight in fights]


def any_fighter(draw, fighter):
    mode = int(draw.integers(LYING + 1))
    fighter[X], fighter[HEALTH] = int(draw.integers(WALL, STAGE - WALL + 1)), int(draw.integers(1, 130))
    fighter[MODE], fighter[FACING], fighter[GUARD] = mode, int(draw.choice((-1, 1))), int(draw.integers(2))
    fighter[STAMINA] = int(draw.integers(-50, 400))
    fighter[TIME] = int(draw.integers(1, 40)) if mode > RETREATING else 0
    if mode == ATTACKING:
        fighter[MOVE], fighter[TOUCHED] = int(draw.integers(len(MOVES))), int(draw.integers(3))
    if mode == JUMPING:
        fighter[WAY] = int(draw.choice((-1, 1)))
        fighter[HEIGHT] = ARC[min(max(fighter[TIME] - TAKE_OFF, 0), IN_AIR)]
    if draw.random() < 0.3:
        fighter[BOLT_WAY], fighter[BOLT_X] = int(draw.choice((-1, 1))), int(draw.integers(STAGE))


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
    with pytest.raises(ConfigError, match="bell: must be 1 or more, got 0"):
        FightBatch(bell=0)


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
