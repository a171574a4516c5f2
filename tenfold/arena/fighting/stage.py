"""The stage ``fighting``: who is better, what speed is worth, and replays."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from functools import cache, partial
from itertools import combinations
from typing import Any

from tenfold.arena.agents import Agent
from tenfold.arena.curves import RewardCurve, curves_figure, curves_table, reward_curve
from tenfold.arena.fighting.page import fight_page
from tenfold.arena.fighting.play import FightRecord, Harness, play_fight
from tenfold.arena.fighting.rules import FRAMES_PER_SECOND
from tenfold.arena.latency import Fixed
from tenfold.arena.lineup import check_line_up, line_up, line_up_notes
from tenfold.arena.live import outcome_in_words, play_live, watch_fight
from tenfold.arena.players import at_latency
from tenfold.arena.ratings import Ratings, rate
from tenfold.arena.tournament import Played, Tournament, play_tournament
from tenfold.config.arena import FightingConfig
from tenfold.files import write_text
from tenfold.stage.context import Context, StageOutput
from tenfold.stage.results import Metric, Result

GAMES, REPLAYS = "games.jsonl", "replays.html"


def check_fighting(config: FightingConfig) -> None:
    """Refuse agents and latencies that cannot be.

    Raises:
        ConfigError: naming the agent.
        DataError: a trace that cannot be read, with file and line.
    """
    check_line_up("fighting", config)


def run_fighting(config: FightingConfig, context: Context) -> StageOutput:
    """The stage ``fighting``; its artefact is the record of all games."""
    context.progress.begin("opening the agents")
    agents = line_up("fighting", config, context)
    if any(spec.kind == "human" for spec in config.specs()):
        return _with_a_person(config, context, agents)
    context.progress.begin("fights")
    play = partial(_fresh, config) if config.workers > 1 else partial(_play, config, agents)
    tournament = play_tournament(
        config.names(),
        play,
        pairs=config.pairs,
        sequential=config.sequential,
        first_seed=context.seed,
        store=context.store,
        workers=config.workers,
        tell=partial(context.progress, "fights"),
    )
    curves = _curves(config, context, agents) if config.latencies else []
    ratings = rate(tournament.pairs, config.names(), seed=context.seed)
    context.progress.begin("writing the games")
    _write(context, _games(tournament))
    replays = _replays(config, context, agents)
    tables, figures = [ratings.table(), tournament.table()], [ratings.matrix()]
    if curves:
        words = {"title": f"Points against {config.names()[-1]}", "x_label": "seconds an answer takes"}
        figures.append(curves_figure(curves, y_label="share of points", **words))
        tables.append(curves_table(curves, title=words["title"], x_label=words["x_label"]))
    return StageOutput(
        results=_results(config.names(), tournament, ratings),
        tables=tables,
        figures=figures,
        attached={"games": tournament.games, "agents": list(config.names())},
        notes=[*line_up_notes(config, context.opening), *tournament.notes, *ratings.notes],
        artefact=GAMES,
        artefacts={"games": GAMES},
        replays=replays,
    )


def _with_a_person(config: FightingConfig, context: Context, agents: Mapping[str, Agent]) -> StageOutput:
    """One fight, in the terminal."""
    one, other = agents.values()
    harness = Harness(config.pipelined, config.predict, config.hold)
    bell = config.seconds * FRAMES_PER_SECOND
    with context.progress.paused():
        record = play_live((one, other), context.seed, harness=(harness, harness), bell=bell)
    fight_page([record], context.folder / REPLAYS)
    row = {"first": one.name, "second": other.name, "seed": record.seed, "score": record.score}
    _write(context, [row | {"rated": record.rated, **_facts(record)}])
    return StageOutput(
        attached={"games": 1, "agents": list(config.names())},
        notes=[outcome_in_words(record)],
        artefact=GAMES,
        artefacts={"games": GAMES},
        replays=REPLAYS,
    )


def _replays(config: FightingConfig, context: Context, agents: Mapping[str, Agent]) -> str | None:
    """The page of the first fights of every two agents, played again: what models said is remembered."""
    seeds = range(context.seed, context.seed + min(config.replays, config.pairs))
    records = [
        _fight(config, agents[first], agents[second], seed)
        for first, second in combinations(config.names(), 2)
        for seed in seeds
    ]
    if records:
        fight_page(records, context.folder / REPLAYS)
    if records and config.watch:
        with context.progress.paused():
            watch_fight(records[0])
    return REPLAYS if records else None


def _fight(config: FightingConfig, first: Agent, second: Agent, seed: int) -> FightRecord:
    harness = Harness(config.pipelined, config.predict, config.hold)
    return play_fight((first, second), seed, harness=(harness, harness), bell=config.seconds * FRAMES_PER_SECOND)


def _play(config: FightingConfig, agents: Mapping[str, Agent], first: str, second: str, seed: int) -> Played:
    record = _fight(config, agents[first], agents[second], seed)
    return Played(record.score, record.rated, _facts(record))


@cache
def _kept_agents(text: str) -> dict[str, Agent]:
    """Of another process, which gets the configuration alone."""
    return line_up("fighting", FightingConfig.parse(json.loads(text), "fighting"))


def _fresh(config: FightingConfig, first: str, second: str, seed: int) -> Played:
    return _play(config, _kept_agents(config.model_dump_json()), first, second, seed)


def _facts(record: FightRecord) -> dict[str, float]:
    found: dict[str, float] = {"frames": float(record.frames)}
    for side, word in enumerate(("first", "second")):
        decisions = record.decisions[side]
        found |= {
            f"{word} health": float(record.health[side]),
            f"{word} decisions": float(len(decisions)),
            f"{word} invalid": float(record.invalid[side]),
            f"{word} latency": statistics.fmean(one.seconds for one in decisions) if decisions else 0.0,
        }
    return found


def _curves(config: FightingConfig, context: Context, agents: Mapping[str, Agent]) -> list[RewardCurve]:
    """Each agent but the last against the last one, at each latency, on the same seeds, both sides."""
    *others, last = config.names()

    def points(name: str, latency: float, seed: int) -> float:
        agent = at_latency(agents[name], Fixed(latency))
        left = _fight(config, agent, agents[last], seed).score
        right = _fight(config, agents[last], agent, seed).score
        return (left + 1 - right) / 2

    seeds = range(context.seed, context.seed + config.pairs)
    return [
        reward_curve(
            name, config.latencies, partial(points, name), seeds, bounded=True, store=context.store,
            tell=partial(context.progress, f"{name} at other latencies"),
        )
        for name in others
    ]  # fmt: skip


def _games(tournament: Tournament) -> list[dict[str, Any]]:
    return [
        {"first": pair[0], "second": pair[1], "seed": seed, "score": game.score, "rated": game.rated, **game.facts}
        for matchup in tournament.matchups
        for seed, both in matchup.games.items()
        for pair, game in zip(
            ((matchup.first, matchup.second), (matchup.second, matchup.first)), both, strict=True
        )
    ]  # fmt: skip


def _write(context: Context, rows: Sequence[Mapping[str, Any]]) -> None:
    write_text(context.folder / GAMES, "".join(json.dumps(row) + "\n" for row in rows))


def _results(names: Sequence[str], tournament: Tournament, ratings: Ratings) -> list[Result]:
    """Of each agent: strength, points, what its answers took, and how many were none."""
    rows = _games(tournament)
    found = []
    for name in names:
        place = ratings.names.index(name)
        played = [(row, word) for row in rows for word in ("first", "second") if row[word] == name]
        decisions = sum(row[f"{word} decisions"] for row, word in played)
        invalid = sum(row[f"{word} invalid"] for row, word in played)
        waited = sum(row[f"{word} latency"] * row[f"{word} decisions"] for row, word in played)
        metrics = (
            Metric(
                name="strength",
                value=ratings.strengths[place],
                interval=ratings.intervals[place],
                count=len(played),
                better="higher",
            ),
            Metric(name="invalid_answers", value=invalid / max(1, decisions), count=int(decisions), better="lower"),
            Metric(name="latency", value=waited / max(1, decisions), unit="s", count=int(decisions), better="lower"),
        )
        found.append(Result(task="fighting", subject=name, metrics=metrics))
    return found
