"""Format metrics on answers as models give them."""

import math

import pytest

from tenfold.data.text_checks import fluency, json_contains, json_valid, pronouns_changed
from tenfold.errors import DataError


@pytest.mark.parametrize(
    "text",
    ['{"a": 1}', 'so {"a": {"b": [1, "}"]}} there', '{ broken {"a": "ä"}', '{"a": "x{y"}', "{}", '{"a":1} and }'],
)
def test_json_somewhere_in_the_text(text):
    assert json_valid(text)


@pytest.mark.parametrize(
    "text",
    ["", " ", "{", "}{", '{"a": 1', "{a: 1}", "{'a': 'b'}", '"a"', "[1]", '{"a": NaN}', '{"a": 1,}', '{"a":' * 5000],
)
def test_no_json(text):
    assert not json_valid(text)
    assert not json_contains(text, "a")


def test_target_among_the_values():
    assert json_contains('Here: {"jobs": [{"title": "Chief PHYSICIAN"}]}.', "physician")
    assert json_contains('{"a": 1} {"b": "a nurse"}', "Nurse")
    assert not json_contains('{"nurse": "doctor"}', "nurse")  # a key is no answer
    assert not json_contains('nurse {"a": "doctor"}', "nurse")  # nor is what stands around
    assert not json_contains('{"age": 12}', "12")  # a string is asked for
    with pytest.raises(DataError, match="target is empty"):
        json_contains('{"a": "b"}', "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She is a doctor.", (False, False)),
        ("HE'S a doctor", (False, False)),
        ("They told him.", (True, False)),
        ("The book is hers_too", (True, False)),
        ("Himself, they said", (True, False)),
        ("They heard the theme of Hershey", (True, True)),
        ("", (False, False)),
        ("...", (False, False)),
    ],
)
def test_pronouns(text, expected):
    assert pronouns_changed(text) == expected


def test_fluency_is_the_entropy_of_word_pairs_and_triples():
    # "a b a b a": pairs ab ba ab ba, one bit; triples aba bab aba
    triples = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    expected = (2 / 3 * 1 + 4 / 3 * triples) / 2
    assert fluency(["a b a b a"]) == pytest.approx(expected)
    assert fluency(["a b a b a", "one"]) == pytest.approx(expected / 2)  # too short for a pair: no entropy
    assert fluency(["no, no, no, no, no,"]) < fluency(["no, we went to the sea by"])
    with pytest.raises(DataError, match="no texts"):
        fluency([])
