"""A day of the synthetic market, asked and played: what its agents see, and what their answers come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tenfold.arena.agents import Action, Agent, Turn
from tenfold.arena.trading.record import (
    DRAWN,
    Line,
    Mark,
    MarketDecision,
    MarketPlay,
    Outcome,
    Prices,
    Reason,
    Trade,
    check_answers,
    check_names,
    clock,
)
from tenfold.arena.trading.synthetic import (
    ALLOWED,
    ASSETS,
    EXIT,
    PAIR_TICKS,
    TICK,
    Floats,
    Market,
    MarketRules,
    Mask,
    Whole,
    book_level,
    displacement,
    draw_market,
)
from tenfold.errors import ConfigError

OPENING = 34_200.0
"""The day starts at 09:30:00."""


@dataclass(frozen=True)
class Jump:
    """What is seen of a jump the moment that it happens; nothing in it is from later.

    Args:
        asset: that jumped, one of `ASSETS`.
        side: 1 up, -1 down.
        price: of the asset now, after the jump.
        pair_ticks: how far the other asset moved since its last point, in ticks.
        imbalance: bought minus sold in the last three seconds, oldest first.
    """

    asset: str
    side: int
    price: float
    pair_ticks: int
    imbalance: tuple[int, ...]

    @property
    def pair_still(self) -> bool:
        """Whether the other asset did not move, the first condition."""
        return abs(self.pair_ticks) < PAIR_TICKS

    @property
    def volume_against(self) -> bool:
        """Whether volume was against the jump in two of the last three seconds at least, the second condition."""
        return sum(amount * self.side < 0 for amount in self.imbalance) >= 2

    @property
    def reverts(self) -> bool:
        """What the rule says of it, which is always right."""
        return self.pair_still and self.volume_against


def market_prompt(rules: MarketRules) -> str:
    """What every question of a market begins with: the papers' content, and the rule that decides."""
    still = f"its price now differs from its last point by less than {PAIR_TICKS * TICK:.2f}"
    against = "bought minus sold is negative before a jump up, positive before a jump down"
    return f"""You trade {ASSETS[0]} and {ASSETS[1]} for one day. Earn as much as you can until the cut-off.
Now and then the price of one of them jumps by {rules.amplitude:.2%}. The jump reverts, or it goes on.
- One that reverts loses half of its size every {rules.half_life:g} s. Trade against it: sell after a jump up, buy \
after a jump down. Be quick: late orders get worse prices, and after {ALLOWED * rules.half_life:g} s none.
- One that goes on moves another {rules.amplitude * rules.drift:.2%} the same way later. Trading against it loses: pass.
A jump reverts if, and only if, both are true:
1. The other asset did not move{"" if rules.easy else f": {still}"}.
2. Volume was against the jump in at least 2 of the last 3 seconds{"" if rules.easy else f": {against}"}.
An order is worth {rules.notional:g} and costs {rules.cost:.2%}. The market closes it for you \
{EXIT * rules.half_life:g} s after the jump, at the latest at the cut-off. You may pass.
Answer with one of the words offered, and nothing else."""


def market_questions(market: Market) -> list[Turn]:
    """One question for each jump, in order. Answers: the order against the jump first, then ``pass``.

    An order with the jump is not offered: only the side that trades against it is displayed while a price is displaced.
    """
    prompt, game, found = market_prompt(market.rules), f"synthetic {market.seed}", []
    for i, jump in enumerate(_jumps(market)):
        answers = ("sell" if jump.side > 0 else "buy", "pass")
        seed, time = int(market.seeds[i]), float(market.start[i])
        found.append(Turn(prompt, _state(market, i, jump), answers, jump, seed, time, game))
    return found


def _jumps(market: Market) -> list[Jump]:
    price = market.fundamental * (
        1 + market.side * displacement(market.rules, market.reverts, np.zeros(len(market.start)))
    )
    return [
        Jump(ASSETS[asset], int(side), float(now), int(ticks), tuple(int(amount) for amount in imbalance))
        for asset, side, now, ticks, imbalance in zip(
            market.asset, market.side, price, market.pair_move, market.imbalance, strict=True
        )
    ]


def _state(market: Market, number: int, jump: Jump) -> str:
    rules, at = market.rules, int(market.start[number])
    up = "up" if jump.side > 0 else "down"
    cutoff = rules.seconds if rules.cutoff is None else rules.cutoff
    head = f"Time {clock(OPENING + at)}, {max(0, cutoff - at)} s to the cut-off.\n{jump.asset} jumped {up}"
    offer = f"Answer with {'sell' if jump.side > 0 else 'buy'} or pass. Your answer:"
    if rules.easy:
        moved = "did not move" if jump.pair_still else "moved"
        count = sum(amount * jump.side < 0 for amount in jump.imbalance)
        volume = f"Volume was against the jump in {count} of the last 3 seconds."
        return f"{head}.\nThe other asset {moved}.\n{volume}\n{offer}"
    own, pair = ASSETS.index(jump.asset), 1 - ASSETS.index(jump.asset)
    when = at - 1 - rules.spacing * np.arange(rules.points - 1, -1, -1)
    past = [" ".join(f"{price:.2f}" for price in market.mid[which, when]) for which in (own, pair)]
    volumes = " ".join(f"{amount:+d}" for amount in jump.imbalance)
    return (
        f"{head} to {jump.price:.2f}.\n"
        f"{jump.asset}, points {rules.spacing} s apart, oldest first: {past[0]}; now {jump.price:.2f}\n"
        f"{ASSETS[pair]}, the other asset: {past[1]}; now {market.mid[pair, at]:.2f}\n"
        f"{jump.asset}, bought minus sold in the last 3 seconds, oldest first: {volumes}\n{offer}"
    )


@dataclass(frozen=True)
class Fills:
    """What orders come to, [agents, events] each.

    Args:
        outcome: of each question.
        arrived: displacement of the touch at arrival; 0 where nothing is traded, as below.
        worse: how much below that the order traded for the depth of the book, as a fraction of the fundamental.
        at_touch: money that traded at the touch.
        gain: money, after cost.
    """

    outcome: NDArray[np.str_]
    arrived: Floats
    worse: Floats
    at_touch: Floats
    gain: Floats


def trade_jumps(market: Market, wants: Mask, seconds: Floats) -> Fills:
    """Orders against the jumps, by price and time: who arrives first takes the touch, ties are drawn by lot.

    Args:
        market: the day.
        wants: [agents, events] whether there is an order.
        seconds: [agents, events] from the jump to its arrival.
    """
    rules = market.rules
    cutoff = rules.seconds if rules.cutoff is None else rules.cutoff
    asked = np.stack([_asked(market.start, line) for line in seconds])
    arrival = market.start + seconds
    outcome = np.full(wants.shape, "traded", dtype="<U8")
    for name, hit in (
        ("late", seconds > ALLOWED * rules.half_life),
        ("rejected", arrival >= cutoff),
        ("passed", ~wants),
        ("busy", ~asked),
    ):
        outcome[hit] = name
    traded = outcome == "traded"
    lottery = np.random.default_rng((market.seed, 1)).random(wants.shape)
    order = np.lexsort((lottery, np.where(traded, seconds, np.inf)), axis=0)
    amounts = np.take_along_axis(np.where(traded, rules.notional, 0.0), order, axis=0)
    before = np.empty_like(amounts)
    np.put_along_axis(before, order, amounts.cumsum(axis=0) - amounts, axis=0)
    worse = np.where(traded, rules.level * book_level(before, rules.notional, rules.size), 0.0)
    arrived = np.where(traded, displacement(rules, market.reverts, np.where(traded, seconds, 0.0)), 0.0)
    gain = np.where(traded, rules.notional * (arrived - worse - market.exits()[1] - rules.cost), 0.0)
    at_touch = np.where(traded, np.clip(rules.size - before, 0.0, rules.notional), 0.0)
    return Fills(outcome, arrived, worse, at_touch, gain)


def _asked(start: Whole, seconds: Floats) -> Mask:
    """Which jumps an agent is asked about: not those that come while it thinks."""
    found = np.ones(len(start), dtype=bool)
    if len(start) < 2 or seconds.max() <= np.diff(start).min():
        return found
    free = 0.0
    for i, at in enumerate(start):
        found[i] = at >= free
        if found[i]:
            free = at + seconds[i]
    return found


def settle_market(
    market: Market, answers: dict[str, Sequence[Action]], latency: dict[str, float] | None = None
) -> MarketPlay:
    """What a day comes to, given what everybody answers to its questions.

    Args:
        market: the day.
        answers: of each agent by name, one for each jump.
        latency: seconds to charge instead of what the answers took, by agent; the answers stay the same.

    Raises:
        ConfigError: no agents, or a latency below 0 or not finite.
        DataError: answers that do not fit the questions.
    """
    names, questions = list(answers), market_questions(market)
    for name in names:
        check_answers(name, answers[name], len(questions))
    seconds = np.array([[answer.seconds for answer in answers[name]] for name in names], dtype=np.float64)
    for name, value in (latency or {}).items():
        if not 0 <= value < np.inf:
            raise ConfigError(f"latency: {name} takes {value} s", remedy="give finite seconds, 0 or more")
        seconds[names.index(name)] = value
    valid = np.array([[a.choice in q.answers for a, q in zip(answers[name], questions, strict=True)] for name in names])
    wants = valid & np.array([[answer.choice != "pass" for answer in answers[name]] for name in names])
    fills = trade_jumps(market, wants, seconds)
    fills.outcome[(fills.outcome == "passed") & ~valid] = "invalid"
    return _record(market, questions, answers, seconds, fills)


def _record(
    market: Market,
    questions: list[Turn],
    answers: dict[str, Sequence[Action]],
    seconds: Floats,
    fills: Fills,
) -> MarketPlay:
    rules, names = market.rules, list(answers)
    decisions, trades = [], []
    closing, home = market.exits()
    equity = {name: ([0.0], [rules.cash]) for name in names}
    for event, question in enumerate(questions):
        at, sign, base = float(market.start[event]), int(market.side[event]), float(market.fundamental[event])
        for agent, name in enumerate(names):
            said, outcome = answers[name][event], str(fills.outcome[agent, event])
            took = float(seconds[agent, event])
            decisions.append(_decision(name, at, took, question.state, said, outcome))
            if outcome != "traded":
                continue
            quantity, entered, left = rules.notional / base, at + took, float(closing[event])
            opened = fills.arrived[agent, event] - fills.worse[agent, event]
            prices = (base * (1 + sign * float(opened)), base * (1 + sign * float(home[event])))
            reason: Reason = "cut-off" if left < at + EXIT * rules.half_life else "exit"
            asset = ASSETS[market.asset[event]]
            trades.append(Trade(name, asset, -sign, quantity, prices[0], entered, "order", len(decisions) - 1))
            trades.append(Trade(name, asset, sign, quantity, prices[1], left, reason))
            times, values = equity[name]
            paid = rules.notional * (rules.cost + float(fills.worse[agent, event]))
            values += [values[-1] - paid, values[-1] + float(fills.gain[agent, event])]
            times += [entered, left]
    end = float(rules.seconds if rules.cutoff is None else rules.cutoff)
    return MarketPlay(
        mode="synthetic",
        rules=market_prompt(rules),
        cash=rules.cash,
        start=OPENING,
        cutoff=end,
        prices=_drawn(market),
        decisions=tuple(decisions),
        trades=tuple(sorted(trades, key=lambda trade: trade.time)),
        equity={name: Line((*times, end), (*values, values[-1])) for name, (times, values) in equity.items()},
        marks=tuple(_mark(market, event) for event in range(len(questions))),
        notes=("A simulated market that does not react to its traders; no jump of it says anything of a real one.",),
    )


def _decision(name: str, at: float, took: float, state: str, said: Action, outcome: str) -> MarketDecision:
    if outcome == "busy":
        return MarketDecision(name, at, 0.0, state, "", None, "busy")
    kind: Outcome = outcome  # type: ignore[assignment]  # numpy forgets which texts these are
    return MarketDecision(name, at, took, state, said.text, said.choice, kind)


def _mark(market: Market, event: int) -> Mark:
    way = "up" if market.side[event] > 0 else "down"
    what = "reverts" if market.reverts[event] else "goes on"
    return Mark(float(market.start[event]), ASSETS[market.asset[event]], f"a jump {way} that {what}")


def _drawn(market: Market) -> dict[str, Prices]:
    """The prices: thinned out, but by quarters of a half-life after a jump, where somebody can trade."""
    rules, last = market.rules, market.rules.seconds
    calm = np.arange(0, last + 1, max(1, last // DRAWN))
    around = market.start[:, None] + [-1, rules.apart - 2]
    within = market.start[:, None] + np.linspace(0, EXIT, 4 * EXIT + 1) * rules.half_life
    times = np.unique(np.concatenate([calm, around.ravel(), within.ravel()]).clip(0, last))
    event = np.searchsorted(market.start, times, side="right") - 1
    after = times - market.start[event]
    jumping = (event >= 0) & (after <= EXIT * rules.half_life)
    found = {}
    for number, name in enumerate(ASSETS):
        own = jumping & (market.asset[event] == number)
        base, side = market.fundamental[event[own]], market.side[event[own]]
        mid = market.mid[number, times.astype(np.int64)]
        mid[own] = base * (1 + side * displacement(rules, market.reverts[event[own]], after[own]))
        displayed = np.zeros((2, len(times)))  # to be bought after a jump down, to be sold to after a jump up
        displayed[:, own] = (np.array([[-1], [1]]) * side > 0) * rules.size / base
        found[name] = Prices(*(tuple(line.tolist()) for line in (times, mid, mid, *displayed)))
    return found


def ask_market(agents: Sequence[Agent], market: Market) -> dict[str, Sequence[Action]]:
    """Each agent's answers to all questions of a day.

    Raises:
        ConfigError: no agents, or two of one name.
    """
    check_names([agent.name for agent in agents])
    return {agent.name: agent.answer(market_questions(market)) for agent in agents}


def play_market(agents: Sequence[Agent], seed: int, rules: MarketRules | None = None) -> MarketPlay:
    """One day: asked, and played at the latencies that the answers took.

    >>> from tenfold.arena.trading.agents import ScriptedTrader
    >>> play_market([ScriptedTrader(1.0, name="knows all")], seed=3).outcomes("knows all")["traded"]
    43
    """
    market = draw_market(seed, rules)
    return settle_market(market, ask_market(agents, market))


def sweep_market(
    agents: Sequence[Agent], seed: int, latencies: Sequence[float], rules: MarketRules | None = None
) -> list[MarketPlay]:
    """One day at several latencies: each question is asked once, and what was answered is charged differently.

    Args:
        agents: that trade in the same market.
        seed: of the day.
        latencies: seconds that each answer of each agent takes, one play for each.
        rules: of the market.
    """
    market = draw_market(seed, rules)
    answers = ask_market(agents, market)
    return [settle_market(market, answers, dict.fromkeys(answers, latency)) for latency in latencies]
