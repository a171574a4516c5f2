"""Question answering: SQuAD's rules, and the way from question to figures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold.data.rows import Question
from tenfold.engines.requests import Reply
from tenfold.engines.session import Session
from tenfold.errors import DataError
from tenfold.evaluate.qa import answer, exact_match, question_prompt, token_f1


@pytest.mark.parametrize(
    ("prediction", "right", "exact", "f1"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1, 1),
        ("in Paris, France", "Paris", 0, 0.5),
        ("a cat a cat", "cat", 0, 2 / 3),
        ("London", "Paris", 0, 0),
        ("", "Paris", 0, 0),
        ("the", "a", 1, 1),
        ("anthem", "them", 0, 0),
    ],
)
def test_squad_rules(prediction, right, exact, f1):
    assert exact_match(prediction, right) == exact
    assert token_f1(prediction, right) == pytest.approx(f1)


@given(st.text(), st.text())
def test_f1_is_symmetric_bounded_and_implied_by_exact_match(one, other):
    value = token_f1(one, other)
    assert value == token_f1(other, one)
    assert 0 <= value <= 1
    assert not exact_match(one, other) or value == 1


QUESTIONS = [
    Question("1", "Who?", ("Ann did.", "Not Bob."), ("Ann", "Ann Lee")),
    Question("2", "Where?", "", ("Rome",)),
    Question("3", "When?", "In May.", ("May",)),
]


def test_best_answer_counts_and_the_first_line_is_taken(monkeypatch, model, tokenizer):
    texts = ["\n Ann Lee \nQuestion: next", "Milan", "in May"]
    monkeypatch.setattr(Session, "generate", lambda *_: [Reply(text) for text in texts])
    found = answer(Session(model, tokenizer), QUESTIONS)
    assert found.predictions == ("Ann Lee", "Milan", "in May")
    assert found.exact == (1.0, 0.0, 0.0)
    assert found.f1 == pytest.approx((1.0, 0.0, 2 / 3))
    metric = found.result.metric("exact_match")
    assert (metric.value, metric.count, metric.stderr) == (pytest.approx(1 / 3), 3, pytest.approx(1 / 3))


def test_generation_is_asked_with_passages_and_question(model, tokenizer):
    found = answer(Session(model, tokenizer, batch_size=2), QUESTIONS, max_new_tokens=3)
    assert len(found.predictions) == 3
    assert found.result.settings["chat"] is True
    assert question_prompt(QUESTIONS[1]).startswith("Answer the question with a few words.\n\nQuestion: Where?")
    assert "\n\nIn May.\n\n" in question_prompt(QUESTIONS[2])


def test_no_questions(model, tokenizer):
    with pytest.raises(DataError, match="no questions"):
        answer(Session(model, tokenizer), [])
