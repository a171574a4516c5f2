"""What a stage does that learns from preferences, and the audit: it inherits what users rely on."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from tenfold import cli
from tenfold.config.r3m import RobustFields
from tenfold.config.training import TrainingFields
from tenfold.data.sources import open_source
from tenfold.errors import ConfigError, DataError
from tenfold.models.export import save_model
from tenfold.models.open import open_model
from tenfold.pipeline import aligning
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
    assert {"accuracy", "nll", "loss", "auc", "excess"} <= set(values)
    kind = "model" if keys["rank"] == 0 else "adapter"
    opened = open_model(folder / kind, task="reward" if keys["target"] == "reward" else "causal")
    assert hasattr(opened.model.get_base_model() if keys["rank"] else opened.model, "score") == (
        keys["target"] == "reward"
    )


@pytest.mark.parametrize("keys", [TARGETS["reward"], TARGETS["dpo"], {**TARGETS["reward"], "budget": "10%"}], ids=str)
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

    ours = margins([str(merged), "--reference", "tiny:llama"], "merged")
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
     {"loss": "new"}, {"lams": [0.5]}, {"lams": [0.5, 0.5]}, {"lams": [1, 0]}, {"trusted": "right.jsonl"},
     {"lams": [1, 0.5], "lam": 0.5}, {"lams": [1, 0.5], "budget": "10%"}, {"lams": [1, 0.5], "loss": "bt"}],
    ids=str,
)  # fmt: skip
def test_impossible_values_are_refused(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        stage("r3m").config_class().parse(values, "contract")


def test_noise_that_needs_true_rewards_says_so_where_there_are_none(tmp_path):
    data = tmp_path / "pairs.jsonl"
    rows = [{"id": str(n), "prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": "0"} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="chosen_rewards"):
        execute(recipe(**{**TARGETS["reward"], "data": str(data), "noise": "stochastic:1"}), tmp_path / "run")


def test_what_the_house_asks_of_a_method_is_there():
    page = (ROOT / "docs/methods/r3m.md").read_text()
    for name in ("r3m", "audit"):
        fields = stage(name).config_class().model_fields
        for key in set(fields) - (set(TrainingFields.model_fields) - set(RobustFields.model_fields)):
            assert f"`{key}`" in page, f"docs/methods/r3m.md does not explain {key}"
    assert (ROOT / "benchmarks/r3m.py").exists()
    assert (ROOT / "tests/oracles/test_r3m.py").exists()
    used = [yaml.safe_load(path.read_text()) for path in (ROOT / "recipes").glob("*.yaml")]
    assert any(entry["use"] == "r3m" for values in used for entry in values["stages"])
