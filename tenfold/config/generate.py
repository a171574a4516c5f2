"""What to write, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tenfold.config.base import Config


class GenerateConfig(Config):
    """Let the model write, beside the one that the recipe started from."""

    prompts: Annotated[tuple[str, ...], Field(min_length=1)] = ("Explain in two sentences what a language model is.",)
    """One text is written for each."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    """Longest text, in tokens."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the most probable token each time."""
    chat: Literal["auto", "yes", "no"] = "auto"
    """Wrap each prompt in the model's chat template; ``auto`` does so where there is one."""
    baseline: bool = True
    """Also let the model write that the recipe started from."""
