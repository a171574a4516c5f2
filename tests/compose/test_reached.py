"""What composes in Python composes in a recipe and on the command line."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from tenfold import cli
from tenfold.engines.requests import Request
from tenfold.engines.session import Session
from tenfold.models import tiny
from tenfold.models.open import open_model
from tenfold.pipeline import run as runner
from tenfold.pipeline.recipe import resolve

KV = "gear:4,buffer=16,kernel=torch"
PROMPT = "It was red, she said, and nobody believed that the old mill had ever been painted in that colour."
TEXT = "The library is on Main Street. It opens at nine in the morning. Cats are not allowed inside."
WRITE = {"prompts": [PROMPT], "emphasise": ["that colour"], "max_new_tokens": 6, "alpha": 0.01, "chat": "no"}
ANSWER = {"context": "notes.txt", "question": "When does it open?", "find_evidence": True, "max_new_tokens": 6}
WRITTEN = {"", ", emphasised", f", {KV}", f", emphasised, {KV}"}
ANSWERED = {"", ", with evidence", ", evidence", f", {KV}", f", with evidence, {KV}", f", evidence, {KV}"}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    from tenfold.attend.autopasta.answering import AutoPasta

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(tiny._DECODER, "max_position_embeddings", 2048)
    Path("heads.json").write_text(json.dumps({"0": [1], "1": [0, 2]}))
    Path("notes.txt").write_text(TEXT)
    quote = "It opens at nine in the morning."
    identify = AutoPasta._identify
    monkeypatch.setattr(AutoPasta, "_identify", lambda self, rows: ([quote] * len(rows), identify(self, rows)[1]))


def named(subjects, parts):
    return {subject + part for subject in subjects for part in parts}


def test_in_a_recipe_on_a_converted_model_with_an_adapter_on_top(number_rows):
    data = {"data": str(number_rows), "steps": 2, "max_length": 48}
    stages = [
        {"use": "masformer", "data": str(number_rows), "full_layers": [1], "window": 24, "passage": 24, "passages": 2},
        {"use": "lora", **data, "rank": 2},
        {"use": "generate", "profile": "heads.json", "kv": KV, **WRITE},
        {"use": "generate", "profile": "heads.json", "kv": KV, **ANSWER},
    ]
    summaries = runner.run(resolve({"model": "tiny:llama", "stages": stages}, "test"), Path("run"), Console(quiet=True))
    written, answered = (summary.samples[0].outputs for summary in summaries[2:])
    assert set(written) == named(("before", "after"), WRITTEN)
    assert set(answered) == named(("before", "after"), ANSWERED)
    assert "It opens at nine in the morning. [characters" in answered[f"after, evidence, {KV}"]
    assert any("layers of full attention" in note for note in summaries[2].notes if note.startswith("after"))
    # The same from Python, on the folders that the recipe left.
    opened = open_model("run/01-masformer/model", adapters=["run/02-lora/adapter"])
    session = Session(opened, kv=KV, heads={0: [1], 1: [0, 2]}, alpha=0.01)
    reply = session.generate([Request(PROMPT, emphasis=("that colour",), max_new_tokens=6)])[0]
    assert reply.text == written[f"after, emphasised, {KV}"]


@pytest.mark.parametrize(
    ("flags", "labels"),
    [
        (["--prompts", PROMPT, "--emphasise", "that colour", "--chat", "no"], WRITTEN),
        (["--context", "notes.txt", "--question", "When does it open?", "--find-evidence"], ANSWERED),
    ],
    ids=["emphasise", "find-evidence"],
)
def test_on_the_command_line(flags, labels):
    more = ["--kv", KV, "--profile", "heads.json", "--max-new-tokens", "4", "--out", "run"]
    assert cli.main(["generate", "tiny:llama", *flags, *more]) == 0
    (sample,) = json.loads(Path("run/01-generate/summary.json").read_text())["samples"]
    assert set(sample["outputs"]) == named(("model",), labels)
