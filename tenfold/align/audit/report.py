"""Labels judged by margins, as the report shows them; for every stage that judges any."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tenfold.align.audit.judging import Audit, Verdict, audit, worst_pairs, write_csv
from tenfold.align.margins import Scored
from tenfold.align.preferences import flip_mask
from tenfold.data.read import Rows
from tenfold.data.rows import Preference, spoken
from tenfold.errors import DataError
from tenfold.evaluate.choice import share
from tenfold.evaluate.ranking import precision_at, roc_auc
from tenfold.stage.context import Context, StageOutput
from tenfold.stage.record import Figure, Sample, Series, Table
from tenfold.stage.results import Metric, Result
from tenfold.stage.store import Store

SCORES = ".store.jsonl"
"""In a run folder: margins, by all that decides them."""
TRAINED = "r3m.json"
"""Lies beside trained weights: how their margins are to be read."""


def score_cache(context: Context, trained: Path | None = None) -> Path:
    """Scores of all runs in this folder: what judges otherwise need not score again.

    Args:
        context: of the stage.
        trained: the folder of a model that a run of another folder may have made: what that run has scored is known.
    """
    path = context.folder.parent / SCORES
    theirs = trained.absolute().parents[1] / SCORES if trained is not None else path
    if theirs.is_file() and theirs.resolve() != path.resolve():
        own = Store(path)
        own.add({key: margin for key, margin in Store(theirs).entries.items() if key not in own.entries})
    return path


def preferences(rows: Rows) -> list[Preference]:
    """The rows as what the reader has checked them to be."""
    return [row for row in rows if isinstance(row, Preference)]


def known_flips(rows: Rows, noise: Sequence[bool] | None) -> tuple[dict[str, bool], list[str]]:
    """Which labels are wrong, where that is known: by the column ``flipped``, and by the noise that was added to it."""
    known: dict[str, bool] | None = None
    notes = []
    if any("flipped" in other for other in rows.others):
        try:
            known = flip_mask(rows)
        except DataError as error:
            notes.append(f"The column flipped is not used: {str(error).splitlines()[0]}.")
    if noise is None:
        return known or {}, notes
    return {row.id: flip != (known or {}).get(row.id, False) for row, flip in zip(rows, noise, strict=True)}, notes


def audited(
    scored: Scored,
    pairs: Sequence[Preference],
    flips: dict[str, bool],
    lam: float,
    worst: int,
    folder: Path,
    epochs: Mapping[str, float] | None = None,
    source: Rows | None = None,
) -> tuple[Audit, StageOutput]:
    """Judge labels by margins; the table is ``audit.csv`` in the folder.

    Args:
        scored: margins of pairs.
        pairs: these, as they were judged.
        flips: which labels are wrong, where that is known.
        lam: the level at which pairs are flagged.
        worst: how many pairs the report shows.
        folder: of the stage.
        epochs: mean margins in training, by id.
        source: the rows that the pairs were read as, for places and further columns.
    """
    if not scored.ids:
        raise DataError("no pair is within max_length", remedy="raise max_length")
    found = audit(scored.margins, scored.ids, lam, epochs)
    about = _about(pairs, source)
    write_csv(folder / "audit.csv", found, about)
    metrics = [
        Metric(name="flagged", value=found.flags / len(found.verdicts), count=len(found.verdicts)),
        Metric(name="expected of right labels", value=found.expected, stderr=found.expected_stderr, unit="pairs"),
        Metric(name="excess", value=found.excess, interval=found.interval, unit="pairs"),
        Metric(name="wrong labels, estimated", value=found.share_wrong, interval=found.share_interval),
    ]
    mask = [flips.get(id, False) for id in scored.ids]
    if any(mask) and not all(mask):
        doubts = (-scored.margins).tolist()
        wrong = sum(mask)
        metrics += [
            Metric(name=f"precision at {wrong}", value=precision_at(doubts, mask, wrong), count=wrong, better="higher"),
            Metric(name="auc", value=roc_auc(doubts, mask), count=len(mask), better="higher"),
            Metric(name="wrong labels", value=wrong, unit="pairs"),
        ]
        hits = [flip for flip, verdict in zip(mask, found.verdicts, strict=True) if verdict.suspect]
        if hits:
            metrics += [share("wrong among those to drop or flip", hits),
                        Metric(name="found of the wrong labels", value=sum(hits) / wrong, better="higher")]  # fmt: skip
    shown = worst_pairs(pairs, found, worst)
    notes = [
        f"audit.csv ranks all {len(found.verdicts)} pairs; {found.flags} are flagged (the model gives their label less "
        f"than {1 - lam:.0%}), of which right labels would give {found.expected:.1f} ± {found.expected_stderr:.1f}.",
        f"{_said(found)} {found.count('drop')} rows to drop, {found.count('flip')} to flip, {found.count('review')} to "
        "review.",
    ]
    if scored.over_long:
        notes.append(f"{len(scored.over_long)} pairs were longer than max_length and not judged.")
    return found, StageOutput(
        results=[Result(task="audit", subject="after", metrics=tuple(metrics), settings={"lam": lam})],
        tables=[_table(shown, flips, about)],
        figures=[_histogram(found)],
        samples=[Sample(prompt=_asked(row), outputs={f"chosen (margin {verdict.margin:.2f})": row.chosen,
                                                    "rejected": row.rejected}) for verdict, row in shown],
        notes=notes,
    )  # fmt: skip


def _about(pairs: Sequence[Preference], source: Rows | None) -> dict[str, dict[str, Any]]:
    """What the table says of each pair beside its verdict."""
    read: dict[str, tuple[str, Mapping[str, Any]]] = {}
    if source is not None and source.records:
        parts = zip(source, source.records, source.others, strict=True)
        read = {row.id: (record.place, others) for row, record, others in parts}
    about = {}
    for row in pairs:
        place, others = read.get(row.id, ("", {}))
        said = {"place": place, "prompt": _asked(row), "chosen": row.chosen, "rejected": row.rejected}
        about[row.id] = {**said, **{name: value for name, value in others.items() if name not in said}}
    return about


def _asked(row: Preference) -> str:
    """The prompt as a reader sees it."""
    return spoken(row.turns) if row.history else row.prompt


def _said(found: Audit) -> str:
    low, high = found.share_interval
    agreed = sum(verdict.margin > 0 for verdict in found.verdicts) / len(found.verdicts)
    if agreed < 0.5 - 1 / math.sqrt(len(found.verdicts)):
        return f"The model contradicts {1 - agreed:.0%} of the labels: are chosen and rejected exchanged?"
    if not low:
        return f"No share of wrong labels can be told from none (up to {high:.1%} are possible)."
    return (
        f"Once margins are divided by {found.temperature:.2g}, {found.share_wrong:.1%} of the labels seem wrong (95 % "
        f"interval {low:.1%} to {high:.1%})."
    )


def _table(
    shown: Sequence[tuple[Verdict, Preference]], flips: dict[str, bool], about: Mapping[str, Mapping[str, Any]]
) -> Table:
    wrong = {verdict.id: ("yes" if flips[verdict.id] else "no") if flips else "unknown" for verdict, _ in shown}
    rows = [
        (verdict.rank, verdict.id, about[verdict.id]["place"] or "unknown", verdict.margin, verdict.p_label,
         verdict.delta, verdict.p_wrong, verdict.suggestion, wrong[verdict.id])
        for verdict, _ in shown
    ]  # fmt: skip
    columns = ("rank", "id", "place", "margin", "probability of the label", "delta", "probability of a wrong label",
               "suggestion", "flipped")  # fmt: skip
    return Table(title="The most doubtful labels", columns=columns, rows=tuple(rows))


def _histogram(found: Audit) -> Figure:
    """How the margins lie, the flagged ones apart."""
    margins = torch.tensor([verdict.margin for verdict in found.verdicts], dtype=torch.float64)
    low, high = float(margins.min()), float(margins.max())
    width = (high - low) / 24 or 1.0
    bins = ((margins - low) / width).long().clamp(max=23)
    flagged = torch.tensor([verdict.flagged for verdict in found.verdicts])
    digits = max(2, 1 - math.floor(math.log10(width)))  # so many that no two bars have one name
    names = tuple(f"{low + (index + 0.5) * width:.{digits}f}" for index in range(24))

    def counts(which: torch.Tensor) -> tuple[float, ...]:
        return tuple(torch.bincount(bins[which], minlength=24).tolist())

    return Figure(
        kind="bar",
        title="Margins of the labels",
        x_label="margin",
        y_label="pairs",
        series=(Series(name="flagged", x=names, y=counts(flagged)), Series(name="others", x=names, y=counts(~flagged))),
        caption="Reward of the chosen answer minus that of the rejected one: below 0 the model contradicts it.",
    )
