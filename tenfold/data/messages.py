"""Messages in the forms that data sets have them in, under one form: ``role``, ``content`` as text, and the rest."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

from tenfold.data.check import wrong
from tenfold.data.sources import RawRow, shorten

CONVERSATIONS = ("conversations", "conversation")
"""Columns that hold messages beside our own."""

_MESSAGES = ("messages", *CONVERSATIONS)
_TURNS = (*_MESSAGES, "prompt", "completion", "chosen", "rejected")
_SENDERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation"), "tool"),
    "system": "system",
}
_CALL = "function_call"
"""Who sends a call of a tool in ShareGPT's form."""


def in_messages(record: RawRow, values: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row with its conversations as lists of ``role`` and ``content``, the latter text.

    Lists of messages, ``tools`` and ``chat_template_kwargs`` may be written as text: JSON, or as Python prints them. A
    column ``conversations`` becomes ``messages``, or the prompt of the answers that stand beside it.

    Args:
        record: the raw record, for its place.
        values: its columns under our names.

    Raises:
        DataError: an unknown ``from``, a part that is not text, or tools that are not a list.

    >>> row = {"conversations": [{"from": "human", "value": "1+1="}, {"from": "gpt", "value": "2"}]}
    >>> in_messages(RawRow("row 1", row), row)["messages"][1]
    {'role': 'assistant', 'content': '2'}
    """
    found = dict(values)
    for column in _TURNS:
        value = found.get(column)
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = _parsed(record, column, value)
        if isinstance(value, dict) and column in ("chosen", "rejected"):
            value = [value]  # one answer, as LLaMA-Factory has it
        if isinstance(value, list):
            found[column] = [_message(record, column, number, one) for number, one in enumerate(value, start=1)]
    for column in ("tools", "chat_template_kwargs"):
        text = found.get(column)
        if isinstance(text, str):
            value = read_literal(text) if text.strip() else []
            found[column] = text if value is None else value or None
    for column in CONVERSATIONS:
        name = "prompt" if "chosen" in found and "rejected" in found else "messages"
        if is_turns(found.get(column)) and name not in found:
            found[name] = found.pop(column)
    return found


def is_turns(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return isinstance(value, list) and bool(value) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in value
    )  # fmt: skip


def read_literal(text: str) -> Any:
    """The value that a text writes, as JSON or as Python prints it; None where it is neither.

    >>> read_literal("[{'role': 'user', 'content': None}]") == read_literal('[{"role": "user", "content": null}]')
    True
    """
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _parsed(record: RawRow, column: str, text: str) -> Any:
    """The messages that a text writes; a text that is none comes back, unless the column holds nothing else."""
    value = read_literal(text)
    objects = isinstance(value, list) and value and all(isinstance(one, dict) for one in value)
    if objects and (column in _MESSAGES or all("role" in one or "from" in one for one in value)):
        return value
    if column in _MESSAGES:
        raise wrong(
            record,
            column,
            f"text {shorten(json.dumps(text), 60)}, which is not a list of messages as JSON",
            "write the list as JSON (json.dumps), in which texts stand in double quotes",
        )
    return text


def _message(record: RawRow, column: str, number: int, message: Any) -> Any:
    """A message with role and content; what is none comes back as it is, for `check` to name."""
    if not isinstance(message, dict):
        return message
    found = {name: value for name, value in message.items() if value is not None or name == "content"}
    if "from" in found and "value" in found and "role" not in found:
        found = _from_sender(record, column, number, found)
    elif isinstance(found.get("role"), str):
        name = found["role"].strip().lower()
        found["role"] = _SENDERS.get(name, name)
    if isinstance(found.get("content"), list) and found["content"]:
        parts = [_part(record, column, f"message {number}, part {at}", part)
                 for at, part in enumerate(found["content"], start=1)]  # fmt: skip
        found["content"] = "".join(parts)
    return found


def _from_sender(record: RawRow, column: str, number: int, message: dict[str, Any]) -> dict[str, Any]:
    """A message of ShareGPT's form."""
    sender, value = message.pop("from"), message.pop("value")
    sender = sender.strip().lower() if isinstance(sender, str) else sender
    if sender == _CALL:
        call = read_literal(value) if isinstance(value, str) else value
        calls = call if isinstance(call, list) else [call]
        if not calls or not all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in calls):
            raise wrong(
                record,
                column,
                f"message {number}: {shorten(json.dumps(value, default=str), 60)}, expected the call of a tool",
                'write {"name": "...", "arguments": {...}} as JSON',
            )
        return {"role": "assistant", "tool_calls": [{"type": "function", "function": one} for one in calls], **message}
    if not isinstance(sender, str) or sender not in _SENDERS:
        raise wrong(
            record,
            column,
            f"message {number}: unknown 'from' {sender!r}, expected one of {', '.join((*_SENDERS, _CALL))}",
            "write messages with role and content",
        )
    return {"role": _SENDERS[sender], "content": value, **message}


def _part(record: RawRow, column: str, place: str, part: Any) -> str:
    if isinstance(part, dict) and part.get("type") in ("text", None) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else None
    said = f"a part of type {kind!r}" if kind else shorten(json.dumps(part, default=str), 60)
    raise wrong(record, column, f"{place}: {said}, expected text", "remove the row; images and sounds are not read")
