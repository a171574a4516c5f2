"""GGUF files with a type for each tensor, from models of ``transformers``: what they will weigh, and writing them.

write_gguf(model, tokenizer, "model.gguf", {"model.embed_tokens": "q8_0", "model.layers.0.mlp.up_proj": "q4_0", ...})
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tenfold.errors import ConfigError, ModelError, RunError
from tenfold.models.gguf_architectures import FileTensor, architecture_keys, family_of, file_tensors
from tenfold.models.gguf_entries import entries, writer_of
from tenfold.models.gguf_types import encode, settled_type, type_bytes
from tenfold.models.gguf_vocabulary import general_entries, vocabulary_entries
from tenfold.models.simulated import refuse_simulated

if TYPE_CHECKING:
    from torch import Tensor

ALIGNMENT = 32
"""Each tensor of a file begins at a multiple of these bytes."""

_OURS = "tenfold"
"""Who packed the file (``general.quantized_by``), by which our own files are known."""


@dataclass(frozen=True)
class TensorSize:
    """What one tensor of a file takes.

    Args:
        name: in the file.
        module: whose matrix it is; empty for norms, biases and rotary divisors.
        asked: the type that was asked for.
        type: the type in the file: another one where rows do not divide by a block.
        shape: rows first.
        bytes: without the gap to the next tensor.
    """

    name: str
    module: str
    asked: str
    type: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class GgufSizes:
    """A file by its tensors.

    Args:
        tensors: in the order of the file.
        metadata: bytes before the first tensor, where the tokenizer was given; else None.
    """

    tensors: tuple[TensorSize, ...]
    metadata: int | None

    @property
    def tensor_bytes(self) -> int:
        """Of all tensors, with the gaps that alignment leaves after each."""
        return sum(_aligned(one.bytes) for one in self.tensors)

    @property
    def total(self) -> int:
        """Of the file.

        Raises:
            ConfigError: the tokenizer was not given.
        """
        if self.metadata is None:
            raise ConfigError("the size of the metadata is unknown", remedy="give gguf_sizes the tokenizer")
        return self.metadata + self.tensor_bytes

    @property
    def fallbacks(self) -> tuple[TensorSize, ...]:
        """Tensors whose rows do not divide by a block of the type that was asked for."""
        return tuple(one for one in self.tensors if one.type != one.asked)

    def __str__(self) -> str:
        lines = [f"{one.bytes:>13,}  {one.type:<8}{one.name}" for one in self.tensors]
        substitutes = Counter((one.asked, one.type) for one in self.fallbacks)
        lines += [f"{count} tensors are {got}, not {asked}: their rows do not divide by its block"
                  for (asked, got), count in substitutes.items()]  # fmt: skip
        metadata = "" if self.metadata is None else f", metadata {self.metadata:,}, file {self.total:,}"
        return "\n".join([*lines, f"bytes: tensors {self.tensor_bytes:,}{metadata}"])


def gguf_sizes(model: Any, types: str | Mapping[str, str], tokenizer: Any = None) -> GgufSizes:
    """What a file will weigh, to the byte, before anything is written.

    Args:
        model: as `write_gguf` takes it; its weights are not looked at.
        types: as there.
        tokenizer: for the size of the metadata; without it that is left open.

    Raises:
        ConfigError, ModelError, MissingDependencyError: as `write_gguf`.

    >>> from tenfold.models.tiny import tiny_model
    >>> sizes = gguf_sizes(tiny_model("llama").model, "q8_0")
    >>> sizes.tensors[1]  # doctest: +NORMALIZE_WHITESPACE
    TensorSize(name='blk.0.attn_q.weight', module='model.layers.0.self_attn.q_proj', asked='q8_0', type='q8_0',
        shape=(64, 64), bytes=4352)
    """
    sizes = tuple(size for _, size in _planned(model, types))
    if tokenizer is None:
        return GgufSizes(sizes, None)
    with tempfile.TemporaryDirectory() as folder:
        writer = _begun(Path(folder) / "metadata.gguf", model, tokenizer, sizes)
        writer.close()
        return GgufSizes(sizes, _aligned((Path(folder) / "metadata.gguf").stat().st_size))


def write_gguf(
    model: Any,
    tokenizer: Any,
    path: str | Path,
    types: str | Mapping[str, str],
    *,
    importance: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
) -> GgufSizes:
    """Write a model as a GGUF file, which llama.cpp runs and `open_model` reads.

    Norms and biases are f32. Of a model that was opened from a GGUF file, that file's tokenizer, name and licence are
    taken over. The file appears under its name only when it is complete.

    Args:
        model: a causal model of `FAMILIES`, plain: adapters merged, not quantised in memory.
        tokenizer: goes into the file, with its chat template.
        path: replaced if tenfold wrote it; refused if it holds anything else.
        types: one type for all matrices, or one for each, by the name of the module. A head that shares its weight
            with the embedding goes by either name. Where rows do not divide by a block, `settled_type` says what is
            written instead.
        importance: of the inputs of a module, ``[in]``, as the mean of their squares: errors that count more are made
            smaller. Types that take none, and modules that have none, are rounded without.
        overwrite: replace whatever is there.

    Returns:
        What was written, with the tensors that fell back to another type.

    Raises:
        ConfigError: an unknown type; a module without a type, or none of this name; an importance of another length;
            a model that simulates a plan.
        ModelError: what llama.cpp does not compute or has no place for, by name; NaN or infinite weights.
        MissingDependencyError: a package that a type needs is absent.
        RunError: the file is taken, or cannot be written.

    >>> from tenfold.models.tiny import tiny_model
    >>> opened = tiny_model("llama")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sizes = write_gguf(opened.model, opened.tokenizer, f"{folder}/tiny.gguf", "q8_0")
    ...     sizes.total == Path(f"{folder}/tiny.gguf").stat().st_size
    True
    """
    path = Path(path)
    refuse_simulated(model, "its weights are rounded already", "take the plan back first (fpx.remove)")
    planned = _planned(model, types)
    weights = _by_module(importance or {}, [one for one, _ in planned if one.module], model, "importance")
    if path.exists() and not overwrite and not _is_ours(path):
        raise RunError(
            f"{path}: exists and was not written by tenfold",
            remedy="choose another file, or allow overwriting (overwrite=True)",
        )
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    sizes = tuple(size for _, size in planned)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = _begun(partial, model, tokenizer, sizes)
        try:
            metadata = _aligned(partial.stat().st_size)
            for tensor, size in planned:
                writer.write_tensor_data(_packed(tensor, size, weights.get(tensor.module)))
        finally:
            writer.close()
        partial.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(
            f"{path}: cannot be written: {reason}", remedy="free space there, or choose another file"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return GgufSizes(sizes, metadata)


def _planned(model: Any, types: str | Mapping[str, str]) -> list[tuple[FileTensor, TensorSize]]:
    """Each tensor with its type and bytes."""
    tensors = file_tensors(model)
    matrices = [one for one in tensors if one.module]
    named = dict.fromkeys((one.module for one in matrices), types) if isinstance(types, str) else types
    asked = _by_module(named, matrices, model, "types")
    missing = [one.module for one in matrices if one.module not in asked]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ConfigError(
            f"types: none for {', '.join(missing[:3])}{more}", remedy="give each matrix a type, such as f16"
        )
    planned = []
    for one in tensors:
        wanted = asked[one.module].lower() if one.module else "f32"
        rows, inner = int(np.prod(one.shape[:-1], dtype=int)), one.shape[-1]
        kind = settled_type(wanted, inner)
        planned.append((one, TensorSize(one.name, one.module, wanted, kind, one.shape, type_bytes(kind, rows, inner))))
    return planned


def _by_module(given: Mapping[str, Any], matrices: list[FileTensor], model: Any, what: str) -> dict[str, Any]:
    """By the modules that stand in the file; a head without a tensor of its own stands for the embedding."""
    modules = {one.module for one in matrices}
    names = {id(module): name for name, module in model.named_modules()}
    tied = {names[id(model.get_output_embeddings())]: names[id(model.get_input_embeddings())]}
    found: dict[str, Any] = {}
    for name, value in given.items():
        module = name if name in modules else tied.get(name)
        if module is None:
            raise ConfigError(f"{what}: no matrix named {name!r} in this model", remedy=f"such as {matrices[0].module}")
        if found.setdefault(module, value) is not value and found[module] != value:
            raise ConfigError(
                f"{what}: {name} and {module} share one weight and cannot be {value} and {found[module]}",
                remedy="give both the same",
            )
    return found


def _begun(file: Path, model: Any, tokenizer: Any, sizes: tuple[TensorSize, ...]) -> Any:
    """A writer that wrote everything before the first tensor."""
    from gguf import GGML_QUANT_VERSION, GGMLQuantizationType

    architecture = family_of(model).name
    rows = model.get_input_embeddings().weight.shape[0]
    ends = getattr(model.generation_config, "eos_token_id", None)
    about = {"general.quantized_by": _OURS, "general.type": "model", "general.quantization_version": GGML_QUANT_VERSION}
    general = [one for one in general_entries(model) if one.key not in about]
    keys = [
        *entries(about),
        *general,
        *entries(architecture_keys(model), f"{architecture}."),
        *vocabulary_entries(tokenizer, rows, ends),
    ]
    writer = writer_of(file, architecture, keys)
    for one in sizes:
        kind = GGMLQuantizationType[one.type.upper()]
        writer.add_tensor_info(one.name, one.shape, np.dtype(np.float32), one.bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def _packed(tensor: FileTensor, size: TensorSize, importance: Tensor | None) -> np.ndarray:
    weights = None if importance is None else importance.detach().float().cpu().numpy()
    try:
        return encode(tensor.values(), size.type, weights)
    except ModelError as error:
        raise ModelError(f"{tensor.module or tensor.name}: {error.problem}", error.remedy) from error
    except ConfigError as error:
        raise ConfigError(f"{tensor.module or tensor.name}: {error.problem}", error.remedy) from error


def _is_ours(path: Path) -> bool:
    """Whether a file says at its very beginning that we wrote it."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        head = stream.read(256)
    mark = b"general.quantized_by" + (8).to_bytes(4, "little") + len(_OURS).to_bytes(8, "little") + _OURS.encode()
    return head.startswith(b"GGUF") and mark in head


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
