"""The run folder: what is done once, what is done again, what is refused."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock
from rich.console import Console

from tenfold.config.evaluate import EvaluateConfig
from tenfold.config.full import FullConfig
from tenfold.data.read import Rows
from tenfold.data.rows import Text
from tenfold.errors import ConfigError, DataError, MissingDependencyError, ModelError, RunError
from tenfold.pipeline import folder
from tenfold.pipeline import run as runner
from tenfold.pipeline.recipe import resolve
from tenfold.pipeline.run import _data_notes
from tenfold.report.load import load_run

QUIET = Console(quiet=True)


@pytest.fixture
def values(number_rows):
    lora = {"use": "lora", "data": str(number_rows), "holdout": 0.3, "rank": 2, "steps": 6, "max_length": 64}
    return {"model": "tiny:llama", "stages": [lora, {"use": "evaluate", "tasks": ["perplexity"]}]}


def execute(values, out):
    return runner.run(resolve(values, "test"), out, QUIET)


def modified(out):
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("0*/summary.json")}


def test_a_run_and_what_it_leaves(values, tmp_path):
    out = tmp_path / "run"
    lora, evaluation = execute(values, out)
    recipe, summaries, metrics = load_run(out)
    assert [summary.stage for summary in summaries] == ["lora", "evaluate"]
    assert resolve(values, "test").to_yaml() == recipe
    assert metrics["01-lora"][-1]["step"] == 6
    assert lora.attached["trainable parameters"] == _trainable(out / "01-lora/adapter")
    assert (out / "01-lora/adapter/README.md").read_text().startswith("---")
    subjects = [result.subject for result in evaluation.results]
    assert subjects == ["before", "after", "after - before"]
    before, after, difference = (result.metrics for result in evaluation.results)
    assert after[1].value - before[1].value == pytest.approx(difference[1].value, abs=1e-9)
    assert not list(out.glob(".0*"))
    assert "<html" in (out / "report.html").read_text()


def _trainable(adapter):
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        return sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118


def test_finished_stages_are_not_run_again(values, tmp_path):
    execute(values, tmp_path)
    first = modified(tmp_path)
    execute(values, tmp_path)
    assert modified(tmp_path) == first


def test_a_changed_stage_is_run_again_with_those_after_it(values, tmp_path):
    execute(values, tmp_path)
    first = modified(tmp_path)
    values["stages"][1]["max_length"] = 256
    execute(values, tmp_path)
    second = modified(tmp_path)
    assert second["01-lora"] == first["01-lora"]
    assert second["02-evaluate"] > first["02-evaluate"]
    values["stages"][0]["rank"] = 1
    execute(values, tmp_path)
    assert modified(tmp_path)["01-lora"] > second["01-lora"]
    assert modified(tmp_path)["02-evaluate"] > second["02-evaluate"]


def test_changed_data_is_seen(values, tmp_path, number_rows):
    data = tmp_path / "data.jsonl"
    data.write_text(number_rows.read_text())
    values["stages"][0]["data"] = str(data)
    out = tmp_path / "run"
    execute(values, out)
    first = modified(out)
    with data.open("a") as file:
        file.write('{"text": "one more row of text"}\n')
    execute(values, out)
    assert modified(out)["01-lora"] > first["01-lora"]


def test_a_seed_repeats_and_another_one_differs(values, tmp_path):
    losses = [
        execute({**values, "seed": seed}, tmp_path / name)[0].results for seed, name in ((0, "a"), (0, "b"), (1, "c"))
    ]
    value = [result[0].metric("loss").value for result in losses]
    assert value[0] == value[1] != value[2]


def test_a_moved_run_is_still_finished(values, tmp_path):
    execute(values, tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    first = modified(tmp_path / "there")
    execute(values, tmp_path / "there")
    assert modified(tmp_path / "there") == first


def test_a_damaged_summary_is_made_again(values, tmp_path):
    execute(values, tmp_path)
    (tmp_path / "02-evaluate/summary.json").write_text('{"half')
    summaries = execute(values, tmp_path)
    assert json.loads((tmp_path / "02-evaluate/summary.json").read_text())["fingerprint"] == summaries[1].fingerprint


def test_a_stage_that_rests_on_one_that_was_made_again_is_not_shown(values, tmp_path):
    execute(values, tmp_path)
    plan = resolve({**values, "stages": [{**values["stages"][0], "rank": 1}, values["stages"][1]]}, "test")
    runner.run(type(plan)(plan.recipe, plan.steps[:1], {}), tmp_path / "other", QUIET)
    (tmp_path / "01-lora").rename(tmp_path / "gone")
    (tmp_path / "other/01-lora").rename(tmp_path / "01-lora")
    assert [summary.stage for summary in load_run(tmp_path)[1]] == ["lora"]


def test_a_lost_artefact_is_made_again(values, tmp_path):
    execute(values, tmp_path)
    shutil.rmtree(tmp_path / "01-lora/adapter")
    execute(values, tmp_path)
    assert (tmp_path / "01-lora/adapter/adapter_model.safetensors").exists()


def test_what_only_changes_the_log_makes_nothing_anew(values, tmp_path):
    execute(values, tmp_path)
    first = modified(tmp_path)
    values["stages"][0].update(log_every=1, save_every=2)
    execute(values, tmp_path)
    assert modified(tmp_path) == first


def test_killed_between_the_summary_and_the_name(values, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(runner, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            execute(values, tmp_path)
    (tmp_path / ".01-lora.123.old").mkdir()
    written = (tmp_path / ".01-lora/summary.json").stat().st_mtime_ns
    execute(values, tmp_path)
    assert modified(tmp_path)["01-lora"] == written, "what was complete is not made again"
    assert not list(tmp_path.glob(".0*"))


def test_killed_between_training_and_saving_resumes_from_the_last_checkpoint(values, tmp_path, monkeypatch):
    from tenfold.adapt.lora import stage as adapting

    values["stages"][0]["save_every"] = 2
    with monkeypatch.context() as patch:
        patch.setattr(adapting, "save_adapter", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            execute(values, tmp_path)
    said = []
    monkeypatch.setattr(runner.Progress, "say", lambda self, text: said.append(text))
    execute(values, tmp_path)
    assert said == ["  going on from step 4 of 6"]


def test_a_bad_change_leaves_a_finished_run_as_it_was(values, tmp_path):
    execute(values, tmp_path)
    before = (tmp_path / "recipe.yaml").read_text()
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    values["stages"][0]["data"] = str(empty)
    with pytest.raises(DataError):
        execute(values, tmp_path)
    assert (tmp_path / "recipe.yaml").read_text() == before


def test_sequences_longer_than_the_model_can_read_are_refused(values, tmp_path):
    values["stages"][0]["max_length"] = 10_000
    with pytest.raises(ConfigError, match="max_length: 10000 is above the 512 positions"):
        execute(values, tmp_path)


def test_the_base_alone_weighs_less_than_with_its_adapter(values, tmp_path):
    values["stages"][1]["tasks"] = ["memory"]
    summary = execute(values, tmp_path)
    weights = {result.subject: result.metric("weights").value for result in summary[1].results}
    assert weights["after"] - weights["before"] == summary[0].attached["bytes"]


def test_validation_knows_what_needs_no_weights(values, tmp_path):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(f'{{"prompt": "p{n}", "completion": "c{n}"}}\n' for n in range(20)))
    values["stages"][0]["data"] = str(rows)
    tasks = values["stages"][1]["tasks"]
    values["stages"][1]["tasks"] = ["needle"]
    with pytest.raises(ConfigError, match="needle needs text rows, but"):
        runner.check(resolve(values, "test"))
    values["stages"][1]["tasks"] = tasks
    values["stages"][0].update(report_to=["trackio"])
    with pytest.raises(MissingDependencyError, match="trackio is not installed"):
        runner.check(resolve(values, "test"))
    del values["stages"][0]["report_to"]
    rows.write_text("".join(f'{{"text": "{n} is a number and more words"}}\n' for n in range(20)))
    with pytest.raises(ModelError, match="no such folder"):
        runner.check(resolve({**values, "model": "./nothing"}, "test"))


def test_another_recipe_in_the_folder_is_refused(values, tmp_path):
    execute(values, tmp_path)
    other = {**values, "stages": [{"use": "generate", "max_new_tokens": 2}]}
    with pytest.raises(RunError, match="01-lora, 02-evaluate"):
        execute(other, tmp_path)
    assert (tmp_path / "01-lora/summary.json").exists()


def test_two_runs_in_one_folder_are_refused(values, tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(RunError, match="another run"):
        execute(values, tmp_path)


def test_a_bad_row_in_the_last_stage_stops_before_the_first(values, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": 3}\n')
    values["stages"][1]["data"] = str(bad)
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2"):
        execute(values, tmp_path / "run")
    assert not list((tmp_path / "run").glob("*01-lora"))


def test_a_folder_that_cannot_be(values):
    with pytest.raises(RunError, match="--out"):
        execute(values, Path("/proc/nothing"))


@pytest.mark.parametrize(
    "error", [RuntimeError("[enforce fail at inline_container.cc:672] unexpected pos"), ValueError("x")]
)
def test_a_full_disk_as_torch_says_it(error, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 4096})
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RunError if "inline" in str(error) else ValueError), folder.writable(tmp_path):
        raise error


def test_a_folder_that_is_a_file(values, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="--out"):
        execute(values, tmp_path / "file")


def test_a_full_disk_says_so_and_keeps_what_is_finished(values, tmp_path, monkeypatch):
    out = tmp_path / "run"
    write = runner.write_text

    def full(path, text):
        if path.name == "summary.json" and "02-evaluate" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, text)

    monkeypatch.setattr(runner, "write_text", full)
    with pytest.raises(RunError, match="no space left"):
        execute(values, out)
    assert (out / "01-lora/summary.json").exists()
    assert not (out / "02-evaluate").exists()
    monkeypatch.setattr(runner, "write_text", write)
    execute(values, out)
    assert (out / "02-evaluate/summary.json").exists()


def test_a_loss_that_is_not_finite_stops_and_names_the_levers(values, tmp_path):
    values["stages"][0].update(learning_rate=1e30, steps=20, max_grad_norm=1e30, log_every=1)
    with pytest.raises(RunError, match=r"(loss|grad_norm) is (nan|inf) at step \d+ of 20") as caught:
        execute(values, tmp_path)
    assert "learning_rate" in caught.value.remedy
    assert not (tmp_path / "01-lora").exists()


def test_training_without_data_is_refused(values, tmp_path):
    del values["stages"][0]["data"]
    with pytest.raises(ConfigError, match="data: missing"):
        execute(values, tmp_path)


@pytest.mark.parametrize(
    ("task", "message"),
    [("question_answering", "needs question rows, but"), ("multiple_choice", "needs choice rows, but")],
)
def test_a_task_for_other_rows_is_refused_before_a_model_is_opened(values, tmp_path, task, message):
    values["stages"] = [{"use": "evaluate", "tasks": [task], "data": values["stages"][0]["data"]}]
    with pytest.raises(ConfigError, match=message):
        execute(values, tmp_path)


def test_a_second_adapter_goes_on_top_of_the_first(values, tmp_path):
    values["stages"] = [values["stages"][0], {**values["stages"][0], "rank": 1}, {"use": "export"}]
    execute(values, tmp_path)
    import torch
    from transformers import AutoModelForCausalLM

    from tenfold.models.open import open_model

    ids = torch.arange(5, 25)[None]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "03-export/model").eval()
    # The second adapter names the first as its base, so opening it alone gives the whole chain.
    opened = open_model(tmp_path / "02-lora/adapter").model
    base = open_model("tiny:llama").model
    with torch.no_grad():
        expected = opened(ids).logits
        torch.testing.assert_close(exported(ids).logits, expected, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(base(ids).logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (FullConfig(data="here"), True),
        (EvaluateConfig(data="here", split="held-out"), True),
        (EvaluateConfig(data="here", split="all"), False),
    ],
)
def test_what_is_said_of_a_division_of_the_rows_is_in_the_summary(config, said):
    rows = Rows(tuple(Text(str(n), f"text {n}") for n in range(4)), "text", "here", ("read",), ("train", "test") * 2)
    notes = _data_notes(config, replace(rows, others=({},) * 4))
    assert notes[0] == "read"
    assert any("own split column decides" in note for note in notes) is said
    assert _data_notes(config, None) == ()
