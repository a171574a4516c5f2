"""A fight to look at: some lines of text for a terminal, or an image."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenfold.arena.fighting.fight import Fight
from tenfold.arena.fighting.moves import MOVES
from tenfold.arena.fighting.rules import (
    ATTACKING,
    BLOCKING,
    BOLT_WAY,
    BOLT_X,
    FACING,
    FRAMES_PER_SECOND,
    FULL,
    GUARD,
    HEALTH,
    HEIGHT,
    IDLE,
    JUMPING,
    LAST_ACTIVE,
    LYING,
    MODE,
    MOVE,
    PIXEL,
    REACH,
    RETREATING,
    STAGE,
    STAMINA,
    STARTUP,
    STUNNED,
    TIME,
    WALKING,
    X,
)

COLUMN, ROW = 6, 21
"""Pixels of the stage that a character is wide and high."""
WIDTH, HEADROOM = STAGE // PIXEL // COLUMN, 4
_POSES = {
    IDLE: (" o ", "/|)", "/ \\"),
    WALKING: (" o ", "/|\\", "/ >"),
    RETREATING: (" o ", " |)", "< \\"),
    ATTACKING: (" o ", "/|>", "/ \\"),
    JUMPING: (" o ", "/|\\", "^ ^"),
    STUNNED: (" x ", "\\|/", "/ \\"),
    BLOCKING: (" o ", "(|)", "/ \\"),
    LYING: ("   ", "   ", "o=_"),
}
"""Head, body and legs of a fighter that faces right."""
_CROUCHED = ("   ", " o)", "/_\\")
_TURNED = str.maketrans("/\\()<>", "\\/)(><")
_LEVEL_ROW = {"over": 0, "mid": 1, "throw": 1, "low": 2}
_ATTACKS = tuple(MOVES.values())
_NAMES = tuple(MOVES)


def fight_as_text(fight: Fight) -> str:
    """The fight as lines of 64 characters: health, stamina, seconds left, the stage, and what both do.

    >>> print(fight_as_text(Fight()).splitlines()[0])
    1000 ####################      99.0     #################### 1000
    """
    rows = [[" "] * WIDTH for _ in range(HEADROOM + 3)]
    for fighter in fight.fighters:
        _draw_fighter(rows, fighter)
    for fighter in fight.fighters:
        if fighter[BOLT_WAY] != 0:
            _put(rows, HEADROOM + 1, fighter[BOLT_X] // PIXEL // COLUMN, "*")
    first, second = fight.fighters
    clock = f"{(fight.bell - fight.frame) / FRAMES_PER_SECOND:.1f}"
    lines = [
        f"{first[what]:4} {_bar(first[what], mark):<20} {middle:^13}{_bar(second[what], mark):>20} {second[what]}"
        for what, mark, middle in ((HEALTH, "#", clock), (STAMINA, "=", ""))
    ]
    doing = f"{_doing_briefly(first):<32}{_doing_briefly(second):>32}"
    return "\n".join([*lines, *("".join(row).rstrip() for row in rows), "-" * WIDTH, doing])


def _bar(value: int, mark: str) -> str:
    return mark * (20 * max(value, 0) // FULL)


def _doing_briefly(fighter: list[int]) -> str:
    if fighter[MODE] == ATTACKING:
        return _NAMES[fighter[MOVE]]
    if fighter[MODE] in (IDLE, RETREATING, BLOCKING):
        return "guard low" if fighter[GUARD] else "guard high"
    return {WALKING: "forward", JUMPING: "jump", STUNNED: "stunned", LYING: "down"}[fighter[MODE]]


def _put(rows: list[list[str]], row: int, column: int, character: str) -> None:
    if character != " " and 0 <= column < WIDTH:
        rows[row][column] = character


def _draw_fighter(rows: list[list[str]], fighter: list[int]) -> None:
    column, facing, mode = fighter[X] // PIXEL // COLUMN, fighter[FACING], fighter[MODE]
    top = HEADROOM - fighter[HEIGHT] // ROW
    pose = _CROUCHED if mode in (IDLE, BLOCKING) and fighter[GUARD] else _POSES[mode]
    if mode == ATTACKING and STARTUP[fighter[MOVE]] < fighter[TIME] <= LAST_ACTIVE[fighter[MOVE]]:
        at = top + _LEVEL_ROW[_ATTACKS[fighter[MOVE]].height]
        for step in range(2, REACH[fighter[MOVE]] // PIXEL // COLUMN + 1):
            _put(rows, at, column + step * facing, "=")
    for line, text in enumerate(pose):
        shown = text if facing > 0 else text[::-1].translate(_TURNED)
        for offset, character in enumerate(shown, start=-1):
            _put(rows, top + line, column + offset, character)


def fight_as_image(fight: Fight) -> NDArray[Any]:
    """The fight as an image, uint8 ``[128, 384, 3]``: boxes for the fighters, lines for health."""
    image = np.full((128, STAGE // PIXEL, 3), 24, np.uint8)
    image[120:] = 80
    for side, (fighter, colour) in enumerate(zip(fight.fighters, ((220, 80, 60), (70, 130, 230)), strict=True)):
        x, mode, ground = fighter[X] // PIXEL, fighter[MODE], 120 - fighter[HEIGHT]
        tall = 8 if mode == LYING else 24 if fighter[GUARD] and mode in (IDLE, BLOCKING) else 36
        image[max(ground - tall, 0) : ground, x - 12 : x + 12] = colour
        if mode == ATTACKING and STARTUP[fighter[MOVE]] < fighter[TIME] <= LAST_ACTIVE[fighter[MOVE]]:
            reach = max(REACH[fighter[MOVE]] // PIXEL, 0)
            near, far = sorted((x, min(max(x + reach * fighter[FACING], 0), STAGE // PIXEL)))
            image[ground - 20 : ground - 16, near:far] = 240
        if fighter[BOLT_WAY] != 0:
            at = fighter[BOLT_X] // PIXEL
            image[100:106, max(at - 4, 0) : at + 4] = 255
        long = 180 * fighter[HEALTH] // FULL
        image[4:10, 4 : 4 + long] = colour if side == 0 else image[4:10, 4 : 4 + long]
        if side == 1:
            image[4:10, 380 - long : 380] = colour
    return image
