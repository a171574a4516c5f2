"""Read a recipe, check all of it without loading a weight, write it back resolved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tenfold.config.base import Config
from tenfold.config.data import DataFields
from tenfold.config.recipe import Recipe
from tenfold.errors import ConfigError
from tenfold.pipeline.stages import stage


@dataclass(frozen=True)
class Step:
    """One stage of a resolved recipe."""

    index: int
    """Its place, from 1."""
    name: str
    config: Config

    @property
    def folder(self) -> str:
        """Name of its folder in the run folder.

        >>> from tenfold.config.generate import GenerateConfig
        >>> Step(2, "generate", GenerateConfig()).folder
        '02-generate'
        """
        return f"{self.index:02d}-{self.name}"


@dataclass(frozen=True)
class Plan:
    """A resolved recipe: every key has its value."""

    recipe: Recipe
    steps: tuple[Step, ...]

    def to_yaml(self) -> str:
        """The recipe with every default spelled out; reading it back gives the same plan."""
        values = self.recipe.model_dump(mode="json")
        values["stages"] = [{"use": step.name, **step.config.model_dump(mode="json")} for step in self.steps]
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def read_recipe(path: Path, changes: Sequence[str] = ()) -> Plan:
    """Read a recipe file.

    Args:
        path: the YAML file.
        changes: ``key=value`` for keys of the recipe, ``stage.key=value`` for keys of its stages; values are YAML.

    Raises:
        ConfigError: when the file is absent, no YAML, or has an unknown key or an impossible value.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", remedy="give the path of a recipe file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}", remedy="save the recipe as UTF-8") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{path}: {place}{problem}", remedy="a recipe is YAML; see recipes/quickstart.yaml") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not a recipe", remedy="a recipe has the keys model and stages")
    for text in changes:
        _change(values, text)
    return resolve(values, where=str(path))


def _change(values: dict[str, Any], text: str) -> None:
    """Set one key of a recipe from ``key=value`` or ``stage.key=value``."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text}: no value", remedy="write --set KEY=VALUE, e.g. --set lora.rank=4")
    target, dot, key = name.partition(".")
    if not dot:
        values[name] = yaml.safe_load(value)
        return
    found = [entry for entry in values.get("stages") or () if isinstance(entry, dict) and entry.get("use") == target]
    if not found:
        uses = [str(entry.get("use")) for entry in values.get("stages") or () if isinstance(entry, dict)]
        raise ConfigError(f"--set {text}: the recipe has no stage {target!r}", remedy=f"stages: {', '.join(uses)}")
    for entry in found:
        entry[key] = yaml.safe_load(value)


def resolve(values: Mapping[str, Any], where: str) -> Plan:
    """Turn plain values into a plan.

    Raises:
        ConfigError: naming every wrong key, the stage it stands in, and the nearest right one.

    >>> plan = resolve({"model": "demo", "stages": [{"use": "lora", "data": "python-reference"}]}, "example")
    >>> plan.steps[0].config.max_length
    512
    """
    recipe = Recipe.parse(values, where)
    steps: list[Step] = []
    data: dict[str, Any] = {}
    seen: set[str] = set()
    for index, entry in enumerate(recipe.stages, start=1):
        name = entry.get("use")
        if not isinstance(name, str):
            raise ConfigError(f"{where}, stage {index}: use: missing", remedy="each stage begins with `use: NAME`")
        place = f"{where}, stage {index} ({name})"
        keys = {key: value for key, value in entry.items() if key != "use"}
        config_class = stage(name, place).config_class()
        if issubclass(config_class, DataFields):
            # A stage without data reads what the stage before it read.
            if keys.get("data") is None:
                keys = {**data, **{key: value for key, value in keys.items() if value is not None}}
            data = {key: keys[key] for key in DataFields.model_fields if key in keys}
            # What an earlier stage may have trained on is only measured on the share that was held out.
            if "split" in config_class.model_fields and keys.get("data") in seen:
                keys.setdefault("split", "held-out")
            seen.add(keys.get("data", ""))
        steps.append(Step(index, name, config_class.parse(keys, place)))
    return Plan(recipe, tuple(steps))
