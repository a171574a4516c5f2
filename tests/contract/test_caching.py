"""What every method does that stores the cache in another way: one row in `rows.py` gives all of these tests."""

from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from transformers import DynamicCache

from tenfold.errors import ConfigError, DataError
from tenfold.models.open import open_model
from tenfold.models.tiny import tiny_model
from tenfold.pipeline import run as runner
from tenfold.pipeline.recipe import resolve
from tenfold.pipeline.stages import stage

from .rows import CACHING

ROOT = Path(__file__).parents[2]
KINDS = [(name, kind) for name, row in CACHING.items() for kind in row.models]
IDS = torch.arange(5, 85).reshape(2, 40)


@pytest.fixture(params=CACHING)
def row(request):
    return CACHING[request.param]


@pytest.fixture
def recipe(row, number_rows):
    keys = {"use": row.name, "data": str(number_rows), **row.keys}
    return {"model": "tiny:llama", "stages": [keys]}


def execute(recipe, out):
    return runner.run(resolve(recipe, "contract"), out, Console(quiet=True))


@torch.no_grad()
def logits(model, cache=None):
    cache = DynamicCache(config=model.config) if cache is None else cache
    model.eval()(input_ids=IDS, past_key_values=cache)
    return model(input_ids=IDS[:, :3], past_key_values=cache).logits


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_attaching_reports_and_detaching_leaves_no_trace(name, kind):
    model = tiny_model(kind).model
    before, implementation = logits(model), model.config._attn_implementation
    try:
        with CACHING[name].attach(model) as cache:
            found = logits(model, cache)
            report = cache.report()
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert report["packed tokens"] >= 32
    assert report["bytes"] > report["packed bytes"] > 0
    assert not torch.equal(found, before)
    torch.testing.assert_close(found, before, atol=0.1, rtol=0)
    assert torch.equal(logits(model), before)
    assert model.config._attn_implementation == implementation
    assert not [hook for m in model.modules() for hook in (*m._forward_hooks, *m._forward_pre_hooks)]


def test_impossible_values_are_refused(row):
    for values in row.impossible:
        with pytest.raises(ConfigError, match=next(iter(values))):
            stage(row.name).parse({**row.keys, **values}, "contract")


def test_the_summary_says_what_was_done_and_weights_stay(row, recipe, tmp_path):
    before = {name: value.clone() for name, value in open_model("tiny:llama").model.state_dict().items()}
    (summary,) = execute(recipe, tmp_path / "run")
    assert summary.attached["layers"] == summary.attached["of"] == 2
    assert summary.continues_with is None
    assert {"exact", *row.keys["caches"]} <= {result.subject for result in summary.results}
    assert all(torch.equal(value, before[name]) for name, value in open_model("tiny:llama").model.state_dict().items())
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


def test_interrupted_halfway_it_ends_as_if_it_never_was(row, recipe, tmp_path, monkeypatch):
    def figures(summaries):
        metrics = [(r.task, r.subject, m) for s in summaries for r in s.results for m in r.metrics]
        return [(task, subject, m.name, m.value) for task, subject, m in metrics if m.kind == "figure"]

    whole = execute(recipe, tmp_path / "whole")
    from tenfold.stage import progress

    with monkeypatch.context() as patch:
        calls = []

        def stop(self, *args):
            calls.append(args)
            if len(calls) == 4:  # the quality is measured, the time of a token is not
                raise KeyboardInterrupt

        patch.setattr(progress.Progress, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            execute(recipe, tmp_path / "cut")
    assert not (tmp_path / "cut" / f"01-{row.name}").exists()
    again = execute(recipe, tmp_path / "cut")
    assert figures(whole) == figures(again)
    assert figures(whole)


def test_runs_in_bfloat16(row, recipe, tmp_path):
    (summary,) = execute({**recipe, "dtype": "bfloat16"}, tmp_path / "run")
    assert summary.results


def test_too_little_text_is_said_before_anything_is_measured(row, recipe, tmp_path):
    recipe["stages"][0]["texts"] = 10**4
    with pytest.raises(DataError, match="fewer or shorter pieces"):
        execute(recipe, tmp_path / "run")


def test_what_the_house_asks_of_a_method_is_there(row):
    page = (ROOT / f"docs/methods/{row.name}.md").read_text()
    assert f"options/{row.name}.md" in page  # where every key is explained: tests/docs
    assert (ROOT / f"benchmarks/{row.name}.py").exists()
    assert (ROOT / f"tests/oracles/test_{row.name}.py").exists()
    used = [yaml.safe_load(path.read_text()) for path in (ROOT / "recipes").glob("*.yaml")]
    assert any(entry["use"] == row.name for recipe in used for entry in recipe["stages"])
