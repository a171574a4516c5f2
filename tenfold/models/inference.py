"""What every measurement needs around a model: evaluation mode, its device, token ids of a wanted length."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.errors import ModelError

_SENTENCE = "The river rises in the hills to the north, passes two old mills and reaches the sea after ninety miles. "


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Run without gradients and with dropout off; afterwards every module is in the mode it was in.

    ``no_grad`` rather than ``inference_mode``: buffers that a model computes on first use stay usable for training.

    >>> layer = torch.nn.Linear(1, 1)
    >>> with evaluating(layer) as model:
    ...     model.training, torch.is_grad_enabled()
    (False, False)
    >>> layer.training
    True
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module in training:
            module.training = True


def input_device(model: Any) -> torch.device:
    """Where token ids must be: the device of the input embeddings, also for a model spread over several devices."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def machine(device: torch.device) -> str:
    """What a measured time on a device depends on, beside other work: its kind and, on the CPU, the threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def processor() -> str:
    """The kind of this machine's processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished, so that a clock reads the work and not its launch."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def takes_logits_to_keep(model: Any) -> bool:
    """Whether the forward pass can be asked for the logits of some positions only."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def takes_cache(model: Any) -> bool:
    """Whether the forward pass takes and returns ``past_key_values``.

    Mamba, RWKV, xLSTM and XLNet keep their past in states of their own, under other names; GPT-1 keeps none.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "past_key_values" in inspect.signature(inner.forward).parameters


def max_positions(model: Any) -> int | None:
    """How many tokens the model was built for, where its configuration says so."""
    value = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None


def prompt_ids(tokenizer: Any, tokens: int, batch_size: int, device: torch.device) -> torch.Tensor:
    """English text of exactly ``tokens`` tokens, the same in each row of the batch.

    Returns:
        ``[batch, tokens]``, int64, on ``device``.
    """
    ids: list[int] = tokenizer(_SENTENCE * tokens, add_special_tokens=False, verbose=False)["input_ids"][:tokens]
    if len(ids) < tokens:
        raise ModelError(f"the tokenizer makes {len(ids)} tokens of {tokens} sentences", remedy="check the tokenizer")
    return torch.tensor([ids] * batch_size, device=device)


def text_loss(model: Any, ids: Tensor, scored: Tensor) -> Tensor:
    """Mean negative log-likelihood of the scored tokens of a text, in nats; with a gradient where one is wanted.

    Args:
        model: a causal language model.
        ids: ``[tokens]``.
        scored: ``[tokens]``, bool; the first token has no prediction and counts never.
    """
    return torch.nn.functional.cross_entropy(*predictions_at(model, ids, scored))


def predictions_at(
    model: Any, ids: Tensor, scored: Tensor, *, make_cache: Callable[[], Any] | None = None, step: int = 64
) -> tuple[Tensor, Tensor]:
    """Logits ``[scored, vocabulary]``, float32, and the tokens that came, ``[scored]``.

    Args:
        model: a causal language model.
        ids: ``[tokens]``.
        scored: ``[tokens]``, bool.
        make_cache: makes the cache that the text before the first scored token is read into at once, as a prompt is;
            the rest is read through it. By default all is read at once, without a cache.
        step: tokens of the rest that are read at once.
    """
    ids, scored = ids.to(input_device(model)), scored.to(input_device(model))
    before = scored[1:].nonzero()[:, 0]
    if make_cache is not None:
        return _through_cache(model, ids, before, make_cache(), step), ids[before + 1]
    if takes_logits_to_keep(model):  # those of a long text are larger than all else
        logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=before).logits[0]
    else:
        logits = model(input_ids=ids[None], use_cache=False).logits[0, before]
    return logits.float(), ids[before + 1]


def _through_cache(model: Any, ids: Tensor, before: Tensor, cache: Any, step: int) -> Tensor:
    """Logits at some places of a text, of which what stands in front of them is read first."""
    first, found = int(before[0]), []
    given = {"past_key_values": cache, "use_cache": True}
    if first:
        keep = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}
        model(input_ids=ids[None, :first], **given, **keep)
    for begin in range(first, int(before[-1]) + 1, step):
        logits = model(input_ids=ids[None, begin : begin + step], **given).logits[0]
        found.append(logits[before[(before >= begin) & (before < begin + step)] - begin].float())
    return torch.cat(found)
