"""Ratings beyond their oracles: what the intervals hold, what is refused, what is said besides."""

import numpy as np
import pytest
from scipy.optimize import minimize

from tenfold.arena.ratings import (
    SeedPair,
    bradley_terry,
    intransitive,
    rate,
    standard_errors,
    wins_matrix,
)
from tenfold.core.statistics import t_quantile, wilson
from tenfold.errors import ConfigError, DataError


def random_wins(seed, agents=5):
    return np.random.default_rng(seed).integers(1, 30, (agents, agents)).astype(float)


@pytest.mark.parametrize("ridge", [0.0, 0.01, 3.0])
def test_strengths_are_where_a_general_optimiser_finds_them(ridge):
    wins = random_wins(0)
    np.fill_diagonal(wins, 0)

    def loss(theta):
        return ridge / 2 * (theta**2).sum() + sum(
            wins[i, j] * np.log1p(np.exp(theta[j] - theta[i])) for i in range(5) for j in range(5)
        )

    right = minimize(loss, np.zeros(5), tol=1e-12).x
    assert bradley_terry(wins, ridge=ridge) == pytest.approx(right - right.mean(), abs=1e-5)


def test_strengths_do_not_depend_on_the_order_of_agents_and_count_draws_half():
    wins, order = random_wins(1), [3, 0, 4, 1, 2]
    assert bradley_terry(wins[np.ix_(order, order)]) == pytest.approx(bradley_terry(wins)[order], abs=1e-9)
    pairs = [SeedPair("a", "b", 0, 0.5), SeedPair("b", "a", 1, 0.25), SeedPair("a", "b", 2, 1)]
    assert wins_matrix(pairs, ["a", "b"]).tolist() == [[0, 4.5], [1.5, 0]]


OVERSHOOTING = [  # a whole step of Newton's method leads away from the solution here
    [0, 0, 0, 0, 0, 2],
    [0, 0, 12, 0, 8, 4],
    [0, 83321, 0, 0, 0, 0],
    [507, 14323, 0, 0, 97289, 0],
    [1, 0, 90, 46, 0, 2],
    [0, 0, 107, 0, 0, 0],
]


@pytest.mark.parametrize("wins", [[[0, 1000], [0, 0]], [[0, 1e6, 0], [1, 0, 1e6], [0, 1, 0]], OVERSHOOTING])
def test_one_sided_results_still_converge(wins):
    strengths, wins = bradley_terry(wins, ridge=1e-3), np.array(wins, float)
    won = 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))
    slope = (wins - (wins + wins.T) * won).sum(1) - 1e-3 * strengths
    assert np.abs(slope).max() < 1e-6


def test_errors_are_the_spread_of_strengths_over_repeated_tournaments():
    true, rng = np.array([0.6, 0.0, -0.6]), np.random.default_rng(0)
    chance = 1 / (1 + np.exp(true[None, :] - true[:, None]))
    found = []
    for _ in range(300):
        won = np.triu(rng.binomial(100, chance), 1)
        found.append(bradley_terry(won + np.tril(100 - won.T, -1)))
    expected = np.triu(100 * chance, 1) + np.tril(100 * chance, -1)
    errors = standard_errors(true, expected)
    assert np.std(found, 0) == pytest.approx(errors, rel=0.12)


def games(rng, chances, seeds, names="abc"):
    """Two independent games a seed and pair; ``chances[one, other]`` is the first's."""
    return [
        SeedPair(names[i], names[j], seed, float(rng.binomial(2, chances[i, j])) / 2)
        for seed in range(seeds)
        for i, j in zip(*np.triu_indices(len(chances), 1), strict=True)
    ]


def test_intervals_hold_the_truth_in_about_95_of_100_tournaments():
    true, rng = np.array([0.5, 0.0, -0.5]), np.random.default_rng(1)
    chance = 1 / (1 + np.exp(true[None, :] - true[:, None]))
    inside = []
    for _ in range(150):
        ratings = rate(games(rng, chance, 60), draws=200)
        right = dict(zip("abc", true, strict=True))
        inside += [low < right[name] < high for name, (low, high) in zip(ratings.names, ratings.intervals, strict=True)]
    assert 0.91 < np.mean(inside) < 0.985


def test_what_happens_on_one_seed_is_one_observation():
    """Whoever a seed favours wins all its games there: the same wins as from independent games, but known less well.

    And where a side decides each game, swapping sides leaves nothing uncertain, however many games there were.
    """
    rng, names = np.random.default_rng(2), "abcd"
    lucky, sides = [], []
    for seed in range(60):
        favour = rng.permutation(4)
        for i in range(4):
            for j in range(i + 1, 4):
                lucky.append(SeedPair(names[i], names[j], seed, float(favour[i] > favour[j])))
                sides.append(SeedPair(names[i], names[j], seed, 0.5))
    elsewhere = [SeedPair(pair.first, pair.second, number, pair.score) for number, pair in enumerate(lucky)]
    lucky, alone, sides = (rate(pairs, draws=400) for pairs in (lucky, elsewhere, sides))
    widths = [np.mean([high - low for low, high in found.intervals]) for found in (lucky, alone, sides)]
    assert widths[0] == pytest.approx((5 / 3) ** 0.5 * widths[1], rel=0.1)  # variances of a place, and of three coins
    assert widths[2] == pytest.approx(0, abs=1e-9)
    assert lucky.errors == alone.errors  # the curvature cannot know
    assert sides.ranks == ((1, 4),) * 4


def test_the_same_games_have_the_same_ratings():
    pairs = games(np.random.default_rng(3), np.full((3, 3), 0.6), 20)
    assert rate(pairs) == rate(pairs)
    assert rate(pairs).strengths == pytest.approx(rate(pairs[::-1], ["c", "a", "b"]).strengths, abs=1e-9)


def test_places_are_told_as_far_as_they_are_known():
    rng = np.random.default_rng(4)
    chance = np.array([[0, 0.5, 0.9], [0, 0, 0.9], [0, 0, 0]])
    ratings = rate(games(rng, chance, 60))
    assert ratings.ranks == ((1, 2), (1, 2), (3, 3))
    assert set(ratings.names[:2]) == {"a", "b"}
    table = ratings.table()
    assert [row[1] for row in table.rows] == ["1 to 2, cannot separate", "1 to 2, cannot separate", "3"]
    assert [row[5] for row in table.rows] == [240, 240, 240]
    assert "seeds drawn anew" in table.columns[3]
    # One interval a row: that of the strength. Shares have theirs where two are compared.
    assert [row[4] for row in table.rows] == pytest.approx([sum(row) / 240 for row in ratings.wins], abs=1e-3)
    figure = ratings.matrix()
    worst = figure.series[2]
    assert worst.name == "c"
    assert worst.y[2] is None
    assert worst.y[0] < 0.25


def test_of_many_equal_agents_hardly_ever_any_two_are_separated():
    rng, names = np.random.default_rng(5), "abcdef"
    found = [rate(games(rng, np.full((6, 6), 0.5), 30, names), draws=400).ranks == ((1, 6),) * 6 for _ in range(25)]
    assert np.mean(found) >= 0.84  # 95 % less two standard deviations


def test_few_seeds_separate_nobody_and_a_clean_sweep_is_not_certainty():
    def won(seeds):
        return rate([SeedPair("a", "b", seed, 1.0) for seed in range(seeds)])

    assert won(5).ranks == ((1, 2), (1, 2))
    assert "5 seeds cannot separate anyone" in " ".join(won(5).notes)
    assert won(6).ranks == ((1, 1), (2, 2))
    low, high = won(6).intervals[0]
    assert high - low > 2
    assert "a won every game" in won(6).notes[0]
    assert "b lost every game" in won(6).notes[1]


def test_intransitive_results_are_warned_of_and_chance_is_not():
    names = ["rock", "scissors", "paper", "stone"]
    pairs = [
        SeedPair(names[i], names[(i + 1) % 3], seed, 1.0 if seed % 5 else 0.5) for i in range(3) for seed in range(30)
    ]
    pairs += [SeedPair("stone", "rock", seed, 0.5 + 0.5 * (-1) ** seed) for seed in range(30)]
    ratings = rate(pairs, names)
    assert ratings.cycles == (("rock", "scissors", "paper"),)
    assert ratings.matrix().caption == ""  # notes are told once, by the stage
    assert ratings.notes[0].startswith("intransitive: rock beats scissors beats paper beats rock")
    even = np.array([[0, 25, 15], [15, 0, 25], [25, 15, 0]])  # each may be chance
    assert intransitive(even) == []
    assert intransitive(np.triu(np.full((4, 4), 40))) == []
    ring = np.zeros((5, 5))
    for i in range(5):
        ring[i, (i + 1) % 5] = 40
    assert intransitive(ring) == [[0, 1, 2, 3, 4]]
    ring[0, 2] = 40  # a way past one of them
    assert sorted(intransitive(ring)[0]) == [0, 2, 3, 4]


@pytest.mark.parametrize(
    ("wins", "message"),
    [
        ([[0, 1], [1, 0], [1, 1]], "wins"),
        ([[0, -1], [1, 0]], "wins"),
        ([[0, np.nan], [1, 0]], "wins"),
        ([[0, 2, 0], [1, 0, 0], [0, 0, 0]], "a, b; c"),
    ],
)
def test_matrices_that_cannot_be_rated(wins, message):
    with pytest.raises(DataError, match=message):
        bradley_terry(wins, names=["a", "b", "c"])


def test_without_a_ridge_an_infinite_strength_is_refused_by_name():
    for wins, message in (
        ([[0, 4], [0, 0]], "a never lost|b never won"),
        ([[0, 3, 0], [3, 0, 0], [2, 0, 0]], "c never lost|a, b never won"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            bradley_terry(wins, ridge=0, names=["a", "b", "c"])
        assert "ridge above 0" in caught.value.remedy


def test_pairs_and_settings_that_cannot_be_meant():
    with pytest.raises(DataError, match=r"a - b, seed 4: score 1\.5"):
        SeedPair("a", "b", 4, 1.5)
    with pytest.raises(ConfigError, match="a plays against itself"):
        SeedPair("a", "a", 0, 0.5)
    pair = SeedPair("a", "b", 0, 0.5)
    for names, ridge in ((["a"], 0.01), (["a", "a", "b"], 0.01), (None, 0.0), (None, -1.0)):
        with pytest.raises(ConfigError):
            rate([pair], names, ridge=ridge)
    with pytest.raises(ConfigError, match="ridge: nan"):
        bradley_terry([[0, 1], [1, 0]], ridge=float("nan"))
    with pytest.raises(DataError, match="a, b; c"):
        rate([pair], ["a", "b", "c"])


def test_wilson_at_its_ends():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 10)[0] == pytest.approx(0, abs=1e-15)
    assert wilson(10, 10) == pytest.approx((1 - wilson(0, 10)[1], 1.0))
    low, high = wilson(2.5, 10)
    z2 = t_quantile(10**9) ** 2
    for end in (low, high):  # where the score test is just at its limit
        assert (0.25 - end) ** 2 == pytest.approx(z2 * end * (1 - end) / 10, rel=1e-6)
