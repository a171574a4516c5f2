"""What each stage of a plan depends on: its rows, files, models and code, hashed before anything runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.config.data import DataFields
from tenfold.config.stage import StageConfig
from tenfold.models.reference import ModelRef
from tenfold.pipeline.checking import check_model, check_stage, model_of
from tenfold.pipeline.recipe import ResolvedRecipe, Step
from tenfold.pipeline.references import is_reference
from tenfold.stage.record import StageSummary

if TYPE_CHECKING:
    from tenfold.data.read import Rows


@dataclass(frozen=True)
class Job:
    """A step with everything its result depends on.

    Args:
        step: of the plan.
        rows: its data; None where it has none, or an earlier stage will make it.
        other_rows: further rows, by key.
        basis: what the result depends on, as plain values.
        previous: the fingerprint of the step before.
    """

    step: Step
    rows: Rows | None
    other_rows: Mapping[str, Rows]
    basis: dict[str, Any]
    previous: str

    @property
    def fingerprint(self) -> str:
        """One hash of it all."""
        return hashlib.sha256(json.dumps(self.basis, sort_keys=True).encode()).hexdigest()


def jobs(plan: ResolvedRecipe) -> list[Job]:
    """Each step with its data and all that its result depends on.

    All data is read first: a bad row in the last stage must not surface after hours of training.

    Raises:
        TenfoldError: data, files or models that are missing or do not fit.
    """
    read = [(rows_of(step.config), other_rows_of(step.config)) for step in plan.steps]
    for step, (rows, _) in zip(plan.steps, read, strict=True):
        check_stage(step, rows)
    check_model(plan)
    found: list[Job] = []
    for step, (rows, others) in zip(plan.steps, read, strict=True):
        previous = found[-1].fingerprint if found else ""
        inputs = {**_model(plan, step), **hashes(step.config, rows, others)}
        basis = {
            "previous": previous,
            "stage": step.name,
            "config": step.config.decisive(),
            "seed": plan.recipe.seed,
            "device": [plan.recipe.dtype, plan.recipe.device, *filter(None, [plan.recipe.load])],
            "inputs": inputs,
            "code": code_hash(type(step.config)),
        }
        found.append(Job(step, rows, others, basis, previous))
    return found


def rows_of(config: StageConfig) -> Rows | None:
    """The data of a stage, read; None where it has none yet.

    Raises:
        DataError: naming file, line and column.
    """
    if not isinstance(config, DataFields) or config.data is None or is_reference(config.data):
        return None
    from tenfold.data.read import read_rows

    how = {name: getattr(config, name) for name in ("rows", "columns", "limit", "on_bad_row")}
    return read_rows(config.data, **how)


def other_rows_of(config: StageConfig) -> dict[str, Rows]:
    """Its further rows, read.

    Raises:
        DataError: naming file, line and column.
    """
    from tenfold.data.read import read_rows

    return {
        key: read_rows(source, rows=kind, columns=columns, on_bad_row=on_bad_row)
        for key, (source, kind, columns, on_bad_row) in config.other_rows().items()
        if not is_reference(source)
    }


def hashes(config: StageConfig, rows: Rows | None, others: Mapping[str, Rows]) -> dict[str, Any]:
    """Hashes of data, files and further models; what an earlier stage makes has that stage's fingerprint."""
    found: dict[str, Any] = {}
    if rows is not None:
        found["data"] = {"source": rows.source, "sha256": rows.sha256, "rows": len(rows)}
        if config.reads_columns:
            found["other columns"] = hashlib.sha256(repr(rows.others).encode()).hexdigest()
    found |= {key: some.sha256 for key, some in others.items()}
    found |= {key: _sha256(path) for key, path in config.files().items()}
    models = {key: source for key, source in config.models().items() if not is_reference(source)}
    return found | {key: ModelRef(source).identity() for key, source in models.items()}


def code_hash(cls: type[StageConfig]) -> str:
    """A hash of the source of a stage: of its configuration, and of the folder of its method.

    A fault that was mended there is measured again; code that it shares with others does not count.
    """
    module = cls.run.partition(":")[0]
    path = _source(module)
    files = sorted(path.parent.glob("*.py")) if path.name == "stage.py" else [path]
    content = b"".join(file.read_bytes() for file in (*files, _source(cls.__module__)) if file.is_file())
    return hashlib.sha256(content).hexdigest()[:16]


def why_again(old: StageSummary, job: Job) -> str:
    """What differs from the run that a summary is of, in words."""
    new = job.basis
    keys = sorted(key for key, value in new["config"].items() if old.config.get(key, ...) != value)
    reasons = [f"{', '.join(keys)} changed"] if keys else []
    reasons += ["its inputs changed"] if old.inputs != new["inputs"] else []
    reasons += ["the seed changed"] if old.seed != new["seed"] else []
    reasons += ["its code changed"] if old.code != new["code"] else []
    reasons += ["a stage before it changed"] if old.previous != job.previous else []
    return ", ".join(reasons) or "device or number format changed"


def _model(plan: ResolvedRecipe, step: Step) -> dict[str, Any]:
    if not step.config.needs.model:
        return {}
    if is_reference(step.model):
        return {"model": step.model}
    return {"model": model_of(plan, step).identity()}


def _source(module: str) -> Path:
    """The file of a module; nothing but its top package is imported."""
    top, *rest = module.split(".")
    spec = find_spec(top)
    if spec is None or spec.submodule_search_locations is None:
        return Path(spec.origin or "" if spec else "")
    path = Path(next(iter(spec.submodule_search_locations))).joinpath(*rest)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
