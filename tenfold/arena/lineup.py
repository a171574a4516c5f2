"""The agents of a configuration, with what their answers cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tenfold.arena.agents import Agent
from tenfold.arena.by_hand import PLANS_IN_WORDS, Arena, by_hand
from tenfold.arena.latency import Latency, parse_latency
from tenfold.arena.players import EnginePlayer, Timed, TwoThread
from tenfold.arena.reference import open_reference, taught
from tenfold.config.arena import AgentsFields, AgentSpec, counts_model
from tenfold.errors import ConfigError
from tenfold.stage.context import Context

MODELS, OTHERS = "tokens", "fixed:0.2"
"""Latencies of agents that do not say theirs."""


def latency_of(spec: AgentSpec, shared: str | None) -> str:
    """What an agent's answers take: what it says, else the shared latency, if it has a model where that counts one.

    >>> from tenfold.config.arena import parse_agent
    >>> [latency_of(parse_agent(who), "tokens:300,30") for who in ("demo", "random", "random@0.1")]
    ['tokens:300,30', 'fixed:0.2', '0.1']
    """
    if spec.latency is not None:
        return spec.latency
    if spec.kind == "model":
        return shared or MODELS
    return OTHERS if shared is None or counts_model(shared) else shared


def line_up_notes(config: AgentsFields, opening: Mapping[str, Any]) -> list[str]:
    """What of a recipe does not reach which agents, in words.

    Args:
        config: of the stage.
        opening: how the recipe opens models.
    """
    specs, latency, notes = config.specs(), config.latency, []
    if latency is not None and counts_model(latency):
        kept = [spec.text for spec in specs if spec.kind not in ("model", "human") and spec.latency is None]
        seconds = OTHERS.removeprefix("fixed:")
        notes += [f"Latency {latency} is for models; an answer of {', '.join(kept)} takes {seconds} s."] if kept else []
    files = [spec.text for spec in specs if "llama.cpp" in (spec.engine, spec.planner and spec.planner.engine)]
    keys = [key for key in ("dtype", "load") if opening.get(key) is not None]
    if files and keys:
        notes.append(
            f"A GGUF file has a number format of its own: {' and '.join(keys)} not used by {', '.join(files)}."
        )
    return notes


def check_line_up(arena: Arena, config: AgentsFields) -> None:
    """Refuse agents and latencies that cannot be, before a model is opened.

    Raises:
        ConfigError: naming the agent.
        DataError: a trace that cannot be read, with file and line.
    """
    if config.latency is not None:
        parse_latency(config.latency)
    for spec in config.specs():
        if spec.kind == "human":
            continue
        for one in filter(None, (spec, spec.planner)):
            _parsed(latency_of(one, config.latency), one, None)
            if one.engine == "llama.cpp" and not one.source.startswith("${"):  # made by an earlier stage
                _gguf(one)
            if one.taught:
                taught(arena, one.taught)
        if spec.kind != "model":
            by_hand(arena, spec)


def line_up(arena: Arena, config: AgentsFields, context: Context | None = None) -> dict[str, Agent]:
    """Agents by name, in the order of the configuration.

    Args:
        arena: what is played.
        config: who they are, and what answers take.
        context: of the stage: its store remembers models' answers, its folder holds the traces of measured latencies,
            and it says how models are opened. llama.cpp heeds ``device: cpu``; a GGUF file has a number format of its
            own. Without one nothing is written.

    Raises:
        ConfigError: a latency or an engine that cannot be.
        ModelError: a model that cannot be opened.
    """
    store, traces, opening = (context.store, context.folder, context.opening) if context else (None, None, {})
    engines: dict[str, Any] = {}

    def timed(spec: AgentSpec, place: str) -> Timed:
        if spec.kind == "model":
            name = _model_name(spec)
            if name not in engines:
                engines[name] = _engine(arena, spec, opening)
            agent: Agent = EnginePlayer(engines[name], name, temperature=config.temperature, memory=store)
        else:
            agent = by_hand(arena, spec)
        return Timed(agent, _parsed(latency_of(spec, config.latency), spec, traces and traces / f"trace-{place}.jsonl"))

    found: dict[str, Agent] = {}
    for number, spec in enumerate(config.specs(), 1):
        if spec.kind == "human":  # takes the time that it takes
            found[spec.text] = by_hand(arena, spec)
            continue
        agent: Agent = timed(spec, str(number))
        if spec.planner is not None:
            agent = TwoThread(agent, timed(spec.planner, f"{number}-plans"), PLANS_IN_WORDS[arena])
        agent.name = spec.text
        found[spec.text] = agent
    return found


def _parsed(text: str, spec: AgentSpec, record: Path | None) -> Latency:
    try:
        return parse_latency(text, record=record)
    except ConfigError as error:
        raise ConfigError(f"agents: {spec.text}: {error.problem}", error.remedy) from None


def _model_name(spec: AgentSpec) -> str:
    """The same for all latencies of one model, so that they share what is remembered of its answers."""
    return " ".join(filter(None, (spec.engine, spec.source, spec.served, spec.taught, spec.kv)))


def _engine(arena: Arena, spec: AgentSpec, opening: Mapping[str, Any]) -> Any:
    if spec.engine == "openai":
        from tenfold.engines.openai import OpenAIEngine

        return OpenAIEngine(spec.source, spec.served)
    if spec.engine == "llama.cpp":
        from tenfold.engines.llama_cpp import LlamaCpp

        layers = 0 if opening.get("device") == "cpu" else None
        return LlamaCpp(_gguf(spec), context=2048, parallel=1, gpu_layers=layers)
    from tenfold.engines.session import Session
    from tenfold.models.reference import ModelRef

    opened = open_reference(arena, spec.taught, **opening) if spec.taught else ModelRef(spec.source, **opening).open()
    return Session(opened, kv=spec.kv or None)


def _gguf(spec: AgentSpec) -> Path:
    from tenfold.models.source import locate

    located = locate(spec.source)
    if located.kind != "gguf":
        raise ConfigError(
            f"agents: {spec.text}: {located.name} is not a GGUF file", remedy="llama.cpp plays demo or a .gguf file"
        )
    return located.path
