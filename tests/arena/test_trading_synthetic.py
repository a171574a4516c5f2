"""The synthetic market: what is asked, what may be known, and what becomes of answers."""

import re
import time
from dataclasses import replace

import numpy as np
import pytest

from tenfold.arena.agents import Action
from tenfold.arena.trading.agents import RandomTrader, ScriptedTrader
from tenfold.arena.trading.market_day import (
    ask_market,
    market_questions,
    play_market,
    settle_market,
    sweep_market,
)
from tenfold.arena.trading.synthetic import MarketRules, draw_market
from tenfold.errors import ConfigError, DataError


def numbers(line):
    return [float(text) for text in re.findall(r"[-+]?\d+(?:\.\d+)?", line.rpartition("first: ")[2])]


def by_the_rule(state):
    """What the rule in the prompt says of a question's text, and of each condition alone."""
    _, jumped, _, pair, volume, _ = state.splitlines()
    up = "jumped up" in jumped
    *_, last, now = numbers(pair)
    still = abs(now - last) < 0.05 - 1e-9
    against = sum(amount < 0 if up else amount > 0 for amount in numbers(volume)) >= 2
    return still and against, still, against


def test_the_text_decides():
    """Every jump of a day, by a reader who has nothing but the text."""
    right = np.zeros(3)
    for seed in range(3):
        day = draw_market(seed, MarketRules(events=1_000))
        for question, truth in zip(market_questions(day), day.reverts, strict=True):
            right += [reading == truth for reading in by_the_rule(question.state)]
            assert question.view.reverts == truth
    assert right[0] == 3_000
    # Who looks at one condition alone is wrong in a quarter of the jumps: the rule needs both.
    assert right[1:] / 3_000 == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / 3_000) ** 0.5)


def test_the_easy_text_decides():
    for seed in range(3):
        day = draw_market(seed, MarketRules(easy=True))
        for question, truth in zip(market_questions(day), day.reverts, strict=True):
            against = int(re.search(r"in (\d) of the last 3", question.state)[1]) >= 2
            assert ("did not move" in question.state and against) == truth
            assert not re.search(r"\d+\.\d+", question.state)  # no prices


def test_nothing_else_tells_the_kind():
    """Days that differ in nothing but the kinds of their jumps differ in what the rule names, and in what follows."""
    kinds = [draw_market(0, MarketRules(revert=p, events=1)) for p in (0.0, 1.0)]
    assert [bool(day.reverts[0]) for day in kinds] == [False, True]
    states = [market_questions(day)[0].state.splitlines() for day in kinds]
    differing = [a for a, b in zip(*states, strict=True) if a != b]
    assert differing
    assert all("other asset" in line or "bought minus sold" in line for line in differing)


def test_the_past_alone_is_seen():
    """Whatever the prices are after a jump, its question is the same."""
    day = draw_market(2)
    for event in (0, 40, 99):
        later = day.mid.copy()
        later[:, day.start[event] + 1 :] = 7.0
        assert market_questions(replace(day, mid=later))[event] == market_questions(day)[event]


def test_prompt_is_constant_and_answers_fit_the_side():
    day = draw_market(0)
    questions = market_questions(day)
    assert len({question.rules for question in questions}) == 1
    assert len({question.seed for question in questions}) == len(questions)
    assert {question.game for question in questions} == {"synthetic 0"}
    for question, side, start in zip(questions, day.side, day.start, strict=True):
        assert question.answers == (("sell" if side > 0 else "buy"), "pass")
        assert question.time == start
        assert question.state.endswith("Your answer:")


@pytest.mark.parametrize("half_life", [0.05, 0.5, 3.0])
def test_jumps_are_apart_and_the_walk_pauses(half_life):
    rules = MarketRules(half_life=half_life, events=200, cost=0)
    day = draw_market(1, rules)
    assert (np.diff(day.start) >= 10 * half_life).all()
    assert day.start[-1] + 9 * half_life <= rules.seconds
    for event in range(200):
        pair, at = 1 - day.asset[event], day.start[event]
        assert len(set(day.mid[pair, at : at + int(9 * half_life)])) <= 1
        assert day.mid[day.asset[event], at - 1] == pytest.approx(day.fundamental[event])
    ticks = day.mid[:, : day.start[0]] / 0.01
    assert ticks == pytest.approx(np.round(ticks), abs=1e-6)


def test_amplitudes_and_probabilities_share_draws():
    few, many = (draw_market(0, MarketRules(revert=p, amplitude=a)) for p, a in ((0.3, 0.01), (0.6, 0.03)))
    assert (few.start == many.start).all()
    assert (few.side == many.side).all()
    assert (few.reverts <= many.reverts).all()


def test_same_seed_same_day():
    agents = [ScriptedTrader(0.7, 0.3), RandomTrader(0.1)]
    first, second, other = (play_market(agents, seed).as_json() for seed in (4, 4, 5))
    assert first == second
    assert first != other


class Counting:
    name = "counting"

    def __init__(self):
        self.asked = []

    def answer(self, questions):
        self.asked += [question.state for question in questions]
        return [Action(question.answers[0], question.answers[0], 0.0) for question in questions]


def test_a_sweep_asks_each_question_once():
    agent = Counting()
    plays = sweep_market([agent], 0, [0.05 * step for step in range(10)])
    assert len(plays) == 10
    assert len(agent.asked) == len(set(agent.asked)) == 100
    charged = settle_market(draw_market(0), ask_market([agent], draw_market(0)), {"counting": 0.1})
    assert charged.as_json() == plays[2].as_json()


def outcomes(seconds, choice="first", rules=None, seed=0):
    day = draw_market(seed, rules or MarketRules(events=20))
    texts = [question.answers[0] if choice == "first" else choice for question in market_questions(day)]
    answers = [
        Action(text, text if choice in ("first", "pass") else None, took)
        for text, took in zip(texts, np.broadcast_to(seconds, 20), strict=True)
    ]
    return settle_market(day, {"one": answers})


def test_invalid_answers_count_and_do_nothing():
    play = outcomes(0.1, choice="buy both")
    assert play.outcomes("one") == {"invalid": 20}
    assert play.decisions[0].seconds == 0.1
    assert play.yields["one"] == 0


def test_an_order_with_the_jump_is_not_valid():
    day = draw_market(0, MarketRules(events=20))
    with_it = ["buy" if side > 0 else "sell" for side in day.side]
    play = settle_market(day, {"one": [Action(text, text, 0.0) for text in with_it]})
    assert play.outcomes("one") == {"invalid": 20}


def test_too_late_for_the_jump():
    assert outcomes(4.0).outcomes("one") == {"traded": 20}
    late = outcomes(4.001)
    assert late.outcomes("one") == {"late": 20}
    assert late.yields["one"] == 0


def test_who_thinks_is_not_asked():
    """An answer that takes longer than the way to the next jump costs that one too."""
    day = draw_market(0, MarketRules(events=20))
    took = np.zeros(20)
    took[3] = day.start[6] - day.start[3] - 0.5
    play = outcomes(took)
    kinds = [decision.outcome for decision in play.decisions]
    assert kinds == ["traded"] * 3 + ["late", "busy", "busy"] + ["traded"] * 14
    assert play.decisions[4].said == ""


def test_cut_off():
    """Later orders are rejected, and what is open is closed at the price then in force."""
    day = draw_market(0, MarketRules(events=20))
    event = int(np.flatnonzero(day.reverts)[5])
    cutoff = int(day.start[event]) + 1
    play = outcomes(0.25, rules=MarketRules(events=20, cutoff=cutoff))
    kinds = [decision.outcome for decision in play.decisions]
    assert kinds == ["traded"] * (event + 1) + ["rejected"] * (19 - event)
    last = play.trades[-1]
    assert (last.reason, last.time) == ("cut-off", cutoff)
    base, sign = day.fundamental[event], day.side[event]
    assert last.price == pytest.approx(base * (1 + sign * 0.01 * 2 ** (-1 / 0.5)))
    steps = np.array(play.equity["one"].values)
    assert steps[-1] - steps[-4] == pytest.approx(1_000 * (0.01 * 2**-0.5 - 0.01 * 2**-2 - 0.001))
    exactly = outcomes(1.0, rules=MarketRules(events=20, cutoff=cutoff))
    assert exactly.decisions[event].outcome == "rejected"


def test_the_record_adds_up():
    """Cash after all trades, fees taken off, is the equity at the end; a page can explain each trade."""
    agents = [ScriptedTrader(0.8, 0.2), ScriptedTrader(0.6, 0.2, seed=1)]
    play = play_market(agents, seed=1, rules=MarketRules(notional=700, size=900))
    for name in play.yields:
        mine = [trade for trade in play.trades if trade.agent == name]
        cash = 10_000 - sum(trade.side * trade.quantity * trade.price for trade in mine)
        orders = [trade for trade in mine if trade.reason == "order"]
        assert cash - len(orders) * 0.7 == pytest.approx(play.equity[name].values[-1])
        assert sum(trade.side * trade.quantity for trade in mine) == pytest.approx(0)
        for trade in orders:
            decision = play.decisions[trade.decision]
            assert decision.agent == name
            assert decision.asked + decision.seconds == pytest.approx(trade.time)
            assert decision.choice == ("buy" if trade.side > 0 else "sell")
        line = play.equity[name]
        assert list(line.times) == sorted(line.times)
        assert len(line.times) == len(line.values)
    assert [trade.time for trade in play.trades] == sorted(trade.time for trade in play.trades)


def test_what_is_drawn():
    """Every trade at the touch lies on the line that is drawn, and takes no more than is displayed."""
    rules = MarketRules(events=40)
    play = play_market([ScriptedTrader(0.7, seconds=0.25)], 0, rules)
    assert play.trades
    for trade in play.trades:
        drawn = play.prices[trade.asset]
        at = int(np.searchsorted(drawn.times, trade.time))
        assert drawn.times[at] == trade.time
        if trade.reason == "order":
            line, size = (drawn.buy, drawn.buy_size) if trade.side > 0 else (drawn.sell, drawn.sell_size)
            assert trade.price == pytest.approx(line[at], rel=1e-12)
            assert trade.quantity == pytest.approx(size[at])
            assert (drawn.sell_size if trade.side > 0 else drawn.buy_size)[at] == 0
    for drawn in play.prices.values():
        assert list(drawn.times) == sorted(set(drawn.times))
        assert len(drawn.times) < 5_000


def test_accuracy_is_what_it_says():
    day = draw_market(0, MarketRules(events=3_000))
    right = {}
    for accuracy in (0.0, 0.5, 0.8, 1.0):
        answers = ScriptedTrader(accuracy).answer(market_questions(day))
        right[accuracy] = np.array([answer.choice != "pass" for answer in answers]) == day.reverts
        assert right[accuracy].mean() == pytest.approx(accuracy, abs=4 * (accuracy * (1 - accuracy) / 3_000) ** 0.5)
    assert (right[0.5] <= right[0.8]).all()  # common random numbers


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"revert": 1.2}, r"revert: .*1\.2"),
        ({"half_life": 0.0}, "half_life"),
        ({"cost": float("nan")}, "cost: .*nan"),
        ({"events": 5_000}, "at most 3274"),
        ({"cutoff": 30_000}, "cutoff: 30000"),
        ({"amplitude": 0.7, "drift": 0.5}, "amplitude"),
    ],
)
def test_rules_that_cannot_be_meant(wrong, named):
    with pytest.raises(ConfigError, match=named):
        MarketRules(**wrong)


def test_what_cannot_be_charged():
    day = draw_market(0, MarketRules(events=2))
    with pytest.raises(DataError, match="one, answer 2: took -1"):
        settle_market(day, {"one": [Action("pass", "pass", 0.0), Action("pass", "pass", -1.0)]})
    with pytest.raises(DataError, match="1 answers to 2"):
        settle_market(day, {"one": [Action("pass", "pass", 0.0)]})
    with pytest.raises(ConfigError, match="two are called 'random'"):
        play_market([RandomTrader(), RandomTrader()], 0)


@pytest.mark.timing
def test_a_day_takes_less_than_a_second():
    start = time.perf_counter()
    play_market([ScriptedTrader(0.9, 0.1), ScriptedTrader(0.7, 0.1, name="other")], 0, MarketRules(events=3_000))
    assert time.perf_counter() - start < 2
    start = time.perf_counter()
    play_market([ScriptedTrader(0.9, 0.1)], 0)
    assert time.perf_counter() - start < 1
