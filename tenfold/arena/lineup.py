"""The agents of a configuration, with what their answers cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tenfold.arena.agents import Agent
from tenfold.arena.latency import Latency, parse_latency
from tenfold.arena.players import EnginePlayer, Timed, TwoThread
from tenfold.config.arena import AgentSpec, counts_model
from tenfold.errors import ConfigError
from tenfold.stage.store import Store

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


def line_up_notes(specs: Sequence[AgentSpec], latency: str | None, opening: Mapping[str, Any]) -> list[str]:
    """What of a recipe does not reach which agents, in words; arguments as those of `line_up`."""
    notes = []
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


def check_line_up(specs: Sequence[AgentSpec], by_hand: Callable[[AgentSpec], Agent], latency: str | None) -> None:
    """Refuse agents and latencies that cannot be, before a model is opened.

    Raises:
        ConfigError: naming the agent.
        DataError: a trace that cannot be read, with file and line.
    """
    if latency is not None:
        parse_latency(latency)
    for spec in specs:
        if spec.kind == "human":
            continue
        for one in filter(None, (spec, spec.planner)):
            _parsed(latency_of(one, latency), one, None)
            if one.engine == "llama.cpp":
                _gguf(one)
        if spec.kind != "model":
            by_hand(spec)


def line_up(
    specs: Sequence[AgentSpec],
    by_hand: Callable[[AgentSpec], Agent],
    plans: Sequence[str],
    *,
    latency: str | None = None,
    temperature: float = 0.0,
    store: Store | None = None,
    traces: Path | None = None,
    opening: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Agent]:
    """Agents by name, in the order of the configuration.

    Args:
        specs: who they are.
        by_hand: makes those that are not models.
        plans: what a slow model may plan for a fast one.
        latency: of those that do not say theirs.
        temperature: of models.
        store: where models' answers are remembered.
        traces: the folder that measured latencies are written to.
        opening: fields of `tenfold.models.reference.ModelRef`: ``dtype``, ``device`` and others. llama.cpp heeds
            ``device: cpu``; a GGUF file has a number format of its own.

    Raises:
        ConfigError: a latency or an engine that cannot be.
        ModelError: a model that cannot be opened.
    """
    engines: dict[tuple[str, str, str], Any] = {}

    def timed(spec: AgentSpec, place: str) -> Timed:
        if spec.kind == "model":
            key = (spec.engine, spec.source, spec.served)
            if key not in engines:
                engines[key] = _engine(spec, opening)
            agent: Agent = EnginePlayer(engines[key], _model_name(spec), temperature=temperature, memory=store)
        else:
            agent = by_hand(spec)
        return Timed(agent, _parsed(latency_of(spec, latency), spec, traces and traces / f"trace-{place}.jsonl"))

    found: dict[str, Agent] = {}
    for number, spec in enumerate(specs, 1):
        if spec.kind == "human":  # takes the time that it takes
            found[spec.text] = by_hand(spec)
            continue
        agent: Agent = timed(spec, str(number))
        if spec.planner is not None:
            agent = TwoThread(agent, timed(spec.planner, f"{number}-plans"), plans)
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
    return " ".join(filter(None, (spec.engine, spec.source, spec.served)))


def _engine(spec: AgentSpec, opening: Mapping[str, Any]) -> Any:
    if spec.engine == "openai":
        from tenfold.engines.openai import OpenAIEngine

        return OpenAIEngine(spec.source, spec.served)
    if spec.engine == "llama.cpp":
        from tenfold.engines.llama_cpp import LlamaCpp

        layers = 0 if opening.get("device") == "cpu" else None
        return LlamaCpp(_gguf(spec), context=2048, parallel=1, gpu_layers=layers)
    from tenfold.engines.session import Session
    from tenfold.models.reference import ModelRef

    return Session(ModelRef(spec.source, **opening).open())


def _gguf(spec: AgentSpec) -> Path:
    from tenfold.models.source import locate

    located = locate(spec.source)
    if located.kind != "gguf":
        raise ConfigError(
            f"agents: {spec.text}: {located.name} is not a GGUF file", remedy="llama.cpp plays demo or a .gguf file"
        )
    return located.path
