"""What was measured, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from tenfold.stage.numbers import scale_for
from tenfold.stage.record import StageSummary
from tenfold.stage.results import Result

SIDES = ("before", "after", "model")
"""Subjects that have a column."""


def figures(summaries: Sequence[StageSummary]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Column titles and rows of what was measured, for the terminal: values as the report shows them.

    What stands behind a comma in a subject, such as the cache in ``model, gear:4``, goes to the task.

    >>> from tenfold.stage.results import Metric, Result
    >>> result = Result(task="speed", subject="model", metrics=(Metric(name="prefill", value=0.0312, unit="s"),))
    >>> summary = StageSummary(tenfold_version="", index=1, stage="", fingerprint="", config={}, seed=0,
    ...                        results=(result,))
    >>> figures([summary])
    (('what', 'model', 'unit'), [('speed: prefill', '31.2', 'ms')])
    >>> packed = result.model_copy(update={"subject": "model, gear:4"})
    >>> figures([summary.model_copy(update={"results": (packed,)})])[1]
    [('speed, gear:4: prefill', '31.2', 'ms')]
    """
    found: dict[tuple[str, str], tuple[dict[str, float], str]] = {}
    for summary in summaries:
        for result in summary.results:
            side, _, label = result.subject.partition(", ")
            task, subject = (f"{result.task}, {label}", side) if side in SIDES else (result.task, result.subject)
            for metric in result.metrics:
                found.setdefault((task.removesuffix(", "), metric.name), ({}, metric.unit))[0][subject] = metric.value
    shown = {key: kept for key, (values, unit) in found.items() if (kept := _sides(values, unit))}
    compared = any(before for before, _, _ in shown.values())
    rows = [
        (f"{task}: {name}", *((before, after) if compared else (after,)), unit)
        for (task, name), (before, after, unit) in shown.items()
    ]
    return ("what", *(("before", "after") if compared else ("model",)), "unit"), rows


def players(summaries: Sequence[StageSummary]) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """What was measured of several that are no model before and after: by stage a title, columns, and a row for each.

    >>> from tenfold.stage.results import Metric, Result
    >>> results = [Result(task="fighting", subject=name, metrics=(Metric(name="latency", value=value, unit="s"),))
    ...            for name, value in (("a", 0.2), ("b", 0.1))]
    >>> summary = StageSummary(tenfold_version="", index=1, stage="fighting", fingerprint="", config={}, seed=0,
    ...                        results=tuple(results))
    >>> players([summary])
    [('01-fighting', ('', 'latency, ms'), [('a', '200'), ('b', '100')])]
    """
    tables = []
    for summary in summaries:
        results = [one for one in summary.results if one.subject.partition(", ")[0] not in SIDES]
        names = dict.fromkeys(metric.name for one in results for metric in one.metrics)
        if len(results) < len(summary.results) or not results:
            continue  # of a model, and its change
        values = {name: {one.subject: one.metric(name) for one in results if _has(one, name)} for name in names}
        scales = {
            name: scale_for([metric.value for metric in of.values()], next(iter(of.values())).unit)
            for name, of in values.items()
        }
        columns = ("", *(", ".join(filter(None, (name.replace("_", " "), scales[name].unit))) for name in names))
        rows = [
            (one.subject, *(scales[name].text(one.metric(name).value) if _has(one, name) else "" for name in names))
            for one in results
        ]
        tables.append((summary.folder, columns, rows))
    return tables


def _has(result: Result, name: str) -> bool:
    return any(metric.name == name for metric in result.metrics)


def _sides(values: dict[str, float], unit: str) -> tuple[str, str, str] | None:
    """Before, after and unit as text; a model that is measured alone counts as after."""
    before, after = values.get("before"), values.get("after", values.get("model"))
    if after is None:
        return None
    scale = scale_for([before, after], unit, finest=None if before is None else after - before)
    return "" if before is None else scale.text(before), scale.text(after), scale.unit
