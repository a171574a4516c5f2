"""Games in which a decision counts when it arrives: who plays, how long answers take, and what is played."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from tenfold.config.base import Config
from tenfold.config.gear import parse_kv
from tenfold.config.stage import ArtefactKind, Incidental, Needs, StageConfig, Takes
from tenfold.errors import ConfigError

PLAYERS = "scripted:QUALITY, random, human, or a model: demo, a hub id, a folder, llama.cpp:FILE, http://HOST/v1#MODEL"
REFERENCES = ("reference", "reference:half")
_LATENCY = re.compile(r"fixed:[^@]*|[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|trace:.+|measured|tokens(:[^@]*)?")
_NAMED = re.compile(r"(?P<name>[\w .-]+)=(?P<who>.+)")
_PACKED = re.compile(r"(?P<who>[^\[\]]+)\[(?P<kv>[^\[\]]+)\]")
_COMMA = re.compile(
    r",\s*(?=$|([\w .-]+=)?(human|random|demo|reference)([@+,:]|$)|([\w .-]+=)?(scripted:|rule:|tiny:|llama\.cpp:|https?://))"
)
"""A comma before somebody who cannot be part of a path, or of ``tokens:PREFILL,DECODE``."""


@dataclass(frozen=True)
class AgentSpec:
    """An agent as it is written.

    Args:
        text: its name: the one given to it, else all as written.
        kind: who it is.
        number: of ``scripted:QUALITY`` and ``rule:MARGIN``.
        engine: of a model: ``transformers``, ``llama.cpp`` or ``openai``.
        source: of a model, as under ``model``; of a server its URL.
        served: the name by which a server knows the model.
        taught: of a model that comes with the arena, its name.
        kv: of a model in transformers, its packed cache; whole where it is empty.
        latency: what its answers take; None where it does not say.
        planner: of ``FAST+SLOW``, the slow one, whose plans the fast one is told.
    """

    text: str
    kind: Literal["scripted", "random", "rule", "human", "model"]
    number: float | None = None
    engine: Literal["transformers", "llama.cpp", "openai"] = "transformers"
    source: str = ""
    served: str = ""
    taught: str = ""
    kv: str = ""
    latency: str | None = None
    planner: AgentSpec | None = None


def counts_model(latency: str) -> bool:
    """Whether a latency counts what a model does: tokens, or the seconds of an engine."""
    return latency.partition(":")[0] in ("tokens", "measured")


def parse_agent(text: str) -> AgentSpec:
    """Who an agent is.

    Args:
        text: ``WHO``, ``WHO@LATENCY`` or, with a name of one's own, ``NAME=WHO``.

    Raises:
        ValueError: naming what is wrong with the text.

    >>> parse_agent("scripted:0.6@fixed:0.2").number, parse_agent("llama.cpp:demo").source
    (0.6, 'demo')
    >>> parse_agent("demo[gear:4]@0.3").kv, parse_agent("small=runs/a/model").text
    ('gear:4', 'small')
    """
    if named := _NAMED.fullmatch(text):
        return replace(parse_agent(named["who"]), text=named["name"])
    fast, plus, slow = text.partition("+")
    if plus and not fast.startswith("http"):
        actor, planner = parse_agent(fast), parse_agent(slow)
        if actor.kind != "model" or planner.kind != "model":
            raise ValueError(f"{text!r}: FAST+SLOW takes two models: plans are told in words")
        return replace(actor, text=text, planner=planner)
    who, latency = text, None
    head, at, tail = text.rpartition("@")
    if at and _LATENCY.fullmatch(tail):
        who, latency = head, tail
    if packed := _PACKED.fullmatch(who):
        found = parse_agent(packed["who"])
        if found.kind != "model" or found.engine != "transformers":
            raise ValueError(f"{text!r}: [{packed['kv']}] packs the cache of a model in transformers, not of {who}")
        try:
            parse_kv(packed["kv"])
        except ConfigError as error:
            raise ValueError(f"{text!r}: {error.problem}; {error.remedy}") from None
        return replace(found, text=text, kv=packed["kv"], latency=latency)
    kind, _, value = who.partition(":")
    if latency and counts_model(latency) and (who == "random" or kind in _EXAMPLES):
        raise ValueError(f"{text!r}: {who} runs no model to be counted or measured: give a number, as in {who}@0.2")
    if who in ("random", "human"):
        return AgentSpec(text, "random" if who == "random" else "human", latency=latency)
    if kind in ("scripted", "rule"):
        try:
            number = float(value)
        except ValueError:
            words = "; put spaces between agents" if "," in value else ""
            raise ValueError(f"{text!r}: {kind} takes a number, as in {kind}:{_EXAMPLES[kind]}{words}") from None
        return AgentSpec(text, "scripted" if kind == "scripted" else "rule", number, latency=latency)
    if kind == "reference":
        if who not in REFERENCES:
            raise ValueError(f"{text!r}: write {' or '.join(REFERENCES)}")
        return AgentSpec(text, "model", source="demo", taught=who, latency=latency)
    if kind == "llama.cpp":
        return AgentSpec(text, "model", engine="llama.cpp", source=value, latency=latency)
    if kind in ("http", "https"):
        url, _, served = who.partition("#")
        if not served:
            raise ValueError(f"{text!r}: which model of the server? Write {url}#MODEL")
        return AgentSpec(text, "model", engine="openai", source=url, served=served, latency=latency)
    if not who:
        raise ValueError(f"{text!r} names nobody; write {PLAYERS}")
    if "," in who and not who.startswith(("/", "./", "../", "~")):
        raise ValueError(f"{text!r}: put spaces between agents, and ./ before a path with a comma in it")
    return AgentSpec(text, "model", source=who, latency=latency)


_EXAMPLES = {"scripted": "0.8", "rule": "0.01"}


class AgentsFields(StageConfig):
    """Who plays, and what answers take."""

    needs: ClassVar[Needs] = Needs(model=False)

    agents: Annotated[tuple[str, ...], Field(min_length=1), Takes(("model", "adapter"))] = (
        "scripted:0.85@fixed:0.3",
        "scripted:0.6",
        "random",
    )
    """Who plays, each a name of its own (``NAME=WHO`` gives it one): ``scripted:QUALITY`` (0 to 1), ``random``, or a
    model: ``reference``, which comes with the arena and was taught its game, ``demo``, a hub id, a folder,
    ``demo[gear:4]`` with a packed cache, ``llama.cpp:FILE.gguf``, ``http://HOST/v1#MODEL``. What its answers take may
    stand behind an ``@``, as in ``random@0.1`` or ``demo@tokens:300,30``. ``FAST+SLOW`` is a fast model that acts by
    the plans of a slow one. In trading also ``rule:MARGIN``, the rule of recorded markets; ``human`` plays with
    keys."""
    latency: str | None = None
    """What answers take of agents that do not say it: seconds (``0.2`` or ``fixed:0.2``), ``tokens:PREFILL,DECODE``
    (prompt and written tokens at these rates, in tokens per second), ``trace:FILE`` (recorded seconds), or ``measured``
    (as they came, and recorded, so that the run repeats). The rates and ``measured`` are for models; others keep 0.2
    seconds then. Default: ``tokens:3500,90`` of models, which is a mid-size model on one graphics card, and 0.2 seconds
    of others."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Of models: 0 takes the most probable answer each time."""

    def specs(self) -> list[AgentSpec]:
        """The agents."""
        return [parse_agent(text) for text in self.agents]

    def names(self) -> tuple[str, ...]:
        """Of the agents."""
        return tuple(parse_agent(text).text for text in self.agents)

    def everyone(self) -> list[AgentSpec]:
        """The agents, and those that plan for them."""
        return [one for spec in self.specs() for one in (spec, spec.planner) if one is not None]

    def models(self) -> dict[str, str]:
        """Of agents that are models on this machine."""
        found = [spec for spec in self.everyone() if spec.kind == "model" and spec.engine != "openai"]
        return {f"agents, {spec.text}": spec.source for spec in found}

    def files(self) -> dict[str, Path]:
        """Traces."""
        texts = [self.latency, *(spec.latency for spec in self.everyone())]
        return {
            f"latency {text}": Path(text.removeprefix("trace:")) for text in texts if text and text.startswith("trace:")
        }

    @field_validator("agents", mode="before")
    @classmethod
    def _apart_at_commas(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        return [part for one in value for part in (_at_commas(one) if isinstance(one, str) else [one])]

    @field_validator("latency", mode="before")
    @classmethod
    def _seconds_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _agents_are_told_apart(self) -> Self:
        if self.latency is not None and not _LATENCY.fullmatch(self.latency):
            raise ValueError(
                f"latency: unknown latency {self.latency!r}: write 0.2, tokens:3500,90, trace:FILE or measured"
            )
        try:
            specs = self.specs()
        except ValueError as error:
            raise ValueError(f"agents: {error}") from None
        names = self.names()
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"agents: {twice[0]!r} is named twice: give each agent a name or latency of its own")
        if any(spec.kind == "human" and spec.latency for spec in specs):
            raise ValueError("agents: human: a person takes the time that it takes: leave @ out")
        return self


class PlayFields(AgentsFields):
    """What all games share."""

    verb = "play"
    makes: ClassVar[Mapping[str, ArtefactKind]] = {"games": "traces"}

    latencies: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Also play each agent at each of these latencies, in seconds, for a curve of what speed is worth."""
    workers: Annotated[int, Field(ge=1), Incidental()] = 1
    """Processes that play side by side. Models play in one."""

    @model_validator(mode="after")
    def _latencies_can_be_charged(self) -> Self:
        again = [seconds for seconds in self.latencies if self.latencies.count(seconds) > 1]
        if again:
            raise ValueError(f"latencies: {again[0]:g} is given twice: give each once")
        specs = self.specs()
        if self.workers > 1 and any(spec.kind == "model" for spec in specs):
            raise ValueError("workers: models play in one process: leave workers out")
        if self.latencies and any(spec.kind == "human" for spec in specs):
            raise ValueError("agents: human: a person takes the time that it takes: leave latencies out")
        return self


def _at_commas(text: str) -> list[str]:
    """Agents that are written with commas between them; a comma that may belong to one of them stays.

    >>> _at_commas("human,scripted:0.6@tokens:300,30"), _at_commas("./a,b")
    (['human', 'scripted:0.6@tokens:300,30'], ['./a,b'])
    """
    places = [-1, *(found.start() for found in _COMMA.finditer(text)), len(text)]
    return [part for one, other in pairwise(places) if (part := text[one + 1 : other].strip())] or [text]


class FightingConfig(PlayFields):
    """Agents fight at 60 frames a second and stand idle while they think: a late answer loses the round.

    A deterministic game of whole numbers. Every two agents meet on the same seeds, each seed twice with sides changed,
    until one is shown to be better or all pairs of games are played.
    """

    summary = "fights at 60 frames a second, where a late answer loses the round"
    verb_summary = "let agents play where a late answer costs: fighting, trading"
    examples = (
        "tenfold play fighting",
        "tenfold play fighting --agents llama.cpp:demo scripted:0.5 --pairs 10",
        "tenfold play fighting --agents human scripted:0.6",
    )
    run = "tenfold.arena.fighting.stage:run_fighting"
    refuse = "tenfold.arena.fighting.stage:check_fighting"

    pairs: Annotated[int, Field(ge=1)] = 100
    """Pairs of games of every two agents, at most. Raise it where the report says that it cannot separate two."""
    sequential: bool = True
    """Stop the games of two agents once one is shown to be better. Turn it off for strengths without bias."""
    seconds: Annotated[int, Field(ge=5, le=99)] = 99
    """Until the bell. Shorten it where models are slow."""
    pipelined: bool = False
    """Ask for the next move while the last one is still being made."""
    predict: bool = False
    """Show the fight as it will stand when the answer is expected."""
    hold: Literal["neutral", "back", "high", "low"] = "neutral"
    """What is pressed while there is nothing to do: ``back`` walks away, ``high`` and ``low`` take up a guard."""
    replays: Annotated[int, Field(ge=0)] = 3
    """Fights of every two agents that are drawn in ``replays.html``, from the first on."""
    watch: Annotated[bool, Incidental()] = False
    """Show the first of them in the terminal as well."""

    @model_validator(mode="after")
    def _somebody_to_fight(self) -> Self:
        specs = self.specs()
        if len(specs) < 2:
            raise ValueError("agents: a fight needs two or more, such as scripted:0.6 random")
        if any(spec.kind == "rule" for spec in specs):
            raise ValueError("agents: rule:MARGIN trades; fighters are scripted:QUALITY")
        if any(spec.kind == "human" for spec in specs) and (len(specs) != 2 or all(s.kind == "human" for s in specs)):
            raise ValueError("agents: a person fights one other agent, as in: human scripted:0.6")
        return self


class SyntheticMarket(Config):
    """The market that is drawn, for ``market: synthetic``."""

    events: Annotated[int, Field(ge=1)] = 100
    """Jumps of a price in a day."""
    revert: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability that a jump reverts; the others go on."""
    amplitude: Annotated[float, Field(gt=0)] = 0.01
    """Of a jump, as a fraction of the price."""
    half_life: Annotated[float, Field(gt=0)] = 0.5
    """Seconds in which half of a jump that reverts is gone. Raise it for slow agents."""
    cost: Annotated[float, Field(ge=0)] = 0.001
    """Of a round trip, as a fraction of what is traded."""
    drift: Annotated[float, Field(ge=0)] = 0.5
    """How much further a jump goes that does not revert, as a share of its size."""
    easy: bool = False
    """Say in words what prices and volumes show of a jump, for models that cannot read it off the numbers."""


class RecordedMarket(Config):
    """The market that is replayed, for ``market: replay`` and ``paper``."""

    bars: dict[str, Path] = {}
    """Ticker -> file of OHLC bars (CSV, JSON lines, JSON, Parquet)."""
    quotes: dict[str, Path] = {}
    """Ticker -> file of best bids and asks."""
    zone: str | None = None
    """Time zone of the stamps in the files, such as ``America/New_York`` or ``UTC``. It must be said."""
    exchange: str | None = None
    """Time zone in which ``opens`` and ``cutoff`` are told. Default: ``zone``."""
    day: str | None = None
    """``YYYY-MM-DD``, of files that hold several days or none."""
    opens: str | None = "09:30:00"
    """No questions before."""
    cutoff: str = "15:30:00"
    """What is held is sold, and later orders are refused."""
    trigger: Annotated[float, Field(ge=0)] = 0.002
    """Ask where a bar's range, or a price's distance from its recent mean or the own cost, reaches this fraction."""
    cooling: Annotated[float, Field(ge=0)] = 60.0
    """Seconds between two questions, at least."""
    longest_gap: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds without a row, at most: after more, part of the day is taken to be missing. Raise it for a market that
    rests at noon."""


class TradingConfig(PlayFields):
    """Agents trade, and an order takes effect when it arrives: late, at a worse price.

    The synthetic market has a closed form: what an agent of some accuracy and latency earns is known. Recorded markets
    are played without looking ahead; ``paper`` keeps the published rules, which do.
    """

    summary = "trading, where a late answer trades at a worse price"
    examples = (
        "tenfold play trading --agents scripted:0.9 --latencies 0 0.3 0.7 1.3",
        "tenfold play trading --agents llama.cpp:demo random --days 2 --synthetic.events 20",
        "tenfold play trading --market replay --recorded.bars NVDA nvda.csv --recorded.zone UTC --agents rule:0.005",
    )
    run = "tenfold.arena.trading.stage:run_trading"
    refuse = "tenfold.arena.trading.stage:check_trading"

    market: Literal["synthetic", "replay", "paper"] = "synthetic"
    """Which market: drawn from the seed, your own recording, or your own recording under the published rules, which
    look ahead and are there for comparison alone."""
    days: Annotated[int, Field(ge=1)] = 30
    """Days of the synthetic market; intervals are over days. Lower it where models are slow."""
    synthetic: SyntheticMarket = SyntheticMarket()
    """The market that is drawn."""
    recorded: RecordedMarket = RecordedMarket()
    """The market that is replayed."""

    def files(self) -> dict[str, Path]:
        """Traces and recordings."""
        kinds = {"bars": self.recorded.bars, "quotes": self.recorded.quotes}
        found = {f"recorded.{kind} {name}": path for kind, paths in kinds.items() for name, path in paths.items()}
        return super().files() | found

    @model_validator(mode="after")
    def _recordings_are_there(self) -> Self:
        given = [*self.recorded.bars, *self.recorded.quotes]
        if self.market == "synthetic":
            if given:
                raise ValueError(f"recorded: {given[0]} is given, and market is synthetic: say market: replay")
            if any(spec.kind == "rule" for spec in self.specs()):
                raise ValueError("agents: rule:MARGIN reads recorded markets: say market: replay, or scripted:0.9")
            return self
        if any(spec.kind == "scripted" for spec in self.specs()):
            raise ValueError(f"agents: scripted:QUALITY reads synthetic jumps; in market: {self.market} take rule:0.01")
        if not given:
            raise ValueError(f"recorded.bars: missing, and market: {self.market} needs a recording")
        if twice := set(self.recorded.bars) & set(self.recorded.quotes):
            raise ValueError(f"recorded.quotes: {min(twice)} is among recorded.bars as well: give one of them")
        if self.recorded.zone is None:
            raise ValueError("recorded.zone: missing: say the time zone of the stamps, such as America/New_York or UTC")
        if self.market == "paper" and self.recorded.quotes:
            raise ValueError("recorded.quotes: the published rules trade on bars: give recorded.bars")
        return self
