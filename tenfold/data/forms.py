"""Rows that say under other column names what ours say, brought under ours; and rows that teach nothing.

| form | columns | becomes |
| --- | --- | --- |
| Alpaca | ``instruction``, ``output`` (``input``, ``system``, ``history``) | prompt and completion, or messages |
| Alpaca's preferences | ``instruction``, ``chosen``, ``rejected`` (``input``, ...) | prompt, chosen, rejected |
| OpenAI's preferences | ``input``, ``preferred_output``, ``non_preferred_output`` | prompt, chosen, rejected |
| two answers and a label | ``response_a``, ``response_b``, ``label``, and the like | prompt, chosen, rejected |

Sources: LLaMA-Factory's data/README.md (Alpaca, ``history``, ``kto_tag``), OpenAI's guides on fine-tuning, TRL 1.16's
dataset formats (unpaired preferences), LMSYS's Chatbot Arena (``winner``).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from tenfold.data.check import wrong
from tenfold.data.left_out import Why
from tenfold.data.messages import CONVERSATIONS, is_turns, read_literal
from tenfold.data.sources import RawRow, shorten

_ANSWERS = ("response", "answer", "output", "completion", "conversation")
_ENDS = (("a", "b"), ("0", "1"), ("1", "2"))
_LABELS = ("label", "winner", "preference", "better_response_id", "preferred")
_TIES = ("tie", "tied", "tie (bothbad)", "both", "both_bad", "neither", "equal", "same", "draw")
_SCORES = ("score", "rating", "reward")
_SIDE = re.compile(r"(?<![^\W_])(chosen|rejected)(?![^\W_])")
"""As a word of a column's name: ``chosen_score``, ``chosen-rating``."""
_UNPAIRED = ("label", "kto_tag")
_WANTED, _UNWANTED = ("true", "desirable"), ("false", "undesirable")


class Labelled(NamedTuple):
    """Two answers under neutral names, and the column that says which is the better."""

    first: str
    second: str
    label: str
    names: tuple[str, str]
    """What the column may hold for each."""


def under_our_names(record: RawRow, values: Mapping[str, Any], told: Counter[str] | None = None) -> dict[str, Any]:
    r"""The columns of a row in one of the forms above under our names; other rows as they are.

    Args:
        record: the raw record, for its place.
        values: its columns, as the user mapped them.
        told: counts rows of each form: ``alpaca``, ``labelled``.

    Raises:
        DataError: a label that names neither answer, or a form with a part missing.

    >>> row = {"instruction": "Add.", "input": "1+1", "output": "2"}
    >>> under_our_names(RawRow("row 1", row), row)
    {'prompt': 'Add.\n1+1', 'completion': '2'}
    """
    if {"preferred_output", "non_preferred_output"} <= set(values) and isinstance(values.get("input"), dict):
        return _openai(values)
    told = Counter() if told is None else told
    if "instruction" in values and "prompt" not in values and ({"output"} & set(values) or _has_pair(values)):
        told["alpaca"] += 1
        return _alpaca(record, values)
    found = labelled(values)
    if found is None or _has_pair(values):
        return dict(values)
    told["labelled"] += 1
    better = _better(record, values[found.label], found)
    rest = {name: value for name, value in values.items() if name not in (found.first, found.second, found.label)}
    order = (found.first, found.second) if better == 0 else (found.second, found.first)
    pair = dict(zip(("chosen", "rejected"), (values[name] for name in order), strict=True))
    return {**rest, **pair, **({"label": "tie"} if better is None else {})}


def _has_pair(values: Mapping[str, Any]) -> bool:
    return {"chosen", "rejected"} <= set(values)


def _openai(values: Mapping[str, Any]) -> dict[str, Any]:
    given = values["input"]
    rest = {name: value for name, value in values.items()
            if name not in ("input", "preferred_output", "non_preferred_output")}  # fmt: skip
    tools = {"tools": given["tools"]} if given.get("tools") else {}
    return {**rest, **tools, "prompt": given.get("messages"), "chosen": values["preferred_output"],
            "rejected": values["non_preferred_output"]}  # fmt: skip


def _alpaca(record: RawRow, values: Mapping[str, Any]) -> dict[str, Any]:
    used = ("instruction", "input", "output", "history")
    rest = {name: value for name, value in values.items() if name not in used}
    asked = [text for name in ("instruction", "input") if (text := values.get(name)) not in (None, "")]
    odd = next((name for name in ("instruction", "input") if not isinstance(values.get(name, ""), str | None)), None)
    if odd or not asked:
        value = shorten(str(values.get(odd or "instruction")), 60)
        raise wrong(record, odd or "instruction", f"{value!r}, expected text", "mend or remove the row")
    prompt: Any = "\n".join(asked)
    history = values.get("history")
    history = read_literal(history) or history if isinstance(history, str) and history.strip() else history
    if history:
        if not isinstance(history, list) or not all(isinstance(one, list | tuple) and len(one) == 2 for one in history):
            raise wrong(record, "history", f"{shorten(str(history), 60)!r}, expected pairs of question and answer",
                        'write [["question", "answer"], ...]')  # fmt: skip
        turns = [{"role": role, "content": text} for pair in history
                 for role, text in zip(("user", "assistant"), pair, strict=True)]  # fmt: skip
        prompt = [*turns, {"role": "user", "content": prompt}]
    pair = {} if _has_pair(values) else {"completion": values["output"]}
    return {"prompt": prompt, **pair, **rest}


def labelled(values: Mapping[str, Any]) -> Labelled | None:
    """Which columns hold two answers and a label; None where none do.

    >>> labelled({"prompt": "q", "response_a": "x", "response_b": "y", "winner": "model_a"}).label
    'winner'
    """
    label = next((name for name in _LABELS if name in values), None)
    if label is None:
        return None
    for stem in _ANSWERS:
        for ends in _ENDS:
            first, second = (f"{stem}_{end}" for end in ends)
            if first in values and second in values:
                return Labelled(first, second, label, ends)
    return None


def _better(record: RawRow, value: Any, found: Labelled) -> int | None:
    """Which answer the label names, 0 or 1; None for a tie."""
    said = _said(value).strip().lower()
    if said in _TIES:
        return None
    for index, (name, end) in enumerate(zip((found.first, found.second), found.names, strict=True)):
        if said in (end, name.lower(), f"model_{end}", f"answer_{end}", f"response_{end}"):
            return index
    raise wrong(
        record,
        found.label,
        f"{shorten(repr(value), 60)} names neither {found.first} nor {found.second}",
        f"write {found.names[0]}, {found.names[1]} or tie, or call the better answer chosen and the other rejected",
    )


def exchanged(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The raw columns of a preference with the other label: its answers change places, or its label names the other.

    What has ``chosen`` or ``rejected`` as a word of its name, and a counterpart, changes places with the answers; a
    column ``flipped`` is negated.

    Args:
        values: as they stand in the source.
        columns: the user's column name for each of ours.

    >>> exchanged({"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2}, {})
    {'prompt': 'q', 'chosen': 'b', 'rejected': 'a', 'score_chosen': 2, 'score_rejected': 1}
    """
    found = dict(values)
    for name in values:
        other = _counterpart(name)
        if other is not None and other in values:
            found[name] = values[other]
    mapped = [columns.get(name, name) for name in ("chosen", "rejected")]
    pairs = [mapped, ["preferred_output", "non_preferred_output"]]
    for one, two in pairs:
        if one in values and two in values:
            found[one], found[two] = values[two], values[one]
            break
    else:
        neutral = labelled(values)
        if neutral is not None:
            found[neutral.label] = _other_label(values[neutral.label], neutral)
    was = as_flag(values.get("flipped"))
    if was is not None:
        found["flipped"] = not was
    return found


def _counterpart(name: str) -> str | None:
    other = _SIDE.sub(lambda word: "rejected" if word[0] == "chosen" else "chosen", name)
    return None if other == name else other


def _other_label(value: Any, found: Labelled) -> Any:
    """The label in the same words, for the other answer."""
    said = _said(value)
    word = said.rstrip()
    other = found.names[word[-1].lower() == found.names[0]]
    text = word[:-1] + (other.upper() if word[-1].isupper() else other) + said[len(word) :]
    return type(value)(text) if isinstance(value, int | float) else text


def _said(value: Any) -> str:
    """A label as text; 1.0 is what pandas makes of 1 where other labels are missing."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def as_flag(value: object) -> bool | None:
    """A value of yes or no, as any format writes it; None where it is neither.

    >>> as_flag(True), as_flag("False"), as_flag(1), as_flag("maybe")
    (True, False, True, None)
    """
    return {"true": True, "1": True, "false": False, "0": False}.get(str(value).strip().lower())


def why_no_lesson(values: Mapping[str, Any]) -> tuple[Why, str] | None:
    """Why a row that is in order teaches nothing, and a name for the reason; None where it does.

    * ``tie``: equal answers, a label that says so, or the same score for both.
    * ``unwanted``: an unpaired preference (a completion or conversation with a ``label`` or ``kto_tag``) that is false.

    Args:
        values: under our names, in our form.

    >>> why_no_lesson({"prompt": "q", "chosen": "a", "rejected": "a"})
    ('tie', 'chosen and rejected are equal')
    """
    if _has_pair(values) and ("prompt" in values):
        if values["chosen"] == values["rejected"]:
            return "tie", "chosen and rejected are equal"
        for name in _LABELS:
            if isinstance(values.get(name), str) and values[name].strip().lower() in _TIES:
                return "tie", f"{name} is {values[name].strip()!r}"
        for name, value in values.items():
            other = _counterpart(name) if any(word in name for word in _SCORES) else None
            if other is not None and _is_number(value) and _same(value, values.get(other)):
                return "tie", f"{name} and {other} are both {value}"
    elif "completion" in values or is_turns(values.get("messages")):
        for name in _UNPAIRED:
            if name in values and is_unwanted(values[name]):
                return "unwanted", f"{name} is {values[name]}"
    return None


def is_unwanted(value: Any) -> bool:
    """Whether a label of an unpaired preference says that the answer is a bad one."""
    return str(value).strip().lower() in _UNWANTED


def is_unpaired(values: Mapping[str, Any]) -> bool:
    """Whether a row is an unpaired preference: one answer, and whether it is wanted."""
    single = "completion" in values or any(name in values for name in ("messages", *CONVERSATIONS))
    return single and any(str(values.get(name)).strip().lower() in (*_WANTED, *_UNWANTED) for name in _UNPAIRED)


def has_unused_flag(values: Mapping[str, Any]) -> bool:
    """Whether an answer has a label 0 or 1, which may say that it is wanted, or be a class."""
    return ("completion" in values or is_turns(values.get("messages"))) and str(values.get("label")).strip() in (
        "0",
        "1",
    )


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _same(one: Any, other: Any) -> bool:
    return _is_number(other) and float(one) == float(other)
