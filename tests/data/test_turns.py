"""Preferences written as conversations."""

import json

import pytest

from tenfold.data.read import read_rows
from tenfold.data.rows import Preference
from tenfold.errors import DataError


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


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
    ],
)
def test_one_pair_in_all_its_forms(tmp_path, row):
    rows = read(tmp_path, **row, score=3)
    assert rows.kind == "preference"
    assert list(rows) == [Preference("7", "q", "a", "b")]
    assert rows.others == ({"score": 3},)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": [user("q"), answer("x"), user("r"), answer("a")],
          "rejected": [user("q"), answer("x"), user("r"), answer("b")]}, "messages of user, assistant, user"),
        ({"chosen": [user("q"), answer("a")], "rejected": [user("r"), answer("b")]}, "2 messages that are not in both"),
        ({"chosen": [user("q"), user("a")], "rejected": [user("q"), answer("b")]}, "role 'user', expected one answer"),
        ({"prompt": [{**user("s"), "role": "system"}, user("q")], "chosen": [answer("a")], "rejected": [answer("b")]},
         "of system, user"),
        ({"prompt": [user("q")], "chosen": [answer("a")], "rejected": [answer("a")]}, "the same text as 'chosen'"),
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
