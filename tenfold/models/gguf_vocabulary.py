"""A tokenizer as the metadata of a GGUF file: from the file that it was read from, else from the tokenizer itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tenfold.errors import ModelError
from tenfold.models.embedded import demo_file
from tenfold.models.folders import read_record
from tenfold.models.gguf import gguf_sha256, source_of
from tenfold.models.gguf_entries import Entry, entries, entries_of

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""What llama.cpp takes a token for (``tokenizer.ggml.token_type``)."""

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE = {
    ("bytes of words",): "gpt-2",
    ("digits", "bytes of words"): "smollm",
    (rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}", "bytes"): "smaug-bpe",
    (rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}", "bytes", "whole words first"): "llama-bpe",
    (rf"{_WORDS}|\p{{N}}|{_REST}", "bytes"): "qwen2",
}
"""How text is split before merging -> llama.cpp's name for it."""

_NOT_CARRIED = ("general.architecture", "general.file_type", "general.quantization_version", "general.alignment")


def vocabulary_entries(tokenizer: Any, rows: int, ends: int | list[int] | None = None) -> list[Entry]:
    """The keys of a tokenizer, ``tokenizer.*``.

    Args:
        tokenizer: a fast one. If it was read from a GGUF file that is still there, that file's own keys are taken.
        rows: of the embedding; ids without a token get a placeholder.
        ends: tokens that end an answer, as in a generation configuration.

    Raises:
        ModelError: a kind of tokenizer that llama.cpp cannot be told of, naming what stands in the way.
    """
    given = _from_source(tokenizer, rows)
    if given is None:
        given = entries(_ids(tokenizer, ends) | _pieces(tokenizer, rows), "tokenizer.ggml.")
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return given + (entries({"tokenizer.chat_template": template}) if template else [])


def general_entries(model: Any) -> list[Entry]:
    """Name, licence and the like of the file that a model was read from; nothing of others."""
    file = _file_of(str(model.name_or_path))
    if file is None:
        return []
    return [one for one in entries_of(file, "general.") if one.key not in _NOT_CARRIED]


def _file_of(folder: str) -> Path | None:
    """The GGUF file that a folder was converted from, where it is still the same."""
    source = source_of(folder) if folder else None
    if source is None:
        return None
    file = demo_file() if source == "demo" else Path(source)
    record = read_record(folder) or {}
    known = file is not None and file.is_file() and gguf_sha256(file) == record.get("gguf_sha256")
    return file if known else None


def _from_source(tokenizer: Any, rows: int) -> list[Entry] | None:
    """The keys of the file that the tokenizer came from, unless its tokens were changed since."""
    file = _file_of(str(getattr(tokenizer, "name_or_path", "") or ""))
    if file is None:
        return None
    found = [one for one in entries_of(file, "tokenizer.") if not one.key.startswith("tokenizer.chat_template")]
    tokens: list[str] = next((one.value for one in found if one.key == "tokenizer.ggml.tokens"), [])
    if len(tokens) != rows:
        return None
    now = tokenizer.convert_ids_to_tokens(list(range(min(rows, len(tokenizer)))))
    # the reader spells tokens of spaces, and those outside a byte alphabet, in another way, and may add one
    same = sum(a == b for a, b in zip(now, tokens, strict=False)) >= 0.99 * len(now)
    added = all(tokens[index] == token for token, index in tokenizer.get_added_vocab().items() if index < rows)
    return found if same and added else None


def _ids(tokenizer: Any, ends: int | list[int] | None) -> dict[str, Any]:
    """The tokens that play a part, and whether texts begin or end with one."""
    named = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    ids = {f"{key}_token_id": getattr(tokenizer, f"{name}_token_id") for key, name in named.items()}
    more = [token for token in (ends if isinstance(ends, list) else []) if token != tokenizer.eos_token_id]
    ids["eot_token_id"] = more[0] if more else None
    text = tokenizer("a")["input_ids"]
    found: dict[str, Any] = {key: int(value) for key, value in ids.items() if value is not None}
    found["add_bos_token"] = bool(text) and text[0] == tokenizer.bos_token_id
    found["add_eos_token"] = bool(text) and text[-1] == tokenizer.eos_token_id
    return found


def _pieces(tokenizer: Any, rows: int) -> dict[str, Any]:
    """Tokens, what each is, how they merge, and how text is split before."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError(f"{type(tokenizer).__name__} is not a fast tokenizer", remedy="open it with use_fast=True")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise ModelError(
            f"GGUF files of tokenizers of type {model['type']} cannot be written", remedy="use a BPE tokenizer"
        )
    tokens: list[str | None] = tokenizer.convert_ids_to_tokens(list(range(min(rows, len(tokenizer)))))
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens, the embedding {rows} rows", remedy="resize_token_embeddings"
        )
    added = {index: CONTROL if one.special else USER_DEFINED for index, one in tokenizer.added_tokens_decoder.items()}
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    spelled = [*(token for token in tokens), *[None] * (rows - len(tokens))]
    named = [f"[PAD{index}]" if token is None else token for index, token in enumerate(spelled)]
    types = [UNUSED if token is None else added.get(index, NORMAL) for index, token in enumerate(spelled)]
    common = {"tokens": named, "merges": merges}
    steps = _steps(backend, bool(merges))
    if steps is not None:
        return {"model": "gpt2", "pre": steps, **common, "token_type": types}
    return {"model": "llama", "pre": "default", **common, **_scored(backend, named, types, added)}


def _steps(backend: dict[str, Any], merging: bool) -> str | None:
    """llama.cpp's name for how a byte-level tokenizer splits; None of other tokenizers."""
    outer = backend["pre_tokenizer"] or {"type": "none"}
    parts = outer["pretokenizers"] if outer["type"] == "Sequence" else [outer]
    if not any(part["type"] == "ByteLevel" for part in parts):
        return None
    said = []
    for part in parts:
        if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
            said.append(part["pattern"].get("Regex", ""))
        elif part["type"] == "Digits" and part["individual_digits"]:
            said.append("digits")
        elif part["type"] == "ByteLevel" and not part["add_prefix_space"]:
            said.append("bytes of words" if part["use_regex"] else "bytes")
        else:
            said.append(part["type"])
    if backend["model"].get("ignore_merges"):
        said.append("whole words first")
    normalizer = (backend["normalizer"] or {"type": "NFC"})["type"]  # which llama.cpp's converter passes over as well
    if said == ["bytes"] and not merging:
        return "gpt-2"  # where nothing merges, it does not matter where text is cut
    if normalizer != "NFC" or tuple(said) not in PRE:
        raise ModelError(
            f"llama.cpp has no known name for how this tokenizer splits: {normalizer}, {said}",
            remedy="give a model whose tokenizer is that of GPT-2, SmolLM, Llama 3 or Qwen",
        )
    return PRE[tuple(said)]


def _scored(backend: dict[str, Any], tokens: list[str], types: list[int], added: dict[int, int]) -> dict[str, Any]:
    """SentencePiece's shape: each token has a score, and the neighbours whose union scores best merge."""
    model = backend["model"]
    ids = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(one.split(" ")) if isinstance(one, str) else tuple(one) for one in model["merges"]]
    order = list(dict.fromkeys(left + right for left, right in pairs))
    rank = {token: place for place, token in enumerate(order)}
    made = [rank[left + right] for left, right in pairs]
    plain = {token for token in ids if not _is_byte(token) and ids[token] not in added}
    every = {
        (token[:cut], token[cut:])
        for token in plain
        for cut in range(1, len(token))
        if {token[:cut], token[cut:]} <= plain
    }
    if not model.get("byte_fallback") or made != sorted(made) or not every <= set(pairs):
        raise ModelError(
            "this tokenizer merges in an order that llama.cpp's scores cannot say",
            remedy="give the GGUF file of this model as its source, or a byte-level tokenizer",
        )
    kinds = [BYTE if kind == NORMAL and _is_byte(token) else kind for token, kind in zip(tokens, types, strict=True)]
    if model.get("unk_token") in ids:
        kinds[ids[model["unk_token"]]] = UNKNOWN
    before = json.dumps([backend["normalizer"], backend["pre_tokenizer"]])
    # with a prefix, llama.cpp puts a word mark after each special token too, as Llama 2 does
    return {
        "scores": [-float(rank.get(token, len(order))) for token in tokens],
        "token_type": kinds,
        "add_space_prefix": '"Prepend"' in before or '"first"' in before or '"always"' in before,
    }


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
