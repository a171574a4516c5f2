"""The oracles of the arenas' specification, section 7.2, by number."""

import zlib
from dataclasses import replace

import numpy as np
import pytest

from tenfold.arena.agents import Action
from tenfold.arena.trading.agents import RuleTrader, ScriptedTrader
from tenfold.arena.trading.files import SECOND, Bars, Quotes
from tenfold.arena.trading.market_day import play_market, settle_market, sweep_market, trade_jumps
from tenfold.arena.trading.paper import (
    PaperRules,
    decayed_price,
    parity_trigger,
    play_paper,
    released_orders,
    stated_orders,
)
from tenfold.arena.trading.replay import ReplayRules, play_replay
from tenfold.arena.trading.synthetic import MarketRules, book_level, draw_market
from tenfold.arena.trading.tapes import BarTape, QuoteTape

FULL = MarketRules(events=3_200)
LONGEST = 8 * FULL.half_life
OPENING = 1_722_850_200 * SECOND  # 2024-08-05T09:30:00Z
ALL_DAY = ReplayRules("UTC", opens=None, cutoff=None)


def artefact_day(seed, bars=21_600):
    """The specification's day: a driftless walk in which one bar of a hundred has a bad print."""
    rng = np.random.default_rng(seed)
    close = 100 * np.exp(rng.normal(0, 1e-4, bars).cumsum())
    opened = np.concatenate([[100.0], close[:-1]])
    high = np.maximum(opened, close) * (1 + rng.uniform(0, 5e-5, bars))
    low = np.minimum(opened, close) * (1 - rng.uniform(0, 5e-5, bars))
    bad, up = rng.random(bars) < 0.01, rng.random(bars) < 0.5
    high, low = np.where(bad & up, high * 1.05, high), np.where(bad & ~up, low * 0.95, low)
    return Bars("X", "UTC", OPENING + SECOND * np.arange(bars), SECOND, opened, high, low, close)


def walk_of_quotes(seed, count=4_000):
    rng = np.random.default_rng(seed)
    time = OPENING + rng.integers(1, 400_000_000, count).cumsum()
    bid = 100 + 0.01 * rng.integers(-2, 3, count).cumsum()
    sizes = rng.integers(1, 200, (2, count)).astype(float)
    return Quotes("X", "UTC", time, bid, bid + 0.01 * rng.integers(1, 4, count), *sizes)


class Swayed:
    """Whatever is different in what it sees makes it choose something else."""

    def __init__(self, seconds, name="swayed"):
        self.name, self.seconds = name, seconds

    def answer(self, questions):
        found = []
        for question in questions:
            choice = question.answers[zlib.crc32(question.state.encode()) % len(question.answers)]
            found.append(Action(choice, choice, self.seconds))
        return found


def test_01_closed_form():
    rules = MarketRules(revert=0.5, amplitude=0.01, half_life=0.5, cost=0.001, drift=0.5)
    assert rules.expected_yield(0.9, 0) == pytest.approx(0.00375, abs=1e-12)
    assert rules.expected_yield(0.9, 0.713) == pytest.approx(0.000924726, abs=5e-10)
    assert rules.expected_yield(0.5, 0) == pytest.approx(0.00075, abs=1e-12)
    assert rules.break_even(0.9) == pytest.approx(1.2925, abs=5e-5)
    assert rules.break_even(0.6) == pytest.approx(0.5, abs=5e-5)
    for accuracy in (0.6, 0.75, 0.9):
        assert rules.expected_yield(accuracy, rules.break_even(accuracy)) == pytest.approx(0, abs=1e-15)


@pytest.fixture(scope="module")
def days():
    """A hundred thousand jumps."""
    return [draw_market(seed, FULL) for seed in range(32)]


@pytest.mark.parametrize(("accuracy", "latency"), [(0.9, 0.0), (0.9, 0.713), (0.5, 0.0), (0.6, 2.0), (1.0, LONGEST)])
def test_01_simulation(days, accuracy, latency):
    rng, gains = np.random.default_rng(5), []
    for day in days:
        wants = day.reverts == (rng.random(FULL.events) < accuracy)
        fills = trade_jumps(day, wants[None], np.full((1, FULL.events), latency))
        gains.append(fills.gain[0] / FULL.notional)
    found = np.concatenate(gains)
    assert found.size >= 100_000
    error = found.std() / found.size**0.5
    assert abs(found.mean() - FULL.expected_yield(accuracy, latency)) < 4 * error
    assert error < 5e-5  # or the line above says nothing


def test_01_agents():
    """The same through questions and answers, for other values than the defaults."""
    rules = MarketRules(events=1_000, revert=0.3, amplitude=0.02, half_life=1.0, cost=0.002, drift=0.8)
    plays = [play_market([ScriptedTrader(0.8, seconds=0.5)], seed, rules) for seed in range(4)]
    found = np.mean([next(iter(play.yields.values())) for play in plays]) * rules.cash / rules.notional / rules.events
    assert found == pytest.approx(rules.expected_yield(0.8, 0.5), abs=4 * 0.013 / 4_000**0.5)


def test_04_nothing_done():
    play = play_market([ScriptedTrader(1.0, seconds=5.0, name="late"), Silent()], seed=0)
    assert play.yields == {"late": 0.0, "silent": 0.0}
    assert play.trades == ()


def test_04_the_same_touch():
    """Where a jump leaves the price where it was, a round trip loses exactly its cost."""
    rules = MarketRules(amplitude=1e-300, events=50)
    play = play_market([ScriptedTrader(1.0, name="reader")], seed=0, rules=rules)
    trips = play.outcomes("reader")["traded"]
    assert trips > 10
    assert play.yields["reader"] == pytest.approx(-trips * 0.001 * 1_000 / 10_000, abs=1e-12)


class Plan:
    """Says the same, again and again; what cannot be done is not valid and does nothing."""

    def __init__(self, *says, seconds=0.0):
        self.name, self.says, self.seconds, self.asked = "plan", says, seconds, 0

    def answer(self, questions):
        said = self.says[self.asked % len(self.says)]
        self.asked += 1
        return [Action(said, said, self.seconds)]


def test_02_paper_decay():
    for delay, high, low in ((0, 100, 98), (0.3, 99.4, 97.8), (0.75, 98.5, 97.5), (1.5, 97, 97), (9.0, 97, 97)):
        assert decayed_price(100, 97, delay) == pytest.approx(high, abs=1e-12)
        assert decayed_price(98, 97, delay) == pytest.approx(low, abs=1e-12)
    assert decayed_price(96, 97, 0.6) == pytest.approx(96.4, abs=1e-12)
    assert decayed_price(95, 97, 0.6) == pytest.approx(95.8, abs=1e-12)


def test_03_parity_trigger():
    for bar, asks in (((100.02, 99.99), False), ((100.03, 99.99), True), ((100.0, 99.97), True)):
        assert parity_trigger([bar, (100.0, 100.0)], [100.0, 100.0], threshold=0.03) is asks
    assert parity_trigger([(100.0, 100.0), (100.0, 100.0)], [100.0, None])  # a ticker that is not held always asks


def flat(count=600, price=100.0):
    prices = np.full(count, price)
    return Bars("X", "UTC", OPENING + SECOND * np.arange(count), SECOND, prices, prices, prices, prices)


def test_04_recorded_markets():
    """Doing nothing yields exactly 0; a round trip at one touch loses the spread and the fees, and nothing else."""
    rules = replace(ALL_DAY, trigger=0, cooling=0, fee=0.001)
    bars = BarTape(flat(), half_spread=0.0005)
    ones = np.ones(2)
    quotes = QuoteTape(
        Quotes("X", "UTC", OPENING + SECOND * np.array([0, 60]), 99.95 * ones, 100.05 * ones, 1e9 * ones, 1e9 * ones)
    )
    for tape in (bars, quotes):
        assert play_replay([Plan("hold")], [tape], rules).yields == {"plan": 0.0}
        play = play_replay([Plan("buy X", "hold")], [tape], replace(rules, cooling=1e6))
        bought, sold = play.trades
        assert (bought.quantity, sold.quantity, sold.reason) == (49, 49, "cut-off")
        assert (bought.price, sold.price) == (pytest.approx(100.05), pytest.approx(99.95))
        paid = 49 * 0.10 + 0.001 * 49 * (100.05 + 99.95)
        assert play.yields["plan"] * 10_000 == pytest.approx(-paid, abs=1e-9)


@pytest.mark.parametrize("seconds", [0.0, 0.7, 20.0])
@pytest.mark.parametrize("kind", ["bars", "quotes"])
def test_05_no_look_ahead(kind, seconds):
    """All that comes after an instant is replaced; what was seen and traded up to it is as before."""
    data = artefact_day(0, 1_200) if kind == "bars" else walk_of_quotes(0)
    rules = replace(ALL_DAY, trigger=0.001, cooling=2, stake=0.2)

    def play(data):
        tape = BarTape(data) if kind == "bars" else QuoteTape(data)
        found = play_replay([Swayed(seconds)], [tape], rules)
        shift = (int(tape.seen.known[0]) - OPENING) / SECOND
        decisions = [(d.asked + shift, d.state, d.choice) for d in found.decisions]
        return decisions, [(t.time + shift, t.side, t.price, t.quantity) for t in found.trades if t.reason == "order"]

    whole = play(data)
    assert min(map(len, whole)) > 10
    for until in (200, 431, 700):
        # A bar is over one second after it began; one that begins now is not known yet, but a quote of now is.
        began = data.start if kind == "bars" else data.time - 1
        later = began >= OPENING + until * SECOND
        columns = ("open", "high", "low", "close") if kind == "bars" else ("bid", "ask", "bid_size", "ask_size")
        tripled = {name: np.where(later, 3, 1) * getattr(data, name) for name in columns}
        changed = play(replace(data, **tripled))
        for before, after in zip(whole, changed, strict=True):
            kept = [[each for each in side if each[0] < until] for side in (before, after)]
            assert kept[0] == kept[1]
            assert kept[0]
        assert whole != changed


def test_05_the_paper_looks_ahead():
    data = artefact_day(0, 600)
    later = replace(data, high=np.where(np.arange(600) > 300, 2 * data.high, data.high))
    rules = PaperRules(lookahead=True, trigger=0.01, stake=0.5)
    first, other = (play_paper([RuleTrader(0.01, 0.5)], [day], rules).trades[0] for day in (data, later))
    assert first.time == other.time < 300
    assert other.price > first.price * 1.05


def test_06_monotone():
    """For every day, not on average: the decisions stay, the answers come later."""
    latencies = np.linspace(0, LONGEST, 33)
    for seed in range(3):
        agents = [ScriptedTrader(0.7, seed=1, name="a"), ScriptedTrader(0.9, seed=2, name="b")]
        yields = np.array([list(play.yields.values()) for play in sweep_market(agents, seed, latencies)])
        assert (np.diff(yields, axis=0) <= 1e-15).all()
        assert (yields[0] > yields[-1] + 0.01).all()


class Silent:
    name = "silent"

    def answer(self, questions):
        return [Action("", None, 0.0) for _ in questions]


def test_08_priority():
    """Two agents want 80 where the touch displays 100: whoever comes first gets 80, the other one 20 and worse."""
    rules = MarketRules(events=60, notional=80, size=100, level=0.002, cost=0)
    day = draw_market(0, rules)
    wants = np.ones((2, 60), dtype=bool)
    for first, second in ((0.1, 0.2), (0.2, 0.1)):
        fills = trade_jumps(day, wants, np.array([[first] * 60, [second] * 60]))
        early = int(first > second)
        assert (fills.at_touch[early] == 80).all()
        assert (fills.at_touch[1 - early] == 20).all()
        assert fills.worse[early] == pytest.approx(0)
        assert fills.worse[1 - early] == pytest.approx(0.002 * 60 / 80)
    tied = trade_jumps(day, wants, np.full((2, 60), 0.3))
    again = trade_jumps(day, wants, np.full((2, 60), 0.3))
    assert (np.sort(tied.at_touch, axis=0) == [[20], [80]]).all()  # somebody is first
    assert 15 <= (tied.at_touch[0] == 80).sum() <= 45  # now the one, now the other
    assert (tied.at_touch == again.at_touch).all()


def test_08_who_does_not_trade_takes_nothing():
    rules = MarketRules(events=60, notional=80, size=100)
    wants = np.ones((2, 60), dtype=bool)
    wants[0] = False
    assert (trade_jumps(draw_market(0, rules), wants, np.zeros((2, 60))).at_touch[1] == 80).all()


BOOKS = [(0, 80, 100), (80, 80, 100), (250, 480, 100), (0, 7, 2), (9, 1, 10)]


@pytest.mark.parametrize(("before", "quantity", "size"), BOOKS)
def test_08_level_by_level(before, quantity, size):
    """One at a time through the book, each at the level where it stands."""
    levels = [unit // size for unit in range(before, before + quantity)]
    assert book_level(np.array([float(before)]), quantity, size)[0] == pytest.approx(np.mean(levels))


def test_08_in_the_record():
    rules = MarketRules(notional=80, size=100, events=20, level=0.002)
    day = draw_market(0, rules)
    orders = [Action(text, text, 0.0) for text in ("sell" if side > 0 else "buy" for side in day.side)]
    play = settle_market(day, {"quick": orders, "slow": orders}, {"quick": 0.1, "slow": 0.1 + 1e-9})
    entries = [trade for trade in play.trades if trade.reason == "order"]
    for quick, slow in zip(entries[::2], entries[1::2], strict=True):
        assert (quick.agent, slow.agent) == ("quick", "slow")
        # A buyer pays more, a seller gets less.
        assert slow.side * (slow.price - quick.price) > 0


@pytest.mark.parametrize(
    ("again", "latency", "percent"),
    [
        (True, 0.0, (19_482.963, 12_684.800, 9_184.588, 7_347.773)),
        (True, 0.7, (495.632, 645.510, 469.625, 377.609)),
        (True, 1.3, (38.044, 43.569, 31.323, 42.747)),
        (False, 0.0, (18_538.529, 11_884.046, 8_765.277, 7_030.741)),
        (False, 0.7, (435.054, 602.588, 397.441, 366.440)),
        (False, 1.3, (37.158, 42.481, 30.718, 41.934)),
    ],
)
def test_07_artefact(again, latency, percent):
    """A walk without drift: what the rule earns comes from the published rules, not from the market."""
    rules = PaperRules(lookahead=True, trigger=0.01, stake=0.98)
    for seed, expected in enumerate(percent):
        play = play_paper([RuleTrader(0.01, latency, again)], [artefact_day(seed)], rules)
        assert 100 * next(iter(play.yields.values())) == pytest.approx(expected, abs=6e-4)


def test_07_honest_replay():
    """The same days and the same rule: no trade, or next to nothing."""
    for seed in range(4):
        tape = BarTape(artefact_day(seed))
        rules = replace(ALL_DAY, stake=0.98, cooling=0)
        play = play_replay([RuleTrader(0.01, 0.0)], [tape], replace(rules, trigger=0.01))
        assert play.trades == ()
        play = play_replay([RuleTrader(0.005, 0.0)], [tape], replace(rules, trigger=0.005))
        assert abs(next(iter(play.yields.values()))) < 0.03
        assert play.trades


def test_07_without_the_filter_the_rule_trades():
    rules = replace(ALL_DAY, stake=0.98, cooling=0, trigger=0.01)
    play = play_replay([RuleTrader(0.01, 0.0)], [BarTape(artefact_day(0), clip=None)], rules)
    assert len(play.trades) > 100


def test_09_parsers():
    text = """<think>"AMZN": 5</think>{"AMZN": -3, 'NVDA': 4}"""
    assert released_orders(text, ["AMZN", "NVDA"]) == {"AMZN": 5, "NVDA": 0}
    assert stated_orders(text, ["AMZN", "NVDA"]) == {"AMZN": -3, "NVDA": 4}
