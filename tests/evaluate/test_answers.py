"""Perplexity of conversations and completions: the tokens that training learns, each as a dense computation has it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import DynamicCache

from tenfold import cli
from tenfold.config.evaluate import EvaluateConfig
from tenfold.data.encode import IGNORED, collate, encode, row_tokens
from tenfold.data.read import read_rows
from tenfold.data.rows import Chat, Completion, Text
from tenfold.errors import ConfigError, DataError
from tenfold.evaluate.perplexity import perplexity, ratio
from tests.runs import execute
from tests.tokenizers import byte_level, metaspace, template_of_trl


def chat(name, *said, **more):
    talk = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(said)]
    return Chat(name, tuple(talk), **more)


CHATS = [
    chat("1", "yes?", "yes", "naïve café or the sky?", "the sky is blue"),
    chat("2", "and the answer?", "no 天空"),
    chat("3", "no answer"),
    chat("4", "a+b=c?", "yes", "and x?", "x = 1", given=2),
    Chat("5", ({"role": "system", "content": "Be brief."}, *chat("", "yes or no?", "no").messages)),
]
COMPLETIONS = [Completion("1", "1+1=", "2"), Completion("2", "The sky is", " blue, and so is the sea."),
               Completion("3", "", "from nothing")]  # fmt: skip

CASES = {
    "offsets": (None, "own", CHATS),
    "generation mask": (None, "llama3_training", CHATS),
    "earlier turns are context": (None, "qwen3", CHATS),
    "merged tokens": (byte_level, "own", CHATS),
    "completions in a chat": (None, "own", COMPLETIONS),
    "completions as texts": (None, None, COMPLETIONS),
    "completions behind a mark": (lambda: metaspace("prepend"), None, COMPLETIONS),
}


@pytest.fixture
def case(request, model, tokenizer):
    make, template, rows = CASES[request.param]
    own = tokenizer.chat_template
    tokenizer = tokenizer if make is None else make()
    if template not in (None, "own"):
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<think>", "</think>"]})
    tokenizer.chat_template = own if template == "own" else template and template_of_trl(template)
    model.resize_token_embeddings(len(tokenizer))
    return model.double(), tokenizer, rows


def dense(model, examples):
    """NLL of all learned tokens of what training is given, row after row, from one full softmax each."""
    parts = []
    for example in examples:
        batch = collate([example], 0)
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"]).logits[0, :-1].double()
        labels = batch["labels"][0, 1:]
        kept = labels != IGNORED
        parts.append(torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="none"))
    return parts


@pytest.mark.parametrize("case", CASES, indirect=True)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_tokens_are_those_of_training_and_the_scores_those_of_a_dense_computation(case, batch_size):
    model, tokenizer, rows = case
    learned = encode(rows, tokenizer, max_length=400, packing=False)
    given, _ = row_tokens(rows, tokenizer)
    found = perplexity(model, tokenizer, given, max_length=400, batch_size=batch_size)
    labels = [label for example in learned.examples for label in example["labels"] if label != IGNORED]
    assert found.token_ids.tolist() == labels
    parts = dense(model, learned.examples)
    torch.testing.assert_close(found.token_nll, torch.cat(parts), rtol=1e-10, atol=1e-10)
    assert found.result.settings["documents"] == len(parts) == len(found.document.unique())
    assert found.result.settings["documents_skipped"] == len(rows) - len(parts)
    assert found.result.settings["scored"] == "answers only"
    sums, counts = torch.stack([p.sum() for p in parts]), torch.tensor([len(p) for p in parts], dtype=torch.float64)
    assert (found.nll, found.stderr) == pytest.approx(ratio(sums, counts))


@pytest.mark.parametrize("case", ["offsets", "completions as texts", "completions behind a mark"], indirect=True)
def test_bytes_are_those_of_the_answers(case):
    model, tokenizer, rows = case
    found = perplexity(model, tokenizer, row_tokens(rows, tokenizer)[0], max_length=400)
    end = "<|im_end|>\n"
    answers = [f"yes{end}the sky is blue{end}", f"no 天空{end}", f"x = 1{end}", f"no{end}"]
    if rows is COMPLETIONS:
        answers = [row.completion for row in rows]
        if tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id:
            answers[2] = answers[2][1:]  # nothing precedes its first token, here a byte
    size = len("".join(answers).encode())
    assert found.result.settings["bytes"] == size
    assert found.bits_per_byte == pytest.approx(found.token_nll.sum().item() / math.log(2) / size)


def test_windows_over_long_conversations_score_each_answer_once_with_what_precedes_it(model, tokenizer):
    model.double()
    rows = [
        chat("1", "q" * 60, "short", "another one?", "an answer that is longer than a window of this test"),
        CHATS[1],
    ]
    given, _ = row_tokens(rows, tokenizer)
    found = perplexity(model, tokenizer, given, max_length=32, stride=12, batch_size=2)
    ids, learned = given[0].ids, given[0].learned
    expected = []
    for at in (at for at in range(1, len(ids)) if learned[at]):
        block = 0 if at < 32 else (at - 32) // 12 + 1
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[block * 12 : at + 1]])).logits[0, -2]
        expected.append(-logits.log_softmax(-1)[ids[at]])
    torch.testing.assert_close(found.token_nll[found.document == 0], torch.stack(expected), rtol=1e-9, atol=1e-9)
    wanted = [token for row in given for token, learn in zip(row.ids, row.learned, strict=True) if learn]
    assert found.token_ids.tolist() == wanted


def test_read_through_a_cache_and_beside_texts_the_answers_score_alike(model, tokenizer, texts):
    given, _ = row_tokens(CHATS, tokenizer)
    right = perplexity(model, tokenizer, given, max_length=150, stride=60)
    cached = perplexity(
        model, tokenizer, given, max_length=150, stride=60, make_cache=lambda: DynamicCache(config=model.config)
    )
    torch.testing.assert_close(cached.token_nll, right.token_nll, rtol=1e-4, atol=1e-4)
    mixed = perplexity(model, tokenizer, [*texts, *given], max_length=150, stride=60)
    torch.testing.assert_close(mixed.token_nll[mixed.document >= len(texts)], right.token_nll, rtol=1e-4, atol=1e-4)
    with pytest.raises(DataError, match="no token to score in 1 documents"):
        perplexity(model, tokenizer, [given[2]], max_length=150)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def chats(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"{n}+1=?"}, {"role": "assistant", "content": f"It is {n + 1}"}]}
            for n in range(30)]  # fmt: skip
    return write(tmp_path / "chats.jsonl", rows)


def test_a_recipe_trains_on_conversations_and_measures_held_out_answers_before_and_after(chats, tmp_path):
    kv = "gear:4,buffer=16,kernel=torch"
    stages = [
        {"use": "lora", "data": chats, "steps": 8, "batch_size": 4, "learning_rate": 0.02, "rank": 4, "holdout": 0.3},
        {"use": "evaluate", "tasks": ["perplexity"], "kv": kv},
    ]
    _, found = execute({"model": "tiny:llama", "stages": stages}, tmp_path / "run")
    by = {result.subject: result for result in found.results}
    assert {"before", "after", f"before, {kv}", f"after, {kv}", "after - before"} <= set(by)
    assert by["after"].metric("nll").value < by["before"].metric("nll").value
    held = read_rows(chats).split(0.3)[1]
    assert by["after"].settings["documents"] == len(held)
    assert by["after"].settings["scored"] == "answers only"
    assert any(f"of {held.kind} rows only the answers are scored" in note for note in found.notes)
    assert "only the answers are scored" in (tmp_path / "run" / "report.html").read_text()


def test_on_the_command_line(tmp_path, capsys):
    data = write(tmp_path / "pairs.jsonl", [{"prompt": f"{n} and", "completion": f" {n + 1}"} for n in range(9)])
    command = ["evaluate", "tiny:llama", "--data", data, "--tasks", "perplexity", "--out", str(tmp_path / "run")]
    assert cli.main(command) == 0
    assert "of completion rows only the answers are scored" in " ".join(capsys.readouterr().out.split())
    assert cli.main([*command[:-1], str(tmp_path / "other"), "--emphasise", "marks"]) == 2
    assert "emphasise: marks are looked for in texts" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["copying", "needle", "multiple_choice"])
def test_tasks_that_have_no_use_for_conversations_say_so(chats, task):
    with pytest.raises(ConfigError, match=rf"tasks: {task} needs \w+ rows, but .* holds chat rows"):
        EvaluateConfig(data=chats, tasks=(task,)).check(read_rows(chats))


def test_rows_of_text_are_tokens_that_are_all_learned(model, tokenizer):
    """The end of a text, which training learns, is not scored in a document: there it is one of the answers."""
    given, _ = row_tokens([Text("1", "some text")], tokenizer)
    found = perplexity(model, tokenizer, given, max_length=64)
    assert found.token_ids.tolist() == [*tokenizer("some text")["input_ids"][1:], tokenizer.eos_token_id]
