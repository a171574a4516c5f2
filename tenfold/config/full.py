"""Training of all weights, without an adapter."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from tenfold.config.shape import Shape
from tenfold.config.training import TextTrainingFields


class FullConfig(TextTrainingFields):
    """All weights are trained: continual training of a converted model on long texts, for one.

    It needs four times the memory of the weights, in float32, and five times with ``distil``; an adapter needs little
    more than the weights.
    """

    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate of AdamW."""

    def applied_to(self, shape: Shape) -> Shape:
        """Other weights, earlier adapters among them."""
        return replace(super().applied_to(shape), adapted=False)
