"""Pictures of results, as plain SVG from the rows of the benchmarks: the same bytes on every machine."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
BLUE, ORANGE, GREY, INK = "#1f6feb", "#c2570c", "#8b949e", "#24292f"
Point = tuple[float, float]


def gear() -> str:
    """Left: what a packed cache costs in quality, by its bits. Right: what it saves in time, by the context."""
    rows = _rows("gear.jsonl")
    tested = [row for row in rows if row["part"] == "quality" and row["kind"] == "documents"]
    timed = [row for row in rows if row["part"] == "decode" and row["dtype"] == "bfloat16"]

    def same(name: str) -> Point:
        mine = [row for row in tested if row["cache"] == name]
        return statistics.mean(row["bits"] for row in mine), 100 * statistics.mean(row["agrees"] for row in mine)

    def time(name: str) -> list[Point]:
        found = sorted((row["context"], statistics.median(row["seconds"])) for row in timed if row["cache"] == name)
        return [(math.log2(context), 1000 * seconds) for context, seconds in found]

    left = Panel(70, "same most probable token, %", "bits a number (exact: 32)", (2, 7), (70, 100), (210, 240))
    kinds = (("gear:N", BLUE, "gear"), ("codes alone", GREY, "plain"), ("paper's GEAR", ORANGE, "gear-full"))
    for label, colour, kind in kinds:
        left.line([same(f"{kind}:{bits}") for bits in (2, 3, 4)], colour, label)
    right = Panel(
        490, "milliseconds a token", "tokens of context", (10, 14), (0, 400), (20, 100), lambda x: f"{2**x:,.0f}"
    )
    for label, colour, kind in (("exact cache", GREY, "DynamicCache"), ("gear:4", BLUE, "gear:4")):
        right.line(time(kind), colour, label)
    title = "What a packed cache costs, and what it saves (embedded model, 2 CPU cores)"
    return _svg(title, 860, 360, [*left.parts(range(2, 8), range(70, 101, 10)),
                                  *right.parts(range(10, 15), range(0, 401, 100))])  # fmt: skip


def pasta() -> str:
    """What emphasis changes: bars of plain, emphasised by the paper's factor, and gently."""
    rows = [row for row in _rows("pasta.jsonl") if row["part"] == "effect"]
    profile = next(row["profile"] for row in reversed(rows))
    mine = [row for row in rows if row["profile"] == profile]
    right = {(row["task"], row["setting"]): 100 * statistics.mean(row["right"]) for row in mine}
    tasks = (
        ("prompt", "new fact believed"),
        ("paraphrase", "asked in other words"),
        ("neighborhood", "other facts kept"),
        ("json", "answers in JSON"),
        ("pronouns", "pronouns changed"),
    )
    settings = (
        ("plain", GREY, "plain"),
        ("default", BLUE, "alpha 0.01 (paper)"),
        ("default, dose 0.3", ORANGE, "target mass 0.3"),
    )
    parts, top, wide, left = [], 70, 560, 210
    for index, (_, colour, label) in enumerate(settings):
        x = left + 200 * index
        parts += [f'<rect x="{x}" y="40" width="14" height="14" fill="{colour}"/>', _text(x + 20, 52, label)]
    for index, (task, said) in enumerate(tasks):
        y = top + 84 * index
        parts.append(_text(left - 12, y + 38, said, "end"))
        for row, (setting, colour, _) in enumerate(settings):
            value = right[task, setting]
            bar = f'<rect x="{left}" y="{y + 22 * row}" width="{wide * value / 100:.1f}" height="18" fill="{colour}"/>'
            parts += [bar, _text(left + wide * value / 100 + 8, y + 22 * row + 14, f"{value:g} %")]
    return _svg("200 items each: the share that is right (embedded model)", 860, top + 84 * len(tasks), parts)


PICTURES: dict[str, Callable[[], str]] = {"gear-results": gear, "pasta-results": pasta}


class Panel:
    """One chart of lines: `line` collects, `parts` draws.

    Args:
        left: where its plot begins, in pixels.
        title: what the heights are.
        below: what the widths are.
        widths: first and last value across.
        heights: lowest and highest value.
        legend: where the names of the lines stand, in pixels from `left` and from above.
        called: how a value across is written.
    """

    def __init__(self, left: int, title: str, below: str, widths: Point, heights: Point, legend: Point,
                 called: Callable[[float], str] = str) -> None:  # fmt: skip
        self.left, self.title, self.below, self.called = left, title, below, called
        self.widths, self.heights, self.legend = widths, heights, (left + legend[0], legend[1])
        self.lines: list[str] = []

    def line(self, points: Sequence[Point], colour: str, label: str) -> None:
        """Add a line, and its name to the legend."""
        places = [self._place(*point) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        self.lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        self.lines += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>' for x, y in places]
        x, y = self.legend
        self.lines.append(_text(x, y, label, colour=colour))
        self.legend = x, y + 22

    def parts(self, across: Sequence[float], up: Sequence[float]) -> list[str]:
        """The chart, with marks at these values."""
        drawn = [_text(self.left - 40, 62, self.title), _text(self.left + 165, 344, self.below, "middle")]
        for value in up:
            y = self._place(self.widths[0], value)[1]
            drawn.append(f'<line x1="{self.left}" x2="{self.left + 330}" y1="{y:.1f}" y2="{y:.1f}" stroke="#d0d7de"/>')
            drawn.append(_text(self.left - 8, y + 5, str(value), "end"))
        drawn += [_text(self._place(x, self.heights[0])[0], 320, self.called(x), "middle") for x in across]
        return [*drawn, *self.lines]

    def _place(self, x: float, y: float) -> Point:
        (first, last), (low, high) = self.widths, self.heights
        return self.left + 330 * (x - first) / (last - first), 300 - 220 * (y - low) / (high - low)


def _rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def _text(x: float, y: float, words: str, anchor: str = "start", colour: str = INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'


def _svg(title: str, width: int, height: int, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="15"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    paper = f'<rect width="{width}" height="{height}" fill="white"/>'
    shown = f'<text x="20" y="26" font-size="17" font-weight="bold" fill="{INK}">{escape(title)}</text>'
    return "\n".join([head, f"<title>{escape(title)}</title>", paper, shown, *parts, "</svg>", ""])
