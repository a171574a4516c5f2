"""Preference labels made wrong on purpose, in the ways that people are: noise whose truth is known.

Each noise model says of every pair whether its label is flipped: a flip mask, which is stored with the data. What is
drawn for a pair comes from the seed and the pair's id alone, so neither the order of rows nor their number changes it
(but for `irrational` and `uniform`, which choose among all pairs given).

Source: R3M specification, section 4 (noise models) and section 5, item 6.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tenfold.data.forms import as_flag
from tenfold.data.groups import hash_share
from tenfold.data.read import Rows
from tenfold.data.rows import Preference
from tenfold.errors import ConfigError, DataError
from tenfold.files import write_text

BATCH = 64
"""Pairs of the mini-batch of `irrational`: the paper's shares (6.25 % at p = 1/3) hold for this one."""


class StepRewards(NamedTuple):
    """True rewards of the steps of two answers, first step first; the answers may have different numbers of steps."""

    chosen: tuple[float, ...]
    rejected: tuple[float, ...]

    @property
    def gap(self) -> float:
        """True return of ``chosen`` minus that of ``rejected``; above 0 where the label is right."""
        return sum(self.chosen) - sum(self.rejected)


def stochastic(ids: Sequence[str], rewards: Sequence[StepRewards], tau: float, *, seed: int) -> list[bool]:
    """An annotator who errs the more, the nearer the answers are: ``P(label) = sigma(gap / tau)``.

    Args:
        ids: of the pairs, [pairs].
        rewards: of the pairs, [pairs].
        tau: above 0, in units of reward; the paper has 1, 2 and 3. Towards 0 the label is the true one; a pair whose
            returns are equal gets either label.
        seed: of the draws.

    Returns:
        Which labels are flipped, [pairs].

    Raises:
        ConfigError: ``tau`` is not above 0.
        DataError: the lengths differ, or an id comes twice.

    >>> stochastic(["a", "b"], [StepRewards((1, 1), (0, 0)), StepRewards((0,), (1,))], 1e-9, seed=0)
    [False, True]
    """
    if not tau > 0:
        raise ConfigError(f"tau: {tau} is not above 0", remedy="give a temperature such as 1, 2 or 3")
    _check(ids, rewards)
    return [_drawn("stochastic", seed, id) >= _sigmoid(pair.gap / tau) for id, pair in zip(ids, rewards, strict=True)]


def myopic(rewards: Sequence[StepRewards], gamma: float) -> list[bool]:
    """An annotator who forgets: compares ``sum over t of gamma**(m - t) * r_t``, so that late steps weigh most.

    Args:
        rewards: of the pairs, [pairs].
        gamma: above 0 and at most 1; the paper has 0.3, 0.5 and 0.7. The smaller, the noisier; 1 gives the true label.

    Returns:
        Which labels are flipped, [pairs]; a label stays where both answers seem equally good.

    Raises:
        ConfigError: ``gamma`` is out of its range.

    >>> early_slips, late_slip = (0.0, 0.0, 1.0), (1.0, 1.0, 0.0)
    >>> myopic([StepRewards(late_slip, early_slips)] * 2, 0.5), myopic([StepRewards(late_slip, early_slips)], 1.0)
    ([True, True], [False])
    """
    if not 0 < gamma <= 1:
        raise ConfigError(f"gamma: {gamma} is not above 0 and at most 1", remedy="give a discount such as 0.5")

    def seen(steps: tuple[float, ...]) -> float:
        return sum(gamma ** (len(steps) - number) * reward for number, reward in enumerate(steps, start=1))

    return [seen(pair.chosen) < seen(pair.rejected) for pair in rewards]


def irrational(
    ids: Sequence[str], rewards: Sequence[StepRewards], p: float, *, seed: int, batch: int = BATCH
) -> list[bool]:
    """An adversary: in each mini-batch B, the ``round(|B|**p)`` pairs with the largest true gap are flipped.

    Batches are drawn by the seed, over all pairs given; among equal gaps the seed decides. The last batch may be
    smaller, and its number of flips with it.

    Args:
        ids: of the pairs, [pairs].
        rewards: of the pairs, [pairs], whose labels are right.
        p: above 0 and at most 1; the paper has 1/3, 1/2 and 2/3: 4, 8 and 16 flips of 64 pairs.
        seed: of the batches.
        batch: pairs of a batch.

    Returns:
        Which labels are flipped, [pairs].

    Raises:
        ConfigError: ``p`` or ``batch`` is out of its range.
        DataError: the lengths differ, or an id comes twice.

    >>> sum(irrational([str(n) for n in range(64)], [StepRewards((n,), (0,)) for n in range(64)], 1 / 3, seed=0))
    4
    """
    if not 0 < p <= 1:
        raise ConfigError(f"p: {p} is not above 0 and at most 1", remedy="give a power such as 1/3, 1/2 or 2/3")
    if batch < 1:
        raise ConfigError(f"batch: {batch} is below 1", remedy=f"give the pairs of a mini-batch, as a rule {BATCH}")
    _check(ids, rewards)
    order = _shuffled("irrational", ids, seed)
    flips = set()
    for first in range(0, len(order), batch):
        members = order[first : first + batch]
        # The sort is stable: equal gaps stay in the drawn order.
        members.sort(key=lambda index: -abs(rewards[index].gap))
        flips.update(members[: round(len(members) ** p)])
    return [index in flips for index in range(len(ids))]


def uniform(ids: Sequence[str], share: float, *, seed: int) -> list[bool]:
    """Labels flipped at random: exactly ``round(share * pairs)`` of them.

    Args:
        ids: of the pairs, [pairs].
        share: from 0 to 1.
        seed: of the choice.

    Returns:
        Which labels are flipped, [pairs]; with a larger share, the same ones and more.

    Raises:
        ConfigError: ``share`` is out of its range.
        DataError: an id comes twice.

    >>> sum(uniform([str(n) for n in range(50)], 0.1, seed=0))
    5
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"share: {share} is not between 0 and 1", remedy="give a share such as 0.1")
    _check(ids, ids)
    flips = set(_shuffled("uniform", ids, seed)[: round(share * len(ids))])
    return [index in flips for index in range(len(ids))]


def corrupt(rows: Sequence[Preference], mask: Sequence[bool]) -> list[Preference]:
    """The rows with the chosen labels flipped: chosen and rejected change places, ids stay.

    Args:
        rows: [pairs].
        mask: which to flip, [pairs]; the same mask once more gives the rows back.

    Raises:
        DataError: the lengths differ.

    >>> [(row.chosen, row.rejected) for row in corrupt([Preference("1", "p", "good", "bad")], [True])]
    [('bad', 'good')]
    """
    _check_lengths(len(rows), len(mask), "flags")
    return [flipped(row) if flip else row for row, flip in zip(rows, mask, strict=True)]


def flipped(row: Preference) -> Preference:
    """The pair with the other label."""
    answers = None if row.answers is None else row.answers[::-1]
    return replace(row, chosen=row.rejected, rejected=row.chosen, answers=answers)


def write_corrupted(path: Path, rows: Sequence[Preference], mask: Sequence[bool]) -> None:
    """Write corrupted rows as JSON lines, with the mask beside them as the column ``flipped``.

    Args:
        path: of the file; written whole or not at all.
        rows: the right ones, [pairs].
        mask: which labels to flip, [pairs].

    Raises:
        DataError: the lengths differ.
        OSError: the file cannot be written.
    """
    lines = [
        json.dumps({**row.columns(), "flipped": flip}, ensure_ascii=False)
        for row, flip in zip(corrupt(rows, mask), mask, strict=True)
    ]
    write_text(path, "".join(line + "\n" for line in lines))


def flip_mask(rows: Rows) -> dict[str, bool]:
    """The mask that is stored with corrupted rows: row id -> whether its label was flipped.

    Args:
        rows: preferences with the column ``flipped``: true or false, or 1 or 0.

    Raises:
        DataError: a row has none.
    """
    return {row.id: _flag(rows, index) for index, row in enumerate(rows)}


def true_rewards(rows: Rows) -> dict[str, StepRewards]:
    """True rewards per step, where the data has them: the columns ``chosen_rewards`` and ``rejected_rewards``.

    Args:
        rows: preferences; those of ``step-audit`` have them.

    Returns:
        Row id -> rewards.

    Raises:
        DataError: no list of numbers in one of the columns.

    >>> from tenfold.data.read import read_rows
    >>> true_rewards(read_rows("step-audit:1"))["step-audit-0-0"].gap > 0
    True
    """
    return {
        row.id: StepRewards(_numbers(rows, index, "chosen_rewards"), _numbers(rows, index, "rejected_rewards"))
        for index, row in enumerate(rows)
    }


def _flag(rows: Rows, index: int) -> bool:
    found = as_flag(rows.others[index].get("flipped"))
    if found is None:
        raise _unusable(rows, index, "flipped", "true or false", "mend the column, or leave it out of all rows")
    return found


def _numbers(rows: Rows, index: int, column: str) -> tuple[float, ...]:
    value = rows.others[index].get(column)
    good = isinstance(value, list) and value
    if not good or any(isinstance(item, bool) or not isinstance(item, int | float) for item in value or ()):
        raise _unusable(
            rows,
            index,
            column,
            "a list of numbers, the true reward of each step",
            "add it, or use a noise model that needs no rewards (uniform)",
        )
    return tuple(float(item) for item in value or ())


def _unusable(rows: Rows, index: int, column: str, wanted: str, remedy: str) -> DataError:
    found = rows.others[index].get(column)
    return DataError(
        f"{rows.source}, row {rows[index].id!r}, column {column!r}: {found!r}, expected {wanted}", remedy=remedy
    )


def _check(ids: Sequence[str], rewards: Sequence[Any]) -> None:
    _check_lengths(len(ids), len(rewards), "rewards")
    if len(set(ids)) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise DataError(f"id {twice!r} comes twice", remedy="give each pair an id of its own")


def _check_lengths(pairs: int, others: int, what: str) -> None:
    if pairs != others:
        raise DataError(f"{pairs} pairs and {others} {what}", remedy="give one for each pair, in the same order")


def _drawn(kind: str, seed: int, id: str) -> float:
    """A number in [0, 1) that is this pair's alone."""
    return hash_share(f"{kind}|{seed}|{id}")


def _shuffled(kind: str, ids: Sequence[str], seed: int) -> list[int]:
    """Indices in an order that depends on seed and ids, and not on the order of the ids."""
    return sorted(range(len(ids)), key=lambda index: (_drawn(kind, seed, ids[index]), ids[index]))


def _sigmoid(x: float) -> float:
    # By tanh, since exp overflows for a small tau.
    return 0.5 * (1 + math.tanh(x / 2))
