"""A recipe: one model and the stages it goes through."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tenfold.config.base import Config


class ModelFields(Config):
    """Which model, and how it is opened."""

    model: str | None = None
    """``demo`` (the embedded SmolLM2-135M-Instruct), a hub id, a folder, a GGUF file, or ``tiny:llama``. Recipes whose
    stages need no model leave it out, and may where the first stage that trains names one itself."""
    task: Literal["causal", "seq2seq", "classification", "reward"] = "causal"
    """What the model's head is for; ``causal`` writes text. Change it for models with another head."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Number format of the weights. Default: float32 on CPU, the checkpoint's own on a GPU. ``bfloat16`` halves
    memory."""
    load: Literal["4bit", "8bit"] | None = None
    """Pack the weights of the linear layers on opening (bitsandbytes), where the model does not fit: ``4bit`` is
    QLoRA's NF4, ``8bit`` is LLM.int8(). Adapters train on them, and export merges into whole weights."""
    device: str | None = None
    """``cpu``, ``cuda``, ``cuda:1``. Default: a GPU where there is one. Give it to choose among several."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; give it so that a run stays repeatable when the model changes."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Only for models whose code you have read."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Every random choice follows from it; change it to see how far figures depend on chance."""


class Recipe(ModelFields):
    """What ``tenfold run`` executes.

    >>> Recipe.parse({"model": "demo", "stages": [{"use": "lora", "data": "python-reference"}]}, "example").model
    'demo'
    """

    stages: Annotated[tuple[dict[str, Any], ...], Field(min_length=1)]
    """Each stage: ``use`` names the method, the other keys are those of its configuration. ``id`` names the stage, so
    that ``${id.artefact}`` stands for what it makes wherever a later stage takes a path; ``model`` lets it start from
    another model than the one that the stages before have left."""
    models: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], str] = {}
    """Further models by name, each as under ``model``: ``${models.NAME}`` stands for one wherever a model may stand."""
