"""Preferences written as conversations."""

import csv
import json
import re

import pytest

from tenfold.data.read import read_rows
from tenfold.data.rows import Chat, Completion, Preference
from tenfold.errors import DataError


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def from_value(sender, text):
    return {"from": sender, "value": text}


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


def read(tmp_path, **row):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"id": "7", **row}) + "\n")
    return read_rows(str(path))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("q")], "chosen": [answer("a")], "rejected": [answer("b")]},
        {"chosen": [user("q"), answer("a")], "rejected": [user("q"), answer("b")]},
        # As in ultrafeedback_binarized: the prompt as text, and again in both conversations.
        {"prompt": "q", "chosen": [user("q"), answer("a")], "rejected": [user("q"), answer("b")]},
        {"prompt": "q", "chosen": [answer("a")], "rejected": [answer("b")]},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        # The prompt as messages, and again in both conversations.
        {"prompt": [user("q")], "chosen": [user("q"), answer("a")], "rejected": [user("q"), answer("b")]},
        {"chosen": [user(parts("q")), answer(parts("a"))], "rejected": [user(parts("q")), answer(parts("b"))]},
        # As LLaMA-Factory has it.
        {"conversations": [from_value("human", "q")], "chosen": from_value("gpt", "a"),
         "rejected": from_value("gpt", "b")},
    ],
)  # fmt: skip
def test_one_pair_in_all_its_forms(tmp_path, row):
    rows = read(tmp_path, **row, score=3)
    assert rows.kind == "preference"
    assert list(rows) == [Preference("7", "q", "a", "b")]
    assert rows.others == ({"score": 3},)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": [user("q"), answer("a")], "rejected": [user("r"), answer("b")]},
         "what is not in both answers is of 'user', 'assistant', expected answers of the assistant"),
        ({"chosen": [user("q"), user("a")], "rejected": [user("q"), answer("b")]}, "is of 'user', expected answers"),
        ({"prompt": [{"role": "narrator", "content": "s"}, user("q")], "chosen": [answer("a")],
          "rejected": [answer("b")]}, "unknown role 'narrator'"),
        ({"prompt": [user("q")], "chosen": [answer("a")], "rejected": [answer("a")]}, "chosen and rejected are equal"),
        ({"prompt": [user("q")], "chosen": [answer(None)], "rejected": [answer("b")]}, "empty"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_question_with_two_answers_is_refused(tmp_path, row, said):
    with pytest.raises(DataError, match=said) as caught:
        read(tmp_path, **row)
    assert "line 1" in str(caught.value)


def test_other_columns_follow_their_rows(tmp_path):
    path = tmp_path / "d.jsonl"
    lines = [{"id": str(n), "text": f"text {n}", "n": n, "split": "dev" if n % 2 else "train"} for n in range(6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = read_rows(str(path))
    assert [other["n"] for other in rows.others] == list(range(6))
    assert [other["n"] for other in rows[2:4].others] == [2, 3]
    train, held = rows.split(0.1)
    assert [other["n"] for other in train.others] == [0, 2, 4]
    assert [other["n"] for other in held.others] == [1, 3, 5]


BEFORE = [system("Be nice."), user("q"), answer("x")]


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [*BEFORE, user("r"), answer("a")], "rejected": [*BEFORE, user("r"), answer("b")]},
        {"prompt": [*BEFORE, user("r")], "chosen": [answer("a")], "rejected": [answer("b")]},
        {"prompt": "r", "chosen": [*BEFORE, user("r"), answer("a")], "rejected": [*BEFORE, user("r"), answer("b")]},
    ],
)
def test_system_messages_and_earlier_turns_are_kept_and_come_back_from_a_file(tmp_path, row):
    rows = read(tmp_path, **row)
    assert list(rows) == [Preference("7", "r", "a", "b", tuple(BEFORE))]
    assert rows.notes == ()
    assert list(read(tmp_path, **rows[0].columns())) == list(rows)
    assert rows[0].turns == [*BEFORE, user("r")]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("\n\nHuman: hi\n\nAssistant: yes", "\n\nHuman: hi\n\nAssistant: no"),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
         "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e"),
        ("The sky is blue.", "The sky is green."),
        ("Q: 1+1=\nA: 2", "Q: 1+1=\nA: 22"),
    ],
)  # fmt: skip
def test_the_prompt_of_whole_texts_is_that_of_trl(tmp_path, chosen, rejected):
    from trl import extract_prompt

    rows = read(tmp_path, chosen=chosen, rejected=rejected, score=0.5, source="hh-rlhf")
    expected = extract_prompt({"chosen": chosen, "rejected": rejected})
    assert {name: getattr(rows[0], name) for name in expected} == expected
    assert "1 rows without a prompt" in rows.notes[0]


def test_a_transcript_is_cut_where_its_last_answer_begins(tmp_path):
    # TRL would cut inside the word: the tokens of the whole are the same, and what both share falls out of the margin.
    (row,) = read(tmp_path, chosen="\n\nHuman: hi\n\nAssistant: yes", rejected="\n\nHuman: hi\n\nAssistant: yeah")
    assert (row.prompt, row.chosen, row.rejected) == ("\n\nHuman: hi\n\nAssistant:", " yes", " yeah")


@pytest.mark.parametrize("row", [
    {"question": "What colour is the sky?", "chosen": "It is blue", "rejected": "It is green"},
    {"chosen": "Blue", "rejected": "green"},
])  # fmt: skip
def test_a_prompt_that_stands_elsewhere_is_asked_for(tmp_path, row):
    with pytest.raises(DataError) as caught:
        read(tmp_path, **row)
    assert "columns: {prompt:" in caught.value.remedy


def test_rows_of_another_kind_may_have_two_such_columns(tmp_path):
    assert read(tmp_path, text="word", chosen="Sky: blue", rejected="Sky: green").kind == "text"


def test_a_prompt_that_differs_from_the_conversation_gives_way_and_a_note_says_so(tmp_path):
    rows = read(tmp_path, prompt="OTHER", chosen=[user("q"), answer("a")], rejected=[user("q"), answer("b")])
    assert list(rows) == [Preference("7", "q", "a", "b")]
    assert "1 prompts differ" in rows.notes[0]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [system("s"), user("q"), answer("a")]},
        {"conversations": [system("s"), user("q"), answer("a")]},
        {"conversations": [from_value("system", "s"), from_value("human", "q"), from_value("gpt", "a")]},
        {"messages": [from_value("system", "s"), user(parts("q")), answer(parts("a"))]},
        {"messages": json.dumps([system("s"), user("q"), answer("a")])},
        {"messages": str([system("s"), user("q"), answer("a")])},
        {"conversations": [from_value("human", "q"), from_value("gpt", "a")], "system": "s"},
        {"messages": [{"role": "human", "content": "q"}, {"role": "gpt", "content": "a"}], "system_prompt": "s"},
    ],
)
def test_one_conversation_in_all_its_forms(tmp_path, row):
    rows = read(tmp_path, **row, score=3)
    assert list(rows) == [Chat("7", (system("s"), user("q"), answer("a")))]
    assert rows.others == ({"score": 3},)


def test_a_conversation_may_stand_in_a_cell_of_a_table(tmp_path):
    path = tmp_path / "d.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [["conversations"], [json.dumps([from_value("human", "q"), from_value("gpt", "a")])]]
        )
    assert read_rows(str(path))[0].messages == (user("q"), answer("a"))


def test_a_completion_may_be_a_conversation(tmp_path):
    assert list(read(tmp_path, prompt=[user("q")], completion=[answer("a")])) == [Completion("7", "q", "a")]
    turns = [user("q"), answer("a"), user("r")]
    assert list(read(tmp_path, prompt=turns, completion=[answer("b")])) == [Chat("7", (*turns, answer("b")), given=3)]
    assert list(read(tmp_path, prompt=turns, completion="b")) == [Chat("7", (*turns, answer("b")), given=3)]
    assert list(read(tmp_path, prompt="q", completion="a", system="s")) == [
        Chat("7", (system("s"), user("q"), answer("a")), given=2)
    ]
    with pytest.raises(DataError, match="messages of user, expected an answer of the assistant"):
        read(tmp_path, prompt=[user("q")], completion=[user("b")])


def test_names_of_speakers_in_any_case(tmp_path):
    talk = [system("s"), user("q"), answer("a")]
    named = [{"role": name, "content": text} for name, text in (("System", "s"), ("USER", "q"), ("Assistant ", "a"))]
    sent = [from_value(name, text) for name, text in (("SYSTEM", "s"), ("Human", "q"), ("GPT", "a"))]
    for row in ({"messages": named}, {"conversations": sent}):
        assert list(read(tmp_path, **row)) == [Chat("7", tuple(talk))]


def test_weights_that_are_neither_0_nor_1_are_refused(tmp_path):
    assert read(tmp_path, messages=[user("q"), answer("a") | {"weight": 0}])
    with pytest.raises(DataError, match=r"message 2: weight 0\.5, expected 0 or 1"):
        read(tmp_path, messages=[user("q"), answer("a") | {"weight": 0.5}])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"conversations": [from_value("narrator", "q")]}, "message 1: unknown 'from' 'narrator'"),
        ({"conversations": [from_value(["human"], "q")]}, "message 1: unknown 'from' ['human']"),
        ({"messages": [user([*parts("q"), {"type": "image", "url": "a.png"}]), answer("a")]},
         "message 1, part 2: a part of type 'image', expected text"),
        ({"messages": [user(["q"]), answer("a")]}, 'part 1: "q", expected text'),
    ],
)  # fmt: skip
def test_what_cannot_be_read_of_a_conversation_is_named(tmp_path, row, said):
    with pytest.raises(DataError, match=re.escape(said)) as caught:
        read(tmp_path, **row)
    assert "line 1" in str(caught.value)
