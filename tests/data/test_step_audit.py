"""StepAudit: everything that it says of itself is recomputed here from the texts alone."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections import Counter

import pytest

from tenfold.data.read import read_rows
from tenfold.data.sources import open_source
from tenfold.data.step_audit import (
    FACTORS,
    TOKENS,
    answer_text,
    from_source,
    problem,
    prompt,
    step_audit,
    trace,
)
from tenfold.errors import ConfigError, DataError

ITEMS = list(step_audit(400, seed=3))
COMPUTE = {"+": lambda v, d: (v + d) % 10, "-": lambda v, d: (v - d) % 10, "*": lambda v, d: v * d % 10}
VERBS = {"Add": "+", "Subtract": "-", "Multiply by": "*"}


def recomputed(item):
    """Start, operations and values, from the words of the judge's problem."""
    words = problem(item).split()
    assert words[0] == "S"
    assert words[2] == ";"
    start, chain = int(words[1]), words[3 : words.index("A")]
    assert chain[2::3] == [";"] * (len(chain) // 3)
    operations = [(sign, int(digit)) for sign, digit in zip(chain[0::3], chain[1::3], strict=True)]
    values = list(itertools.accumulate(operations, lambda v, o: COMPUTE[o[0]](v, o[1]), initial=start))
    return start, operations, values[1:]


def test_values_are_those_of_the_operations():
    for item in ITEMS:
        start, operations, values = recomputed(item)
        assert (item.start, [tuple(o) for o in item.operations], list(item.values)) == (start, operations, values)
        assert all(1 <= digit <= 9 and (sign != "*" or digit in FACTORS) for sign, digit in operations)


def test_exactly_one_claim_is_right_and_the_grade_is_its_distance():
    for item in ITEMS:
        a, b = (claim == recomputed(item)[2][-1] for claim in item.claims)
        assert a != b
        assert item.label == ("A" if a else "B")
        assert item.distance == min(3, abs(item.claims[0] - item.claims[1]))
        assert item.score == (-item.distance if a else item.distance)
    assert {abs(item.score) for item in ITEMS} == {1, 2, 3}


def test_neither_position_nor_claim_betrays_the_label():
    items = list(step_audit(4000, seed=0))
    assert sum(item.label == "A" for item in items) == pytest.approx(2000, abs=130)
    for digits in (
        Counter(item.values[-1] for item in items),
        Counter(sum(item.claims) - item.values[-1] for item in items),
    ):
        assert all(count == pytest.approx(400, abs=90) for count in digits.values())
        assert len(digits) == 10


@pytest.mark.parametrize(("stride", "words"), [(1, 30), (2, 21), (3, 18), (6, 15), (None, 6)])
def test_traces_recomputed(stride, words):
    for item in ITEMS[:100]:
        _, operations, values = recomputed(item)
        written = trace(item, stride).split()
        assert len(written) == words, "tokens per verdict, table of the specification"
        assert set(written) | set(problem(item).split()) <= set(TOKENS)
        end = written.index("</think>")
        assert written[end + 1 :] == ["<answer>", item.label, "</answer>", "<eos>"]
        thought = written[1:end]
        if stride is None:
            assert thought == []
            continue
        steps, checks = thought[:-6], thought[-6:]
        shown = range(stride - 1, 6, stride)
        assert steps == [w for k in shown for w in (operations[k][0], str(operations[k][1]), str(values[k]))]
        right = ["y" if claim == values[-1] else "n" for claim in item.claims]
        assert checks == ["A", str(item.claims[0]), right[0], "B", str(item.claims[1]), right[1]]


def test_a_stride_that_hides_the_last_value_is_refused():
    for stride in (0, -1, 4, 12):
        with pytest.raises(ConfigError, match=f"stride: {stride} does not divide the 6 operations"):
            trace(ITEMS[0], stride)


def test_answers_show_their_work_and_each_line_is_judged_by_the_one_before():
    for item in ITEMS:
        told = re.findall(r"(Add|Subtract|Multiply by) (\d)\.", prompt(item))
        for answer in (item.better, item.worse):
            *lines, last = answer_text(item, answer).split("\n")
            assert len(lines) == 6
            before, rewards = item.start, []
            for (verb, digit), line in zip(told, lines, strict=True):
                value, sign, operand, equals, after = line.split()
                assert (int(value), sign, operand, equals) == (before, VERBS[verb], digit, "=")
                rewards.append(float(COMPUTE[sign](before, int(operand)) == int(after)))
                before = int(after)
            assert last == f"The result is {before}."
            assert tuple(rewards) == answer.rewards
        assert sum(item.better.rewards) > sum(item.worse.rewards)


def test_slips_are_early_and_late_and_of_any_number():
    slips = Counter(step for item in ITEMS for step, reward in enumerate(item.worse.rewards) if not reward)
    assert len(slips) == 6
    assert max(slips.values()) < 1.3 * min(slips.values())
    assert {sum(item.better.rewards) for item in ITEMS} == set(range(1, 7))
    # Neither answer need be as good as the other at each step: else a myopic judge could not err.
    assert any(b < w for item in ITEMS for b, w in zip(item.better.rewards, item.worse.rewards, strict=True))


def test_one_slip_always_spoils_the_result():
    ones = [item for item in ITEMS if sum(item.better.rewards) == 5]
    assert ones
    assert all(item.better.values[-1] != item.values[-1] for item in ones)


def test_a_seed_gives_the_same_items_and_few_are_the_first_of_many():
    assert list(step_audit(20, seed=3)) == ITEMS[:20]
    assert list(step_audit(20, seed=4)) != ITEMS[:20]
    assert len({item.id for item in ITEMS}) == len(ITEMS)
    assert len({(item.start, item.operations) for item in ITEMS}) == len(ITEMS)
    # Frozen for ever: results are compared across versions.
    assert problem(next(step_audit(1, seed=0))) == "S 9 ; + 1 ; + 4 ; - 5 ; - 4 ; - 6 ; - 8 ; A 5 B 1 ? |"


def test_any_number_of_steps():
    item = next(step_audit(1, seed=0, steps=1))
    assert len(item.values) == len(item.better.values) == 1
    assert item.better.rewards == (1.0,)
    assert item.worse.rewards == (0.0,)
    with pytest.raises(ConfigError, match="steps: 0 is below 1"):
        step_audit(1, 0, steps=0)
    with pytest.raises(ConfigError, match="count: 0 is below 1"):
        step_audit(0, 0)
    with pytest.raises(ConfigError, match="seed: -1 is below 0"):
        step_audit(1, -1)


def test_as_a_source_of_preference_rows():
    rows = read_rows("step-audit:50:3")
    assert (rows.kind, len(rows), rows.source) == ("preference", 50, "step-audit:50:3")
    item = ITEMS[7]
    assert rows[7].id == item.id
    assert rows[7].prompt == prompt(item)
    assert (rows[7].chosen, rows[7].rejected) == (answer_text(item, item.better), answer_text(item, item.worse))
    assert rows.sha256 == read_rows("step-audit:50:3").sha256 != read_rows("step-audit:50").sha256
    raw = list(open_source("step-audit:50:3").records)[7]
    assert raw.place == "step-audit:50:3, row 8"
    assert raw.values["chosen_rewards"] == list(item.better.rewards)
    assert raw.values["rejected_rewards"] == list(item.worse.rewards)


def test_defaults_of_the_source():
    assert len(list(from_source("step-audit"))) == 2000
    assert next(from_source("step-audit")).id == "step-audit-0-0"


@pytest.mark.parametrize("tail", [":", ":0", ":-1", ":x", ":1:2:3", ":5:", ":1.5", ": 5", ":1_0", ":" + "9" * 30])
def test_bad_counts(tail):
    with pytest.raises(DataError, match="expected step-audit:count:seed") as caught:
        read_rows(f"step-audit{tail}")
    assert "step-audit:500" in caught.value.remedy


def test_torch_is_not_needed():
    code = (
        "import sys; from tenfold.data.read import read_rows; read_rows('step-audit:3'); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
