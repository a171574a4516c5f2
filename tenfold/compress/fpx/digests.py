"""What a plan was made for, by hash: the weights of a model in memory, and the tokens it was calibrated on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tenfold.compress.fpx.units import stored_tensors

_SAMPLES = 16
_PART = 2**24


def weights_digest(model: Any) -> str:
    """A hash of all numbers that a plain model stores; adapters on it are not looked at.

    Numbers are read as float32: a model that was saved in bfloat16 has one hash however it is opened. Of each tensor
    it takes a few values and the sum of all bits as whole numbers, which is exact and cheap for any size.

    >>> from tenfold.models.tiny import tiny_model
    >>> weights_digest(tiny_model("llama").model) == weights_digest(tiny_model("llama", seed=1).model)
    False
    """
    digest = hashlib.sha256()
    for name, tensor in stored_tensors(model):
        flat = tensor.detach().reshape(-1)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(str(flat[:: max(1, -(-len(flat) // _SAMPLES))].float().tolist()).encode())
        total = sum(int(part.float().view(torch.int32).sum(dtype=torch.int64)) for part in flat.split(_PART))
        digest.update(str(total).encode())
    return digest.hexdigest()


def tokens_digest(passages: Sequence[Tensor]) -> str:
    """A hash of token ids, passage by passage.

    >>> tokens_digest([torch.tensor([1, 2])]) == tokens_digest([torch.tensor([1]), torch.tensor([2])])
    False
    """
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(f"{passage.tolist()}".encode())
    return digest.hexdigest()
