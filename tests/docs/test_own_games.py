"""The page on games of one's own runs from its first line to its last, and gives what it says."""

import doctest
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs/own_games.md"
BLOCK = re.compile(r"(<!-- not run here -->\n)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_page_runs():
    pytest.importorskip("pettingzoo")
    known, examples = {"__name__": "page"}, 0
    for number, found in enumerate(BLOCK.finditer(PAGE.read_text(encoding="utf-8"))):
        apart, block = found.groups()
        if apart:
            compile(block, PAGE.name, "exec")
        elif block.startswith(">>>"):
            runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE, verbose=False)
            test = doctest.DocTestParser().get_doctest(block, known, f"block {number}", str(PAGE), 0)
            assert runner.run(test, clear_globs=False).failed == 0
            known.update(test.globs)
            examples += len(test.examples)
        else:
            exec(compile(block, PAGE.name, "exec"), known)
    assert examples > 10
