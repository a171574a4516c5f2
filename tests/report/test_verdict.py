import math

import pytest

from tenfold.report.verdict import changes, headlines, verdict
from tenfold.stage.results import Metric, Result


def outcome(results, name):
    return next(item.outcome for item in changes(results) if item.name == name)


@pytest.mark.parametrize(
    ("better", "before", "after", "expected"),
    [
        ("lower", 31.2, 24.8, "better"),
        ("lower", 24.8, 31.2, "worse"),
        ("higher", 0.5, 0.6, "better"),
        ("higher", 0.6, 0.5, "worse"),
        ("neither", 0.6, 0.5, "changed"),
        ("lower", 0.5, 0.5, "unchanged"),
        ("lower", 1.0, math.nan, "changed"),
    ],
)
def test_direction(make_measured, better, before, after, expected):
    metric = {"name": "score", "better": better, "stderr": 0.01}
    assert outcome(make_measured("quiz", {**metric, "value": before}, {**metric, "value": after}), "score") == expected


def test_a_tie_within_the_interval_is_no_clear_change(make_perplexity):
    assert outcome(make_perplexity(31.2, 30.8, (-0.04, 0.01)), "perplexity") == "no clear change"


def test_the_paired_difference_sees_what_two_wide_spreads_hide(make_perplexity):
    assert outcome(make_perplexity(31.2, 30.8), "perplexity") == "no clear change"
    assert outcome(make_perplexity(31.2, 30.8, (-0.02, -0.01)), "perplexity") == "better"


def test_a_ratio_stands_still_at_one(make_perplexity):
    assert outcome(make_perplexity(31.2, 24.8, (-0.25, -0.21)), "perplexity_ratio") == "better"
    worse = Metric(name="perplexity_ratio", value=1.2, interval=(1.1, 1.3), better="lower")
    assert (
        outcome([Result(task="perplexity", subject="after - before", metrics=(worse,))], "perplexity_ratio") == "worse"
    )


def test_a_difference_stands_in_the_row_of_its_metric_and_not_in_another(make_measured):
    metric = {"name": "accuracy", "better": "higher"}
    change = Metric(name="accuracy_difference", value=0.1, interval=(-0.1, 0.3), better="higher")
    difference = Result(task="quiz", subject="after - before", metrics=(change,))
    both = [*make_measured("quiz", {**metric, "value": 0.5}, {**metric, "value": 0.6}), difference]
    (item,) = changes(both)
    assert (item.name, item.paired, item.outcome) == ("accuracy", change, "no clear change")
    assert [item.name for item in changes([difference])] == ["accuracy_difference"]


@pytest.mark.parametrize(("before", "after", "relative"), [(2.0, 3.0, 0.5), (-0.5, 2.0, None), (2.0, -0.5, None)])
def test_a_share_is_given_only_of_what_cannot_be_negative(make_measured, before, after, relative):
    metric = {"name": "margin", "better": "higher"}
    (item,) = changes(make_measured("quiz", {**metric, "value": before}, {**metric, "value": after}))
    assert item.relative == relative


@pytest.mark.parametrize(("value", "outcome"), [(0.005, "too small to matter"), (0.02, "better")])
def test_a_difference_alone_matters_alike_in_both_directions(value, outcome):
    def judged(value):
        change = Metric(name="f1_difference", value=value, interval=(value - 1e-3, value + 1e-3), better="higher")
        return changes([Result(task="quiz", subject="after - before", metrics=(change,))])[0].outcome

    assert (judged(value), judged(-value)) == (outcome, outcome.replace("better", "worse"))


def test_a_paired_figure_without_a_known_standstill_is_not_judged():
    improved = Metric(name="tokens_improved", value=0.62, better="higher")
    results = [Result(task="perplexity", subject="after - before", metrics=(improved,))]
    assert outcome(results, "tokens_improved") == "not compared"


def test_what_was_measured_once_is_changed_and_no_more(make_measured):
    metric = {"name": "score", "better": "lower"}
    assert outcome(make_measured("quiz", {**metric, "value": 2.0}, {**metric, "value": 1.0}), "score") == "changed"
    size = {"name": "cache", "unit": "bytes", "better": "lower"}
    assert outcome(make_measured("speed", {**size, "value": 2e6}, {**size, "value": 1e6}), "cache") == "better"
    peak = {**size, "name": "peak", "kind": "memory"}
    assert outcome(make_measured("memory", {**peak, "value": 2e6}, {**peak, "value": 1e6}), "peak") == "changed"


@pytest.mark.parametrize(("after", "expected"), [(0.509, "too small to matter"), (0.511, "better"), (0.489, "worse")])
def test_a_clear_change_of_less_than_a_point_does_not_matter(make_measured, after, expected):
    metric = {"name": "accuracy", "better": "higher", "stderr": 1e-4}
    assert outcome(make_measured("quiz", {**metric, "value": 0.5}, {**metric, "value": after}), "accuracy") == expected


def test_an_interval_has_the_unit_of_its_figure():
    """The paired difference is known in nats; perplexity and bits per byte show it in their own units."""
    nats = (-0.3, -0.1)
    results = [
        Result(
            task="perplexity",
            subject=subject,
            metrics=(
                Metric(name="perplexity", value=math.exp(nll), better="lower"),
                Metric(name="nll", value=nll, unit="nats/token", better="lower"),
                Metric(name="bits_per_byte", value=0.35 * nll, unit="bits/byte", better="lower"),
            ),
        )
        for subject, nll in (("before", 2.2), ("after", 2.0))
    ]
    change = Metric(name="nll_difference", value=-0.2, unit="nats/token", interval=nats, better="lower")
    items = changes([*results, Result(task="perplexity", subject="after - before", metrics=(change,))])
    intervals = {item.name: item.interval for item in items}
    assert intervals["perplexity"] == pytest.approx([math.exp(2.2 + end) - math.exp(2.2) for end in nats])
    assert intervals["nll"] == nats
    assert intervals["bits_per_byte"] == pytest.approx([0.35 * end for end in nats])
    assert {item.outcome for item in items} == {"better"}


@pytest.mark.parametrize("difference", [-0.00499, -0.00501])
def test_two_views_of_one_phenomenon_agree(difference):
    """Half a per cent of perplexity and 0.005 nats are not quite the same; the first view decides for all."""
    spread = {"interval": (difference - 1e-5, difference + 1e-5), "better": "lower"}
    nll = [Metric(name="nll", value=value, unit="nats/token", better="lower") for value in (2.0, 2.0 + difference)]
    text = [Metric(name="perplexity", value=math.exp(metric.value), better="lower") for metric in nll]
    results = [
        Result(task="perplexity", subject=subject, metrics=metrics)
        for subject, metrics in zip(("before", "after"), zip(text, nll, strict=True), strict=True)
    ]
    change = Metric(name="nll_difference", value=difference, unit="nats/token", **spread)
    outcomes = {item.outcome for item in changes([*results, Result(
        task="perplexity", subject="after - before", metrics=(change,))])}  # fmt: skip
    assert len(outcomes) == 1
    assert outcomes <= {"better", "too small to matter"}


@pytest.mark.parametrize(("after", "expected"), [(102.0, "too small to matter"), (110.0, "better"), (90.0, "worse")])
def test_timings_drift(make_measured, after, expected):
    metric = {"name": "prefill", "unit": "tokens/s", "better": "higher", "kind": "timing", "stderr": 0.1}
    assert (
        outcome(make_measured("speed", {**metric, "value": 100.0}, {**metric, "value": after}), "prefill") == expected
    )


def test_one_subject_alone_is_not_compared():
    results = [Result(task="quiz", subject="model", metrics=(Metric(name="accuracy", value=0.5),))]
    assert outcome(results, "accuracy") == "not compared"
    assert changes([]) == []


def test_sentences(run_stages):
    texts = [sentence.text for sentence in verdict(run_stages)]
    assert texts == [
        "Held-out perplexity 31.2 → 24.8 (-20.5 %), difference -6.39 [-6.78, -6.00]: better.",
        "No clear change: prefill 1,204 → 1,187 tokens/s (-1.4 %).",
        "The stage lora trained 538,000 parameters, 0.40 % of the model.",
    ]


def test_the_last_stage_that_measured_a_task_speaks(make_summary, make_perplexity):
    first = make_summary(stage="evaluate", results=make_perplexity(30.0, 29.0))
    last = make_summary(index=2, stage="evaluate", results=make_perplexity(30.0, 20.0))
    assert [item.after.value for item in headlines([first, last])] == [20.0]


def test_exact_sizes_speak_and_equal_ones_are_unchanged(make_summary, make_measured):
    weights = {"name": "weights", "unit": "bytes", "better": "lower"}
    results = make_measured("memory", {**weights, "value": 2**29}, {**weights, "value": 2**29})
    assert [sentence.text for sentence in verdict([make_summary(results=results)])] == [
        "Unchanged: weights (memory) 512 MiB."
    ]


def test_nothing_measured_nothing_said(make_summary):
    assert verdict([make_summary()]) == []
