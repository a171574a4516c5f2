"""What README, docs and help tell people to type must exist."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from tenfold import cli
from tenfold.pipeline.recipe import resolve
from tenfold.pipeline.stages import verbs

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md"]


def commands():
    """Every line that begins with `tenfold` in a code block of README, docs or help, comments cut off."""
    found = [line for verb in (*cli.COMMANDS, *verbs()) for line in cli.examples(verb)]
    for page in PAGES:
        for block in re.findall(r"^```[a-z]*\n(.*?)^```", page.read_text(), re.M | re.S):
            found += [line for line in block.splitlines() if line.startswith("tenfold ")]
    return sorted(set(found))


@pytest.mark.parametrize("line", commands())
def test_every_command_parses(line, monkeypatch, tmp_path):
    verb, *arguments = shlex.split(line, comments=True)[1:]
    monkeypatch.setattr(cli, "_execute", lambda plan, out: 0)
    if verb in verbs():
        assert cli.main([verb, *arguments]) == 0
    elif verb == "run":
        path = ROOT / arguments[0]
        assert cli.main(["run", str(path), *arguments[1:]]) == 0
    else:
        assert verb in cli.COMMANDS


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), (
            f"{page.name}: {target} (options/ and results/ are written by python -m docs.generate)"
        )


RECIPES = [
    (page, block)
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.M | re.S)
    if re.search(r"^stages:", block, re.M)
]


@pytest.mark.parametrize("number", range(len(RECIPES)))
def test_the_recipes_of_the_pages_are_valid(number):
    page, block = RECIPES[number]
    assert resolve(yaml.safe_load(block), page.name).steps


def test_every_target_of_the_makefile_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"`make ([a-z-]+)`", page.read_text()):
            assert re.search(rf"^{target}:", makefile, re.M), f"{page.name}: make {target}"
