"""The user's market data: bars and quotes of one day, read strictly.

A time zone must be named, since stamps that are off by hours look like any others. What cannot be meant is refused with
file and line; what is safe to mend (a row that stands there twice) or to leave as it is (bars without a trade) is
counted.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
from numpy.typing import NDArray

from tenfold.data.sources import open_source
from tenfold.errors import ConfigError, DataError

SECOND = 1_000_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_CLOCKS = ("local_ts_ns", "local_ts_us", "local_ts_ms", "time", "timestamp", "datetime")
_UNITS = {"ns": 1, "us": 1_000, "ms": 1_000_000}
_WORDS = {1: "nanoseconds", 1_000: "microseconds", 1_000_000: "milliseconds"}
_OLDEST = 1980
"""No recording in the form of quotes is older; stamps of another unit than they say are in the first days of 1970."""
_OTHER_NAMES = {"bid_price": "bid", "ask_price": "ask", "bid_size": "bid_qty", "ask_size": "ask_qty"}


@dataclass(frozen=True)
class Bars:
    """One day of bars of one ticker; bars without a trade are absent.

    Args:
        ticker: whose.
        zone: of the file's stamps.
        start: [bars] when each bar begins, nanoseconds since 1970 in UTC, increasing.
        length: nanoseconds of a bar; it is complete at ``start + length``.
        open: [bars], as the next three.
        high: at least open and close.
        low: at most open and close.
        close: of each bar.
        notes: what was mended or is missing, counted.
    """

    ticker: str
    zone: str
    start: NDArray[np.int64]
    length: int
    open: NDArray[np.float64]
    high: NDArray[np.float64]
    low: NDArray[np.float64]
    close: NDArray[np.float64]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quotes:
    """One day of the best bid and ask of one ticker, on the clock of whoever recorded them.

    Args:
        ticker: whose.
        zone: of the file's stamps.
        time: [quotes] nanoseconds since 1970 in UTC, not decreasing; of quotes at one time the last is in force.
        bid: [quotes], as the next three; at most ``ask``.
        ask: of each quote.
        bid_size: what is displayed at the bid; infinite where the file does not tell.
        ask_size: what is displayed at the ask.
        notes: what was mended or is missing, counted.
    """

    ticker: str
    zone: str
    time: NDArray[np.int64]
    bid: NDArray[np.float64]
    ask: NDArray[np.float64]
    bid_size: NDArray[np.float64]
    ask_size: NDArray[np.float64]
    notes: tuple[str, ...] = ()


def read_bars(path: str | Path, ticker: str, *, zone: str, day: str | None = None, longest_gap: float = 3_600) -> Bars:
    """Bars from CSV, JSON lines, Parquet, or JSON, also packed (.gz).

    Columns: ``time`` (or ``timestamp``, ``datetime``), ``open``, ``high``, ``low``, ``close``; others are ignored. JSON
    holds a list of rows, or has the form ``{"2024-08-05": {"09:30:00": {"open": 1, "high": 2, ...}}}``. A stamp is when
    a bar begins: ``HH:MM:SS`` or ISO 8601. The length of a bar is the largest step that fits all stamps.

    Args:
        path: the file.
        ticker: whose bars they are.
        zone: of the stamps, as ``America/New_York`` or ``UTC``. Offsets in the file must agree with it.
        day: ``YYYY-MM-DD``: needed for stamps without a date; of a file of several days, the one to read.
        longest_gap: seconds between two bars above which part of the day is taken to be missing.

    Raises:
        ConfigError: an unknown zone or day.
        DataError: with file and line: not a number, NaN, not above 0, high below low, open or close outside them, time
            that goes backwards, two different bars of one time, stamps with and without a zone or of another one,
            several days, a gap that is too long.
    """
    prices = ("open", "high", "low", "close")
    rows = _Reader(path, zone, day, longest_gap)
    kept = list(rows.read(prices, (), _check_bar, repeat="two bars of one time that differ"))
    start = np.array([time for time, _ in kept], dtype=np.int64)
    if len(start) < 2:
        raise DataError(f"{path}: {len(start)} bars", remedy="a day has two bars or more")
    length = int(np.gcd.reduce(np.diff(start)))
    if length < SECOND:
        raise DataError(
            f"{path}: the stamps have no common step of a second or more",
            remedy="bars begin at multiples of their length; give finer data as quotes",
        )
    opened, high, low, close = np.array([values for _, values in kept]).T
    absent = int((start[-1] - start[0]) // length + 1 - len(start))
    longest = int(np.diff(start).max()) / SECOND
    notes = [f"{ticker}: bars of {length // SECOND} s."]
    if absent:
        notes.append(f"{ticker}: {absent} bars are absent, the longest gap is {longest:g} s.")
    return Bars(ticker, zone, start, length, opened, high, low, close, (*notes, *rows.notes(ticker)))


def read_quotes(
    path: str | Path, ticker: str, *, zone: str, day: str | None = None, longest_gap: float = 3_600
) -> Quotes:
    """Best bids and asks from CSV, JSON lines or Parquet, also packed (.gz).

    Columns: ``local_ts_ns`` (``_us``, ``_ms``; since 1970) or ``time``, ``bid``, ``ask``, and ``bid_qty``, ``ask_qty``
    where sizes are known. An exchange's own stamps are not used: its clock is another one, and the difference of two
    clocks is not a latency.

    Args:
        path: the file.
        ticker: whose quotes they are.
        zone: of the stamps; for stamps since 1970, of the day that they are told in.
        day: as for `read_bars`.
        longest_gap: as for `read_bars`.

    Raises:
        ConfigError: an unknown zone or day.
        DataError: as `read_bars`, and a bid above its ask.
    """
    rows = _Reader(path, zone, day, longest_gap)
    kept = list(rows.read(("bid", "ask"), ("bid_qty", "ask_qty"), _check_quote, repeat=None))
    if not kept:
        raise DataError(f"{path}: no quotes", remedy="give a file with rows")
    bid, ask, bid_size, ask_size = np.array([values for _, values in kept]).T
    notes = () if np.isfinite((bid_size, ask_size)).all() else (f"{ticker}: no displayed sizes, taken as unlimited.",)
    time = np.array([time for time, _ in kept], dtype=np.int64)
    return Quotes(ticker, zone, time, bid, ask, bid_size, ask_size, (*notes, *rows.notes(ticker)))


def _check_bar(values: list[float]) -> str | None:
    opened, high, low, close = values
    if high < low:
        return f"high {high:g} is below low {low:g}"
    for name, value in (("open", opened), ("close", close)):
        if not low <= value <= high:
            return f"{name} {value:g} is outside low {low:g} to high {high:g}"
    return None


def _check_quote(values: list[float]) -> str | None:
    bid, ask, *_ = values
    return f"a crossed book: bid {bid:g} is above ask {ask:g}" if bid > ask else None


class _Reader:
    """Rows of a file in time's order, each checked; counts what it leaves out."""

    def __init__(self, path: str | Path, zone: str, day: str | None, longest_gap: float) -> None:
        self.path, self.longest_gap = Path(path), longest_gap
        self.stamps = _Stamps(zone, day)
        self.repeated = 0

    def notes(self, ticker: str) -> list[str]:
        return [f"{ticker}: {self.repeated} repeated rows were dropped."] if self.repeated else []

    def read(
        self,
        above_zero: tuple[str, ...],
        sizes: tuple[str, ...],
        check: Callable[[list[float]], str | None],
        repeat: str | None,
    ) -> Iterator[tuple[int, list[float]]]:
        """Time and values of each row; ``sizes`` may be absent, and are infinite then.

        ``repeat`` says what is wrong with two rows of one time that differ; None where nothing is.
        """
        last: tuple[int, list[float]] | None = None
        for place, row in self._rows():
            time = self.stamps.read(place, row)
            if time is None:
                continue
            values = [_number(place, name, row, least=0.0) for name in above_zero]
            values += [_number(place, name, row, least=None) if name in row else math.inf for name in sizes]
            wrong = check(values)
            if wrong:
                raise DataError(f"{place}: {wrong}", remedy="correct the row or take it out")
            if last is not None:
                self._check_order(place, time, last[0])
                if time == last[0] and values == last[1]:
                    self.repeated += 1
                    continue
                if time == last[0] and repeat:
                    raise DataError(f"{place}: {repeat}", remedy="keep the one that is right")
            last = (time, values)
            yield last

    def _check_order(self, place: str, time: int, before: int) -> None:
        if time < before:
            raise DataError(
                f"{place}: time goes backwards by {(before - time) / SECOND:g} s", remedy="sort the rows by time"
            )
        if time - before > self.longest_gap * SECOND:
            raise DataError(
                f"{place}: a gap of {(time - before) / SECOND:g} s before it, more than {self.longest_gap:g}",
                remedy="get the missing part of the day; if the market rested, raise recorded.longest_gap",
            )

    def _rows(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        name = self.path.name.removesuffix(".gz")
        if name.endswith(".json") and (days := self._days()) is not None:
            yield from self._released(days)
            return
        for raw in open_source(str(self.path)).records:
            if raw.error is not None:
                raise raw.error
            yield raw.place, {_OTHER_NAMES.get(key, key): value for key, value in raw.values.items()}

    def _days(self) -> Any:
        """A JSON object as pairs, in which a key that stands there twice hides nothing; None for a list of rows."""
        opener = gzip.open if self.path.suffix == ".gz" else open
        try:
            with opener(self.path, "rt", encoding="utf-8") as file:
                text = file.read()
            return None if text.lstrip().startswith("[") else json.loads(text, object_pairs_hook=list)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{self.path}, line {error.lineno}, column {error.colno}: malformed JSON: {error.msg}",
                remedy='write {"2024-08-05": {"09:30:00": {"open": 1, "high": 1, "low": 1, "close": 1}}}',
            ) from None
        except (OSError, UnicodeDecodeError, EOFError) as error:
            raise DataError(f"{self.path}: cannot be read: {error}", remedy="check its name and rights") from None

    def _released(self, days: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Rows of ``{day: {time: {column: value}}}``."""
        try:
            for day, times in days:
                for time, pairs in times:
                    yield f"{self.path}, {day} {time}", {**dict(pairs), "time": f"{day}T{time}"}
        except (TypeError, ValueError):
            raise DataError(
                f"{self.path}: not of the form {{day: {{time: {{column: value}}}}}}",
                remedy="give such a file, or rows as CSV or JSON lines",
            ) from None


def _number(place: str, name: str, row: Mapping[str, Any], least: float | None) -> float:
    """A finite number, above ``least``, or 0 or more where that is None."""
    if name not in row:
        raise DataError(f"{place}: no column {name!r}", remedy=f"it has {', '.join(row)}; rename the one that is meant")
    value = row[name]
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{place}: {name} is {value!r}", remedy="give a finite number")
    if number < 0 or number == least:
        raise DataError(f"{place}: {name} is {value}", remedy=f"give {'0 or more' if least is None else 'above 0'}")
    return number


class _Stamps:
    """From what stands in a row to nanoseconds since 1970."""

    def __init__(self, zone: str, day: str | None) -> None:
        self.name, self.zone = zone, zone_of(zone)
        self.day = None if day is None else day_of(day)
        self.given = day is not None
        self.aware: bool | None = None

    def read(self, place: str, row: Mapping[str, Any]) -> int | None:
        """Nanoseconds since 1970; None where the row is of another day than the one asked for."""
        column = next((name for name in _CLOCKS if name in row), None)
        if column is None:
            raise DataError(f"{place}: no column of times", remedy=f"name it {' or '.join(_CLOCKS)}; see the zone too")
        value, unit = row[column], _UNITS.get(column.rpartition("_")[2])
        if unit is None:
            moment = self._moment(place, column, value)
            found = (moment - _EPOCH) // timedelta(microseconds=1) * 1_000
        else:
            try:
                found = int(value) * unit
                moment = datetime.fromtimestamp(found // SECOND, self.zone)
            except (TypeError, ValueError, OverflowError, OSError):
                raise DataError(f"{place}: {column} is {value!r}", remedy="give a whole number since 1970") from None
            if moment.year < _OLDEST:
                raise DataError(
                    f"{place}: {column} is {value!r}, which is on {moment.date()} in {_WORDS[unit]} since 1970",
                    remedy="name the column by the unit of its numbers: local_ts_ns, local_ts_us or local_ts_ms",
                )
        return found if self._of_the_day(place, moment.astimezone(self.zone).date()) else None

    def _of_the_day(self, place: str, day: date) -> bool:
        if self.day is None:
            self.day = day
        if day != self.day and not self.given:
            raise DataError(f"{place}: {day}, and rows before it are of {self.day}", remedy="name the day to read")
        return day == self.day

    def _moment(self, place: str, column: str, value: Any) -> datetime:
        text = str(value).strip()
        if text[2:3] == ":":
            if not self.given:
                raise DataError(f"{place}: {column} {text!r} has no date", remedy="name the day, YYYY-MM-DD")
            text = f"{self.day}T{text}"
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            raise DataError(f"{place}: {column} is {value!r}", remedy="write HH:MM:SS or 2024-08-05T09:30:00") from None
        aware = moment.tzinfo is not None
        if self.aware not in (None, aware):
            raise DataError(f"{place}: {column} {value!r}: stamps with and without a zone", remedy="write all alike")
        self.aware = aware
        if aware:
            if moment.astimezone(self.zone).utcoffset() != moment.utcoffset():
                raise DataError(
                    f"{place}: {column} {value!r} has another offset than {self.name} has then",
                    remedy=f"name the zone that the file is in, or convert its stamps to {self.name}",
                )
            return moment
        local = moment.replace(tzinfo=self.zone)
        if local.astimezone(UTC).astimezone(self.zone).replace(tzinfo=None) != moment:
            raise DataError(f"{place}: {text} does not exist in {self.name}", remedy="name the zone of the file")
        return local


def day_of(text: str) -> date:
    """A day by its text.

    Raises:
        ConfigError: not ``YYYY-MM-DD``.
    """
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"day: {text!r}", remedy="write YYYY-MM-DD") from None


def zone_of(name: str, key: str = "zone") -> ZoneInfo:
    """A time zone by its name; errors call it by the key.

    Raises:
        ConfigError: unknown.
    """
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ConfigError(f"{key}: unknown time zone {name!r}", remedy="as America/New_York, or UTC") from None
