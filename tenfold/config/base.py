"""What every configuration shares: frozen, strict, torch-free, with errors that name the key and the nearest one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, ErrorDetails

from tenfold.errors import ConfigError


class Record(BaseModel):
    """A frozen model without unknown keys, for what is written and read back."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="strings")


def _make_strict(part: Any) -> None:
    """Let numbers and truth values of a schema be nothing else; lists and paths still come as YAML writes them."""
    if isinstance(part, list):
        for item in part:
            _make_strict(item)
    elif isinstance(part, dict):
        if part.get("type") in ("int", "float", "bool"):
            part["strict"] = True
        if part.get("type") == "float":
            part["allow_inf_nan"] = False
        for name, inner in part.items():
            if name not in ("default", "expected", "metadata", "config", "serialization", "keys_schema"):
                _make_strict(inner)


class Config(Record):
    """A frozen configuration: unknown keys and impossible values are refused.

    Numbers are numbers and truth values are truth values: neither ``True`` nor ``"8"`` counts as 8, and no number is
    infinite or NaN. The docstring under a field is its help text on the command line and in the reference. A field that
    is a configuration itself is a group, such as ``paper``.

    >>> class Example(Config):
    ...     rank: int = 8
    >>> Example.parse({"rnk": 4}, where="stage 1 (example)")
    Traceback (most recent call last):
    ...
    tenfold.errors.ConfigError: stage 1 (example): rnk: unknown key; did you mean 'rank'?
      -> valid keys: rank
    """

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[BaseModel], handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _make_strict(schema)
        return schema

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str, beside: Sequence[str] = ()) -> Self:
        """Build the configuration from plain values.

        A key of a group may also stand beside the group: so caches in one word write it, and recipes of versions that
        had no groups.

        Args:
            values: keys and values as YAML gives them.
            where: what is being read, named in the error ("recipe.yaml, stage 2 (lora)").
            beside: keys that may stand beside these, and were taken out: an unknown key may have been meant for one.

        Raises:
            ConfigError: naming every wrong key and value.
        """
        try:
            return cls.model_validate(cls._grouped(values, where))
        except ValidationError as error:
            raise _explain(error, cls, where, beside) from None

    @classmethod
    def groups(cls) -> dict[str, type[Config]]:
        """The fields that are configurations themselves."""
        kinds = {key: field.annotation for key, field in cls.model_fields.items()}
        return {key: kind for key, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Config)}

    @classmethod
    def _grouped(cls, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The values with every key in the group that has it."""
        found = dict(values)
        for group, kind in cls.groups().items():
            beside = {key: found.pop(key) for key in kind.model_fields if key in found and key not in cls.model_fields}
            given = found.get(group, {})
            if isinstance(given, Config):
                given = given.model_dump(exclude_unset=True)
            if not beside or not isinstance(given, Mapping):
                continue
            if twice := [key for key in beside if key in given]:
                raise ConfigError(
                    f"{where}: {twice[0]} and {group}.{twice[0]} are one key", remedy=f"give {group}.{twice[0]} alone"
                )
            found[group] = {**given, **beside}
        return found


def _explain(error: ValidationError, cls: type[Config], where: str, beside: Sequence[str]) -> ConfigError:
    fields = _fields(cls)
    keys = [*beside, *fields]
    # A value that may be one of several kinds is wrong as each of them: one of these is enough to say.
    errors = {_field_of(item, cls) or item["msg"]: item for item in reversed(error.errors())}
    lines, named = [], []
    for item in reversed(errors.values()):
        key = ".".join(str(part) for part in item["loc"] if part != "[key]")
        message = _message(item, keys)
        # What is wrong between keys names them itself.
        lines.append(f"{where}: {key}: {message}" if key else f"{where}: {message}")
        named += [_field_of(item, cls)] if key else [name for name in keys if _mentions(message, name)]
    known = [name for name in dict.fromkeys(named) if name in fields]
    if not known or any(item["type"] == "extra_forbidden" for item in errors.values()):
        return ConfigError("\n".join(lines), remedy=f"valid keys: {', '.join(keys)}")
    return ConfigError("\n".join(lines), remedy="\n     ".join(_described(name, fields[name]) for name in known))


def _fields(cls: type[Config]) -> dict[str, FieldInfo]:
    """Fields by name, those of groups as ``paper.init``."""
    inner = {f"{group}.{key}": field for group, kind in cls.groups().items() for key, field in _fields(kind).items()}
    return {**cls.model_fields, **inner}


def _field_of(item: ErrorDetails, cls: type[Config]) -> str:
    """The field that an error is about; nothing of an error between fields."""
    place = [str(part) for part in item["loc"]]
    return ".".join(place[: 2 if place[:1] and place[0] in cls.groups() else 1])


def _mentions(message: str, name: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(name)}(?!\.?\w)", message.partition("\n")[0]) is not None


def _described(key: str, field: FieldInfo) -> str:
    """What a key means, from its help text."""
    text = " ".join((field.description or "").split()).replace("``", "")
    return f"{key}: {re.sub(r',? ?:math:`[^`]*`', '', text).lstrip(', ')}"


_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}
_KINDS = {
    "int": "a whole number is asked for",
    "float": "a number is asked for",
    "finite": "a finite number is asked for",
    "bool": "true or false is asked for",
    "string": "text is asked for",
    "tuple": "a list is asked for",
    "dict": "names and values are asked for, as in {name: value}",
    "model": "names and values are asked for, as in {name: value}",
    "path": "a path is asked for",
}


def _message(item: ErrorDetails, keys: list[str]) -> str:
    """A pydantic error in our words."""
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "extra_forbidden":
        names = {key.rpartition(".")[2]: key for key in reversed(keys)}
        near = difflib.get_close_matches(str(item["loc"][-1]), names, n=1)
        return f"unknown key; did you mean {names[near[0]]!r}?" if near else "unknown key"
    if kind == "missing":
        return "missing"
    if kind in _BOUNDS:
        word, bound = _BOUNDS[kind]
        return f"must be {word} {context[bound]}, got {value!r}"
    if kind == "too_short":
        return "an empty list, and at least one entry is asked for"
    if kind == "literal_error":
        near = difflib.get_close_matches(str(value), re.findall(r"'([^']*)'", context["expected"]), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"must be {context['expected']}, got {value!r}{hint}"
    asked = _KINDS.get(kind.partition("_")[0], "")
    if asked and not kind.endswith("_length"):
        example = f", such as [{value}]" if kind.startswith("tuple") and isinstance(value, str | int | float) else ""
        return f"{asked}{example}, got {value!r}{_as_yaml(value)}"
    message = item["msg"].removeprefix("Value error, ")
    return f"{message}, got {value!r}" if item["loc"] and repr(value) not in message else message


def yes_or_no(value: object) -> object:
    """A validator for the choices ``yes`` and ``no``, which YAML reads as truth values."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


def _as_yaml(value: object) -> str:
    """Where a value comes from that nobody wrote."""
    return " (YAML reads yes, on and true as True, no, off and false as False)" if isinstance(value, bool) else ""
