"""Stages that train an adapter: open, attach, train through the Trainer, save a PEFT folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from transformers import set_seed

from tenfold.adapt.distil import Teacher, is_converted, keeps_apart
from tenfold.adapt.training import Trained, total_steps, train
from tenfold.config.training import TextTrainingFields
from tenfold.data.encode import Encoded, encode
from tenfold.errors import ConfigError
from tenfold.models.inference import max_positions
from tenfold.models.memory import measure_growth
from tenfold.models.opened import Opened
from tenfold.models.quantised import for_training
from tenfold.models.reference import ModelRef
from tenfold.stage.context import Context
from tenfold.stage.results import Metric, Result


def prepare(config: TextTrainingFields, context: Context) -> tuple[Opened, Encoded]:
    """The opened model, adapters of earlier stages folded in, and the training share of the data as tokens.

    Raises:
        ConfigError: sequences longer than the model can read.
    """
    assert context.rows is not None, "checked before anything was opened"
    # From here on every random choice (the adapter's start, the order of the rows, dropout) follows from the seed.
    set_seed(context.seed)
    opened = context.model.open(merge=True)
    opened = dataclasses.replace(opened, model=for_training(opened.model))
    limit = max_positions(opened.model)
    if limit is not None and config.max_length > limit:
        raise ConfigError(
            f"max_length: {config.max_length} is above the {limit} positions that the model has",
            remedy=f"give {limit} or less",
        )
    rows, _ = context.rows.split(config.holdout)
    converted = config.distil > 0 and is_converted(opened.model)
    if config.boundaries and not keeps_apart(opened.model, converted=converted):
        raise ConfigError(
            f"boundaries: {type(opened.model).__name__} does not keep packed rows apart by their position_ids",
            remedy="leave boundaries out, or give packing: false",
        )
    encoded = encode(
        rows,
        opened.tokenizer,
        max_length=config.max_length,
        packing=config.packing,
        boundaries=config.boundaries,
        on_bad_row=config.on_bad_row,
    )
    return opened, dataclasses.replace(encoded, notes=(*opened.notes, *encoded.notes))


def base_of(model: ModelRef) -> str:
    """What an adapter trained on this model names as its base: the adapter before it, which names the next."""
    return model.adapters[-1] if model.adapters else model.source


def fit(
    model: Any,
    opened: Opened,
    encoded: Encoded,
    config: TextTrainingFields,
    context: Context,
    numbers: Callable[[], dict[str, float]] = dict,
    teacher: Teacher | None = None,
) -> tuple[Trained, list[Result]]:
    """Train, resuming where a killed run stopped; returns what was done and the figures of the training.

    ``numbers`` gives what a method logs beside the loss; ``teacher`` is of the share ``distil``, see
    `tenfold.adapt.training.train`.
    """
    steps = total_steps(config, encoded.sequences, encoded.tokens)
    set_seed(context.seed)

    def resumed(step: int) -> None:
        context.metrics.rewind(step)
        if step:
            context.progress.say(f"  going on from step {step} of {steps}")

    # Weights are mapped from their file and read on first use: they must not count as growth of the training.
    for parameter in model.parameters():
        parameter.detach().sum()
    with measure_growth(next(model.parameters()).device) as growth:
        trained = train(
            model,
            opened.tokenizer,
            encoded,
            config,
            folder=context.folder,
            seed=context.seed,
            on_resume=resumed,
            on_log=lambda step, values: context.metrics.write(step, {**values, **numbers()}),
            on_step=lambda done, total, detail: context.progress("training", done, total, detail),
            teacher=teacher,
        )
    lines = [json.loads(line) for line in context.metrics.path.read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    unit = "nats/token" if not config.distil else ""  # else it is, in part, a relative distance
    metrics = (
        Metric(name="loss", value=losses[-1], unit=unit, better="lower"),
        Metric(name="first loss", value=losses[0], unit=unit),
        Metric(name="steps", value=trained.steps),
        Metric(name="tokens", value=trained.tokens),
        Metric(
            name="speed",
            value=trained.tokens / trained.steps * max(trained.steps - trained.resumed_from, 1) / trained.seconds,
            unit="tokens/s",
            better="higher",
            kind="timing",
        ),
        Metric(name="peak memory growth", value=growth.growth, unit="bytes", better="lower", kind="memory"),
    )
    settings = {
        "sequences": encoded.sequences,
        "trained tokens per epoch": encoded.trained_tokens,
        "rows": encoded.rows,
        "rows cut": encoded.truncated_rows,
        "tokens cut": encoded.tokens_cut,
    }
    return trained, [Result(task="training", subject="after", metrics=metrics, settings=settings)]
