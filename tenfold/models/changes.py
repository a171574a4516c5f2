"""What tenfold did to a model and keeps in its configuration: done again when a folder is opened, told of in adapters.

The functions that do it lie in later rooms, so they are known by name alone.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tenfold.errors import ModelError

FINISHERS = {"tenfold_span": "tenfold.attend.masformer.native:restore"}
"""Fields of a saved configuration that ask for something once the model is loaded, and what does it: a function of the
model."""

COMPRESSED = {"losparse": "tenfold.compress.losparse.saving"}
"""Methods (``quantization_config.quant_method``) of models whose layers hold fewer numbers, all of which can be
trained; and a module that lets transformers open their files once it is imported. Its function ``restructure`` gives
a model without weights such layers, ``absorb`` adds the adapters of a PEFT model into them, ``settle`` measures in
which form each is fastest."""

_NOTE = """

> **This adapter needs tenfold.** It was trained on a model that was changed (`{fields}` in `adapter_config.json`). PEFT
> alone would put it on the unchanged model, which computes something else: open it with
> `tenfold.open_model`.
"""


def changes_of(model: Any) -> dict[str, Any]:
    """The fields of `FINISHERS` that a model's configuration has.

    >>> from tenfold.models.tiny import tiny_model
    >>> changes_of(tiny_model("llama").model)
    {}
    """
    config = model.config.get_text_config(decoder=True)
    found = {field: getattr(config, field, None) for field in FINISHERS}
    return {field: value for field, value in found.items() if value is not None}


def compression(config: Any) -> str | None:
    """How the layers of a model are compressed: a method of `COMPRESSED`; None of others.

    Args:
        config: as transformers holds it, or the dictionary of ``config.json``.

    >>> compression({"quantization_config": {"quant_method": "losparse"}}), compression({})
    ('losparse', None)
    """
    entry = config.get("quantization_config") if isinstance(config, dict) else vars(config).get("quantization_config")
    method = entry.get("quant_method") if isinstance(entry, dict) else getattr(entry, "quant_method", None)
    return method if method in COMPRESSED else None


def compress_shapes(model: Any) -> None:
    """Give a model on the meta device the layers that its configuration says it has."""
    if method := compression(model.config):
        _named(f"{COMPRESSED[method]}:restructure")(model)


def absorb_adapters(model: Any) -> None:
    """Add the adapters of a PEFT model into its compressed layers, which PEFT cannot; plain layers are left to it."""
    if method := compression(model.config):
        _named(f"{COMPRESSED[method]}:absorb")(model)


def settle_layers(model: Any) -> None:
    """Before a model is written: measure how its compressed layers are fastest here, where that is not known of them.

    Saving alone does not, as it must not change what a model computes with.
    """
    if method := compression(model.config):
        _named(f"{COMPRESSED[method]}:settle")(model)


def prepare_opening(config: Any) -> None:
    """Before a model is built: import what its configuration asks for, as its attention has to be registered then."""
    if method := compression(config):
        importlib.import_module(COMPRESSED[method])
    config = config.get_text_config(decoder=True)
    for field in FINISHERS:
        if getattr(config, field, None) is not None:
            _finisher(field)


def finish_opening(model: Any) -> None:
    """Once it is loaded: do what fields of the configuration ask for."""
    for field in changes_of(model):
        _finisher(field)(model)


def finish_for(model: Any, adapter: Path) -> None:
    """Give a model the changes of the model that an adapter was trained on.

    Args:
        model: the adapter's base; one that was changed already has to have been changed alike.
        adapter: a folder that `mark` has written into, or any other adapter, for which nothing is done.

    Raises:
        ModelError: the model was changed in another way.
    """
    wanted = json.loads((adapter / "adapter_config.json").read_text())
    config = model.config.get_text_config(decoder=True)
    for field in FINISHERS:
        if wanted.get(field) is None:
            continue
        has = getattr(config, field, None)
        if has is not None and has != wanted[field]:
            raise ModelError(
                f"{adapter}: trained on a model with {field} {wanted[field]}, and this one has {has}",
                remedy="open it on the model that it was trained on",
            )
        if has is None:
            setattr(config, field, wanted[field])
            _finisher(field)(model)


def mark(folder: Path, model: Any) -> None:
    """Write into an adapter's folder what was done to the model that it was trained on.

    The configuration gets the fields, of which PEFT warns when it meets them, and the card a note.
    """
    changes = changes_of(model)
    if not changes:
        return
    path, card = folder / "adapter_config.json", folder / "README.md"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2, sort_keys=True) + "\n")
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    card.write_text(text.rstrip() + _NOTE.format(fields=", ".join(changes)), encoding="utf-8")


def is_marked(folder: Path) -> bool:
    """Whether a saved model or adapter is only what it is with tenfold.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "config.json").write_text('{"text_config": {"tenfold_span": {}}}')
    ...     is_marked(Path(folder))
    True
    """
    files = [folder / name for name in ("adapter_config.json", "config.json")]
    found = [json.loads(path.read_text()) for path in files if path.is_file()]
    parts = [part for config in found for part in (config, *config.values()) if isinstance(part, dict)]
    return any(part.get(field) is not None for part in parts for field in FINISHERS)


def is_compressed(folder: Path) -> bool:
    """Whether a saved model has compressed layers, or a saved adapter stands on such a model.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "config.json").write_text('{"quantization_config": {"quant_method": "losparse"}}')
    ...     is_compressed(Path(folder))
    True
    """
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        folder = Path(str(json.loads(adapter.read_text()).get("base_model_name_or_path") or folder))
    path = folder / "config.json"
    return path.is_file() and compression(json.loads(path.read_text())) is not None


@contextmanager
def unwarned() -> Iterator[None]:
    """Without PEFT's warning of the fields that `mark` wrote, for those who heed them."""
    with warnings.catch_warnings():
        for field in FINISHERS:
            warnings.filterwarnings("ignore", message=rf"Unexpected keyword arguments \['{field}'\]")
        yield


def _finisher(field: str) -> Any:
    return _named(FINISHERS[field])


def _named(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
