"""The layer map: every matrix of a model by its role, whatever the architecture calls it."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tenfold.errors import ConfigError, ModelError
from tenfold.models.families import FAMILIES, GROUPS
from tenfold.models.head_sizes import head_dim, kv_heads

Layout = Literal["linear", "conv1d", "embedding", "norm"]


@dataclass(frozen=True)
class Slot:
    """One module with weights, and the part it plays.

    Args:
        name: of the module in the plain model, also when adapters wrap it: ``model.layers.0.self_attn.q_proj``.
        role: ``q k v o`` and ``qkv`` of self-attention, ``cross_q cross_k cross_v cross_o`` of T5's attention to the
            encoder, ``pos_q pos_k`` of DeBERTa's positions, ``gate up down`` and ``gate_up`` of a gated MLP,
            ``fc1 fc2`` of a plain one, ``embed``, ``position``, ``head``, ``norm``.
        layer: index of the block within its stack; None outside the blocks.
        in_features: size of the input; of an embedding, the number of rows.
        out_features: size of the output.
        layout: ``linear`` stores its weight as ``[out, in]``, ``conv1d`` (GPT-2) as ``[in, out]``.
        stack: ``decoder`` or ``encoder``. T5's shared embedding counts as the encoder's.
        split: for a fused role, the parts of the output in order, as (role, size).
    """

    name: str
    role: str
    layer: int | None
    in_features: int
    out_features: int
    layout: Layout
    stack: Literal["decoder", "encoder"]
    split: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class LayerMap:
    """The shape of a model and its slots in model order.

    Args:
        model_type: as the configuration names it.
        layers: blocks of the decoder; of the encoder where there is no decoder.
        encoder_layers: blocks of the encoder beside a decoder (T5); otherwise 0.
        hidden: width of the residual stream.
        heads: query heads per layer.
        kv_heads: key and value heads per layer.
        head_dim: size of one head.
        slots: every slot, in the order of the model's modules.
    """

    model_type: str
    layers: int
    encoder_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    slots: tuple[Slot, ...]

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
        candidates = [slot for slot in self.slots if slot.layout in ("linear", "conv1d")]
        chosen = {slot.name for target in targets for slot in self._matches(target, candidates)}
        if not chosen:
            raise ConfigError("targets: empty", remedy="name a role, a group such as all-linear, or a module")
        return tuple(slot for slot in candidates if slot.name in chosen)

    def _matches(self, target: str, candidates: list[Slot]) -> list[Slot]:
        roles = GROUPS.get(target, (target,))
        found = [slot for slot in candidates if slot.role in roles]
        found = found or [slot for slot in candidates if f".{slot.name}".endswith(f".{target}")]
        if not found:
            try:
                found = [slot for slot in candidates if re.fullmatch(target, slot.name)]
            except re.error:
                found = []
        if not found:
            raise self._no_match(target, candidates)
        return found

    def _no_match(self, target: str, candidates: list[Slot]) -> ConfigError:
        roles = list(dict.fromkeys(slot.role for slot in candidates))
        fused = next((slot for slot in candidates if target in dict(slot.split)), None)
        if fused is not None:
            problem = f"targets: {target!r} is fused into {fused.role!r} in this {self.model_type} model"
            return ConfigError(problem, remedy=f"give {fused.role!r} ({fused.name.rsplit('.', 1)[-1]})")
        known = [*roles, *GROUPS, *dict.fromkeys(slot.name.rsplit(".", 1)[-1] for slot in candidates)]
        near = difflib.get_close_matches(target, known, n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        return ConfigError(
            f"targets: {target!r} matches nothing in this {self.model_type} model{hint}",
            remedy=f"roles here: {', '.join(roles)}; groups: {', '.join(GROUPS)}; or part of a module name",
        )


def layer_map(model: Any) -> LayerMap:
    """Find out which module of a model plays which part.

    Works on models on the meta device (only shapes are read) and on models with PEFT adapters attached, whose slots
    have the names of the plain model.

    Args:
        model: a ``transformers`` model or a ``PeftModel``.

    Returns:
        The map.

    Raises:
        ModelError: an unknown architecture, a mixture of experts, or a block with a matrix that the architecture's
            table does not know; lists what was found.

    >>> from tenfold.models.tiny import tiny_model
    >>> found = layer_map(tiny_model("llama").model)
    >>> found.layers, found.heads, found.kv_heads, found.head_dim
    (2, 4, 2, 16)
    >>> found.slots[2]
    Slot(name='model.layers.0.self_attn.k_proj', role='k', layer=0, in_features=64, out_features=32, layout='linear', \
stack='decoder', split=())
    """
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    config = model.config
    family = FAMILIES.get(config.model_type)
    if family is None or _experts(config):
        raise _unknown(model)
    slots: list[Slot] = []
    strangers: list[str] = []
    patterns = family.compiled(bool(getattr(config, "is_gated_act", False)))
    sizes = _sizes(config)
    for name, module in _modules(model, patterns):
        match = next(((role, found) for pattern, role in patterns if (found := pattern.fullmatch(name))), None)
        shape = _shape(module)
        if match is None or shape is None:
            if shape is not None and shape[2] in ("linear", "conv1d") and family.in_block(name):
                strangers.append(name)
            continue
        role, found = match
        groups = found.groupdict()
        layer = groups.get("layer")
        slots.append(
            Slot(
                name=name,
                role=role,
                layer=None if layer is None else int(layer),
                in_features=shape[0],
                out_features=shape[1],
                layout=shape[2],
                stack=family.stack_of(name),
                split=_split(role, shape[1], sizes),
            )
        )
    if strangers or not any(slot.role in ("q", "qkv") for slot in slots):
        raise _unknown(model, strangers)
    return LayerMap(model_type=config.model_type, slots=tuple(slots), **sizes)


def _modules(model: Any, patterns: list[tuple[re.Pattern[str], str]]) -> Iterator[tuple[str, Any]]:
    """Modules in order under the plain model's names; what wraps a layer is looked through, not listed."""
    seen: set[int] = set()

    def walk(name: str, module: Any) -> Iterator[tuple[str, Any]]:
        while (inner := _wrapped(module)) is not None:
            module = inner
        if id(module) in seen:
            return
        seen.add(id(module))
        yield name, module
        if any(pattern.fullmatch(name) for pattern, _ in patterns):
            return  # a matrix may be made of smaller ones (a compressed layer); they are not the model's own
        for child_name, child in module.named_children():
            yield from walk(f"{name}.{child_name}" if name else child_name, child)

    yield from walk("", model)


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
    layers, encoder_layers = config.num_hidden_layers, 0
    if getattr(config, "is_encoder_decoder", False):
        encoder_layers, layers = layers, config.num_decoder_layers
    return {
        "layers": layers,
        "encoder_layers": encoder_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": kv_heads(config),
        "head_dim": head_dim(config),
    }


def _split(role: str, out_features: int, sizes: dict[str, int]) -> tuple[tuple[str, int], ...]:
    if role == "gate_up":
        return (("gate", out_features // 2), ("up", out_features // 2))
    if role == "qkv":
        keys = sizes["kv_heads"] * sizes["head_dim"]
        return (("q", sizes["heads"] * sizes["head_dim"]), ("k", keys), ("v", keys))
    return ()


def _experts(config: Any) -> bool:
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any((getattr(config, name, None) or 0) > 1 for name in names)


def _unknown(model: Any, strangers: Sequence[str] = ()) -> ModelError:
    """The refusal, with the names and counts of the matrices that a table entry would have to cover."""
    config = model.config
    names = strangers or [
        name for name, module in model.named_modules() if (shape := _shape(module)) and shape[2] in ("linear", "conv1d")
    ]
    counts = Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names)
    listed = ", ".join(f"{count} x {pattern}" for pattern, count in counts.items()) or "no linear layer"
    if _experts(config):
        problem = f"{config.model_type}: a mixture-of-experts model, which is not supported; found {listed}"
        return ModelError(problem, remedy="use a dense model")
    what = "matrices in its blocks that the layer map does not know" if strangers else "unknown to the layer map"
    return ModelError(
        f"{config.model_type}: {what}; found {listed}",
        remedy=f"add it to tenfold/models/families.py; supported: {', '.join(FAMILIES)}",
    )
