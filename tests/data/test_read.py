"""Reading: kinds, ids, hashes, splits."""

from __future__ import annotations

import csv
import gc
import gzip
import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold.data.groups import hash_share
from tenfold.data.read import read_rows
from tenfold.data.rows import Chat, Choice, Classification, Completion, Preference, Question, Text
from tenfold.errors import ConfigError, DataError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("values", "row"),
    [
        ({"text": "a"}, Text("7", "a")),
        ({"text": "a", "label": 1}, Classification("7", "a", 1)),
        ({"text": "a", "label": "x", "text_pair": "b"}, Classification("7", "a", "x", "b")),
        ({"prompt": "a", "completion": "b"}, Completion("7", "a", "b")),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, Preference("7", "a", "b", "c")),
        ({"messages": MESSAGES, "text": "too"}, Chat("7", tuple(MESSAGES))),
        ({"question": "a", "answers": "b"}, Question("7", "a", "", ("b",))),
        (
            {"question": "a", "answers": ["b", "c"], "context": [{"title": "T", "text": "d"}, "e"], "gold": 1},
            Question("7", "a", ("T\nd", "e"), ("b", "c"), (1,)),
        ),
        ({"prompt": "a", "options": ["b", "c"], "answer": 1}, Choice("7", "a", ("b", "c"), 1)),
        ({"prompt": "a", "options": {"X": "b", "Y": "c"}, "answer": "Y"}, Choice("7", "a", ("b", "c"), 1)),
        ({"prompt": "a", "options": ["b", "c"], "answer": "b"}, Choice("7", "a", ("b", "c"), 0)),
    ],
)
def test_kind_is_told_from_the_columns(tmp_path, values, row):
    rows = read_rows(write(tmp_path / "d.jsonl", [{"id": 7, "unused": None, **values}]))
    assert rows[0] == row


def test_columns_maps_our_names_to_theirs(tmp_path):
    source = write(tmp_path / "d.jsonl", [{"question": "a", "answer": "b", "text": "not meant"}])
    rows = read_rows(source, columns={"prompt": "question", "completion": "answer"})
    assert (rows.kind, rows[0].prompt, rows[0].completion) == ("completion", "a", "b")


def test_rows_can_be_named_when_columns_allow_two(tmp_path):
    source = write(tmp_path / "d.jsonl", [{"text": "a", "label": 1}])
    assert read_rows(source).kind == "classification"
    assert read_rows(source, rows="text")[0] == Text(read_rows(source, rows="text")[0].id, "a")


def test_every_format_gives_the_same_rows_and_hash(tmp_path):
    rows = [
        {"id": f"r{i}", "text": f'line {i}\nÄ "quoted", and more', "label": i % 3, "split": ["train", "test"][i % 2]}
        for i in range(5)
    ]
    source = write(tmp_path / "d.jsonl", rows)
    with gzip.open(tmp_path / "d.jsonl.gz", "wb") as file:
        file.write(Path(source).read_bytes())
    (tmp_path / "d.json").write_text(json.dumps(rows), encoding="utf-8")
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        with (tmp_path / f"d{suffix}").open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    found = {
        name: read_rows(str(tmp_path / name))
        for name in ("d.jsonl", "d.jsonl.gz", "d.json", "d.csv", "d.tsv", "d.parquet")
    }
    assert len({r.sha256 for r in found.values()}) == 1
    assert all(r.items == found["d.jsonl"].items and r.splits == found["d.jsonl"].splits for r in found.values())


def test_csv_cells_hold_lists_as_json_and_long_text(tmp_path):
    path = tmp_path / "d.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "answers", "context", "gold"])
        writer.writerow(["q", '["a", "b"]', "x" * 200_000, ""])
        writer.writerow(["q2", "[sic] an answer", '["p", "r"]', "[1]"])
    before = csv.field_size_limit()
    first, second = read_rows(str(path))
    assert (first.answers, len(first.context), first.gold) == (("a", "b"), 200_000, ())
    assert (second.answers, second.context, second.gold) == (("[sic] an answer",), ("p", "r"), (1,))
    assert csv.field_size_limit() == before


def test_text_folder_is_a_row_per_file(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("bee\r\n")
    (tmp_path / "sub/a.md").write_text("ay")
    (tmp_path / "skipped.bin").write_bytes(b"\xff")
    with gzip.open(tmp_path / "c.txt.gz", "wt") as file:
        file.write("see")
    rows = read_rows(str(tmp_path))
    assert [(row.id, row.text) for row in rows] == [("b.txt", "bee\r\n"), ("c.txt.gz", "see"), ("sub/a.md", "ay")]


def test_ids_are_hashes_of_the_content_and_survive_reordering(tmp_path):
    rows = [{"text": f"row {i}"} for i in range(20)]
    there = read_rows(write(tmp_path / "a.jsonl", rows))
    back = read_rows(write(tmp_path / "b.jsonl", rows[::-1]))
    assert {row.id: row.text for row in there} == {row.id: row.text for row in back}
    assert there.sha256 != back.sha256
    assert {row.id for row in there.split(0.5)[1]} == {row.id for row in back.split(0.5)[1]}


def test_repeated_rows_without_an_id_are_left_out_and_counted(tmp_path):
    rows = read_rows(write(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}, {"text": "a"}]))
    assert [row.text for row in rows] == ["a", "b"]
    assert "1 rows without an id repeat" in rows.notes[0]
    assert "line 3" in rows.notes[0]


def open_files(path):
    return [o for o in gc.get_objects() if type(o) is io.FileIO and o.name == str(path) and not o.closed]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "jsonl.gz"])
def test_a_file_is_closed_while_the_error_about_its_row_is_still_held(tmp_path, kind):
    path = tmp_path / f"d.{kind}"
    rows = "prompt,completion\n1,\n2,b\n" if kind == "csv" else '{"prompt": "1"}\n{"prompt": "2"}\n'
    path.write_bytes(gzip.compress(rows.encode()) if kind.endswith("gz") else rows.encode())
    with pytest.raises(DataError, match=r"line \d") as caught:
        read_rows(str(path))
    assert not open_files(path), caught  # still held here


def test_limit_reads_no_further(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\nbroken\n')
    assert len(read_rows(str(path), limit=2)) == 2


@given(st.text())
def test_split_rule_is_the_documented_one(key):
    digest = hashlib.sha256(b"tenfold-v1|" + key.encode()).hexdigest()
    assert hash_share(key) == int(digest[:8], 16) / 2**32 < 1


def test_split_keeps_every_row_once_and_grows_monotonically(tmp_path):
    rows = read_rows(write(tmp_path / "a.jsonl", [{"id": i, "text": str(i)} for i in range(300)]))
    train, held = rows.split(0.1)
    assert sorted([*train, *held], key=lambda row: int(row.id)) == list(rows)
    assert {row.id for row in held} == {row.id for row in rows if hash_share(row.id) < 0.1}
    assert {row.id for row in held} < {row.id for row in rows.split(0.3)[1]}
    assert 10 < len(held) < 60


@pytest.mark.parametrize(
    ("splits", "train", "held"),
    [
        (["train", "dev", "train", "test"], ["0", "2"], ["1", "3"]),
        (["valid", "test", "valid", "test"], ["0", "2"], ["1", "3"]),
    ],
)
def test_own_split_column_wins_and_a_note_says_so(tmp_path, splits, train, held):
    source = write(tmp_path / "a.jsonl", [{"id": i, "text": str(i), "split": s} for i, s in enumerate(splits)])
    parts = read_rows(source).split(0.5)
    assert [[row.id for row in part] for part in parts] == [train, held]
    assert all("own split column" in part.notes[-1] for part in parts)


def test_a_split_column_that_cannot_divide_gives_way_to_the_hash(tmp_path):
    rows = [{"id": i, "text": str(i), "split": "train"} for i in range(100)]
    train, held = read_rows(write(tmp_path / "a.jsonl", rows)).split(0.2)
    assert {row.id for row in held} == {str(i) for i in range(100) if hash_share(str(i)) < 0.2}
    assert train.notes == ()


@pytest.mark.parametrize("count", [2, 5, 40])
def test_a_small_file_has_something_to_hold_out(tmp_path, count):
    """Whatever the hashes: forty rows of which none falls below a tenth still give a tenth, five rows give one."""
    for trial in range(20):
        rows = read_rows(write(tmp_path / "a.jsonl", [{"id": f"{trial}-{i}", "text": str(i)} for i in range(count)]))
        train, held = rows.split(0.1)
        by_hash = [row for row in rows if hash_share(row.id) < 0.1]
        assert len(held) == (len(by_hash) or max(1, count // 10))
        assert len(train) + len(held) == count
        assert {row.id for row in rows[::-1].split(0.1)[1]} == {row.id for row in held}


def test_what_cannot_be_split_is_an_error(tmp_path):
    rows = read_rows(write(tmp_path / "a.jsonl", [{"id": i, "text": str(i)} for i in range(3)]))
    with pytest.raises(DataError, match="1 row, which cannot be split"):
        rows[:1].split(0.5)
    with pytest.raises(ConfigError):
        rows.split(1.0)


def test_slices_are_rows_with_their_splits(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"id": i, "text": str(i), "split": "train"} for i in range(4)])
    part = read_rows(source)[1:3]
    assert [row.id for row in part] == ["1", "2"]
    assert part.splits == ("train", "train")
    assert part.sha256 != read_rows(source).sha256


def test_reading_imports_no_torch(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"text": "a"}])
    code = (
        "import sys; from tenfold.data.read import read_rows; "
        f"read_rows({source!r}); read_rows('python-reference'); "
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_real_data_reads_with_its_own_splits(shared_data):
    rows = read_rows(str(shared_data / "qa_nq_distractors.jsonl.gz"))
    train, dev = rows.split(0.1)
    assert (rows.kind, len(train), len(dev)) == ("question", 1154, 1000)
    assert all(len(row.context) == 10 and len(row.gold) == 1 for row in rows)
    assert all(any(answer.lower() in row.context[row.gold[0]].lower() for answer in row.answers) for row in dev[:50])


def test_real_data_of_many_kinds_reads(shared_data):
    expected = {
        "lm_wikitext2": ("text", {}),
        "cls_rte": ("classification", {"text": "premise", "text_pair": "hypothesis"}),
        "pref_hh_harmless": ("preference", {}),
        "math_gsm8k": ("completion", {"prompt": "question", "completion": "rationale"}),
        "mcq_commonsenseqa": ("choice", {"prompt": "question", "options": "choices"}),
    }
    for name, (kind, columns) in expected.items():
        rows = read_rows(str(shared_data / f"{name}.jsonl.gz"), columns=columns)
        assert rows.kind == kind
        assert len(rows) > 100
