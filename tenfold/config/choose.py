"""Which of several models to use, by what an arena pays for good answers in time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tenfold.config.arena import AgentsFields, AgentSpec, SyntheticMarket, parse_agent
from tenfold.config.stage import ArtefactKind, Takes


class ShortMarket(SyntheticMarket):
    """The market that is drawn: few jumps an episode, because differences are found in episodes, not in jumps."""

    events: Annotated[int, Field(ge=1)] = 5
    """Jumps of a price in an episode."""


class ChooseConfig(AgentsFields):
    """Play several models, or one in several precisions, and find the best in few episodes (arXiv 2505.19481).

    Each answers questions whose good answers are known; who is both slower and worse than another one is out. The
    others play on the same seeds, and after each round a third of them stays, which plays three times as much. What is
    found is the best of those that are named here, for this game, at the latencies of this machine.
    """

    verb = "choose"
    summary = "the best of several models or precisions, by what an arena pays for good answers in time"
    examples = (
        "tenfold choose --arena trading --synthetic.easy --agents reference reference:half",
        "tenfold choose --arena fighting --agents llama.cpp:runs/a/01-fpx/model llama.cpp:runs/b/01-fpx/model",
    )
    makes: ClassVar[Mapping[str, ArtefactKind]] = {"choice": "table"}
    run = "tenfold.arena.choosing.stage:run_choose"
    refuse = "tenfold.arena.choosing.stage:check_choose"

    arena: Literal["fighting", "trading"] = "trading"
    """What is played: an episode is a few jumps of the synthetic market, each candidate in a book of its own, or two
    fights against the opponent, sides swapped."""
    agents: Annotated[tuple[str, ...], Field(min_length=1), Takes(("model", "adapter"))] = (
        "scripted:0.9@0.6",
        "scripted:0.7@0.1",
    )
    """The candidates, each a name of its own (``NAME=WHO`` gives it one), as in ``tenfold play``: a hub id, a folder,
    ``llama.cpp:FILE.gguf``, ``demo[gear:4]`` with a packed cache. What an answer takes may stand behind an ``@``."""
    latency: str | None = "measured"
    """What answers take of candidates that do not say it, as in ``tenfold play``; ``measured`` counts what models take
    here."""
    opponent: str = "scripted:0.6@0.2"
    """In fighting, whom all candidates meet."""
    probe: Annotated[int, Field(ge=0)] = 64
    """Questions with known answers that each is asked first; 0 leaves this out."""
    first: Annotated[int, Field(ge=1)] = 16
    """Episodes of each in the first round."""
    most: Annotated[int, Field(ge=2)] | None = None
    """Episodes of all together. Default: as many for each round as for the first one, and once more. Lower it where
    models are slow; raise it where the report says that it cannot separate two."""
    seconds: Annotated[int, Field(ge=5, le=99)] = 30
    """In fighting, until the bell."""
    synthetic: ShortMarket = ShortMarket()
    """In trading, the market that is drawn."""

    def specs(self) -> list[AgentSpec]:
        """The candidates and, in fighting, the opponent."""
        found = super().specs()
        return [*found, parse_agent(self.opponent)] if self.arena == "fighting" else found

    @model_validator(mode="after")
    def _candidates_can_be_compared(self) -> Self:
        specs = self.specs()
        if len(self.agents) < 2:
            raise ValueError(f"agents: {self.agents[0]} alone: give two or more to choose from")
        if any(spec.kind == "human" for spec in specs):
            raise ValueError("agents: human: people are not chosen; play against them with tenfold play")
        if any(spec.kind == "rule" for spec in specs):
            raise ValueError("agents: rule:MARGIN reads recorded markets, and a choice is made in the synthetic one")
        if self.arena == "fighting" and parse_agent(self.opponent).text in self.names():
            raise ValueError(f"opponent: {self.opponent} is among the candidates: name another one")
        if self.most is not None and self.most < self.first * len(self.agents):
            each = f"{len(self.agents)} candidates {self.first} each"
            raise ValueError(f"most: {self.most} episodes do not give {each}: raise it, or lower first")
        return self
