"""Training through transformers' Trainer as it is: what a run needs around it, and nothing of the loop."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerControl, TrainerState

from tenfold.adapt.distil import DistilTrainer, Teacher, unconverted
from tenfold.compat import activation_checkpointing
from tenfold.config.training import TextTrainingFields, TrainingFields
from tenfold.data.encode import Encoded, collate
from tenfold.errors import ConfigError, RunError
from tenfold.models.quantised import computing_dtype, is_quantised

COMPLETE = ".complete"
"""Marks a checkpoint that was written to its end; one without it was cut off by a kill."""


@dataclass(frozen=True)
class Trained:
    """What a training run did."""

    steps: int
    """Optimizer steps, resumed ones included."""
    tokens: int
    """Tokens seen over all steps."""
    seconds: float
    """Wall time of this process's share of the steps."""
    resumed_from: int
    """The step of the checkpoint from which this process went on; 0 for a fresh start."""


def total_steps(config: TrainingFields, sequences: int, tokens: int) -> int:
    """Optimizer steps that ``steps``, ``epochs`` or ``tokens`` mean on so many examples with so many tokens.

    Raises:
        ConfigError: when there is nothing to train on.

    >>> total_steps(TrainingFields(tokens=1000, batch_size=2), sequences=10, tokens=500)
    10
    """
    if sequences == 0:
        raise ConfigError("data: no example is left to train on", remedy="lower holdout, or give more rows")
    per_step = config.batch_size * config.accumulate
    if config.steps is not None:
        return config.steps
    if config.tokens is not None:
        return math.ceil(config.tokens / (tokens / sequences * per_step))
    return math.ceil((config.epochs or 1.0) * sequences / per_step)


def train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Encoded,
    config: TextTrainingFields,
    *,
    folder: Path,
    seed: int,
    on_resume: Callable[[int], None] = lambda step: None,
    on_log: Callable[[int, dict[str, float]], None] = lambda step, values: None,
    on_step: Callable[[int, int, str], None] = lambda done, total, detail: None,
    callbacks: Sequence[TrainerCallback] = (),
    teacher: Teacher | None = None,
) -> Trained:
    """Train `model` in place on `encoded`, going on from the last complete checkpoint in `folder`.

    Args:
        model: whose parameters with ``requires_grad`` are trained.
        tokenizer: saved with each checkpoint; gives the padding.
        encoded: examples of token ids and labels.
        config: lengths, rates and intervals.
        folder: for checkpoints; empty at the first call.
        seed: of the order of the examples and of dropout.
        on_resume: told the step that training goes on from, once, before the first step.
        on_log: told ``(step, {"loss": ..., "grad_norm": ..., "learning_rate": ...})`` every ``log_every`` steps.
        on_step: told ``(done, total, text)`` after each step.
        callbacks: further callbacks of the Trainer.
        teacher: of a loss with a share ``config.distil``. Default: the model as it was before it was converted.

    Raises:
        RunError: when the loss or the gradient norm is not finite.
    """
    steps = total_steps(config, len(encoded.examples), encoded.tokens)
    make: Callable[..., Trainer] = Trainer
    if config.distil:
        make = partial(DistilTrainer, teacher=teacher or unconverted(model), share=config.distil)
    trainer = make(
        model=model,
        args=TrainingArguments(**trainer_arguments(config, model, steps=steps, folder=folder, seed=seed)),
        train_dataset=encoded.examples,
        data_collator=partial(collate, pad_id=tokenizer.pad_token_id),
        callbacks=list(callbacks),
    )
    seconds, resumed_from = carry_out(trainer, config, on_resume=on_resume, on_log=on_log, on_step=on_step)
    tokens = round(encoded.tokens / len(encoded.examples) * steps * config.batch_size * config.accumulate)
    return Trained(steps=steps, tokens=tokens, seconds=seconds, resumed_from=resumed_from)


def trainer_arguments(
    config: TrainingFields, model: nn.Module, *, steps: int, folder: Path, seed: int
) -> dict[str, Any]:
    """What every Trainer of ours is told, as arguments of transformers' ``TrainingArguments`` or TRL's."""
    parameter = next(model.parameters())
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulate,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.schedule if config.schedule != "constant" else "constant_with_warmup",
        "warmup_steps": round(config.warmup * steps),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        **activation_checkpointing(config.gradient_checkpointing),
        "logging_steps": config.log_every,
        "logging_nan_inf_filter": False,  # a loss that is not finite must be seen, not averaged away
        "save_steps": config.save_every,
        "save_total_limit": 2,  # while one is being written, the one before it must still be there
        "seed": seed,
        "data_seed": seed,
        "report_to": list(config.report_to) or "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": parameter.device.type == "cuda",
        "use_cpu": parameter.device.type == "cpu",
        "bf16": parameter.device.type == "cuda" and _computes_in_bfloat16(model, parameter),
    }


def _computes_in_bfloat16(model: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether the model does; what packed weights have beside them is float32 while an adapter is trained."""
    dtype = computing_dtype(parameter.device) if is_quantised(model) else parameter.dtype
    return str(dtype) == "torch.bfloat16"


def carry_out(
    trainer: Trainer,
    config: TrainingFields,
    *,
    on_resume: Callable[[int], None],
    on_log: Callable[[int, dict[str, float]], None],
    on_step: Callable[[int, int, str], None],
) -> tuple[float, int]:
    """Let a Trainer train, from the last complete checkpoint in its folder on; see `train` for the rest.

    Returns:
        Seconds of this process, and the step that it went on from.
    """
    resume = last_checkpoint(Path(trainer.args.output_dir))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Watch(config, on_log, on_step))
    resumed_from = int(resume.name.rpartition("-")[2]) if resume else 0
    on_resume(resumed_from)
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return time.perf_counter() - began, resumed_from


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; those cut off by a kill are removed."""
    complete = []
    for path in folder.glob("checkpoint-*"):
        if (path / COMPLETE).exists():
            complete.append(path)
        else:
            shutil.rmtree(path, ignore_errors=True)
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class _Watch(TrainerCallback):
    """Passes on what happens, marks complete checkpoints, and stops at the first number that is not finite."""

    def __init__(
        self,
        config: TrainingFields,
        on_log: Callable[[int, dict[str, float]], None],
        on_step: Callable[[int, int, str], None],
    ) -> None:
        self.config, self.log, self.step = config, on_log, on_step
        self.detail = ""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.step(state.global_step, state.max_steps, self.detail)
        if state.global_step % self.config.save_every == 0 or state.global_step == state.max_steps:
            control.should_log = True  # checked before it is saved; and a resumed run logs at the same steps

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        values = {key: float(value) for key, value in (logs or {}).items() if key in _LOGGED or "/" in key}
        if not values:
            return
        for key in ("loss", "grad_norm"):
            if not math.isfinite(values.get(key, 0.0)):
                raise RunError(
                    f"{key} is {values[key]} at step {state.global_step} of {state.max_steps}",
                    remedy=f"lower learning_rate (now {self.config.learning_rate:g}) or max_grad_norm "
                    f"(now {self.config.max_grad_norm:g}), or train in float32",
                )
        self.detail = f"loss {values['loss']:.3f}"
        self.log(state.global_step, values)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # The last one is never resumed from: a process that makes no step has nothing to learn a method's state from.
        if state.global_step < state.max_steps:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


_LOGGED = ("loss", "grad_norm", "learning_rate", "accuracy", "margin")
"""What every Trainer logs, and TRL's of rewards; what a method adds has a slash in its name."""
