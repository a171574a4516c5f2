"""PASTA: what emphasis adds to reading a prompt and to writing, beside a dense mask for each head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.utils import is_flash_attn_2_available

from benchmarks.gpu.bench import Bench, Measured
from benchmarks.gpu.models import in_float64, random_ids, random_llama
from tenfold.attend.attention import self_attentions
from tenfold.attend.pasta import steer
from tenfold.attend.pasta.steering import log_strength
from tenfold.attend.text_marks import Marks

ALPHA = 0.01
CHECKED = 1024
"""Tokens of the prompt on which a way is compared with float64: beyond, attention written out fills the memory."""


def pasta(bench: Bench) -> None:
    """Prefill, then single tokens; a quarter of all heads is steered, a sixteenth of the prompt marked."""
    for shape in bench.shapes:
        model = random_llama(bench, shape)
        double = in_float64(model)
        double.set_attn_implementation("eager")  # another way than sdpa's: written out, with the bias added
        for batch, tokens in bench.sizes(((1, 2048), (1, 8192), (8, 2048)), ((2, 64),)):
            for way in _ways():
                case = {"model": shape.name, "layers": shape.layers, "batch": batch, "tokens": tokens, "way": way}
                for part, work in (("pasta prefill", _prefill), ("pasta decode", _decode)):
                    bench.row(part, case, partial(work, bench, model, double, batch, tokens, way))
        del model, double


def _ways() -> tuple[str, ...]:
    flash = ("flash, plain", "flash, steered") if is_flash_attn_2_available() else ()
    return ("sdpa, plain", "sdpa, steered", "sdpa, dense masks", "sdpa, target mass", *flash)


def _marks(bench: Bench, batch: int, tokens: int) -> Marks:
    ids = random_ids(bench, batch, tokens)
    marked = torch.zeros_like(ids, dtype=torch.bool)
    marked[:, tokens // 16 : tokens // 8] = True
    return Marks(ids, torch.ones_like(ids), marked, torch.ones_like(ids, dtype=torch.float32))


def _heads(model: Any) -> dict[int, tuple[int, ...]]:
    return {layer: tuple(range(0, model.config.num_attention_heads, 4)) for layer in self_attentions(model)}


def _block(model: Any, marks: Marks, way: str, keys: int = 0) -> AbstractContextManager[Any]:
    """What is around the model's calls; ``keys`` is for masks that are made once, for a step on so many keys."""
    if "plain" in way:
        return nullcontext()
    if "target" in way:
        return steer(model, marks, heads=_heads(model), target_mass=0.2)
    if "dense" in way:
        return _dense(model, marks, keys)
    return steer(model, marks, heads=_heads(model), alpha=ALPHA)


@contextmanager
def _dense(model: Any, marks: Marks, keys: int) -> Iterator[None]:
    """The peers' way: a mask of all heads, queries and keys in every layer; here made once, which favours it."""
    values = log_strength(marks, ALPHA)
    batch, tokens = values.shape
    heads = model.config.num_attention_heads
    bias = torch.zeros(batch, heads, 1, keys or tokens, device=values.device)
    bias[:, list(_heads(model)[0]), 0, :tokens] = values[:, None]
    mask = bias.to(model.dtype)
    if not keys:
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=values.device).tril()
        mask = torch.where(causal, mask, torch.finfo(model.dtype).min)

    def give(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": mask}

    with ExitStack() as stack:
        for module in self_attentions(model).values():
            stack.callback(module.register_forward_pre_hook(give, with_kwargs=True).remove)
        yield


@contextmanager
def _implementation(model: Any, way: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("flash_attention_2" if way.startswith("flash") else "sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _logits(model: Any, marks: Marks) -> Tensor:
    found: Tensor = model(input_ids=marks.input_ids, use_cache=False, logits_to_keep=1).logits
    return found


def _read(model: Any, marks: Marks, way: str) -> Tensor:
    with _block(model, marks, way):
        return _logits(model, marks)


def _read_step(model: Any, marks: Marks, way: str) -> Tensor:
    """Of the token after a prompt, which is read without emphasis here: only the step is looked at."""
    length = marks.input_ids.shape[1]
    cache = DynamicCache(config=model.config)
    model(input_ids=marks.input_ids, past_key_values=cache, logits_to_keep=1)
    with _block(model, marks, way, length + 1):
        found: Tensor = model(input_ids=marks.input_ids[:, :1], past_key_values=cache).logits
    return found


def _checked(bench: Bench, model: Any, double: Any, tokens: int, way: str, read: Callable[..., Tensor]) -> Measured:
    """The distance of the logits from float64, and how far emphasis moves those; plain rows say what bfloat16 does."""
    marks = _marks(bench, 1, min(tokens, CHECKED))
    exact, plain = (read(double, marks, its) for its in (way.replace("dense masks", "steered"), "plain"))
    effect = None if "plain" in way else float((exact - plain).norm() / plain.norm())
    # What was not steered at all would be as far away as the effect is large.
    error = bench.check(read(model, marks, way), exact, 0.1 if effect is None else min(0.1, effect / 2))
    return {"error": error, "effect": effect}


def _prefill(bench: Bench, model: Any, double: Any, batch: int, tokens: int, way: str) -> Measured:
    with torch.no_grad(), _implementation(model, way):
        checked = _checked(bench, model, double, tokens, way, _read)
        marks = _marks(bench, batch, tokens)
        with _block(model, marks, way):
            work: Callable[[], object] = partial(_logits, model, marks)
            return {**checked, "ms": bench.milliseconds(work), "peak": bench.peak(work)}


def _decode(bench: Bench, model: Any, double: Any, batch: int, tokens: int, way: str) -> Measured:
    """A token at a time on a cache that is cropped again, so that each step is the same."""
    token = random_ids(bench, batch, 1)
    with torch.no_grad(), _implementation(model, way):
        checked = _checked(bench, model, double, tokens, way, _read_step)
        marks = _marks(bench, batch, tokens)
        cache = DynamicCache(config=model.config)
        model(input_ids=marks.input_ids, past_key_values=cache, logits_to_keep=1)
        with _block(model, marks, way, tokens + 1):

            def step() -> None:
                model(input_ids=token, past_key_values=cache)
                cache.crop(-1)

            return {**checked, "ms": bench.milliseconds(step), "peak": bench.peak(step)}
