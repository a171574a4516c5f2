"""Dialogues written as one text, as HH-RLHF has them: after empty lines ``Human: ...`` and ``Assistant: ...``."""

from __future__ import annotations

import re
from typing import Any

ANSWER = "\n\nAssistant:"
"""Where an answer begins."""

_ROLES = {"Human": "user", "Assistant": "assistant"}
_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def turns_of(prompt: str) -> list[dict[str, Any]]:
    r"""The messages of a dialogue that asks for an answer; none where a text is no such dialogue.

    It is one where the human begins, both take turns, and it ends with ``Assistant:``.

    >>> turns_of("\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: 1+1=\n\nAssistant:")[-1]
    {'role': 'user', 'content': '1+1='}
    >>> turns_of("Human: is this a dialogue?")
    []
    """
    prompt = prompt.replace("\r\n", "\n")
    if not prompt.rstrip().endswith(ANSWER) or not prompt.lstrip().startswith("Human:"):
        return []
    _, *parts = _SPEAKER.split(prompt.rstrip())
    turns = [
        {"role": _ROLES[name], "content": text.strip()} for name, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    *asked, begun = turns
    takes = [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
    return asked if takes and not begun["content"] and all(turn["content"] for turn in asked) else []
