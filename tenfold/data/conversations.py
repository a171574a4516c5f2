"""Completions and preferences that are conversations, or whole texts, under one form of ours.

Preferences may be conversations (TRL's other form), or whole texts that begin with their prompt (TRL's implicit prompt,
HH-RLHF); a system message may stand in a column of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from tenfold.data.check import KNOWN_AS, kind_of, wrong
from tenfold.data.messages import is_turns
from tenfold.data.rows import is_plain
from tenfold.data.sources import RawRow
from tenfold.data.transcripts import ANSWER, turns_of

_SYSTEM = ("system", "system_prompt")
_REMEDY = "end both with answers of the assistant to the same messages, or write prompt, chosen and rejected as text"


def in_our_form(record: RawRow, values: Mapping[str, Any], told: Counter[str] | None = None) -> dict[str, Any]:
    """The columns of a conversation or preference in any form as those of a row; other rows as they are.

    * Prompt and completion that are conversations become texts where they are one question and one answer, else
      ``messages`` of which the first, ``given``, are context.
    * Where ``chosen`` and ``rejected`` are lists of messages, those that both begin with belong to the prompt, which
      may also be a column of its own; as text it gives way to the conversation's question, as in TRL.
    * Where they are texts without a prompt, it is what both begin with: up to the last answer's beginning in
      transcripts as of HH-RLHF, else as TRL's ``extract_prompt`` has it.
    * A column ``system`` becomes the first message, where there is none.

    Args:
        record: the raw record, for its place.
        values: its columns under our names, as `tenfold.data.messages.in_messages` gives them.
        told: counts prompts that differ from the conversation (``differs``), those not written out (``implicit``),
            those that are transcripts (``transcript``) and columns that became a system message (``system``).

    Raises:
        DataError: the conversations differ in what is asked, or do not end with the assistant.

    >>> ask, good, bad = {"role": "user", "content": "1+1="}, *({"role": "assistant", "content": c} for c in "23")
    >>> in_our_form(RawRow("row 1", {}), {"chosen": [ask, good], "rejected": [ask, bad]})["prompt"]
    [{'role': 'user', 'content': '1+1='}]
    >>> in_our_form(RawRow("row 1", {}), {"chosen": "Sky: blue", "rejected": "Sky: green"})
    {'chosen': ' blue', 'rejected': ' green', 'prompt': 'Sky:'}
    """
    told = Counter() if told is None else told
    found = _with_plain_lines(values)
    if _has_implicit_prompt(found):
        told["implicit"] += 1
        found = _from_whole_texts(record, found)
    found = _with_system(found, told)
    if all(is_turns(found.get(column)) for column in ("chosen", "rejected")):
        found = _from_conversations(record, found, told)
    elif "completion" in found and is_turns(found.get("prompt")):
        found = _completion(record, found)
    if isinstance(found.get("prompt"), str) and turns_of(found["prompt"]):
        told["transcript"] += 1
    return found


def _with_system(values: dict[str, Any], told: Counter[str]) -> dict[str, Any]:
    """The columns with that of a system message as the first message of the conversation."""
    name = next((name for name in _SYSTEM if isinstance(values.get(name), str) and values[name].strip()), None)
    if name is None:
        return values
    prompt = values.get("prompt")
    holders = [
        column
        for column in ("messages", "prompt", "chosen", "rejected")
        if is_turns(values.get(column)) and (column == "messages" or values[column][0]["role"] != "assistant")
    ]
    if not holders and isinstance(prompt, str) and ("completion" in values or "chosen" in values):
        holders = ["prompt"]
    if not holders:
        return values
    told["system"] += 1
    found = {column: value for column, value in values.items() if column != name}
    message = {"role": "system", "content": values[name]}
    if isinstance(prompt, str) and "prompt" in holders:
        found["prompt"] = [{"role": "user", "content": prompt}]
    for column in holders:
        if found[column][0]["role"] not in ("system", "developer"):
            found[column] = [message, *found[column]]
    return found


def _completion(record: RawRow, values: dict[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in values.items() if name not in ("prompt", "completion")}
    asked, told = values["prompt"], values["completion"]
    told = [{"role": "assistant", "content": told}] if isinstance(told, str) else told
    if not is_turns(told) or not any(message["role"] == "assistant" for message in told):
        said = f"messages of {', '.join(one['role'] for one in told)}" if is_turns(told) else "not a list of messages"
        raise wrong(record, "completion", f"{said}, expected an answer of the assistant", "mend or remove the row")
    single = len(asked) == len(told) == 1 and is_plain(asked[0], "user") and is_plain(told[0], "assistant")
    single = single and not turns_of(asked[0]["content"])
    if single and not rest.get("tools") and not rest.get("chat_template_kwargs"):
        return {**rest, "prompt": asked[0]["content"], "completion": told[0]["content"]}
    return {**rest, "messages": [*asked, *told], "given": len(asked)}


def _from_conversations(record: RawRow, values: Mapping[str, Any], told: Counter[str]) -> dict[str, Any]:
    chosen, rejected = values["chosen"], values["rejected"]
    # The last message of each is its answer, also where both are the same.
    shared = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen[:-1], rejected[:-1], strict=False))]
    own = {"chosen": chosen[len(shared) :], "rejected": rejected[len(shared) :]}
    for column, turns in own.items():
        roles = [turn["role"] for turn in turns]
        if roles[0] != "assistant" or roles[-1] != "assistant":
            said = f"what is not in both answers is of {', '.join(map(repr, roles))}"
            raise wrong(record, column, f"{said}, expected answers of the assistant", _REMEDY)
    before, given = shared, values.get("prompt")
    if isinstance(given, list) and is_turns(given):
        # Some data sets write the prompt out and begin both answers with it.
        before = shared if shared[: len(given)] == given else [*given, *shared]
    elif isinstance(given, str):
        questions = [str(turn.get("content")).split() for turn in shared if turn["role"] == "user"]
        if questions and given.split() not in questions:
            told["differs"] += 1
    return {**values, **own, **({"prompt": before} if before else {})}


def _with_plain_lines(values: Mapping[str, Any]) -> dict[str, Any]:
    """The columns, with the lines of transcripts that come from Windows ended as those of others."""
    mark = ANSWER.replace("\n", "\r\n")
    plain = {name: text.replace("\r\n", "\n") for name in ("chosen", "rejected")
             if isinstance(text := values.get(name), str) and mark in text}  # fmt: skip
    return {**values, **plain}


def _has_implicit_prompt(values: Mapping[str, Any]) -> bool:
    """Whether both answers are texts that begin with their prompt, and no other column can hold it."""
    both: list[Any] = [values.get(column) for column in ("chosen", "rejected")]
    if kind_of(values) is not None or "prompt" in values or not all(isinstance(text, str) for text in both):
        return False
    if ANSWER in _beginning(*both):
        return True
    if any(values.get(name) for name in KNOWN_AS["prompt"]):
        return False
    # A single word (a source, a language) is not a prompt.
    others = (value for name, value in values.items() if name not in ("id", "split", "chosen", "rejected"))
    return all(not value or isinstance(value, int | float) or len(str(value).split()) < 2 for value in others)


def _from_whole_texts(record: RawRow, values: Mapping[str, Any]) -> dict[str, Any]:
    chosen, rejected = values["chosen"], values["rejected"]
    same = _beginning(chosen, rejected)
    if ANSWER in same:
        length = same.rindex(ANSWER) + len(ANSWER)
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
