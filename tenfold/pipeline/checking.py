"""What can be known of a plan before any weight is loaded; `validate` and `run` both ask it of every stage first."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from tenfold.config.data import DataFields
from tenfold.config.shape import Shape
from tenfold.errors import ConfigError, TenfoldError
from tenfold.pipeline.recipe import ResolvedRecipe, Step
from tenfold.pipeline.references import is_reference
from tenfold.pipeline.stages import load

if TYPE_CHECKING:
    from tenfold.data.read import Rows
    from tenfold.models.reference import ModelRef


def check_stage(step: Step, rows: Rows | None) -> None:
    """Refuse a stage whose data does not fit it; rows that an earlier stage will make are checked when they are there.

    Args:
        step: of the plan.
        rows: its data, or None.

    Raises:
        TenfoldError: as `StageConfig.check` and `StageConfig.refuse`, with the stage named.
    """
    with naming(step):
        for key, path in step.config.files().items():
            if not path.is_file():
                raise ConfigError(f"{key}: no file {path}", remedy="give a file that is there")
        if not (isinstance(step.config, DataFields) and is_reference(step.config.data)):
            step.config.check(rows)
        if step.config.refuse is not None:
            load(step.config.refuse)(step.config)


@contextmanager
def naming(step: Step) -> Iterator[None]:
    """Put the stage before what is said of it."""
    try:
        yield
    except TenfoldError as error:
        raise type(error)(f"{step.folder}: {error.problem}", error.remedy) from None


def check_model(plan: ResolvedRecipe) -> list[str]:
    """Refuse what a plan asks of its models and cannot have, by configurations alone; no weight is read.

    Returns:
        Notes on what could not be looked at.

    Raises:
        ConfigError: a length, layer, budget, target, form, profile or device that this model or machine does not have.
        ModelError: no such model, or an architecture that a stage does not know.
    """
    steps = [step for step in plan.steps if step.config.needs.model]
    if not steps and not any(step.config.models() for step in plan.steps):
        return []
    if plan.recipe.load is not None:
        from tenfold.models.quantised import check_load

        check_load(plan.recipe.load)
    if plan.recipe.device not in (None, "cpu"):
        from tenfold.models.open import resolve_device

        resolve_device(plan.recipe.device)
    notes: dict[str, None] = {}
    shapes: dict[str | None, Shape | None] = {}
    for step in steps:
        if step.model not in shapes:
            with naming(step) if step.model is not None else nullcontext():
                shapes[step.model] = _shape(plan, step, notes)
        start = shapes[step.model]
        if start is None:
            continue
        with naming(step):
            after = _applied(step, start, plan)
        if step.model is None or step.config.leaves_model():
            shapes[None] = after  # what the stages before have left
        shapes |= {made.reference: after for made in plan.made.values() if made.step == step.index - 1}
    return list(notes)


def _shape(plan: ResolvedRecipe, step: Step, notes: dict[str, None]) -> Shape | None:
    """The shape of a model that is there before the run; None where it cannot be looked at."""
    from tenfold.models.shape import HubAwayError, shape_of

    try:
        return shape_of(model_of(plan, step))
    except HubAwayError as error:
        notes[f"{error.problem}: what its stages ask of it was not checked"] = None
        return None


def _applied(step: Step, shape: Shape, plan: ResolvedRecipe) -> Shape:
    config = step.config
    if config.needs.full_attention and shape.spans is not None:
        raise ConfigError(
            f"{shape.name} has local spans, and {step.name} needs full attention in every layer",
            remedy="put the stage before the one that made them local",
        )
    if config.writes_weights() and shape.quantised is not None:
        load = plan.recipe.load
        packed = f"load: {load} packs" if load else f"the files hold packed ({shape.quantised})"
        raise ConfigError(
            f"{packed} the weights of {shape.name}, and {step.name} writes whole ones",
            remedy=f"{'leave load out' if load else 'start from the unquantised model'}; "
            "on packed weights lora, adalora and r3m train adapters",
        )
    after = config.applied_to(shape)
    strange = "targets" in type(config).model_fields and not _comes_with_transformers(shape.model_type)
    # An artefact is not a folder yet: its matrices are looked at when the stage runs.
    if not is_reference(step.model) and (strange or config.needs_matrices(shape)):
        _check_matrices(step, dataclasses.replace(model_of(plan, step), task=after.task))
    return after


def _comes_with_transformers(model_type: str) -> bool:
    """Whether transformers has a folder for an architecture; its list of names would cost the import of torch."""
    spec = importlib.util.find_spec("transformers")
    name = model_type.replace("-", "_")
    models = Path(spec.origin).parent / "models" if spec is not None and spec.origin is not None else Path()
    return any((models / folder / "__init__.py").is_file() for folder in (name, name.removesuffix("_text")))


def _check_matrices(step: Step, ref: ModelRef) -> None:
    """Attach a stage's adapter to a model without storage: what does not fit is refused as it will be in the run."""
    import torch

    from tenfold.models.layer_map import layer_map
    from tenfold.models.meta_model import meta_model

    model = meta_model(ref)
    if step.config.fits is not None:
        load(step.config.fits)(model, step.config, ref.tokenizer)
        return
    if step.config.attach is None:
        layer_map(model).select(step.config.model_dump()["targets"])
        return
    with torch.device("meta"):
        load(step.config.attach)(model, step.config, task=ref.task)


def model_of(plan: ResolvedRecipe, step: Step | None = None) -> ModelRef:
    """The model that a plan, or a step of it, starts from; for a step without one of its own, that of the plan."""
    from tenfold.models.reference import ModelRef

    source = plan.recipe.model if step is None or step.model is None else step.model
    fields = plan.recipe.model_dump(include={"task", "dtype", "load", "device", "revision", "trust_remote_code"})
    if source != plan.recipe.model:
        fields["revision"] = None  # of another repository
    return ModelRef(source=str(source), **fields)
