"""Trainings that several files look at, each made once."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tenfold.stage.record import StageSummary
from tenfold.stage.store import Store
from tests.preferences import TARGETS, recipe
from tests.runs import execute


@dataclass(frozen=True)
class Trained:
    """A finished run of R3M alone.

    Args:
        out: the run folder, which tests only read.
        summary: of its stage.
    """

    out: Path
    summary: StageSummary

    @property
    def folder(self):
        """Of the stage."""
        return self.out / "01-r3m"

    def copied(self, out):
        """The run folder once more, for a longer recipe that goes on from it."""
        return shutil.copytree(self.out, out)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The run of one of `TARGETS`."""
    made = {}

    def of(target):
        if target not in made:
            out = tmp_path_factory.mktemp("trained") / target
            (summary,) = execute(recipe(**TARGETS[target]), out)
            made[target] = Trained(out, summary)
        return made[target]

    return of


@pytest.fixture
def kept(monkeypatch):
    """Keys of all that stages keep from now on, for the case that they are interrupted."""
    keys, add = [], Store.add

    def spy(self, entries):
        keys.extend(entries)
        add(self, entries)

    monkeypatch.setattr(Store, "add", spy)
    return keys
