"""TRL's trainers of reward models and of policies (DPO), with R3M's loss in place of theirs.

Everything else is TRL's: adapters, accumulation, many processes, checkpoints, evaluation and all that it logs. Beyond
that, each batch knows the ids of its pairs, so that a suspect label can be named. With ``lam`` 1, or the loss ``bt``,
they are TRL's trainers to the bit (in float32; half-precision scores are computed in float32 here, not in TRL).
R3M specification, sections 2.4, 2.5 and 6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from jinja2 import TemplateError
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from tenfold.align.r3m.losses import PairLoss, RunningKink, pair_loss, perturbation
from tenfold.config.r3m import TRIMMED_START, RobustFields
from tenfold.data.templates import render_chat
from tenfold.errors import ConfigError, DataError, MissingDependencyError, RunError
from tenfold.models.quantised import is_quantised

try:
    from trl import DPOTrainer, RewardTrainer
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise MissingDependencyError("learning from preferences needs the package trl", 'pip install "trl>=1.16"') from None

ID = "id"
"""The column that names a pair."""

_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


class R3MMemory(TrainerCallback, ExportableState):
    """What a run knows beyond its weights: the running kink and the last margin of each pair; kept in checkpoints.

    transformers writes it into ``trainer_state.json``, and it takes itself out of there again, whichever way the
    weights are saved.

    Args:
        share: of the labels that may be wrong; None where no budget moves the kink.
    """

    def __init__(self, share: float | None = None) -> None:
        self.share = share
        self.kink = None if share is None else RunningKink(share)
        self.margins: dict[Any, float] = {}
        self.sums: dict[Any, tuple[float, int]] = {}

    def observe(self, ids: Iterable[Any], margins: list[float], *, judged: bool) -> None:
        """Take in a training batch, after its loss: no pair moves the kink that it is judged by."""
        for id, margin in zip(ids, margins, strict=True):
            before, times = self.sums.get(id, (0.0, 0))
            self.margins[id], self.sums[id] = margin, (before + margin, times + 1)
        if self.kink is not None:
            self.kink.observe(margins, judged=judged)

    def state(self) -> dict[str, Any]:
        """What transformers writes, in the form that it wants."""
        # Lists, since the keys of a JSON object are text and an id may be a number.
        saved: dict[str, Any] = {"ids": list(self.margins), "margins": list(self.margins.values())}
        saved["sums"] = list(self.sums.values())
        saved["kink"] = None if self.kink is None else self.kink.state_dict()
        return {"args": {"share": self.share}, "attributes": {"saved": saved}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the Trainer when ``state`` is the run's: the checkpoint's, where one is resumed."""
        # A checkpoint of another trainer has none; transformers needs the key when it saves the next one.
        found = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]["saved"]
        self.margins = dict(zip(found["ids"], found["margins"], strict=True))
        sums = found.get("sums") or [(margin, 1) for margin in found["margins"]]  # older checkpoints have none
        self.sums = dict(zip(found["ids"], map(tuple, sums), strict=True))
        seen = args.train_batch_size * args.gradient_accumulation_steps * args.world_size * state.max_steps
        if self.kink is not None and seen < self.kink.enough:
            raise ConfigError(
                f"budget: {self.share:.2g} of {seen} pairs are too few to see which margins are low",
                remedy=f"train on {self.kink.enough} pairs or more, epochs counted, or give lam",
            )
        if self.kink is not None and found["kink"] is not None:
            self.kink.load_state_dict(found["kink"])


class _WithIds:
    """A collator that keeps the ids, as a list, beside the tensors of another one."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.collator(examples), ID: [example[ID] for example in examples]}


@contextmanager
def _unrounded(model: Any) -> Iterator[None]:
    """Keep what is trained on quantised weights in float32, as `adapt` has it: TRL makes it bfloat16.

    Steps are smaller than bfloat16 tells apart, and the head of a reward model gets hidden states in float32.
    """
    quantised = isinstance(model, torch.nn.Module) and is_quantised(model)
    before = {p: p.data for p in model.parameters() if p.requires_grad} if quantised else {}
    yield
    for parameter, data in before.items():
        parameter.data = data


class _Robust(Trainer):
    """What both trainers share: ids from the data set to the loss, the loss of a pair, and what is logged of it.

    Stands before TRL's trainer among the bases, so that ``super()`` is TRL's.
    """

    data_collator: Any

    def __init__(self, *args: Any, robust: RobustFields | None = None, **kwargs: Any) -> None:
        with _unrounded(kwargs.get("model")):
            super().__init__(*args, **kwargs)
        self.robust = RobustFields() if robust is None else robust
        self.data_collator = _WithIds(self.data_collator)
        self.add_callback(R3MMemory(self.robust.share))

    def margins(self) -> dict[Any, float]:
        """Of each pair that was trained on, its margin when it last was: before that step, in training mode.

        Pairs without an ``id`` are called by their number in the data set as it was given. All processes know all.
        """
        return dict(self._memory.margins)

    def epoch_margins(self) -> dict[Any, float]:
        """Of each pair that was trained on, the mean of its margins over epochs; otherwise as `margins`."""
        return {id: total / times for id, (total, times) in self._memory.sums.items()}

    @property
    def _memory(self) -> R3MMemory:
        # Looked up, since transformers can be told to put a restored one in its place.
        return next(found for found in self.callback_handler.callbacks if isinstance(found, R3MMemory))

    @property
    def _warming(self) -> bool:
        return self.state.global_step < self.robust.paper.lam_warmup * self.state.max_steps

    @property
    def _now(self) -> tuple[PairLoss, float]:
        """The loss of this step, and its cap."""
        if self._warming:
            # What is trimmed too early never comes back, so first all pairs pull, and about equally.
            return "r3m", TRIMMED_START if self.robust.loss == "trimmed" else 1.0
        moving = self._memory.kink
        return self.robust.loss, self.robust.fixed_lam if moving is None else moving.lam

    def _prepare_dataset(self, dataset: Any, processing_class: Any, *args: Any, **kwargs: Any) -> Any:
        named = ID in next(iter(dataset), {ID: None})
        if named and isinstance(dataset, Dataset):
            _check_ids(dataset[ID])
        if not named:
            # Now, for TRL leaves pairs out that are too long, and then the numbers shift.
            dataset = dataset.map(_number, with_indices=True)
        try:
            return super()._prepare_dataset(dataset, processing_class, *args, **kwargs)
        except TemplateError:
            _name_refused(dataset, processing_class)
            raise

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if ID not in self._signature_columns:
            self._signature_columns.append(ID)

    def _pair_losses(self, margin: Tensor, ids: list[Any]) -> Tensor:
        """The loss of each pair, ``[pairs]``; what can be known of it is logged and kept.

        Raises:
            RunError: a margin is not finite. Its gradient would be finite all the same, and so pass unnoticed.
        """
        finite = torch.isfinite(margin).tolist()
        if not all(finite):
            bad = [f"{name!r}" for name, good in zip(ids, finite, strict=True) if not good]
            step = f"step {self.state.global_step + 1} of {self.state.max_steps}"
            raise RunError(
                f"the margin is not finite at {step}, of id {', '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}",
                remedy=f"look at these pairs, lower learning_rate (now {self.args.learning_rate:g}), or train in "
                "float32",
            )
        loss, lam = self._now
        losses = pair_loss(margin, loss, lam=lam, smoothing=self.robust.paper.smoothing)
        self._note(margin.detach().float(), ids, lam)
        return losses

    def _note(self, margin: Tensor, ids: list[Any], lam: float) -> None:
        mode = "train" if self.model.training else "eval"
        margins = self.accelerator.gather(margin)
        delta = perturbation(margins, lam)
        flagged = (delta > 0).float().mean()
        numbers = {"flagged_frac": float(flagged), "delta_mean": float(delta.mean()), "delta_max": float(delta.max())}
        for name, number in (numbers | {"lam": lam}).items():
            self._metrics[mode][f"r3m/{name}"].append(number)
        if mode == "train":
            self._memory.observe(gather_object(ids), margins.tolist(), judged=not self._warming)


class R3MRewardTrainer(_Robust, RewardTrainer):
    """TRL's ``RewardTrainer`` on a robust loss.

    TRL's ``margin`` column and its ``center_rewards_coefficient`` work as there.

    Args:
        *args: of TRL's trainer.
        robust: the loss; by default R3M with ``lam`` 0.75.
        **kwargs: of TRL's trainer.

    Raises:
        ConfigError: a ``margin`` column with a loss that also looks at the flipped label.
        RunError: when training, in the step in which a margin is not finite; names the pair.

    Sections 2.4 and 6.

    >>> robust = RobustFields(budget="10%")
    >>> trainer = R3MRewardTrainer(model, args, train_dataset=pairs, robust=robust)  # doctest: +SKIP
    >>> trainer.train().training_loss, trainer.margins()["pair-1"]  # doctest: +SKIP
    (0.41, 2.37)
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch, as the Trainer asks for it."""
        ids, inputs = _apart(inputs)
        # TRL's own loss is a handful of numbers; what is wanted are its metrics and the scores of its one forward pass.
        _, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        chosen, rejected = outputs.logits.squeeze(-1).float().chunk(2)
        margin = chosen - rejected
        if "margin" in inputs:
            if self.robust.loss in ("cdpo", "rdpo"):
                raise ConfigError(
                    f"margin: a data set with this column does not fit the loss {self.robust.loss}, which asks what "
                    "the flipped label would cost",
                    remedy="remove the column, or set loss to r3m, trimmed or bt",
                )
            margin = margin - inputs["margin"]
        loss = self._pair_losses(margin, ids).mean()
        if self.args.center_rewards_coefficient is not None:
            loss += self.args.center_rewards_coefficient * torch.mean((chosen + rejected) ** 2)
        return (loss, outputs) if return_outputs else loss


class R3MDPOTrainer(_Robust, DPOTrainer):
    """TRL's ``DPOTrainer`` on a robust loss of DPO's implicit margin.

    The kink is in units of ``beta`` times the log-ratio, so ``beta`` and ``lam`` work together.

    Args:
        *args: of TRL's trainer.
        robust: the loss; by default R3M with ``lam`` 0.75.
        **kwargs: of TRL's trainer.

    Raises:
        ConfigError: an option of TRL that changes the margin or the loss, or data with images.
        RunError: when training, in the step in which a margin is not finite; names the pair.

    Sections 2.5 and 6.

    >>> robust = RobustFields(lam=0.8)
    >>> trainer = R3MDPOTrainer(model, args=args, train_dataset=pairs, robust=robust)  # doctest: +SKIP
    >>> trainer.train().training_loss, trainer.margins()["pair-1"]  # doctest: +SKIP
    (0.62, 0.35)
    """

    loss_types: list[str]
    loss_weights: list[float]
    precompute_ref_logps: bool

    def __init__(self, *args: Any, robust: RobustFields | None = None, **kwargs: Any) -> None:
        super().__init__(*args, robust=robust, **kwargs)
        _refuse_other_losses(self.args)
        if self._is_vision_dataset:
            raise ConfigError("train_dataset: R3M's DPO takes no images", remedy="leave them out")
        # TRL has no place to put a loss of a pair, but it adds up its losses over a list. With an empty one it makes
        # the forward passes, logs all that it logs, and returns what is left, which is the auxiliary loss of a mixture
        # of experts, or 0; ours is then added to it. So nothing of TRL is copied or replaced.
        self.loss_types, self.loss_weights = [], []

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """The reference's log-probability of the chosen and of the rejected answers, ``[pairs]`` each."""
        return super().compute_ref_log_probs(model, {key: value for key, value in inputs.items() if key != ID})

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        ids, inputs = _apart(inputs)
        if not self.precompute_ref_logps:
            reference = self.model if self.ref_model is None else self.ref_model
            inputs |= dict(zip(_REFERENCE, self.compute_ref_log_probs(reference, inputs), strict=True))
        policy = _Recorder(model)
        precomputed = self.precompute_ref_logps
        self.precompute_ref_logps = True  # the reference need not be asked twice
        try:
            found = super()._compute_loss(policy, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = precomputed
        rest, outputs = found if return_outputs else (found, None)
        # Prompt-learning adapters put virtual tokens first.
        tokens = inputs["completion_mask"].shape[1] - 1
        chosen, rejected = policy.first.log_probs[:, -tokens:].sum(dim=1).chunk(2)
        chosen, rejected = chosen - inputs[_REFERENCE[0]], rejected - inputs[_REFERENCE[1]]
        loss = rest + self._pair_losses(self.beta * (chosen - rejected), ids).mean()
        return (loss, outputs) if return_outputs else loss


class _Recorder:
    """A model whose first outputs are kept; TRL calls it again, without labels, where outputs are asked for."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.first: Any = None

    def __call__(self, **inputs: Any) -> Any:
        outputs = self.model(**inputs)
        if self.first is None:
            self.first = outputs
        return outputs


def _refuse_other_losses(args: Any) -> None:
    """Refuse the options of a ``DPOConfig`` that make another margin or loss than DPO's."""
    wanted = {
        "loss_type": (["sigmoid"], "choose the loss with loss: r3m, bt, cdpo, rdpo or trimmed"),
        "loss_weights": (None, "there is one loss: leave it out"),
        "f_divergence_type": ("reverse_kl", "leave it out"),
        "ld_alpha": (None, "leave it out"),
        "use_weighting": (False, "leave it out"),
        "label_smoothing": (0.0, "TRL's sigmoid loss ignores it: set loss to cdpo and give paper.smoothing"),
    }
    for name, (value, remedy) in wanted.items():
        if getattr(args, name) != value:
            raise ConfigError(f"{name}: {getattr(args, name)!r} does not go with R3M", remedy=remedy)


def _check_ids(ids: Sequence[Any]) -> None:
    """Refuse ids by which margins could not be told apart."""
    seen = set()
    for index, id in enumerate(ids):
        if id is None or isinstance(id, list | dict) or id in seen:
            said = "comes twice" if isinstance(id, str | int) else "is not a name"
            raise DataError(
                f"train_dataset, row {index}: the id {id!r} {said}",
                remedy="give each pair an id of its own, text or a number, or remove the column",
            )
        seen.add(id)


def _name_refused(dataset: Iterable[dict[str, Any]], tokenizer: Any) -> None:
    """Raise an error that names the first pair that the chat template refuses."""
    for row in dataset:
        for answer in ("chosen", "rejected"):
            render_chat(tokenizer, [*row.get("prompt", []), *row[answer]], f"train_dataset, id {row[ID]!r}")


def _number(row: dict[str, Any], index: int) -> dict[str, Any]:
    return {ID: index}


def _apart(inputs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The ids of a batch, and what the model is to see."""
    return inputs[ID], {key: value for key, value in inputs.items() if key != ID}
