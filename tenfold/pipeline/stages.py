"""The registry of stages: names and configuration classes, resolved on first use, open to other packages."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from tenfold.config.stage import StageConfig
from tenfold.errors import ConfigError

# The first stage of a verb is its default method.
BUILT_IN: Mapping[str, str] = {
    "adalora": "tenfold.config.adalora:AdaLoraConfig",
    "lora": "tenfold.config.lora:LoraConfig",
    "full": "tenfold.config.full:FullConfig",
    "losparse": "tenfold.config.losparse:LoSparseConfig",
    "fpx": "tenfold.config.fpx:FpxConfig",
    "masformer": "tenfold.config.masformer:MasformerConfig",
    "r3m": "tenfold.config.r3m:R3MConfig",
    "audit": "tenfold.config.r3m:AuditConfig",
    "pasta": "tenfold.config.pasta:PastaConfig",
    "profile": "tenfold.config.pasta:ProfileConfig",
    "autopasta": "tenfold.config.autopasta:AutoPastaConfig",
    "generate": "tenfold.config.generate:GenerateConfig",
    "evaluate": "tenfold.config.evaluate:EvaluateConfig",
    "gear": "tenfold.config.gear:GearConfig",
    "fighting": "tenfold.config.arena:FightingConfig",
    "trading": "tenfold.config.arena:TradingConfig",
    "choose": "tenfold.config.choose:ChooseConfig",
    "export": "tenfold.config.export:ExportConfig",
}
GROUP = "tenfold.stages"


def load(reference: str) -> Any:
    """What ``module:name`` names.

    >>> load("tenfold.config.lora:LoraConfig").verb
    'adapt'
    """
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


@cache
def stages() -> Mapping[str, type[StageConfig]]:
    """All stages by name: the built-in ones, then those of installed packages.

    Raises:
        ConfigError: a package registers a name that is taken, or something that is not a stage.
    """
    found: dict[str, type[StageConfig]] = {name: load(reference) for name, reference in BUILT_IN.items()}
    for point in entry_points(group=GROUP):
        if point.name in found:
            raise ConfigError(
                f"stage {point.name!r} of {point.value} is registered already",
                remedy=f"uninstall one of the two packages, or rename the entry point {point.name!r}",
            )
        found[point.name] = _checked(point.name, point.value, point.load())
    return found


def _checked(name: str, value: str, cls: Any) -> type[StageConfig]:
    if not (isinstance(cls, type) and issubclass(cls, StageConfig)):
        raise ConfigError(
            f"entry point {name} = {value} is not a tenfold stage",
            remedy="point it at a subclass of tenfold.config.stage.StageConfig",
        )
    missing = [key for key in ("verb", "summary", "run") if not isinstance(getattr(cls, key, None), str)]
    if missing:
        raise ConfigError(
            f"stage {name!r} of {value}: {missing[0]} is missing", remedy=f"set {missing[0]} on the class"
        )
    return cls


def stage(name: str, where: str = "recipe") -> type[StageConfig]:
    """The stage of that name.

    Raises:
        ConfigError: naming the nearest stage.

    >>> stage("lora").verb
    'adapt'
    """
    if name not in stages():
        near = difflib.get_close_matches(name, stages(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{where}: unknown stage {name!r}{hint}", remedy=f"stages: {', '.join(stages())}")
    return stages()[name]


def verbs() -> dict[str, list[str]]:
    """Each verb of the command line with its methods, the default one first.

    >>> verbs()["steer"]
    ['pasta', 'profile', 'autopasta']
    """
    found: dict[str, list[str]] = {}
    for name, config in stages().items():
        found.setdefault(config.verb, []).append(name)
    return found
