"""Pages of results: the tables of the benchmarks' rows, each under its command, with what was written about it by hand.

A method with a page and rows in `benchmarks/results/NAME.jsonl` has one. `docs/results/notes/NAME.md` holds the
hand-written part, if there is one: what stands before its first heading opens the page, a section whose heading is that
of a table follows this table, and the other sections (what no row backs) stand at the end.
"""

from __future__ import annotations

import importlib
import io
import re
from contextlib import redirect_stdout
from pathlib import Path

DOCS = Path(__file__).parent

FURTHER = {
    "adalora": ("adalora_defaults:defaults_table",),
    "pasta": ("chats:table",),
    "r3m": ("r3m_choose:table", "r3m_choose:lost"),
}
"""Method -> tables of it that stand in other benchmarks."""
TABLES = {
    path.stem: (f"{path.stem}:table", *FURTHER.get(path.stem, ()))
    for path in sorted((DOCS.parent / "benchmarks/results").glob("*.jsonl"))
    if (DOCS / f"methods/{path.stem}.md").exists()
}
"""Method -> functions of `benchmarks` that print Markdown, each table under a heading (`benchmarks.section`)."""


def results(name: str) -> str:
    """The page of a method's results."""
    tables: dict[str, str] = {}
    for reference in TABLES[name]:
        tables |= _sections(_printed(reference))[1]
    opening, notes = _sections(_noted(name))
    title = (DOCS / f"methods/{name}.md").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    parts = [f"# {title}: results", opening]
    for heading in dict.fromkeys([*tables, *notes]):
        parts += [f"## {heading}", tables.get(heading, ""), notes.get(heading, "")]
    return "\n\n".join(filter(None, parts)) + "\n"


def _printed(reference: str) -> str:
    module, _, function = reference.partition(":")
    out = io.StringIO()
    with redirect_stdout(out):
        getattr(importlib.import_module(f"benchmarks.{module}"), function)()
    return out.getvalue()


def _noted(name: str) -> str:
    """The hand-written part; its links are those of a page one folder higher."""
    notes = DOCS / f"results/notes/{name}.md"
    text = notes.read_text(encoding="utf-8") if notes.exists() else ""
    return text.replace("](../", "](")


def _sections(text: str) -> tuple[str, dict[str, str]]:
    """What stands before the first heading, and what stands under each."""
    opening, *rest = re.split(r"^## ", text, flags=re.MULTILINE)
    sections: dict[str, str] = {}
    for section in rest:
        heading, _, body = section.partition("\n")
        sections[heading] = body.strip()
    return opening.strip(), sections
