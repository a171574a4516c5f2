"""Bad rows: reading stops at the first, or leaves them out and says of each where it stands and why."""

from __future__ import annotations

import json

import pytest

from tenfold import cli
from tenfold.data.read import read_rows
from tenfold.errors import DataError
from tenfold.models.export import save_model
from tenfold.models.tiny import tiny_model
from tests.runs import execute

CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
BAD = {
    2: ('{"messages": [', "malformed JSON"),
    3: ("[1]", "holds a list, expected an object"),
    4: (json.dumps({"messages": [{"role": "narrator", "content": "q"}]}), "unknown role 'narrator'"),
    5: (json.dumps({"text": "another kind"}), "looks like a text row"),
    6: (json.dumps({"messages": [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}]}), "type 'image'"),
}


def chats(path, bad=BAD, count=12):
    """A file of conversations, with bad lines among them."""
    lines = []
    for number in range(1, count + 1):
        talk = [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"answer {number}"}]
        lines.append(bad[number][0] if number in bad else json.dumps({"messages": talk}))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_bad_rows_are_listed_with_place_and_reason(tmp_path):
    path = chats(tmp_path / "d.jsonl")
    with pytest.raises(DataError, match="line 2, column"):
        read_rows(str(path))
    rows = read_rows(str(path), on_bad_row="skip")
    assert len(rows) == 12 - len(BAD)
    assert [record.place for record in rows.records][:2] == [f"{path}, line 1", f"{path}, line 7"]
    for one, (line, (_, reason)) in zip(rows.left_out, BAD.items(), strict=True):
        assert (one.place, one.why) == (f"{path}, line {line}", "bad")
        assert reason in one.reason
        assert "\n" not in one.reason
    assert "5 rows cannot be read and were left out" in rows.notes[0]
    assert "line 2" in rows.notes[0]


def test_the_rows_that_are_left_hash_as_if_the_others_had_never_been(tmp_path):
    with_bad = read_rows(str(chats(tmp_path / "d.jsonl")), on_bad_row="skip")
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(dict(r.values)) + "\n" for r in with_bad.records))
    assert with_bad.sha256 == read_rows(str(tmp_path / "e.jsonl")).sha256


def test_tables_leave_out_uneven_rows_and_missing_labels(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("text,label\na,0\nb,1,2\nc,nan\nd,1\n")
    rows = read_rows(str(path), on_bad_row="skip")
    assert [(row.text, row.label) for row in rows] == [("a", 0), ("d", 1)]
    assert [one.reason.partition(":")[0] for one in rows.left_out] == ["3 fields, but the header names 2 (text, label)",
                                                                    "column 'label'"]  # fmt: skip
    path.write_text("text,label\nb,1,2\na,0\nd,1\n")
    assert [row.label for row in read_rows(str(path), on_bad_row="skip")] == [0, 1], "the first row is bad"


def test_where_no_row_is_left_the_first_reason_is_said(tmp_path):
    path = chats(tmp_path / "d.jsonl", dict.fromkeys((1, 2, 3), BAD[3]), 3)
    with pytest.raises(DataError, match=r"none of its 3 rows can be used; .*line 1: holds a list"):
        read_rows(str(path), on_bad_row="skip")


def test_a_file_that_is_damaged_as_a_whole_stops_either_way(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(CHAT).encode() + b"\n\xff\n")
    with pytest.raises(DataError, match="not UTF-8"):
        read_rows(str(path), on_bad_row="skip")


def test_a_run_counts_and_lists_what_it_left_out(tmp_path, capsys):
    data = chats(tmp_path / "d.jsonl", dict.fromkeys(range(2, 14), BAD[3]), 40)
    command = ["adapt", "tiny:llama", "--method", "lora", "--data", str(data), "--steps", "1", "--holdout", "0.2",
               "--out", str(tmp_path / "run")]  # fmt: skip
    assert cli.main(command) == 2
    assert "line 2: holds a list" in capsys.readouterr().err
    assert cli.main([*command, "--on-bad-row", "skip"]) == 0
    assert "12 rows cannot be read and were left out" in capsys.readouterr().out.replace("\n", " ")
    folder = tmp_path / "run" / "01-lora"
    listed = [json.loads(line) for line in (folder / "left_out.jsonl").read_text().splitlines()]
    assert [one["place"] for one in listed] == [f"{data}, line {n}" for n in range(2, 14)]
    summary = json.loads((folder / "summary.json").read_text())
    (table,) = (table for table in summary["tables"] if table["title"].startswith("Rows left out: 12"))
    assert table["rows"][0] == [f"{data}, line 2", "holds a list, expected an object"]
    assert len(table["rows"]) == 10
    assert "Rows left out: 12" in (tmp_path / "run" / "report.html").read_text()


def test_a_recipe_may_say_it_and_complete_data_leave_no_list(tmp_path):
    data = chats(tmp_path / "d.jsonl", {})
    stage = {"use": "lora", "data": str(data), "on_bad_row": "skip", "steps": 1, "holdout": 0.2}
    (summary,) = execute({"model": "tiny:llama", "stages": [stage]}, tmp_path / "run")
    assert not (tmp_path / "run/01-lora/left_out.jsonl").exists()
    assert not any("left out" in table.title for table in summary.tables)


NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REFUSED = (3, 7)


def turns(number, answer):
    talk = [{"role": "user", "content": f"{number}+1=?"}, {"role": "assistant", "content": answer}]
    return [*([{"role": "system", "content": "Be brief."}] if number in REFUSED else []), *talk]


@pytest.fixture
def strict(tmp_path):
    """A model whose template refuses system messages, and rows of which two have one."""
    opened = tiny_model("llama")
    opened.tokenizer.chat_template = NO_SYSTEM
    save_model(opened.model, opened.tokenizer, tmp_path / "model")
    chats, pairs = tmp_path / "chats.jsonl", tmp_path / "pairs.jsonl"
    numbers = range(1, 25)
    chats.write_text("".join(json.dumps({"messages": turns(n, f"{n + 1}"), "split": _side(n)}) + "\n" for n in numbers))
    pairs.write_text(
        "".join(
            json.dumps({"chosen": turns(n, f"{n + 1}"), "rejected": turns(n, "no"), "split": _side(n)}) + "\n"
            for n in numbers
        )
    )
    return str(tmp_path / "model"), {"chat": str(chats), "preference": str(pairs)}


def _side(number):
    return "train" if number % 4 else "test"


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ("chat", ["adapt", "--method", "lora", "--steps", "1"]),
        ("chat", ["evaluate", "--tasks", "perplexity"]),
        ("preference", ["align", "--target", "reward", "--steps", "1", "--lam", "0.5", "--rank", "2"]),
        ("preference", ["audit", "--reference", "MODEL"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_what_a_template_refuses_is_skipped_and_listed_wherever_it_is_read(kind, command, strict, tmp_path, capsys):
    model, data = strict
    verb, *flags = [model if word == "MODEL" else word for word in command]
    out = tmp_path / "run"
    whole = [verb, model, "--data", data[kind], *flags]
    whole += ["--out", str(out)] if verb != "audit" else ["--out", str(out / "audit.csv")]
    out.mkdir()
    assert cli.main(whole) == 2
    said = capsys.readouterr().err
    assert f"{data[kind]}, line 3: the chat template refuses these messages: System role not supported" in said
    assert cli.main([*whole, "--on-bad-row", "skip"]) == 0
    assert "2 rows cannot be written as the model reads them" in " ".join(capsys.readouterr().out.split())
    (file,) = tmp_path.rglob("left_out.jsonl")
    listed = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(one["place"], one["why"]) for one in listed] == [(f"{data[kind]}, line {n}", "refused") for n in REFUSED]
    assert all(one["reason"].startswith("the chat template refuses") for one in listed)
    tables = json.loads((file.parent / "summary.json").read_text())["tables"]
    assert [table["title"] for table in tables if "left out" in table["title"]] == ["Rows left out: 2"]


def test_an_audit_cleans_the_rows_that_it_could_read(strict, tmp_path):
    model, data = strict
    stage = {"use": "audit", "data": data["preference"], "reference": model, "on_bad_row": "skip"}
    execute({"model": model, "stages": [stage]}, tmp_path / "run")
    cleaned = [json.loads(line) for line in (tmp_path / "run/01-audit/cleaned.jsonl").read_text().splitlines()]
    assert cleaned
    assert all(row["chosen"][0]["role"] == "user" for row in cleaned)
