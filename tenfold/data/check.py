"""From a raw record to a typed row: every value checked, every error naming place, column and row."""

from __future__ import annotations

import difflib
import json
import math
import re
import string
from collections.abc import Callable, Mapping
from typing import Any

from tenfold.config.stage import Kind
from tenfold.data.rows import KINDS, Choice, Message, Question, Row, content_id, is_plain, spoken
from tenfold.data.sources import RawRow, shorten
from tenfold.data.transcripts import turns_of
from tenfold.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")


class _UnfitError(Exception):
    """A value that its column cannot hold: what was found, what was expected."""


def kind_of(columns: Mapping[str, Any]) -> Kind | None:
    """The first kind of the table in ``rows`` whose needed columns are all there.

    >>> kind_of({"prompt": "1+1=", "completion": "2", "id": 7})
    'completion'
    """
    return next((kind for kind, spec in KINDS.items() if set(spec.needed) <= set(columns)), None)


def build(kind: Kind, record: RawRow, values: Mapping[str, Any]) -> Row:
    """The typed row of ``record``.

    Args:
        kind: what the row is.
        record: the raw record, for its place.
        values: its columns under our names.

    Raises:
        DataError: naming place, column, what was found and what was expected.
    """
    spec = KINDS[kind]
    fields: dict[str, Any] = {}
    cells = dict(values)
    lists: dict[str, tuple[Message, ...]] = {}
    for column in spec.needed + spec.further:
        value = values.get(column)
        if column in spec.further and (value is None or (record.flat and value == "")):
            if column == "context":
                fields["context"] = ""
            continue
        if column not in values:
            raise _missing(kind, column, record, values)
        if record.flat:
            value = cells[column] = _from_cell(column, value)
        if kind == "preference" and isinstance(value, list) and column in ("prompt", "chosen", "rejected"):
            lists[column] = _listed(record, column, value)
            continue
        try:
            fields[column] = _answer(value, cells["options"]) if column == "answer" else _PARSERS[column](value)
        except _UnfitError as unfit:
            raise wrong(record, column, str(unfit), remedy=f"mend or remove the row; {_EXPECTED[column]}") from None
    if lists:
        fields |= _pair(fields, lists)
    row = spec.row(id=_own_id(record, values), **fields)
    _check_together(row, record)
    return row if row.id else spec.row(id=content_id(row), **fields)


def _listed(record: RawRow, column: str, messages: list[Any]) -> tuple[Message, ...]:
    try:
        return _messages(messages)
    except _UnfitError as unfit:
        raise wrong(record, column, str(unfit), remedy=f"mend or remove the row; {_EXPECTED['messages']}") from None


def _pair(fields: Mapping[str, Any], lists: Mapping[str, tuple[Message, ...]]) -> dict[str, Any]:
    """The fields of a preference of which prompt or answers are messages: texts, as far as these say all."""
    found: dict[str, Any] = {}
    if asked := lists.get("prompt"):
        text = asked[-1]["content"] if is_plain(asked[-1], "user") else ""
        plain = bool(text) and (len(asked) > 1 or not turns_of(text))
        found = {"prompt": text, "history": asked[:-1]} if plain else {"prompt": "", "history": asked}
    if {"chosen", "rejected"} & set(lists):
        both = [lists.get(name) or ({"role": "assistant", "content": fields[name]},) for name in ("chosen", "rejected")]
        found |= {name: spoken(messages) for name, messages in zip(("chosen", "rejected"), both, strict=True)}
        if not all(len(messages) == 1 and is_plain(messages[0], "assistant") for messages in both):
            found["answers"] = tuple(both)
    return found


def wrong(record: RawRow, column: str, problem: str, remedy: str) -> DataError:
    """The error for one value of one record."""
    return DataError(f"{record.place}, column {column!r}: {problem}\n  row: {show(record.values)}", remedy=remedy)


def show(values: Mapping[str, Any]) -> str:
    """A raw row in one line, long values shortened."""
    parts = (
        f"{name}: {shorten(json.dumps(value, default=str, ensure_ascii=False), 60)}" for name, value in values.items()
    )
    return shorten("{" + ", ".join(parts) + "}", 240).encode("utf-8", "backslashreplace").decode()


def _missing(kind: Kind, column: str, record: RawRow, values: Mapping[str, Any]) -> DataError:
    other = kind_of(values)
    if other is not None and other != kind:
        return DataError(
            f"{record.place}: looks like a {other} row, but the rows before it are {kind} rows (no column {column!r})\n"
            f"  row: {show(record.values)}",
            remedy="put rows of different kinds into different files",
        )
    near = difflib.get_close_matches(column, list(record.values), n=1)
    theirs = near[0] if near else "your_name"
    return DataError(
        f"{record.place}, column {column!r}: missing; a {kind} row needs {', '.join(KINDS[kind].needed)}"
        f"{f'; did you mean {near[0]!r}?' if near else ''}\n  row: {show(record.values)}",
        remedy=f"add it, or name the column that holds it: columns: {{{column}: {theirs}}}",
    )


def unknown_kind(record: RawRow, values: Mapping[str, Any]) -> DataError:
    """The error when the columns of the first record fit no kind."""
    table = "\n".join(f"  {kind}: {', '.join(spec.needed)}" for kind, spec in KINDS.items())
    needed = dict.fromkeys(column for spec in KINDS.values() for column in spec.needed)
    guesses = {column: difflib.get_close_matches(column, list(record.values), n=1, cutoff=0.8) for column in needed}
    for ours, names in KNOWN_AS.items():
        guesses[ours] = guesses[ours] or [name for name in names if name in record.values]
    mapping = ", ".join(f"{ours}: {near[0]}" for ours, near in guesses.items() if near and ours not in values)
    # Alpaca's input belongs to the prompt, and a mapping cannot join the two.
    joined = "; put `input` behind the instruction first where it is not empty" if "input" in record.values else ""
    return DataError(
        f"{record.place}: the columns {', '.join(record.values) or '(none)'} fit no known kind of row; "
        f"known are\n{table}\n  row: {show(record.values)}",
        remedy="say which of your columns is which: "
        f"columns: {{{mapping or 'prompt: question, completion: answer'}}}{joined if 'instruction' in mapping else ''}",
    )


KNOWN_AS = {
    "prompt": ("instruction", "question", "query", "input"),
    "completion": ("output", "response", "answer", "solution"),
}
"""Other names of columns that a remedy may point to."""


def _own_id(record: RawRow, values: Mapping[str, Any]) -> str:
    value = values.get("id")
    if value is None:
        return ""
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1:
            return str(int(value))  # 1.0 is what pandas makes of 1 where other ids are missing
        return _text(value)
    except _UnfitError as unfit:
        raise wrong(record, "id", f"{unfit} or a whole number", remedy="mend or drop the id") from None


def _check_together(row: Row, record: RawRow) -> None:
    if isinstance(row, Choice):
        _check_answer(row, record)
    if isinstance(row, Question) and row.gold:
        passages = 1 if isinstance(row.context, str) else len(row.context)
        beyond = [index for index in row.gold if not 0 <= index < passages]
        if beyond:
            raise wrong(
                record,
                "gold",
                f"passage {beyond[0]} does not exist; 'context' has {passages}, counted from 0",
                remedy="mend the indices, or leave 'gold' out",
            )


def _check_answer(row: Choice, record: RawRow) -> None:
    if len(row.options) < 2:
        raise wrong(record, "options", "a single option leaves no choice", remedy="mend or remove the row")
    if not 0 <= row.answer < len(row.options):
        raise wrong(
            record,
            "answer",
            f"option {row.answer} does not exist; 'options' has {len(row.options)}, counted from 0",
            remedy="give the index, the letter or the text of an option",
        )


def _found(value: Any) -> str:
    if value is None:
        return "empty (null)"
    shown = shorten(json.dumps(value, default=str), 60)
    return f"{'text' if isinstance(value, str) else type(value).__name__} {shown}"


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _UnfitError(f"{_found(value)}, expected text")
    if not value.strip():
        raise _UnfitError("empty text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _UnfitError(
            f"half a surrogate pair (\\u{ord(value[error.start]):04x}) at character {error.start + 1}"
        ) from None
    return value


def _messages(value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise _UnfitError(f"{_found(value)}, expected a list of messages")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or "role" not in message:
            raise _UnfitError(f"message {number}: {_found(message)}, expected an object with 'role' and 'content'")
        if message["role"] not in ROLES:
            near = difflib.get_close_matches(str(message["role"]), ROLES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise _UnfitError(
                f"message {number}: unknown role {message['role']!r}, expected one of {', '.join(ROLES)}{hint}"
            )
        _check_weight(message, number)
        if message.get("content") in (None, "") and _may_be_silent(message):
            continue
        try:
            _text(message.get("content"))
        except _UnfitError as unfit:
            raise _UnfitError(f"message {number}, 'content': {unfit}") from None
    return tuple(value)


def _check_weight(message: Mapping[str, Any], number: int) -> None:
    """Of messages that say whether they are to be learned: ``weight`` 0 or 1, ``train`` true or false."""
    for name, expected in (("weight", "0 or 1"), ("train", "true or false")):
        value = message.get(name)
        if message["role"] == "assistant" and value is not None and value not in (0, 1):
            raise _UnfitError(f"message {number}: {name} {value!r}, expected {expected}")


def _may_be_silent(message: Mapping[str, Any]) -> bool:
    """Whether a message needs no text: calls and results of tools, thoughts, and system messages left empty."""
    if message["role"] in ("system", "developer", "tool"):
        return message.get("content") == ""
    return bool(message.get("tool_calls") or message.get("reasoning_content") or message.get("thinking"))


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise _UnfitError(f"{_found(value)}, expected a list of objects")
    return tuple(value)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _UnfitError(f"{_found(value)}, expected an object")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _UnfitError(f"{_found(value)}, expected a whole number of messages")
    return value


def _passages(value: Any) -> str | tuple[str, ...]:
    if isinstance(value, list) and value:
        return tuple(_passage(item, number) for number, item in enumerate(value))
    return _text(value)


def _passage(value: Any, number: int) -> str:
    try:
        if isinstance(value, dict):
            text = _text(value.get("text"))
            return f"{_text(value['title'])}\n{text}" if value.get("title") else text
        return _text(value)
    except _UnfitError as unfit:
        raise _UnfitError(f"passage {number}: {unfit}") from None


def _answers(value: Any) -> tuple[str, ...]:
    if isinstance(value, list) and value:
        return tuple(_text(item) for item in value)
    return (_text(value),)


def _options(value: Any) -> tuple[str, ...]:
    texts = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(texts, list) or not texts:
        raise _UnfitError(f"{_found(value)}, expected a list of texts, or an object of letters and texts")
    return tuple(_text(text) for text in texts)


def _answer(value: Any, options: Any) -> int:
    """The index of the right option, from its index, its letter or its text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    names = list(options) if isinstance(options, dict) else list(string.ascii_uppercase[: len(options)])
    texts = list(options.values()) if isinstance(options, dict) else options
    for known in (names, texts):
        if value in known:
            return known.index(value)
    raise _UnfitError(f"{_found(value)}, expected an index, one of {', '.join(names)}, or the text of an option")


def _indices(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) for item in values):
        raise _UnfitError(f"{_found(value)}, expected whole numbers")
    return tuple(values)


def _label(value: Any) -> str | int | float:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int | float):
        if not math.isfinite(value):
            raise _UnfitError(f"{value} is not finite")
        return value
    return _text(value)


def _from_cell(column: str, cell: Any) -> Any:
    """What a CSV cell holds: lists as JSON, whole numbers in ``answer``, else text; of labels see `labels`."""
    if not isinstance(cell, str):
        return cell
    if column == "answer":
        return int(cell) if re.fullmatch(r"-?(0|[1-9][0-9]*)", cell) else cell
    if column == "gold" or (column in _LISTS and cell.startswith(("[", "{"))):
        try:
            return json.loads(cell)
        except json.JSONDecodeError:
            return cell
    return cell


_LISTS = ("context", "answers", "options")
_PARSERS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("text", "text_pair", "prompt", "completion", "chosen", "rejected", "question"), _text),
    "messages": _messages,
    "given": _count,
    "tools": _tools,
    "chat_template_kwargs": _object,
    "context": _passages,
    "answers": _answers,
    "options": _options,
    "gold": _indices,
    "label": _label,
}
_EXPECTED: dict[str, str] = {
    **dict.fromkeys(
        ("text", "text_pair", "prompt", "completion", "chosen", "rejected", "question"), "it holds text, not empty"
    ),
    "messages": 'it holds [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]',
    "given": "it holds how many messages at the beginning are context only",
    "tools": 'it holds [{"type": "function", "function": {"name": "...", "parameters": {...}}}], also as JSON',
    "chat_template_kwargs": 'it holds {"enable_thinking": false}, or what else the chat template takes',
    "context": 'it holds text or a list of passages, each text or {"title": "...", "text": "..."}',
    "answers": "it holds one text or a list of texts",
    "options": "it holds a list of texts",
    "answer": "it holds the index, the letter or the text of the right option",
    "gold": "it holds indices of passages, counted from 0",
    "label": "it holds a name or a number",
}
