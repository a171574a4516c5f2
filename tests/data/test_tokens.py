"""Tokens of a whole text: never other ones than the tokenizer gives, and the right ones for a part of it."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from tenfold.data.tokens import shared, standing, tokens, tokens_within
from tests.tokenizers import TOKENIZERS, byte_level, metaspace, slow

MADE = {name: make() for name, make in TOKENIZERS.items()}
PIECES = [
    "the answer is",
    " yes",
    "yes",
    "no ",
    "\n",
    "\n\n",
    "    ",
    "return x",
    "é",
    "🙂",
    "a+b=",
    "c",
    "<|im_end|>",
    ":",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)


def bare(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", MADE)
@given(before=TEXTS, part=TEXTS.filter(str.strip), after=TEXTS)
@example("a+b=", "c", "")
@example("x:\n", "    return x", "")
@example("the answer is", " yes", "\n\n")
@example("", "yes", "")
@example("é", "🙂", "é")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_part_begins_where_the_tokens_of_what_stands_before_it_end(name, before, part, after):
    tokenizer = MADE[name]
    whole = before + part + after
    ids, inside = tokens_within(tokenizer, whole, [(len(before), len(before + part))], special=False)
    assert ids == bare(tokenizer, whole)
    # One token may write all of the part and of what follows; unknown words look alike.
    assume(any(inside) and tokenizer.unk_token_id not in ids)
    first, last = inside.index(True), len(ids) - inside[::-1].index(True)
    assert all(inside[first:last])
    prompt = bare(tokenizer, before)
    if ids[: len(prompt)] == prompt:
        assert first == len(prompt)
    else:  # a token reaches over the border, or what stands before it is divided anew
        assert first >= shared(ids, prompt)
    ended = bare(tokenizer, before + part)
    if ids[: len(ended)] == ended and ended != prompt and name != "words (BERT)":  # whose words may go on after it
        assert last == len(ended)


@pytest.mark.parametrize("trim", [True, False])
@given(before=TEXTS, part=TEXTS.filter(bool))
@example("x:\n", "    return x")
@settings(max_examples=60, deadline=None)
def test_tokens_left_out_write_nothing_of_the_part_and_the_first_one_taken_does(trim, before, part):
    tokenizer = MADE["bytes, offsets trimmed (Llama 3)" if trim else "bytes (Qwen)"]
    ids, inside = tokens_within(tokenizer, before + part, [(len(before), len(before + part))], special=False)
    first = inside.index(True)
    size = [len(tokenizer.decode(ids[:count], skip_special_tokens=False).encode()) for count in (first, first + 1)]
    complete = "\ufffd" not in tokenizer.decode(ids[:first]) + tokenizer.decode(ids[: first + 1])
    assert not complete or size[0] <= len(before.encode()) < size[1]
    assert all(inside[first:])


def test_tokens_of_white_space_belong_to_what_they_stand_in():
    tokenizer = byte_level()  # leaves spaces out of its offsets
    text = "x:\n        return 🙂"
    ids, inside = tokens_within(tokenizer, text, [(4, len(text))])
    kept = tokenizer.convert_ids_to_tokens([id for id, taken in zip(ids, inside, strict=True) if taken])
    assert kept[:2] == ["ĊĠĠĠĠ", "ĠĠĠĠ"], "the first reaches over the border, the second has no offsets of its own"
    assert kept[-2:] == ["ðŁ", "ĻĤ"], "both of the bytes' tokens of the last character"


def test_several_parts_of_one_text():
    tokenizer = MADE["prepend (Llama 2)"]
    text = "a<|im_end|>\nyes<|im_end|>\nno"
    ids, inside = tokens_within(tokenizer, text, [(0, 1), (12, 15), (26, 28)], special=False)
    kept = [token for token, taken in zip(tokenizer.convert_ids_to_tokens(ids), inside, strict=True) if taken]
    assert "".join(kept) == "▁ayesno"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("words (BERT)", [False, True, False]),
        ("bytes, offsets trimmed (Llama 3)", [False, True, True, True]),
        ("first (Mistral)", [False, True, True, True, True]),
    ],
)
def test_special_tokens_are_never_in_a_part(name, expected):
    ids, inside = tokens_within(MADE[name], "yes", [(0, 3)])
    assert ids == MADE[name]("yes")["input_ids"]
    assert inside == expected


def test_a_standing_text_has_no_mark_of_a_beginning():
    for name in ("prepend (Llama 2)", "always", "first (Mistral)"):
        tokenizer = MADE[name]
        assert "".join(tokenizer.convert_ids_to_tokens(standing(tokenizer, "yes"))) == "yes"
        assert "".join(tokenizer.convert_ids_to_tokens(tokens(tokenizer, "yes", special=False))) == "▁yes"
        assert "".join(tokenizer.convert_ids_to_tokens(standing(tokenizer, "\n\nyes no"))) == "\n\nyes▁no"
    for tokenizer in (byte_level(), metaspace("never"), MADE["words (BERT)"]):
        assert standing(tokenizer, "yes") == bare(tokenizer, "yes")
    assert slow().convert_ids_to_tokens(standing(slow(), " no")) == ["▁no"]
