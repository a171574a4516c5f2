"""AdaLoRA against LoRA and PEFT's AdaLoRA at equal final parameters, each at its own best learning rate.

    python -m benchmarks.adalora quality   # resumable, one row at a time; about 2 minutes a row on 2 cores
    python -m benchmarks.adalora table     # what docs/results/adalora.md shows

The embedded model and the language reference of CPython: 25 topics are for training, 20 for validation, 20 for the
test. A run trains on 15,360 tokens in 60 steps, with the same optimizer and schedule for all. The learning rate of each
method is chosen at each size on the validation topics, from the same grid; where the best lies at the grid's edge, the
grid grows by one rate, for whichever method. Then 5 seeds at the chosen rate, scored on the test topics.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig as PeftAdaLoraConfig
from peft import get_peft_model
from torch import Tensor
from transformers import TrainerCallback, set_seed

from benchmarks import keep_in, rows_in, section
from tenfold.adapt import adalora, lora
from tenfold.adapt.training import train
from tenfold.config.adalora import AdaLoraConfig
from tenfold.config.lora import LoraConfig
from tenfold.config.training import TextTrainingFields
from tenfold.core.statistics import t_quantile
from tenfold.data.encode import encode
from tenfold.data.groups import hash_share
from tenfold.data.read import read_rows
from tenfold.data.rows import Row
from tenfold.evaluate.perplexity import document_sums, perplexity, ratio
from tenfold.models.layer_map import layer_map
from tenfold.models.open import open_model

RESULTS = Path(__file__).parent / "results" / "adalora.jsonl"
STEPS, BATCH, LENGTH = 60, 2, 128
SEEDS = range(5)
TUNING_SEED = 100
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
BEYOND = (1e-4, 3e-4, *RATES, 1e-1, 3e-1)
"""Where the grid may grow to."""
SIZES = ("small", "1")
"""Of the adapter: LoRA on q and v alone, or LoRA of this rank on all linear layers; others get as many parameters."""
GAMMA = 0.1
SMALL = 57_600
"""Parameters of LoRA of rank 1 on q and v of the embedded model: what lies below one rank on all matrices."""


def fields(rate: float) -> dict[str, Any]:
    """What all runs share."""
    return {"steps": STEPS, "batch_size": BATCH, "max_length": LENGTH, "learning_rate": rate, "save_every": 10**6}


class StepByHand(TrainerCallback):
    """PEFT's AdaLoRA, called where it must be: after the optimizer's step, before the gradients are cleared."""

    def on_optimizer_step(self, args, state, control, model=None, **_):
        """Score and allocate."""
        model.base_model.update_and_allocate(state.global_step)


def attach_lora(model, size: str, rate: float):
    """LoRA through PEFT; returns model, configuration, callbacks, and a function that counts final parameters."""
    targets = ("q", "v") if size == "small" else ("all-linear",)
    config = LoraConfig(rank=1 if size == "small" else int(size), targets=targets, **fields(rate))
    adapted = lora.attach(model, config)
    return adapted, config, [], lambda: lora.attached(adapted)["trainable parameters"]


def attach_peft(model, size: str, rate: float):
    """PEFT's AdaLoRA with the phases, scale and penalty of ours."""
    rank = int(size)
    initial = max(rank + 1, round(1.5 * rank))
    config = PeftAdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=initial,
        target_r=rank,
        lora_alpha=2 * initial,
        target_modules=[slot.name for slot in layer_map(model).select(["all-linear"])],
        tinit=round(0.1 * STEPS),
        tfinal=round(0.5 * STEPS),
        deltaT=1,
        orth_reg_weight=GAMMA,
        total_step=STEPS,
    )
    adapted = get_peft_model(model, config)

    def final() -> int:
        layers = [m for m in adapted.modules() if hasattr(m, "lora_E") and "default" in m.lora_E]
        return sum(
            int((layer.lora_E["default"] != 0).sum()) * (layer.in_features + layer.out_features) for layer in layers
        )

    return adapted, TextTrainingFields(**fields(rate)), [StepByHand()], final


def attach_ours(model, size: str, rate: float):
    """Ours with its default start, at the number of parameters that LoRA of this size has."""
    per_rank = sum(slot.in_features + slot.out_features for slot in layer_map(model).select(["all-linear"]))
    budget = SMALL if size == "small" else int(size) * per_rank
    config = AdaLoraConfig(budget=str(budget), gamma=GAMMA, **fields(rate))
    handle = adalora.attach(model, config)
    handle.model.tenfold_handle = handle  # keeps it alive as long as its model
    return handle.model, config, [], lambda: handle.attached()["exported parameters"]


METHODS: dict[str, Callable[..., Any]] = {
    "lora": attach_lora,
    "tenfold-adalora": attach_ours,
    "peft-adalora": attach_peft,
}


def compared() -> Iterable[tuple[str, str]]:
    """Sizes with methods; PEFT has no target rank below 1."""
    return (
        (size, method)
        for size, method in itertools.product(SIZES, METHODS)
        if (size, method) != ("small", "peft-adalora")
    )


@cache
def topics() -> tuple[list[Row], list[str], list[str], str]:
    """Training rows, validation and test texts (the first 3,000 characters of each topic), and the data's hash."""
    rows = read_rows("python-reference")
    shuffled = sorted(rows, key=lambda row: hash_share(f"quality {row.id}"))
    validation, test = ([row.text[:3000] for row in part] for part in (shuffled[:20], shuffled[20:40]))
    return shuffled[40:], validation, test, rows.sha256


def measure(method: str, size: str, rate: float, seed: int, split: str) -> dict[str, Any]:
    """Train one adapter and score it."""
    rows, validation, test, digest = topics()
    set_seed(seed)
    opened = open_model("demo", device="cpu")
    encoded = encode(rows, opened.tokenizer, max_length=LENGTH, packing=True)
    began = time.perf_counter()
    model, config, callbacks, final = METHODS[method](opened.model, size, rate)
    with tempfile.TemporaryDirectory() as folder:
        train(model, opened.tokenizer, encoded, config, folder=Path(folder), seed=seed, callbacks=callbacks)
    seconds = time.perf_counter() - began
    held = validation if split == "validation" else test
    found = perplexity(model, opened.tokenizer, held, max_length=1024, batch_size=4)
    sums, counts = document_sums(found.token_nll, found.document)
    return {
        "parameters": final(),
        "nll": found.nll,
        "document nll": sums.tolist(),
        "document tokens": counts.tolist(),
        "training seconds": round(seconds, 1),
        "data sha256": digest,
    }


def once(method: str, size: str, rate: float, seed: int, split: str) -> dict[str, Any]:
    """A row: read back, or measured and appended."""
    keys = {"part": "quality", "method": method, "size": size, "rate": rate, "seed": seed, "split": split}
    kept = _kept(**keys)
    if not kept:
        keep_in(RESULTS, {**keys, **measure(method, size, rate, seed, split)})
        kept = _kept(**keys)
    return kept[0]


def _kept(**keys: Any) -> list[dict[str, Any]]:
    return [row for row in rows_in(RESULTS) if all(row.get(key) == value for key, value in keys.items())]


def best_rate(loss: Callable[[float], float]) -> float:
    """The rate with the lowest loss; the grid grows while that is its first or last."""
    low, high = BEYOND.index(RATES[0]), BEYOND.index(RATES[-1])
    while True:
        best = min(BEYOND[low : high + 1], key=loss)
        if best == BEYOND[low] and low > 0:
            low -= 1
        elif best == BEYOND[high] and high < len(BEYOND) - 1:
            high += 1
        else:
            return best


def quality() -> None:
    """All rows, size by size, so that an unfinished run already compares like with like."""
    for size in SIZES:
        methods = [method for other, method in compared() if other == size]
        rates = {
            method: best_rate(lambda rate, m=method, s=size: once(m, s, rate, TUNING_SEED, "validation")["nll"])
            for method in methods
        }
        for seed, method in itertools.product(SEEDS, methods):
            once(method, size, rates[method], seed, "test")


def paired(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Mean difference in NLL of two methods, and the half width of its 95 % interval over topics and seeds.

    The rows of both are of the same seeds, in one order.
    """
    change = torch.tensor([row["document nll"] for row in first]) - torch.tensor([r["document nll"] for r in second])
    return two_way(change.double(), torch.tensor([row["document tokens"] for row in first]).double())


def two_way(change: Tensor, counts: Tensor) -> tuple[float, float]:
    """Mean change per token, and the half width of its 95 % interval over documents and seeds together.

    Every seed is scored on every document, so changes go together by row and by column: the variance is that of
    clusters of seeds plus that of clusters of documents less that of single cells (Cameron, Gelbach and Miller 2011,
    equation 2.11), and Student's t has the degrees of freedom of the fewer clusters. The larger one-way variance is the
    least that it can be.

    Args:
        change: the difference in nats, ``[seeds, documents]``.
        counts: tokens, of the same shape.

    >>> mean, half = two_way(torch.tensor([[1.0, 3.0], [1.0, 3.0]]), torch.ones(2, 2))
    >>> mean, round(half, 3)  # the seeds agree: 12.706 standard errors of two documents
    (2.0, 12.706)
    """
    mean, by_seed = ratio(change.sum(1), counts.sum(1))
    _, by_document = ratio(change.sum(0), counts.sum(0))
    _, by_cell = ratio(change.flatten(), counts.flatten())
    variances = [(error or 0.0) ** 2 for error in (by_seed, by_document, by_cell)]
    variance = max(variances[0] + variances[1] - variances[2], variances[0], variances[1])
    return mean, t_quantile(min(change.shape) - 1) * variance**0.5


def table() -> None:
    """Markdown for docs/results: quality at equal final parameters, and how the rates were chosen."""
    found = _kept(part="quality", split="test")
    section("Quality at equal final parameters", "adalora quality", found)
    print("| final parameters | method | learning rate | seeds | nll (mean ± sd) | against LoRA, paired [95 %] |")
    print("|---|---|---|---|---|---|")
    for size, method in compared():
        group, reference = (
            {row["seed"]: row for row in found if (row["method"], row["size"]) == (name, size)}
            for name in (method, "lora")
        )
        if not group:
            continue
        nll = [row["nll"] for row in group.values()]
        spread = f" ± {statistics.stdev(nll):.4f}" if len(nll) > 1 else ""
        shared = sorted(set(group) & set(reference))
        against = ""
        if method != "lora" and len(shared) > 1:
            mean, half = paired([group[seed] for seed in shared], [reference[seed] for seed in shared])
            against = f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"
        counts = sorted({row["parameters"] for row in group.values()})
        size_text = f"{counts[0]:,}" + (f" to {counts[-1]:,}" if len(counts) > 1 else "")
        rate = next(iter(group.values()))["rate"]
        print(f"| {size_text} | {method} | {rate:g} | {len(nll)} | {statistics.mean(nll):.4f}{spread} | {against} |")
    _rates_table(_kept(part="quality", split="validation"))


def _rates_table(found: Sequence[dict[str, Any]]) -> None:
    section("The learning rate of each method", "adalora quality", found)
    losses = {(row["size"], row["method"], row["rate"]): row["nll"] for row in found}
    rates = sorted({rate for *_, rate in losses})
    print(f"| size | method | {' | '.join(f'{rate:g}' for rate in rates)} |\n|---|---|{'---|' * len(rates)}")
    for size, method in compared():
        cells = [losses.get((size, method, rate)) for rate in rates]
        if not any(cells):
            continue
        best = min(filter(None, cells))
        texts = ["" if nll is None else f"**{nll:.4f}**" if nll == best else f"{nll:.4f}" for nll in cells]
        print(f"| {size if size == 'small' else f'rank {size}'} | {method} | {' | '.join(texts)} |")
