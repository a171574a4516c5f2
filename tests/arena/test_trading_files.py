"""Market data of users: what is read, what is refused and where."""

import gzip
import json

import numpy as np
import pytest

from tenfold.arena.trading.files import SECOND, read_bars, read_quotes
from tenfold.errors import ConfigError, DataError

NOON = 1_722_859_200 * SECOND  # 2024-08-05T12:00:00Z


def bars_file(tmp_path, *lines, header="time,open,high,low,close", name="bars.csv"):
    path = tmp_path / name
    path.write_text("\n".join((header, *lines)) + "\n")
    return path


def quotes_file(tmp_path, *lines, header="local_ts_ns,bid,bid_qty,ask,ask_qty"):
    return bars_file(tmp_path, *lines, header=header, name="quotes.csv")


GOOD = ("12:00:00,10,12,9,11", "12:00:01,11,11,11,11", "12:00:04,11,12,10,10")


@pytest.mark.parametrize(
    ("zone", "hours"), [("UTC", 0), ("America/New_York", 4), ("Europe/Berlin", -2), ("Asia/Kolkata", -5.5)]
)
def test_bars(tmp_path, zone, hours):
    """The zone decides what a stamp means; it is not guessed."""
    bars = read_bars(bars_file(tmp_path, *GOOD), "X", zone=zone, day="2024-08-05")
    assert bars.start.tolist() == [NOON + int((hours * 3600 + s) * SECOND) for s in (0, 1, 4)]
    assert bars.length == SECOND
    assert bars.open.tolist() == [10, 11, 11]
    assert bars.high.tolist() == [12, 11, 12]
    assert bars.low.tolist() == [9, 11, 10]
    assert bars.close.tolist() == [11, 11, 10]
    assert bars.notes == ("X: bars of 1 s.", "X: 2 bars are absent, the longest gap is 3 s.")


def test_every_form_reads_alike(tmp_path):
    rows = [dict(zip(("time", "open", "high", "low", "close"), line.split(","), strict=True)) for line in GOOD]
    expected = read_bars(bars_file(tmp_path, *GOOD), "X", zone="UTC", day="2024-08-05")
    dated = [{**row, "time": f"2024-08-05T{row['time']}"} for row in rows]
    for name, text in {
        "a.jsonl": "\n".join(map(json.dumps, dated)),
        "b.json": json.dumps(dated),
        "c.json": json.dumps({"2024-08-05": {row["time"]: {**row, "time": None} for row in rows}}),
        "d.csv": "timestamp,open,high,low,close,volume\n"
        + "\n".join(f"2024-08-05 {line},{number}" for number, line in enumerate(GOOD)),
        "e.csv": "time,open,high,low,close\n" + "\n".join(f"2024-08-05T{line.replace(',', 'Z,', 1)}" for line in GOOD),
    }.items():
        path = tmp_path / f"{name}.gz"
        path.write_bytes(gzip.compress(text.encode()))
        found = read_bars(path, "X", zone="UTC")
        for column in ("start", "open", "high", "low", "close"):
            assert (getattr(found, column) == getattr(expected, column)).all(), name
        assert found.notes == expected.notes


def test_minute_bars(tmp_path):
    """A bar is not complete before it has ended: its length comes from all stamps."""
    lines = [f"12:{minute:02}:00,10,10,10,10" for minute in (0, 2, 5)]
    assert read_bars(bars_file(tmp_path, *lines), "X", zone="UTC", day="2024-08-05").length == 60 * SECOND


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["12:00:02,10,10,10,10"], r"line 3: time goes backwards by 1 s"),
        (["12:00:03,10,10,10,nan"], r"line 3: close is 'nan'"),
        (["12:00:03,10,10,10,"], r"line 3: close is ''"),
        (["12:00:03,10,9,10,10"], r"line 3: high 9 is below low 10"),
        (["12:00:03,11,10,9,10"], r"line 3: open 11 is outside low 9 to high 10"),
        (["12:00:03,10,10,9,8"], r"line 3: close 8 is outside"),
        (["12:00:03,0,10,0,10"], r"line 3: open is 0"),
        (["12:00:03,10,10,-1,10"], r"line 3: low is -1"),
        (["12:00:03,10,inf,9,10"], r"line 3: high is 'inf'"),
        (["12:00:03,10,10,9"], r"line 3: 4 fields"),
        (["noon,10,10,9,10"], r"line 3: time is 'noon'"),
        (["25:00:00,10,10,9,10"], r"line 3: time is '25:00:00'"),
        (["12:00:03,10,10,10,10", "12:00:03,10,11,10,10"], r"line 4: two bars of one time"),
        (["2024-08-05T12:00:05Z,10,10,10,10"], r"line 3: .*with and without a zone"),
        (["2024-08-06T12:00:05,10,10,10,10", "12:00:06,10,10,9,11"], r"line 4: close 11 is outside"),
        (["13:00:04,10,10,10,10"], r"line 3: a gap of 3601 s"),
    ],
)
def test_malformed_bars(tmp_path, lines, problem):
    path = bars_file(tmp_path, "12:00:03,10,10,10,10" if "03" not in lines[0][:9] else "12:00:02,10,10,10,10", *lines)
    with pytest.raises(DataError, match=rf"bars\.csv, {problem}") as caught:
        read_bars(path, "X", zone="UTC", day="2024-08-05")
    assert caught.value.remedy


def test_stamps_of_another_zone(tmp_path):
    lines = [f"2024-08-05T12:00:00{offset},10,10,10,10" for offset in ("-04:00", "-05:00")]
    with pytest.raises(DataError, match=r"line 3: .*another offset than America/New_York"):
        read_bars(bars_file(tmp_path, *lines), "X", zone="America/New_York")
    with pytest.raises(DataError, match=r"line 2: .*another offset than UTC"):
        read_bars(bars_file(tmp_path, *lines), "X", zone="UTC")


def test_the_hour_that_comes_twice(tmp_path):
    """With offsets it is unambiguous; without, the second pass would go backwards; in spring an hour is not there."""
    twice = [f"2024-11-03T01:30:00{offset},10,10,10,10" for offset in ("-04:00", "-05:00")]
    bars = read_bars(bars_file(tmp_path, *twice), "X", zone="America/New_York")
    assert np.diff(bars.start).tolist() == [3600 * SECOND]
    with pytest.raises(DataError, match=r"line 2: 2024-03-10T02:30:00 does not exist"):
        read_bars(bars_file(tmp_path, "2024-03-10T02:30:00,1,1,1,1"), "X", zone="America/New_York")


def test_repeated_rows_are_counted(tmp_path):
    path = bars_file(tmp_path, GOOD[0], GOOD[0], *GOOD[1:])
    bars = read_bars(path, "X", zone="UTC", day="2024-08-05")
    assert len(bars.start) == 3
    assert bars.notes[-1] == "X: 1 repeated rows were dropped."


def test_days(tmp_path):
    lines = [f"2024-08-0{day}T12:00:0{s},10,10,10,10" for day in (5, 6) for s in (0, 1)]
    path = bars_file(tmp_path, *lines)
    with pytest.raises(DataError, match=r"line 4: 2024-08-06, and rows before it are of 2024-08-05"):
        read_bars(path, "X", zone="UTC")
    assert len(read_bars(path, "X", zone="UTC", day="2024-08-06").start) == 2
    with pytest.raises(DataError, match="0 bars"):
        read_bars(path, "X", zone="UTC", day="2024-08-07")
    with pytest.raises(DataError, match="line 2: time '12:00:00' has no date"):
        read_bars(bars_file(tmp_path, *GOOD), "X", zone="UTC")
    with pytest.raises(ConfigError, match="day: '5 August'"):
        read_bars(path, "X", zone="UTC", day="5 August")
    with pytest.raises(ConfigError, match="unknown time zone 'Wall Street'"):
        read_bars(path, "X", zone="Wall Street")


def test_released_form_hides_no_row(tmp_path):
    path = tmp_path / "ohlc.json"

    def write(first, second):
        bars = [json.dumps(dict.fromkeys(("open", "high", "low", "close"), price)) for price in (first, second)]
        path.write_text('{"2024-08-05": {"12:00:00": ' + ', "12:00:00": '.join(bars) + "}}")

    write(1, 1.0)
    with pytest.raises(DataError, match="1 bars"):
        read_bars(path, "X", zone="UTC")
    write(1, 2)
    with pytest.raises(DataError, match=r"ohlc\.json, 2024-08-05 12:00:00: two bars of one time"):
        read_bars(path, "X", zone="UTC")
    for wrong in ("[1, 2]", '{"2024-08-05": 3}', '{"2024-08-05": {"12:00:00": 3}}', '{"2024-08-05": {', "7"):
        path.write_text(wrong)
        with pytest.raises(DataError, match=r"ohlc\.json"):
            read_bars(path, "X", zone="UTC")


def test_quotes(tmp_path):
    lines = [f"{NOON},10,1,11,2", f"{NOON},10,3,11,2", f"{NOON + 5},11,1,11,0", f"{NOON + 5},11,1,11,0"]
    quotes = read_quotes(quotes_file(tmp_path, *lines), "X", zone="UTC")
    assert quotes.time.tolist() == [NOON, NOON, NOON + 5]
    assert quotes.bid_size.tolist() == [1, 3, 1]
    assert quotes.ask_size.tolist() == [2, 2, 0]
    assert quotes.notes == ("X: 1 repeated rows were dropped.",)
    sizeless = quotes_file(tmp_path, f"{NOON // 1_000_000},10,11", header="local_ts_ms,bid_price,ask_price")
    found = read_quotes(sizeless, "X", zone="UTC")
    assert found.time.tolist() == [NOON]
    assert np.isinf(found.bid_size).all()
    assert "no displayed sizes" in found.notes[0]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (f"{NOON + 9},11,1,10,1", r"a crossed book: bid 11 is above ask 10"),
        (f"{NOON - 1},10,1,11,1", r"time goes backwards"),
        (f"{NOON + 9},nan,1,11,1", r"bid is 'nan'"),
        (f"{NOON + 9},10,-1,11,1", r"bid_qty is -1"),
        ("soon,10,1,11,1", r"local_ts_ns is 'soon'"),
        (f"{NOON}0000,10,1,11,1", r"local_ts_ns is"),
        (f"{NOON // 1_000_000},10,1,11,1", r"local_ts_ns is '\d+', which is on 1970-01-01 in nanoseconds since 1970"),
    ],
)
def test_malformed_quotes(tmp_path, line, problem):
    with pytest.raises(DataError, match=rf"quotes\.csv, line 3: {problem}"):
        read_quotes(quotes_file(tmp_path, f"{NOON},10,1,11,1", line), "X", zone="UTC")


def test_the_exchanges_clock_is_not_used(tmp_path):
    path = quotes_file(tmp_path, f"{NOON // 1_000_000},10,1,11,1", header="exch_ts_ms,bid,bid_qty,ask,ask_qty")
    with pytest.raises(DataError, match="no column of times"):
        read_quotes(path, "X", zone="UTC")
    with pytest.raises(DataError, match="line 2: no column 'bid'"):
        read_quotes(quotes_file(tmp_path, f"{NOON},1", header="local_ts_ns,ask"), "X", zone="UTC")


def test_real_files(shared_data):
    amzn = read_bars(shared_data / "hft_ohlc_AMZN_2024-08-05.csv.gz", "AMZN", zone="UTC", day="2024-08-05")
    assert (len(amzn.start), amzn.length) == (12_042, SECOND)
    quotes = read_quotes(shared_data / "lob_BTCUSDT_2024-08-08_bbo.csv.gz", "BTC", zone="UTC")
    assert len(quotes.time) == 28_040
    assert (quotes.bid < quotes.ask).all()
