"""A folder appears whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tenfold.errors import RunError
from tenfold.models.folders import is_complete, read_record, write_folder


def fill(folder: Path, text: str = "abc", **options) -> None:
    with write_folder(folder, "model", **options) as partial:
        (partial / "weights").write_text(text)


def test_complete_with_sizes(tmp_path):
    fill(tmp_path / "out")
    assert read_record(tmp_path / "out")["files"] == {"weights": 3}
    assert is_complete(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("damage", ["shorter", "gone", "no record", "bad record"])
def test_damage_is_seen(tmp_path, damage):
    fill(tmp_path / "out")
    weights, record = tmp_path / "out" / "weights", tmp_path / "out" / "tenfold.json"
    {
        "shorter": lambda: weights.write_text("ab"),
        "gone": weights.unlink,
        "no record": record.unlink,
        "bad record": lambda: record.write_text('{"files": '),
    }[damage]()
    assert not is_complete(tmp_path / "out")


def test_failure_leaves_nothing(tmp_path):
    def interrupted() -> None:
        with write_folder(tmp_path / "out", "model") as partial:
            (partial / "weights").write_text("abc")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_failure_leaves_what_was_there(tmp_path):
    fill(tmp_path / "out", "old")
    with pytest.raises(ValueError, match="no"), write_folder(tmp_path / "out", "model"):
        raise ValueError("no")
    assert (tmp_path / "out" / "weights").read_text() == "old"


def test_ours_is_replaced_and_others_are_not(tmp_path):
    fill(tmp_path / "out", "old")
    fill(tmp_path / "out", "new")
    assert (tmp_path / "out" / "weights").read_text() == "new"
    (tmp_path / "theirs").mkdir()
    fill(tmp_path / "theirs")  # empty: nothing to lose
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").write_text("years of work")
    with pytest.raises(RunError, match="not written by tenfold"):
        fill(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1").exists()
    fill(tmp_path / "thesis", overwrite=True)
    assert is_complete(tmp_path / "thesis")
    assert len(list(tmp_path.iterdir())) == 3


def test_full_disk(tmp_path):
    with pytest.raises(RunError, match="No space left"), write_folder(tmp_path / "out", "model"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_parent_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        fill(tmp_path / "file" / "out")
