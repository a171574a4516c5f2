"""How well a score finds what is known to be wrong: the area under the ROC curve, and precision at the top."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from scipy.stats import rankdata

from tenfold.errors import ConfigError, DataError


def roc_auc(scores: Sequence[float], mask: Sequence[bool]) -> float:
    """The probability that a marked item scores above one that is not marked; equal scores count half.

    Args:
        scores: higher is more suspicious, [items].
        mask: which items are truly wrong, [items].

    Returns:
        0 to 1; 0.5 is chance.

    Raises:
        DataError: the lengths differ, a score is NaN, or all items are of one kind.

    >>> roc_auc([3.0, 1.0, 1.0, 0.0], [True, True, False, False])
    0.875
    """
    _check(scores, mask)
    wrong = sum(map(bool, mask))
    right = len(mask) - wrong
    if not wrong or not right:
        raise DataError(
            f"{wrong} of {len(mask)} items are marked, so there is nothing to tell apart",
            remedy="give some that are and some that are not",
        )
    ranks = rankdata(scores)  # Mann and Whitney's U from the sum of the marked ones' ranks; ties share theirs
    marked = sum(float(rank) for rank, mark in zip(ranks, mask, strict=True) if mark)
    return (marked - wrong * (wrong + 1) / 2) / (wrong * right)


def precision_at(scores: Sequence[float], mask: Sequence[bool], k: int) -> float:
    """Which share of the ``k`` items of highest score is marked.

    Where the cut goes through items of equal score, it is the mean over all ways to choose among them: the order of the
    items does not matter.

    Args:
        scores: higher is more suspicious, [items].
        mask: which items are truly wrong, [items].
        k: 1 to the number of items.

    Raises:
        ConfigError: ``k`` is out of its range.
        DataError: the lengths differ, or a score is NaN.

    >>> precision_at([3.0, 1.0, 1.0, 0.0], [True, True, False, False], 2)
    0.75
    """
    _check(scores, mask)
    if not 1 <= k <= len(scores):
        raise ConfigError(f"k: {k} is not between 1 and {len(scores)}", remedy="give how many of the items to look at")
    hits, room = 0.0, k
    pairs = sorted(zip(scores, map(bool, mask), strict=True), key=lambda pair: pair[0], reverse=True)
    for _, group in groupby(pairs, key=lambda pair: pair[0]):
        tied = [mark for _, mark in group]
        taken = min(room, len(tied))
        hits += sum(tied) * taken / len(tied)
        room -= taken
        if not room:
            break
    return hits / k


def _check(scores: Sequence[float], mask: Sequence[bool]) -> None:
    if len(scores) != len(mask):
        raise DataError(f"{len(scores)} scores and {len(mask)} marks", remedy="give one mark for each score")
    if any(score != score for score in scores):
        raise DataError("a score is NaN and has no place in a ranking", remedy="leave such items out")
