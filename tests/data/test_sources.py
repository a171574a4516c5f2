"""Bad input: each error names place, column and row, says what was expected and what to do."""

from __future__ import annotations

import gzip
import json
import subprocess

import pytest

from tenfold.data.read import read_rows
from tenfold.errors import ConfigError, DataError

USER = {"role": "user", "content": "a"}


def error(tmp_path, content: bytes | str, name: str = "d.jsonl", **options) -> str:
    """The message of reading a file of this content."""
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        read_rows(str(path), **options)
    assert caught.value.remedy
    return str(caught.value).replace(str(tmp_path) + "/", "")


def jsonl(*rows, **options) -> str:
    return "".join(json.dumps(row, **options) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('{"text": "a"}\n\n{"text": "b",}\n', ["d.jsonl, line 3, column 14", "malformed JSON", '{"text": "b",}']),
        ('{"text": "a"}\n["b"]\n', ["line 2", "a list, expected an object"]),
        (jsonl({"txt": "a"}), ["line 1", "no known kind", "completion: prompt, completion", "columns: {text: txt}"]),
        (
            jsonl({"prompt": "a", "completion": "b"}, {"prompt": "a", "completions": "b"}),
            ["line 2, column 'completion': missing", "did you mean 'completions'", "{completion: completions}"],
        ),
        (
            jsonl({"text": "a"}, {"prompt": "a", "completion": "b"}),
            ["line 2", "looks like a completion row, but the rows before it are text rows"],
        ),
        (jsonl({"text": 5}), ["line 1, column 'text': int 5, expected text", "{text: 5}"]),
        (jsonl({"text": "a"}, {"text": " \n"}), ["line 2, column 'text': empty text"]),
        (jsonl({"text": None}), ["column 'text': empty (null), expected text"]),
        ('{"text": "a\\ud800b"}\n', ["line 1, column 'text': half a surrogate pair (\\ud800) at character 2"]),
        ("", ["d.jsonl: has no rows"]),
        (jsonl({"id": 1, "text": "a"}, {"id": "1", "text": "b"}), ["line 2, column 'id'", "already used at", "line 1"]),
        (jsonl({"id": [1], "text": "a"}), ["column 'id': list [1], expected text or a whole number"]),
        (
            jsonl({"prompt": "p", "chosen": "x", "rejected": "x"}),
            ["none of its 1 rows can be used", "line 1: chosen and rejected are equal"],
        ),
        (
            jsonl({"messages": [USER, {"role": "asistant", "content": "b"}]}),
            ["message 2: unknown role 'asistant'", "did you mean 'assistant'?"],
        ),
        (jsonl({"messages": [USER, {"role": "assistant", "content": ""}]}), ["message 2, 'content': empty text"]),
        (jsonl({"messages": "hello"}), ["expected a list of messages"]),
        (jsonl({"text": "a", "label": 1}, {"text": "b", "label": "x"}), ["line 2, column 'label': 'x' is a name"]),
        (
            jsonl({"question": "q", "answers": ["a"], "context": ["c"], "gold": [1]}),
            ["column 'gold': passage 1 does not exist; 'context' has 1"],
        ),
        (jsonl({"question": "q", "answers": []}), ["column 'answers'", "expected text"]),
        (
            jsonl({"prompt": "q", "options": ["a", "b"], "answer": "C"}),
            ["column 'answer'", "expected an index, one of A, B, or the text"],
        ),
        (jsonl({"prompt": "q", "options": ["a", "b"], "answer": 2}), ["option 2 does not exist"]),
    ],
)
def test_json_lines_errors(tmp_path, content, parts):
    message = error(tmp_path, content)
    assert all(part in message for part in parts), message


def test_long_rows_are_shortened(tmp_path):
    assert len(error(tmp_path, jsonl({"text": "x" * 10_000, "prompt": 1, "completion": "y" * 10_000}))) < 500


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("text,label\na,1\nb\n", ["d.csv, line 3: 1 fields, but the header names 2"]),
        ('text,label\n"a\nb",1\n"c" d,2\n', ["d.csv, line 4: malformed CSV"]),
        ('text,label\n"a,1\n', ["d.csv, line 2: malformed CSV"]),
        ("text,text\na,b\n", ["line 1: the header names 'text' twice"]),
        ("prompt;completion\na;b\n", ["line 1: the header has one column", "';' separates names", "write commas"]),
        ("prompt\tcompletion\na\tb\n", ["line 1: the header has one column", "name a file with tabs .tsv"]),
        ("text,label\n", ["has no rows"]),
        ('text,label\n"a\nb",1\n,2\n', ["d.csv, line 4, column 'text': empty text"]),
        ("prompt,completion\na,b\n,c\n", ["line 3, column 'prompt': empty text"]),
    ],
)
def test_csv_errors_name_the_line_where_the_row_begins(tmp_path, content, parts):
    message = error(tmp_path, content, "d.csv")
    assert all(part in message for part in parts), message


def test_not_utf8_names_the_line_and_byte(tmp_path):
    message = error(tmp_path, b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    assert "line 2, byte 14: not UTF-8 (byte 0xe9)" in message


@pytest.mark.parametrize("name", ["d.jsonl", "d 1.jsonl", "d.jsonl.gz"])
@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_what_is_not_utf8_is_named_and_the_remedy_works(tmp_path, encoding, name):
    texts = ["café", "a\n“b” – c" if encoding != "latin-1" else "b"]
    content = jsonl(*({"id": str(n), "text": text} for n, text in enumerate(texts)), ensure_ascii=False)
    path = tmp_path / name
    raw = content.encode(encoding)
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    with pytest.raises(DataError) as caught:
        read_rows(str(path))
    assert ("UTF-" in str(caught.value)) or ("not UTF-8" in str(caught.value))
    subprocess.run(["sh", "-c", caught.value.remedy.removeprefix("convert it: ")], check=True)
    converted = tmp_path / f"utf8-{name.removesuffix('.gz')}"
    assert [row.text for row in read_rows(str(converted))] == texts


def test_a_zero_byte_in_text_is_named(tmp_path):
    assert "line 2, byte 13: a zero byte" in error(tmp_path, b'{"text": "a"}\n{"text": "bc\0"}\n')


def test_truncated_gzip(tmp_path):
    whole = gzip.compress(jsonl(*({"text": str(i) * 50} for i in range(2000))).encode())
    assert "cannot be read" in error(tmp_path, whole[: len(whole) // 2], "d.jsonl.gz")
    assert "cannot be read" in error(tmp_path, b"not gzip at all", "e.jsonl.gz")


def test_json_file_errors(tmp_path):
    assert "rename the file" in error(tmp_path, jsonl({"text": "a"}, {"text": "b"}), "d.json")
    assert "line 2, column" in error(tmp_path, '[{"text": "a"},\n {"text" "b"}]', "d.json")
    assert "holds an object, expected a list" in error(tmp_path, "{}", "d.json")
    assert "d.json, row 2: holds a number" in error(tmp_path, '[{"text": "a"}, 3]', "d.json")
    assert "has no rows" in error(tmp_path, " ", "d.json")


def test_parquet_names_the_row(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": ["a", "b", None]})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(DataError, match="row 3, column 'text': empty"):
        read_rows(str(tmp_path / "d.parquet"))
    assert "not readable as Parquet" in error(tmp_path, "no parquet", "e.parquet")


def test_missing_files_and_unknown_formats(tmp_path):
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(DataError, match=r"did you mean .*train\.jsonl"):
        read_rows(str(tmp_path / "trian.jsonl"))
    assert "unknown kind of file" in error(tmp_path, "", "d.xlsx")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no text files in this folder"):
        read_rows(str(tmp_path / "empty"))


def test_columns_that_do_not_exist(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(jsonl({"input": "a", "output": "b"}))
    with pytest.raises(ConfigError, match="did you mean 'prompt'"):
        read_rows(str(path), columns={"promt": "input", "completion": "output"})
    with pytest.raises(ConfigError, match="our name comes first"):
        read_rows(str(path), columns={"input": "prompt"})
    with pytest.raises(DataError, match=r"column 'outputs': missing.*\n.*\n.*completion: output}"):
        read_rows(str(path), columns={"prompt": "input", "completion": "outputs"})


class TestHub:
    """The hub's client is replaced at its public function; the rows it returns are real ``datasets`` objects."""

    @pytest.fixture
    def hub(self, monkeypatch):
        import datasets

        calls = []
        data = datasets.DatasetDict(
            {
                "train": datasets.Dataset.from_dict({"text": ["a", "", "b"]}),
                "test": datasets.Dataset.from_dict({"text": ["c"]}),
            }
        )

        def load(name, config=None, split=None):
            calls.append((name, config, split))
            if name == "user/gone":
                raise ConnectionError("Couldn't reach 'user/gone' on the Hub\nmore")
            return data if split is None else data[split]

        monkeypatch.setattr(datasets, "load_dataset", load)
        return calls

    @pytest.mark.parametrize(
        ("source", "call", "texts"),
        [
            ("hub:user/name", ("user/name", None, None), ["a", "b"]),
            ("hub:user/name:test", ("user/name", None, "test"), ["c"]),
            ("hub:user/name:small/test", ("user/name", "small", "test"), ["c"]),
        ],
    )
    def test_names(self, hub, source, call, texts):
        rows = read_rows(source)
        assert hub == [call]
        assert [row.text for row in rows] == texts

    def test_what_was_chosen_and_left_out_is_noted(self, hub):
        first, second = read_rows("hub:user/name").notes
        assert "read train, left test" in first
        assert "1 rows with empty text" in second

    def test_no_network_is_one_clear_error(self, hub):
        with pytest.raises(DataError, match="ConnectionError: Couldn't reach 'user/gone' on the Hub\n  -> check"):
            read_rows("hub:user/gone")


def test_a_file_in_the_home_folder(tmp_path, monkeypatch):
    """Recipes quote paths, so no shell expands them."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text('{"text": "some text"}\n')
    assert len(read_rows("~/rows.jsonl")) == 1
    with pytest.raises(DataError, match=r"no such file|not there|No such"):
        read_rows("~nobody-by-that-name/rows.jsonl")
