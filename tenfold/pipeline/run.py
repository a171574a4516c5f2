"""Execute a plan in a run folder: one stage after the other, each finished once, resumable after a kill.

The run folder:

    recipe.yaml         the resolved recipe, written first
    environment.json    versions and machine of the last invocation
    01-lora/            a finished stage: summary.json, metrics.jsonl, artefact
    .02-evaluate/       the stage at work; it takes its name when it is complete
    .tenfold.json       what runs have written here: they write over nothing else
    report.html         written anew after each stage
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from rich.console import Console

import tenfold
from tenfold.config.base import Config
from tenfold.config.data import DataFields
from tenfold.config.pasta import ProfileConfig, SteeringFields
from tenfold.config.r3m import AuditConfig, R3MConfig
from tenfold.config.training import TrainingFields
from tenfold.errors import FolderError, RunError, TenfoldError
from tenfold.files import replace_folder, write_text
from tenfold.models.embedded import DEMO_HUB_ID
from tenfold.models.reference import ModelRef
from tenfold.pipeline.checking import check_model, check_stage, model_of, trusted_rows
from tenfold.pipeline.ownership import LOCK, Owned, check_out, owned
from tenfold.pipeline.recipe import Plan, Step
from tenfold.pipeline.stages import stage
from tenfold.report.card import write_card
from tenfold.report.load import load_metrics
from tenfold.report.page import write_report
from tenfold.stage.context import Context, StageOutput
from tenfold.stage.numbers import fit
from tenfold.stage.progress import Progress
from tenfold.stage.record import StageSummary

if TYPE_CHECKING:
    from tenfold.data.read import Rows


NO_FIGURE = {"save_every", "log_every", "report_to", "csv", "clean"}
"""Keys that change what is written on the way or where, and no figure: another value makes no finished stage anew."""


@dataclass(frozen=True)
class Job:
    """A step with everything its result depends on."""

    step: Step
    rows: Rows | None
    fingerprint: str
    previous: str
    inputs: dict[str, Any]


def run(plan: Plan, out: Path, console: Console) -> list[StageSummary]:
    """Execute a plan and write its report.

    Finished stages are skipped unless their configuration or inputs changed; a stage that was killed goes on from its
    last checkpoint.

    Args:
        plan: the resolved recipe.
        out: the run folder; made if absent.
        console: where progress goes.

    Returns:
        The summaries of all stages, in order.

    Raises:
        TenfoldError: bad input, a folder in use, not writable or not ours, a full disk, a loss that is not finite.
    """
    check_out(out)
    with _writable(out), _locked(out):
        ours = owned(out)
        _refuse_foreign(plan, out)
        for name in ("recipe.yaml", "environment.json", "report.html"):
            ours.check_text(out / name)
        _sweep(out)
        model = model_of(plan)
        with Progress(console) as progress:
            progress.begin("reading the data and the files of the model")
            jobs = list(_jobs(plan, model))
        _refuse_losses(jobs, out, ours)
        ours.write(out / "recipe.yaml", plan.to_yaml())  # known to be good by now: it describes what lies beside it
        from tenfold.pipeline.environment import environment  # imports torch: only once the input is known to be good

        machine = environment()
        ours.write(out / "environment.json", json.dumps(machine, indent=2))
        start, summaries = model, []
        for job in jobs:
            summary = _finished(out, job, ours)
            if summary is None:
                console.print(f"[bold]{job.step.folder}[/bold]", highlight=False)
                summary = _execute(plan, out, job, start, model, machine, console, ours)
            else:
                console.print(f"[bold]{job.step.folder}[/bold]: finished already", highlight=False)
            for name, target in _delivered(job.step.config):
                ours.write(target, (out / job.step.folder / name).read_text(encoding="utf-8"))
            summaries.append(summary)
            metrics = {done.folder: load_metrics(out / done.folder / "metrics.jsonl") for done in summaries}
            write_report(out, plan.to_yaml(), summaries, metrics, environment=machine, write=ours.write)
            model = continued(model, out / job.step.folder, summary)
        return summaries


def check(plan: Plan) -> list[str]:
    """Read all data of a plan and look at local model files, without weights; returns one line per stage for the user.

    Raises:
        DataError: naming file, line and column.
        ConfigError: data that does not fit its stage.
        ModelError: a model that is not there or damaged; a hub id is not looked up.
    """
    from tenfold.models.source import locate

    if locate(plan.recipe.model).kind != "hub":
        model_of(plan).identity()
    lines = []
    for step in plan.steps:
        rows = _rows(step)
        check_stage(step.config, rows, step.folder)
        found = f": {len(rows)} {rows.kind} rows from {rows.source}" if rows is not None else ""
        lines.append(f"{step.folder}{found}")
    return [*lines, *check_model(plan)]


def continued(model: ModelRef, folder: Path, summary: StageSummary) -> ModelRef:
    """The model that the stage after `folder` starts from."""
    from tenfold.models.open import saved_task
    from tenfold.models.reference import ModelRef

    if summary.continues_with is None or summary.artefact is None:
        return model
    artefact = folder / summary.artefact
    task = saved_task(artefact, model.task)
    if summary.continues_with == "adapter":
        return dataclasses.replace(model.with_adapter(artefact), task=task)
    return ModelRef(source=str(artefact), task=task, dtype=model.dtype, device=model.device)


def _rows(step: Step) -> Rows | None:
    config = step.config
    if not isinstance(config, DataFields) or config.data is None:
        return None
    from tenfold.data.read import read_rows

    return read_rows(config.data, rows=config.rows, columns=config.columns, limit=config.limit)


def _jobs(plan: Plan, model: ModelRef) -> Iterator[Job]:
    """Each step with its data and the hash of all that its result depends on.

    All data is read first: a bad row in the last stage must not surface after hours of training.
    """
    data = [_rows(step) for step in plan.steps]
    for step, rows in zip(plan.steps, data, strict=True):
        check_stage(step.config, rows, step.folder)
    check_model(plan)
    identity = model.identity()
    previous = ""
    for step, rows in zip(plan.steps, data, strict=True):
        inputs: dict[str, Any] = {"model": identity}
        if rows is not None:
            inputs["data"] = {"source": rows.source, "sha256": rows.sha256, "rows": len(rows)}
        inputs |= _named(step.config, rows)
        basis = {
            "previous": previous,
            "stage": step.name,
            "config": step.config.model_dump(mode="json", exclude=NO_FIGURE),
            "seed": plan.recipe.seed,
            "device": [plan.recipe.dtype, plan.recipe.device],
            "inputs": inputs,
        }
        fingerprint = hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()
        yield Job(step, rows, fingerprint, previous, inputs)
        previous = fingerprint


def _delivered(config: Config) -> list[tuple[str, Path]]:
    """What a stage was asked to leave outside of the run folder, and its name inside of it."""
    if not isinstance(config, AuditConfig):
        return []
    asked = (("audit.csv", config.csv), ("cleaned.jsonl", config.clean))
    return [(name, target) for name, target in asked if target is not None]


def _refuse_losses(jobs: Sequence[Job], out: Path, ours: Owned) -> None:
    """Refuse before any work what would end in writing over somebody else's file."""
    for job in jobs:
        if _finished(out, job, ours) is None:
            ours.check_folder(out / job.step.folder)
        for _, target in _delivered(job.step.config):
            ours.check_text(target)


def _named(config: Config, rows: Rows | None) -> dict[str, Any]:
    """Hashes of what a configuration names beside its data; an earlier stage has a fingerprint of its own."""
    context = getattr(config, "context", None)
    paths = {"context": context, "profile": config.profile_file() if isinstance(config, SteeringFields) else None}
    found: dict[str, Any] = {
        key: hashlib.sha256(path.read_bytes()).hexdigest() for key, path in paths.items() if isinstance(path, Path)
    }
    if isinstance(config, R3MConfig | AuditConfig) and rows is not None:
        # True rewards, known flips, and what cleaned rows keep.
        found["other columns"] = hashlib.sha256(repr(rows.others).encode()).hexdigest()
    if isinstance(config, R3MConfig) and config.trusted is not None:
        found["trusted"] = trusted_rows(config).sha256
    if isinstance(config, AuditConfig) and config.reference is not None:
        found["reference"] = ModelRef(config.reference).identity()
    return found


def _finished(out: Path, job: Job, ours: Owned) -> StageSummary | None:
    folder = out / job.step.folder
    work = out / f".{job.step.folder}"
    if _summary(work, job) is not None:  # killed just before it took its name
        _finish(work, folder, ours)
    return _summary(folder, job)


def _summary(folder: Path, job: Job) -> StageSummary | None:
    """The summary of a complete stage folder that is what the job asks for."""
    path = folder / "summary.json"
    if not path.exists():
        return None
    try:
        summary = StageSummary.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError:  # of another schema, or damaged: the stage is run again
        return None
    there = summary.artefact is None or (folder / summary.artefact).is_dir()
    return summary if summary.fingerprint == job.fingerprint and there else None


def _data_notes(job: Job) -> tuple[str, ...]:
    """What a reader must know of the rows, and of how they were divided."""
    if job.rows is None:
        return ()
    config = job.step.config
    divides = isinstance(config, TrainingFields | ProfileConfig) or getattr(config, "split", None) == "held-out"
    if isinstance(config, DataFields) and divides:
        return job.rows.split(config.holdout)[1].notes
    return job.rows.notes


def _execute(
    plan: Plan,
    out: Path,
    job: Job,
    start: ModelRef,
    model: ModelRef,
    machine: dict[str, Any],
    console: Console,
    ours: Owned,
) -> StageSummary:
    work = out / f".{job.step.folder}"
    marker = work / "fingerprint"
    if not marker.exists() or marker.read_text(encoding="utf-8") != job.fingerprint:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        write_text(marker, job.fingerprint)
    began = time.perf_counter()
    with Progress(console) as progress:
        progress.begin(f"opening {model.source}")
        context = Context(work, start, model, job.rows, plan.recipe.seed, plan.to_yaml(), progress)
        output: StageOutput = stage(job.step.name).function()(job.step.config, context)
    summary = StageSummary(
        tenfold_version=tenfold.__version__,
        index=job.step.index,
        stage=job.step.name,
        fingerprint=job.fingerprint,
        previous=job.previous,
        config=job.step.config.model_dump(mode="json"),
        seed=plan.recipe.seed,
        inputs=job.inputs,
        attached=output.attached,
        results=tuple(output.results),
        figures=tuple(output.figures),
        tables=tuple(output.tables),
        samples=tuple(output.samples),
        notes=(*_data_notes(job), *output.notes),
        artefact=output.artefact,
        continues_with=output.continues_with,
        timings={**output.timings, "stage": time.perf_counter() - began},
        environment=machine,
    )
    if summary.artefact and summary.continues_with:
        write_card(
            work / summary.artefact,
            summary,
            base_model=DEMO_HUB_ID if start.source == "demo" else start.source,
            recipe_text=plan.to_yaml(),
            kind=summary.continues_with,
            task=start.task,
        )
    write_text(work / "summary.json", summary.model_dump_json(indent=2))
    _finish(work, out / job.step.folder, ours)
    return summary


def _finish(work: Path, final: Path, ours: Owned) -> None:
    """Give a complete working folder its name; what only a resume needs goes first."""
    for path in (*work.glob("checkpoint-*"), *work.glob(".*.partial-*")):
        shutil.rmtree(path)
    (work / "fingerprint").unlink(missing_ok=True)
    ours.check_folder(final)
    ours.remember_folder(work, final)
    replace_folder(work, final)


def _sweep(out: Path) -> None:
    """Remove what a killed process left between two renames; the lock is held, so nobody else is at work."""
    for path in out.glob(".*.old"):
        shutil.rmtree(path, ignore_errors=True)
    for path in out.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def _refuse_foreign(plan: Plan, out: Path) -> None:
    """Two recipes do not share a folder: neither would know which figures are its own."""
    expected = {step.folder for step in plan.steps}
    foreign = sorted(path.parent.name for path in out.glob("[0-9][0-9]-*/summary.json"))
    foreign = [name for name in foreign if name not in expected]
    if foreign:
        raise FolderError(
            f"{out} holds stages of another recipe: {', '.join(foreign)}",
            remedy="choose another folder with --out, or remove this one",
        )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    lock = FileLock(out / LOCK)
    try:
        with lock.acquire(timeout=0):
            yield
    except Timeout:
        raise RunError(
            f"another run is at work in {out}", remedy="wait for it, stop it, or choose another folder with --out"
        ) from None


@contextmanager
def _writable(out: Path) -> Iterator[None]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / LOCK).touch()
    except OSError as error:
        raise FolderError(f"{out}: {error.strerror}", remedy="choose a folder you can write with --out") from error
    try:
        yield
    except TenfoldError:
        raise
    except Exception as error:
        if not _is_full(error, out):
            raise
        raise RunError(
            f"{out}: no space left ({shutil.disk_usage(out).free / 2**20:.1f} MiB free)",
            remedy="free some space and give the same command again: what is finished is kept",
        ) from error


def _is_full(error: Exception, out: Path) -> bool:
    """Whether an error means a full disk: torch and safetensors say so each in its own way, or hardly at all."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    if "No space left" in text:
        return True
    return shutil.disk_usage(out).free < 2**20 and ("inline_container" in text or "iostream" in text)


def figures(summaries: Sequence[StageSummary]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Column titles and rows of what was measured, for the terminal: values as the report shows them.

    >>> from tenfold.stage.results import Metric, Result
    >>> result = Result(task="speed", subject="model", metrics=(Metric(name="prefill", value=0.0312, unit="s"),))
    >>> summary = StageSummary(tenfold_version="", index=1, stage="", fingerprint="", config={}, seed=0,
    ...                        results=(result,))
    >>> figures([summary])
    (('what', 'model', 'unit'), [('speed: prefill', '31.2', 'ms')])
    """
    found: dict[tuple[str, str], tuple[dict[str, float], str]] = {}
    for summary in summaries:
        for result in summary.results:
            for metric in result.metrics:
                found.setdefault((result.task, metric.name), ({}, metric.unit))[0][result.subject] = metric.value
    shown = {key: kept for key, (values, unit) in found.items() if (kept := _sides(values, unit))}
    compared = any(before for before, _, _ in shown.values())
    rows = [
        (f"{task}: {name}", *((before, after) if compared else (after,)), unit)
        for (task, name), (before, after, unit) in shown.items()
    ]
    return ("what", *(("before", "after") if compared else ("model",)), "unit"), rows


def _sides(values: dict[str, float], unit: str) -> tuple[str, str, str] | None:
    """Before, after and unit as text; a model that is measured alone counts as after."""
    before, after = values.get("before"), values.get("after", values.get("model"))
    if after is None:
        return None
    scale = fit([before, after], unit, finest=None if before is None else after - before)
    return "" if before is None else scale.text(before), scale.text(after), scale.unit
