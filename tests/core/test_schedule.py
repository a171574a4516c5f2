import itertools
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold.core.schedule import CubicSchedule
from tenfold.errors import ConfigError


@st.composite
def schedules(draw):
    total = draw(st.integers(1, 500))
    warmup = draw(st.integers(0, total - 1))
    cooldown = draw(st.integers(0, total - 1 - warmup))
    start = draw(st.floats(0, 1e6))
    end = draw(st.floats(0, 1)) * start
    return CubicSchedule(start, end, total, warmup, cooldown, every=draw(st.integers(1, 50)))


@given(schedules())
def test_falls_from_start_to_end(schedule):
    values = [schedule.value(step) for step in range(schedule.total + 10)]
    assert values[0] == schedule.start
    assert values[-1] == schedule.end
    slack = 1e-9 * schedule.start
    assert all(later <= earlier + slack for earlier, later in itertools.pairwise(values))
    assert min(values) >= schedule.end


@given(schedules())
def test_phases_come_in_order_and_the_last_decision_is_at_the_end(schedule):
    phases = [schedule.phase(step) for step in range(schedule.total + 1)]
    assert phases == sorted(phases, key=["warmup", "shrink", "final"].index)
    assert not any(schedule.due(step) for step, phase in enumerate(phases) if phase == "warmup")
    assert all(schedule.due(step) for step, phase in enumerate(phases) if phase == "final")
    last = schedule.total - schedule.cooldown
    assert schedule.due(last)
    assert math.isclose(schedule.value(last), schedule.end, abs_tol=1e-9 * max(schedule.start, 1))


def test_losparse_shares():
    schedule = CubicSchedule(1, 0.5, total=20, warmup=2, cooldown=4, every=2)
    expected = {
        2: 1,
        3: 0.90033,
        4: 0.81487,
        6: 0.68222,
        8: 0.59329,
        10: 0.53936,
        12: 0.51166,
        14: 0.50146,
        15: 0.50018,
    }
    for step, value in expected.items():
        assert schedule.value(step) == pytest.approx(value, abs=5e-6)
    assert [schedule.due(step) for step in (2, 3, 4, 14, 15, 16, 19)] == [False, False, True, True, False, True, True]


def test_a_count_where_double_arithmetic_floors_below_the_exact_integer():
    schedule = CubicSchedule(1000, 0, total=100, warmup=10, cooldown=20, every=5)
    assert int(schedule.value(31)) == 342


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"start": 4, "end": 5, "total": 10}, "not between 0 and the initial budget 4"),
        ({"start": 4, "end": -1, "total": 10}, "not between 0"),
        ({"start": 4, "end": 2, "total": 10, "warmup": 5, "cooldown": 5}, "at most 9 steps"),
        ({"start": 4, "end": 2, "total": 10, "every": 0}, "interval and power 1 or more"),
    ],
)
def test_values_that_fit_no_run_are_refused(values, says):
    with pytest.raises(ConfigError, match=says):
        CubicSchedule(**values)


def test_needs_no_torch():
    code = "import sys, tenfold.core.schedule; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
