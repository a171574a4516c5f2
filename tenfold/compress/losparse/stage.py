"""The stage ``losparse``: a model with fewer weights, what it holds now, and what that cost in quality."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tenfold.adapt.distil import by_model
from tenfold.adapt.fitting import prepare
from tenfold.adapt.role_map import by_role
from tenfold.adapt.training import Trained
from tenfold.compress.losparse.checks import check_asked, low_rank_error
from tenfold.compress.losparse.factors import stored
from tenfold.compress.losparse.layer import LowRankRowsLinear, compressed_layers, install, number_count
from tenfold.compress.losparse.layout import settle
from tenfold.compress.losparse.mathematics import rank_for
from tenfold.compress.losparse.oneshot import Replaced, compress_once
from tenfold.compress.losparse.own_text import own_text
from tenfold.compress.losparse.training import fit_compact, fit_compressed
from tenfold.config.losparse import LoSparseConfig
from tenfold.data.encode import Encoded, RowTokens, row_tokens
from tenfold.data.rows import Text
from tenfold.evaluate.compare import compare
from tenfold.evaluate.perplexity import perplexity
from tenfold.models.export import save_model
from tenfold.models.inference import input_device, max_positions
from tenfold.models.layer_map import Slot, layer_map
from tenfold.models.opened import Opened
from tenfold.stage.context import RESUME, Context, StageOutput
from tenfold.stage.record import Figure, Series, Table
from tenfold.stage.results import Result

OWN_LENGTH = 256
"""Tokens of a text that the model writes."""
ONE_SHOT = f"{RESUME}oneshot"
"""Folder of the compressed model before it is trained."""


class _Size(NamedTuple):
    """What a model holds, and its multiply-adds for each token, without those of attention."""

    numbers: int
    bytes: int
    products: int


def run_losparse(config: LoSparseConfig, context: Context) -> StageOutput:
    """The stage ``losparse``; its artefact is the compressed model."""
    opened, encoded = prepare(config, context)
    before, dtype = _size(opened.model), opened.model.dtype
    slots = {slot.name: slot for slot in layer_map(opened.model).select(config.targets)}
    model, matrices, notes = _once(config, context, opened, encoded)
    trained, results = None, list[Result]()
    if config.trains:
        opened = dataclasses.replace(opened, model=model)
        model, trained, results, more = _train(config, context, opened, encoded, matrices)
        notes += more
    layers, after = compressed_layers(model.to(dtype)), _size(model)
    measured = context.store.get("quality", partial(_quality, config, context, model, opened.tokenizer), list[Result])
    context.progress.begin("timing its layers")  # after what is measured of its text, which no clock has to do with
    settle(model, layout=config.layout)
    context.progress.begin("writing the model")
    save_model(model, opened.tokenizer, context.folder / "model")
    return StageOutput(
        results=[*measured, *results],
        tables=[_sizes(matrices, layers, before, after)],
        figures=_maps({row.name: slots[row.name] for row in matrices}, layers),
        attached=_attached(matrices, layers, before, after),
        notes=[*encoded.notes, *notes, *_said(matrices, layers, before, after), *_forms(layers)],
        timings={} if trained is None else {"training": trained.seconds},
        artefact="model",
        continues_with="model",
        left_out=encoded.refused,
    )


def _once(
    config: LoSparseConfig, context: Context, opened: Opened, encoded: Encoded
) -> tuple[Any, list[Replaced], list[str]]:
    """The model compressed without training; of a killed run the one that it had made already."""
    store, folder = context.store, context.folder / ONE_SHOT
    if "matrices" in store.entries:
        context.progress.say("  compressed before; going on from there")
        model = dataclasses.replace(context.model, source=str(folder), adapters=(), revision=None).open().model
    else:
        check_asked(opened.model, config)  # before it writes texts
        found = compress_once(
            opened.model,
            _passages(config, context, opened, encoded),
            budget=config.allowed,
            targets=config.targets,
            refit=config.refit and config.pruning == "oneshot",
            elastic=config.elastic,
            progress=context.progress,
        )
        model = install(opened.model, found.factors, elastic=config.elastic)
        save_model(model, opened.tokenizer, folder)
        store.add({"matrices": found.matrices, "notes": found.notes})
    return model, store.get("matrices", list, list[Replaced]), store.get("notes", list, list[str])


def _passages(config: LoSparseConfig, context: Context, opened: Opened, encoded: Encoded) -> list[Tensor]:
    """Training sequences from all over the data and texts of the model, of about as many tokens as are asked for."""
    whole = [example["input_ids"] for example in encoded.examples]
    share = min(1.0, (1 - config.own_text) * config.calibration / encoded.tokens)
    chosen = [ids for index, ids in enumerate(whole) if int((index + 1) * share) > int(index * share)] or whole[:1]
    given = [torch.tensor(ids, device=input_device(opened.model)) for ids in chosen]
    if not config.own_text:
        return given
    own = max(1, round(sum(map(len, given)) * config.own_text / (1 - config.own_text)))
    length = max(2, min(OWN_LENGTH, config.max_length))
    tell = partial(context.progress, "texts of its own")
    tell(0, own)
    return given + own_text(opened.model, opened.tokenizer, own, length=length, seed=context.seed, tell=tell)


def _train(
    config: LoSparseConfig, context: Context, opened: Opened, encoded: Encoded, matrices: Sequence[Replaced]
) -> tuple[Any, Trained, list[Result], list[str]]:
    """Train what was compressed, or begin with the whole model again and let training choose the rows."""
    if config.pruning == "oneshot":
        teacher = by_model(context.model.open(merge=True).model) if config.distil else None
        return opened.model, *fit_compact(opened, encoded, config, context, teacher=teacher), []
    share, layers = config.paper.low_rank, compressed_layers(opened.model)
    if share is None:
        changed = [row for row in matrices if row.name in layers]
        ranks = {row.name: row.choice.rank for row in changed}
        starts = {row.name: layers[row.name].low_rank() for row in changed}
    else:
        changed, starts = list(matrices), {}
        ranks = {row.name: rank_for(share, *row.shape) for row in changed}
    # A kept row costs what it holds, less the combination that the row would be otherwise, which elastic ones keep.
    costs = {row.name: row.shape[1] - (0 if config.elastic else ranks[row.name]) for row in changed}
    numbers = sum(row.numbers for row in changed)
    low = sum(stored(*row.shape, ranks[row.name], 0) for row in changed)
    if low > numbers and share is not None:
        raise low_rank_error(share, low, numbers)
    rows = numbers - low
    whole = dataclasses.replace(opened, model=context.model.open(merge=True).model)
    handle, trained, results = fit_compressed(whole, encoded, config, context, ranks, rows, starts=starts, costs=costs)
    return handle.model, trained, results, handle.report()["notes"]


def _quality(config: LoSparseConfig, context: Context, model: Any, tokenizer: Any) -> list[Result]:
    """Perplexity of held-out rows, before and after, and the difference token by token."""
    texts = _held_out(config, context, tokenizer)
    length = min(config.max_length, max_positions(model) or config.max_length)
    measured = {
        subject: perplexity(
            one,
            tokenizer,
            texts,
            max_length=length,
            batch_size=config.batch_size,
            subject=subject,
            progress=partial(context.progress, f"perplexity, {subject}"),
        )
        for subject, one in (("before", context.model.open(merge=True).model), ("after", model))
    }
    return [*(one.result for one in measured.values()), compare(measured["before"], measured["after"]).result]


def _held_out(config: LoSparseConfig, context: Context, tokenizer: Any) -> list[str | RowTokens]:
    """Held-out rows, as many as hold about the tokens that the model was compressed by."""
    assert context.rows is not None
    _, rows = context.rows.split(config.holdout)
    found, _ = row_tokens(rows, tokenizer, on_bad_row=config.on_bad_row)
    before = itertools.accumulate((len(row.ids) for row in found), initial=0)
    count = sum(tokens < config.calibration for tokens, _ in zip(before, found, strict=False))
    # A text is scored whole; of a conversation only what training would learn.
    return [row.text for row in rows[:count] if isinstance(row, Text)] or list(found[:count])


def _size(model: Any) -> _Size:
    products = 0
    for slot in layer_map(model).slots:
        if slot.layout in ("linear", "conv1d"):
            module = model.get_submodule(slot.name)
            own = isinstance(module, LowRankRowsLinear)
            products += module.rows.numel() + module.mix.numel() if own else slot.in_features * slot.out_features
    held = {id(tensor): tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers())}
    return _Size(number_count(model), sum(held.values()), products)


def _numbers(matrices: Sequence[Replaced], layers: Mapping[str, LowRankRowsLinear]) -> tuple[int, int]:
    """What the matrices held before, and what they hold now."""
    before = {row.name: row.shape[0] * row.shape[1] for row in matrices}
    now = {name: layer.numbers for name, layer in layers.items()}
    return sum(before.values()), sum((before | now).values())


def _sizes(matrices: Sequence[Replaced], layers: Mapping[str, LowRankRowsLinear], before: _Size, after: _Size) -> Table:
    """What the budget is a share of, and what it comes to of the whole model."""
    dense, now = _numbers(matrices, layers)
    lines = (
        ("numbers in the replaced matrices, millions", dense / 1e6, now / 1e6, 100 * now / dense),
        ("numbers in the whole model, millions", before.numbers / 1e6, after.numbers / 1e6,
         100 * after.numbers / before.numbers),
        ("whole model, MiB", before.bytes / 2**20, after.bytes / 2**20, 100 * after.bytes / before.bytes),
        ("multiply-adds for a token, millions", before.products / 1e6, after.products / 1e6,
         100 * after.products / before.products),
    )  # fmt: skip
    return Table(title="What is stored", columns=("", "before", "after", "%"), rows=lines)


def _attached(
    matrices: Sequence[Replaced], layers: Mapping[str, LowRankRowsLinear], before: _Size, after: _Size
) -> dict[str, Any]:
    dense, now = _numbers(matrices, layers)
    return {
        "method": "LoSparse",
        "matrices": len(layers),
        "share of the replaced matrices": now / dense,
        "share of the model": after.numbers / before.numbers,
        "bytes": after.bytes,
        "ranks": sum(layer.rank for layer in layers.values()),
        "kept rows": sum(layer.kept for layer in layers.values()),
    }


def _maps(slots: Mapping[str, Slot], layers: Mapping[str, LowRankRowsLinear]) -> list[Figure]:
    """Where ranks and rows stayed, in percent of what each matrix had."""
    sizes = {name: (slot.out_features, min(slot.in_features, slot.out_features)) for name, slot in slots.items()}
    whole = dict.fromkeys(slots, (100, 0))
    found = {
        name: (round(100 * layer.kept / sizes[name][0]), round(100 * layer.rank / sizes[name][1]))
        for name, layer in layers.items()
    }
    captions = (
        ("Rows that stayed", "Whole rows, in % of the rows of each matrix. 100: the matrix stayed as it was."),
        ("Rank that stayed", "Rank of what the other rows have in common, in % of the full rank."),
    )
    figures = []
    for place, (title, caption) in enumerate(captions):
        shares = by_role(slots, {name: pair[place] for name, pair in (whole | found).items()})
        series = tuple(
            Series(name=role, x=tuple(map(str, range(len(row)))), y=tuple(row)) for role, row in shares.items()
        )
        figures.append(
            Figure(
                kind="heatmap", title=title, x_label="layer", y_label="role", series=series, full=100, caption=caption
            )
        )
    return figures


def _forms(layers: Mapping[str, LowRankRowsLinear]) -> list[str]:
    """What speed takes in memory, on this machine."""
    faster = [layer for layer in layers.values() if layer.form_bytes()]
    if not faster:
        return []
    size = sum(layer.form_bytes() for layer in faster) / 2**20
    return [
        f"{len(faster)} of {len(layers)} compressed matrices are faster on this machine in a form that takes more "
        f"memory: {size:.3g} MiB beside the model, which layout: small saves. The files hold the small form."
    ]


def _said(
    matrices: Sequence[Replaced], layers: Mapping[str, LowRankRowsLinear], before: _Size, after: _Size
) -> list[str]:
    dense, now = _numbers(matrices, layers)
    notes = [
        f"{now / dense:.1%} of the numbers of the replaced matrices are left, {after.numbers / before.numbers:.1%} of "
        f"those of the whole model: {before.bytes / 2**20:.4g} MiB became {after.bytes / 2**20:.4g}."
    ]
    if whole := [row.name for row in matrices if row.name not in layers]:
        notes.append(f"{len(whole)} of {len(matrices)} matrices stayed as they are: the budget saves more elsewhere.")
    tried = [row for row in matrices if row.refitted is not None]
    if tried:
        notes.append(
            f"{sum(row.refit for row in tried)} of {len(tried)} matrices are fitted to what the compressed layers "
            "before them give; of the others the held-out tokens did not gain."
        )
    return notes
