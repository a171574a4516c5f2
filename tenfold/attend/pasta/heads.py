"""Finding the heads to steer, at a fraction of the paper's cost (PASTA, section 3.2; specification, section 8.4).

The paper steers each head alone and generates. Here the measure is the margin of the next token, one backward pass
shortlists the heads of a task, and only those are steered alone: several in one batch, each from its own layer on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.attend.attention import base_implementation, installed, self_attentions
from tenfold.attend.pasta.blocks import given_hidden
from tenfold.attend.pasta.likelihood import continuation
from tenfold.attend.pasta.profiles import by_layer
from tenfold.attend.pasta.search import Head
from tenfold.attend.pasta.steering import log_strength, steer
from tenfold.attend.pasta.tasks import Item
from tenfold.attend.reach import reach
from tenfold.attend.text_marks import Marked, Marks, encode
from tenfold.errors import ConfigError, DataError
from tenfold.kernels.biased import KeyBias
from tenfold.models.inference import evaluating, input_device, takes_logits_to_keep

TellWhat = Callable[[int, int, str], None]
"""Progress: done, of how many, what."""


@dataclass(frozen=True)
class Batch:
    """Items of one forward pass.

    Args:
        marks: their prompts.
        target: first token of each target, ``[batch]``, int64.
        foils: first tokens of the foils, ``[batch, n]``, int64, filled up with -1.
    """

    marks: Marks
    target: Tensor
    foils: Tensor

    def margin(self, logits: Tensor) -> Tensor:
        """Log-odds of target against strongest foil, ``[batch]``, from next-token logits ``[batch, vocabulary]``.

        Above 0 the target is the most probable of the continuations.
        """
        foils = logits.gather(1, self.foils.clamp(min=0)).masked_fill(self.foils < 0, -torch.inf)
        return logits.gather(1, self.target[:, None])[:, 0] - foils.amax(1)


def batches_of(model: Any, tokenizer: Any, items: Sequence[Item], batch_size: int = 16) -> list[Batch]:
    """Items as tokens on the model's device.

    What target and foils have in common is read as part of the prompt; a foil that still begins with the same token as
    its target is left out.

    Raises:
        DataError: a target and foils that cannot be told apart, or no item at all.
        ConfigError: a continuation without a token.

    >>> from tenfold.attend.pasta.tasks import conflict_items
    >>> from tenfold.models.tiny import tiny_model
    >>> opened = tiny_model("llama")
    >>> [len(batch.target) for batch in batches_of(opened.model, opened.tokenizer, conflict_items(5), batch_size=3)]
    [3, 2]
    """
    if not items:
        raise DataError("no items to measure on", remedy="give at least one")
    device, found = input_device(model), []
    for start in range(0, len(items), batch_size):
        part = items[start : start + batch_size]
        chosen = [_told_apart(tokenizer, item) for item in part]
        names = [item.name or f"item {number}" for number, item in enumerate(part, start + 1)]
        most = max(len(foils) for _, _, foils in chosen)
        marks = encode(tokenizer, [prompt for prompt, _, _ in chosen], device=device, names=names)
        padded = torch.tensor([foils + [-1] * (most - len(foils)) for _, _, foils in chosen], device=device)
        found.append(Batch(marks, torch.tensor([target for _, target, _ in chosen], device=device), padded))
    return found


def _told_apart(tokenizer: Any, item: Item) -> tuple[Marked, int, list[int]]:
    """The prompt up to where target and foils part, and the next token of each."""
    ends = (item.target, *item.foils)
    common = max(size for size in range(min(map(len, ends)) + 1) if len({end[:size] for end in ends}) == 1)
    for shared in (0, common):
        prompt = replace(item.prompt, text=item.prompt.text + item.target[:shared])
        target, *foils = [continuation(tokenizer, prompt, end[shared:])[0] for end in ends]
        others = [token for token in dict.fromkeys(foils) if token != target]
        if others:
            return prompt, target, others
    raise DataError(
        f"{item.name and item.name + ': '}{item.target!r} and {item.foils[0]!r} begin with the same token",
        remedy="give continuations that differ from their first token on",
    )


def margins(
    model: Any,
    batches: Sequence[Batch],
    heads: Mapping[int, Sequence[int]] | None = None,
    *,
    alpha: float = 0.01,
    make_cache: Callable[[], Any] | None = None,
) -> Tensor:
    """Margin of each item, ``[items]``, float32, plain or with these heads steered.

    With ``make_cache`` the last token of a prompt is read through a cache that the others have been read into; without,
    all are read at once.

    >>> from tenfold.attend.pasta.tasks import conflict_items
    >>> from tenfold.models.tiny import tiny_model
    >>> opened = tiny_model("llama")
    >>> batches = batches_of(opened.model, opened.tokenizer, conflict_items(4))
    >>> bool((margins(opened.model, batches) == margins(opened.model, batches, {0: [1]})).any())
    False
    """
    found = []
    with evaluating(model):
        for batch in batches:
            with ExitStack() as stack:
                if heads:
                    stack.enter_context(steer(model, batch.marks, heads=heads, alpha=alpha))
                cache = None if make_cache is None else make_cache()
                found.append(batch.margin(_next(model, batch.marks.inputs, cache)))
    return torch.cat(found)


def gradients(model: Any, batches: Sequence[Batch], *, alpha: float = 0.01) -> dict[Head, float]:
    """Change of the mean margin when the steering of a head begins, for all heads from one backward pass a batch.

    The log-strengths of a head are multiplied by a weight; this is the derivative at weight 0.

    >>> from tenfold.attend.pasta.tasks import conflict_items
    >>> from tenfold.models.tiny import tiny_model
    >>> opened = tiny_model("llama")
    >>> len(gradients(opened.model, batches_of(opened.model, opened.tokenizer, conflict_items(2))))
    8
    """
    counts = steerable(model, batches)
    total = {layer: torch.zeros(count) for layer, count in counts.items()}
    with evaluating(model), _frozen(model), torch.enable_grad():
        for batch in batches:
            values = log_strength(batch.marks, alpha)
            weights = {
                layer: torch.zeros(count, device=values.device, requires_grad=True) for layer, count in counts.items()
            }
            with _weighted(model, values, weights):
                margin = batch.margin(_next(model, batch.marks.inputs)).sum()
            for layer, slope in zip(weights, torch.autograd.grad(margin, list(weights.values())), strict=True):
                total[layer] += slope.float().cpu()
    items = sum(len(batch.target) for batch in batches)
    return {(layer, head): float(slope) / items for layer, row in total.items() for head, slope in enumerate(row)}


def effects(
    model: Any,
    batches: Sequence[Batch],
    heads: Sequence[Head],
    *,
    alpha: float = 0.01,
    rows: int = 64,
    tell: TellWhat | None = None,
) -> dict[Head, float]:
    """Change of the mean margin when a head is steered alone, exactly, for each of these heads.

    Different heads go into different rows of one batch, and a pass begins at the layer of its heads, from the hidden
    states of the plain pass; what comes out is that of whole passes (a model for which it is not is run as a whole).

    Args:
        model: a causal language model on sdpa or eager.
        batches: items, as `batches_of` makes them.
        heads: which to measure.
        alpha: factor of the attention to unmarked tokens.
        rows: sequences of one forward pass.
        tell: called with the passes done, all passes, and a text.

    >>> from tenfold.attend.pasta.tasks import conflict_items
    >>> from tenfold.models.tiny import tiny_model
    >>> opened = tiny_model("llama")
    >>> batches = batches_of(opened.model, opened.tokenizer, conflict_items(2))
    >>> change = effects(opened.model, batches, [(1, 3)])[1, 3]
    >>> steered = margins(opened.model, batches, {1: [3]}).mean() - margins(opened.model, batches).mean()
    >>> abs(change - float(steered)) < 1e-5
    True
    """
    counts = steerable(model, batches)
    total = dict.fromkeys(heads, 0.0)
    layers = _layers(model)
    work = [(batch, layer, part) for batch in batches for layer, part in _parts(heads, len(batch.target), rows)]
    plain: dict[int, tuple[Tensor, Tensor, list[Tensor]]] = {}
    with evaluating(model):
        for done, (batch, layer, part) in enumerate(work):
            if tell is not None:
                tell(done, len(work), f"layer {layer}")
            if id(batch) not in plain:
                plain = {id(batch): _remembered(model, layers, batch, alpha)}
            margin, values, hidden = plain[id(batch)]
            size = len(batch.target)
            weights = torch.zeros(len(part), size, counts[layer], device=values.device)
            weights[range(len(part)), :, list(part)] = 1.0
            inputs = {name: tensor.repeat(len(part), 1) for name, tensor in batch.marks.inputs.items()}
            with ExitStack() as stack:
                stack.enter_context(_weighted(model, values.repeat(len(part), 1), {layer: weights.flatten(0, 1)}))
                if hidden:
                    repeated = hidden[layer].repeat(len(part), 1, 1)
                    stack.enter_context(_starting_at(layers, layer, repeated))
                logits = _next(model, inputs)
            for index, head in enumerate(part):
                steered = batch.margin(logits[index * size : (index + 1) * size])
                total[layer, head] += float((steered - margin).sum())
    items = sum(len(batch.target) for batch in batches)
    return {head: change / items for head, change in total.items()}


def _parts(heads: Sequence[Head], size: int, rows: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Heads of one layer, as many as fit into a forward pass of about so many rows."""
    for layer, indices in by_layer(heads).items():
        step = max(1, rows // size)
        for start in range(0, len(indices), step):
            yield layer, indices[start : start + step]


def rank(values: Mapping[Head, float]) -> list[Head]:
    """Heads from best to worst; ties by layer and head, and what is not a number last.

    >>> rank({(1, 0): 0.5, (0, 1): 0.5, (2, 0): 9.0})
    [(2, 0), (0, 1), (1, 0)]
    """
    return sorted(values, key=lambda head: (math.isnan(values[head]), -values[head], head))


def intersect(rankings: Mapping[str, Sequence[Head]], k: int) -> tuple[Head, ...]:
    """Heads among the first ``k`` of every task: the paper's multi-task set.

    >>> intersect({"a": [(0, 0), (0, 1), (1, 0)], "b": [(1, 0), (0, 1), (0, 0)]}, 2)
    ((0, 1),)
    """
    sets = [set(ranking[:k]) for ranking in rankings.values()]
    return tuple(sorted(set.intersection(*sets))) if sets else ()


def candidates(rankings: Mapping[str, Sequence[Head]], sizes: Sequence[int]) -> dict[int, tuple[Head, ...]]:
    """For each size the smallest ``k`` whose intersection has at least so many heads, and that intersection.

    >>> candidates({"a": [(0, 0), (0, 1), (1, 0)]}, [1, 2, 9])
    {1: ((0, 0),), 2: ((0, 0), (0, 1))}
    """
    most = max(map(len, rankings.values()))
    found: dict[int, tuple[Head, ...]] = {}
    k = 0
    for size in sorted(sizes):
        while k < most and len(intersect(rankings, k)) < size:
            k += 1
        heads = intersect(rankings, k)
        if len(heads) >= size:
            found[k] = heads
    return found


def steerable(model: Any, batches: Sequence[Batch] = ()) -> dict[int, int]:
    """Heads of each layer that can be steered over prompts as long as these: not those of shorter windows.

    Raises:
        ConfigError: a model on an implementation without a mask (flash), or one that has no such layer.

    >>> from tenfold.models.tiny import tiny_model
    >>> steerable(tiny_model("llama").model)
    {0: 4, 1: 4}
    """
    attentions = self_attentions(model)
    base = base_implementation(attentions[min(attentions)].config)
    if base not in ("sdpa", "eager"):
        raise ConfigError(
            f"heads cannot be found on {base!r}: it takes no mask of weights",
            remedy="model.set_attn_implementation('sdpa') first; the profile then serves every implementation",
        )
    longest = max((batch.marks.input_ids.shape[1] for batch in batches), default=0)
    counts = {
        layer: int(module.config.num_attention_heads)
        for layer, module in sorted(attentions.items())
        if (reach(module) or longest) >= longest
    }
    if not counts:
        raise ConfigError(f"every layer looks back fewer than {longest} tokens", remedy="profile on shorter prompts")
    return counts


def _next(model: Any, inputs: Mapping[str, Tensor], cache: Any = None) -> Tensor:
    """Next-token logits, ``[batch, vocabulary]``, float32."""
    keep = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}
    if cache is not None and inputs["input_ids"].shape[1] > 1:
        read: dict[str, Any] = {"past_key_values": cache, "use_cache": True, **keep}
        model(**{name: tensor[:, :-1] for name, tensor in inputs.items()}, **read)
        step = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": inputs["attention_mask"]}
        logits: Tensor = model(**step, **read).logits
    else:
        logits = model(**inputs, use_cache=False, **keep).logits
    return logits[:, -1].float()


@contextmanager
def _weighted(model: Any, values: Tensor, weights: Mapping[int, Tensor]) -> Iterator[None]:
    """Steer all heads of some layers, each by its own weight, ``[heads]`` or ``[batch, heads]``; prompts only."""
    attentions = self_attentions(model)
    with ExitStack() as stack:
        stack.enter_context(installed(model))
        for layer, weight in weights.items():
            heads = torch.arange(weight.shape[-1], device=weight.device)
            hook = partial(_hand, KeyBias(heads, values, weights=weight))
            stack.callback(attentions[layer].register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _hand(bias: KeyBias, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    device = given_hidden(args, kwargs).device
    weights = None if bias.weights is None else bias.weights.to(device)
    here = replace(bias, heads=bias.heads.to(device), values=bias.values.to(device), weights=weights)
    return args, {**kwargs, "key_bias": (*kwargs.get("key_bias", ()), here)}


def _layers(model: Any) -> list[nn.Module]:
    """The decoder layers in order, by the index of their attention; empty where they do not form one list."""
    attentions = self_attentions(model)
    names = {module: name for name, module in model.named_modules()}
    parents = [names[attentions[index]].rpartition(".")[0] for index in sorted(attentions)]
    container = parents[0].rpartition(".")[0]
    if parents != [f"{container}.{index}" for index in range(len(parents))]:
        return []
    return [model.get_submodule(parent) for parent in parents]


def _remembered(model: Any, layers: list[nn.Module], batch: Batch, alpha: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Plain margin, log-strengths, and what each layer was given in the plain pass (empty where that is no use)."""
    hidden: list[Tensor] = []
    tensors = True

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal tensors
        hidden.append(given_hidden(args, kwargs))
        tensors = tensors and isinstance(output, Tensor)

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(keep, with_kwargs=True).remove)
        logits = _next(model, batch.marks.inputs)
    middle = len(layers) // 2
    if hidden and tensors:
        with _starting_at(layers, middle, hidden[middle]):
            tensors = torch.equal(_next(model, batch.marks.inputs), logits)
    # Where something besides the hidden states goes from layer to layer, every pass is a whole one.
    return batch.margin(logits), log_strength(batch.marks, alpha), hidden if tensors else []


@contextmanager
def _starting_at(layers: list[nn.Module], first: int, hidden: Tensor) -> Iterator[None]:
    """Let the layers before ``first`` do nothing, and give it these hidden states, ``[batch, tokens, hidden]``."""

    def skip(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return hidden_states

    def put(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    own = [(layer, layer.__dict__.get("forward")) for layer in layers[:first]]
    handle = layers[first].register_forward_pre_hook(put, with_kwargs=True)
    try:
        for layer, _ in own:
            layer.forward = skip
        yield
    finally:
        handle.remove()
        for layer, forward in own:
            del layer.forward
            if forward is not None:  # accelerate puts one on the instance
                layer.forward = forward


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients of weights for a while: only those of the steering are asked for."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
