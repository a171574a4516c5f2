"""One fight: two fighters, a frame at a time, the same on every machine."""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence

from tenfold.arena.fighting.rules import (
    FIELDS,
    FRAMES,
    HEALTH,
    MODE,
    RETREATING,
    STARTS,
    mirror,
    run_frame,
    start,
)
from tenfold.errors import ConfigError


class Fight:
    """The state of a fight. Nothing in it is drawn by chance.

    ``fighters`` holds the two vectors of `rules.FIELDS`, player 0 first, who starts on the left; ``frame`` counts the
    frames that are over.

    Args:
        bell: frames after which it ends at the latest.

    Raises:
        ConfigError: a bell before the first frame.

    >>> from tenfold.arena.fighting.rules import X
    >>> fight = Fight()
    >>> for _ in range(16):
    ...     fight.step(1, 0)
    >>> fight.fighters[0][X] // 256, fight.frame, fight.over
    (192, 16, False)
    """

    __slots__ = ("bell", "fighters", "frame")

    def __init__(self, bell: int = FRAMES) -> None:
        if bell < 1:
            raise ConfigError(f"bell: must be 1 or more, got {bell}", remedy="give a number of frames, 60 a second")
        self.bell = bell
        self.frame = 0
        self.fighters = (start(STARTS[0], 1), start(STARTS[1], -1))

    def step(self, pressed_0: int, pressed_1: int) -> None:
        """One frame of 1/60 s.

        Args:
            pressed_0: what player 0 presses, a place in `moves.INPUTS`.
            pressed_1: what player 1 presses.
        """
        self.frame += 1
        run_frame(*self.fighters, pressed_0, pressed_1)

    @property
    def over(self) -> bool:
        """Somebody is out of health, or the bell has rung."""
        return self.frame >= self.bell or self.knocked_out

    @property
    def knocked_out(self) -> bool:
        """Somebody is out of health."""
        first, second = self.fighters
        return first[HEALTH] == 0 or second[HEALTH] == 0

    @property
    def leader(self) -> int | None:
        """Who has more health, and so has won where the fight is over; None where they have the same."""
        first, second = self.fighters[0][HEALTH], self.fighters[1][HEALTH]
        return None if first == second else int(second > first)

    def is_free(self, side: int) -> bool:
        """Whether this player's next input moves it."""
        return self.fighters[side][MODE] <= RETREATING

    def seen_by(self, side: int) -> list[int]:
        """Frames left, then the own vector and the other's: what a player sees.

        Mirrored for player 1, so that both see the game from the left.

        >>> Fight().seen_by(0) == Fight().seen_by(1)
        True
        """
        own, other = self.fighters[side][:], self.fighters[1 - side][:]
        if side == 1:
            mirror(own)
            mirror(other)
        return [self.bell - self.frame, *own, *other]

    def state_hash(self) -> str:
        """Of everything in it: two fights with the same hash go on alike."""
        return vector_hash(self.seen_by(0))

    def copy(self) -> Fight:
        """The same, on its own from here."""
        other = Fight(self.bell)
        other.frame = self.frame
        other.fighters = (self.fighters[0][:], self.fighters[1][:])
        return other


OBSERVED = 1 + 2 * len(FIELDS)
"""How many integers `Fight.seen_by` gives."""


def vector_hash(values: Sequence[int]) -> str:
    """16 hexadecimal digits of some integers of 32 bits, the same whatever the machine's byte order."""
    numbers = array("i", values)
    if sys.byteorder == "big":
        numbers.byteswap()
    return hashlib.blake2b(numbers.tobytes(), digest_size=8).hexdigest()
