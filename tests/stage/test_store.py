"""Finished work is computed once, whatever happens in between."""

import json
import multiprocessing
import os
import signal
import time

import pytest

from tenfold.errors import DataError
from tenfold.stage.results import Metric, Result
from tenfold.stage.store import Store


def test_what_is_kept_is_not_computed_again(tmp_path):
    path = tmp_path / "deep" / "store.jsonl"
    result = Result(task="t", subject="after", metrics=(Metric(name="m", value=float("inf"), interval=(0.0, 1.0)),))
    first = Store(path).get("key", lambda: [result], list[Result])
    assert Store(path).get("key", lambda: pytest.fail("again"), list[Result]) == first == [result]


def test_the_first_time_gives_what_later_times_give(tmp_path):
    store = Store(tmp_path / "store.jsonl")
    assert store.get("key", lambda: {1: (2, 3)}) == {"1": [2, 3]} == Store(store.path).get("key", dict)


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_that_was_being_written_is_passed_over(tmp_path, cut):
    path = tmp_path / "store.jsonl"
    store = Store(path)
    store.add({"a": 1})
    whole = path.read_bytes()
    store.add({"b": 2, "c": 3})
    path.write_bytes(path.read_bytes()[: len(whole) + cut])
    again = Store(path)
    assert again.entries == {"a": 1}
    again.add({"d": 4})
    assert Store(path).entries == {"a": 1, "d": 4}


@pytest.mark.parametrize("text", ["mine\n", '{"a": 1}\n', "[]\n", '{"store": 3}\n'])
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "notes.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match="line 1: not written by a run"):
        Store(path).get("a", dict)
    assert path.read_text() == text


def square(number):
    if number < 0:
        raise ValueError(f"{number} is below 0")
    return number**2


@pytest.mark.parametrize("workers", [1, 2])
def test_map_keeps_order_and_what_was_finished(tmp_path, workers):
    told = []
    store = Store(tmp_path / "store.jsonl")
    store.add({"two": 4})
    items = {"three": 3, "two": 2, "one": 1}
    found = store.map(items, square, workers=workers, tell=lambda *counts: told.append(counts))
    assert list(found.items()) == [("three", 9), ("two", 4), ("one", 1)]
    assert told == [(2, 3), (3, 3)]


@pytest.mark.parametrize("workers", [1, 2])
def test_one_failure_loses_nothing_that_was_finished(tmp_path, workers):
    path = tmp_path / "store.jsonl"
    with pytest.raises(ValueError, match="-1 is below 0"):
        Store(path).map({"one": 1, "bad": -1}, square, workers=workers)
    assert Store(path).entries == {"one": 1}


def slow(number):
    time.sleep(0.3)
    return number


def work_on(path):
    Store(path).map({str(number): number for number in range(20)}, slow)


def test_killed_at_any_moment_it_goes_on(tmp_path):
    path = tmp_path / "store.jsonl"
    process = multiprocessing.get_context("spawn").Process(target=work_on, args=(path,))
    process.start()
    while not path.exists() or path.read_text().count("\n") < 2:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    done = len(Store(path).entries)
    assert 2 <= done < 20
    computed = []
    found = Store(path).map({str(number): number for number in range(20)}, lambda n: computed.append(n) or n)
    assert found == {str(number): number for number in range(20)}
    assert len(computed) == 20 - done


def test_values_without_a_form_in_json_are_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "store.jsonl"
    with pytest.raises(Exception, match="serialize"):
        Store(path).get("a", object)
    assert not path.exists() or json.loads(path.read_text() or "{}") == {}
