"""Training of all weights, without an adapter."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tenfold.config.training import TextTrainingFields


class FullConfig(TextTrainingFields):
    """All weights are trained: continual training of a converted model on long texts, for one.

    It needs four times the memory of the weights, in float32, and five times with ``distil``; an adapter needs little
    more than the weights.
    """

    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate of AdamW."""
