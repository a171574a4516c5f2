"""AdaLoRA: quality against LoRA and PEFT's AdaLoRA, its defaults, and the cost of a step.

    python -m benchmarks.adalora quality   # at equal final parameters (adalora_quality.py)
    python -m benchmarks.adalora cost
    python -m benchmarks.adalora table     # what docs/results/adalora.md shows
    python -m benchmarks.adalora defaults  # the default learning rate against plain LoRA's (adalora_defaults.py)
    python -m benchmarks.adalora rates     # both at the rates that people give LoRA (adalora_defaults.py)
    python -m benchmarks.adalora defaults-table

The files that are named say how each is measured.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import AdaLoraConfig as PeftAdaLoraConfig
from peft import get_peft_model

from benchmarks.adalora_defaults import defaults, defaults_table, rates, wide
from benchmarks.adalora_quality import BATCH, GAMMA, LENGTH, quality, table
from tenfold.adapt import adalora, lora
from tenfold.compat import quiet_upstream
from tenfold.config.adalora import AdaLoraConfig
from tenfold.config.lora import LoraConfig
from tenfold.models.layer_map import layer_map
from tenfold.models.open import open_model


def filled(model) -> list[torch.nn.Parameter]:
    """The trainable parameters, each with a gradient of noise."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def alternate(work: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each piece of work, taking turns, after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repeats + 1):
        for name in work if turn % 2 else reversed(work):
            began = time.perf_counter()
            work[name]()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def spread(values: Sequence[float]) -> str:
    """Median and quartiles in milliseconds."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{1000 * middle:.1f} ms [{1000 * low:.1f}, {1000 * high:.1f}]"


def quotient(first: Sequence[float], second: Sequence[float]) -> str:
    """Median of the paired ratios with its quartiles."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(first, second, strict=True)], n=4)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def scoring(repeats: int = 21) -> None:
    """Scoring and allocation of one optimizer step: 210 matrices, 1260 triplets, every step allocates."""
    many = 10**6
    common = {"gamma": 0.0, "rank": 4, "initial_rank": 6, "tinit": 0, "tfinal": 1, "interval": 1, "steps": many}
    work: dict[str, Callable[[], object]] = {}
    handles = []  # an adapter steps only while its handle and model live
    for importance in ("full", "light"):
        handle = adalora.attach(open_model("demo", device="cpu").model, AdaLoraConfig(importance=importance, **common))
        # Plain SGD at rate 0: what remains of the step is what the hooks do, and one pass over the tensors.
        work[f"tenfold {importance}"] = torch.optim.SGD(filled(handle.model), lr=0.0).step
        handles.append(handle)
    plain = lora.attach(open_model("demo", device="cpu").model, LoraConfig(rank=6))
    work["optimizer alone"] = torch.optim.SGD(filled(plain), lr=0.0).step
    model = open_model("demo", device="cpu").model
    config = PeftAdaLoraConfig(
        task_type="CAUSAL_LM", init_r=6, target_r=4, tinit=0, tfinal=1, deltaT=1, total_step=many,
        target_modules=[slot.name for slot in layer_map(model).select(["all-linear"])],
    )  # fmt: skip
    peft = get_peft_model(model, config)
    filled(peft)
    steps = itertools.count(1)
    work["peft"] = lambda: peft.base_model.update_and_allocate(next(steps))
    seconds = alternate(work, repeats)
    print("| one step of scoring and allocation | median [quartiles] | of PEFT's |")
    print("|---|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {spread(values)} | {quotient(values, seconds['peft'])} |")


def step_time(repeats: int = 9) -> None:
    """A whole training step, 256 tokens, against plain LoRA of the initial rank, before and after shrinking."""
    ids = torch.randint(0, 40_000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))

    def stepper(model) -> Callable[[], object]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        model.train()

        def step() -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    keys: dict[str, Any] = {"rank": 4, "initial_rank": 6, "gamma": GAMMA, "interval": 1}
    work = {"lora, rank 6": stepper(lora.attach(open_model("demo", device="cpu").model, LoraConfig(rank=6)).train())}
    handles = []
    for name, importance, phases in (
        ("before shrinking, full", "full", {"tinit": 0, "tfinal": 1, "steps": 10**6}),
        ("before shrinking, light", "light", {"tinit": 0, "tfinal": 1, "steps": 10**6}),
        ("after shrinking", "full", {"tinit": 0, "tfinal": 10**6, "steps": 10**6 + 1}),
    ):
        config = AdaLoraConfig(importance=importance, **keys, **phases)
        handles.append(adalora.attach(open_model("demo", device="cpu").model, config))
        work[f"adalora {name}"] = stepper(handles[-1].model)
    seconds = alternate(work, repeats)
    print("\n| training step of 256 tokens | median [quartiles] | of plain LoRA |")
    print("|---|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {spread(values)} | {quotient(values, seconds['lora, rank 6'])} |")


def cost() -> None:
    """Timings: run them on a machine that does nothing else."""
    scoring()
    step_time()


PARTS: dict[str, Callable[[], None]] = {
    "quality": quality,
    "cost": cost,
    "table": table,
    "defaults": defaults,
    "rates": rates,
    "defaults-table": defaults_table,
    "wide": wide,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts that are asked for; all of them by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=list(PARTS), default=[])
    parts = parser.parse_args(argv).parts or ["quality", "cost", "table"]
    quiet_upstream()
    for part in parts:
        PARTS[part]()


if __name__ == "__main__":
    main()
