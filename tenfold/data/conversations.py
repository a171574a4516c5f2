"""Conversations and preferences in the forms that data sets have them in, under one form of ours.

Messages may have ``from`` and ``value`` (ShareGPT) or contents that are lists of text parts; preferences may be
conversations (TRL's other form), or whole texts that begin with their prompt (TRL's implicit prompt, HH-RLHF).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from tenfold.data.check import kind_of, wrong
from tenfold.data.groups import HH_ANSWER
from tenfold.data.sources import RawRow, shorten

_CONVERSATIONS = ("conversations", "conversation")
_TURNS = ("messages", *_CONVERSATIONS, "prompt", "completion", "chosen", "rejected")
_SHAREGPT = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation"), "tool"),
    "system": "system",
}
_REMEDY = "end both with one answer of the assistant to the same messages, or write prompt, chosen and rejected as text"


def in_messages(record: RawRow, values: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row with its conversations as lists of ``role`` and ``content``, the latter text.

    A column ``conversations`` becomes ``messages``, or the prompt of the answers that stand beside it. Prompt and
    completion that are conversations become texts, or ``messages`` where a system message comes first.

    Args:
        record: the raw record, for its place.
        values: its columns under our names.

    Raises:
        DataError: an unknown ``from``, a part that is not text, or a completion to a conversation of several turns.

    >>> row = {"conversations": [{"from": "human", "value": "1+1="}, {"from": "gpt", "value": "2"}]}
    >>> in_messages(RawRow("row 1", row), row)["messages"][1]
    {'role': 'assistant', 'content': '2'}
    """
    found = dict(values)
    for column in _TURNS:
        value = found.get(column)
        if record.flat and column in ("messages", *_CONVERSATIONS) and str(value).startswith("["):
            value = _parsed(str(value))
        if isinstance(value, dict) and column in ("chosen", "rejected"):
            value = [value]  # one answer, as LLaMA-Factory has it
        if isinstance(value, list):
            found[column] = [_message(record, column, number, one) for number, one in enumerate(value, start=1)]
    for column in _CONVERSATIONS:
        name = "prompt" if "chosen" in found and "rejected" in found else "messages"
        if _is_turns(found.get(column)) and name not in found:
            found[name] = found.pop(column)
    if _is_turns(found.get("prompt")) and _is_turns(found.get("completion")):
        return _completion(record, found)
    return found


def _completion(record: RawRow, values: dict[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in values.items() if name not in ("prompt", "completion")}
    messages = [*values["prompt"], *values["completion"]]
    roles = [message["role"] for message in messages]
    if roles == ["user", "assistant"]:
        return {**rest, "prompt": messages[0]["content"], "completion": messages[1]["content"]}
    if roles.count("assistant") == 1 and roles[-1] == "assistant":
        return {**rest, "messages": messages}  # what the assistant says is the completion and nothing else
    raise wrong(
        record,
        "completion",
        f"the conversation is of {', '.join(roles)}, and a completion must be the assistant's only message",
        "write it as messages, of which all that the assistant says is learnt",
    )


def _parsed(cell: str) -> Any:
    try:
        return json.loads(cell)
    except json.JSONDecodeError:
        return cell


def _message(record: RawRow, column: str, number: int, message: Any) -> Any:
    """A message with role and content; what is none comes back as it is, for `check` to name."""
    if not isinstance(message, dict):
        return message
    found = dict(message)
    if "from" in found and "value" in found and "role" not in found:
        sender = found.pop("from")
        if not isinstance(sender, str) or sender not in _SHAREGPT:
            raise wrong(
                record,
                column,
                f"message {number}: unknown 'from' {sender!r}, expected one of {', '.join(_SHAREGPT)}",
                "write messages with role and content",
            )
        found = {"role": _SHAREGPT[sender], "content": found.pop("value"), **found}
    if isinstance(found.get("content"), list) and found["content"]:
        parts = [_part(record, column, f"message {number}, part {at}", part)
                 for at, part in enumerate(found["content"], start=1)]  # fmt: skip
        found["content"] = "".join(parts)
    return found


def _part(record: RawRow, column: str, place: str, part: Any) -> str:
    if isinstance(part, dict) and part.get("type") in ("text", None) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else None
    said = f"a part of type {kind!r}" if kind else shorten(json.dumps(part, default=str), 60)
    raise wrong(record, column, f"{place}: {said}, expected text", "remove the row; images and sounds are not read")


def as_texts(record: RawRow, values: Mapping[str, Any], told: Counter[str] | None = None) -> dict[str, Any]:
    """The columns of a preference in any of its forms as a prompt and two texts; other rows as they are.

    Where ``chosen`` and ``rejected`` are lists of messages, those that both begin with belong to the prompt, which may
    also be a column of its own; as text it gives way to the conversation's question, as in TRL. The prompt is a list of
    messages where a system message or further turns come before the last question. Where they are texts
    without a prompt, it is what both begin with: up to the last answer's beginning in transcripts as of HH-RLHF, else
    as TRL's ``extract_prompt`` has it.

    Args:
        record: the raw record, for its place.
        values: its columns under our names, as `in_messages` gives them.
        told: counts prompts that differ from the conversation (``differs``) and those not written out (``implicit``).

    Raises:
        DataError: the conversations differ before their last message, or that is not the assistant's.

    >>> ask, good, bad = {"role": "user", "content": "1+1="}, *({"role": "assistant", "content": c} for c in "23")
    >>> as_texts(RawRow("row 1", {}), {"chosen": [ask, good], "rejected": [ask, bad]})
    {'chosen': '2', 'rejected': '3', 'prompt': '1+1='}
    >>> as_texts(RawRow("row 1", {}), {"chosen": "Sky: blue", "rejected": "Sky: green"})
    {'chosen': ' blue', 'rejected': ' green', 'prompt': 'Sky:'}
    """
    told = Counter() if told is None else told
    if all(_is_turns(values.get(column)) for column in ("chosen", "rejected")):
        return _from_conversations(record, values, told)
    if _has_implicit_prompt(values):
        told["implicit"] += 1
        return _from_whole_texts(record, values)
    return dict(values)


def _from_conversations(record: RawRow, values: Mapping[str, Any], told: Counter[str]) -> dict[str, Any]:
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
    if isinstance(given, list) and _is_turns(given):
        # Some data sets write the prompt out and begin both answers with it.
        before = shared if shared[: len(given)] == given else [*given, *shared]
    else:
        before = shared
        questions = [str(turn["content"]).split() for turn in shared if turn["role"] == "user"]
        told["differs"] += isinstance(given, str) and bool(questions) and given.split() not in questions
    if before:
        if before[-1]["role"] != "user":
            raise wrong(
                record,
                "prompt",
                f"the last message before the answer is of {before[-1]['role']!r}, expected one of 'user'",
                _REMEDY,
            )
        texts["prompt"] = before if len(before) > 1 else before[0]["content"]
    return texts


def _has_implicit_prompt(values: Mapping[str, Any]) -> bool:
    """Whether both answers are texts that begin with their prompt, and no other column can hold it."""
    both: list[Any] = [values.get(column) for column in ("chosen", "rejected")]
    if kind_of(values) is not None or "prompt" in values or not all(isinstance(text, str) for text in both):
        return False
    if HH_ANSWER in _beginning(*both):
        return True
    # A single word (a source, a language) is no prompt.
    others = (value for name, value in values.items() if name not in ("id", "split", "chosen", "rejected"))
    return all(not value or isinstance(value, int | float) or len(str(value).split()) < 2 for value in others)


def _from_whole_texts(record: RawRow, values: Mapping[str, Any]) -> dict[str, Any]:
    chosen, rejected = values["chosen"], values["rejected"]
    same = _beginning(chosen, rejected)
    if HH_ANSWER in same:
        length = same.rindex(HH_ANSWER) + len(HH_ANSWER)
    else:
        # TRL's rule: up to the first character that differs, without the space before it; else all but one.
        shorter = min(len(chosen), len(rejected))
        length = len(same) - same.endswith(" ") if len(same) < shorter else shorter - 1
    if not chosen[:length].strip():
        raise wrong(
            record,
            "prompt",
            "missing, and chosen and rejected begin with no text in common that could be it",
            "add a column prompt, or say which one it is: columns: {prompt: your_name}",
        )
    return {**values, "chosen": chosen[length:], "rejected": rejected[length:], "prompt": chosen[:length]}


def _beginning(one: str, other: str) -> str:
    """What both texts begin with."""
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and "content" in turn for turn in value
    )  # fmt: skip
