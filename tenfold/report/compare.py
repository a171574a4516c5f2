"""Two runs side by side: what differs in the results, and what differs in the configuration."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tenfold.stage import numbers
from tenfold.stage.record import StageSummary
from tenfold.stage.results import Metric


@dataclass(frozen=True)
class MetricRow:
    """One metric of one subject in two runs; ``None`` where a run did not measure it."""

    stage: str
    """``evaluate``; the second one of a run is ``evaluate 2``."""
    task: str
    subject: str
    metric: str
    unit: str
    better: Literal["lower", "higher", "neither"]
    kind: Literal["figure", "timing", "memory"]
    a: float | None
    b: float | None

    @property
    def difference(self) -> float | None:
        """``b - a``, in ``unit``."""
        return self.b - self.a if self.a is not None and self.b is not None else None

    @property
    def relative(self) -> float | None:
        """The difference as a share of ``a``."""
        return self.difference / abs(self.a) if self.difference is not None and self.a else None


@dataclass(frozen=True)
class ConfigRow:
    """One key whose value differs; ``None`` also where a run has no such key."""

    stage: str
    key: str
    a: Any
    b: Any


def compare_runs(a: Sequence[StageSummary], b: Sequence[StageSummary]) -> list[MetricRow]:
    """Match the metrics of two runs by stage, task, subject and name, in the order in which they were measured."""
    first, second = _metrics(a), _metrics(b)
    rows = []
    for key in [*first, *(key for key in second if key not in first)]:
        left, right = first.get(key), second.get(key)
        example = left or second[key]
        rows.append(
            MetricRow(
                *key,
                unit=example.unit,
                better=example.better,
                kind=example.kind,
                a=left.value if left else None,
                b=right.value if right else None,
            )
        )
    return rows


def compare_configs(a: Sequence[StageSummary], b: Sequence[StageSummary]) -> list[ConfigRow]:
    """The keys of seed, inputs and configuration that differ, stage by stage."""
    first, second = _configs(a), _configs(b)
    keys = [*first, *(key for key in second if key not in first)]
    return [ConfigRow(*key, first.get(key), second.get(key)) for key in keys if first.get(key) != second.get(key)]


def metric_cells(rows: Sequence[MetricRow]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Column titles and rows of text, for a terminal.

    >>> row = MetricRow("evaluate", "perplexity", "after", "perplexity", "", "lower", "figure", 25.0, 24.5)
    >>> metric_cells([row])[1]
    [('evaluate', 'perplexity', 'after', 'perplexity', '25.00', '24.50', '-0.50', '-2.0 %')]
    """
    cells: list[tuple[str, ...]] = []
    for row in rows:
        scale = numbers.scale_for([row.a, row.b], row.unit, finest=row.difference)
        name = f"{row.metric} ({scale.unit})" if scale.unit else row.metric
        difference = "–" if row.difference is None else scale.text(row.difference, sign=True)
        relative = numbers.percent(row.relative, sign=True)
        cells.append(
            (row.stage, row.task, row.subject, name, scale.text(row.a), scale.text(row.b), difference, relative)
        )
    return ("stage", "task", "subject", "metric", "A", "B", "B - A", "change"), cells


def config_cells(rows: Sequence[ConfigRow]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Column titles and rows of text, for a terminal.

    >>> config_cells([ConfigRow("lora", "rank", 8, None)])[1]
    [('lora', 'rank', '8', '–')]
    """
    cells = [(row.stage, row.key, *("–" if value is None else str(value) for value in (row.a, row.b))) for row in rows]
    return ("stage", "key", "A", "B"), cells


def _named(summaries: Sequence[StageSummary]) -> Iterator[tuple[str, StageSummary]]:
    seen: dict[str, int] = {}
    for summary in summaries:
        count = seen[summary.stage] = seen.get(summary.stage, 0) + 1
        yield summary.stage if count == 1 else f"{summary.stage} {count}", summary


def _metrics(summaries: Sequence[StageSummary]) -> dict[tuple[str, str, str, str], Metric]:
    return {
        (stage, result.task, result.subject, metric.name): metric
        for stage, summary in _named(summaries)
        for result in summary.results
        for metric in result.metrics
    }


def _configs(summaries: Sequence[StageSummary]) -> dict[tuple[str, str], Any]:
    found: dict[tuple[str, str], Any] = {}
    for stage, summary in _named(summaries):
        for part in ({"seed": summary.seed}, _flat(summary.inputs), _flat(summary.config)):
            found.update({(stage, key): value for key, value in part.items()})
        found[(stage, "tenfold")] = summary.tenfold_version
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            # NaN differs from itself, and would stand in every comparison
            flat[prefix + key] = str(value) if isinstance(value, float) and math.isnan(value) else value
    return flat
