"""The command line as a person meets it: help, exit codes, errors without tracebacks, small real runs."""

import os
import subprocess
import sys
import time

import pytest
import yaml

from tenfold import cli
from tenfold.pipeline.stages import verbs

VERBS = [*cli.COMMANDS, *verbs()]


def tenfold(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "tenfold.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )


@pytest.fixture
def recipe(tmp_path, number_rows):
    path = tmp_path / "recipe.yaml"
    stage = {"use": "lora", "data": str(number_rows), "holdout": 0.3, "rank": 2, "steps": 3, "max_length": 64}
    path.write_text(
        yaml.safe_dump({"model": "tiny:llama", "stages": [stage, {"use": "evaluate", "tasks": ["perplexity"]}]})
    )
    return path


@pytest.mark.parametrize("verb", VERBS)
def test_every_help_has_examples(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"tenfold {verb}" in out
    for line in cli.examples(verb):
        assert " ".join(line.split()[:3]) in out


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_for_people(verb, capsys):
    cli.main([verb, "--help"])
    out = capsys.readouterr().out
    for noise in ("None", "``", ":math:", "Args:", "config", "typing"):
        assert noise not in out.replace("adapter_config.json", "").replace("configuration", ""), noise


def test_overview_names_every_verb(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb}" in out for verb in VERBS)


@pytest.mark.timing
def test_help_and_validate_are_quick(recipe):
    for words in (("adapt", "--help"), ("validate", recipe)):
        began = time.perf_counter()
        assert tenfold(*words).returncode == 0
        assert time.perf_counter() - began < 1.5  # < 1 s on a free machine


@pytest.mark.parametrize("arguments", [["--help"], ["adapt", "--help"], ["validate", "RECIPE"], ["ls"]])
def test_what_needs_no_model_loads_no_torch(arguments, recipe):
    """Loading torch and transformers takes seconds; without them these commands take a fraction of one."""
    arguments = [str(recipe) if word == "RECIPE" else word for word in arguments]
    code = (
        f"import sys; from tenfold import cli; code = cli.main({arguments!r});"
        "print(code, {'torch', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 set()"


def test_validate_says_what_it_read(recipe):
    done = tenfold("validate", recipe)
    assert done.returncode == 0
    assert "40 text rows" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], "did you mean 'run'"),
        (["run", "nothing.yaml"], "No such file"),
        (["validate"], "RECIPE is missing"),
        (["adapt", "demo", "--method", "magic"], "methods: adalora, lora"),
        (["adapt", "demo", "--method", "loar"], "did you mean 'lora'"),
        (["steer", "prfile", "demo"], "did you mean 'profile'"),
        (["adapt", "demo", "--method"], "no value"),
        (["adapt", "demo", "--rnak", "3"], "unknown flag --rnak; did you mean --rank?"),
        (["adapt", "demo", "--rank", "eight"], "--rank: a number is asked for, got 'eight'"),
        (["adapt", "demo", "--method", "lora", "--rank", "eight"], "--rank: a whole number is asked for, got 'eight'"),
        (["adapt", "demo", "--steps", "1e3"], "--steps: digits are asked for, got '1e3'"),
        (["adapt", "demo", "--steps"], "--steps: a value is asked for"),
        (["adapt", "demo", "--schedule", "fast"], "--schedule: must be one of linear, cosine, constant, got 'fast'"),
        (["evaluate", "demo", "--emphasise", "mark"], "one of marks, question, gold, whole, got 'mark'; did you mean"),
        (["adapt", "demo", "--learning-rate", "nan"], "tenfold adapt: --learning-rate: a finite number is asked for"),
        (["adapt", "demo", "--columns", "text:body"], "as in --columns prompt question, got 'text:body'"),
        (["adapt", "demo", "--columns", "{text: body}"], "as in --columns prompt question"),
        (["adapt", "demo", "--columns", "text"], "as in --columns prompt question, got 'text'"),
        (["adapt", "demo", "--packing", "no"], "write --packing or --no-packing"),
        (["adapt", "demo", "--find-evidence"], "--find-evidence belongs to tenfold generate"),
        (["adapt", "--model", "demo"], "the model has no flag, it comes first"),
        (["adapt", "demo", "more"], "'more' belongs to no flag"),
        (["generate", "demo", "What is it?"], "such as --prompts"),
        (["lengthen", "demo", "--full-layers", "0", "b"], "a whole number is asked for, got 'b'"),
        (["run", "a.yaml", "b.yaml"], "'b.yaml' belongs to no flag"),
        (["compare", "one"], "SECOND is missing"),
        (["adapt", "demo"], "tenfold adapt: --data: missing, and training needs text, completion or chat rows"),
        (["adapt", "demo", "--rank", "0"], "must be above 0"),
        (["adapt", "demo", "--rank", "3", "--budget", "1%"], "rank and budget"),
        (["adapt", "demo", "--budget", "much"], "cannot be read as a budget"),
        (["ls", "nothing"], "no such folder"),
        (["compare", "nothing", "other"], "no such folder"),
    ],
)
def test_wrong_input_is_exit_code_2_and_no_traceback(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = cli.main(arguments)
    captured = capsys.readouterr()
    assert code in (1, 2) if arguments[0] == "compare" else code == 2
    assert message in " ".join((captured.out + captured.err).replace("│", " ").split())
    assert "Traceback" not in captured.err


def test_debug_shows_the_traceback(tmp_path):
    done = tenfold("run", tmp_path / "none.yaml", "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_an_unexpected_error_is_exit_code_1(monkeypatch, capsys):
    def broken():
        """Break."""
        raise AttributeError("no such thing")

    monkeypatch.setitem(cli.COMMANDS, "env", broken)
    assert cli.main(["env"]) == 1
    assert "this is a bug" in capsys.readouterr().err


def test_out_of_memory_names_the_settings_that_help(monkeypatch, capsys):
    def broken():
        """Break."""
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setitem(cli.COMMANDS, "env", broken)
    assert cli.main(["env"]) == 1
    assert "batch_size" in capsys.readouterr().err


def test_a_run_from_the_command_line(recipe, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["run", str(recipe), "--out", str(out)]) == 0
    assert "report.html" in capsys.readouterr().out
    assert cli.main(["run", str(recipe), "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("finished already") == 2
    assert cli.main(["ls", str(tmp_path)]) == 0
    assert "lora evaluate" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["compare", str(out), str(out)]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_several_changes_all_count(recipe, tmp_path, capsys):
    out = tmp_path / "run"
    changes = ["--set", "model=tiny:qwen2", "--set", "lora.rank=1", "--set", "seed=3"]
    assert cli.main(["run", str(recipe), "--out", str(out), *changes]) == 0
    resolved = yaml.safe_load((out / "recipe.yaml").read_text())
    assert (resolved["model"], resolved["stages"][0]["rank"], resolved["seed"]) == ("tiny:qwen2", 1, 3)


def test_flags_of_a_group(monkeypatch, capsys):
    """They reach the plan; a value, a name and a place that are wrong are refused in our words."""
    plans = []
    monkeypatch.setattr(cli, "_execute", lambda plan, out: plans.append(plan) or 0)
    flags = ["adapt", "tiny:llama", "--data", "python-reference"]
    assert cli.main([*flags, "--paper.init", "normal"]) == 0
    assert cli.main(flags) == 0
    assert [plan.steps[0].config.paper.init for plan in plans] == ["normal", "lora"]
    for wrong, message in (
        (["--paper.init", "nrmal"], "--paper.init: must be one of lora, normal, orthonormal, got 'nrmal'"),
        (["--init", "normal"], "unknown flag --init; did you mean --paper.init?"),
        (["--paper.smoothing", "0.1"], "--paper.smoothing belongs to tenfold align"),
    ):
        assert cli.main([*flags, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["align", "tiny:llama", "--data", "step-audit:20:1", "--paper.smoothing", "0.9"]) == 2
    assert "tenfold align: --paper.smoothing: must be below 0.5, got 0.9" in capsys.readouterr().err


def test_verbs_work_on_what_verbs_made(number_rows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--data", str(number_rows), "--steps", "4", "--max-length", "64", "--rank", "2", "--out", "adapted"]
    assert cli.main(["adapt", "tiny:llama", *flags]) == 0
    adapter = "adapted/01-adalora/adapter"
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("4 optimizer steps are few for AdaLoRA") == 1
    assert cli.main(["adapt", "tiny:llama", *flags]) == 0
    assert "steps are few for AdaLoRA" in capsys.readouterr().out, "a finished stage says again what matters"
    assert cli.main(["evaluate", adapter, "--data", str(number_rows), "--tasks", "perplexity"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "bits_per_byte" in line)
    assert len(row.split()) >= 4, "an adapter is shown beside its base"
    assert cli.main(["generate", adapter, "--prompts", "3 squared is", "--max-new-tokens", "4", "--chat", "no"]) == 0
    assert cli.main(["export", adapter, "--out", "exported"]) == 0
    assert (tmp_path / "exported/01-export/model/model.safetensors").exists()
    capsys.readouterr()
    assert cli.main(["ls", "runs"]) == 0
    assert capsys.readouterr().out.count("runs/") >= 2


def test_estimate_and_env(recipe, capsys):
    assert cli.main(["estimate", str(recipe)]) == 0
    assert "trainable parameters" in capsys.readouterr().out
    assert cli.main(["env"]) == 0
    assert "torch" in capsys.readouterr().out


def summary(index=1, **subjects):
    """A stage summary with one value for each subject and metric."""
    from tenfold.stage.record import StageSummary
    from tenfold.stage.results import Metric, Result

    results = tuple(
        Result(
            task="measured", subject=subject.replace("_", " "), metrics=tuple(Metric(**metric) for metric in metrics)
        )
        for subject, metrics in subjects.items()
    )
    return StageSummary(
        tenfold_version="", index=index, stage="evaluate", fingerprint="", config={}, seed=0, results=results
    )


def test_figures_are_shown_for_people():
    from tenfold.report.terminal import figures

    def measured(seconds, size, loss):
        return [
            {"name": "time", "value": seconds, "unit": "s"},
            {"name": "cache", "value": size, "unit": "bytes"},
            {"name": "loss", "value": loss},
        ]

    found = summary(before=measured(0.0312, 3 * 2**20, 2.0), after=measured(0.0298, 2**20, 2.0004))
    columns, rows = figures([found])
    assert columns == ("what", "before", "after", "unit")
    assert rows == [
        ("measured: time", "31.2", "29.8", "ms"),
        ("measured: cache", "3.00", "1.00", "MiB"),
        ("measured: loss", "2.00000", "2.00040", ""),
    ]


def test_a_single_model_is_called_model():
    from tenfold.report.terminal import figures

    columns, rows = figures([summary(model=[{"name": "weights", "value": 16e9, "unit": "bytes"}])])
    assert (columns, rows) == (("what", "model", "unit"), [("measured: weights", "14.9", "GiB")])


def test_a_folder_that_is_not_there_is_told_from_one_without_runs(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name, said in (("nowhere", "no such folder"), ("empty", "no run in it")):
        assert cli.main(["ls", str(tmp_path / name)]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["adapt", "FILE"], ["evaluate", "FILE", "--data", "FILE"], ["export", "FILE"]])
def test_rows_given_as_the_model_are_named_first(arguments, number_rows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([str(number_rows) if word == "FILE" else word for word in arguments]) == 2
    shown = capsys.readouterr().err
    assert "a file of data, not a model" in shown
    assert f"--data {number_rows}" in shown
    assert not list(tmp_path.iterdir())
