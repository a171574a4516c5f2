import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold.stage import numbers


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0.0312, "s", "31.2 ms"),
        (1.5, "s", "1.50 s"),
        (600.0, "s", "10.0 min"),
        (9000.0, "s", "2.50 h"),
        (16e9, "bytes", "14.9 GiB"),
        (3e9, "bytes/token", "2.79 GiB/token"),
        (0.0312, "s/token", "31.2 ms/token"),
        (425.2, "ms", "425 ms"),
        (538_060_032, "bytes", "513 MiB"),
        (9216, "bytes/token", "9.00 KiB/token"),
        (17, "bytes", "17 bytes"),
        (1204.2, "tokens/s", "1,204 tokens/s"),
        (134_515_008, "", "134,515,008"),
        (0.8312, "", "0.831"),
        (1e-5, "", "1.00e-05"),
        (0.0, "", "0"),
        (math.nan, "", "not a number"),
        (-math.inf, "nats", "-∞ nats"),
        (None, "s", "–"),
    ],
)
def test_quantities_read_as_people_write_them(value, unit, shown):
    assert numbers.quantity(value, unit) == shown


def test_values_side_by_side_keep_their_difference_visible():
    scale = numbers.scale_for([0.8312, 0.8354], finest=0.0042)
    assert (scale.text(0.8312), scale.text(0.8354), scale.text(0.0042, sign=True)) == ("0.8312", "0.8354", "+0.0042")


def test_nothing_is_neither_plus_nor_minus():
    scale = numbers.scale_for([31.2])
    assert scale.text(-0.0001, sign=True) == "0.0"
    assert scale.text(0.0, sign=True) == "0.0"
    assert numbers.percent(0.0, sign=True) == "0.0 %"


def test_exact_values_keep_every_digit():
    assert numbers.exact(31.203418734, "ms") == "31.203418734 ms"
    assert numbers.exact(None) == "not measured"


@given(st.floats(), st.sampled_from(["", "s", "bytes", "bytes/token", "tokens/s"]), st.floats())
def test_every_number_can_be_shown(value, unit, finest):
    text = numbers.scale_for([value], unit, finest=finest).quantity(value, sign=True)
    assert text
    assert len(text) < 40
    assert numbers.percent(value)
