"""GGUF files: converted once into a safetensors folder that everything else opens."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tenfold.errors import MissingDependencyError, ModelError, RunError
from tenfold.models.folders import is_complete, partial_prefix, read_record, write_folder
from tenfold.models.gguf_metadata import carry_biases, carry_over, check_tensors, read_header
from tenfold.models.gguf_tokenizer import carry_tokenizer
from tenfold.models.heads import check_loaded

READER = 2
"""Counts the ways in which files were converted: what an older one left in the cache is not used again."""


def cache_dir() -> Path:
    """Where converted models are kept: ``$TENFOLD_CACHE``, else ``~/.cache/tenfold/models``.

    >>> cache_dir().is_absolute()
    True
    """
    return Path(os.environ.get("TENFOLD_CACHE") or "~/.cache/tenfold/models").expanduser().absolute()


def gguf_sha256(file: str | Path) -> str:
    """SHA-256 of a file, remembered in the cache under its path, size and modification time.

    Raises:
        ModelError: the file cannot be read.
    """
    file = Path(file).absolute()
    try:
        facts = file.stat()
        key = f"{file}|{facts.st_size}|{facts.st_mtime_ns}"
        memo = cache_dir() / "checksums.json"
        known = _read_memo(memo)
        if key not in known:
            with file.open("rb") as stream:
                known[key] = hashlib.file_digest(stream, "sha256").hexdigest()
            with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not the answer
                _write_memo(memo, known)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror or error}", remedy="check the path") from error
    return known[key]


def converted(file: str | Path, source: str | None = None) -> Path:
    """The safetensors folder of a GGUF file, converted on first use.

    Weights are stored in float32, which is what dequantisation computes in, so the folder gives the logits of the
    file itself, bit for bit. Neither half format could: a 4-bit code times its fp16 scale, plus an fp16 offset, has
    more bits than either. For SmolLM2-135M at Q4_1, bfloat16 would move weights by up to 0.2 % of the largest one
    in their matrix and float16 by up to 0.04 %. The cost is four bytes per parameter on disk; give ``dtype`` to
    `open_model` to hold less in memory.

    Two processes that ask at once convert once; one that is killed leaves nothing under the final name.

    Args:
        file: the GGUF file.
        source: the name that adapters trained on this model should carry as their base. Default: the file's path.

    Returns:
        The folder, complete and checked against the sizes recorded when it was written.

    Raises:
        ModelError: the file is truncated, corrupt, or of an architecture that ``transformers`` cannot read.
        MissingDependencyError: the ``gguf`` package is absent.
        RunError: the cache cannot be written.
    """
    from filelock import FileLock

    file = Path(file).absolute()
    check_header(file)
    sha256 = gguf_sha256(file)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem)
    folder = cache_dir() / f"{stem}-{sha256[:12]}-float32-v{READER}"
    if is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"{folder.parent}: the cache cannot be written: {error.strerror}", remedy="set TENFOLD_CACHE to a folder"
        ) from error
    with FileLock(folder.parent / f"{folder.name}.lock"):
        if not is_complete(folder):  # another process may have finished while this one waited
            for leftover in folder.parent.glob(f"{partial_prefix(folder)}*"):
                shutil.rmtree(leftover, ignore_errors=True)  # of a killed conversion: the lock is ours
            _convert(file, folder, source or str(file), sha256)
    return folder


def source_of(folder: str | Path) -> str | None:
    """What a converted folder was made from (``demo`` or a GGUF path); None for any other folder."""
    record = read_record(folder)
    return record.get("gguf_source") if record else None


def check_header(file: Path) -> None:
    """Refuse what cannot be a GGUF file before anything slow is started.

    Raises:
        ModelError: missing, empty, or not beginning with ``GGUF``.
    """
    if not file.is_file():
        raise ModelError(f"{file}: no such file", remedy="check the path")
    with file.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise ModelError(
            f"{file}: not a GGUF file ({file.stat().st_size} bytes, begins with {magic!r})",
            remedy="download the file again",
        )


def load_gguf(file: Path) -> tuple[Any, Any]:
    """Model (float32, on the CPU) and tokenizer straight from a GGUF file, dequantised.

    Raises:
        ModelError: truncated, corrupt, or of an unknown architecture.
        MissingDependencyError: the ``gguf`` package is absent.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GgufConfig

    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError("GGUF files need the package gguf", remedy='pip install "gguf>=0.17"')
    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    packing = GgufConfig(gguf_file=file.name, dequantize=True)
    options = {"dtype": torch.float32, "quantization_config": packing, "output_loading_info": True}
    try:
        config = AutoConfig.from_pretrained(**place)
        header = read_header(file)
        carry_over(config, header, str(file))
        carry_biases(config, header)
        builder = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model, report = builder.from_pretrained(**place, config=config, **options)
        check_loaded(model, report["missing_keys"], str(file))
        check_tensors(model, header, report["unexpected_keys"], str(file))
        tokenizer = AutoTokenizer.from_pretrained(**place)
        carry_tokenizer(model, tokenizer, header)
        return model, tokenizer
    except ModelError:
        raise
    except Exception as error:  # the readers raise whatever their parsing stumbled over: struct, index, value errors
        if "not supported" in str(error):
            problem = f"{file}: {error}"
            raise ModelError(problem, remedy="give the original model (a folder or hub id) instead") from error
        raise ModelError(
            f"{file}: truncated or corrupt GGUF ({file.stat().st_size} bytes): {type(error).__name__}: {error}",
            remedy="download the file again and compare its size with the publisher's",
        ) from error


def _convert(file: Path, folder: Path, source: str, sha256: str) -> None:
    """Load, move the weights into a model that never heard of GGUF, save."""
    import torch

    model, tokenizer = load_gguf(file)
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        # save_pretrained refuses a model that says it is quantised in a way it cannot write.
        del config.quantization_config
    with torch.device("meta"):
        fresh = type(model)(config)
    fresh.load_state_dict(model.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    with write_folder(folder, "model", overwrite=True, gguf_source=source, gguf_sha256=sha256) as partial:
        fresh.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def _read_memo(memo: Path) -> dict[str, str]:
    try:
        known = json.loads(memo.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write_memo(memo: Path, known: dict[str, str]) -> None:
    memo.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=memo.parent, prefix=".checksums-")
    with os.fdopen(handle, "w") as stream:
        json.dump(known, stream, indent=1)
    os.replace(partial, memo)
