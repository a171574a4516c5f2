"""The keys that every training stage shares; they become arguments of the transformers Trainer."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tenfold.config.data import DataFields
from tenfold.config.shape import Shape
from tenfold.config.stage import Incidental, RowsRead, check_kind
from tenfold.errors import ConfigError, MissingDependencyError


class TrainingFields(DataFields):
    """How to train, whatever is trained."""

    reads: ClassVar[tuple[str, ...]] = ("text", "completion", "chat")
    learns: ClassVar[bool] = True

    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps; give this, ``epochs`` or ``tokens``. Default: one epoch. For a quick try, or a length that does
    not depend on the data."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training rows; more than 1 where rows are few."""
    tokens: Annotated[int, Field(ge=1)] | None = None
    """Training tokens, rounded up to whole steps; to compare methods or batch sizes at the same amount of text."""
    batch_size: Annotated[int, Field(ge=1)] = 4
    """Sequences per forward pass; raise it as far as memory goes."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Forward passes per optimizer step, for larger batches than memory holds."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Tokens per sequence; what is longer is cut, and what was cut is counted. Raise it where much was cut, lower it
    where memory is short."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate of AdamW. Lower it where the loss jumps or rises, raise it where the loss hardly falls."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up; ``constant`` for runs that will be continued."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps in which the learning rate rises; more where the loss jumps at the start."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay; for many passes over few rows."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm; lower it where single batches throw the loss up."""
    gradient_checkpointing: bool = False
    """Trade time for memory: recompute activations in the backward pass; where a batch does not fit."""
    save_every: Annotated[int, Field(ge=1), Incidental] = 25
    """Optimizer steps between checkpoints, from which a killed run resumes. Raise it where saving takes time that
    counts, lower it where steps are slow."""
    log_every: Annotated[int, Field(ge=1), Incidental] = 5
    """Optimizer steps between lines of ``metrics.jsonl``; raise it for long runs."""
    report_to: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], Incidental] = ()
    """Also log to these, as the transformers Trainer does; to watch a run from elsewhere."""

    def check(self, rows: RowsRead | None) -> None:
        """Rows to learn from, of which some can be held out, and loggers that are installed."""
        check_kind(rows, self.reads, "training")
        assert rows is not None
        rows.split(self.holdout)
        for name in self.report_to:
            if find_spec(name) is None and not (name == "tensorboard" and find_spec("tensorboardX")):
                raise MissingDependencyError(f"report_to: {name} is not installed", f"pip install {name}")

    def applied_to(self, shape: Shape) -> Shape:
        """Sequences must be within what the model can read, and earlier adapters must go into its weights."""
        shape.check_mergeable()
        shape.check_positions("max_length", self.max_length)
        return shape

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        given = [name for name in ("steps", "epochs", "tokens") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say how long to train; give one")
        return self


class TextTrainingFields(TrainingFields):
    """How to train on texts, completions and conversations, by the next token."""

    packing: bool = True
    """Fill each sequence with several rows (text rows only). Turn it off where rows must not share a sequence."""
    boundaries: bool = False
    """Keep packed rows apart: a token sees those of its own row only. Turn it on where rows are short and have nothing
    to do with each other."""
    distil: Annotated[float, Field(ge=0, le=1)] = 0.0
    """For models with local spans: share of the loss, from 0 to 1, that is the distance to the hidden states that the
    model has with full attention. 1 needs no label at all, and serves best to win back what a conversion by
    ``masformer`` lost; the rest is the loss on the text."""

    def applied_to(self, shape: Shape) -> Shape:
        """A model without local spans has nothing to teach itself."""
        if self.distil and shape.model_type and shape.spans is None:
            raise ConfigError(
                "distil: the model has no local spans, so it has nothing to learn from itself",
                remedy="put a stage masformer before this one, or leave distil out",
            )
        return super().applied_to(shape)
