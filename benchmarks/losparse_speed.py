"""Speed of compressed layers and models beside dense ones, and what the machine allows.

    python -m benchmarks.losparse machine   # what memory and arithmetic give: the limit of the others
    python -m benchmarks.losparse layers    # one matrix, 1, 16 and 128 tokens
    python -m benchmarks.losparse decode    # whole models, one token after another

All want an idle machine. Dense and compact take turns. Numbers are random: what they are changes no time. Of what is
kept a fifth is rows and the rest rank.

A layer alone, again and again, would be read from the caches of the processor, which in a model it never is: so a pass
of one token goes through as many copies as fill 256 MiB when dense (of n tokens an n-th: arithmetic hides the reading),
and the time is that of a pass by the number of copies.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from benchmarks import done_in, keep_in, rows_in, section
from benchmarks.adalora import alternate
from benchmarks.losparse_peers import READS, affordable
from tenfold.compress.losparse.factors import stored
from tenfold.compress.losparse.format import LowRankRowsConfig
from tenfold.compress.losparse.layer import LowRankRowsLinear, compressed_layers, remark, replace_module
from tenfold.compress.losparse.layout import settle
from tenfold.kernels.low_rank_rows import FEW, Form
from tenfold.models.inference import evaluating
from tenfold.models.open import open_model

RESULTS = Path(__file__).parent / "results" / "losparse.jsonl"
SHAPES = {
    "embedded, gate": (1536, 576),
    "embedded, down": (576, 1536),
    "embedded, q": (576, 576),
    "1B, gate": (8192, 2048),
    "1B, down": (2048, 8192),
    "1B, q": (2048, 2048),
}
"""``(out, in)``."""
DTYPES = (torch.bfloat16, torch.float32)
KEPT, TOKENS = (0.5, 0.3, 0.2), (1, 16, 128)
ROWS = 0.2
"""Of what is kept."""
COPIES = 2**28
"""Bytes of the dense copies that a pass of one token goes through."""
LARGE = LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                    num_key_value_heads=8, head_dim=64, vocab_size=128_256, tie_word_embeddings=True)  # fmt: skip
"""The shape of Llama 3.2 1B."""
PROMPT, STEPS = 32, 4

rows = partial(rows_in, RESULTS)
keep = partial(keep_in, RESULTS)
done = partial(done_in, RESULTS)


def named(dtype: torch.dtype) -> str:
    """Without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def split_of(out_features: int, in_features: int, kept: float) -> tuple[int, int]:
    """Rank and rows that a share of a matrix's numbers buys.

    >>> rank, rows = split_of(8192, 2048, 0.2)
    >>> rank, rows, stored(8192, 2048, rank, rows) <= 0.2 * 8192 * 2048
    (269, 378, True)
    """
    rank = affordable(out_features, in_features, (1 - ROWS) * kept, pivoted=True)
    left = int(kept * out_features * in_features) - stored(out_features, in_features, rank, 0)
    return rank, min(left // (in_features - rank), out_features - rank) if rank < in_features else 0


def compact(out_features: int, in_features: int, kept: float, dtype: torch.dtype) -> LowRankRowsLinear:
    """A layer of random numbers, its rows in random order."""
    layer = LowRankRowsLinear(
        in_features, out_features, *split_of(out_features, in_features, kept), bias=False, dtype=dtype
    )
    nn.init.normal_(layer.rows, std=in_features**-0.5)
    nn.init.normal_(layer.mix, std=max(layer.rank, 1) ** -0.5)
    layer.place.copy_(torch.randperm(out_features))
    return layer.requires_grad_(False).eval()


def dense(out_features: int, in_features: int, dtype: torch.dtype) -> nn.Linear:
    """A layer of random numbers."""
    layer = nn.Linear(in_features, out_features, bias=False, dtype=dtype)
    return layer.requires_grad_(False).eval()


def machine(repeats: int = 9, size: int = 2**30) -> None:
    """Bytes a second that a product with one vector reads, and multiply-adds a second of one with many."""
    for dtype in DTYPES:
        if done(part="machine", dtype=named(dtype)):
            continue
        rows_of = size // (4096 * dtype.itemsize)
        tall, vector = torch.ones(rows_of, 4096, dtype=dtype), torch.ones(1, 4096, dtype=dtype)
        square = torch.ones(1024, 1024, dtype=dtype)
        with torch.inference_mode():
            work: dict[str, Callable[[], object]] = {
                "read": lambda tall=tall, vector=vector: nn.functional.linear(vector, tall),
                "sum": lambda tall=tall: tall.sum(),
                "multiply": lambda square=square: square @ square.mT,
            }
            seconds = alternate(work, repeats)
        keep({"part": "machine", "dtype": named(dtype), "bytes": tall.nbytes, "multiply-adds": 1024**3,
              "seconds": seconds})  # fmt: skip


def layers(repeats: int = 9, copies: int = COPIES, shapes: Sequence[str] = tuple(SHAPES)) -> None:
    """Each shape dense, and compact at each share in the form that `settle` chose, and as stored where that differs."""
    for name, dtype in itertools.product(shapes, DTYPES):
        out, size = SHAPES[name]
        todo = [tokens for tokens in TOKENS if not done(part="layers", shape=name, dtype=named(dtype), tokens=tokens)]
        forms = {kept: settled(compact(out, size, kept, dtype)) for kept in KEPT if todo}
        for tokens in todo:
            number = math.ceil(copies / (out * size * dtype.itemsize * tokens))
            made: dict[str, list[Any]] = {"dense": [dense(out, size, dtype) for _ in range(number)]}
            for kept, pair in forms.items():
                made[f"{kept:.0%}"] = [compact(out, size, kept, dtype) for _ in range(number)]
                for layer in made[f"{kept:.0%}"]:
                    layer.take(*pair)
                if pair[tokens > FEW] != "stored":
                    made[f"{kept:.0%}, stored"] = [compact(out, size, kept, dtype) for _ in range(number)]
            x = torch.randn(tokens, size).to(dtype)
            with torch.inference_mode():
                found = alternate({way: partial(_pass, modules, x) for way, modules in made.items()}, repeats)
            keep({"part": "layers", "shape": name, "dtype": named(dtype), "tokens": tokens, "copies": number,
                  "forms": {f"{kept:.0%}": pair[tokens > FEW] for kept, pair in forms.items()},
                  "seconds": {way: [s / number for s in values] for way, values in found.items()}})  # fmt: skip


def settled(layer: LowRankRowsLinear) -> tuple[Form, Form]:
    """The forms that are chosen for a layer on this machine, for few tokens and for many."""
    holder: Any = nn.ModuleList([layer])
    holder.config = SimpleNamespace(quantization_config=LowRankRowsConfig({}))
    return next(iter(settle(holder).values()))


def _pass(modules: Sequence[nn.Module], x: torch.Tensor) -> None:
    for module in modules:
        module(x)


def decode(repeats: int = 9, large: LlamaConfig = LARGE) -> None:
    """Tokens after a short prompt: the dense model, and its shape with compact layers, taking turns."""
    for name, config in (("1B, random", large), ("embedded", open_model("demo", device="cpu").model.config)):
        for dtype in DTYPES:
            if done(part="decode", model=name, dtype=named(dtype)):
                continue
            torch.manual_seed(0)
            whole = random_model(config, dtype)
            models = {"dense": whole} | {f"{kept:.0%}": replaced(whole, config, kept, dtype) for kept in KEPT}
            for model in models.values():
                settle(remark(model))
            work, numbers, beside = {}, {}, {}
            for way, model in models.items():
                work[way] = _steps(model)
                numbers[way] = sum(parameter.numel() for parameter in model.parameters())
                beside[way] = sum(layer.form_bytes() for layer in compressed_layers(model).values())
            with torch.inference_mode():
                found = alternate(work, repeats)
            keep({"part": "decode", "model": name, "dtype": named(dtype), "prompt": PROMPT, "numbers": numbers,
                  "bytes beside": beside,
                  "seconds": {way: [s / STEPS for s in values] for way, values in found.items()}})  # fmt: skip


def random_model(config: Any, dtype: torch.dtype) -> Any:
    """A model of this shape."""
    config = AutoConfig.for_model(**{"model_type": config.model_type, **config.to_diff_dict()})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False).eval()


def replaced(whole: Any, config: Any, kept: float, dtype: torch.dtype) -> Any:
    """The same model with compact layers; all else is shared with it."""
    with torch.device("meta"):
        model = random_model(config, dtype)
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in READS:
            replace_module(model, name, compact(module.out_features, module.in_features, kept, dtype))
        elif not any(module.children()):
            replace_module(model, name, whole.get_submodule(name))
    return model.eval()


def _steps(model: Any) -> Callable[[], None]:
    """`STEPS` tokens after the prompt, from the same cache each time."""
    ids = torch.arange(10, 10 + PROMPT)[None]
    with evaluating(model):
        cache = model(input_ids=ids, use_cache=True).past_key_values

    def run() -> None:
        for token in range(STEPS):
            model(input_ids=ids[:, token : token + 1], past_key_values=cache, use_cache=True)
        cache.crop(-STEPS)

    return run


# ---- tables ---------------------------------------------------------------------------------------------------------


def speed_tables() -> None:
    """Times, what they are of the dense ones, and of the limit."""
    of_part = {part: [row for row in rows() if row["part"] == part] for part in ("machine", "layers", "decode")}
    if of_part["machine"]:
        section("What the machine gives", "losparse machine", of_part["machine"])
        print("| numbers | bytes read a second | multiply-adds a second |\n|---|---|---|")
        for row in of_part["machine"]:
            read, multiplied = rates(row)
            print(f"| {row['dtype']} | {read / 1e9:.1f} G | {multiplied / 1e9:.1f} G |")
    limits = {row["dtype"]: rates(row) for row in of_part["machine"]}
    if of_part["layers"]:
        section("Speed of a layer", "losparse layers", of_part["layers"])
        print("| shape | numbers | tokens | dense, ms | 50% | 30% | 20% | of the limit at 20% |")
        print("|---|---|---|---|---|---|---|---|")
        for row in of_part["layers"]:
            _layer_line(row, limits)
    if of_part["decode"]:
        section("Speed of whole models", "losparse decode", of_part["decode"])
        print("| model | numbers | dense, ms a token | 50% | 30% | 20% | limit at 20% | of it |")
        print("|---|---|---|---|---|---|---|---|")
        for row in of_part["decode"]:
            _decode_line(row, limits)


def rates(row: dict[str, Any]) -> tuple[float, float]:
    """Bytes read and multiply-adds, a second, at best."""
    seconds = row["seconds"]
    return row["bytes"] / min(*seconds["read"], *seconds["sum"]), row["multiply-adds"] / min(seconds["multiply"])


def _layer_line(row: dict[str, Any], limits: dict[str, tuple[float, float]]) -> None:
    out, size = SHAPES[row["shape"]]
    cells = []
    for way in (f"{kept:.0%}" for kept in KEPT):
        form = row["forms"][way]
        cells.append(_faster(row["seconds"], way) + ("" if form == "stored" else f" ({form})"))
    share = ""
    if row["dtype"] in limits:
        read, multiplied = limits[row["dtype"]]
        numbers = stored(out, size, *split_of(out, size, KEPT[-1]))
        width = getattr(torch, row["dtype"]).itemsize
        limit = max(numbers * width / read, numbers * row["tokens"] / multiplied)
        share = f"{limit / min(row['seconds'][f'{KEPT[-1]:.0%}']):.0%}"
    print(
        f"| {row['shape']} {out} x {size} | {row['dtype']} | {row['tokens']} | {_ms(row['seconds']['dense'])} | "
        f"{' | '.join(cells)} | {share} |"
    )


def _decode_line(row: dict[str, Any], limits: dict[str, tuple[float, float]]) -> None:
    """The limit of a token is the reading of all numbers: of the embedding as well, where the head shares it."""
    times, numbers = row["seconds"], row["numbers"]
    cells = [_faster(times, f"{kept:.0%}") for kept in KEPT]
    most = f"{numbers['dense'] / numbers['20%']:.2f} x"
    reached = ""
    if row["dtype"] in limits:
        least = numbers["20%"] * getattr(torch, row["dtype"]).itemsize / limits[row["dtype"]][0]
        reached = f"{least / min(times['20%']):.0%}"
    print(f"| {row['model']} | {row['dtype']} | {_ms(times['dense'])} | {' | '.join(cells)} | {most} | {reached} |")


def _ms(values: Sequence[float]) -> str:
    """Minimum and median."""
    return f"{1000 * min(values):.3g}, {1000 * statistics.median(values):.3g}"


def _faster(times: dict[str, list[float]], way: str) -> str:
    """By minima and by medians."""
    least, middle = (of(times["dense"]) / of(times[way]) for of in (min, statistics.median))
    return f"{least:.2f} x, {middle:.2f} x"
