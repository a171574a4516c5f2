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

import json
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

import tenfold
from tenfold.config.data import DataFields
from tenfold.config.stage import StageConfig
from tenfold.errors import RunError
from tenfold.files import write_text
from tenfold.models.embedded import DEMO_HUB_ID
from tenfold.models.reference import ModelRef
from tenfold.models.shape import auto_class_name
from tenfold.pipeline.checking import check_model, check_stage, model_of, naming
from tenfold.pipeline.folder import finish, locked, refuse_foreign, removed_if_refused, sweep, writable
from tenfold.pipeline.inputs import Job, jobs, other_rows_of, rows_of, why_again
from tenfold.pipeline.left_out import write_left_out
from tenfold.pipeline.ownership import Owned, check_out, owned
from tenfold.pipeline.recipe import ResolvedRecipe, Step
from tenfold.pipeline.references import is_reference, references_in, replaced
from tenfold.pipeline.stages import load
from tenfold.report.card import write_card
from tenfold.report.load import load_metrics
from tenfold.report.page import write_report
from tenfold.stage.context import Context, StageOutput
from tenfold.stage.progress import Progress
from tenfold.stage.record import StageSummary

if TYPE_CHECKING:
    from tenfold.data.read import Rows


@dataclass
class Run:
    """A run at work.

    Args:
        plan: the resolved recipe.
        out: the run folder.
        ours: what runs have written there.
        console: where progress goes.
        machine: versions and machine.
        start: what the recipe's model is.
        model: the model as the stages so far have left it.
        paths: of the artefacts that are there, by their references.
        summaries: of the finished stages.
        said: what stages have said already.
    """

    plan: ResolvedRecipe
    out: Path
    ours: Owned
    console: Console
    machine: dict[str, Any]
    start: ModelRef | None
    model: ModelRef | None
    paths: dict[str, str]
    summaries: list[StageSummary]
    said: set[str]


def run(plan: ResolvedRecipe, out: Path, console: Console, said: set[str] | None = None) -> list[StageSummary]:
    """Execute a plan and write its report.

    Finished stages are skipped unless what they depend on has changed; a stage that was killed goes on from its last
    checkpoint.

    Args:
        plan: the resolved recipe.
        out: the run folder; made if absent.
        console: where progress goes.
        said: gets the lines that stages say while they work; a note among them needs no second mention.

    Returns:
        The summaries of all stages, in order.

    Raises:
        TenfoldError: bad input, a folder in use, not writable or not ours, a full disk, a loss that is not finite.
    """
    check_out(out)
    with writable(out) as made, locked(out), removed_if_refused(out, made):
        ours = owned(out)
        refuse_foreign(plan, out)
        for name in ("recipe.yaml", "environment.json", "report.html"):
            ours.check_text(out / name)
        sweep(out)
        with Progress(console) as progress:
            progress.begin("reading the data and the files of the model")
            todo = jobs(plan)
        _refuse_losses(todo, out, ours)
        ours.write(out / "recipe.yaml", plan.to_yaml())  # known to be good by now: it describes what lies beside it
        from tenfold.pipeline.environment import environment  # imports torch: only once the input is known to be good

        machine = environment()
        ours.write(out / "environment.json", json.dumps(machine, indent=2))
        start = None if plan.recipe.model is None else model_of(plan)
        at_work = Run(plan, out, ours, console, machine, start, start, {}, [], set() if said is None else said)
        for job in todo:
            _stage(at_work, job)
        return at_work.summaries


def check(plan: ResolvedRecipe) -> list[str]:
    """Read all data of a plan and look at local model files, without weights; returns one line per stage for the user.

    Raises:
        DataError: naming file, line and column.
        ConfigError: data that does not fit its stage.
        ModelError: a model that is not there or damaged; a hub id is not looked up.
    """
    from tenfold.models.source import locate

    looked_at = set()
    for step in plan.steps:
        own = [model_of(plan, step)] if step.config.needs.model and not is_reference(step.model) else []
        with naming(step) if step.model is not None or not own else nullcontext():
            others = [ModelRef(source) for source in step.config.models().values() if not is_reference(source)]
            for one in (*own, *others):
                if one not in looked_at and locate(one.source).kind != "hub":
                    one.identity()
                looked_at.add(one)
    lines = []
    for step in plan.steps:
        rows = rows_of(step.config)
        other_rows_of(step.config)
        check_stage(step, rows)
        found = f": {len(rows)} {rows.kind} rows from {rows.source}" if rows is not None else ""
        if isinstance(step.config, DataFields) and is_reference(step.config.data):
            found = f": rows from {step.config.data}, once they are there"
        lines.append(f"{step.folder}{found}")
    return [*lines, *check_model(plan)]


def _stage(at_work: Run, job: Job) -> None:
    """One stage: skipped if it is finished, else executed; its report and its artefacts are there afterwards."""
    out, ours, console, step = at_work.out, at_work.ours, at_work.console, job.step
    folder = out / step.folder
    start, model = at_work.start, at_work.model
    if step.model is not None:
        start = model = _own_model(at_work, step)
    summary = _finished(out, job, ours)
    if summary is None:
        old = _read(folder)
        why = f": again, {why_again(old, job)}" if old is not None else ""
        console.print(f"[bold]{step.folder}[/bold]{why}", highlight=False)
        summary = _execute(at_work, job, start, model)
    else:
        console.print(f"[bold]{step.folder}[/bold]: finished already", highlight=False)
    for name, target in step.config.delivers().items():
        ours.write(target, (folder / name).read_bytes().decode("utf-8"))  # line ends as they are
    at_work.summaries.append(summary)
    metrics = {done.folder: load_metrics(out / done.folder / "metrics.jsonl") for done in at_work.summaries}
    recipe = at_work.plan.to_yaml()
    write_report(out, recipe, at_work.summaries, metrics, environment=at_work.machine, write=ours.write)
    for made in at_work.plan.made.values():
        if made.step == step.index - 1:
            at_work.paths[made.reference] = str(folder / summary.artefacts[made.name])
    # A look at another model does not turn to it: later stages go on with the one before, unless this stage made one.
    if step.model is not None and summary.continues_with is not None:
        at_work.start = start
    if model is not None and (step.model is None or summary.continues_with is not None):
        at_work.model = continued(model, folder, summary)


def _own_model(at_work: Run, step: Step) -> ModelRef:
    """The model that a step names: a source, or what an earlier stage made."""
    ref = model_of(at_work.plan, step)
    if not is_reference(step.model):
        return ref
    from tenfold.models.open import saved_task

    source = at_work.paths[ref.source]
    return replace(ref, source=source, task=saved_task(Path(source), ref.task))


def resolved(config: StageConfig, paths: dict[str, str]) -> StageConfig:
    """The configuration with paths where references stood."""
    changes: dict[str, Any] = {}
    for key in config.takes():
        value = getattr(config, key)
        if references_in(value):
            changes[key] = replaced(value, paths)
    return config.model_copy(update=changes) if changes else config


def continued(model: ModelRef, folder: Path, summary: StageSummary) -> ModelRef:
    """The model that the stage after `folder` starts from."""
    from tenfold.models.open import saved_task
    from tenfold.models.reference import ModelRef

    if summary.continues_with is None or summary.artefact is None:
        return model
    artefact = folder / summary.artefact
    task = saved_task(artefact, model.task)
    if summary.continues_with == "adapter":
        return replace(model.with_adapter(artefact), task=task)
    return ModelRef(source=str(artefact), task=task, dtype=model.dtype, load=model.load, device=model.device)


def _refuse_losses(todo: list[Job], out: Path, ours: Owned) -> None:
    """Refuse before any work what would end in writing over somebody else's file."""
    for job in todo:
        if _finished(out, job, ours) is None:
            ours.check_folder(out / job.step.folder)
        for target in job.step.config.delivers().values():
            ours.check_text(target)


def _finished(out: Path, job: Job, ours: Owned) -> StageSummary | None:
    folder = out / job.step.folder
    work = out / f".{job.step.folder}"
    if _complete(work, job) is not None:  # killed just before it took its name
        finish(work, folder, ours)
    return _complete(folder, job)


def _complete(folder: Path, job: Job) -> StageSummary | None:
    """The summary of a complete stage folder that is what the job asks for."""
    summary = _read(folder)
    if summary is None or summary.fingerprint != job.fingerprint:
        return None
    return summary if all((folder / path).exists() for path in summary.artefacts.values()) else None


def _read(folder: Path) -> StageSummary | None:
    """The summary in a folder; None where there is none, or one that is damaged or of another schema."""
    path = folder / "summary.json"
    try:
        return StageSummary.model_validate_json(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError:
        return None


def _data_notes(config: StageConfig, rows: Rows | None) -> tuple[str, ...]:
    """What a reader must know of the rows, and of how they were divided."""
    if rows is None or not isinstance(config, DataFields):
        return ()
    divides = config.learns or getattr(config, "split", None) == "held-out"
    return rows.split(config.holdout)[1].notes if divides else rows.notes


def _execute(at_work: Run, job: Job, start: ModelRef | None, model: ModelRef | None) -> StageSummary:
    plan, step = at_work.plan, job.step
    work = at_work.out / f".{step.folder}"
    marker = work / "fingerprint"
    if not marker.exists() or marker.read_text(encoding="utf-8") != job.fingerprint:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        write_text(marker, job.fingerprint)
    began = time.perf_counter()
    config, rows, others = _given(at_work, job)
    with Progress(at_work.console, at_work.said) as progress:
        if model is not None:
            progress.begin(f"opening {model.source}")
        opening = plan.recipe.model_dump(include={"dtype", "load", "device", "trust_remote_code"})
        context = Context(work, start, model, rows, plan.recipe.seed, plan.to_yaml(), progress, others, opening)
        output: StageOutput = load(config.run)(config, context)
    summary = StageSummary(
        tenfold_version=tenfold.__version__,
        index=step.index,
        stage=step.name,
        fingerprint=job.fingerprint,
        previous=job.previous,
        code=job.basis["code"],
        config=step.config.model_dump(mode="json"),
        seed=plan.recipe.seed,
        inputs=job.basis["inputs"],
        attached=output.attached,
        results=tuple(output.results),
        figures=tuple(output.figures),
        tables=(*output.tables, *write_left_out(work, rows, others, output.left_out)),
        samples=tuple(output.samples),
        notes=(*_data_notes(config, rows), *output.notes),
        artefact=output.artefact,
        artefacts=_made(config, output, work),
        replays=output.replays,
        continues_with=output.continues_with,
        timings={**output.timings, "stage": time.perf_counter() - began},
        environment=at_work.machine,
    )
    if summary.artefact and summary.continues_with and start is not None:
        write_card(
            work / summary.artefact,
            summary,
            base_model=DEMO_HUB_ID if start.source == "demo" else start.source,
            recipe_text=plan.to_yaml(),
            kind=summary.continues_with,
            task=start.task,
            auto=auto_class_name(start),
        )
    write_text(work / "summary.json", summary.model_dump_json(indent=2))
    finish(work, at_work.out / step.folder, at_work.ours)
    return summary


def _given(at_work: Run, job: Job) -> tuple[StageConfig, Rows | None, dict[str, Rows]]:
    """The configuration and the rows of a stage, with those that earlier stages have made since."""
    step = job.step
    config = resolved(step.config, at_work.paths)
    if config is step.config:
        return config, job.rows, dict(job.other_rows)
    with naming(step):
        rows, others = rows_of(config), other_rows_of(config)
        config.check(rows)
    return config, rows, others


def _made(config: StageConfig, output: StageOutput, work: Path) -> dict[str, str]:
    """Where each artefact lies in the stage's folder.

    Raises:
        RunError: a stage that did not make what it says.
    """
    naming = {} if output.artefact is None else {Path(output.artefact).name: output.artefact}
    found = {**naming, **output.artefacts}
    for name in config.artefacts():
        if not (work / found.get(name, "?")).exists():
            raise RunError(f"{config.run}: made no {name}, which its configuration promises", remedy="report this")
    return {name: found[name] for name in config.artefacts()}
