"""What every method does, whatever it does: one row in `rows.py` gives all of these tests."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from tenfold.adapt.training import last_checkpoint
from tenfold.errors import ConfigError
from tenfold.models.open import open_model
from tenfold.models.tiny import tiny_model
from tenfold.pipeline import run as runner
from tenfold.pipeline.recipe import read_recipe, resolve
from tenfold.pipeline.stages import stage

from .rows import ROWS

ROOT = Path(__file__).parents[2]
MODELS = [(name, model) for name, row in ROWS.items() for model in row.models]
IDS = torch.arange(5, 29).reshape(2, 12)


@pytest.fixture(params=ROWS)
def row(request):
    return ROWS[request.param]


@pytest.fixture
def recipe(row, number_rows):
    keys = {"use": row.name, "data": str(number_rows), "holdout": 0.3, **row.keys}
    return {"model": source_of(row), "stages": [keys, {"use": "evaluate", "tasks": ["perplexity"]}]}


def source_of(row):
    return f"tiny:{row.models[0]}"


def artefact_of(row, folder):
    return folder / f"01-{row.name}" / next(iter(stage(row.name).makes))


def needs_an_adapter(row):
    if "adapter" not in stage(row.name).makes:
        pytest.skip("its artefact is a model")


def config_of(row, **changes):
    return stage(row.name).parse({**row.keys, **changes}, "contract")


def execute(recipe, out):
    return runner.run(resolve(recipe, "contract"), out, Console(quiet=True))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize(("name", "kind"), MODELS)
def test_attaching_reports_and_detaching_leaves_no_trace(name, kind):
    row = ROWS[name]
    model = tiny_model(kind).model
    before, names = logits(model), [key for key, _ in model.named_parameters()]
    adapted = row.attach(model, config_of(row))
    report = row.report(adapted)
    assert report["matrices"] > 0
    assert report["trainable parameters"] == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert torch.equal(logits(adapted), before), "a fresh adapter must change nothing"
    restored = row.detach(adapted)
    assert torch.equal(logits(restored), before)
    assert [key for key, _ in restored.named_parameters()] == names
    hooks = [hook for module in restored.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]
    assert not hooks


def test_only_the_adapter_is_trained(row, recipe, tmp_path):
    execute(recipe, tmp_path)
    base, adapted = open_model(source_of(row)).model, open_model(artefact_of(row, tmp_path)).model
    assert not torch.allclose(logits(adapted), logits(base), atol=1e-3), "training must change the outputs"
    needs_an_adapter(row)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), logits(base))


def test_targets_that_match_nothing_are_an_error_also_beside_right_ones(row):
    if "targets" not in stage(row.name).model_fields:
        pytest.skip("it has no targets")
    with pytest.raises(ConfigError, match="nonsense"):
        row.attach(tiny_model(row.models[0]).model, config_of(row, targets=["attention", "nonsense"]))


def test_impossible_values_are_refused(row):
    for values in row.impossible:
        kept = {key: value for key, value in row.keys.items() if key not in ("rank", "budget")}
        with pytest.raises(ConfigError, match=next(iter(values))):
            stage(row.name).parse({**kept, **values}, "contract")


def test_the_artefact_needs_no_tenfold(row, recipe, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    execute(recipe, tmp_path)
    folder = artefact_of(row, tmp_path)
    assert (folder / "README.md").exists()
    if folder.name == "adapter":
        by_peer = PeftModel.from_pretrained(tiny_model(row.models[0]).model, folder)
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == source_of(row)
    else:
        by_peer = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(by_peer), logits(open_model(folder).model), atol=1e-6, rtol=0)


def test_interrupted_halfway_it_ends_as_if_it_never_was(row, recipe, tmp_path, monkeypatch):
    whole = execute(recipe, tmp_path / "whole")
    halfway = {}

    def stop(self, args, state, control, **_):
        if state.global_step == 5:
            halfway["from"] = last_checkpoint(Path(args.output_dir)).name
            raise KeyboardInterrupt

    from tenfold.adapt.training import _Watch

    with monkeypatch.context() as patch:
        patch.setattr(_Watch, "on_step_begin", stop)
        with pytest.raises(KeyboardInterrupt):
            execute(recipe, tmp_path / "cut")
    assert halfway["from"] == "checkpoint-3"
    again = execute(recipe, tmp_path / "cut")
    for first, second in zip(whole, again, strict=True):
        assert first.fingerprint == second.fingerprint
        figures = [
            [(m.name, m.value) for r in s.results for m in r.metrics if m.kind == "figure"] for s in (first, second)
        ]
        assert figures[0] == figures[1]
    first, second = ((artefact_of(row, tmp_path / name).glob("*.safetensors")) for name in ("whole", "cut"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second] != []


def test_the_summary_says_what_was_done(row, recipe, tmp_path):
    summary = execute(recipe, tmp_path)[0]
    assert summary.attached["trainable parameters"] > 0
    assert summary.inputs["data"]["sha256"]
    names = {metric.name for result in summary.results for metric in result.metrics}
    assert {"loss", "steps", "tokens", "speed", "peak memory growth"} <= names
    assert summary.config["max_length"] == row.keys["max_length"]


def test_trains_in_bfloat16(row, recipe, tmp_path):
    summary = execute({**recipe, "dtype": "bfloat16"}, tmp_path)[0]
    assert summary.results[0].metric("loss").value > 0


def test_what_the_house_asks_of_a_method_is_there(row):
    if row.baseline:
        return
    asked = [f"docs/methods/{row.name}.md", f"benchmarks/{row.name}.py", f"tests/oracles/test_{row.name}.py"]
    assert [path for path in asked if not (ROOT / path).exists()] == [], "write them: see CONTRIBUTING.md"
    page = (ROOT / asked[0]).read_text()
    assert f"options/{row.name}.md" in page, (
        f"link the options in {asked[0]}"
    )  # every key is explained there: tests/docs
    used = [yaml.safe_load(path.read_text()) for path in (ROOT / "recipes").glob("*.yaml")]
    assert any(entry["use"] == row.name for recipe in used for entry in recipe["stages"]), "no recipe uses it"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_needs_no_shared_data(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TENFOLD_DATA", raising=False)
    runner.check(read_recipe(path))
    assert not os.listdir(tmp_path)
