"""The stage ``audit``, and how any stage judges labels by margins and shows it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tenfold.align.audit import Audit, Verdict, audit, audit_groups, cleaned_rows, worst_pairs, write_csv
from tenfold.align.margins import Scored, score_pairs, score_policy_pairs
from tenfold.align.preferences import flip_mask
from tenfold.config.r3m import AuditConfig
from tenfold.data.read import Rows
from tenfold.data.rows import Preference
from tenfold.errors import DataError, ModelError
from tenfold.evaluate.choice import share
from tenfold.evaluate.ranking import precision_at, roc_auc
from tenfold.evaluate.results import Metric, Result
from tenfold.files import write_text
from tenfold.models.open import saved_task
from tenfold.models.reference import ModelRef
from tenfold.models.source import read_json
from tenfold.pipeline.context import Context, StageOutput
from tenfold.report.record import Figure, Sample, Series, Table

TRAINED = "r3m.json"
"""Lies beside trained weights: how their margins are to be read."""


def run_audit(config: AuditConfig, context: Context) -> StageOutput:
    """The stage ``audit``: what a model thinks of labels that are there; the model stays as it is."""
    assert context.rows is not None
    flips, notes = known_flips(context.rows, None)
    model = context.model
    if not model.adapters and Path(model.source).is_dir():
        model = dataclasses.replace(model, task=saved_task(Path(model.source), model.task))
    folder = Path(model.adapters[-1] if model.adapters else model.source)
    trained = read_json(folder / TRAINED) if (folder / TRAINED).exists() else {}
    opened = model.open()
    if model.task == "reward":
        _check_head(opened.model, str(folder))
    pairs = preferences(context.rows)
    keys: dict[str, Any] = {
        "batch_size": config.batch_size,
        "max_length": config.max_length or trained.get("max_length", 1024),
        "cache": score_cache(context),
        "progress": partial(context.progress, "scoring"),
    }
    if model.task == "reward":
        scored = score_pairs(opened.model, opened.tokenizer, pairs, **keys)
    else:
        keys["reference"] = None if config.reference is None else _reference(config.reference, context)
        keys["beta"] = trained.get("beta", 0.1) if config.beta is None else config.beta
        scored = score_policy_pairs(opened.model, opened.tokenizer, pairs, **keys)
        notes.append(f"Margins are those of beta {keys['beta']:g}.")
    found, output = audited(scored, pairs, flips, config.lam, config.worst, context.folder)
    others = dict(zip((row.id for row in context.rows), context.rows.others, strict=True))
    cleaned = cleaned_rows(pairs, found, config.action, others)
    lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in cleaned)
    write_text(context.folder / "cleaned.jsonl", "".join(lines))
    tables = output.tables if config.by is None else [*output.tables, _groups(found, context.rows, config.by)]
    return dataclasses.replace(output, tables=tables, notes=[*output.notes, *notes])


def _groups(found: Audit, rows: Rows, column: str) -> Table:
    """Whose labels to doubt."""
    group_of = {row.id: str(other[column]) for row, other in zip(rows, rows.others, strict=True) if column in other}
    groups = audit_groups(found, group_of)
    return Table(
        title=f"The most doubtful by {column}",
        columns=(column, "pairs", "flagged", "expected of right labels", "excess", "excess / its deviation"),
        rows=tuple((one.name, one.pairs, one.flags, one.expected, one.excess, one.doubt) for one in groups[:50]),
    )


def _check_head(model: Any, name: str) -> None:
    """Refuse a reward model whose score is random, because no file held one."""
    adapters = getattr(model, "peft_config", {}).values()
    trained = any(getattr(adapter, "modules_to_save", None) for adapter in adapters)
    names = [str(one) for one in model.config.architectures or ()]
    if not trained and not any("ForSequenceClassification" in one or "Reward" in one for one in names):
        raise ModelError(
            f"{name}: has no reward head, so its rewards would be random",
            remedy="train one (tenfold align --target reward), or audit a policy: leave the task out",
        )


def score_cache(context: Context) -> Path:
    """Scores of all runs in this folder: what judges otherwise need not score again."""
    return context.folder.parent / ".margins.jsonl"


def _reference(source: str, context: Context) -> Any:
    """The model that a policy started from, opened like the policy."""
    like = context.model
    return ModelRef(source, dtype=like.dtype, device=like.device, trust_remote_code=like.trust_remote_code).open().model


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
) -> tuple[Audit, StageOutput]:
    """Judge labels by margins; the table is ``audit.csv`` in the folder."""
    if not scored.ids:
        raise DataError("no pair is within max_length", remedy="raise max_length")
    found = audit(scored.margins, scored.ids, lam, epochs)
    write_csv(folder / "audit.csv", found)
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
        tables=[_table(shown, flips)],
        figures=[_histogram(found)],
        samples=[Sample(prompt=_asked(row), outputs={f"chosen (margin {verdict.margin:.2f})": row.chosen,
                                                    "rejected": row.rejected}) for verdict, row in shown],
        notes=notes,
    )  # fmt: skip


def _asked(row: Preference) -> str:
    """The prompt as a reader sees it."""
    said = [f"{message['role']}: {message.get('content') or ''}" for message in row.turns]
    return "\n".join(said) if row.history else row.prompt


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


def _table(shown: Sequence[tuple[Verdict, Preference]], flips: dict[str, bool]) -> Table:
    rows = [
        (verdict.rank, verdict.id, verdict.margin, verdict.p_label, verdict.delta, verdict.suggestion,
         ("yes" if flips[verdict.id] else "no") if flips else "unknown")
        for verdict, _ in shown
    ]  # fmt: skip
    columns = ("rank", "id", "margin", "probability of the label", "delta", "suggestion", "flipped")
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
