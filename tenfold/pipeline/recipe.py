"""Read a recipe, check all of it without loading a weight, write it back resolved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tenfold.config.autopasta import AutoPastaConfig
from tenfold.config.base import Config
from tenfold.config.data import DataFields
from tenfold.config.pasta import PastaConfig, ProfileConfig, SteeringFields
from tenfold.config.r3m import R3MConfig
from tenfold.config.reading import read_yaml, write_yaml
from tenfold.config.recipe import Recipe
from tenfold.config.training import TrainingFields
from tenfold.errors import ConfigError
from tenfold.pipeline.stages import stage, stages

STEERING = (ProfileConfig, PastaConfig, AutoPastaConfig)


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
        return write_yaml(values)


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
    values = _yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not a recipe", remedy="a recipe has the keys model and stages")
    for text in changes:
        _change(values, text)
    return resolve(values, where=str(path))


def _yaml(text: str, where: str) -> Any:
    try:
        return read_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{where}: {place}{problem}", remedy="write YAML; see recipes/quickstart.yaml") from None


def _change(values: dict[str, Any], text: str) -> None:
    """Set one key of a recipe from ``key=value`` or ``stage.key=value``."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text}: no value", remedy="write --set KEY=VALUE, e.g. --set lora.rank=4")
    target, dot, key = name.partition(".")
    if not dot:
        _refuse_bare_key(name, values, text)
        values[name] = _yaml(value, f"--set {text}")
        return
    found = [entry for entry in values.get("stages") or () if isinstance(entry, dict) and entry.get("use") == target]
    if not found:
        uses = [str(entry.get("use")) for entry in values.get("stages") or () if isinstance(entry, dict)]
        raise ConfigError(f"--set {text}: the recipe has no stage {target!r}", remedy=f"stages: {', '.join(uses)}")
    for entry in found:
        entry[key] = _yaml(value, f"--set {text}")


def _refuse_bare_key(name: str, values: Mapping[str, Any], text: str) -> None:
    """A key of a stage that is written without the stage."""
    if name in Recipe.model_fields:
        return
    for entry in values.get("stages") or ():
        use = entry.get("use") if isinstance(entry, dict) else None
        if isinstance(use, str) and use in stages() and name in stage(use).config_class().model_fields:
            raise ConfigError(f"--set {text}: {name} is a key of the stage {use}", remedy=f"write --set {use}.{text}")


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
    tagged: dict[str, Any] = {}
    trained: dict[str, dict[str, Any]] = {}
    profiled: Step | None = None
    task: str = recipe.task
    for index, entry in enumerate(recipe.stages, start=1):
        name = entry.get("use")
        if not isinstance(name, str):
            raise ConfigError(f"{where}, stage {index}: use: missing", remedy="each stage begins with `use: NAME`")
        place = f"{where}, stage {index} ({name})"
        keys = {key: value for key, value in entry.items() if key != "use"}
        if task not in stage(name, place).tasks:
            says = (
                f"the recipe says task: {task}" if task == recipe.task else f"the stages before it made a {task} model"
            )
            raise ConfigError(
                f"{place}: works on {' or '.join(stage(name).tasks)} models, and {says}",
                remedy="leave the stage out, or open the model as causal; from Python, adapters train on every task",
            )
        config_class = stage(name, place).config_class()
        if issubclass(config_class, DataFields):
            # A stage without data reads what the stage before it read; steering has rows of its own kind.
            if keys.get("data") is None:
                before = tagged if config_class is PastaConfig else {} if issubclass(config_class, STEERING) else data
                keys = {**before, **{key: value for key, value in keys.items() if value is not None}}
            # What an earlier stage trained on is only measured on the share that it held out.
            earlier = trained.get(_same(keys.get("data")))
            if "split" in config_class.model_fields and earlier is not None:
                keys = _held_out(keys, earlier, place)
        config = config_class.parse(keys, place)
        if isinstance(config, SteeringFields) and config.steers and config.profile is None and profiled is not None:
            config = config.model_copy(update={"profile": profiled.folder})
        steps.append(Step(index, name, config))
        if isinstance(config, ProfileConfig):
            profiled = steps[-1]
        if isinstance(config, R3MConfig):
            task = "reward" if config.target == "reward" else task
        if isinstance(config, DataFields):
            read = {key: keys[key] for key in DataFields.model_fields if key in keys}
            if not isinstance(config, STEERING):
                data = read
            elif isinstance(config, ProfileConfig):
                tagged = read if config.data is not None else {}
            if isinstance(config, TrainingFields | ProfileConfig) and config.data is not None:
                trained[_same(config.data)] = {key: getattr(config, key) for key in DataFields.model_fields}
    return Plan(recipe, tuple(steps))


def _same(data: object) -> str:
    """One name for one source, however its path is written."""
    return str(Path(data).expanduser().resolve()) if isinstance(data, str) and Path(data).exists() else str(data)


def _held_out(keys: dict[str, Any], trained: dict[str, Any], place: str) -> dict[str, Any]:
    """The keys of an evaluation on data that was trained on: read in the same way, it holds out the same rows.

    Raises:
        ConfigError: a key under which other rows would be held out, of which some were trained on.
    """
    if keys.get("split") == "all":
        return keys
    for key, value in trained.items():
        if key != "data" and keys.get(key, value) not in (value, None):
            raise ConfigError(
                f"{place}: {key}: {keys[key]!r}, but an earlier stage trained on this data with {key} {value!r}",
                remedy=f"leave {key} out, or write split: all to measure rows that were trained on as well",
            )
    return {**keys, **trained, "split": "held-out"}
