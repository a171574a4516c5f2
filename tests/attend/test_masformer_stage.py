"""The stage that gives layers a span: the model that it makes, and what the stages after it make of that."""

import pytest
import torch

from tenfold.errors import ConfigError
from tenfold.models.open import open_model
from tests.runs import execute

IDS = torch.arange(5, 85).reshape(2, 40)


@pytest.fixture
def recipe(number_rows):
    keys = {"budget": "50%", "window": 16, "passage": 24, "passages": 2}
    return {"model": "tiny:llama", "stages": [{"use": "masformer", "data": str(number_rows), **keys}]}


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


def test_the_artefact_is_the_converted_model_and_its_weights_are_the_old_ones(recipe, tmp_path):
    (summary,) = execute(recipe, tmp_path / "run")
    assert summary.continues_with == "model"
    assert len(summary.attached["full layers"]) == 1
    assert {"before", "after"} <= {result.subject for result in summary.results}
    base = open_model("tiny:llama").model
    converted = open_model(tmp_path / "run" / "01-masformer" / "model").model
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in converted.state_dict().items())
    assert not torch.allclose(logits(converted), logits(base), atol=1e-4)
    card = (tmp_path / "run" / "01-masformer" / "model/README.md").read_text()
    assert "It needs tenfold" in card
    assert "No tenfold needed" not in card
    assert any("refuses the folder" in note for note in summary.notes)


def test_heads_instead_of_layers(recipe, tmp_path):
    recipe["stages"][0] |= {"by": "heads", "budget": "3"}
    (summary,) = execute(recipe, tmp_path)
    assert len(summary.attached["full layers"]) == 1
    assert [len(heads) for heads in summary.attached["heads"].values()] == [1]
    converted = open_model(tmp_path / "01-masformer" / "model").model
    assert converted.config.tenfold_span["heads"] == summary.attached["heads"]
    table = {line[0]: line for line in summary.tables[0].rows}
    assert 1 < table[32768][-1] < 4
    with pytest.raises(ConfigError, match="budget: 5 is 5 heads of 4"):
        execute({**recipe, "stages": [{**recipe["stages"][0], "budget": "5"}]}, tmp_path / "more")


def test_what_follows_is_measured_on_the_small_cache(recipe, tmp_path):
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


def test_caches_are_compared_on_the_full_layers(recipe, tmp_path):
    keys = {"caches": ["gear:2,buffer=16", "gear:8,buffer=16"], "context": 64, "scored": 8, "texts": 2, "repeats": 1}
    recipe["stages"].append({"use": "gear", "timed_contexts": [64], "steps": 1, **keys})
    _, compared = execute(recipe, tmp_path)
    found = {r.subject: {m.name: m.value for m in r.metrics} for r in compared.results if r.task == "cache"}
    assert compared.attached == {"layers": 1, "of": 2}
    assert 0 < found["gear:8,buffer=16"]["kl"] < 0.1 * found["gear:2,buffer=16"]["kl"]
    assert found["gear:8,buffer=16"]["bits"] == pytest.approx(found["gear:8,buffer=16"]["formula_bits"])
    assert {r.subject for r in compared.results if r.task.startswith("decode")} >= {"exact", "gear:8,buffer=16"}
    assert any("layers of full attention are packed" in note for note in compared.notes)


def test_an_adapter_before_it_is_merged_and_one_after_it_keeps_it(recipe, tmp_path):
    train = {"use": "lora", "rank": 2, "steps": 4, "max_length": 32, "learning_rate": 0.05}
    recipe["stages"] = [{**train, "data": recipe["stages"][0]["data"]}, recipe["stages"][0], train]
    execute(recipe, tmp_path)
    adapted, merged = (
        open_model(tmp_path / "01-lora/adapter").model,
        open_model(tmp_path / "02-masformer/model").model,
    )
    weights = {name: value for name, value in merged.state_dict().items() if "q_proj" in name}
    base = open_model("tiny:llama").model.state_dict()
    assert weights
    assert not any(torch.equal(value, base[name]) for name, value in weights.items())
    assert not torch.allclose(logits(merged), logits(adapted), atol=1e-4), "its spans"
    assert open_model(tmp_path / "03-lora/adapter").model.config.tenfold_span == merged.config.tenfold_span
    for folder, needs in (("01-lora/adapter", "No tenfold needed"), ("03-lora/adapter", "It needs tenfold")):
        assert needs in (tmp_path / folder / "README.md").read_text()
