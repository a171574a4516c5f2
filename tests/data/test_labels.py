"""Labels and ids as tables have them: codes, numbers as pandas writes them, what is missing."""

from __future__ import annotations

import json

import pytest

from tenfold.data.read import read_rows
from tenfold.errors import DataError


def table(tmp_path, *labels):
    path = tmp_path / "d.csv"
    path.write_text("text,label\n" + "".join(f"text {n},{label}\n" for n, label in enumerate(labels)))
    return read_rows(str(path))


@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        (("0", "1", "-2"), [0, 1, -2]),
        (("0.0", "1.0"), [0, 1]),
        (("12345678901234567", "12345678901234568"), [12345678901234567, 12345678901234568]),
        (("0", "0.5", "1e-3"), [0.0, 0.5, 0.001]),
        (("007", "012"), ["007", "012"]),
        (("12", "007"), ["12", "007"]),  # one code makes codes of all, wherever it stands
        (("007", "12"), ["007", "12"]),
        (("EU", "NA", "1"), ["EU", "NA", "1"]),
        (("1_0", "2"), ["1_0", "2"]),
        (("yes", "no"), ["yes", "no"]),
    ],
)
def test_what_labels_are_is_told_from_the_whole_column(tmp_path, cells, labels):
    found = [row.label for row in table(tmp_path, *cells)]
    assert found == labels
    assert len({type(label) for label in found}) == 1


@pytest.mark.parametrize("missing", ["nan", "NaN", "NA", "null", "inf"])
def test_a_missing_label_among_numbers_is_named(tmp_path, missing):
    with pytest.raises(DataError, match="line 3, column 'label'"):
        table(tmp_path, "0.5", missing, "1")


def test_an_empty_cell_is_named(tmp_path):
    with pytest.raises(DataError, match="line 3, column 'label': empty text"):
        table(tmp_path, "0.5", "", "1")


@pytest.mark.parametrize("label", ["NaN", "Infinity", "-Infinity"])
def test_a_label_of_a_json_file_that_is_not_finite_is_named(tmp_path, label):
    path = tmp_path / "d.jsonl"
    path.write_text(f'{{"text": "a", "label": 0.5}}\n{{"text": "b", "label": {label}}}\n')
    with pytest.raises(DataError, match=r"line 2, column 'label': .*not finite"):
        read_rows(str(path))


def test_words_for_what_is_missing_are_texts(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("text\nnull\nNA\nnan\n")
    assert [row.text for row in read_rows(str(path))] == ["null", "NA", "nan"]


def test_ids_are_text_whole_numbers_or_what_pandas_makes_of_them(tmp_path):
    path = tmp_path / "d.jsonl"
    ids = [7, "7a", 8.0]
    path.write_text("".join(json.dumps({"id": id, "text": f"text {id}"}) + "\n" for id in ids))
    assert [row.id for row in read_rows(str(path))] == ["7", "7a", "8"]
    for bad in ("1.5", "NaN", "true", "[1]"):
        path.write_text(f'{{"id": {bad}, "text": "a"}}\n')
        with pytest.raises(DataError, match="column 'id'"):
            read_rows(str(path))
    path.write_text('{"id": 1, "text": "a"}\n{"id": "1", "text": "b"}\n')
    with pytest.raises(DataError, match="'1' was already used"):
        read_rows(str(path))
