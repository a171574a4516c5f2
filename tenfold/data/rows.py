"""What a row of data is: one frozen dataclass per kind, and the columns each kind is read from.

| kind | columns it needs | further columns |
| --- | --- | --- |
| ``preference`` | ``prompt``, ``chosen``, ``rejected`` | ``tools``, ``chat_template_kwargs`` |
| ``chat`` | ``messages`` | ``given``, ``tools``, ``chat_template_kwargs`` |
| ``question`` | ``question``, ``answers`` | ``context``, ``gold`` |
| ``choice`` | ``prompt``, ``options``, ``answer`` | |
| ``completion`` | ``prompt``, ``completion`` | |
| ``classification`` | ``text``, ``label`` | ``text_pair`` |
| ``text`` | ``text`` | |

Every kind may also have ``id`` and ``split``. The first kind of the table whose needed columns are all there is taken.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tenfold.config.stage import Kind
from tenfold.data.transcripts import turns_of

Message = dict[str, Any]
"""As chat templates take it: ``role``, ``content``, and what else there is (``tool_calls``, ``name``, ...)."""


@dataclass(frozen=True)
class Text:
    """Running text to learn from or to score."""

    id: str
    text: str


@dataclass(frozen=True)
class Completion:
    """A prompt and what should follow it."""

    id: str
    prompt: str
    completion: str

    @property
    def messages(self) -> tuple[Message, ...]:
        """As a conversation: the prompt as the user's, or the turns of a transcript, and the completion."""
        return tuple(_answered(self.prompt, self.completion))


@dataclass(frozen=True)
class Chat:
    """A conversation.

    ``given`` messages at its beginning are context, of which nothing is learned; ``tools`` and
    ``chat_template_kwargs`` are what the chat template is given beside the messages.
    """

    id: str
    messages: tuple[Message, ...]
    given: int = 0
    tools: tuple[dict[str, Any], ...] = ()
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """Further arguments of the chat template."""
        return _options(self.tools, self.chat_template_kwargs)


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, of which ``chosen`` is the better.

    ``history`` are the messages before the prompt, where it is the last question of a conversation or has a system
    message; where a conversation ends with something else (the result of a tool, an answer begun), they are all of it,
    and ``prompt`` is empty. ``answers`` are the two as messages, chosen first, where one is more than a text (calls of
    tools, thoughts, several turns); ``chosen`` and ``rejected`` are then what a reader is shown. All of this needs a
    chat template, as do ``tools`` and ``chat_template_kwargs``.
    """

    id: str
    prompt: str
    chosen: str
    rejected: str
    history: tuple[Message, ...] = ()
    answers: tuple[tuple[Message, ...], tuple[Message, ...]] | None = None
    tools: tuple[dict[str, Any], ...] = ()
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def needs_template(self) -> bool:
        """Whether prompt and answers are more than three texts."""
        return bool(self.history or self.answers or self.tools)

    @property
    def turns(self) -> list[Message]:
        """The messages that are answered: the history, and the prompt as the user's or as the turns of a transcript."""
        if self.history:
            return [*self.history, *([{"role": "user", "content": self.prompt}] if self.prompt else ())]
        return _answered(self.prompt)

    @property
    def replies(self) -> tuple[list[Message], list[Message]]:
        """Both answers as messages, chosen first."""
        if self.answers is not None:
            return list(self.answers[0]), list(self.answers[1])
        question = "" if self.history else self.prompt
        chosen, rejected = (_answered(question, text)[-1:] for text in (self.chosen, self.rejected))
        return chosen, rejected

    @property
    def options(self) -> dict[str, Any]:
        """Further arguments of the chat template."""
        return _options(self.tools, self.chat_template_kwargs)

    def columns(self) -> dict[str, Any]:
        """As a row of a file or of TRL's: texts, or conversations where it is more.

        >>> Preference("1", "1+1=", "2", "3").columns()
        {'id': '1', 'prompt': '1+1=', 'chosen': '2', 'rejected': '3'}
        """
        if not self.needs_template:
            return {"id": self.id, "prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}
        return self.conversations()

    def conversations(self) -> dict[str, Any]:
        """As a row of TRL's conversational form."""
        chosen, rejected = self.replies
        further = {"tools": list(self.tools), "chat_template_kwargs": self.chat_template_kwargs}
        return {"id": self.id, "prompt": self.turns, "chosen": chosen, "rejected": rejected,
                **{name: value for name, value in further.items() if value}}  # fmt: skip


def _answered(prompt: str, answer: str | None = None) -> list[Message]:
    """A prompt, and an answer where one is given, as messages; white space around turns of a transcript is its own."""
    turns = turns_of(prompt)
    before = turns or [{"role": "user", "content": prompt}]
    if answer is None:
        return before
    return [*before, {"role": "assistant", "content": answer.strip() if turns else answer}]


def _options(tools: Sequence[Mapping[str, Any]], further: Mapping[str, Any]) -> dict[str, Any]:
    return {**({"tools": list(tools)} if tools else {}), **further}


def spoken(messages: Sequence[Mapping[str, Any]]) -> str:
    r"""Messages as a reader is shown them; one text of the assistant as it is.

    >>> spoken([{"role": "assistant", "content": "4"}])
    '4'
    >>> spoken([{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}])
    'user: 2+2=\nassistant: 4'
    """
    if len(messages) == 1 and is_plain(messages[0], "assistant"):
        return str(messages[0]["content"])
    lines = []
    for message in messages:
        said = [str(message[name]) for name in ("reasoning_content", "thinking", "content") if message.get(name)]
        if message.get("tool_calls"):
            said.append(json.dumps(message["tool_calls"], ensure_ascii=False, default=str))
        lines.append(f"{message['role']}: {' '.join(said)}")
    return "\n".join(lines)


def is_plain(message: Mapping[str, Any], role: str) -> bool:
    """Whether a message is a text of this role and nothing else."""
    there = {name for name, value in message.items() if value is not None}
    return message.get("role") == role and there == {"role", "content"} and isinstance(message["content"], str)


@dataclass(frozen=True)
class Question:
    """A question, what it may be answered from, and every answer that counts as right.

    ``context`` is one text or several passages (a passage given with a title is ``title``, newline, ``text``);
    ``gold`` are the indices of the passages that hold the answer.
    """

    id: str
    question: str
    context: str | tuple[str, ...]
    answers: tuple[str, ...]
    gold: tuple[int, ...] = ()


@dataclass(frozen=True)
class Classification:
    """A text, or a pair of texts, and its class (a name or a whole number; a float for regression)."""

    id: str
    text: str
    label: str | int | float
    text_pair: str | None = None


@dataclass(frozen=True)
class Choice:
    """A prompt, its possible continuations and the index of the right one.

    In a file ``options`` is a list, or an object such as ``{"A": "...", "B": "..."}``; ``answer`` is the index counted
    from 0, the letter, or the option itself.
    """

    id: str
    prompt: str
    options: tuple[str, ...]
    answer: int


Row = Text | Completion | Chat | Preference | Question | Choice | Classification


class KindSpec(NamedTuple):
    """The class of a kind and the columns it is read from."""

    row: type[Row]
    needed: tuple[str, ...]
    further: tuple[str, ...] = ()


KINDS: dict[Kind, KindSpec] = {
    "preference": KindSpec(Preference, ("prompt", "chosen", "rejected"), ("tools", "chat_template_kwargs")),
    "chat": KindSpec(Chat, ("messages",), ("given", "tools", "chat_template_kwargs")),
    "question": KindSpec(Question, ("question", "answers"), ("context", "gold")),
    "choice": KindSpec(Choice, ("prompt", "options", "answer")),
    "completion": KindSpec(Completion, ("prompt", "completion")),
    "classification": KindSpec(Classification, ("text", "label"), ("text_pair",)),
    "text": KindSpec(Text, ("text",)),
}
"""In the order in which they are tried."""

OUR_COLUMNS = (*dict.fromkeys(c for spec in KINDS.values() for c in spec.needed + spec.further), "id", "split")
"""Every column name that a row can be read from."""


def content(row: Row) -> str:
    """A row without its id, as canonical JSON: equal for equal rows whatever file they came from."""
    fields = {name: value for name, value in vars(row).items() if name != "id" and value is not None}
    for name in ("history", "given", "tools", "chat_template_kwargs"):
        if not fields.get(name):
            fields.pop(name, None)  # rows without one keep their ids
    return json.dumps(fields, sort_keys=True, ensure_ascii=False)


def content_id(row: Row) -> str:
    """The id of a row that came without one: the start of the SHA-256 of its content.

    >>> content_id(Text("", "a")) == content_id(Text("other", "a"))
    True
    """
    return hashlib.sha256(content(row).encode()).hexdigest()[:16]
