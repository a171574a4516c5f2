"""The stage ``masformer``: local attention in most layers, and what it costs in quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from tenfold.attend.attention import self_attentions
from tenfold.attend.masformer.conversion import Converted, choose_heads, convert, place, profile, profile_heads
from tenfold.cache.spans import formula_bytes
from tenfold.config.masformer import MasformerConfig
from tenfold.errors import ConfigError
from tenfold.evaluate.long_context import copying, joined_ids, repeated, spread
from tenfold.kernels.local import AttentionWindow
from tenfold.models.changes import settle_layers
from tenfold.models.export import save_model
from tenfold.models.head_sizes import head_dim, kv_heads
from tenfold.models.inference import max_positions
from tenfold.stage.context import Context, StageOutput
from tenfold.stage.record import Figure, Series, Table
from tenfold.stage.results import Result

LENGTHS = (2048, 8192, 32768)
"""Contexts of which the cost is predicted."""


def run_masformer(config: MasformerConfig, context: Context) -> StageOutput:
    """The stage ``masformer``; its artefact is the converted model."""
    opened = context.model.open(merge=True)
    model = opened.model
    span = AttentionWindow(config.pattern, config.window, config.previous, config.sinks)
    convert(model, full_layers=config.full_layers or (), span=span).revert()  # refuses what cannot be, before hours
    _count(model, config)
    found, measured = _texts(opened.tokenizer, model, span, config, context)
    quality = partial(copying, model, measured, config.passage, progress=partial(context.progress, "quality"))
    before = context.store.get("before", lambda: [quality(subject="before")], list[Result])
    full, heads, scores = _chosen(model, span, found, config, context)
    handle = convert(model, full_layers=full, span=span, heads=heads)
    after = context.store.get("after", lambda: [quality(subject="after")], list[Result])
    settle_layers(model)
    save_model(model, opened.tokenizer, context.folder / "model")
    report = handle.report()
    return StageOutput(
        results=[*before, *after],
        tables=[_costs(handle)],
        figures=_maps(handle, scores),
        attached={key: report[key] for key in ("full layers", "local layers", "heads", "span")},
        notes=[
            "No weight is changed: the spans lie in the model's configuration as tenfold_span, which tenfold reads. "
            "Plain transformers refuses the folder, as it has no attention of that name. With an attn_implementation "
            "of its own, and in other programs, the model would run on full attention everywhere.",
        ],
        artefact="model",
        continues_with="model",
    )


def _texts(
    tokenizer: Any, model: Any, span: AttentionWindow, config: MasformerConfig, context: Context
) -> tuple[list[Tensor], list[Tensor]]:
    """Texts to profile on, and others to measure on: from the first and the second half of the rows."""
    assert context.rows is not None
    between = config.between or max(config.passage, span.reach)
    length = config.passage + between
    limit = max_positions(model)
    if limit is not None and length + config.passage > limit:
        raise ConfigError(
            f"passage {config.passage} twice with {between} tokens between are more than the {limit} of the model",
            remedy="give a shorter passage, a smaller window, or between",
        )
    ids = joined_ids(tokenizer, context.rows)
    pieces = spread(ids, length, 2 * config.passages, context.rows.source)
    return pieces[: config.passages], pieces[config.passages :]


def _count(model: Any, config: MasformerConfig) -> tuple[int, int]:
    """What a layer counts as, and how many of all that are full."""
    each = kv_heads(model.config.get_text_config(decoder=True)) if config.by == "heads" else 1
    return each, config.count(len(self_attentions(model)) * each)


def _chosen(
    model: Any, span: AttentionWindow, texts: Sequence[Tensor], config: MasformerConfig, context: Context
) -> tuple[tuple[int, ...], dict[int, dict[int, AttentionWindow | None]], dict[int, list[float]]]:
    """The full layers, the full heads of others, and the scores that they were found by, if they were."""
    layers = sorted(self_attentions(model))
    if config.full_layers is not None:
        return tuple(sorted(set(config.full_layers))), {}, {}
    each, count = _count(model, config)
    if config.placement != "profile":
        return place(config.placement, count, layers), {}, {}
    context.progress("profile", 0, 1, f"{len(layers) * each} {config.by} in one backward pass")
    passages = [repeated(ids, config.passage, len(ids) - config.passage)[0] for ids in texts]

    def scored() -> dict[int, list[float]]:
        if config.by == "heads":
            return profile_heads(model, passages, span)
        return {layer: [score] for layer, score in profile(model, passages, span).items()}

    scores = context.store.get("profile", scored, dict[int, list[float]])
    return *choose_heads(scores, count), scores


def _costs(handle: Converted) -> Table:
    """Visible pairs, arithmetic and cache bytes at some lengths (specification, section 2, item 6, and oracle 9)."""
    model = handle.model
    config = model.config.get_text_config(decoder=True)
    outer = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer}
    weights = sum(p.numel() for p in model.parameters() if id(p) not in outer)
    size = head_dim(config)
    rows = []
    for length in LENGTHS:
        pairs = handle.report(length)["pairs"]
        # Of a pair two products of head_dim numbers, of a weight one for each token; a product is two operations.
        attention = 4 * len(self_attentions(model)) * config.num_attention_heads * size * length * (length + 1) / 2
        prefill = [(2 * weights * length + attention * share) / 1e12 for share in (1, pairs)]
        bytes_of = partial(formula_bytes, config, length, itemsize=model.dtype.itemsize)
        whole, small = bytes_of(spans=False), bytes_of()
        rows.append((length, pairs, *prefill, whole / 2**20, small / 2**20, whole / small))
    columns = ("tokens", "pairs of full attention", "prefill before, TFLOP", "prefill after, TFLOP",
               "cache before, MiB", "cache after, MiB", "smaller")  # fmt: skip
    return Table(title="What the spans cost", columns=columns, rows=tuple(rows))


def _maps(handle: Converted, scores: Mapping[int, Sequence[float]]) -> list[Figure]:
    """How many heads of each layer keep full attention, and the scores that they were chosen by."""
    layers = sorted(self_attentions(handle.model))
    names, each = tuple(map(str, layers)), kv_heads(handle.model.config.get_text_config(decoder=True))
    heads: Mapping[int, Mapping[int, AttentionWindow | None]] = handle.heads
    counts = tuple(float(each if layer in handle.full_layers else len(heads.get(layer, ()))) for layer in layers)
    figures = [
        Figure(
            kind="bar",
            title="Full attention",
            x_label="layer",
            y_label="KV heads",
            series=(Series(name="full", x=names, y=counts),),
            caption=f"KV heads of each layer that see all tokens, of {each}.",
        )
    ]
    if scores:
        heads_each = len(scores[layers[0]])
        titles = [f"KV head {head}" for head in range(heads_each)] if heads_each > 1 else ["layer"]
        series = tuple(
            Series(name=title, x=names, y=tuple(scores[layer][head] for layer in layers))
            for head, title in enumerate(titles)
        )
        figures.append(
            Figure(
                kind="heatmap" if len(series) > 1 else "bar",
                title="What a local span takes",
                x_label="layer",
                y_label="score, nats/token" if len(series) == 1 else "KV head",
                series=series,
                caption="How much the loss on far copies would fall if what is half local became full.",
            )
        )
    return figures
