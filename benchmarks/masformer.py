"""MASFormer: time and memory of local attention, of a converted model, and what conversion costs in quality.

    python -m benchmarks.masformer cost      # the kernel, forward and backward; an idle machine
    python -m benchmarks.masformer length    # the same from 8k to 32k tokens; an idle machine
    python -m benchmarks.masformer model [--model FILE]  # prefill, decoding, cache when converted; an idle machine
    python -m benchmarks.masformer quality   # text, far copies, needles by placement, with and without sinks, at 2k
    python -m benchmarks.masformer long      # the same at 8k
    python -m benchmarks.masformer recover   # what short training on other long documents gives back
    python -m benchmarks.masformer table     # what docs/results/masformer.md shows

The peers of the kernel: full causal sdpa, and what a stock sliding layer does on sdpa, a mask of all pairs.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import done_in, keep_in, rows_in, section
from benchmarks.adalora import alternate, quotient, spread
from benchmarks.gear import documents
from tenfold.adapt import adalora, lora
from tenfold.adapt.training import train
from tenfold.attend.attention import self_attentions
from tenfold.attend.masformer.conversion import Placement, choose_heads, convert, place, profile_heads
from tenfold.cache.spans import own_cache
from tenfold.compat import quiet_upstream
from tenfold.config.adalora import AdaLoraConfig, AdaLoraPaper
from tenfold.config.lora import LoraConfig
from tenfold.data.encode import Encoded
from tenfold.evaluate.long_context import copying, needle, repeated
from tenfold.kernels.local import AttentionWindow, local_attention
from tenfold.models.inference import evaluating, max_positions, prompt_ids
from tenfold.models.memory import peak_growth, stored_bytes
from tenfold.models.open import open_model

RESULTS = Path(__file__).parent / "results" / "masformer.jsonl"
SHAPES = ((1024, 256), (2048, 256), (4096, 512), (8192, 512), (8192, 1024))
LENGTHS = (8192, 16384, 32768)
"""Tokens whose times are compared, at a span of 1,024."""
HEADS, KV_HEADS, CHANNELS = 9, 3, 64

rows = partial(rows_in, RESULTS)
keep = partial(keep_in, RESULTS)
done = partial(done_in, RESULTS)


def cost(repeats: int = 5) -> None:
    """One attention, the ways taking turns; then its peak growth."""
    for n, size in SHAPES:
        for backward in (False, True):
            if done(part="kernel", n=n, size=size, backward=backward):
                continue
            query, key, value = _tensors(n, backward)
            index = torch.arange(n)
            mask = ((index[:, None] >= index) & (index[:, None] - index < size))[None, None]
            dense = partial(scaled_dot_product_attention, query, key, value, scale=0.125, enable_gqa=True)
            ways = _ways(query, key, value, size)
            ways |= {"full": partial(dense, is_causal=True), "stock sliding": partial(dense, attn_mask=mask)}
            work = {name: partial(_run, way, backward) for name, way in ways.items()}
            for name, seconds in alternate(work, repeats).items():
                peak = peak_growth(work[name]).growth
                keep({"part": "kernel", "n": n, "size": size, "backward": backward, "way": name, "seconds": seconds,
                      "peak": peak})  # fmt: skip


def length(repeats: int = 5) -> None:
    """How time and memory of a local layer grow with the text: the lengths taking turns."""
    for way in ("block, own only", "block, one before", "sliding", "sliding, 4 sinks"):
        for backward in (False, True):
            if done(part="length", way=way, backward=backward):
                continue
            work = {str(n): partial(_run, _ways(*_tensors(n, backward), 1024)[way], backward) for n in LENGTHS}
            seconds = alternate(work, repeats)
            peaks = {n: peak_growth(run).growth for n, run in work.items()}
            keep({"part": "length", "way": way, "backward": backward, "times": seconds, "peaks": peaks})


def _tensors(n: int, backward: bool) -> tuple[torch.Tensor, ...]:
    query = torch.randn(1, HEADS, n, CHANNELS, requires_grad=backward)
    return query, *(torch.randn(1, KV_HEADS, n, CHANNELS, requires_grad=backward) for _ in range(2))


def _ways(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, size: int
) -> dict[str, Callable[[], torch.Tensor]]:
    spans = {
        "block, own only": AttentionWindow("block", size, 0),
        "block, one before": AttentionWindow("block", size, 1),
        "sliding": AttentionWindow("sliding", size),
        "sliding, 4 sinks": AttentionWindow("sliding", size, sinks=4),
    }
    return {name: partial(local_attention, query, key, value, span, 0.125) for name, span in spans.items()}


def _run(way: Callable[[], torch.Tensor], backward: bool) -> None:
    output = way()
    if backward:
        output.sum().backward()


def model(source: str = "demo", repeats: int = 3) -> None:
    """A model with a quarter of its layers full, on its small cache, and the unconverted one, taking turns."""
    opened = open_model(source, device="cpu")
    whole = opened.model.eval()
    name, limit = Path(source).name, max_positions(whole) or 8192
    local = copy.deepcopy(whole)
    layers = self_attentions(local)
    convert(
        local,
        full_layers=place("interleave", quarter(len(layers)), layers),
        span=AttentionWindow("sliding", 1024, sinks=4),
    )
    token = torch.tensor([[10]])
    for tokens in (2048, 8000, 16000):
        if tokens > limit or done(part="model", model=name, tokens=tokens):
            continue
        ids = prompt_ids(opened.tokenizer, tokens, 1, torch.device("cpu"))
        caches: dict[str, Any] = {}

        def read(key: str, net: Any, ids: torch.Tensor = ids, caches: dict[str, Any] = caches) -> None:
            output = net(input_ids=ids, past_key_values=own_cache(net), use_cache=True, logits_to_keep=1)
            caches[key] = output.past_key_values

        nets = {"full": whole, "converted": local}
        with evaluating(whole), evaluating(local):
            prefill = alternate({key: partial(read, key, net) for key, net in nets.items()}, repeats)
            steps = {
                key: partial(net, input_ids=token, past_key_values=caches[key], use_cache=True)
                for key, net in nets.items()
            }
            decode = alternate(cast(dict[str, Callable[[], object]], steps), 15)
        for key in nets:
            keep({"part": "model", "model": name, "tokens": tokens, "way": key, "prefill": prefill[key],
                  "decode": decode[key], "cache": stored_bytes(caches[key].layers)})  # fmt: skip


PLACEMENTS = ("all", "none", "profile", "profile of heads", "bottom", "interleave")
SETTINGS = {2048: (256, 4, (*PLACEMENTS, "top", "middle")), 8192: (1024, 2, PLACEMENTS)}
"""Context -> the window of local layers, documents, and which quarter of the layers stays full."""


def quality(context: int) -> None:
    """Text, far copies and needles of real documents right after conversion.

    Layers are profiled on 2k tokens of other documents with the window of 256, for both contexts: a backward pass over
    8k tokens does not fit the memory of a small machine.
    """
    opened = open_model("demo", device="cpu")
    net = opened.model.eval()
    size, texts, names = SETTINGS[context]
    pieces = [ids[: context - PASSAGE] for ids in documents(opened.tokenizer, context, texts)]
    for sinks in (4, 0):
        scores = _scores(opened, sinks)
        for name in names:
            if (name == "all" and not sinks) or done(part="quality", placement=name, sinks=sinks, context=context):
                continue
            full, heads = _placed(name, scores)
            handle = convert(net, full_layers=full, span=AttentionWindow("sliding", size, sinks=sinks), heads=heads)
            measured = _measured(net, opened.tokenizer, pieces)
            handle.revert()
            keep({"part": "quality", "placement": name, "sinks": sinks, "context": context, "full": list(full),
                  "heads": sum(map(len, heads.values())), "texts": texts, **measured})  # fmt: skip


PASSAGE = 384
"""Tokens that come twice; at least so many are left free at the end of a context."""


def _scores(opened: Any, sinks: int) -> dict[int, list[float]]:
    """What each KV head loses by a window of 256 tokens, on four documents that are not measured."""
    others = _unmeasured(documents(opened.tokenizer, 2048, 16), opened.tokenizer)[:4]
    passages = [repeated(ids[:1664], PASSAGE, 1280)[0] for ids in others]
    return profile_heads(opened.model.eval(), passages, AttentionWindow("sliding", 256, sinks=sinks))


def _unmeasured(found: Sequence[torch.Tensor], tokenizer: Any) -> list[torch.Tensor]:
    used = [ids[:64] for context, (_, texts, _) in SETTINGS.items() for ids in documents(tokenizer, context, texts)]
    return [ids for ids in found if not any(torch.equal(ids[:64], other) for other in used)]


def quarter(layers: int) -> int:
    """Layers, or heads, that stay full."""
    return layers // 4


def _placed(name: str, scores: dict[int, list[float]]) -> tuple[tuple[int, ...], dict[int, Any]]:
    """Full layers, and full heads of others; the scores of a layer's heads add up to its own."""
    if name in ("all", "none"):
        return (tuple(scores) if name == "all" else ()), {}
    if name == "profile of heads":
        return choose_heads(scores, quarter(sum(map(len, scores.values()))))
    if name == "profile":
        return choose_heads({layer: [sum(row)] for layer, row in scores.items()}, quarter(len(scores)))
    return place(cast(Placement, name), quarter(len(scores)), scores), {}


def _measured(net: Any, tokenizer: Any, pieces: Sequence[torch.Tensor]) -> dict[str, float]:
    results = (copying(net, pieces, PASSAGE), needle(net, tokenizer, pieces))
    return {metric.name: metric.value for result in results for metric in result.metrics}


RECOVERIES: dict[str, tuple[AdaLoraConfig | LoraConfig, int]] = {
    "hidden states, lora": (LoraConfig(distil=1.0, learning_rate=5e-3, budget="0.4%"), 4),
    "hidden states, lora, no sinks": (LoraConfig(distil=1.0, learning_rate=5e-3, budget="0.4%"), 0),
    "hidden states, adalora": (
        AdaLoraConfig(distil=1.0, paper=AdaLoraPaper(init="normal"), learning_rate=1e-2, gamma=1e-3, budget="0.4%"),
        4,
    ),
    "text alone, lora": (LoraConfig(learning_rate=5e-4, budget="0.4%"), 4),
}
"""What a converted model is trained by, in which adapter of 0.4 % of the model, and its sinks."""


def recover(tokens: int = 40_000) -> None:
    """Training on other long documents after conversion: window 256, a quarter of the layers full, measured at 2k."""
    size, texts, _ = SETTINGS[2048]
    for name, (recovery, sinks) in RECOVERIES.items():
        if done(part="recover", way=name, tokens=tokens):
            continue
        opened = open_model("demo", device="cpu")
        full, _ = _placed("profile", _scores(opened, sinks))
        pieces = [ids[: 2048 - PASSAGE] for ids in documents(opened.tokenizer, 2048, texts)]
        convert(opened.model, full_layers=full, span=AttentionWindow("sliding", size, sinks=sinks))
        before = _measured(opened.model, opened.tokenizer, pieces)
        keys = {"tokens": tokens, "max_length": 1024, "batch_size": 1, "accumulate": 2, "save_every": 10**6}
        config = recovery.model_copy(update=keys)
        if isinstance(config, AdaLoraConfig):
            model = adalora.attach(opened.model, config, task="causal").model
        else:
            model = lora.attach(opened.model, config)
        with tempfile.TemporaryDirectory() as folder:
            trained = train(model, opened.tokenizer, _encoded(opened.tokenizer), config,
                            folder=Path(folder), seed=0)  # fmt: skip
        after = _measured(model, opened.tokenizer, pieces)
        keep({"part": "recover", "way": name, "tokens": tokens, "texts": texts, "full": list(full),
              "seconds": trained.seconds, "before": before, "after": after})  # fmt: skip


def _encoded(tokenizer: Any) -> Encoded:
    """Pieces of 1,024 tokens, four from each document that is not measured."""
    others = _unmeasured(documents(tokenizer, 4096, 200), tokenizer)
    pieces = [ids[start : start + 1024].tolist() for ids in others for start in range(0, 4096, 1024)]
    examples = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in pieces]
    count = sum(map(len, pieces))
    return Encoded(examples, len(others), count, count - len(pieces), 0, 0, 0, ())


def table() -> None:
    """Markdown for docs/results."""
    found = rows()
    of_part = {part: [row for row in found if row["part"] == part] for part in dict.fromkeys(r["part"] for r in found)}
    section("Kernel", "masformer cost", of_part["kernel"])
    print("| tokens, span | pass | way | median [quartiles] | of full | of stock | peak growth, MiB |")
    print("|---|---|---|---|---|---|---|")
    for row in (row for row in found if row["part"] == "kernel"):
        same = {
            r["way"]: r
            for r in found
            if r["part"] == "kernel" and all(r[k] == row[k] for k in ("n", "size", "backward"))
        }
        ratios = [
            quotient(row["seconds"], same[peer]["seconds"]) if peer in same else ""
            for peer in ("full", "stock sliding")
        ]
        what = "forward and backward" if row["backward"] else "forward"
        cells = f"{spread(row['seconds'])} | {ratios[0]} | {ratios[1]} | {row['peak'] / 2**20:.0f} |"
        print(f"| {row['n']}, {row['size']} | {what} | {row['way']} | {cells}")
    section("Growth with the length", "masformer length", of_part["length"])
    print("| way | pass | 8k | 32k over 8k | peak 8k, MiB | 32k over 8k |\n|---|---|---|---|---|---|")
    for row in (row for row in found if row["part"] == "length"):
        what = "forward and backward" if row["backward"] else "forward"
        times = quotient(row["times"]["32768"], row["times"]["8192"])
        peaks = row["peaks"]["32768"] / row["peaks"]["8192"]
        first = row["peaks"]["8192"] / 2**20
        print(f"| {row['way']} | {what} | {spread(row['times']['8192'])} | {times} | {first:.0f} | {peaks:.2f} |")
    section("Whole models", "masformer model", of_part["model"])
    print("| model, tokens | way | prefill | of full | decode | of full | cache, MiB | smaller |")
    print("|---|---|---|---|---|---|---|---|")
    for row in (row for row in found if row["part"] == "model"):
        same = [r for r in found if r["part"] == "model" and all(r[k] == row[k] for k in ("model", "tokens"))]
        full = next(r for r in same if r["way"] == "full")
        cells = [f"{spread(row[key])} | {quotient(row[key], full[key])}" for key in ("prefill", "decode")]
        size = f"{row['cache'] / 2**20:.1f} | {full['cache'] / row['cache']:.2f}"
        print(f"| {row['model']}, {row['tokens']} | {row['way']} | {cells[0]} | {cells[1]} | {size} |")
    section("Quality right after conversion", "masformer quality", of_part["quality"])
    print("| context, window | full layers | sinks | text | far copies | needle | needles found |")
    print("|---|---|---|---|---|---|---|")
    for row in (row for row in found if row["part"] == "quality"):
        name = row["placement"] if row["placement"] != "profile" else f"profile {row['full']}"
        figures = [f"{row[key]:.3f}" for key in ("text_nll", "repeat_nll", "needle_nll")]
        cells = " | ".join([*figures, f"{row['found'] * row['texts']:.0f} of {row['texts']}"])
        print(f"| {row['context']}, {SETTINGS[row['context']][0]} | {name} | {row['sinks']} | {cells} |")
    _recovered([row for row in found if row["part"] == "recover"])


def _recovered(found: Sequence[dict[str, Any]]) -> None:
    section("Recovery on real documents", "masformer recover", found)
    print("| trained by | tokens | minutes | text | far copies | needle |\n|---|---|---|---|---|---|")
    for row in found:
        cells = [
            f"{row['before'][key]:.3f} → {row['after'][key]:.3f}" for key in ("text_nll", "repeat_nll", "needle_nll")
        ]
        print(f"| {row['way']} | {row['tokens']} | {row['seconds'] / 60:.0f} | {' | '.join(cells)} |")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts that are asked for; all of them by default."""
    parts: dict[str, Callable[[], None]] = {
        "cost": cost,
        "length": length,
        "model": model,
        "quality": partial(quality, 2048),
        "long": partial(quality, 8192),
        "recover": recover,
        "table": table,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=list(parts), default=[])
    parser.add_argument("--model", default="demo", help="for `model`: another model, such as a GGUF file")
    quiet_upstream()
    given = parser.parse_args(argv)
    parts["model"] = partial(model, given.model)
    for part in given.parts or parts:
        parts[part]()


if __name__ == "__main__":
    main()
