"""Stages that steer attention: ``profile`` finds heads, ``pasta`` steers marked prompts, before and after."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tenfold.attend.chat_marks import MessageSpan
from tenfold.attend.pasta.attention_share import attention_mass
from tenfold.attend.pasta.heads import Batch, batches_of, margins
from tenfold.attend.pasta.profiles import Profile, save_profile
from tenfold.attend.pasta.profiling import find_profile
from tenfold.attend.pasta.prompts import chat_prompt, loops, profile_of, uses_template
from tenfold.attend.pasta.tasks import Item, items_of, task_items
from tenfold.attend.text_marks import Marked, encode, from_tags
from tenfold.config.pasta import PastaConfig, ProfileConfig
from tenfold.data.rows import Preference
from tenfold.engines.requests import Request
from tenfold.engines.session import Session
from tenfold.evaluate.choice import share
from tenfold.evaluate.compare import paired_metric
from tenfold.models.inference import input_device
from tenfold.models.opened import Opened
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
    profile.check_model(opened.model)
    asking = _Asking(config, opened, profile)
    with asking.session().steering(encode(opened.tokenizer, ["."], device=input_device(opened.model))):
        pass  # nothing is marked: this only refuses heads and models that it would refuse later
    tasks: dict[str, list[Item]] = {
        name: task_items(name, config.samples, TEST_SEED, tokenizer=opened.tokenizer) for name in config.tasks
    }
    if context.rows is not None:
        rows = context.rows if config.split == "all" else context.rows.split(config.holdout)[1]
        tasks["data"] = _items(rows, config.tags)
    results: list[Result] = []
    for number, (name, items) in enumerate(tasks.items()):
        context.progress("steering", number, len(tasks), name)
        results += context.store.get(name, partial(_measured, asking, name, items), list[Result])
    samples, figures, touched = _prompts(asking, prompts, context)
    texts = {
        f"prompt {number}{subject.removeprefix('after')}": text
        for number, sample in enumerate(samples, 1)
        for subject, text in sample.outputs.items()
        if subject.startswith("after")
    }
    told = dict.fromkeys(result.settings["heads"] for result in results if "heads" in result.settings)
    told |= dict.fromkeys(
        f"{result.task}, {result.settings['cache']}" for result in results if "cache" in result.settings
    )
    return StageOutput(
        results=results,
        figures=figures,
        tables=[_effect_table(results)] if results else [],
        samples=samples,
        attached=touched or {"heads": profile.size, "layers": len(profile.heads)},
        notes=[
            "before: the plain model; after: the same model, steered. Nothing of the model is changed.",
            *(told | asking.notes),
            *loops(texts),
        ],
    )


class _Asking:
    """The model and what is attached to it for each part of the stage.

    Args:
        config: of the stage.
        opened: the model.
        profile: the heads.
    """

    def __init__(self, config: PastaConfig, opened: Opened, profile: Profile) -> None:
        self.config, self.opened, self.profile = config, opened, profile
        self.chat = uses_template(opened.tokenizer, config.chat)
        self.notes: dict[str, None] = {}
        """What is to be said of the prompts."""

    def session(self, kv: str | None = None) -> Session:
        """A new one, on the exact cache or on a packed one."""
        config = self.config
        return Session(
            self.opened,
            kv=kv,
            profile=self.profile,
            **config.strength(),
            batch_size=config.batch_size,
        )

    def each(self) -> Iterator[tuple[str, Session]]:
        """A session on the exact cache, and one on the packed cache where that is asked for, by what labels them."""
        yield "", self.session()
        if self.config.kv is not None:
            yield f", {self.config.kv}", self.session(self.config.kv)


def _items(rows: Any, tags: tuple[str, str]) -> list[Item]:
    return items_of([row for row in rows if isinstance(row, Preference)], tags)


def _data(context: Context) -> dict[str, Any]:
    return {} if context.rows is None else {"data": context.rows.source, "data sha256": context.rows.sha256}


def _measured(asking: _Asking, name: str, items: Sequence[Item]) -> list[Result]:
    """One task: plain, with marks in the text, steered, and the paired difference of the last to the first."""
    model, tokenizer, config = asking.opened.model, asking.opened.tokenizer, asking.config
    prepared = batches_of(model, tokenizer, items, config.batch_size)
    settings = {"items": len(items), **config.dose(chat=False), "marks in the text": "*like this*"}
    results = []
    for label, session in asking.each():
        notes: dict[str, None] = {}
        with session.caches() as make_cache:
            options: dict[str, Any] = {} if session.kv is None else {"make_cache": make_cache}
            plain = margins(model, prepared, **options)
            found = {"before": plain}
            if session.kv is None:
                texts = [starred(item) for item in items]
                found["marks in the text"] = margins(model, batches_of(model, tokenizer, texts, config.batch_size))
            steered = torch.cat([_steered(session, batch, notes, options) for batch in prepared])
            found["after"] = steered
        here = settings | ({"heads": "; ".join(notes)} if notes else {})
        here |= {} if session.kv is None else {"kv": session.kv, "cache": session.notes[0]}
        results += [
            Result(task=name, subject=subject + label, metrics=_margin_metrics(values), settings=here)
            for subject, values in found.items()
        ]
        pairs = (
            ("accuracy", (steered > 0).double() - (plain > 0).double(), ""),
            ("probability", steered.sigmoid().double() - plain.sigmoid().double(), ""),
            ("margin", (steered - plain).double(), "nats"),
        )
        metrics = tuple(paired_metric(f"{metric}_difference", change, unit) for metric, change, unit in pairs)
        results.append(Result(task=name, subject=f"after - before{label}", metrics=metrics, settings=here))
    return results


def _steered(session: Session, batch: Batch, notes: dict[str, None], options: dict[str, Any]) -> Tensor:
    with session.steering(batch.marks, tell=notes.setdefault):
        return margins(session.model, [batch], **options)


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
    asking: _Asking, prompts: Sequence[Marked], context: Context
) -> tuple[list[Sample], list[Figure], dict[str, Any]]:
    """The user's own prompts: texts before and after, and where the attention went."""
    if not prompts:
        return [], [], {}
    context.progress("steering", 0, 1, "prompts")
    texts: dict[str, list[str]] = {}
    for label, session in asking.each():
        for subject in ("before", "after"):
            requests = [_request(prompt, asking, subject == "after") for prompt in prompts]
            replies = session.generate(requests)
            texts[subject + label] = [reply.text for reply in replies]
            asking.notes |= dict.fromkeys(note for reply in replies for note in reply.notes)
        asking.notes |= dict.fromkeys(session.notes)
    samples = [
        Sample(prompt=prompt, outputs={subject: written[index] for subject, written in texts.items()})
        for index, prompt in enumerate(asking.config.prompts)
    ]
    return samples, *_looked_at(asking, prompts)


def _request(prompt: Marked, asking: _Asking, steered: bool) -> Request:
    """A prompt as what a user says, where there is a chat template and it is wanted."""
    length = asking.config.max_new_tokens
    if not asking.chat:
        return Request(prompt.text, emphasis=prompt.spans if steered else (), max_new_tokens=length)
    spans = tuple(MessageSpan(0, span.start, span.end, span.strength) for span in prompt.spans)
    talk = [{"role": "user", "content": prompt.text}]
    return Request(messages=talk, emphasis=spans if steered else (), max_new_tokens=length)


def _looked_at(asking: _Asking, prompts: Sequence[Marked]) -> tuple[list[Figure], dict[str, Any]]:
    """Where the attention goes in the first batch, plain and steered, and what steering touches in all of them."""
    model, tokenizer, size = asking.opened.model, asking.opened.tokenizer, asking.config.batch_size
    marked = [chat_prompt(tokenizer, prompt, asking.config.chat) for prompt in prompts]
    session, touched, figures = asking.session(), {}, []  # type: Session, dict[str, Any], list[Figure]
    for start in range(0, len(marked), size):
        marks = encode(tokenizer, marked[start : start + size], device=input_device(model))
        if start == 0:
            figures.append(mass_map(attention_mass(model, marks), "before"))
        with session.steering(marks, chat=asking.chat, tell=asking.notes.setdefault) as found:
            counts = found.report()
            touched = counts | {key: counts[key] + touched.get(key, 0) for key in counts if "tokens" in key}
            if start == 0:
                figures.append(mass_map(attention_mass(model, marks), "after"))
    return figures, touched


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
            names.get(first := result.subject.partition(", ")[0], first) + result.subject.removeprefix(first),
            *(result.metric(name).value for name in ("accuracy", "probability", "margin")),
        )
        for result in results
        if not result.subject.startswith("after - before")
    )
    return Table(
        title="Obedience to the marks",
        columns=("task", "model", "accuracy", "probability", "margin"),
        rows=rows,
    )
