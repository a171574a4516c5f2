"""Stages that look at the model and leave it alone: ``evaluate`` and ``generate``, before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from tenfold.attend.pasta.prompts import profile_of
from tenfold.attend.text_marks import Marked, from_tags
from tenfold.cache.spans import own_cache
from tenfold.config.evaluate import ANSWERED, EvaluateConfig, on_cache
from tenfold.data.encode import RowTokens, row_tokens, spoken_notes
from tenfold.data.left_out import LeftOut, left_out_notes
from tenfold.data.read import Rows
from tenfold.data.readable import readable
from tenfold.data.rows import Choice, Question, Text
from tenfold.engines.session import Session
from tenfold.errors import ConfigError
from tenfold.evaluate.choice import multiple_choice
from tenfold.evaluate.compare import compare
from tenfold.evaluate.long_context import copying, joined_ids, needle, spread
from tenfold.evaluate.memory import memory
from tenfold.evaluate.perplexity import perplexity
from tenfold.evaluate.qa import answer, marked_prompt
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
    refused: tuple[LeftOut, ...] = ()
    opened: list[Subjects] = []

    def subjects() -> Subjects:
        if not opened:
            opened.append(open_subjects(context, config.baseline))
        return opened[0]

    answers: list[str] = []
    if rows is not None and rows.kind in ANSWERED:
        rows, refused = readable(rows, subjects().tokenizer, config.on_bad_row)
        answers = _answers(rows, refused, subjects().tokenizer)
    results: list[Result] = []
    for task in config.tasks:
        results += context.store.get(task, partial(_measure, task, config, context, subjects, rows), list[Result])
    notes = [*answers, *_left_out(results), *_attached(config, results)]
    return StageOutput(results=results, notes=notes, left_out=refused)


def _answers(rows: Rows, refused: Sequence[LeftOut], tokenizer: Any) -> list[str]:
    """What a reader must know of a perplexity of answers."""
    found, _ = row_tokens(rows, tokenizer)
    scored, whole = sum(sum(row.learned[1:]) for row in found), sum(len(row.ids) for row in found)
    notes = [
        f"perplexity: of {rows.kind} rows only the answers are scored, given what precedes them, as training would "
        f"learn them: {scored} of {whole} tokens."
    ]
    silent = sum(not any(row.learned[1:]) for row in found)
    if silent:
        notes.append(f"perplexity: {silent} of {len(rows)} rows have no answer to score.")
    return [*left_out_notes(rows.source, refused), *notes, *spoken_notes(found)]


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


def _attached(config: EvaluateConfig, results: Sequence[Result]) -> list[str]:
    """What packed caches and emphasis came to, and which tasks were measured without."""
    notes = []
    for key in ("cache", "heads"):
        found = [result for result in results if key in result.settings]
        for result in found:
            label = result.subject.removesuffix(f", {config.kv}") if key == "cache" else result.subject
            notes.append(f"{result.task}, {label}, {result.settings[key]}")
    exact = [task for task in config.tasks if not on_cache(task)]
    plain = [task for task in config.tasks if not config.emphasises(task)]
    if config.kv and exact:
        notes.append(f"kv: {', '.join(exact)} are measured on the exact cache.")
    if config.steers and plain:
        notes.append(
            f"emphasise: {', '.join(plain)} are measured without, as they have no {config.emphasise} of theirs."
        )
    return notes


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
    marks = config.emphasise == "marks"
    texts: Sequence[str | Marked | RowTokens]
    if rows.kind in ANSWERED:
        texts, _ = row_tokens(rows, subjects.tokenizer)
    else:
        chosen = [row for row in rows if isinstance(row, Text)]
        texts = [from_tags(row.text, config.tags, name=f"row {row.id!r}") if marks else row.text for row in chosen]
    scored, results = {}, []
    for reading in _readings(task, config, context, subjects):
        with reading.passes() as passes:
            scored[reading.name] = perplexity(
                reading.session.model,
                subjects.tokenizer,
                texts,
                max_length=config.max_length or min(1024, max_positions(reading.session.model) or 1024),
                stride=config.stride,
                batch_size=config.batch_size,
                subject=reading.name,
                progress=partial(context.progress, f"perplexity, {reading.name}"),
                **passes,
            )
        results.append(reading.noted(scored[reading.name].result, {"data": rows.source, "data sha256": rows.sha256}))
    pairs = [("before", "after")]
    for name in subjects.models:
        pairs += [(name + kv, f"{name}, emphasised{kv}") for kv in ("", f", {config.kv}")]
        pairs.append((name, f"{name}, {config.kv}"))
    found = [(scored[one], scored[other]) for one, other in pairs if one in scored and other in scored]
    return [*results, *(compare(*pair).result for pair in found)]


def _copying(task: str, config: EvaluateConfig, context: Context, subjects: Subjects, rows: Rows) -> list[Result]:
    pieces = _pieces(config, subjects, rows, config.passage)
    results = []
    for reading in _readings(task, config, context, subjects):
        tell = partial(context.progress, f"{task}, {reading.name}")
        with reading.passes() as passes:
            found = copying(
                reading.session.model, pieces, config.passage, subject=reading.name, progress=tell, **passes
            )
        results.append(reading.noted(found))
    return results


def _needle(task: str, config: EvaluateConfig, context: Context, subjects: Subjects, rows: Rows) -> list[Result]:
    pieces = _pieces(config, subjects, rows, room=64)
    results = []
    for reading in _readings(task, config, context, subjects):
        tell = partial(context.progress, f"{task}, {reading.name}")
        part: dict[str, Any] = {"emphasise": config.emphasise} if reading.emphasised else {}
        with reading.passes() as passes:
            found = needle(
                reading.session.model,
                subjects.tokenizer,
                pieces,
                subject=reading.name,
                progress=tell,
                **part,
                **passes,
            )
        results.append(reading.noted(found))
    return results


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
    results = []
    for reading in _readings(task, config, context, subjects):
        put = partial(marked_prompt if reading.emphasised else _unmarked, emphasise=config.emphasise, tags=config.tags)
        found = answer(reading.session, questions, subject=reading.name, prompt=put)
        results.append(reading.noted(found.result))
    return results


def _unmarked(question: Question, **how: Any) -> str:
    """A prompt without its marks and their tags."""
    return marked_prompt(question, **how).text


def _standard(
    task: str, config: EvaluateConfig, context: Context, subjects: Subjects, rows: Rows | None
) -> list[Result]:
    name = task.removeprefix("lm_eval:")
    return [
        result
        for reading in _readings(task, config, context, subjects)
        for result in lm_eval_task(reading.session, name, limit=config.limit, subject=reading.name)
    ]


@dataclass(frozen=True)
class _Reading:
    """A model with what is attached to it while it is measured."""

    name: str
    session: Session
    config: EvaluateConfig
    emphasised: bool = False
    told: dict[str, None] = field(default_factory=dict)

    @contextmanager
    def passes(self) -> Iterator[dict[str, Any]]:
        """For measurements that read texts themselves: their ``make_cache`` and ``steering``, where there are some."""
        with self.session.caches() as make_cache:
            found: dict[str, Any] = {} if self.session.kv is None else {"make_cache": make_cache}
            if self.emphasised:
                found["steering"] = partial(self.session.steering, tell=self.told.setdefault)
            yield found

    def noted(self, result: Result, more: Mapping[str, Any] | None = None) -> Result:
        """A result with what was emphasised, and what its cache came to, among its settings."""
        here: dict[str, Any] = {}
        if self.session.kv is not None:
            here |= {"kv": self.session.kv, "cache": self.session.notes[0]}
        if self.emphasised:
            here |= {"emphasise": self.config.emphasise} | ({"heads": "; ".join(self.told)} if self.told else {})
        return result.model_copy(update={"settings": {**result.settings, **(more or {}), **here}})


def _readings(task: str, config: EvaluateConfig, context: Context, subjects: Subjects) -> Iterator[_Reading]:
    """Each model on the exact cache and on the packed one, plain and emphasised, as far as a task is measured so."""
    profile = profile_of(config, context) if config.steers else "default"
    caches = (None, config.kv) if config.kv and on_cache(task) else (None,)
    for name, model in _each(subjects):
        for kv in caches:
            for emphasised in (False, True) if config.emphasises(task) else (False,):
                session = Session(
                    model,
                    subjects.tokenizer,
                    kv=kv,
                    profile=profile,
                    **config.strength(),
                    batch_size=config.batch_size,
                )
                label = ", ".join([name, *(["emphasised"] if emphasised else []), *([kv] if kv else [])])
                yield _Reading(label, session, config, emphasised)


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
