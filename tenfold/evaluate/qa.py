"""Question answering: exact match and token F1 as SQuAD defined them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tenfold.data.rows import Question
from tenfold.engines.requests import Request
from tenfold.engines.session import Session
from tenfold.errors import DataError
from tenfold.evaluate.choice import share
from tenfold.models.quantised import number_format
from tenfold.stage.results import Result

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Answers:
    """What was answered.

    Args:
        result: the figures for the report.
        predictions: the first line of each generated text.
        exact: exact match of each, 0 or 1.
        f1: token F1 of each, 0 to 1.
    """

    result: Result
    predictions: tuple[str, ...]
    exact: tuple[float, ...]
    f1: tuple[float, ...]


def question_prompt(question: Question) -> str:
    """Passages, numbered where there are several, then the question.

    >>> print(question_prompt(Question("1", "Who?", ("Ann did.", "Not Bob."), ("Ann",))))
    Answer the question with a few words from the text.
    <BLANKLINE>
    [1] Ann did.
    <BLANKLINE>
    [2] Not Bob.
    <BLANKLINE>
    Question: Who?
    Answer:
    """
    if isinstance(question.context, str):
        passages = [question.context] if question.context else []
    else:
        passages = [f"[{number}] {passage}" for number, passage in enumerate(question.context, start=1)]
    source = " from the text" if passages else ""
    return "\n\n".join(
        [f"Answer the question with a few words{source}.", *passages, f"Question: {question.question}\nAnswer:"]
    )


def answer(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 8,
    chat: bool | None = None,
    prompt: Callable[[Question], str] = question_prompt,
    subject: str = "model",
    kv: str | None = None,
) -> Answers:
    """Answer greedily and compare with every answer that counts as right; the best one counts.

    Of the generated text the first line that is not empty is taken: base models go on with questions of their own.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        questions: rows of questions.
        max_new_tokens: tokens of an answer.
        batch_size: prompts at once.
        chat: whether to use the chat template; by default where the tokenizer has one.
        prompt: how a question is put.
        subject: which model this is, for the report.
        kv: a packed cache that questions are read into, such as ``gear:4``.

    Returns:
        ``exact_match`` and ``token_f1`` with standard errors over questions.

    Example:
        >>> answer(model, tokenizer, rows, max_new_tokens=16).result.metric("token_f1").value  # doctest: +SKIP
        0.41
    """
    if not questions:
        raise DataError("no questions to answer", remedy="give at least one")
    chat = tokenizer.chat_template is not None if chat is None else chat
    session = Session(model, tokenizer, kv=kv, batch_size=batch_size)
    requests = [_request(prompt(question), chat, max_new_tokens) for question in questions]
    texts = [reply.text for reply in session.generate(requests)]
    predictions = [next((line.strip() for line in text.splitlines() if line.strip()), "") for text in texts]
    exact = [
        max(exact_match(prediction, right) for right in question.answers)
        for prediction, question in zip(predictions, questions, strict=True)
    ]
    f1 = [
        max(token_f1(prediction, right) for right in question.answers)
        for prediction, question in zip(predictions, questions, strict=True)
    ]
    settings = {
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "chat": chat,
        "dtype": number_format(model),
        **({} if kv is None else {"kv": kv, "cache": session.notes[0]}),
    }
    metrics = (share("exact_match", exact), share("token_f1", f1))
    return Answers(
        result=Result(task="question_answering", subject=subject, metrics=metrics, settings=settings),
        predictions=tuple(predictions),
        exact=tuple(exact),
        f1=tuple(f1),
    )


def _request(prompt: str, chat: bool, max_new_tokens: int) -> Request:
    if chat:
        return Request(messages=[{"role": "user", "content": prompt}], max_new_tokens=max_new_tokens)
    return Request(prompt, max_new_tokens=max_new_tokens)


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces.

    >>> normalise(" The  Cat's-eye! ")
    'catseye'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, right: str) -> float:
    """1 when both are the same after normalisation, else 0.

    >>> exact_match("The Beatles.", "beatles")
    1.0
    """
    return float(normalise(prediction) == normalise(right))


def token_f1(prediction: str, right: str) -> float:
    """Harmonic mean of precision and recall of the words; when either has none, 1 only if both have none.

    >>> token_f1("the red house", "red")
    0.6666666666666666
    """
    found, wanted = normalise(prediction).split(), normalise(right).split()
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall)
