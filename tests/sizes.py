"""Refuse files that nobody reads to the end: 500 lines for a method, 600 for anything else, 60 for a function."""

import ast
import sys
from pathlib import Path

METHOD_ROOMS = ("adapt", "attend", "cache", "compress", "align", "arena", "robust")


def too_long(root: Path) -> list[str]:
    """One line per offence."""
    found = []
    for path in sorted(root.glob("tenfold/**/*.py")):
        text = path.read_text(encoding="utf-8")
        limit = 500 if path.relative_to(root).parts[1] in METHOD_ROOMS else 600
        lines = len(text.splitlines())
        if lines > limit:
            found.append(f"{path}: {lines} lines, the ceiling is {limit}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                if length > 60:
                    found.append(f"{path}:{node.lineno}: {node.name} has {length} lines, the ceiling is 60")
    return found


if __name__ == "__main__":
    problems = too_long(Path(__file__).parents[1])
    print("\n".join(problems) or "file and function sizes: fine")
    sys.exit(bool(problems))
