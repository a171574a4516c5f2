"""Marks in chat messages, and their way through a chat template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tenfold.attend.text_marks import Marked, TextSpan, check_span, check_strength, from_spans
from tenfold.data.templates import render_chat, require_chat_template
from tenfold.errors import DataError

_PRIVATE = range(0xE000, 0xF900)
"""Characters without a meaning of their own: sentinels on the way through a chat template."""


@dataclass(frozen=True)
class MessageSpan:
    """Characters ``[start, end)`` of the content of a chat message; ``strength`` as in `TextSpan`."""

    message: int
    start: int
    end: int
    strength: float = 1.0


def from_messages(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **template: Any) -> Marked:
    """Render chat messages of which some carry an ``emphasis``.

    Args:
        tokenizer: with a chat template.
        messages: as chat templates take them; ``emphasis`` (a strength above 0) on a message marks its whole content,
            on a text part (``{"type": "text", "text": ..., "emphasis": 1.0}``) that part. Text parts are joined.
        **template: as in `in_chat`.

    Raises:
        DataError: content that is not text, an emphasis that is not a number above 0; as `in_chat`.

    >>> from tenfold.models.tiny import tiny_tokenizer
    >>> messages = [{"role": "user", "content": [{"type": "text", "text": "Why? "},
    ...                                          {"type": "text", "text": "Be brief.", "emphasis": 1.0}]}]
    >>> marked = from_messages(tiny_tokenizer(), messages)
    >>> marked.text[marked.spans[0].start : marked.spans[0].end]
    'Be brief.'
    """
    plain, spans = [], []
    for number, message in enumerate(messages):
        content = message.get("content")
        fields = {key: value for key, value in message.items() if key != "emphasis"}
        if content is None and message.get("emphasis") is None:
            plain.append(fields)  # the model's call of a tool says nothing
            continue
        parts = content if isinstance(content, Sequence) and not isinstance(content, str) else [content]
        text = ""
        for part in parts:
            piece = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
            if not isinstance(piece, str):
                raise DataError(f"message {number}: a part of its content is not text", remedy="give text parts only")
            if isinstance(part, Mapping) and part.get("emphasis") is not None:
                spans.append(MessageSpan(number, len(text), len(text) + len(piece), part["emphasis"]))
            text += piece
        if message.get("emphasis") is not None:
            # In front: what a part says of itself decides.
            spans.insert(0, MessageSpan(number, 0, len(text), message["emphasis"]))
        plain.append({**fields, "content": text})
    return in_chat(tokenizer, plain, spans, **template)


def said_by_user(tokenizer: Any, prompt: Marked, **template: Any) -> Marked:
    """A marked prompt as the one message of a user, and the beginning of the model's turn; as `in_chat`.

    >>> from tenfold.models.tiny import tiny_tokenizer
    >>> marked = said_by_user(tiny_tokenizer(), Marked("Be brief.", (TextSpan(3, 8, 0.5),)))
    >>> marked.text[marked.spans[0].start : marked.spans[0].end], marked.spans[0].strength
    ('brief', 0.5)
    """
    spans = [MessageSpan(0, span.start, span.end, span.strength) for span in prompt.spans]
    return in_chat(tokenizer, [{"role": "user", "content": prompt.text}], spans, **template)


def in_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    spans: Iterable[MessageSpan],
    *,
    add_generation_prompt: bool = True,
    place: str = "the marked messages",
    **template: Any,
) -> Marked:
    """Render chat messages with the tokenizer's template and follow the marks through it.

    Sentinels are put around what is marked, and the render without them must be the render of the plain messages: a
    template that drops, repeats or rewrites the marked text is refused instead of marking something else. Where it
    escapes text, the escaped text is marked.

    Args:
        tokenizer: with a chat template.
        messages: with text as ``content``.
        spans: what to mark. White space at the ends of a message, which many templates trim, is left out.
        add_generation_prompt: end with the beginning of the model's turn.
        place: what an error calls them.
        **template: further arguments of the template.

    Raises:
        ModelError: no chat template.
        DataError: a message that is not there, a span outside its content or of white space alone, a template that
            refuses the messages, or loses or changes what is marked.

    >>> from tenfold.models.tiny import tiny_tokenizer
    >>> marked = in_chat(tiny_tokenizer(), [{"role": "user", "content": "Be brief."}], [MessageSpan(0, 3, 8)])
    >>> marked.text[marked.spans[0].start : marked.spans[0].end], marked.special
    ('brief', False)
    """
    require_chat_template(tokenizer)
    options = {"ask": add_generation_prompt, **template}
    plain = render_chat(tokenizer, messages, place, **options)
    free = [chr(code) for code in _PRIVATE if chr(code) not in plain]
    inserts: dict[int, list[tuple[int, str]]] = {}
    pairs: list[tuple[MessageSpan, str, str]] = []
    for span in spans:
        start, end = _inside(messages, span)
        if len(free) < 2:
            raise DataError("too many marks in one conversation", remedy="mark longer spans")
        opening, closing = free.pop(), free.pop()
        inserts.setdefault(span.message, []).extend([(start, opening), (end, closing)])
        pairs.append((span, opening, closing))
    if not pairs:
        return Marked(plain, (), special=False)
    marked = [dict(message) for message in messages]
    for number, places in inserts.items():
        text = marked[number]["content"]
        for at, sentinel in sorted(places, reverse=True):
            text = text[:at] + sentinel + text[at:]
        marked[number]["content"] = text
    rendered = render_chat(tokenizer, marked, place, **options)
    sentinels = {character for _, *both in pairs for character in both}
    offsets: dict[str, int] = {}
    clean: list[str] = []
    for character in rendered:
        if character in sentinels:
            offsets.setdefault(character, len(clean))
        else:
            clean.append(character)
    lost = next((span for span, *both in pairs if any(rendered.count(character) != 1 for character in both)), None)
    if lost is not None or "".join(clean) != plain:
        number = pairs[0][0].message if lost is None else lost.message
        raise DataError(
            f"message {number}: the chat template drops, repeats or rewrites its marked text",
            remedy="mark another message, or render the prompt yourself and mark it with from_spans",
        )
    found = [TextSpan(offsets[opening], offsets[closing], span.strength) for span, opening, closing in pairs]
    return replace(from_spans(plain, found), special=False)


def _inside(messages: Sequence[Mapping[str, Any]], span: MessageSpan) -> tuple[int, int]:
    """The span within its message, without white space at the ends of the message."""
    if not 0 <= span.message < len(messages):
        raise DataError(f"message {span.message}: there are {len(messages)}", remedy="messages count from 0")
    text = messages[span.message].get("content")
    if not isinstance(text, str):
        raise DataError(
            f"message {span.message}: its content is not text", remedy="use from_messages for content parts"
        )
    check_span(span.start, span.end, len(text), f"message {span.message}")
    check_strength(span.strength)
    start = max(span.start, len(text) - len(text.lstrip()))
    end = min(span.end, len(text.rstrip()))
    if start >= end:
        raise DataError(f"message {span.message}: only white space is marked", remedy="mark some text")
    return start, end
