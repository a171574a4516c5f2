"""The tokenizer that lies beside an adapter, and an embedding that has a row for each of its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tenfold.errors import ModelError
from tenfold.models.source import read_json

_PREFIX = "base_model.model."
_TOKENIZER = ("tokenizer_config.json", "tokenizer.json")
_TEMPLATE = "chat_template.jinja"


def adapter_tokenizer(folder: Path, tokenizer: Any, config: Any, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer that an adapter was trained with: the one in its folder, else the one given.

    Args:
        folder: of the adapter.
        tokenizer: of what it is attached to. A folder with a chat template alone gives it that template.
        config: of the base, which says what kind of tokenizer it is where the folder does not.
        trust_remote_code: run Python code that comes with the tokenizer.

    Raises:
        ModelError: there is one and it cannot be read.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _TOKENIZER):
        if (folder / _TEMPLATE).is_file():
            tokenizer.chat_template = (folder / _TEMPLATE).read_text(encoding="utf-8")
        return tokenizer
    try:
        return AutoTokenizer.from_pretrained(str(folder), config=config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{folder}: its tokenizer cannot be read: {reason}", remedy="save the tokenizer into the folder again"
        ) from error


def check_embedding(model: Any, tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer whose ordinary tokens, or those that fill and end texts, have no row in the embedding.

    Added tokens without a row are left alone: some tokenizers have such, and no text of theirs.

    Args:
        model: a ``transformers`` model, with or without adapters.
        tokenizer: its tokenizer.
        name: the model, as the error should call it.

    Raises:
        ModelError: naming both numbers, or the token.
    """
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if weight is None or weight.ndim != 2:
        return
    rows = weight.shape[0]
    remedy = "take the tokenizer that the model was trained with, or give the model more rows: "
    remedy += "model.resize_token_embeddings(len(tokenizer)), then save_pretrained"
    if tokenizer.vocab_size > rows:
        raise ModelError(
            f"{name}: its tokenizer has {tokenizer.vocab_size} tokens, and its embedding has rows for {rows}", remedy
        )
    for role in ("pad", "eos", "bos"):
        token = getattr(tokenizer, f"{role}_token_id", None)
        if token is not None and token >= rows:
            raise ModelError(f"{name}: its {role}_token has the number {token}, and its embedding {rows} rows", remedy)


def fit_embedding(model: Any, tokenizer: Any, folder: Path) -> str | None:
    """Give the model as many embedding rows as the adapter was trained with, before it is attached.

    As many as lie in the adapter's folder; else as many as its tokenizer has tokens, where that is more than there
    are. New rows are the mean of the old ones, around which ``transformers`` draws them, until those of the adapter
    take their place.

    Args:
        model: a ``transformers`` model without adapters; changed in place.
        tokenizer: the adapter's.
        folder: of the adapter.

    Returns:
        A sentence where new rows are stored nowhere, so that they are not those of the training.
    """
    layers = {"input embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    where = {id(module): name for name, module in model.named_modules()}
    names = {role: where[id(layer)] for role, layer in layers.items() if layer is not None}
    shared = "head" in names and layers["head"].weight is layers["input embedding"].weight
    before = layers["input embedding"].weight.shape[0]
    stored = _stored_rows(folder)
    found = [rows for name in names.values() for rows in stored.get(name, {}).values()]
    rows = max(found, default=max(before, len(tokenizer)))
    if rows != before:
        _resize(model, rows)
    new = set(range(before, min(rows, len(tokenizer))))
    known = _known_rows(folder, names, {name for name in stored if "weight" in stored[name]}, new, shared)
    lacking = [role for role in names if not new <= known[role]]
    if not lacking:
        return None
    tokens = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(new)[:3]))) + (", ..." if len(new) > 3 else "")
    return (
        f"{folder}: its tokenizer adds {len(new)} tokens to the base ({tokens}), and the adapter holds no rows of the "
        f"{' and '.join(lacking)} for them. They are the mean of the other rows, as when tokens are added: if the "
        "training had other rows, the model answers differently where these tokens stand."
    )


def _resize(model: Any, rows: int) -> None:
    before = model.get_input_embeddings().weight.shape[0]
    with torch.random.fork_rng(devices=[]):
        model.resize_token_embeddings(rows, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None and rows > before:
            layer.weight.data[before:] = layer.weight.data[:before].float().mean(dim=0).to(layer.weight.dtype)


def _stored_rows(folder: Path) -> dict[str, dict[str, int]]:
    """For each module of which the adapter holds something: ``weight`` or ``low rank`` -> the rows that tells of.

    Only headers are read.
    """
    found: dict[str, dict[str, int]] = {}
    for key, shape in _shapes(folder).items():
        name = key.removeprefix(_PREFIX)
        for ending in (".base_layer.weight", ".modules_to_save.weight", ".weight"):
            if name.endswith(ending) and "lora_" not in name:
                found.setdefault(name.removesuffix(ending), {})["weight"] = shape[0]
                break
        if name.endswith(".lora_embedding_A"):
            found.setdefault(name.removesuffix(".lora_embedding_A"), {})["low rank"] = shape[1]
        elif name.endswith(".lora_B.weight"):
            found.setdefault(name.removesuffix(".lora_B.weight"), {})["low rank"] = shape[0]
    return found


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    file = folder / "adapter_model.safetensors"
    if file.is_file():
        with safe_open(str(file), framework="pt") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    file = folder / "adapter_model.bin"
    if not file.is_file():
        return {}
    loaded = torch.load(file, map_location="meta", weights_only=True)
    return {key: tuple(tensor.shape) for key, tensor in loaded.items()}


def _known_rows(
    folder: Path, names: dict[str, str], whole: set[str], new: set[int], shared: bool
) -> dict[str, set[int]]:
    """Of each layer by its role, the new tokens whose rows the adapter holds: all, or those trained one by one.

    PEFT's ``trainable_token_indices``, and its TrainableTokens; a bare list is of the input embedding.
    """
    config = read_json(folder / "adapter_config.json")
    given = config.get("trainable_token_indices") or config.get("token_indices") or {}
    by_module = given if isinstance(given, dict) else {names["input embedding"]: given}
    single = {name.split(".")[-1]: set(tokens) for name, tokens in by_module.items()}
    known = {role: new if name in whole else single.get(name.split(".")[-1], set()) for role, name in names.items()}
    copied = {name.split(".")[-1] for name in names.values()} & set(config.get("modules_to_save") or ())
    if shared and not copied:  # what is known of one is so of the other
        known = dict.fromkeys(names, set().union(*known.values()))
    return known
