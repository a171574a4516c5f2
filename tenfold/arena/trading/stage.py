"""The stage ``trading``: what agents earn, how often they read the market rightly, and what speed is worth."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Any

from tenfold.arena.agents import Agent
from tenfold.arena.curves import RewardCurve, curves_figure, curves_table, reward_curve
from tenfold.arena.latency import Fixed, latency_metrics
from tenfold.arena.lineup import check_line_up, line_up, line_up_notes
from tenfold.arena.players import at_latency
from tenfold.arena.reference import check_taught
from tenfold.arena.trading.files import Bars, day_of, read_bars, read_quotes, zone_of
from tenfold.arena.trading.market_day import ask_market, market_questions, settle_market
from tenfold.arena.trading.page import market_page
from tenfold.arena.trading.paper import PaperRules, play_paper
from tenfold.arena.trading.record import MarketPlay
from tenfold.arena.trading.replay import ReplayRules, play_replay
from tenfold.arena.trading.synthetic import ALLOWED, MarketRules, draw_market
from tenfold.arena.trading.tapes import BarTape, QuoteTape, Tape
from tenfold.config.arena import TradingConfig
from tenfold.core.statistics import t_quantile, wilson
from tenfold.errors import ConfigError
from tenfold.files import write_text
from tenfold.stage.context import Context, StageOutput
from tenfold.stage.record import Figure, Series, Table
from tenfold.stage.results import Metric, Result

Day = dict[str, Any]
"""What one agent made of one day: ``agent``, ``day``, ``yield``, ``outcomes``, ``seconds``; in the synthetic market
``right`` and ``asked``."""

GAMES, REPLAYS = "games.jsonl", "replays.html"


def check_trading(config: TradingConfig) -> None:
    """Refuse agents, latencies and markets that cannot be.

    Raises:
        ConfigError: naming the agent, or the key of the market.
        DataError: a trace that cannot be read, with file and line.
    """
    check_line_up("trading", config)
    if config.market != "synthetic" and any(spec.taught for spec in config.everyone()):
        raise ConfigError("agents: reference was taught the synthetic market", "say market: synthetic")
    check_taught(config.everyone(), config.synthetic.easy)
    group = "synthetic" if config.market == "synthetic" else "recorded"
    try:
        if config.market == "synthetic":
            _rules(config)
            return
        zone_of(config.recorded.zone or "")
        if config.recorded.exchange is not None:
            zone_of(config.recorded.exchange, "exchange")
        if config.recorded.day is not None:
            day_of(config.recorded.day)
        _paper_rules(config) if config.market == "paper" else _replay_rules(config)
    except ConfigError as error:
        raise ConfigError(f"{group}.{error.problem}", error.remedy) from None


def run_trading(config: TradingConfig, context: Context) -> StageOutput:
    """The stage ``trading``; its artefact is the record of all days."""
    context.progress.begin("opening the agents")
    agents = line_up("trading", config, context)
    play = _synthetic if config.market == "synthetic" else _recorded
    days, curves, notes = play(config, context, agents)
    context.progress.begin("writing the days")
    write_text(context.folder / GAMES, "".join(json.dumps(row) + "\n" for row in days))
    tables, figures = [_outcomes(config.names(), days)], list[Figure]()
    if curves:
        words = {"title": "Yield of a day", "x_label": "seconds an answer takes"}
        figures.append(_with_closed_form(config, curves_figure(curves, y_label="yield", **words)))
        tables.append(curves_table(curves, title=words["title"], x_label=words["x_label"]))
    return StageOutput(
        results=[_result([row for row in days if row["agent"] == name], name) for name in config.names()],
        tables=tables,
        figures=figures,
        attached={"market": config.market, "days": len({row["day"] for row in days}), "agents": list(config.names())},
        notes=[
            *line_up_notes(config, context.opening),
            *notes,
            "What is earned in a simulated market says nothing about what would be earned elsewhere.",
        ],
        artefact=GAMES,
        artefacts={"games": GAMES},
        replays=REPLAYS,
    )


def _rules(config: TradingConfig) -> MarketRules:
    return MarketRules(**config.synthetic.model_dump())


def _synthetic(
    config: TradingConfig, context: Context, agents: Mapping[str, Agent]
) -> tuple[list[Day], list[RewardCurve], Sequence[str]]:
    """Days from the seed on: each is asked once, whatever the latencies."""
    rules, seeds = _rules(config), range(context.seed, context.seed + config.days)
    people = any(spec.kind == "human" for spec in config.specs())

    def day(seed: int) -> list[Day]:
        market = draw_market(seed, rules)
        with context.progress.paused() if people else nullcontext():
            answers = ask_market(list(agents.values()), market)
        play, questions = settle_market(market, answers), market_questions(market)
        if seed == context.seed:
            market_page([play], context.folder / REPLAYS)
        found = []
        for name, given in answers.items():
            right = sum(
                one.choice is not None and (one.choice == question.answers[0]) == question.view.reverts
                for one, question in zip(given, questions, strict=True)
            )
            found.append(_day(play, name, seed) | {"right": right, "asked": len(questions)})
        return found

    items = {f"day {seed}": seed for seed in seeds}
    found = context.store.map(items, day, of=list[Day], tell=partial(context.progress, "days"))

    def gain(name: str, latency: float, seed: int) -> float:
        market = draw_market(seed, rules)
        answers = ask_market([agents[name]], market)
        return settle_market(market, answers, {name: latency}).yields[name]

    curves = [_curve(name, config, context, partial(gain, name), seeds) for name in agents if config.latencies]
    return list(chain.from_iterable(found.values())), curves, []


def _recorded(
    config: TradingConfig, context: Context, agents: Mapping[str, Agent]
) -> tuple[list[Day], list[RewardCurve], Sequence[str]]:
    """One day, each agent on its own."""
    recorded, zone = config.recorded, config.recorded.zone or ""
    context.progress.begin("reading the market")
    how: dict[str, Any] = {"zone": zone, "day": recorded.day, "longest_gap": recorded.longest_gap}
    bars = [read_bars(path, name, **how) for name, path in recorded.bars.items()]
    quotes = [read_quotes(path, name, **how) for name, path in recorded.quotes.items()]
    tapes: list[Tape] = [*map(BarTape, bars), *map(QuoteTape, quotes)]

    def play(players: Iterable[Agent]) -> MarketPlay:
        return _played_day(config, list(players), bars, tapes, context.seed)

    whole = play(agents.values())
    market_page([whole], context.folder / REPLAYS)
    label = recorded.day or "the recorded day"

    def gain(name: str, latency: float, seed: int) -> float:
        return play([at_latency(agents[name], Fixed(latency))]).yields[name]

    curves = [_curve(name, config, context, partial(gain, name), [context.seed]) for name in agents if config.latencies]
    return [_day(whole, name, label) for name in agents], curves, whole.notes


def _played_day(
    config: TradingConfig, players: list[Agent], bars: Sequence[Bars], tapes: Sequence[Tape], seed: int
) -> MarketPlay:
    if config.market == "paper":
        return play_paper(players, bars, _paper_rules(config), seed=seed)
    return play_replay(players, tapes, _replay_rules(config), seed=seed)


def _paper_rules(config: TradingConfig) -> PaperRules:
    return PaperRules(lookahead=True, cutoff=config.recorded.cutoff)


def _replay_rules(config: TradingConfig) -> ReplayRules:
    recorded = config.recorded
    return ReplayRules(
        zone=recorded.exchange or recorded.zone or "",
        opens=recorded.opens,
        cutoff=recorded.cutoff,
        trigger=recorded.trigger,
        cooling=recorded.cooling,
    )


def _day(play: MarketPlay, name: str, day: int | str) -> Day:
    return {
        "agent": name,
        "day": day,
        "yield": play.yields[name],
        "outcomes": dict(play.outcomes(name)),
        "seconds": [one.seconds for one in play.decisions if one.agent == name],
    }


def _curve(name: str, config: TradingConfig, context: Context, gain: Any, seeds: Sequence[int]) -> RewardCurve:
    tell = partial(context.progress, f"{name} at other latencies")
    return reward_curve(name, config.latencies, gain, seeds, store=context.store, tell=tell)


def _result(days: Sequence[Day], name: str) -> Result:
    """Of one agent: yield of a day, share of right readings, answers that were none, what they took."""
    yields = [row["yield"] for row in days]
    mean, interval = statistics.fmean(yields), None
    if len(yields) > 1:
        half = t_quantile(len(yields) - 1) * statistics.stdev(yields) / len(yields) ** 0.5
        interval = (mean - half, mean + half)
    metrics = [Metric(name="yield", value=mean, interval=interval, count=len(yields), better="higher")]
    if asked := sum(row.get("asked", 0) for row in days):
        right = sum(row["right"] for row in days)
        metrics.append(
            Metric(
                name="right_readings",
                value=right / asked,
                interval=wilson(right, asked),
                count=asked,
                better="higher",
            )
        )
    seconds = [value for row in days for value in row["seconds"]]
    if seconds:
        invalid = sum(row["outcomes"].get("invalid", 0) for row in days)
        metrics.append(Metric(name="invalid_answers", value=invalid / len(seconds), count=len(seconds), better="lower"))
        metrics += latency_metrics(seconds)[:2]
    return Result(task="trading", subject=name, metrics=tuple(metrics))


def _outcomes(names: Sequence[str], days: Sequence[Day]) -> Table:
    """What became of the questions."""
    counts = {
        name: sum((Counter(row["outcomes"]) for row in days if row["agent"] == name), Counter[str]()) for name in names
    }
    kinds = sorted({kind for count in counts.values() for kind in count})
    return Table(
        title="What became of the questions",
        columns=("agent", *kinds),
        rows=tuple((name, *(counts[name][kind] for kind in kinds)) for name in names),
    )


def _with_closed_form(config: TradingConfig, figure: Figure) -> Figure:
    """What scripted agents are expected to earn, beside what they did."""
    if config.market != "synthetic":
        return figure
    rules = _rules(config)
    scale = rules.events * rules.notional / rules.cash
    latest = ALLOWED * rules.half_life
    known = tuple(latency for latency in config.latencies if latency <= latest)
    expected = tuple(
        Series(
            name=f"{spec.text}, expected",
            x=known,
            y=tuple(scale * rules.expected_yield(spec.number or 0.0, latency) for latency in known),
        )
        for spec in config.specs()
        if spec.kind == "scripted" and known
    )
    said = figure.caption
    if len(known) < len(config.latencies) and any(spec.kind == "scripted" for spec in config.specs()):
        said = f"{said} Expected yields hold up to {latest:g} s ({ALLOWED} half-lives): later orders trade nothing."
    return figure.model_copy(update={"series": (*figure.series, *expected), "caption": said.strip()})
