"""What a row of data is: one frozen dataclass per kind, and the columns each kind is read from.

| kind | columns it needs | further columns |
| --- | --- | --- |
| ``preference`` | ``prompt``, ``chosen``, ``rejected`` | |
| ``chat`` | ``messages`` | |
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
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from tenfold.config.stage import Kind


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


@dataclass(frozen=True)
class Chat:
    """A conversation; ``messages`` are dictionaries as chat templates take them (``role``, ``content``, ...)."""

    id: str
    messages: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, of which ``chosen`` is the better.

    ``history`` are the messages before the prompt, where it is the last question of a conversation or has a system
    message; it needs a chat template.
    """

    id: str
    prompt: str
    chosen: str
    rejected: str
    history: tuple[dict[str, Any], ...] = ()

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The messages that are answered: the history, and the prompt as the user's."""
        return [*self.history, {"role": "user", "content": self.prompt}]

    def columns(self) -> dict[str, Any]:
        """As a row of a file or of TRL's: texts, or conversations where there is a history.

        >>> Preference("1", "1+1=", "2", "3").columns()
        {'id': '1', 'prompt': '1+1=', 'chosen': '2', 'rejected': '3'}
        """
        if not self.history:
            return {"id": self.id, "prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}
        return self.conversations()

    def conversations(self) -> dict[str, Any]:
        """As a row of TRL's conversational form."""
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (self.chosen, self.rejected))
        return {"id": self.id, "prompt": self.turns, "chosen": chosen, "rejected": rejected}


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
    "preference": KindSpec(Preference, ("prompt", "chosen", "rejected")),
    "chat": KindSpec(Chat, ("messages",)),
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
    fields = {name: value for name, value in asdict(row).items() if name != "id" and value is not None}
    if not fields.get("history"):
        fields.pop("history", None)  # rows without one keep their ids
    return json.dumps(fields, sort_keys=True, ensure_ascii=False)


def content_id(row: Row) -> str:
    """The id of a row that came without one: the start of the SHA-256 of its content.

    >>> content_id(Text("", "a")) == content_id(Text("other", "a"))
    True
    """
    return hashlib.sha256(content(row).encode()).hexdigest()[:16]
