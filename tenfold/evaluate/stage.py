"""Stages that look at the model and leave it alone: ``evaluate`` and ``generate``, before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from tenfold.cache.packing import cache_note, packed_caches
from tenfold.cache.spans import own_cache
from tenfold.config.evaluate import ON_CACHE, EvaluateConfig
from tenfold.data.read import Rows
from tenfold.data.rows import Choice, Question, Text
from tenfold.errors import ConfigError
from tenfold.evaluate.choice import multiple_choice
from tenfold.evaluate.compare import compare
from tenfold.evaluate.long_context import copying, joined_ids, needle, spread
from tenfold.evaluate.memory import memory
from tenfold.evaluate.perplexity import perplexity
from tenfold.evaluate.qa import answer
from tenfold.evaluate.speed import speed
from tenfold.evaluate.standard import lm_eval_task
from tenfold.evaluate.subjects import Subjects, open_subjects
from tenfold.models.inference import max_positions
from tenfold.models.memory import stored_bytes
from tenfold.stage.context import Context, StageOutput
from tenfold.stage.results import Result


def run_evaluate(config: EvaluateConfig, context: Context) -> StageOutput:
    """The stage ``evaluate``: each task once, remembered when the run is killed between two tasks."""
    rows = _chosen(config, context)
    opened: list[Subjects] = []

    def subjects() -> Subjects:
        if not opened:
            opened.append(open_subjects(context, config.baseline))
        return opened[0]

    results: list[Result] = []
    for task in config.tasks:
        results += context.store.get(task, partial(_measure, task, config, context, subjects, rows), list[Result])
    return StageOutput(results=results, notes=[*_left_out(results), *_on_caches(config, results)])


def _left_out(results: Sequence[Result]) -> list[str]:
    """Which figures of a cache there are none of, and why."""
    found = {
        result.subject: result.task
        for result in results
        if result.task in ("speed", "memory") and all(metric.name != "cache" for metric in result.metrics)
    }
    return [
        f"{subject}: keeps no past_key_values, so bytes of the cache and times of decoding are left out; what it knows "
        "of a text is a state of its own."
        for subject in found
    ]


def _on_caches(config: EvaluateConfig, results: Sequence[Result]) -> list[str]:
    """What packed caches came to, and which tasks were measured without."""
    notes = [
        f"{result.task}, {result.subject.partition(',')[0]}, {result.settings['cache']}"
        for result in results
        if "cache" in result.settings
    ]
    exact = [task for task in config.tasks if task not in ON_CACHE]
    return [*notes, *([f"kv: {', '.join(exact)} are measured on the exact cache."] if config.kv and exact else [])]


def _measure(
    task: str, config: EvaluateConfig, context: Context, subjects: Callable[[], Subjects], rows: Rows | None
) -> Sequence[Result]:
    opened = subjects()
    context.progress.begin(task)
    return _MEASURES.get(task, _standard)(task, config, context, opened, rows)


def _chosen(config: EvaluateConfig, context: Context) -> Rows | None:
    if context.rows is None or config.split == "all":
        return context.rows
    return context.rows.split(config.holdout)[1]


def _perplexity(task: str, config: EvaluateConfig, context: Context, subjects: Subjects, rows: Rows) -> list[Result]:
    texts = [row.text for row in rows if isinstance(row, Text)]
    scored, results = {}, []
    for reading in _readings(subjects, config.kv):
        name, model = reading.name, reading.model
        scored[name] = perplexity(
            model,
            subjects.tokenizer,
            texts,
            max_length=config.max_length or min(1024, max_positions(model) or 1024),
            stride=config.stride,
            batch_size=config.batch_size,
            subject=name,
            progress=partial(context.progress, f"perplexity, {name}"),
            make_cache=reading.make_cache,
        )
        data = {"data": rows.source, "data sha256": rows.sha256}
        results.append(reading.noted(scored[name].result, data))
    if "before" in scored:
        results.append(compare(scored["before"], scored["after"]).result)
    packed = [(name, f"{name}, {config.kv}") for name in scored if f"{name}, {config.kv}" in scored]
    return results + [compare(scored[name], scored[on_cache]).result for name, on_cache in packed]


def _copying(task: str, config: EvaluateConfig, context: Context, subjects: Subjects, rows: Rows) -> list[Result]:
    pieces = _pieces(config, subjects, rows, config.passage)
    return [
        reading.noted(
            copying(
                reading.model,
                pieces,
                config.passage,
                subject=reading.name,
                progress=partial(context.progress, f"{task}, {reading.name}"),
                make_cache=reading.make_cache,
            )
        )
        for reading in _readings(subjects, config.kv)
    ]


def _needle(task: str, config: EvaluateConfig, context: Context, subjects: Subjects, rows: Rows) -> list[Result]:
    pieces = _pieces(config, subjects, rows, room=64)
    return [
        reading.noted(
            needle(
                reading.model,
                subjects.tokenizer,
                pieces,
                subject=reading.name,
                progress=partial(context.progress, f"{task}, {reading.name}"),
                make_cache=reading.make_cache,
            )
        )
        for reading in _readings(subjects, config.kv)
    ]


def _pieces(config: EvaluateConfig, subjects: Subjects, rows: Rows, room: int) -> list[Tensor]:
    """Pieces of the joined rows that leave room for what is put into them."""
    length = config.passage + config.between
    limits = [max_positions(model) for model, _ in subjects.models.values()]
    limit = min((limit for limit in limits if limit is not None), default=None)
    if limit is not None and length + room > limit:
        raise ConfigError(
            f"between: {config.between} tokens with passages of {config.passage} are more than the {limit} positions "
            "of the model",
            remedy="give a smaller between",
        )
    return spread(joined_ids(subjects.tokenizer, rows), length, config.passages, rows.source)


def _speed(task: str, config: EvaluateConfig, context: Context, subjects: Subjects, rows: Rows | None) -> list[Result]:
    context.progress("speed", 0, 1)
    return speed(
        subjects.models,
        subjects.tokenizer,
        prompt_tokens=min(_prompt(config, model) for model, _ in subjects.models.values()),
        new_tokens=config.new_tokens,
        repeats=config.repeats,
        make_cache=own_cache,
    )


def _memory(task: str, config: EvaluateConfig, context: Context, subjects: Subjects, rows: Rows | None) -> list[Result]:
    results = []
    for name in subjects.models:
        with subjects.use(name) as model:
            found = memory(model, subjects.tokenizer, tokens=_prompt(config, model), subject=name, make_cache=own_cache)
        if name == "before":
            found = _without_adapter(found, model)
        results.append(found)
    return results


def _prompt(config: EvaluateConfig, model: Any) -> int:
    """The prompt's length, shortened where the model cannot read it and write the new tokens."""
    limit = max_positions(model)
    return config.prompt_tokens if limit is None else max(1, min(config.prompt_tokens, limit - config.new_tokens))


def _without_adapter(result: Result, model: Any) -> Result:
    """Weights of the base alone: an adapter that is switched off still lies in memory."""
    adapter = stored_bytes([parameter for name, parameter in model.named_parameters() if ".lora_" in name])
    metrics = tuple(
        metric.model_copy(update={"value": metric.value - adapter}) if metric.name == "weights" else metric
        for metric in result.metrics
    )
    return result.model_copy(update={"metrics": metrics})


def _choice(task: str, config: EvaluateConfig, context: Context, subjects: Subjects, rows: Rows) -> list[Result]:
    return [
        multiple_choice(
            model,
            subjects.tokenizer,
            [row for row in rows if isinstance(row, Choice)],
            batch_size=config.batch_size,
            subject=name,
            progress=partial(context.progress, f"{task}, {name}"),
        ).result
        for name, model in _each(subjects)
    ]


def _answer(task: str, config: EvaluateConfig, context: Context, subjects: Subjects, rows: Rows) -> list[Result]:
    questions = [row for row in rows if isinstance(row, Question)]
    caches: dict[str, dict[str, Any]] = {"": {}} | ({f", {config.kv}": {"kv": config.kv}} if config.kv else {})
    return [
        answer(model, subjects.tokenizer, questions, batch_size=config.batch_size, subject=name + label, **kv).result
        for name, model in _each(subjects)
        for label, kv in caches.items()
    ]


def _standard(
    task: str, config: EvaluateConfig, context: Context, subjects: Subjects, rows: Rows | None
) -> list[Result]:
    name = task.removeprefix("lm_eval:")
    return [
        result.model_copy(update={"subject": subject})
        for subject, model in _each(subjects)
        for result in lm_eval_task(model, subjects.tokenizer, name, limit=config.limit)
    ]


@dataclass(frozen=True)
class _Reading:
    """A model and the cache that it reads through."""

    name: str
    model: Any
    make_cache: Callable[[], Any] | None = None
    kv: str = ""
    made: Sequence[Any] = ()

    def noted(self, result: Result, more: Mapping[str, Any] | None = None) -> Result:
        """A result with what its cache came to among its settings."""
        cache = {"kv": self.kv, "cache": cache_note(self.kv, self.made)} if self.made else {}
        return result.model_copy(update={"settings": {**result.settings, **(more or {}), **cache}})


def _readings(subjects: Subjects, kv: str | None) -> Iterator[_Reading]:
    """Each model without a cache, and through a packed one where that is asked for."""
    for name, model in _each(subjects):
        yield _Reading(name, model)
        if kv is not None:
            with packed_caches(model, kv) as (make, made):
                yield _Reading(f"{name}, {kv}", model, make, kv, made)


def _each(subjects: Subjects) -> Iterator[tuple[str, Any]]:
    for name in subjects.models:
        with subjects.use(name) as model:
            yield name, model


_MEASURES: dict[str, Callable[..., Sequence[Result]]] = {
    "perplexity": _perplexity,
    "copying": _copying,
    "needle": _needle,
    "speed": _speed,
    "memory": _memory,
    "multiple_choice": _choice,
    "question_answering": _answer,
}
