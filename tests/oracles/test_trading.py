"""The oracles of the arenas' specification, section 7.2, by number."""

import numpy as np
import pytest

from tenfold.arena.agents import Answer
from tenfold.arena.trading.agents import ScriptedTrader
from tenfold.arena.trading.market_day import play_market, settle_market, sweep_market, trade_jumps
from tenfold.arena.trading.synthetic import MarketRules, draw_market

FULL = MarketRules(events=3_200)
LONGEST = 8 * FULL.half_life


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
        return [Answer("", None, 0.0) for _ in questions]


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


def test_08_in_the_record():
    rules = MarketRules(notional=80, size=100, events=20, level=0.002)
    day = draw_market(0, rules)
    orders = [Answer(text, text, 0.0) for text in ("sell" if side > 0 else "buy" for side in day.side)]
    play = settle_market(day, {"quick": orders, "slow": orders}, {"quick": 0.1, "slow": 0.1 + 1e-9})
    entries = [trade for trade in play.trades if trade.reason == "order"]
    for quick, slow in zip(entries[::2], entries[1::2], strict=True):
        assert (quick.agent, slow.agent) == ("quick", "slow")
        # A buyer pays more, a seller gets less.
        assert slow.side * (slow.price - quick.price) > 0
