"""The stage that learns from preferences: what it measures, and what it says of its own labels."""

import csv
import json
from functools import partial

import pytest
import torch

from tenfold.adapt.training import _Watch
from tenfold.align.margins import Scored, score_pairs, score_policy_pairs
from tenfold.align.r3m import stage as aligning
from tenfold.align.r3m.losses import kink
from tenfold.data.read import read_rows
from tenfold.errors import DataError
from tenfold.models.open import open_model
from tests.preferences import FAST, TARGETS, recipe, table_of
from tests.runs import execute, figures


@pytest.mark.parametrize("target", TARGETS)
def test_it_trains_measures_and_audits_its_own_labels(target, trained):
    folder, summary = trained(target).folder, trained(target).summary
    keys = TARGETS[target]
    rows = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    turned = {row["id"]: row["flipped"] for row in rows}
    assert sum(turned.values()) == round(0.2 * len(turned))
    with (folder / "audit.csv").open() as file:
        table = list(csv.DictReader(file))
    assert {row["id"] for row in table} == set(turned)
    assert [int(row["rank"]) for row in table] == list(range(1, len(table) + 1))
    values = {metric.name: metric.value for result in summary.results for metric in result.metrics}
    worst = table[: sum(turned.values())]
    expected = sum(turned[row["id"]] for row in worst) / len(worst)
    assert values[f"precision at {len(worst)}"] == pytest.approx(expected)
    assert {"accuracy", "nll", "loss", "auc", "excess", "wrong labels, estimated"} <= set(values)
    kind = "model" if keys["rank"] == 0 else "adapter"
    opened = open_model(folder / kind, task="reward" if keys["target"] == "reward" else "causal")
    assert hasattr(opened.model.get_base_model() if keys["rank"] else opened.model, "score") == (
        keys["target"] == "reward"
    )


def test_interrupted_halfway_a_budget_is_kept_as_if_it_never_was(tmp_path, monkeypatch):
    keys = {**TARGETS["reward"], "budget": "50%"}
    whole = execute(recipe(**keys), tmp_path / "whole")

    def stop(self, args, state, control, **_):
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_Watch, "on_step_begin", stop)
        with pytest.raises(KeyboardInterrupt):
            execute(recipe(**keys), tmp_path / "cut")
    assert figures(execute(recipe(**keys), tmp_path / "cut")) == figures(whole)


def test_out_of_fold_margins_are_those_of_models_that_have_not_seen_the_pair(trained, kept, tmp_path):
    (crossed,) = execute(recipe(**TARGETS["reward"], folds=2), tmp_path / "crossed")
    folder = tmp_path / "crossed/01-r3m"
    assert {"fold-0", "fold-1"} <= {*kept}, "margins"
    assert not list(folder.glob("fold-*")), "no weights"

    def margins(folder):
        with (folder / "audit.csv").open() as file:
            return {row["id"]: float(row["margin"]) for row in csv.DictReader(file)}

    first, second = margins(trained("reward").folder), margins(folder)
    assert first.keys() == second.keys()
    assert first != second
    held = [result for result in trained("reward").summary.results if result.task == "held-out preferences"]
    assert held == [result for result in crossed.results if result.task == "held-out preferences"]


@pytest.mark.parametrize("target", ["reward", "dpo"])
def test_its_figures_are_those_of_the_saved_adapter(target, trained):
    folder, summary = trained(target).folder, trained(target).summary
    opened = open_model(folder / "adapter", task="reward" if target == "reward" else "causal")
    score = score_pairs if target == "reward" else partial(score_policy_pairs, beta=0.5)
    training = list(read_rows(str(folder / "training.jsonl")))
    _, held = read_rows("step-audit:30").split(0.2)
    margins = score(opened.model, opened.tokenizer, held).margins.double()
    values = {metric.name: metric.value for result in summary.results for metric in result.metrics}
    assert values["accuracy"] == pytest.approx(float((margins > 0).double().mean()))
    assert values["nll"] == pytest.approx(float(-torch.nn.functional.logsigmoid(margins).mean()), abs=1e-4)
    found = score(opened.model, opened.tokenizer, training)
    written = table_of(folder / "audit.csv")
    assert [float(written[id]["margin"]) for id in found.ids] == pytest.approx(found.margins.tolist(), abs=1e-4)


@pytest.mark.parametrize("target", ["reward", "dpo"])
def test_the_mean_over_epochs_stands_beside_the_margin(target, tmp_path):
    keys = {**TARGETS[target], "steps": None, "epochs": 2, "batch_size": 1, "learning_rate": 1e-12}
    execute(recipe(**keys), tmp_path / "still")
    rows = table_of(tmp_path / "still/01-r3m/audit.csv").values()
    assert [float(row["epoch_margin"]) for row in rows] == pytest.approx([float(r["margin"]) for r in rows], abs=1e-4)
    execute(recipe(**{**keys, "learning_rate": 0.01}), tmp_path / "moving")
    rows = table_of(tmp_path / "moving/01-r3m/audit.csv").values()
    assert all(abs(float(row["epoch_margin"]) - float(row["margin"])) > 1e-6 for row in rows)


def test_with_a_budget_that_share_is_flagged_and_nothing_that_the_model_agrees_with(tmp_path):
    keys = {**TARGETS["dpo"], "data": "step-audit:60", "steps": 12, "budget": "30%"}
    execute(recipe(**keys), tmp_path)
    rows = table_of(tmp_path / "01-r3m/audit.csv").values()
    low = sorted(float(row["margin"]) for row in rows)
    flagged = [float(row["margin"]) for row in rows if row["flagged"] == "True"]
    disagreed = sum(margin < 0 for margin in low)
    assert len(flagged) == pytest.approx(min(0.3 * len(low), disagreed), abs=1)
    assert all(margin < 0 for margin in flagged)


def test_the_level_of_a_budget():
    def level(margins, share):
        return aligning._level(Scored(tuple(map(str, range(len(margins)))), torch.tensor(margins)), share)

    ten = [float(n) for n in range(-3, 7)]
    assert kink(level(ten, 0.2)) == pytest.approx(-1.2), "two of ten lie below"
    assert kink(level(ten, 0.5)) == pytest.approx(0), "a label with which the model agrees is no suspect"
    assert 0.999 < level([-50.0] * 30 + [60.0] * 70, 0.1) < 1


def turned_over(summary):
    (table,) = (table for table in summary.tables if "flipped" in table.columns)
    where = table.columns.index("flipped")
    return {row[1]: row[where] for row in table.rows}


def test_whether_a_label_was_turned_over_is_said_only_where_it_is_known(tmp_path):
    keys = {**TARGETS["reward"], "steps": 2}
    (unknown,) = execute(recipe(**keys, noise=None), tmp_path / "unknown")
    assert set(turned_over(unknown).values()) == {"unknown"}
    (noisy,) = execute(recipe(**keys), tmp_path / "noisy")
    path = tmp_path / "noisy/01-r3m/training.jsonl"
    known = {row["id"]: row["flipped"] for row in map(json.loads, path.read_text().splitlines())}
    assert turned_over(noisy) == {id: "yes" if known[id] else "no" for id in turned_over(noisy)}
    # The column of an earlier corruption, and a second one on top of it.
    (column,) = execute(recipe(**{**keys, "data": str(path), "noise": None, "holdout": 0.5}), tmp_path / "column")
    assert turned_over(column) == {id: "yes" if known[id] else "no" for id in turned_over(column)}
    (both,) = execute(recipe(**{**keys, "data": str(path), "noise": "uniform:99%", "holdout": 0.5}), tmp_path / "both")
    opposite = {id: "no" if known[id] else "yes" for id in turned_over(both)}
    assert sum(turned_over(both)[id] != opposite[id] for id in opposite) <= 1


def test_a_reward_may_be_learnt_on_top_of_an_adapter(tmp_path):
    first = {"use": "lora", "data": "python-reference", "limit": 20, "rank": 2, **FAST, "max_length": 64}
    second = {"use": "r3m", "data": "step-audit:30", "holdout": 0.2, **FAST, **TARGETS["reward"]}
    execute({"model": "tiny:llama", "stages": [first, second]}, tmp_path)
    ids = torch.arange(5, 29).reshape(2, 12)
    stacked = open_model("tiny:llama", task="reward", adapters=[tmp_path / "01-lora/adapter"])
    alone = open_model("tiny:llama", task="reward")
    plain = open_model("tiny:llama", adapters=[tmp_path / "01-lora/adapter"])
    with torch.no_grad():
        hidden = stacked.model.get_base_model().model(ids).last_hidden_state
        torch.testing.assert_close(hidden, plain.model.get_base_model().model(ids).last_hidden_state)
        assert not torch.allclose(hidden, alone.model.model(ids).last_hidden_state, atol=1e-4)


def test_accuracy_is_logged(trained):
    lines = [json.loads(line) for line in (trained("reward").folder / "metrics.jsonl").read_text().splitlines()]
    assert all({"loss", "accuracy", "margin", "r3m/flagged_frac"} <= set(line) for line in lines)


def test_noise_that_needs_true_rewards_says_so_where_there_are_none(tmp_path):
    data = tmp_path / "pairs.jsonl"
    rows = [{"id": str(n), "prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": "0"} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="chosen_rewards"):
        execute(recipe(**{**TARGETS["reward"], "data": str(data), "noise": "stochastic:1"}), tmp_path / "run")
