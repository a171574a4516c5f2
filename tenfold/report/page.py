"""The report of a run: one HTML page that needs nothing but itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tenfold.files import write_text
from tenfold.report import plots, thresholds
from tenfold.report.verdict import (
    AFTER,
    BEFORE,
    Change,
    Outcome,
    by_task,
    changes,
    half_width,
    headlines,
    label,
    standstill,
    verdict,
)
from tenfold.stage import numbers
from tenfold.stage.record import Figure, StageSummary, Table
from tenfold.stage.results import Metric

if TYPE_CHECKING:
    from jinja2 import Environment

MARKS: Mapping[Outcome, str] = {
    "better": "▲",
    "worse": "▼",
    "changed": "◆",
    "no clear change": "≈",
    "too small to matter": "≈",
    "unchanged": "=",
    "not compared": "•",
}
"""Beside every colour stands a sign and a word, for readers who do not see the colour."""

MOST_TILES = 6
NBSP = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class RunPage:
    """What the page of a run shows."""

    title: str
    recipe: str
    """The resolved recipe, as text."""
    summaries: Sequence[StageSummary]
    metrics: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Stage folder -> the lines of its ``metrics.jsonl``."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Versions and machine."""


@dataclass(frozen=True)
class Cell:
    """What a table cell shows, and the exact value behind it."""

    text: str
    spread: str = ""
    exact: str = ""


@dataclass(frozen=True)
class PageRow:
    """One metric in the table of results."""

    name: str
    unit: str
    hints: tuple[str, ...]
    """What to know about the metric: its kind, which direction is better, which change matters."""
    cells: tuple[Cell, ...]
    difference: Cell | None
    relative: str
    outcome: Outcome


@dataclass(frozen=True)
class ResultTable:
    """The metrics of one task, subjects side by side."""

    task: str
    subjects: tuple[str, ...]
    compared: bool
    rows: tuple[PageRow, ...]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class PlainTable:
    """A table of a stage: the numbers of a column share their digits."""

    title: str
    columns: tuple[tuple[str, bool], ...]
    """Title, and whether the column holds numbers."""
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Plot:
    """A drawn figure."""

    title: str
    caption: str
    wide: bool
    svg: str


@dataclass(frozen=True)
class Tile:
    """One headline number."""

    label: str
    value: str
    unit: str
    was: str
    change: str
    outcome: Outcome


@dataclass(frozen=True)
class Section:
    """One stage as the template needs it."""

    summary: StageSummary
    anchor: str
    tables: tuple[ResultTable, ...]
    figures: tuple[Plot, ...]
    curves: tuple[Plot, ...]
    more_curves: tuple[Plot, ...]
    plain_tables: tuple[PlainTable, ...]


def render(run: RunPage) -> str:
    """The page as text. Equal input gives an equal page.

    >>> page = render(RunPage("first run", "model: demo", ()))
    >>> page.startswith("<!doctype html>"), "first run" in page
    (True, True)
    """
    sections = [_section(summary, run.metrics.get(summary.folder, ())) for summary in run.summaries]
    template = _templates().get_template("report.html")
    return template.render(
        run=run,
        sections=sections,
        sentences=verdict(run.summaries),
        tiles=[_tile(item) for item in headlines(run.summaries) if item.outcome != "unchanged"][:MOST_TILES],
        seconds=sum(summary.timings.get("stage", 0.0) for summary in run.summaries),
        model=_model(run.recipe),
        data=_data(run.summaries),
    )


def write_report(
    folder: Path,
    recipe: str,
    summaries: Sequence[StageSummary],
    metrics: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    environment: Mapping[str, Any] | None = None,
    write: Callable[[Path, str], None] = write_text,
) -> Path:
    """Write ``report.html`` into a run folder.

    Args:
        folder: the run folder.
        recipe: the resolved recipe, as text.
        summaries: of the finished stages, in order.
        metrics: stage folder -> lines of its ``metrics.jsonl``, as `tenfold.report.load.load_run` gives them.
        environment: versions and machine. Default: those of the last stage.
        write: writes the page; a run's own way refuses to write over somebody else's file.

    Returns:
        The path of the page.

    >>> import tempfile
    >>> write_report(Path(tempfile.mkdtemp()), "model: demo", [], {}).name
    'report.html'
    """
    if environment is None:
        environment = summaries[-1].environment if summaries else {}
    path = folder / "report.html"
    write(path, render(RunPage(folder.resolve().name, recipe, summaries, metrics, environment)))
    return path


@cache
def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # autoescape: prompts, notes and file names are other people's text
    templates = Environment(
        loader=PackageLoader("tenfold.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["quantity"] = numbers.quantity
    templates.filters["percent"] = numbers.percent
    templates.filters["named"] = numbers.named_unit
    templates.filters["typeset"] = _typeset
    templates.globals["marks"] = MARKS
    templates.globals["thresholds"] = thresholds
    return templates


def _typeset(text: str) -> str:
    """Numbers with a true minus sign, as wide as the plus, and their per cent on the same line; words stay."""
    return re.sub(r"(?<!\w)-(?=[\d∞])", "−", text).replace(" %", f"{NBSP}%")


def _data(summaries: Sequence[StageSummary]) -> list[str]:
    """What the figures rest on: each source with the beginning of its hash; the whole of it stands further down."""
    found = [summary.inputs.get("data") for summary in summaries]
    named = [
        f"{item.get('source')} (sha256 {str(item['sha256'])[:12]})"
        for item in found
        if isinstance(item, Mapping) and "sha256" in item
    ]
    return list(dict.fromkeys(named))


def _model(recipe: str) -> str:
    try:
        values = yaml.safe_load(recipe)
    except yaml.YAMLError:
        return ""
    return str(values.get("model") or "") if isinstance(values, dict) else ""


def _section(summary: StageSummary, metrics: Sequence[Mapping[str, Any]]) -> Section:
    curves = plots.curve_figures(metrics)
    shown = [figure for figure in curves if figure.title in ("Loss", "Learning rate")]
    more = [figure for figure in curves if figure not in shown]
    return Section(
        summary=summary,
        anchor=f"stage-{summary.index}",
        tables=tuple(_table(task, items) for task, items in by_task(changes(summary.results)).items()),
        figures=_drawn(summary.figures, summary.folder),
        curves=_drawn(shown, f"{summary.folder} curves"),
        more_curves=_drawn(more, f"{summary.folder} more"),
        plain_tables=tuple(_plain(table) for table in summary.tables),
    )


def _drawn(figures: Sequence[Figure], key: str) -> tuple[Plot, ...]:
    from markupsafe import Markup

    # plots.draw escapes what it is given
    return tuple(
        Plot(figure.title, figure.caption, plots.is_wide(figure), Markup(plots.draw(figure, f"{key} {number}")))
        for number, figure in enumerate(figures)
    )


def _plain(table: Table) -> PlainTable:
    columns = [[row[place] if place < len(row) else None for row in table.rows] for place in range(len(table.columns))]
    numeric = [any(numbers.is_number(cell) for cell in cells) for cells in columns]
    scales = [numbers.scale_for(cell for cell in cells if numbers.is_number(cell)) for cells in columns]
    rows = zip(
        *([_plain_cell(cell, scale) for cell in cells] for cells, scale in zip(columns, scales, strict=True)),
        strict=True,
    )
    return PlainTable(table.title, tuple(zip(table.columns, numeric, strict=True)), tuple(rows))


def _plain_cell(cell: str | float | None, scale: numbers.Scale) -> Cell:
    if cell is None:
        return Cell("–")
    return Cell(cell) if isinstance(cell, str) else Cell(scale.text(cell), exact=numbers.exact(cell))


def _table(task: str, items: Sequence[Change]) -> ResultTable:
    subjects = list(dict.fromkeys(subject for item in items for subject in item.subjects))
    subjects.sort(key=lambda subject: {BEFORE: 0, AFTER: 1}.get(subject, 2))
    return ResultTable(
        task=task.replace("_", " "),
        subjects=tuple(subjects),
        compared=any(item.difference is not None for item in items),
        rows=tuple(_row(item, subjects) for item in items),
        settings=items[0].settings,
    )


def _row(item: Change, subjects: Sequence[str]) -> PageRow:
    values = [metric.value for metric in item.subjects.values()]
    ends = [end for metric in item.subjects.values() for end in metric.interval or ()]
    finest = _finest(item) if values else None
    scale = numbers.scale_for([*values, *ends] or [item.difference, *(item.interval or ())], item.unit, finest=finest)
    return PageRow(
        name=item.name.replace("_", " "),
        unit=scale.unit,
        hints=tuple(_hints(item)),
        cells=tuple(_cell(item.subjects.get(subject), scale) for subject in subjects),
        difference=_difference(item, scale),
        relative=numbers.percent(item.relative, sign=True) if item.relative is not None else "",
        outcome=item.outcome,
    )


def _cell(metric: Metric | None, scale: numbers.Scale) -> Cell:
    if metric is None:
        return Cell("–", exact="not measured")
    exact = numbers.exact(metric.value, metric.unit)
    if metric.count is not None:
        exact += f", {metric.count:,} observations"
    if metric.stderr is not None:
        exact += f", standard error {numbers.exact(metric.stderr)}"
    spread = ""
    if metric.interval is not None:
        low, high = metric.interval
        spread = f"[{scale.text(low)},{NBSP}{scale.text(high)}]"
        exact += f", 95 % interval {numbers.exact(low)} to {numbers.exact(high)}"
    elif metric.stderr is not None:
        width = half_width(metric)
        spread = (
            f"± {numbers.scale_for([width], metric.unit).text(width) if scale.decimals is None else scale.text(width)}"
        )
    return Cell(scale.text(metric.value), spread, exact)


def _hints(item: Change) -> Iterator[str]:
    if item.kind != "figure":
        yield item.kind
    if item.better != "neither":
        yield f"{item.better} is better"
        if item.matters is not None:
            yield f"{item.matters.text(item.unit)} matters"


def _finest(item: Change) -> float | None:
    """The smallest step that must stay visible in a row: the difference, and the width of every interval."""
    widths = [high - low for low, high in (metric.interval for metric in item.subjects.values() if metric.interval)]
    # ten times the width: its first digit is enough to tell the two ends apart
    steps = [abs(item.difference or 0), *(10 * width for width in widths)]
    return min((step for step in steps if step > 0), default=None)


def _difference(item: Change, scale: numbers.Scale) -> Cell | None:
    if item.difference is None:
        return None
    exact = numbers.exact(item.difference, item.unit)
    still = standstill(item.name) if not item.subjects else 0.0
    spread = ""
    if item.interval is not None:
        low, high = (scale.text(end, sign=still == 0) for end in item.interval)
        spread = f"[{low},{NBSP}{high}]"
        exact += f", 95 % interval {numbers.exact(item.interval[0])} to {numbers.exact(item.interval[1])}"
    return Cell(scale.text(item.difference, sign=still == 0), spread, exact)


def _tile(item: Change) -> Tile:
    before, after = item.subjects[BEFORE].value, item.subjects[AFTER].value
    scale = numbers.scale_for([before, after], item.unit, finest=item.difference)
    change = numbers.percent(item.relative, sign=True) if item.relative is not None else ""
    name = label(item)
    return Tile(
        name[:1].upper() + name[1:],
        scale.text(after),
        scale.unit,
        scale.text(before),
        change,
        item.outcome,
    )
