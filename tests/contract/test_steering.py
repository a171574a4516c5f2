"""What every stage does that steers attention: one row in `rows.py` gives all of these tests."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from tenfold.attend.pasta.profiles import load_profile
from tenfold.errors import ConfigError
from tenfold.models.open import open_model
from tenfold.models.tiny import tiny_model
from tenfold.pipeline import run as runner
from tenfold.pipeline.recipe import resolve
from tenfold.pipeline.stages import stage

from .rows import MARKED, STEERING

ROOT = Path(__file__).parents[2]
KINDS = [(name, kind) for name, row in STEERING.items() for kind in row.models]
HEADS = {0: [1], 1: [0, 2]}


@pytest.fixture(params=STEERING)
def row(request):
    return STEERING[request.param]


@pytest.fixture
def recipe(row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "heads.json").write_text(json.dumps(HEADS))
    # max_position_embeddings: a byte a token, and prompts of questions are long
    return {"model": "tiny:llama", "stages": [{"use": row.name, **row.keys}]}


@pytest.fixture(autouse=True)
def long_enough(monkeypatch):
    """Byte-level prompts are long: the tiny model gets positions for them."""
    from tenfold.models import tiny

    monkeypatch.setitem(tiny._DECODER, "max_position_embeddings", 2048)


def execute(recipe, out):
    return runner.run(resolve(recipe, "contract"), out, Console(quiet=True))


@torch.no_grad()
def logits(opened):
    text = MARKED.replace("<mark>", "").replace("</mark>", "")
    return opened.model.eval()(**opened.tokenizer(text, return_tensors="pt")).logits


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_attaching_reports_and_detaching_leaves_no_trace(name, kind):
    fields = {"sliding_window": 256} if kind == "gemma3" else {}
    opened = tiny_model(kind, **fields)
    before, implementation = logits(opened), opened.model.config._attn_implementation
    try:
        with STEERING[name].attach(opened, HEADS) as steered:
            assert steered.report()["heads"] == 3
            assert not torch.allclose(logits(opened), before, atol=1e-4)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert torch.equal(logits(opened), before)
    assert opened.model.config._attn_implementation == implementation
    assert not [hook for m in opened.model.modules() for hook in (*m._forward_hooks, *m._forward_pre_hooks)]


@pytest.mark.parametrize("heads", [{7: [0]}, {0: [4]}, {0: [-1]}])
def test_heads_that_the_model_does_not_have_are_an_error_also_beside_right_ones(row, heads):
    with pytest.raises(ConfigError, match="heads"):
        row.attach(tiny_model("llama"), {1: [0], **heads}).__enter__()


def test_impossible_values_are_refused(row):
    for values in row.impossible:
        with pytest.raises(ConfigError, match=next(iter(values))):
            stage(row.name).parse({**row.keys, **values}, "contract")


def test_the_summary_says_what_was_done_and_weights_stay(row, recipe, tmp_path):
    before = {name: value.clone() for name, value in open_model("tiny:llama").model.state_dict().items()}
    (summary,) = execute(recipe, tmp_path / "run")
    assert summary.attached["heads"] > 0
    assert summary.continues_with is None
    assert {"before", "after"} <= {result.subject for result in summary.results}
    assert all(torch.equal(value, before[name]) for name, value in open_model("tiny:llama").model.state_dict().items())
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


def test_interrupted_halfway_it_ends_as_if_it_never_was(row, recipe, tmp_path, monkeypatch):
    def figures(summaries):
        return [
            (r.task, r.subject, m.name, m.value)
            for s in summaries
            for r in s.results
            for m in r.metrics
            if m.kind == "figure"
        ]

    whole = execute(recipe, tmp_path / "whole")
    from tenfold.stage import progress

    with monkeypatch.context() as patch:
        calls = []

        def stop(self, *args):
            calls.append(args)
            if len(calls) == 3:
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


@pytest.mark.parametrize("row", ["profile"], indirect=True)
def test_a_profile_is_plain_json_that_the_next_stage_takes(recipe, tmp_path):
    stages = [*recipe["stages"], {"use": "pasta", "prompts": [MARKED], "max_new_tokens": 3}]
    plan = resolve({**recipe, "stages": stages}, "contract")
    assert plan.steps[1].config.profile == "${01-profile.profile}"
    summaries = execute({**recipe, "stages": stages}, tmp_path / "run")
    path = tmp_path / "run/01-profile/profile/profile.json"
    heads = json.loads(path.read_text())["heads"]
    assert summaries[1].attached["heads"] == sum(map(len, heads.values())) == load_profile(path).size
    assert set(summaries[1].samples[0].outputs) == {"before", "after"}


def test_what_the_house_asks_of_a_method_is_there(row):
    page = (ROOT / f"docs/methods/{row.page}.md").read_text()
    assert f"options/{row.name}.md" in page  # where every key is explained: tests/docs
    assert (ROOT / f"benchmarks/{row.page}.py").exists()
    assert (ROOT / f"tests/oracles/test_{row.page}.py").exists()
    used = [yaml.safe_load(path.read_text()) for path in (ROOT / "recipes").glob("*.yaml")]
    assert any(entry["use"] == row.name for recipe in used for entry in recipe["stages"])
