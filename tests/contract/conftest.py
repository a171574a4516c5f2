"""The runs that the contract looks at: each is made once for a row, however many tests ask for it."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tenfold.adapt.training import _Watch
from tenfold.models import tiny
from tenfold.models.opened import Opened
from tenfold.models.reference import ModelRef
from tenfold.pipeline import run as runner
from tenfold.stage import progress
from tenfold.stage.record import StageSummary

from ..runs import execute
from .rows import HEADS, Row


@dataclass
class Made:
    """A finished run of a row.

    Args:
        row: of the contract.
        out: the run folder.
        summaries: of all its stages.
        calls: of `Progress` in the row's stage.
        opened: what the row's stage opened, and the models as it left them.
        left: files in the row's working folder, each time it was interrupted.
    """

    row: Row
    out: Path
    summaries: list[StageSummary] = field(default_factory=list)
    calls: int = 0
    opened: list[tuple[ModelRef, Opened]] = field(default_factory=list)
    left: list[set[str]] = field(default_factory=list)

    @property
    def summary(self) -> StageSummary:
        """Of the row's own stage."""
        return self.summaries[len(self.row.before)]

    @property
    def folder(self) -> Path:
        """Of the row's own stage."""
        return self.out / f"{len(self.row.before) + 1:02}-{self.row.use}"

    def artefact(self, name: str) -> Path:
        """Where an artefact lies."""
        return self.folder / self.summary.artefacts[name]


def hooks(model: Any) -> list[Any]:
    """That hang on any module of a model."""
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


@pytest.fixture(scope="package", autouse=True)
def files(tmp_path_factory, number_rows):
    """Runs work in a folder that holds the files which rows name, on tiny models that read long prompts."""
    folder = tmp_path_factory.mktemp("contract")
    (folder / "numbers.jsonl").write_text(number_rows.read_text())
    (folder / "heads.json").write_text(json.dumps(HEADS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # A byte a token, and prompts of questions are long.
        patch.setitem(tiny._DECODER, "max_position_embeddings", 2048)
        yield folder


def once(make: Callable[[Row, Path], Made], files: Path, name: str) -> Callable[[Row], Made]:
    """Make a run of each row that is asked for, and keep it."""
    made: dict[str, Made] = {}

    def of(row: Row) -> Made:
        if row.name not in made:
            made[row.name] = make(row, files / f"{row.name} {name}")
        return made[row.name]

    return of


@pytest.fixture(scope="package")
def whole(files):
    """A run of a row from its beginning to its end."""
    return once(_whole, files, "whole")


@pytest.fixture(scope="package")
def resumed(files, whole):
    """The same run, interrupted half-way and again when all is measured, from another state of all generators."""
    return once(lambda row, out: _resumed(row, out, whole(row)), files, "resumed")


@pytest.fixture(scope="package")
def in_bfloat16(files):
    """The same run on a model in bfloat16."""
    return once(_in_bfloat16, files, "bfloat16")


def _whole(row: Row, out: Path) -> Made:
    made = Made(row, out)
    with pytest.MonkeyPatch.context() as patch:
        own = _during(patch, row)
        told, opens = progress.Progress.__call__, ModelRef.open

        def tell(self: Any, *args: Any) -> None:
            made.calls += bool(own)
            told(self, *args)

        def open_and_keep(self: ModelRef, merge: bool = False) -> Opened:
            opened = opens(self, merge)
            if own:
                made.opened.append((self, opened))
            return opened

        patch.setattr(progress.Progress, "__call__", tell)
        patch.setattr(ModelRef, "open", open_and_keep)
        made.summaries = execute(row.recipe(), out)
    return made


def _resumed(row: Row, out: Path, whole: Made) -> Made:
    made = Made(row, out)
    for interrupt in (_in_a_step if row.trains else _half_way(whole.calls), _when_all_is_measured):
        torch.manual_seed(99)
        random.seed(99)
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, row)
            with pytest.raises(KeyboardInterrupt):
                execute(row.recipe(), out)
        assert not made.folder.exists()
        work = out / f".{made.folder.name}"
        made.left.append({str(path.relative_to(work)) for path in work.rglob("*")})
    made.summaries = execute(row.recipe(), out)
    return made


def _in_bfloat16(row: Row, out: Path) -> Made:
    return Made(row, out, execute({**row.recipe(), "dtype": "bfloat16"}, out))


def _during(patch: pytest.MonkeyPatch, row: Row) -> list[None]:
    """A list that holds something as long as the row's own stage is at work."""
    own: list[None] = []
    executes = runner._execute

    def execute_one(at_work: Any, job: Any, *rest: Any) -> StageSummary:
        if job.step.index == len(row.before) + 1:
            own.append(None)
        try:
            return executes(at_work, job, *rest)
        finally:
            own.clear()

    patch.setattr(runner, "_execute", execute_one)
    return own


def _half_way(calls: int) -> Callable[[pytest.MonkeyPatch, Row], None]:
    """At half of what a stage tells of its progress."""

    def interrupt(patch: pytest.MonkeyPatch, row: Row) -> None:
        own, told = _during(patch, row), []

        def stop(self: Any, *args: Any) -> None:
            told.extend(own)
            if len(told) == calls // 2 + 1:
                raise KeyboardInterrupt

        patch.setattr(progress.Progress, "__call__", stop)

    return interrupt


def _in_a_step(patch: pytest.MonkeyPatch, row: Row) -> None:
    """Some steps after the first checkpoint of a training."""
    own, step = _during(patch, row), 2 * row.config.save_every - 1

    def stop(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if own and state.global_step == step:
            raise KeyboardInterrupt

    patch.setattr(_Watch, "on_step_begin", stop)


def _when_all_is_measured(patch: pytest.MonkeyPatch, row: Row) -> None:
    """Just before a stage would be complete."""
    own, makes = _during(patch, row), runner._made

    def stop(*args: Any) -> dict[str, str]:
        if own:
            raise KeyboardInterrupt
        return makes(*args)

    patch.setattr(runner, "_made", stop)
