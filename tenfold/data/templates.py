"""Chat templates: a conversation as one text, and which characters of it the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from tenfold.data.tokens import shared
from tenfold.errors import DataError, ModelError

Messages = Sequence[Mapping[str, Any]]
Write = Callable[..., str]
"""Writes messages as the template does: `render_chat` with all but the messages filled in."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_WORDS = ("content", "reasoning_content", "reasoning", "thinking")
"""Fields of a message that hold what the assistant said or thought."""
_PLACEHOLDERS = ("\ue000", "\ue001")
"""Characters without a meaning: what stands in for an answer to see where a template writes it."""


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation.

    Args:
        text: as the template writes it.
        spans: characters ``[start, end)`` that the assistant writes, what ends its turns included, in order.
        history: turns of the assistant that stand otherwise in ``text`` than the model writes them when asked.
        cue: what the template ends a prompt with and leaves out of the conversation, such as an opened thought.
        lost: whether words or calls of tools of the assistant's turns are not in the text.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    history: int = 0
    cue: str = ""
    lost: bool = False


def require_chat_template(tokenizer: Any) -> str:
    """The tokenizer's chat template.

    Raises:
        ModelError: when it has none.
    """
    if tokenizer.chat_template is None:
        raise ModelError(
            "this tokenizer has no chat template",
            remedy="take an instruction-tuned model, put the chat_template.jinja of one into the model's folder (in "
            "Python set tokenizer.chat_template), or give prompts and answers as text",
        )
    template: str = tokenizer.get_chat_template()
    return template


def render_chat(tokenizer: Any, messages: Messages, place: str, *, ask: bool = False, **options: Any) -> str:
    r"""Messages as the chat template writes them.

    Args:
        tokenizer: with a chat template.
        messages: as chat templates take them.
        place: what an error calls them, such as ``row '3'``.
        ask: end with the beginning of the model's turn.
        **options: further arguments of the template.

    Raises:
        DataError: the template refuses the messages, as many do a system message or two of the user in a row.

    >>> from tenfold.models.tiny import tiny_tokenizer
    >>> render_chat(tiny_tokenizer(), [{"role": "user", "content": "Hi"}], "prompt 1")
    '<|im_start|>user\nHi<|im_end|>\n'
    """
    given = [dict(message) for message in messages]
    with _named(place):
        text: str = tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=ask, **options)
    return text


@contextmanager
def _named(place: str) -> Iterator[None]:
    from jinja2 import TemplateError

    try:
        yield
    except (TemplateError, TypeError, ValueError) as error:  # the last two from within a template, as of None + "\n"
        raise DataError(
            f"{place}: the chat template refuses these messages: {error}",
            remedy="mend them (some templates take no system message, or want user and assistant to alternate), or set "
            "another tokenizer.chat_template",
        ) from error


def converse(tokenizer: Any, messages: Messages, place: str, *, given: int = 0, **options: Any) -> Conversation:
    r"""Render a conversation and find what the model would write of it when asked.

    Where the template marks that itself (``{% generation %}``), its marks count. Otherwise a turn of the assistant
    begins where the prompt ends that asks for it, and ends with what the template writes after it. If that prompt ends
    with something that the conversation lacks (an opened thought), the turn begins where the two part. If the turn's
    words stand otherwise in the conversation, as templates of reasoning models drop earlier thoughts, the turn is
    context only; the last turn never is. A message with ``weight`` 0 (OpenAI) or ``train`` false (axolotl) is context
    only, too.

    Args:
        tokenizer: with a chat template.
        messages: the conversation.
        place: as for `render_chat`.
        given: how many messages at the beginning are context only.
        **options: further arguments of the template, such as ``tools``.

    Raises:
        ModelError: no chat template.
        DataError: the template refuses the messages.

    >>> from tenfold.models.tiny import tiny_tokenizer
    >>> talk = [{"role": "user", "content": "yes?"}, {"role": "assistant", "content": "yes"}]
    >>> found = converse(tiny_tokenizer(), talk, "row 1")
    >>> [found.text[start:end] for start, end in found.spans]
    ['yes<|im_end|>\n']
    """
    require_chat_template(tokenizer)
    template = tokenizer.get_chat_template(tools=options.get("tools"))  # some have another one for tools
    write: Write = partial(render_chat, tokenizer, place=place, **options)
    text = write(messages)
    if _GENERATION.search(template):
        spans = _generated(tokenizer, messages, template, place, options)
        begun = shared(text, write(messages[:given], ask=True)) if given else 0
        spans = _wanted_spans(spans, messages, place)
        return Conversation(text, tuple((start, end) for start, end in spans if end > begun))
    turns = [index for index, message in enumerate(messages) if index >= given and _is_wanted(message)]
    found = [_turn(write, messages, index, text) for index in turns]
    told = [turn for turn in found if turn is not None]
    if turns and not told and turns[-1] < len(messages) - 1:
        # What follows the last turn made it history. Nothing is learned from that, and nothing comes after it.
        return converse(tokenizer, messages[: turns[-1] + 1], place, given=given, **options)
    return Conversation(
        text,
        tuple(span for turn in told for span in turn.spans),
        history=len(found) - len(told),
        cue=next((turn.cue for turn in told if turn.cue), ""),
        lost=any(turn.lost for turn in told),
    )


def _turn(write: Write, messages: Messages, index: int, text: str) -> Conversation | None:
    """The conversation up to a turn of the assistant, and where the turn is; None where ``text`` has other words."""
    try:
        after = write(messages[: index + 1])
        asked = write(messages[:index], ask=True) if index else ""
        start, end, cue = len(asked), shared(text, after), ""
        follows = bool(index) and after.startswith(asked)
        if not follows or end < len(after):
            first, last = _words(write, messages, index, after)
            if end < last:
                return None
            if not follows:
                told = write(messages[:index]) if index else None
                start, cue = _parting(asked, after[:first], told)
    except DataError:  # the template takes the whole conversation, but would not have asked for this turn
        return None
    said = [part for field in _WORDS if isinstance(part := messages[index].get(field), str)]
    # The prompt may have begun with the words, as with <think>; white space is the template's.
    lost = any(_dense(part) not in _dense(after[max(0, start - len(part)) :]) for part in said)
    calls = [name for call in messages[index].get("tool_calls") or () if (name := _called(call))]
    silent = bool(calls) and not any(name in after[start:] for name in calls)
    # Of a call that the template drops, an answer without a word would be learned.
    spans = () if silent and not any(part.strip() for part in said) else ((start, end),)
    return Conversation(after, spans, cue=cue, lost=lost or silent)


def _called(call: Any) -> str:
    """The name of the tool that is called."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    return str(function.get("name") or "") if isinstance(function, Mapping) else ""


def _is_wanted(message: Mapping[str, Any]) -> bool:
    """Whether a message is one of the assistant that is to be learned (OpenAI's ``weight``, axolotl's ``train``)."""
    return message["role"] == "assistant" and message.get("weight") != 0 and message.get("train") not in (False, 0)


def _wanted_spans(spans: tuple[tuple[int, int], ...], messages: Messages, place: str) -> tuple[tuple[int, int], ...]:
    """Of what the template marks as the assistant's, that of messages which are to be learned."""
    told = [message for message in messages if message["role"] == "assistant"]
    if all(_is_wanted(message) for message in told):
        return spans
    if len(spans) != len(told):
        raise DataError(
            f"{place}: a message has weight 0, and the chat template does not mark each answer by itself",
            remedy="set a tokenizer.chat_template without {% generation %}, or leave the weight out",
        )
    return tuple(span for span, message in zip(spans, told, strict=True) if _is_wanted(message))


def _dense(text: str) -> str:
    return "".join(text.split())


def _words(write: Write, messages: Messages, index: int, after: str) -> tuple[int, int]:
    """Where in the text up to a turn the words of the turn stand: what changes with them."""
    other = next(character for character in _PLACEHOLDERS if character not in after)
    content = messages[index].get("content")
    placed = other if isinstance(content, str) or content is None else [{"type": "text", "text": other}]
    changed = write([*messages[:index], {**messages[index], "content": placed}])
    begin = shared(after, changed)
    return begin, len(after) - shared(after[begin:][::-1], changed[begin:][::-1])


def _parting(asked: str, header: str, told: str | None) -> tuple[int, str]:
    """Where a turn begins whose prompt is not how the conversation goes on, and what that prompt has in addition.

    Args:
        asked: the prompt that asks for the turn.
        header: the conversation up to the words of the turn.
        told: the messages before the turn, rendered without asking; None where there are none.
    """
    start = shared(asked, header)
    if told is not None and header.startswith(told) and start >= len(told):
        return start, asked[start:]
    # They part within an earlier message (Mistral's v0.3 writes the system message into the last question only).
    return len(header), ""


def _generated(
    tokenizer: Any, messages: Messages, template: str, place: str, options: Mapping[str, Any]
) -> tuple[tuple[int, int], ...]:
    """The characters that the template marks as the assistant's.

    transformers (5.23) gives them as a mask of tokens only, in which all but the first token of a turn's last character
    are missing, and not at all for slow tokenizers; so its renderer is called as ``apply_chat_template`` calls it.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    given = [{key: value for key, value in message.items() if value is not None} for message in messages]
    with _named(place):
        _, spans = render_jinja_template(
            [given],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **{**tokenizer.special_tokens_map, **options},
        )
    return tuple((start, end) for start, end in spans[0] if start < end)


def template_notes(found: Sequence[Conversation]) -> list[str]:
    """What is to be said of conversations that are not learned from as they stand, one sentence for each reason."""
    notes = []
    turns, rows = sum(talk.history for talk in found), sum(talk.history > 0 for talk in found)
    if turns:
        notes.append(
            f"{turns} earlier turns of the assistant, in {rows} of {len(found)} rows, are context only: the chat "
            "template writes them differently once others follow, as reasoning models drop earlier thoughts."
        )
    cues = [talk.cue for talk in found if talk.cue]
    if cues:
        notes.append(
            f"In {len(cues)} of {len(found)} rows the chat template ends the prompt with {cues[0]!r}, which it leaves "
            "out of the conversation: the answer is learned without it."
        )
    lost = sum(talk.lost for talk in found)
    if lost:
        notes.append(
            f"In {lost} of {len(found)} rows the chat template leaves out or rewrites words of the assistant, as "
            "thoughts or calls of tools: they are not learned. A template that keeps them is set as "
            "tokenizer.chat_template."
        )
    return notes
