"""What decoding one token takes: each unit in each format by its kernel, and all the rest of the model by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.compress.fpx.units import Unit
from tenfold.compress.losparse.calibration import read
from tenfold.kernels.packed_choice import decode_seconds
from tenfold.kernels.timing import in_turns
from tenfold.models.inference import evaluating, input_device, takes_cache, takes_logits_to_keep
from tenfold.models.layer_map import plain_modules

CONTEXT = 128
"""Tokens before the one that is timed."""
_STEPS = 8


def unit_seconds(model: Any, unit: Unit, form: str) -> float:
    """Seconds of a unit's products for one token; looking up a row of an embedding is left to `rest_seconds`.

    Args:
        model: the model, where it is to run.
        unit: of this model.
        form: that the unit is stored in, one that there are kernels for.
    """
    modules = dict(plain_modules(model))
    return sum(
        decode_seconds(form, (weight.out, weight.inner), modules[name].weight.dtype, modules[name].weight.device)
        for weight in unit.weights
        for name in weight.modules
        if not isinstance(modules[name], nn.Embedding)
    )


def rest_seconds(model: Any, units: tuple[Unit, ...]) -> float:
    """Seconds of decoding one token after `CONTEXT` others without the products of these units.

    Attention, norms, lookups, and the calls of Python. Measured with zeros in the place of what the products give; of
    models that do not decode with a cache, what reading one token takes.

    Args:
        model: the model; it stays as it is.
        units: of it.
    """
    device = input_device(model)
    ids = torch.zeros(1, CONTEXT, dtype=torch.int64, device=device)
    keep = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}
    with evaluating(model), _silent(model, units):
        if takes_cache(model) and not model.config.is_encoder_decoder:
            cache = model(input_ids=ids, use_cache=True, **keep).past_key_values
            step = partial(model, input_ids=ids[:, :1], past_key_values=cache, use_cache=True, **keep)
        else:
            step = partial(read, model, ids[:, :1])
        return in_turns({"rest": [step] * _STEPS}, device)["rest"]


@contextmanager
def _silent(model: Any, units: tuple[Unit, ...]) -> Iterator[None]:
    """The linear layers of units give zeros, by as many steps as a packed layer takes beside its product."""
    modules = dict(plain_modules(model))
    silenced = {
        modules[name]: weight.out
        for unit in units
        for weight in unit.weights
        for name in weight.modules
        if not isinstance(modules[name], nn.Embedding)
    }

    def zeros(out: int, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return rows.new_zeros(len(rows), out).view(*x.shape[:-1], out)

    try:
        for module, out in silenced.items():
            module.forward = partial(zeros, out)
        yield
    finally:
        for module in silenced:
            module.__dict__.pop("forward", None)
