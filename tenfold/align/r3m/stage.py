"""The stage ``r3m``: learn from preferences of which some are wrong, and name the suspects."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import set_seed

from tenfold.adapt import full, lora
from tenfold.adapt.fitting import base_of
from tenfold.adapt.training import carry_out, total_steps, trainer_arguments
from tenfold.align.audit.report import TRAINED, audited, known_flips, preferences, score_cache
from tenfold.align.margins import (
    Scored,
    complete_folds,
    cross_fit,
    folds_of,
    pair_lengths,
    score_pairs,
    score_policy_pairs,
)
from tenfold.align.preferences import (
    corrupt,
    irrational,
    myopic,
    stochastic,
    true_rewards,
    uniform,
    write_corrupted,
)
from tenfold.align.r3m.choose import LEAST, Candidate, choose_lam
from tenfold.align.r3m.losses import RunningKink
from tenfold.config.full import FullConfig
from tenfold.config.lora import LoraConfig
from tenfold.config.r3m import R3MConfig, parse_noise
from tenfold.data.groups import twin
from tenfold.data.left_out import LeftOut, left_out_notes
from tenfold.data.read import Rows
from tenfold.data.readable import readable
from tenfold.data.rows import Preference
from tenfold.errors import ConfigError, DataError
from tenfold.evaluate.choice import share
from tenfold.files import write_text
from tenfold.models.changes import settle_layers
from tenfold.models.export import save_adapter, save_model
from tenfold.models.layer_map import layer_map
from tenfold.models.memory import measure_growth
from tenfold.models.opened import Opened
from tenfold.models.quantised import for_training
from tenfold.models.reference import ModelRef
from tenfold.stage.context import Context, StageOutput
from tenfold.stage.results import Metric, Result


def run_r3m(config: R3MConfig, context: Context) -> StageOutput:
    """The stage ``r3m``: train, measure on held-out pairs, audit the training labels."""
    context, kept, held, refused = _written(config, context)
    mask = _mask(kept, config, context.seed)
    flips, notes = known_flips(kept, mask if config.noise is not None else None)
    pairs = corrupt(preferences(kept), mask)
    write_corrupted(context.folder / "training.jsonl", preferences(kept), mask)
    if config.folds:
        _check_folds(pairs, config)
    config, tried, chosen = _chosen(pairs, config, context)
    trained = _learnt(pairs, config, context, context.folder)
    results = [
        *trained.results,
        context.store.get("held-out", lambda: _quality(trained.model, trained.opened, held, config, context), Result),
    ]
    scored = _judged(trained, pairs, config, context)
    found, output = audited(scored, pairs, flips, config.audit_lam or _level(scored, config.share), config.worst,
                             context.folder, trained.margins, kept)  # fmt: skip
    method = {"method": f"R3M ({config.loss}, {config.target})", "pairs": len(pairs), "flagged": found.flags}
    if tried:
        method["lam"] = config.fixed_lam
    kind: Any = "adapter" if config.rank else "model"
    if config.rank:
        save_adapter(trained.model, trained.opened.tokenizer, context.folder / kind, base=base_of(context.model))
        method = {**lora.attached(trained.model), **method}
        notes = [*notes, *layer_map(trained.model).left_out(config.targets)]
    else:
        settle_layers(trained.model)
        save_model(trained.model, trained.opened.tokenizer, context.folder / kind)
    known = {"target": config.target, "beta": config.beta, "max_length": config.max_length}
    write_text(context.folder / kind / TRAINED, json.dumps(known))
    return dataclasses.replace(
        output,
        results=[*tried, *results, *output.results],
        notes=[*notes, *left_out_notes(kept.source, refused), *chosen, *output.notes],
        left_out=refused,
        attached=method,
        artefact=kind,
        artefacts={"audit": "audit.csv", "training": "training.jsonl"},
        continues_with=kind,
    )


def _written(config: R3MConfig, context: Context) -> tuple[Context, Rows, Rows, tuple[LeftOut, ...]]:
    """The context with trusted, training and held-out pairs that the chat template takes, and what it refuses."""
    assert context.rows is not None
    tokenizer = context.model.tokenizer()
    parts = dict(zip(("kept", "held"), context.rows.split(config.holdout), strict=True)) | dict(context.other_rows)
    found = {key: readable(rows, tokenizer, config.on_bad_row) for key, rows in parts.items()}
    rest = {key: found[key][0] for key in context.other_rows}
    refused = tuple(one for _, some in found.values() for one in some)
    return dataclasses.replace(context, other_rows=rest), found["kept"][0], found["held"][0], refused


def _check_folds(pairs: Sequence[Preference], config: R3MConfig) -> None:
    """Refuse before any training what would fail in a fold."""
    sizes = Counter(complete_folds(pairs, config.folds).values())
    if config.share is not None and config.steps is None and config.tokens is None:
        seen, enough = (len(pairs) - max(sizes.values())) * (config.epochs or 1), RunningKink(config.share).enough
        if seen < enough:
            raise ConfigError(
                f"budget: {config.budget} of {seen:.0f} pairs, which are seen without a fold, are too few to see which "
                "margins are low",
                remedy=f"train on {enough} pairs or more, epochs counted, give lam, or leave folds out",
            )


def _level(scored: Scored, share: float | None) -> float:
    """The cap at which this share of the pairs is flagged; none with which the model agrees is."""
    assert share is not None
    running = RunningKink(share)
    running.value = min(0.0, float(torch.quantile(scored.margins.double(), share)) if len(scored.ids) else 0.0)
    return min(running.lam, 1 - 1e-12)


def _mask(rows: Rows, config: R3MConfig, seed: int) -> list[bool]:
    """Which training labels are flipped."""
    pairs = preferences(rows)
    if config.noise is None:
        return [False] * len(pairs)
    kind, strength = parse_noise(config.noise)
    ids = [row.id for row in pairs]
    if kind == "uniform":
        mask = uniform(ids, strength, seed=seed)
    else:
        rewards = true_rewards(rows)
        steps = [rewards[id] for id in ids]
        if kind == "myopic":
            mask = myopic(steps, strength)
        else:
            mask = (stochastic if kind == "stochastic" else irrational)(ids, steps, strength, seed=seed)
    if not any(mask):
        raise ConfigError(
            f"noise: {config.noise} flips none of {len(ids)} labels", remedy="make it stronger, or leave it out"
        )
    return mask


def judging(model: ModelRef, target: str) -> ModelRef:
    """The same model with the head that the target needs."""
    return dataclasses.replace(model, task="reward" if target == "reward" else "causal")


class TrainedJudge(NamedTuple):
    """A model, what it was opened as, what its training measured, and of each pair the mean margin over epochs."""

    model: Any
    opened: Opened
    results: list[Result]
    margins: dict[str, float]


def _learnt(pairs: Sequence[Preference], config: R3MConfig, context: Context, folder: Path) -> TrainedJudge:
    """Train on pairs; checkpoints lie in the folder."""
    from datasets import disable_progress_bars

    from tenfold.align.trainers import R3MDPOTrainer, R3MRewardTrainer

    disable_progress_bars()
    set_seed(context.seed)  # before the model is opened: the head of a reward model is random
    ref = judging(context.model, config.target)
    opened, task = ref.open(merge=True), ref.task
    if config.rank:
        base = for_training(opened.model)
        model: Any = lora.attach(base, LoraConfig(rank=config.rank, targets=config.targets), task=task)
    else:
        model = full.attach(opened.model, FullConfig(), task=task)
    fitting, settings = _fitting(pairs, config, opened.tokenizer)
    steps = total_steps(config, len(fitting), sum(fitting))
    arguments = trainer_arguments(config, model, steps=steps, folder=folder, seed=context.seed)
    arguments |= {"max_length": config.max_length, "gradient_checkpointing": config.gradient_checkpointing}
    chat = opened.tokenizer.chat_template is not None
    keys = {
        "model": model,
        "train_dataset": _dataset(pairs, chat),
        "processing_class": opened.tokenizer,
        "robust": config,
    }
    set_seed(context.seed)
    if config.target == "reward":
        from trl import RewardConfig

        trainer: Any = R3MRewardTrainer(args=RewardConfig(**arguments), **keys)
    else:
        from trl import DPOConfig

        trainer = R3MDPOTrainer(args=DPOConfig(**arguments, beta=config.beta), **keys)
    name = "training" if folder == context.folder else f"training, {folder.name}"
    with measure_growth(next(model.parameters()).device) as growth:
        seconds, resumed_from = carry_out(
            trainer,
            config,
            on_resume=context.metrics.rewind if folder == context.folder else lambda step: None,
            on_log=context.metrics.write if folder == context.folder else lambda step, values: None,
            on_step=lambda done, total, detail: context.progress(name, done, total, detail),
        )
    seen = round(sum(fitting) / len(fitting) * steps * config.batch_size * config.accumulate)
    figures = (
        Metric(name="loss", value=_last_loss(trainer), unit="nats/pair", better="lower"),
        Metric(name="steps", value=steps),
        Metric(name="tokens", value=seen),
        Metric(name="speed", value=seen / steps * max(steps - resumed_from, 1) / seconds, unit="tokens/s",
               better="higher", kind="timing"),
        Metric(name="peak memory growth", value=growth.growth, unit="bytes", better="lower", kind="memory"),
    )  # fmt: skip
    result = Result(task="preference training", subject="after", metrics=figures, settings=settings)
    return TrainedJudge(model, opened, [result], trainer.epoch_margins())


def _fitting(pairs: Sequence[Preference], config: R3MConfig, tokenizer: Any) -> tuple[list[int], dict[str, Any]]:
    """Tokens of each pair that TRL trains on, and what is to be said of the others."""
    longest = config.max_length
    fitting, cut = [], 0
    for row in pairs:
        prompt, *both = pair_lengths(row, tokenizer)
        if config.target == "reward" and max(both) <= longest:
            fitting.append(sum(both))
        elif config.target == "dpo" and prompt < longest:  # TRL cuts the end of the answers off here
            fitting.append(sum(min(length, longest) for length in both))
            cut += max(both) > longest
    if not fitting:
        what = "pair" if config.target == "reward" else "prompt"
        raise DataError(f"max_length: no {what} is within {longest} tokens", remedy="raise max_length")
    return fitting, {"pairs": len(fitting), "pairs left out as too long": len(pairs) - len(fitting), "pairs cut": cut}


def _last_loss(trainer: Any) -> float:
    return float(next(line["loss"] for line in reversed(trainer.state.log_history) if "loss" in line))


def _dataset(pairs: Sequence[Preference], chat: bool) -> Any:
    """Rows as TRL reads them: plain texts, or messages for the chat template."""
    from datasets import Dataset, Features, Json, List, Value

    if not chat:
        return Dataset.from_list([row.columns() for row in pairs])
    # As JSON, for a table gives every message the fields of all, and every call of a tool the arguments of all.
    rows = [{"tools": [], "chat_template_kwargs": {}, **row.conversations()} for row in pairs]
    messages = {name: List(Json()) for name in ("prompt", "chosen", "rejected", "tools")}
    return Dataset.from_list(rows, features=Features(id=Value("string"), **messages, chat_template_kwargs=Json()))


def _scorer(config: R3MConfig, opened: Opened, **keys: Any) -> Callable[[Any, Sequence[Preference]], Scored]:
    sizes: dict[str, Any] = {"batch_size": 2 * config.batch_size, "max_length": config.max_length, **keys}
    if config.target == "reward":
        return lambda model, rows: score_pairs(model, opened.tokenizer, rows, **sizes)
    return lambda model, rows: score_policy_pairs(model, opened.tokenizer, rows, beta=config.beta, **sizes)


def _quality(model: Any, opened: Opened, held: Rows, config: R3MConfig, context: Context) -> Result:
    """Held-out pairs, whose labels are as they came."""
    tell = partial(context.progress, "held-out pairs")
    scorer = _scorer(config, opened, progress=tell, cache=score_cache(context))  # an audit need not score them again
    margins = scorer(model, preferences(held)).margins.double()
    if not len(margins):
        raise DataError(
            f"{held.source}: no held-out pair is within max_length {config.max_length}", remedy="raise max_length"
        )
    nll = -torch.nn.functional.logsigmoid(margins)
    error = float(nll.std()) / math.sqrt(len(nll)) if len(nll) > 1 else None
    metrics = (
        share("accuracy", (margins > 0).tolist()),
        Metric(name="nll", value=float(nll.mean()), unit="nats/pair", count=len(nll), stderr=error, better="lower"),
    )
    return Result(task="held-out preferences", subject="after", metrics=metrics, settings={"pairs": len(margins)})


def _judged(trained: TrainedJudge, pairs: Sequence[Preference], config: R3MConfig, context: Context) -> Scored:
    """The margins by which training labels are doubted."""
    if not config.folds:
        keys = {"cache": score_cache(context), "progress": partial(context.progress, "audit")}
        return _scorer(config, trained.opened, **keys)(trained.model, list(pairs))

    def score(fitted: tuple[list[Preference], int], held: list[Preference]) -> Scored:
        return _unseen(fitted[0], held, config, context, f"fold-{fitted[1]}")

    return cross_fit(pairs, config.folds, lambda rows, fold: (rows, fold), score)


def _unseen(
    rows: Sequence[Preference], judged: Sequence[Preference], config: R3MConfig, context: Context, name: str
) -> Scored:
    """Margins of pairs by a model trained on others; kept, for a resumed stage that has trained it."""
    folder = context.folder / name

    def found() -> dict[str, Any]:
        folder.mkdir(exist_ok=True)
        trained = _learnt(rows, config, context, folder)
        tell = partial(context.progress, f"scoring, {name}")
        found = _scorer(config, trained.opened, progress=tell)(trained.model, list(judged))
        return {"ids": found.ids, "margins": found.margins.tolist(), "over_long": found.over_long}

    values = context.store.get(name, found)
    shutil.rmtree(folder, ignore_errors=True)
    return Scored(tuple(values["ids"]), torch.tensor(values["margins"]), tuple(values["over_long"]))


JUDGES = 5
"""One in so many training pairs judges caps, where no pair is trusted."""


def _chosen(
    pairs: Sequence[Preference], config: R3MConfig, context: Context
) -> tuple[R3MConfig, list[Result], list[str]]:
    """The configuration with the cap whose training explains unseen pairs best, and what is to be said of it."""
    if not config.lams:
        return config, [], []
    if config.trusted is not None:
        judges = preferences(context.other_rows["trusted"])
        known = {twin(row) for row in judges}
        rows = [row for row in pairs if twin(row) not in known]
        if not rows:
            raise DataError(
                f"trusted: {config.trusted} holds all the training pairs", remedy="keep trusted pairs out of the data"
            )
    else:
        fold_of = folds_of(pairs, JUDGES)
        judges = [row for row in pairs if not fold_of[row.id]]
        rows = [row for row in pairs if fold_of[row.id]]
    if len(judges) < LEAST:
        raise DataError(
            f"lams: {len(judges)} pairs cannot choose among caps",
            remedy=f"give {LEAST} or more under trusted, or {JUDGES * LEAST} or more to train on; best ten times that",
        )
    fixed = {lam: config.model_copy(update={"lam": lam, "lams": (), "trusted": None}) for lam in config.lams}
    margins = {}
    for lam, one in fixed.items():
        margins[lam] = _unseen(rows, judges, one, context, f"lam-{lam!r}".removesuffix(".0")).margins
        if len(margins[lam]) < LEAST:
            raise DataError(
                f"max_length: {len(margins[lam])} of {len(judges)} judging pairs are within {config.max_length} tokens",
                remedy="raise max_length, or give more pairs",
            )
    choice = choose_lam(margins, trusted=config.trusted is not None)
    labels = "trusted" if config.trusted is not None else "doubtful"
    close = [f"{one.lam:g}" for one in choice.candidates if one.lam != choice.lam and one.behind <= 2 * one.stderr]
    note = f"lam {choice.lam:g} explains {len(margins[choice.lam])} unseen pairs with {labels} labels best"
    note += f"; there is no evidence that {', '.join(close)} would be worse." if close else "."
    return fixed[choice.lam], [_tried(one, len(margins[one.lam]), labels) for one in choice.candidates], [note]


def _tried(one: Candidate, pairs: int, labels: str) -> Result:
    metrics = [
        Metric(name="agreement", value=one.agreement, count=pairs, better="higher"),
        Metric(name="nats, recalibrated", value=one.nats, unit="nats/pair", count=pairs, better="lower"),
        Metric(name="behind the best", value=one.behind, stderr=one.stderr, unit="nats/pair", better="lower"),
    ]
    if labels == "doubtful":
        metrics.append(Metric(name="share of wrong labels, estimated", value=one.wrong))
    return Result(task="choice of lam", subject=f"{one.lam:g}", metrics=tuple(metrics), settings={"labels": labels})
