import math

import pytest

from tenfold.evaluate.results import Metric, Result
from tenfold.report.verdict import compare, headlines, verdict


def outcome(results, name):
    return next(item.outcome for item in compare(results) if item.name == name)


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
    metric = {"name": "score", "better": better}
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
    (item,) = compare(both)
    assert (item.name, item.paired, item.outcome) == ("accuracy", change, "no clear change")
    assert [item.name for item in compare([difference])] == ["accuracy_difference"]


@pytest.mark.parametrize(("before", "after", "relative"), [(2.0, 3.0, 0.5), (-0.5, 2.0, None), (2.0, -0.5, None)])
def test_a_share_is_given_only_of_what_cannot_be_negative(make_measured, before, after, relative):
    metric = {"name": "margin", "better": "higher"}
    (item,) = compare(make_measured("quiz", {**metric, "value": before}, {**metric, "value": after}))
    assert item.relative == relative


def test_a_paired_figure_without_a_known_standstill_is_not_judged():
    improved = Metric(name="tokens_improved", value=0.62, better="higher")
    results = [Result(task="perplexity", subject="after - before", metrics=(improved,))]
    assert outcome(results, "tokens_improved") == "not compared"


@pytest.mark.parametrize(("after", "expected"), [(102.0, "no clear change"), (110.0, "better"), (90.0, "worse")])
def test_timings_drift(make_measured, after, expected):
    metric = {"name": "prefill", "unit": "tokens/s", "better": "higher", "kind": "timing", "stderr": 0.1}
    assert (
        outcome(make_measured("speed", {**metric, "value": 100.0}, {**metric, "value": after}), "prefill") == expected
    )


def test_one_subject_alone_is_not_compared():
    results = [Result(task="quiz", subject="model", metrics=(Metric(name="accuracy", value=0.5),))]
    assert outcome(results, "accuracy") == "not compared"
    assert compare([]) == []


def test_sentences(run_stages):
    texts = [sentence.text for sentence in verdict(run_stages)]
    assert texts == [
        "Held-out perplexity 31.2 → 24.8 (-20.5 %), paired difference -0.229 nats/token [-0.245, -0.213]: better.",
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
