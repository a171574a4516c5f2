"""The Python reference: real text, no paragraph both in training and in held-out text."""

from __future__ import annotations

from pydoc_data.topics import topics

from tenfold.data.python_reference import python_reference, without_repeats
from tenfold.data.read import read_rows


def paragraphs(text: str) -> set[str]:
    return {" ".join(part.split()) for part in text.split("\n\n") if len(" ".join(part.split())) >= 40}


def test_no_paragraph_is_both_trained_on_and_held_out():
    for holdout in (0.1, 0.2, 0.5):
        train, held = read_rows("python-reference").split(holdout)
        seen = set().union(*(paragraphs(row.text) for row in train))
        assert all(not paragraphs(row.text) & seen for row in held)


def test_without_care_there_would_be_many():
    names = sorted(topics)
    shared = paragraphs("\n\n".join(topics[n] for n in names[::2])) & paragraphs(
        "\n\n".join(topics[n] for n in names[1::2])
    )
    assert len(shared) > 50


def test_every_long_paragraph_is_kept_once_or_in_a_dropped_topic():
    kept, (note,) = python_reference()
    everything = set().union(*map(paragraphs, topics.values()))
    still = set().union(*map(paragraphs, kept.values()))
    assert still <= everything
    assert len(still) > 0.98 * len(everything)
    assert all(name in note for name in set(topics) - set(kept))


def test_repeats_within_one_text_stay():
    text = "\n\n".join(["A paragraph that stands twice in the same text."] * 2)
    assert without_repeats({"a": text}) == ({"a": text}, 0)


def test_rows_are_sorted_topics_with_a_stable_hash():
    rows = read_rows("python-reference")
    assert [row.id for row in rows] == sorted(row.id for row in rows)
    assert rows.sha256 == read_rows("python-reference").sha256
    assert len(rows) > 50
