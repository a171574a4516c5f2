"""Stages describe themselves: those of this package, and those of any other."""

import json
import os
import subprocess
import sys

import pytest

from tenfold.config.lora import LoraConfig
from tenfold.config.stage import StageConfig
from tenfold.errors import ConfigError
from tenfold.pipeline import stages as registry


@pytest.fixture
def entry_points(monkeypatch):
    """Let installed packages offer these stages."""
    registry.stages.cache_clear()

    def offer(*points):
        monkeypatch.setattr(registry, "entry_points", lambda group: points)

    yield offer
    registry.stages.cache_clear()


class Point:
    def __init__(self, name, found):
        self.name, self.value, self._found = name, "package.module:CONFIG", found

    def load(self):
        return self._found


class MineConfig(LoraConfig):
    run = "package:run"


def test_another_package_adds_a_stage(entry_points):
    entry_points(Point("mine", MineConfig))
    assert registry.stage("mine") is MineConfig
    assert registry.verbs()["adapt"][-1] == "mine"


def test_a_taken_name_is_refused(entry_points):
    entry_points(Point("lora", MineConfig))
    with pytest.raises(ConfigError, match="registered already"):
        registry.stages()


class WithoutRun(StageConfig):
    verb = "adapt"
    summary = "none"


@pytest.mark.parametrize(("found", "message"), [(object(), "not a tenfold stage"), (WithoutRun, "run is missing")])
def test_something_else_than_a_stage_is_refused(entry_points, found, message):
    entry_points(Point("mine", found))
    with pytest.raises(ConfigError, match=message):
        registry.stages()


@pytest.mark.parametrize("name", registry.BUILT_IN)
def test_every_built_in_stage_says_all_of_itself(name):
    cls = registry.stage(name)
    assert callable(registry.load(cls.run))
    assert cls.attach is None or callable(registry.load(cls.attach))
    assert cls.verb
    assert cls.summary
    assert all(line.startswith(f"tenfold {cls.verb} ") for line in cls.examples)
    assert cls.examples
    assert set(cls().artefacts().values()) <= set(registry.load("tenfold.config.stage:ArtefactKind").__args__)


PACKAGE = {
    "counting/__init__.py": "",
    "counting/config.py": '''
from pathlib import Path
from typing import Annotated, ClassVar
from tenfold.config.data import DataFields
from tenfold.config.stage import Needs, Takes, check_kind

class CountConfig(DataFields):
    """Count the words of a text that stand on a list."""

    verb = "count"
    summary = "count words that stand on a list"
    examples = ("tenfold count --data notes.txt --words words.txt",)
    reads: ClassVar = ("text",)
    needs: ClassVar[Needs] = Needs(model=False)
    makes: ClassVar = {"found": "rows"}
    run = "counting.stage:run"

    words: Path = Path("words.txt")
    """File with a word a line."""

    def files(self):
        return {"words": self.words}

    def check(self, rows):
        check_kind(rows, self.reads, "counting")
''',
    "counting/stage.py": """
import json
from tenfold.stage.context import StageOutput
from tenfold.stage.results import Metric, Result

def run(config, context):
    words = set(config.words.read_text().split())
    count = sum(word in words for row in context.rows for word in row.text.split())
    (context.folder / "found.jsonl").write_text(json.dumps({"text": f"{count} words were found on the list here"}))
    result = Result(task="words", subject="after", metrics=(Metric(name="found", value=count),))
    return StageOutput(results=[result], artefacts={"found": "found.jsonl"})
""",
    "counting-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: counting\nVersion: 1.0\n",
    "counting-1.0.dist-info/entry_points.txt": "[tenfold.stages]\ncount = counting.config:CountConfig\n",
}


@pytest.fixture
def outside(tmp_path):
    """A package beside tenfold, and the command line as it then is."""
    for name, text in PACKAGE.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "notes.txt").write_text("a rose is a rose is a rose")
    (tmp_path / "words.txt").write_text("rose\n")

    def tenfold(*arguments):
        paths = os.pathsep.join([str(tmp_path / "site"), os.getcwd(), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "tenfold.cli", *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": paths}
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)

    return tenfold


def test_a_stage_of_another_package_has_all_that_ours_have(outside, tmp_path):
    assert "count words that stand on a list" in outside("--help").stdout
    shown = outside("count", "--help").stdout
    assert "--words" in shown
    assert "File with a word a line" in shown
    assert "tenfold count --data notes.txt" in shown
    assert "MODEL" not in shown

    done = outside("count", "--data", "notes.txt", "--out", "run")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run/01-count/summary.json").read_text())
    assert summary["results"][0]["metrics"][0]["value"] == 3
    assert summary["artefacts"] == {"found": "found.jsonl"}
    assert "finished already" in outside("count", "--data", "notes.txt", "--out", "run").stdout

    (tmp_path / "words.txt").write_text("a\n")  # a file that it names is hashed
    again = outside("count", "--data", "notes.txt", "--out", "run")
    assert "again, its inputs changed" in again.stdout
    stage = tmp_path / "site/counting/stage.py"  # and so is its code
    stage.write_text(stage.read_text().replace("sum(", "2 * sum("))
    again = outside("count", "--data", "notes.txt", "--out", "run")
    assert "again, its code changed" in again.stdout

    (tmp_path / "words.txt").unlink()
    gone = outside("count", "--data", "notes.txt", "--out", "run")
    assert gone.returncode == 2
    assert "tenfold count: --words: no file words.txt" in gone.stderr

    wrong = outside("count", "--data", "notes.txt", "--wrds", "x")
    assert wrong.returncode == 2
    assert "--words" in wrong.stderr


def test_a_stage_of_another_package_takes_its_place_in_recipes(outside, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "stages:\n"
        "- {use: count, id: first, data: notes.txt}\n"
        "- {use: count, id: second}\n"  # reads what the stage before it read
        '- {use: count, data: "${first.found}"}\n'
    )
    done = outside("validate", recipe)
    assert done.returncode == 0, done.stderr
    assert "03-count: rows from ${first.found}" in done.stdout
    assert outside("run", recipe, "--out", "run").returncode == 0
    counts = []
    for folder in ("01-count", "02-count", "03-count"):
        summary = json.loads((tmp_path / "run" / folder / "summary.json").read_text())
        counts.append(summary["results"][0]["metrics"][0]["value"])
    assert counts == [3, 3, 0]
    recipe.write_text("stages: [{use: count}]\n")
    missing = outside("validate", recipe)
    assert missing.returncode == 2
    assert "01-count: data: missing, and counting needs text rows" in missing.stderr
