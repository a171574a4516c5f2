"""The layer map: every matrix of a model by its role, whatever the architecture calls it."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tenfold.errors import ConfigError, ModelError
from tenfold.models.roles import GROUPS, ROLES, BlockMatrix, Part, reads_weight, roles_of

Layout = Literal["linear", "conv1d", "embedding", "norm"]
_MATRIX = ("linear", "conv1d")


@dataclass(frozen=True)
class Slot:
    """One module with weights, and the part it plays.

    Args:
        name: of the module in the plain model, also when adapters wrap it: ``model.layers.0.self_attn.q_proj``.
        role: ``q k v o`` and ``qkv`` of self-attention, ``cross_q cross_k cross_v cross_o`` of T5's attention to the
            encoder, ``pos_q pos_k`` of DeBERTa's positions, ``gate up down`` and ``gate_up`` of a gated MLP,
            ``fc1 fc2`` of a plain one, ``embed``, ``position``, ``head``, ``norm``; any other matrix (``in_proj`` of
            Mamba, ``kv_b_proj`` of DeepSeek) has its own name for a role.
        layer: index of the block within its stack; None outside the blocks.
        in_features: size of the input; of an embedding, the number of rows.
        out_features: size of the output.
        layout: ``linear`` stores its weight as ``[out, in]``, ``conv1d`` (GPT-2) as ``[in, out]``.
        stack: ``decoder`` or ``encoder``. T5's shared embedding counts as the encoder's.
        split: for a fused role, the parts of the output, as (role, size); some families interleave them by heads.
        part: of the block: ``attention``, ``mlp``, ``mixer`` (of recurrent layers and convolutions), ``router`` (of
            experts, or of the tokens that sparse attention reads); ``head`` and ``other`` stand outside.
        fixed: why no adapter can stand here; empty where one can.
    """

    name: str
    role: str
    layer: int | None
    in_features: int
    out_features: int
    layout: Layout
    stack: Literal["decoder", "encoder"]
    split: tuple[tuple[str, int], ...] = ()
    part: Part = "other"
    fixed: str = ""


@dataclass(frozen=True)
class LayerMap:
    """The shape of a model and its slots in model order.

    Args:
        model_type: as the configuration names it.
        layers: blocks of the decoder; of the encoder where there is no decoder.
        encoder_layers: blocks of the encoder beside a decoder (T5); otherwise 0.
        hidden: width of the residual stream.
        heads: query heads per layer; 0 where the configuration knows none, as for the next two.
        kv_heads: key and value heads per layer.
        head_dim: size of one head.
        slots: every slot, in the order of the model's modules.
        stacked: matrices that are slices of one parameter and no layers, as the experts of most models are: its name
            and shape.
    """

    model_type: str
    layers: int
    encoder_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    slots: tuple[Slot, ...]
    stacked: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def select(self, targets: Sequence[str]) -> tuple[Slot, ...]:
        r"""The matrices that targets name; only ``linear`` and ``conv1d`` slots can be selected.

        Args:
            targets: each one is tried as a role (``q``), a group (``attention``, ``mlp``, ``all-linear``; never
                embeddings or heads), the end of a module name from a dot on (``q_proj``, ``mlp.down_proj``), and a
                regular expression that matches a whole name, in this order; the first that matches anything is meant.

        Returns:
            The slots in model order, each once.

        Raises:
            ConfigError: a target that matches nothing; names the nearest candidates and the roles there are.

        >>> from tenfold.models.tiny import tiny_model
        >>> slots = layer_map(tiny_model("llama").model).select(["q", r".*layers\.0\.mlp\.up_proj"])
        >>> [slot.name.removeprefix("model.layers.") for slot in slots]
        ['0.self_attn.q_proj', '0.mlp.up_proj', '1.self_attn.q_proj']
        """
        if isinstance(targets, str):
            raise ConfigError(f"targets: {targets!r} is text, not a list", remedy=f"write [{targets}]")
        chosen = {slot.name for target in targets for slot in self._matches(target)}
        if not chosen:
            raise ConfigError("targets: empty", remedy="name a role, a group such as all-linear, or a module")
        return tuple(slot for slot in self.slots if slot.name in chosen)

    def left_out(self, targets: Sequence[str]) -> tuple[str, ...]:
        """What groups among the targets do not reach in this model, one sentence for each kind.

        Args:
            targets: as `select` takes them; a role or a module that is named leaves nothing out.

        >>> from tenfold.models.tiny import tiny_model
        >>> layer_map(tiny_model("llama").model).left_out(["all-linear"])
        ()
        """
        groups = [target for target in targets if target in GROUPS]
        if not groups:
            return ()
        parts = {part for target in groups for part in GROUPS[target]}
        said = []
        if self.stacked and parts & {"mlp", "other"}:
            numbers = sum(math.prod(shape) for shape in self.stacked.values())
            kind = "experts" if all("expert" in name.lower() for name in self.stacked) else "matrices"
            said.append(
                f"stacked {kind} stay as they are: {_patterns(self.stacked)} are parameters, not linear layers, of "
                f"{numbers:,} numbers"
            )
        if "all-linear" in groups and (routers := [slot.name for slot in self.slots if slot.part == "router"]):
            said.append(f"routers stay as they are: {_patterns(routers)}")
        reasons: dict[str, list[str]] = {}
        for slot in self.slots:
            if slot.fixed and slot.part in parts:
                reasons.setdefault(slot.fixed, []).append(slot.name)
        return (*said, *(f"left as they are: {_patterns(names)}: {reason}" for reason, names in reasons.items()))

    def _matches(self, target: str) -> list[Slot]:
        matrices = [slot for slot in self.slots if slot.layout in _MATRIX]
        if target in GROUPS:
            found = [slot for slot in matrices if slot.part in GROUPS[target]]
        else:
            found = [slot for slot in matrices if target in ROLES and slot.role == target]
            found = found or [slot for slot in matrices if f".{slot.name}".endswith(f".{target}")]
            found = found or [slot for slot in matrices if _fullmatch(target, slot.name)]
        if not found:
            raise self._no_match(target, matrices)
        adaptable = [slot for slot in found if not slot.fixed]
        if not adaptable:
            remedy = "adapt another model" if target == "all-linear" else "all-linear names what can be adapted"
            raise ConfigError(f"targets: {target!r} in this {self.model_type} model: {found[0].fixed}", remedy=remedy)
        return adaptable

    def _no_match(self, target: str, matrices: list[Slot]) -> ConfigError:
        roles = list(dict.fromkeys(slot.role for slot in matrices))
        groups = [group for group in GROUPS if any(slot.part in GROUPS[group] for slot in matrices)]
        fused = next((slot for slot in matrices if target in dict(slot.split)), None)
        if fused is not None:
            problem = f"targets: {target!r} is fused into {fused.role!r} in this {self.model_type} model"
            return ConfigError(problem, remedy=f"give {fused.role!r} ({fused.name.rsplit('.', 1)[-1]})")
        if stacked := [name for name in self.stacked if f".{name}".endswith(f".{target}") or _fullmatch(target, name)]:
            return ConfigError(
                f"targets: {target!r} is not a linear layer in this {self.model_type} model: {stacked[0]} is a "
                f"parameter of shape {self.stacked[stacked[0]]}",
                remedy=f"roles here: {', '.join(roles)}",
            )
        known = [*roles, *groups, *dict.fromkeys(slot.name.rsplit(".", 1)[-1] for slot in matrices)]
        near = difflib.get_close_matches(target, known, n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        if self.stacked:
            hint += f"; stacked in parameters, which no target reaches: {_patterns(self.stacked)}"
        return ConfigError(
            f"targets: {target!r} matches nothing in this {self.model_type} model{hint}",
            remedy=f"roles here: {', '.join(roles)}; groups: {', '.join(groups)}; or part of a module name",
        )


def _fullmatch(expression: str, name: str) -> bool:
    try:
        return re.fullmatch(expression, name) is not None
    except re.error:
        return False


def _patterns(names: Iterable[str]) -> str:
    """Names with a star for every number, each pattern once."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))


def layer_map(model: Any) -> LayerMap:
    """Find out which module of a model plays which part.

    By structure: a block is what stands in a numbered list, and the part of a matrix follows from where it stands in
    its block, from its shape and from the words that all families share (`tenfold.models.roles`). Of a model with
    towers for pictures or sound, the part that reads text is looked at.

    Works on models on the meta device (only shapes are read) and on models with PEFT adapters attached, whose slots
    have the names of the plain model.

    Args:
        model: a ``transformers`` model or a ``PeftModel``.

    Returns:
        The map.

    Raises:
        ModelError: no block with a linear layer; lists what was found.

    >>> from tenfold.models.tiny import tiny_model
    >>> found = layer_map(tiny_model("llama").model)
    >>> found.layers, found.heads, found.kv_heads, found.head_dim
    (2, 4, 2, 16)
    >>> found.slots[2].name, found.slots[2].role, found.slots[2].part, found.slots[2].out_features
    ('model.layers.0.self_attn.k_proj', 'k', 'attention', 32)
    """
    model = plain_model(model)
    config = model.config.get_text_config()
    modules = _of_text(model)
    roles = _roles(model, modules)
    if not any(part not in ("head", "router") for part, _ in roles.values()):
        raise _unknown(model)
    fixed = _fixed(model, dict(modules))
    sizes = _sizes(config)
    blocks = _blocks(config, roles)
    slots = []
    for name, module in modules:
        shape = _shape(module)
        if shape is None:
            continue
        part, role = roles.get(name, ("other", "norm"))
        if shape[2] == "embedding":
            role = "position" if _POSITION.search(name.rpartition(".")[2]) else "embed"
        place = _place(name)
        slots.append(
            Slot(
                name=name,
                role=role,
                layer=place[0] if place else None,
                in_features=shape[0],
                out_features=shape[1],
                layout=shape[2],
                stack=_stack(config, name, blocks),
                split=_split(role, shape[1], sizes),
                part=part,
                fixed=fixed.get(name, ""),
            )
        )
    return LayerMap(model_type=config.model_type, slots=tuple(slots), stacked=_stacked(modules), **sizes)


def plain_model(model: Any) -> Any:
    """The ``transformers`` model within a ``PeftModel``; any other is its own."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


_POSITION = re.compile(r"pos|relative|rel_|wpe|type")
_HEAD = re.compile(r"pooler|classif|score|head")


def _place(name: str) -> tuple[int, tuple[str, ...]] | None:
    """The block that a module stands in, and its name there; None outside of the blocks.

    >>> _place("model.layers.7.self_attn.q_proj"), _place("lm_head"), _place("model.projections.0")
    ((7, ('self_attn', 'q_proj')), None, None)
    """
    parts = name.split(".")
    number = next((at for at, part in enumerate(parts) if part.isdigit()), len(parts))
    return (int(parts[number]), tuple(parts[number + 1 :])) if number + 1 < len(parts) else None


def _roles(model: Any, modules: Sequence[tuple[str, Any]]) -> dict[str, tuple[Part, str]]:
    """Part and role of every matrix."""
    shapes = {name: shape for name, module in modules if (shape := _shape(module)) and shape[2] in _MATRIX}
    siblings = Counter(name.rpartition(".")[0] for name in shapes)
    blocks: dict[str, list[BlockMatrix]] = {}
    output, body = model.get_output_embeddings(), f"{model.base_model_prefix}."
    found: dict[str, tuple[Part, str]] = {}
    for name, shape in shapes.items():
        place = _place(name)
        if place is None:
            beyond = f".{name}".find(f".{body}") < 0 and hasattr(model, model.base_model_prefix)
            is_head = beyond or dict(modules)[name] is output or _HEAD.search(name)
            own = next(part for part in reversed(name.split(".")) if not part.isdigit())
            found[name] = ("head", "head") if is_head else ("other", own)
            continue
        block = name.removesuffix(".".join(("", *place[1])))
        alone = siblings[name.rpartition(".")[0]] == 1
        blocks.setdefault(block, []).append(BlockMatrix(name, place[1], shape[:2], alone))
    for there in blocks.values():
        found |= roles_of(there)
    return found


def _fixed(model: Any, modules: dict[str, Any]) -> dict[str, str]:
    """Matrices that no adapter can stand at, and why."""
    owners: dict[int, list[str]] = {}
    found: dict[str, str] = {}
    for name, module in modules.items():
        shape, place = _shape(module), _place(name)
        if shape is None or shape[2] not in _MATRIX or place is None:
            continue
        # What a layer makes of its weight when asked is nobody else's.
        owners.setdefault(id(module._parameters.get("weight", module)), []).append(name)
        parent, _, child = name.rpartition(".")
        kind: type = type(modules[parent])
        if refusal := getattr(module, "takes_no_adapter", ""):
            found[name] = refusal
        if reads_weight(kind, child):
            found[name] = "the model reads the weight without calling the layer, so no adapter would be seen"
    shared = [name for names in owners.values() if len(names) > 1 for name in names]
    found |= dict.fromkeys(shared, "several layers share the weight, so no adapter could be merged")
    taken = "PEFT takes the name for the stacked experts of this model, so no target module can mean the layer"
    return found | dict.fromkeys(_taken_by_peft(model, [name for names in owners.values() for name in names]), taken)


def _taken_by_peft(model: Any, names: Sequence[str]) -> list[str]:
    """Names that PEFT reads as those of experts from before these were stacked, though layers have them, too.

    So it does with ``mlp.shared_experts.gate_proj`` of DeepSeek, in what it attaches and in the folders that it opens.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=list(names))
    convert_peft_config_for_transformers(config, model, None)
    return [name for name in names if name not in config.target_modules]


def _stacked(modules: Sequence[tuple[str, Any]]) -> dict[str, tuple[int, ...]]:
    """Matrices of blocks that are not layers but slices of a parameter, as stacked experts are: name and shape."""
    import torch

    convolutions = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return {
        f"{name}.{own}": tuple(parameter.shape)
        for name, module in modules
        if _shape(module) is None and not isinstance(module, convolutions) and _place(f"{name}.") is not None
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 3 and min(parameter.shape[-2:]) > 1
    }


def _of_text(model: Any) -> list[tuple[str, Any]]:
    """Modules by name; of a model with towers for pictures or sound, those that read text, and the head."""
    modules = list(plain_modules(model))
    if model.config.get_text_config() is model.config:
        return modules
    decoder = model.get_decoder()
    prefix = next((f"{name}." for name, module in modules if module is decoder and name), "")
    return [(name, module) for name, module in modules if name.startswith(prefix) or "." not in name]


def _blocks(config: Any, names: Iterable[str]) -> Literal["decoder", "encoder"]:
    """The stack of a model that has one alone, by what its blocks stand in."""
    within = any("encoder" in name.split(".") for name in names if _place(name))
    return "encoder" if within and not getattr(config, "is_decoder", False) else "decoder"


def _stack(config: Any, name: str, blocks: Literal["decoder", "encoder"]) -> Literal["decoder", "encoder"]:
    """The stack that a module belongs to; what encoder and decoder share counts as the encoder's.

    Args:
        config: of the model.
        name: of the module.
        blocks: the stack of a model that has one alone.
    """
    if not getattr(config, "is_encoder_decoder", False):
        return blocks
    in_decoder = re.search(r"(^|\.)decoder(\.|$)", name.split(".encoder.")[0]) or _HEAD.search(name)
    return "decoder" if in_decoder else "encoder"


def plain_modules(model: Any) -> Iterator[tuple[str, Any]]:
    """Modules in order under the plain model's names; what wraps a layer is looked through, not listed.

    Each once, under its first name; what a matrix is made of is not listed.

    Args:
        model: a ``transformers`` model, also one that adapters were put into.

    >>> from tenfold.models.tiny import tiny_model
    >>> dict(plain_modules(tiny_model("llama").model))["model.layers.0.self_attn.q_proj"]
    Linear(in_features=64, out_features=64, bias=False)
    """
    seen: set[int] = set()

    def walk(name: str, module: Any) -> Iterator[tuple[str, Any]]:
        while (inner := _wrapped(module)) is not None:
            module = inner
        if id(module) in seen:
            return
        seen.add(id(module))
        yield name, module
        if (shape := _shape(module)) is not None and shape[2] in _MATRIX:
            return  # a matrix may be made of smaller ones (a compressed layer); they are not the model's own
        for child_name, child in module.named_children():
            yield from walk(f"{name}.{child_name}" if name else child_name, child)

    yield from walk("", plain_model(model))


def _wrapped(module: Any) -> Any:
    """What a PEFT layer (``base_layer``) or a trainable copy (``original_module``) stands in front of."""
    children = dict(module.named_children())
    return children.get("base_layer", children.get("original_module"))


def _shape(module: Any) -> tuple[int, int, Layout] | None:
    """(in, out, layout) of a module with weights; None for all others."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return module.nx, module.nf, "conv1d"
    if isinstance(module, torch.nn.Embedding):
        return module.num_embeddings, module.embedding_dim, "embedding"
    if isinstance(module, torch.nn.Linear) or (hasattr(module, "in_features") and hasattr(module, "out_features")):
        return module.in_features, module.out_features, "linear"
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.ndim == 1:
        return weight.shape[0], weight.shape[0], "norm"
    return None


def _sizes(config: Any) -> dict[str, int]:
    """The numbers of a `LayerMap`; transformers maps GPT-2's and T5's own names onto the common ones."""
    layers, encoder_layers = _number(config, "num_hidden_layers"), 0
    if getattr(config, "is_encoder_decoder", False):
        encoder_layers, layers = layers, _number(config, "num_decoder_layers") or _number(config, "decoder_layers")
    heads, width = _number(config, "num_attention_heads"), _number(config, "hidden_size")
    stated = _number(config, "head_dim") or _number(config, "d_kv")
    return {
        "layers": layers,
        "encoder_layers": encoder_layers,
        "hidden": width,
        "heads": heads,
        "kv_heads": _number(config, "num_key_value_heads") or heads,
        "head_dim": stated or (width // heads if heads else 0),
    }


def _number(config: Any, name: str) -> int:
    """A whole number of the configuration; 0 where it has none, or one for each layer."""
    try:
        value = getattr(config, name, 0)
    except RuntimeError:  # transformers' refusal where it differs by layers
        return 0
    return value if isinstance(value, int) else 0


def _split(role: str, out_features: int, sizes: dict[str, int]) -> tuple[tuple[str, int], ...]:
    """The parts of a fused matrix; the heads of keys follow from its size, whatever the configuration calls them."""
    if role == "gate_up":
        return (("gate", out_features // 2), ("up", out_features // 2))
    queries = sizes["heads"] * sizes["head_dim"]
    if role == "qkv" and queries and (rest := out_features - queries) > 0:
        return (("q", queries), ("k", rest // 2), ("v", rest // 2))
    return ()


def _unknown(model: Any) -> ModelError:
    """The refusal, with the names and counts of what is there."""
    names = [name for name, module in model.named_modules() if (shape := _shape(module)) and shape[2] in _MATRIX]
    counts = Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names)
    listed = ", ".join(f"{count} x {pattern}" for pattern, count in counts.items()) or "no linear layer"
    return ModelError(
        f"{model.config.model_type}: no linear layer in repeated blocks, so there is nothing to adapt; found {listed}",
        remedy="train all weights (--method full), or take another model",
    )
