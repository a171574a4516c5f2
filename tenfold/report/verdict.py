"""What changed between the model before and after, whether it is clear, and how to say so in a sentence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tenfold.report.thresholds import Threshold, is_bytes, is_counted, threshold
from tenfold.stage import numbers
from tenfold.stage.record import StageSummary
from tenfold.stage.results import Metric, Result

BEFORE, AFTER, DIFFERENCE = "before", "after", "after - before"

Outcome = Literal["better", "worse", "changed", "no clear change", "too small to matter", "unchanged", "not compared"]

LIKELIHOOD = frozenset({"perplexity", "loss", "nll", "bits per byte"})
"""Each is a monotone function of the same log-likelihood: a paired difference of one decides all."""

VIEWS = (LIKELIHOOD | {"perplexity ratio", "nll difference"}, frozenset({"prefill", "time to first token"}))
"""Names of one phenomenon each: the first of them that a task lists decides for the others."""


@dataclass(frozen=True)
class Change:
    """One metric of one task, for every subject."""

    task: str
    name: str
    unit: str
    better: Literal["lower", "higher", "neither"]
    kind: Literal["figure", "timing", "memory"]
    subjects: Mapping[str, Metric]
    """Subject -> metric; differences excepted."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    held_out: bool = False
    """Whether it was measured on rows that no stage trained on."""
    paired: Metric | None = None
    """The measured difference ``after - before``, token by token or item by item."""
    difference: float | None = None
    """After minus before, in ``unit``."""
    relative: float | None = None
    """The difference as a share of the value before."""
    interval: tuple[float, float] | None = None
    """A 95 % interval of ``difference``, in ``unit``: of the paired difference where one was measured."""
    matters: Threshold | None = None
    """The smallest change that is called better or worse."""
    outcome: Outcome = "not compared"

    @property
    def before(self) -> Metric | None:
        """The metric of the model that the recipe started from."""
        return self.subjects.get(BEFORE)

    @property
    def after(self) -> Metric | None:
        """The metric of the model that the stages made."""
        return self.subjects.get(AFTER)


@dataclass(frozen=True)
class Sentence:
    """One sentence of the verdict."""

    text: str
    outcome: Outcome


def changes(results: Iterable[Result], *, held_out: bool = False) -> list[Change]:
    """Put the subjects of each metric side by side and judge the change.

    A change is better or worse when the 95 % interval of the paired difference (without one, of the difference of two
    independent values) leaves out zero *and* the change is one that matters (`tenfold.report.thresholds`). Where no
    spread is known it is only "changed", sizes that were counted excepted: they are exact.

    Args:
        results: of one stage.
        held_out: whether its rows are the held-out share of the data.

    >>> def speed(subject, value):
    ...     metric = Metric(name="prefill", value=value, stderr=0.1, better="higher", kind="timing")
    ...     return Result(task="speed", subject=subject, metrics=(metric,))
    >>> [changes([speed("before", 100.0), speed("after", after)])[0].outcome for after in (100.1, 102.0, 110.0)]
    ['no clear change', 'too small to matter', 'better']
    """
    found: dict[tuple[str, str], dict[str, Metric]] = {}
    settings: dict[str, dict[str, Any]] = {}
    differences: dict[str, dict[str, Metric]] = {}
    for result in results:
        settings.setdefault(result.task, {}).update(result.settings)
        for metric in result.metrics:
            if result.subject == DIFFERENCE:
                differences.setdefault(result.task, {})[metric.name] = metric
            else:
                found.setdefault((result.task, metric.name), {})[result.subject] = metric
    for task, metrics in differences.items():
        for name in metrics:
            # The row of the metric itself shows its difference.
            if not {BEFORE, AFTER} <= set(found.get((task, name.removesuffix("_difference")), ())):
                found.setdefault((task, name), {})
    judged = []
    for (task, name), subjects in found.items():
        item = _judge(task, name, subjects, differences.get(task, {}), found.get((task, "nll"), {}).get(BEFORE))
        own_rows = held_out and item.kind == "figure" and not task.startswith("lm_eval:")
        judged.append(replace(item, settings=settings[task], held_out=own_rows))
    return _agreed(judged)


def _judge(
    task: str, name: str, subjects: Mapping[str, Metric], paired: Mapping[str, Metric], nll: Metric | None
) -> Change:
    own = paired.get(name)
    decides = own or paired.get(f"{name}_difference") or _likelihood(name, paired)
    example = subjects.get(AFTER) or next(iter(subjects.values()), None) or paired[name]
    before, after = subjects.get(BEFORE), subjects.get(AFTER)
    difference = relative = interval = matters = None
    outcome: Outcome = "not compared"
    if before is not None and after is not None:
        difference = after.value - before.value
        # Of log-odds and the like, which may be negative, a share says nothing.
        relative = difference / before.value if before.value > 0 and after.value >= 0 else None
        interval = _paired(decides, before, nll) if decides is not None else _independent(before, after, difference)
        matters = threshold(before, after)
        outcome = _outcome(difference, interval, matters.of(before.value), example)
    elif own is not None:
        difference, interval, still = own.value, _interval(own), standstill(own.name)
        if still is not None:
            moved = (interval[0] - still, interval[1] - still) if interval else None
            size = own.model_copy(update={"value": abs(own.value)})  # a loss of a share matters as a gain does
            matters = threshold(size, size)
            outcome = _outcome(difference - still, moved, matters.of(still), own)
    return Change(
        task=task,
        name=name,
        unit=example.unit,
        better=example.better,
        kind=example.kind,
        subjects=subjects,
        paired=decides,
        difference=difference,
        relative=relative,
        interval=interval,
        matters=matters,
        outcome=outcome,
    )


def _agreed(items: Sequence[Change]) -> list[Change]:
    """The same items, with one outcome for all views of one phenomenon: near a threshold they could differ."""
    decided: dict[tuple[str, int], Outcome] = {}
    agreed = []
    for item in items:
        view = next((index for index, names in enumerate(VIEWS) if _plain(item.name) in names), None)
        if view is not None and item.outcome != "not compared":
            agreed.append(replace(item, outcome=decided.setdefault((item.task, view), item.outcome)))
        else:
            agreed.append(item)
    return agreed


def standstill(name: str) -> float | None:
    """The value of a paired figure when nothing changed; ``None`` where its name does not tell.

    >>> standstill("perplexity_ratio"), standstill("nll_difference"), standstill("tokens_improved")
    (1.0, 0.0, None)
    """
    words = _plain(name).split()
    if "ratio" in words:
        return 1.0
    return 0.0 if "difference" in words or _plain(name) in LIKELIHOOD else None


def _plain(name: str) -> str:
    return name.replace("_", " ").replace("/", " per ").lower()


def _likelihood(name: str, paired: Mapping[str, Metric]) -> Metric | None:
    if _plain(name) not in LIKELIHOOD:
        return None
    return next((metric for metric in paired.values() if metric.unit == "nats/token"), None)


def _paired(decides: Metric, before: Metric, nll: Metric | None) -> tuple[float, float] | None:
    """The interval of a paired difference in the unit of the metric that it decides.

    Perplexity is exp(NLL), so a difference of d nats moves it by ``before * (exp(d) - 1)``; bits per byte are NLL times
    a constant of the text.
    """
    interval = _interval(decides)
    name = _plain(before.name)
    if interval is None or name not in LIKELIHOOD or decides.unit in ("", before.unit):
        return interval
    if name == "perplexity":
        return before.value * math.expm1(interval[0]), before.value * math.expm1(interval[1])
    if nll is None or not nll.value:
        return None
    scale = before.value / nll.value
    return interval[0] * scale, interval[1] * scale


def _interval(metric: Metric) -> tuple[float, float] | None:
    if metric.interval is not None:
        return metric.interval
    if metric.stderr is not None:
        return metric.value - 1.96 * metric.stderr, metric.value + 1.96 * metric.stderr
    return None


def half_width(metric: Metric) -> float | None:
    """Half the width of the 95 % interval of a metric, where one is known."""
    interval = _interval(metric)
    return (interval[1] - interval[0]) / 2 if interval else None


def _independent(before: Metric, after: Metric, difference: float) -> tuple[float, float] | None:
    widths = half_width(before), half_width(after)
    if widths[0] is None or widths[1] is None:
        return None
    width = math.hypot(widths[0], widths[1])
    return difference - width, difference + width


def _outcome(difference: float, interval: tuple[float, float] | None, matters: float, metric: Metric) -> Outcome:
    if difference == 0:
        return "unchanged"
    if not math.isfinite(difference):
        return "changed"
    if interval is not None and interval[0] <= 0 <= interval[1]:
        return "no clear change"
    if abs(difference) < matters:
        return "too small to matter"
    if metric.better == "neither" or (interval is None and not is_counted(metric)):
        return "changed"
    return "better" if (difference < 0) == (metric.better == "lower") else "worse"


def headlines(summaries: Sequence[StageSummary]) -> list[Change]:
    """The comparisons that speak for the run, most important first.

    The first metric of each task speaks for it, each timing (tails apart) and each size for itself; where several
    stages measured a task, the last one does.
    """
    latest: dict[str, list[Change]] = {}
    for summary in summaries:
        held_out = summary.config.get("split") == "held-out"
        groups = by_task(changes(summary.results, held_out=held_out))
        latest.update({task: group for task, group in groups.items() if any(map(_is_compared, group))})
    items = [item for group in latest.values() for item in _speakers(group)]
    return sorted(items, key=lambda item: ("figure", "timing", "memory").index(item.kind))


def verdict(summaries: Sequence[StageSummary]) -> list[Sentence]:
    """What the run bought and what it cost, most important first; what did not change for certain shares a sentence."""
    items = headlines(summaries)
    clear = [item for item in items if item.outcome in ("better", "worse", "changed")]
    sentences = [Sentence(describe_change(item), item.outcome) for item in clear]
    quiet: tuple[Outcome, ...] = ("no clear change", "too small to matter")
    for outcome in quiet:
        steady = [item for item in items if item.outcome == outcome]
        if steady:
            values = "; ".join(_values(item) for item in steady)
            sentences.append(Sentence(f"{outcome.capitalize()}: {values}.", outcome))
    same = [item for item in items if item.outcome == "unchanged" and item.after is not None]
    if same:
        values = "; ".join(
            f"{label(item)} {numbers.quantity(item.after.value, item.unit)}" for item in same if item.after
        )
        sentences.append(Sentence(f"Unchanged: {values}.", "unchanged"))
    return sentences + _cost(summaries)


def by_task(items: Iterable[Change]) -> dict[str, list[Change]]:
    """The comparisons grouped by task, in order."""
    groups: dict[str, list[Change]] = {}
    for item in items:
        groups.setdefault(item.task, []).append(item)
    return groups


def _speakers(group: Sequence[Change]) -> list[Change]:
    compared = [item for item in group if _is_compared(item) and item.better != "neither"]
    measured = [item for item in compared if _is_cost(item) and "p95" not in item.name]
    return measured or compared[:1]


def _is_compared(item: Change) -> bool:
    return item.before is not None and item.after is not None


def _is_cost(item: Change) -> bool:
    return item.kind != "figure" or is_bytes(item.unit)


def label(item: Change) -> str:
    """The metric's name as a reader says it: ``held-out perplexity``, ``accuracy (quiz)``, ``prefill``."""
    name, task = item.name.replace("_", " "), item.task.replace("_", " ")
    if item.kind != "timing" and task not in name:
        name = f"{name} ({task})"
    return f"held-out {name}" if item.held_out and not _is_cost(item) else name


def _values(item: Change) -> str:
    before, after = item.subjects[BEFORE].value, item.subjects[AFTER].value
    scale = numbers.scale_for([before, after], item.unit, finest=item.difference)
    change = f" ({numbers.percent(item.relative, sign=True)})" if item.relative is not None else ""
    return f"{label(item)} {scale.text(before)} → {scale.quantity(after)}{change}"


def describe_change(item: Change) -> str:
    """A sentence for one clear change.

    >>> before, after = (Metric(name="accuracy", value=v, stderr=0.02, better="higher") for v in (0.5, 0.75))
    >>> describe_change(changes([Result(task="quiz", subject=s, metrics=(m,)) for s, m in (("before", before),
    ...                                                                             ("after", after))])[0])
    'Accuracy (quiz) 0.500 → 0.750 (+50.0 %), difference +0.250 [+0.195, +0.305]: better.'
    """
    text = _values(item)
    if item.difference is not None and item.interval is not None:
        scale = numbers.scale_for([item.difference, *item.interval], item.unit)
        low, high = (scale.text(end, sign=True) for end in item.interval)
        text += f", difference {scale.quantity(item.difference, sign=True)} [{low}, {high}]"
    ending = {"better": ": better.", "worse": ": worse."}.get(item.outcome, ".")
    return text[0].upper() + text[1:] + ending


def _cost(summaries: Sequence[StageSummary]) -> list[Sentence]:
    sentences = []
    for summary in summaries:
        touched = {key.replace("_", " "): value for key, value in summary.attached.items()}
        count, share = touched.get("trainable parameters"), touched.get("share of the model")
        if isinstance(count, int):
            of = f", {numbers.percent(share)} of the model" if isinstance(share, float) else ""
            sentences.append(Sentence(f"The stage {summary.stage} trained {count:,} parameters{of}.", "not compared"))
    return sentences
