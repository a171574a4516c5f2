"""What an answer costs, from text to seconds."""

import json
from dataclasses import replace

import pytest

from tenfold.arena.agents import Action, Turn
from tenfold.arena.latency import (
    Fixed,
    Measured,
    Tokens,
    Trace,
    latency_metrics,
    parse_latency,
    question_key,
    read_trace,
)
from tenfold.errors import ConfigError, DataError, RunError

ASKED = Turn("rules", "far", ("jab", "wait"), seed=3)
SAID = Action("jab", "jab", 0.7, prompt_tokens=200, tokens=4)


def questions(count):
    return [replace(ASKED, seed=seed) for seed in range(count)]


def test_each_kind_from_its_text(tmp_path):
    assert parse_latency("fixed:0.25").seconds(ASKED, SAID) == 0.25
    assert parse_latency("fixed:0").seconds(ASKED, SAID) == 0
    assert parse_latency("tokens:400,20").seconds(ASKED, SAID) == pytest.approx(0.5 + 0.2)
    assert parse_latency("tokens") == Tokens()
    assert parse_latency("measured").seconds(ASKED, SAID) == 0.7
    file = tmp_path / "a:b.jsonl"
    file.write_text("0.5\n")
    assert parse_latency(f"trace:{file}").seconds(ASKED, SAID) == 0.5


def test_a_trace_is_drawn_from_by_question_and_not_by_turn():
    """All lines come about equally often; the same question has the same cost, in any order and beside any other."""
    trace = Trace(tuple(range(5)))
    found = [trace.seconds(question, SAID) for question in questions(500)]
    assert min(found.count(value) for value in range(5)) > 70
    again = [trace.seconds(question, SAID) for question in reversed(questions(500))]
    assert again[::-1] == found
    assert len({trace.seconds(replace(ASKED, state=str(n)), SAID) for n in range(50)}) == 5


def test_what_is_measured_repeats_exactly_from_its_trace(tmp_path):
    file = tmp_path / "trace.jsonl"
    measured = Measured(file)
    answers = [replace(SAID, seconds=0.01 * n + 1e-17) for n in range(20)]
    first = [measured.seconds(question, answer) for question, answer in zip(questions(20), answers, strict=True)]
    assert first == [answer.seconds for answer in answers]
    slow = replace(SAID, seconds=9.0)
    replayed = parse_latency(f"trace:{file}")
    assert [replayed.seconds(question, slow) for question in reversed(questions(20))] == first[::-1]
    assert replayed.seconds(replace(ASKED, seed=99), slow) in first  # not among it: drawn
    assert [measured.seconds(question, slow) for question in questions(20)] == first  # the first time counts
    resumed = parse_latency("measured", record=file)
    assert [resumed.seconds(question, slow) for question in questions(21)] == [*first, 9.0]
    assert len(file.read_text().splitlines()) == 21
    assert json.loads(file.read_text().splitlines()[-1]) == {
        "question": question_key(questions(21)[20]),
        "seconds": 9.0,
    }


def test_lines_of_a_trace_may_be_numbers_or_objects(tmp_path):
    file = tmp_path / "trace.jsonl"
    file.write_text('0.5\n\n{"seconds": 1}\n{"seconds": 2.5, "question": "00ff00ff00ff00ff", "machine": "x"}\n')
    assert read_trace(file) == Trace((0.5, 1.0, 2.5), {"00ff00ff00ff00ff": 2.5})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fixd:0.2", "latency: 'fixd:0.2' is unknown"),
        ("", "latency: '' is unknown"),
        ("trace", "latency: 'trace' is unknown"),
        ("trace:", "latency: 'trace:' is unknown"),
        ("measured:now", "is unknown"),
        ("fixed", "is unknown"),
        ("fixed:", "fixed takes one number of seconds"),
        ("fixed:0.2s", "fixed takes one number of seconds"),
        ("fixed:1,2", "fixed takes one number of seconds"),
        ("fixed:-1", "fixed:-1"),
        ("fixed:nan", "fixed:nan"),
        ("fixed:inf", "fixed:inf"),
        ("tokens:100", "tokens takes two numbers"),
        ("tokens:0,5", "PREFILL of tokens:PREFILL,DECODE is 0"),
        ("tokens:5,-2", "DECODE of tokens:PREFILL,DECODE is -2"),
    ],
)
def test_texts_that_cannot_be_meant(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_latency(text)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("-1", "'-1'"),
        ("NaN", "'NaN'"),
        ("true", "'true'"),
        ("soon", "'soon'"),
        ('{"second": 1}', "second"),
        ('"1"', "1"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, shown):
    file = tmp_path / "trace.jsonl"
    file.write_text(f"0.5\n{line}\n")
    with pytest.raises(DataError, match=r"trace\.jsonl, line 2: .*" + shown):
        parse_latency(f"trace:{file}")


def test_files_that_are_no_trace(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: No such file"):
        read_trace(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.jsonl is empty"):
        read_trace(tmp_path / "empty.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"0.5\n\xff\n")
    with pytest.raises(DataError, match="not UTF-8 at byte 4"):
        read_trace(tmp_path / "bytes.jsonl")


def test_late_answers_are_counted():
    found = {metric.name: metric for metric in latency_metrics([0.1] * 90 + [3.0] * 10, deadline=3.0)}
    assert found["latency_p50"].value == pytest.approx(0.1)
    assert found["latency_p99"].value == pytest.approx(3.0)
    assert found["deadline_miss_rate"].value == 0  # at the deadline is in time
    late = latency_metrics([0.1] * 90 + [3.0] * 10, deadline=2.0)[-1]
    assert late.value == 0.1
    assert late.interval[0] < 0.1 < late.interval[1]
    assert [metric.name for metric in latency_metrics([0.2])] == ["latency_p50", "latency_p95", "latency_p99"]


def test_settings_of_code_are_checked_as_texts_are():
    with pytest.raises(ConfigError):
        Fixed(-0.1)
    with pytest.raises(ConfigError):
        Tokens(decode=0)


def test_an_answer_whose_tokens_nobody_counted_is_not_instant():
    with pytest.raises(RunError, match="'jab' came without a count"):
        Tokens().seconds(ASKED, Action("jab", "jab", 0.7))
