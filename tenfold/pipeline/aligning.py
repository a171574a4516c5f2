"""The stages ``r3m`` and ``audit``: learn from preferences of which some are wrong, and name the suspects."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import set_seed

from tenfold.adapt import full, lora
from tenfold.adapt.training import carry_out, total_steps, trainer_arguments
from tenfold.align.audit import Audit, Verdict, audit, audit_groups, cleaned_rows, worst_pairs, write_csv
from tenfold.align.choose import LEAST, Candidate, choose_lam
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
    flip_mask,
    irrational,
    myopic,
    stochastic,
    true_rewards,
    uniform,
    without_label,
    write_corrupted,
)
from tenfold.align.r3m import RunningKink
from tenfold.config.full import FullConfig
from tenfold.config.lora import LoraConfig
from tenfold.config.r3m import AuditConfig, R3MConfig, parse_noise
from tenfold.data.read import Rows
from tenfold.data.rows import Preference
from tenfold.errors import ConfigError, DataError, ModelError
from tenfold.evaluate.choice import share
from tenfold.evaluate.memory import measure_growth
from tenfold.evaluate.ranking import precision_at, roc_auc
from tenfold.evaluate.results import Metric, Result
from tenfold.files import write_text
from tenfold.models.export import save_adapter, save_model
from tenfold.models.open import saved_task
from tenfold.models.opened import Opened
from tenfold.models.reference import ModelRef
from tenfold.models.source import read_json
from tenfold.pipeline.adapting import base_of
from tenfold.pipeline.checking import trusted_rows
from tenfold.pipeline.context import Context, StageOutput
from tenfold.report.record import Figure, Sample, Series, Table


def run_r3m(config: R3MConfig, context: Context) -> StageOutput:
    """The stage ``r3m``: train, measure on held-out pairs, audit the training labels."""
    assert context.rows is not None
    kept, held = context.rows.split(config.holdout)
    mask = _mask(kept, config, context.seed)
    flips, notes = _known_flips(kept, mask if config.noise is not None else None)
    pairs = corrupt(_preferences(kept), mask)
    write_corrupted(context.folder / "training.jsonl", _preferences(kept), mask)
    if config.folds:
        _check_folds(pairs, config)
    config, tried, chosen = _chosen(pairs, config, context)
    trained = _learnt(pairs, config, context, context.folder)
    results = trained.results + context.remember(
        "held-out", lambda: [_quality(trained.model, trained.opened, held, config, context)]
    )
    scored = _judged(trained, pairs, config, context)
    found, output = _audited(scored, pairs, flips, config.audit_lam or _level(scored, config.share), config.worst,
                             context.folder, trained.margins)  # fmt: skip
    method = {"method": f"R3M ({config.loss}, {config.target})", "pairs": len(pairs), "flagged": found.flags}
    if tried:
        method["lam"] = config.fixed_lam
    kind: Any = "adapter" if config.rank else "model"
    if config.rank:
        save_adapter(trained.model, trained.opened.tokenizer, context.folder / kind, base=base_of(context.model))
        method = {**lora.attached(trained.model), **method}
    else:
        save_model(trained.model, trained.opened.tokenizer, context.folder / kind)
    known = {"target": config.target, "beta": config.beta, "max_length": config.max_length}
    write_text(context.folder / kind / TRAINED, json.dumps(known))
    return dataclasses.replace(
        output,
        results=[*tried, *results, *output.results],
        notes=[*notes, *chosen, *output.notes],
        attached=method,
        artefact=kind,
        continues_with=kind,
    )


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


TRAINED = "r3m.json"
"""Lies beside trained weights: how their margins are to be read."""


def run_audit(config: AuditConfig, context: Context) -> StageOutput:
    """The stage ``audit``: what a model thinks of labels that are there; the model stays as it is."""
    assert context.rows is not None
    flips, notes = _known_flips(context.rows, None)
    model = context.model
    if not model.adapters and Path(model.source).is_dir():
        model = dataclasses.replace(model, task=saved_task(Path(model.source), model.task))
    folder = Path(model.adapters[-1] if model.adapters else model.source)
    trained = read_json(folder / TRAINED) if (folder / TRAINED).exists() else {}
    opened = model.open()
    if model.task == "reward":
        _check_head(opened.model, str(folder))
    pairs = _preferences(context.rows)
    keys: dict[str, Any] = {
        "batch_size": config.batch_size,
        "max_length": config.max_length or trained.get("max_length", 1024),
        "cache": _cache(context),
        "progress": partial(context.progress, "scoring"),
    }
    if model.task == "reward":
        scored = score_pairs(opened.model, opened.tokenizer, pairs, **keys)
    else:
        keys["reference"] = None if config.reference is None else _reference(config.reference, context)
        keys["beta"] = trained.get("beta", 0.1) if config.beta is None else config.beta
        scored = score_policy_pairs(opened.model, opened.tokenizer, pairs, **keys)
        notes.append(f"Margins are those of beta {keys['beta']:g}.")
    found, output = _audited(scored, pairs, flips, config.lam, config.worst, context.folder)
    others = dict(zip((row.id for row in context.rows), context.rows.others, strict=True))
    cleaned = cleaned_rows(pairs, found, config.action, others)
    lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in cleaned)
    write_text(context.folder / "cleaned.jsonl", "".join(lines))
    tables = output.tables if config.by is None else [*output.tables, _groups(found, context.rows, config.by)]
    return dataclasses.replace(output, tables=tables, notes=[*output.notes, *notes])


def _groups(found: Audit, rows: Rows, column: str) -> Table:
    """Whose labels to doubt."""
    group_of = {row.id: str(other[column]) for row, other in zip(rows, rows.others, strict=True) if column in other}
    groups = audit_groups(found, group_of)
    return Table(
        title=f"The most doubtful by {column}",
        columns=(column, "pairs", "flagged", "expected of right labels", "excess", "excess / its deviation"),
        rows=tuple((one.name, one.pairs, one.flags, one.expected, one.excess, one.doubt) for one in groups[:50]),
    )


def _check_head(model: Any, name: str) -> None:
    """Refuse a reward model whose score is random, because no file held one."""
    adapters = getattr(model, "peft_config", {}).values()
    trained = any(getattr(adapter, "modules_to_save", None) for adapter in adapters)
    names = [str(one) for one in model.config.architectures or ()]
    if not trained and not any("ForSequenceClassification" in one or "Reward" in one for one in names):
        raise ModelError(
            f"{name}: has no reward head, so its rewards would be random",
            remedy="train one (tenfold align --target reward), or audit a policy: leave the task out",
        )


def _cache(context: Context) -> Path:
    """Scores of all runs in this folder: what judges otherwise need not score again."""
    return context.folder.parent / ".margins.jsonl"


def _level(scored: Scored, share: float | None) -> float:
    """The cap at which this share of the pairs is flagged; none with which the model agrees is."""
    assert share is not None
    running = RunningKink(share)
    running.value = min(0.0, float(torch.quantile(scored.margins.double(), share)) if len(scored.ids) else 0.0)
    return min(running.lam, 1 - 1e-12)


def _reference(source: str, context: Context) -> Any:
    """The model that a policy started from, opened like the policy."""
    like = context.model
    return ModelRef(source, dtype=like.dtype, device=like.device, trust_remote_code=like.trust_remote_code).open().model


def _preferences(rows: Rows) -> list[Preference]:
    return [row for row in rows if isinstance(row, Preference)]


def _mask(rows: Rows, config: R3MConfig, seed: int) -> list[bool]:
    """Which training labels turn over."""
    pairs = _preferences(rows)
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
            f"noise: {config.noise} turns over none of {len(ids)} labels", remedy="make it stronger, or leave it out"
        )
    return mask


def _known_flips(rows: Rows, noise: Sequence[bool] | None) -> tuple[dict[str, bool], list[str]]:
    """Which labels are wrong, where that is known: by the column ``flipped``, and by the noise that was added to it."""
    known: dict[str, bool] | None = None
    notes = []
    if any("flipped" in other for other in rows.others):
        try:
            known = flip_mask(rows)
        except DataError as error:
            notes.append(f"The column flipped is not used: {str(error).splitlines()[0]}.")
    if noise is None:
        return known or {}, notes
    return {row.id: flip != (known or {}).get(row.id, False) for row, flip in zip(rows, noise, strict=True)}, notes


def judging(model: ModelRef, target: str) -> ModelRef:
    """The same model with the head that the target needs."""
    return dataclasses.replace(model, task="reward" if target == "reward" else "causal")


class Trained(NamedTuple):
    """A model, what it was opened as, what its training measured, and of each pair the mean margin over epochs."""

    model: Any
    opened: Opened
    results: list[Result]
    margins: dict[str, float]


def _learnt(pairs: Sequence[Preference], config: R3MConfig, context: Context, folder: Path) -> Trained:
    """Train on pairs; checkpoints lie in the folder."""
    from datasets import Dataset, disable_progress_bars

    from tenfold.align.trainers import R3MDPOTrainer, R3MRewardTrainer

    disable_progress_bars()
    set_seed(context.seed)  # before the model is opened: the head of a reward model is random
    ref = judging(context.model, config.target)
    opened, task = ref.open(merge=True), ref.task
    if config.rank:
        model: Any = lora.attach(opened.model, LoraConfig(rank=config.rank, targets=config.targets), task=task)
    else:
        model = full.attach(opened.model, FullConfig(), task=task)
    fitting, settings = _fitting(pairs, config, opened.tokenizer)
    steps = total_steps(config, len(fitting), sum(fitting))
    arguments = trainer_arguments(config, model, steps=steps, folder=folder, seed=context.seed)
    arguments |= {"max_length": config.max_length, "gradient_checkpointing": config.gradient_checkpointing}
    chat = opened.tokenizer.chat_template is not None
    keys = {
        "model": model,
        "train_dataset": Dataset.from_list([_example(row, chat) for row in pairs]),
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
    return Trained(model, opened, [result], trainer.epoch_margins())


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


def _example(row: Preference, chat: bool) -> dict[str, Any]:
    """A row as TRL reads it: plain texts, or turns for the chat template."""
    if not chat:
        return dataclasses.asdict(row)
    return {
        "id": row.id,
        "prompt": [{"role": "user", "content": row.prompt}],
        "chosen": [{"role": "assistant", "content": row.chosen}],
        "rejected": [{"role": "assistant", "content": row.rejected}],
    }


def _scorer(config: R3MConfig, opened: Opened, **keys: Any) -> Callable[[Any, Sequence[Preference]], Scored]:
    sizes: dict[str, Any] = {"batch_size": 2 * config.batch_size, "max_length": config.max_length, **keys}
    if config.target == "reward":
        return lambda model, rows: score_pairs(model, opened.tokenizer, rows, **sizes)
    return lambda model, rows: score_policy_pairs(model, opened.tokenizer, rows, beta=config.beta, **sizes)


def _quality(model: Any, opened: Opened, held: Rows, config: R3MConfig, context: Context) -> Result:
    """Held-out pairs, whose labels are as they came."""
    tell = partial(context.progress, "held-out pairs")
    margins = _scorer(config, opened, progress=tell)(model, _preferences(held)).margins.double()
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


def _judged(trained: Trained, pairs: Sequence[Preference], config: R3MConfig, context: Context) -> Scored:
    """The margins by which training labels are doubted."""
    if not config.folds:
        keys = {"cache": _cache(context), "progress": partial(context.progress, "audit")}
        return _scorer(config, trained.opened, **keys)(trained.model, list(pairs))

    def score(fitted: tuple[list[Preference], int], held: list[Preference]) -> Scored:
        return _unseen(fitted[0], held, config, context, f"fold-{fitted[1]}")

    return cross_fit(pairs, config.folds, lambda rows, fold: (rows, fold), score)


def _unseen(
    rows: Sequence[Preference], judged: Sequence[Preference], config: R3MConfig, context: Context, name: str
) -> Scored:
    """Margins of pairs by a model trained on others; kept in a file, for a resumed stage that has trained it."""
    kept, folder = context.folder / f"{name}.json", context.folder / name
    if not kept.exists():
        folder.mkdir(exist_ok=True)
        trained = _learnt(rows, config, context, folder)
        tell = partial(context.progress, f"scoring, {name}")
        found = _scorer(config, trained.opened, progress=tell)(trained.model, list(judged))
        values = {"ids": found.ids, "margins": found.margins.tolist(), "over_long": found.over_long}
        write_text(kept, json.dumps(values))
    shutil.rmtree(folder, ignore_errors=True)
    values = json.loads(kept.read_text(encoding="utf-8"))
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
        judges = _preferences(trusted_rows(config))
        known = {without_label(row) for row in judges}
        rows = [row for row in pairs if without_label(row) not in known]
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


def _audited(
    scored: Scored,
    pairs: Sequence[Preference],
    flips: dict[str, bool],
    lam: float,
    worst: int,
    folder: Path,
    epochs: Mapping[str, float] | None = None,
) -> tuple[Audit, StageOutput]:
    """Judge labels by margins; the table is ``audit.csv`` in the folder."""
    if not scored.ids:
        raise DataError("no pair is within max_length", remedy="raise max_length")
    found = audit(scored.margins, scored.ids, lam, epochs)
    write_csv(folder / "audit.csv", found)
    metrics = [
        Metric(name="flagged", value=found.flags / len(found.verdicts), count=len(found.verdicts)),
        Metric(name="expected of right labels", value=found.expected, stderr=found.expected_stderr, unit="pairs"),
        Metric(name="excess", value=found.excess, interval=found.interval, unit="pairs"),
        Metric(name="wrong labels, estimated", value=found.share_wrong, interval=found.share_interval),
    ]
    mask = [flips.get(id, False) for id in scored.ids]
    if any(mask) and not all(mask):
        doubts = (-scored.margins).tolist()
        wrong = sum(mask)
        metrics += [
            Metric(name=f"precision at {wrong}", value=precision_at(doubts, mask, wrong), count=wrong, better="higher"),
            Metric(name="auc", value=roc_auc(doubts, mask), count=len(mask), better="higher"),
            Metric(name="wrong labels", value=wrong, unit="pairs"),
        ]
        suspects = [verdict.suggestion in ("drop", "flip") for verdict in found.verdicts]
        if any(suspects):
            hits = [flip for flip, suspect in zip(mask, suspects, strict=True) if suspect]
            metrics += [share("wrong among those to drop or flip", hits),
                        Metric(name="found of the wrong labels", value=sum(hits) / wrong, better="higher")]  # fmt: skip
    shown = worst_pairs(pairs, found, worst)
    notes = [
        f"audit.csv ranks all {len(found.verdicts)} pairs; {found.flags} are flagged (the model gives their label less "
        f"than {1 - lam:.0%}), of which right labels would give {found.expected:.1f} ± {found.expected_stderr:.1f}.",
        f"{_said(found)} {found.count('drop')} rows to drop, {found.count('flip')} to flip, {found.count('review')} to "
        "review.",
    ]
    if scored.over_long:
        notes.append(f"{len(scored.over_long)} pairs were longer than max_length and not judged.")
    return found, StageOutput(
        results=[Result(task="audit", subject="after", metrics=tuple(metrics), settings={"lam": lam})],
        tables=[_table(shown, flips)],
        figures=[_histogram(found)],
        samples=[Sample(prompt=row.prompt, outputs={f"chosen (margin {verdict.margin:.2f})": row.chosen,
                                                    "rejected": row.rejected}) for verdict, row in shown],
        notes=notes,
    )  # fmt: skip


def _said(found: Audit) -> str:
    low, high = found.share_interval
    agreed = sum(verdict.margin > 0 for verdict in found.verdicts) / len(found.verdicts)
    if agreed < 0.5 - 1 / math.sqrt(len(found.verdicts)):
        return f"The model contradicts {1 - agreed:.0%} of the labels: are chosen and rejected exchanged?"
    if not low:
        return f"No share of wrong labels can be told from none (up to {high:.1%} are possible)."
    return (
        f"Once margins are divided by {found.temperature:.2g}, {found.share_wrong:.1%} of the labels seem wrong (95 % "
        f"interval {low:.1%} to {high:.1%})."
    )


def _table(shown: Sequence[tuple[Verdict, Preference]], flips: dict[str, bool]) -> Table:
    rows = [
        (verdict.rank, verdict.id, verdict.margin, verdict.p_label, verdict.delta, verdict.suggestion,
         ("yes" if flips[verdict.id] else "no") if flips else "unknown")
        for verdict, _ in shown
    ]  # fmt: skip
    columns = ("rank", "id", "margin", "probability of the label", "delta", "suggestion", "turned over")
    return Table(title="The most doubtful labels", columns=columns, rows=tuple(rows))


def _histogram(found: Audit) -> Figure:
    """How the margins lie, the flagged ones apart."""
    margins = torch.tensor([verdict.margin for verdict in found.verdicts], dtype=torch.float64)
    low, high = float(margins.min()), float(margins.max())
    width = (high - low) / 24 or 1.0
    bins = ((margins - low) / width).long().clamp(max=23)
    flagged = torch.tensor([verdict.flagged for verdict in found.verdicts])
    digits = max(2, 1 - math.floor(math.log10(width)))  # so many that no two bars have one name
    names = tuple(f"{low + (index + 0.5) * width:.{digits}f}" for index in range(24))

    def counts(which: torch.Tensor) -> tuple[float, ...]:
        return tuple(torch.bincount(bins[which], minlength=24).tolist())

    return Figure(
        kind="bar",
        title="Margins of the labels",
        x_label="margin",
        y_label="pairs",
        series=(Series(name="flagged", x=names, y=counts(flagged)), Series(name="others", x=names, y=counts(~flagged))),
        caption="Reward of the chosen answer minus that of the rejected one: below 0 the model contradicts it.",
    )
