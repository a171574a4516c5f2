"""The arena's own models: the embedded one, taught to trade and to fight (`benchmarks/arena_agents.py`).

What was learnt comes with the package, as adapters of AdaLoRA. ``reference`` keeps all layers of the model,
``reference:half`` the first half of them: it is worse and twice as fast, so that what speed is worth can be seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from tenfold.arena.by_hand import Arena
from tenfold.config.arena import REFERENCES, AgentSpec
from tenfold.errors import ConfigError
from tenfold.models.opened import Opened, describe
from tenfold.models.source import content_hash, read_json

FOLDER = Path(__file__).parent / "adapters"


@dataclass(frozen=True)
class Taught:
    """What a reference agent is.

    Args:
        arena: ``fighting`` or ``trading``.
        layers: of the embedded model, the first ones.
        easy: whether its market says in words what prices and volumes show.
        quality: share of held-out questions that it answers well.
    """

    arena: Arena
    layers: int
    easy: bool
    quality: float


def taught(arena: Arena, name: str) -> tuple[Path, Taught]:
    """The folder of a reference agent's adapter, and what it is.

    Raises:
        ConfigError: no such agent in this arena; names those there are.
    """
    folder = _folder(arena, name)
    if not folder.is_dir():
        there = [one for one in REFERENCES if _folder(arena, one).is_dir()]
        others = " or ".join([*there, "another model"])
        raise ConfigError(f"agents: {name} does not play {arena}", remedy=f"take {others}")
    fields = read_json(folder / "agent.json")
    known = {key: fields[key] for key in Taught.__dataclass_fields__}
    return folder, TypeAdapter(Taught).validate_python(known)


def check_taught(specs: Iterable[AgentSpec], easy: bool) -> None:
    """Models that were taught one market play no other.

    Args:
        specs: of the agents.
        easy: whether the market says in words what prices and volumes show.

    Raises:
        ConfigError: naming the agent.
    """
    for spec in specs:
        if spec.taught and taught("trading", spec.taught)[1].easy != easy:
            remedy = f"say synthetic.easy: {str(not easy).lower()}, or take another model"
            raise ConfigError(f"agents: {spec.text} was taught another market", remedy)


def _folder(arena: Arena, name: str) -> Path:
    return FOLDER / name.replace("reference", arena).replace(":", "-")


def open_reference(arena: Arena, name: str = "reference", **opening: Any) -> Opened:
    """A reference agent as a plain model: layers cut, the adapter merged.

    Args:
        arena: ``fighting`` or ``trading``.
        name: ``reference`` or ``reference:half``.
        opening: further arguments of `tenfold.models.open.open_model`, such as ``device``.

    Raises:
        ConfigError: as `taught`; or ``load``, because what was learnt is merged into whole weights.
        ModelError: the embedded model is not installed.
    """
    from tenfold.models.open import attach_adapter, open_model

    folder, agent = taught(arena, name)
    if opening.get("load"):
        raise ConfigError(f"load: {name} cannot be packed: what it learnt is merged", remedy="leave load out")
    opened = open_model("demo", **opening)
    model = first_layers(opened.model, agent.layers)
    model = attach_adapter(model, folder, "causal").merge_and_unload().eval()
    identity = describe(model, name, str(folder), opened.identity["weights"], (content_hash(folder),))
    return Opened(model, opened.tokenizer, identity, opened.notes)


def first_layers(model: Any, count: int) -> Any:
    """Cut a model of Llama's shape to its first layers, in place; its head reads what the last of them gives."""
    model.model.layers = torch.nn.ModuleList(model.model.layers[:count])
    model.config.num_hidden_layers = count
    return model
