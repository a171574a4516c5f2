"""A run writes over its own files and over nobody else's."""

import shutil

import pytest
from rich.console import Console

from tenfold import cli
from tenfold.errors import DataError, FolderError
from tenfold.pipeline import folder
from tenfold.pipeline import run as runner
from tenfold.pipeline.ownership import RECORD, check_out, owned
from tenfold.pipeline.recipe import resolve
from tenfold.pipeline.stages import verbs

QUIET = Console(quiet=True)


@pytest.fixture
def values():
    stage = {"use": "generate", "prompts": ["3 squared is"], "max_new_tokens": 2, "chat": "no"}
    return {"model": "tiny:llama", "stages": [stage]}


def execute(values, out):
    return runner.run(resolve(values, "test"), out, QUIET)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


RECIPE = "# mine\nmodel: tiny:llama\nstages:\n  - {use: generate, max_new_tokens: 2, chat: no}\n"


@pytest.mark.parametrize("out", [".", "..", "sub", "link", "recipe.yaml"])
def test_a_folder_of_the_user_keeps_every_file(out, tmp_path, monkeypatch, capsys):
    here = tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    (here / "sub/notes.txt").write_text("mine")
    (here / "link").symlink_to(here / "sub")
    (here / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(here)
    before = contents(tmp_path)
    assert cli.main(["run", "recipe.yaml", "--out", out]) == 2
    said = capsys.readouterr().err
    assert "--out" in said
    assert "this is a bug" not in said
    assert contents(tmp_path) == before


VERBS = {
    "adapt": ["tiny:llama", "--data", "ROWS", "--steps", "1"],
    "align": ["tiny:llama", "--data", "ROWS"],
    "audit": ["tiny:llama", "--data", "ROWS"],
    "lengthen": ["tiny:llama", "--data", "ROWS"],
    "compress": ["tiny:llama", "--data", "ROWS"],
    "steer": ["tiny:llama", "--prompts", "<mark>a</mark>"],
    "generate": ["tiny:llama"],
    "evaluate": ["tiny:llama", "--data", "ROWS", "--tasks", "perplexity"],
    "play": [],
    "choose": [],
    "export": ["tiny:llama"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_writes_into_a_folder_of_the_user(verb, number_rows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    flags = [str(number_rows) if word == "ROWS" else word for word in VERBS[verb]]
    assert set(VERBS) == set(verbs())
    assert cli.main([verb, *flags, "--out", "."]) == 2
    assert "holds files that no run wrote (recipe.yaml)" in capsys.readouterr().err
    assert contents(tmp_path) == {"recipe.yaml": RECIPE.encode()}


@pytest.mark.parametrize("name", [".lock", ".hidden", "01-generate", "report.html"])
def test_any_file_makes_a_folder_the_users(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FolderError, match=f"no run wrote \\({name}\\)"):
        check_out(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_a_new_folder_an_empty_one_and_a_link_to_one_are_ours(values, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("new/deep", "link"):
        execute(values, tmp_path / name)
        execute(values, tmp_path / name)
    assert (tmp_path / "empty/01-generate/summary.json").exists()


def test_a_link_to_nothing_is_refused(values, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(FolderError, match="a link to nothing"):
        execute(values, tmp_path / "link")


def test_a_recipe_that_was_edited_in_the_run_folder_is_kept(values, tmp_path):
    execute(values, tmp_path)
    written = (tmp_path / "recipe.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text("# my notes\n" + written)
    with pytest.raises(FolderError, match=r"recipe\.yaml: was not written by a run"):
        execute(values, tmp_path)
    (tmp_path / "recipe.yaml").write_text(written)
    values["seed"] = 3
    execute(values, tmp_path)
    assert "seed: 3" in (tmp_path / "recipe.yaml").read_text()


def test_a_recipe_that_was_put_in_place_of_ours_is_kept(values, tmp_path):
    execute(values, tmp_path / "run")
    (tmp_path / "mine.yaml").write_text(RECIPE)
    (tmp_path / "run/recipe.yaml").unlink()
    (tmp_path / "run/recipe.yaml").symlink_to(tmp_path / "mine.yaml")
    with pytest.raises(FolderError, match=r"recipe\.yaml"):
        execute(values, tmp_path / "run")
    assert (tmp_path / "mine.yaml").read_text() == RECIPE


def test_notes_in_a_stage_are_kept_when_it_would_run_again(values, tmp_path):
    execute(values, tmp_path)
    notes = tmp_path / "01-generate/deep/notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    execute(values, tmp_path)  # finished already: nothing is lost
    values["stages"][0]["max_new_tokens"] = 3
    with pytest.raises(FolderError, match=r"notes\.txt: no run wrote this"):
        execute(values, tmp_path)
    assert notes.read_text() == "mine"
    shutil.rmtree(notes.parent)
    execute(values, tmp_path)


def test_an_interrupted_run_goes_on(values, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_execute", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            execute(values, out)
    assert (out / RECORD).exists()
    execute(values, out)
    with monkeypatch.context() as patch:  # killed between the record and the file
        patch.setattr("tenfold.pipeline.ownership.write_text", _stops_at_the_recipe)
        with pytest.raises(KeyboardInterrupt):
            execute({**values, "seed": 1}, out)
    assert execute({**values, "seed": 2}, out)


def _stops_at_the_recipe(path, text):
    if path.name == "recipe.yaml":
        raise KeyboardInterrupt
    path.write_text(text)


def test_a_folder_that_was_only_locked_is_ours(values, tmp_path):
    (tmp_path / ".lock").touch()
    execute(values, tmp_path)


def test_a_damaged_record_is_refused(tmp_path):
    (tmp_path / RECORD).write_text("{")
    with pytest.raises(FolderError, match="damaged"):
        owned(tmp_path)


def test_a_table_outside_of_the_run_folder(tmp_path):
    (tmp_path / "run").mkdir()
    table = tmp_path / "audit.csv"
    table.write_text("mine")
    with pytest.raises(FolderError, match="would be lost"):
        owned(tmp_path / "run").write(table, "ours")
    table.unlink()
    for text in ("ours", "ours again"):
        owned(tmp_path / "run").write(table, text)
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    owned(tmp_path / "elsewhere").write(table, "and again")
    assert table.read_text() == "and again"


@pytest.mark.parametrize("name", ["report.html", "environment.json"])
def test_a_page_or_record_of_the_user_in_a_run_folder_is_kept(name, values, tmp_path):
    """Also where the run wrote such a file before: what lies there now is somebody else's."""
    execute(values, tmp_path / "run")
    execute(values, tmp_path / "run")  # its own are written again
    (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(FolderError, match=name):
        execute(values, tmp_path / "run")
    assert (tmp_path / "run" / name).read_text() == "mine"


def test_a_file_has_one_name_however_its_path_is_written(tmp_path):
    for name in ("run", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other")
    ours = owned(tmp_path / "run")
    ours.write(tmp_path / "other/../profile.json", "one")
    ours.write(tmp_path / "profile.json", "two")
    ours.write(tmp_path / "link/profile.json", "one")
    ours.write(tmp_path / "other/profile.json", "two")


@pytest.mark.parametrize("there", [False, True])
def test_a_refused_run_leaves_no_folder_that_it_made(there, values, tmp_path):
    out = tmp_path / "a/b/run"
    if there:
        out.parent.mkdir(parents=True)
    values["stages"][0] = {"use": "evaluate", "tasks": ["perplexity"], "data": str(tmp_path / "nowhere.jsonl")}
    with pytest.raises(DataError, match="no such file"):
        execute(values, out)
    assert not out.exists()
    assert (tmp_path / "a/b").is_dir() == (tmp_path / "a").is_dir() == there


def test_a_refused_run_removes_nothing_that_was_there(values, tmp_path):
    out = tmp_path / "run"
    execute(values, out)
    before = contents(out)
    values["stages"][0]["prompts"] = ["3 cubed is"]
    values["stages"].append({"use": "evaluate", "tasks": ["perplexity"], "data": str(tmp_path / "nowhere.jsonl")})
    with pytest.raises(DataError):
        execute(values, out)
    assert contents(out) == before
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError):
        execute(values, empty)
    assert empty.is_dir()


def test_a_run_that_came_between_keeps_its_folder(tmp_path):
    out = tmp_path / "run"

    def refused():
        with folder.writable(out) as made, folder.removed_if_refused(out, made):
            (out / "recipe.yaml").write_text("another's")
            raise DataError("no")

    with pytest.raises(DataError):
        refused()
    assert (out / "recipe.yaml").exists()
