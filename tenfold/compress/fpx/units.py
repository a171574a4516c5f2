"""Units of a plan: the weights of a model that get a precision, those together that must have the same one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import ConfigDict, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from tenfold.compress.losparse.layer import LowRankRowsLinear
from tenfold.errors import ModelError
from tenfold.models.fused import fused_name
from tenfold.models.layer_map import LayerMap, Slot, layer_map, plain_modules
from tenfold.models.quantised import refuse_quantised
from tenfold.models.roles import reads_weight

READ_FROM_FILES = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
"""How pydantic reads the parts of a plan: nothing unknown, nothing converted."""


@dataclass(frozen=True)
class UnitWeight:
    """One weight, by the modules that read it.

    Args:
        name: of the parameter in the plain model, under its first name.
        modules: that hold it, in model order; several where it is tied.
        out: rows, each rounded by itself: outputs of a layer, tokens of an embedding.
        inner: columns; blocks and groups lie along them.
        count: of matrices in the parameter: the experts of a stack, otherwise 1.
        transposed: whether it is stored as ``[in, out]``, as GPT-2's are.
        looked_up: whether an embedding is among the modules.
    """

    name: str
    modules: tuple[str, ...]
    out: PositiveInt
    inner: PositiveInt
    count: PositiveInt = 1
    transposed: bool = False
    looked_up: bool = False
    __pydantic_config__: ClassVar[ConfigDict] = READ_FROM_FILES

    @property
    def numbers(self) -> int:
        """Of all of its matrices."""
        return self.count * self.out * self.inner


@dataclass(frozen=True)
class Unit:
    """What gets one precision.

    Args:
        name: of its module; of several, what they have in common.
        weights: one, or several that the unit's precision is that of.
    """

    name: str
    weights: tuple[UnitWeight, ...]

    @property
    def numbers(self) -> int:
        """Of all its weights."""
        return sum(weight.numbers for weight in self.weights)

    @property
    def modules(self) -> tuple[str, ...]:
        """All that read one of its weights, each once."""
        return tuple(dict.fromkeys(module for weight in self.weights for module in weight.modules))


@dataclass(frozen=True)
class Kept:
    """What stays as it is: norms, biases, positions, routers, and what no plan can reach.

    Args:
        name: of the parameter, or of a buffer that is saved with the model.
        numbers: how many it holds.
        bytes: what they take in the model's own number format.
    """

    name: str
    numbers: NonNegativeInt
    bytes: NonNegativeInt
    __pydantic_config__: ClassVar[ConfigDict] = READ_FROM_FILES


def units_of(model: Any, *, fused: bool = False, blocks_only: bool = False) -> tuple[Unit, ...]:
    """What gets a precision of its own, in model order.

    Each linear layer is a unit. Weights that are one tensor, such as an embedding and its head, are one; untied ones
    are one each. Experts that are stacked in parameters are one unit for each block, and so are the rows that a
    compressed layer (LoSparse) stores and the combinations that it makes the others of. Routers, positions and
    convolutions stay as they are, as do layers whose weight the model reads without calling them (Mamba's); `kept_by`
    lists them.

    Args:
        model: a ``transformers`` model, also with adapters of PEFT, which are not looked at.
        fused: whether queries, keys and values of an attention, and gate and up of an MLP, are one unit, as engines
            need it that multiply them as one matrix.
        blocks_only: whether embeddings, heads and all else outside of the blocks stay, as in the paper.

    Raises:
        ModelError: packed weights, layers that are compressed while they train, stacked experts of unknown layout, or
            no layer at all.

    >>> from tenfold.models.tiny import tiny_model
    >>> model = tiny_model("llama", tie_word_embeddings=True).model
    >>> [unit.name.removeprefix("model.layers.0.") for unit in units_of(model, fused=True)][:4]
    ['model.embed_tokens', 'self_attn.q_proj+k_proj+v_proj', 'self_attn.o_proj', 'mlp.gate_proj+up_proj']
    >>> units_of(model)[0].modules
    ('model.embed_tokens', 'lm_head')
    """
    refuse_quantised(model, "plan", "open the model in its original precision (leave load out)")
    found, modules = layer_map(model), dict(plain_modules(model))
    groups: dict[str, list[UnitWeight]] = {}
    for weight, first in _matrices(found, modules):
        if not (blocks_only and first.layer is None):
            groups.setdefault(fused_name(first, found) if fused else first.name, []).append(weight)
    for weight in _stacks(found, modules):
        groups.setdefault(weight.modules[0], []).append(weight)
    place = {name: at for at, name in enumerate(modules)}
    units = [Unit(name, tuple(weights)) for name, weights in groups.items()]
    if not units:
        raise ModelError(f"{found.model_type}: no layer that could be planned", "take another model")
    return tuple(sorted(units, key=lambda unit: place[unit.modules[0]]))


def kept_by(model: Any, units: Iterable[Unit]) -> tuple[Kept, ...]:
    """All that a model stores beside the weights of these units, in model order; each tensor once.

    >>> from tenfold.models.tiny import tiny_model
    >>> model = tiny_model("llama").model
    >>> kept_by(model, units_of(model))[0]
    Kept(name='model.layers.0.input_layernorm.weight', numbers=64, bytes=256)
    """
    planned = {weight.name for unit in units for weight in unit.weights}
    return tuple(
        Kept(name, tensor.numel(), tensor.numel() * tensor.element_size())
        for name, tensor in stored_tensors(model)
        if name not in planned
    )


def stored_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """What is saved of the plain model, by its first name: parameters, and buffers that are saved with them."""
    seen: set[int] = set()
    for name, module in plain_modules(model):
        # What a matrix is made of is not listed as modules.
        inside = module.named_modules() if hasattr(module, "in_features") else [("", module)]
        for inner, one in inside:
            saved = {key: value for key, value in one._buffers.items() if key not in one._non_persistent_buffers_set}
            for own, tensor in [*one._parameters.items(), *saved.items()]:
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield ".".join(part for part in (name, inner, own) if part), tensor


def _matrices(found: LayerMap, modules: dict[str, Any]) -> Iterator[tuple[UnitWeight, Slot]]:
    """Weights of layers and embeddings with the slot that has each first."""
    owners: dict[int, list[tuple[Slot, str]]] = {}
    for slot in found.slots:
        if slot.layout == "norm" or slot.role == "position" or slot.part == "router":
            continue
        module = modules[slot.name]
        for own in ("rows", "mix") if isinstance(module, LowRankRowsLinear) else ("weight",):
            weight = module._parameters.get(own)
            if not isinstance(weight, nn.Parameter) or not weight.is_floating_point() or weight.ndim != 2:
                raise ModelError(
                    f"{slot.name}: a {type(module).__name__} does not store its matrix as numbers of its own",
                    remedy="plan the plain model: tenfold export --form dense",
                )
            if weight.numel():
                owners.setdefault(id(weight), []).append((slot, own))
    for readers in owners.values():
        (first, own), slots = readers[0], [slot for slot, _ in readers]
        if any(_unseen(slot, modules) for slot in slots):
            continue
        out, inner = modules[first.name]._parameters[own].shape
        transposed = first.layout == "conv1d" and own == "weight"
        yield (
            UnitWeight(
                name=f"{first.name}.{own}",
                modules=tuple(slot.name for slot in slots),
                out=inner if transposed else out,
                inner=out if transposed else inner,
                transposed=transposed,
                looked_up=any(slot.layout == "embedding" for slot in slots),
            ),
            first,
        )


def _unseen(slot: Slot, modules: dict[str, Any]) -> bool:
    parent, _, child = slot.name.rpartition(".")
    kind: type = type(modules[parent])
    return slot.layer is not None and reads_weight(kind, child)


def _stacks(found: LayerMap, modules: dict[str, Any]) -> Iterator[UnitWeight]:
    """Experts that are slices of a parameter."""
    for name, shape in found.stacked.items():
        holder = name.rpartition(".")[0]
        transposed = getattr(modules[holder], "is_transposed", None)
        if transposed is None:
            if "expert" in name.lower():
                raise ModelError(
                    f"{name}: a stack of experts of shape {shape}, and {type(modules[holder]).__name__} does not say "
                    "which dimension is that of the inputs",
                    remedy="take a model whose experts transformers runs by its common interface",
                )
            continue  # gates of recurrent layers and the like
        out, inner = (shape[-1], shape[-2]) if transposed else (shape[-2], shape[-1])
        yield UnitWeight(name, (holder,), out, inner, math.prod(shape[:-2]), bool(transposed))
