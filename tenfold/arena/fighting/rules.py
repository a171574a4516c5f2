"""The rules of one frame, on vectors of integers: what a fighter is, and what happens to two of them.

A fighter is a vector of the `FIELDS`, changed in place. `run_frame` runs on lists in plain Python (`fight`), and
compiled by numba on rows of an array (`batch`): one text of the rules for both, so it holds to what both know. All
lengths are sub-pixels, 256 to a pixel. Only what cannot be negative is divided, so that left and right are exact
mirror images.

Source: the specification of the latency arena, 7.3.
"""

from __future__ import annotations

from typing import Any

from tenfold.arena.fighting.moves import FIRST_ATTACK, FORWARD, HIGH, JUMP_BACK, JUMP_FORWARD, LOW, MOVES

Vector = Any  # a list of ints, or a row of an int32 array

PIXEL = 256
STAGE = 384 * PIXEL
WALL = 16 * PIXEL
"""Nearest that a fighter's centre comes to an end of the stage."""
STARTS = (144 * PIXEL, 240 * PIXEL)
FULL = 1000
"""Health and stamina at the start."""
FRAMES = 5940
"""The bell: 99 seconds."""
FRAMES_PER_SECOND = 60

FIELDS = (
    "x",  # of the centre
    "facing",  # 1 right, -1 left
    "mode",  # what it does: one of the modes below
    "time",  # in an attack or jump, frames since the press, which is 1; stunned or lying, frames left
    "move",  # which attack, in the order of MOVES; 0 outside of attacks
    "touched",  # what the attack did so far: nothing, HIT or BLOCKED
    "height",  # pixels above the ground
    "way",  # where a jump goes: 1 right, -1 left; 0 on the ground
    "low",  # the guard: 0 high, 1 low
    "health",
    "stamina",
    "safe",  # frames left in which nothing hits after lying
    "bolt_way",  # where its bolt flies; 0 where none does
    "bolt_x",
)
(X, FACING, MODE, TIME, MOVE, TOUCHED, HEIGHT, WAY, GUARD, HEALTH, STAMINA, SAFE, BOLT_WAY, BOLT_X) = range(len(FIELDS))

LARGEST = 2**17
"""No number of a fight is as large, nor below its negative."""

IDLE, WALKING, RETREATING, ATTACKING, JUMPING, STUNNED, BLOCKING, LYING = range(8)
"""The modes. Up to `RETREATING` a fighter is free: it faces the other, acts on inputs and gains stamina."""
HIT, BLOCKED = 1, 2

WALK, RETREAT, LEAP, SPIN_STEP, BOLT_STEP = 3 * PIXEL, 5 * PIXEL // 2, 4 * PIXEL, 3 * PIXEL, 5 * PIXEL
PUSH_BOX, KNOCK_BACK = 32 * PIXEL, 6 * PIXEL
BOLT_START, BOLT_REACH, BOLT_MEETS = 30 * PIXEL, 14 * PIXEL, 10 * PIXEL
TAKE_OFF, IN_AIR, LANDING = 4, 34, 4
JUMP = TAKE_OFF + IN_AIR + LANDING
"""Frames of a jump."""
HIGH_IN_AIR, ABOVE_BOLT = 30, 40
REGAIN, EXHAUSTED, REVIVED = 5, 55, 250
SAFE_FRAMES, UPPER_SAFE, AIR_STUN = 8, 6, 40

_table = list(MOVES.values())
_names = list(MOVES)
SPIN, BOLT, THROW, UPPER = (_names.index(name) for name in ("spin", "bolt", "throw", "upper"))
STARTUP = tuple(move.startup for move in _table)
LAST_ACTIVE = tuple(move.startup + move.active for move in _table)
LENGTH_HIT = tuple(move.startup + move.active + move.recovery for move in _table)
LENGTH_MISSED = tuple(
    length if name == "bolt" else length + move.recovery // 2
    for name, move, length in zip(_names, _table, LENGTH_HIT, strict=True)
)
LENGTH_BLOCKED = tuple(length + 10 * (name != "bolt") for name, length in zip(_names, LENGTH_HIT, strict=True))
LENGTHS = (LENGTH_MISSED, LENGTH_HIT, LENGTH_BLOCKED)
"""Of each attack, by what it did: nothing, `HIT`, `BLOCKED`."""
DAMAGE = tuple(move.damage for move in _table)
REACH = tuple(move.reach * PIXEL for move in _table)
HITSTUN = tuple(move.hitstun for move in _table)
BLOCKSTUN = tuple(move.blockstun for move in _table)
COST = tuple(move.stamina for move in _table)
GUARDED_BY = tuple({"mid": (1, 1), "over": (1, 0), "low": (0, 1), "throw": (0, 0)}[move.height] for move in _table)
"""By the guard, high and low: 1 where it stops the attack."""
KNOCKS_DOWN = tuple(int(move.knocks_down) for move in _table)
ANTI_AIR = tuple(int(move.anti_air) for move in _table)
ARC = tuple(k * (IN_AIR - k) * 84 // 289 for k in range(IN_AIR + 1))
"""Height in pixels on each frame in the air: 84 in the middle."""


def start(x: int, facing: int) -> list[int]:
    """A fighter as the fight begins."""
    fighter = [0] * len(FIELDS)
    fighter[X], fighter[FACING], fighter[HEALTH], fighter[STAMINA] = x, facing, FULL, FULL
    return fighter


def mirror(f: Vector) -> None:
    """Left and right exchanged."""
    f[X] = STAGE - f[X]
    f[FACING] = -f[FACING]
    f[WAY] = -f[WAY]
    f[BOLT_WAY] = -f[BOLT_WAY]
    if f[BOLT_WAY] != 0:
        f[BOLT_X] = STAGE - f[BOLT_X]


def run_frame(a: Vector, b: Vector, pressed_a: int, pressed_b: int) -> None:
    """One frame of 1/60 s: ``a`` is player 0, who counts as left where both stand on one place."""
    side = 1 if a[X] <= b[X] else -1
    if a[MODE] <= RETREATING:
        a[FACING] = side
    if b[MODE] <= RETREATING:
        b[FACING] = -side
    press(a, pressed_a)
    press(b, pressed_b)
    pass_time(a)
    pass_time(b)
    stay_on_stage(a)
    stay_on_stage(b)
    push_apart(a, b)
    detect_and_apply(a, b)
    release(a)
    release(b)


def press(f: Vector, pressed: int) -> None:
    """The input: the guard changes at any time, all else is for the free."""
    f[GUARD] = pressed - HIGH if HIGH <= pressed <= LOW else f[GUARD]
    if f[MODE] > RETREATING:
        return
    f[MODE] = IDLE
    if pressed == 0:
        return
    if pressed < HIGH:
        f[MODE] = WALKING if pressed == FORWARD else RETREATING
    elif pressed >= FIRST_ATTACK:
        move = pressed - FIRST_ATTACK
        if move == BOLT and f[BOLT_WAY] != 0:
            return
        f[MODE] = ATTACKING
        f[MOVE] = move
        f[STAMINA] -= COST[move]
    elif pressed == JUMP_FORWARD:
        f[MODE] = JUMPING
        f[WAY] = f[FACING]
    elif pressed == JUMP_BACK:
        f[MODE] = JUMPING
        f[WAY] = -f[FACING]


def pass_time(f: Vector) -> None:
    """Counters and motion."""
    mode, move = f[MODE], f[MOVE]
    if f[SAFE] > 0:
        f[SAFE] -= 1
    if mode <= RETREATING:
        if f[STAMINA] < FULL:
            f[STAMINA] = min(f[STAMINA] + REGAIN, FULL)
        if mode == WALKING:
            f[X] += WALK * f[FACING]
        elif mode == RETREATING:
            f[X] -= RETREAT * f[FACING]
        return
    f[TIME] += 1 if mode <= JUMPING else -1
    if move == SPIN:
        if STARTUP[SPIN] < f[TIME] <= LAST_ACTIVE[SPIN]:
            f[X] += SPIN_STEP * f[FACING]
    elif move == BOLT:
        if f[TIME] == LAST_ACTIVE[BOLT]:
            f[BOLT_WAY] = f[FACING]
            f[BOLT_X] = f[X] + BOLT_START * f[FACING]
    elif mode == JUMPING:
        k = f[TIME] - TAKE_OFF
        if 0 < k <= IN_AIR:
            f[X] += LEAP * f[WAY]
            f[HEIGHT] = ARC[k]


def release(f: Vector) -> None:
    """Whoever has come to the last frame of what it does is free in the next one.

    An attack that runs to its end on an empty stamina leaves its owner stunned.
    """
    mode, time = f[MODE], f[TIME]
    if mode <= RETREATING:
        return
    # read whatever the mode: compiled, the one branch is that which is seldom taken
    length = LENGTHS[f[TOUCHED]][f[MOVE]]
    left = length - time if mode == ATTACKING else JUMP - time if mode == JUMPING else time
    if left > 0:
        return
    f[MODE] = IDLE
    f[TIME] = 0
    f[MOVE] = f[TOUCHED] = f[WAY] = 0
    if mode == ATTACKING and f[STAMINA] < 0:
        f[STAMINA] = REVIVED
        f[MODE] = STUNNED
        f[TIME] = EXHAUSTED
    elif mode == LYING:
        f[SAFE] = SAFE_FRAMES  # this frame is the first of them


def stay_on_stage(f: Vector) -> None:
    """A fighter's centre stays within the walls."""
    if f[X] < WALL:
        f[X] = WALL
    elif f[X] > STAGE - WALL:
        f[X] = STAGE - WALL


def push_apart(a: Vector, b: Vector) -> None:
    """Two on the ground do not overlap: each gives way by half; an odd sub-pixel stays."""
    overlap = PUSH_BOX - abs(b[X] - a[X])
    if overlap <= 0 or a[HEIGHT] > 0 or b[HEIGHT] > 0:
        return
    half = overlap // 2 if a[X] <= b[X] else -(overlap // 2)
    a[X] -= half
    b[X] += half
    stay_on_stage(a)
    stay_on_stage(b)


def detect_and_apply(a: Vector, b: Vector) -> None:
    """Who hits whom, both judged as they stand now; then what it does to them, so that both may hit at once."""
    side = 1 if a[X] <= b[X] else -1
    strike_a = strike(a, b, side) if is_active(a) else 0
    strike_b = strike(b, a, -side) if is_active(b) else 0
    bolt_a = bolt_b = way_a = way_b = 0
    if a[BOLT_WAY] != 0 or b[BOLT_WAY] != 0:
        way_a, way_b = a[BOLT_WAY], b[BOLT_WAY]
        bolt_a = fly(a, b)
        bolt_b = fly(b, a)
        if a[BOLT_WAY] != 0 and b[BOLT_WAY] != 0 and abs(a[BOLT_X] - b[BOLT_X]) <= BOLT_MEETS:
            a[BOLT_WAY] = a[BOLT_X] = b[BOLT_WAY] = b[BOLT_X] = 0
    if strike_a == 0 and strike_b == 0 and bolt_a == 0 and bolt_b == 0:
        return
    move_a, move_b, facing_a, facing_b = a[MOVE], b[MOVE], a[FACING], b[FACING]
    counter_a, counter_b = b[MODE] == ATTACKING, a[MODE] == ATTACKING
    flying_a, flying_b = b[HEIGHT] > 0, a[HEIGHT] > 0
    if strike_a != 0:
        a[TOUCHED] = strike_a
    if strike_b != 0:
        b[TOUCHED] = strike_b
    # a bolt before a strike: where both touch in one frame, the strike says what the victim does next
    touch(b, bolt_a, BOLT, way_a, counter_a, flying_a)
    touch(a, bolt_b, BOLT, way_b, counter_b, flying_b)
    if strike_a == BLOCKED:
        a[STAMINA] -= COST[move_a] // 2
    if strike_b == BLOCKED:
        b[STAMINA] -= COST[move_b] // 2
    touch(b, strike_a, move_a, facing_a, counter_a, flying_a)
    touch(a, strike_b, move_b, facing_b, counter_b, flying_b)
    stay_on_stage(a)
    stay_on_stage(b)


def is_active(f: Vector) -> bool:
    """In the frames of an attack that can hit, and it has not touched yet."""
    return f[MODE] == ATTACKING and f[TOUCHED] == 0 and STARTUP[f[MOVE]] < f[TIME] <= LAST_ACTIVE[f[MOVE]]


def strike(f: Vector, victim: Vector, side: int) -> int:
    """What an active attack does in this frame; ``side`` is where the victim is."""
    move = f[MOVE]
    if f[FACING] != side or abs(victim[X] - f[X]) > REACH[move] or is_safe(victim):
        return 0
    mode = victim[MODE]
    if move == THROW:
        return 0 if mode in (JUMPING, STUNNED, BLOCKING) else HIT
    if victim[HEIGHT] >= HIGH_IN_AIR and ANTI_AIR[move] == 0:
        return 0
    return guarded(victim, move)


def fly(f: Vector, victim: Vector) -> int:
    """The bolt moves on, and what it does to the victim; it is gone once it touches or leaves the stage."""
    if f[BOLT_WAY] == 0:
        return 0
    f[BOLT_X] += BOLT_STEP * f[BOLT_WAY]
    touches = abs(victim[X] - f[BOLT_X]) <= BOLT_REACH and victim[HEIGHT] < ABOVE_BOLT
    if touches or f[BOLT_X] < 0 or f[BOLT_X] > STAGE:
        f[BOLT_WAY] = f[BOLT_X] = 0
    return guarded(victim, BOLT) if touches and not is_safe(victim) else 0


def is_safe(f: Vector) -> bool:
    """Nothing hits who lies, has just risen, or begins an upper."""
    mode = f[MODE]
    return mode == LYING or f[SAFE] > 0 or (mode == ATTACKING and f[MOVE] == UPPER and f[TIME] <= UPPER_SAFE)


def guarded(victim: Vector, move: int) -> int:
    """BLOCKED, or HIT: a guard is held standing, retreating and blocking, whatever the facing."""
    mode = victim[MODE]
    holds = mode in (IDLE, RETREATING, BLOCKING)
    return BLOCKED if holds and GUARDED_BY[move][victim[GUARD]] else HIT


def touch(f: Vector, outcome: int, move: int, way: int, counter: bool, flying: bool) -> None:
    """What a touch does to its victim: ``counter`` where it was attacking, ``flying`` where it was in the air."""
    if outcome == 0:
        return
    if outcome == BLOCKED:
        f[HEALTH] -= DAMAGE[move] // 12
        f[STAMINA] -= COST[move] // 3
        f[MODE] = BLOCKING
        f[TIME] = BLOCKSTUN[move]
    else:
        f[HEALTH] -= DAMAGE[move] * 5 // 4 if counter else DAMAGE[move]
        f[X] += KNOCK_BACK * way
        f[MODE] = LYING if KNOCKS_DOWN[move] != 0 or flying else STUNNED
        f[TIME] = max(HITSTUN[move], AIR_STUN) if flying else HITSTUN[move]
    f[HEALTH] = max(f[HEALTH], 0)
    f[MOVE] = f[TOUCHED] = f[HEIGHT] = f[WAY] = 0
