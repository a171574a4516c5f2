"""Prompts of a question over a context, and where in them the context stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

from tenfold.attend.chat_marks import said_by_user
from tenfold.attend.text_marks import Marked, from_spans
from tenfold.errors import ConfigError

IDENTIFY_PROMPT = (
    "{context}\n\nQuestion: {question}\n\nCopy the one sentence of the text above that contains the evidence for the "
    "answer. Output only that sentence.\nSentence:"
)
ANSWER_PROMPT = (
    "{context}\n\nQuestion: {question}\n\nAnswer with a short phrase taken from the text above. Output only the "
    "answer.\nAnswer:"
)


class QuestionPrompt:
    """A template with ``{context}`` and ``{question}``, once each; braces that are meant as such are doubled.

    Args:
        name: what error messages call it.
        template: the text.

    Raises:
        ConfigError: other fields, or a field twice.

    >>> prompt = QuestionPrompt("answer_prompt", "{context} Question: {question}")
    >>> prompt.marked("Did Ann?", "Ann did.", [(0, 3)])
    Marked(text='Ann did. Question: Did Ann?', spans=(TextSpan(start=0, end=3, strength=1.0),), special=True)
    """

    def __init__(self, name: str, template: str) -> None:
        remedy = "write {context} and {question} once each; double the braces that are meant as such"
        try:
            parts = list(Formatter().parse(template))
        except ValueError as error:
            raise ConfigError(f"{name}: {error}", remedy) from error
        fields = [part[1] for part in parts if part[1] is not None]
        if sorted(fields) != ["context", "question"] or any(part[2] or part[3] for part in parts):
            raise ConfigError(f"{name}: its fields are {fields}", remedy)
        self._parts = [(literal, name) for literal, name, _, _ in parts]

    def marked(
        self,
        question: str,
        context: str,
        spans: Sequence[tuple[int, int]] = (),
        *,
        tokenizer: Any = None,
        chat: Mapping[str, Any] | None = None,
    ) -> Marked:
        """The prompt, with parts of the context marked.

        Args:
            question: the question; what stands in it is never marked.
            context: the context.
            spans: ``[start, end)`` offsets of the context.
            tokenizer: whose chat template to use.
            chat: further arguments of the chat template; None for no chat template.
        """
        text, base = "", 0
        for literal, name in self._parts:
            text += literal
            base = len(text) if name == "context" else base
            text += {"context": context, "question": question, None: ""}[name]
        marked = from_spans(text, [(base + start, base + end) for start, end in spans])
        return marked if chat is None else said_by_user(tokenizer, marked, **chat)
