"""Wrong flags in our own words: what was found, and the nearest flag that there is."""

from __future__ import annotations

import difflib
import io
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, NoReturn

from tenfold.config.base import Config
from tenfold.config.reading import read_yaml
from tenfold.errors import ConfigError, TenfoldError

FREE_TEXT = {"generate": "--prompts", "steer": "--prompts", "run": "--set", "validate": "--set", "estimate": "--set"}
"""Verb -> the flag that a word without one was probably meant for; of all others it is the data."""


def flags_of(classes: Iterable[type[Config]], group: str = "") -> dict[str, tuple[str, type[Config]]]:
    """By flag its key and the class that has it.

    >>> from tenfold.config.r3m import RobustFields
    >>> list(flags_of([RobustFields]))
    ['--loss', '--lam', '--budget', '--paper.smoothing', '--paper.lam-warmup']
    """
    found: dict[str, tuple[str, type[Config]]] = {}
    for cls in classes:
        for key in cls.model_fields:
            if key in cls.groups():
                found |= flags_of([cls.groups()[key]], f"{key}.")
            elif key != "model":
                found[f"--{group}{key.replace('_', '-')}"] = (key, cls)
    return found


def with_flags(error: TenfoldError, where: str, place: str, cls: type[Config], group: str = "") -> TenfoldError:
    """The error in the words of the command line: a verb and its flags in place of a stage and its keys.

    Args:
        error: what is wrong, with keys in front of problems and remedies.
        where: what stands in front of its problems.
        place: what is to stand there.
        cls: the configuration that has the keys.
        group: of the keys, with its dot.

    >>> from tenfold.config.lora import LoraConfig
    >>> print(with_flags(ConfigError("01-lora: max_length: too long"), "01-lora", "tenfold adapt", LoraConfig))
    tenfold adapt: --max-length: too long
    """
    key = re.compile(rf"^( *)({'|'.join(cls.model_fields)})(?=: )", re.M)

    def flagged(text: str) -> str:
        return key.sub(lambda found: f"{found[1]}--{group}{found[2].replace('_', '-')}", text)

    said = []
    for line in error.problem.splitlines():
        rest = line.removeprefix(f"{where}: ")
        named = flagged(rest)
        said.append(line if rest == line else f"{place}: {named if named != rest else group + rest}")
    return type(error)("\n".join(said), error.remedy and flagged(error.remedy))


@contextmanager
def in_our_words(
    verb: str, arguments: Sequence[str], classes: Iterable[type[Config]], example: str, elsewhere: Mapping[str, str]
) -> Iterator[None]:
    """While the block runs, what tyro refuses becomes a `ConfigError` of two lines instead of tyro's box.

    tyro 1.0.17 offers a hook for it under a private name; a version without that hook shows its box.

    Args:
        verb: the verb whose flags are read.
        arguments: what follows it.
        classes: the configurations whose fields are flags.
        example: a command that works.
        elsewhere: flag -> where it belongs, of flags that this method does not have.

    Raises:
        ConfigError: from within the block.
    """
    try:
        from tyro._errors import on_parse_error
    except ImportError:
        yield
        return
    fields = flags_of(classes)

    def refuse(event: Any) -> None:
        kind = type(event).__name__
        if kind == "UnrecognizedArgs":
            _refuse_switch(verb, event.tokens[0], arguments, fields)
            _unrecognised(verb, event.tokens[0], [*fields, *_switched_off(fields), "--out"], elsewhere, example)
        if kind == "MissingArgs":
            names = ", ".join(found.arg.lowered.name_or_flags[-1].upper() for found in event.missing_arguments)
            raise ConfigError(f"tenfold {verb}: {names} is missing", remedy=f"write it as in: {example}")
        argument = getattr(event, "argument", None)
        if argument is None:
            return
        flag = argument.lowered.name_or_flags[-1]
        if kind == "InvalidChoice":
            choices = sorted(set(event.choices) - {"None"}, key=_order(flag, fields))  # None is no flag at all
            near = difflib.get_close_matches(event.value, choices, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            _refuse(verb, f"{flag}: must be one of {', '.join(choices)}, got {event.value!r}{hint}")
        if kind == "BadValue":
            _refuse(verb, f"{flag}: a value is asked for behind it")
        values = _values(flag, arguments)
        if flag in fields:
            key, cls = fields[flag]
            kinds = str(cls.model_fields[key].annotation)
            if kinds == "dict[str, str]":
                _refuse(
                    verb,
                    f"{flag}: must be ours and yours in turn, as in {flag} prompt question, got {' '.join(values)!r}",
                )
            given = [_read(value) for value in values]
            many = "tuple" in kinds
            try:
                cls.parse({key: given if many or len(given) != 1 else given[0]}, f"tenfold {verb}")
            except ConfigError as error:
                raise ConfigError(error.problem.replace(f": {key}", f": {flag}", 1), error.remedy) from None
            if "int" in kinds:  # `1e3` counts in a recipe, and tyro asks for digits
                _refuse(verb, f"{flag}: digits are asked for, got {' '.join(values)!r}")
        _refuse(verb, f"{flag}: cannot be read from {' '.join(values)!r}")

    with on_parse_error(refuse):
        yield


def _order(flag: str, fields: Mapping[str, tuple[str, type[Config]]]) -> Callable[[str], int]:
    """The order in which the field names its choices."""
    key, cls = fields.get(flag, ("", Config))
    named = str(cls.model_fields[key].annotation) if key else ""
    return lambda choice: named.find(repr(choice))


def _refuse(verb: str, problem: str) -> NoReturn:
    raise ConfigError(f"tenfold {verb}: {problem}", remedy=f"tenfold {verb} --help shows the flags")


def _unrecognised(verb: str, token: str, flags: Sequence[str], elsewhere: Mapping[str, str], example: str) -> NoReturn:
    if not token.startswith("-"):
        _refuse_word(verb, token, example)
    name = token.partition("=")[0].replace("_", "-")
    if name == "--model":
        raise ConfigError(f"tenfold {verb}: the model has no flag, it comes first", remedy=f"write it as in: {example}")
    short = {f"--{flag.rpartition('.')[2]}": flag for flag in flags if "." in flag}
    near = difflib.get_close_matches(name, [*flags, *short], n=1)
    near = [short.get(flag, flag) for flag in near]
    if name in elsewhere:
        raise ConfigError(f"tenfold {verb}: {name} belongs to {elsewhere[name]}", remedy=f"{elsewhere[name]} --help")
    _refuse(verb, f"unknown flag {token}{f'; did you mean {near[0]}?' if near else ''}")


def _refuse_switch(
    verb: str, token: str, arguments: Sequence[str], fields: Mapping[str, tuple[str, type[Config]]]
) -> None:
    """A switch with a value behind it."""
    place = arguments.index(token) if token in arguments else 0
    flag = arguments[place - 1].replace("_", "-") if place else ""
    if flag in fields and f"--no-{flag.removeprefix('--')}" in _switched_off(fields):
        off = f"--no-{flag.removeprefix('--')}"
        raise ConfigError(f"tenfold {verb}: {flag} takes no value, got {token!r}", remedy=f"write {flag} or {off}")


def _refuse_word(verb: str, word: str, example: str) -> NoReturn:
    flag = FREE_TEXT.get(verb, "--data")
    raise ConfigError(
        f"tenfold {verb}: {word!r} belongs to no flag",
        remedy=f"put the flag before it, such as {flag}, and quotes around words that belong together: {example}",
    )


def _switched_off(fields: Mapping[str, tuple[str, type[Config]]]) -> Iterator[str]:
    for flag, (key, cls) in fields.items():
        if cls.model_fields[key].annotation is bool:
            yield f"--no-{flag.removeprefix('--')}"


def _values(flag: str, arguments: Sequence[str]) -> list[str]:
    """What stands behind a flag on the command line."""
    names = (flag, flag.replace("-", "_").replace("__", "--", 1))
    for index, argument in enumerate(arguments):
        if argument.partition("=")[0] in names:
            if "=" in argument:
                return [argument.partition("=")[2]]
            rest = arguments[index + 1 :]
            end = next((place for place, word in enumerate(rest) if word.startswith("--")), len(rest))
            return list(rest[:end])
    return []


def _read(text: str) -> Any:
    try:
        return read_yaml(text)
    except Exception:  # not YAML, then it is text
        return text


@contextmanager
def readable_help(arguments: Sequence[str]) -> Iterator[None]:
    """While the block runs, ``--help`` is printed without what stands for "nothing given"."""
    if not {"-h", "--help"} & set(arguments):
        yield
        return
    text = io.StringIO()
    try:
        with redirect_stdout(text):
            yield
    finally:
        sys.stdout.write(without_none(text.getvalue()))


def without_none(text: str) -> str:
    """Help whose boxes keep their width.

    >>> without_none("│ --out {None}|PATH  Where. (default: None) │")
    '│ --out PATH         Where.                 │'
    >>> without_none("│ --rows {None,text}  What. │")
    '│ --rows {text}       What. │'
    >>> without_none("│ --tasks [STR]  Which. (default: ) │")
    '│ --tasks [STR]  Which.             │'
    """
    usage, blank, text = text.partition("\n\n") if text.startswith("usage:") else ("", "", text)
    text = re.sub(r"\{None\}\|(\S+)", lambda found: found[1] + " " * len("{None}|"), text)
    text = re.sub(r"\{None,(\S+)", lambda found: "{" + found[1] + " " * len("None,"), text)
    text = re.sub(
        r"\(default:(\s*(?:│\n│)?\s*)((?:None)?\))", lambda found: f"{'':9}{found[1]}{'':{len(found[2])}}", text
    )
    text = re.sub(r"\bmethod\.(\w+ options)", rf"\1{'':7}", text)  # the flags of a group
    return usage.replace("{None}|", "").replace("{None,", "{") + blank + text
