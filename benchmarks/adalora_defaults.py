"""What `tenfold adapt` and plain LoRA learn with nothing but their defaults, and what decided AdaLoRA's.

    python -m benchmarks.adalora defaults   # resumable, one row at a time; 1 to 10 minutes a row on one core
    python -m benchmarks.adalora rates      # both methods at the rates that people give LoRA, 100 steps
    python -m benchmarks.adalora defaults-table
    python -m benchmarks.adalora wide       # 1,000 steps on a wide random model: does the rate hold?

The embedded model, everything at its default (rank 8, all linear layers) but one sequence of 32 tokens a step (E2E: of
at most 48), which a busy core can afford. Three data sets that differ in how much there is to learn: the language
reference of CPython (text), E2E (completions: a sentence that says what a list of facts says) and introductions of
Wikipedia (text that the model knows well). Each run is scored on validation rows, which choose, and on test rows, which
are reported; no row is in two of the three.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import get_linear_schedule_with_warmup, set_seed

from benchmarks import done_in, keep_in, rows_in, section
from tenfold.adapt import adalora, lora
from tenfold.adapt.training import train
from tenfold.config.adalora import AdaLoraConfig
from tenfold.config.lora import LoraConfig
from tenfold.core.statistics import t_quantile
from tenfold.data.encode import Encoded, collate, encode
from tenfold.data.groups import hash_share
from tenfold.data.read import read_rows
from tenfold.data.rows import Completion, Row, Text
from tenfold.evaluate.perplexity import ratio
from tenfold.models.open import open_model
from tenfold.models.tiny import tiny_model

RESULTS = Path(__file__).parent / "results" / "adalora.jsonl"
DATA = Path(os.environ.get("TENFOLD_DATA", "shared/data"))
"""Where ``gen_e2e.jsonl.gz`` and ``lm_wiki_passages.jsonl.gz`` lie."""
BATCH, SEED = 1, 0
SETS = {"python": 32, "e2e": 48, "wiki": 32}
"""Data sets and tokens per sequence."""
SCORED = {"validation": 16, "test": 24}
"""Sequences scored."""
_PAPER = {"paper": {"init": "normal"}}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "start as lora, 1e-3": {"learning_rate": 1e-3},
    "3e-3": {"learning_rate": 3e-3, **_PAPER},
    "5e-3": {"learning_rate": 5e-3, **_PAPER},
    "1e-2": {"learning_rate": 1e-2, **_PAPER},
    "3e-2": {"learning_rate": 3e-2, **_PAPER},
}
"""``lora`` at its default, and what AdaLoRA could have as its own; the rates alone have the paper's start."""
WIDE = (30, 100, 300, 1000)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
"""Those that people give LoRA, and one above."""
RATES_STEPS = 100
CHOSEN = "start as lora, 1e-3"
"""What became the default."""
GRID = (
    (30, ("lora", CHOSEN)),
    (100, ("lora", CHOSEN)),
    (300, ("lora", CHOSEN)),
    (30, ("1e-2", "3e-2", "3e-3")),
    (100, ("1e-2", "3e-2")),
    (300, ("1e-2", "5e-3")),
)
"""What is measured at each number of steps, in this order."""


def shares(name: str) -> dict[str, list[Row]]:
    """Training, validation and test rows of a data set."""
    if name == "python":
        rows = read_rows("python-reference")
        rest, test = rows.split(0.2)
        kept, validation = rest.split(0.3)
        return {"train": list(kept), "validation": list(validation), "test": list(test)}
    found: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for share, row in _e2e() if name == "e2e" else _wiki():
        found[share].append(row)
    return found


def _lines(name: str) -> Iterator[dict[str, Any]]:
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def _e2e() -> Iterator[tuple[str, Row]]:
    for line in _lines("gen_e2e.jsonl.gz"):
        share = "validation" if line["split"] == "valid" else line["split"]
        facts = "; ".join(f"{key.lower()}: {value.lower()}" for key, value in line["slots"].items())
        yield share, Completion(line["id"], f"{facts}\n", line["references"][0].lower())


def _wiki() -> Iterator[tuple[str, Row]]:
    for line in _lines("lm_wiki_passages.jsonl.gz"):
        place = hash_share(line["title"])
        yield "test" if place < 0.1 else "validation" if place < 0.2 else "train", Text(line["id"], line["text"])


def encoded(name: str, tokenizer: Any) -> dict[str, Encoded]:
    """The rows as sequences; a different set of tokens for each share."""
    rows = {share: sorted(found, key=lambda row: hash_share(row.id)) for share, found in shares(name).items()}
    result = {}
    for share, some in rows.items():
        every = encode(
            some[: 3000 if share == "train" else 400], tokenizer, max_length=SETS[name], packing=True, chat=False
        )
        if name == "e2e":  # leave out what would be cut
            whole = [example for example in every.examples if len(example["input_ids"]) < SETS[name]]
            every = replace(every, examples=whole)
        result[share] = every
    return result


@torch.no_grad()
def score(model: Any, tokenizer: Any, examples: Sequence[dict[str, list[int]]]) -> tuple[list[float], list[int]]:
    """Negative log-likelihood in nats and learned tokens of each sequence."""
    sums, counts = [], []
    model.eval()
    for start in range(0, len(examples), 8):
        batch = collate(examples[start : start + 8], tokenizer.pad_token_id)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
        labels = batch["labels"][:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none", ignore_index=-100)
        sums += loss.sum(1).tolist()
        counts += (labels != -100).sum(1).tolist()
    return sums, counts


def measure(data: str, steps: int, method: str, **settings: Any) -> dict[str, Any]:
    """Train one adapter (``lora``, ``adalora``) and score it; 0 steps: the model as it is."""
    set_seed(SEED)
    opened = open_model("demo", device="cpu")
    sequences = encoded(data, opened.tokenizer)
    began, seconds, model = time.perf_counter(), 0.0, opened.model
    if steps:
        common = {"steps": steps, "batch_size": BATCH, "max_length": SETS[data], "save_every": 10**6}
        handle = None
        if method == "lora":
            config: Any = LoraConfig(**common, **settings)
            model = lora.attach(opened.model, config)
        else:
            config = AdaLoraConfig(**common, **settings)
            handle = adalora.attach(opened.model, config)
            model = handle.model
        with tempfile.TemporaryDirectory() as folder:
            train(model, opened.tokenizer, sequences["train"], config, folder=Path(folder), seed=SEED)
        seconds = time.perf_counter() - began
        del handle
    row: dict[str, Any] = {"data": data, "steps": steps}
    for share, count in SCORED.items():
        sums, counts = score(model, opened.tokenizer, sequences[share].examples[:count])
        row |= {f"{share} nll": sum(sums) / sum(counts), f"{share} sums": sums, f"{share} counts": counts}
    return row | {"training seconds": round(seconds, 1)}


def rows(part: str) -> list[dict[str, Any]]:
    """What has been measured so far."""
    return [row for row in rows_in(RESULTS) if row.get("part") == part]


def defaults() -> None:
    """All rows that are not there yet, the short runs first."""
    wanted = [(data, 0, "none") for data in SETS]
    wanted += [(data, steps, variant) for steps, variants in GRID for data in SETS for variant in variants]
    for data, steps, variant in wanted:
        keys = {"part": "defaults", "data": data, "steps": steps, "variant": variant}
        if not done_in(RESULTS, **keys):
            method = "lora" if variant == "lora" else "adalora"
            keep_in(RESULTS, keys | measure(data, steps, method, **VARIANTS.get(variant, {})))


def rates() -> None:
    """Both methods at each rate, all else at its default."""
    for data, rate, method in itertools.product(SETS, RATES, ("lora", "adalora")):
        keys = {"part": "rates", "data": data, "steps": RATES_STEPS, "method": method, "rate": rate}
        if not done_in(RESULTS, **keys):
            keep_in(RESULTS, keys | measure(data, RATES_STEPS, method, learning_rate=rate))


def paired(first: dict[str, Any], second: dict[str, Any]) -> tuple[float, float]:
    """Mean difference in test loss of two runs on the same tokens, and the half width of its 95 % interval."""
    change = torch.tensor(first["test sums"]).double() - torch.tensor(second["test sums"]).double()
    mean, error = ratio(change, torch.tensor(first["test counts"]).double())
    return mean, t_quantile(len(change) - 1) * (error or 0.0)


def defaults_table() -> None:
    """Markdown for docs/results: validation loss of all, test loss of what was chosen."""
    known = rows("defaults")
    found = {(row["data"], row["steps"], row["variant"]): row for row in known}
    lengths = sorted({steps for _, steps, _ in found if steps})
    shown = [variant for variant in VARIANTS if any(key[2] == variant for key in found)]
    section("The default learning rate", "adalora defaults", known)
    print("| steps | data | " + " | ".join(shown) + " |")
    print("|---|---|" + "---|" * len(shown))
    for steps in lengths:
        for data in SETS:
            cells = [found.get((data, steps, variant)) for variant in shown]
            print(
                f"| {steps} | {data} | " + " | ".join(f"{c['validation nll']:.3f}" if c else "" for c in cells) + " |"
            )
    section("The default learning rate: test loss", "adalora defaults", known)
    print(f"| steps | data | untrained | LoRA | AdaLoRA, {CHOSEN} | difference, paired [95 %] |")
    print("|---|---|---|---|---|---|")
    for steps in lengths:
        for data in SETS:
            base, plain, ours = (found.get((data, *key)) for key in ((0, "none"), (steps, "lora"), (steps, CHOSEN)))
            if base and plain and ours:
                mean, half = paired(ours, plain)
                losses = " | ".join(f"{row['test nll']:.3f}" for row in (base, plain, ours))
                print(f"| {steps} | {data} | {losses} | {mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}] |")
    _rates_table()


def _rates_table() -> None:
    known = rows("rates")
    if not known:
        return
    section("The rates that people give LoRA", "adalora rates", known)
    print(f"| data | method | {' | '.join(f'{rate:g}' for rate in RATES)} |\n|---|---|{'---|' * len(RATES)}")
    for data, method in itertools.product(SETS, ("lora", "adalora")):
        losses = {row["rate"]: row["test nll"] for row in known if (row["data"], row["method"]) == (data, method)}
        best = min(losses.values(), default=0.0)
        cells = [f"{losses[rate]:.3f}" if rate in losses else "" for rate in RATES]
        marked = [f"**{cell}**" if losses.get(rate) == best else cell for rate, cell in zip(RATES, cells, strict=True)]
        print(f"| {data} | {method} | {' | '.join(marked)} |")


def chains(count: int, seed: int) -> torch.Tensor:
    """Sequences of 16 tokens from a Markov chain of 96 states."""
    chance = torch.softmax(3 * torch.randn(96, 96, generator=torch.Generator().manual_seed(7)), 1)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 96, (count, 1), generator=generator)
    for _ in range(15):
        ids = torch.cat([ids, torch.multinomial(chance[ids[:, -1]], 1, generator=generator)], 1)
    return ids


def wide(steps: int = 1000) -> None:
    """Adapters on a random Llama of one layer and width 1,024: held-out loss along the run."""
    held = chains(64, seed=1)
    shape = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 8}
    print("| method, rate | " + " | ".join(f"step {step}" for step in WIDE) + " | highest training loss |")
    print("|---|" + "---|" * (len(WIDE) + 1))
    for method, rate in (("LoRA", 1e-3), ("AdaLoRA", 1e-3), ("LoRA", 3e-3), ("AdaLoRA", 3e-3)):
        torch.manual_seed(SEED)
        base = tiny_model("llama", **shape).model
        handle = adalora.attach(base, AdaLoraConfig(steps=steps)) if method == "AdaLoRA" else None
        model = handle.model if handle else lora.attach(base, LoraConfig())
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        schedule = get_linear_schedule_with_warmup(optimizer, round(0.05 * steps), steps)
        losses, found = [], []
        for step in range(1, steps + 1):
            ids = chains(2, seed=step + 1)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if step in WIDE:
                with torch.no_grad():
                    found.append(model(input_ids=held, labels=held).loss.item())
        cells = " | ".join(f"{value:.2f}" for value in (*found, max(losses)))
        print(f"| {method}, {rate:g} | {cells} |", flush=True)
