"""The stage ``gear``: caches side by side, by what they do to predictions, by bytes and by time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from tenfold.cache.gear import CacheConfig
from tenfold.cache.gear.layer import GearLayer
from tenfold.cache.gear.measure import Quality, measure_decoding, measure_quality
from tenfold.cache.packing import _packed_cache
from tenfold.cache.spans import SpanCache, own_cache
from tenfold.config.gear import GearConfig, parse_kv
from tenfold.errors import ConfigError
from tenfold.evaluate.compare import paired_metric
from tenfold.evaluate.long_context import joined_ids, spread
from tenfold.models.inference import max_positions
from tenfold.models.quantised import number_format
from tenfold.stage.context import Context, StageOutput
from tenfold.stage.record import Figure, Series, Table
from tenfold.stage.results import Metric, Result

RAW_BITS = 16
"""What a number of the exact cache is compared with, bfloat16."""


def run_gear(config: GearConfig, context: Context) -> StageOutput:
    """The stage ``gear``; it changes nothing of the model."""
    opened = context.model.open()
    model = opened.model
    made: dict[str, Callable[[], Any]] = {
        name: partial(_packed_cache, model, parse_kv(name)) for name in config.named()
    }
    first, *_ = [make() for make in made.values()]  # refuses what cannot be before anything is measured
    spans = isinstance(first, SpanCache)
    _check_lengths(model, config)
    texts = _pieces(opened.tokenizer, context, config)
    quality = context.store.get(
        "quality",
        lambda: _quality(model, texts, made, config, partial(context.progress, "quality")),
        list[Result],
    )
    own: dict[str, Callable[[], Any]] = {"exact": lambda: own_cache(model) or DynamicCache(config=model.config)}
    times: list[Result] = []
    for number, length in enumerate(config.timed_contexts):
        context.progress("time of a token", number, len(config.timed_contexts), f"{length} tokens")
        room = length + config.repeats * (config.steps + 1)
        static = {"static": partial(StaticCache, config=model.config, max_cache_len=room)}
        raw = {"16 bits, packed": partial(_packed_cache, model, CacheConfig(bits=16))}
        timed = own | ({} if spans else static) | raw | made
        times += context.store.get(f"decode-{length}", partial(_decoding, model, timed, length, config), list[Result])
    return StageOutput(
        results=[*quality, *times],
        tables=[_table(quality, times)],
        figures=[_quality_figure(quality), *([_time_figure(times)] if times else [])],
        attached={"layers": sum(isinstance(layer, GearLayer) for layer in first.layers), "of": len(first.layers)},
        notes=[
            *([_SPANS_NOTE] if spans else []),
            "The exact cache is not touched: packed caches are made beside it. Bits are measured on the stored tensors "
            "of the packed blocks; the exact first tokens and the buffer come on top.",
        ],
    )


_SPANS_NOTE = (
    "The model has local spans: its layers of full attention are packed, and bits are theirs. The others keep what is "
    "in reach, exactly; so does the exact cache where times are measured."
)


def _check_lengths(model: Any, config: GearConfig) -> None:
    """Refuse texts that are longer than what the model can read."""
    limit = max_positions(model)
    asked = {"context": config.context + config.scored}
    if getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) is None:  # learned positions end
        asked["timed_contexts"] = max((0, *config.timed_contexts)) + config.repeats * (config.steps + 1)
    for key, tokens in asked.items():
        if limit is not None and tokens > limit:
            raise ConfigError(
                f"{key}: {tokens} tokens with what follows are more than the {limit} of the model",
                remedy=f"give a smaller {key}",
            )


def _pieces(tokenizer: Any, context: Context, config: GearConfig) -> list[Tensor]:
    """Pieces of equal length, spread evenly over the joined texts."""
    assert context.rows is not None
    ids, length = joined_ids(tokenizer, context.rows), config.context + config.scored + 1
    return spread(ids, length, config.texts, context.rows.source, "texts, context or scored")


def _quality(
    model: Any,
    texts: Sequence[Tensor],
    made: Mapping[str, Callable[[], Any]],
    config: GearConfig,
    tell: Callable[[int, int], None],
) -> list[Result]:
    found = measure_quality(model, texts, made, context=config.context, scored=config.scored, tell=tell)
    settings = {"context": config.context, "scored": config.scored, "texts": config.texts}
    return [
        Result(task="cache", subject=name, metrics=_metrics(quality, found["exact"]), settings=settings)
        for name, quality in found.items()
    ]


def _metrics(quality: Quality, exact: Quality) -> tuple[Metric, ...]:
    """Differences and divergences with intervals over texts: tokens of one text are not independent."""
    report = quality.report
    worse = [a - b for a, b in zip(quality.nll, exact.nll, strict=True)]
    found = [
        Metric(
            name="nll", value=statistics.mean(quality.nll), unit="nats/token", count=len(quality.nll), better="lower"
        ),
        paired_metric("nll_difference", _by_text(worse, quality.text), "nats/token").model_copy(
            update={"better": "lower"}
        ),
        paired_metric("kl", _by_text(quality.kl, quality.text), "nats/token").model_copy(update={"better": "lower"}),
        paired_metric("same_top_token", _by_text(quality.agrees, quality.text)),
    ]
    if "bits" in report:
        found += [
            Metric(name="bits", value=report["bits"], unit="bits", better="lower"),
            Metric(name="formula_bits", value=report["formula bits"], unit="bits"),
            Metric(name="bits_with_buffer", value=report["bits with buffer"], unit="bits", better="lower"),
        ]
    return tuple(found)


def _by_text(values: Sequence[float], text: Sequence[int]) -> Tensor:
    numbers = torch.tensor(values, dtype=torch.float64)
    return torch.stack([numbers[torch.tensor(text) == number].mean() for number in sorted(set(text))])


def _decoding(model: Any, made: Mapping[str, Callable[[], Any]], length: int, config: GearConfig) -> list[Result]:
    found = measure_decoding(model, made, context=length, steps=config.steps, repeats=config.repeats)
    return [
        Result(
            task=f"decode, {length} tokens",
            subject=name,
            metrics=(
                Metric(
                    name="decode",
                    value=1000 * statistics.median(seconds),
                    unit="ms/token",
                    count=len(seconds),
                    better="lower",
                    kind="timing",
                ),
            ),
            settings={"context": length, "dtype": number_format(model)},
        )
        for name, seconds in found.items()
    ]


def _table(quality: Sequence[Result], times: Sequence[Result]) -> Table:
    lengths = sorted({result.settings["context"] for result in times})
    columns = (
        "cache",
        "bits a number",
        "formula",
        "smaller than bfloat16",
        "nll difference",
        "KL",
        "same top token",
    )
    rows = []
    names = dict.fromkeys(result.subject for result in (*quality, *times))
    for name in names:
        seen = {metric.name: metric.value for result in quality if result.subject == name for metric in result.metrics}
        spent = [
            next(
                (r.metric("decode").value for r in times if (r.subject, r.settings["context"]) == (name, length)), None
            )
            for length in lengths
        ]
        bits = seen.get("bits")
        cells = (seen.get("nll_difference"), seen.get("kl"), seen.get("same_top_token"))
        rows.append((name, bits, seen.get("formula_bits"), RAW_BITS / bits if bits else None, *cells, *spent))
    return Table(
        title="Caches", columns=(*columns, *(f"ms a token at {length}" for length in lengths)), rows=tuple(rows)
    )


def _quality_figure(quality: Sequence[Result]) -> Figure:
    """One line for each variant, by rising size."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for result in quality:
        if result.subject != "exact":
            point = (result.metric("bits").value, result.metric("kl").value)
            lines.setdefault(result.subject.partition(":")[0], []).append(point)
    series = []
    for name, points in lines.items():
        points.sort()
        series.append(Series(name=name, x=tuple(x for x, _ in points), y=tuple(y for _, y in points)))
    return Figure(
        kind="line",
        title="Quality against bytes",
        x_label="bits a number, measured",
        y_label="KL to the exact cache, nats/token",
        series=tuple(series),
        caption="Lower and further left is better. Bits hold codes, scales, low rank and outliers of packed blocks.",
    )


def _time_figure(times: Sequence[Result]) -> Figure:
    names = dict.fromkeys(result.subject for result in times)
    series = []
    for name in names:
        points = sorted((r.settings["context"], r.metric("decode").value) for r in times if r.subject == name)
        series.append(Series(name=name, x=tuple(float(x) for x, _ in points), y=tuple(y for _, y in points)))
    return Figure(
        kind="line",
        title="Time against context",
        x_label="tokens in the cache",
        y_label="ms a token",
        series=tuple(series),
        caption="Median of one decoding step at batch 1; the caches took turns in one process.",
    )
