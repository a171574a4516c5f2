"""What every method does, whatever its kind: one row in `rows.py` gives all of these tests, and those of its kind."""

import os
import re
from pathlib import Path

import pytest
import torch
import yaml

from tenfold import cli
from tenfold.errors import ConfigError, DataError
from tenfold.pipeline import run as runner
from tenfold.pipeline.recipe import read_recipe

from ..runs import execute, figures
from .conftest import hooks
from .rows import ROWS, params

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
every = pytest.mark.parametrize("row", params())


@every
def test_the_summary_says_what_was_done(row, whole):
    summary = whole(row).summary
    assert row.attached(summary.attached)
    assert row.subjects <= {result.subject for result in summary.results}
    for sample in summary.samples:
        assert row.subjects <= set(sample.outputs)
    assert row.metrics <= {metric.name for result in summary.results for metric in result.metrics}
    assert summary.continues_with == (row.model and row.makes[row.model])
    wanted = row.config.model_dump(mode="json", include=set(row.keys))
    assert {key: summary.config[key] for key in wanted} == wanted
    if summary.config.get("data") is not None:
        assert summary.inputs["data"]["sha256"]
    assert (whole(row).out / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("row", params(lambda row: row.model is None))
def test_a_method_that_makes_no_model_leaves_the_one_it_was_given_as_it_was(row, whole):
    assert whole(row).opened
    for ref, opened in whole(row).opened:
        fresh = ref.open().model
        before, after = fresh.state_dict(), opened.model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        assert opened.model.config._attn_implementation == fresh.config._attn_implementation
        assert not hooks(opened.model)


@every
def test_interrupted_twice_it_ends_as_if_it_never_was(row, whole, resumed):
    assert figures(whole(row).summaries)
    assert figures(resumed(row).summaries) == figures(whole(row).summaries)
    for first, second in zip(whole(row).summaries, resumed(row).summaries, strict=True):
        assert first.fingerprint == second.fingerprint
        assert first.attached == second.attached
    for name in row.makes:
        assert written(resumed(row).artefact(name)) == written(whole(row).artefact(name))


def written(path):
    """What a file or a folder of an artefact holds, but times and what is said of it to people, which names times."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {
        str(file.relative_to(path)): re.sub(rb'"seconds": [\d.]+', b"", file.read_bytes())
        for file in files
        if file.name != "README.md"
    }


@every
def test_runs_in_bfloat16(row, in_bfloat16):
    assert in_bfloat16(row).summary.results


@every
def test_impossible_values_are_refused(row):
    for values in row.impossible:
        with pytest.raises(ConfigError, match=next(iter(values))):
            type(row.config).parse({**row.keys, **values}, "contract")


@pytest.mark.parametrize("row", params(lambda row: row.too_little))
def test_too_little_data_is_said_before_anything_is_measured(row, tmp_path):
    keys, said = row.too_little
    with pytest.raises(DataError, match=said):
        execute(row.recipe(**keys), tmp_path / "run")
    assert not list(tmp_path.rglob("store.jsonl"))


@every
def test_help_has_its_examples_and_every_flag(row, capsys):
    assert cli.main([row.config.verb, "--method", row.use, "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for line in row.config.examples:
        assert line.startswith(f"tenfold {row.config.verb} ")
        assert line in out
    for key in type(row.config).model_fields:
        assert f"--{key.replace('_', '-')}" in out


@every
def test_its_pages_are_there(row):
    page = (ROOT / f"docs/methods/{row.method}.md").read_text()
    assert (ROOT / f"docs/options/{row.use}.md").exists()  # where every key is explained: tests/docs
    assert row.baseline or f"options/{row.use}.md" in page, f"link the options in docs/methods/{row.method}.md"


@pytest.mark.parametrize("row", params(lambda row: not row.baseline))
def test_what_the_house_asks_of_a_method_is_there(row):
    asked = [f"benchmarks/{row.method}.py", f"tests/oracles/test_{row.method}.py"]
    assert [path for path in asked if not (ROOT / path).exists()] == [], "write them: see CONTRIBUTING.md"
    used = {entry["use"] for path in RECIPES for entry in yaml.safe_load(path.read_text())["stages"]}
    assert used & {row.use, *(stage["use"] for stage in row.before)}, "no recipe uses it"


def test_every_method_has_a_row():
    assert {path.stem for path in (ROOT / "docs/methods").glob("*.md")} == {row.method for row in ROWS}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_needs_no_shared_data(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TENFOLD_DATA", raising=False)
    runner.check(read_recipe(path))
    assert not os.listdir(tmp_path)
