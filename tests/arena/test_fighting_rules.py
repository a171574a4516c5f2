"""The rules of a frame, one by one, from states that are set up for them."""

import pytest

from tenfold.arena.fighting import rules
from tenfold.arena.fighting.fight import Fight
from tenfold.arena.fighting.moves import INPUTS, MOVES
from tenfold.arena.fighting.rules import (
    ATTACKING,
    BLOCKING,
    BOLT_WAY,
    BOLT_X,
    FACING,
    GUARD,
    HEALTH,
    HEIGHT,
    IDLE,
    JUMPING,
    LYING,
    MODE,
    MOVE,
    STAMINA,
    STUNNED,
    TIME,
    TOUCHED,
    WALL,
    X,
)

PX = 256
NAMES = list(MOVES)
STRIKES = [name for name in NAMES if name not in ("bolt", "throw")]


def key(name):
    return INPUTS.index(name)


def stood(distance, **second):
    """A fight with the two some pixels apart; fields of the second fighter may be set."""
    fight = Fight()
    fight.fighters[0][X], fight.fighters[1][X] = 150 * PX, (150 + distance) * PX
    for name, value in second.items():
        fight.fighters[1][getattr(rules, name)] = value
    return fight


def press(fight, *pairs):
    for first, second in pairs:
        fight.step(key(first), key(second))
    return fight


def frames_until(fight, condition, pressed=("neutral", "neutral"), most=400):
    for n in range(1, most):
        press(fight, pressed)
        if condition(fight):
            return n
    raise AssertionError("never")


def hits(distance, move, before=0, **second):
    """Health that an attack takes in its first active frame.

    The victim is put into a state that many frames earlier, and one more: the frame before the attack can hit.
    """
    fight = stood(distance)
    press(fight, (move, "neutral"))
    for _ in range(MOVES[move].startup - 1 - before):
        press(fight, ("neutral", "neutral"))
    for name, value in second.items():
        fight.fighters[1][getattr(rules, name)] = value
    press(fight, *[("neutral", "neutral")] * (1 + before))
    return 1000 - fight.fighters[1][HEALTH]


@pytest.mark.parametrize("name", STRIKES)
def test_reach_counts_to_the_sub_pixel(name):
    move = MOVES[name]
    moved = 3 if name == "spin" else 0  # in its first active frame
    for extra, expected in ((0, move.damage), (1, 0)):
        fight = stood(0, MODE=STUNNED, TIME=99)
        fight.fighters[1][X] += (move.reach + moved) * PX + extra
        press(fight, (name, "neutral"), *[("neutral", "neutral")] * move.startup)
        assert 1000 - fight.fighters[1][HEALTH] == expected


@pytest.mark.parametrize("name", [name for name in NAMES if name != "bolt"])
def test_active_frames(name):
    """Who comes within reach is hit in each active frame, in none before and none after."""
    move = MOVES[name]
    for time in range(1, move.startup + move.active + 5):
        fight = stood(300)
        press(fight, (name, "neutral"), *[("neutral", "neutral")] * (time - 2) if time > 1 else [])
        if time == 1:
            fight = stood(300)
        fight.fighters[1][X] = fight.fighters[0][X] + 40 * PX
        fight.fighters[1][MODE] = 1  # walking: no guard, and may be thrown
        press(fight, (name if time == 1 else "neutral", "forward"))
        active = move.startup < time <= move.startup + move.active
        assert (fight.fighters[1][HEALTH] < 1000) == active, time


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("outcome", ["missed", "hit", "blocked"])
def test_how_long_an_attack_lasts(name, outcome):
    move = MOVES[name]
    if outcome == "blocked" and name == "throw":
        return
    fight = stood({"missed": 200}.get(outcome, 42))
    if name == "bolt" and outcome != "missed":
        fight = stood(100)
    second = "low" if (move.height == "low") == (outcome == "blocked") else "high"
    if move.height == "mid" and outcome == "hit":
        fight.fighters[1][MODE], fight.fighters[1][TIME] = STUNNED, 99
    fight.step(key(name), key(second))
    length = 1 + frames_until(fight, lambda fight: fight.is_free(0))
    extra = {"missed": move.recovery // 2, "hit": 0, "blocked": 10}[outcome] if name != "bolt" else 0
    assert length == move.startup + move.active + move.recovery + extra
    assert fight.fighters[0][MOVE] == fight.fighters[0][TOUCHED] == fight.fighters[0][TIME] == 0


@pytest.mark.parametrize("name", NAMES)
def test_guards(name):
    height = MOVES[name].height
    for guard, stops in ((0, ("mid", "over")), (1, ("mid", "low"))):
        distance = 42 if name != "bolt" else 48
        for mode, holds in ((IDLE, True), (BLOCKING, True), (STUNNED, False), (JUMPING, False)):
            if height == "throw" and mode != IDLE:
                continue
            taken = hits(distance, name, GUARD=guard, MODE=mode, TIME=3)
            blocked = holds and height in stops
            assert taken == (MOVES[name].damage // 12 if blocked else MOVES[name].damage), (guard, mode)


def test_guard_is_held_walking_back_and_not_walking_forward():
    for walk, taken in (("back", 2), ("forward", 30)):
        fight = stood(45)
        press(fight, ("jab", walk), *[("neutral", walk)] * 4)
        assert 1000 - fight.fighters[1][HEALTH] == taken
    # and whatever the facing
    fight = stood(45, FACING=1, MODE=BLOCKING, TIME=50)
    press(fight, ("jab", "neutral"), *[("neutral", "neutral")] * 4)
    assert fight.fighters[1][HEALTH] == 998


def test_guard_level_changes_at_any_time_and_costs_the_free_a_neutral_frame():
    for mode in (ATTACKING, JUMPING, STUNNED, BLOCKING, LYING):
        fight = stood(200, MODE=mode, TIME=5)
        press(fight, ("neutral", "low"))
        assert (fight.fighters[1][GUARD], fight.fighters[1][MODE]) == (1, mode)
    fight = press(stood(200), ("low", "forward"), ("forward", "forward"))
    assert fight.fighters[0][GUARD] == 1
    assert fight.fighters[0][X] == 153 * PX
    assert press(fight, ("high", "neutral")).fighters[0][GUARD] == 0


def test_a_counter_hit_costs_a_quarter_more():
    for time in (1, 20):  # recovery included
        assert hits(42, "jab", MODE=ATTACKING, MOVE=NAMES.index("fierce"), TIME=time) == 37
    assert hits(42, "throw", MODE=ATTACKING, MOVE=NAMES.index("fierce"), TIME=20) == 137


def test_what_a_block_costs():
    fight = stood(60)
    frames_until(press(fight, ("fierce", "neutral")), lambda fight: fight.fighters[1][HEALTH] < 1000)
    first, second = fight.fighters
    assert (first[STAMINA], second[STAMINA], second[HEALTH]) == (1000 - 170 - 85, 1000 - 56, 992)
    assert second[X] == 210 * PX  # not pushed
    fight = stood(48)
    frames_until(press(fight, ("bolt", "neutral")), lambda fight: fight.fighters[1][HEALTH] < 1000)
    first, second = fight.fighters
    assert (first[STAMINA], second[STAMINA], second[HEALTH]) == (1000 - 170, 1000 - 56, 995)


def test_stun_covers_the_frames_after_the_hit():
    fight = stood(42)
    frames_until(
        press(fight, ("jab", "forward")), lambda fight: fight.fighters[1][HEALTH] < 1000, ("neutral", "forward")
    )
    assert frames_until(fight, lambda fight: fight.is_free(1)) == 14
    # in the last of them there is no guard yet, in the next one there is
    assert hits(42, "jab", MODE=STUNNED, TIME=1) == 30
    assert hits(42, "jab", before=1, MODE=STUNNED, TIME=1) == 2


def test_who_lies_is_safe_and_eight_frames_from_the_last_one_on():
    # struck in the n-th frame after the last of lying: seven more are safe, the next is not
    for after, expected in ((0, 0), (1, 0), (7, 0), (8, 95)):
        assert hits(42, "axe", after, MODE=LYING, TIME=1, GUARD=1) == expected


def test_throws_miss_who_is_not_on_their_feet():
    assert hits(40, "throw", GUARD=0) == hits(40, "throw", GUARD=1) == 110
    for mode in (STUNNED, BLOCKING, LYING):
        assert hits(40, "throw", MODE=mode, TIME=3) == 0
    for frame in range(1, 44):  # of a jump, in which the throw's seventh frame falls, the first that is active
        fight = stood(40)
        for n in range(frame + 9):
            press(fight, ("throw" if n == frame + 2 else "neutral", "jump back" if n == 9 else "neutral"))
            fight.fighters[1][X] = fight.fighters[0][X] + 40 * PX
        assert (fight.fighters[1][HEALTH] < 1000) == (frame == 43), frame


def test_a_jump():
    fight = press(stood(200), ("jump forward", "neutral"))
    heights = [fight.fighters[0][HEIGHT]]
    while not fight.is_free(0):
        press(fight, ("back", "neutral"))
        heights.append(fight.fighters[0][HEIGHT])
    assert heights == [0] * 4 + [k * (34 - k) * 84 // 289 for k in range(1, 35)] + [0] * 4
    assert max(heights) == 84
    assert fight.fighters[0][X] == (150 + 4 * 34) * PX
    assert press(stood(200), ("neutral", "jump back"), *[("neutral", "forward")] * 7).fighters[1][X] == 366 * PX


def test_height_and_attacks():
    for name in STRIKES:
        for height, over in ((29, False), (30, True)):
            taken = hits(50, name, MODE=JUMPING, TIME=2, HEIGHT=height)
            assert taken == (0 if over and name not in ("fierce", "upper") else MOVES[name].damage), name
    assert hits(48, "bolt", MODE=JUMPING, TIME=2, HEIGHT=39) == 60
    assert hits(48, "bolt", MODE=JUMPING, TIME=2, HEIGHT=40) == 0


def test_who_is_hit_in_the_air_falls():
    for name, lies in (("jab", 40), ("fierce", 40), ("upper", 50)):
        fight = stood(50)
        press(fight, (name, "neutral"), *[("neutral", "neutral")] * (MOVES[name].startup - 1))
        fight.fighters[1][MODE], fight.fighters[1][TIME], fight.fighters[1][HEIGHT] = JUMPING, 2, 9
        press(fight, ("neutral", "neutral"))
        second = fight.fighters[1]
        assert (second[MODE], second[TIME], second[HEIGHT]) == (LYING, lies, 0)
    # on the ground a jump is an ordinary hit
    fight = stood(50)
    press(fight, ("jab", "neutral"), *[("neutral", "neutral")] * 3)
    fight.fighters[1][MODE], fight.fighters[1][TIME] = JUMPING, 2
    assert press(fight, ("neutral", "neutral")).fighters[1][MODE] == STUNNED


def test_an_upper_is_safe_for_six_frames():
    for time, taken in ((5, 0), (6, 37)):  # the frame that follows is the sixth, the seventh
        assert hits(42, "jab", MODE=ATTACKING, MOVE=NAMES.index("upper"), TIME=time, FACING=1) == taken


def test_a_spin_moves_while_it_is_active():
    fight = press(stood(200), ("spin", "neutral"), *[("neutral", "neutral")] * 60)
    assert fight.fighters[0][X] == (150 + 3 * 12) * PX


def test_an_attack_hits_once_and_not_behind():
    fight = press(stood(40), ("upper", "forward"), *[("neutral", "forward")] * 12)
    assert fight.fighters[1][HEALTH] == 870
    for facing, taken in ((-1, 0), (1, 30)):
        fight = stood(42, MODE=STUNNED, TIME=99)
        press(fight, ("jab", "neutral"))
        fight.fighters[0][FACING] = facing
        press(fight, *[("neutral", "neutral")] * 20)
        assert 1000 - fight.fighters[1][HEALTH] == taken
    # on one place player 0 counts as left of player 1
    for facing, taken in ((1, 30), (-1, 0)):
        fight = stood(0, MODE=STUNNED, TIME=99, HEIGHT=5)
        fight.fighters[0][:] = [150 * PX, facing, ATTACKING, 4, *fight.fighters[0][4:]]
        assert 1000 - press(fight, ("neutral", "neutral")).fighters[1][HEALTH] == taken


def test_a_hit_pushes_along_the_facing_and_not_through_the_wall():
    fight = press(stood(40, MODE=STUNNED, TIME=9), ("jab", "neutral"), *[("neutral", "neutral")] * 4)
    assert fight.fighters[1][X] == 196 * PX
    fight = press(stood(40, MODE=STUNNED, TIME=9, FACING=1), ("jab", "neutral"), *[("neutral", "neutral")] * 4)
    assert fight.fighters[1][X] == 196 * PX  # the attacker's, not the victim's
    fight = stood(40)
    fight.fighters[0][X], fight.fighters[1][X] = 326 * PX, 366 * PX
    press(fight, ("jab", "forward"), *[("neutral", "neutral")] * 3)
    fight.fighters[1][MODE], fight.fighters[1][TIME] = STUNNED, 9
    assert press(fight, ("neutral", "neutral")).fighters[1][X] == 368 * PX


def test_bolts():
    fight = press(stood(180), ("bolt", "neutral"), *[("neutral", "neutral")] * 12)
    assert fight.fighters[0][BOLT_WAY] == 0
    press(fight, ("neutral", "neutral"))
    assert (fight.fighters[0][BOLT_WAY], fight.fighters[0][BOLT_X]) == (1, (150 + 30 + 5) * PX)
    # one for each: pressed again it is a neutral frame, free of charge
    fight.fighters[0][MODE], fight.fighters[0][TIME] = IDLE, 0
    before = fight.fighters[0][STAMINA]
    press(fight, ("bolt", "neutral"))
    assert (fight.fighters[0][MODE], fight.fighters[0][STAMINA]) == (IDLE, before + 5)
    # it flies over a jumper's head no more, and out of the stage
    fight.fighters[1][MODE], fight.fighters[1][TIME], fight.fighters[1][HEIGHT] = JUMPING, 2, 60
    for _ in range(60):
        fight.fighters[1][TIME] = 2
        press(fight, ("neutral", "neutral"))
    assert (fight.fighters[0][BOLT_WAY], fight.fighters[0][BOLT_X]) == (0, 0)
    assert fight.fighters[1][HEALTH] == 1000


def test_a_bolt_is_gone_at_who_cannot_be_hit():
    for mode, time in ((LYING, 9), (IDLE, 0)):
        fight = stood(60, MODE=mode, TIME=time, SAFE=9)
        fight.fighters[0][BOLT_WAY], fight.fighters[0][BOLT_X] = 1, (150 + 42) * PX
        press(fight, ("neutral", "neutral"))
        assert (fight.fighters[0][BOLT_WAY], fight.fighters[1][HEALTH]) == (0, 1000)


@pytest.mark.parametrize(("apart", "meet"), [(20, True), (21, False)])
def test_two_bolts_cancel(apart, meet):
    """They come 10 px nearer in the frame, and are gone within 10."""
    fight = stood(200)
    fight.fighters[0][BOLT_WAY], fight.fighters[0][BOLT_X] = 1, 240 * PX
    fight.fighters[1][BOLT_WAY], fight.fighters[1][BOLT_X] = -1, (240 + apart) * PX
    press(fight, ("neutral", "neutral"))
    assert (fight.fighters[0][BOLT_WAY], fight.fighters[1][BOLT_WAY]) == ((0, 0) if meet else (1, -1))


def test_push_boxes_and_walls():
    fight = stood(0)
    fight.fighters[1][X] += 32 * PX - 5
    press(fight, ("neutral", "neutral"))
    assert [fighter[X] for fighter in fight.fighters] == [150 * PX - 2, 182 * PX - 3]  # an odd sub-pixel stays
    fight = stood(10, HEIGHT=3, MODE=JUMPING, TIME=2)
    press(fight, ("neutral", "neutral"))
    assert fight.fighters[1][X] - fight.fighters[0][X] == 10 * PX
    fight = stood(200)
    press(fight, *[("back", "back")] * 80)
    assert [fighter[X] for fighter in fight.fighters] == [WALL, 384 * PX - WALL]


def test_stamina_comes_back_to_the_free():
    fight = press(stood(200), ("jab", "neutral"))
    fight.fighters[1][STAMINA] = 991
    frames_until(fight, lambda fight: fight.is_free(0))
    assert (fight.fighters[0][STAMINA], fight.fighters[1][STAMINA]) == (940, 1000)
    assert press(fight, ("forward", "back")).fighters[0][STAMINA] == 945


def test_stamina_of_exactly_nothing_exhausts_nobody():
    for stamina, mode in ((60, IDLE), (59, STUNNED)):
        fight = stood(200)
        fight.fighters[0][STAMINA] = stamina
        press(fight, ("jab", "neutral"), *[("neutral", "neutral")] * 17)
        assert fight.fighters[0][MODE] == mode


def test_an_attack_that_is_cut_short_exhausts_nobody():
    fight = stood(42)
    fight.fighters[0][STAMINA] = 100
    press(fight, ("sweep", "jab"), *[("neutral", "neutral")] * 4)
    assert (fight.fighters[0][MODE], fight.fighters[0][STAMINA]) == (STUNNED, -90)
    frames_until(fight, lambda fight: fight.is_free(0))
    assert fight.fighters[0][STAMINA] < 0  # there is no floor


def test_the_end():
    fight = stood(45, HEALTH=20)
    fight.fighters[0][HEALTH] = 20
    press(fight, ("jab", "jab"), *[("neutral", "neutral")] * 4)
    assert [fighter[HEALTH] for fighter in fight.fighters] == [0, 0]
    assert (fight.over, fight.knocked_out, fight.leader) == (True, True, None)
    fight = stood(200, HEALTH=999)
    fight.frame = 5938
    press(fight, ("neutral", "neutral"))
    assert not fight.over
    press(fight, ("neutral", "neutral"))
    assert (fight.over, fight.knocked_out, fight.leader) == (True, False, 0)
