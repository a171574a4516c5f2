"""The stage ``choose``: candidates probed, pruned, played and compared."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from tenfold.arena.agents import Agent
from tenfold.arena.choosing.halving import ChosenAgent, Probed, choose_agent, dominated
from tenfold.arena.fighting.play import play_fight
from tenfold.arena.fighting.rules import FRAMES_PER_SECOND
from tenfold.arena.labelled import labelled_questions
from tenfold.arena.lineup import check_line_up, line_up, line_up_notes
from tenfold.arena.reference import check_taught
from tenfold.arena.trading.market_day import ask_market, settle_market
from tenfold.arena.trading.synthetic import MarketRules, draw_market
from tenfold.config.arena import parse_agent
from tenfold.config.choose import ChooseConfig
from tenfold.core.statistics import t_quantile, wilson
from tenfold.errors import ConfigError
from tenfold.files import write_text
from tenfold.stage.context import Context, StageOutput
from tenfold.stage.record import Figure, Series, Table
from tenfold.stage.results import Metric, Result

CHOICE = "choice.json"
PROBED_FROM = 20_000_000
"""Seeds of the probe's questions: no episode meets them."""


def check_choose(config: ChooseConfig) -> None:
    """Refuse candidates, latencies and markets that cannot be.

    Raises:
        ConfigError: naming the candidate, or the key of the market.
        DataError: a trace that cannot be read, with file and line.
    """
    check_line_up(config.arena, config)
    try:
        rules = _market(config)
    except ConfigError as error:
        raise ConfigError(f"synthetic.{error.problem}", error.remedy) from None
    if config.arena == "trading":
        check_taught(config.everyone(), rules.easy)


def run_choose(config: ChooseConfig, context: Context) -> StageOutput:
    """The stage ``choose``; its artefact is the choice, with all rewards."""
    context.progress.begin("opening the candidates")
    agents = line_up(config.arena, config, context)
    probes = _probes(config, context, agents)
    out = dominated(probes)
    playing = [name for name in config.names() if name not in out]
    context.progress.begin("episodes")
    play = _fights(config, agents) if config.arena == "fighting" else _days(config, agents)
    found = choose_agent(
        playing, play, first=config.first, most=config.most, first_seed=context.seed, store=context.store,
        tell=partial(context.progress, "episodes"),
    )  # fmt: skip
    write_text(context.folder / CHOICE, json.dumps(_record(found, probes, out), indent=1) + "\n")
    reward = _reward_of(config)
    return StageOutput(
        results=[_result(config, found, name, probes, reward) for name in playing],
        tables=[_table(config, found, probes, out, reward)],
        figures=[_frontier(config, found, probes, reward)] if probes else [],
        attached={"chosen": found.winner, "episodes": found.episodes, "episodes of the full grid": found.grid},
        notes=[*line_up_notes(config, context.opening), *_said(config, found, out)],
        artefact=CHOICE,
        artefacts={"choice": CHOICE},
    )


def _market(config: ChooseConfig) -> MarketRules:
    return MarketRules(**config.synthetic.model_dump())


def _probes(config: ChooseConfig, context: Context, agents: Mapping[str, Agent]) -> dict[str, Probed]:
    """What each candidate answers to the same questions, and how soon."""
    if not config.probe:
        return {}
    asked = labelled_questions(config.arena, PROBED_FROM, config.probe, _market(config))
    found = {}
    for number, name in enumerate(config.names(), 1):
        context.progress(f"questions to {name}", number, len(config.names()))
        actions = agents[name].answer([question.turn for question in asked])
        right = sum(action.choice in question.good for action, question in zip(actions, asked, strict=True))
        seconds = [action.seconds for action in actions]
        mean = statistics.fmean(seconds)
        half = t_quantile(len(seconds) - 1) * statistics.stdev(seconds) / len(seconds) ** 0.5 if seconds[1:] else 0.0
        share = right / len(asked)
        found[name] = Probed((mean, mean - half, mean + half), (share, *wilson(right, len(asked))), len(asked))
    return found


def _fights(config: ChooseConfig, agents: Mapping[str, Agent]) -> Callable[[str, int], float]:
    """Share of the points of two fights against the opponent, sides swapped."""
    opponent, bell = agents[parse_agent(config.opponent).text], config.seconds * FRAMES_PER_SECOND

    def reward(name: str, seed: int) -> float:
        left = play_fight((agents[name], opponent), seed, bell=bell).score
        return (left + 1 - play_fight((opponent, agents[name]), seed, bell=bell).score) / 2

    return reward


def _days(config: ChooseConfig, agents: Mapping[str, Agent]) -> Callable[[str, int], float]:
    """The yield of an episode, such that the largest possible loss is 0 and the largest possible gain is 1."""
    rules, most = _market(config), _most(config)

    def reward(name: str, seed: int) -> float:
        market = draw_market(seed, rules)
        gained = settle_market(market, ask_market([agents[name]], market)).yields[name]
        return (gained / most + 1) / 2

    return reward


def _most(config: ChooseConfig) -> float:
    """No episode yields or loses more than this: each order gains its jump at most, and loses the drift beyond it."""
    rules = _market(config)
    worst = rules.amplitude * max(1.0, rules.drift) + rules.cost + rules.level * rules.notional / rules.size
    return rules.events * rules.notional / rules.cash * worst


def _reward_of(config: ChooseConfig) -> Callable[[float], float]:
    """From the scale of `choose` to the game's own: shares of points, or yields."""
    if config.arena == "fighting":
        return lambda reward: reward
    most = _most(config)
    return lambda reward: (2 * reward - 1) * most


def _record(found: ChosenAgent, probes: Mapping[str, Probed], out: Mapping[str, str]) -> dict[str, Any]:
    return {
        "chosen": found.winner,
        "not shown to be worse": list(found.tied),
        "slower and worse": dict(out),
        "rounds": [list(names) for names in found.rounds],
        "episodes": found.episodes,
        "rewards, 0 to 1": {name: list(values) for name, values in found.rewards.items()},
        "questions": {name: {"seconds": one.seconds, "good": one.quality} for name, one in probes.items()},
    }


def _result(
    config: ChooseConfig, found: ChosenAgent, name: str, probes: Mapping[str, Probed], reward: Callable[[float], float]
) -> Result:
    values = [reward(value) for value in found.rewards[name]]
    mean, interval = statistics.fmean(values), None
    if len(values) > 1:
        half = t_quantile(len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
        interval = (mean - half, mean + half)
    called = "points" if config.arena == "fighting" else "yield"
    metrics = [Metric(name=called, value=mean, interval=interval, count=len(values), better="higher")]
    if name in probes:
        seconds, quality = probes[name].seconds, probes[name].quality
        metrics += [
            Metric(
                name="good_answers", value=quality[0], interval=quality[1:], count=probes[name].asked, better="higher"
            ),
            Metric(name="latency", value=seconds[0], interval=seconds[1:], unit="s", better="lower"),
        ]
    return Result(task="choose", subject=name, metrics=tuple(metrics))


def _table(
    config: ChooseConfig,
    found: ChosenAgent,
    probes: Mapping[str, Probed],
    out: Mapping[str, str],
    reward: Callable[[float], float],
) -> Table:
    """All candidates, best first."""

    def row(name: str) -> tuple[str | float | int | None, ...]:
        probe = probes.get(name)
        beside = (round(probe.seconds[0], 4), round(probe.quality[0], 3)) if probe else (None, None)
        if name in out:
            return (name, *beside, 0, None, f"slower and worse than {out[name]}")
        mean = reward(statistics.fmean(found.rewards[name]))
        verdict = "chosen" if name == found.winner else found.verdicts[name].text(found.winner, name)
        return name, *beside, len(found.rewards[name]), round(mean, 5), verdict

    order = sorted(found.rewards, key=lambda name: (name != found.winner, -statistics.fmean(found.rewards[name])))
    return Table(
        title="Candidates (points in verdicts are (1 + difference) / 2, with bounds that hold at every look, 95 %)",
        columns=(
            "candidate", "seconds of an answer", "good answers", "episodes",
            "share of points" if config.arena == "fighting" else "yield of an episode", "verdict",
        ),
        rows=tuple(row(name) for name in [*order, *out]),
    )  # fmt: skip


def _frontier(
    config: ChooseConfig, found: ChosenAgent, probes: Mapping[str, Probed], reward: Callable[[float], float]
) -> Figure:
    """Reward over latency: who is not beaten by anybody faster, the others, and the choice."""
    points = [(probes[name].seconds[0], reward(statistics.fmean(found.rewards[name])), name) for name in found.rewards]
    points.sort(key=lambda point: (point[0], -point[1]))
    frontier = [point for at, point in enumerate(points) if all(point[1] > other[1] for other in points[:at])]
    groups = {
        "frontier": frontier,
        "chosen": [point for point in points if point[2] == found.winner],
        **{point[2]: [point] for point in points if point not in frontier},
    }
    series = [
        Series(name=name, x=tuple(one[0] for one in group), y=tuple(one[1] for one in group))
        for name, group in groups.items()
        if group
    ]
    return Figure(
        kind="line",
        title="What speed is worth",
        x_label="seconds an answer takes",
        y_label="share of points" if config.arena == "fighting" else "yield of an episode",
        series=tuple(series),
        caption=f"On the frontier, from the fastest on: {', '.join(point[2] for point in frontier)}.",
    )


def _said(config: ChooseConfig, found: ChosenAgent, out: Mapping[str, str]) -> list[str]:
    where = f"In {config.arena}"  # two stages of a recipe may say the same otherwise
    notes = [
        f"{where} {found.winner} is chosen after {found.episodes} episodes; a full grid would have taken {found.grid}."
    ]
    if found.tied:
        others = ", ".join(found.tied)
        notes.append(f"{where} it cannot be separated from {others}: raise most, or take whichever is cheaper for you.")
    notes += [f"{where} {name} is both slower and worse than {one} and was not played." for name, one in out.items()]
    return notes
