"""Write the pages that can be computed: options, command line, recipe, results, and pictures of results.

    python -m docs.generate            # all of them, where they changed
    python -m docs.generate options    # those whose path contains a word

`make docs` does the first. `tests/docs/test_generated.py` fails where a page is not what this would write.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from docs import architectures, measured, pictures, reference

DOCS = Path(__file__).parent


def pages() -> dict[str, Callable[[], str]]:
    """Path within docs -> what writes its text."""
    found: dict[str, Callable[[], str]] = {
        "reference/command-line.md": reference.command_line,
        "reference/recipe.md": reference.recipe,
        "models.md": architectures.page,
    }
    found |= {f"options/{name}.md": partial(reference.options, name) for name in reference.described()}
    found |= {f"results/{name}.md": partial(measured.results, name) for name in measured.TABLES}
    return found | {f"pictures/{name}.svg": draw for name, draw in pictures.PICTURES.items()}


def text(path: str) -> str:
    """A page as it has to be, with the remark that it is not to be edited."""
    written = pages()[path]()
    if path.endswith(".svg"):
        return written
    notes = DOCS / "results/notes" / Path(path).name
    source = (
        f"and docs/{notes.relative_to(DOCS)}" if path.startswith("results/") and notes.exists() else "and docstrings"
    )
    return f"<!-- Written by `python -m docs.generate` from the code {source}: edit those. -->\n\n{written}"


def main(words: Sequence[str]) -> None:
    """Write the pages whose path contains one of the words, or all."""
    for path in pages():
        if words and not any(word in path for word in words):
            continue
        file, new = DOCS / path, text(path)
        if not file.exists() or file.read_text(encoding="utf-8") != new:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(new, encoding="utf-8")
            print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
