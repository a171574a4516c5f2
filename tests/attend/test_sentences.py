"""The sentence splitter: exact spans, rules one by one, and what holds for any text."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tenfold.attend.autopasta.sentences import sentences

SPECIFIED = (
    "Dr. Smith moved to Paris in 1999. He won the U.S. Open! Did he retire? No.\n"
    'His score was 3.14 points. "It is over." He left'
)


def split(text: str) -> list[str]:
    return [text[lo:hi] for lo, hi in sentences(text)]


def test_spans_of_the_specification():
    assert sentences(SPECIFIED) == [(0, 33), (34, 55), (56, 70), (71, 74), (75, 101), (102, 115), (116, 123)]


@pytest.mark.parametrize("blank", ["", " ", "\n", " \t\r\n\u2028\u3000 "])
def test_nothing_in_a_blank_context(blank):
    assert sentences(blank) == []


# Each row is what must come out; what goes in is its parts joined by one space.
@pytest.mark.parametrize(
    "parts",
    [
        # titles and linking abbreviations never end a sentence
        ["Mr. and Mrs. Smith met Prof. Ngata.", "They ran."],
        ["Roe v. Wade was heard, i.e. Roe won.", "Wade lost."],
        ["Gen. Lee and Lt. Col. The Hon. He Who Waits left."],
        # numbered abbreviations: a number follows, or the sentence is over
        ["See Fig. 3 and No. 5, vol. IV.", "He said no.", "Then he left."],
        ["Jan. 5 was cold.", "It ended in Jan.", "Feb. 1 was warm."],
        ["It was c. 1850 and p. 7.", "See p. 8."],
        # names: initials, dotted abbreviations, Inc. and their like
        ["J. R. R. Tolkien wrote it.", "C. S. Lewis read it."],
        ["The U.S. Open is big.", "He lives in the U.S.", "He left the U.S.", "The rest stayed."],
        ["It is the U.S. Army.", "He has a Ph.D.", "She has a Ph.D. student."],
        ["Apple Inc. Chief Cook spoke.", "He works at Apple Inc.", "The firm is big."],
        ["The U.S. Inland Revenue paid U.S. A-bombs."],  # "In" and "A" are starters, these words are not
        ["At 5 p.m. I left."],
        ["Washington D.C. is nice.", "We went to Washington D.C.", "It was nice."],
        ["Smith et al. (2009) found it.", "It works."],
        ["He took plan B.", "It failed."],
        # numbers
        ["Pi is 3.14 or so.", "It is 2.5.", "Version 1.2.3 is out."],
        ["He was born in 1990.", "5 people came."],
        ["1. First item.", "2. Second item.", "B. Third item.", "IV. Fourth item."],
        # runs of stops
        ["Wait...", "What?!", "Yes!!!", "Well…", "Good."],
        ["Wait... he is here.", "Really?", "Yes."],
        ["What? he asked."],
        # what closes on a stop belongs to it
        ["“Stop!” she said.", "'It is over.'", "“No.”", "(He left.)", "She stayed."],
        ["It is so.[1]", "It is not.[12][b]", "**It may be.**", "«Non.»", "Good."],
        ['He said "No."', '"Why?" she asked.'],
        # no capital follows, or none that is one
        ["He came, saw etc. and left.", "She did too."],
        ["iPhone sales rose.", "iPhone sales fell."],
        ["Google.com and a.b are names.", "Hi.World is one."],
        # other scripts
        ["العربية؟", "نعم.", "لا"],
        ["यह है।", "वह है।"],
        ["Она ушла.", "Он остался."],
    ],
    ids=lambda parts: parts[0],
)
def test_rules(parts):
    assert split(" ".join(parts)) == parts


@pytest.mark.parametrize(
    "parts",
    [
        ["日本語です。", "次の文！", "本当？", "はい。"],
        ["彼は来た。", "「はい。」", "彼女は笑った。"],  # what opens belongs to the next
        ["他走了。", "“好的。”", "她说。"],
        ["これは3.14です。", "Hello。", "World"],
    ],
)
def test_wide_stops_need_no_space(parts):
    assert split("".join(parts)) == parts


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r", "\n\n \n", "\u2028", "\u2029", "\x85", "\v", "\f"])
def test_a_line_break_always_ends_a_sentence(newline):
    assert split(f"a heading{newline}and Dr.{newline}Smith, the{newline}") == ["a heading", "and Dr.", "Smith, the"]


def test_other_white_space_does_not_break_and_is_kept_inside():
    assert split("\t One\u00a0two\tthree.\u00a0Four \u3000") == ["One\u00a0two\tthree.", "Four"]


def test_lower_case_begins_sentences_only_where_nothing_is_upper_case():
    assert split("no caps here. second one. e.g. third.") == ["no caps here.", "second one.", "e.g. third."]
    assert split("no caps here. second one. Third.") == ["no caps here. second one.", "Third."]


def test_a_comma_goes_on_with_the_sentence():
    assert split("Yahoo! , Google and Who? ; were rivals. Then Bing.") == [
        "Yahoo! , Google and Who? ; were rivals.",
        "Then Bing.",
    ]


TEXTS = st.one_of(
    st.text(),
    st.text(st.sampled_from(" \n.!?…。\"'“”「」()[]1aAbB,-_*é漢\u2028\u00a0\x1f\u200b")),
    st.lists(st.sampled_from(["Dr. ", "U.S. ", "He ", "3.14", "left. ", '"', "\n", "No. ", "5", "。", "[1]"])).map(
        "".join
    ),
)


@given(TEXTS)
@example(SPECIFIED)
def test_spans_are_ordered_disjoint_tight_and_cover_all_but_white_space(text):
    spans = sentences(text)
    last = 0
    for lo, hi in spans:
        assert last <= lo < hi <= len(text)
        assert text[lo:hi] == text[lo:hi].strip()
        assert not set(text[lo:hi]) & set("\n\r\v\f\x85\u2028\u2029")
        assert not text[last:lo].strip()
        last = hi
    assert not text[last:].strip()


@given(TEXTS, TEXTS)
def test_lines_are_split_by_themselves(one, two):
    cased = "X\n"  # so that both agree on what begins a sentence
    joined = split(f"{cased}{one}\n{two}")
    assert joined == ["X", *split(cased + one)[1:], *split(cased + two)[1:]]


@pytest.mark.parametrize(
    "unit",
    [
        *(".", "!", "。", ". ", "? ", ".)", "._", '."', ".[1]", ".[", ". (", ". -", ". A", "A. ", "A.", "a.b", "Dr. "),
        *("1. ", '"', " ", "\n", "a", "- ", "I.", ".\u00a0", "。「", "No. 5 "),
    ],
)
def test_time_is_linear(unit):
    text = ("A " + unit * 100_000)[:100_000]
    begin = time.process_time()  # of this process alone, whatever else the machine does
    sentences(text)
    assert time.process_time() - begin < 10  # far less; a quadratic scan takes minutes
