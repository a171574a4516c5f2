"""The stage ``masformer``: local attention in most layers, and what it costs in quality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tenfold.attend.attention import self_attentions
from tenfold.attend.masformer import convert, place, profile, repeated, text_loss
from tenfold.config.masformer import MasformerConfig
from tenfold.data.rows import Text
from tenfold.errors import ConfigError, DataError
from tenfold.evaluate.inference import evaluating, max_positions
from tenfold.evaluate.results import Metric, Result
from tenfold.kernels.local import Span
from tenfold.models.export import save_model
from tenfold.pipeline.context import Context, StageOutput
from tenfold.report.record import Figure, Series, Table

LENGTHS = (2048, 8192, 32768)
"""Contexts of which the cost is predicted."""


def run_masformer(config: MasformerConfig, context: Context) -> StageOutput:
    """The stage ``masformer``; its artefact is the converted model."""
    opened = context.model.open()
    model = opened.model
    layers = len(self_attentions(model))
    span = Span(config.pattern, config.window, config.previous, config.sinks)
    found, measured = _texts(opened.tokenizer, model, span, config, context)
    before = context.remember("before", lambda: [_measured(model, measured, "before")])
    full, scores = _chosen(model, layers, span, found, config, context)
    handle = convert(model, full_layers=full, span=span)
    after = context.remember("after", lambda: [_measured(model, measured, "after")])
    save_model(model, opened.tokenizer, context.folder / "model")
    report = handle.report()
    return StageOutput(
        results=[*before, *after],
        tables=[_costs(model, span, len(full), layers)],
        figures=[_layer_map(full, layers, scores)],
        attached={"full layers": list(full), "local layers": layers - len(full), "span": report["span"]},
        notes=[
            "No weight is changed: the spans lie in the model's configuration as tenfold_span, which tenfold reads. "
            "Plain transformers opens this folder with full attention everywhere.",
        ],
        artefact="model",
        continues_with="model",
    )


def _texts(
    tokenizer: Any, model: Any, span: Span, config: MasformerConfig, context: Context
) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Texts to profile on, and others to measure on."""
    assert context.rows is not None
    between = config.between or max(config.passage, span.reach)
    length = config.passage + between
    limit = max_positions(model)
    if limit is not None and length + config.passage > limit:
        raise ConfigError(
            f"passage {config.passage} twice with {between} tokens between are more than the {limit} of the model",
            remedy="give a shorter passage, a smaller window, or between",
        )
    joined = "\n\n".join(row.text for row in context.rows if isinstance(row, Text))
    ids = torch.tensor(tokenizer(joined, verbose=False)["input_ids"])
    needed = 2 * config.passages * length
    if len(ids) < needed:
        raise DataError(
            f"{context.rows.source}: {len(ids)} tokens, and {needed} are needed for {config.passages} passages twice",
            remedy="give more text, or fewer or shorter passages",
        )
    half = len(ids) // 2
    return tuple(  # type: ignore[return-value]
        repeated(part[: config.passages * length], config.passage, between) for part in (ids[:half], ids[half:])
    )


def _chosen(
    model: Any,
    layers: int,
    span: Span,
    texts: Sequence[tuple[Tensor, Tensor]],
    config: MasformerConfig,
    context: Context,
) -> tuple[tuple[int, ...], list[float] | None]:
    """The full layers, and the scores that they were found by."""
    if config.full_layers is not None:
        return tuple(sorted(set(config.full_layers))), None
    count = config.count(layers)
    if config.placement != "profile":
        return place(config.placement, count, layers), None
    if count > layers:
        raise ConfigError(f"budget: {config.budget} is {count} layers of {layers}", remedy=f"give at most {layers}")
    context.progress("profile", 0, 1, f"{layers} layers in one backward pass")
    scores = context.remember(
        "profile",
        lambda: [
            Result(
                task="profile",
                subject="layers",
                metrics=tuple(
                    Metric(name=str(layer), value=score, unit="nats/token", better="neither")
                    for layer, score in enumerate(profile(model.eval(), texts, span))
                ),
            )
        ],
    )[0].metrics
    values = [metric.value for metric in scores]
    best = sorted(range(layers), key=lambda layer: -values[layer])[:count]
    return tuple(sorted(best)), values


def _measured(model: Any, texts: Sequence[tuple[Tensor, Tensor]], subject: str) -> Result:
    """Ordinary text, beyond what a local layer reaches, and second copies."""
    plain, copies = [], []
    with evaluating(model):
        for ids, scored in texts:
            first = int(scored.int().argmax())
            copies.append(float(text_loss(model, ids, scored)))
            plain.append(float(text_loss(model, ids[:first], torch.arange(first) >= first // 2)))
    metrics = [
        Metric(name=name, value=sum(values) / len(values), unit="nats/token", count=len(values), better="lower")
        for name, values in (("text_nll", plain), ("repeat_nll", copies))
    ]
    return Result(task="long text", subject=subject, metrics=tuple(metrics))


def _costs(model: Any, span: Span, full: int, layers: int) -> Table:
    """Visible pairs and cache bytes at some lengths (specification, section 2, item 6, and oracle 9)."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * heads * size * model.dtype.itemsize
    rows = []
    for length in LENGTHS:
        pairs = (full + (layers - full) * span.pairs(length) / (length * (length + 1) / 2)) / layers
        whole = token * layers * length
        small = token * (full * length + (layers - full) * min(length, span.reach + span.sinks))
        rows.append((length, pairs, whole / 2**20, small / 2**20, whole / small))
    columns = ("tokens", "pairs of full attention", "cache before, MiB", "cache after, MiB", "smaller")
    return Table(title="What the spans cost", columns=columns, rows=tuple(rows))


def _layer_map(full: Sequence[int], layers: int, scores: Sequence[float] | None) -> Figure:
    names = tuple(str(layer) for layer in range(layers))
    chosen = tuple(float(layer in full) for layer in range(layers))
    if scores is None:
        return Figure(
            kind="bar",
            title="Layers of full attention",
            x_label="layer",
            series=(Series(name="full", x=names, y=chosen),),
        )
    split = [tuple(s if (layer in full) == kept else 0.0 for layer, s in enumerate(scores)) for kept in (True, False)]
    return Figure(
        kind="bar",
        title="Layers of full attention",
        x_label="layer",
        y_label="score, nats/token",
        series=(Series(name="full", x=names, y=split[0]), Series(name="local", x=names, y=split[1])),
        caption="How much the loss on far copies would fall if a layer, half local, became full: one backward pass.",
    )
