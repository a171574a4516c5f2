"""Compress a model while it trains: put the layers in, see what they hold, take the factors out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tenfold.adapt.role_map import by_role
from tenfold.compress.losparse.factors import Factors, stored
from tenfold.compress.losparse.layer import Kind, LowRankRowsLinear, remark, replace_module
from tenfold.compress.losparse.masked import LoSparseLinear
from tenfold.compress.losparse.mathematics import rest_of, split_off
from tenfold.compress.losparse.pruner import Pruner, pruning_schedule
from tenfold.config.losparse import LoSparsePaper
from tenfold.errors import ConfigError, ModelError, RunError
from tenfold.models.layer_map import Slot, layer_map
from tenfold.models.quantised import parameter_count, refuse_quantised
from tenfold.models.simulated import refuse_simulated


class LoSparse:
    """A model that is compressed while it trains. Train ``.model`` in any loop; there is nothing to call."""

    def __init__(
        self,
        model: nn.Module,
        slots: Mapping[str, Slot],
        pruner: Pruner,
        originals: dict[str, nn.Module],
        free: Mapping[str, bool],
    ) -> None:
        self.model = model
        """Give it to the Trainer, or to an optimizer."""
        self.slots = dict(slots)
        """The replaced matrices by name, in model order."""
        self.pruner = pruner
        """Chooses the rows; its ``step``, ``history`` and ``notes`` may be read."""
        self._originals, self._free = originals, free

    @property
    def layers(self) -> dict[str, LoSparseLinear]:
        """What stands in the place of each matrix."""
        return self.pruner.layers

    def attached(self) -> dict[str, Any]:
        """What is touched: matrices, trainable parameters and their share of the model, bytes, rank, kept rows."""
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        rows = {name: int(layer.mask.sum()) for name, layer in self.layers.items()}
        numbers = 0
        for name, layer in self.layers.items():
            out, kept = layer.out_features, rows[name]
            numbers += stored(out, layer.in_features, min(len(layer.right), out - kept), kept)
        dense = sum(layer.out_features * layer.in_features for layer in self.layers.values())
        return {
            "method": "LoSparse",
            "matrices": len(self.layers),
            "trainable parameters": trainable,
            "share of the model": trainable / parameter_count(self.model),
            "rank": sum(len(layer.right) for layer in self.layers.values()),
            "kept rows": sum(rows.values()),
            "numbers": numbers,
            "share of the replaced matrices": numbers / dense,
        }

    def report(self) -> dict[str, Any]:
        """Plain data for tables and plots.

        Returns:
            ``attached`` as `attached` gives it; ``ranks`` and ``rows``: role -> the rank, or the number of kept rows,
            in each layer; ``budget``: one ``(step, budget, kept)`` for each choice, in numbers of the rest, from the
            start; ``steps``: optimizer steps made; ``notes``: sentences that the reader must know.
        """
        pruner = self.pruner
        return {
            "attached": self.attached(),
            "ranks": by_role(self.slots, {name: len(layer.right) for name, layer in self.layers.items()}),
            "rows": by_role(self.slots, {name: int(layer.mask.sum()) for name, layer in self.layers.items()}),
            "budget": [
                (0, pruner.all_rows, pruner.all_rows),
                *((step, budget, int(kept)) for step, budget, kept in pruner.history),
            ],
            "steps": pruner.step,
            "notes": list(pruner.notes),
        }

    def finish(self) -> dict[str, Factors]:
        """Take the hooks off and give what each matrix has come to, never above the budget.

        The layers stay in the model; `compact` puts what computes with the factors in their place.

        Raises:
            RunError: when nothing was trained.
        """
        self.pruner.finish()
        self.pruner.close()
        return {name: layer.factors() for name, layer in self.layers.items()}

    def compact(self, *, elastic: bool = False) -> nn.Module:
        """Finish, with the compressed layers in place of those that were trained.

        Args:
            elastic: whether the layers can be trimmed, as of `tenfold.compress.losparse.layer.install`.

        Returns:
            The model.

        Raises:
            RunError: when nothing was trained.
        """
        for name, factors in self.finish().items():
            trained = self.layers[name]
            kind: Kind = "conv1d" if self.slots[name].layout == "conv1d" else "linear"
            layer = LowRankRowsLinear.from_factors(factors, dtype=trained.left.dtype, kind=kind, elastic=elastic)
            replace_module(self.model, name, layer.to(trained.left.device).train(trained.training))
        return remark(self.model)

    def detach(self) -> nn.Module:
        """Take the layers and all hooks off a model that was not trained.

        Returns:
            The model as it was, bit for bit.

        Raises:
            RunError: after the first optimizer step, at which the original weights are let go; and where the rest is
                frozen, because it takes their place at once.
        """
        if not self._originals:
            raise RunError(
                "the weights before compressing are gone: frozen ones at once, others at the first step",
                remedy="take finish(), or open the model again",
            )
        self.pruner.close()
        for name, module in self._originals.items():
            replace_module(self.model, name, module)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._free[name])
        return self.model


def attach(
    model: nn.Module,
    ranks: Mapping[str, int],
    rows: int,
    config: LoSparsePaper | None = None,
    *,
    total_steps: int | None = None,
    grams: Mapping[str, Tensor] | None = None,
    starts: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    costs: Mapping[str, int] | None = None,
    frozen: bool = False,
) -> LoSparse:
    r"""Replace matrices by :math:`LR + S`, of which training prunes rows of :math:`S`.

    The model computes what it did. Train it with a torch optimizer that holds its parameters, in a loop of your own or
    in transformers' Trainer: scores, schedule and masks happen around each optimizer step by themselves.

    Args:
        model: a transformers model with whole weights.
        ranks: of :math:`LR`, for each matrix that is replaced, by the name of its module.
        rows: what may be kept of all :math:`S` together at the end, in numbers (or in the unit of ``costs``).
        config: when and how rows are pruned.
        total_steps: optimizer steps of the run. Default: the running Trainer's.
        grams: ``[in, in]`` of a matrix's inputs, to split off what matters for its outputs; see
            `tenfold.compress.losparse.mathematics.split_off`.
        starts: :math:`L` and :math:`R` of a matrix to begin with, of its rank, such as those that were found without
            training; the rest is what they leave of the matrix.
        costs: of a row of each matrix. Default: its numbers, ``in_features``.
        frozen: leave :math:`S` as it is, with all matrices that are not replaced; low-rank parts, norms and biases
            train. Rows are ranked by what the loss would feel of each. It takes a fraction of the memory.

    Raises:
        ConfigError: names of no matrix, ranks or rows that cannot be, phases that do not fit the run.
        ModelError: a model with adapters, quantised weights, or matrices that are compressed already or shared.

    >>> from tenfold.models.tiny import tiny_model
    >>> model = tiny_model("llama").model
    >>> handle = attach(model, {"model.layers.0.mlp.up_proj": 4, "model.layers.1.self_attn.q_proj": 4}, rows=2000)
    >>> handle.attached()["kept rows"], handle.pruner.all_rows
    (192, 12288)
    >>> handle.detach() is model
    True
    """
    config, grams, starts = config or LoSparsePaper(), grams or {}, starts or {}
    slots = _slots(model, ranks, rows)
    costs = dict(costs) if costs is not None else {name: slot.in_features for name, slot in slots.items()}
    free = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    all_rows = sum(costs[name] * slot.out_features for name, slot in slots.items())
    if total_steps is not None:
        pruning_schedule(config, min(rows / all_rows, 1.0), total_steps)
    originals: dict[str, nn.Module] = {}
    layers: dict[str, LoSparseLinear] = {}
    for name, slot in slots.items():
        module: Any = model.get_submodule(name)
        weight = module.weight.detach().T if slot.layout == "conv1d" else module.weight.detach()
        given = starts.get(name)
        left, right, rest = rest_of(weight, *given) if given else split_off(weight, ranks[name], grams.get(name))
        layer = LoSparseLinear(left.contiguous(), right.contiguous(), rest.contiguous(), module.bias, frozen=frozen)
        layers[name] = layer.train(module.training)
        replace_module(model, name, layers[name])
        if not frozen:  # there the moments of the optimizer come later, and need more than these
            originals[name] = module
    pruner = Pruner(model, layers, rows, costs, config, total_steps, started=originals.clear)
    if frozen:
        ours = {id(parameter) for layer in layers.values() for parameter in (layer.left, layer.right)}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in ours or parameter.ndim == 1)
    return LoSparse(model, slots, pruner, originals, free)


def _slots(model: Any, ranks: Mapping[str, int], rows: int) -> dict[str, Slot]:
    """The matrices of these names, all of which can be replaced."""
    if hasattr(model, "peft_config"):
        raise ModelError("the model has an adapter", remedy="merge it (merge_and_unload), and compress the result")
    refuse_quantised(model, "its matrices cannot be compressed", "open the model unquantised (without load)")
    refuse_simulated(model, "its matrices cannot be compressed", "take the plan back first (fpx.remove)")
    if rows < 0:
        raise ConfigError(
            f"rows: {rows:,} numbers are left for them, because the low-rank parts alone are above the budget",
            remedy="raise the budget, or lower the ranks",
        )
    if not ranks:
        raise ConfigError("ranks: empty, so nothing is replaced", remedy="name the matrices to compress")
    for name, module in model.named_modules():
        if isinstance(module, LoSparseLinear) or (name in ranks and not _is_plain(module)):
            raise ModelError(
                f"{name} is a {type(module).__name__}, not a plain matrix",
                remedy="open the model as it was before it was compressed, or take a dense export of it",
            )
    known = {slot.name: slot for slot in layer_map(model).slots if slot.layout in ("linear", "conv1d")}
    for name, rank in ranks.items():
        if name not in known:
            raise ConfigError(f"ranks: {name!r} is not a matrix of this model", remedy=f"such as {next(iter(known))}")
        slot = known[name]
        if slot.fixed or slot.part == "head":
            raise ModelError(
                f"{name} cannot be compressed: {slot.fixed or 'it is the head, which stays whole'}",
                remedy="leave it out",
            )
        most = min(slot.in_features, slot.out_features)
        if not 0 <= rank <= most:
            raise ConfigError(f"rank of {name}: must be in [0, {most}], got {rank}")
    return {name: slot for name, slot in known.items() if name in ranks}


def _is_plain(module: Any) -> bool:
    """Whether a layer does nothing but multiply with a weight of floating-point numbers."""
    plain = type(module).forward in (nn.Linear.forward, Conv1D.forward)
    return plain and bool(module.weight.is_floating_point())
