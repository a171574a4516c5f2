"""The stage ``adalora``: train, say where the budget went, leave plain LoRA."""

from __future__ import annotations

from typing import Any

from tenfold.adapt import adalora
from tenfold.adapt.fitting import base_of, fit, prepare
from tenfold.adapt.training import total_steps
from tenfold.config.adalora import AdaLoraConfig
from tenfold.models.layer_map import layer_map
from tenfold.stage.context import Context, StageOutput
from tenfold.stage.record import Figure, Series


def run_adalora(config: AdaLoraConfig, context: Context) -> StageOutput:
    """The stage ``adalora``; the artefact is plain LoRA."""
    opened, encoded = prepare(config, context)
    left_out = layer_map(opened.model).left_out(config.targets)
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
        left_out=encoded.refused,
        notes=[*encoded.notes, *left_out, *report["notes"]],
        timings={"training": trained.seconds},
        artefact=folder.name,
        continues_with="adapter",
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
