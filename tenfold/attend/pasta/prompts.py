"""Prompts as the model sees them, heads as the recipe names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tenfold.attend.chat_marks import said_by_user
from tenfold.attend.pasta.profiles import Profile, load_profile
from tenfold.attend.text_marks import Marked
from tenfold.config.pasta import SteeringFields
from tenfold.data.text_checks import repeats
from tenfold.stage.context import Context


def profile_of(config: SteeringFields, context: Context) -> Profile:
    """The heads to steer: those an earlier stage found, or a profile by name or file."""
    path = config.profile_file()
    assert path is not None, "references are resolved before a stage runs"
    return load_profile(path)


def uses_template(tokenizer: Any, chat: str) -> bool:
    """Whether prompts go through the chat template: ``yes``, or ``auto`` where there is one."""
    return chat == "yes" or (chat == "auto" and tokenizer.chat_template is not None)


def loops(texts: Mapping[str, str]) -> list[str]:
    """A note if some steered texts go round in circles.

    >>> loops({"prompt 1": "It is noon. " * 4, "prompt 2": "It is noon."})[0].partition(";")[0]
    'the steered text of prompt 1 repeats itself'
    """
    found = [name for name, text in texts.items() if repeats(text)]
    if not found:
        return []
    verb = "text of {} repeats itself" if len(found) == 1 else "texts of {} repeat themselves"
    remedy = "a gentler dose may read better: an alpha nearer to 1, or target_mass 0.15"
    return [f"the steered {verb.format(', '.join(found))}; {remedy}"]


def chat_prompt(tokenizer: Any, prompt: Marked, chat: str) -> Marked:
    """A marked prompt as the model sees it: what a user says, where there is a chat template and it is wanted."""
    return said_by_user(tokenizer, prompt) if uses_template(tokenizer, chat) else prompt
