"""Many fights at once, for policies that are trained: the rules of `rules`, compiled by numba.

Source: the specification of the latency arena, 7.3 and 8.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tenfold.arena.fighting import moves, rules
from tenfold.arena.fighting.fight import OBSERVED, Fight, vector_hash
from tenfold.arena.fighting.moves import INPUTS
from tenfold.arena.fighting.rules import FIELDS, FRAMES, FULL, HEALTH, STARTS, start
from tenfold.errors import DataError, MissingDependencyError

try:
    import numba
except ImportError:
    raise MissingDependencyError("batches of fights need numba", 'pip install "tenfold[cpu]"') from None

_INPUTS = len(INPUTS)
_FIGHTER = np.dtype([(name, np.int32) for name in FIELDS])
_SEEN = np.dtype([("left", np.int32), ("own", _FIGHTER), ("other", _FIGHTER)])
"""Structures, which compiled rules read faster than rows of an array."""
_OPENING = np.array([start(STARTS[0], 1), start(STARTS[1], -1)], np.int32)


def _compile_rules() -> dict[str, Any]:
    """The rules, each a part of its callers, with arrays for their tables: out of a tuple numba reads by a jump."""
    names = dict(vars(rules))
    for name, value in vars(rules).items():
        if isinstance(value, FunctionType):
            names[name] = numba.njit(FunctionType(value.__code__, names), forceinline=True)
        elif isinstance(value, tuple) and name != "FIELDS":
            names[name] = np.array(value, np.int32)
    return names


_RULES = _compile_rules()
_mirror, _run_frame = _RULES["mirror"], _RULES["run_frame"]

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

    ``fighters`` is int32 ``[N, 2, fields]``, the vectors of `rules.FIELDS`; ``frames`` int32 ``[N]``, the frames that
    are over; ``final`` int32 ``[N, 2, OBSERVED]``, what the players saw last of each fight that is over. The first
    batch of an installation compiles the rules, in some seconds.

    Args:
        automatic_reset: off, fights that are over stay as they are until `restart`, and give no reward.
        bell: frames after which a fight ends at the latest.

    Raises:
        ConfigError: a bell before the first frame.

    >>> batch = FightBatch()
    >>> batch.reset(range(8)).shape
    (8, 2, 29)
    >>> batch.step(np.ones((8, 2), np.int32)).rewards.sum()  # doctest: +SKIP
    0.0
    """

    def __init__(self, automatic_reset: bool = True, bell: int = FRAMES) -> None:
        self.automatic_reset, self.bell = automatic_reset, Fight(bell).bell
        self._begin(0)

    def reset(self, seeds: Sequence[int] | NDArray[Any]) -> Numbers:
        """Begin as many fights as there are seeds, and return the observations.

        A fight draws nothing by chance: the seeds say how many there are and no more.
        """
        self._begin(len(seeds))
        return self._seen

    def restart(self, which: NDArray[np.bool_]) -> Numbers:
        """Begin some of the fights anew, bool ``[N]``, and return the observations of all.

        Raises:
            DataError: another shape.
        """
        if which.shape != self.frames.shape:
            raise DataError(f"which: shape {which.shape} for {len(self.frames)} fights", remedy="give one for each")
        self.fighters[which] = _OPENING
        self.frames[which] = 0
        _see_all(self.fighters, self.frames, self.bell, self._seen)
        return self._seen

    def _begin(self, games: int) -> None:
        self.fighters: Numbers = np.tile(_OPENING, (games, 1, 1))
        self.frames: Numbers = np.zeros(games, np.int32)
        self.final: Numbers = np.zeros((games, 2, OBSERVED), np.int32)
        self._seen: Numbers = np.zeros((games, 2, OBSERVED), np.int32)
        self._rewards = np.zeros((games, 2), np.float32)
        self._ends = np.zeros(games, np.bool_), np.zeros(games, np.bool_)
        _see_all(self.fighters, self.frames, self.bell, self._seen)

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
        done = _run_all(
            self.fighters,
            self.frames,
            self.bell,
            self.automatic_reset,
            actions,
            self._seen,
            self._rewards,
            *self._ends,
            self.final,
        )
        if not done:
            raise DataError(
                f"actions: from {actions.min()} to {actions.max()}", remedy=f"give inputs from 0 to {_INPUTS - 1}"
            )
        return Stepped(self._seen, self._rewards, *self._ends)

    def hashes(self) -> list[str]:
        """`Fight.state_hash` of each."""
        return [vector_hash(row.tolist()) for row in self._seen[:, 0]]


@numba.njit(forceinline=True)
def _see(a, b, left, first, second):  # type: ignore[no-untyped-def]  # numba reads the types
    """`Fight.seen_by` of both players."""
    first.left = second.left = left
    first.own, first.other = a, b
    second.own, second.other = b, a
    _mirror(second.own)
    _mirror(second.other)


def _compile_loops(edition: str) -> tuple[Any, Any]:
    """The loops over all fights, which numba keeps on the disk.

    It compiles anew when this file has changed, or what a function holds from outside, such as ``edition``.
    """

    @numba.njit(cache=True, nogil=True)
    def see_all(fighters, frames, bell, seen):  # type: ignore[no-untyped-def]
        _ = edition
        pairs, views = fighters.view(_FIGHTER), seen.view(_SEEN)
        for n in range(len(frames)):
            _see(pairs[n, 0, 0], pairs[n, 1, 0], bell - frames[n], views[n, 0, 0], views[n, 1, 0])

    @numba.njit(cache=True, nogil=True)
    def run_all(  # type: ignore[no-untyped-def]
        fighters, frames, bell, again, actions, seen, rewards, knocked_out, timed_out, final
    ):
        """Whether all of the actions exist; else nothing has been done."""
        _ = edition
        for n in range(len(frames)):
            if not (0 <= actions[n, 0] < _INPUTS and 0 <= actions[n, 1] < _INPUTS):
                return False
        pairs, views, last = fighters.view(_FIGHTER), seen.view(_SEEN), final.view(_SEEN)
        opening = _OPENING.view(_FIGHTER)
        for n in range(len(frames)):
            a, b = pairs[n, 0, 0], pairs[n, 1, 0]
            reward = 0.0
            if again or (frames[n] < bell and a[HEALTH] > 0 and b[HEALTH] > 0):
                before = a[HEALTH] - b[HEALTH]
                _run_frame(a, b, actions[n, 0], actions[n, 1])
                frames[n] += 1
                lead = a[HEALTH] - b[HEALTH]
                reward = (lead - before) / FULL
                knocked_out[n] = a[HEALTH] == 0 or b[HEALTH] == 0
                timed_out[n] = not knocked_out[n] and frames[n] >= bell
                if knocked_out[n] or timed_out[n]:
                    reward += np.sign(lead)
                    if again:
                        _see(a, b, bell - frames[n], last[n, 0, 0], last[n, 1, 0])
                        pairs[n, 0, 0], pairs[n, 1, 0] = opening[0, 0], opening[1, 0]
                        frames[n] = 0
            rewards[n, 0], rewards[n, 1] = reward, -reward
            _see(a, b, bell - frames[n], views[n, 0, 0], views[n, 1, 0])
        return True

    return see_all, run_all


_see_all, _run_all = _compile_loops(
    hashlib.blake2b(b"".join(Path(str(file)).read_bytes() for file in (moves.__file__, rules.__file__))).hexdigest()
)
