"""Stages that steer attention: ``profile`` finds heads, ``pasta`` steers marked prompts, before and after."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tenfold.attend.pasta.attention_share import attention_mass
from tenfold.attend.pasta.heads import batches_of, margins
from tenfold.attend.pasta.profiles import Profile, save_profile
from tenfold.attend.pasta.profiling import find_profile
from tenfold.attend.pasta.prompts import chat_prompt, loops, profile_of, uses_template
from tenfold.attend.pasta.steering import Steered, lifts, steer
from tenfold.attend.pasta.tasks import Item, items_of, task_items
from tenfold.attend.text_marks import Marked, encode, from_tags
from tenfold.config.pasta import PastaConfig, ProfileConfig
from tenfold.data.rows import Preference
from tenfold.evaluate.choice import share
from tenfold.evaluate.compare import paired_metric
from tenfold.models.generation import continue_inputs
from tenfold.models.inference import input_device
from tenfold.stage.context import Context, StageOutput
from tenfold.stage.record import Figure, Sample, Series, Table
from tenfold.stage.results import Metric, Result

TEST_SEED, VALIDATION_SEED = 2, 1
"""Built-in items: heads are ranked on seed 0, their number is chosen on seed 1, and results come from seed 2."""


SIZED = 3
"""Of the rows of ``data`` that are not held out, each of this number chooses how many heads; the others rank them."""


def run_profile(config: ProfileConfig, context: Context) -> StageOutput:
    """The stage ``profile``; its artefact is a JSON file of heads."""
    opened = context.model.open()
    tasks: dict[str, tuple[Sequence[Item], Sequence[Item]]] = {
        name: (
            task_items(name, config.samples, tokenizer=opened.tokenizer),
            task_items(name, config.validation, VALIDATION_SEED, tokenizer=opened.tokenizer),
        )
        for name in config.tasks
    }
    if context.rows is not None:
        # What is held out is for whoever tests the profile; its size is chosen on a part of the rest.
        items = _items(context.rows.split(config.holdout)[0], config.tags)
        tasks["data"] = ([item for index, item in enumerate(items) if index % SIZED], items[::SIZED])
    found = find_profile(
        opened.model,
        opened.tokenizer,
        tasks,
        alpha=config.alpha,
        shortlist=config.shortlist,
        sizes=config.sizes,
        min_fluency=config.min_fluency,
        batch_size=config.batch_size,
        provenance={"source": opened.identity["source"], "seed": context.seed, **_data(context)},
        store=context.store,
        tell=lambda done, total, what: context.progress("profile", done, total, what),
    )
    folder = context.folder / "profile"
    folder.mkdir(exist_ok=True)
    save_profile(found, folder / "profile.json")
    plain, best = found.curve[0], next(point for point in found.curve if point["heads"] == found.size)
    results = [
        Result(task="profiling", subject=subject, metrics=_curve_metrics(point))
        for subject, point in (("before", plain), ("after", best))
    ]
    return StageOutput(
        results=results,
        figures=[_curve_figure(found), head_map(found)],
        tables=[_curve_table(found)],
        attached={"heads": found.size, "layers": len(found.heads), "tasks": list(found.tasks)},
        artefact=folder.name,
        artefacts={"profile": f"{folder.name}/profile.json"},
    )


def run_pasta(config: PastaConfig, context: Context) -> StageOutput:
    """The stage ``pasta``."""
    # What can be wrong with profile and prompts shows before the weights are read.
    profile, prompts = profile_of(config, context), [from_tags(prompt, config.tags) for prompt in config.prompts]
    opened = context.model.open()
    model, tokenizer = opened.model, opened.tokenizer
    profile.check_model(model)
    notes: dict[str, None] = {}
    # these two look at each token's own strength, which a target mass does not have
    can_lift = lifts(model) and not config.keep_sink and config.generated == "keep"
    steering = partial(
        steer,
        heads=profile.heads,
        generated=config.generated,
        keep_sink=config.keep_sink,
        tell=lambda note: notes.update({note: None}),
    )
    scored, chatting = (
        partial(steering, **config.dose(chat, lifts=can_lift))
        for chat in (False, uses_template(tokenizer, config.chat))
    )
    with scored(model, encode(tokenizer, ["."], device=input_device(model))):
        pass  # nothing is marked: this only refuses heads and models that it would refuse later
    tasks: dict[str, list[Item]] = {
        name: task_items(name, config.samples, TEST_SEED, tokenizer=tokenizer) for name in config.tasks
    }
    if context.rows is not None:
        rows = context.rows if config.split == "all" else context.rows.split(config.holdout)[1]
        tasks["data"] = _items(rows, config.tags)
    results: list[Result] = []
    for number, (name, items) in enumerate(tasks.items()):
        context.progress("steering", number, len(tasks), name)
        results += context.store.get(
            name, partial(_measured, model, tokenizer, name, items, scored, config), list[Result]
        )
    samples, figures, touched = _prompts(model, tokenizer, prompts, config, chatting, context)
    texts = {f"prompt {number}": sample.outputs["after"] for number, sample in enumerate(samples, 1)}
    return StageOutput(
        results=results,
        figures=figures,
        tables=[_effect_table(results)] if results else [],
        samples=samples,
        attached=touched or {"heads": profile.size, "layers": len(profile.heads)},
        notes=[
            "before: the plain model; after: the same model, steered. Nothing of the model is changed.",
            *notes,
            *loops(texts),
        ],
    )


def _items(rows: Any, tags: tuple[str, str]) -> list[Item]:
    return items_of([row for row in rows if isinstance(row, Preference)], tags)


def _data(context: Context) -> dict[str, Any]:
    return {} if context.rows is None else {"data": context.rows.source, "data sha256": context.rows.sha256}


def _measured(
    model: Any, tokenizer: Any, name: str, items: Sequence[Item], steering: Callable[..., Any], config: PastaConfig
) -> list[Result]:
    """One task: plain, with marks in the text, steered, and the paired difference of the last to the first."""
    prepared = batches_of(model, tokenizer, items, config.batch_size)
    plain = margins(model, prepared)
    written = margins(model, batches_of(model, tokenizer, [starred(item) for item in items], config.batch_size))
    steered = torch.cat([_steered(model, batch, steering) for batch in prepared])
    settings = {"items": len(items), **config.dose(chat=False), "marks in the text": "*like this*"}
    results = [
        Result(task=name, subject=subject, metrics=_margin_metrics(values), settings=settings)
        for subject, values in (("before", plain), ("marks in the text", written), ("after", steered))
    ]
    pairs = (
        ("accuracy", (steered > 0).double() - (plain > 0).double(), ""),
        ("probability", steered.sigmoid().double() - plain.sigmoid().double(), ""),
        ("margin", (steered - plain).double(), "nats"),
    )
    metrics = tuple(paired_metric(f"{metric}_difference", change, unit) for metric, change, unit in pairs)
    return [*results, Result(task=name, subject="after - before", metrics=metrics, settings=settings)]


def _steered(model: Any, batch: Any, steering: Callable[..., Any]) -> Tensor:
    with steering(model, batch.marks):
        return margins(model, [batch])


def starred(item: Item) -> Item:
    """The item with its marks written into the text, as people do without steering: ``*like this*``.

    >>> from tenfold.attend.text_marks import from_spans
    >>> starred(Item(from_spans("Say yes now.", [(4, 7)]), " a", (" b",))).prompt.text
    'Say *yes* now.'
    """
    text = item.prompt.text
    for span in sorted(item.prompt.spans, key=lambda span: -span.start):
        text = f"{text[: span.start]}*{text[span.start : span.end]}*{text[span.end :]}"
    return Item(Marked(text, (), item.prompt.special), item.target, item.foils)


def _margin_metrics(margin: Tensor) -> tuple[Metric, ...]:
    error = float(margin.std()) / len(margin) ** 0.5 if len(margin) > 1 else None
    return (
        share("accuracy", (margin > 0).tolist()),
        share("probability", margin.sigmoid().tolist()),
        Metric(
            name="margin", value=float(margin.mean()), unit="nats", count=len(margin), stderr=error, better="higher"
        ),
    )


def _prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Marked],
    config: PastaConfig,
    steering: Callable[..., Any],
    context: Context,
) -> tuple[list[Sample], list[Figure], dict[str, Any]]:
    """The user's own prompts: texts before and after, and where the attention went."""
    if not prompts:
        return [], [], {}
    context.progress("steering", 0, 1, "prompts")
    marked = [chat_prompt(tokenizer, prompt, config.chat) for prompt in prompts]
    texts: dict[str, list[str]] = {"before": [], "after": []}
    touched: dict[str, Any] = {}
    figures = []
    for start in range(0, len(marked), config.batch_size):
        marks = encode(tokenizer, marked[start : start + config.batch_size], device=input_device(model))
        for subject in texts:
            with ExitStack() as stack:
                if subject == "after":
                    found: Steered = stack.enter_context(steering(model, marks))
                    counts = found.report()
                    touched = counts | {key: counts[key] + touched.get(key, 0) for key in counts if "tokens" in key}
                if start == 0:
                    figures.append(mass_map(attention_mass(model, marks), subject))
                texts[subject] += continue_inputs(model, tokenizer, marks.inputs, max_new_tokens=config.max_new_tokens)
    samples = [
        Sample(prompt=prompt, outputs={subject: written[index] for subject, written in texts.items()})
        for index, prompt in enumerate(config.prompts)
    ]
    return samples, figures, touched


def mass_map(mass: Tensor, subject: str) -> Figure:
    """The picture of `attention_mass`: layers across, heads down."""
    values = [[None if math.isnan(value) else round(value, 4) for value in row] for row in mass.T.tolist()]
    seen = [value for row in values for value in row if value is not None]
    state = {"before": "before steering", "after": "while steered"}[subject]
    return _layers_and_heads(
        f"Attention on the marks, {state}",
        values,
        "Share of each head's attention that the last token of a prompt gives to the marks; mean over the prompts of "
        f"the first batch. Mean over the heads {sum(seen) / len(seen):.3f}, largest {max(seen):.2f}.",
        full=1.0,
    )


def head_map(profile: Profile) -> Figure:
    """Which heads a profile steers: layers across, heads down."""
    layers, heads = profile.model["layers"], profile.model["heads"]
    values = [[float(head in profile.heads.get(layer, ())) for layer in range(layers)] for head in range(heads)]
    return _layers_and_heads("Heads of the profile", values, "1: steered. The best heads of every task, intersected.")


def _layers_and_heads(
    title: str, values: Sequence[Sequence[float | None]], caption: str, full: float | None = None
) -> Figure:
    layers = tuple(map(str, range(len(values[0]))))
    series = tuple(Series(name=str(head), x=layers, y=tuple(row)) for head, row in enumerate(values))
    return Figure(
        kind="heatmap", title=title, x_label="layer", y_label="head", series=series, full=full, caption=caption
    )


def _curve_figure(profile: Profile) -> Figure:
    sizes = tuple(float(point["heads"]) for point in profile.curve)
    plain = profile.curve[0]["fluency"] or 1.0
    return Figure(
        kind="line",
        title="How many heads",
        x_label="heads",
        y_label="share",
        series=(
            Series(name="score", x=sizes, y=tuple(point["score"] for point in profile.curve)),
            Series(name="fluency / plain", x=sizes, y=tuple(point["fluency"] / plain for point in profile.curve)),
        ),
        caption="Score: probability of what the mark asks for, on items that no head was chosen on. 0 heads: plain.",
    )


def _curve_table(profile: Profile) -> Table:
    names = [f"accuracy, {name}" for name in profile.tasks]
    rows = tuple(
        (point["heads"], point["k"], point["score"], point["fluency"], *point["accuracy"].values())
        for point in profile.curve
    )
    return Table(title="Sizes that were tried", columns=("heads", "k", "score", "fluency", *names), rows=rows)


def _curve_metrics(point: dict[str, Any]) -> tuple[Metric, ...]:
    return (
        Metric(name="score", value=point["score"], stderr=point["stderr"], better="higher"),
        Metric(name="fluency", value=point["fluency"], unit="bits"),
    )


def _effect_table(results: Sequence[Result]) -> Table:
    names = {"before": "plain", "after": "steered"}
    rows = tuple(
        (
            result.task,
            names.get(result.subject, result.subject),
            *(result.metric(name).value for name in ("accuracy", "probability", "margin")),
        )
        for result in results
        if result.subject != "after - before"
    )
    return Table(
        title="Obedience to the marks",
        columns=("task", "model", "accuracy", "probability", "margin"),
        rows=rows,
    )
