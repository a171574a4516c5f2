"""Measurements through a cache: an exact one changes nothing, a packed one is what its bits make of it."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import DynamicCache

from tenfold.attend import masformer
from tenfold.cache.packing import packed_caches
from tenfold.cache.spans import own_cache
from tenfold.data.rows import Question
from tenfold.engines.session import Session
from tenfold.errors import ConfigError
from tenfold.evaluate.long_context import copying, needle
from tenfold.evaluate.perplexity import perplexity
from tenfold.evaluate.qa import answer
from tenfold.kernels.local import AttentionWindow
from tenfold.models import scoring
from tenfold.models.tiny import tiny_model
from tenfold.pipeline import run as runner
from tenfold.pipeline.recipe import resolve
from tenfold.report.terminal import figures

TEXTS = ["A text of some length, which is read in windows and in steps.", "Short.", "Another one, naïve café; " * 3]
KV = "plain:{},buffer=16,kernel=torch"
LOUD = {"initializer_range": 0.08}


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("step", [5, 64])
def test_perplexity_through_an_exact_cache_is_that_of_one_pass(kind, step, monkeypatch):
    monkeypatch.setattr(scoring, "STEP", step)
    opened = tiny_model(kind)
    model = opened.model.double()
    keys = {"max_length": 40, "stride": 7, "batch_size": 3}
    right = perplexity(model, opened.tokenizer, TEXTS, **keys)
    made = []

    def make():
        made.append(DynamicCache(config=model.config))
        return made[-1]

    found = perplexity(model, opened.tokenizer, TEXTS, **keys, make_cache=make)
    torch.testing.assert_close(found.token_nll, right.token_nll, atol=1e-9, rtol=0)
    assert torch.equal(found.token_ids, right.token_ids)
    assert all(cache.get_seq_length() > 5 for cache in made)


def test_perplexity_on_a_converted_model_is_that_of_its_small_cache():
    opened = tiny_model("llama", num_hidden_layers=3)
    masformer.convert(opened.model, full_layers=[1], span=AttentionWindow("sliding", 12))
    keys = {"max_length": 60, "stride": 20, "batch_size": 3}
    right = perplexity(opened.model, opened.tokenizer, TEXTS, **keys)
    found = perplexity(opened.model, opened.tokenizer, TEXTS, **keys, make_cache=lambda: own_cache(opened.model))
    torch.testing.assert_close(found.token_nll, right.token_nll, atol=1e-4, rtol=0)


def test_fewer_bits_are_further_off():
    opened = tiny_model("llama", **LOUD)
    text, off = ["It was red, she said, and nobody believed that the old mill had been painted. " * 4], {}
    right = perplexity(opened.model, opened.tokenizer, text, max_length=300).token_nll
    for bits in (16, 4, 2):
        with packed_caches(opened.model, KV.format(bits)) as (make, made):
            found = perplexity(opened.model, opened.tokenizer, text, max_length=300, make_cache=make)
        off[bits] = float((found.token_nll - right).abs().mean())
        assert made[0].report()["packed tokens"] >= 256
    assert off[16] < 2e-3 < off[4] < off[2]


def test_needles_and_copies_through_an_exact_cache_are_those_of_one_pass():
    opened = tiny_model("llama")
    model, pieces = opened.model.double(), [torch.arange(start, start + 100) for start in (10, 90)]
    for measure in (
        lambda **keys: needle(model, opened.tokenizer, pieces, **keys),
        lambda **keys: copying(model, pieces, 30, **keys),
    ):
        right = measure()
        found = measure(make_cache=lambda: DynamicCache(config=model.config))
        for one, other in zip(found.metrics, right.metrics, strict=True):
            assert one.value == pytest.approx(other.value, abs=1e-9)
        with packed_caches(model, KV.format(2)) as (make, made):
            packed = measure(make_cache=make)
        assert packed.metrics[-1].value != pytest.approx(right.metrics[-1].value, abs=1e-6)
        assert made[-1].report()["packed tokens"] > 40


def test_questions_are_answered_from_the_packed_cache(monkeypatch):
    from tenfold.engines import session

    opened, seen = tiny_model("llama", max_position_embeddings=1024), []
    note = session.cache_note
    monkeypatch.setattr(session, "cache_note", lambda kv, caches: (seen.extend(caches), note(kv, caches))[1])
    rows = [Question("1", "When?", "It opens at nine.", ("nine",)), Question("2", "Who?", "Ann did it.", ("Ann",))]
    exact = answer(Session(opened), rows, max_new_tokens=4)
    found = answer(Session(opened, kv=KV.format(16)), rows, max_new_tokens=4)
    assert seen[0].report()["packed tokens"] >= 100
    assert found.result.settings["cache"].startswith(KV.format(16))
    assert "cache" not in exact.result.settings
    assert len(found.predictions) == 2


def run(*stages):
    return runner.run(
        resolve({"model": "tiny:llama", "stages": list(stages)}, "test"), Path("run"), Console(quiet=True)
    )


def test_the_stage_measures_both_and_compares_them(number_rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tasks = {"tasks": ["perplexity", "needle", "copying", "memory"], "passages": 2, "passage": 16, "between": 60}
    kv = KV.format(4)
    keys = {"data": str(number_rows), "limit": 6, "max_length": 64, "kv": kv, **tasks}
    (summary,) = run({"use": "evaluate", **keys})
    by_task = {}
    for result in summary.results:
        by_task.setdefault(result.task, []).append(result.subject)
    both = ["model", f"model, {kv}"]
    assert by_task["perplexity"] == [*both, f"model, {kv} - model"]
    assert by_task["needle"] == by_task["copying"] == both
    assert by_task["memory"] == ["model"]
    assert any("memory are measured on the exact cache" in note for note in summary.notes)
    assert sum("packed" in note and note.startswith(("perplexity", "needle", "copying")) for note in summary.notes) == 3
    assert Path("run/report.html").stat().st_size > 10_000
    titles, shown = figures([summary])
    assert titles == ("what", "model", "unit")
    names = [row[0] for row in shown]
    for name in ("perplexity: nll", f"perplexity, {kv}: nll", f"perplexity, {kv} - model: nll_difference"):
        assert name in names


def test_the_stage_on_a_converted_model_and_on_questions(number_rows, tmp_path, monkeypatch):
    from tenfold.models import tiny

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(tiny._DECODER, "max_position_embeddings", 1024)
    row = {"question": "When does it open?", "context": "It opens at nine. It rains.", "answers": ["nine"]}
    Path("questions.jsonl").write_text("".join(json.dumps({"id": str(n), **row}) + "\n" for n in range(3)))
    Path("heads.json").write_text(json.dumps({"0": [1], "1": [0, 2]}))
    kv = KV.format(8)
    long = {"full_layers": [1], "window": 24, "passage": 24, "passages": 2}
    asked = {"data": "questions.jsonl", "tasks": ["question_answering"], "kv": kv, "split": "all"}
    steered = {"data": "questions.jsonl", "profile": "heads.json", "kv": kv, "max_quote_tokens": 3}
    summaries = run(
        {"use": "masformer", "data": str(number_rows), **long},
        {"use": "evaluate", **asked},
        {"use": "autopasta", **steered, "max_answer_tokens": 3, "modes": ["direct", "gold"]},
    )
    names = ["before", f"before, {kv}", "after", f"after, {kv}"]
    assert [result.subject for result in summaries[1].results] == names
    assert summaries[2].results[0].settings["kv"] == kv
    assert any(note.startswith(kv) for note in summaries[2].notes)


@pytest.mark.parametrize(
    ("use", "keys", "message"),
    [
        ("evaluate", {"kv": "gear:5", "tasks": ["perplexity"]}, "gear:5"),
        ("evaluate", {"kv": "gear:4", "tasks": ["speed", "memory"]}, "tasks names none of them"),
        ("autopasta", {"kv": "gear:5"}, "gear:5"),
    ],
)
def test_what_cannot_be_meant(use, keys, message):
    with pytest.raises(ConfigError, match=message):
        resolve({"model": "tiny:llama", "stages": [{"use": use, **keys}]}, "test")
