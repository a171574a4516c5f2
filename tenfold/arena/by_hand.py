"""Agents without a model, of each arena: a person, scripted, by a rule, at random; and what may be planned there."""

from __future__ import annotations

from typing import Literal

from tenfold.arena.agents import Agent
from tenfold.arena.fighting.scripted import ScriptedFighter
from tenfold.arena.human import HumanFighter, HumanTrader
from tenfold.arena.trading.agents import RandomTrader, RuleTrader, ScriptedTrader
from tenfold.config.arena import AgentSpec
from tenfold.errors import ConfigError

Arena = Literal["fighting", "trading"]

PLANS_IN_WORDS: dict[Arena, tuple[str, ...]] = {
    "fighting": ("attack", "defend", "keep away and throw bolts", "wait for a mistake and punish it"),
    "trading": ("trade every jump", "trade only clear cases", "pass"),
}
"""What a slow model may plan for a fast one."""


def by_hand(arena: Arena, spec: AgentSpec) -> Agent:
    """The agent that plays without a model.

    Raises:
        ConfigError: a number out of its range; names the agent.
    """
    if spec.kind == "human":
        return HumanFighter() if arena == "fighting" else HumanTrader()
    number = spec.number or 0.0
    try:
        if arena == "fighting":  # at random is scripted with quality 0
            return ScriptedFighter(number)
        if spec.kind == "scripted":
            return ScriptedTrader(number, seconds=0.2)
        return RuleTrader(number, seconds=0.2) if spec.kind == "rule" else RandomTrader(seconds=0.2)
    except ConfigError as error:
        raise ConfigError(f"agents: {spec.text}: {error.problem}", error.remedy) from None
