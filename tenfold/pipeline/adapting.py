"""Stages that train an adapter: open, attach, train through the Trainer, save a PEFT folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from transformers import set_seed

from tenfold.adapt import adalora, full, lora
from tenfold.adapt.distil import keeps_apart
from tenfold.adapt.training import Trained, total_steps, train
from tenfold.config.adalora import AdaLoraConfig
from tenfold.config.full import FullConfig
from tenfold.config.lora import LoraConfig
from tenfold.config.training import TextTrainingFields
from tenfold.data.encode import Encoded, encode
from tenfold.errors import ConfigError
from tenfold.evaluate.inference import max_positions
from tenfold.evaluate.memory import measure_growth
from tenfold.evaluate.results import Metric, Result
from tenfold.models.export import save_adapter, save_model
from tenfold.models.opened import Opened
from tenfold.models.reference import ModelRef
from tenfold.pipeline.context import Context, StageOutput
from tenfold.report.record import Figure, Series


def run_lora(config: LoraConfig, context: Context) -> StageOutput:
    """The stage ``lora``."""
    opened, encoded = prepare(config, context)
    model = lora.attach(opened.model, config, task=context.model.task)
    trained, results = fit(model, opened, encoded, config, context)
    save_adapter(model, opened.tokenizer, context.folder / "adapter", base=base_of(context.model))
    return StageOutput(
        results=results,
        attached=lora.attached(model),
        notes=encoded.notes,
        timings={"training": trained.seconds},
        artefact="adapter",
        continues_with="adapter",
    )


def run_adalora(config: AdaLoraConfig, context: Context) -> StageOutput:
    """The stage ``adalora``; the artefact is plain LoRA."""
    opened, encoded = prepare(config, context)
    adapter = adalora.attach(opened.model, config, task=context.model.task)
    if note := adapter.too_short(total_steps(config, encoded.sequences, encoded.tokens)):
        context.progress.say(f"  {note}")
    trained, results = fit(adapter.model, opened, encoded, config, context, numbers=adapter.controller.numbers)
    report = adapter.report()
    touched = report["attached"]
    # What a reader calls trainable is what is left at the end and leaves in the artefact.
    base = touched["trainable parameters"] / touched["share of the model"]
    kept = touched.pop("exported parameters")
    touched |= {"trainable parameters": kept, "share of the model": kept / base, "bytes": touched.pop("exported bytes")}
    warmup = adapter.controller.schedule.warmup if adapter.controller.schedule is not None else 0
    folder = adapter.export(context.folder / "adapter", base=base_of(context.model))
    opened.tokenizer.save_pretrained(folder)
    return StageOutput(
        results=results,
        attached=touched,
        figures=[rank_map(report["ranks"]), budget_curve(report["budget"], adapter.plan.by, warmup)],
        notes=[*encoded.notes, *report["notes"]],
        timings={"training": trained.seconds},
        artefact=folder.name,
        continues_with="adapter",
    )


def run_full(config: FullConfig, context: Context) -> StageOutput:
    """The stage ``full``; the artefact is a model in the type that it came in."""
    opened, encoded = prepare(config, context)
    dtype = opened.model.dtype
    model = full.attach(opened.model, config, task=context.model.task)
    trained, results = fit(model, opened, encoded, config, context)
    save_model(model.to(dtype), opened.tokenizer, context.folder / "model")
    count = sum(parameter.numel() for parameter in model.parameters())
    return StageOutput(
        results=results,
        attached={"method": "all weights", "trainable parameters": count, "share of the model": 1.0},
        notes=encoded.notes,
        timings={"training": trained.seconds},
        artefact="model",
        continues_with="model",
    )


def attach_adalora(model: Any, config: AdaLoraConfig, task: str) -> Any:
    """The adapted model alone, as it starts, for `tenfold.pipeline.estimate`: nothing is scored on fake tensors."""
    adapter = adalora.attach(model, config, task=task)
    adapter.controller.close()
    return adapter.model


def rank_map(ranks: dict[str, list[int | None]]) -> Figure:
    """Where the budget went: the rank of each role in each layer."""
    layers = max(len(row) for row in ranks.values())
    series = tuple(Series(name=role, x=tuple(map(str, range(layers))), y=tuple(row)) for role, row in ranks.items())
    return Figure(
        kind="heatmap",
        title="Rank map",
        x_label="layer",
        y_label="role",
        series=series,
        caption="The rank that each matrix was left with. Rank 0: the matrix is not adapted any more.",
    )


def budget_curve(history: list[tuple[int, int, int]], unit: str, warmup: int) -> Figure:
    """The budget and what was kept, over the steps; level until the warm-up ends."""
    if warmup:
        history = [history[0], (warmup, *history[0][1:]), *history[1:]]
    steps = tuple(float(step) for step, _, _ in history)
    budget = Series(
        name=f"budget ({'triplets' if unit == 'count' else unit})", x=steps, y=tuple(b for _, b, _ in history)
    )
    kept = Series(name="triplets kept", x=steps, y=tuple(k for _, _, k in history))
    return Figure(
        kind="line",
        title="Budget over time",
        x_label="step",
        y_label="triplets" if unit == "count" else unit,
        series=(budget, kept) if unit == "count" else (budget,),
        caption="All triplets until the warm-up ends, a cubic fall to the budget, then a fixed mask.",
    )


def prepare(config: TextTrainingFields, context: Context) -> tuple[Opened, Encoded]:
    """The opened model, adapters of earlier stages folded in, and the training share of the data as tokens.

    Raises:
        ConfigError: sequences longer than the model can read.
    """
    assert context.rows is not None, "checked before anything was opened"
    # From here on every random choice (the adapter's start, the order of the rows, dropout) follows from the seed.
    set_seed(context.seed)
    opened = context.model.open(merge=True)
    limit = max_positions(opened.model)
    if limit is not None and config.max_length > limit:
        raise ConfigError(
            f"max_length: {config.max_length} is above the {limit} positions that the model has",
            remedy=f"give {limit} or less",
        )
    rows, _ = context.rows.split(config.holdout)
    if config.boundaries and not keeps_apart(opened.model, converted=config.distil > 0):
        raise ConfigError(
            f"boundaries: {type(opened.model).__name__} does not keep packed rows apart by their position_ids",
            remedy="leave boundaries out, or give packing: false",
        )
    encoded = encode(
        rows, opened.tokenizer, max_length=config.max_length, packing=config.packing, boundaries=config.boundaries
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
) -> tuple[Trained, list[Result]]:
    """Train, resuming where a killed run stopped; returns what was done and the figures of the training.

    ``numbers`` gives what a method logs beside the loss.
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
