"""The stage that doubts labels: what it reads, writes and refuses, and what it remembers."""

import csv
import json

import pytest
import torch

from tenfold import cli
from tenfold.align import margins
from tenfold.align.audit import stage as auditing
from tenfold.align.margins import Scored
from tenfold.data.rows import Preference
from tenfold.data.sources import open_source
from tenfold.errors import ConfigError
from tenfold.models.export import save_model
from tenfold.models.open import open_model
from tenfold.pipeline.recipe import resolve
from tests.preferences import TARGETS, recipe, table_of
from tests.runs import execute


def test_a_policy_without_an_adapter_is_audited_against_the_model_it_started_from(trained, tmp_path, capsys):
    stage_folder = trained("dpo").folder
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


def test_after_a_reward_its_head_is_known_and_other_stages_are_refused(trained, tmp_path):
    _, audited = execute(recipe({"use": "audit"}, **TARGETS["reward"]), trained("reward").copied(tmp_path / "run"))
    assert len((tmp_path / "run/02-audit/cleaned.jsonl").read_text().splitlines()) <= 30
    assert audited.results[0].task == "audit"
    with pytest.raises(ConfigError, match="made a reward model"):
        resolve(recipe({"use": "evaluate"}, **TARGETS["reward"]), "contract")


@pytest.mark.parametrize("target", ["reward", "dpo"])
def test_audit_from_the_command_line(target, trained, tmp_path, capsys):
    adapter, data = trained(target).folder / "adapter", trained(target).folder / "training.jsonl"
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


@pytest.mark.parametrize(
    ("margins", "said"),
    [
        ([3.0, 6.0, 4.0, 5.0] * 40 + [-6.0] * 8, "% of the labels seem wrong (95 % interval 2.2% to 8.7%)"),
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


def test_what_an_audit_names_decides_whether_it_is_finished(trained, tmp_path):
    folder = trained("dpo").folder
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
def test_the_verb_audit_finds_what_the_stage_found(target, trained, tmp_path):
    """Without being told the beta of the training."""
    folder = trained(target).folder
    data, out = str(folder / "training.jsonl"), tmp_path / "again.csv"
    assert cli.main(["audit", str(folder / "adapter"), "--data", data, "--lam", "0.75", "--out", str(out)]) == 0
    ours, theirs = table_of(folder / "audit.csv"), table_of(out)
    assert {id: float(row["margin"]) for id, row in theirs.items()} == {
        id: pytest.approx(float(row["margin"]), abs=1e-5) for id, row in ours.items()
    }


def test_cleaned_rows_keep_the_columns_of_the_user(trained, tmp_path):
    rows = [dict(record.values) for record in open_source("step-audit:30").records]
    data, clean = tmp_path / "mine.jsonl", tmp_path / "clean.jsonl"
    mine = [{**row, "split": "train" if n % 3 else "test", "author": n} for n, row in enumerate(rows)]
    data.write_text("".join(json.dumps(row) + "\n" for row in mine))
    before = data.read_text()
    command = [
        "audit",
        str(trained("reward").folder / "adapter"),
        "--data",
        str(data),
        "--out",
        str(tmp_path / "audit"),
    ]
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


def test_another_level_scores_nothing_again_and_files_outside_come_back(trained, tmp_path, monkeypatch, capsys):
    folder = trained("reward").folder
    data = str(folder / "training.jsonl")
    out = tmp_path / "audit.csv"
    command = ["audit", str(folder / "adapter"), "--data", data, "--out", str(out)]
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


def test_labels_are_doubted_by_who_gave_them(trained, tmp_path):
    data = tmp_path / "mine.jsonl"
    rows = [
        {**record.values, "author": f"author {n % 3}"} for n, record in enumerate(open_source("step-audit:30").records)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    audits = {"use": "audit", "data": str(data), "by": "author"}
    summary = execute(recipe(audits, **TARGETS["reward"]), trained("reward").copied(tmp_path / "run"))[1]
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
        (["--out", "a.csv", "--csv", "b.csv"], "both name the file"),
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
