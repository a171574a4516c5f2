"""The oracles of the specification of the arenas, section 7.5, in its order."""

import numpy as np
import pytest

from tenfold.arena.ratings import bradley_terry, comparison_groups, elo
from tenfold.core.statistics import wilson
from tenfold.errors import DataError

THREE = [[0, 25, 30], [15, 0, 22], [10, 18, 0]]
NAMES = ["14B", "14B-8bit", "32B", "4B", "4B-8bit", "8B", "8B-8bit", "32B again", "32B-8bit"]
WINS = {
    ("14B", "14B-8bit"): (15, 25),
    ("14B", "32B"): (22, 18),
    ("14B", "4B"): (24, 16),
    ("14B", "8B"): (19, 0),
    ("4B", "4B-8bit"): (8, 32),
    ("4B", "8B"): (0, 33),
    ("8B", "8B-8bit"): (25, 15),
    ("32B again", "32B-8bit"): (30, 10),
}


def readme():
    wins = np.zeros((9, 9))
    for (one, other), (won, lost) in WINS.items():
        wins[NAMES.index(one), NAMES.index(other)] = won
        wins[NAMES.index(other), NAMES.index(one)] = lost
    return wins


def test_22_thirty_to_ten():
    high, low = bradley_terry([[0, 30], [10, 0]], ridge=0)
    assert high - low == pytest.approx(1.098612, abs=1e-6)


@pytest.mark.parametrize(
    ("ridge", "strengths"),
    [(0, (0.52878, -0.10595, -0.42283)), (0.01, (0.52857, -0.10591, -0.42266)), (1, (0.50882, -0.10192, -0.4069))],
)
def test_23_three_agents(ridge, strengths):
    assert bradley_terry(THREE, ridge=ridge) == pytest.approx(strengths, abs=6e-6)


@pytest.mark.parametrize(("games", "rating"), [("WWW", 1543.747), ("WWL", 1511.747), ("LWW", 1517.334)])
def test_24_elo_depends_on_the_order(games, rating):
    ratings = {}
    for game in games:
        ratings = elo(ratings, "a", "b", float(game == "W"))
    assert ratings["a"] == pytest.approx(rating, abs=5e-4)
    assert sum(ratings.values()) == 3000


def test_25_the_published_table_is_two_tables():
    wins = readme()
    with pytest.raises(DataError, match="2 groups of agents never met") as caught:
        bradley_terry(wins, names=NAMES)
    assert "14B, 14B-8bit, 32B, 4B, 4B-8bit, 8B, 8B-8bit; 32B again, 32B-8bit" in str(caught.value)
    found = {}
    for group in comparison_groups(wins):
        strengths = bradley_terry(wins[np.ix_(group, group)], ridge=0.01)
        found |= {NAMES[index]: value for index, value in zip(group, strengths, strict=True)}
    right = (0.3150, 0.8249, 0.1142, -1.0911, 0.2947, 0.0263, -0.4840, 0.5489, -0.5489)
    assert [found[name] for name in NAMES] == pytest.approx(right, abs=6e-5)


@pytest.mark.parametrize(("won", "interval"), [(29, (0.572, 0.839)), (31, (0.625, 0.877))])
def test_26_wilson(won, interval):
    assert wilson(won, 40) == pytest.approx(interval, abs=5e-4)
