"""The one attention function: what spans, steering and compressed caches do to a layer, in front of the model's own.

`installed` puts it in front of whatever implementation a model has: ``sdpa`` becomes ``tenfold_sdpa``, which is
registered with transformers together with the mask function of ``sdpa``. So masks stay what they were (packed rows,
sliding windows, static caches), a name with ``flash`` in it keeps it, and a layer that nothing touches runs the
implementation of before on the very same inputs.

What a layer is given arrives with the call, in the keyword arguments of its attention module:

* ``key_bias``: a tuple of `tenfold.kernels.biased.KeyBias`, which add up;
* ``probe``: something that looks on, such as the picture of the attention mass.

A compressed cache hands over a `tenfold.kernels.view.View` in the place of keys and values; it is read part by part.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from tenfold.errors import ConfigError, ModelError
from tenfold.kernels.biased import (
    KeyBias,
    biased_mask,
    has_fused,
    in_parts,
    lift,
    merge,
    split_heads,
    with_key_channel,
)
from tenfold.kernels.view import View, attend

PREFIX = "tenfold_"
FLASH_CHANNELS = 256
"""Most channels of a head that flash kernels take."""

Probe = Callable[[int, Tensor, Callable[[Tensor], Tensor]], None]


def self_attentions(model: nn.Module) -> dict[int, Any]:
    """The causal self-attention modules of a model by layer index: not its cross-attention, not its vision tower.

    Raises:
        ModelError: there is none that goes through transformers' attention interface (GPT-J, Falcon, Bloom, ...); a
            model of encoder and decoder.

    >>> from tenfold.models.tiny import tiny_model
    >>> sorted(self_attentions(tiny_model("llama").model))
    [0, 1]
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__}: a model of encoder and decoder reads its prompt where no causal attention is",
            remedy="take a decoder such as Llama, Qwen, Mistral, Gemma, Phi or GPT-2",
        )
    found: dict[int, Any] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        causal = getattr(module, "is_causal", False) is True and not getattr(module, "is_cross_attention", False)
        if isinstance(index, int) and causal and hasattr(module, "config") and _on_interface(module):
            found.setdefault(index, module)
    if not found:
        raise ModelError(
            f"{type(model).__name__}: no causal self-attention that uses transformers' attention interface",
            remedy="take a decoder such as Llama, Qwen, Mistral, Gemma, Phi or GPT-2; GPT-J and Falcon are not on it",
        )
    return found


def _on_interface(module: nn.Module) -> bool:
    return hasattr(sys.modules.get(type(module).__module__), "ALL_ATTENTION_FUNCTIONS")


@contextmanager
def installed(model: nn.Module) -> Iterator[None]:
    """Put the function in front of the model's own implementation while the block runs.

    Blocks that overlap share one installation, in whatever order and thread they end; the last restores the
    implementation, also after an exception. One that was set within the block stays.

    Raises:
        ModelError: the implementation was changed within an open block.

    >>> from tenfold.models.tiny import tiny_model
    >>> model = tiny_model("llama").model
    >>> with installed(model):
    ...     model.config._attn_implementation
    'tenfold_sdpa'
    >>> model.config._attn_implementation
    'sdpa'
    """
    with ExitStack() as stack:
        for config in {id(module.config): module.config for module in self_attentions(model).values()}.values():
            stack.callback(_give_back, _take(config))
        yield


@dataclass
class _Installation:
    """A configuration with our implementation, and how many blocks count on it."""

    config: Any
    before: str
    ours: str
    blocks: int = 0


_OPEN: dict[int, _Installation] = {}
"""By the identity of the configuration, which is kept alive here."""
_LOCK = threading.Lock()


def _take(config: Any) -> _Installation:
    with _LOCK:
        found = _OPEN.get(id(config))
        if found is None:
            before = str(config._attn_implementation)
            found = _Installation(config, before, _registered(before))
            config._attn_implementation = found.ours
            _OPEN[id(config)] = found
        elif config._attn_implementation != found.ours:
            raise _changed(config)
        found.blocks += 1
        return found


def _give_back(found: _Installation) -> None:
    with _LOCK:
        found.blocks -= 1
        if not found.blocks:
            del _OPEN[id(found.config)]
            if found.config._attn_implementation == found.ours:
                found.config._attn_implementation = found.before


def check_installed(module: Any) -> None:
    """Refuse to hand a layer what its implementation would ignore, or what it would read without a mask.

    Raises:
        ModelError: the implementation was changed within an open block, or its mask function is gone.
    """
    name = str(module.config._attn_implementation)
    if not name.startswith(PREFIX):
        raise _changed(module.config)
    check_mask(name)


def check_mask(name: str) -> None:
    """Refuse an implementation of ours whose mask function was lost: transformers then makes no mask, silently.

    Raises:
        ModelError: it is not in transformers' registry.
    """
    masks = AttentionMaskInterface._global_mapping
    if name not in masks and (name in _OWN or name.removeprefix(PREFIX) in masks):
        raise ModelError(
            f"the mask function of {name} is missing from transformers' AttentionMaskInterface: padding would be read",
            remedy="leave its entries alone while the model is used, or open the model again",
        )


def _changed(config: Any) -> ModelError:
    return ModelError(
        f"the attention implementation was set to {config._attn_implementation!r} within a block that steers the "
        "model, and that one would ignore the steering",
        remedy="set it before the block",
    )


def base_implementation(config: Any) -> str:
    """The implementation that a model has without ours.

    >>> from types import SimpleNamespace
    >>> base_implementation(SimpleNamespace(_attn_implementation="tenfold_sdpa"))
    'sdpa'
    """
    return str(config._attn_implementation).removeprefix(PREFIX)


_OWN: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}
"""Implementations of ours that stand in front of none: their function and mask function."""


def register(name: str, function: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Make an implementation known to transformers, with its mask function; `installed` repairs what is lost of it."""
    _OWN[name] = function, mask
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, mask)


def _registered(base: str) -> str:
    """The name of our function in front of an implementation, with both of its parts in transformers' registries.

    Both are looked at each time: a name without a mask function gets no mask at all, and padding is read.
    """
    if base.startswith(PREFIX):
        if base in _OWN:
            register(base, *_OWN[base])
        return base
    name, masks = PREFIX + base, AttentionMaskInterface._global_mapping
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, partial(attention, base=base))
    if base in masks:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    else:
        masks.pop(name, None)  # as for the implementation itself
    return name


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    base: str,
    key_bias: tuple[KeyBias, ...] = (),
    probe: Probe | None = None,
    **arguments: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer, as transformers calls it.

    Args:
        module: the attention module.
        query: ``[batch, heads, queries, head_dim]``.
        key: ``[batch, kv_heads, keys, head_dim]``, or the view of a compressed cache.
        value: as ``key``.
        attention_mask: as the mask function of ``base`` makes it, or as the caller gave it.
        base: the implementation that the model had before.
        key_bias: biases per (batch, head, key), added after scale and rotary positions; none leaves everything to
            ``base``.
        probe: looks on: it is given the layer's index, ``value``, and a function from other values to the output they
            would give; see `tenfold.attend.pasta.attention_share`.
        **arguments: what else transformers passes; ``base`` gets it.

    Returns:
        Output ``[batch, queries, heads, head_dim]``, and the weights where ``base`` gives them.
    """
    if isinstance(key, View):
        return _on_view(module, query, key, attention_mask, base, key_bias, probe, arguments)
    plain = partial(_function(module, base), module)
    if probe is not None:

        def read(values: Tensor) -> Tensor:
            return attention(module, query, key, values, attention_mask, base=base, key_bias=key_bias, **arguments)[0]

        layer: Any = module.layer_idx
        probe(layer, value, read)
    if not key_bias:
        return plain(query, key, value, attention_mask, **arguments)
    if any(bias.until is not None for bias in key_bias):

        def attend_with(some: tuple[KeyBias, ...]) -> tuple[Tensor, Tensor | None]:
            return attention(module, query, key, value, attention_mask, base=base, key_bias=some, **arguments)

        return in_parts(key_bias, attend_with)
    _refuse(module, base, key_bias, arguments)
    if any(bias.values.shape[1] != key.shape[2] for bias in key_bias):
        raise ModelError(
            f"layer {module.layer_idx}: {key.shape[2]} keys and log-strengths for {key_bias[0].values.shape[1]}: this "
            "model hands its cache to attention in a way of its own",
            remedy="generate with use_cache=False, or take another model",
        )
    scale = arguments.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if base == "sdpa" or key_bias[0].target is not None:
        return _biased_sdpa(plain, query, key, value, attention_mask, scale, key_bias, arguments), None
    if "flash" in base:
        value_size = value.shape[-1]
        for bias in key_bias:
            query, key, value = with_key_channel(query, key, value, scale, bias)
        _check_channels(module, base, query.shape[-1])
        output, weights = plain(query, key, value, attention_mask, **{**arguments, "scaling": scale})
        return output[..., :value_size].contiguous(), weights
    dense = sum_biases(key_bias, query)
    if base == "flex_attention":
        _check_takes_bias(plain)
        dense = dense.expand(-1, -1, query.shape[2], -1)
        return plain(query, key, value, attention_mask, position_bias=dense, **arguments)
    keys = key.shape[2]
    mask = None if attention_mask is None else attention_mask[..., :keys]
    return plain(query, key, value, biased_mask(mask, dense, query.shape[2], keys), **arguments)


def _on_view(
    module: nn.Module,
    query: Tensor,
    view: View,
    attention_mask: Any,
    base: str,
    key_bias: tuple[KeyBias, ...],
    probe: Probe | None,
    arguments: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Attention on a compressed cache; as long as nothing of it is packed, it is that on its exact tensors."""
    if not view.packed or probe is not None:  # a picture is drawn from whole tensors: it is no part of generating
        tensors = view.tensors()
        given = {"base": base, "key_bias": key_bias, "probe": probe, **arguments}
        output, weights = attention(module, query, *tensors, attention_mask, **given)
    else:
        weights = None
        if key_bias:
            _refuse(module, "eager", key_bias, arguments)
        scale = arguments.get("scaling")
        with torch.autocast(query.device.type, enabled=False):  # it computes in float32
            bias = sum_biases(key_bias, query.to(torch.promote_types(query.dtype, torch.float32))) if key_bias else None
            output = attend(
                query,
                view,
                _dense_mask(attention_mask, query.shape[2], view.tokens),
                query.shape[-1] ** -0.5 if scale is None else scale,
                bias=bias,
                lift=partial(lift, key_bias[0], query.shape[1])
                if key_bias and key_bias[0].target is not None
                else None,
                softcap=arguments.get("softcap"),
                sinks=arguments.get("s_aux"),
            ).transpose(1, 2)
    view.finish(partial(_seen_keys, attention_mask, view.tokens))
    return output, weights


def _dense_mask(mask: Any, queries: int, keys: int) -> Tensor | None:
    """A mask ``[batch or 1, heads or 1, queries, keys]``, also where the implementation takes one of padding."""
    if mask is None:
        return None
    if mask.ndim == 4:
        return mask[..., :keys]
    seen = mask[:, None, None, :keys].bool()
    if queries == 1:
        return seen
    return seen & seen.new_ones(queries, keys).tril(keys - queries)


def _seen_keys(mask: Tensor | None, keys: int) -> Tensor | None:
    """Keys that some query of some head sees: ``[batch or 1, keys]``, None for all; padding is not among them."""
    if mask is None:
        return None
    mask = mask[..., :keys]
    if mask.dtype.is_floating_point:
        mask = mask > torch.finfo(mask.dtype).min / 2
    if mask.ndim == 2:
        return mask.bool()
    # Most often the last query sees all, and the rest of a large mask need not be read.
    return None if bool(mask[:, :, -1].any(1).all()) else mask.bool().any(2).any(1)


def _refuse(module: nn.Module, base: str, key_bias: tuple[KeyBias, ...], arguments: dict[str, Any]) -> None:
    """Raise where the result would be another one than was asked for."""
    name = type(module).__name__
    softcap, sinks = arguments.get("softcap") is not None, arguments.get("s_aux") is not None
    if arguments.get("position_bias") is not None:
        raise ModelError(f"{name} has a bias of positions and takes no other", remedy="steer another model")
    if softcap and (base == "sdpa" or "flash" in base):  # sdpa knows no cap, and flash would cap the bias as well
        raise ModelError(f"{name} caps its scores and cannot be biased on {base}", remedy="open it with 'eager'")
    if any(bias.target is not None for bias in key_bias):
        if len(key_bias) > 1:
            raise ConfigError("target_mass within another steer block", remedy="give that block alone, or use alpha")
        if softcap or sinks:
            raise ModelError(f"target_mass: {name} caps its scores or has sinks", remedy="use alpha")


def _check_channels(module: nn.Module, base: str, channels: int) -> None:
    """Raise where the heads of a layer and the channels of the bias are more than a flash kernel takes."""
    if channels > FLASH_CHANNELS:
        raise ModelError(
            f"{type(module).__name__}: with its bias a head has {channels} channels, and {base} takes up to "
            f"{FLASH_CHANNELS}",
            remedy="open the model with attn_implementation='sdpa'",
        )


def _check_takes_bias(function: Callable[..., Any]) -> None:
    """Raise where transformers' flex attention would swallow the bias among its other arguments."""
    if "position_bias" not in inspect.signature(function).parameters:
        raise ModelError(
            f"flex_attention of transformers {transformers.__version__} takes no bias of keys",
            remedy="pip install -U transformers, or open the model with attn_implementation='sdpa'",
        )


def _biased_sdpa(
    plain: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    key_bias: tuple[KeyBias, ...],
    arguments: dict[str, Any],
) -> Tensor:
    """The fastest exact way: see `tenfold.kernels.biased`."""
    queries = query.shape[2]
    if mask is None and 1 < queries < key.shape[2]:  # the first prefill of a static cache: the rest is not written yet
        key, value = key[:, :, :queries], value[:, :, :queries]
        key_bias = tuple(bias.first_keys(queries) for bias in key_bias)
    bias = key_bias[0]
    simple = len(key_bias) == 1 and bias.weights is None and not arguments.get("dropout")
    simple = simple and not torch.compiler.is_compiling()
    if bias.target is not None or (simple and queries > 1 and bias.raised is not None and has_fused(query, key, value)):
        return merge(query, key, value, mask, scale, bias).transpose(1, 2).contiguous()
    if simple and queries > 1 and len(bias.heads) < query.shape[1]:
        output = plain(query, key, value, mask, **arguments)[0].transpose(1, 2)
        return split_heads(output, query, key, value, mask, scale, bias).transpose(1, 2).contiguous()
    dense = biased_mask(mask, sum_biases(key_bias, query), queries, key.shape[2])
    result: Tensor = plain(query, key, value, dense.contiguous(), **arguments)[0]
    return result


def sum_biases(key_bias: tuple[KeyBias, ...], query: Tensor) -> Tensor:
    """All biases of a layer together: ``[batch, heads, 1, keys]`` in the dtype of ``query``."""
    parts = [bias.dense(query.shape[1], query.dtype) for bias in key_bias]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def _function(module: nn.Module, base: str) -> Callable[..., Any]:
    if base == "eager":  # each model file has its own, with its own softcap and sinks
        own: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
        return own
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[base]
    return function
