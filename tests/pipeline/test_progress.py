"""A part that takes long says so, with steps or without."""

import io

import pytest
from rich.console import Console

from tenfold.stage import progress as module
from tenfold.stage.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def told(clock):
    """A progress without a terminal, and what it has printed."""
    file = io.StringIO()
    progress = Progress(Console(file=file, width=80))

    def at(second):
        clock[0] = 1000.0 + second
        progress.beat(clock[0])
        return file.getvalue().splitlines()

    return progress, at


def test_a_part_without_steps_is_named_after_five_seconds(told):
    progress, at = told
    progress.begin("opening demo")
    assert at(4) == []
    assert at(5) == ["  opening demo: for 5.00 s"]
    assert len(at(14)) == 1
    assert at(15)[1:] == ["  opening demo: for 15.0 s"]
    assert len(at(34)) == 2
    assert at(35)[2:] == ["  opening demo: for 35.0 s"]
    assert at(615)[-1] == "  opening demo: for 10.2 min"
    assert len(at(674)) == 4
    assert len(at(675)) == 5, "once a minute in the end"


def test_a_quick_part_says_nothing(told):
    progress, at = told
    progress.begin("reading")
    at(3)
    progress.begin("writing")
    assert at(7) == []


def test_steps_are_told_every_ten_seconds_and_a_slow_step_in_between(told):
    progress, at = told
    at(0)
    progress("training", 1, 100)
    assert at(9) == ["  training: 1/100"]
    assert at(12)[1:] == ["  training: for 12.0 s"]
    progress("training", 2, 100, "loss 2.3")
    assert at(13)[2:] == ["  training: 2/100 loss 2.3"]
    progress("training", 100, 100)
    assert at(14)[3:] == ["  training: 100/100"]


def test_a_terminal_has_a_bar_for_a_part_without_steps(clock):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Progress(console) as progress:
        progress.begin("opening demo")
        progress("training", 1, 4)
        assert [task.description for task in progress._bar.tasks] == ["training"]
        progress.begin("writing the model")
        assert [(task.description, task.total) for task in progress._bar.tasks] == [("writing the model", None)]


def test_the_watch_ends_with_the_block():
    import threading

    before = set(threading.enumerate())
    with Progress(Console(file=io.StringIO())):
        (watch,) = set(threading.enumerate()) - before
    watch.join(10)
    assert not watch.is_alive()


def test_names_and_paths_are_printed_as_they_are(told, clock):
    progress, at = told
    progress.begin("opening tiny:llama")  # `:llama:` is a picture in rich's markup, and [x] a style
    assert at(6) == ["  opening tiny:llama: for 6.00 s"]
    progress("opening runs/[x]/:smile:", 1, 1)
    progress.say("written to runs/[x]")
    assert at(7)[1:] == ["  opening runs/[x]/:smile:: 1/1", "written to runs/[x]"]
