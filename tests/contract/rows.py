"""One row per method, of the kind that its work is: it inherits all behaviour tests of this kind.

| it | row | tests |
|---|---|---|
| trains on texts | `Row` in `ROWS` | `test_contract.py` |
| changes no weight, and is read differently within `attach` | `Steering` in `STEERING` | `test_steering.py` |
| stores the cache | `Caching` in `CACHING` | `test_caching.py` |
| gives layers a span | `Spans` in `SPANS` | `test_spans.py` |

Add your method here; nothing else in this folder needs to change, unless it is of a kind of its own (R3M has
`test_preferences.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """What the contract needs to know of a method that trains on texts."""

    name: str
    """The registered stage."""
    keys: dict[str, Any]
    """Keys of its configuration for a run of seconds on a tiny model; ``data`` is added."""
    models: tuple[str, ...]
    """Tiny models that it must work on; the first is the one that whole runs start from."""
    attach: Callable[[Any, Any], Any]
    """``(model, config) -> adapted model``."""
    detach: Callable[[Any], Any]
    """``(adapted model) -> model`` without residue."""
    report: Callable[[Any], dict[str, Any]]
    """What it touched, with ``matrices``, ``trainable parameters`` and ``bytes``."""
    impossible: tuple[dict[str, Any], ...]
    """Keys with values that must be refused."""
    baseline: bool = False
    """A method of others, kept for comparison: it has no oracles, benchmark or page of its own."""


def _full() -> Row:
    from tenfold.adapt import full

    def report(model):
        parameters = list(model.parameters())
        count = sum(p.numel() for p in parameters)
        return {"matrices": len(parameters), "trainable parameters": count}

    return Row(
        name="full",
        keys={"steps": 8, "max_length": 48, "learning_rate": 0.02, "save_every": 3, "log_every": 2},
        models=("gpt2", "llama"),
        attach=full.attach,
        detach=lambda model: model,
        report=report,
        impossible=({"steps": 0}, {"learning_rate": 0}, {"distil": 2}),
        baseline=True,
    )


def _lora() -> Row:
    from tenfold.adapt import lora

    return Row(
        name="lora",
        keys={"rank": 2, "steps": 8, "max_length": 48, "learning_rate": 0.02, "save_every": 3, "log_every": 2},
        models=("llama", "qwen3", "gemma3", "gpt2"),
        attach=lora.attach,
        detach=lambda model: model.unload(),
        report=lora.attached,
        impossible=(
            {"rank": 0},
            {"dropout": 1.0},
            {"alpha": -1},
            {"rank": 2, "budget": "1%"},
            {"budget": "a lot"},
            {"budget": "3ms"},
        ),
        baseline=True,
    )


def _adalora() -> Row:
    from tenfold.adapt import adalora

    handles = {}

    def attach(model, config):
        handle = adalora.attach(model, config, task=None)
        handles[id(handle.model)] = handle
        return handle.model

    return Row(
        name="adalora",
        keys={"rank": 2, "steps": 12, "max_length": 48, "learning_rate": 0.02, "save_every": 3, "log_every": 2},
        models=("llama", "qwen3", "gemma3", "gpt2"),
        attach=attach,
        detach=lambda model: handles[id(model)].detach(),
        report=lambda model: handles[id(model)].attached(),
        impossible=(
            {"rank": 0},
            {"initial_rank": 0},
            {"rank": 4, "initial_rank": 2},
            {"rank": 2, "budget": "1%"},
            {"budget": "3ms"},
            {"beta1": 1.0},
            {"tfinal": 0},
            {"tinit": 0.6, "tfinal": 0.6},
            {"min_rank": 3, "rank": 2},
            {"gamma": -1},
        ),
    )


ROWS = {row.name: row for row in (_lora(), _adalora(), _full())}


@dataclass(frozen=True)
class Steering:
    """What the contract needs to know of a stage that changes no weight: see `test_steering.py`."""

    name: str
    """The registered stage."""
    keys: dict[str, Any]
    """Keys of its configuration for a run of seconds on a tiny model."""
    models: tuple[str, ...]
    """Tiny models that it must work on."""
    attach: Callable[[Any, Any], Any]
    """``(opened model, heads) -> context manager`` within which the prompt `MARKED` is read otherwise."""
    impossible: tuple[dict[str, Any], ...]
    """Keys with values that must be refused."""
    page: str
    """The method whose page, benchmark and oracles cover it."""


MARKED = "The old mill was <mark>painted red</mark> last year, and the door of the mill is"


def _steer(opened: Any, heads: Any) -> Any:
    from tenfold.attend import pasta

    return pasta.steer(opened.model, pasta.encode(opened.tokenizer, [pasta.from_tags(MARKED)]), heads=heads)


_STEERING = ({"alpha": -1}, {"batch_size": 0}, {"samples": 1})
_ALL = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2")

STEERING = {
    row.name: row
    for row in (
        Steering(
            "profile",
            {"tasks": ["conflict"], "samples": 4, "validation": 4, "sizes": [1, 2], "min_fluency": 0.0},
            _ALL,
            _steer,
            (*_STEERING, {"shortlist": 0}, {"sizes": []}, {"tasks": ["nonsense"]}, {"tasks": []}, {"tags": ["a", "a"]}),
            "pasta",
        ),
        Steering(
            "pasta",
            {
                "profile": "heads.json",
                "tasks": ["conflict", "evidence"],
                "samples": 4,
                "prompts": [MARKED],
                "max_new_tokens": 4,
            },
            _ALL,
            _steer,
            (*_STEERING, {"prompts": ["no tag"]}, {"target_mass": 1.0}, {"generated": "x"}, {"tags": ["", "b"]}),
            "pasta",
        ),
        Steering(
            "autopasta",
            {"profile": "heads.json", "samples": 3, "max_answer_tokens": 3, "max_quote_tokens": 3, "batch_size": 2},
            _ALL,
            _steer,
            (*_STEERING, {"modes": []}, {"modes": ["nonsense"]}, {"min_similarity": 2}, {"max_spans": 0}),
            "autopasta",
        ),
    )
}


@dataclass(frozen=True)
class Caching:
    """What the contract needs to know of a method that stores the cache: see `test_caching.py`."""

    name: str
    """The registered stage."""
    keys: dict[str, Any]
    """Keys of its configuration for a run of seconds on a tiny model; ``data`` is added."""
    models: tuple[str, ...]
    """Tiny models that it must work on."""
    attach: Callable[[Any], Any]
    """``(model) -> context manager`` that yields a cache within which some of the first 40 tokens are packed."""
    impossible: tuple[dict[str, Any], ...]
    """Keys with values that must be refused."""


def _gear(model: Any) -> Any:
    from tenfold.cache import gear

    return gear.attach(model, bits=4, buffer=16, kernel="torch")


CACHING = {
    row.name: row
    for row in (
        Caching(
            "gear",
            {
                "caches": ["gear:2,kernel=torch,buffer=16", "gear-full:4,kernel=torch,buffer=32"],
                "context": 64,
                "scored": 16,
                "texts": 3,
                "timed_contexts": [80],
                "steps": 2,
                "repeats": 2,
            },
            _ALL,
            _gear,
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
        ),
    )
}


@dataclass(frozen=True)
class Spans:
    """What the contract needs to know of a method that gives layers a span: see `test_spans.py`."""

    name: str
    """The registered stage."""
    keys: dict[str, Any]
    """Keys of its configuration for a run of seconds on a tiny model; ``data`` is added."""
    models: tuple[str, ...]
    """Tiny models that it must work on."""
    attach: Callable[[Any], Any]
    """``(model) -> handle`` with ``report()`` and ``revert()``; layer 1 stays full."""
    impossible: tuple[dict[str, Any], ...]
    """Keys with values that must be refused."""


def _masformer(model: Any) -> Any:
    from tenfold.attend import masformer
    from tenfold.kernels.local import AttentionWindow

    return masformer.convert(model, full_layers=[1], span=AttentionWindow("sliding", 4))


SPANS = {
    row.name: row
    for row in (
        Spans(
            "masformer",
            {"budget": "50%", "window": 16, "passage": 24, "passages": 2},
            tuple(kind for kind in _ALL if kind != "gemma3"),  # it has spans of its own
            _masformer,
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
        ),
    )
}
