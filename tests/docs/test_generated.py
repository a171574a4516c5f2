"""Pages that are written from code and rows are as these would write them now, and every anchor leads somewhere."""

import re
from pathlib import Path

import pytest
import yaml

from docs import generate, measured
from docs.nav import filled
from docs.reference import described, kind

DOCS = Path(generate.__file__).parent
WRITTEN = sorted(path for path in DOCS.rglob("*.md") if "notes" not in path.parts)


@pytest.mark.parametrize("path", generate.pages())
def test_page_is_up_to_date(path):
    file = DOCS / path
    assert file.exists(), f"docs/{path} is missing: python -m docs.generate writes it"
    assert file.read_text(encoding="utf-8") == generate.text(path), "python -m docs.generate writes it anew"


@pytest.mark.parametrize(("name", "stage"), described().items())
def test_every_option_is_explained(name, stage):
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", (DOCS / f"options/{name}.md").read_text(), re.MULTILINE)
    assert all(meaning for _, meaning in rows)
    assert set(stage.model_fields) <= {key for key, _ in rows}


@pytest.mark.parametrize("name", measured.TABLES)
def test_no_note_is_lost(name):
    page = (DOCS / f"results/{name}.md").read_text(encoding="utf-8")
    noted = (DOCS / f"results/notes/{name}.md").read_text(encoding="utf-8").replace("](../", "](")
    assert all(line in page for line in noted.splitlines())


def test_a_note_stands_after_the_table_of_its_heading(tmp_path, monkeypatch):
    (tmp_path / "methods").mkdir()
    (tmp_path / "results/notes").mkdir(parents=True)
    (tmp_path / "methods/toy.md").write_text("# Toy\n\ntext")
    (tmp_path / "results/notes/toy.md").write_text(
        "opening [x](../../a.md)\n\n## By hand\n\nlast\n\n## Speed\n\nfast\n"
    )
    monkeypatch.setattr(measured, "DOCS", tmp_path)
    monkeypatch.setattr(measured, "TABLES", {"toy": ("toy:table",)})
    monkeypatch.setattr(measured, "_printed", lambda reference: "\n## Size\n\nsmall\n\n## Speed\n\n3 ms\n")
    page = measured.results("toy")
    after = ["## Size", "small", "## Speed", "3 ms", "fast", "## By hand", "last\n"]
    assert page.split("\n\n") == ["# Toy: results", "opening [x](../a.md)", *after]


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, "number > 0, ≤ 1"),
        ({"anyOf": [{"enum": [2, 4]}, {"type": "null"}]}, "`2`, `4`"),
        ({"type": "array", "items": {"type": "string", "format": "path"}}, "list: path"),
        ({"anyOf": [{"type": "integer"}, {"type": "number"}]}, "number"),
        ({"type": "object", "additionalProperties": {"type": "string"}}, "names and values: text"),
    ],
)
def test_values_are_said_in_words(schema, said):
    assert kind(schema) == said


@pytest.mark.parametrize("page", [DOCS.parent / "README.md", *WRITTEN], ids=lambda path: path.name)
def test_anchors_lead_to_a_heading(page):
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
        text = ((page.parent / target) if target else page).read_text(encoding="utf-8")
        headings = [
            re.sub(r"[^\w -]", "", line).strip().lower() for line in re.findall(r"^#+ (.*)", text, re.MULTILINE)
        ]
        assert anchor in {heading.replace(" ", "-") for heading in headings}, f"{page.name}: {target}#{anchor}"


def test_the_site_lists_every_page():
    nav = filled(yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text())["nav"])
    listed = re.findall(r"[\w/-]+\.md", str(nav))
    pages = [str(path.relative_to(DOCS)) for path in WRITTEN]
    assert sorted(listed) == pages, f"put under nav in mkdocs.yml: {sorted({*pages} - {*listed})}"


@pytest.mark.parametrize("name", sorted(path.stem for path in (DOCS / "methods").glob("*.md")))
def test_a_page_of_a_method_is_short(name):
    assert len((DOCS / f"methods/{name}.md").read_text(encoding="utf-8").split()) <= 900
