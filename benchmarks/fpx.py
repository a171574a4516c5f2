"""FPX: what a plan loses beside the paper's order and llama.cpp's own mixes, and how fast its files are.

    python -m benchmarks.fpx share     # 4-bit floats for a share of the parameters, by each way to order the matrices
    python -m benchmarks.fpx files     # GGUF files beside llama.cpp's mixes of the same bytes, or fewer
    python -m benchmarks.fpx decode    # tokens a second of these files in llama.cpp; an idle machine
    python -m benchmarks.fpx kernels   # packed in memory: milliseconds, predicted and measured; an idle machine
    python -m benchmarks.fpx table     # what docs/results/fpx.md shows
    python -m benchmarks.fpx share files --model FILE.gguf

All are resumable. Plans look at 1,024 tokens of the Python reference; tested is on other topics of it, by the
divergence of the predictions from those of the model as it was. The weights of the embedded model come from a file of
4 bits (Q4_1), on whose grid some types lose nothing: so they are taken off it before anything is measured (`off_grid`).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import done_in, keep_in, rows_in, section
from tenfold.compat import quiet_upstream
from tenfold.compress.fpx.apply import apply
from tenfold.compress.fpx.packing import pack
from tenfold.compress.fpx.plan import Plan, plan
from tenfold.compress.fpx.stage import PALETTE, input_squares
from tenfold.core.latency import LatencyModel, TimedCall
from tenfold.core.statistics import t_quantile
from tenfold.data.groups import hash_share
from tenfold.data.read import read_rows
from tenfold.evaluate.agreement import agreement
from tenfold.evaluate.latency import time_calls
from tenfold.evaluate.perplexity import ratio
from tenfold.models.gguf_mixes import native_mix
from tenfold.models.gguf_write import gguf_sizes, write_gguf
from tenfold.models.memory import weight_bytes
from tenfold.models.open import open_model
from tenfold.models.opened import Opened

RESULTS = Path(__file__).parent / "results" / "fpx.jsonl"
PIECE, PIECES, TESTED = 256, 4, 8
"""Tokens of a passage, passages to plan by, and passages to test on."""
SHARES = (0.3, 0.5, 0.7)
"""Of the parameters of the blocks, in the smaller format."""
FORMATS = ("fp8_row", "nvfp4")
MIXES = ("Q4_K_M", "Q4_0", "Q3_K_M", "Q5_K_M")
METRICS = ("relative_l2", "fisher", "kl")

rows = partial(rows_in, RESULTS)
keep = partial(keep_in, RESULTS)
done = partial(done_in, RESULTS)


@cache
def passages(model: str) -> tuple[list[Tensor], list[Tensor]]:
    """To plan by, and to test on: each the first tokens of a topic."""
    tokenizer = opened(model).tokenizer
    topics = sorted(read_rows("python-reference"), key=lambda row: hash_share(f"fpx {row.id}"))
    ids = [torch.tensor(tokenizer(row.text, verbose=False)["input_ids"][:PIECE]) for row in topics]
    whole = [one for one in ids if len(one) == PIECE]
    return whole[:PIECES], whole[PIECES : PIECES + TESTED]


@cache
def opened(model: str) -> Opened:
    """In float32, off the grid of the file that it came from."""
    found = open_model(model, device="cpu")
    off_grid(found.model)
    return found


@torch.no_grad()
def off_grid(model: Any) -> None:
    """Scale channels within a Llama such that it computes the same with weights that lie on no file's grid.

    Channels behind a norm by its weight, those of values within a head by the columns of the output, those within an
    MLP by the columns of its way down. The embedding, which is the head as well, has noise of a third of a step of four
    bits instead: that is another model, which what follows is compared with.
    """
    draw = torch.Generator().manual_seed(0)

    def scales(count: int) -> Tensor:
        return torch.exp2(torch.rand(count, generator=draw) - 0.5)

    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm, readers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            by = scales(len(norm.weight))
            norm.weight *= by
            for reader in readers:
                reader.weight /= by
        by = scales(len(attention.v_proj.weight))
        attention.v_proj.weight *= by[:, None]
        heads = by.view(model.config.num_key_value_heads, 1, -1).expand(-1, attention.num_key_value_groups, -1)
        attention.o_proj.weight /= heads.reshape(-1)
        by = scales(len(mlp.up_proj.weight))
        mlp.up_proj.weight *= by[:, None]
        mlp.down_proj.weight /= by
    table = model.get_input_embeddings().weight
    groups = table.unflatten(1, (-1, 32))
    step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
    groups += step * (torch.rand(groups.shape, generator=draw) - 0.5) * (2 / 3)


def share(model: str = "demo", metrics: Sequence[str] = METRICS) -> None:
    """The same share of parameters in 4 bits, chosen by each metric: by count of bytes, so that none spends more."""
    found, (seen, tested) = opened(model), passages(model)
    keys = {"part": "share", "model": Path(model).stem}
    for metric in metrics:
        if all(done(**keys, metric=metric, share=one) for one in SHARES):
            continue
        began = time.perf_counter()
        scores = plan(found.model, seen, budget="99bits", palette=FORMATS, metric=metric, codec="reference")  # type: ignore[arg-type]
        seconds = time.perf_counter() - began
        for one in SHARES:
            chosen = scores.replan(f"{_bytes_at(scores, one)}B")
            _keep(keys | {"metric": metric, "share": one, "seconds": seconds}, found, chosen, tested)
    for name in FORMATS:
        if not done(**keys, metric="all", format=name):
            alone = plan(found.model, seen[:1], budget="99bits", palette=(name,), metric="relative_l2")
            _keep(keys | {"metric": "all", "format": name}, found, alone, tested)


def _bytes_at(scores: Plan, share: float) -> int:
    """What is stored when this share of the numbers has the second format."""
    first, second = (sum(unit.candidates[place].bytes for unit in scores.units) for place in (0, 1))
    beside = scores.bytes - sum(unit.chosen.bytes for unit in scores.units)
    return round(beside + first + share * (second - first))


def _keep(row: dict[str, Any], found: Opened, chosen: Plan, tested: Sequence[Tensor]) -> None:
    other = copy.deepcopy(found.model)
    apply(other, chosen)
    keep(row | {"bits": chosen.bits} | _away(found.model, other, tested))


def _away(before: Any, after: Any, tested: Sequence[Tensor]) -> dict[str, Any]:
    near = agreement(before, after, tested)
    return {"kl": near.kl_of_texts.tolist(), "tokens": near.tokens.tolist(), "same": near.same}


def files(model: str = "demo", mixes: Sequence[str] = MIXES) -> None:
    """A file as llama.cpp would mix it, and ours within its bytes; with and without an importance of inputs."""
    found, (seen, tested) = opened(model), passages(model)
    keys = {"part": "files", "model": Path(model).stem}
    scores: Plan | None = None
    squares = input_squares(found.model, seen)
    for name in mixes:
        sizes = gguf_sizes(found.model, native_mix(name, found.model, weighted=True), found.tokenizer)
        if not done(**keys, way="llama.cpp", of=name):
            types = native_mix(name, found.model, weighted=True)
            _write(keys | {"way": "llama.cpp", "of": name}, found, types, squares, tested)
        if not done(**keys, way="plan", of=name):
            if scores is None:
                scores = _scores(found, seen)
            types = scores.replan(f"{sizes.total}B").by_module
            _write(keys | {"way": "plan", "of": name}, found, types, squares, tested)


def _scores(found: Opened, seen: Sequence[Tensor]) -> Plan:
    return plan(found.model, seen, budget="99bits", palette=PALETTE, codec="gguf", tokenizer=found.tokenizer)


def _write(
    row: dict[str, Any], found: Opened, types: dict[str, str], squares: dict[str, Tensor], tested: Sequence[Tensor]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(found.model, found.tokenizer, path, types, importance=squares)
        written = open_model(path, device="cpu").model
        keep(row | {"bytes": path.stat().st_size} | _away(found.model, written, tested))


def decode(model: str = "demo", mixes: Sequence[str] = MIXES, tokens: int = 64, rounds: int = 5) -> None:
    """Tokens a second in llama.cpp, the files taking turns."""
    from tenfold.engines.llama_cpp import LlamaCpp
    from tenfold.engines.requests import Request

    found, (seen, _) = opened(model), passages(model)
    keys = {"part": "decode", "model": Path(model).stem}
    if done(**keys):
        return
    scores = _scores(found, seen)
    with tempfile.TemporaryDirectory() as folder:
        paths: dict[str, Path] = {}
        for name in mixes:
            mix = native_mix(name, found.model)
            size = gguf_sizes(found.model, mix, found.tokenizer).total
            for way, types in (("llama.cpp", mix), ("plan", scores.replan(f"{size}B").by_module)):
                paths[f"{way} {name}"] = Path(folder) / f"{way} {name}.gguf"
                write_gguf(found.model, found.tokenizer, paths[f"{way} {name}"], types)
        engines = {name: LlamaCpp(path) for name, path in paths.items()}
        request = Request("The quick brown fox", max_new_tokens=tokens)
        rates: dict[str, list[float]] = {name: [] for name in engines}
        for _, (name, engine) in itertools.product(range(rounds), engines.items()):
            (reply,) = engine.generate([request])
            rates[name].append(reply.tokens / reply.seconds.decode)
        for name, path in paths.items():
            keep(keys | {"file": name, "bytes": path.stat().st_size, "tokens a second": rates[name]})


def kernels(model: str = "demo", rounds: int = 5, prompt: int = 128, tokens: int = 32, tested: int = TESTED) -> None:
    """Packed in memory: milliseconds of a prompt and of a token, the forms taking turns, beside what plans predict."""
    found, (seen, texts) = opened(model), passages(model)
    keys = {"part": "kernels", "model": Path(model).stem}
    if done(**keys):
        return
    scores = plan(found.model, seen, budget="99bits", codec="kernels")
    plans = {name: _all_in(scores, name) for name in scores.palette}
    between = statistics.mean(one.seconds or 0.0 for one in (plans["int8_row"], plans["int4_g32"]))
    plans["mixed"] = scores.replan(f"{1e3 * between}ms")
    models = {"float32, torch": found.model, "bfloat16, torch": copy.deepcopy(found.model).bfloat16()}
    for name, chosen in plans.items():
        models[name] = copy.deepcopy(found.model)
        pack(models[name], chosen)
    times: dict[str, list[list[TimedCall]]] = {name: [] for name in models}
    for _, (name, one) in itertools.product(range(rounds), models.items()):
        times[name].append(time_calls(one, (prompt,), (0, tokens), rounds=1))
    # Fitted to one plan alone, the model of latencies says what calls of the others take.
    fitted = LatencyModel.fit(time_calls(models["int8_row"], rounds=max(1, rounds // 2)))
    for name, one in models.items():
        row: dict[str, Any] = {"form": name}
        row["prefill"] = [read.seconds for read, _ in times[name]]
        row["decode"] = [(whole.seconds - read.seconds) / tokens for read, whole in times[name]]
        if name in plans:
            away = (plans[name].seconds or 0.0) - (plans["int8_row"].seconds or 0.0)
            row["predicted"] = plans[name].seconds
            row["call"] = fitted.with_write(max(0.0, fitted.write + away)).seconds(prompt, tokens)
            row |= {"bits": plans[name].bits} | _away(found.model, one, texts[:tested])
        keep(keys | {"prompt tokens": prompt, "new tokens": tokens, "bytes": weight_bytes(one)} | row)


def _all_in(scores: Plan, name: str) -> Plan:
    return replace(scores, budget=name, units=tuple(replace(unit, format=name) for unit in scores.units))


# ---- tables ---------------------------------------------------------------------------------------------------------


def table() -> None:
    """Markdown for docs/results."""
    _shares([row for row in rows() if row["part"] == "share"])
    _files([row for row in rows() if row["part"] == "files"])
    _rates([row for row in rows() if row["part"] == "decode"])
    _kernels([row for row in rows() if row["part"] == "kernels"])


def _divergence(row: dict[str, Any]) -> str:
    mean, error = ratio(*(torch.tensor(row[name]).double() for name in ("kl", "tokens")))
    return f"{mean:.4f} ± {t_quantile(len(row['kl']) - 1) * (error or 0.0):.4f}"


def _shares(found: Sequence[dict[str, Any]]) -> None:
    if not found:
        return
    section("A share of the numbers in 4-bit floats", "fpx share", found)
    print("| model | NVFP4 share | chosen by | bits | divergence, nats a token | same likeliest token |")
    print("|---|---|---|---|---|---|")
    for row in sorted(found, key=lambda row: (row["model"], row.get("share", row.get("format") == "nvfp4"))):
        of = f"{row['share']:.0%}" if "share" in row else f"all {row['format']}"
        metric = "" if row["metric"] == "all" else row["metric"]
        print(f"| {row['model']} | {of} | {metric} | {row['bits']:.2f} | {_divergence(row)} | {row['same']:.3f} |")


def _files(found: Sequence[dict[str, Any]]) -> None:
    if not found:
        return
    section("Files of the same bytes", "fpx files", found)
    print("| model | mix | chosen by | MB | divergence, nats a token | same likeliest token | of llama.cpp's |")
    print("|---|---|---|---|---|---|---|")
    for row in found:
        other = [
            one for one in found if one["of"] == row["of"] and one["model"] == row["model"] and one["way"] != row["way"]
        ]
        gain = f"{sum(row['kl']) / sum(other[0]['kl']):.2f}" if other and row["way"] == "plan" else ""
        cells = f"{row['bytes'] / 1e6:.1f} | {_divergence(row)} | {row['same']:.3f} | {gain}"
        print(f"| {row['model']} | {row['of']} | {row['way']} | {cells} |")


def _rates(found: Sequence[dict[str, Any]]) -> None:
    if not found:
        return
    section("Decoding in llama.cpp", "fpx decode", found)
    print("| model | file | MB | tokens a second, median |")
    print("|---|---|---|---|")
    for row in found:
        rate = statistics.median(row["tokens a second"])
        print(f"| {row['model']} | {row['file']} | {row['bytes'] / 1e6:.1f} | {rate:.1f} |")


def _kernels(found: Sequence[dict[str, Any]]) -> None:
    if not found:
        return
    section("Packed in memory", "fpx kernels", found)
    print("| model | form | MB | prompt, ms | token, ms | fastest | predicted | call, ms | predicted | divergence |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in found:
        calls = [read + row["new tokens"] * each for read, each in zip(row["prefill"], row["decode"], strict=True)]
        measured = [row["prefill"], row["decode"]]
        cells = [f"{1e3 * statistics.median(one):.1f}" for one in measured] + [f"{1e3 * min(row['decode']):.1f}"]
        cells += [
            f"{1e3 * row['predicted']:.1f}" if "predicted" in row else "",
            f"{1e3 * statistics.median(calls):.0f}",
        ]
        cells += [f"{1e3 * row['call']:.0f}" if "call" in row else ""]
        cells += [_divergence(row) if "kl" in row else ""]
        print(f"| {row['model']} | {row['form']} | {row['bytes'] / 1e6:.0f} | {' | '.join(cells)} |")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts that are asked for; all of them by default."""
    parts: dict[str, Callable[..., None]] = {"share": share, "files": files, "decode": decode, "kernels": kernels}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*parts, "table", "cost"], default=[])
    parser.add_argument("--model", default="demo")
    given = parser.parse_args(argv)
    quiet_upstream()
    for part in given.parts or parts:
        if part == "table":
            table()
        else:
            parts["decode" if part == "cost" else part](given.model)


if __name__ == "__main__":
    main()
