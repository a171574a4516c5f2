"""The stage ``audit``, and how any stage judges labels by margins and shows it."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from tenfold.align.audit.judging import Audit, audit_groups, cleaned_records
from tenfold.align.audit.report import TRAINED, audited, known_flips, preferences, score_cache
from tenfold.align.margins import score_pairs, score_policy_pairs
from tenfold.config.r3m import AuditConfig
from tenfold.data.left_out import left_out_notes
from tenfold.data.read import Rows
from tenfold.data.readable import readable
from tenfold.data.write import write_rows
from tenfold.errors import ModelError
from tenfold.models.open import saved_task
from tenfold.models.reference import ModelRef
from tenfold.models.source import read_json
from tenfold.stage.context import Context, StageOutput
from tenfold.stage.record import Table


def run_audit(config: AuditConfig, context: Context) -> StageOutput:
    """The stage ``audit``: what a model thinks of labels that are there; the model stays as it is."""
    assert context.rows is not None
    model = context.model
    if not model.adapters and Path(model.source).is_dir():
        model = dataclasses.replace(model, task=saved_task(Path(model.source), model.task))
    folder = Path(model.adapters[-1] if model.adapters else model.source)
    trained = read_json(folder / TRAINED) if (folder / TRAINED).exists() else {}
    opened = model.open()
    if model.task == "reward":
        _check_head(opened.model, str(folder))
    rows, refused = readable(context.rows, opened.tokenizer, config.on_bad_row)
    flips, notes = known_flips(rows, None)
    notes += left_out_notes(rows.source, refused)
    pairs = preferences(rows)
    keys: dict[str, Any] = {
        "batch_size": config.batch_size,
        "max_length": config.max_length or trained.get("max_length", 1024),
        "cache": score_cache(context, folder if trained else None),
        "progress": partial(context.progress, "scoring"),
    }
    if model.task == "reward":
        scored = score_pairs(opened.model, opened.tokenizer, pairs, **keys)
    else:
        keys["reference"] = None if config.reference is None else _reference(config.reference, context)
        keys["beta"] = trained.get("beta", 0.1) if config.beta is None else config.beta
        scored = score_policy_pairs(opened.model, opened.tokenizer, pairs, **keys)
        notes.append(f"Margins are those of beta {keys['beta']:g}.")
    found, output = audited(scored, pairs, flips, config.lam, config.worst, context.folder, source=rows)
    for name in config.cleaned_files:
        write_rows(context.folder / name, cleaned_records(rows, found, config.action))
    tables = output.tables if config.by is None else [*output.tables, _groups(found, rows, config.by)]
    artefacts = {"audit": "audit.csv", "cleaned": config.cleaned_files[0]}
    return dataclasses.replace(
        output, tables=tables, notes=[*output.notes, *notes], left_out=refused, artefacts=artefacts
    )


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


def _reference(source: str, context: Context) -> Any:
    """The model that a policy started from, opened like the policy."""
    like = context.model
    return (
        ModelRef(source, dtype=like.dtype, load=like.load, device=like.device, trust_remote_code=like.trust_remote_code)
        .open()
        .model
    )
