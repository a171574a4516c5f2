"""AdaLoRA against LoRA and PEFT's AdaLoRA: quality at equal final parameters, and the cost of a step.

    python -m benchmarks.adalora quality   # resumable, one row at a time; about 2 minutes a row on 2 cores
    python -m benchmarks.adalora cost
    python -m benchmarks.adalora table     # what docs/results/adalora.md shows
    python -m benchmarks.adalora defaults  # AdaLoRA's default learning rate against plain LoRA's (adalora_defaults.py)
    python -m benchmarks.adalora defaults-table

Quality: the embedded model, the language reference of CPython, 15,000 training tokens a run in 60 steps, 3 seeds, the
same optimizer and schedule for all. The learning rate of each method is the best of five on a share of the training
rows (``sweep``), at rank 2. Scored on held-out topics, all methods on the same tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig as PeftAdaLoraConfig
from peft import get_peft_model
from transformers import TrainerCallback, set_seed

from benchmarks import section
from benchmarks.adalora_defaults import defaults, defaults_table, wide
from tenfold.adapt import adalora, lora
from tenfold.adapt.training import train
from tenfold.compat import quiet_upstream
from tenfold.config.adalora import AdaLoraConfig, AdaLoraPaper
from tenfold.config.lora import LoraConfig
from tenfold.config.training import TrainingFields
from tenfold.data.encode import encode
from tenfold.data.read import read_rows
from tenfold.evaluate.compare import t_quantile
from tenfold.evaluate.perplexity import document_sums, perplexity, ratio
from tenfold.models.layer_map import layer_map
from tenfold.models.open import open_model

RESULTS = Path(__file__).parent / "results" / "adalora.jsonl"
STEPS, BATCH, LENGTH = 60, 2, 128
SEEDS = (0, 1, 2)
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
RANKS = (1, 2, 4)
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
    initial = max(1, round(1.5 * rank))
    if initial == rank:
        initial += 1
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

    return adapted, TrainingFields(**fields(rate)), [StepByHand()], final


def attach_ours(model, size: str, rate: float, importance: str = "full"):
    """Ours, at the number of parameters that LoRA of this rank has."""
    per_rank = sum(slot.in_features + slot.out_features for slot in layer_map(model).select(["all-linear"]))
    budget = SMALL if size == "small" else int(size) * per_rank
    config = AdaLoraConfig(
        budget=str(budget), paper=AdaLoraPaper(init="normal"), gamma=GAMMA, importance=importance, **fields(rate)
    )
    handle = adalora.attach(model, config)
    handle.model.tenfold_handle = handle  # keeps it alive as long as its model
    return handle.model, config, [], lambda: handle.attached()["exported parameters"]


METHODS: dict[str, Callable[..., Any]] = {
    "lora": attach_lora,
    "peft-adalora": attach_peft,
    "tenfold-adalora": attach_ours,
}


def texts() -> tuple[Any, list[str], list[str], str]:
    """Training rows, the validation and the test texts (the first 3,000 characters of each topic), the data's hash."""
    rows = read_rows("python-reference")
    train_rows, test = rows.split(0.2)
    kept, validation = train_rows.split(0.3)
    return kept, [row.text[:3000] for row in validation][:8], [row.text[:3000] for row in test], rows.sha256


def measure(method: str, size: str, rate: float, seed: int, validation: bool) -> dict[str, Any]:
    """Train one adapter and score it."""
    rows, held, test, digest = texts()
    set_seed(seed)
    opened = open_model("demo", device="cpu")
    encoded = encode(rows, opened.tokenizer, max_length=LENGTH, packing=True)
    began = time.perf_counter()
    if method == "none":
        model, parameters = opened.model, 0
    else:
        model, config, callbacks, final = METHODS[method](opened.model, size, rate)
        with tempfile.TemporaryDirectory() as folder:
            train(model, opened.tokenizer, encoded, config, folder=Path(folder), seed=seed, callbacks=callbacks)
        parameters = final()
    seconds = time.perf_counter() - began
    found = perplexity(model, opened.tokenizer, held if validation else test, max_length=1024, batch_size=4)
    sums, counts = document_sums(found.token_nll, found.document)
    return {
        "method": method,
        "size": size,
        "rate": rate,
        "seed": seed,
        "split": "validation" if validation else "test",
        "parameters": parameters,
        "nll": found.nll,
        "document nll": sums.tolist(),
        "document tokens": counts.tolist(),
        "training seconds": round(seconds, 1),
        "data sha256": digest,
        "torch": torch.__version__,
    }


def rows() -> list[dict[str, Any]]:
    """What has been measured so far."""
    lines = map(json.loads, RESULTS.read_text().splitlines() if RESULTS.exists() else [])
    return [row for row in lines if "part" not in row]


def once(method: str, size: str, rate: float, seed: int, validation: bool) -> dict[str, Any]:
    """A row: read back, or measured and appended."""
    split = "validation" if validation else "test"
    for row in rows():
        if (row["method"], row["size"], row["rate"], row["seed"], row["split"]) == (method, size, rate, seed, split):
            return row
    row = measure(method, size, rate, seed, validation)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(method, size, rate, seed, split, f"nll {row['nll']:.4f}", f"{row['training seconds']} s", flush=True)
    return row


def best_rate(method: str) -> float:
    """The learning rate with the lowest validation loss at rank 2."""
    return min(RATES, key=lambda rate: once(method, "2", rate, 100, True)["nll"])


def quality() -> None:
    """All rows: the sweep, then seeds x sizes x methods, so that an unfinished run already compares like with like."""
    rates = {method: best_rate(method) for method in METHODS}
    once("none", "0", 0.0, 0, False)
    for seed, size in itertools.product(SEEDS, (*map(str, RANKS), "small")):
        for method in METHODS:
            if not (method == "peft-adalora" and size == "small"):  # PEFT has no target rank below 1
                once(method, size, rates[method], seed, False)


def paired(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Mean difference in NLL of two methods on the same tokens and seeds, and the half width of its 95 % interval.

    Documents are the independent observations; a document's difference is summed over the seeds.
    """
    change = sum(
        torch.tensor(a["document nll"]) - torch.tensor(b["document nll"]) for a, b in zip(first, second, strict=True)
    )
    counts = sum(torch.tensor(a["document tokens"]) for a in first)
    mean, error = ratio(change.double(), counts.double())
    return mean, t_quantile(len(change) - 1) * (error or 0.0)


def table() -> None:
    """Markdown for docs/results: quality at equal final parameters, and how the rates were chosen."""
    found = [row for row in rows() if row["split"] == "test"]
    section("Quality at equal final parameters", "adalora quality", found)
    base = [row for row in found if row["method"] == "none"]
    print(f"base model: {base[0]['nll']:.4f} nats/token\n" if base else "base model: not measured\n")
    print("| final parameters | method | learning rate | seeds | nll (mean ± sd) | against LoRA, paired [95 %] |")
    print("|---|---|---|---|---|---|")
    for size in ("small", *map(str, RANKS)):
        reference = {row["seed"]: row for row in found if (row["method"], row["size"]) == ("lora", size)}
        for method in METHODS:
            group = {row["seed"]: row for row in found if (row["method"], row["size"]) == (method, size)}
            if not group:
                continue
            nll = [row["nll"] for row in group.values()]
            spread = statistics.stdev(nll) if len(nll) > 1 else float("nan")
            shared = sorted(set(group) & set(reference))
            against = ""
            if method != "lora" and shared:
                mean, half = paired([group[seed] for seed in shared], [reference[seed] for seed in shared])
                against = f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"
            parameters = {row["parameters"] for row in group.values()}
            size_text = f"{min(parameters):,}" + (f" to {max(parameters):,}" if len(parameters) > 1 else "")
            rate, mean_nll = next(iter(group.values()))["rate"], statistics.mean(nll)
            print(f"| {size_text} | {method} | {rate:g} | {len(nll)} | {mean_nll:.4f} ± {spread:.4f} | {against} |")
    _rates_table([row for row in rows() if row["split"] == "validation"])


def _rates_table(found: Sequence[dict[str, Any]]) -> None:
    section("The learning rate of each method", "adalora quality", found)
    losses = {(row["method"], row["rate"]): row["nll"] for row in found}
    methods = [method for method in METHODS if any(key[0] == method for key in losses)]
    best = {method: min(nll for (other, _), nll in losses.items() if other == method) for method in methods}
    print(f"| learning rate | {' | '.join(methods)} |\n|---|{'---|' * len(methods)}")
    for rate in sorted({key[1] for key in losses}):
        cells = [losses.get((method, rate)) for method in methods]
        marks = ["**" if nll == best[method] else "" for method, nll in zip(methods, cells, strict=True)]
        texts = ["" if nll is None else f"{mark}{nll:.4f}{mark}" for mark, nll in zip(marks, cells, strict=True)]
        print(f"| {rate:g} | {' | '.join(texts)} |")


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
