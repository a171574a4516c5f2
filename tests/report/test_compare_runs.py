import math

from tenfold.report.compare import compare_configs, compare_runs, config_cells, metric_cells


def test_equal_metrics_are_matched(run_stages, make_summary, make_perplexity):
    other = [
        run_stages[0].model_copy(update={"config": {"budget": "0.8%", "targets": ["all-linear"]}, "seed": 1}),
        make_summary(index=2, stage="evaluate", results=make_perplexity(31.2034, 23.0)),
    ]
    rows = {(row.stage, row.task, row.subject, row.metric): row for row in compare_runs(run_stages, other)}
    after = rows["evaluate", "perplexity", "after", "perplexity"]
    assert (after.a, after.b) == (24.811, 23.0)
    assert math.isclose(after.difference, -1.811)
    assert math.isclose(after.relative, -1.811 / 24.811)
    assert rows["evaluate", "perplexity", "before", "perplexity"].difference == 0
    prefill = rows["evaluate", "speed", "after", "prefill"]
    assert (prefill.a, prefill.b, prefill.difference, prefill.relative) == (1187.0, None, None, None)
    configs = {(row.stage, row.key): (row.a, row.b) for row in compare_configs(run_stages, other)}
    assert configs["lora", "budget"] == ("0.4%", "0.8%")
    assert configs["lora", "seed"] == (0, 1)
    assert configs["evaluate", "split"] == ("held-out", None)
    assert ("lora", "targets") not in configs


def test_a_run_equals_itself(run_stages):
    assert all(row.difference == 0 for row in compare_runs(run_stages, run_stages))
    assert compare_configs(run_stages, run_stages) == []
    assert compare_runs([], []) == []


def test_a_stage_used_twice_is_matched_by_its_place(make_summary, make_perplexity):
    run = [
        make_summary(index=1, stage="evaluate", results=make_perplexity(30.0, 29.0)),
        make_summary(index=2, stage="evaluate", results=make_perplexity(30.0, 20.0)),
    ]
    rows = compare_runs(run, run[:1])
    assert [(row.stage, row.a, row.b) for row in rows if row.subject == "after"] == [
        ("evaluate", 29.0, 29.0),
        ("evaluate 2", 20.0, None),
    ]


def test_cells_are_text(run_stages):
    columns, cells = metric_cells(compare_runs(run_stages, run_stages[:1]))
    assert all(len(row) == len(columns) for row in cells)
    assert ("evaluate", "speed", "after", "prefill (tokens/s)", "1,187", "–", "–", "–") in cells
    columns, cells = config_cells(compare_configs(run_stages, []))
    assert all(len(row) == len(columns) for row in cells)


def test_what_is_not_a_number_does_not_differ_from_itself(make_summary):
    stage = make_summary(config={"limit": math.nan, "nested": {"rank": 4}})
    other = make_summary(config={"limit": math.nan, "nested": {"rank": 8}})
    assert [row.key for row in compare_configs([stage], [other])] == ["nested.rank"]
