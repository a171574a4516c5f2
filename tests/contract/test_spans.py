"""What a stage does that gives layers a span: one row in `rows.py` gives all of these tests."""

from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from tenfold.errors import ConfigError, DataError
from tenfold.models.open import open_model
from tenfold.models.tiny import tiny_model
from tenfold.pipeline import run as runner
from tenfold.pipeline.recipe import resolve
from tenfold.pipeline.stages import stage

from .rows import SPANS

ROOT = Path(__file__).parents[2]
KINDS = [(name, kind) for name, row in SPANS.items() for kind in row.models]
IDS = torch.arange(5, 85).reshape(2, 40)


@pytest.fixture(params=SPANS)
def row(request):
    return SPANS[request.param]


@pytest.fixture
def recipe(row, number_rows):
    return {"model": "tiny:llama", "stages": [{"use": row.name, "data": str(number_rows), **row.keys}]}


def execute(recipe, out):
    return runner.run(resolve(recipe, "contract"), out, Console(quiet=True))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_attaching_reports_and_detaching_leaves_no_trace(name, kind):
    model = tiny_model(kind).model
    before, implementation = logits(model), model.config._attn_implementation
    handle = SPANS[name].attach(model)
    assert handle.report()["full layers"] == [1]
    assert handle.report()["local layers"] == 1
    assert not torch.allclose(logits(model), before, atol=1e-4)
    handle.revert()
    assert torch.equal(logits(model), before)
    assert model.config._attn_implementation == implementation
    assert not [hook for m in model.modules() for hook in (*m._forward_hooks, *m._forward_pre_hooks)]


def test_impossible_values_are_refused(row):
    for values in row.impossible:
        with pytest.raises(ConfigError, match=next(iter(values))):
            stage(row.name).parse({**row.keys, **values}, "contract")


def test_the_artefact_is_the_converted_model_and_its_weights_are_the_old_ones(row, recipe, tmp_path):
    (summary,) = execute(recipe, tmp_path / "run")
    assert summary.continues_with == "model"
    assert len(summary.attached["full layers"]) == 1
    assert {"before", "after"} <= {result.subject for result in summary.results}
    base = open_model("tiny:llama").model
    converted = open_model(tmp_path / "run" / f"01-{row.name}" / "model").model
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in converted.state_dict().items())
    assert not torch.allclose(logits(converted), logits(base), atol=1e-4)
    card = (tmp_path / "run" / f"01-{row.name}" / "model/README.md").read_text()
    assert "It needs tenfold" in card
    assert "No tenfold needed" not in card
    assert any("refuses the folder" in note for note in summary.notes)


def test_interrupted_halfway_it_ends_as_if_it_never_was(row, recipe, tmp_path, monkeypatch):
    def figures(summaries):
        metrics = [(r.task, r.subject, m) for s in summaries for r in s.results for m in r.metrics]
        return [(task, subject, m.name, m.value) for task, subject, m in metrics if m.kind == "figure"]

    whole = execute(recipe, tmp_path / "whole")
    from tenfold.attend.masformer import stage as lengthening

    def stop(*args, **keys):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lengthening, "save_model", stop)
        with pytest.raises(KeyboardInterrupt):
            execute(recipe, tmp_path / "cut")
    assert not (tmp_path / "cut" / f"01-{row.name}").exists()
    again = execute(recipe, tmp_path / "cut")
    assert figures(whole) == figures(again)
    assert whole[0].attached == again[0].attached


def test_runs_in_bfloat16(row, recipe, tmp_path):
    (summary,) = execute({**recipe, "dtype": "bfloat16"}, tmp_path / "run")
    assert summary.results


def test_heads_instead_of_layers(row, recipe, tmp_path):
    recipe["stages"][0] |= {"by": "heads", "budget": "3"}
    (summary,) = execute(recipe, tmp_path)
    assert len(summary.attached["full layers"]) == 1
    assert [len(heads) for heads in summary.attached["heads"].values()] == [1]
    converted = open_model(tmp_path / f"01-{row.name}" / "model").model
    assert converted.config.tenfold_span["heads"] == summary.attached["heads"]
    table = {line[0]: line for line in summary.tables[0].rows}
    assert 1 < table[32768][-1] < 4
    with pytest.raises(ConfigError, match="budget: 5 is 5 heads of 4"):
        execute({**recipe, "stages": [{**recipe["stages"][0], "budget": "5"}]}, tmp_path / "more")


def test_what_follows_is_measured_on_the_small_cache(row, recipe, tmp_path):
    tasks = ["copying", "needle", "speed", "memory"]
    keys = {"passages": 1, "passage": 24, "between": 40, "prompt_tokens": 200, "new_tokens": 2, "repeats": 1}
    recipe["stages"] += [
        {"use": "evaluate", "tasks": tasks, **keys},
        {"use": "generate", "prompts": ["12"], "kv": "gear:4"},
    ]
    _, measured, written = execute(recipe, tmp_path)
    found = {(r.task, r.subject): {m.name: m.value for m in r.metrics} for r in measured.results}
    assert {task for task, _ in found} == set(tasks)
    for task in ("speed", "memory"):
        assert found[task, "after"]["cache"] < 0.7 * found[task, "before"]["cache"]
    assert any("layers of full attention" in note for note in written.notes)


def test_caches_are_compared_on_the_full_layers(row, recipe, tmp_path):
    keys = {"caches": ["gear:2,buffer=16", "gear:8,buffer=16"], "context": 64, "scored": 8, "texts": 2, "repeats": 1}
    recipe["stages"].append({"use": "gear", "timed_contexts": [64], "steps": 1, **keys})
    _, compared = execute(recipe, tmp_path)
    found = {r.subject: {m.name: m.value for m in r.metrics} for r in compared.results if r.task == "cache"}
    assert compared.attached == {"layers": 1, "of": 2}
    assert 0 < found["gear:8,buffer=16"]["kl"] < 0.1 * found["gear:2,buffer=16"]["kl"]
    assert found["gear:8,buffer=16"]["bits"] == pytest.approx(found["gear:8,buffer=16"]["formula_bits"])
    assert {r.subject for r in compared.results if r.task.startswith("decode")} >= {"exact", "gear:8,buffer=16"}
    assert any("layers of full attention are packed" in note for note in compared.notes)


def test_too_little_text_is_said_before_anything_is_measured(row, recipe, tmp_path):
    recipe["stages"][0]["passages"] = 10**4
    with pytest.raises(DataError, match="smaller passages"):
        execute(recipe, tmp_path / "run")


def test_what_the_house_asks_of_a_method_is_there(row):
    page = (ROOT / f"docs/methods/{row.name}.md").read_text()
    assert f"options/{row.name}.md" in page  # where every key is explained: tests/docs
    assert (ROOT / f"benchmarks/{row.name}.py").exists()
    assert (ROOT / f"tests/oracles/test_{row.name}.py").exists()
    used = [yaml.safe_load(path.read_text()) for path in (ROOT / "recipes").glob("*.yaml")]
    assert any(entry["use"] == row.name for recipe in used for entry in recipe["stages"])


def test_an_adapter_before_it_is_merged_and_one_after_it_keeps_it(row, recipe, tmp_path):
    train = {"use": "lora", "rank": 2, "steps": 4, "max_length": 32, "learning_rate": 0.05}
    recipe["stages"] = [{**train, "data": recipe["stages"][0]["data"]}, recipe["stages"][0], train]
    execute(recipe, tmp_path)
    adapted, merged = (
        open_model(tmp_path / "01-lora/adapter").model,
        open_model(tmp_path / f"02-{row.name}/model").model,
    )
    weights = {name: value for name, value in merged.state_dict().items() if "q_proj" in name}
    base = open_model("tiny:llama").model.state_dict()
    assert weights
    assert not any(torch.equal(value, base[name]) for name, value in weights.items())
    assert not torch.allclose(logits(merged), logits(adapted), atol=1e-4), "its spans"
    assert open_model(tmp_path / "03-lora/adapter").model.config.tenfold_span == merged.config.tenfold_span
    for folder, needs in (("01-lora/adapter", "No tenfold needed"), ("03-lora/adapter", "It needs tenfold")):
        assert needs in (tmp_path / folder / "README.md").read_text()


def test_training_on_an_adapter_folder_goes_on_from_it(number_rows, tmp_path):
    train = {"use": "lora", "data": str(number_rows), "rank": 2, "steps": 4, "max_length": 32, "learning_rate": 0.05}
    execute({"model": "tiny:llama", "stages": [train]}, tmp_path / "first")
    first = tmp_path / "first/01-lora/adapter"
    execute({"model": str(first), "stages": [{**train, "steps": 1, "learning_rate": 1e-9}]}, tmp_path / "second")
    again = open_model(tmp_path / "second/01-lora/adapter").model
    torch.testing.assert_close(logits(again), logits(open_model(first).model), atol=1e-4, rtol=0)
