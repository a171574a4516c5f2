"""Tokens and masks are those that TRL's own trainers make of the same rows: conversations, tools, transcripts."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from tenfold.align.margins import pair_lengths, pair_tokens
from tenfold.data.encode import encode
from tenfold.data.read import read_rows
from tenfold.data.rows import Completion
from tests.tokenizers import byte_level, template_of_trl

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
        },
    }
]


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(**arguments):
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": arguments}}],
    }


SYSTEM, RESULT = {"role": "system", "content": "Be brief."}, {"role": "tool", "name": "add", "content": "3"}
QUESTION = [SYSTEM, user("is the sky blue?"), answer("yes"), user("and the sea?")]
WORKED = [user("1+2=?"), call(a=1, b=2), RESULT]
CHATS = {
    "turns": {"messages": [*QUESTION, answer("no")]},
    "tools": {"messages": [*WORKED, answer("3")], "tools": TOOLS},
    "tools as text": {"messages": [*WORKED, answer("3")], "tools": json.dumps(TOOLS)},
    "template arguments": {"messages": QUESTION[:3], "chat_template_kwargs": {"enable_thinking": False}},
}
COMPLETIONS = {
    "one": {"prompt": [user("q")], "completion": [answer("yes")]},
    "turns": {"prompt": QUESTION, "completion": [answer("blue")]},
    "after a tool": {"prompt": WORKED, "completion": [answer("3")], "tools": TOOLS},
    "a call": {"prompt": WORKED[:1], "completion": [call(a=1, b=2)], "tools": TOOLS},
    "text": {"prompt": "the sky is", "completion": " blue"},
}
PAIRS = {
    "implicit prompt": {"chosen": [*QUESTION, answer("blue")], "rejected": [*QUESTION, answer("red")]},
    "prompt": {"prompt": QUESTION, "chosen": [answer("blue")], "rejected": [answer("red")]},
    "after a tool": {"prompt": WORKED, "chosen": [answer("3")], "rejected": [answer("4")], "tools": TOOLS},
    "calls": {"prompt": WORKED[:1], "chosen": [call(a=1, b=2)], "rejected": [call(c=3)], "tools": json.dumps(TOOLS)},
    "another call": {"prompt": WORKED[:1], "chosen": [call(c="3")], "rejected": [answer("3")], "tools": TOOLS},
    "several turns": {
        "chosen": [user("q"), answer("x"), user("r"), answer("a")],
        "rejected": [user("q"), answer("y"), user("s"), answer("b")],
    },
    "thoughts": {"prompt": [user("q")], "chosen": [answer("a", reasoning_content="hm")], "rejected": [answer("b")]},
    "the same question as text": {
        "prompt": "q",
        "chosen": [user("q"), answer("a")],
        "rejected": [user("q"), answer("b")],
    },
    "texts": {"prompt": "the sky is", "chosen": " blue", "rejected": " red"},
    "transcripts": {"chosen": "\n\nHuman: sky?\n\nAssistant: blue", "rejected": "\n\nHuman: sky?\n\nAssistant: red"},
}


def fitting(forms, *templates):
    """Texts without a template, conversations with one, those with tools with one that knows them."""
    return [
        (template, form)
        for template in templates
        for form, line in forms.items()
        if (template is None) == all(isinstance(value, str) for value in line.values())
        and not (str(template).startswith("llama3") and "tools" in line)
    ]


def rows_of(tmp_path, line):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(line) + "\n")
    return read_rows(str(path))


def tokenizer_with(template):
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})  # as real ones have
    tokenizer.chat_template = template and template_of_trl(template)
    return tokenizer


def prepared(trainer, tokenizer, line, **host):
    """What a trainer of TRL makes of a row; columns stay JSON, as TRL advises for tools."""
    features = {name: datasets.List(datasets.Json()) if isinstance(value, list) else datasets.Json()
                if isinstance(value, dict) else datasets.Value("string") for name, value in line.items()}  # fmt: skip
    data = datasets.Dataset.from_list([line], features=datasets.Features(features))
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start", shuffle_dataset=False,
                           dataset_text_field="text", assistant_only_loss=host.pop("assistant", False))  # fmt: skip
    further = (False, None) if trainer is trl.SFTTrainer else ()
    itself = SimpleNamespace(_tokenizer=tokenizer, **host)
    return next(iter(trainer._prepare_dataset(itself, data, tokenizer, args, *further, "train")))


@pytest.mark.parametrize(
    ("template", "form"), fitting(CHATS, "qwen3_training", "qwen2_5_training", "llama3", "llama3_training")
)
def test_what_is_learned_of_a_conversation_is_what_trl_learns_of_the_assistant_alone(template, form, tmp_path):
    tokenizer = tokenizer_with(template)
    theirs = prepared(trl.SFTTrainer, tokenizer, CHATS[form], assistant=True, completion_only_loss=False,
                      chat_template=template_of_trl(template.removesuffix("_training") + "_training"))  # fmt: skip
    (ours,) = encode(rows_of(tmp_path, CHATS[form]), tokenizer, max_length=9999, packing=False).examples
    assert ours["input_ids"] == theirs["input_ids"]
    assert ours["labels"] == theirs["labels"]
    assert any(label != -100 for label in ours["labels"])


@pytest.mark.parametrize(("template", "form"), fitting(COMPLETIONS, "qwen3", "qwen2_5", "llama3", None))
def test_what_is_learned_of_a_completion_is_what_trl_learns(template, form, tmp_path):
    line = COMPLETIONS[form]
    tokenizer = tokenizer_with(template)
    theirs = prepared(trl.SFTTrainer, tokenizer, line, completion_only_loss=True, chat_template=None)
    (ours,) = encode(rows_of(tmp_path, line), tokenizer, max_length=9999, packing=False).examples
    assert ours["input_ids"] == theirs["input_ids"]
    assert ours["labels"] == theirs["labels"]


@pytest.mark.parametrize(("template", "form"), fitting(PAIRS, "qwen3", "qwen2_5", "llama3", None))
def test_tokens_of_pairs_are_those_of_trl(template, form, tmp_path):
    line = PAIRS[form]
    if form == "the same question as text":
        line = {name: value for name, value in line.items() if name != "prompt"}  # TRL's trainers would not take both
    tokenizer = tokenizer_with(template)
    (row,) = rows_of(tmp_path, PAIRS[form])
    chosen, rejected = pair_tokens(row, tokenizer)
    reward = prepared(trl.RewardTrainer, tokenizer, line)
    assert (chosen, rejected) == (reward["chosen_ids"], reward["rejected_ids"])
    dpo = prepared(trl.DPOTrainer, tokenizer, line)
    start, *_ = pair_lengths(row, tokenizer)
    if form != "transcripts":  # there TRL's prompt ends where the words part, ours where the answer begins
        assert start == len(dpo["prompt_ids"])
    assert (chosen, rejected) == tuple(dpo["prompt_ids"] + dpo[name] for name in ("chosen_ids", "rejected_ids"))


def test_what_the_stage_hands_to_trl_has_the_tokens_of_the_rows(tmp_path):
    """In one table: arguments of calls that differ must not get each other's names."""
    from tenfold.align.r3m.stage import _dataset

    tokenizer = tokenizer_with("qwen3")
    rows = [
        rows_of(tmp_path, {"id": name, **line})[0] for name, line in PAIRS.items() if isinstance(line["chosen"], list)
    ]
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    data = _dataset(rows, chat=True)
    found = trl.RewardTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), data, tokenizer, args, "train")
    for row, line in zip(rows, found, strict=True):
        assert (line["chosen_ids"], line["rejected_ids"]) == pair_tokens(row, tokenizer), row.id


def test_real_transcripts_have_the_tokens_of_trl_as_texts_and_as_turns(shared_data, tmp_path):
    rows = read_rows(str(shared_data / "pref_hh_harmless.jsonl.gz"), limit=40)
    for template in (None, "llama3"):
        tokenizer = tokenizer_with(template)
        for row in rows[:8]:
            line = row.conversations() if template else row.columns()
            reward = prepared(trl.RewardTrainer, tokenizer, line)
            assert pair_tokens(row, tokenizer) == (reward["chosen_ids"], reward["rejected_ids"])
            *asked, told = (completion := Completion(row.id, row.prompt, row.chosen)).messages
            line = (
                {"prompt": asked, "completion": [told]}
                if template
                else {"prompt": row.prompt, "completion": row.chosen}
            )
            sft = prepared(trl.SFTTrainer, tokenizer, line, completion_only_loss=True, chat_template=None)
            (ours,) = encode([completion], tokenizer, max_length=99999, packing=False).examples
            assert (ours["input_ids"], ours["labels"]) == (sft["input_ids"], sft["labels"])
    assert sum(len(row.turns) > 1 for row in rows) > 10
    assert all(turn["content"] == turn["content"].strip() for row in rows for turn in row.turns)
