"""The one place where stages are registered: names that resolve lazily, open to other packages.

A package adds a stage by an entry point of the group ``tenfold.stages`` whose object is a `Stage`:

    [project.entry-points."tenfold.stages"]
    mymethod = "mypackage.tenfold_stage:STAGE"
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from tenfold.config.base import Config
from tenfold.errors import ConfigError


@dataclass(frozen=True)
class Stage:
    """A step of a recipe: its configuration, its function, and the verb it belongs to on the command line.

    A stage that trains an adapter also names ``attach``, ``(model, config, task) -> adapted model``, from which
    `tenfold.pipeline.estimate` predicts its needs.

    ``config``, ``run`` and ``attach`` are written ``module:name`` and imported on first use, so that listing stages,
    validating recipes and showing help load neither torch nor transformers.
    """

    verb: str
    summary: str
    config: str
    run: str
    attach: str | None = None
    tasks: tuple[str, ...] = ("causal",)
    """What the model's head may be for."""

    def config_class(self) -> type[Config]:
        """The configuration class; torch-free."""
        return _resolve(self.config)

    def function(self) -> Callable[..., Any]:
        """``(config, context) -> StageOutput``."""
        return _resolve(self.run)

    def attach_function(self) -> Callable[..., Any] | None:
        """``(model, config, task) -> adapted model``, or None."""
        return _resolve(self.attach) if self.attach else None


BUILT_IN: Mapping[str, Stage] = {
    "adalora": Stage(
        verb="adapt",
        summary="AdaLoRA: a parameter budget that goes to the matrices that use it",
        config="tenfold.config.adalora:AdaLoraConfig",
        run="tenfold.adapt.adalora.stage:run_adalora",
        attach="tenfold.adapt.adalora.stage:attach_adalora",
    ),
    "lora": Stage(
        verb="adapt",
        summary="LoRA through PEFT: one rank for every matrix, the baseline",
        config="tenfold.config.lora:LoraConfig",
        run="tenfold.adapt.lora.stage:run_lora",
        attach="tenfold.adapt.lora:attach",
    ),
    "full": Stage(
        verb="adapt",
        summary="all weights, without an adapter",
        config="tenfold.config.full:FullConfig",
        run="tenfold.adapt.full.stage:run_full",
        attach="tenfold.adapt.full:attach",
    ),
    "r3m": Stage(
        verb="align",
        summary="R3M: a reward or a policy from preferences of which some are wrong, and which those are",
        config="tenfold.config.r3m:R3MConfig",
        run="tenfold.align.r3m.stage:run_r3m",
        tasks=("causal", "reward"),
    ),
    "audit": Stage(
        verb="audit",
        summary="which preference labels to doubt, by a reward model or a DPO policy",
        config="tenfold.config.r3m:AuditConfig",
        run="tenfold.align.audit.stage:run_audit",
        tasks=("causal", "reward"),
    ),
    "profile": Stage(
        verb="steer",
        summary="find the attention heads whose steering the model obeys",
        config="tenfold.config.pasta:ProfileConfig",
        run="tenfold.attend.pasta.stage:run_profile",
    ),
    "pasta": Stage(
        verb="steer",
        summary="PASTA: emphasis of marked text that the model obeys",
        config="tenfold.config.pasta:PastaConfig",
        run="tenfold.attend.pasta.stage:run_pasta",
    ),
    "autopasta": Stage(
        verb="steer",
        summary="AutoPASTA: answers from a context whose key sentence the model finds itself",
        config="tenfold.config.autopasta:AutoPastaConfig",
        run="tenfold.attend.autopasta.stage:run_autopasta",
    ),
    "evaluate": Stage(
        verb="evaluate",
        summary="perplexity, speed, memory, questions, standard tasks; before and after",
        config="tenfold.config.evaluate:EvaluateConfig",
        run="tenfold.evaluate.stage:run_evaluate",
    ),
    "masformer": Stage(
        verb="lengthen",
        summary="MASFormer: full attention where it matters, local attention in the other layers",
        config="tenfold.config.masformer:MasformerConfig",
        run="tenfold.attend.masformer.stage:run_masformer",
    ),
    "gear": Stage(
        verb="evaluate",
        summary="GEAR: a KV cache in 2 to 4 bits; quality against bytes, time against context",
        config="tenfold.config.gear:GearConfig",
        run="tenfold.cache.gear.stage:run_gear",
    ),
    "generate": Stage(
        verb="generate",
        summary="let the model write, before and after",
        config="tenfold.config.generate:GenerateConfig",
        run="tenfold.engines.stage:run_generate",
    ),
    "export": Stage(
        verb="export",
        summary="a folder that transformers or PEFT opens without tenfold",
        config="tenfold.config.export:ExportConfig",
        run="tenfold.models.stage:run_export",
        tasks=("causal", "seq2seq", "classification", "reward"),
    ),
}


def _resolve(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


@cache
def stages() -> Mapping[str, Stage]:
    """All stages by name: the built-in ones, then those of installed packages.

    Raises:
        ConfigError: when a package registers a name that is taken, or something that is no `Stage`.
    """
    found = dict(BUILT_IN)
    for point in entry_points(group="tenfold.stages"):
        if point.name in found:
            raise ConfigError(
                f"stage {point.name!r} of {point.value} is registered already",
                remedy=f"uninstall one of the two packages, or rename the entry point {point.name!r}",
            )
        stage = point.load()
        if not isinstance(stage, Stage):
            raise ConfigError(
                f"entry point {point.name} = {point.value} is a {type(stage).__name__}, not a tenfold Stage",
                remedy="point it at a tenfold.pipeline.stages.Stage",
            )
        found[point.name] = stage
    return found


def stage(name: str, where: str = "recipe") -> Stage:
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
