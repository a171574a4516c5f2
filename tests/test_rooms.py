"""What import-linter cannot say of the rooms."""

import ast
from pathlib import Path

import pytest

from tenfold.pipeline.stages import BUILT_IN, stages

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "tenfold").rglob("*.py"))
SHARED = [path for path in FILES if path.relative_to(ROOT).parts[1] in ("pipeline", "report", "stage", "cli.py")]
METHODS = {reference.rpartition(":")[2] for reference in BUILT_IN.values()}


def imported(path):
    """Modules that a file imports anywhere, and the names it takes from each."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, [name.name for name in node.names]
        elif isinstance(node, ast.Import):
            yield from ((name.name, []) for name in node.names)


def test_nobody_imports_a_stage():
    """They put rooms together that do not know each other, and are reached by name alone."""
    modules = {cls.run.partition(":")[0] for cls in stages().values()}
    assert all(module.endswith(".stage") for module in modules)
    for path in FILES:
        for module, names in imported(path):
            asked = {module, *(f"{module}.{name}" for name in names)}
            assert not asked & modules, f"{path} imports {asked & modules}"


@pytest.mark.parametrize("path", SHARED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shared_code_knows_no_method(path):
    """Neither its configuration nor its name: what a stage is stands on its configuration class."""
    if path.name == "stages.py":
        return  # the registry names each once
    taken = {name for _, names in imported(path) for name in names}
    assert not taken & METHODS
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            compared = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
            assert not compared & set(stages()), f"line {node.lineno} compares a method's name"


SAME_MEANING = {
    "attach",  # each method's own
    "encode",  # texts with marks, rows: to tokens, as are the next two
    "detach",
    "attached",
    "combine",  # one kernel in torch, numba and Triton
    "scores",
    "compare",  # verbs of the command line, and what they call
    "estimate",
    "run",
    "check",
}


def test_one_word_has_one_meaning():
    """No two files define a public function or class of one name, unless one stands in for the other."""
    places = {}
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    again = {name: at for name, at in places.items() if len(at) > 1 and name not in SAME_MEANING}
    assert again == {}, f"rename all but one, or add to SAME_MEANING what means the same: {again}"
