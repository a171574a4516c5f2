"""Figures as inline SVG that follows the page: its font, its colours by day and by night.

matplotlib draws with placeholder colours; they become CSS variables with a fallback, so that the same picture reads on
paper and on a dark screen.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from tenfold.stage import numbers
from tenfold.stage.record import Figure, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

# Okabe and Ito's colours: told apart by colour-blind readers; dashes and hatches tell them apart in grey.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 2, 1.5, 2)), (0, (8, 3)), (0, (3, 1)))
HATCHES = ("", "///", "...", "xxx", "---", "\\\\\\")
INK, LINES, PAPER = "#010101", "#020202", "#030303"
VARIABLES = {
    INK: "currentColor",
    LINES: "var(--line, #8888)",
    PAPER: "var(--paper, #fff)",
    **{colour: f"var(--c{number}, {colour})" for number, colour in enumerate(COLOURS, start=1)},
}
WIDTH, HEIGHT = 5.6, 2.9
LONGEST_LABEL = 36
WIDE = 16
"""Columns of a heatmap from which it takes the whole width of the page."""
MOST_ANNOTATED = 150
"""Cells of a heatmap up to which each shows its number."""

SETTINGS = {
    "svg.fonttype": "none",  # text stays text: searchable, and in the page's font
    "text.parse_math": False,  # a dollar sign in a label is a dollar sign
    "font.size": 9.5,
    "axes.edgecolor": LINES,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": LINES,
    "grid.alpha": 0.6,
    "grid.linewidth": 0.6,
    "hatch.color": PAPER,
    "hatch.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": LINES,
    "ytick.color": LINES,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.0,
}


def draw(figure: Figure, key: str = "") -> str:
    """Draw a figure.

    Args:
        figure: the plot as data; gaps are ``None`` or not finite.
        key: tells apart two figures of equal content on one page.

    Returns:
        An ``<svg>`` element, or a ``<p>`` that says there is nothing to draw. Equal input gives equal output.

    >>> draw(Figure(kind="line", title="Loss"))
    '<p class="empty">Loss: there are no values to draw.</p>'
    """
    if not any(_finite(value) for series in figure.series for value in series.y):
        return f'<p class="empty">{escape(figure.title or "Figure")}: there are no values to draw.</p>'
    import matplotlib

    salt = hashlib.sha256((key + figure.model_dump_json()).encode()).hexdigest()[:8]
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": salt}), warnings.catch_warnings():
        # the reader's browser draws the text: a glyph that matplotlib's font lacks is not missing
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        # a plot whose labels leave it little room is still a plot
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        canvas = {"line": _line, "bar": _bar, "heatmap": _heatmap}[figure.kind](figure)
        file = io.StringIO()
        canvas.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(file.getvalue(), figure, salt)


def is_wide(figure: Figure) -> bool:
    """Whether the figure needs the whole width of the page."""
    return figure.kind == "heatmap" and len(_categories(figure)) >= WIDE


def curve_figures(metrics: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """The curves of a training from the lines of ``metrics.jsonl``.

    Training and held-out loss share a figure, which comes first; the learning rate follows, then everything else that
    was logged.

    >>> [figure.title for figure in curve_figures([{"step": 5, "loss": 2.5, "learning_rate": 1e-3}])]
    ['Loss', 'Learning rate']
    """
    names = dict.fromkeys(key for row in metrics for key, value in row.items() if numbers.is_number(value))
    for passed_over in ("step", "epoch"):
        names.pop(passed_over, None)
    losses = {"loss": "training", "eval_loss": "held-out"}
    groups: list[tuple[str, dict[str, str]]] = [
        ("Loss", {name: shown for name, shown in losses.items() if name in names}),
        ("Learning rate", {"learning_rate": "learning rate"} if "learning_rate" in names else {}),
    ]
    for name in names:
        if name not in losses and name != "learning_rate":
            shown = name.replace("_", " ")
            groups.append((shown[:1].upper() + shown[1:], {name: shown}))
    return [
        Figure(
            kind="line",
            title=title,
            x_label="step",
            y_label="nats/token" if title == "Loss" else "",
            series=tuple(_curve(metrics, name, shown) for name, shown in members.items()),
        )
        for title, members in groups
        if members
    ]


def _curve(metrics: Sequence[Mapping[str, Any]], name: str, shown: str) -> Series:
    points = [(row["step"], row[name]) for row in metrics if name in row and numbers.is_number(row.get("step"))]
    values = tuple(float(y) if numbers.is_number(y) and _finite(y) else None for _, y in points)
    return Series(name=shown, x=tuple(float(x) for x, _ in points), y=values)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _gaps(values: Iterable[float | None]) -> list[float]:
    return [value if value is not None and math.isfinite(value) else math.nan for value in values]


def _clean(text: str) -> str:
    """Without the control characters that XML forbids."""
    return re.sub(r"[\x00-\x1f\x7f\ufffe\uffff]", " ", text)


def _short(text: str) -> str:
    """As much of a label as leaves room for the plot; the description holds all of it."""
    text = _clean(text)
    return text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 1]}…"


def _axes(figure: Figure, width: float = WIDTH, height: float = HEIGHT) -> tuple[Canvas, Axes]:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(width, height), layout="constrained")
    canvas.patch.set_visible(False)
    axes = canvas.add_subplot()
    axes.patch.set_visible(False)
    axes.set_xlabel(_short(figure.x_label))
    axes.set_ylabel(_short(figure.y_label))
    axes.tick_params(length=0)
    return canvas, axes


def _categories(figure: Figure) -> list[str]:
    """The labels of the x axis in order of appearance; none where all x are numbers."""
    values = [x for series in figure.series for x in series.x]
    if figure.kind == "line" and not any(isinstance(x, str) for x in values):
        return []
    return list(dict.fromkeys(_label(x) for x in values))


def _label(x: float | str) -> str:
    return x if isinstance(x, str) else f"{x:g}"


def _label_categories(axes: Axes, labels: Sequence[str], width: float = WIDTH) -> None:
    """Write the labels below their places: level where they have room, slanted where not, thinned if need be."""
    room = (width - 1.2) * 72 / len(labels)
    step = max(1, math.ceil(13 / room))
    shown = [_short(label) for label in labels]
    axes.set_xticks(range(0, len(labels), step), shown[::step])
    if max(map(len, shown)) * 5.2 + 4 > room * step:
        axes.tick_params(axis="x", rotation=40)
        for text in axes.get_xticklabels():
            text.set_horizontalalignment("right")
            text.set_rotation_mode("anchor")


def _legend(axes: Axes, series: Sequence[Series]) -> None:
    if len(series) > 1:
        columns = min(len(series), 4)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, handlelength=1.8, borderpad=0.1)


def _line(figure: Figure) -> Canvas:
    from matplotlib.ticker import MaxNLocator

    canvas, axes = _axes(figure)
    places = {label: place for place, label in enumerate(_categories(figure))}
    for number, series in enumerate(figure.series):
        x = [places[_label(value)] if places else float(value) for value in series.x]
        y = _gaps(series.y)
        colour = COLOURS[number % len(COLOURS)]
        dash = DASHES[number % len(DASHES)]
        alone = [i for i in range(len(y)) if not math.isnan(y[i]) and _isolated(y, i)]
        axes.plot(
            x,
            y,
            color=colour,
            linestyle=dash,
            marker="o",
            # a point without neighbours has no line to be seen by
            markevery=None if len(y) <= 16 else alone,
            label=_short(series.name) or " ",
        )
        if series.low is not None and series.high is not None:
            axes.fill_between(x, _gaps(series.low), _gaps(series.high), color=colour, alpha=0.18, linewidth=0)
    if places:
        _label_categories(axes, list(places))
    elif all(float(value).is_integer() for series in figure.series for value in series.x if _finite(float(value))):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    _legend(axes, figure.series)
    return canvas


def _isolated(y: Sequence[float], i: int) -> bool:
    return (i == 0 or math.isnan(y[i - 1])) and (i + 1 == len(y) or math.isnan(y[i + 1]))


def _bar(figure: Figure) -> Canvas:
    canvas, axes = _axes(figure)
    labels = _categories(figure)
    places = {label: place for place, label in enumerate(labels)}
    width = 0.8 / len(figure.series)
    for number, series in enumerate(figure.series):
        x = [places[_label(value)] + (number - (len(figure.series) - 1) / 2) * width for value in series.x]
        y = _gaps(series.y)
        axes.bar(
            x,
            y,
            width=width * 0.92,
            color=COLOURS[number % len(COLOURS)],
            hatch=HATCHES[number % len(HATCHES)],
            edgecolor=PAPER,
            linewidth=0,
            label=_short(series.name) or " ",
        )
        if series.low is not None and series.high is not None:
            low = [max(0.0, value - end) for value, end in zip(y, _gaps(series.low), strict=True)]
            high = [max(0.0, end - value) for value, end in zip(y, _gaps(series.high), strict=True)]
            axes.errorbar(x, y, yerr=[low, high], fmt="none", ecolor=INK, elinewidth=1.2, capsize=3)
    _label_categories(axes, labels)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    _legend(axes, figure.series)
    return canvas


def _heatmap(figure: Figure) -> Canvas:
    """Cells whose opacity is the value: they read on any ground. Negative values take the second colour."""
    from matplotlib.patches import Rectangle

    columns, rows = _categories(figure), figure.series
    width = 10.6 if is_wide(figure) else WIDTH
    canvas, axes = _axes(figure, width, 1.1 + 0.27 * len(rows))
    axes.grid(False)
    places = {label: place for place, label in enumerate(columns)}
    values = [value for series in rows for value in series.y if value is not None and math.isfinite(value)]
    largest = figure.full or max(abs(value) for value in values) or 1.0
    scale = numbers.scale_for(values)
    room = (width - 1.2) * 72 / len(columns)
    longest = max(len(scale.text(value)) for value in values)
    annotated = len(rows) * len(columns) <= MOST_ANNOTATED and longest * 5.2 < room
    for place, series in enumerate(rows):
        for x, value in zip(series.x, _gaps(series.y), strict=True):
            left = places[_label(x)]
            if math.isnan(value):
                axes.text(left, place, "·", ha="center", va="center", color=LINES)
                continue
            strength = min(1.0, 0.04 + 0.96 * abs(value) / largest)
            colour = COLOURS[0] if value >= 0 else COLOURS[1]
            cell = Rectangle((left - 0.47, place - 0.46), 0.94, 0.92, facecolor=colour, alpha=strength, linewidth=0)
            axes.add_patch(cell)
            if annotated:
                ink = PAPER if strength > 0.68 else INK
                axes.text(left, place, scale.text(value), ha="center", va="center", color=ink, fontsize=8)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [_short(series.name) for series in rows])
    _label_categories(axes, columns, width)
    axes.spines[:].set_visible(False)
    if not annotated:
        _scale_bar(canvas, axes, min(values), figure.full or max(values), largest)
    return canvas


def _scale_bar(canvas: Canvas, axes: Axes, lowest: float, highest: float, largest: float) -> None:
    from matplotlib.patches import Rectangle

    steps = 24
    bottom, top = min(lowest, 0.0), max(highest, 0.0)
    bar = axes.inset_axes((1.015, 0.0, 0.022, 1.0))
    bar.set_in_layout(True)
    bar.patch.set_visible(False)
    bar.grid(False)
    height = (top - bottom) / steps or 1.0
    for step in range(steps):
        value = bottom + (step + 0.5) * height
        colour = COLOURS[0] if value >= 0 else COLOURS[1]
        strength = min(1.0, 0.04 + 0.96 * abs(value) / largest)
        bar.add_patch(Rectangle((0, bottom + step * height), 1, height, facecolor=colour, alpha=strength, linewidth=0))
    bar.set_xlim(0, 1)
    bar.set_ylim(bottom, top if top > bottom else bottom + 1)
    bar.set_xticks([])
    ends = [bottom, top] if top > bottom else [bottom]
    scale = numbers.scale_for(ends)
    bar.set_yticks(ends, [scale.text(end) for end in ends])
    bar.yaxis.tick_right()
    bar.tick_params(length=0)
    bar.spines[:].set_visible(False)


def _inline(svg: str, figure: Figure, salt: str) -> str:
    """Make matplotlib's file an element of a page: no prologue, no foreign ids, the page's font and colours."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\n?", "", svg, flags=re.DOTALL)
    # its style sheet would hold for the whole page; the svg element carries the two settings instead
    svg = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|xlink:href="#)([^)"]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: f' id="t{salt}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(url\(#|xlink:href="#)', rf"\g<1>t{salt}-", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1; font-family: inherit", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    title = f'<title id="t{salt}">{escape(_clean(figure.title or "Figure"))}</title>'
    described = f'<desc id="d{salt}">{escape(_clean(_describe(figure)))}</desc>'
    box = re.findall(r'viewBox="[^"]+"', svg)[0]
    opening = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{box} style="stroke-linejoin: round; stroke-linecap: butt" role="img" '
        f'aria-labelledby="t{salt}" aria-describedby="d{salt}">'
    )
    return opening + title + described + svg[svg.index(">") + 1 :]


def _describe(figure: Figure) -> str:
    """The figure in words, for those who do not see it."""
    parts = []
    for series in figure.series:
        known = [value for value in series.y if value is not None and math.isfinite(value)]
        if not known:
            parts.append(f"{series.name}: no values")
            continue
        scale = numbers.scale_for(known)
        first, last, low, high = (scale.text(value) for value in (known[0], known[-1], min(known), max(known)))
        parts.append(f"{series.name}: {len(known)} values from {first} to {last}, lowest {low}, highest {high}")
    return f"{figure.kind} plot. " + "; ".join(parts) + "."
