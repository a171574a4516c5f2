"""Many fights at once, for policies that are trained: the rules of `rules`, compiled by numba.

Source: the specification of the latency arena, 7.3 and 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tenfold.arena.fighting import rules
from tenfold.arena.fighting.fight import OBSERVED, vector_hash
from tenfold.arena.fighting.moves import INPUTS
from tenfold.arena.fighting.rules import FIELDS, FRAMES, FULL, HEALTH, STARTS, start
from tenfold.errors import DataError, MissingDependencyError

try:
    import numba
    from numba.extending import register_jitable
except ImportError:
    raise MissingDependencyError("batches of fights need numba", 'pip install "tenfold[cpu]"') from None

for _rule in (
    rules.mirror,
    rules.run_frame,
    rules.press,
    rules.pass_time,
    rules.release,
    rules.stay_on_stage,
    rules.push_apart,
    rules.detect_and_apply,
    rules.strike,
    rules.fly,
    rules.is_safe,
    rules.guarded,
    rules.touch,
):
    register_jitable(_rule)  # plain Python to everybody else

_WIDTH, _INPUTS = len(FIELDS), len(INPUTS)
_FIGHTER = np.dtype([(name, np.int32) for name in FIELDS])
"""A fighter as a structure, which compiled rules read twice as fast as a row of an array."""
_OPENING = np.array([start(STARTS[0], 1), start(STARTS[1], -1)], np.int32).view(_FIGHTER)[:, 0]

Numbers = NDArray[np.int32]


class Stepped(NamedTuple):
    """What a frame of N fights gives.

    Args:
        observations: int32 ``[N, 2, OBSERVED]``, `Fight.seen_by` of each player; of the next fight where one is over.
        rewards: float32 ``[N, 2]``: the change of own minus other's health / 1000, and 1 for winning, -1 for losing.
        knocked_out: bool ``[N]``: over, for somebody is out of health.
        timed_out: bool ``[N]``: over by the bell.
    """

    observations: Numbers
    rewards: NDArray[np.float32]
    knocked_out: NDArray[np.bool_]
    timed_out: NDArray[np.bool_]


class FightBatch:
    """N fights side by side; one that is over begins anew in the same step.

    The arrays that come back are written again by the next call: copy what is to be kept.

    Args:
        automatic_reset: off, fights that are over stay as they are until `restart`, and give no reward.

    >>> batch = FightBatch()
    >>> batch.reset(range(8)).shape
    (8, 2, 29)
    >>> batch.step(np.ones((8, 2), np.int32)).rewards.sum()  # doctest: +SKIP
    0.0
    """

    def __init__(self, automatic_reset: bool = True) -> None:
        self.automatic_reset = automatic_reset
        self._begin(0)

    def reset(self, seeds: Sequence[int] | NDArray[Any]) -> Numbers:
        """Begin as many fights as there are seeds, and return the observations.

        A fight draws nothing by chance: the seeds say how many there are and no more.
        """
        self._begin(len(seeds))
        return self._seen.numbers

    def restart(self, which: NDArray[np.bool_]) -> Numbers:
        """Begin some of the fights anew, bool ``[N]``, and return the observations of all.

        Raises:
            DataError: another shape.
        """
        if which.shape != self.frames.shape:
            raise DataError(f"which: shape {which.shape} for {len(self.frames)} fights", remedy="give one for each")
        self.fighters[which] = _OPENING
        self.frames[which] = 0
        _see_all(self.fighters, self.frames, self._seen.parts)
        return self._seen.numbers

    def _begin(self, games: int) -> None:
        self.fighters = np.tile(_OPENING, (games, 1))
        self.frames: Numbers = np.zeros(games, np.int32)
        self._seen, self._final = _Seen(games), _Seen(games)
        self._rewards = np.zeros((games, 2), np.float32)
        self._ends = np.zeros(games, np.bool_), np.zeros(games, np.bool_)
        _see_all(self.fighters, self.frames, self._seen.parts)

    @property
    def final(self) -> Numbers:
        """What the players saw last of each fight that is over, ``[N, 2, OBSERVED]``."""
        return self._final.numbers

    def step(self, actions: NDArray[Any]) -> Stepped:
        """One frame of each.

        Args:
            actions: integers ``[N, 2]``, what each player presses, places in `moves.INPUTS`.

        Raises:
            DataError: another shape, no integers, or an input that there is not; nothing has been done then.
        """
        if actions.dtype.kind not in "iu":
            raise DataError(f"actions: numbers of type {actions.dtype}", remedy="give integers")
        actions = np.ascontiguousarray(actions, np.int32)
        if actions.shape != (len(self.frames), 2):
            raise DataError(
                f"actions: shape {actions.shape} for {len(self.frames)} fights", remedy="give two inputs for each fight"
            )
        done = _frame_of_all(
            self.fighters,
            self.frames,
            _OPENING,
            actions,
            self._seen.parts,
            self._rewards,
            *self._ends,
            self._final.parts,
            self.automatic_reset,
        )
        if not done:
            raise DataError(
                f"actions: from {actions.min()} to {actions.max()}", remedy=f"give inputs from 0 to {_INPUTS - 1}"
            )
        return Stepped(self._seen.numbers, self._rewards, *self._ends)

    def hashes(self) -> list[str]:
        """`Fight.state_hash` of each."""
        return [vector_hash(row.tolist()) for row in self._seen.numbers[:, 0]]


class _Seen:
    """Observations, and the parts of them as structures."""

    def __init__(self, games: int) -> None:
        self.numbers: Numbers = np.zeros((games, 2, OBSERVED), np.int32)
        self.parts = (
            self.numbers[:, :, 0],
            self.numbers[:, :, 1 : 1 + _WIDTH].view(_FIGHTER)[..., 0],
            self.numbers[:, :, 1 + _WIDTH :].view(_FIGHTER)[..., 0],
        )


@numba.njit
def _see(fighters, frames, n, left, own, other):  # type: ignore[no-untyped-def]  # numba reads the types
    """`Fight.seen_by` of both players of fight ``n``."""
    left[n, 0] = left[n, 1] = FRAMES - frames[n]
    own[n, 0] = other[n, 1] = fighters[n, 0]
    own[n, 1] = other[n, 0] = fighters[n, 1]
    rules.mirror(own[n, 1])
    rules.mirror(other[n, 1])


@numba.njit
def _see_all(fighters, frames, seen):  # type: ignore[no-untyped-def]
    left, own, other = seen
    for n in range(len(frames)):
        _see(fighters, frames, n, left, own, other)


@numba.njit
def _frame_of_all(fighters, frames, opening, actions, seen, rewards, knocked_out, timed_out, final, again):  # type: ignore[no-untyped-def]
    """Whether all of the actions exist; else nothing has been done."""
    for n in range(len(frames)):
        if not (0 <= actions[n, 0] < _INPUTS and 0 <= actions[n, 1] < _INPUTS):
            return False
    left, own, other = final
    for n in range(len(frames)):
        a, b = fighters[n, 0], fighters[n, 1]
        if not again and (frames[n] >= FRAMES or a[HEALTH] == 0 or b[HEALTH] == 0):
            rewards[n, 0] = rewards[n, 1] = 0
            continue
        before = a[HEALTH] - b[HEALTH]
        rules.run_frame(a, b, actions[n, 0], actions[n, 1])
        frames[n] += 1
        lead = a[HEALTH] - b[HEALTH]
        reward = (lead - before) / FULL
        knocked_out[n] = a[HEALTH] == 0 or b[HEALTH] == 0
        timed_out[n] = not knocked_out[n] and frames[n] >= FRAMES
        if knocked_out[n] or timed_out[n]:
            reward += np.sign(lead)
            if again:
                _see(fighters, frames, n, left, own, other)
                fighters[n, 0] = opening[0]
                fighters[n, 1] = opening[1]
                frames[n] = 0
        rewards[n, 0], rewards[n, 1] = reward, -reward
    _see_all(fighters, frames, seen)
    return True
