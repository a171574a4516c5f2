"""The ten attacks, and what can be pressed in a frame.

Source: the specification of the latency arena, 7.3. Lengths are frames of 1/60 s, distances pixels between centres.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Height = Literal["mid", "low", "over", "throw"]


@dataclass(frozen=True)
class Move:
    """One attack.

    Args:
        startup: frames before it can hit; the press is the first.
        active: frames after these in which it hits, once.
        recovery: frames after these; half as many more where it touched nobody, ten more where it was blocked.
        damage: health that a hit takes, of 1000; a twelfth where it is blocked.
        reach: pixels; below 0 for one that does not strike itself.
        hitstun: frames that who is hit cannot act; lying, where it knocks down.
        blockstun: the same for who blocks it.
        height: ``mid`` is blocked by both guards, ``over`` by the high one, ``low`` by the low one, ``throw`` by none.
        stamina: what it costs, of 1000.
        knocks_down: leaves who is hit lying.
        anti_air: hits those who are high in the air.
        hint: for people and models.
    """

    startup: int
    active: int
    recovery: int
    damage: int
    reach: int
    hitstun: int
    blockstun: int
    height: Height
    stamina: int
    knocks_down: bool = False
    anti_air: bool = False
    hint: str = ""


MOVES: dict[str, Move] = {
    "jab": Move(4, 2, 8, 30, 58, 14, 10, "mid", 60, hint="fastest and cheapest"),
    "strong": Move(6, 3, 13, 60, 72, 18, 12, "mid", 110, hint="quick punch"),
    "fierce": Move(9, 4, 22, 100, 84, 22, 14, "mid", 170, anti_air=True, hint="hard punch, hits jumpers"),
    "short": Move(6, 2, 11, 45, 62, 15, 9, "low", 90, hint="quick kick, only a low guard stops it"),
    "sweep": Move(10, 3, 26, 95, 90, 45, 12, "low", 190, knocks_down=True, hint="long low kick, knocks down"),
    "axe": Move(17, 3, 18, 95, 74, 24, 12, "over", 170, hint="slow overhead, only a high guard stops it"),
    "upper": Move(5, 8, 34, 130, 56, 50, 16, "mid", 260, True, True, hint="rising punch, hits jumpers, slow to end"),
    "spin": Move(12, 12, 20, 100, 60, 40, 14, "mid", 240, knocks_down=True, hint="moves forward while it hits"),
    "bolt": Move(13, 1, 29, 60, -1, 20, 12, "mid", 170, hint="flies across the stage, one at a time"),
    "throw": Move(6, 2, 28, 110, 44, 60, 0, "throw", 140, knocks_down=True, hint="beats every guard, very near only"),
}
"""The attacks by name, in the order of their inputs."""

INPUTS: tuple[str, ...] = ("neutral", "forward", "back", "high", "low", "jump forward", "jump back", *MOVES)
"""What can be pressed in a frame; an input is its place in here. ``high`` and ``low`` change the guard."""

NEUTRAL, FORWARD, BACKWARD, HIGH, LOW, JUMP_FORWARD, JUMP_BACK, FIRST_ATTACK = range(8)
