"""What a stage does that learns from preferences, and the audit: it inherits what users rely on."""

import csv
import json
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from tenfold import cli
from tenfold.align import margins
from tenfold.align.audit import stage as auditing
from tenfold.align.margins import Scored, score_pairs, score_policy_pairs
from tenfold.align.r3m import stage as aligning
from tenfold.align.r3m.losses import kink
from tenfold.data.read import read_rows
from tenfold.data.rows import Preference
from tenfold.data.sources import open_source
from tenfold.errors import ConfigError, DataError
from tenfold.models.export import save_model
from tenfold.models.open import open_model
from tenfold.pipeline import run as runner
from tenfold.pipeline.recipe import resolve
from tenfold.pipeline.stages import stage

# TRL sets the old name itself, see tenfold.compat.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

ROOT = Path(__file__).parents[2]
FAST = {"steps": 6, "batch_size": 2, "learning_rate": 0.01, "save_every": 2, "log_every": 2}
TARGETS = {"reward": {"target": "reward", "rank": 2}, "dpo": {"target": "dpo", "rank": 2, "beta": 0.5}}
TARGETS["all weights"] = {"target": "reward", "rank": 0}


def recipe(*more, **keys):
    first = {"use": "r3m", "data": "step-audit:30", "holdout": 0.2, "noise": "uniform:20%", **FAST, **keys}
    return {"model": "tiny:llama", "stages": [first, *more]}


def execute(values, out):
    return runner.run(resolve(values, "contract"), out, Console(quiet=True))


def step_audit_rows(source):
    keys = ("id", "prompt", "chosen", "rejected")
    return [{key: f"right-{record.values[key]}" if key == "id" else record.values[key] for key in keys}
            for record in open_source(source).records]  # fmt: skip


def figures(summaries):
    return [
        (result.task, result.subject, metric.name, metric.value)
        for summary in summaries
        for result in summary.results
        for metric in result.metrics
        if metric.kind == "figure"
    ]


@pytest.mark.parametrize("keys", TARGETS.values(), ids=list(TARGETS))
def test_it_trains_measures_and_audits_its_own_labels(keys, tmp_path):
    (summary,) = execute(recipe(**keys), tmp_path)
    folder = tmp_path / "01-r3m"
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


@pytest.mark.parametrize("keys", [TARGETS["reward"], TARGETS["dpo"], {**TARGETS["reward"], "budget": "50%"}], ids=str)
def test_interrupted_halfway_it_ends_as_if_it_never_was(keys, tmp_path, monkeypatch):
    whole = execute(recipe(**keys), tmp_path / "whole")
    from tenfold.adapt.training import _Watch

    def stop(self, args, state, control, **_):
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_Watch, "on_step_begin", stop)
        with pytest.raises(KeyboardInterrupt):
            execute(recipe(**keys), tmp_path / "cut")
    assert figures(execute(recipe(**keys), tmp_path / "cut")) == figures(whole)


def test_out_of_fold_margins_are_those_of_models_that_have_not_seen_the_pair(tmp_path):
    (plain,) = execute(recipe(**TARGETS["reward"]), tmp_path / "plain")
    (crossed,) = execute(recipe(**TARGETS["reward"], folds=2), tmp_path / "crossed")
    kept = sorted(path.name for path in (tmp_path / "crossed" / "01-r3m").glob("fold-*"))
    assert kept == ["fold-0.json", "fold-1.json"], "margins, no weights"

    def margins(folder):
        with (folder / "01-r3m" / "audit.csv").open() as file:
            return {row["id"]: float(row["margin"]) for row in csv.DictReader(file)}

    first, second = margins(tmp_path / "plain"), margins(tmp_path / "crossed")
    assert first.keys() == second.keys()
    assert first != second
    held = [result for result in plain.results if result.task == "held-out preferences"]
    assert held == [result for result in crossed.results if result.task == "held-out preferences"]


CHOOSING = {**TARGETS["reward"], "data": "step-audit:80", "lams": [1, 0.4], "steps": 3}


@pytest.fixture
def right(tmp_path):
    """Pairs with right labels."""
    path = tmp_path / "right.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in step_audit_rows("step-audit:20:7")))
    return path


@pytest.mark.parametrize("trusted", [False, True])
def test_a_cap_is_chosen_by_pairs_that_its_training_has_not_seen(trusted, right, tmp_path, monkeypatch):
    judged, trained = [], []
    learnt, unseen = aligning._learnt, aligning._unseen

    def spy_learnt(pairs, config, context, folder):
        trained.append(({row.id for row in pairs}, config.fixed_lam))
        return learnt(pairs, config, context, folder)

    def spy_unseen(rows, judges, *rest):
        judged.append({row.id for row in judges})
        return unseen(rows, judges, *rest)

    monkeypatch.setattr(aligning, "_learnt", spy_learnt)
    monkeypatch.setattr(aligning, "_unseen", spy_unseen)
    keys = {**CHOOSING, **({"trusted": str(right)} if trusted else {})}
    (summary,) = execute(recipe(**keys), tmp_path / "run")
    folder = tmp_path / "run/01-r3m"
    everything = {json.loads(line)["id"] for line in (folder / "training.jsonl").read_text().splitlines()}
    assert [lam for _, lam in trained[:2]] == [1.0, 0.4]
    for (rows, _), judges in zip(trained, judged, strict=False):
        assert not rows & judges
        assert rows == everything if trusted else rows | judges == everything
    assert judged[0] == judged[1]
    tried = [result for result in summary.results if result.task == "choice of lam"]
    nats = {float(one.subject): next(m.value for m in one.metrics if "nats" in m.name) for one in tried}
    chosen = min(nats, key=nats.get)
    assert trained[2] == (everything, chosen)
    assert summary.attached["lam"] == chosen
    assert any(f"lam {chosen:g} explains" in note for note in summary.notes)
    assert sorted(path.name for path in folder.glob("lam-*")) == ["lam-0.4.json", "lam-1.json"]


def test_caps_that_train_alike_are_said_to(tmp_path):
    (summary,) = execute(recipe(**{**CHOOSING, "lams": [1, 0.95], "steps": 2}), tmp_path)
    assert any("no evidence that 0.95 would be worse" in note for note in summary.notes)


def test_what_a_fold_or_a_judge_would_miss_is_said_before_any_training(right, tmp_path, monkeypatch):
    monkeypatch.setattr(aligning, "_learnt", None)
    base = {**TARGETS["reward"], "data": "step-audit:60", "noise": None, "steps": None, "epochs": 1}
    with pytest.raises(ConfigError, match=r"budget: 10% of 2\d pairs"):
        execute(recipe(**base, budget="10%", folds=2), tmp_path / "a")
    with pytest.raises(DataError, match="has none of the"):
        execute(recipe(**{**base, "data": "step-audit:12"}, folds=15), tmp_path / "b")
    same = {**base, "data": str(right), "lams": [1, 0.5], "trusted": str(right)}
    with pytest.raises(DataError, match="holds all the training pairs"):
        execute(recipe(**same), tmp_path / "c")


def test_too_few_judges_are_refused_before_any_training(tmp_path, monkeypatch):
    monkeypatch.setattr(aligning, "_learnt", None)
    with pytest.raises(DataError, match=r"lams: \d pairs cannot choose"):
        execute(recipe(**{**CHOOSING, "data": "step-audit:30"}), tmp_path / "run")


def test_a_choice_that_is_interrupted_goes_on_with_the_caps_that_are_left(tmp_path, monkeypatch):
    whole = execute(recipe(**CHOOSING), tmp_path / "whole")
    learnt = aligning._learnt

    def stop(pairs, config, context, folder):
        if folder.name == "lam-0.4":
            raise KeyboardInterrupt
        return learnt(pairs, config, context, folder)

    with monkeypatch.context() as patch:
        patch.setattr(aligning, "_learnt", stop)
        with pytest.raises(KeyboardInterrupt):
            execute(recipe(**CHOOSING), tmp_path / "cut")

    def first_once(pairs, config, context, folder):
        assert folder.name != "lam-1"
        return learnt(pairs, config, context, folder)

    monkeypatch.setattr(aligning, "_learnt", first_once)
    assert figures(execute(recipe(**CHOOSING), tmp_path / "cut")) == figures(whole)


def test_trusted_pairs_are_read_before_any_training_and_decide_whether_a_run_is_finished(right, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "no pair"}\n')
    with pytest.raises(DataError, match=r"bad.jsonl.*line 1"):
        execute(recipe(**CHOOSING, trusted=str(bad)), tmp_path / "run")
    first = execute(recipe(**CHOOSING, trusted=str(right)), tmp_path / "run")
    assert execute(recipe(**CHOOSING, trusted=str(right)), tmp_path / "run") == first
    right.write_text("".join(right.read_text().splitlines(keepends=True)[:15]))
    assert execute(recipe(**CHOOSING, trusted=str(right)), tmp_path / "run") != first


def test_a_policy_without_an_adapter_is_audited_against_the_model_it_started_from(tmp_path, capsys):
    execute(recipe(**TARGETS["dpo"]), tmp_path / "run")
    stage_folder = tmp_path / "run/01-r3m"
    data = ["--data", str(stage_folder / "training.jsonl"), "--beta", "0.5"]
    merged = tmp_path / "merged"
    opened = open_model(stage_folder / "adapter")
    save_model(opened.model.merge_and_unload(), opened.tokenizer, merged)

    def margins(arguments, name):
        assert cli.main(["audit", *arguments, *data, "--out", str(tmp_path / f"{name}.csv")]) == 0
        with (tmp_path / f"{name}.csv").open() as file:
            return {row["id"]: float(row["margin"]) for row in csv.DictReader(file)}

    ours = margins([str(merged), "--reference", "tiny:llama"], "of-merged")
    assert ours == pytest.approx(margins([str(stage_folder / "adapter")], "adapter"), abs=1e-4)
    capsys.readouterr()
    assert cli.main(["audit", str(merged), *data]) == 2
    assert "reference" in capsys.readouterr().err


def test_after_a_reward_its_head_is_known_and_other_stages_are_refused(tmp_path):
    _, audited = execute(recipe({"use": "audit"}, **TARGETS["reward"]), tmp_path / "run")
    assert len((tmp_path / "run/02-audit/cleaned.jsonl").read_text().splitlines()) <= 30
    assert audited.results[0].task == "audit"
    with pytest.raises(ConfigError, match="made a reward model"):
        resolve(recipe({"use": "evaluate"}, **TARGETS["reward"]), "contract")


@pytest.mark.parametrize("target", ["reward", "dpo"])
def test_audit_from_the_command_line(target, tmp_path, capsys):
    execute(recipe(**TARGETS[target]), tmp_path / "run")
    adapter, data = tmp_path / "run/01-r3m/adapter", tmp_path / "run/01-r3m/training.jsonl"
    out, clean = tmp_path / "audit.csv", tmp_path / "cleaned.jsonl"
    arguments = ["audit", str(adapter), "--data", str(data), "--out", str(out), "--clean", str(clean)]
    assert cli.main(arguments) == 0
    with out.open() as file:
        table = list(csv.DictReader(file))
    rows = data.read_text().splitlines()
    assert len(table) == len(rows)
    kept = {row["id"] for row in table if row["suggestion"] in ("keep", "review")}
    assert {json.loads(line)["id"] for line in clean.read_text().splitlines()} == kept
    told = capsys.readouterr().out
    assert "precision" in told
    assert "rows to drop" in told
    summary = json.loads((tmp_path / "audit/01-audit/summary.json").read_text())
    assert summary["samples"]


def table_of(path):
    with path.open() as file:
        return {row["id"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("target", ["reward", "dpo"])
def test_its_figures_are_those_of_the_saved_adapter(target, tmp_path):
    (summary,) = execute(recipe(**TARGETS[target]), tmp_path)
    folder = tmp_path / "01-r3m"
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


@pytest.mark.parametrize(
    ("margins", "said"),
    [
        ([3.0, 6.0, 4.0, 5.0] * 40 + [-6.0] * 8, "% of the labels seem wrong (95 % interval 2.2% to 8.6%)"),
        ([2.0, -1.0, 3.0, 0.5] * 20, "No share of wrong labels can be told from none"),
        ([-2.0, -1.0, -3.0, 0.5] * 20, "contradicts 75% of the labels: are chosen and rejected exchanged?"),
    ],
    ids=["some", "none", "exchanged"],
)
def test_what_is_said_of_the_labels_as_a_whole(margins, said, tmp_path):
    rows = [Preference(str(n), "p", "x", "y") for n in range(len(margins))]
    scored = Scored(tuple(row.id for row in rows), torch.tensor(margins))
    _, output = auditing.audited(scored, rows, {}, 0.85, 3, tmp_path)
    assert any(said in note for note in output.notes), output.notes


def test_what_an_audit_names_decides_whether_it_is_finished(tmp_path):
    execute(recipe(**TARGETS["dpo"]), tmp_path / "run")
    folder = tmp_path / "run/01-r3m"
    opened = open_model(folder / "adapter")
    merged = opened.model.merge_and_unload()
    save_model(merged, opened.tokenizer, tmp_path / "merged")
    data = tmp_path / "data.jsonl"
    data.write_text((folder / "training.jsonl").read_text())

    def found(reference):
        audits = {"use": "audit", "data": str(data), "reference": str(reference)}
        execute({"model": str(tmp_path / "merged"), "stages": [audits]}, tmp_path / "audit")
        margins = [float(row["margin"]) for row in table_of(tmp_path / "audit/01-audit/audit.csv").values()]
        summary = json.loads((tmp_path / "audit/01-audit/summary.json").read_text())
        metrics = summary["results"][0]["metrics"]
        return margins, [m["value"] for m in metrics if m["name"] == "wrong labels"]

    base, reference = open_model("tiny:llama"), tmp_path / "reference"
    save_model(base.model, base.tokenizer, reference)
    margins, wrong = found(reference)
    assert any(margins)
    assert wrong[0] > 0
    save_model(merged, opened.tokenizer, reference)
    assert not any(found(reference)[0]), "the same name, another model: now a policy is its own reference"
    data.write_text(data.read_text().replace('"flipped": true', '"flipped": false', 1))
    assert found(reference)[1] == [wrong[0] - 1], "a column beside the pair"


@pytest.mark.parametrize("target", ["reward", "dpo"])
def test_the_verb_audit_finds_what_the_stage_found(target, tmp_path):
    """Without being told the beta of the training."""
    execute(recipe(**TARGETS[target]), tmp_path / "run")
    folder = tmp_path / "run/01-r3m"
    data, out = str(folder / "training.jsonl"), tmp_path / "again.csv"
    assert cli.main(["audit", str(folder / "adapter"), "--data", data, "--lam", "0.75", "--out", str(out)]) == 0
    ours, theirs = table_of(folder / "audit.csv"), table_of(out)
    assert {id: float(row["margin"]) for id, row in theirs.items()} == {
        id: pytest.approx(float(row["margin"]), abs=1e-5) for id, row in ours.items()
    }


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


def test_cleaned_rows_keep_the_columns_of_the_user(tmp_path):
    rows = [dict(record.values) for record in open_source("step-audit:30").records]
    data, clean = tmp_path / "mine.jsonl", tmp_path / "clean.jsonl"
    mine = [{**row, "split": "train" if n % 3 else "test", "author": n} for n, row in enumerate(rows)]
    data.write_text("".join(json.dumps(row) + "\n" for row in mine))
    before = data.read_text()
    execute(recipe(**TARGETS["reward"]), tmp_path / "run")
    command = ["audit", str(tmp_path / "run/01-r3m/adapter"), "--data", str(data), "--out", str(tmp_path / "audit")]
    assert cli.main([*command, "--clean", str(data)]) == 2
    table = tmp_path / "mine.csv"
    table.write_text("prompt,chosen,rejected\np,x,y\nq,x,y\n")
    assert cli.main([*command[:3], str(table), "--out", str(table)]) == 2
    assert cli.main([*command[:3], str(tmp_path), "--csv", str(tmp_path / "new.csv")]) == 2
    assert (data.read_text(), table.read_text().count("\n")) == (before, 3)
    assert cli.main([*command, "--clean", str(clean), "--action", "weights"]) == 0
    for row, original in zip(map(json.loads, clean.read_text().splitlines()), mine, strict=True):
        assert 0 <= row.pop("weight") <= 1
        assert row == original


def test_another_level_scores_nothing_again_and_files_outside_come_back(tmp_path, monkeypatch, capsys):
    execute(recipe(**TARGETS["reward"]), tmp_path / "run")
    data = str(tmp_path / "run/01-r3m/training.jsonl")
    out = tmp_path / "audit.csv"
    command = ["audit", str(tmp_path / "run/01-r3m/adapter"), "--data", data, "--out", str(out)]
    assert cli.main(command) == 0
    first = out.read_text()

    def never(*_):
        raise AssertionError("scored again")

    monkeypatch.setattr(margins, "_reward_margins", never)
    out.unlink()
    assert cli.main(command) == 0
    assert "finished already" in capsys.readouterr().out
    assert out.read_text() == first
    assert cli.main([*command, "--lam", "0.4"]) == 0
    assert out.read_text() != first
    assert cli.main([*command, "--clean", str(tmp_path / "clean.jsonl")]) == 0
    assert (tmp_path / "clean.jsonl").exists()


def test_labels_are_doubted_by_who_gave_them(tmp_path):
    data = tmp_path / "mine.jsonl"
    rows = [
        {**record.values, "author": f"author {n % 3}"} for n, record in enumerate(open_source("step-audit:30").records)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    audits = {"use": "audit", "data": str(data), "by": "author"}
    summary = execute(recipe(audits, **TARGETS["reward"]), tmp_path / "run")[1]
    (table,) = (table for table in summary.tables if table.title == "The most doubtful by author")
    assert sorted(row[:2] for row in table.rows) == [(f"author {n}", 10) for n in range(3)]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--by", "author"], "has no column 'author'"),
        (["--csv", "nowhere/a.csv"], "no folder nowhere"),
        (["--csv", "a.txt"], "is not a .csv file"),
        (["--clean", "nowhere/a.jsonl"], "no folder nowhere"),
        (["--clean", "a.csv"], "is not a .jsonl file"),
        (["--out", "a.csv", "--csv", "b.csv"], "both name the table"),
        (["--task", "reward"], "has no reward head"),
    ],
    ids=str,
)
def test_what_cannot_be_audited_or_written_is_said_first(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(auditing, "score_pairs", None)
    assert cli.main(["audit", "tiny:llama", "--data", "step-audit:20", *flags]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "a.csv").exists()


@pytest.mark.parametrize("target", ["reward", "dpo"])
def test_a_limit_that_no_pair_keeps_is_named(target, tmp_path):
    with pytest.raises(DataError, match=r"max_length: no (pair|prompt) is within 8 tokens"):
        execute(recipe(**TARGETS[target], max_length=8), tmp_path)


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


def test_accuracy_is_logged(tmp_path):
    execute(recipe(**TARGETS["reward"]), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "01-r3m/metrics.jsonl").read_text().splitlines()]
    assert all({"loss", "accuracy", "margin", "r3m/flagged_frac"} <= set(line) for line in lines)


def test_the_base_is_untouched_and_the_adapter_needs_no_tenfold(tmp_path):
    from peft import PeftModel

    execute(recipe(**TARGETS["reward"]), tmp_path)
    folder = tmp_path / "01-r3m/adapter"
    base = open_model("tiny:llama", task="reward").model
    ids = torch.arange(5, 29).reshape(2, 12)
    with torch.no_grad():
        ours = open_model(folder, task="reward").model.eval()(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(base, folder).eval()(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "values",
    [{"noise": "loud"}, {"noise": "uniform:0"}, {"folds": 1}, {"lam": 0}, {"lam": 0.5, "budget": "10%"},
     {"budget": "60%"}, {"beta": 0.2}, {"rank": 0, "target": "dpo"}, {"loss": "bt", "lam": 0.5}, {"smoothing": 0.2},
     {"noise": "uniform:150%"}, {"noise": "irrational:5"}, {"noise": "myopic:2"}, {"noise": "irrational:1/0"},
     {"loss": "new"}, {"lams": [0.5]}, {"lams": [0.5, 0.5]}, {"lams": [1, 0]}, {"trusted": "right.jsonl"},
     {"lams": [1, 0.5], "lam": 0.5}, {"lams": [1, 0.5], "budget": "10%"}, {"lams": [1, 0.5], "loss": "bt"}],
    ids=str,
)  # fmt: skip
def test_impossible_values_are_refused(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        stage("r3m").parse(values, "contract")


def test_noise_that_needs_true_rewards_says_so_where_there_are_none(tmp_path):
    data = tmp_path / "pairs.jsonl"
    rows = [{"id": str(n), "prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": "0"} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="chosen_rewards"):
        execute(recipe(**{**TARGETS["reward"], "data": str(data), "noise": "stochastic:1"}), tmp_path / "run")


def test_what_the_house_asks_of_a_method_is_there():
    page = (ROOT / "docs/methods/r3m.md").read_text()
    for name in ("r3m", "audit"):
        assert f"options/{name}.md" in page  # where every key is explained: tests/docs
    assert (ROOT / "benchmarks/r3m.py").exists()
    assert (ROOT / "tests/oracles/test_r3m.py").exists()
    used = [yaml.safe_load(path.read_text()) for path in (ROOT / "recipes").glob("*.yaml")]
    assert any(entry["use"] == "r3m" for values in used for entry in values["stages"])
