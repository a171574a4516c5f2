"""What is held out was not trained on: rows of one prompt, and the same rows under other ids or labels."""

from __future__ import annotations

import json
import random

import pytest

from tenfold.data.groups import hash_share, subject, twin
from tenfold.data.read import Rows, read_rows
from tenfold.data.rows import Chat, Choice, Classification, Completion, Preference, Question, Text
from tenfold.errors import DataError


def rows_of(items, kind="preference"):
    return Rows(tuple(items), kind, "here", others=({},) * len(items))


def pairs(sizes):
    """A prompt for each size, with so many pairs."""
    return [
        Preference(f"{prompt}-{n}", f"question {prompt}", f"good {n}", f"bad {prompt} {n}")
        for prompt, size in enumerate(sizes)
        for n in range(size)
    ]


def shared(train, held):
    known = {row.prompt for row in train}
    return sum(row.prompt in known for row in held)


@pytest.mark.parametrize(
    ("sizes", "holdout", "low", "high"),
    [
        ([3] * 400, 0.1, 0.08, 0.12),
        ([3] * 40, 0.1, 0.08, 0.12),
        ([10] * 10, 0.1, 0.1, 0.1),
        ([10] * 10, 0.9, 0.9, 0.9),
        ([20] * 5, 0.1, 0.2, 0.2),  # one prompt is the least
        ([max(1, 500 // (n + 1)) for n in range(200)], 0.1, 0.08, 0.12),
        ([300, *[1] * 700], 0.1, 0.08, 0.12),  # a prompt of three times what is wanted is trained on
        ([300, *[1] * 700], 0.9, 0.85, 0.95),
    ],
    ids=str,
)
def test_no_prompt_is_on_both_sides_and_the_share_is_kept(sizes, holdout, low, high):
    train, held = rows_of(pairs(sizes)).split(holdout)
    assert shared(train, held) == 0
    assert low <= len(held) / sum(sizes) <= high
    assert not held.notes


def test_the_same_two_answers_judged_twice_are_on_one_side():
    # Two annotators for each pair, who disagree about three in ten.
    items, chance = [], random.Random(0)
    for n in range(600):
        for judge in range(2):
            answers = [f"answer A {n}", f"answer B {n}"]
            if chance.random() < 0.3:
                answers.reverse()
            items.append(Preference(f"{n}-{judge}", f"question {n}", *answers))
    train, held = rows_of(items).split(0.1)
    known = {twin(row) for row in train}
    assert not [row for row in held if twin(row) in known]
    assert len(held) == pytest.approx(120, rel=0.15)


@pytest.mark.parametrize("sizes", [[3] * 400, [3] * 40, [10] * 10, [300, *[1] * 700], [100]], ids=str)
def test_order_and_runs_change_nothing(sizes):
    items = pairs(sizes)
    mixed = random.Random(1).sample(items, len(items))
    held, again = (rows_of(one).split(0.1)[1] for one in (items, mixed))
    assert {row.id for row in held} == {row.id for row in again}


def test_further_rows_leave_others_where_they_are_but_at_the_border():
    items = pairs([3] * 400)
    before, after = ({row.id for row in rows_of(part).split(0.1)[1]} for part in (items[:1140], items))
    kept = {row.id for row in items[:1140]}
    assert len(before ^ (after & kept)) <= 0.2 * len(before)


def test_rows_of_their_own_are_held_out_by_the_hash_of_their_id_alone():
    items = pairs([1] * 300)
    assert {row.id for row in rows_of(items).split(0.1)[1]} == {row.id for row in items if hash_share(row.id) < 0.1}


@pytest.mark.parametrize("sizes", [[200], [970, *[1] * 30], [60, 60]], ids=str)
def test_too_few_prompts_are_divided_but_the_same_pair_is_not_and_a_note_says_so(sizes):
    items = pairs(sizes)
    items += [Preference(f"again-{row.id}", row.prompt, row.rejected, row.chosen) for row in items]
    train, held = rows_of(items).split(0.1)
    assert not {twin(row) for row in train} & {twin(row) for row in held}
    assert 0.03 < len(held) / len(items) < 0.2
    for part in (train, held):
        assert "too few prompts" in part.notes[-1]


FIRST = [{"role": "user", "content": "Why?"}]
LATER = [*FIRST, {"role": "assistant", "content": "So."}, {"role": "user", "content": "And then?"}]


@pytest.mark.parametrize(
    ("kind", "one", "other"),
    [
        ("text", Text("1", "The same\ntext"), Text("2", "the  same text ")),
        ("classification", Classification("1", "a", 0), Classification("2", "a", 1)),
        ("classification", Classification("1", "a", "x", "b"), Classification("2", "a", "y", "b")),
        ("completion", Completion("1", "q", "a"), Completion("2", "q", "b")),
        ("completion", Completion("1", "What is it?\n", "a"), Completion("2", " what is  it?", "b")),
        ("choice", Choice("1", "q", ("a", "b"), 0), Choice("2", "q", ("c", "d"), 1)),
        ("question", Question("1", "q", "here", ("a",)), Question("2", "q", ("there", "x"), ("b",))),
        (
            "chat",
            Chat("1", ({"role": "system", "content": "Be nice."}, *FIRST, {"role": "assistant", "content": "a"})),
            Chat("2", (*LATER, {"role": "assistant", "content": "b"})),
        ),
        ("preference", Preference("1", "q", "a", "b"), Preference("2", "Q", "c", "d")),
        (
            "preference",
            Preference("1", "Why?", "a", "b"),
            Preference("2", "And then?", "c", "d", history=tuple(LATER[:2])),
        ),
        (
            "preference",
            Preference("1", "\n\nHuman: Why?\n\nAssistant:", " a", " b"),
            Preference("2", "\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: And?\n\nAssistant:", " a", " b"),
        ),
    ],
)
def test_every_kind_of_row_has_its_siblings(kind, one, other):
    assert subject(one) == subject(other)
    make = type(one)
    spare = {
        Text: lambda n: Text(f"s{n}", f"text {n}"),
        Classification: lambda n: Classification(f"s{n}", f"text {n}", 0),
        Completion: lambda n: Completion(f"s{n}", f"q {n}", "a"),
        Choice: lambda n: Choice(f"s{n}", f"q {n}", ("a", "b"), 0),
        Question: lambda n: Question(f"s{n}", f"q {n}", "", ("a",)),
        Chat: lambda n: Chat(f"s{n}", ({"role": "user", "content": f"q {n}"},)),
        Preference: lambda n: Preference(f"s{n}", f"q {n}", "a", "b"),
    }[make]
    others = [spare(n) for n in range(60)]
    assert len({subject(row) for row in others}) == 60
    for holdout in (0.1, 0.3, 0.5, 0.7, 0.9):
        _, held = rows_of([one, *others, other], kind).split(holdout)
        assert len({row.id for row in held} & {"1", "2"}) in (0, 2)


def test_different_pairs_of_texts_and_different_questions_are_no_siblings():
    assert subject(Classification("1", "a", 0, "b")) != subject(Classification("2", "a", 0, "c"))
    assert subject(Preference("1", "q", "a", "b")) != subject(Preference("2", "q?", "a", "b"))
    assert twin(Preference("1", "q", "a", "b")) != twin(Preference("2", "q", "a", "c"))


def test_an_own_split_that_shares_prompts_is_kept_and_a_note_counts_them(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        {"id": n, "prompt": f"q{n % 8}", "completion": str(n), "split": "test" if n > 7 else "train"} for n in range(10)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    train, held = read_rows(str(path)).split(0.1)
    assert [row.id for row in held] == ["8", "9"]
    assert "2 of 2 held-out rows share their prompt or text with a training row" in train.notes[-1]


def test_rows_that_all_say_the_same_cannot_be_split():
    with pytest.raises(DataError, match="all say the same"):
        rows_of([Text(str(n), "a") for n in range(30)], "text").split(0.1)
