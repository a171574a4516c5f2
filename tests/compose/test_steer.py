"""The stage `pasta` through a session: tokens and figures of PASTA's own functions, on exact and packed caches."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from tenfold import cli, gear, pasta
from tenfold.attend.chat_marks import said_by_user
from tenfold.attend.pasta.heads import batches_of, margins
from tenfold.attend.pasta.tasks import conflict_items
from tenfold.attend.text_marks import from_tags
from tenfold.models import tiny
from tenfold.models.generation import continue_inputs
from tenfold.models.open import open_model
from tenfold.pipeline import run as runner
from tenfold.pipeline.recipe import resolve

HEADS = {0: [1], 1: [0, 2]}
PROMPTS = ["It was red, she said; <mark>red</mark> as the mill by the river. So it was", "Why? <mark>Be brief.</mark>"]
KV = "gear:2,buffer=16,kernel=torch"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(tiny._DECODER, "max_position_embeddings", 2048)
    monkeypatch.setitem(tiny._DECODER, "initializer_range", 0.08)  # attention of the usual weights is next to nothing
    Path("heads.json").write_text(json.dumps({str(layer): heads for layer, heads in HEADS.items()}))


def stage(**keys):
    """The summary of one stage `pasta`."""
    plan = resolve({"model": "tiny:llama", "stages": [{"use": "pasta", "profile": "heads.json", **keys}]}, "test")
    return runner.run(plan, Path("run"), Console(quiet=True))[0]


@pytest.mark.parametrize(
    ("keys", "dose"),
    [
        ({}, {"target_mass": 0.15}),
        ({"generated": "scale", "keep_sink": True}, {"alpha": 0.3, "generated": "scale", "keep_sink": True}),
        ({"chat": "no", "target_mass": 0.6}, {"target_mass": 0.6}),
        ({"chat": "no", "alpha": 0.001, "keep_sink": True}, {"alpha": 0.001, "keep_sink": True}),
    ],
    ids=str,
)
def test_texts_are_those_of_steer_and_generate(keys, dose):
    """Two batches, marks of one place of several, padding: token by token what the context manager alone gives."""
    summary = stage(prompts=[*PROMPTS, PROMPTS[0]], batch_size=2, max_new_tokens=24, **keys)
    opened = open_model("tiny:llama")
    marked = [from_tags(prompt) for prompt in (*PROMPTS, PROMPTS[0])]
    if keys.get("chat") != "no":
        marked = [said_by_user(opened.tokenizer, prompt) for prompt in marked]
    right = {"before": [], "after": []}
    for batch in (marked[:2], marked[2:]):
        marks = pasta.encode(opened.tokenizer, batch)
        right["before"] += continue_inputs(opened.model, opened.tokenizer, marks.inputs, max_new_tokens=24)
        with pasta.steer(opened.model, marks, heads=HEADS, **dose) as steered:
            right["after"] += continue_inputs(opened.model, opened.tokenizer, marks.inputs, max_new_tokens=24)
    for subject, texts in right.items():
        assert [sample.outputs[subject] for sample in summary.samples] == texts
    assert right["before"] != right["after"]
    assert summary.attached["heads"] == steered.report()["heads"] == 3
    assert summary.attached["marked tokens"] == 2 * len("red") + len("Be brief.")


def test_a_packed_cache_stands_beside_the_exact_one():
    summary = stage(prompts=PROMPTS[:1], chat="no", alpha=0.01, kv=KV, max_new_tokens=20, tasks=["conflict"], samples=4)
    opened = open_model("tiny:llama")
    marks = pasta.encode(opened.tokenizer, [from_tags(PROMPTS[0])])
    with gear.attach(opened.model, KV) as cache, pasta.steer(opened.model, marks, heads=HEADS, alpha=0.01):
        inputs = {**marks.inputs, "past_key_values": cache}
        (right,) = continue_inputs(opened.model, opened.tokenizer, inputs, max_new_tokens=20)
    (sample,) = summary.samples
    assert set(sample.outputs) == {"before", "after", f"before, {KV}", f"after, {KV}"}
    assert sample.outputs[f"after, {KV}"] == right != sample.outputs[f"before, {KV}"]
    subjects = {result.subject: result for result in summary.results}
    assert {f"before, {KV}", f"after, {KV}", f"after - before, {KV}"} < set(subjects)
    exact, packed = subjects["after"].metric("margin").value, subjects[f"after, {KV}"].metric("margin").value
    assert exact != pytest.approx(packed, abs=1e-4)
    assert sum("tokens are packed" in note for note in summary.notes) == 2  # of the task, and of the prompts
    (effect,) = summary.tables
    assert [row[1] for row in effect.rows] == [
        "plain",
        "marks in the text",
        "steered",
        f"plain, {KV}",
        f"steered, {KV}",
    ]


def test_margins_through_a_cache_are_those_of_one_pass_up_to_its_bits():
    opened = open_model("tiny:llama")
    items = batches_of(opened.model, opened.tokenizer, conflict_items(4), batch_size=3)
    off = {}
    right = margins(opened.model, items, HEADS)
    for bits in (16, 2):
        with gear.attach(opened.model, f"plain:{bits},buffer=16,kernel=torch"):
            settings = gear.CacheConfig(variant="plain", bits=bits, buffer=16, kernel="torch")
            made = []

            def make(settings=settings, made=made):
                made.append(gear.GearCache(opened.model.config, settings))
                return made[-1]

            off[bits] = float((margins(opened.model, items, HEADS, make_cache=make) - right).abs().max())
        assert all(cache.report()["packed tokens"] > 100 for cache in made)
    assert off[16] < 0.02 < off[2]


def test_on_the_command_line():
    flags = ["--prompts", PROMPTS[1], "--profile", "heads.json", "--kv", KV, "--generated", "scale", "--keep-sink"]
    assert cli.main(["steer", "tiny:llama", *flags, "--max-new-tokens", "3", "--out", "run"]) == 0
    (sample,) = json.loads(Path("run/01-pasta/summary.json").read_text())["samples"]
    assert set(sample["outputs"]) == {"before", "after", f"before, {KV}", f"after, {KV}"}


def test_what_cannot_be_meant(capsys):
    assert cli.main(["steer", "tiny:llama", "--prompts", PROMPTS[1], "--kv", "gear:5"]) == 2
    assert "gear:5" in capsys.readouterr().err
    assert cli.main(["steer", "tiny:llama", "--prompts", PROMPTS[1], "no mark"]) == 2
    assert "prompt 2 has no <mark>" in capsys.readouterr().err
