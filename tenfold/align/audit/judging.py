r"""Which preference labels to doubt, and how many of the doubts are more than chance.

A pair is flagged where the model gives its label less than ``1 - lam`` (its margin lies below the kink of the R3M
loss). Clean labels are flagged, too, now and then; what goes beyond their expected number estimates the wrong ones.

What to do with a pair is read from the probability that its label is wrong. With the margin's temperature T and the
share e of flipped labels, the most likely ones (`tenfold.align.recalibrate`), let p be sigma(m / T), what
the model thinks of the label by itself. By Bayes' rule

.. math:: P(\text{wrong}) = \frac{e (1 - p)}{e (1 - p) + (1 - e) p}

Where the 95 % interval of e begins at 0, e is 0.

=========== ============================= ===================================================================
suggestion  when                          why
=========== ============================= ===================================================================
``keep``    none of the others            the model does not contradict the label
``review``  flagged, sigma(m) below 0.5   more likely right than wrong: only a look can tell
``drop``    P(wrong) from 0.5             kept or flipped, it would be wrong too often
``flip``    P(wrong) from 0.9             nine of ten flips mend a label
=========== ============================= ===================================================================

Flags and their excess take the margins at their word, as the specification has it: a model that is too sure has too
many. The probabilities do not; but a model that has memorised wrong labels hides them from both. Margins of
`tenfold.align.margins.cross_fit` are free of that.

Source: R3M specification, sections 2.7 and 8.4; the probability that a label is wrong, and the suggestions, are ours.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tenfold.align.preferences import flipped
from tenfold.align.r3m.losses import expected_flags, perturbation
from tenfold.align.recalibrate import recalibrate, wrong_interval
from tenfold.data.forms import exchanged
from tenfold.data.read import Rows
from tenfold.data.rows import Preference, Row
from tenfold.data.write import as_cell
from tenfold.errors import ConfigError, DataError
from tenfold.files import write_text

Suggestion = Literal["keep", "review", "drop", "flip"]
Action = Literal["drop", "flip", "weights"]

DROP, FLIP = 0.5, 0.9
"""Probabilities of a wrong label from which a pair should go, and from which its label should be flipped."""

_NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Verdict:
    """What is known of one pair.

    Args:
        id: of the row.
        margin: reward of ``chosen`` minus that of ``rejected``.
        p_label: the probability that the model gives to the label, sigma(margin).
        delta: by how much the margin had to be raised for the label to count as plausible; 0 where it is.
        rank: 1 for the most doubtful pair; by margin, among equals by id.
        flagged: whether delta is above 0.
        p_wrong: the probability that the label is wrong; see the head of this file.
        suggestion: what to do with the pair.
        epoch_margin: its mean margin in training, each from before that step, in training mode; None where the model
            was not just trained. A pair that was memorised late has a low one.
    """

    id: str
    margin: float
    p_label: float
    delta: float
    rank: int
    flagged: bool
    p_wrong: float
    suggestion: Suggestion
    epoch_margin: float | None = None

    @property
    def suspect(self) -> bool:
        """Whether the label is more likely wrong than right."""
        return self.suggestion in ("drop", "flip")


@dataclass(frozen=True)
class Audit:
    """All verdicts, and how many of the flags are more than chance.

    Args:
        lam: the level at which pairs were flagged, per sample.
        verdicts: in the order of the margins given.
        flags: flagged pairs.
        expected: flags that clean labels would give at these margins, in expectation.
        expected_stderr: standard deviation of that number of flags.
        excess: ``flags - expected``, the estimate of wrong labels among the flagged; chance can bring it below 0.
        interval: its 95 % interval, for a calibrated model; with 0 inside, the flags may all be chance.
        share_wrong: most likely share of flipped labels, 0 to 0.5.
        share_interval: its 95 % interval.
        temperature: by which the margins are divided; above 1 they were too large.
    """

    lam: float
    verdicts: tuple[Verdict, ...]
    flags: int
    expected: float
    expected_stderr: float
    excess: float
    interval: tuple[float, float]
    share_wrong: float
    share_interval: tuple[float, float]
    temperature: float

    def count(self, suggestion: Suggestion) -> int:
        """How many pairs have this suggestion."""
        return sum(verdict.suggestion == suggestion for verdict in self.verdicts)


def audit(
    margins: Tensor | Sequence[float], ids: Sequence[str], lam: float, epochs: Mapping[str, float] | None = None
) -> Audit:
    """Judge every pair by its margin.

    Args:
        margins: of the pairs, [pairs], in units of reward.
        ids: of the pairs, [pairs].
        lam: as of the R3M loss, above 0 and below 1: a pair is flagged where the model gives its label less than
            ``1 - lam``.
        epochs: mean margins in training, by id, to stand beside the others; they judge nothing.

    Raises:
        ConfigError: ``lam`` is out of its range.
        DataError: the lengths differ, an id comes twice, there are no pairs, or a margin is not finite.

    >>> found = audit([3.0, -5.0, 0.5], ["a", "b", "c"], lam=0.85)
    >>> [(verdict.id, verdict.rank, verdict.flagged) for verdict in found.verdicts]
    [('a', 3, False), ('b', 1, True), ('c', 2, False)]
    """
    m = torch.as_tensor(margins, dtype=torch.float64)
    _check(m, ids, lam)
    delta = perturbation(m, lam)
    flagged = delta > 0
    flags = int(flagged.sum())
    expected, stderr = (float(value) for value in expected_flags(m, lam))
    excess = flags - expected
    interval = (excess - _NORMAL_95 * stderr, excess + _NORMAL_95 * stderr)
    best = recalibrate(m, flips=True)
    share_interval = wrong_interval(m, best)
    _, temperature, share = best if share_interval[0] > 0 else recalibrate(m, flips=False)
    p_label, p = torch.sigmoid(m), torch.sigmoid(m / temperature)
    p_wrong = share * (1 - p) / (share * (1 - p) + (1 - share) * p).clamp(min=1e-300)
    values = m.tolist()
    order = sorted(range(len(ids)), key=lambda index: (values[index], ids[index]))
    ranks = {index: rank for rank, index in enumerate(order, start=1)}
    columns = zip(ids, values, p_label.tolist(), delta.tolist(), flagged.tolist(), p_wrong.tolist(), strict=True)
    verdicts = tuple(
        Verdict(id, margin, p, d, ranks[index], flag, w, _suggestion(flag and p < 0.5, w), (epochs or {}).get(id))
        for index, (id, margin, p, d, flag, w) in enumerate(columns)
    )
    return Audit(lam, verdicts, flags, expected, stderr, excess, interval, share, share_interval, temperature)


def _suggestion(contradicted: bool, p_wrong: float) -> Suggestion:
    if p_wrong >= DROP:
        return "flip" if p_wrong >= FLIP else "drop"
    return "review" if contradicted else "keep"


def _check(margins: Tensor, ids: Sequence[str], lam: float) -> None:
    if not 0 < lam < 1:
        raise ConfigError(f"lam: {lam} is not above 0 and below 1", remedy="give a level such as 0.85")
    if margins.shape != (len(ids),) or not ids:
        raise DataError(
            f"margins of shape {list(margins.shape)} for {len(ids)} ids",
            remedy="give one margin for each id, one or more",
        )
    if len(set(ids)) < len(ids):
        raise DataError(f"{len(ids) - len(set(ids))} ids come more than once", remedy="give each pair an id of its own")
    bad = (~margins.isfinite()).nonzero()[:, 0].tolist()
    if bad:
        raise DataError(
            f"the margins of {len(bad)} pairs are not finite (first: {ids[bad[0]]!r})",
            remedy="check that training did not diverge, and leave these pairs out",
        )


@dataclass(frozen=True)
class Group:
    """What is known of one annotator, or of one source of labels.

    Args:
        name: of the group.
        pairs: its pairs.
        flags: flagged ones.
        expected: flags that right labels would give at these margins.
        excess: ``flags - expected``.
        stderr: standard deviation of the number of flags of right labels.
        doubt: ``excess / stderr``, the latter taken as 0.1 at least; above 3 it is hardly chance.
    """

    name: str
    pairs: int
    flags: int
    expected: float
    excess: float
    stderr: float
    doubt: float


def audit_groups(found: Audit, group_of: Mapping[str, str]) -> tuple[Group, ...]:
    """Whose labels to doubt: flags and their excess, by annotator or source.

    Args:
        found: the audit of all pairs.
        group_of: row id -> group; pairs without one are left out.

    Returns:
        The groups, the most doubtful first.

    Section 8.5, whose group penalty is for training; this one looks at margins as they are.

    >>> found = audit([3.0, -5.0, 0.5, 2.0], ["a", "b", "c", "d"], lam=0.85)
    >>> [group.name for group in audit_groups(found, {"a": "Ada", "b": "Bob", "c": "Ada", "d": "Bob"})]
    ['Bob', 'Ada']
    """
    members: dict[str, list[Verdict]] = {}
    for verdict in found.verdicts:
        if verdict.id in group_of:
            members.setdefault(group_of[verdict.id], []).append(verdict)
    groups = []
    for name, verdicts in members.items():
        margins = torch.tensor([verdict.margin for verdict in verdicts], dtype=torch.float64)
        expected, stderr = expected_flags(margins, found.lam)
        flags = sum(verdict.flagged for verdict in verdicts)
        doubt = (flags - expected) / max(stderr, 0.1)  # of a few sure pairs nothing may be expected
        groups.append(Group(name, len(verdicts), flags, expected, flags - expected, stderr, doubt))
    return tuple(sorted(groups, key=lambda group: (-group.doubt, group.name)))


def write_csv(path: Path, found: Audit, about: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Write the verdicts as a table, most doubtful first; the columns are the fields of `Verdict`.

    Args:
        path: of the file.
        found: the audit.
        about: further columns by id: prompt, answers, what else the rows have. One that is named like a field of
            `Verdict` is marked as ``(data)``.

    Raises:
        OSError: the file cannot be written; an old one is untouched.
    """
    about = about or {}
    known = [field.name for field in fields(Verdict)]
    further = dict.fromkeys(name for verdict in found.verdicts for name in about.get(verdict.id, ()))
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*known, *(f"{name} (data)" if name in known else name for name in further)])
    for verdict in sorted(found.verdicts, key=lambda verdict: verdict.rank):
        more = about.get(verdict.id, {})
        table.writerow([*astuple(verdict), *(as_cell(more.get(name)) for name in further)])
    write_text(path, text.getvalue())


def cleaned_rows(
    rows: Iterable[Preference],
    found: Audit,
    action: Action,
    others: Mapping[str, Mapping[str, Any]] | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows as they should be trained on, under our column names, ready to be written as JSON lines.

    Rows that were not audited (over-long ones) come through as they are; those to review stay, too.

    Args:
        rows: the rows; read once.
        found: their audit.
        action: ``drop`` leaves out the rows whose suggestion is ``drop`` or ``flip``; ``flip`` flips those of
            ``flip`` and leaves out those of ``drop``; ``weights`` keeps all and adds the column ``weight``, the
            probability that the label is right.
        others: further columns by id, which stay with their rows. What has ``chosen`` or ``rejected`` as a word of its
            name, and a counterpart, changes places with the answers; ``flipped`` is negated.

    Raises:
        ConfigError: unknown action.

    >>> rows = [Preference(str(n), "p", "x", "y") for n in range(168)]
    >>> found = audit([3.0, 6.0, 4.0, 5.0] * 40 + [-6.0] * 8, [row.id for row in rows], lam=0.85)
    >>> len(list(cleaned_rows(rows, found, "drop")))
    160
    """
    further = others or {}

    def written(row: Preference, flip: bool) -> dict[str, Any]:
        more = further.get(row.id, {})
        return {**exchanged(more, {}), **flipped(row).columns()} if flip else {**more, **row.columns()}

    return _cleaned(rows, found, action, written)


def cleaned_records(rows: Rows, found: Audit, action: Action) -> Iterator[dict[str, Any]]:
    """As `cleaned_rows`, under the user's own column names: each row as it stands in its source.

    Args:
        rows: preferences as they were read.
        found: their audit.
        action: as of `cleaned_rows`; the label of a flipped row is turned in whatever form the row has it.

    Raises:
        ConfigError: unknown action.
    """
    records = {row.id: record.values for row, record in zip(rows, rows.records, strict=True)}

    def written(row: Row, flip: bool) -> dict[str, Any]:
        return exchanged(records[row.id], rows.columns) if flip else dict(records[row.id])

    return _cleaned(rows, found, action, written)


def _cleaned(
    rows: Iterable[Any], found: Audit, action: Action, written: Callable[[Any, bool], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    if action not in get_args(Action):
        raise ConfigError(f"clean: {action!r} is unknown", remedy=f"give one of {', '.join(get_args(Action))}")
    verdicts = {verdict.id: verdict for verdict in found.verdicts}

    def kept() -> Iterator[dict[str, Any]]:
        for row in rows:
            verdict = verdicts.get(row.id)
            if action == "weights":
                yield {**written(row, False), "weight": 1.0 if verdict is None else 1.0 - verdict.p_wrong}
            elif verdict is None or not verdict.suspect:
                yield written(row, False)
            elif verdict.suggestion == action == "flip":
                yield written(row, True)

    return kept()


def worst_pairs(rows: Iterable[Preference], found: Audit, count: int) -> list[tuple[Verdict, Preference]]:
    """The most doubtful pairs with what is known of them, for a reader to look at; the worst first.

    Args:
        rows: the rows; read once.
        found: their audit.
        count: how many, 1 or more; fewer come where there are fewer.

    Raises:
        ConfigError: ``count`` is below 1.

    >>> found = audit([3.0, -5.0], ["a", "b"], lam=0.85)
    >>> [(verdict, row)] = worst_pairs([Preference("b", "p", "x", "y")], found, 1)
    >>> row.id, round(verdict.margin)
    ('b', -5)
    """
    if count < 1:
        raise ConfigError(f"count: {count} is below 1", remedy="give how many pairs to show")
    wanted = {verdict.id: verdict for verdict in found.verdicts if verdict.rank <= count}
    pairs = [(wanted[row.id], row) for row in rows if row.id in wanted]
    return sorted(pairs, key=lambda pair: pair[0].rank)
