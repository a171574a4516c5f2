"""The reference: options of every stage from the docstrings of its configuration, the command line, the recipe."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tenfold import cli
from tenfold.config.base import Config
from tenfold.config.gear import CacheConfig
from tenfold.config.recipe import ModelFields, Recipe
from tenfold.config.stage import StageConfig
from tenfold.pipeline.stages import stages, verbs

DOCS = Path(__file__).parent

WITH = {"gear": (CacheConfig,)}
"""Stage -> further configurations that are explained on its page."""


def described() -> dict[str, type[StageConfig]]:
    """The stages of this package by name."""
    return {name: config for name, config in stages().items() if config.__module__.startswith("tenfold.")}


# ---- options --------------------------------------------------------------------------------------------------------


def options(name: str) -> str:
    """The page of one stage's options."""
    stage = described()[name]
    parts = [
        f"# Options of `{name}`",
        f"{_sentence(stage.summary)} In a recipe `use: {name}`, on the command line "
        f"`tenfold {stage.verb} {'MODEL --method ' if stage.needs.model else ''}{name}`{_in_full(stage)}.",
        _prose(stage.__doc__ or ""),
    ]
    for title, keys in _groups(stage):
        parts += [f"## {title}", _table(stage, keys)]
    for group, config in stage.groups().items():
        parts += [f"## `{group}`", _prose(config.__doc__ or ""), _table(config, list(config.model_fields), f"{group}.")]
    for config in WITH.get(name, ()):
        parts += [f"## {_title(config)}", _table(config, list(config.model_fields))]
    return "\n\n".join(filter(None, parts)) + "\n"


def _in_full(config: type[Config]) -> str:
    """Links to the method that a configuration belongs to, by the name of its file, and to what was measured of it."""
    name = config.__module__.rpartition(".")[2]
    links = ["[the method](../methods/{}.md)"] if (DOCS / f"methods/{name}.md").exists() else []
    links += ["[results](../results/{}.md)"] if (DOCS / f"results/notes/{name}.md").exists() else []
    return f"; {', '.join(links)}".format(name, name) if links else ""


def _groups(config: type[Config]) -> Iterator[tuple[str, list[str]]]:
    """Fields by the class that declares them, the stage's own first."""
    left = list(config.model_fields)
    for owner in config.__mro__:
        keys = [key for key in left if key in inspect.get_annotations(owner)]
        left = [key for key in left if key not in keys]
        if keys:
            yield ("Its own" if owner is config else _title(owner)), keys


def _table(config: type[Config], keys: list[str], group: str = "") -> str:
    schema = config.model_json_schema()["properties"]
    lines = ["| option | value | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        field = {"type": "group", "default": None} if key in config.groups() else schema[key]
        cells = (f"`{group}{key}`", kind(field), _default(field), _prose(config.model_fields[key].description or ""))
        lines.append("| " + " | ".join(" ".join(cell.split()).replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines)


BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
KINDS = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text", "group": "group"}


def kind(schema: dict[str, Any]) -> str:
    """What a value may be, from its JSON schema.

    >>> kind({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]})
    'whole number ≥ 1'
    """
    if "anyOf" in schema:
        kinds = [kind(one) for one in schema["anyOf"] if one.get("type") != "null"]
        return " or ".join(one for one in dict.fromkeys(kinds) if (one, "number" in kinds) != ("whole number", True))
    if "enum" in schema:
        return ", ".join(f"`{choice}`" for choice in schema["enum"])
    if schema.get("type") == "array":
        parts = schema.get("prefixItems")
        return f"list of {len(parts)}: {kind(parts[0])}" if parts else f"list: {kind(schema.get('items', {}))}"
    if schema.get("type") == "object":
        inner = schema.get("additionalProperties")
        return f"names and values: {kind(inner)}" if isinstance(inner, dict) else "names and values"
    if schema.get("format") == "path":
        return "path"
    bounds = [f"{sign} {schema[key]}" for key, sign in BOUNDS.items() if key in schema]
    return f"{KINDS.get(schema.get('type', ''), 'value')} {', '.join(bounds)}".strip()


def _default(schema: dict[str, Any]) -> str:
    if schema.get("default") is None:
        return "" if "default" in schema else "required"
    value = schema["default"]
    return f"`{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}`"


# ---- command line ---------------------------------------------------------------------------------------------------


def command_line() -> str:
    """The page of all verbs."""
    parts = [
        "# Command line",
        "A verb says what happens to the model, `--method` says how. The flags of a method are its "
        "[options](recipe.md#stages): `max_length` is `--max-length 512`, a list is written with spaces "
        "(`--tasks perplexity speed`), true and false as `--packing` and `--no-packing`, names and values in turns "
        "(`--columns prompt question`), a key of a group with its group (`--paper.init normal`). `tenfold VERB --help` "
        "prints them; `--debug` shows the traceback of an error.",
        "Exit codes: 0 done, 1 failed while working, 2 bad input, 130 interrupted.",
    ]
    for verb, command in cli.COMMANDS.items():
        parts += [f"## `{verb}`", *_command(command), _examples(verb)]
    for verb, (first, *_) in verbs().items():
        summary = stages()[first].verb_summary or stages()[first].summary
        parts += [f"## `{verb}`", _sentence(summary), _methods(verb), _examples(verb)]
    parts += [
        "## Flags of every verb that takes a model",
        "`MODEL` comes first. `--out FOLDER` is the run folder (default `runs/METHOD-HASH`).",
        _table(ModelFields, [key for key in ModelFields.model_fields if key != "model"]),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _command(command: Any) -> list[str]:
    """What a function of `tenfold.cli` does, and its arguments, from its docstring (Google style)."""
    text, _, arguments = inspect.cleandoc(command.__doc__ or "").partition("\nArgs:\n")
    found = re.findall(r"^ +(\w+): (.*(?:\n {8,}.*)*)", arguments, re.MULTILINE)
    parameters = inspect.signature(command).parameters
    lines = []
    for name, meaning in found:
        flag = f"`{name.upper()}`" if "Positional" in str(parameters[name].annotation) else f"`--{name}`"
        lines.append(f"- {flag}: {' '.join(meaning.split())}")
    return [_prose(text), "\n".join(lines)]


def _methods(verb: str) -> str:
    lines = [
        f"- `{name}`: {stage.summary} ([options](../options/{name}.md))"
        for name, stage in described().items()
        if stage.verb == verb
    ]
    return "\n".join(lines)


def _examples(verb: str) -> str:
    return "\n".join(["```", *cli.examples(verb), "```"])


# ---- recipe ---------------------------------------------------------------------------------------------------------


def recipe() -> str:
    """The page of a recipe's keys, and the stages."""
    lines = ["| stage | verb | what it does | reads | makes |", "|---|---|---|---|---|"]
    for name, stage in described().items():
        made = stage.model_construct().artefacts()  # as its defaults have it
        reads, makes = ", ".join(stage.reads), ", ".join(f"`{artefact}`" for artefact in made)
        lines.append(f"| [`{name}`](../options/{name}.md) | `{stage.verb}` | {stage.summary} | {reads} | {makes} |")
    example = (DOCS.parent / "recipes/quickstart.yaml").read_text(encoding="utf-8").strip()
    parts = [
        "# Recipe",
        "A recipe is a YAML file; [Recipes and runs](../runs.md) says what is done with it. "
        "`tenfold validate` checks every key before anything is loaded.",
        f"```yaml\n{example}\n```",
        "## Keys of a recipe",
        _table(Recipe, list(Recipe.model_fields)),
        "## Stages",
        "`use` names the stage; its other keys are its options. A later stage takes what it makes (here: with its "
        "defaults) as `${id.name}`.",
        "\n".join(lines),
    ]
    return "\n\n".join(parts) + "\n"


# ---- text -----------------------------------------------------------------------------------------------------------


def _prose(docstring: str) -> str:
    """Markdown from a docstring: its examples and the marks of reStructuredText taken off."""
    text = re.sub(r"^>>> .*", "", inspect.cleandoc(docstring), flags=re.DOTALL | re.MULTILINE).strip()
    text = re.sub(r":\w+:`([^`]*)`", r"`\1`", text).replace("``", "`")
    return re.sub(r"`~?(?:\w+\.)+(\w+)`", r"`\1`", text) if text.startswith(":") else text


def _title(config: type[Config]) -> str:
    """The first sentence of a class, as a heading."""
    return re.split(r"(?<=\w)\.\s|\.$| \(|\n", _prose(config.__doc__ or config.__name__))[0]


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."
