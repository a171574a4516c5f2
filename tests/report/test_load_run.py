import json

import pytest

from tenfold.errors import RunError
from tenfold.report.load import load_run
from tenfold.stage.record import SCHEMA_VERSION


@pytest.fixture
def folder(tmp_path, run_stages, steps):
    (tmp_path / "recipe.yaml").write_text("model: demo\n")
    for stage in run_stages:
        path = tmp_path / stage.folder
        path.mkdir()
        (path / "summary.json").write_text(stage.model_dump_json())
    (tmp_path / "01-lora" / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (tmp_path / ".04-export").mkdir()
    (tmp_path / "notes").mkdir()
    return tmp_path


def test_a_run_comes_back_as_it_was_written(folder, run_stages, steps):
    recipe, summaries, metrics = load_run(folder)
    assert recipe == "model: demo\n"
    assert summaries == run_stages
    assert metrics == {"01-lora": steps, "02-evaluate": [], "03-generate": []}


def test_stages_come_in_the_order_of_their_numbers(folder, make_summary):
    (folder / "100-late").mkdir()
    late = make_summary(index=100, stage="late")
    (folder / "100-late" / "summary.json").write_text(late.model_dump_json())
    assert [summary.index for summary in load_run(folder)[1]] == [1, 2, 3, 100]


def test_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: demo\n")
    assert load_run(tmp_path) == ("model: demo\n", [], {})


def damaged(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(RunError) as caught:
        load_run(folder)
    assert name in str(caught.value)
    assert caught.value.remedy
    return str(caught.value)


def test_no_run(tmp_path):
    with pytest.raises(RunError, match="not a run: it has no recipe"):
        load_run(tmp_path)
    with pytest.raises(RunError, match="no such folder"):
        load_run(tmp_path / "absent")


def test_a_newer_schema_says_to_upgrade(folder):
    newer = {"schema_version": SCHEMA_VERSION + 1, "tenfold_version": "9.0", "unknown": 1}
    message = damaged(folder, "02-evaluate/summary.json", json.dumps(newer).encode())
    assert "9.0" in message
    assert "pip install --upgrade tenfold" in message


@pytest.mark.parametrize("content", [b"", b'{"index": 1', b"[]", b'{"index": "x"}', b"\xff\xfe", b"null"])
def test_a_corrupt_summary_is_named(folder, content):
    assert "tenfold run" in damaged(folder, "02-evaluate/summary.json", content)


def test_a_missing_summary_is_named(folder):
    (folder / "03-generate" / "summary.json").unlink()
    with pytest.raises(RunError, match="03-generate"):
        load_run(folder)


@pytest.mark.parametrize("line", [b'{"step": 30, "lo', b"[1]", b'{"loss": 1.0}'])
def test_a_corrupt_line_of_the_log_is_named(folder, line):
    before = (folder / "01-lora" / "metrics.jsonl").read_bytes()
    assert "line 6" in damaged(folder, "01-lora/metrics.jsonl", before + line)
