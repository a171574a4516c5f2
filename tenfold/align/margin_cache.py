"""What a margin is kept by: all that decides it, the row, the weights, the adapters, the tokens, the limits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from tenfold.data.rows import Preference, content
from tenfold.models.layer_map import plain_model
from tenfold.models.simulated import MARK


def row_key(settings: Sequence[Any], row: Preference) -> str:
    """What the margin of a row is kept by, scored in this way.

    Args:
        settings: all else that decides it, as plain values.
        row: the pair.
    """
    how = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    return hashlib.sha256(f"{how}|{row.id}|{content(row)}".encode()).hexdigest()[:32]


def fingerprint(model: Any) -> str:
    """A hash of all that decides what a model answers: every weight, in its type, the configuration, the adapters.

    Of each tensor it takes a few values and the sum of its bits as whole numbers, which is exact: cheap for any size,
    and the same for any number of threads.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NO_SCORE}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    if (planned := getattr(plain_model(model), MARK, None)) is not None:  # that inputs are rounded is in no weight
        digest.update(repr(planned).encode())
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
