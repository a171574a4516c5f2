"""A quote found again: what is stripped from it, the cascade rung by rung, and what is refused."""

from __future__ import annotations

import time
from difflib import SequenceMatcher

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tenfold.attend.autopasta.quote_matching import (
    MIN_RATIO,
    Hit,
    bag_of_words,
    clean_quote,
    cosine,
    is_refusal,
    locate_quote,
    matcher,
)
from tenfold.attend.autopasta.sentences import sentences
from tenfold.errors import ConfigError, DataError

RIVERS = [
    "The Amazon River is in South America.",
    "It is the largest river by discharge.",
    "The Nile is often called the longest river.",
    "Its length is about 6,650 km.",
]
CONTEXT = " ".join(RIVERS)


def never(texts):
    raise AssertionError(f"embedded {texts}")


def found(quote, context=CONTEXT, **options):
    """The sentences hit, and the stages."""
    hits = locate_quote(quote, context, **options)
    return [context[hit.start : hit.end] for hit in hits], [hit.stage for hit in hits]


# ---- the numbers of the specification --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quote", "expected"),
    [
        ("The Nile is the longest river.", [0.534522, 0.534522, 0.894427, 0.133631]),
        ("The Nile has a length of about 6650 km.", [0.125988, 0.125988, 0.316228, 0.377964]),
        ("I do not know.", [0, 0, 0, 0]),
    ],
)
def test_cosines_of_words(quote, expected):
    rows = bag_of_words([quote, *RIVERS])
    assert cosine(rows[0], rows[1:]).tolist() == pytest.approx(expected, abs=1e-6)


def test_ratios_and_their_order():
    quote = "The Nile is the longest river."
    expected = [0.477612, 0.597015, 0.821918, 0.372881]
    assert [matcher(quote, text).ratio() for text in RIVERS] == pytest.approx(expected, abs=1e-6)
    assert [matcher(text, quote).ratio() for text in RIVERS] != pytest.approx(expected, abs=1e-6)


def test_the_right_sentence_on_the_right_rung():
    quote = "The Nile is the longest river."
    assert locate_quote(quote, CONTEXT, embed=never) == (Hit(76, 119, pytest.approx(0.821918, abs=1e-6), "ratio"),)
    assert locate_quote("The Nile has a length of about 6650 km.", CONTEXT) == (
        Hit(120, 149, pytest.approx(0.377964, abs=1e-6), "embedding"),
    )
    assert locate_quote("I do not know.", CONTEXT) == ()


@pytest.mark.parametrize("text", RIVERS)
def test_a_copy_is_exact(text):
    start = CONTEXT.index(text)
    assert locate_quote(text, CONTEXT, embed=never) == (Hit(start, start + len(text), 1.0, "exact"),)


def test_ties_go_to_the_first():
    context = " ".join(RIVERS[:2])
    rows = bag_of_words(["The Nile is the longest river.", *RIVERS[:2]])
    assert len(set(cosine(rows[0], rows[1:]).tolist())) == 1
    assert found("The Nile is the longest river.", context) == ([RIVERS[0]], ["embedding"])
    twice = "A bird sang. The sun was out all day. A bird sang. The sun was out all day."
    for quote in ("The sun was out all day.", "the sun was out all day", "The sun was out today."):
        assert [hit.start for hit in locate_quote(quote, twice, embed=never)] == [13]
        assert [hit.start for hit in locate_quote(quote, twice, all_matches=True)] == [13, 51]


# ---- cleaning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "written",
    [
        "It's 9,250 km long.",
        "  It's 9,250 km long.\n",
        '"It\'s 9,250 km long."',
        "“It's 9,250 km long.”",
        "'It's 9,250 km long.'",
        "«It's 9,250 km long.»",
        "„It's 9,250 km long.“",
        "「It's 9,250 km long.」",
        "``It's 9,250 km long.''",
        "“‘It's 9,250 km long.’”",
        "\"It's 9,250 km long.",  # cut off
        "**It's 9,250 km long.**",
        "*“It's 9,250 km long.”*",
        "1. It's 9,250 km long.",
        "(2) It's 9,250 km long.",
        "[3] It's 9,250 km long.",
        "- It's 9,250 km long.",
        "> * a) It's 9,250 km long.",
        "## It's 9,250 km long.",
        "The key sentence is: It's 9,250 km long.",
        "Sure, here is the sentence:\n\n1. **“It's 9,250 km long.”**",
        'The sentence that contains the evidence is "It\'s 9,250 km long."',
        "Answer: It's 9,250 km long.",
        "<think>It's 5 km? No.</think>It's 9,250 km long.",
        "<THINKING>\nhm\n</THINKING>\n\nIt's 9,250 km long.",
        "or the second? No.</think> It's 9,250 km long.",  # opened by the prompt
        "<think>a<think>b</think>c</think>It's 9,250 km long.",
        "It's 9,250 km long.<think>Is it?</think>",
        "It's 9,250 km long. <think>Is it? Let me",
    ],
)
def test_what_models_put_around_is_taken_away(written):
    assert clean_quote(written) == "It's 9,250 km long."


@pytest.mark.parametrize(
    "kept",
    [
        '"A" is not "B"',  # two quotations, no pair around
        "'Tis the season.",
        "The dogs' owners left.",
        "3.14 is pi.",
        "1999 was a good year.",
        "A cat sat.",
        "-5 degrees were measured.",
        "The evidence was burnt. It said: no.",
        "She said here that it is so.",
    ],
)
def test_what_belongs_to_the_quote_stays(kept):
    assert clean_quote(kept) == kept


def test_unfinished_thought_leaves_nothing():
    assert clean_quote("<think>The Nile is often called the longest river.") == ""


DECORATED = st.lists(
    st.sampled_from(
        [
            *(
                "<think>",
                "</think>",
                "</reasoning>",
                '"',
                "'",
                "“",
                "”",
                "*",
                "_",
                "- ",
                "1. ",
                "a) ",
                "The quote is: ",
            ),
            *("Here", ":", " is ", "sentence", "\n", " ", "left.", "Ann", "’s ", "`", "no "),
        ]
    ),
    max_size=30,
).map("".join)


@given(st.one_of(st.text(), DECORATED))
def test_cleaning_is_idempotent_and_only_takes_away(text):
    cleaned = clean_quote(text)
    assert clean_quote(cleaned) == cleaned == cleaned.strip()
    rest = iter(text + " ")
    assert all(character == " " or character in rest for character in cleaned)


@pytest.mark.parametrize(
    "unit",
    [
        *(
            '"',
            "'",
            "“",
            "- ",
            "1. ",
            "[1] ",
            "* *",
            "_ ",
            "**",
            "Here is: ",
            "the sentence is: ",
            "sure ",
            "sentence ",
        ),
        *("<think>", "</think>", "<think></think>", "<think>a</thinking>", "no ", "\n", "'a' ", '("', "evidence is '"),
    ],
)
def test_cleaning_and_refusing_take_linear_time(unit):
    text = (unit * 50_000)[:50_000]
    begin = time.process_time()  # of this process alone, whatever else the machine does
    clean_quote(text)
    is_refusal(text)
    assert time.process_time() - begin < 10  # far less; a quadratic scan takes minutes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n",
        "...",
        "“”",
        "<think>hm</think>",
        "None",
        "none.",
        "N/A",
        "**Unknown**",
        "Answer: None.",
        "Not found!",
        "I do not know.",
        "I don't know",
        "I don’t know the answer to this question.",
        "I'm not sure.",
        "Sorry, but I cannot find it.",
        "There is no such sentence in the context.",
        "No relevant sentence was found.",
        "The context does not say who won.",
    ],
)
def test_refusals(text):
    assert is_refusal(text)
    assert locate_quote(text, CONTEXT, embed=never, min_similarity=-1) == ()


@pytest.mark.parametrize(
    "text",
    [
        "None of the crew survived.",
        "No.",
        "Nothing compares to you.",
        "Unknown men came.",
        "I do not know him.",
        "No king ruled then.",
        "The text is old.",
        "漢",
    ],
)
def test_no_refusals(text):
    assert not is_refusal(text)


def test_a_refusal_is_not_read_on():
    assert locate_quote("No sentence says so. The rivers of South America are long.", CONTEXT, min_similarity=-1) == ()


def test_a_refusal_that_the_context_holds_is_a_quote():
    assert found("I do not know.", "They asked. I do not know. He left.") == (["I do not know."], ["exact"])
    assert found("Here is the answer: he left it.", "A note. Here is the answer: he left it. Gone.") == (
        ["Here is the answer: he left it."],
        ["exact"],
    )


# ---- the cascade -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quote", "stage"),
    [
        ("called the longest river", "exact"),
        ("Answer: “The Nile is often called the longest river.”", "exact"),
        ("the NILE is often called the longest river", "normalised"),
        ("The Nile  is often\ncalled the longest river ...", "normalised"),
        ("The ‘Nile’ is often called *the longest* river .", "normalised"),
        ("Ｔｈｅ Ｎｉｌｅ is often called the longest river.", "normalised"),
        ("The Nile was often called the long river.", "ratio"),
        ("People often called the Nile, of all rivers, the longest one.", "embedding"),
    ],
)
def test_each_rung(quote, stage):
    hits = locate_quote(quote, CONTEXT)
    assert [(hit.start, hit.end, hit.stage) for hit in hits] == [(76, 119, stage)]
    assert (hits[0].score == 1) == (stage in ("exact", "normalised"))


@pytest.mark.parametrize(
    ("quote", "text"),
    [
        ("It's the 'Old–World' way…", "It’s the “Old—World” way..."),
        ("It´s so-called art", "It's so‑called art."),
        ("the ﬁnal ½ hour", "The final 1⁄2 hour."),
        ("STRASSE in Zürich ended", "straße in Zu\u0308rich ended"),
        ("he left (at once)", "He left ( at once ) ."),
        ("zero\u200bwidth soft\u00adhyphen gone", "zerowidth softhyphen gone."),
    ],
)
def test_normalisation(quote, text):
    context = f"Another one.\n{text}\nAnd a third."
    assert found(quote, context, embed=never) == ([text], ["normalised"])


def test_an_equal_sentence_goes_before_one_that_holds_it():
    context = "He said that the river is long and wide. The river is long!"
    assert found("the river is long", context) == (["He said that the river is long and wide."], ["exact"])
    assert found("The river is long", context) == (["The river is long!"], ["exact"])
    assert found("THE RIVER IS LONG", context) == (["The river is long!"], ["normalised"])


def test_earlier_rungs_win_over_higher_places():
    context = "The old river is very long. The old river was very long."
    assert found("The old river was very long.", context) == (["The old river was very long."], ["exact"])
    assert found("The old river was so very long.", context) == (["The old river was very long."], ["ratio"])


def test_long_sentences_are_compared_by_all_their_letters():
    text = (
        "The commission, which had been appointed by the king in the spring of the year 1843 and had met eleven times "
        "in the old town hall, reported that the bridge over the river could not be repaired at a cost below forty "
        "thousand pounds and should be rebuilt."
    )
    quote = text.replace("eleven", "twelve").replace("town hall", "townhall")
    assert SequenceMatcher(None, quote, text).ratio() < MIN_RATIO < 0.98 < matcher(quote, text).ratio()
    assert found(quote, f"{text} It was.", embed=never) == ([text], ["ratio"])


def test_the_ratio_rung_takes_the_best_and_not_the_first():
    context = "The tall man sold the red house. The tall man sold the red horse."
    assert found("The tall man sold a red horse.", context)[0] == ["The tall man sold the red horse."]


@given(st.lists(st.text(st.sampled_from("abcd "), min_size=4, max_size=20), min_size=1, max_size=6), st.data())
def test_the_ratio_rung_agrees_with_trying_all(texts, data):
    texts = ["x y z " + text.strip() + "." for text in texts]
    piece = data.draw(st.sampled_from(texts))[:-3] + "q w."
    if any(piece.strip(" .") in text for text in texts):
        return
    context = "\n".join(texts)
    spans = [(sum(len(text) + 1 for text in texts[:k]), len(texts[k])) for k in range(len(texts))]
    ratios = [matcher(piece, text).ratio() for text in texts]
    hits = locate_quote(piece, context, [(lo, lo + length) for lo, length in spans], min_similarity=1)
    hits = [hit for hit in hits if hit.stage == "ratio"]
    if max(ratios) >= MIN_RATIO:
        best = ratios.index(max(ratios))
        assert [(hit.start, hit.score) for hit in hits] == [(spans[best][0], ratios[best])]
    else:
        assert not hits


@given(st.text(st.sampled_from('aB .!?\n"’漢1'), max_size=60), st.data())
def test_any_copy_of_a_long_sentence_is_found_exactly(context, data):
    context = "One two three. " + context
    spans = sentences(context)
    lo, hi = data.draw(st.sampled_from(spans))
    text = context[lo:hi]
    if len(text.split()) < 3 or is_refusal(text):
        return
    first = next((a, b) for a, b in spans if context[a:b] == text)
    assert locate_quote(text, context, embed=never) == (Hit(*first, 1.0, "exact"),)


@given(st.text(max_size=80), st.text(max_size=80), st.integers(1, 3), st.booleans())
def test_hits_are_sentences_in_order(quote, context, count, copies):
    hits = locate_quote(quote, context, max_spans=count, all_matches=copies)
    spans = [(hit.start, hit.end) for hit in hits]
    assert spans == sorted(set(spans))
    assert set(spans) <= set(sentences(context))
    assert copies or len(hits) <= count
    assert all(hit.score == 1 or hit.stage in ("ratio", "embedding") for hit in hits)


# ---- several sentences -----------------------------------------------------------------------------------------------


def test_a_quote_of_several_sentences_means_all_up_to_max_spans():
    quote = f"1. {RIVERS[3]}\n2. “{RIVERS[0]}”\n3. The Nile is the longest river."
    assert found(quote) == ([RIVERS[0]], ["exact"])
    assert found(quote, max_spans=2) == ([RIVERS[0], RIVERS[3]], ["exact", "exact"])
    assert found(quote, max_spans=9) == ([RIVERS[0], *RIVERS[2:]], ["exact", "ratio", "exact"])


def test_the_surest_sentences_are_kept():
    quote = f"The Nile is the longest river. I do not know. {RIVERS[3].upper()} {RIVERS[1]}"
    assert found(quote, max_spans=1) == ([RIVERS[1]], ["exact"])
    assert found(quote, max_spans=2) == ([RIVERS[1], RIVERS[3]], ["exact", "normalised"])
    assert found(quote, max_spans=4) == (RIVERS[1:], ["exact", "ratio", "normalised"])


def test_all_open_sentences_are_embedded_in_one_call():
    calls = []

    def embed(texts):
        calls.append(list(texts))
        return bag_of_words(texts)

    quote = f"A length of 650 km it has. {RIVERS[1]} In South America, the Amazon is a river."
    assert found(quote, embed=embed, max_spans=3)[1] == ["embedding", "exact", "embedding"]
    assert calls == [["A length of 650 km it has.", "In South America, the Amazon is a river.", *RIVERS]]


def test_a_quote_across_a_line_end_means_both_parts_the_larger_first():
    context = "A start. The Nile is often called\nthe longest river of the whole wide world. An end."
    quote = "The Nile is often called the longest river of the whole wide world."
    assert found(quote, context, embed=never) == (["the longest river of the whole wide world."], ["normalised"])
    assert found(quote, context, embed=never, max_spans=3) == (
        ["The Nile is often called", "the longest river of the whole wide world."],
        ["normalised", "normalised"],
    )


def test_several_sentences_of_the_quote_may_be_one_of_the_context():
    context = "It rained. The sun rose. The moon set."
    assert locate_quote("The sun rose. The moon set.", context, [(0, 10), (11, 38)]) == (Hit(11, 38, 1.0, "exact"),)


def test_copies_come_beyond_max_spans():
    context = "The sun rose again. It rained.\nthe sun  rose again. The moon set then. The sun rose again."
    assert len(locate_quote("The sun rose again.", context)) == 1
    hits = locate_quote("The sun rose again.", context, all_matches=True)
    assert [(hit.start, hit.end) for hit in hits] == [(0, 19), (31, 51), (71, 90)]
    assert {(hit.score, hit.stage) for hit in hits} == {(1.0, "exact")}


# ---- short pieces ----------------------------------------------------------------------------------------------------


def test_a_heading_never_wins_by_cosine_but_lends_its_words():
    context = "The Nile\nIts full length is about 6,650 km.\nThe Amazon\nThat one is wider by far."
    rows = bag_of_words(["Of which length is the Nile?", "The Nile", "Its full length is about 6,650 km."])
    assert cosine(rows[0], rows[1:]).argmax() == 0  # the accident
    seen = []

    def embed(texts):
        seen.extend(texts)
        return bag_of_words(texts)

    assert found("Of which length is the Nile?", context, embed=embed)[0] == ["Its full length is about 6,650 km."]
    assert seen[1:] == ["The Nile Its full length is about 6,650 km.", "The Amazon That one is wider by far."]
    assert found("Which one has the Amazon far wider?", context)[0] == ["That one is wider by far."]


def test_only_headings_are_no_evidence():
    assert locate_quote("Of which length is the Nile?", "The Nile\nThe Amazon\n", embed=never) == ()


def test_short_quotes():
    context = "In 1999 he left Rome. Rome fell later on. The Nile\nParisians came to it."
    assert found("1999", context) == (["In 1999 he left Rome."], ["exact"])
    assert found("the nile", context) == (["The Nile"], ["normalised"])
    for quote in ("Rome", "Paris", "199", "he came"):  # of several, part of a word, nowhere
        assert locate_quote(quote, context, embed=never, min_similarity=-1) == ()


def test_headings_do_not_cost_quadratic_memory():
    sizes = []

    def embed(texts):
        sizes.append(sum(map(len, texts)))
        return torch.ones(len(texts), 1)

    context = "cell\n" * 5_000 + "The very last row of all."
    assert found("Some other words are here.", context, embed=embed)[0] == ["The very last row of all."]
    assert sizes[0] < 2 * len(context)


def test_ideographs_count_as_words():
    context = "彼は東京へ行った。彼女は大阪に残った。"
    assert found("東京へ行った", context) == (["彼は東京へ行った。"], ["exact"])
    assert found("彼女は大阪に残る。", context, embed=never)[0] == ["彼女は大阪に残った。"]


# ---- embeddings ------------------------------------------------------------------------------------------------------


def test_the_least_similarity_decides_and_counts_itself():
    quote = "The Nile has a length of about 6650 km."
    rows = bag_of_words([quote, *RIVERS])
    score = float(cosine(rows[0], rows[1:])[3])
    assert len(locate_quote(quote, CONTEXT, min_similarity=score)) == 1
    assert locate_quote(quote, CONTEXT, min_similarity=score + 1e-9) == ()


def test_no_common_word_is_no_evidence():
    assert locate_quote("Penguins cannot fly.", CONTEXT) == ()
    assert locate_quote("Πιγκουίνοι που δεν πετούν.", CONTEXT) == ()


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda rows: [torch.tensor(row) for row in rows]])
def test_rows_of_any_kind(kind):
    vectors = {RIVERS[0]: [-1.0, 0.0], RIVERS[1]: [1.0, 1.0], RIVERS[2]: [0.0, 0.0], RIVERS[3]: [3.0, 1.0]}
    hits = locate_quote(
        "A quite different thing.", CONTEXT, embed=lambda texts: kind([vectors.get(t, [2.0, 0]) for t in texts])
    )
    assert hits == (Hit(120, 149, pytest.approx(3 / 10**0.5), "embedding"),)


def test_rows_that_differ_by_rounding_are_a_tie():
    noise = iter([0.1, 0.0, 1e-7, 2e-7, 0.0])  # the third sentence is nearest, by 2e-8
    hits = locate_quote(
        "A quite different thing.", CONTEXT, embed=lambda texts: [[1.0, 1e-3 + next(noise)] for _ in texts]
    )
    assert [hit.start for hit in hits] == [0]


@pytest.mark.parametrize(
    "rows",
    [
        None,
        1.0,
        [],
        ["a", "b", "c", "d", "e"],
        [[1.0]] * 4,
        [[1.0]] * 6,
        [1.0] * 5,
        [[1.0], [1.0, 2.0], [1.0], [1.0], [1.0]],
        torch.ones(5, 1, 1),
        [[float("nan")]] * 5,
        [[1.0]] * 4 + [[float("inf")]],
        torch.full((5, 1), 1e200, dtype=torch.float64),
    ],
    ids=str,
)
def test_rows_that_are_no_embeddings_are_refused(rows):
    with pytest.raises(ConfigError, match=r"^embed: returned"):
        locate_quote("A quite different thing.", CONTEXT, embed=lambda texts: rows)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_spans": 0}, "max_spans: 0"),
        ({"max_spans": -1}, "max_spans: -1"),
        ({"min_similarity": 1.1}, r"min_similarity: must be in \[-1, 1\], got 1.1"),
        ({"min_similarity": -1.1}, r"min_similarity: must be in \[-1, 1\], got -1.1"),
        ({"min_similarity": float("nan")}, r"min_similarity: must be in \[-1, 1\], got nan"),
    ],
)
def test_options_out_of_range_are_refused_whatever_the_quote(options, field):
    with pytest.raises(ConfigError, match=rf"^{field}\b"):
        locate_quote("", "", **options)


@pytest.mark.parametrize(
    ("spans", "number"),
    [
        ([(5, 10), (0, 4)], 1),
        ([(0, 10), (9, 12)], 1),
        ([(3, 3)], 0),
        ([(4, 3)], 0),
        ([(-1, 3)], 0),
        ([(0, 3), (140, 150)], 1),
    ],
)
def test_spans_that_are_no_spans_of_the_context_are_refused(spans, number):
    with pytest.raises(DataError, match=rf"^spans\[{number}\]: "):
        locate_quote(RIVERS[0], CONTEXT, spans)


def test_spans_of_the_caller_are_used():
    assert locate_quote("It is the largest river", CONTEXT, [(0, 37), (38, 119)]) == (Hit(38, 119, 1.0, "exact"),)
    assert locate_quote(RIVERS[3], CONTEXT, [(0, 37)], min_similarity=0.9) == ()
    assert locate_quote(RIVERS[3], CONTEXT, [], embed=never) == ()
    assert locate_quote(RIVERS[3], "", embed=never) == ()


def test_bag_of_words_counts_ascii_words():
    assert bag_of_words([]).shape == (0, 0)
    assert bag_of_words(["é — ü", ""]).shape == (2, 0)
    rows = bag_of_words(["B2 b2, a-b2!", "A"])
    assert rows.dtype == torch.float64
    assert rows.tolist() == [[3, 1], [0, 1]]
