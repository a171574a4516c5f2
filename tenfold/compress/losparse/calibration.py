"""What calibration texts say about each matrix: which inputs it sees, and how much the loss depends on its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tenfold.models.inference import evaluating, input_device, takes_cache

BATCH_TOKENS = 1024
"""Tokens that are read at once."""
GRAM_BYTES = 2**31
"""Moments that are held at once; a model with more of them is read in several passes."""

Tell = Callable[[str, int, int], None]
"""Called with what is done, how many steps of it are, and how many there will be."""


class Moments:
    r"""Sums over tokens of what a matrix reads: products of channels, from which every squared error follows.

    Args:
        like: inputs of the matrix, ``[..., in]``; sums are on their device, in float32 (float64 for float64).
        paired: also take the inputs that the matrix would have read in the model as it was, :math:`x`, beside those
            that it reads now, :math:`\tilde x`.
        measured: of pairs, also take what an error needs and a fit does not.
    """

    def __init__(self, like: Tensor, *, paired: bool = False, measured: bool = False) -> None:
        dtype = torch.promote_types(like.dtype, torch.float32)
        zeros = torch.zeros(like.shape[-1], like.shape[-1], dtype=dtype, device=like.device)
        self.tokens = 0
        self.own = zeros
        r""":math:`\sum\tilde x\tilde x^\top`, ``[in, in]``."""
        self.cross = zeros.clone() if paired else self.own
        r""":math:`\sum x\tilde x^\top`."""
        self.before = zeros.clone() if paired and measured else self.own
        r""":math:`\sum xx^\top`."""

    def add(self, own: Tensor, before: Tensor | None = None) -> None:
        """Take in tokens, ``[..., in]``; in pairs with what came in their place before."""
        own = own.detach().reshape(-1, own.shape[-1]).to(self.own.dtype)
        self.tokens += len(own)
        self.own.addmm_(own.T, own)
        if before is not None:
            before = before.detach().reshape(own.shape).to(own)
            self.cross.addmm_(before.T, own)
            if self.before is not self.own:
                self.before.addmm_(before.T, before)


def equal_batches(passages: Sequence[Tensor], device: torch.device, tokens: int = BATCH_TOKENS) -> list[Tensor]:
    """Passages of one length together, ``[passages, tokens]``, in order; no padding."""
    by_length: dict[int, list[Tensor]] = {}
    for passage in passages:
        by_length.setdefault(len(passage), []).append(passage)
    return [
        torch.stack(together[first : first + size]).to(device)
        for length, together in by_length.items()
        for size in [max(1, tokens // length)]
        for first in range(0, len(together), size)
    ]


def read(model: Any, ids: Tensor) -> Any:
    """The forward pass of a batch, whatever the model's architecture; a decoder beside an encoder reads it as well."""
    inputs: dict[str, Any] = {"input_ids": ids}
    if takes_cache(model):
        inputs["use_cache"] = False
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return model(**inputs)


def weight_of(module: nn.Module) -> Tensor:
    """The matrix of a layer as ``[out, in]``, of a ``Conv1D`` a view of its transpose."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def sensitivity(
    model: nn.Module, passages: Sequence[Tensor], names: Iterable[str], *, seed: int = 0, tell: Tell | None = None
) -> dict[str, Tensor]:
    r"""How much the loss depends on the outputs :math:`y` of each matrix: :math:`B=E[gg^\top]` of its gradients there.

    The labels are the model's own, as likely as it finds them, so that :math:`B` is the Fisher information of
    :math:`y`: a change :math:`\delta` of the outputs costs :math:`\tfrac12\delta^\top B\delta` of loss, in the model's
    own units and whatever the text. A single score is read as the mean of a variance of 1.

    Args:
        model: any model with logits.
        passages: token ids, ``[tokens]`` each.
        names: of the matrices.
        seed: of the draws.
        tell: hears of the batches.

    Returns:
        ``[out, out]`` of each matrix, float32; ``[out]``, the diagonal alone, of all where the whole would take more
        than `GRAM_BYTES`. Without those that no token reached. What lies off the diagonal is shrunk by
        ``out / (out + tokens)``: few tokens say little of it.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = dict.fromkeys(names, 0)
    whole = sum(4 * weight_of(model.get_submodule(name)).shape[0] ** 2 for name in counts) <= GRAM_BYTES

    def watch(name: str) -> Callable[..., None]:
        def on_gradient(gradient: Tensor) -> None:
            rows = gradient.reshape(-1, gradient.shape[-1]).float()
            if name not in sums:
                sums[name] = rows.new_zeros((rows.shape[1],) * (2 if whole else 1))
            if whole:
                sums[name].addmm_(rows.T, rows)
            else:
                sums[name] += rows.square().sum(0)
            counts[name] += len(rows)

        def on_output(module: Any, inputs: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(on_gradient)

        return on_output

    def differentiable(module: Any, inputs: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_()

    hooks = [model.get_submodule(name).register_forward_hook(watch(name)) for name in counts]
    embeddings = {model.get_input_embeddings(), *(m for m in model.modules() if isinstance(m, nn.Embedding))}  # type: ignore[operator]
    hooks += [module.register_forward_hook(differentiable) for module in embeddings]
    batches = equal_batches(passages, input_device(model), BATCH_TOKENS // 2)
    generator = torch.Generator().manual_seed(seed)
    try:
        with evaluating(model), frozen(model), torch.enable_grad():
            for done, ids in enumerate(batches, 1):
                own_loss(read(model, ids).logits, generator).backward()
                if tell is not None:
                    tell("sensitivity", done, len(batches))
    finally:
        for hook in hooks:
            hook.remove()
    for name, found in sums.items():
        found /= counts[name]
        if whole:
            own = found.diagonal().clone()
            found *= counts[name] / (counts[name] + len(own))
            found.diagonal().copy_(own)
    return sums


def own_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    r"""A sum over tokens whose gradient has the covariance of that of the loss on labels that the model draws itself.

    That is :math:`\operatorname{diag}p-pp^\top` at the logits, as of :math:`s-p\sum s` with
    :math:`s=\sqrt p\,\varepsilon`. A label that is drawn has it too, but a rare one counts for so much that many more
    tokens are needed.
    """
    flat = logits.reshape(-1, logits.shape[-1]).float()
    noise = torch.randn(flat.shape, generator=generator).to(flat.device)
    if flat.shape[-1] > 1:
        with torch.no_grad():
            likely = flat.softmax(-1)
            noise = noise.mul_(likely.sqrt())
            noise = noise.sub_(likely.mul_(noise.sum(-1, keepdim=True)))
    return (flat * noise).sum()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter takes a gradient; afterwards those that did do again."""
    free = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in free:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in free:
            parameter.requires_grad_(True)


def moments(
    model: nn.Module, batches: Sequence[Tensor], names: Sequence[str], *, tell: Tell | None = None
) -> Iterator[tuple[str, Moments]]:
    """What each matrix reads in the model as it is, by passes over the texts that hold `GRAM_BYTES` at once.

    Matrices that read the same inputs (queries, keys and values) share their moments. One that no token reaches has
    none and is not among the results.
    """
    sizes = {name: 4 * weight_of(model.get_submodule(name)).shape[1] ** 2 for name in names}
    parts: list[list[str]] = [[]]
    held = 0
    for name in names:
        if parts[-1] and held + sizes[name] > GRAM_BYTES:
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += sizes[name]
    for number, part in enumerate(parts):
        collected: dict[str, Moments] = {}
        with evaluating(model), inputs_of(model, part) as seen:
            for done, ids in enumerate(batches, 1):
                read(model, ids)
                for leader, followers in same_inputs(seen).items():
                    for own in seen[leader]:
                        collected.setdefault(leader, Moments(own)).add(own)
                    for follower in followers:
                        collected[follower] = collected[leader]
                seen.clear()
                if tell is not None:
                    tell("inputs", number * len(batches) + done, len(parts) * len(batches))
        yield from ((name, collected.pop(name)) for name in part if name in collected)


@contextmanager
def inputs_of(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what matrices read, call by call, in the order of the first calls."""
    seen: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        def on_input(module: Any, inputs: tuple[Tensor, ...]) -> None:
            seen.setdefault(name, []).append(inputs[0].detach())

        return on_input

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def same_inputs(seen: Mapping[str, Sequence[Tensor]]) -> dict[str, list[str]]:
    """Matrices by the first one that reads the very same inputs."""
    found: dict[str, list[str]] = {}
    for name, inputs in seen.items():
        for leader, followers in found.items():
            same = len(inputs) == len(seen[leader])
            if same and all(_same(one, other) for one, other in zip(inputs, seen[leader], strict=True)):
                followers.append(name)
                break
        else:
            found[name] = []
    return found


def _same(one: Tensor, other: Tensor) -> bool:
    return (
        one.numel() > 0
        and one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
    )
