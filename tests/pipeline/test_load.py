"""`load: 4bit|8bit` in recipes and on the command line: refusals before anything runs, fingerprints, and whole runs."""

import json
from importlib.util import find_spec

import pytest
import torch
from peft import PeftModel

from tenfold import cli, open_model
from tenfold.errors import ConfigError, MissingDependencyError
from tenfold.models import quantised
from tenfold.models.tiny import tiny_model
from tenfold.pipeline import run as runner
from tenfold.pipeline.estimate import estimate
from tenfold.pipeline.inputs import jobs
from tenfold.pipeline.recipe import resolve
from tests.runs import execute, figures

bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
LOADS = ["4bit", "8bit"]
IDS = torch.arange(5, 69).reshape(2, 32)
TRAIN = {"max_length": 64, "batch_size": 2, "steps": 3, "log_every": 1, "learning_rate": 3e-2}
WHOLE = {
    "full": [{"use": "full", "max_length": 64}],
    "masformer": [{"use": "masformer", "window": 16, "passage": 16}],
    "r3m": [{"use": "r3m", "rank": 0, "max_length": 64}],
}
PACKED = [{"use": "adalora", "max_length": 64}, {"use": "lora", "max_length": 64}, {"use": "export"}]


@pytest.fixture
def there(monkeypatch):
    """As if every package were installed."""
    monkeypatch.setattr(quantised, "_is_there", lambda package: True)


def plan_of(stages, rows, **fields):
    data = {"r3m": "step-audit:40", "export": None}
    stages = [{"data": data.get(entry["use"], str(rows)), **entry} for entry in stages]
    stages = [{key: value for key, value in entry.items() if value is not None} for entry in stages]
    return resolve({"model": "tiny:llama", **fields, "stages": stages}, "test")


@pytest.mark.parametrize("use", WHOLE)
def test_what_writes_whole_weights_is_refused(use, there, number_rows):
    plan = plan_of(WHOLE[use], number_rows, load="4bit")
    with pytest.raises(ConfigError, match=f"01-{use}: load: 4bit packs the weights of tiny:llama, and {use} writes"):
        runner.check(plan)
    with pytest.raises(ConfigError, match="writes whole ones"):
        estimate(plan)
    runner.check(plan_of(WHOLE[use], number_rows))


def test_adapters_and_their_export_are_let_through(there, number_rows):
    runner.check(plan_of(PACKED, number_rows, load="8bit"))
    with pytest.raises(ConfigError, match="04-full: load: 8bit packs"):  # what was exported is opened packed as well
        runner.check(plan_of([*PACKED, *WHOLE["full"]], number_rows, load="8bit"))


def test_packed_files_take_one_adapter_and_no_merge(there, number_rows, tmp_path):
    config = {**tiny_model("llama").model.config.to_dict(), "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    folder = str(tmp_path)
    runner.check(plan_of(PACKED[:1], number_rows, model=folder))
    for stages, place in ((PACKED[:2], "02-lora"), ([PACKED[0], PACKED[2]], "02-export")):
        with pytest.raises(ConfigError, match=rf"{place}: the files of .* hold quantised weights \(gptq\)"):
            runner.check(plan_of(stages, number_rows, model=folder))
    with pytest.raises(ConfigError, match=r"the files hold packed \(gptq\) the weights of"):
        runner.check(plan_of(WHOLE["full"], number_rows, model=folder))
    with pytest.raises(ConfigError, match=r"load: the weights of .* are quantised already"):
        runner.check(plan_of(PACKED[:1], number_rows, model=folder, load="4bit"))


def test_validate_says_what_to_install(number_rows, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(quantised, "_is_there", lambda package: package != "bitsandbytes")
    with pytest.raises(MissingDependencyError, match="needs the package bitsandbytes"):
        runner.check(plan_of(PACKED, number_rows, load="4bit"))
    command = ["adapt", "tiny:llama", "--data", str(number_rows), "--load", "4bit", "--out", str(tmp_path / "run")]
    assert cli.main(command) == 2
    assert 'pip install "tenfold[bnb]"' in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_load_is_part_of_recipe_and_fingerprint(there, number_rows):
    stages = [*PACKED, {"use": "lora", "max_length": 64, "model": "${03-export.model}"}]
    plain, four, eight = ([job.fingerprint for job in jobs(plan_of(stages, number_rows, **load))] for load in
                          ({}, {"load": "4bit"}, {"load": "8bit"}))  # fmt: skip
    for prints in zip(plain, four, eight, strict=True):
        assert len({*prints}) == 3
    plan = plan_of(PACKED, number_rows, load="4bit")
    assert "load: 4bit" in plan.to_yaml()
    basis = jobs(plan_of(PACKED, number_rows))[0].basis
    assert "load" not in basis["inputs"]["model"]  # as of runs that are older than the key


@pytest.mark.parametrize("load", LOADS)
def test_estimates_need_no_bitsandbytes(load, there, number_rows):
    model, stage = estimate(plan_of(PACKED[:1], number_rows, load=load))
    plain, as_plain = estimate(plan_of(PACKED[:1], number_rows))
    assert model.amounts["parameters"] == plain.amounts["parameters"]
    assert model.amounts["weights"] < plain.amounts["weights"]
    assert stage.amounts["trainable parameters"] == as_plain.amounts["trainable parameters"]


@bitsandbytes
@pytest.mark.parametrize("load", LOADS)
def test_what_is_exported_is_the_adapter_on_whole_weights(load, number_rows, tmp_path):
    recipe = {
        "model": "tiny:llama",
        "load": load,
        "stages": [
            {"use": "adalora", "data": str(number_rows), "rank": 2, **TRAIN},
            {"use": "evaluate", "tasks": ["perplexity"], "max_length": 64},
            {"use": "export"},
        ],
    }
    trained, looked, exported = execute(recipe, tmp_path)
    assert trained.inputs["model"]["load"] == load
    assert looked.results[0].settings["dtype"] == f"{load}, float32"
    assert "not those that load" in exported.notes[0]
    card = (tmp_path / "01-adalora/adapter/README.md").read_text()
    assert f"packed into {load}" in card
    assert f"load: {load}" in card
    folder = str(tmp_path / "01-adalora/adapter")
    with torch.no_grad():
        plain = tiny_model("llama").model.eval()(IDS).logits
        expected = PeftModel.from_pretrained(tiny_model("llama").model, folder).eval()(IDS).logits
        found = open_model(tmp_path / "03-export/model", device="cpu").model(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (expected - plain).norm() > 0.02 * plain.norm()


@bitsandbytes
def test_a_killed_run_goes_on_to_the_same_figures(number_rows, tmp_path, monkeypatch):
    from tenfold.adapt import training

    recipe = {"model": "tiny:llama", "load": "4bit", "stages": [
        {"use": "lora", "data": str(number_rows), "rank": 2, "save_every": 1, **TRAIN, "steps": 4}
    ]}  # fmt: skip
    whole = execute(recipe, tmp_path / "whole")
    step_end = training._Watch.on_step_end

    def killed(self, args, state, control, **more):
        if state.global_step == 3:
            raise KeyboardInterrupt
        return step_end(self, args, state, control, **more)

    with monkeypatch.context() as patch:
        patch.setattr(training._Watch, "on_step_end", killed)
        with pytest.raises(KeyboardInterrupt):
            execute(recipe, tmp_path / "again")
    again = execute(recipe, tmp_path / "again")
    assert figures(again) == figures(whole)


@bitsandbytes
@pytest.mark.parametrize("target", ["reward", "dpo"])
def test_preferences_train_in_float32_on_packed_weights(target, tmp_path, monkeypatch):
    """TRL would make the adapter bfloat16, and the scores of a reward model have no such hidden states."""
    pytest.importorskip("trl")
    from tenfold.align.r3m import stage

    seen = {}

    def watched(trainer, *args, **keys):
        seen["types"] = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
        return carry_out(trainer, *args, **keys)

    carry_out = stage.carry_out
    monkeypatch.setattr(stage, "carry_out", watched)
    train = {"use": "r3m", "data": "step-audit:40", "target": target, "max_length": 512, "batch_size": 2, "steps": 2}
    (summary,) = execute({"model": "tiny:llama", "load": "4bit", "stages": [train]}, tmp_path)
    assert seen["types"] == {torch.float32}
    assert summary.artefact == "adapter"
    task = "reward" if target == "reward" else "causal"
    assert open_model(tmp_path / "01-r3m/adapter", task, device="cpu").identity["dtype"] == "float32"
