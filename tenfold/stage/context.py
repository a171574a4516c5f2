"""What a stage is given and what it gives back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tenfold.files import write_text
from tenfold.stage.progress import Progress
from tenfold.stage.record import Figure, Sample, Table
from tenfold.stage.results import Result
from tenfold.stage.store import Store

if TYPE_CHECKING:
    from tenfold.data.left_out import LeftOut
    from tenfold.data.read import Rows


@dataclass(frozen=True)
class StageOutput:
    """What a stage found and made; the fields are those of `tenfold.stage.record.StageSummary`."""

    results: Sequence[Result] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    samples: Sequence[Sample] = ()
    notes: Sequence[str] = ()
    left_out: Sequence[LeftOut] = ()
    """Rows of its data that the model's chat template refused; listed with those that could not be read."""
    attached: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    artefact: str | None = None
    """The folder that the report and the next stage know."""
    replays: str | None = None
    """A page to look at, within the stage's folder; the report links to it."""
    artefacts: Mapping[str, str] = field(default_factory=dict)
    """Further artefacts: name as the configuration promises it -> file or folder within the stage's folder."""
    continues_with: Literal["adapter", "model"] | None = None


class MetricsLog:
    """``metrics.jsonl``: one line per logged step, in order, also after a resume."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Append one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def rewind(self, step: int) -> None:
        """Forget what was logged after `step`: training resumes from there."""
        if self.path.exists():
            lines = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
            write_text(self.path, "".join(line + "\n" for line in lines))


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):  # the line that was being written when the run was killed
        return float("inf")


STORE = "store.jsonl"
"""Finished work of a stage, in its working folder."""
RESUME = "resume-"
"""How files and folders of a stage begin that only a resume needs: they go once the stage is complete."""


@dataclass(frozen=True)
class Context:
    """What a stage works with."""

    folder: Path
    """Its working folder; everything in it appears under its final name when the stage is complete."""
    start: Any
    """The model that the recipe started from, a `tenfold.models.reference.ModelRef`; None of a stage without one."""
    model: Any
    """The model as the stages so far have left it, likewise."""
    rows: Rows | None
    """Its data, read and checked before any weight was loaded."""
    seed: int
    recipe: str
    """The resolved recipe."""
    progress: Progress
    other_rows: Mapping[str, Rows] = field(default_factory=dict)
    """Further rows, by the key that names them."""
    opening: Mapping[str, Any] = field(default_factory=dict)
    """How the recipe wants models to be opened: ``dtype``, ``load``, ``device``, ``trust_remote_code``, as those of
    `tenfold.models.reference.ModelRef`."""

    @property
    def metrics(self) -> MetricsLog:
        """The log of the stage's steps."""
        return MetricsLog(self.folder / "metrics.jsonl")

    @cached_property
    def store(self) -> Store:
        """What the stage has finished so far; empty whenever anything it depends on has changed."""
        return Store(self.folder / STORE)
