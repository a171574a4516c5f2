"""GEAR: bytes, quality at equal bytes, and time of a token, beside the caches of transformers.

    python -m benchmarks.gear cost       # decoding and prefill, the caches taking turns; an idle machine
    python -m benchmarks.gear bytes      # the setting of the specification, section 2.4: one block of 1,024 tokens
    python -m benchmarks.gear quality    # resumable; needs the real data (TENFOLD_DATA)
    python -m benchmarks.gear agreement  # greedy texts after real questions; needs the real data
    python -m benchmarks.gear cot        # slow, only when asked for: 50 worked problems on each cache
    python -m benchmarks.gear table      # what docs/results/gear.md shows

`--model FOLDER_OR_GGUF` takes another model than the embedded one for cost, quality and agreement.

Peers: DynamicCache, StaticCache and QuantizedCache (quanto and hqq, 4 bits: pip install 'tenfold[caches]') of
transformers, and our own storage at 16 bits read by the same kernel, which isolates what compression buys. Keys and
values of the timed caches are random: no prompt need be read, and the time of a step does not depend on them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import re
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, QuantizedCache, StaticCache

from benchmarks import done_in, keep_in, rows_in, section
from benchmarks.adalora import alternate, quotient, spread
from tenfold.attend.attention import installed
from tenfold.cache.gear import GearCache
from tenfold.cache.gear.measure import measure_decoding, measure_quality
from tenfold.compat import quiet_upstream
from tenfold.config.gear import parse_kv
from tenfold.core.statistics import t_quantile
from tenfold.engines.requests import Request
from tenfold.engines.session import Session
from tenfold.models.head_sizes import head_dim, kv_heads
from tenfold.models.inference import evaluating, prompt_ids
from tenfold.models.memory import peak_growth
from tenfold.models.open import open_model
from tenfold.models.opened import Opened

RESULTS = Path(__file__).parent / "results" / "gear.jsonl"
DATA = Path(os.environ.get("TENFOLD_DATA", Path(__file__).parents[2] / "shared" / "data"))
CONTEXTS = (1024, 4096, 8192, 16384)
TIMED = ("gear:4", "gear:3", "gear:2", "gear-full:4", "gear-full:2", "gear:16")
QUALITY = (
    *(f"{variant}:{bits}" for bits in (2, 3, 4) for variant in ("gear", "plain", "gear-l", "gear-full")),
    *("gear:K3V2", "gear:K4V3", "gear:8", "plain:4,backbone=kcvt", "gear-full:4,backbone=kcvt"),
)
TEXTS = 12
FEW = ("gear:4", "gear:K4V3", "gear:2", "gear-full:4", "gear-full:2", "plain:4")
LONG = {"demo": 7680}
"""Contexts of the long documents; other models than the embedded one read more."""

rows = partial(rows_in, RESULTS)
keep = partial(keep_in, RESULTS)
done = partial(done_in, RESULTS)


def called(source: str) -> str:
    """A model's name in the rows: no paths of this machine."""
    return Path(source).stem


def packed(model: Any, names: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """Our caches."""
    return {name: partial(GearCache, model.config, parse_kv(name)) for name in names}


def quantized(model: Any) -> dict[str, Callable[[], Any]]:
    """Those of transformers that are installed."""
    backends = {"quanto": "optimum", "hqq": "hqq"}
    return {
        f"QuantizedCache, {backend}-4": partial(QuantizedCache, backend=backend, config=model.config, nbits=4)
        for backend, package in backends.items()
        if find_spec(package)
    }


def cost(source: str = "demo", repeats: int = 7) -> None:
    """One token after a long context, and what packing adds to a prefill."""
    for dtype in ("bfloat16", "float32"):
        model = open_model(source, device="cpu", dtype=dtype).model.eval()
        for context in CONTEXTS:
            if done(part="decode", model=called(source), dtype=dtype, context=context):
                continue
            static = partial(StaticCache, config=model.config, max_cache_len=context + 64)
            made = {"DynamicCache": partial(DynamicCache, config=model.config), "StaticCache": static}
            made |= {**quantized(model), **packed(model, TIMED)}
            found = measure_decoding(model, made, context=context, steps=5, repeats=repeats)
            for name, seconds in found.items():
                keep(
                    {
                        "part": "decode",
                        "model": called(source),
                        "dtype": dtype,
                        "context": context,
                        "cache": name,
                        "seconds": seconds,
                    }
                )
        prefill(source, model, dtype)


def prefill(source: str, model: Any, dtype: str, repeats: int = 7) -> None:
    """A prompt on the model's own cache, and on packed ones, whose blocks are made at its end."""
    tokenizer = open_model(source, device="cpu").tokenizer
    for tokens in (1024, 4096):
        if done(part="prefill", model=called(source), dtype=dtype, tokens=tokens):
            continue
        ids = prompt_ids(tokenizer, tokens, 1, torch.device("cpu"))

        def read(make: Callable[[], Any], ids: torch.Tensor = ids) -> None:
            with evaluating(model), installed(model):
                model(input_ids=ids, past_key_values=make(), logits_to_keep=1)

        made = {"DynamicCache": partial(DynamicCache, config=model.config), **packed(model, TIMED[:-1])}
        work: dict[str, Callable[[], object]] = {name: partial(read, make) for name, make in made.items()}
        for name, seconds in alternate(work, repeats if tokens < 4096 else 3).items():
            peak = peak_growth(work[name]).growth
            keep(
                {
                    "part": "prefill",
                    "model": called(source),
                    "dtype": dtype,
                    "tokens": tokens,
                    "cache": name,
                    "seconds": seconds,
                    "peak": peak,
                }
            )


def bandwidth() -> None:
    """What the memory gives: seconds to read 1 GiB of float32, as a sum."""
    block = torch.ones(2**28)
    seconds = alternate({"read": lambda: block.sum()}, 9)["read"]
    keep({"part": "bandwidth", "bytes": block.nbytes, "seconds": seconds})


def sizes() -> None:
    """Bytes of one block of 1,024 tokens, in the bfloat16 of the embedded model, beside the formula."""
    model = open_model("demo", device="cpu", dtype="bfloat16").model
    names = ("gear-l:4", "gear-full:4", "gear-l:2", "gear-full:2", "gear:4", "gear:2", "plain:4", "plain:2")
    for name in (*names, "gear-l:4,backbone=kcvt", "gear-full:4,backbone=kcvt"):
        cache = GearCache(model.config, parse_kv(f"{name},sinks=0,buffer=64"))
        for layer in range(model.config.num_hidden_layers):
            cache.update(*torch.randn(2, 1, 3, 1024, 64).bfloat16(), layer)
        report = cache.report()
        keep({"part": "bytes", "cache": name, "bits": report["bits"], "formula": report["formula bits"],
              "packed": report["packed bytes"], "exact": report["exact bytes"]})  # fmt: skip


def documents(tokenizer: Any, length: int, count: int) -> list[torch.Tensor]:
    """The first documents that are long enough, by id."""
    found = []
    with gzip.open(DATA / "longdoc.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = sorted((json.loads(line) for line in file), key=lambda row: str(row["id"]))
    for row in rows:
        if row["n_tokens"] > length:
            ids = torch.tensor(tokenizer(row["text"], verbose=False)["input_ids"])
            if len(ids) > length:
                found.append(ids[: length + 1])
        if len(found) == count:
            break
    return found


def rationales(tokenizer: Any, count: int) -> tuple[list[torch.Tensor], list[int]]:
    """GSM8K: the long few-shot prompt and a question are the context, the reference rationale is scored."""
    with gzip.open(DATA / "cot_prompts.jsonl.gz", "rt", encoding="utf-8") as file:
        shots = next(row for row in map(json.loads, file) if row["task"].lower().startswith("gsm8k"))["prompt"]
    texts, contexts = [], []
    with gzip.open(DATA / "math_gsm8k.jsonl.gz", "rt", encoding="utf-8") as file:
        test = [row for row in map(json.loads, file) if row["split"] == "test"][:count]
    for row in test:
        front = f"{shots.strip()}\n\nQuestion: {row['question']}\nAnswer:"
        whole = tokenizer(f"{front} {row['rationale']}", verbose=False)["input_ids"]
        contexts.append(len(tokenizer(front, verbose=False)["input_ids"]))
        texts.append(torch.tensor(whole))
    return texts, contexts


def quality(source: str = "demo") -> None:
    """Predictions on every cache against those on the exact one."""
    opened = open_model(source, device="cpu")
    model, tokenizer = opened.model.eval(), opened.tokenizer
    made = {**packed(model, QUALITY), **quantized(model)}
    for kind, length, count in (
        ("rationales", 0, TEXTS),
        ("documents", 1024, TEXTS),
        ("documents", LONG.get(source, 12288), 3),
    ):
        chosen = made if length == 1024 else {name: made[name] for name in FEW}
        if length:
            texts: Sequence[torch.Tensor] = documents(tokenizer, length + 256, count)
            contexts: Sequence[int] = [length] * len(texts)
        else:
            texts, contexts = rationales(tokenizer, count)
        for number, (text, context) in enumerate(zip(texts, contexts, strict=True)):
            if done(part="quality", model=called(source), kind=kind, length=length, text=number):
                continue
            found = measure_quality(model, [text], chosen, context=[context])
            elements = 2 * model.config.num_hidden_layers * kv_heads(model.config) * head_dim(model.config) * context
            exact = statistics.mean(found["exact"].nll)
            for name, values in found.items():
                bits = values.report.get("bits", 8 * values.report["bytes"] / elements)
                keep({"part": "quality", "model": called(source), "kind": kind, "length": length, "text": number,
                      "cache": name, "bits": bits, "worse": statistics.mean(values.nll) - exact,
                      "kl": statistics.mean(values.kl),
                      "agrees": statistics.mean(values.agrees), "nll": exact})  # fmt: skip


def agreement(source: str = "demo", count: int = 32, new: int = 96) -> None:
    """Greedy texts after GSM8K questions: tokens before the first that differs from the exact cache's."""
    opened = open_model(source, device="cpu")
    tokenizer = opened.tokenizer
    with gzip.open(DATA / "math_gsm8k.jsonl.gz", "rt", encoding="utf-8") as file:
        asked = [row["question"] for row in map(json.loads, file) if row["split"] == "test"][:count]
    exact = [tokenizer(text)["input_ids"] for text in _written(opened, asked, new)]
    for name in ("gear:2", "gear:3", "gear:K4V3", "gear:4", "gear-full:2", "gear-full:4", "plain:2", "plain:4"):
        if done(part="agreement", model=called(source), cache=name):
            continue
        texts = _written(opened, asked, new, f"{name},buffer=64")
        same = []
        for text, reference in zip(texts, exact, strict=True):
            ids = tokenizer(text)["input_ids"]
            pairs = zip(ids, reference, strict=False)
            first = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(reference)))
            same.append(first / max(1, len(reference)))
        keep({"part": "agreement", "model": called(source), "cache": name, "same": same})


def _written(opened: Opened, prompts: Sequence[str], new: int, kv: str | None = None) -> list[str]:
    """Greedy answers to what a user says, on the exact cache or on a packed one."""
    chat = opened.tokenizer.chat_template is not None
    asked: Any = [{"messages": [{"role": "user", "content": text}]} if chat else {"text": text} for text in prompts]
    requests = [Request(**prompt, max_new_tokens=new) for prompt in asked]
    return [reply.text for reply in Session(opened, kv=kv, batch_size=16).generate(requests)]


def cot(source: str = "demo", count: int = 50, new: int = 256) -> None:
    """Worked GSM8K problems, greedily: is the last number of the text the answer?"""
    opened = open_model(source, device="cpu")
    with gzip.open(DATA / "math_gsm8k.jsonl.gz", "rt", encoding="utf-8") as file:
        asked = [row for row in map(json.loads, file) if row["split"] == "test"][:count]
    prompts = [f"{row['question']}\nThink step by step, and end with the number alone." for row in asked]
    for name in ("exact", "gear:4", "gear:3", "gear:2", "gear-full:2", "plain:2"):
        if done(part="cot", model=called(source), cache=name):
            continue
        texts = _written(opened, prompts, new, None if name == "exact" else f"{name},buffer=64")
        right = []
        for row, text in zip(asked, texts, strict=True):
            numbers = re.findall(r"-?\d[\d,]*\.?\d*", text)
            right.append(float(bool(numbers) and numbers[-1].replace(",", "").rstrip(".") == str(row["answer"])))
        keep({"part": "cot", "model": called(source), "cache": name, "right": right})


def table() -> None:
    """Markdown for docs/results."""
    found = rows()
    _bytes_table([row for row in found if row["part"] == "bytes"])
    for model in dict.fromkeys(row["model"] for row in found if "model" in row):
        mine = [row for row in found if row.get("model") == model]
        of = "" if model == "demo" else f" ({model})"
        for dtype in ("bfloat16", "float32"):
            _decode_table([row for row in mine if row["part"] == "decode" and row["dtype"] == dtype], f"{dtype}{of}")
        _prefill_table([row for row in mine if row["part"] == "prefill"], of)
        kinds = dict.fromkeys((row["kind"], row["length"]) for row in mine if row["part"] == "quality")
        for kind, length in kinds:
            rest = [row for row in mine if row["part"] == "quality" and (row["kind"], row["length"]) == (kind, length)]
            _quality_table(rest, f"{kind}, {length:,} tokens before{of}")
        _agreement_table([row for row in mine if row["part"] == "agreement"], of)
        for row in (row for row in mine if row["part"] == "cot"):
            print(f"\nworked problems, {row['cache']}: {sum(row['right']):.0f} of {len(row['right'])} right")
    speed = [row for row in found if row["part"] == "bandwidth"]
    section("Bandwidth of the memory", "gear bandwidth", speed)
    for row in speed:
        print(f"{row['bytes'] / statistics.median(row['seconds']) / 1e9:.1f} GB/s")


def _bytes_table(found: Sequence[dict[str, Any]]) -> None:
    section("Bytes", "gear bytes", found)
    print("| cache | bits | formula | of the formula | smaller than bfloat16 |\n|---|---|---|---|---|")
    for row in found:
        ratio = row["bits"] / row["formula"]
        print(f"| {row['cache']} | {row['bits']:.3f} | {row['formula']:.3f} | {ratio:.4f} | {16 / row['bits']:.2f} |")


def _agreement_table(found: Sequence[dict[str, Any]], of: str) -> None:
    section(f"Greedy agreement{of}", "gear agreement", found)
    print("| cache | tokens before the first other one, % of the text | same text, % |\n|---|---|---|")
    for row in found:
        whole = statistics.mean(share == 1 for share in row["same"])
        print(f"| {row['cache']} | {100 * statistics.mean(row['same']):.0f} | {100 * whole:.0f} |")


def _prefill_table(timed: Sequence[dict[str, Any]], of: str) -> None:
    section(f"Prefill{of}", "gear cost", timed)
    print("| dtype | tokens | cache | prefill | of DynamicCache | peak growth, MiB |\n|---|---|---|---|---|---|")
    for row in timed:
        key = (row["dtype"], row["tokens"])
        plain = next(r for r in timed if (r["dtype"], r["tokens"]) == key and r["cache"] == "DynamicCache")
        ratio, peak = quotient(row["seconds"], plain["seconds"]), row["peak"] / 2**20
        print(f"| {key[0]} | {key[1]} | {row['cache']} | {spread(row['seconds'])} | {ratio} | {peak:.0f} |")


def _decode_table(found: Sequence[dict[str, Any]], kind: str) -> None:
    section(f"Time of a token, {kind}", "gear cost", found)
    print("| cache; tokens before | " + " | ".join(f"{context:,}" for context in CONTEXTS) + " |")
    print("|---" * (1 + len(CONTEXTS)) + "|")
    for name in dict.fromkeys(row["cache"] for row in found):
        cells = []
        for context in CONTEXTS:
            here = {row["cache"]: row["seconds"] for row in found if row["context"] == context}
            if name in here:
                ratio = quotient(here[name], here["DynamicCache"]) if name != "DynamicCache" else ""
                cells.append(f"{1000 * statistics.median(here[name]):.0f} ms {ratio}")
            else:
                cells.append("")
        print(f"| {name} | {' | '.join(cells)} |")


def _quality_table(found: Sequence[dict[str, Any]], kind: str) -> None:
    texts = len({row["text"] for row in found})
    if not texts:
        return
    section(f"Quality: {texts} {kind}", "gear quality", found)
    print("| cache | bits | NLL - exact [95 %] | KL | same top token, % |\n|---|---|---|---|---|")
    lines = []
    for name in dict.fromkeys(row["cache"] for row in found):
        mine = [row for row in found if row["cache"] == name]
        worse = [row["worse"] for row in mine]
        half = t_quantile(len(worse) - 1) * statistics.stdev(worse) / math.sqrt(len(worse))
        mean, kl = statistics.mean(worse), statistics.mean(row["kl"] for row in mine)
        same, bits = 100 * statistics.mean(row["agrees"] for row in mine), statistics.mean(row["bits"] for row in mine)
        cells = f"{bits:.2f} | {mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}] | {kl:.4f} | {same:.1f} |"
        lines.append((bits, f"| {name} | {cells}"))
    print("\n".join(line for _, line in sorted(lines)))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts that are asked for; all of them by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["cost", "bandwidth", "bytes", "quality", "agreement", "table"]
    parser.add_argument("parts", nargs="*", choices=[*names, "cot"], default=[])
    parser.add_argument("--model", default="demo", help="cost, quality and agreement of another model")
    given = parser.parse_args(argv)
    quiet_upstream()
    parts: dict[str, Callable[[], None]] = {"bandwidth": bandwidth, "bytes": sizes, "table": table}
    of_model = {"cost": cost, "quality": quality, "agreement": agreement, "cot": cot}
    parts |= {name: partial(function, given.model) for name, function in of_model.items()}
    for part in given.parts or names:
        parts[part]()


if __name__ == "__main__":
    main()
