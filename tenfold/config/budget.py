"""``budget``: one word for what may be spent, whatever the resource.

``0.4%`` (a share), ``300k`` (a count), ``64MiB`` (bytes), ``200ms`` (seconds), ``4.5bits`` (per element),
``9KiB/token`` (bytes per token). Each configuration says which it takes, and of what.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator

Unit = Literal["share", "count", "bytes", "seconds", "bits", "bytes/token"]

PARAMETER_BYTES = 4
"""Of a parameter of an adapter (float32)."""
_BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 10**3, "MB": 10**6, "GB": 10**9}
_COUNT = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
_PATTERN = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z%/]*)\s*")


@dataclass(frozen=True)
class Budget:
    """An amount and its unit: a share is in [0, 1], durations are in seconds, sizes in bytes."""

    amount: float
    unit: Unit


_FORMS: dict[Unit, str] = {
    "share": "50% (at most 100%)",
    "count": "300k",
    "bytes": "64MiB",
    "seconds": "200ms",
    "bits": "4.5bits",
    "bytes/token": "9KiB/token",
}
_WORDS: dict[Unit, str] = {
    "share": "a share",
    "count": "a count",
    "bytes": "a number of bytes",
    "seconds": "a time",
    "bits": "bits for each number",
    "bytes/token": "bytes for each token",
}
SIZES: tuple[Unit, ...] = ("share", "count", "bytes")
"""Of what is made of numbers."""


def parse_budget(text: str, units: Sequence[Unit] = get_args(Unit)) -> Budget:
    """Read a budget as users write it.

    Args:
        text: an amount and the short form of a unit.
        units: that the caller takes.

    Raises:
        ValueError: saying which forms these have.

    >>> parse_budget("0.4%")
    Budget(amount=0.004, unit='share')
    >>> parse_budget("300k")
    Budget(amount=300000.0, unit='count')
    >>> parse_budget("64MiB").amount == 64 * 2**20
    True
    >>> parse_budget("0.25")
    Traceback (most recent call last):
    ...
    ValueError: '0.25' counts something and is not whole; for a share write 25%
    >>> parse_budget("64KB", units=["bytes"])
    Traceback (most recent call last):
    ...
    ValueError: '64KB' cannot be read as a budget: write 64KiB (1 KiB is 1,024 bytes) or 64kB (1 kB is 1,000 bytes)
    """
    budget = _read(text, units)
    if budget.unit not in units:
        raise ValueError(f"{text!r} is {_WORDS[budget.unit]}, which does not fit here: write {_forms(units)}")
    return budget


def _read(text: str, units: Sequence[Unit]) -> Budget:
    forms = _forms(units)
    match = _PATTERN.fullmatch(text)
    if match:
        amount, suffix = float(match[1]), match[2]
        if suffix == "%" and amount <= 100:
            return Budget(amount / 100, "share")
        if suffix in _COUNT:
            count = amount * _COUNT[suffix]
            if abs(count - round(count)) > 1e-6 * count:  # 1.1k is 1100, whatever binary fractions make of it
                share = f"; for a share write {amount * 100:g}%" if count < 1 and "share" in units else ""
                raise ValueError(f"{text!r} counts something and is not whole{share}")
            return Budget(float(round(count)), "count")
        if suffix in _BYTES:
            return Budget(amount * _BYTES[suffix], "bytes")
        if suffix.removesuffix("/token") in _BYTES:
            return Budget(amount * _BYTES[suffix.removesuffix("/token")], "bytes/token")
        if suffix in ("ms", "s"):
            return Budget(amount / 1000 if suffix == "ms" else amount, "seconds")
        if suffix in ("bit", "bits"):
            return Budget(amount, "bits")
        short, per = suffix.removesuffix("/token"), "/token" if suffix.endswith("/token") else ""
        meant = [name for name in _BYTES if name.lower().replace("i", "") == short.lower().replace("i", "")]
        if meant and f"bytes{per}" in units:  # 64KB, 64mb
            forms = _listed([f"{match[1]}{name}{per} (1 {name} is {_BYTES[name]:,} bytes)" for name in meant])
    raise ValueError(f"{text!r} cannot be read as a budget: write {forms}")


def adapter_budget(text: str) -> Budget:
    """A budget of trainable parameters: a share, a count, or bytes of the adapter.

    Raises:
        ValueError: another unit, or nothing at all.

    >>> adapter_budget("2MiB").unit
    'bytes'
    """
    budget = parse_budget(text)
    if budget.unit not in ("share", "count", "bytes"):
        raise ValueError(f"budget: an adapter spends parameters or bytes, not {budget.unit}: write 0.4%, 300k or 2MiB")
    if budget.amount <= 0:
        raise ValueError(f"budget: {text!r} buys nothing: write 0.4%, 300k or 2MiB")
    return budget


def trainable_parameters(text: str, model_parameters: int) -> float:
    """How many parameters a budget of an adapter pays for; one takes four bytes (float32).

    Args:
        text: the budget.
        model_parameters: of the whole model; what a share is a share of.

    Raises:
        ValueError: as `adapter_budget`.

    >>> trainable_parameters("2%", 1000), trainable_parameters("3k", 1000), trainable_parameters("1KiB", 1000)
    (20.0, 3000.0, 256.0)
    """
    budget = adapter_budget(text)
    each = {"share": model_parameters, "count": 1, "bytes": 1 / PARAMETER_BYTES}
    return budget.amount * each[budget.unit]


def _check(value: object, units: Sequence[Unit] = get_args(Unit)) -> str:
    text = str(value)
    parse_budget(text, units)
    return text


def _forms(units: Sequence[Unit]) -> str:
    return _listed([_FORMS[unit] for unit in units])


def _listed(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


WeightBudget = Annotated[str, BeforeValidator(partial(_check, units=SIZES))]
"""A field type: the text as written, known to be a share, a count or bytes."""
LayerBudget = Annotated[str, BeforeValidator(partial(_check, units=("share", "count")))]
"""The same of layers or heads: a share or a count."""
CacheBudget = Annotated[str, BeforeValidator(partial(_check, units=("bits", "bytes/token")))]
"""The same of a cache: bits of an element, or bytes of a token."""
ShareBudget = Annotated[str, BeforeValidator(partial(_check, units=("share",)))]
"""The same of a share alone."""

FileBudget = Annotated[str, BeforeValidator(partial(_check, units=("bytes", "bits")))]
"""Of a file: bytes, or bits for each of its numbers."""
