"""LoSparse: matrices of real shapes at 50, 30 and 20 % beside the dense ones, in each form, and whole models' steps."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.bench import Bench, Measured, Shape
from benchmarks.gpu.models import in_float64, random_ids, random_llama
from tenfold.compress.losparse.factors import stored
from tenfold.compress.losparse.layer import LowRankRowsLinear, remark, replace_module
from tenfold.compress.losparse.layout import settle
from tenfold.kernels.low_rank_rows import Form

KEPT = (0.5, 0.3, 0.2)
TOKENS = (1, 16, 128, 2048)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def products(bench: Bench) -> None:
    """One matrix of the feed-forward part, then the models."""
    for shape in bench.shapes:
        for kept in KEPT:
            for tokens in bench.sizes(TOKENS, (1, 16)):
                case = {"model": shape.name, "tokens": tokens, "of": f"{shape.inner} x {shape.hidden}"}
                for way in ("whole", "stored", "joined"):
                    if way != "whole" or kept == KEPT[0]:
                        named = way if way == "whole" else f"{way}, {kept:.0%}"
                        bench.row("losparse product", case | {"way": named},
                                  partial(_product, bench, shape, kept, tokens, way))  # fmt: skip
    for shape in bench.shapes:
        for kept in (None, *KEPT):
            case = {"model": shape.name, "layers": shape.layers, "tokens": 1}
            way = "dense" if kept is None else f"compressed, {kept:.0%}"
            bench.row("losparse model", case | {"way": way}, partial(_model, bench, shape, kept))


def sizes(out: int, inner: int, kept: float) -> tuple[int, int]:
    """The largest rank within a share, beside an eighth of it in rows."""
    rows = int(kept * out / 8)
    rank = max(
        rank for rank in range(0, min(out - rows, inner), 4) if stored(out, inner, rank, rows) <= kept * out * inner
    )
    return rank, rows


def random_layer(bench: Bench, out: int, inner: int, kept: float) -> LowRankRowsLinear:
    """Outputs are of the size of inputs. Put together from its parts: to find them in a matrix takes seconds."""
    rank, rows = sizes(out, inner, kept)
    layer = LowRankRowsLinear(inner, out, rank, rows, bias=False, device=bench.device, dtype=bench.dtype)
    with torch.no_grad():
        layer.rows.copy_(bench.randn(rank + rows, inner) / inner**0.5)
        layer.mix.copy_(bench.randn(out - rank - rows, rank) / max(rank, 1) ** 0.5)
        layer.place.copy_(torch.randperm(out, device=bench.device))
    return layer.requires_grad_(False)


def _product(bench: Bench, shape: Shape, kept: float, tokens: int, form: Form) -> Measured:
    out, inner = shape.inner, shape.hidden
    layer = random_layer(bench, out, inner, kept)
    layer.take(form, form)
    x = bench.randn(1, tokens, inner)
    with torch.no_grad():
        exact = x.double() @ layer.dense_weight().double().mT
        found: Measured = {"error": bench.check(layer(x), exact, 2e-2)}
        found |= {"ms": bench.milliseconds(lambda: layer(x)), "graph_ms": bench.graph_milliseconds(lambda: layer(x))}
    few = layer.rank + layer.kept
    numbers = {
        "whole": out * inner,
        "stored": stored(out, inner, layer.rank, layer.kept),
        "joined": few * (out + inner),
    }
    return found | {"bytes": 2 * numbers[form]}


def _model(bench: Bench, shape: Shape, kept: float | None) -> Measured:
    """A forward pass of one token, in the forms that `settle` chooses; and of 2,048."""
    model: Any = random_llama(bench, shape)
    found: Measured = {}
    if kept is not None:
        for name, module in list(model.named_modules()):
            if name.rpartition(".")[2] in LINEARS:
                replace_module(model, name, random_layer(bench, *module.weight.shape, kept))
        forms = Counter(f"{few}/{many}" for few, many in settle(remark(model)).values())
        found["forms"] = ", ".join(f"{count} {name}" for name, count in forms.items())
    one, many = random_ids(bench, 1, 1), random_ids(bench, 1, bench.sizes(2048, 24))
    with torch.no_grad():
        found["error"] = bench.check(model(many).logits, in_float64(model)(many).logits, 5e-2)
        found |= {
            "ms": bench.milliseconds(lambda: model(one, use_cache=False)),
            "graph_ms": bench.graph_milliseconds(lambda: model(one, use_cache=False)),
            "ms_of_2048": bench.milliseconds(lambda: model(many, use_cache=False)),
        }
    return found | {"bytes": sum(p.numel() * p.element_size() for p in model.parameters())}
