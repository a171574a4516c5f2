"""Read a recipe, check all of it without loading a weight, write it back resolved."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os.path import expanduser
from pathlib import Path
from typing import Any

import yaml

from tenfold.config.data import DataFields
from tenfold.config.reading import read_yaml, write_yaml
from tenfold.config.recipe import Recipe
from tenfold.config.shape import Task
from tenfold.config.stage import StageConfig, Takes
from tenfold.errors import ConfigError
from tenfold.models.names import refuse_data
from tenfold.pipeline.references import MODELS, Made, inherit, is_reference, look_up, reference, references_in, replaced
from tenfold.pipeline.stages import stage, stages

OF_EVERY_STAGE = ("use", "id", "model")
"""Keys of a stage that are not its configuration's."""


@dataclass(frozen=True)
class Step:
    """One stage of a resolved recipe."""

    index: int
    """Its place, from 1."""
    name: str
    config: StageConfig
    id: str = ""
    """By which later stages refer to what it makes; by default the name of its folder."""
    model: str | None = None
    """What it starts from, where that is not the model as the stages before have left it."""

    @property
    def folder(self) -> str:
        """Name of its folder in the run folder.

        >>> from tenfold.config.generate import GenerateConfig
        >>> Step(2, "generate", GenerateConfig()).folder
        '02-generate'
        """
        return f"{self.index:02d}-{self.name}"


@dataclass(frozen=True)
class ResolvedRecipe:
    """A resolved recipe: every key has its value."""

    recipe: Recipe
    steps: tuple[Step, ...]
    made: Mapping[str, Made]
    """What references stand for."""

    def to_yaml(self) -> str:
        """The recipe with every default spelled out; reading it back gives the same plan."""
        values = self.recipe.model_dump(mode="json")
        values["stages"] = [
            {
                "use": step.name,
                **({"id": step.id} if step.id != step.folder else {}),
                **({"model": step.model} if step.model is not None else {}),
                **step.config.model_dump(mode="json"),
            }
            for step in self.steps
        ]
        return write_yaml(values)


def read_recipe(path: Path, changes: Sequence[str] = ()) -> ResolvedRecipe:
    """Read a recipe file.

    Args:
        path: the YAML file.
        changes: ``key=value`` for keys of the recipe, ``stage.key=value`` for keys of its stages (of a group
            ``stage.group.key=value``); values are YAML.

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
    """Set one key of a recipe from ``key=value``, ``stage.key=value`` or ``stage.group.key=value``."""
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
    group, dot, inner = key.partition(".")
    for entry in found:
        read = _yaml(value, f"--set {text}")
        entry[group] = {**(entry.get(group) or {}), inner: read} if dot else read


def _refuse_bare_key(name: str, values: Mapping[str, Any], text: str) -> None:
    """A key of a stage that is written without the stage."""
    if name in Recipe.model_fields:
        return
    for entry in values.get("stages") or ():
        use = entry.get("use") if isinstance(entry, dict) else None
        if isinstance(use, str) and use in stages() and name in stage(use).model_fields:
            raise ConfigError(f"--set {text}: {name} is a key of the stage {use}", remedy=f"write --set {use}.{text}")


def resolve(values: Mapping[str, Any], where: str) -> ResolvedRecipe:
    """Turn plain values into a plan.

    Raises:
        ConfigError: naming every wrong key, the stage it stands in, and the nearest right one.

    >>> plan = resolve({"model": "demo", "stages": [{"use": "lora", "data": "python-reference"}]}, "example")
    >>> plan.steps[0].config.max_length
    512
    """
    _check_stages(values.get("stages", []), where)
    recipe = Recipe.parse(values, where)
    for source in (recipe.model, *recipe.models.values()):
        refuse_data(source or "")
    made = {reference(MODELS, name): Made(reference(MODELS, name), "model", None, name) for name in recipe.models}
    steps: list[Step] = []
    pools: dict[str, dict[str, Any]] = {}
    learnt: dict[str, dict[str, Any]] = {}
    task: Task = recipe.task
    for index, entry in enumerate(recipe.stages, start=1):
        name = entry.get("use")
        if not isinstance(name, str):
            raise ConfigError(f"{where}, stage {index}: use: missing", remedy="each stage begins with `use: NAME`")
        place = f"{where}, stage {index} ({name})"
        cls = stage(name, place)
        keys = {key: value for key, value in entry.items() if key not in OF_EVERY_STAGE}
        keys = _with_data(_with_columns(keys, made, steps), cls, pools, learnt, place)
        config = inherit(cls.parse(keys, place, beside=OF_EVERY_STAGE), made)
        step = Step(index, name, config, model=entry.get("model"))
        step = replace(step, id=_id(entry.get("id"), step.folder, steps, place))
        ids = {str(other.get("id")): number < index for number, other in enumerate(recipe.stages, start=1)}
        if recipe.model is None and step.model is None and config.needs.model:
            recipe = _from_first(recipe, steps)
        _check_model(step, recipe, task, made, place, ids)
        step = _with_models(step, recipe, made, place, ids)
        config = step.config
        steps.append(step)
        for artefact, kind in config.artefacts().items():
            known = Made(reference(step.id, artefact), kind, len(steps) - 1, artefact)
            made[known.reference] = known
        if step.model is None or config.leaves_model():
            task = config.task_after(task)
        if isinstance(config, DataFields):
            read = {key: keys[key] for key in DataFields.model_fields if key in keys}
            if config.data_pool is not None:
                pools[config.data_pool] = read
            if config.learns and config.data is not None:
                learnt[_same(config.data)] = {key: getattr(config, key) for key in DataFields.model_fields}
    return ResolvedRecipe(recipe, tuple(steps), {key: one for key, one in made.items() if one.step is not None})


def _check_stages(stages: Any, where: str) -> None:
    """A list of mappings, said in a line: the help of the key explains what may stand in one."""
    wrong = None
    if not isinstance(stages, list | tuple):
        wrong = f"stages: a list is asked for, got {stages!r}"
    for number, entry in enumerate(stages if wrong is None else (), start=1):
        if not isinstance(entry, Mapping):
            wrong = f"stages: stage {number}: keys and values are asked for, got {entry!r}"
            break
    if wrong is not None:
        raise ConfigError(f"{where}: {wrong}", remedy="write each stage as `- {use: NAME, KEY: VALUE}`, with its dash")


def _from_first(recipe: Recipe, steps: list[Step]) -> Recipe:
    """The recipe with the model of its first stage, where that one leaves it to the stages that follow."""
    first = next((step for step in steps if step.config.needs.model), None)
    if first is None or first.model is None or is_reference(first.model) or not first.config.leaves_model():
        return recipe
    steps[steps.index(first)] = replace(first, model=None)
    return recipe.model_copy(update={"model": first.model})


def _with_models(step: Step, recipe: Recipe, made: Mapping[str, Made], place: str, ids: Mapping[str, bool]) -> Step:
    """The step with its references looked up.

    What stands for a model of the recipe becomes that model, so that it is looked at and hashed like any; what a stage
    makes stays a reference until the run.
    """
    sources = {reference(MODELS, name): source for name, source in recipe.models.items()}
    changes: dict[str, Any] = {}
    for key, takes in step.config.takes().items():
        value = getattr(step.config, key)
        for found in references_in(value):
            look_up(found, made, takes, place, key, ids)
        changes |= {key: replaced(value, sources)} if any(one in sources for one in references_in(value)) else {}
    config = step.config.model_copy(update=changes) if changes else step.config
    return replace(step, config=config, model=sources.get(step.model or "", step.model))


def _id(given: Any, folder: str, steps: Sequence[Step], place: str) -> str:
    """The name of a stage; each has its own."""
    if given is None:
        return folder
    if not isinstance(given, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", given) or given == MODELS:
        raise ConfigError(
            f"{place}: id: {given!r} is not a name", remedy="use letters, digits, - and _; models is taken"
        )
    if given in [step.id for step in steps]:
        raise ConfigError(f"{place}: id: {given!r} names an earlier stage", remedy="give each stage an id of its own")
    return given


def _check_model(
    step: Step, recipe: Recipe, task: str, made: Mapping[str, Made], place: str, ids: Mapping[str, bool]
) -> None:
    """Refuse a stage that lacks a model, or whose model has another head."""
    needs = step.config.needs
    if step.model is not None and (not isinstance(step.model, str) or not needs.model):
        problem = "does not work on a model" if not needs.model else f"{step.model!r} is not a model"
        raise ConfigError(f"{place}: model: {problem}", remedy="give a source as under model, or leave the key out")
    if is_reference(step.model):
        assert step.model is not None
        look_up(step.model, made, Takes(("model", "adapter")), place, "model", ids)
    if step.model in recipe.models and not Path(step.model).exists():
        raise ConfigError(
            f"{place}: model: {step.model!r} is a name under models", remedy=f"write {reference(MODELS, step.model)}"
        )
    if not needs.model:
        return
    if step.model is None and recipe.model is None:
        own = f", or in the stage model: {reference(MODELS, next(iter(recipe.models)))}" if recipe.models else ""
        raise ConfigError(
            f"{place}: works on a model, and the recipe names none", remedy=f"write model: demo, for one{own}"
        )
    if step.model is None and task not in needs.task:
        says = f"the recipe says task: {task}" if task == recipe.task else f"the stages before it made a {task} model"
        raise ConfigError(
            f"{place}: works on {' or '.join(needs.task)} models, and {says}",
            remedy="leave the stage out, give it a model of its own (model: ...), or open the recipe's as causal; "
            "from Python, adapters train on every task",
        )


def _with_data(
    keys: dict[str, Any],
    cls: type[StageConfig],
    pools: Mapping[str, dict[str, Any]],
    learnt: Mapping[str, dict[str, Any]],
    place: str,
) -> dict[str, Any]:
    """The keys with the data of the stage before, read as before."""
    if not issubclass(cls, DataFields):
        return keys
    if keys.get("data") is None:
        before = pools.get(cls.data_pool, {}) if cls.data_pool is not None else {}
        keys = {**before, **{key: value for key, value in keys.items() if value is not None}}
    # What an earlier stage learnt from is only measured on the share that it held out.
    earlier = learnt.get(_same(keys.get("data")))
    return _held_out(keys, earlier, place) if "split" in cls.model_fields and earlier is not None else keys


def _with_columns(keys: dict[str, Any], made: Mapping[str, Made], steps: Sequence[Step]) -> dict[str, Any]:
    """The keys with the ``columns`` of the stage whose rows are read, where these have the names of its own data."""
    found = made.get(str(keys.get("data")))
    if found is None or found.step is None or "columns" in keys:
        return keys
    before = steps[found.step].config
    if found.name not in before.keeps_columns or not isinstance(before, DataFields) or not before.columns:
        return keys
    return {**keys, "columns": before.columns}


def _same(data: object) -> str:
    """One name for one source, however its path is written."""
    path = Path(expanduser(str(data)))
    return str(path.resolve()) if path.exists() else str(data)


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
