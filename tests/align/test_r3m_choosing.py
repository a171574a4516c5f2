"""The stage that learns from preferences, where it chooses the cap of its loss itself."""

import json

import pytest

from tenfold.align.r3m import stage as aligning
from tenfold.data.sources import open_source
from tenfold.errors import ConfigError, DataError
from tests.preferences import TARGETS, recipe
from tests.runs import execute, figures

CHOOSING = {**TARGETS["reward"], "data": "step-audit:80", "lams": [1, 0.4], "steps": 3}


def step_audit_rows(source):
    keys = ("id", "prompt", "chosen", "rejected")
    return [{key: f"right-{record.values[key]}" if key == "id" else record.values[key] for key in keys}
            for record in open_source(source).records]  # fmt: skip


@pytest.fixture
def right(tmp_path):
    """Pairs with right labels."""
    path = tmp_path / "right.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in step_audit_rows("step-audit:20:7")))
    return path


@pytest.mark.parametrize("trusted", [False, True])
def test_a_cap_is_chosen_by_pairs_that_its_training_has_not_seen(trusted, right, kept, tmp_path, monkeypatch):
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
    assert {"lam-0.4", "lam-1"} <= {*kept}, "margins"
    assert not list(folder.glob("lam-*")), "no weights"


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
