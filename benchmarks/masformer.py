"""MASFormer: time and memory of local attention, of a converted model, and what conversion costs in quality.

    python -m benchmarks.masformer cost      # the kernel, forward and backward; an idle machine
    python -m benchmarks.masformer model     # prefill, decoding, cache of the converted embedded model; an idle machine
    python -m benchmarks.masformer quality   # text and far copies by placement, with and without sinks; real data
    python -m benchmarks.masformer table     # what docs/methods/masformer.md shows

The peers of the kernel: full causal sdpa, and what a stock sliding layer does on sdpa, a mask of all pairs. Nothing is
trained here: quality is that right after conversion.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import done_in, keep_in, rows_in
from benchmarks.adalora import alternate, quotient, spread
from benchmarks.gear import documents
from tenfold.attend.attention import self_attentions
from tenfold.attend.masformer import Placement, convert, place, profile, repeated, text_loss
from tenfold.cache.spans import SpanCache
from tenfold.compat import quiet_upstream
from tenfold.evaluate.inference import evaluating, prompt_ids
from tenfold.evaluate.memory import peak_growth, stored_bytes
from tenfold.kernels.local import Span, local_attention
from tenfold.models.open import open_model

RESULTS = Path(__file__).parent / "results" / "masformer.jsonl"
SHAPES = ((1024, 256), (2048, 256), (4096, 512), (8192, 512), (8192, 1024), (32768, 1024))
DENSE = 8192
"""Up to so many tokens the peers are timed as well."""
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
            query = torch.randn(1, HEADS, n, CHANNELS, requires_grad=backward)
            key, value = (torch.randn(1, KV_HEADS, n, CHANNELS, requires_grad=backward) for _ in range(2))
            index = torch.arange(min(n, DENSE))
            mask = ((index[:, None] >= index) & (index[:, None] - index < size))[None, None]
            ways: dict[str, Callable[[], torch.Tensor]] = {
                "block, own only": partial(local_attention, query, key, value, Span("block", size, 0), 0.125),
                "block, one before": partial(local_attention, query, key, value, Span("block", size, 1), 0.125),
                "sliding": partial(local_attention, query, key, value, Span("sliding", size), 0.125),
                "sliding, 4 sinks": partial(local_attention, query, key, value, Span("sliding", size, sinks=4), 0.125),
            }
            dense = partial(scaled_dot_product_attention, query, key, value, scale=0.125, enable_gqa=True)
            if n <= DENSE:
                ways |= {"full": partial(dense, is_causal=True), "stock sliding": partial(dense, attn_mask=mask)}
            work = {name: partial(_run, way, backward) for name, way in ways.items()}
            for name, seconds in alternate(work, repeats).items():
                peak = peak_growth(work[name]).growth
                keep({"part": "kernel", "n": n, "size": size, "backward": backward, "way": name, "seconds": seconds,
                      "peak": peak})  # fmt: skip


def _run(way: Callable[[], torch.Tensor], backward: bool) -> None:
    output = way()
    if backward:
        output.sum().backward()


def model(repeats: int = 3) -> None:
    """The embedded model with a quarter of its layers full, on its small caches, beside the unconverted one."""
    opened = open_model("demo", device="cpu")
    tokenizer, net = opened.tokenizer, opened.model.eval()
    token = torch.tensor([[10]])
    for tokens in (2048, 8000):
        if done(part="model", tokens=tokens):
            continue
        ids = prompt_ids(tokenizer, tokens, 1, torch.device("cpu"))
        for name in ("full", "converted"):
            handle = None
            if name == "converted":
                layers = place("interleave", 8, len(self_attentions(net)))
                handle = convert(net, full_layers=layers, span=Span("sliding", 1024, sinks=4))
            with evaluating(net):
                caches: list[Any] = []

                def read(handle: Any = handle, ids: torch.Tensor = ids, caches: list[Any] = caches) -> None:
                    cache = None if handle is None else SpanCache(net.config)
                    output = net(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    caches[:] = [output.past_key_values]

                seconds = alternate({name: read}, repeats)[name]
                step = partial(net, input_ids=token, past_key_values=caches[0], use_cache=True)
                decode = alternate({name: lambda step=step: step()}, 10)[name]  # type: ignore[misc]
            keep({"part": "model", "tokens": tokens, "way": name, "prefill": seconds, "decode": decode,
                  "cache": stored_bytes(caches[0].layers)})  # fmt: skip
            if handle is not None:
                handle.revert()


def quality(size: int = 256, texts: int = 4) -> None:
    """Text and far copies of real documents right after conversion: 8 of 30 layers full, 2k tokens."""
    opened = open_model("demo", device="cpu")
    net, count = opened.model.eval(), 8
    layers = len(self_attentions(net))
    found = documents(opened.tokenizer, 2000, 2 * texts)
    pieces = [repeated(ids[:1600], 384, 1216)[0] for ids in found]
    for sinks in (4, 0):
        span = Span("sliding", size, sinks=sinks)
        scores = profile(net, pieces[:texts], span)
        by_profile = tuple(sorted(sorted(range(layers), key=lambda layer: -scores[layer])[:count]))
        fixed: tuple[Placement, ...] = ("bottom", "top", "middle", "interleave")
        chosen = {"all": tuple(range(layers)), "none": (), "profile": by_profile}
        chosen |= {name: place(name, count, layers) for name in fixed}
        for name, full in chosen.items():
            if done(part="quality", placement=name, sinks=sinks):
                continue
            handle = convert(net, full_layers=full, span=span)
            with evaluating(net):
                copies = [float(text_loss(net, ids, scored)) for ids, scored in pieces[texts:]]
                plain = [float(text_loss(net, ids[:1600], torch.arange(1600) >= 800)) for ids, _ in pieces[texts:]]
            handle.revert()
            keep({"part": "quality", "placement": name, "sinks": sinks, "full": list(full), "text": plain,
                  "repeat": copies})  # fmt: skip


def table() -> None:
    """Markdown for the docs page."""
    found = rows()
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
    print("\n| tokens | model | prefill | decode | cache, MiB |\n|---|---|---|---|---|")
    for row in (row for row in found if row["part"] == "model"):
        cells = f"{spread(row['prefill'])} | {spread(row['decode'])} | {row['cache'] / 2**20:.1f} |"
        print(f"| {row['tokens']} | {row['way']} | {cells}")
    print("\n| full layers | sinks | text, nats/token | far copies, nats/token |\n|---|---|---|---|")
    for row in (row for row in found if row["part"] == "quality"):
        name = row["placement"] if row["placement"] != "profile" else f"profile {row['full']}"
        print(
            f"| {name} | {row['sinks']} | {statistics.mean(row['text']):.3f} | {statistics.mean(row['repeat']):.3f} |"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts that are asked for; all of them by default."""
    parts: dict[str, Callable[[], None]] = {"cost": cost, "model": model, "quality": quality, "table": table}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=list(parts), default=[])
    quiet_upstream()
    for part in parser.parse_args(argv).parts or parts:
        parts[part]()


if __name__ == "__main__":
    main()
