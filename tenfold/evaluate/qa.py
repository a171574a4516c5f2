"""Question answering: exact match and token F1 as SQuAD defined them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tenfold.attend.autopasta.sentences import sentences
from tenfold.attend.chat_marks import MessageSpan
from tenfold.attend.text_marks import Marked, from_spans, from_tags
from tenfold.config.evaluate import Emphasised
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
    return marked_prompt(question).text


def marked_prompt(
    question: Question, emphasise: Emphasised | None = None, tags: tuple[str, str] = ("<mark>", "</mark>")
) -> Marked:
    """`question_prompt` with a part that is emphasised.

    Args:
        question: a row.
        emphasise: ``question``; ``whole``, all passages; ``gold``, the sentences that hold an answer; ``marks``, what
            stands between tags, which do not come into the prompt.
        tags: what begins and ends a mark.

    Raises:
        DataError: a tag that does not close or was not opened.

    >>> prompt = marked_prompt(Question("1", "Who?", "It rains. Ann did it.", ("Ann",)), "gold")
    >>> [prompt.text[span.start : span.end] for span in prompt.spans]
    ['Ann did it.']
    """
    passages = passages_of(question) if question.context else []
    parts = [_emphasised(text, "whole" if emphasise == "whole" else None) for text in passages]
    ask = _emphasised(question.question, "whole" if emphasise == "question" else None)
    if emphasise == "marks":
        name = f"row {question.id!r}"
        parts = [from_tags(text, tags, name=name) for text in passages]
        ask = from_tags(question.question, tags, name=name)
    elif emphasise == "gold":
        gold = gold_passages(question)
        parts = [
            from_spans(text, answering_sentences(text, question.answers) if index in gold else ())
            for index, text in enumerate(passages)
        ]
    numbered = not isinstance(question.context, str)
    text, spans = f"Answer the question with a few words{' from the text' if parts else ''}.", []
    for number, part in enumerate([*parts, ask], 1):
        text += "\n\n" + ("Question: " if number > len(parts) else f"[{number}] " if numbered else "")
        spans += [replace(span, start=span.start + len(text), end=span.end + len(text)) for span in part.spans]
        text += part.text
    return Marked(text + "\nAnswer:", tuple(spans))


def _emphasised(text: str, what: str | None) -> Marked:
    """All of a text but outer white space, or nothing of it."""
    start, end = len(text) - len(text.lstrip()), len(text.rstrip())
    return from_spans(text, [(start, end)] if what and start < end else ())


def passages_of(question: Question) -> list[str]:
    """The passages of the context."""
    return [question.context] if isinstance(question.context, str) else list(question.context)


def gold_passages(question: Question) -> set[int]:
    """Which passages hold an answer: those that the row names, or those in which one stands."""
    found = {index for index, text in enumerate(passages_of(question)) if holds(text, question.answers)}
    return set(question.gold) or found


def answering_sentences(text: str, answers: Sequence[str]) -> list[tuple[int, int]]:
    """Characters ``[start, end)`` of the sentences in which an answer stands.

    >>> answering_sentences("It rains. Ann did it.", ["ann"])
    [(10, 21)]
    """
    return [(start, end) for start, end in sentences(text) if holds(text[start:end], answers)]


def holds(text: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers stands in the text as whole words."""
    words = f" {normalise(text)} "
    return any(f" {normalise(answer)} " in words for answer in answers if normalise(answer))


def answer(
    session: Session,
    questions: Sequence[Question],
    *,
    max_new_tokens: int = 32,
    chat: bool | None = None,
    prompt: Callable[[Question], str | Marked] = question_prompt,
    subject: str = "model",
) -> Answers:
    """Answer greedily and compare with every answer that counts as right; the best one counts.

    Of the generated text the first line that is not empty is taken: base models go on with questions of their own.

    Args:
        session: a model with what is attached to it.
        questions: rows of questions.
        max_new_tokens: tokens of an answer.
        chat: whether to use the chat template; by default where the tokenizer has one.
        prompt: how a question is put; of a marked prompt the marks are emphasised, as with ``partial(marked_prompt,
            emphasise="gold")``.
        subject: which model this is, for the report.

    Returns:
        ``exact_match`` and ``token_f1`` with standard errors over questions.

    Raises:
        DataError: no questions; marked prompts of which none has a mark.

    Example:
        >>> answer(Session(model, tokenizer), rows).result.metric("token_f1").value  # doctest: +SKIP
        0.41
    """
    if not questions:
        raise DataError("no questions to answer", remedy="give at least one")
    chat = session.tokenizer.chat_template is not None if chat is None else chat
    prompts = [prompt(question) for question in questions]
    requests = [_request(text, chat, max_new_tokens) for text in prompts]
    if any(isinstance(text, Marked) for text in prompts) and not any(request.emphasis for request in requests):
        raise DataError(
            f"of {len(prompts)} questions none has anything to emphasise",
            remedy="give rows whose answers stand in their context, or whose text is tagged; or emphasise the question",
        )
    replies = session.generate(requests)
    predictions = [next((line.strip() for line in r.text.splitlines() if line.strip()), "") for r in replies]
    pairs = list(zip(predictions, questions, strict=True))
    exact = [max(exact_match(prediction, right) for right in question.answers) for prediction, question in pairs]
    f1 = [max(token_f1(prediction, right) for right in question.answers) for prediction, question in pairs]
    told = dict.fromkeys(note for reply in replies for note in reply.notes)
    emphasised = sum(bool(request.emphasis) for request in requests)
    settings = {
        "max_new_tokens": max_new_tokens,
        "batch_size": session.batch_size,
        "chat": chat,
        "dtype": number_format(session.model),
        **({"emphasised": f"{emphasised} of {len(requests)} questions"} if emphasised else {}),
        **({"heads": "; ".join(told)} if told else {}),
        **({} if session.kv is None else {"kv": session.kv, "cache": session.notes[0]}),
    }
    metrics = (share("exact_match", exact), share("token_f1", f1))
    return Answers(
        result=Result(task="question_answering", subject=subject, metrics=metrics, settings=settings),
        predictions=tuple(predictions),
        exact=tuple(exact),
        f1=tuple(f1),
    )


def _request(prompt: str | Marked, chat: bool, max_new_tokens: int) -> Request:
    marked = Marked(prompt) if isinstance(prompt, str) else prompt
    if not chat:
        return Request(marked.text, emphasis=marked.spans, max_new_tokens=max_new_tokens)
    spans = tuple(MessageSpan(0, span.start, span.end, span.strength) for span in marked.spans)
    talk = [{"role": "user", "content": marked.text}]
    return Request(messages=talk, emphasis=spans, max_new_tokens=max_new_tokens)


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
