"""One row for each method: it inherits every test of this folder that its kind of method can be asked.

Add your method to `ROWS`; nothing else in this folder needs to change. Tests choose rows by what these say of
themselves (`row.trains`, `row.attach`, what `row.config` makes), never by their names.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tenfold.adapt import adalora, full, lora
from tenfold.attend import masformer, pasta
from tenfold.cache import gear
from tenfold.compress import fpx, losparse
from tenfold.config.adalora import AdaLoraConfig
from tenfold.config.full import FullConfig
from tenfold.config.lora import LoraConfig
from tenfold.config.stage import ArtefactKind, StageConfig
from tenfold.config.training import TrainingFields
from tenfold.kernels.local import AttentionWindow
from tenfold.models.layer_map import layer_map
from tenfold.models.opened import Opened
from tenfold.pipeline.stages import stage

Keys = Mapping[str, Any]
MARKED = "The old mill was <mark>painted red</mark> last year, and the door of the mill is"
HEADS = {0: [1], 1: [0, 2]}
"""Of the file ``heads.json`` beside the runs; the file ``numbers.jsonl`` holds forty rows of text."""
COMPARED = frozenset({"before", "after"})
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2")


@dataclass(frozen=True)
class Attached:
    """A method on a model.

    Args:
        read: the logits of `reading`, with what the method needs beside the model.
        report: what it touched.
    """

    read: Callable[[], Tensor]
    report: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Attachment:
    """How a method is put on a model and taken off, in Python.

    Args:
        on: ``(opened model, keys) -> context manager`` of `Attached`; without keys it works on every model of `models`.
        models: tiny models that it must work on.
        touched: whether a report says what it must, after `Attached.read`.
        refused: keys that cannot be, and what the error must name.
        change: of the logits: at least the first (more than none, if 0), at most the second. None: none at all.
    """

    on: Callable[[Opened, Keys], AbstractContextManager[Attached]]
    models: tuple[str, ...]
    touched: Callable[[dict[str, Any]], bool]
    refused: tuple[tuple[Keys, str], ...] = ()
    change: tuple[float, float] | None = (1e-4, float("inf"))


@dataclass(frozen=True)
class Row:
    """What the contract needs to know of a method.

    Args:
        name: the registered stage, with what sets the row apart from another one of that stage.
        keys: of its configuration, for a run of seconds on a tiny model.
        impossible: keys with values that must be refused, the key to be named first.
        attached: whether what the summary says of the model is what it must be.
        subjects: of the results that it must give.
        metrics: by name, that it must give.
        too_little: keys that leave it no data to work with, and what the error must say.
        start: the model that its recipe begins with.
        before: stages that its recipe begins with.
        after: stages that its recipe ends with.
        attachment: None where nothing is attached to a model, or only by another row's method.
        page: of the documentation, with its benchmark and its oracles. Default: the stage's name.
        baseline: a method of others, kept for comparison: it has no oracles, benchmark or recipe of its own.
    """

    name: str
    keys: Keys
    impossible: tuple[Keys, ...]
    attached: Callable[[dict[str, Any]], bool]
    subjects: frozenset[str] = frozenset()
    metrics: frozenset[str] = frozenset()
    too_little: tuple[Keys, str] | None = None
    start: str = "tiny:llama"
    before: tuple[Keys, ...] = ()
    after: tuple[Keys, ...] = ()
    attachment: Attachment | None = None
    page: str = ""
    baseline: bool = False

    @property
    def use(self) -> str:
        """The registered stage."""
        return self.name.split()[0]

    @property
    def method(self) -> str:
        """The page that it is described on."""
        return self.page or self.use

    @cached_property
    def config(self) -> StageConfig:
        """Of the row's keys."""
        return stage(self.use).parse(dict(self.keys), "contract")

    @property
    def trains(self) -> bool:
        """Whether it is a training, with steps and checkpoints."""
        return isinstance(self.config, TrainingFields) and "loss" in self.metrics

    @property
    def makes(self) -> Mapping[str, ArtefactKind]:
        """Its artefacts by name, and what each is."""
        return self.config.artefacts()

    @property
    def model(self) -> str | None:
        """The artefact that later stages start from; None where the model stays as it was."""
        return next((name for name, kind in self.makes.items() if kind in ("model", "adapter")), None)

    def recipe(self, **changes: Any) -> dict[str, Any]:
        """A recipe of this method, with other keys."""
        own = {"use": self.use, **self.keys, **changes}
        return {"model": self.start, "stages": [*map(dict, self.before), own, *map(dict, self.after)]}


def params(has: Callable[[Row], Any] = lambda row: True) -> list[Any]:
    """The rows of which something holds, for ``pytest.mark.parametrize``."""
    return [pytest.param(row, id=row.name) for row in ROWS if has(row)]


@torch.no_grad()
def reading(opened: Opened, model: Any = None, cache: Any = None) -> Tensor:
    """Logits of a prompt that is read into a cache, and of tokens that follow it.

    Args:
        opened: the model, and the tokenizer of `MARKED`.
        model: what stands around it by now. Default: itself.
        cache: an empty one. Default: transformers' own.
    """
    model = (opened.model if model is None else model).eval()
    inputs = opened.tokenizer(pasta.from_tags(MARKED).text, return_tensors="pt")
    cache = DynamicCache(config=model.config) if cache is None else cache
    read = model(**inputs, past_key_values=cache).logits
    return torch.cat((read, model(input_ids=inputs["input_ids"][:, :3], past_key_values=cache).logits), dim=1)


# ---- adapters -------------------------------------------------------------------------------------------------------

TRAINED = frozenset({"loss", "steps", "tokens", "speed", "peak memory growth"})
NUMBERS = {"data": "numbers.jsonl", "holdout": 0.3, "max_length": 48, "learning_rate": 0.02, "save_every": 3}
BUDGETS = (
    {"rank": 0},
    {"rank": 2, "budget": "1%"},
    {"budget": "3ms", "rank": None},
)
ADAPTED = ("llama", "qwen3", "gemma3", "gpt2")
PERPLEXITY = {"use": "evaluate", "tasks": ["perplexity"]}


@contextmanager
def _lora(opened: Opened, keys: Keys) -> Iterator[Attached]:
    model = lora.attach(opened.model, LoraConfig(**{"rank": 2, **keys}))
    try:
        yield Attached(lambda: reading(opened, model), lambda: lora.attached(model))
    finally:
        model.unload()


@contextmanager
def _adalora(opened: Opened, keys: Keys) -> Iterator[Attached]:
    handle = adalora.attach(opened.model, AdaLoraConfig(**{"rank": 2, **keys}), task=None)
    try:
        yield Attached(lambda: reading(opened, handle.model), handle.attached)
    finally:
        handle.detach()


def _adapter(on: Callable[[Opened, Keys], AbstractContextManager[Attached]]) -> Attachment:
    """A fresh adapter changes nothing."""
    refused = (({"targets": ("attention", "nonsense")}, "nonsense"),)
    return Attachment(on, ADAPTED, lambda report: report["matrices"] > 0, refused, change=None)


LORA = Row(
    "lora",
    {**NUMBERS, "rank": 2, "steps": 8, "log_every": 2},
    (*BUDGETS, {"dropout": 1.0}, {"alpha": -1}, {"budget": "a lot", "rank": None}),
    lambda found: found["trainable parameters"] > 0,
    metrics=TRAINED,
    after=(PERPLEXITY,),
    attachment=_adapter(_lora),
    baseline=True,
)
ADALORA = Row(
    "adalora",
    {**NUMBERS, "rank": 2, "steps": 12, "log_every": 2},
    (
        *BUDGETS,
        {"initial_rank": 0},
        {"rank": 4, "initial_rank": 2},
        {"beta1": 1.0},
        {"tfinal": 0},
        {"tinit": 0.6, "tfinal": 0.6},
        {"min_rank": 3, "rank": 2},
        {"gamma": -1},
    ),
    lambda found: found["trainable parameters"] > 0,
    metrics=TRAINED,
    after=(PERPLEXITY,),
    attachment=_adapter(_adalora),
)


@contextmanager
def _full(opened: Opened, keys: Keys) -> Iterator[Attached]:
    model = full.attach(opened.model, FullConfig(**keys))
    parameters = list(model.parameters())
    count = {"matrices": len(parameters), "trainable parameters": sum(p.numel() for p in parameters)}
    yield Attached(lambda: reading(opened, model), lambda: count)


FULL = Row(
    "full",
    {**NUMBERS, "steps": 8, "log_every": 2},
    ({"steps": 0}, {"learning_rate": 0}, {"distil": 2}),
    lambda found: found["trainable parameters"] > 0,
    metrics=TRAINED,
    start="tiny:gpt2",
    after=(PERPLEXITY,),
    attachment=Attachment(_full, ("gpt2", "llama"), lambda report: report["matrices"] > 0, change=None),
    page="lora",
    baseline=True,
)

# ---- steering -------------------------------------------------------------------------------------------------------

STEERED = ({"alpha": -1}, {"batch_size": 0}, {"samples": 1})


@contextmanager
def _steered(opened: Opened, keys: Keys) -> Iterator[Attached]:
    marks = pasta.encode(opened.tokenizer, [pasta.from_tags(MARKED)])
    with pasta.steer(opened.model, marks, **{"heads": HEADS, **keys}) as steered:
        yield Attached(lambda: reading(opened), steered.report)


PASTA = Row(
    "pasta",
    {
        "profile": "heads.json",
        "tasks": ["conflict", "evidence"],
        "samples": 4,
        "prompts": [MARKED],
        "max_new_tokens": 4,
    },
    (*STEERED, {"prompts": ["no tag"]}, {"target_mass": 1.0}, {"generated": "x"}, {"tags": ["", "b"]}),
    lambda found: found["heads"] == 3,
    subjects=COMPARED,
    attachment=Attachment(
        _steered,
        DECODERS,
        lambda report: report["heads"] == 3,
        tuple(({"heads": {1: [0], **wrong}}, "heads") for wrong in ({7: [0]}, {0: [4]}, {0: [-1]})),
    ),
)
PROFILE = Row(
    "profile",
    {"tasks": ["conflict"], "samples": 4, "validation": 4, "sizes": [1, 2], "min_fluency": 0.0},
    (*STEERED, {"shortlist": 0}, {"sizes": []}, {"tasks": ["nonsense"]}, {"tasks": []}, {"tags": ["a", "a"]}),
    lambda found: found["heads"] > 0,
    subjects=COMPARED,
    page="pasta",
)
AUTOPASTA = Row(
    "autopasta",
    {"profile": "heads.json", "samples": 3, "max_answer_tokens": 3, "max_quote_tokens": 3, "batch_size": 2},
    (*STEERED, {"modes": []}, {"modes": ["nonsense"]}, {"min_similarity": 2}, {"max_spans": 0}),
    lambda found: found["heads"] == 3,
    subjects=COMPARED,
)

# ---- caches ---------------------------------------------------------------------------------------------------------


@contextmanager
def _gear(opened: Opened, keys: Keys) -> Iterator[Attached]:
    with gear.attach(opened.model, **{"bits": 4, "buffer": 16, "kernel": "torch", **keys}) as cache:
        yield Attached(lambda: reading(opened, cache=cache), cache.report)


CACHES = ["gear:2,kernel=torch,buffer=16", "gear-full:4,kernel=torch,buffer=32"]
GEAR = Row(
    "gear",
    {
        "data": "numbers.jsonl",
        "caches": CACHES,
        "context": 64,
        "scored": 16,
        "texts": 3,
        "timed_contexts": [80],
        "steps": 2,
        "repeats": 2,
    },
    (
        {"caches": []},
        {"caches": ["gear:5"]},
        {"caches": ["quanto:4"]},
        {"caches": ["gear:4", "gear:4"]},
        {"caches": ["gear-l:2,s=0.1"]},
        {"context": 0},
        {"scored": 0},
        {"texts": 0},
        {"timed_contexts": [0]},
    ),
    lambda found: found["layers"] == found["of"] == 2,
    subjects=frozenset({"exact", *CACHES}),
    too_little=({"texts": 10**4}, "fewer or shorter pieces"),
    attachment=Attachment(
        _gear,
        DECODERS,
        lambda report: report["packed tokens"] >= 32 and report["bytes"] > report["packed bytes"] > 0,
        (({"bits": 5}, "bits"),),
        change=(0, 0.1),
    ),
)

# ---- spans ----------------------------------------------------------------------------------------------------------


@contextmanager
def _masformer(opened: Opened, keys: Keys) -> Iterator[Attached]:
    handle = masformer.convert(opened.model, **{"full_layers": [1], "span": AttentionWindow("sliding", 4), **keys})
    try:
        yield Attached(lambda: reading(opened), handle.report)
    finally:
        handle.revert()


MASFORMER = Row(
    "masformer",
    {"data": "numbers.jsonl", "budget": "50%", "window": 16, "passage": 24, "passages": 2},
    (
        {"budget": "3ms"},
        {"window": 0},
        {"previous": -1},
        {"sinks": -1},
        {"placement": "nowhere"},
        {"pattern": "diagonal"},
        {"passages": 0},
        {"passage": 1},
        {"budget": "50%", "full_layers": [1]},
        {"by": "heads", "placement": "bottom"},
    ),
    lambda found: len(found["full layers"]) == 1,
    subjects=COMPARED,
    too_little=({"passages": 10**4}, "smaller passages"),
    attachment=Attachment(
        _masformer,
        tuple(kind for kind in DECODERS if kind != "gemma3"),  # it has spans of its own
        lambda report: report["full layers"] == [1] and report["local layers"] == 1,
        (({"full_layers": [1, 7]}, "7"),),
    ),
)

# ---- weights --------------------------------------------------------------------------------------------------------


@contextmanager
def _losparse(opened: Opened, keys: Keys) -> Iterator[Attached]:
    slots = layer_map(opened.model).select(keys.get("targets", ("all-linear",)))
    handle = losparse.attach(opened.model, {slot.name: 4 for slot in slots}, rows=4000)
    try:
        yield Attached(lambda: reading(opened), handle.attached)
    finally:
        handle.detach()


COMPRESSED = {key: value for key, value in NUMBERS.items() if key != "save_every"}
SMALLER = (
    {"budget": "3ms"},
    {"budget": "0%"},
    {"calibration": 1},
    {"pruning": "nothing"},
    {"distil": 2},
)


def _is_smaller(found: Mapping[str, Any]) -> bool:
    return found["matrices"] > 0 and 0.4 < found["share of the replaced matrices"] <= 0.5


UNTIMED = {"layout": "small"}  # the other one follows a clock, and so do its files
LOSPARSE = Row(
    "losparse",
    {**COMPRESSED, "budget": "50%", "calibration": 256, **UNTIMED},
    (*SMALLER, {"pruning": "schedule"}, {"distil": 0.5}),
    _is_smaller,
    subjects=COMPARED,
    after=(PERPLEXITY,),
    attachment=Attachment(
        _losparse,
        ADAPTED,
        lambda report: report["matrices"] > 0,
        (({"targets": ("nonsense",)}, "nonsense"),),
        (0, 1e-4),
    ),
)
LOSPARSE_TRAINED = Row(
    "losparse schedule",
    {**NUMBERS, "budget": "50%", "calibration": 256, "pruning": "schedule", "steps": 10, "log_every": 2, **UNTIMED},
    SMALLER,
    _is_smaller,
    subjects=COMPARED,
    metrics=TRAINED,
    page="losparse",
)

FPX_READ = {"data": "numbers.jsonl", "holdout": 0.3, "max_length": 48}


@contextmanager
def _fpx(opened: Opened, keys: Keys) -> Iterator[Attached]:
    found = fpx.plan(opened.model, [torch.arange(6, 70)], **{"gamma": 0.5, **keys})
    fpx.apply(opened.model, found)
    try:
        yield Attached(lambda: reading(opened), lambda: {"units": len(found.units), "bits": found.bits})
    finally:
        fpx.remove(opened.model)


FPX = Row(
    "fpx",
    {**FPX_READ, "budget": "6bits", "calibration": 256},
    ({"budget": "50%"}, {"budget": "0bits"}, {"calibration": 1}, {"metric": "size"}, {"palette": ("q9_k",)}),
    lambda found: found["units"] == 16 and 5 < found["bits of a weight"] <= 6,
    subjects=COMPARED,
    after=(PERPLEXITY,),
    attachment=Attachment(
        _fpx,
        ADAPTED,
        lambda report: report["units"] > 0 and report["bits"] < 32,
        (({"gamma": 2}, "gamma"), ({"palette": ("nonsense", "fp8_row")}, "nonsense")),
    ),
)

# ---- games ----------------------------------------------------------------------------------------------------------

NOBODY = ({"agents": ("scripted:lots", "random")}, {"latency": "soon"}, {"latencies": (-1.0,)}, {"workers": 0})
FIGHTERS = ("tiny:llama@fixed:0.1", "scripted:0.8", "random")
FIGHTING = Row(
    "fighting",
    {"agents": FIGHTERS, "pairs": 2, "seconds": 5, "latencies": (0.0, 0.5), "replays": 1},
    (*NOBODY, {"agents": ("random",)}, {"agents": ("rule:0.1", "random")}, {"seconds": 1}, {"pairs": 0}),
    lambda found: found["games"] == 12,
    subjects=frozenset(FIGHTERS),
    metrics=frozenset({"strength", "invalid_answers", "latency"}),
    page="arena",
)
TRADERS = ("tiny:llama", "scripted:0.8", "random")
TRADING = Row(
    "trading",
    {"agents": TRADERS, "days": 3, "latencies": (0.0, 0.5), "synthetic": {"events": 4}},
    (*NOBODY, {"agents": ("rule:0.1",)}, {"market": "replay"}, {"days": 0}),
    lambda found: found["days"] == 3,
    subjects=frozenset(TRADERS),
    metrics=frozenset({"yield", "right_readings", "latency_p95"}),
    page="arena",
)

# ---- preferences ----------------------------------------------------------------------------------------------------

PAIRS = {
    "data": "step-audit:30",
    "holdout": 0.2,
    "noise": "uniform:20%",
    "rank": 2,
    "steps": 6,
    "batch_size": 2,
    "learning_rate": 0.01,
    "save_every": 2,
    "log_every": 2,
}
JUDGED = frozenset({"accuracy", "nll", "loss", "auc", "excess", "wrong labels, estimated"})
SHORT = ({"max_length": 8}, r"max_length: no (pair|prompt) is within 8 tokens")
REWARD = Row(
    "r3m reward",
    {**PAIRS, "target": "reward"},
    ({"beta": 0.2},),
    lambda found: found["trainable parameters"] > 0,
    metrics=JUDGED,
    too_little=SHORT,
    page="r3m",
)
DPO = Row(
    "r3m dpo",
    {**PAIRS, "target": "dpo", "beta": 0.5},
    (
        {"noise": "loud"},
        {"noise": "uniform:0"},
        {"noise": "uniform:150%"},
        {"noise": "irrational:5"},
        {"noise": "irrational:1/0"},
        {"noise": "myopic:2"},
        {"folds": 1},
        {"lam": 0},
        {"lam": 0.5, "budget": "10%"},
        {"budget": "60%"},
        {"rank": 0},
        {"loss": "new"},
        {"loss": "bt", "lam": 0.5},
        {"smoothing": 0.2},
        {"lams": [0.5]},
        {"lams": [0.5, 0.5]},
        {"lams": [1, 0]},
        {"lams": [1, 0.5], "lam": 0.5},
        {"lams": [1, 0.5], "budget": "10%"},
        {"lams": [1, 0.5], "loss": "bt"},
        {"trusted": "right.jsonl"},
    ),
    lambda found: found["trainable parameters"] > 0,
    metrics=JUDGED,
    too_little=SHORT,
    page="r3m",
)
AUDIT = Row(
    "audit",
    {},
    ({"lam": 1}, {"beta": 0}, {"batch_size": 0}, {"max_length": 7}, {"worst": 0}, {"action": "burn"}),
    lambda found: True,
    before=({"use": "r3m", **PAIRS, "steps": 2, "target": "reward"},),
    page="r3m",
)

ROWS = (
    ADALORA,
    LORA,
    FULL,
    PASTA,
    PROFILE,
    AUTOPASTA,
    GEAR,
    MASFORMER,
    LOSPARSE,
    LOSPARSE_TRAINED,
    FPX,
    REWARD,
    DPO,
    AUDIT,
    FIGHTING,
    TRADING,
)
