"""What a game does with the machine it runs on, and values as plain data, to be compared."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from datetime import date, datetime
from types import FrameType, FunctionType
from typing import Any

_MACHINE: dict[Any, str] = {
    **{
        getattr(time, name): f"time.{name}"
        for name in (
            *("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "process_time"),
            *("process_time_ns", "thread_time", "thread_time_ns", "clock_gettime", "sleep", "localtime", "gmtime"),
        )
        if hasattr(time, name)
    },
    os.urandom: "os.urandom",
}
_MAY = ("logging", "numba")
_DATES = ("now", "utcnow", "today")
_WHOLE = frozenset({type(None), bool, int, str, bytes})


class _Touched(BaseException):
    """Past whatever the game catches."""


def without_machine(play: Callable[[], object]) -> str | None:
    """Run something, and stop it where it reads the clock, sleeps, or draws from the machine.

    Calls are seen whatever they are imported as, before they are made, in this thread and in Python's code alone.
    Logging and numba's compiler may read the clock.

    Returns:
        What was called and where; None where nothing was.

    >>> from time import sleep as pause
    >>> without_machine(lambda: pause(60)).partition(" at ")[0]
    'time.sleep'
    >>> without_machine(lambda: sum(range(9))) is None
    True
    """
    touched: list[str] = []

    def watch(frame: FrameType, event: str, called: Any) -> None:
        if event != "c_call" or frame.f_globals.get("__name__", "").partition(".")[0] in _MAY:
            return
        name = _name(called)
        if name is not None:
            touched.append(f"{name} at {frame.f_code.co_filename}:{frame.f_lineno}")
            raise _Touched

    before, collects = sys.getprofile(), gc.isenabled()
    gc.disable()  # libraries time collections by callbacks, which would be called from within the game
    sys.setprofile(watch)
    try:
        play()
    except _Touched:
        pass
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()
    return touched[0] if touched else None


def _name(called: Any) -> str | None:
    owner = getattr(called, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, date) and called.__name__ in _DATES:
        return f"{'datetime' if issubclass(owner, datetime) else 'date'}.{called.__name__}"
    try:
        return _MACHINE.get(called)
    except TypeError:  # cannot be a key, and so is none
        return None


def plain(value: Any) -> Any:
    """A value as numbers, texts and tuples, all the way down: equal for equal values, and never changing.

    Args:
        value: whatever can be pickled.

    Raises:
        TypeError: what cannot.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Place:
    ...     x: list
    >>> place = Place([1])
    >>> before = plain(place)
    >>> place.x.append(2)
    >>> plain(place) == before, before == plain(Place([1]))
    (False, True)
    """
    kind = type(value)
    if kind in _WHOLE:
        return kind.__name__, value
    if kind in (float, complex):
        return kind.__name__, repr(value)  # a NaN is the same as itself
    if kind in (list, tuple):
        return kind.__name__, tuple(map(plain, value))
    if kind is dict:
        return "dict", tuple((plain(key), plain(each)) for key, each in value.items())
    if kind in (set, frozenset):
        return kind.__name__, tuple(sorted(map(repr, map(plain, value))))
    if isinstance(value, type | FunctionType):
        return "name", f"{value.__module__}.{value.__qualname__}"
    parts = value.__reduce_ex__(4)
    if isinstance(parts, str):
        return "name", parts
    return kind.__name__, tuple(
        plain(tuple(part)) if place in (3, 4) and part is not None else plain(part) for place, part in enumerate(parts)
    )
