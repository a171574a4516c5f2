"""Text from a model: batched, greedy unless asked otherwise, and the same for every batch size."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from tenfold.data.encode import pad_id
from tenfold.data.templates import render_chat, require_chat_template
from tenfold.errors import ConfigError
from tenfold.models.inference import evaluating, input_device


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    chat: bool | None = None,
    seed: int = 0,
    batch_size: int = 8,
    make_cache: Callable[[], Any] | None = None,
) -> list[str]:
    """Continue each prompt.

    Decoding is plain: greedy at temperature 0, else sampling from the whole distribution. The model's own defaults for
    top-k, top-p and repetition penalties are not used, so that models can be compared. The global random state is left
    as it was.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompts: what to continue; with a chat template, what the user says.
        max_new_tokens: stop after this many tokens, or at the end of the turn.
        temperature: 0 for greedy.
        chat: whether to use the chat template; by default where the tokenizer has one.
        seed: of the sampling.
        batch_size: prompts at once, padded on the left.
        make_cache: makes the cache of a batch; by default, and where it gives None, the model's own.

    Returns:
        The new text of each prompt, special tokens left out.

    Raises:
        DataError: the chat template refuses a prompt.
        ModelError: when ``chat`` is true and the tokenizer has no chat template.

    Example:
        >>> generate(model, tokenizer, ["What is a generator?"])  # doctest: +SKIP
        ['A generator is a function which ...']
    """
    if temperature < 0:
        raise ConfigError(f"temperature: {temperature} is below 0", remedy="0 is greedy, 1 the model's distribution")
    chat = tokenizer.chat_template is not None if chat is None else chat
    if chat:
        require_chat_template(tokenizer)
        prompts = [
            render_chat(tokenizer, [{"role": "user", "content": prompt}], f"prompt {number}", ask=True)
            for number, prompt in enumerate(prompts, 1)
        ]
    config = decoding(model, tokenizer, max_new_tokens, temperature)
    device = input_device(model)
    texts: list[str] = []
    with evaluating(model), _seeded(seed if temperature else None, device):
        for start in range(0, len(prompts), batch_size):
            batch = left_padded(tokenizer, prompts[start : start + batch_size], special=not chat, device=device)
            cache = None if make_cache is None else make_cache()
            given = batch if cache is None else {**batch, "past_key_values": cache}
            texts += tokenizer.batch_decode(_continue(model, given, config), skip_special_tokens=True)
    return texts


def continue_inputs(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, Any],
    *,
    max_new_tokens: int = 64,
) -> list[str]:
    """Continue prompts that are tokens already, greedily.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        inputs: ``input_ids`` and ``attention_mask``, each ``[batch, tokens]``, filled on the left, and what else
            ``model.generate`` takes, such as ``past_key_values``.
        max_new_tokens: stop after this many tokens, or at the end of the turn.

    Returns:
        The new text of each row, special tokens left out.
    """
    ids = continue_ids(model, tokenizer, inputs, max_new_tokens=max_new_tokens)
    texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


def continue_ids(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, Any],
    *,
    max_new_tokens: int = 64,
) -> list[list[int]]:
    """As `continue_inputs`: the new tokens of each row, the one that ends its turn included."""
    config = decoding(model, tokenizer, max_new_tokens, 0.0)
    with evaluating(model):
        return _continue(model, inputs, config)


def _continue(model: Any, inputs: Mapping[str, Any], config: GenerationConfig) -> list[list[int]]:
    ids = model.generate(**inputs, generation_config=config)
    return [up_to_end(row, config.eos_token_id) for row in ids[:, inputs["input_ids"].shape[1] :].tolist()]


def up_to_end(ids: list[int], ends: Sequence[int] | None) -> list[int]:
    """Tokens up to the first that ends a turn, which is among them.

    >>> up_to_end([5, 6, 2, 0, 0], [2])
    [5, 6, 2]
    """
    end = next((at for at, token in enumerate(ids) if token in (ends or ())), len(ids))
    return ids[: end + 1]


def left_padded(
    tokenizer: Any, prompts: Sequence[str], *, special: bool, device: torch.device
) -> dict[str, torch.Tensor]:
    """Token ids and their mask, each ``[batch, tokens]``, filled on the left; the tokenizer's settings stay alone.

    Args:
        tokenizer: any.
        prompts: none of them empty.
        special: whether the tokenizer adds its special tokens.
        device: where the tensors go.

    Raises:
        ConfigError: a prompt without a token.
    """
    encoded = [tokenizer(prompt, add_special_tokens=special, verbose=False)["input_ids"] for prompt in prompts]
    if any(not ids for ids in encoded):
        raise ConfigError("an empty prompt cannot be continued", remedy="give each prompt at least one word")
    length = max(map(len, encoded))
    fill = pad_id(tokenizer)
    return {
        "input_ids": torch.tensor([[fill] * (length - len(ids)) + ids for ids in encoded], device=device),
        "attention_mask": torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in encoded], device=device),
    }


def decoding(model: Any, tokenizer: Any, max_new_tokens: int, temperature: float = 0.0) -> GenerationConfig:
    """Plain decoding: greedy, or the model's own distribution; it ends at every end token that either names."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    ends = sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None})
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=0 if temperature else 50,  # 50 is the library's default, about which greedy decoding does not warn
        top_p=1.0,
        repetition_penalty=1.0,
        num_beams=1,
        eos_token_id=ends or None,
        pad_token_id=pad_id(tokenizer),
    )


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Random numbers from ``seed`` for a while; nothing at all for None."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
