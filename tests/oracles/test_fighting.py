"""The oracles of the latency arena's specification, 7.3, in its order: exact frames and health."""

import pickle

import pytest

from tenfold.arena.fighting.fight import Fight
from tenfold.arena.fighting.moves import INPUTS
from tenfold.arena.fighting.play import play_fight
from tenfold.arena.fighting.rules import BLOCKING, HEALTH, LYING, MODE, STAMINA, STUNNED, X
from tenfold.arena.fighting.scripted import ScriptedFighter


def keys(*presses):
    """Inputs from names and (times, name)."""
    found = []
    for each in presses:
        times, name = each if isinstance(each, tuple) else (1, each)
        found += [INPUTS.index(name)] * times
    return found


def run(first, second=(), frames=120):
    """The fight after each frame, until somebody loses health."""
    fight = Fight()
    for n in range(frames):
        fight.step(first[n] if n < len(first) else 0, second[n] if n < len(second) else 0)
        if min(health(fight)) < 1000:
            break
    return fight


def health(fight):
    return [fighter[HEALTH] for fighter in fight.fighters]


NEAR = (16, "forward")


def test_10_walking():
    assert run(keys(NEAR), frames=16).fighters[0][X] == 192 * 256


def test_11_jab_blocked():
    fight = run(keys(NEAR, "jab"))
    assert (fight.frame, health(fight)) == (21, [1000, 998])
    assert fight.fighters[1][MODE] == BLOCKING


def test_12_short():
    fight = run(keys(NEAR, "short"))
    assert (fight.frame, health(fight), fight.fighters[1][X]) == (23, [1000, 955], 246 * 256)
    fight = run(keys(NEAR, "short"), keys("low"))
    assert (fight.frame, health(fight), fight.fighters[1][X]) == (23, [1000, 997], 240 * 256)


def test_13_axe():
    fight = run(keys(NEAR, "axe"), keys("low"))
    assert (fight.frame, health(fight)) == (34, [1000, 905])
    fight = run(keys(NEAR, "axe"))
    assert (fight.frame, health(fight)) == (34, [1000, 993])


def test_14_throw():
    fight = run(keys((18, "forward"), "throw"))
    assert (fight.frame, health(fight), fight.fighters[1][MODE]) == (25, [1000, 890], LYING)
    assert health(run(keys(NEAR, "throw"))) == [1000, 1000]


def test_15_bolt():
    fight = run(keys("bolt"))
    assert (fight.frame, health(fight)) == (24, [1000, 995])
    fight = run(keys("bolt"), keys((60, "forward")))
    assert (fight.frame, health(fight)) == (15, [1000, 940])


def test_16_upper_against_a_jump():
    fight = run(keys((14, "neutral"), "upper"), keys("jump forward"))
    assert (fight.frame, health(fight)) == (20, [1000, 870])


def test_17_trade():
    fight = run(keys(NEAR, "jab"), keys((16, "neutral"), "jab"))
    assert (fight.frame, health(fight)) == (21, [963, 963])


@pytest.mark.parametrize(
    ("move", "blocked", "advantage"),
    [
        ("jab", False, 5),
        ("strong", False, 3),
        ("short", False, 3),
        ("sweep", False, 17),
        ("fierce", False, -3),
        ("axe", False, 4),
        ("jab", True, -9),
        ("sweep", True, -26),
    ],
)
def test_18_advantage(move, blocked, advantage):
    """Frames by which the attacker acts first, from who is free first."""
    guard = "low" if (move in ("short", "sweep")) == blocked else "high"
    fight = Fight()
    # the victim walks forward where no guard may be held
    victim = keys(guard) if blocked or move not in ("jab", "strong", "fierce") else keys((60, "forward"))
    attack = keys(NEAR, move) if victim == keys(guard) else keys((8, "forward"), move)
    freed = [0, 0]
    while not all(freed):
        n = fight.frame
        fight.step(attack[n] if n < len(attack) else 0, victim[n] if n < len(victim) else 0)
        if health(fight)[1] < 1000:
            freed = [freed[side] or fight.is_free(side) * fight.frame for side in (0, 1)]
    assert freed[1] - freed[0] == advantage


def test_19_mashing_exhausts():
    fight = Fight()
    fight.fighters[1][X] = 368 * 256
    first = None
    while first is None:
        fight.step(INPUTS.index("upper"), 0)
        if fight.fighters[0][MODE] == STUNNED:
            first = fight.frame
    assert first == 256
    assert fight.fighters[0][STAMINA] == 250
    for _ in range(55):
        assert not fight.is_free(0)
        fight.step(INPUTS.index("upper"), 0)
    assert fight.is_free(0)


def frames_at_random(seed, count):
    """Inputs as people press them, each held for some frames; drawn by a rule that no library can change."""
    found = []
    while len(found) < count:
        seed = (6364136223846793005 * seed + 1442695040888963407) % 2**64
        found += [(seed >> 33) % len(INPUTS)] * (1, 1, 4, 12)[(seed >> 60) % 4]
    return found[:count]


def test_20_mirror_symmetry():
    """With sides exchanged, every frame is the same game seen from the other side."""
    for seed in range(20):
        one, two = frames_at_random(2 * seed, 1500), frames_at_random(2 * seed + 1, 1500)
        fight, other = Fight(), Fight()
        for first, second in zip(one, two, strict=True):
            fight.step(first, second)
            other.step(second, first)
            assert fight.seen_by(0) == other.seen_by(1)
            assert fight.seen_by(1) == other.seen_by(0)


def test_20_mirror_symmetry_of_agents():
    """The same agents with the same luck on the other sides: the same health and length."""
    one, two = ScriptedFighter(0.8, 0.2), ScriptedFighter(0.5, 0.1)
    for seed in range(60):
        first = play_fight((one, two), seed)
        other = play_fight((two, one), seed, streams=(1, 0))
        assert (first.health, first.frames) == (other.health[::-1], other.frames)
        assert first.inputs == other.inputs[::-1]


def test_21_the_same_on_every_machine():
    fight = Fight()
    start = fight.state_hash()
    for first, second in zip(frames_at_random(1, 900), frames_at_random(2, 900), strict=True):
        fight.step(first, second)
    assert (start, fight.state_hash()) == ("94b903b2547c2f66", "b70fb3f9e53c2622")
    assert health(fight) == [662, 650]


def test_21_pickled_in_the_middle():
    one, two = frames_at_random(3, 800), frames_at_random(4, 800)
    fight, copies = Fight(), []
    for n, (first, second) in enumerate(zip(one, two, strict=True)):
        if n == 400:
            copies = [pickle.loads(pickle.dumps(fight)), fight.copy()]
        for each in (fight, *copies):
            each.step(first, second)
        assert len({each.state_hash() for each in (fight, *copies)}) == 1
    assert fight.frame == 800


def win_rate(one, two, matches=600):
    """Share that the first wins, a draw half; each seed is played on both sides. Quality and latency in frames."""
    one, two = (ScriptedFighter(quality, frames / 60) for quality, frames in (one, two))
    points = 0.0
    for seed in range(matches // 2):
        for side, agents in enumerate([(one, two), (two, one)]):
            winner = play_fight(agents, seed).winner
            points += 0.5 if winner is None else winner == side
    return points / matches


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "two", "rate"),
    [
        ((0.8, 0), (0.8, 12), 0.87),
        ((0.8, 12), (0.8, 12), 0.47),
        ((0.8, 36), (0.8, 12), 0.23),
        ((0.8, 72), (0.8, 12), 0.01),
        ((0.0, 12), (0.6, 12), 0.24),
        ((1.0, 12), (0.6, 12), 0.62),
        ((0.0, 12), (1.0, 12), 0.13),
        ((0.95, 60), (0.85, 24), 0.14),
        ((0.85, 18), (0.85, 24), 0.65),
        ((0.1, 9), (0.85, 24), 0.11),
    ],
)
def test_structure(one, two, rate):
    """The prototype's rates: four standard errors of both, .02 each."""
    assert win_rate(one, two) == pytest.approx(rate, abs=0.11)
