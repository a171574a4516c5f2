"""Audits of rows of one's own: what the table says of each, how cleaned rows come back, what is scored again."""

from __future__ import annotations

import csv
import json

import pytest

from tenfold import cli
from tenfold.align import margins
from tenfold.align.audit import audit, cleaned_records
from tenfold.data.read import read_rows
from tenfold.data.sources import open_source
from tenfold.data.write import write_rows
from tenfold.pipeline.recipe import resolve
from tests.preferences import TARGETS, recipe, table_of
from tests.runs import execute


def made_up(count=30):
    return [dict(record.values) for record in open_source(f"step-audit:{count}").records]


def mapped(path, count=30):
    """Pairs under other names, with columns of their own, of which one is named like a field of the table."""
    rows = [
        {"question": row["prompt"], "good": row["chosen"], "bad": row["rejected"], "author": f"A, {n}", "margin": n}
        for n, row in enumerate(made_up(count))
    ]
    write_rows(path, rows)
    return rows


COLUMNS = {"prompt": "question", "chosen": "good", "rejected": "bad"}
FLAGS = ["--columns", *(word for pair in COLUMNS.items() for word in pair)]


def test_the_table_says_of_each_pair_where_it_stands_and_what_it_holds(trained, tmp_path):
    data, out = tmp_path / "mine.csv", tmp_path / "audit.csv"
    rows = mapped(data)
    adapter = str(trained("reward").folder / "adapter")
    assert cli.main(["audit", adapter, "--data", str(data), *FLAGS, "--out", str(out)]) == 0
    table = sorted(table_of(out).values(), key=lambda line: int(line["place"].rpartition(" ")[2]))
    assert len(table) == len(rows)
    line = 2
    for found, row in zip(table, rows, strict=True):
        assert found["place"] == f"{data}, line {line}"
        assert [found[name] for name in ("prompt", "chosen", "rejected")] == [row[name] for name in COLUMNS.values()]
        assert (found["author"], found["margin (data)"]) == (row["author"], str(row["margin"]))
        assert 0 <= float(found["p_wrong"]) <= 1
        line += sum(str(value).count("\n") for value in row.values()) + 1


def test_cleaned_rows_have_the_names_and_the_format_of_the_data(trained, tmp_path):
    data, clean = tmp_path / "mine.csv", tmp_path / "clean.csv"
    rows = mapped(data)
    command = ["audit", str(trained("reward").folder / "adapter"), "--data", str(data), *FLAGS]
    command += ["--out", str(tmp_path / "run"), "--action", "weights"]
    assert cli.main([*command, "--clean", str(clean)]) == 0
    with clean.open(newline="") as file:
        found = list(csv.DictReader(file))
    for line, row in zip(found, rows, strict=True):
        assert 0 <= float(line.pop("weight")) <= 1
        assert line == {name: str(value) for name, value in row.items()}
    assert cli.main([*command, "--clean", str(tmp_path / "clean.jsonl")]) == 0, "finished, and written once more"
    first = json.loads((tmp_path / "clean.jsonl").read_text().splitlines()[0])
    assert list(first) == [*rows[0], "weight"]


@pytest.mark.parametrize(
    "form",
    [
        lambda q, a, b: {"prompt": q, "response_a": b, "response_b": a, "winner": "model_b"},
        lambda q, a, b: {"chosen": [said("user", q), said("assistant", a)],
                         "rejected": [said("user", q), said("assistant", b)], "score_chosen": 4, "score_rejected": 2},
        lambda q, a, b: {"prompt": f"\n\nHuman: {q}\n\nAssistant:", "chosen": f" {a}", "rejected": f" {b}"},
    ],
    ids=["label", "conversations", "transcripts"],
)  # fmt: skip
def test_a_flipped_row_is_read_back_with_the_other_label(form, tmp_path):
    data = tmp_path / "d.jsonl"
    write_rows(data, [form(f"question {n}", f"right {n}", f"wrong {n}") for n in range(168)])
    rows = read_rows(str(data))
    found = audit([3.0, 6.0, 4.0, 5.0] * 40 + [-6.0] * 8, [row.id for row in rows], lam=0.8)
    assert found.count("flip") == 8
    write_rows(data, cleaned_records(rows, found, "flip"))
    again = read_rows(str(data))
    assert [row.prompt for row in again] == [row.prompt for row in rows]
    for number, row in enumerate(again):
        assert (row.chosen.split()[0], row.rejected.split()[0]) == (
            ("right", "wrong") if number < 160 else ("wrong", "right")
        )
        assert set(again.records[number].values) == set(rows.records[number].values)


def said(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize("target", ["reward", "dpo"])
def test_an_audit_after_a_training_on_the_same_pairs_scores_nothing(target, tmp_path, monkeypatch):
    data = tmp_path / "pairs.jsonl"
    write_rows(data, made_up())
    stage = {**recipe(**TARGETS[target])["stages"][0], "data": str(data), "noise": None}
    execute({"model": "tiny:llama", "stages": [stage]}, tmp_path / "run")

    def never(*_):
        raise AssertionError("scored again")

    for name in ("_reward_margins", "_policy_margins"):
        monkeypatch.setattr(margins, name, never)
    adapter = str(tmp_path / "run/01-r3m/adapter")
    assert cli.main(["audit", adapter, "--data", str(data), "--out", str(tmp_path / "audit.csv")]) == 0
    found, known = table_of(tmp_path / "audit.csv"), table_of(tmp_path / "run/01-r3m/audit.csv")
    assert len(found) == 30 > len(known)
    assert {id: found[id]["margin"] for id in known} == {id: line["margin"] for id, line in known.items()}
    (tmp_path / "run/.store.jsonl").unlink()
    with pytest.raises(AssertionError, match="scored again"):
        cli.main(["audit", adapter, "--data", str(data), "--out", str(tmp_path / "again.csv"), "--debug"])


def test_what_reads_cleaned_rows_reads_them_under_their_names(tmp_path):
    mapped(tmp_path / "mine.csv")
    audits = {"use": "audit", "id": "clean", "data": str(tmp_path / "mine.csv"), "columns": COLUMNS}
    learns = {"use": "r3m", "data": "${clean.cleaned}", "steps": 1}
    values = {**recipe(audits, learns, **TARGETS["reward"])}
    values["stages"][2]["model"] = "tiny:llama"
    plan = resolve(values, "example")
    assert plan.steps[2].config.columns == COLUMNS
    values["stages"][2]["columns"] = {"prompt": "author"}
    assert resolve(values, "example").steps[2].config.columns == {"prompt": "author"}
    values["stages"][2] = {"use": "r3m", "data": "${01-r3m.training}", "model": "tiny:llama"}
    assert resolve(values, "example").steps[2].config.columns == {}, "these have our names"
