"""Train a model while it is compressed, or after, through the Trainer as it is."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.adapt import full
from tenfold.adapt.distil import Teacher, by_model
from tenfold.adapt.fitting import fit
from tenfold.adapt.training import Trained, total_steps
from tenfold.compress.losparse.handle import LoSparse, attach
from tenfold.config.full import FullConfig
from tenfold.config.losparse import LoSparseConfig
from tenfold.data.encode import Encoded
from tenfold.models.opened import Opened
from tenfold.stage.context import Context
from tenfold.stage.results import Result


def uncompressed(model: Any, replaced: Collection[str], *, states: bool = True, logits: bool = True) -> Teacher:
    """The teacher of a model that is going to be compressed: what it computes now.

    Its matrices are not copied: compressing puts others in their place, so they stay what they are, in memory or mapped
    from a file. What is trained in place (embedding, head, norms, biases) is copied, unless training converts it to
    another type anyway.

    Args:
        model: before anything is replaced or converted.
        replaced: names of the modules that are going to be replaced.
        states: whether hidden states are to be learnt.
        logits: whether predictions are.

    >>> from tenfold.models.tiny import tiny_model
    >>> model = tiny_model("llama").model
    >>> teacher, ids = uncompressed(model, ["model.layers.0.mlp.up_proj"]), torch.arange(5, 25)[None]
    >>> before = model(ids).logits
    >>> model.model.norm.weight.data.zero_()[:2]
    tensor([0., 0.])
    >>> bool(torch.equal(teacher({"input_ids": ids}).logits, before))
    True
    """
    shared: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        data = parameter.detach()
        stays = name.removesuffix(".weight") in replaced or data.dtype != torch.float32
        shared[id(parameter)] = nn.Parameter(data if stays else data.clone(), requires_grad=False)
    return by_model(copy.deepcopy(model, shared), states=states, logits=logits)


def fit_compressed(
    opened: Opened,
    encoded: Encoded,
    config: LoSparseConfig,
    context: Context,
    ranks: Mapping[str, int],
    rows: int,
    *,
    starts: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    costs: Mapping[str, int] | None = None,
) -> tuple[LoSparse, Trained, list[Result]]:
    """Compress a model while it trains; afterwards its compressed layers are in it.

    Args:
        opened: the model, whole.
        encoded: what it learns from.
        config: how to train, and when rows are pruned; with ``pruning: gates`` rows stay frozen.
        context: of the stage.
        ranks: see `attach`, as for the next three.
        rows: what may be kept.
        starts: low-rank parts.
        costs: of rows.

    The teacher of the share ``config.distil`` is the model as it is given.

    Returns:
        The handle, whose report says where the budget went; what was done; the figures of the training.
    """
    teacher = uncompressed(opened.model, ranks) if config.distil else None
    gates = config.pruning == "gates"
    model = opened.model if gates else full.attach(opened.model, FullConfig())
    if gates and model.dtype != torch.float32 and model.device.type == "cpu":
        model = model.float()  # without autocast all has to be of one type
    steps = total_steps(config, encoded.sequences, encoded.tokens)
    handle = attach(model, ranks, rows, config.paper, total_steps=steps, starts=starts, costs=costs, frozen=gates)
    for parameter in model.parameters():
        if parameter.requires_grad:  # steps are smaller than what half precision tells apart
            parameter.data = parameter.data.float()
    trained, results = fit(model, opened, encoded, config, context, numbers=handle.pruner.numbers, teacher=teacher)
    handle.compact(elastic=config.elastic)
    return handle, trained, results


def fit_compact(
    opened: Opened, encoded: Encoded, config: LoSparseConfig, context: Context, *, teacher: Teacher | None = None
) -> tuple[Trained, list[Result]]:
    """Train a model whose compressed layers are in it, with all that it has: rows, combinations and the rest.

    Args:
        opened: the model.
        encoded: what it learns from.
        config: how to train.
        context: of the stage.
        teacher: of the share ``config.distil``; see `uncompressed`, made before the layers were put in.
    """
    return fit(full.attach(opened.model, FullConfig()), opened, encoded, config, context, teacher=teacher)
