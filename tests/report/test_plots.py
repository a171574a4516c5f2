import math
import re
from xml.etree import ElementTree

import pytest

from tenfold.report.plots import curve_figures, draw
from tenfold.stage.record import Figure, Series

SVG = "{http://www.w3.org/2000/svg}"


def figure(kind, *series, **fields):
    return Figure(kind=kind, title="A title", series=series, **fields)


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


LINE = Series(name="training", x=(1, 2, 3), y=(3.0, 2.5, 2.0), low=(2.9, 2.4, 1.9), high=(3.1, 2.6, 2.1))
BARS = Series(name="before", x=("q", "k"), y=(3.0, 2.0), low=(2.5, 1.5), high=(3.5, 2.5))


@pytest.mark.parametrize(
    "drawn",
    [
        figure("line", LINE, LINE.model_copy(update={"name": "held-out"}), x_label="step", y_label="loss"),
        figure("line", BARS),
        figure("bar", BARS, BARS.model_copy(update={"name": "after"})),
        figure("bar", Series(name="", x=(1, 2), y=(-1.0, 2.0))),
        figure("heatmap", BARS, BARS.model_copy(update={"name": "after"})),
        figure("heatmap", *(Series(name=str(n), x=tuple(range(40)), y=tuple(range(-20, 20))) for n in range(7))),
        figure("heatmap", Series(name="zeros", x=("q",), y=(0.0,))),
        figure("line", Series(name="one point", x=(5,), y=(1.0,))),
        figure("line", Series(name="gaps", x=(1, 2, 3, 4), y=(None, 1.0, math.nan, 2.0))),
        figure("bar", Series(name="gaps", x=("a", "b"), y=(None, 1.0), low=(math.nan, 2.0), high=(math.nan, 0.5))),
        figure("heatmap", Series(name="gaps", x=("a", "b"), y=(math.inf, 1.0))),
        figure("line", Series(name="empty", x=(), y=()), LINE),
        figure("line", *(LINE.model_copy(update={"name": f"{n}"}) for n in range(9))),
    ],
    ids=range(13),
)
def test_every_figure_is_well_formed_titled_and_repeats(drawn):
    svg = draw(drawn)
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    assert root.find(f"{SVG}title").text == "A title"
    assert root.find(f"{SVG}desc").text
    ids = {element.get("id") for element in root.iter()}
    assert {root.get("aria-labelledby"), root.get("aria-describedby")} <= ids
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg)) <= ids
    assert draw(drawn) == svg


@pytest.mark.parametrize(
    "drawn",
    [figure("line"), figure("bar", Series(name="", x=(), y=())), figure("heatmap", Series(name="", x=(1,), y=(None,)))],
)
def test_nothing_to_draw_is_a_sentence(drawn):
    assert draw(drawn) == '<p class="empty">A title: there are no values to draw.</p>'


def test_text_stays_text_and_cannot_become_markup():
    evil = "<script>alert(1)</script> $x_$ & \x00 \u6f22\u5b57\u5b57"
    svg = draw(Figure(kind="bar", title=evil, x_label=evil, series=(Series(name=evil, x=(evil,), y=(1.0,)),)))
    tags = {element.tag for element in ElementTree.fromstring(svg).iter()}
    assert f"{SVG}script" not in tags
    assert "<script>alert(1)</script> $x_$ &   …" in texts(svg)


def test_colours_follow_the_page():
    svg = draw(figure("line", LINE, x_label="step"))
    assert "currentColor" in svg
    assert "var(--c1, #0072b2)" in svg
    assert not re.search(r"#0[123]0[123]0[123]", svg)


def test_no_address_but_the_namespaces():
    addresses = set(re.findall(r"https?://[^\"' ]+", draw(figure("bar", BARS))))
    assert addresses == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_equal_figures_on_one_page_have_their_own_ids():
    first, second = (set(re.findall(r' id="([^"]+)"', draw(figure("line", LINE), key))) for key in ("a", "b"))
    assert first.isdisjoint(second)


def test_small_heatmaps_show_their_numbers_and_large_ones_a_scale():
    assert {"3", "2"} <= set(texts(draw(figure("heatmap", BARS))))
    large = figure("heatmap", *(Series(name=str(n), x=tuple(range(40)), y=tuple(range(40))) for n in range(7)))
    assert "39" in texts(draw(large))


def test_two_heatmaps_of_one_scale_can_be_compared():
    def opacities(*values, full):
        drawn = Figure(kind="heatmap", title="A title", full=full, series=(Series(name="a", x=(0, 1), y=values),))
        return [
            float(found or 1) for found in re.findall(r'fill: var\(--c1[^;"]*(?:; opacity: ([\d.]+))?', draw(drawn))
        ]

    low, high = opacities(0.1, 0.2, full=1.0), opacities(0.1, 0.8, full=1.0)
    assert low[0] == high[0] < low[1] < high[1] < 1
    assert opacities(0.1, 0.2, full=None)[1] == 1
    assert opacities(0.1, 4.0, full=1.0)[1] == 1
    rows = (Series(name=str(n), x=tuple(range(40)), y=(0.2,) * 40) for n in range(7))
    assert "1" in texts(draw(Figure(kind="heatmap", title="A title", full=1.0, series=tuple(rows))))


def test_series_of_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="different lengths"):
        Series(name="loss", x=(1, 2), y=(1.0,))


def test_curves(steps):
    steps[1]["eval_loss"] = 2.9
    steps[2]["loss"] = math.nan
    steps[3]["note"] = "text is passed over"
    steps[3]["epoch"] = 0.5
    loss, rate, norm = curve_figures(steps)
    assert [figure.title for figure in (loss, rate, norm)] == ["Loss", "Learning rate", "Grad norm"]
    assert [series.name for series in loss.series] == ["training", "held-out"]
    assert loss.series[0].y == (2.9, 2.8, None, 2.6, 2.5)
    assert loss.series[1].x == (10.0,)


def test_no_steps_no_curves():
    assert curve_figures([]) == []
    assert curve_figures([{"step": 1}]) == []
