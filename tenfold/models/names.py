"""What a name that opens nothing was probably meant to be; answered from here, before any hub is asked."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from os.path import expanduser  # Path.expanduser raises where there is no such user
from pathlib import Path

from tenfold.data.sources import FILE_SUFFIXES
from tenfold.errors import ModelError

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # ./name and ../name are paths
_OLD_HUB_ID = re.compile(
    r"(albert|bert|camembert|ctrl|distil[a-z]+2?|gpt2|openai-gpt|roberta|t5|transfo-xl|xlm|xlnet)(-[\w.-]+)?"
)
"""Models of the hub's first years, which have no owner in their name."""
_GIVE = "give demo, tiny:<kind>, a folder, a .gguf file or a hub id (owner/name)"


def is_hub_id(source: str) -> bool:
    """Whether a name that is neither a file nor a folder here can be meant for the hub.

    Names of the form ``owner/name`` are, unless they look like a path with a slip: the folder ``owner`` is here, and
    one in it has nearly that name, with the same digits (so ``Qwen/Qwen3-4B`` is not mistaken for a local
    ``Qwen/Qwen3-8B``).

    >>> is_hub_id("Qwen/Qwen3-0.6B"), is_hub_id("gpt2"), is_hub_id("demmo"), is_hub_id("tinny:llama")
    (True, True, False, False)
    """
    if not _HUB_ID.fullmatch(source):
        return _OLD_HUB_ID.fullmatch(source) is not None
    path = Path(source)
    slips = [name for name in _entries(path.parent) if _digits(name) == _digits(path.name)]
    return not difflib.get_close_matches(path.name, slips, n=1, cutoff=0.8)


def no_such(source: str, known: Iterable[str]) -> ModelError:
    """The error for a source that is neither here nor on the hub, with the nearest name or path that is.

    Args:
        source: as the user gave it.
        known: names that are not paths.

    >>> print(no_such("demmo", ["demo", "tiny:llama"]).problem)
    unknown model 'demmo'; nearest: demo
    """
    if "://" in source:
        return ModelError(f"{source!r}: an address, not a model", remedy="give the hub id alone: owner/name")
    if "/" in source or source.startswith("~") or source.endswith(".gguf"):
        near = _nearest_path(Path(expanduser(source)))
        hint = f"; nearest: {near}" if near else ""
        return ModelError(f"{source!r}: no such folder or file{hint}", remedy="check the path")
    names = [*known, *_entries(Path())]
    found = difflib.get_close_matches(source, names, n=1, cutoff=0.6)
    hint = f"; nearest: {found[0]}" if found else ""
    return ModelError(f"unknown model {source!r}{hint}", remedy=_GIVE)


def refuse_data(source: str) -> None:
    """Say of a file of rows that stands where a model belongs, where it belongs.

    Args:
        source: as the user gave it; the file need not exist.

    Raises:
        ModelError: its name ends as those of files of rows do.

    >>> refuse_data("models/mine"), refuse_data("adapter/adapter_config.json")
    (None, None)
    >>> refuse_data("rows/my.jsonl")
    Traceback (most recent call last):
    ...
    tenfold.errors.ModelError: 'rows/my.jsonl': a file of data, not a model
      -> name the model first and the file as data: demo --data rows/my.jsonl (`model: demo` and `data:` in a recipe)
    """
    path = Path(source)
    name = path.name.lower().removesuffix(".gz")
    of_models = name.endswith(("config.json", "index.json", "tokenizer.json"))
    if name.endswith(FILE_SUFFIXES) and not of_models and not path.is_dir():
        raise ModelError(
            f"{source!r}: a file of data, not a model",
            remedy=f"name the model first and the file as data: demo --data {source} (`model: demo` and `data:` in a "
            "recipe)",
        )


def _nearest_path(path: Path) -> Path | None:
    """The path with its first wrong part put right, as far as it then exists."""
    wrong = next(part for part in (*reversed(path.parents), path) if not part.exists())
    # An ending that both have makes no two names alike.
    ending = ".gguf" if wrong.name.endswith(".gguf") else ""
    names = {name.removesuffix(".gguf"): name for name in _entries(wrong.parent) if name.endswith(ending)}
    found = difflib.get_close_matches(wrong.name.removesuffix(".gguf"), names, n=1, cutoff=0.6)
    if not found:
        return None
    near = wrong.parent / names[found[0]]
    whole = near / path.relative_to(wrong)
    return whole if whole.exists() else near


def _entries(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError:
        return []


def _digits(name: str) -> list[str]:
    return re.findall(r"\d", name)
