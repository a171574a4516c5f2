"""Recorded markets: when questions come, what orders trade at, and what a trader is told."""

from dataclasses import replace

import numpy as np
import pytest

from tenfold.arena.agents import Action
from tenfold.arena.trading.agents import RandomTrader, RuleTrader
from tenfold.arena.trading.files import SECOND, Bars, Quotes, read_bars, read_quotes
from tenfold.arena.trading.paper import PaperRules, play_paper, released_orders, stated_orders
from tenfold.arena.trading.replay import ReplayRules, play_replay
from tenfold.arena.trading.tapes import BarTape, QuoteTape, running_median
from tenfold.errors import ConfigError, DataError

NOON = 1_722_859_200 * SECOND  # 2024-08-05T12:00:00Z, 08:00 in New York
RULES = ReplayRules("UTC", opens=None, cutoff=None, trigger=0, cooling=0, stake=1.0)


class Script:
    """Answers from a list, then ``hold``; keeps the questions."""

    def __init__(self, *says, seconds=0.0, name="script"):
        self.name, self.says, self.seconds, self.questions = name, list(says), seconds, []

    def answer(self, questions):
        self.questions += questions
        said = self.says.pop(0) if self.says else "hold"
        return [Action(said, said, self.seconds)]


def bars_of(opens, start=NOON, step=1, ticker="X", **columns):
    opens = np.asarray(opens, dtype=float)
    columns = {name: np.asarray(columns.get(name, opens), dtype=float) for name in ("high", "low", "close")}
    starts = start + SECOND * step * np.arange(len(opens))
    return Bars(ticker, "UTC", starts, SECOND * step, opens, **columns)


def quotes_of(rows, ticker="X"):
    time, bid, bid_size, ask, ask_size = np.array(rows, dtype=float).T
    return Quotes(ticker, "UTC", NOON + np.round(time * SECOND).astype(np.int64), bid, ask, bid_size, ask_size)


@pytest.mark.parametrize(
    ("latency", "price"), [(0.0, 98.0), (0.1, 98.2), (0.2, 98.4), (0.4, 98.8), (0.8, 99.6), (1.5, 100.0)]
)
def test_the_touch_at_arrival(latency, price):
    """The specification's check of another simulator: an ask that falls to 98 and recovers by 0.2 every 0.1 s."""
    asks = [(0.0, 100.0), (1.0, 98.0), *((1.0 + 0.1 * step, 98.0 + 0.2 * step) for step in range(1, 11)), (5.0, 100.0)]
    rows = [(time, 90.0, 1e9, ask, 1e9) for time, ask in asks]
    rows.insert(2, (1.05, 90.0, 1e9, 98.0, 1e9))  # when the book is read
    agent = Script("hold", "hold", "buy X", seconds=0.0)
    play = play_replay([agent], [QuoteTape(quotes_of(rows))], RULES)
    assert agent.questions[2].view.tickers[0].buy == 98.0
    agent = Script("hold", "hold", "buy X")
    agent.answer = lambda questions, script=agent: [
        replace(Script.answer(script, questions)[0], seconds=latency if len(script.questions) == 3 else 0.0)
    ]
    play = play_replay([agent], [QuoteTape(quotes_of(rows))], RULES)
    bought = play.trades[0]
    assert (bought.time, bought.price) == (pytest.approx(1.05 + latency), pytest.approx(price))


def test_quotes_of_one_instant():
    rows = [(0, 90, 9, 100, 9), (1, 90, 9, 101, 9), (1, 90, 9, 102, 9), (9, 90, 9, 103, 9)]
    tape = QuoteTape(quotes_of(rows))
    offers = [tape.offer(1, NOON + int(at * SECOND)) for at in (-0.1, 0, 0.999999999, 1, 8, 20)]
    assert [offer and offer.price for offer in offers] == [None, 100, 100, 102, 102, 103]


def test_displayed_size():
    """No more than is displayed; lots; what is sold comes off what is held."""
    rows = [(0, 90, 1.5, 100, 2.55), (1, 90, 1.5, 100, 2.55), (2, 90, 0, 100, 0), (3, 90, 9, 100, 9)]
    agent = Script("buy X", "sell X", "sell X")
    play = play_replay([agent], [QuoteTape(quotes_of(rows))], replace(RULES, lot=0.1))
    assert [(trade.side, round(trade.quantity, 9)) for trade in play.trades] == [(1, 2.5), (-1, 1.5), (-1, 1.0)]
    assert [decision.outcome for decision in play.decisions] == ["traded", "traded", "unfilled"]
    assert play.trades[-1].reason == "cut-off"


def test_a_bar_trades_at_the_next_open():
    """The bar that an agent has seen is over: its prices are gone."""
    agent = Script("hold", "buy X", "hold", "sell X")
    opens = [100.0, 100.1, 100.2, 100.3, 100.2, 100.4, 100.3]
    play = play_replay([agent], [BarTape(bars_of(opens), half_spread=0.001)], RULES)
    bought, sold = play.trades
    # The second question comes when the second bar is over, 1 s after the first one; the third bar opens then.
    assert (bought.time, bought.price) == (1.0, pytest.approx(100.2 * 1.001))
    assert (sold.time, sold.price) == (3.0, pytest.approx(100.2 * 0.999))
    assert bought.quantity == 99


@pytest.mark.parametrize(("latency", "opens_at"), [(0.0, 100.1), (0.3, 100.2), (1.0, 100.2), (1.001, 100.3)])
def test_latency_on_bars(latency, opens_at):
    agent = Script("buy X", seconds=latency)
    play = play_replay([agent], [BarTape(bars_of([100, 100.1, 100.2, 100.3, 100.4, 100.5]), half_spread=0)], RULES)
    assert play.trades[0].price == pytest.approx(opens_at)


def test_bad_prints():
    """They are neither seen nor traded at, whichever way they point; nothing later decides that."""
    n = 200
    opens, high, low = np.full(n, 100.0), np.full(n, 100.01), np.full(n, 99.99)
    high[80], low[90], opens[101], opens[102] = 105, 95, 96, 104
    high[102], low[101] = 104, 96
    tape = BarTape(bars_of(opens, high=high, low=low, close=np.full(n, 100.0)), half_spread=0)
    assert tape.seen.high.max() == pytest.approx(100.5)
    assert tape.seen.low.min() == pytest.approx(99.5)
    for side in (1, -1):
        offer = tape.offer(side, NOON + 101 * SECOND)
        assert (offer.time, offer.price) == (NOON + 103 * SECOND, 100.0)
    assert "4 bars have prints off the market" in tape.notes[0]
    trusting = BarTape(bars_of(opens, high=high, low=low), half_spread=0, clip=None)
    assert trusting.offer(1, NOON + 101 * SECOND).price == 96
    assert trusting.seen.high.max() == 105


def test_a_market_that_really_moves_is_followed():
    """The filter lets a new level in once half of its window stands there."""
    opens = np.concatenate([np.full(100, 100.0), np.full(100, 110.0)])
    tape = BarTape(bars_of(opens), half_spread=0)
    offer = tape.offer(1, NOON + 100 * SECOND)
    assert offer.price == 110
    assert offer.time == NOON + 131 * SECOND


def test_running_median_is_causal():
    values = np.random.default_rng(0).normal(size=300)
    found = running_median(values, 61)
    for at in (0, 1, 59, 60, 61, 299):
        assert found[at] == np.median(values[max(0, at - 60) : at + 1])
    assert (running_median(values[:40], 61) == found[:40]).all()


def test_nothing_to_trade_with_and_invalid_answers():
    agent = Script("sell X", "buy both", "buy X", "buy X")
    play = play_replay([agent], [BarTape(bars_of(np.full(9, 100.0)), half_spread=0)], RULES)
    assert [decision.outcome for decision in play.decisions] == ["invalid", "invalid", "traded", "invalid", "passed",
                                                                 "passed", "passed", "passed"]  # fmt: skip
    assert agent.questions[0].answers == ("hold", "buy X")
    assert agent.questions[3].answers == ("hold", "sell X")  # no cash is left for one more


def test_an_invalid_answer_costs_its_time():
    """No question comes before it is there, nor within the cooling time."""
    bars = BarTape(bars_of(np.full(30, 100.0)))
    slow = play_replay([Script("nonsense", "nonsense", seconds=4.5)], [bars], RULES)
    assert [decision.asked for decision in slow.decisions][:3] == [0, 5, 10]
    cool = play_replay([Script()], [bars], replace(RULES, cooling=7))
    assert [decision.asked for decision in cool.decisions] == [0, 7, 14, 21, 28]


def test_trigger():
    """A wide bar, a distance from the recent mean, or from what was paid."""
    wide = bars_of(np.full(400, 100.0), high=np.where(np.arange(400) == 200, 100.3, 100.0))
    rules = replace(RULES, trigger=0.0029)
    assert [d.asked for d in play_replay([Script()], [BarTape(wide)], rules).decisions] == [200]
    opens = np.where(np.arange(400) >= 250, 100.3, 100.0)
    steps = bars_of(opens)
    asked = [d.asked for d in play_replay([Script()], [BarTape(steps)], rules).decisions]
    assert (asked[0], asked[-1]) == (250, 309)  # one of ten past prices is enough for the mean to come near again
    asked = [d.asked for d in play_replay([Script("buy X")], [BarTape(wide)], replace(rules, trigger=0.0)).decisions]
    assert len(asked) == 399


def test_own_margin_triggers():
    opens = np.concatenate([np.full(200, 100.0), np.full(1_300, 100.3)])
    high = np.where(np.arange(1_500) == 150, 100.4, opens)
    rules = replace(RULES, trigger=0.0029, points=1)
    without = play_replay([Script()], [BarTape(bars_of(opens, high=high))], rules)
    held = play_replay([Script("buy X")], [BarTape(bars_of(opens, high=high))], rules)
    assert without.decisions[-1].asked < 300
    assert held.decisions[-1].asked == 1_498


def test_zone_of_the_exchange():
    """The session is told in the exchange's zone, whatever zone the file is in."""
    hour = bars_of(np.full(10_000, 100.0), start=NOON)  # 08:00 to 10:46 in New York
    rules = ReplayRules("America/New_York", opens="09:30:00", cutoff="10:00:00", trigger=0, cooling=60)
    play = play_replay([Script()], [BarTape(hour)], rules)
    assert play.start == 9.5 * 3_600
    assert play.cutoff == 1_800
    assert len(play.decisions) == 30
    assert play.decisions[0].state.startswith("Time 09:30:00, 1800 s to the cut-off. Cash 10000.00.")
    with pytest.raises(DataError, match=r"X: nothing is recorded from 09:30:00 to 10:00:00 in Asia/Tokyo"):
        play_replay([Script()], [BarTape(hour)], replace(rules, zone="Asia/Tokyo"))


def test_cut_off_rejects_and_liquidates():
    bars = BarTape(bars_of(100 + 0.01 * np.arange(100)), half_spread=0.001)
    rules = replace(RULES, cutoff="12:00:50", cooling=1)
    for late in (48.5, 49.0, 70.0, 1e6):  # the first is there before the cut-off, but the bar after it is not
        play = play_replay([Script("buy X", seconds=late)], [bars], rules)
        assert [decision.outcome for decision in play.decisions] == ["rejected"]
        assert play.yields == {"script": 0.0}
    touch = [(0, 90, 9, 91, 9), (5, 90, 9, 91, 9), (60, 90, 9, 91, 9)]
    for seconds, outcome in ((44.9, "traded"), (45.0, "rejected")):
        agent = Script("hold", "buy X", seconds=0.0)
        agent.answer = lambda questions, script=agent, took=seconds: [
            replace(Script.answer(script, questions)[0], seconds=took if len(script.questions) == 2 else 0.0)
        ]
        play = play_replay([agent], [QuoteTape(quotes_of(touch))], rules)
        assert [decision.outcome for decision in play.decisions] == ["passed", outcome]
    play = play_replay([Script("buy X", seconds=48.0)], [bars], rules)
    bought, sold = play.trades
    assert (bought.time, bought.price) == (48.0, pytest.approx(100.49 * 1.001))
    # At the last price that is known then: the close of the bar that ended a second before.
    assert (sold.reason, sold.time, sold.price) == ("cut-off", 49.0, pytest.approx(100.48 * 0.999))
    assert max(trade.time for trade in play.trades) <= play.cutoff == 49.0


def test_equity_adds_up():
    rng = np.random.default_rng(3)
    pair = [BarTape(bars_of(100 + rng.normal(0, 0.05, 900).cumsum(), ticker=name)) for name in ("AA", "BB")]
    rules = replace(RULES, cooling=5, fee=0.0005, stake=0.3)
    play = play_replay([RandomTrader(1.0), RandomTrader(1.0, seed=1, name="other")], pair, rules)
    for name, line in play.equity.items():
        mine = [trade for trade in play.trades if trade.agent == name]
        assert len(mine) > 20
        cash = 10_000 - sum(trade.quantity * trade.price * (trade.side + 0.0005) for trade in mine)
        assert line.values[-1] == pytest.approx(cash)
        assert list(line.times) == sorted(line.times)
        for asset in ("AA", "BB"):
            assert sum(trade.side * trade.quantity for trade in mine if trade.asset == asset) == pytest.approx(0)
        for trade in mine:
            if trade.reason == "order":
                decision = play.decisions[trade.decision]
                assert decision.agent == name
                assert decision.choice == f"{'buy' if trade.side > 0 else 'sell'} {trade.asset}"
                assert trade.time >= decision.asked + decision.seconds
    again = play_replay([RandomTrader(1.0), RandomTrader(1.0, seed=1, name="other")], pair, rules)
    assert again.as_json() == play.as_json()


def test_what_is_asked():
    opens = np.linspace(100, 101, 600)
    agent = Script("buy X")
    rules = replace(RULES, opens="12:05:00", points=3, stake=0.5)
    play_replay([agent], [BarTape(bars_of(opens), half_spread=0)], rules)
    first, second = agent.questions[:2]
    assert first.rules == second.rules
    assert (first.time, second.time, first.game) == (0.0, 1.0, "replay 0")
    close = opens[299]  # the bar from 12:04:59 on is the last one that is over at 12:05:00
    past = " ".join(f"{opens[299 - 60 * back]:.2f}" for back in (3, 2, 1))
    assert first.state.splitlines()[1] == f"X: buy {close:.2f}, sell {close:.2f}; you can buy 49. Past {past}"
    paid, now = opens[300], opens[300]
    assert f"you hold 49, paid {paid:.2f}: margins {now / paid - 1:+.2%}" in second.state
    assert second.answers == ("hold", "buy X", "sell X")
    assert all(len(answer) < 12 for answer in second.answers)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"zone": "Mars"}, "unknown time zone 'Mars'"),
        ({"zone": "UTC", "stake": 1.5}, r"stake: 1\.5"),
        ({"zone": "UTC", "lot": 0}, "lot: .*got 0"),
        ({"zone": "UTC", "fee": float("nan")}, "fee: .*nan"),
        ({"zone": "UTC", "cutoff": "half past three"}, "cutoff: 'half past three'"),
    ],
)
def test_rules_that_cannot_be_meant(wrong, named):
    with pytest.raises(ConfigError, match=named):
        ReplayRules(**wrong)


def test_tickers():
    tape = BarTape(bars_of([100.0, 100.0, 100.0]))
    with pytest.raises(DataError, match="tickers: X, X"):
        play_replay([Script()], [tape, tape], RULES)
    with pytest.raises(DataError, match="tickers: none"):
        play_replay([Script()], [], RULES)
    other = BarTape(bars_of([100.0, 100.0], start=NOON + 86_400 * SECOND, ticker="Y"))
    with pytest.raises(DataError, match="different days in UTC: X 2024-08-05, Y 2024-08-06"):
        play_replay([Script()], [tape, other], RULES)


def test_a_record_that_ends_ends_the_session():
    """Nobody trades at the last quote of a ticker that is not recorded any more."""
    long, short = bars_of(np.full(90, 100.0)), quotes_of([(0, 90, 9, 91, 9), (30, 90, 9, 91, 9)], ticker="Y")
    play = play_replay([Script()], [BarTape(long), QuoteTape(short)], RULES)
    assert (play.cutoff, play.decisions[-1].asked) == (29, 28)  # from the first bar on, which is over after a second


# The published rules.


def test_look_ahead_must_be_said():
    for value in (False, None, "true"):
        with pytest.raises(ConfigError, match="the future"):
            PaperRules(lookahead=value)
    with pytest.raises(ConfigError, match="cutoff: '25:00:00'"):
        PaperRules(lookahead=True, cutoff="25:00:00")
    with pytest.raises(ConfigError, match="unknown parser 'mine'"):
        play_paper([Script()], [bars_of([1.0, 1.0])], PaperRules(lookahead=True), parser="mine")


def test_paper_orders_by_quantity():
    """Texts that name quantities: what is not covered by cash does nothing, nobody sells more than is held."""
    bars = [bars_of([100.0, 101.0, 102.0, 103.0], ticker=name) for name in ("AA", "BB")]
    said = ['{"AA": 10, "BB": 5}', "no idea", '{"AA": 1000}', '{"AA": -50}']
    play = play_paper([Script(*said)], bars, PaperRules(lookahead=True), parser="stated")
    assert [decision.outcome for decision in play.decisions] == ["traded", "invalid", "unfilled", "traded"]
    assert [(t.asset, t.side, t.quantity, t.price) for t in play.trades] == [
        ("AA", 1, 10, 100), ("BB", 1, 5, 100), ("AA", -1, 10, 103),
    ]  # fmt: skip
    assert play.yields["script"] == pytest.approx((10 * 3 + 5 * 3) / 10_000)
    assert "Look-ahead" in play.notes[0]
    agent = Script(*said)
    play_paper([agent], bars, PaperRules(lookahead=True), parser="stated")
    assert agent.questions[1].answers == ("{}", '{"AA": 82}', '{"AA": -10}', '{"BB": 82}', '{"BB": -5}')
    for question in agent.questions:
        for answer in question.answers:
            assert stated_orders(answer, ["AA", "BB"]) == released_orders(answer, ["AA", "BB"])
    released = play_paper([Script(*said)], bars, PaperRules(lookahead=True), parser="released")
    assert [decision.outcome for decision in released.decisions] == ["traded", "passed", "unfilled", "traded"]


def test_paper_steps_are_common_and_end_after_the_cut_off():
    first, second = bars_of(np.full(10, 100.0), ticker="AA"), bars_of(np.full(5, 50.0), step=2, ticker="BB")
    agent = Script()
    play = play_paper([agent], [first, second], PaperRules(lookahead=True, cutoff="12:00:02"))
    # Every common second asks while a ticker is not held; the first one after the cut-off is the last.
    assert [decision.asked for decision in play.decisions] == [0, 2, 4]
    with pytest.raises(DataError, match="no second that all have"):
        play_paper([Script()], [first, bars_of([1.0, 1.0], start=NOON - 100 * SECOND, ticker="BB")], PaperRules(True))


def test_paper_holders_are_asked_when_prices_move():
    """Three hundredths of a percent, as released."""
    opens = np.array([100.0, 100.02, 100.02, 100.04, 100.0])
    agent = Script("buy X")
    play = play_paper([agent], [bars_of(opens)], PaperRules(lookahead=True))
    assert [decision.asked for decision in play.decisions] == [0, 3]


@pytest.mark.parametrize(
    ("text", "orders"),
    [
        ('{"AMZN": 1} then {"AMZN": 2}', {"AMZN": 2, "NVDA": 0}),
        ("<think>{'AMZN': 1}", None),
        ('{"AMZN": 2.5}', None),
        ('{"AMZN": True}', None),
        ('{"AMZN": __import__("os")}', None),
        ('{"AMZN": "3"}', None),
        ("{AMZN: 3}", None),
        ("{'OTHER': 3}", {"AMZN": 0, "NVDA": 0}),
        ("", None),
        ('```json\n{"NVDA": +4,\n "AMZN": -1}\n```', {"AMZN": -1, "NVDA": 4}),
    ],
)
def test_stated_orders(text, orders):
    assert stated_orders(text, ["AMZN", "NVDA"]) == orders


# The user's own files, where they are.


def test_real_bars(shared_data):
    """The rule bot's gap: millions of percent by the published rules, single digits in the replay."""
    bars = [
        read_bars(shared_data / f"hft_ohlc_{name}_2024-08-05.csv.gz", name, zone="UTC", day="2024-08-05")
        for name in ("NVDA", "AMZN")
    ]
    paper = play_paper([RuleTrader(0.01, 0.713)], bars, PaperRules(lookahead=True, trigger=0.01))
    assert next(iter(paper.yields.values())) > 100
    rules = ReplayRules("America/New_York", stake=0.98, trigger=0.01, cooling=0)
    replayed = play_replay([RuleTrader(0.01, 0.713)], [BarTape(each) for each in bars], rules)
    assert replayed.start == 9.5 * 3_600
    assert replayed.cutoff == 2.5 * 3_600 + 1  # the file ends at noon in New York
    assert abs(next(iter(replayed.yields.values()))) < 0.2  # the market itself rose by 7 % until noon


def test_real_quotes(shared_data):
    tapes = [
        QuoteTape(read_quotes(shared_data / f"lob_{name}USDT_2024-08-08_bbo.csv.gz", name, zone="UTC"))
        for name in ("BTC", "ETH")
    ]
    rules = ReplayRules("UTC", opens=None, cutoff=None, lot=1e-5, trigger=0.0003, cooling=1, points=5, spacing=10)
    play = play_replay([RandomTrader(0.5)], tapes, rules)
    assert play.outcomes("random")["traded"] > 50
    drawn = play.prices["BTC"]
    assert len(drawn.times) == len(drawn.sell_size) < 5_000
    assert all(sell < buy for sell, buy in zip(drawn.sell, drawn.buy, strict=True))
    for trade in play.trades:
        tape = next(tape for tape in tapes if tape.ticker == trade.asset)
        assert tape.seen.low.min() <= trade.price <= tape.seen.high.max()
