"""A run that is killed at any moment, and started again, ends with the figures of one that never was."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import yaml

RECIPE = {
    "model": "tiny:llama",
    "stages": [
        {
            "use": "adalora",
            "holdout": 0.3,
            "rank": 2,
            "steps": 40,
            "max_length": 64,
            "dropout": 0.1,
            "learning_rate": 0.01,
            "save_every": 7,
            "log_every": 3,
        },
        {
            "use": "evaluate",
            "tasks": ["perplexity", "speed", "memory"],
            "prompt_tokens": 32,
            "new_tokens": 4,
            "repeats": 2,
        },
        {"use": "generate", "prompts": ["The with statement"], "max_new_tokens": 8},
    ],
}
WORKERS = multiprocessing.get_context("forkserver")
WORKERS.set_forkserver_preload(["tenfold.adapt.fitting", "tenfold.evaluate.stage", "tenfold.cli"])


def work(recipe: Path, out: Path) -> None:
    from tenfold import cli

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    raise SystemExit(cli.main(["run", str(recipe), "--out", str(out), "--debug"]))


def start(recipe: Path, out: Path):
    process = WORKERS.Process(target=work, args=(recipe, out))
    process.start()
    return process


def figures(out: Path) -> list[dict]:
    """All that a run reports but times, memory and machine."""
    found = []
    for path in sorted(out.glob("0*/summary.json")):
        summary = json.loads(path.read_text())
        del summary["timings"], summary["environment"]
        for result in summary["results"]:
            result["metrics"] = [metric for metric in result["metrics"] if metric["kind"] == "figure"]
        metrics = path.with_name("metrics.jsonl")
        found.append({**summary, "log": metrics.read_text().splitlines() if metrics.exists() else None})
    return found


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, number_rows):
    RECIPE["stages"][0]["data"] = str(number_rows)
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    process = start(recipe, out)
    process.join(120)
    assert process.exitcode == 0
    return figures(out)


MOMENTS = {
    "before the first step": lambda out: (out / ".01-adalora").exists(),
    "between checkpoints": lambda out: _lines(out / ".01-adalora/metrics.jsonl") >= 4,
    "while a checkpoint is written": lambda out: any(
        not (path / ".complete").exists() for path in (out / ".01-adalora").glob("checkpoint-1*")
    ),
    "when the stage is finished": lambda out: (out / "01-adalora").exists(),
    "between two tasks": lambda out: (out / ".02-evaluate/store.jsonl").exists(),
}


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_started_again(moment, recipe, uninterrupted, tmp_path):
    out = tmp_path / "run"
    process = start(recipe, out)
    while process.is_alive() and not MOMENTS[moment](out):
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert not (out / "03-generate").exists()
    again = start(recipe, out)
    again.join(120)
    assert again.exitcode == 0
    assert figures(out) == uninterrupted
    assert not list(out.glob(".0*")), "working folders are left"


def test_killed_again_and_again(recipe, uninterrupted, tmp_path):
    """Each restart is killed a little later than the one before, until one gets through."""
    out = tmp_path / "run"
    kills = 0
    for patience in (0.5 * 1.3**power for power in range(20)):
        process = start(recipe, out)
        process.join(patience)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join(30)
        if process.exitcode == 0:
            break
    assert kills > 0
    assert figures(out) == uninterrupted
