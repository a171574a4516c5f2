"""Preferences written as conversations, the form of TRL and of many hub data sets, as a prompt and two answers."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from tenfold.data.check import wrong
from tenfold.data.sources import Record

_REMEDY = "keep rows of one question and one answer, or write prompt, chosen and rejected as text"


def as_texts(record: Record, values: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row, where ``chosen`` and ``rejected`` are lists of messages, with texts in their place.

    The messages that both answers begin with belong to the prompt, which may also be a column of its own. Other rows
    come back as they are.

    Args:
        record: the raw record, for its place.
        values: its columns under our names.

    Raises:
        DataError: more than one question before the answer, or an answer that is not one message of the assistant.

    >>> ask, good, bad = {"role": "user", "content": "1+1="}, *({"role": "assistant", "content": c} for c in "23")
    >>> as_texts(Record("row 1", {}), {"chosen": [ask, good], "rejected": [ask, bad]})
    {'chosen': '2', 'rejected': '3', 'prompt': '1+1='}
    """
    if not all(_is_turns(values.get(column)) for column in ("chosen", "rejected")):
        return dict(values)
    chosen, rejected = values["chosen"], values["rejected"]
    # The last message of each is its answer, also where both are the same.
    shared = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen[:-1], rejected[:-1], strict=False))]
    texts = {**values}
    for column, turns in (("chosen", chosen), ("rejected", rejected)):
        own = turns[len(shared) :]
        if len(own) != 1 or own[0]["role"] != "assistant":
            said = f"{len(own)} messages that are not in both answers" if len(own) != 1 else f"role {own[0]['role']!r}"
            raise wrong(record, column, f"{said}, expected one answer of the assistant", _REMEDY)
        texts[column] = own[0]["content"]
    given = values.get("prompt")
    before = [*given, *shared] if isinstance(given, list) and _is_turns(given) else shared
    if before:
        if len(before) != 1 or before[0]["role"] != "user":
            roles = ", ".join(turn["role"] for turn in before)
            raise wrong(
                record, "prompt", f"messages of {roles} come before the answer, expected one of the user", _REMEDY
            )
        texts["prompt"] = before[0]["content"]
    return texts


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and "content" in turn for turn in value
    )  # fmt: skip
