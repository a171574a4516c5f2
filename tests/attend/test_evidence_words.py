"""Quotes that are no copies: rare words decide, and what no sentence supports marks nothing."""

import math

import pytest

from tenfold.attend.autopasta.answering import AutoPasta
from tenfold.attend.autopasta.quote_matching import MIN_RARE, cosine, locate_quote, rare_words
from tenfold.models.tiny import tiny_model

CONTEXT = (
    "The town library stands on Main Street, next to the bakery. It was built in 1902 with money of the miller. "
    "On weekdays the library opens at nine in the morning. The librarian wrote a history of the library in 1987. "
    "Cats and dogs are not allowed inside the building."
)
NONSENSE = [
    "The film was shot in the north of the country and it is one of the best of the year.",
    "She is the daughter of a king and was born in the winter of the great war.",
    "The band played in the hall on the last night of the tour.",
    "It is the second of the two planets that were found in the spring.",
    "There are many reasons for the rise of the price of oil in the east.",
]


@pytest.mark.parametrize("quote", NONSENSE)
def test_fluent_text_about_something_else_marks_nothing(quote):
    assert locate_quote(quote, CONTEXT, min_similarity=0.3) != ()  # counts of words are taken in
    assert locate_quote(quote, CONTEXT, embed=rare_words, min_similarity=MIN_RARE) == ()


@pytest.mark.parametrize(
    ("quote", "start"),
    [
        ("The library is open from nine every weekday morning.", "On weekdays"),
        ("In 1987 its librarian published a history.", "The librarian"),
        ("No cats or dogs may come in.", "Cats"),
        ("Its construction in 1902 was paid by a miller.", "It was built"),
    ],
)
def test_a_quote_in_other_words_finds_its_sentence(quote, start):
    (hit,) = locate_quote(quote, CONTEXT, embed=rare_words, min_similarity=MIN_RARE)
    assert CONTEXT[hit.start :].startswith(start)
    assert hit.stage == "embedding"


def test_weights_are_those_of_the_formula():
    rows = rare_words(["Nile nile", "the Nile", "cat"])
    # 3 texts: log(4 / 2) for Nile, which is twice in the first, a fifth of log(4 / 1) for "the", log(4) for "cat"
    expected = [[(1 + math.log(2)) * math.log(2), 0, 0], [math.log(2), 0.2 * math.log(4), 0], [0, 0, math.log(4)]]
    assert rows.tolist() == [pytest.approx(row) for row in expected]
    assert cosine(rows[0], rows).tolist() == pytest.approx([1, math.log(2) / math.hypot(*expected[1]), 0])
    assert rare_words(["", "..."]).shape == (2, 0)
    assert float(cosine(rare_words(["尼罗河很长"])[0], rare_words(["尼罗河很长"]))[0]) == pytest.approx(1)


def test_unsupported_quotes_fall_back_to_the_plain_answer(monkeypatch):
    opened = tiny_model("llama", max_position_embeddings=2048)
    ask = AutoPasta(opened.model, opened.tokenizer, heads={0: [1]}, max_answer_tokens=3)
    for quote, found in ((NONSENSE[0], False), ("The library opens at nine on weekdays.", True)):
        monkeypatch.setattr(AutoPasta, "_identify", lambda self, rows, quote=quote: ([quote], None))
        answer = ask("When does it open?", CONTEXT)
        assert (answer.fallback, bool(answer.spans)) == (not found, found)
        if not found:
            assert answer.answer == ask("When does it open?", CONTEXT, mode="direct").answer
