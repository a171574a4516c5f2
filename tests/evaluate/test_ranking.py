"""Area under the curve and precision, against counting every pair and every order."""

from __future__ import annotations

import itertools
import random

import pytest

from tenfold.errors import ConfigError, DataError
from tenfold.evaluate.ranking import precision_at, roc_auc


def brute_auc(scores, mask):
    wrong = [score for score, mark in zip(scores, mask, strict=True) if mark]
    right = [score for score, mark in zip(scores, mask, strict=True) if not mark]
    won = sum((a > b) + 0.5 * (a == b) for a in wrong for b in right)
    return won / (len(wrong) * len(right))


def brute_precision(scores, mask, k):
    """The mean over all orders that respect the scores."""
    orders = itertools.permutations(range(len(scores)))
    right = (order for order in orders if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)))
    found = [sum(mask[index] for index in order[:k]) / k for order in right]
    return sum(found) / len(found)


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_auc_is_the_count_of_pairs_also_with_ties(levels):
    rng = random.Random(levels)
    for size in (2, 3, 20, 150):
        scores = [float(rng.randrange(levels)) for _ in range(size)]
        mask = [True, False, *(rng.random() < 0.3 for _ in range(size - 2))]
        assert roc_auc(scores, mask) == pytest.approx(brute_auc(scores, mask), abs=1e-12)
        assert roc_auc([-score for score in scores], mask) == pytest.approx(1 - brute_auc(scores, mask), abs=1e-12)


def test_precision_is_the_mean_over_ties():
    rng = random.Random(0)
    for _ in range(12):
        scores = [float(rng.randrange(3)) for _ in range(6)]
        mask = [rng.random() < 0.5 for _ in range(6)]
        for k in range(1, 7):
            assert precision_at(scores, mask, k) == pytest.approx(brute_precision(scores, mask, k), abs=1e-12)


def test_order_does_not_matter():
    scores, mask = [0.0] * 50 + [1.0] * 10, [True] * 20 + [False] * 35 + [True] * 5
    both = list(zip(scores, mask, strict=True))
    random.Random(1).shuffle(both)
    shuffled = tuple(zip(*both, strict=True))
    assert roc_auc(*shuffled) == pytest.approx(roc_auc(scores, mask))
    assert precision_at(*shuffled, 30) == pytest.approx(precision_at(scores, mask, 30))


def test_bad_input():
    with pytest.raises(DataError, match="2 scores and 1 marks"):
        roc_auc([1.0, 2.0], [True])
    with pytest.raises(DataError, match="0 of 2 items are marked"):
        roc_auc([1.0, 2.0], [False, False])
    with pytest.raises(DataError, match="2 of 2 items are marked"):
        roc_auc([1.0, 2.0], [True, True])
    with pytest.raises(DataError, match="NaN"):
        precision_at([1.0, float("nan")], [True, False], 1)
    for k in (0, 3):
        with pytest.raises(ConfigError, match=f"k: {k} is not between 1 and 2"):
            precision_at([1.0, 2.0], [True, False], k)
