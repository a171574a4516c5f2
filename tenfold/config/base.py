"""What every configuration shares: frozen, strict, torch-free, with errors that name the key and the nearest one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from tenfold.errors import ConfigError


class Config(BaseModel):
    """A frozen configuration: unknown keys and impossible values are refused.

    The docstring under a field is its help text on the command line and in the reference.

    >>> class Example(Config):
    ...     rank: int = 8
    >>> Example.parse({"rnk": 4}, where="stage 1 (example)")
    Traceback (most recent call last):
    ...
    tenfold.errors.ConfigError: stage 1 (example): rnk: unknown key; did you mean 'rank'?
      -> valid keys: rank
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="strings")

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> Self:
        """Build the configuration from plain values.

        Args:
            values: keys and values as YAML gives them.
            where: what is being read, named in the error ("recipe.yaml, stage 2 (lora)").

        Raises:
            ConfigError: naming every wrong key and value.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise _explain(error, cls, where) from None


def _explain(error: ValidationError, cls: type[Config], where: str) -> ConfigError:
    keys = list(cls.model_fields)
    lines = []
    unknown = False
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            unknown = True
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            lines.append(f"{where}: {key}: unknown key{hint}")
        elif item["type"] == "missing":
            lines.append(f"{where}: {key}: missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            # What is wrong between keys names them itself.
            lines.append(f"{where}: {key}: {message}, got {item['input']!r}" if key else f"{where}: {message}")
    remedy = (
        f"valid keys: {', '.join(keys)}" if unknown else f"see the reference of {cls.__name__} for the valid ranges"
    )
    return ConfigError("\n".join(lines), remedy=remedy)
