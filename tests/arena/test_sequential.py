"""The sequential test: what it costs to look after every pair, and what it sees."""

import math

import numpy as np
import pytest
from scipy.integrate import quad

from tenfold.arena import sequential
from tenfold.arena.sequential import judge, log_wealth, unrefuted
from tenfold.errors import ConfigError, DataError

LEVELS = np.array([0, 0.25, 0.5, 0.75, 1])


def running(scores, mean=0.5):
    """W after each pair of many series ``[tournaments, pairs]`` of the scores of `LEVELS`."""
    p = sequential._P
    steps = np.outer(LEVELS / mean, p) + np.outer((1 - LEVELS) / (1 - mean), 1 - p)
    wealth, found = np.ones((len(scores), len(p))), []
    for column in (scores * 4).round().astype(int).T:
        wealth *= steps[column]
        found.append(wealth.mean(1))
    return np.array(found).T


def equals(kind, rng, shape):
    """Pairs of games of two agents that are equal."""
    coin = rng.random(shape)
    one, other = rng.random(shape), rng.random(shape)
    return {
        "coins": ((one < 0.5) * 1.0 + (other < 0.5)) / 2,
        "the seed decides both games": (coin < 0.5) * 1.0,
        "the side decides most games": ((one < 0.8) * 1.0 + (other >= 0.8)) / 2,
        "mostly draws": np.select([coin < 0.1, coin > 0.9], [0.0, 1.0], 0.5),
        "rare great losses, frequent small wins": np.select([coin < 1 / 3], [0.0], 0.75),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "coins",
        "the seed decides both games",
        "the side decides most games",
        "mostly draws",
        "rare great losses, frequent small wins",
    ],
)
def test_equal_agents_are_separated_in_at_most_5_of_100_tournaments_however_often_one_looks(kind):
    scores = equals(kind, np.random.default_rng(0), (2000, 150))
    assert scores.mean() == pytest.approx(0.5, abs=0.005)
    ever = (running(scores) >= 20).any(axis=1)
    assert ever.mean() <= 0.05
    for tournament in (*np.flatnonzero(ever)[:1], *np.flatnonzero(~ever)[:1]):
        finals = [judge(scores[tournament, :n], most=150).better is not None for n in range(1, 151, 7)]
        assert any(finals) <= ever[tournament]


def test_a_test_of_a_fixed_size_would_be_wrong_if_looked_at_after_every_pair():
    """Why there is this one: the usual test at 5 % each time separates equal agents in every third tournament."""
    scores = equals("coins", np.random.default_rng(0), (2000, 150))
    count = np.arange(1, 151)
    z = (scores.cumsum(1) / count - 0.5) / np.sqrt(0.125 / count)
    assert (np.abs(z[:, 5:]) > 1.96).any(axis=1).mean() > 0.3


def test_the_same_agent_twice_on_common_random_numbers_is_never_separated():
    assert judge([0.5] * 400, most=400).better is None


@pytest.mark.parametrize("chance", [0.62, 0.38])
def test_a_real_difference_is_found_on_the_right_side_and_early(chance):
    rng = np.random.default_rng(1)
    scores = rng.binomial(2, chance, (200, 400)) / 2
    path = running(scores)
    found = (path >= 20).any(axis=1)
    assert found.mean() > 0.97
    pairs = (path >= 20).argmax(axis=1)[found] + 1
    assert np.median(pairs) < 150
    verdicts = [judge(row[:n], most=400) for row, n in zip(scores[found], pairs, strict=True)]
    right = [verdict.better == (0 if chance > 0.5 else 1) for verdict in verdicts]
    assert np.mean(right) > 0.99
    assert all(verdict.final for verdict in verdicts)
    assert path[3, 49] == pytest.approx(math.exp(log_wealth(scores[3, :50])), rel=1e-9)


def test_wealth_is_the_integral_over_all_gamblers():
    scores = np.random.default_rng(2).choice(LEVELS, 40)

    def at(angle):
        p = math.cos(angle / 2) ** 2  # uniform in the angle is Dirichlet(1/2, 1/2) in p
        return math.exp(np.log(p * scores / 0.4 + (1 - p) * (1 - scores) / 0.6).sum()) / math.pi

    assert log_wealth(scores, 0.4) == pytest.approx(math.log(quad(at, 0, math.pi)[0]), abs=1e-6)


@pytest.mark.parametrize("mean", [0.2, 0.5, 0.7])
def test_the_bet_is_fair_at_the_true_mean(mean):
    """The mean of W over all series of 4 scores, weighted by their probability, is 1."""
    chance = np.array([1 - mean, 0, 0, 0, mean]) * 0.5 + 0.5 * np.array([0, 1.5 - 2 * mean, 0, 2 * mean - 0.5, 0])
    if mean < 0.25 or mean > 0.75:
        chance = np.array([1 - mean, 0, 0, 0, mean])
    assert chance.sum() == pytest.approx(1)
    assert chance @ LEVELS == pytest.approx(mean)
    grids = np.meshgrid(*[range(5)] * 4, indexing="ij")
    series = np.stack([grid.ravel() for grid in grids], axis=1)
    weights = chance[series].prod(1)
    assert weights @ np.exp(log_wealth(LEVELS[series], mean)) == pytest.approx(1, abs=1e-9)


def test_means_outside_the_interval_are_those_that_are_refuted():
    scores = np.random.default_rng(3).choice([0, 0.5, 1], 60, p=[0.1, 0.3, 0.6])
    low, high = unrefuted(scores)
    means = np.linspace(0.01, 0.99, 197)
    wealth = np.array([log_wealth(scores, mean) for mean in means])
    assert [low < mean < high for mean in means] == (wealth < math.log(20)).tolist()
    assert low < scores.mean() < high
    assert unrefuted(1 - scores) == pytest.approx((1 - high, 1 - low), abs=1e-6)
    assert unrefuted(scores, 0.001)[0] < low
    assert unrefuted([1.0, 1.0])[1] == 1.0
    assert unrefuted([0.0])[0] == 0.0


def test_the_true_mean_leaves_the_interval_in_at_most_5_of_100_series():
    scores = np.random.default_rng(4).choice(LEVELS, (400, 100), p=[0.05, 0.1, 0.15, 0.3, 0.4])
    true = float(np.array([0.05, 0.1, 0.15, 0.3, 0.4]) @ LEVELS)
    assert (running(scores, true) >= 20).any(axis=1).mean() <= 0.05


def test_seven_clean_sweeps_separate_and_six_do_not():
    assert [judge([1.0] * n, most=50).better for n in (6, 7)] == [None, 0]
    assert [judge([0.0] * n, most=50).better for n in (6, 7)] == [None, 1]
    assert judge([1.0] * 7, most=50, level=0.01).better is None


def test_what_is_said():
    assert judge([0.0] * 9, most=50).text("a", "b").startswith("b is better than a (9 pairs, 1.00 of the points")
    assert judge([1, 0], most=2).text("a", "b").startswith("cannot separate a and b (2 pairs, 0.50")
    assert judge([1, 0], most=3).text("a", "b").startswith("not separated yet: a and b")
    empty = judge([], most=3)
    assert (empty.better, empty.final, empty.score) == (None, False, None)
    assert empty.text("a", "b") == "a and b: no games that count"


@pytest.mark.parametrize(
    ("scores", "keys", "kind", "message"),
    [
        ([0.5], {"most": 0}, ConfigError, "most: 0"),
        ([0.5], {"most": 5, "level": 1.0}, ConfigError, r"level: 1\.0"),
        ([0.5, 1.5], {"most": 5}, DataError, "scores"),
        ([float("nan")], {"most": 5}, DataError, "scores"),
    ],
)
def test_what_cannot_be_meant(scores, keys, kind, message):
    with pytest.raises(kind, match=message):
        judge(scores, **keys)
