"""In which form each compressed layer multiplies: measured once on a machine, and stored with the model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from tenfold.compress.losparse.factors import stored
from tenfold.compress.losparse.format import Layout, LowRankRowsConfig
from tenfold.compress.losparse.layer import LowRankRowsLinear, compressed_layers
from tenfold.kernels.low_rank_rows import MANY, Form, seconds
from tenfold.models.inference import machine

GAIN = 0.87
"""The joined form takes more memory than the stored one, and is taken where it needs at most this part of the time."""
PATIENCE = 30.0
"""Seconds after which layers that have not been measured take the form of the nearest one that has."""
_STEP = 0.05
"""Of the share of numbers that is stored: layers of the same shape within a step are measured once."""


def settle(model: Any, *, measure: bool = True, layout: Layout | None = None) -> dict[str, tuple[Form, Form]]:
    """Let every compressed layer take the form that is best on this machine: fast enough, and small.

    No layer is then slower than its whole matrix, as measured. A measurement is off by a few percent.

    `install` and whatever changes sizes (`trim`, the merging of an adapter) leave this to be called; the commands do.
    What was measured on a machine of this kind is taken from the model's configuration, where new measurements go to,
    so that ``save_pretrained`` keeps them. Forms other than ``stored`` take memory beside that of the parameters.

    Args:
        model: a compressed ``transformers`` model, where it is to run.
        measure: whether to measure where nothing is known of such a machine; layers keep their form otherwise.
        layout: ``fast``, or ``small`` for layers that hold nothing beside their parameters, for which nothing is
            measured. It is kept with the model. Default: what the model has, ``fast`` at first.

    Returns:
        By name, the form for few tokens and the one for many.

    >>> from tenfold.compress.losparse.factors import Factors
    >>> from tenfold.compress.losparse.layer import install
    >>> from tenfold.models.tiny import tiny_model
    >>> one = Factors(torch.ones(128, 1), torch.ones(1, 64), torch.tensor([3]), torch.ones(1, 64))
    >>> settle(install(tiny_model("llama").model, {"model.layers.0.mlp.up_proj": one}), layout="small")
    {'model.layers.0.mlp.up_proj': ('stored', 'stored')}
    """
    layers = compressed_layers(model)
    config = getattr(model.config, "quantization_config", None)
    if not layers or not isinstance(config, LowRankRowsConfig):
        return {}
    config.layout = layout or config.layout
    if config.layout == "small":
        config.layouts = {}
        for layer in layers.values():
            layer.take("stored", "stored")
        return dict.fromkeys(layers, ("stored", "stored"))
    first = next(iter(layers.values())).rows
    here = f"{machine(first.device)}, {str(first.dtype).removeprefix('torch.')}"
    if here not in config.layouts and measure:
        forms = _measured(layers)
        config.layouts[here] = {name: list(pair) for name, pair in forms.items() if pair != ("stored", "stored")}
    elif here not in config.layouts:
        return {}
    known = config.layouts[here]
    for name, layer in layers.items():
        few, many = known.get(name, ("stored", "stored"))
        layer.take(few, many)
    return {name: (layer.few, layer.many) for name, layer in layers.items()}


def _measured(layers: dict[str, LowRankRowsLinear]) -> dict[str, tuple[Form, Form]]:
    """The forms of all layers; those that are alike are measured once."""
    groups: dict[tuple[int, int, int], dict[str, LowRankRowsLinear]] = {}
    for name, layer in layers.items():
        groups.setdefault(_kind(layer), {})[name] = layer
    found: dict[tuple[int, int, int], tuple[Form, Form]] = {}
    start = time.perf_counter()
    for kind in sorted(groups, key=lambda kind: -len(groups[kind])):
        if not found or time.perf_counter() - start < PATIENCE:
            found[kind] = _fastest(next(iter(groups[kind].values())))
    near = {kind: min(found, key=lambda one: [abs(a - b) for a, b in zip(one, kind, strict=True)]) for kind in groups}
    return {name: found[near[kind]] for kind, group in groups.items() for name in group}


def _kind(layer: LowRankRowsLinear) -> tuple[int, int, int]:
    out, inner = layer.out_features, layer.in_features
    share = stored(out, inner, layer.rank, layer.kept) / (out * inner)
    return out, inner, round(share / _STEP)


def _fastest(layer: LowRankRowsLinear) -> tuple[Form, Form]:
    shape = (layer.out_features, layer.in_features)
    pair: list[Form] = []
    with torch.random.fork_rng(devices=[]):
        for tokens in (1, MANY):
            taken = seconds(shape, layer.rank, layer.kept, tokens, layer.rows.dtype, layer.rows.device)
            pair.append(_worth(taken))
    return pair[0], pair[1]


def _worth(taken: Mapping[Form, float]) -> Form:
    """The form that takes the least memory, of those that are fast enough."""
    whole = taken["whole"]
    if taken["stored"] <= whole and taken["joined"] > GAIN * taken["stored"]:
        return "stored"
    return "joined" if taken["joined"] <= whole else "stored" if taken["stored"] <= whole else "whole"
