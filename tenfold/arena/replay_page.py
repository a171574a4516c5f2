"""A replay as one HTML file that needs nothing but itself: the games as data, and a script that draws them.

Whatever agents and files say travels as data and reaches the page as text, never as markup; the page's own policy lets
no other script run than the one that it was written with, and loads nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from html import escape
from importlib.resources import files
from itertools import groupby, pairwise
from typing import Any, Literal


def replay_page(kind: Literal["fight", "market"], title: str, data: Mapping[str, Any]) -> str:
    """The page as text. Equal input gives an equal page.

    Args:
        kind: which of the scripts in ``pages/`` draws the data.
        title: of the page, plain text.
        data: what this script reads; finite numbers, texts, lists and dictionaries.
    """
    style, body = _part("replay.css"), _part(f"{kind}.html")
    script = _part("replay.js") + _part(f"{kind}.js")
    policy = f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}"
    # as \u003c no text can end the element that it stands in; pure ASCII, also where a model wrote half a character
    games = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    name = escape(title).encode("ascii", "xmlcharrefreplace").decode()
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="color-scheme" content="light dark">
<title>{name} – tenfold replay</title>
<style>{style}</style>
</head>
<body>
{body}<noscript><p>This replay is drawn by a script of its own; please allow it to run.</p></noscript>
<script type="application/json" id="data">{games}</script>
<script>{script}</script>
</body>
</html>
"""


def _part(name: str) -> str:
    return (files("tenfold.arena") / "pages" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def packed(values: Iterable[int]) -> list[int]:
    """Integers as runs of equal steps, beginning at 0: a step, how often it comes, the next step, and so on.

    >>> packed([5, 5, 5, 8, 11])
    [5, 1, 0, 2, 3, 2]
    """
    steps = (after - before for before, after in pairwise([0, *values]))
    return [number for step, run in groupby(steps) for number in (step, sum(1 for _ in run))]


def shortened(values: Iterable[float]) -> list[float | None]:
    """Numbers with 9 digits, as much as anybody can see of them; None for what is not finite.

    >>> shortened([1 / 3, 100.0, float("inf")])
    [0.333333333, 100, None]
    """
    return [_short(float(value)) if math.isfinite(value) else None for value in values]


def _short(value: float) -> float:
    value = float(f"{value:.9g}")
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


class Pieces:
    """Texts that repeat in large parts, as places in a list of pieces: they end with a comma or a line.

    >>> pieces = Pieces()
    >>> pieces.places("You: free, health 9"), pieces.places("You: free, health 8")
    ([0, 1], [0, 2])
    >>> pieces.all
    ['You: free,', ' health 9', ' health 8']
    """

    def __init__(self) -> None:
        self._place: dict[str, int] = {}

    def places(self, text: str) -> list[int]:
        """Of the pieces of a text, which are added where they are new."""
        found = re.findall(r"[^,\n]*[,\n]|[^,\n]+", text)
        return [self._place.setdefault(piece, len(self._place)) for piece in found]

    @property
    def all(self) -> list[str]:
        """The pieces by their places."""
        return list(self._place)
