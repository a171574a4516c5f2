"""What can be known of a stage before any weight is loaded; `validate` and `run` both ask it of every stage first."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.align.r3m.stage import trusted_rows
from tenfold.config.autopasta import AutoPastaConfig
from tenfold.config.base import Config
from tenfold.config.evaluate import EvaluateConfig
from tenfold.config.gear import GearConfig
from tenfold.config.generate import GenerateConfig
from tenfold.config.masformer import MasformerConfig
from tenfold.config.pasta import PastaConfig, ProfileConfig, SteeringFields, untagged
from tenfold.config.r3m import AuditConfig, R3MConfig
from tenfold.config.training import TrainingFields
from tenfold.errors import ConfigError, DataError, MissingDependencyError, ModelError
from tenfold.pipeline.recipe import Plan, Step
from tenfold.pipeline.stages import stage

if TYPE_CHECKING:
    from tenfold.data.read import Rows
    from tenfold.models.reference import ModelRef

TRAINED_ROWS = ("text", "completion", "chat")
"""Kinds of rows that a causal model is trained on by its next token."""

MEASURED_ROWS = {
    "perplexity": "text",
    "copying": "text",
    "needle": "text",
    "question_answering": "question",
    "multiple_choice": "choice",
}
"""Tasks of an evaluation that need rows, and of which kind."""


def check_stage(config: Config, rows: Rows | None, where: str) -> None:
    """Refuse a stage whose data does not fit it.

    Args:
        config: of the stage.
        rows: its data, or None.
        where: the stage, as the error calls it.

    Raises:
        ConfigError: no data, rows of another kind, or a logger that is not installed.
        DataError: rows of which none would be trained on or held out.
    """
    if isinstance(config, TrainingFields):
        _check_training(config, rows, where)
    if isinstance(config, AuditConfig):
        _check_kind(rows, ("preference",), f"{where}: auditing labels")
        _check_outputs(config, where)
        if rows is not None and config.by is not None and not any(config.by in other for other in rows.others):
            there = ", ".join(dict.fromkeys(name for other in rows.others for name in other)) or "none"
            raise ConfigError(
                f"{where}: by: {rows.source} has no column {config.by!r}", remedy=f"further columns are: {there}"
            )
    if isinstance(config, SteeringFields):
        config.profile_file()
    if isinstance(config, PastaConfig) and not config.prompts and not config.tasks and rows is None:
        raise ConfigError(
            f"{where}: prompts, tasks and data are all empty", remedy="give at least one prompt with a marked part"
        )
    if isinstance(config, PastaConfig | ProfileConfig) and rows is not None:
        _check_tagged(config, rows, where)
    if isinstance(config, AutoPastaConfig) and rows is not None:
        _check_kind(rows, ("question",), where)
    if isinstance(config, MasformerConfig):
        _check_kind(rows, ("text",), f"{where}: profiling layers")
    if isinstance(config, GearConfig):
        _check_kind(rows, ("text",), f"{where}: comparing caches")
    if isinstance(config, GenerateConfig) and config.context is not None and not config.context.is_file():
        raise DataError(f"{where}: context: no file {config.context}", remedy="give a text file to answer from")
    if isinstance(config, EvaluateConfig):
        for task in config.tasks:
            if task in MEASURED_ROWS:
                _check_kind(rows, (MEASURED_ROWS[task],), f"{where}: tasks: {task}")
        if rows is not None and config.split == "held-out":
            rows.split(config.holdout)


def check_model(plan: Plan) -> list[str]:
    """Refuse what a plan asks of its model and cannot have, by configurations alone; no weight is read.

    Returns:
        Notes on what could not be looked at.

    Raises:
        ConfigError: a length, layer, budget, target, form, profile or device that this model or machine does not have.
        ModelError: no such model, or an architecture that a stage does not know.
    """
    from tenfold.models.families import FAMILIES
    from tenfold.models.shape import HubAwayError, shape_of

    ref = model_of(plan)
    if ref.device is not None and ref.device != "cpu":
        from tenfold.models.open import resolve_device

        resolve_device(ref.device)
    try:
        shape = shape_of(ref)
    except HubAwayError as error:
        return [f"{error.problem}: what its stages ask of it was not checked"]
    task: Any
    for step in plan.steps:
        try:
            after = step.config.applied_to(shape)
            unknown = "targets" in type(step.config).model_fields and shape.model_type not in FAMILIES
            if unknown or step.config.needs_matrices(shape):
                task = after.task
                _check_matrices(step, dataclasses.replace(ref, task=task))
        except (ConfigError, ModelError) as error:
            raise type(error)(f"{step.folder}: {error.problem}", error.remedy) from None
        shape = after
    return []


def _check_matrices(step: Step, ref: ModelRef) -> None:
    """Attach a stage's adapter to a model without storage: what does not fit is refused as it will be in the run."""
    import torch

    from tenfold.models.layer_map import layer_map
    from tenfold.models.meta_model import skeleton

    model, attach = skeleton(ref), stage(step.name).attach_function()
    if attach is None:
        layer_map(model).select(step.config.model_dump()["targets"])
        return
    with torch.device("meta"):
        attach(model, step.config, task=ref.task)


def model_of(plan: Plan) -> ModelRef:
    """The model that a plan starts from."""
    from tenfold.models.reference import ModelRef

    fields = plan.recipe.model_dump(exclude={"stages", "seed", "model"})
    return ModelRef(source=plan.recipe.model, **fields)


def _check_tagged(config: PastaConfig | ProfileConfig, rows: Rows, where: str) -> None:
    _check_kind(rows, ("preference",), f"{where}: steering")
    for row in rows:
        problem = untagged(getattr(row, "prompt", ""), config.tags)
        if problem:
            raise DataError(
                f"{where}: the prompt of row {row.id!r} of {rows.source} {problem}",
                remedy="put tags around what to emphasise, or name yours under `tags`",
            )
    if isinstance(config, ProfileConfig) or config.split == "held-out":
        rows.split(config.holdout)


def _check_training(config: TrainingFields, rows: Rows | None, where: str) -> None:
    kinds = ("preference",) if isinstance(config, R3MConfig) else TRAINED_ROWS
    _check_kind(rows, kinds, f"{where}: training")
    assert rows is not None
    rows.split(config.holdout)
    if isinstance(config, R3MConfig) and config.trusted is not None:
        trusted_rows(config)
    for name in config.report_to:
        package = {"tensorboard": "tensorboard"}.get(name, name)
        if find_spec(package) is None and not (name == "tensorboard" and find_spec("tensorboardX")):
            raise MissingDependencyError(f"{where}: report_to: {name} is not installed", f"pip install {package}")


def _check_outputs(config: AuditConfig, where: str) -> None:
    data = Path(str(config.data)).resolve()
    for key, path, suffix in (("csv", config.csv, ".csv"), ("clean", config.clean, ".jsonl")):
        if path is None:
            continue
        if path.suffix != suffix or path.is_dir():
            raise ConfigError(
                f"{where}: {key}: {path} is not a {suffix} file", remedy=f"give a name that ends in {suffix}"
            )
        if not path.absolute().parent.is_dir():
            raise ConfigError(
                f"{where}: {key}: there is no folder {path.parent}", remedy="make it, or give another one"
            )
        if path.resolve() == data or data in path.resolve().parents:
            raise ConfigError(
                f"{where}: {key}: {path} belongs to the data, which would be lost", remedy="give another file"
            )


def _check_kind(rows: Rows | None, kinds: tuple[str, ...], what: str) -> None:
    if rows is None:
        first = "step-audit" if kinds == ("preference",) else "python-reference"
        raise ConfigError(
            f"{what} needs {_listed(kinds)} rows, and data is missing",
            remedy=f"name a file, a folder or a hub id under `data` (--data), or {first} for a first try",
        )
    if rows.kind not in kinds:
        raise ConfigError(
            f"{what} needs {_listed(kinds)} rows, but {rows.source} holds {rows.kind} rows",
            remedy="choose other tasks or data, or say what the rows are with `rows` and `columns`",
        )


def _listed(kinds: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(kinds[:-1]), kinds[-1])))
