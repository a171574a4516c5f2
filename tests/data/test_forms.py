"""Rows under the names that other tools give them, and rows that teach nothing."""

from __future__ import annotations

import csv
import json
import re

import pytest

from tenfold.align.preferences import flipped
from tenfold.config.stage import check_kind
from tenfold.data.forms import exchanged
from tenfold.data.read import read_rows
from tenfold.data.rows import Chat, Completion, Preference
from tenfold.errors import ConfigError, DataError


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


def write(tmp_path, *lines):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def read(tmp_path, **line):
    rows = read_rows(write(tmp_path, {"id": "7", **line}))
    return rows[0]


CALL = {"name": "add", "arguments": {"a": 1}}


@pytest.mark.parametrize(
    ("line", "row"),
    [
        ({"instruction": "Add.", "input": "1+1", "output": "2"}, Completion("7", "Add.\n1+1", "2")),
        ({"instruction": "Add 1 and 1.", "input": "", "output": "2"}, Completion("7", "Add 1 and 1.", "2")),
        (
            {"instruction": "r", "output": "b", "system": "s", "history": [["q", "a"]]},
            Chat("7", ({"role": "system", "content": "s"}, user("q"), answer("a"), user("r"), answer("b")), given=4),
        ),
        ({"instruction": "q", "input": "1", "chosen": "a", "rejected": "b"}, Preference("7", "q\n1", "a", "b")),
        (
            {
                "input": {"messages": [user("q")]},
                "preferred_output": [answer("a")],
                "non_preferred_output": [answer("b")],
            },
            Preference("7", "q", "a", "b"),
        ),
        ({"prompt": "q", "response_a": "b", "response_b": "a", "label": "b"}, Preference("7", "q", "a", "b")),
        (
            {"prompt": "q", "response_0": "b", "response_1": "a", "better_response_id": 1},
            Preference("7", "q", "a", "b"),
        ),
        ({"prompt": "q", "answer_1": "a", "answer_2": "b", "preference": "1"}, Preference("7", "q", "a", "b")),
        (
            {
                "conversation_a": [user("q"), answer("b")],
                "conversation_b": [user("q"), answer("a")],
                "winner": "model_b",
            },
            Preference("7", "q", "a", "b"),
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "system": "s"},
            Preference("7", "q", "a", "b", ({"role": "system", "content": "s"},)),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": json.dumps(CALL)},
                    {"from": "observation", "value": "2"},
                    {"from": "gpt", "value": "a"},
                ],
                "tools": json.dumps([CALL]),
            },
            Chat(
                "7",
                (
                    user("q"),
                    {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]},
                    {"role": "tool", "content": "2"},
                    answer("a"),
                ),
                tools=(CALL,),
            ),
        ),
    ],
    ids=str,
)
def test_rows_under_other_names(tmp_path, line, row):
    assert read(tmp_path, **line) == row


def test_preferences_keep_prompts_and_answers_that_are_more_than_texts(tmp_path):
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]}
    row = read(tmp_path, prompt=[user("q")], chosen=[call], rejected=[answer("b")], tools=[CALL])
    assert (row.prompt, row.answers, row.tools) == ("q", ((call,), (answer("b"),)), (CALL,))
    assert '"name": "add"' in row.chosen
    assert row.rejected == "b"
    ends = read(tmp_path, prompt=[user("q"), call, {"role": "tool", "content": "2"}], chosen="a", rejected="b")
    assert (ends.prompt, len(ends.turns), ends.replies) == ("", 3, ([answer("a")], [answer("b")]))
    turned = flipped(row)
    assert (turned.chosen, turned.replies) == (row.rejected, row.replies[::-1])
    for one in (row, ends):
        assert read(tmp_path, **one.columns()) == one


def test_a_transcript_is_a_text_to_one_model_and_turns_to_another(tmp_path):
    row = read(tmp_path, chosen="\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
               rejected="\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e")  # fmt: skip
    assert row.columns()["prompt"] == "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert row.turns == [user("a"), answer("b"), user("c")]
    assert row.replies == ([answer("d")], [answer("e")])
    quoted = read(tmp_path, prompt=[user("\n\nHuman: a\n\nAssistant:")], chosen=[answer("d")], rejected=[answer("e")])
    assert quoted.turns == [user("\n\nHuman: a\n\nAssistant:")], "one message, which says so"


def test_conversations_may_be_texts_in_the_cells_of_a_table(tmp_path):
    path = tmp_path / "d.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["chosen", "rejected", "score"])
        for write in (json.dumps, str):
            name = write.__name__
            table.writerow([write([user(name), answer("a")]), write([user(name), answer("b")]), 1])
    assert [(row.prompt, row.chosen, row.rejected) for row in read_rows(str(path))] == [
        ("dumps", "a", "b"),
        ("str", "a", "b"),
    ]
    path.write_text("messages\n\"[{'role': 'user'} {'role': 'assistant'}]\"\n")
    with pytest.raises(DataError, match="not a list of messages as JSON") as caught:
        read_rows(str(path))
    assert "json.dumps" in caught.value.remedy


GOOD = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("tie", "reason"),
    [
        ({**GOOD, "rejected": "a"}, "chosen and rejected are equal"),
        ({**GOOD, "label": "Tie"}, "label is 'Tie'"),
        ({**GOOD, "score_chosen": 7, "score_rejected": 7.0}, "score_chosen and score_rejected are both 7"),
        ({"chosen": [user("q"), answer("a")], "rejected": [user("q"), answer("a")]}, "chosen and rejected are equal"),
        ({"prompt": "q", "response_a": "b", "response_b": "a", "winner": "tie (bothbad)"}, "label is 'tie'"),
    ],
    ids=str,
)
def test_ties_are_left_out_and_counted(tmp_path, tie, reason):
    rows = read_rows(write(tmp_path, {**GOOD, "prompt": "r", "score_chosen": 7, "score_rejected": 6}, tie, tie))
    assert [row.prompt for row in rows] == ["r"]
    assert [(one.why, one.reason) for one in rows.left_out] == [("tie", reason)] * 2
    assert rows.left_out[0].place.endswith("line 2")
    assert any("2 rows are ties" in note and "line 2" in note for note in rows.notes)


@pytest.mark.parametrize("label", ["label", "kto_tag"])
@pytest.mark.parametrize(("yes", "no"), [(True, False), ("Desirable", "undesirable")])
def test_unpaired_preferences_teach_their_wanted_answers_and_are_no_pairs(tmp_path, label, yes, no):
    lines = [{"prompt": "q", "completion": text, label: wanted} for text, wanted in (("good", yes), ("bad", no))]
    rows = read_rows(write(tmp_path, *lines))
    assert [row.completion for row in rows] == ["good"]
    assert any("1 rows are labelled as unwanted" in note for note in rows.notes)
    with pytest.raises(ConfigError, match="holds unpaired preferences") as caught:
        check_kind(rows, ("preference",), "training")
    assert "KTOTrainer" in caught.value.remedy
    chats = read_rows(write(tmp_path, *({"messages": [user("q"), answer(str(w))], label: w} for w in (yes, no))))
    assert [row.messages[1]["content"] for row in chats] == [str(yes)]


def test_a_completion_with_another_label_is_a_completion(tmp_path):
    rows = read_rows(write(tmp_path, *({"prompt": f"{n}", "completion": "a", "label": n} for n in (0, 1))))
    assert len(rows) == 2
    assert any("2 answers have a label 0 or 1, which is not used" in note for note in rows.notes)
    assert read(tmp_path, prompt="q", completion="a", label="greeting") == Completion("7", "q", "a")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": "q", "response_a": "b", "response_b": "a", "label": "c"}, "'c' names neither response_a nor"),
        ({"prompt": "q", "response_a": "b", "response_b": "a", "label": 0}, "0 names neither"),
        ({"question": "q", "chosen": "Sky: a", "rejected": "Sky: b"}, "fit no known kind of row"),
        ({"instruction": 3, "output": "b"}, "column 'instruction': '3', expected text"),
        ({"instruction": "q", "output": "b", "history": "x"}, "column 'history'"),
        ({"messages": [user("q"), answer("a")], "tools": "add"}, "column 'tools': text \"add\", expected a list"),
        ({"messages": [user("q"), answer("a")], "chat_template_kwargs": [1]}, "column 'chat_template_kwargs': list"),
        ({"conversations": [{"from": "function_call", "value": "add"}]}, "expected the call of a tool"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_named(tmp_path, line, said):
    with pytest.raises(DataError, match=re.escape(said)) as caught:
        read(tmp_path, **line)
    assert "line 1" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "columns"),
    [
        ({"q": "q", "good": "a", "bad": "b"}, {"prompt": "q", "chosen": "good", "rejected": "bad"}),
        ({"prompt": "q", "response_a": "a", "response_b": "b", "label": "a"}, {}),
        ({"prompt": "q", "response_a": "b", "response_b": "a", "winner": "model_b"}, {}),
        ({"prompt": "q", "response_0": "b", "response_1": "a", "better_response_id": 1}, {}),
        ({"prompt": "q", "response_1": "a", "response_2": "b", "label": "1"}, {}),
        ({"prompt": "q", "answer_a": "a", "answer_b": "b", "label": "A"}, {}),
        ({"prompt": "q", "output_1": "a", "output_2": "b", "preference": "1 "}, {}),
        ({"prompt": "q", "output_1": "b", "output_2": "a", "preference": 2.0}, {}),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "chosen-rating": 3, "rejected-rating": 2}, {}),
        ({"chosen": "Sky: a", "rejected": "Sky: b"}, {}),
        (
            {
                "input": {"messages": [user("q")]},
                "preferred_output": [answer("a")],
                "non_preferred_output": [answer("b")],
            },
            {},
        ),
    ],
    ids=str,
)
def test_the_other_label_in_the_form_of_the_row(tmp_path, values, columns):
    def pair(line):
        (row,) = read_rows(write(tmp_path, line), columns=columns)
        return row.chosen.strip(), row.rejected.strip()

    turned = exchanged(values, columns)
    assert list(turned) == list(values)
    assert (pair(values), pair(turned)) == (("a", "b"), ("b", "a"))
    assert exchanged(turned, columns) == values


def test_ratings_named_with_hyphens_tie_and_change_places(tmp_path):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "chosen-rating": 3, "rejected-rating": 2}
    assert exchanged(pair, {})["chosen-rating"] == 2
    with pytest.raises(DataError, match="chosen-rating and rejected-rating are both 3"):
        read(tmp_path, **pair | {"rejected-rating": 3})


def test_transcripts_with_the_line_ends_of_windows(tmp_path):
    talk = "\r\n\r\nHuman: q\r\n\r\nAssistant: I say "
    found = read(tmp_path, chosen=f"{talk}a", rejected=f"{talk}b")
    assert (found.prompt, found.chosen) == ("\n\nHuman: q\n\nAssistant:", " I say a")
    assert found.turns == [user("q")]
    row = read(tmp_path, prompt=talk.removesuffix(" I say "), completion=" a")
    assert list(row.messages) == [user("q"), answer("a")]


def test_a_label_0_beside_a_conversation_is_mentioned(tmp_path):
    rows = read_rows(write(tmp_path, {"messages": [user("q"), answer("a")], "label": 0}))
    assert any("answers have a label 0 or 1, which is not used" in note for note in rows.notes)


def test_pairs_where_answers_are_learned_get_a_remedy_that_works(tmp_path):
    path = write(tmp_path, {"prompt": "q", "chosen": "a", "rejected": "b"})
    with pytest.raises(ConfigError) as caught:
        check_kind(read_rows(path), ("text", "completion", "chat"), "training")
    assert "--rows completion --columns completion chosen" in caught.value.remedy
    (row,) = read_rows(path, rows="completion", columns={"completion": "chosen"})
    assert (row.prompt, row.completion) == ("q", "a")
