"""How the package is built: what import-linter cannot say."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WAITING: set[str] = {"average_bits", "best_gamma"}
"""Public names that nothing uses yet, and who will: `compress.fpx`."""


def modules(root: Path) -> dict[str, Path]:
    """The files of the package by the name they are imported under."""
    found = {}
    for path in sorted((root / "tenfold").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """Every import of a file, also within functions and for types alone: a module, and a name in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((each.name, None) for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "the graph is read from absolute imports"
            yield from ((node.module or "", each.name) for each in node.names)


def graph(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """By file, the files that it imports."""
    found: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for module, member in imported(ast.parse(path.read_text(encoding="utf-8"))):
            target = f"{module}.{member}" if f"{module}.{member}" in files else module
            if target in files:
                found[name].add(target)
    return found


def circle(edges: Mapping[str, set[str]]) -> list[str]:
    """Files that import each other in a ring; none where there is no such ring."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_circles_between_files():
    """Also none that a lazy import hides: whoever reads one file of a ring has to read them all."""
    edges = graph(modules(ROOT))
    assert sum(map(len, edges.values())) > 500  # it was read
    assert circle(edges) == []


@pytest.mark.parametrize(
    "line", ["import tenfold.two", "from tenfold import two", "def f():\n    from tenfold.two import name"]
)
def test_a_circle_is_seen_however_it_is_imported(tmp_path, line):
    (tmp_path / "tenfold").mkdir()
    (tmp_path / "tenfold" / "__init__.py").touch()
    (tmp_path / "tenfold" / "one.py").write_text(line)
    (tmp_path / "tenfold" / "two.py").write_text("from tenfold.one import name")
    assert set(circle(graph(modules(tmp_path)))) == {"tenfold.one", "tenfold.two"}


def unused(root: Path) -> set[str]:
    """Public functions and classes that no code of the package or of benchmarks names, and no page."""
    defined, named = set(), set()
    for path in [*root.glob("tenfold/**/*.py"), *root.glob("benchmarks/**/*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.is_relative_to(root / "tenfold"):
            defined |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Name | ast.Attribute):
                named.add(node.id if isinstance(node, ast.Name) else node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and ":" in node.value:
                named.add(node.value.rpartition(":")[2])  # "tenfold.cache.gear.stage:run_gear"
    for page in {root / "README.md", *root.glob("docs/**/*.md")} - {root / "docs/decisions.md"}:
        if page.exists():
            named |= set(re.findall(r"\w+", page.read_text(encoding="utf-8")))
    return {name for name in defined - named if not name.startswith("_")}


def test_what_is_public_is_used_or_shown():
    assert unused(ROOT) == WAITING


def test_what_only_a_reexport_and_its_own_definition_name_is_unused(tmp_path):
    (tmp_path / "tenfold").mkdir()
    (tmp_path / "tenfold" / "__init__.py").write_text("from tenfold.one import idle")
    (tmp_path / "tenfold" / "one.py").write_text(
        "def idle(): ...\ndef called(): ...\ncalled()\nRUN = 'one:stage'\ndef stage(): ..."
    )
    assert unused(tmp_path) == {"idle"}
