"""Measurements under emphasis, on exact and packed caches: those of one dense softmax in float64."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tenfold import cli
from tenfold.attend.text_marks import from_tags
from tenfold.data.rows import Question
from tenfold.engines.session import Session
from tenfold.errors import ConfigError, DataError
from tenfold.evaluate import long_context
from tenfold.evaluate.perplexity import perplexity
from tenfold.evaluate.qa import answer, marked_prompt, question_prompt
from tenfold.models import tiny
from tenfold.pipeline import run as runner
from tenfold.pipeline.recipe import resolve

from .dense import Meaning, log_probabilities
from .test_pairs import ALPHA, HEADS, KINDS, PACKED, build

TEXTS = (
    "It was red, she said, and <mark>nobody</mark> believed that the <mark>old</mark> mill had been painted.",
    "The <mark>red</mark> door stayed shut all day.",
    "Nothing is marked here, so it is read as it stands, which is the same as ever.",
)


def right_nll(plain, tokenizer, on, text, length, stride):
    """Of each token but the first, in windows, nats, float64."""
    ids = tokenizer(text.text)["input_ids"]  # a token is a byte
    marked = [at for span in text.spans for at in range(span.start, span.end)]
    values, done, start = [], 1, 0
    while done < len(ids):
        end = min(start + length, len(ids))
        inside = [at - start for at in marked if start <= at < end]
        meaning = Meaning(end - start, inside, HEADS, ALPHA, {0: 40, 2: 40} if "masformer" in on else {})
        logs = log_probabilities(plain, ids[start:end], meaning)
        values += [-float(logs[at - start - 1, ids[at]]) for at in range(done, end)]
        done, start = end, start + stride
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    "on", [set(), {"gear"}, {"adapter", "gear"}, {"masformer"}], ids=lambda on: " x ".join(sorted(on))
)
@pytest.mark.parametrize("kind", KINDS)
def test_perplexity_of_marked_texts_is_that_of_the_definition(kind, on):
    """Batches of two lengths are filled on the right, windows cut marks off, and marks move what comes after them."""
    model, tokenizer, plain = build(kind, on)
    session = Session(model, tokenizer, kv=PACKED if "gear" in on else None, heads=HEADS, alpha=ALPHA)
    texts = [from_tags(text) for text in TEXTS]
    for length, stride in ((200, 100), (50, 30)):
        keys = {"max_length": length, "stride": stride, "batch_size": 3}
        with session.caches() as make_cache:
            cache = {"make_cache": make_cache} if "gear" in on else {}
            found = perplexity(model, tokenizer, texts, **keys, **cache, steering=session.steering)
        right = torch.cat([right_nll(plain, tokenizer, on, text, length, stride) for text in texts])
        torch.testing.assert_close(found.token_nll, right, atol=2e-2 if "gear" in on else 1e-4, rtol=0)
        unmarked = perplexity(model, tokenizer, [text.text for text in texts], **keys)
        moved = (found.token_nll - unmarked.token_nll).abs()
        assert float(moved.max()) > 0.1
        if length == 200:
            first = texts[0].spans[0].start
            assert float(moved[: first - 1].max()) < 2e-2  # nothing moves in front of the first mark
    assert bool(session.notes) == ("gear" in on)


@pytest.mark.parametrize("emphasise", ["gold", "question", "whole"])
@pytest.mark.parametrize("on", [set(), {"gear"}], ids=lambda on: " x ".join(sorted(on)))
def test_needles_are_those_of_the_definition(emphasise, on):
    model, tokenizer, plain = build("llama", on)
    session = Session(model, tokenizer, kv=PACKED if "gear" in on else None, heads=HEADS, alpha=ALPHA)
    pieces = [torch.arange(start, start + 60) for start in (10, 90)]
    with session.caches() as make_cache:
        cache = {"make_cache": make_cache} if "gear" in on else {}
        options = {**cache, "emphasise": emphasise, "steering": session.steering}
        found = long_context.needle(model, tokenizer, pieces, **options)
    losses = []
    for index, ids in enumerate(pieces):
        number, depth = 7919 * (index + 13) % 90000 + 10000, (index + 0.5) / 2
        told = f"\n\nRemember this: the secret number of the lighthouse is {number}"  # a token is a byte here
        whole = long_context.hidden(tokenizer, ids, depth, number).ids.tolist()
        begin, asked, prompt = round(depth * len(ids)), len(whole) - len(told), len(whole) - len(f" {number}")
        part = {
            "gold": range(begin, begin + len(f"{told}.\n\n")),
            "question": range(asked, prompt),
            "whole": range(asked),
        }[emphasise]
        logs = log_probabilities(plain, whole, Meaning(prompt, list(part), HEADS, ALPHA))
        losses.append(-float(sum(logs[at - 1, whole[at]] for at in range(prompt, len(whole)))) / (len(whole) - prompt))
    close = 2e-2 if "gear" in on else 1e-4
    assert found.metric("needle_nll").value == pytest.approx(sum(losses) / 2, abs=close)
    without = long_context.needle(model, tokenizer, pieces).metric("needle_nll").value
    assert abs(found.metric("needle_nll").value - without) > 2 * close


def test_questions_are_asked_with_what_is_emphasised(monkeypatch):
    """The prompt is the same to the last character; of it the named part is marked, in a chat as in a text."""
    opened = tiny.tiny_model("llama", max_position_embeddings=2048)
    rows = [
        Question("1", "When does it open?", ("Cats are out.", "It rains. It opens at nine."), ("nine",)),
        Question("2", "Who <b>did</b> it?", "Bob. Ann <b>Lee</b> did it. So.", ("Ann",)),
    ]
    asked, generate = [], Session.generate
    monkeypatch.setattr(Session, "generate", lambda self, some: (asked.extend(some), generate(self, some))[1])
    session = Session(opened, heads={0: [1]}, alpha=ALPHA)
    wanted = {
        "question": (["When does it open?"], ["Who <b>did</b> it?"]),
        "gold": (["It opens at nine."], ["Ann <b>Lee</b> did it."]),
        "whole": (["Cats are out.", "It rains. It opens at nine."], ["Bob. Ann <b>Lee</b> did it. So."]),
        "marks": ([], ["Lee", "did"]),
    }
    for emphasise, right in wanted.items():
        put = partial(marked_prompt, emphasise=emphasise, tags=("<b>", "</b>"))
        for chat in (False, True):
            asked.clear()
            found = answer(session, rows, max_new_tokens=2, chat=chat, prompt=put)
            texts = [request.messages[0]["content"] if chat else request.text for request in asked]
            parts = [
                [text[span.start : span.end] for span in request.emphasis]
                for text, request in zip(texts, asked, strict=True)
            ]
            assert parts == list(right), emphasise
            assert texts[0] == question_prompt(rows[0])
            assert ("<b>" in texts[1]) == (emphasise != "marks")
            assert found.result.settings["emphasised"] == f"{sum(map(bool, right))} of 2 questions"
    with pytest.raises(DataError, match="of 1 questions none"):
        answer(session, [Question("1", "Who?", "It rains.", ("Ann",))], prompt=partial(marked_prompt, emphasise="gold"))
    with pytest.raises(DataError, match="row '1': tag '<b>' at character 4"):
        marked_prompt(Question("1", "Who <b>?", "It rains.", ("Ann",)), "marks", ("<b>", "</b>"))


KV = "gear:4,buffer=16,kernel=torch"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(tiny._DECODER, "max_position_embeddings", 2048)
    Path("heads.json").write_text(json.dumps({str(layer): heads for layer, heads in HEADS.items() if layer < 2}))
    row = {"question": "When does it open?", "context": "It opens at nine. It rains.", "answers": ["nine"]}
    Path("questions.jsonl").write_text("".join(json.dumps({"id": str(n), **row}) + "\n" for n in range(3)))
    Path("texts.jsonl").write_text(
        "".join(json.dumps({"id": str(n), "text": t * 9}) + "\n" for n, t in enumerate(TEXTS))
    )


def subjects(*names):
    return [name + label for name in names for label in ("", ", emphasised", f", {KV}", f", emphasised, {KV}")]


def test_in_a_recipe_on_a_converted_model_with_an_adapter_on_top(here, number_rows):
    asked = {"data": "questions.jsonl", "split": "all", "kv": KV, "profile": "heads.json", "alpha": 0.1}
    stages = [
        {"use": "masformer", "data": str(number_rows), "full_layers": [1], "window": 24, "passage": 24, "passages": 2},
        {"use": "lora", "data": str(number_rows), "steps": 2, "max_length": 48, "rank": 2},
        {"use": "evaluate", "tasks": ["question_answering"], "emphasise": "question", **asked},
    ]
    plan = resolve({"model": "tiny:llama", "stages": stages}, "test")
    summary = runner.run(plan, Path("run"), Console(quiet=True))[2]
    assert sorted(result.subject for result in summary.results) == sorted(subjects("before", "after"))
    assert all(
        ("emphasise" in result.settings) == ("emphasised" in result.subject)
        and ("cache" in result.settings) == (KV in result.subject)
        for result in summary.results
    )


def test_on_the_command_line(here, capsys):
    flags = ["--profile", "heads.json", "--kv", KV, "--data", "texts.jsonl", "--out", "run"]
    sizes = ["--max-length", "64", "--passages", "2", "--passage", "16", "--between", "60"]
    assert (
        cli.main(["evaluate", "tiny:llama", "--tasks", "perplexity", "memory", "--emphasise", "marks", *flags, *sizes])
        == 0
    )
    summary = json.loads(Path("run/01-evaluate/summary.json").read_text())
    found = [result["subject"] for result in summary["results"] if result["task"] == "perplexity"]
    assert found[:4] == subjects("model")
    assert {"model, emphasised - model", f"model, emphasised, {KV} - model, {KV}"} < set(found)
    assert any("emphasise: memory" in note for note in summary["notes"])
    flags[-1] = "other"
    flags[flags.index("texts.jsonl")] = "questions.jsonl"
    assert cli.main(["evaluate", "tiny:llama", "--tasks", "question_answering", "--emphasise", "gold", *flags]) == 0
    assert f"model, emphasised, {KV}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"tasks": ["perplexity"], "emphasise": "question"},
            "emphasise: question is something of question_answering and",
        ),
        (
            {"tasks": ["needle"], "emphasise": "marks"},
            "emphasise: marks is something of perplexity and question_answering",
        ),
        ({"tasks": ["lm_eval:arc_easy"], "emphasise": "question"}, "tasks names none of them"),
        ({"tasks": ["perplexity"], "alpha": 0.1}, "nothing is emphasised: give emphasise"),
        ({"tasks": ["needle"], "emphasise": "gold", "tags": ["[", "]"]}, "no marks are emphasised"),
        ({"tasks": ["perplexity"], "emphasise": "marks", "tags": ["[", "["]}, "give two different ones"),
        ({"tasks": ["perplexity"], "emphasise": "loudly"}, "marks"),
    ],
    ids=str,
)
def test_what_cannot_be_meant(keys, message):
    with pytest.raises(ConfigError, match=message):
        resolve({"model": "tiny:llama", "stages": [{"use": "evaluate", **keys}]}, "test")


@pytest.mark.parametrize(
    ("text", "message"), [("none", "no row of"), ("a <mark>b", "row '0' of .* has 1 <mark> and 0 </mark>")]
)
def test_texts_without_marks_are_refused_before_the_model_is_opened(here, monkeypatch, text, message):
    monkeypatch.setattr("tenfold.models.reference.ModelRef.open", lambda *_, **__: pytest.fail("opened"))
    Path("texts.jsonl").write_text(json.dumps({"id": "0", "text": text}) + "\n")
    stage = {"use": "evaluate", "tasks": ["perplexity"], "emphasise": "marks", "data": "texts.jsonl"}
    with pytest.raises(DataError, match=message):
        runner.run(resolve({"model": "tiny:llama", "stages": [stage]}, "test"), Path("run"), Console(quiet=True))
