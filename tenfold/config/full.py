"""Training of all weights, without an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar

from pydantic import Field

from tenfold.config.shape import Shape
from tenfold.config.stage import ArtefactKind
from tenfold.config.training import TextTrainingFields


class FullConfig(TextTrainingFields):
    """All weights are trained: continual training of a converted model on long texts, for one.

    It needs four times the memory of the weights, in float32, and five times with ``distil``; an adapter needs little
    more than the weights.
    """

    verb = "adapt"
    summary = "all weights, without an adapter"
    examples = ("tenfold adapt demo --method full --data python-reference --steps 20",)
    makes: ClassVar[Mapping[str, ArtefactKind]] = {"model": "model"}
    run = "tenfold.adapt.full.stage:run_full"
    attach = "tenfold.adapt.full:attach"

    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate of AdamW, far below an adapter's. Lower it where the model forgets, raise it where the loss
    hardly falls."""

    def applied_to(self, shape: Shape) -> Shape:
        """Other weights, earlier adapters among them."""
        return replace(super().applied_to(shape), adapted=False)
