"""The one attention function: what spans, steering and compressed caches do to a layer, in front of the model's own.

`installed` puts it in front of whatever implementation a model has: ``sdpa`` becomes ``tenfold_sdpa``, which is
registered with transformers together with the mask function of ``sdpa``. So masks stay what they were (packed rows,
sliding windows, static caches), a name with ``flash`` in it keeps it, and a layer that nothing touches runs the
implementation of before on the very same inputs.

What a layer is given arrives with the call, in the keyword arguments of its attention module:

* ``key_bias``: a tuple of `tenfold.kernels.biased.KeyBias`, which add up;
* ``probe``: something that looks on, such as the picture of the attention mass.

A cache of ours hands over a `tenfold.attend.handle.CacheHandle` in the place of keys and values.
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

import transformers
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from tenfold.attend.handle import CacheHandle
from tenfold.errors import ConfigError, ModelError
from tenfold.kernels.biased import KeyBias, biased_attention, in_parts

PREFIX = "tenfold_"

Probe = Callable[[int, Tensor, Callable[[Tensor], Tensor]], None]


def self_attentions(model: nn.Module) -> dict[int, Any]:
    """The causal self-attention modules of a model by layer index: not its cross-attention, not its vision tower.

    Raises:
        ModelError: there is none that goes through transformers' attention interface (GPT-J, Falcon, Bloom, Mamba), or
            none that is of one layer alone (Zamba2); a model of encoder and decoder.

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
        # Zamba2 runs one module in several layers and numbers it -1.
        if isinstance(index, int) and index >= 0 and causal and hasattr(module, "config") and _on_interface(module):
            found.setdefault(index, module)
    if not found:
        raise ModelError(
            f"{type(model).__name__}: no causal self-attention that uses transformers' attention interface",
            remedy="leave steering, packed caches and local spans out (adapt, evaluate and generate need none), or "
            "take a model such as Llama, Qwen, Mistral, Gemma, Phi or GPT-2",
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


def still_in_front(config: Any, implementation: str) -> str:
    """An implementation that was ours while a block was open: without us, if none is open any more.

    Args:
        config: of the layers.
        implementation: that was found there earlier.

    >>> from types import SimpleNamespace
    >>> still_in_front(SimpleNamespace(), "tenfold_sdpa")
    'sdpa'
    """
    with _LOCK:
        return implementation if id(config) in _OPEN else implementation.removeprefix(PREFIX)


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


_READERS: set[Callable[..., Any]] = set()
"""Functions of ours that read the handles of caches."""


def reader(config: Any) -> Callable[..., Any] | None:
    """Our function that the attention of a model runs as now, where it reads handles of caches; None for any other.

    >>> from tenfold.models.tiny import tiny_model
    >>> model = tiny_model("llama").model
    >>> reader(model.config) is None
    True
    >>> with installed(model):
    ...     reader(model.config).func.__name__
    'attention'
    """
    function = ALL_ATTENTION_FUNCTIONS.get(str(config._attn_implementation))
    return function if function in _READERS else None


def register(name: str, function: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Make an implementation known to transformers, with its mask function; `installed` repairs what is lost of it."""
    _OWN[name] = function, mask
    _READERS.add(function)
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
        function = partial(attention, base=base)
        AttentionInterface.register(name, function)
        if base != "flex_attention":  # its masks are not tensors
            _READERS.add(function)
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
        key: ``[batch, kv_heads, keys, head_dim]``, or the handle of a cache.
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
    if isinstance(key, CacheHandle):
        if probe is None and not key.exact:
            return _on_handle(module, query, key, attention_mask, key_bias, arguments), None
        key, value = key.dense(attention_mask)  # a picture is drawn from whole tensors: it is not part of generating
    plain = partial(_function(module, base), module, **arguments)
    if probe is not None:

        def read(values: Tensor) -> Tensor:
            return attention(module, query, key, values, attention_mask, base=base, key_bias=key_bias, **arguments)[0]

        layer: Any = module.layer_idx
        probe(layer, value, read)
    if not key_bias:
        return plain(query, key, value, attention_mask)
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
    dropout = bool(arguments.get("dropout"))
    return biased_attention(base, plain, query, key, value, attention_mask, scale, key_bias, dropout=dropout)


def _on_handle(
    module: nn.Module,
    query: Tensor,
    handle: CacheHandle,
    attention_mask: Any,
    key_bias: tuple[KeyBias, ...],
    arguments: dict[str, Any],
) -> Tensor:
    """Attention on what a cache keeps, as the cache computes it."""
    if key_bias:
        _refuse(module, "eager", key_bias, arguments)

    def attend_with(some: tuple[KeyBias, ...]) -> tuple[Tensor, None]:
        return handle.attend(module, query, attention_mask, some, **arguments), None

    return in_parts(key_bias, attend_with)[0]


def _refuse(module: nn.Module, base: str, key_bias: tuple[KeyBias, ...], arguments: dict[str, Any]) -> None:
    """Raise where the result would be another one than was asked for."""
    name = type(module).__name__
    softcap, sinks = arguments.get("softcap") is not None, arguments.get("s_aux") is not None
    if arguments.get("position_bias") is not None:
        raise ModelError(f"{name} has a bias of positions and takes no other", remedy="steer another model")
    if softcap and (base == "sdpa" or "flash" in base):  # sdpa knows no cap, and flash would cap the bias as well
        raise ModelError(f"{name} caps its scores and cannot be biased on {base}", remedy="open it with 'eager'")
    if base == "flex_attention" and key_bias[0].target is None:
        _check_takes_bias(_function(module, base))
    if any(bias.target is not None for bias in key_bias):
        if len(key_bias) > 1:
            raise ConfigError("target_mass within another steer block", remedy="give that block alone, or use alpha")
        if softcap or sinks:
            raise ModelError(f"target_mass: {name} caps its scores or has sinks", remedy="use alpha")


def _check_takes_bias(function: Callable[..., Any]) -> None:
    """Raise where transformers' flex attention would swallow the bias among its other arguments."""
    if "position_bias" not in inspect.signature(function).parameters:
        raise ModelError(
            f"flex_attention of transformers {transformers.__version__} takes no bias of keys",
            remedy="pip install -U transformers, or open the model with attn_implementation='sdpa'",
        )


def _function(module: nn.Module, base: str) -> Callable[..., Any]:
    if base == "eager":  # each model file has its own, with its own softcap and sinks
        own: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
        return own
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[base]
    return function
