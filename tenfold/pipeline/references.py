"""``${id.name}`` in a recipe: the artefact ``name`` of the stage ``id``, or the model ``name`` under ``models``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from tenfold.config.stage import ArtefactKind, StageConfig, Takes
from tenfold.errors import ConfigError

MODELS = "models"
"""The id under which the recipe's further models stand."""
_ANY = re.compile(r"\$\{[^{}]*\}?")
_WHOLE = re.compile(r"\$\{([^{}.]+)\.([^{}.]+)\}")


@dataclass(frozen=True)
class Made:
    """An artefact that a recipe will have, before it is there.

    Args:
        reference: as recipes write it.
        kind: what it is.
        step: index in the plan of the stage that makes it; None for a model under ``models``.
        name: of the artefact, or of the model.
    """

    reference: str
    kind: ArtefactKind
    step: int | None
    name: str


def is_reference(value: object) -> bool:
    """Whether a value stands for an artefact.

    >>> is_reference("${clean.cleaned}"), is_reference("cleaned.jsonl")
    (True, False)
    """
    return isinstance(value, str) and value.startswith("${")


def references_in(value: object) -> list[str]:
    """The references that a value holds: it is one, or it is a list of texts with some in them.

    >>> references_in("${clean.cleaned}"), references_in(("demo", "small=llama.cpp:${mixed.model}@0.3"))
    (['${clean.cleaned}'], ['${mixed.model}'])
    """
    if isinstance(value, list | tuple):
        return [found for text in value if isinstance(text, str) for found in _ANY.findall(text)]
    return [str(value)] if is_reference(value) else []


def replaced(value: Any, by: Mapping[str, str]) -> Any:
    """The value with what its references stand for, as far as that is known.

    >>> replaced(("demo", "llama.cpp:${mixed.model}"), {"${mixed.model}": "runs/01-fpx/model"})
    ('demo', 'llama.cpp:runs/01-fpx/model')
    """
    if isinstance(value, list | tuple):
        return tuple(_ANY.sub(lambda found: by.get(found[0], found[0]), text) for text in value)
    return by.get(value, value) if isinstance(value, str) else value


def reference(id: str, name: str) -> str:
    """As recipes write it.

    >>> reference("clean", "cleaned")
    '${clean.cleaned}'
    """
    return f"${{{id}.{name}}}"


def look_up(
    value: str,
    known: Mapping[str, Made],
    takes: Takes,
    place: str,
    key: str,
    ids: Mapping[str, bool] = MappingProxyType({}),
) -> Made:
    """The artefact that a value stands for.

    Args:
        value: as the recipe writes it.
        known: artefacts of the stages before, and models, by reference.
        takes: what may stand there.
        place: of the stage, for errors.
        key: under which the value stands.
        ids: those of the recipe's stages, each with whether it comes before this stage.

    Raises:
        ConfigError: not of the form, unknown, made only later, or of a kind that cannot stand there.
    """
    if not _WHOLE.fullmatch(value):
        raise ConfigError(
            f"{place}: {key}: cannot read {value!r}",
            remedy=f"write ${{ID.NAME}}, as in {next(iter(known), '${clean.cleaned}')}",
        )
    if value not in known:
        raise _nothing_makes(value, known, ids, f"{place}: {key}")
    found = known[value]
    if found.kind not in takes.kinds:
        raise ConfigError(
            f"{place}: {key}: {value} is of kind {found.kind}, and {' or '.join(takes.kinds)} is asked for",
            remedy=f"name another artefact: {', '.join(m.reference for m in known.values() if m.kind in takes.kinds)}"
            if any(made.kind in takes.kinds for made in known.values())
            else f"put a stage before this one that makes something of kind {' or '.join(takes.kinds)}, or give a path",
        )
    return found


def _nothing_makes(value: str, known: Mapping[str, Made], ids: Mapping[str, bool], where: str) -> ConfigError:
    id = value[2:].partition(".")[0]
    near = difflib.get_close_matches(value, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    advice = "" if id in ids else ": give an earlier stage an id, or list models under models"
    there = ", ".join(known) or f"none{advice}"
    remedy = f"there is {there}"
    if ids.get(id) is False:
        hint, remedy = (
            f", and the stage {id} does not come before it",
            f"put this stage after {id}, or name one that comes before",
        )
    elif id in ids and not any(made.startswith(f"${{{id}.") for made in known):
        hint = f", and the stage {id} makes nothing"
    return ConfigError(f"{where}: nothing before this stage makes {value}{hint}", remedy=remedy)


def inherit(config: StageConfig, known: Mapping[str, Made]) -> StageConfig:
    """The configuration with what it left out taken from the last stage that made such a thing."""
    changes: dict[str, Any] = {}
    for key, takes in config.takes().items():
        made = [one for one in known.values() if one.kind in takes.kinds]
        if takes.inherits and getattr(config, key) is None and made:
            changes[key] = made[-1].reference
    return config.model_copy(update=changes) if changes else config
