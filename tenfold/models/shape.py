"""The shape of a model from its configuration file; torch-free, so that `validate` can ask in no time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tenfold.config.shape import Shape, Task
from tenfold.errors import MissingDependencyError, ModelError
from tenfold.models.changes import compression
from tenfold.models.gguf import cache_dir, gguf_sha256
from tenfold.models.heads import reads_pictures
from tenfold.models.quantised import check_own
from tenfold.models.reference import ModelRef
from tenfold.models.source import Located, hub_error, read_json, resolve_source

# Of GPT-2, T5 and their kin: transformers maps these onto the common names.
_NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "num_decoder_layers", "num_layers", "n_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_attention_heads", "n_head", "num_heads"),
    "vocabulary": ("vocab_size",),
    "positions": ("max_position_embeddings", "n_positions"),
}
_GGUF = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
}


def shape_of(ref: ModelRef) -> Shape:
    """What the configuration of a model says; weights are not touched, a hub is asked for ``config.json`` alone.

    Raises:
        ModelError: no such model, or its configuration cannot be read.
        MissingDependencyError: the files hold quantised weights, and the package that reads them is absent.
        ConfigError: they do, and they are to be packed on opening.
        HubAwayError: the hub cannot be asked, which says nothing about the model.

    >>> shape_of(ModelRef("tiny:llama")).positions
    512
    """
    located, _, chain = resolve_source(ref.source, ref.adapters)
    config = _configuration(located, ref.revision)
    own = check_own(config, ref.source, packs=ref.load is not None)
    return replace(shape_from(config, ref.source, ref.task, adapted=bool(chain)), quantised=ref.load or own)


def shape_from(config: dict[str, Any], name: str, task: Task = "causal", *, adapted: bool = False) -> Shape:
    """The shape that a ``config.json`` describes.

    >>> shape_from({"model_type": "gpt2", "n_layer": 12, "n_positions": 1024}, "gpt2").positions
    1024
    """
    inner = config.get("text_config")
    values = {**config, **inner} if isinstance(inner, dict) else config
    found: dict[str, Any] = {
        key: next((_whole(values[one]) for one in names if one in values), None) for key, names in _NAMES.items()
    }
    spans = values.get("tenfold_span")
    heads = [str(one) for one in config.get("architectures") or ()]
    if task == "causal" and any("ForSequenceClassification" in one or "Reward" in one for one in heads):
        task = "reward"  # a saved one, whatever the recipe calls it
    kind, compressed = str(values.get("model_type", "")), compression(config) is not None
    return Shape(name, kind, task=task, adapted=adapted, spans=spans, compressed=compressed, **found)


def auto_class_name(ref: ModelRef) -> str | None:
    """The auto class of transformers by which one opens a model, where it is known not to be that of its task.

    Raises:
        ModelError: no such model, or its configuration cannot be read.

    >>> auto_class_name(ModelRef("tiny:llama"))
    """
    located, _, _ = resolve_source(ref.source, ref.adapters)
    try:
        kind = str(_configuration(located, ref.revision).get("model_type", ""))
    except HubAwayError:
        return None
    return "AutoModelForImageTextToText" if ref.task == "causal" and reads_pictures(kind) else None


class HubAwayError(ModelError):
    """The hub could not be asked."""


def _configuration(located: Located, revision: str | None) -> dict[str, Any]:
    if located.kind == "tiny":
        from tenfold.models.tiny import tiny_configuration

        return tiny_configuration(located.name)
    if located.kind == "gguf":
        return _of_gguf(located.path)
    if located.kind == "hub":
        return _of_hub(located.name, revision)
    return read_json(located.path / "config.json")


def _of_hub(name: str, revision: str | None) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return read_json(Path(hf_hub_download(name, "config.json", revision=revision)))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise hub_error(name, error) from error
    except Exception as error:  # huggingface_hub raises its own, httpx's and plain OS errors
        if isinstance(error, ModelError) or (
            isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        ):
            raise hub_error(name, error) from error
        reason = str(error).strip().split("\n")[0]
        raise HubAwayError(f"{name}: the hub could not be asked: {reason}", "check the connection") from error


def _of_gguf(file: Path) -> dict[str, Any]:
    """From the converted folder where there is one, else from the file's own header."""
    sha256 = gguf_sha256(file)[:12]
    for folder in sorted(cache_dir().glob(f"*-{sha256}-*/config.json")):
        return read_json(folder)
    try:
        from gguf import GGUFReader
    except ImportError:
        raise MissingDependencyError(f"{file}: reading GGUF needs the package gguf", "pip install gguf") from None
    fields = GGUFReader(file).fields
    kind = fields["general.architecture"].contents() if "general.architecture" in fields else ""
    found = {name: fields[f"{kind}.{key}"].contents() for name, key in _GGUF.items() if f"{kind}.{key}" in fields}
    return {"model_type": kind, **found}


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
