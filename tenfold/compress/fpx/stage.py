"""The stage ``fpx``: a plan, a GGUF file with a type for each tensor, and what that cost in quality."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from tenfold.adapt.role_map import by_role
from tenfold.compress.fpx.checks import PALETTE, known_plan, refuse_unplannable, writable_palette
from tenfold.compress.fpx.digests import weights_digest
from tenfold.compress.fpx.plan import Plan, plan
from tenfold.config.fpx import FpxConfig
from tenfold.data.encode import encode, row_tokens
from tenfold.data.rows import Text
from tenfold.errors import ConfigError
from tenfold.evaluate.agreement import agreement
from tenfold.evaluate.compare import compare
from tenfold.evaluate.perplexity import perplexity
from tenfold.models.gguf_write import GgufSizes, gguf_sizes, write_gguf
from tenfold.models.inference import evaluating, input_device
from tenfold.models.layer_map import layer_map
from tenfold.models.open import open_model
from tenfold.models.opened import Opened
from tenfold.stage.context import Context, StageOutput
from tenfold.stage.record import Figure, Series, Table
from tenfold.stage.results import Result

FOLDER = "model"
FILE = "model.gguf"
PLAN = "plan.json"
WHOLE = "99bits"
"""A budget that no plan exceeds: scores alone are wanted."""


def run_fpx(config: FpxConfig, context: Context) -> StageOutput:
    """The stage ``fpx``; its artefacts are the file and the plan."""
    assert context.rows is not None, "checked before anything was opened"
    opened = context.model.open(merge=True)
    refuse_unplannable(opened.model, config, lambda: opened.tokenizer)
    train, _ = context.rows.split(config.holdout)
    encoded = encode(train, opened.tokenizer, max_length=config.max_length, packing=True, on_bad_row=config.on_bad_row)
    passages = _evenly([torch.tensor(one["input_ids"]) for one in encoded.examples], config.calibration)
    scores = Plan.from_json(context.store.get("scores", partial(_scores, config, context, opened, passages), str))
    found = scores.replan(config.budget)
    sizes = gguf_sizes(opened.model, found.by_module, opened.tokenizer)
    found.save(context.folder / PLAN)
    context.progress.begin("writing the file")
    weights = input_squares(opened.model, passages) if writable_palette() == PALETTE else None
    write_gguf(
        opened.model,
        opened.tokenizer,
        context.folder / FOLDER / FILE,
        found.by_module,
        importance=weights,
        overwrite=True,
    )
    measured = context.store.get("quality", partial(_quality, config, context, opened), list[Result])
    return StageOutput(
        results=measured,
        tables=[_formats(sizes), _tensors(sizes)],
        figures=[_map(opened.model, sizes)],
        attached={
            "method": "FPX",
            "units": len(found.units),
            "bytes": sizes.total,
            "bits of a weight": 8 * sizes.total / found.numbers,
            "budget": config.budget,
        },
        notes=[*opened.notes, *encoded.notes, *_said(found, sizes)],
        artefact=FOLDER,
        artefacts={"plan": PLAN},
        continues_with="model",
        left_out=encoded.refused,
    )


def _scores(config: FpxConfig, context: Context, opened: Opened, passages: Sequence[Tensor]) -> str:
    """What each matrix loses by each type: those of an earlier plan, or measured."""
    known = known_plan(opened.model, config.plan)
    if known is not None:
        if known.weights_hash != weights_digest(opened.model):
            raise ConfigError(
                f"plan: {config.plan} was made for other weights than these of {opened.identity['source']}",
                remedy="give the plan of an earlier run on this very model, or leave plan out",
            )
        # The tokenizer may be another one.
        beside = gguf_sizes(opened.model, known.by_module, opened.tokenizer).total - known.bytes
        return replace(known, extra_bytes=known.extra_bytes + beside).to_json()
    palette = config.palette or writable_palette()
    return plan(
        opened.model, passages, budget=WHOLE, palette=palette, metric=config.metric, codec="gguf",
        tokenizer=opened.tokenizer, seed=context.seed, tell=context.progress,
    ).to_json()  # fmt: skip


def input_squares(model: Any, passages: Sequence[Tensor]) -> dict[str, Tensor]:
    """The mean square of each input of each layer, by which roundings are weighed."""
    sums: dict[str, Tensor] = {}
    names = [slot.name for slot in layer_map(model).slots if slot.layout in ("linear", "conv1d")]

    def watch(name: str, args: tuple[Tensor, ...]) -> None:
        squares = args[0].detach().flatten(0, -2).double().square().sum(0)
        sums[name] = sums[name] + squares if name in sums else squares

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: watch(name, args))
        for name in names
    ]
    try:
        with evaluating(model), torch.no_grad():
            for ids in passages:
                model(input_ids=ids[None].to(input_device(model)))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (found / sum(map(len, passages))).float() for name, found in sums.items()}


def _evenly(sequences: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """Sequences from all over the data, of about as many tokens as are asked for."""
    share = min(1.0, tokens / max(1, sum(map(len, sequences))))
    chosen = [ids for index, ids in enumerate(sequences) if int((index + 1) * share) > int(index * share)]
    return chosen or list(sequences[:1])


def _quality(config: FpxConfig, context: Context, opened: Opened) -> list[Result]:
    """Of held-out rows: how near the predictions of the file are to those before, and both perplexities."""
    assert context.rows is not None
    _, rows = context.rows.split(config.holdout)
    found, _ = row_tokens(rows, opened.tokenizer, on_bad_row=config.on_bad_row)
    before = itertools.accumulate((len(row.ids) for row in found), initial=0)
    held = [row for row, tokens in zip(found, before, strict=False) if tokens < config.calibration]
    texts = [row.text if isinstance(row, Text) else row for row in held]
    # As it is read back, whatever was meant to be written.
    written = open_model(
        context.folder / FOLDER / FILE, device=input_device(opened.model), dtype=opened.model.dtype
    ).model
    near = agreement(
        opened.model,
        written,
        [torch.tensor(row.ids[: config.max_length]) for row in held if len(row.ids) > 1],
        tell=partial(context.progress, "predictions, before and after"),
    )
    measured = {
        subject: perplexity(
            one, opened.tokenizer, texts, max_length=config.max_length, batch_size=config.batch_size, subject=subject,
            progress=partial(context.progress, f"perplexity, {subject}"),
        )
        for subject, one in (("before", opened.model), ("after", written))
    }  # fmt: skip
    changed = compare(measured["before"], measured["after"]).result
    return [near.result, *(one.result for one in measured.values()), changed]


def _formats(sizes: GgufSizes) -> Table:
    """How many matrices have each type, and what they take."""
    counts, taken = Counter[str](), Counter[str]()
    for one in sizes.tensors:
        kind = one.type if one.module else "norms and biases, f32"
        counts[kind] += 1
        taken[kind] += one.bytes
    lines: list[tuple[Any, ...]] = [
        (kind, counts[kind], size / 1e6, 100 * size / sizes.total) for kind, size in taken.most_common()
    ]
    beside = sizes.total - sum(taken.values())
    lines.append(("tokenizer and other metadata", "", beside / 1e6, 100 * beside / sizes.total))
    return Table(title="What the file holds", columns=("type", "tensors", "MB", "%"), rows=tuple(lines))


def _tensors(sizes: GgufSizes) -> Table:
    """Each tensor of the file."""
    return Table(
        title="Tensors",
        columns=("tensor", "shape", "type", "bytes"),
        rows=tuple((one.name, " x ".join(map(str, one.shape)), one.type, one.bytes) for one in sizes.tensors),
    )


def _map(model: Any, sizes: GgufSizes) -> Figure:
    """Bits of a weight, by layer and role."""
    bits = {one.module: round(8 * one.bytes / prod(one.shape), 1) for one in sizes.tensors if one.module}
    slots = {slot.name: slot for slot in layer_map(model).slots if slot.name in bits and slot.layer is not None}
    shares = by_role(slots, {name: bits[name] for name in slots})
    series = tuple(Series(name=role, x=tuple(map(str, range(len(row)))), y=tuple(row)) for role, row in shares.items())
    caption = "Bits for each weight, scales included."
    return Figure(
        kind="heatmap", title="Where the bits went", x_label="layer", y_label="role", series=series, full=9,
        caption=caption,
    )  # fmt: skip


def _said(found: Plan, sizes: GgufSizes) -> list[str]:
    notes = [
        f"The file has {sizes.total / 1e6:.4g} MB, {8 * sizes.total / found.numbers:.3g} bits for each of "
        f"{found.numbers / 1e6:.4g} million numbers; the budget was {found.budget}."
    ]
    if sizes.fallbacks:
        kinds = Counter(f"{one.asked} became {one.type}" for one in sizes.fallbacks)
        notes.append(
            f"Rows of {len(sizes.fallbacks)} matrices do not divide by 256, which K types need: "
            + ", ".join(f"{kind} ({count})" for kind, count in kinds.items())
        )
    return notes
