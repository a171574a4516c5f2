"""YAML as people write it: a key stands once, and ``1e-3`` is a number."""

from __future__ import annotations

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice, of which the first would be lost, and reads the numbers of YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key!r} is given twice", problem_mark=node.value[index][0].start_mark
                )
        return super().construct_mapping(node, deep)


def _power_of_ten(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
    """``1e6`` counts something and is whole; ``1e-3`` is not."""
    value = float(node.value)
    return int(value) if value.is_integer() else value


# YAML 1.1, which PyYAML reads, wants a point and a sign: `1e-3` is text to it, and only `1.0e-3` a number.
_EXPONENT = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+\Z")


class _Dumper(yaml.SafeDumper):
    """Puts quotes around texts that `_Loader` would take for numbers."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("!exponent", _EXPONENT, list("-+.0123456789"))
_Loader.add_constructor("!exponent", _power_of_ten)


def read_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: malformed, or a mapping with one key twice.

    >>> read_yaml("{learning_rate: 1e-3, tokens: 1e6, packing: no}")
    {'learning_rate': 0.001, 'tokens': 1000000, 'packing': False}
    """
    return yaml.load(text, _Loader)


def write_yaml(value: Any) -> str:
    """A value as YAML that `read_yaml` reads back.

    >>> read_yaml(write_yaml({"prompts": ["1e3", "no"], "learning_rate": 1e-5}))
    {'prompts': ['1e3', 'no'], 'learning_rate': 1e-05}
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
