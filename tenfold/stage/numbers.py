"""Numbers as people read them: milliseconds, MiB, thousands separators, no more digits than the spread allows."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeGuard

KIB, MIB, GIB = 2**10, 2**20, 2**30
MOST_DIGITS = 6


@dataclass(frozen=True)
class Scale:
    """How a group of values of one unit is shown: the values of one row share it, so that they compare at a glance."""

    factor: float
    """Multiplies the value."""
    unit: str
    """Unit on screen."""
    decimals: int | None
    """Digits after the point; ``None`` for scientific notation."""

    def text(self, value: float | None, *, sign: bool = False) -> str:
        """The value without its unit; a dash for what is absent."""
        if value is None:
            return "–"
        if math.isnan(value):
            return "not a number"
        if math.isinf(value):
            return "∞" if value > 0 else "-∞"
        shown = value * self.factor
        if self.decimals is not None:
            shown = round(shown, self.decimals) or 0.0  # "-0.0" says that something fell; nothing did
        plus = "+" if sign and shown else ""
        return f"{shown:{plus}.2e}" if self.decimals is None else f"{shown:{plus},.{self.decimals}f}"

    def quantity(self, value: float | None, *, sign: bool = False) -> str:
        """The value with its unit."""
        text = self.text(value, sign=sign)
        return f"{text} {self.unit}" if self.unit and value is not None else text


def scale_for(values: Iterable[float | None], unit: str = "", *, finest: float | None = None) -> Scale:
    """The scale on which `values` read well: three significant digits, more where their difference needs them.

    Args:
        values: what stands side by side, in `unit`.
        unit: ``s`` becomes ms or min, ``bytes`` becomes KiB or MiB, also before a slash (``s/token``).
        finest: a difference that must stay visible, in `unit`.

    >>> scale_for([0.0312], "s").quantity(0.0312)
    '31.2 ms'
    >>> scale_for([31.24, 31.21], finest=0.03).text(31.21)
    '31.210'
    >>> scale_for([3 * 2**20], "bytes").quantity(3 * 2**20)
    '3.00 MiB'
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    largest = max((abs(value) for value in known), default=0.0)
    factor, shown = _unit(unit, largest)
    if shown in ("", "bytes") and all(float(value).is_integer() for value in known) and largest < 1e15:
        return Scale(factor, shown, 0)
    largest *= factor
    if largest == 0:
        return Scale(factor, shown, 0)
    order = math.floor(math.log10(largest))
    if not -4 <= order < 15:
        return Scale(factor, shown, None)
    decimals = max(0, 2 - order)
    step = abs(finest * factor) if finest is not None and math.isfinite(finest) else 0.0
    if step > 0:
        wanted = 1 - math.floor(math.log10(step))
        decimals = max(decimals, min(wanted, MOST_DIGITS - 1 - order))
    return Scale(factor, shown, decimals)


def _unit(unit: str, largest: float) -> tuple[float, str]:
    base, slash, per = unit.partition("/")
    if base == "s":
        if largest >= 7200 and not slash:
            return 1 / 3600, "h"
        if largest >= 120 and not slash:
            return 1 / 60, "min"
        return (1000.0, f"ms{slash}{per}") if largest < 1 else (1.0, unit)
    if base == "bytes" and largest >= GIB:
        return 1 / GIB, f"GiB{slash}{per}"
    if base == "bytes" and largest >= KIB:
        # MiB on screen; below a tenth of one the digits would be zeros
        return (1 / KIB, f"KiB{slash}{per}") if largest < MIB / 10 else (1 / MIB, f"MiB{slash}{per}")
    return 1.0, unit


def quantity(value: float | None, unit: str = "") -> str:
    """One value with its unit.

    >>> quantity(134515008), quantity(1.5, "s"), quantity(0.0001, "")
    ('134,515,008', '1.50 s', '0.000100')
    """
    return scale_for([value], unit).quantity(value)


def percent(share: float | None, *, sign: bool = False) -> str:
    """A share as a percentage.

    >>> percent(-0.2051, sign=True), percent(0.004), percent(12.0)
    ('-20.5 %', '0.40 %', '1,200 %')
    """
    if share is None:
        return "–"
    if not math.isfinite(share):
        return Scale(1, "%", 0).quantity(share, sign=sign)
    size = abs(share)
    decimals = 0 if size >= 10 else 1 if size >= 0.01 or size == 0 or sign else 2 if size >= 0.001 else 3
    return Scale(100, "%", decimals).quantity(share, sign=sign)


def exact(value: float | None, unit: str = "") -> str:
    """Every digit, in the unit of the record; for tooltips.

    >>> exact(31.2034, "bits/byte")
    '31.2034 bits/byte'
    """
    if value is None:
        return "not measured"
    text = str(int(value)) if math.isfinite(value) and float(value).is_integer() else repr(float(value))
    return f"{text} {unit}".rstrip()


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a number; truth values are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def named_unit(value: object, key: str) -> str:
    """A value in words, by what its key says it is: bytes, seconds, a share, a count.

    >>> named_unit(2152000, "bytes"), named_unit(0.004, "share of the model")
    ('2.05 MiB', '0.40 %')
    >>> named_unit(True, "packing"), named_unit(None, "rank")
    ('yes', '–')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not is_number(value):
        return "–" if value is None else str(value)
    words = re.findall(r"[a-z]+", key.lower())
    if "bytes" in words:
        return quantity(value, "bytes")
    if "seconds" in words:
        return quantity(value, "s")
    return percent(value) if "share" in words else quantity(value)
