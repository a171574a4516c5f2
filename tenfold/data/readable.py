"""Rows that a model's tokenizer can write: what its chat template refuses is left out, or named by its line."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tenfold.config.stage import OnBadRow
from tenfold.data.left_out import LeftOut, use_each
from tenfold.data.read import Rows
from tenfold.data.rows import Chat, Completion, Preference, Row
from tenfold.data.templates import converse, render_chat
from tenfold.errors import DataError


def readable(rows: Rows, tokenizer: Any, on_bad_row: OnBadRow) -> tuple[Rows, tuple[LeftOut, ...]]:
    """The rows that the tokenizer can write, and what it refuses.

    Args:
        rows: of any kind; of conversations, completions and pairs some may be refused.
        tokenizer: with or without a chat template.
        on_bad_row: ``stop`` at the first row that is refused, or ``skip`` such rows.

    Raises:
        DataError: naming the row by its place in the source, where it is to stop or no row is left.

    >>> from tenfold.data.read import read_rows
    >>> from tenfold.models.tiny import tiny_tokenizer
    >>> rows = read_rows("step-audit:3:0")
    >>> readable(rows, tiny_tokenizer(), "stop") == (rows, ())
    True
    """
    write = _WRITES.get(rows.kind)
    if write is None:
        return rows, ()
    found, refused = use_each(rows, partial(write, tokenizer), on_bad_row)
    return (rows.only([one is not None for one in found]) if refused else rows), refused


def need_template(row: Preference, place: str) -> None:
    """Refuse a pair that is more than three texts, for a tokenizer without a chat template.

    Raises:
        DataError: it is.
    """
    if row.needs_template:
        raise DataError(
            f"{place}: has a system message, several turns or tools, which need a chat template",
            remedy="use an instruction-tuned model, set tokenizer.chat_template, or write the whole prompt as text",
        )


def _chat(tokenizer: Any, row: Row, place: str) -> bool:
    assert isinstance(row, Chat)
    converse(tokenizer, row.messages, place, given=row.given, **row.options)
    return True


def _completion(tokenizer: Any, row: Row, place: str) -> bool:
    assert isinstance(row, Completion)
    if tokenizer.chat_template is not None:
        converse(tokenizer, row.messages, place, given=len(row.messages) - 1)
    return True


def _preference(tokenizer: Any, row: Row, place: str) -> bool:
    assert isinstance(row, Preference)
    if tokenizer.chat_template is None:
        need_template(row, place)
        return True
    render_chat(tokenizer, row.turns, place, ask=True, **row.options)
    for reply in row.replies:
        render_chat(tokenizer, [*row.turns, *reply], place, **row.options)
    return True


_WRITES: dict[str, Callable[[Any, Row, str], bool]] = {
    "chat": _chat,
    "completion": _completion,
    "preference": _preference,
}
