"""Margins that are already known: in memory, and in a file that any run may read from and add to.

What they are known by is all that decides them: the row, the weights, the adapters, the tokens, the limits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.data.rows import Preference, content
from tenfold.errors import DataError

_LINE = b'{"margins": ['
"""How each line of a cache begins."""


class KnownMargins:
    """Margins that are already there: in memory, and in a file where one is given. None stands for an over-long pair.

    A line holds a whole batch, so that a batch is either there or not, whenever the process is killed.
    """

    def __init__(self, path: Path | None, settings: Sequence[Any]) -> None:
        self._path = path
        self._settings = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
        self.margins: dict[str, float | None] = {}
        if path is not None and path.exists():
            self._load(path)

    def _load(self, path: Path) -> None:
        torn = False
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                torn = not line.endswith(b"\n")
                try:
                    entries = json.loads(line)["margins"]
                    self.margins.update({key: margin for _, key, margin in entries})
                except json.JSONDecodeError:
                    # What a killed run was writing is the beginning of a line; anything else is of no cache.
                    if not line.startswith(_LINE[: len(line.rstrip())]):
                        raise _no_cache(path, number) from None
                except (ValueError, TypeError, KeyError):
                    raise _no_cache(path, number) from None
        if torn:
            with path.open("ab") as file:
                file.write(b"\n")

    def key(self, row: Preference) -> str:
        """What stands for this row, scored in this way."""
        return hashlib.sha256(f"{self._settings}|{row.id}|{content(row)}".encode()).hexdigest()[:32]

    def add(self, ids: Sequence[str], keys: Sequence[str], margins: Sequence[float | None]) -> None:
        """Remember the margins of a batch; None for pairs that are over-long."""
        new = list(zip(ids, keys, margins, strict=True))
        self.margins.update((key, margin) for _, key, margin in new)
        if self._path is not None and new:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"margins": new}) + "\n")


def _no_cache(path: Path, number: int) -> DataError:
    return DataError(f"{path}, line {number}: holds no margins", remedy="name another file as cache")


def fingerprint(model: Any) -> str:
    """A hash of all that decides what a model answers: every weight, in its type, the configuration, the adapters.

    Of each tensor it takes a few values and the sum of its bits as whole numbers, which is exact: cheap for any size,
    and the same for any number of threads.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NO_SCORE}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    # The same weights score otherwise when another adapter is switched on, or the same one with another scale, or none.
    if hasattr(model, "disable_adapter"):
        digest.update(repr(list(model.active_adapters)).encode())
    for name, module in model.named_modules():
        if hasattr(module, "disable_adapters"):
            digest.update(f"{name}{module.disable_adapters}{getattr(module, 'scaling', None)}".encode())
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if not tensor.is_meta and tensor.numel():
            flat = tensor.detach().reshape(-1)
            digest.update(str(flat[:: max(1, -(-len(flat) // 16))].tolist()).encode())
            if type(flat) in (Tensor, torch.nn.Parameter) and flat.element_size() in _WHOLE:
                digest.update(str(int(flat.view(_WHOLE[flat.element_size()]).sum(dtype=torch.int64))).encode())
    return digest.hexdigest()


_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The whole numbers of so many bytes."""
_NO_SCORE = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")
"""Fields of a configuration that change no margin; the weights' type is looked at itself."""


def tokenizer_hash(tokenizer: Any) -> str:
    """What a tokenizer makes of texts, by hash."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()
