import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from tenfold.report.page import RunPage, render, write_report
from tenfold.stage.record import Figure, Sample, Series, Table
from tenfold.stage.results import Metric, Result

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects what a page holds, and that its tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def attributes(self, name):
        return [attrs[name] for _, attrs in self.tags if name in attrs]


@pytest.fixture
def run(run_stages, steps):
    return RunPage("first", "model: demo\n", run_stages, {"01-lora": steps}, run_stages[0].environment)


def test_the_page_shows_the_run(run):
    text = Page(render(run)).text
    for expected in (
        "Held-out perplexity 31.2 → 24.8 (−20.5 %), difference −6.39 [−6.78, −6.00]: better.",
        "No clear change: prefill 1,204 → 1,187 tokens/s (−1.4 %).",
        "timing · higher is better · 3.0 % matters",
        "538,000",
        "2.05 MiB",
        "3 rows were cut.",
        "± 2.0",
        "Learning rate",
        "Grad norm",
        "wraps a block",
        "9f" * 32,
        "5e" * 32,
        "8.00 GiB",
        "2.13.0",
        "3.08 min",
    ):
        assert expected in text


def test_equal_input_gives_an_equal_page(run):
    assert render(run) == render(run)


def test_the_page_needs_nothing_but_itself(run):
    text = render(run)
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    assert page.attributes("src") == []
    for address in [*page.attributes("href"), *page.attributes("xlink:href")]:
        assert address.startswith("#") or address == "01-lora/adapter"
    assert "@import" not in text
    assert set(re.findall(r"url\(([^)]+)\)", text)) == set(re.findall(r"url\((#[^)]+)\)", text))


def test_the_page_is_accessible(run):
    page = Page(render(run))
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(headings))
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert set(page.attributes("aria-labelledby")) <= set(ids)
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in page.tags if tag == "th")
    assert sum(tag == "caption" for tag, _ in page.tags) == sum(tag == "table" for tag, _ in page.tags)
    assert ("html", {"lang": "en"}) in page.tags


def test_other_peoples_text_stays_text(make_summary):
    evil = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 7 }}</pre></style></svg>"
    stage = make_summary(
        stage=evil,
        fingerprint=evil,
        tenfold_version=evil,
        config={evil: evil, "nested": {evil: [evil]}},
        inputs={"model": {evil: evil}, "data": {"source": evil}},
        attached={evil: evil, "modules": [evil] * 12},
        results=(
            Result(
                task=evil,
                subject=evil,
                metrics=(Metric(name=evil, value=1.0, unit=evil),),
                settings={evil: evil},
            ),
        ),
        figures=(
            Figure(kind="line", title=evil, caption=evil, x_label=evil, series=(Series(name=evil, x=(evil,), y=(1,)),)),
            Figure(kind="bar", title=evil),
        ),
        tables=(Table(title=evil, columns=(evil, "n"), rows=((evil, 1), (None, None))),),
        samples=(Sample(prompt=evil, outputs={evil: evil}),),
        notes=(evil,),
        artefact=evil,
        timings={evil: 1.0, "stage": 2.0},
    )
    steps = [{"step": 1, evil: 1.0}]
    text = render(RunPage(evil, evil, [stage], {stage.folder: steps}, {evil: evil}))
    page = Page(text)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert sum(tag == "style" for tag, _ in page.tags) == 1
    assert "49" not in page.text
    assert page.text.count("<script>alert(1)</script>") >= 20


def test_missing_values_are_shown_as_missing(make_summary):
    results = (
        Result(
            task="quiz", subject="before", metrics=(Metric(name="accuracy", value=0.5), Metric(name="f1", value=0.4))
        ),
        Result(task="quiz", subject="after", metrics=(Metric(name="accuracy", value=float("nan")),)),
    )
    text = Page(render(RunPage("r", "", [make_summary(results=results, attached={"rank": None})]))).text
    assert "not a number" in text
    assert "–" in text


def test_a_run_without_finished_stages(tmp_path):
    path = write_report(tmp_path, "model: [", [], {})
    text = Page(path.read_text(encoding="utf-8")).text
    assert "No stage has finished yet." in text


def test_write_report_names_the_page_after_its_folder(tmp_path, run_stages):
    folder = tmp_path / "quickstart"
    folder.mkdir()
    path = write_report(folder, "model: demo", run_stages, {})
    assert path == folder / "report.html"
    page = path.read_text(encoding="utf-8")
    assert "<h1>quickstart</h1>" in page
    assert str(tmp_path) not in page
    assert [entry.name for entry in folder.iterdir()] == ["report.html"]


def test_both_ends_of_an_interval_show_where_the_value_has_few_digits(make_summary):
    found = Metric(name="excess", value=0.0, interval=(0.0, 0.368))
    narrow = Metric(name="tokens", value=1234.0, interval=(1233.94, 1234.06))
    results = [Result(task="audit", subject="model", metrics=(found, narrow))]
    text = Page(render(RunPage("r", "", [make_summary(results=results)]))).text
    assert "[0.000, 0.368]" in text.replace("\N{NO-BREAK SPACE}", " ")
    assert "[1,233.9, 1,234.1]" in text.replace("\N{NO-BREAK SPACE}", " ")
