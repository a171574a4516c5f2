"""How much attention each head gives to the marks: what steering changes, as a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from tenfold.attend.attention import Probe, installed, self_attentions
from tenfold.attend.text_marks import Marks
from tenfold.errors import ConfigError
from tenfold.models.inference import evaluating


def attention_mass(model: Any, marks: Marks) -> Tensor:
    """Share of the attention of each head that the last prompt token gives to the marked tokens.

    Read off the attention that really runs, steered within a `tenfold.attend.pasta.steer` block: the same call with
    values that are 1 on marked keys and 0 elsewhere. Works on every implementation.

    Args:
        model: a causal language model.
        marks: prompts with marks; rows without any are left out.

    Returns:
        ``[layers, heads]``, float32, mean over the rows; NaN for layers that do not go through the interface.

    Raises:
        ConfigError: no row has a mark.

    >>> from tenfold.attend.pasta import encode, from_tags, steer
    >>> from tenfold.models.tiny import tiny_model
    >>> opened = tiny_model("llama")
    >>> marks = encode(opened.tokenizer, [from_tags("It was <mark>red</mark>, she said.")])
    >>> plain = attention_mass(opened.model, marks)
    >>> with steer(opened.model, marks, heads={1: [2]}):
    ...     steered = attention_mass(opened.model, marks)
    >>> (steered > plain + 0.1).nonzero().tolist()
    [[1, 2]]
    """
    rows = marks.marked.any(1)
    if not rows.any():
        raise ConfigError("no row has a mark", remedy="mark what is to be looked at")
    attentions = self_attentions(model)
    heads = max(int(module.config.num_attention_heads) for module in attentions.values())
    mass = torch.full((max(attentions) + 1, heads), torch.nan)

    def probe(layer: int, value: Tensor, read: Callable[[Tensor], Tensor]) -> None:
        indicator = marks.marked.to(value.device, value.dtype)[:, None, :, None].expand_as(value)
        found = read(indicator.contiguous())[rows.to(value.device), -1, :, 0]
        mass[layer, : found.shape[1]] = found.float().mean(0).cpu()

    with evaluating(model), _probed(model, attentions, probe):
        model(**marks.inputs, use_cache=False)
    return mass


@contextmanager
def _probed(model: Any, attentions: dict[int, Any], probe: Probe) -> Iterator[None]:
    own = get_ident()

    def hand(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        return (args, {**kwargs, "probe": probe}) if get_ident() == own else None

    with ExitStack() as stack:
        stack.enter_context(installed(model))
        for module in attentions.values():
            stack.callback(module.register_forward_pre_hook(hand, with_kwargs=True).remove)
        yield
