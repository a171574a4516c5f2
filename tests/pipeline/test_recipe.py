import re

import pytest
import yaml

from tenfold.config.reading import read_yaml
from tenfold.errors import ConfigError
from tenfold.pipeline.recipe import read_recipe, resolve

MINIMAL = {"model": "demo", "stages": [{"use": "lora", "data": "python-reference"}, {"use": "evaluate"}]}


def test_evaluation_reads_the_held_out_share_of_what_was_trained_on():
    plan = resolve(MINIMAL, "test")
    assert plan.steps[1].config.data == "python-reference"
    assert plan.steps[1].config.split == "held-out"


def test_naming_the_training_data_again_does_not_leak_it_into_the_evaluation():
    values = {**MINIMAL, "stages": [MINIMAL["stages"][0], {"use": "evaluate", "data": "python-reference"}]}
    assert resolve(values, "test").steps[1].config.split == "held-out"


@pytest.mark.parametrize("name", ["rows.jsonl", "~/rows.jsonl"])
def test_the_same_file_under_another_name_is_the_same_data(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text("")
    stages = [{"use": "lora", "data": name}, {"use": "evaluate", "data": str(tmp_path / "rows.jsonl")}]
    assert resolve({"model": "demo", "stages": stages}, "test").steps[1].config.split == "held-out"


@pytest.mark.parametrize("change", [{"holdout": 0.5}, {"limit": 3}, {"rows": "text"}, {"columns": {"text": "body"}}])
def test_an_evaluation_that_would_hold_out_other_rows_than_the_training_is_refused(change):
    values = {**MINIMAL, "stages": [MINIMAL["stages"][0], {"use": "evaluate", **change}]}
    with pytest.raises(ConfigError, match=f"{next(iter(change))}: .*an earlier stage trained on this data"):
        resolve(values, "test")
    values["stages"][1]["split"] = "all"
    assert resolve(values, "test").steps[1].config.split == "all"


def test_the_holdout_of_the_training_is_that_of_the_evaluation():
    values = {**MINIMAL, "stages": [{**MINIMAL["stages"][0], "holdout": 0.05}, {"use": "evaluate"}]}
    assert resolve(values, "test").steps[1].config.holdout == 0.05


def test_other_data_is_measured_whole():
    values = {**MINIMAL, "stages": [MINIMAL["stages"][0], {"use": "evaluate", "data": "test.jsonl"}]}
    assert resolve(values, "test").steps[1].config.split == "all"


def test_the_resolved_recipe_gives_the_same_plan_again(tmp_path):
    plan = resolve(MINIMAL, "test")
    path = tmp_path / "recipe.yaml"
    path.write_text(plan.to_yaml())
    assert read_recipe(path).steps == plan.steps


def test_set_changes_keys_of_recipe_and_stages(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    plan = read_recipe(path, ["model=other/model", "seed=3", "lora.rank=4", "evaluate.tasks=[speed]"])
    columns = read_recipe(path, ["lora.columns={text: body}", "lora.columns.prompt=question"]).steps[0].config.columns
    assert columns == {"text": "body", "prompt": "question"}  # a key within a key leaves the others
    assert (plan.recipe.model, plan.recipe.seed) == ("other/model", 3)
    assert plan.steps[0].config.rank == 4
    assert plan.steps[1].config.tasks == ("speed",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: demo\nstages: [", "line 2, column 10"),
        ("- a\n- b", "not a recipe"),
        ("model: demo", "stages: missing"),
        ("model: demo\nstages: []", "stages"),
        ("model: demo\nstages: [{data: x}]", "use: missing"),
        ("model: demo\nstages: [{use: lara}]", "did you mean 'lora'"),
        ("model: demo\nstages: [{use: lora, rank: 0}]", r"stage 1 \(lora\): rank: .*must be at least 1, got 0"),
        ("model: demo\nstages: [{use: lora, steps: 1, steps: 2}]", "'steps' is given twice"),
        ("model: demo\ntask: seq2seq\nstages: [{use: lora}]", "works on causal models"),
        ("model: demo\nseed: 5000000000\nstages: [{use: lora}]", "seed"),
        ("model: demo\nstages: [{use: lora, data: [a]}]", "data"),
        ("modle: demo\nstages: [{use: lora}]", "did you mean 'model'"),
        ("model: demo\nstages: [{use: evaluate, tasks: [perplexety]}]", "unknown task 'perplexety'"),
    ],
)
def test_bad_recipes_name_the_place_and_the_remedy(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_recipe(path)
    assert caught.value.remedy


def test_absent_recipe(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_recipe(tmp_path / "none.yaml")


def test_a_key_of_a_stage_without_the_stage_says_whose_it_is(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(ConfigError, match="rank is a key of the stage lora") as caught:
        read_recipe(path, ["rank=3"])
    assert caught.value.remedy == "write --set lora.rank=3"


@pytest.mark.parametrize("source", ["tiny:llama", "${models.small}"])
def test_without_a_model_the_recipe_starts_from_that_of_its_first_stage(source):
    lora = {"use": "lora", "model": source, "data": "python-reference"}
    models = {"small": "tiny:llama"}
    plan = resolve({"models": models, "stages": [lora, {"use": "evaluate", "tasks": ["speed"]}]}, "test")
    assert plan.recipe.model == "tiny:llama"  # so that `evaluate` compares with it
    assert [step.model for step in plan.steps] == [None, None]
    assert resolve(read_yaml(plan.to_yaml()), "test").to_yaml() == plan.to_yaml()
    alone = resolve({"models": models, "stages": [lora]}, "test")
    assert (alone.recipe.model, alone.steps[0].model) == (None, "tiny:llama")


def test_a_look_at_a_model_leaves_none_to_go_on_with():
    look = {"use": "evaluate", "model": "tiny:llama", "tasks": ["speed"]}
    with pytest.raises(ConfigError, match=r"stage 2.*names none"):
        resolve({"stages": [look, {"use": "evaluate", "tasks": ["speed"]}]}, "test")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"use": "lora"}, "stages: a list is asked for, got {'use': 'lora'}"),
        (None, "stages: a list is asked for, got None"),
        ([{"use": "lora"}, "evaluate"], "stages: stage 2: keys and values are asked for, got 'evaluate'"),
    ],
)
def test_stages_that_are_no_list_have_a_remedy_of_one_line(stages, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        resolve({"model": "demo", "stages": stages}, "test")
    assert caught.value.remedy == "write each stage as `- {use: NAME, KEY: VALUE}`, with its dash"


@pytest.mark.parametrize("change", ["lora.rank", "nothing.rank=3", "lora.rank=["])
def test_bad_changes(tmp_path, change):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(ConfigError, match="--set"):
        read_recipe(path, [change])
