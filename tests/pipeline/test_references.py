"""``${id.name}``: what a stage makes stands wherever a later one takes a path."""

import json

import pytest
import yaml
from rich.console import Console

from tenfold.errors import ConfigError, ModelError
from tenfold.pipeline import run as runner
from tenfold.pipeline.inputs import jobs
from tenfold.pipeline.recipe import read_recipe, resolve

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
PREFERENCES = "step-audit:60:0"
REWARD = {"use": "r3m", "id": "judge", "data": PREFERENCES, "steps": 2, "rank": 2, "max_length": 512}


def execute(stages, out, **keys):
    plan = resolve({"model": "tiny:llama", "stages": stages, **keys}, "test")
    return runner.run(plan, out, Console(quiet=True))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"use": "lora", "data": "${clean.cleaned}"}], r"nothing before this stage makes \${clean.cleaned}"),
        ([{"use": "lora", "data": "${clean"}], "cannot read"),
        ([REWARD, {"use": "audit", "data": "${judge.adaptor}"}], r"did you mean \${judge.adapter}\?"),
        ([REWARD, {"use": "audit", "data": "${judge.adapter}"}], "is of kind adapter, and rows is asked for"),
        ([REWARD, {**REWARD, "id": "judge"}], "names an earlier stage"),
        ([{**REWARD, "id": "a b"}], "is not a name"),
        ([{**REWARD, "id": "models"}], "models is taken"),
        ([{"use": "generate", "model": "${models.other}"}], "nothing before"),
        ([{"use": "generate", "model": "${judge.training}"}, REWARD], "the stage judge does not come before it"),
        ([{"use": "generate", "id": "said"}, {"use": "lora", "data": "${said.texts}"}], "the stage said makes nothing"),
        (
            [{"use": "lora", "id": "one"}, {"use": "pasta", "profile": "${one.adapter}"}],
            "that makes something of kind profile",
        ),
        ([REWARD, {"use": "generate", "modle": "demo"}], "did you mean 'model'"),
        ([REWARD, {"use": "generate", "model": "${judge.training}"}], "kind rows, and model or adapter"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(stages, message):
    with pytest.raises(ConfigError, match=message):
        resolve({"model": "tiny:llama", "stages": stages}, "test")


def test_a_name_under_models_is_referred_to():
    with pytest.raises(ConfigError, match=r"write \${models.teacher}"):
        resolve({"models": {"teacher": "demo"}, "stages": [{"use": "generate", "model": "teacher"}]}, "test")
    with pytest.raises(ConfigError, match=r"in the stage model: \${models.teacher}"):
        resolve({"models": {"teacher": "demo"}, "stages": [{"use": "generate"}]}, "test")


def test_a_recipe_without_a_model_needs_stages_without_one():
    with pytest.raises(ConfigError, match="works on a model, and the recipe names none"):
        resolve({"stages": [{"use": "generate"}]}, "test")


def test_rows_that_a_stage_made_are_read_by_a_later_one(tmp_path):
    audit = {"use": "audit", "id": "clean", "model": "${judge.adapter}", "data": PREFERENCES, "action": "drop"}
    again = {**REWARD, "id": "second", "data": "${clean.cleaned}", "model": "tiny:llama"}
    summaries = execute([REWARD, audit, again], tmp_path / "run")
    cleaned = (tmp_path / "run/02-audit/cleaned.jsonl").read_text().splitlines()
    trained = (tmp_path / "run/03-r3m/training.jsonl").read_text().splitlines()
    assert 0 < len(trained) < len(cleaned) <= 60  # some are held out
    assert {json.loads(line)["chosen"] for line in trained} <= {json.loads(line)["chosen"] for line in cleaned}
    assert summaries[2].config["data"] == "${clean.cleaned}"
    plan = read_recipe(tmp_path / "run/recipe.yaml")
    assert [step.id for step in plan.steps] == ["judge", "clean", "second"]
    assert runner.run(plan, tmp_path / "run", Console(quiet=True)) == summaries  # finished already


def test_what_a_later_stage_reads_runs_again_with_it(tmp_path):
    audit = {"use": "audit", "id": "clean", "data": PREFERENCES}
    again = {**REWARD, "id": "second", "data": "${clean.cleaned}"}
    first = execute([REWARD, audit, again], tmp_path / "run")
    second = execute([REWARD, {**audit, "lam": 0.99}, again], tmp_path / "run")
    assert [a.fingerprint == b.fingerprint for a, b in zip(first, second, strict=True)] == [True, False, False]


def test_stages_may_start_from_models_of_their_own(tmp_path):
    stages = [
        {"use": "generate", "prompts": ["a"], "max_new_tokens": 2, "model": "${models.other}"},
        {"use": "generate", "prompts": ["a"], "max_new_tokens": 2, "model": "tiny:qwen2"},
    ]
    first, second = execute(stages, tmp_path / "run", models={"other": "tiny:qwen2"})
    assert first.samples == second.samples
    assert first.inputs["model"] == second.inputs["model"]
    (plain,) = execute([{"use": "generate", "prompts": ["a"], "max_new_tokens": 2}], tmp_path / "plain")
    assert plain.inputs["model"] != first.inputs["model"]


def test_a_profile_is_inherited_and_spelled_out():
    stages = [{"use": "profile", "id": "heads"}, {"use": "pasta", "tasks": ["conflict"]}]
    plan = resolve({"model": "tiny:llama", "stages": stages}, "test")
    assert plan.steps[1].config.profile == "${heads.profile}"
    assert resolve(yaml.safe_load(plan.to_yaml()), "test").steps == plan.steps


def test_a_look_at_another_model_is_no_turn_to_it(tmp_path):
    """Later stages, and what they compare with, go on with the model before; one that trains it turns to it."""
    write = {"use": "generate", "prompts": ["a"], "max_new_tokens": 2}
    tune = {"use": "lora", "data": "python-reference", "limit": 4, "steps": 1, "max_length": 32, "holdout": 0.5}
    stages = [{**write, "model": "tiny:qwen2"}, write, {**tune, "model": "tiny:qwen2"}, write]
    looked, own, _, turned = execute(stages, tmp_path / "run")
    (alone,) = execute([write], tmp_path / "alone")
    assert own.samples == alone.samples
    assert own.samples[0].outputs["model"] != looked.samples[0].outputs["model"]
    # before: what the adapter was trained on
    assert turned.samples[0].outputs["before"] == looked.samples[0].outputs["model"]


def test_a_model_of_the_recipe_is_hashed_wherever_it_stands():
    audit = {"use": "audit", "data": PREFERENCES, "reference": "${models.start}", "max_length": 512}
    first, second = (
        resolve({"model": "tiny:llama", "models": {"start": source}, "stages": [audit]}, "test")
        for source in ("tiny:llama", "tiny:qwen2")
    )
    assert first.steps[0].config.reference == "tiny:llama"
    assert jobs(first)[0].fingerprint != jobs(second)[0].fingerprint
    assert jobs(first)[0].basis["inputs"]["reference"] != jobs(second)[0].basis["inputs"]["reference"]


def test_another_model_that_is_not_there_is_found_by_validate():
    audit = {"use": "audit", "data": PREFERENCES, "reference": "./nowhere"}
    with pytest.raises(ModelError, match="nowhere"):
        runner.check(resolve({"model": "tiny:llama", "stages": [audit]}, "test"))
