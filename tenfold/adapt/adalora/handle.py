"""What a user holds: the adapted model, what is known about it, and the ways out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from tenfold.adapt.adalora.attaching import Matrix, trainable, wrap
from tenfold.adapt.adalora.controller import Controller
from tenfold.adapt.adalora.exporting import Order, RankLayout, affordable, export
from tenfold.adapt.adalora.opening import Stored, fill, read_adapter
from tenfold.adapt.adalora.plan import RankPlan, make_plan, make_schedule, size_plan, too_short
from tenfold.adapt.role_map import by_role
from tenfold.config.adalora import AdaLoraConfig
from tenfold.config.budget import PARAMETER_BYTES
from tenfold.errors import ModelError, RunError
from tenfold.models.layer_map import layer_map
from tenfold.models.quantised import parameter_count
from tenfold.models.tied import tie_again


class AdaLora:
    """An attached AdaLoRA adapter. Train ``.model`` in any loop; there is nothing to call.

    As a context manager it detaches at the end.
    """

    def __init__(
        self,
        model: PeftModel,
        matrices: dict[str, Matrix],
        controller: Controller,
        free: list[str],
        *,
        untied: list[tuple[str, str]],
        biases: dict[str, Tensor] | None = None,
    ) -> None:
        self.model = model
        """PEFT's model: give it to the Trainer, to TRL, to an optimizer."""
        self.matrices = matrices
        """The adapted matrices by name, in model order."""
        self.controller = controller
        """Makes the steps; its ``step``, ``masks``, ``scores`` and ``notes`` may be read."""
        self._untied = untied
        self._free, self._biases = free, biases or {}  # what training may change in the base, as it was

    def __enter__(self) -> AdaLora:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @property
    def plan(self) -> RankPlan:
        """The sizes at the start and at the end."""
        return self.controller.plan

    def too_short(self, steps: int) -> str | None:
        """What a run of so many optimizer steps is too short for, as its report will note; None where it is not.

        Raises:
            ConfigError: phases that do not fit the run.
        """
        return too_short(self.controller.config, make_schedule(self.controller.config, self.plan, steps))

    def ranks(self) -> dict[str, int]:
        """The triplets that each matrix keeps now."""
        return {name: int(mask.sum()) for name, mask in self.controller.kept().items()}

    def attached(self) -> dict[str, Any]:
        """What the adapter touches: matrices, triplets, trainable parameters and their share of the base, bytes."""
        tensors = trainable(self.matrices)
        all_trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        base = parameter_count(self.model, lambda name: ".lora_" not in name)
        kept = self.ranks()
        parameters = sum(int(mask.sum()) * self.plan.costs[name] for name, mask in self._exported().items())
        return {
            "method": "AdaLoRA",
            "matrices": len(self.matrices),
            "trainable parameters": all_trainable,
            "share of the model": all_trainable / base,
            "bytes": sum(t.numel() * t.element_size() for t in tensors),
            "triplets at the start": sum(self.plan.ranks.values()),
            "triplets": sum(kept.values()),
            "exported parameters": parameters,
            "exported bytes": parameters * PARAMETER_BYTES,
            "budget": f"{self.plan.end} {'triplets' if self.plan.by == 'count' else 'parameters'}",
        }

    def report(self) -> dict[str, Any]:
        """Plain data for tables and plots.

        Returns:
            ``attached`` as `attached` gives it; ``ranks``: the rank map, role -> the kept rank in each layer (None
            where the role is not adapted), roles of an encoder beside a decoder as ``encoder.q``, and names within the
            block where it has a role several times, as with experts; ``budget``: one
            ``(step, budget, triplets kept)`` for each allocation, from the start; ``steps``: optimizer steps made;
            ``notes``: sentences that the reader must know.
        """
        self.controller.check_stepped()
        start = (0, self.plan.start, sum(self.plan.ranks.values()))
        return {
            "attached": self.attached(),
            "ranks": by_role({name: matrix.slot for name, matrix in self.matrices.items()}, self.ranks()),
            "budget": [start] + [(step, budget, int(kept)) for step, budget, kept in self.controller.history],
            "steps": self.controller.step,
            "notes": [*self.controller.notes, *self._above_budget()],
        }

    def _exported(self) -> dict[str, Tensor]:
        """The triplets that an export writes, for each matrix ``bool[rank]``."""
        return affordable(self.matrices, self.controller.kept(), self.controller.latest_scores(), self.plan)

    def _above_budget(self) -> list[str]:
        """A note where the adapter holds more than an export writes."""
        alive = sum(int((matrix.singular != 0).sum()) for matrix in self.matrices.values())
        written = sum(int(mask.sum()) for mask in self._exported().values())
        if alive <= written:
            return []
        schedule, step = self.controller.schedule, self.controller.step
        early = schedule is not None and step <= schedule.total - schedule.cooldown
        when = f" after step {step} of {schedule.total}, before the final phase," if early and schedule else ""
        return [f"the adapter holds {alive} triplets{when} and the budget pays for {written}: an export keeps the best"]

    def export(
        self,
        folder: Path | str,
        *,
        layout: RankLayout = "padded",
        order: Order | None = None,
        triplets: int | None = None,
        base: str | None = None,
    ) -> Path:
        """Write the adapter as plain LoRA of scale 1, which PEFT, TRL, vLLM and llama.cpp open.

        The budget is never exceeded: of an adapter that holds more, because its training ended early or an earlier
        checkpoint was loaded back, the best triplets are written, and `report` says so in a note.

        Args:
            folder: written whole or not at all; replaced if tenfold wrote it, refused if it holds anything else.
            layout: ``padded`` (equal ranks, right in every reader) or ``compact`` (true ranks; not for llama.cpp).
            order: triplets by final ``score`` or exact ``singular_value``, so that any smaller rank is a prefix.
                Default: by score where there are scores.
            triplets: export only the best of this number, over all matrices.
            base: where the model came from, written into the adapter so that it finds its base again. Default: the
                folder or hub id that it was opened from (``demo`` for the embedded model).

        Raises:
            RunError: when the adapter was never trained, or no triplet is left.
        """
        self.controller.check_stepped()
        if self.controller.step == 0 and not self.controller.trained and not self._loaded():
            raise RunError("the adapter was never trained: no optimizer has stepped it", remedy="train first")
        return export(
            self.model,
            self.matrices,
            self._exported(),
            self.controller.latest_scores(),
            self.plan.scale,
            Path(folder),
            layout=layout,
            order=order,
            triplets=triplets,
            base=base,
        )

    def _loaded(self) -> bool:
        return any(matrix.layer.lora_B["default"].loaded for matrix in self.matrices.values())

    def detach(self) -> nn.Module:
        """Take the adapter and all hooks off.

        Returns:
            The base model as it was, bit for bit.
        """
        self.controller.close()
        for parent in list(self.model.get_base_model().modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, ModulesToSaveWrapper):  # PEFT's unload would leave the trained head behind
                    setattr(parent, name, child.original_module)
        base = self.model.unload()
        tie_again(base, self._untied)
        free = set(self._free)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name in free)
            if name in self._biases:
                parameter.data.copy_(self._biases[name])
        return base


def attach(
    model: nn.Module,
    config: AdaLoraConfig,
    *,
    total_steps: int | None = None,
    task: str | None = "causal",
) -> AdaLora:
    """Put a fresh AdaLoRA adapter on the targeted matrices; the base is frozen and stays as it is.

    Then train ``.model`` with a torch optimizer that holds its parameters, in a loop of your own, in transformers'
    Trainer or in TRL's: scoring, allocation and masks happen around each optimizer step by themselves. Give the
    optimizer no weight decay on the adapter: it would act against the orthogonality penalty.

    Args:
        model: a transformers model; quantised bases are fine.
        config: budget or rank, phases, targets.
        total_steps: optimizer steps of the run. Default: the running Trainer's, else ``config.steps``.
        task: what the model's head is for (``causal``, ``seq2seq``, ``classification``, ``reward``, or None); the head
            of a classification or reward model is trained in full.

    Raises:
        ConfigError: a target that matches nothing, a budget that does not fit, phases that do not fit the run.
        ModelError: a model that already has an adapter, or layers that cannot be adapted.

    >>> from tenfold.models.tiny import tiny_model
    >>> adapter = attach(tiny_model("llama").model, AdaLoraConfig(rank=2, targets=("q", "v"), steps=10))
    >>> adapter.attached()["triplets at the start"], adapter.plan.end
    (12, 8)
    """
    free = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    slots = layer_map(model).select(config.targets)
    plan = make_plan(config, slots, parameters=parameter_count(model))
    adapted, matrices, untied = wrap(model, slots, plan, config, task=task)
    return AdaLora(
        adapted, matrices, Controller(adapted, matrices, plan, config, total_steps, trained=False), free, untied=untied
    )


def open_adapter(
    model: nn.Module,
    folder: Path | str,
    config: AdaLoraConfig | None = None,
    *,
    total_steps: int | None = None,
    task: str | None = "causal",
) -> AdaLora:
    """Open a PEFT AdaLoRA or LoRA adapter, to go on training it under a budget or to export it.

    Args:
        model: the base that the adapter was trained on.
        folder: as `PeftModel.save_pretrained` wrote it.
        config: how to go on; its targets, initial rank, alpha and initialisation are the adapter's and not read here.
            Default: keep every triplet.
        total_steps: as `attach`.
        task: as `attach`.

    Raises:
        ModelError: not a LoRA or AdaLoRA folder, or not of this model.
        ConfigError: a budget above what the adapter holds.
    """
    stored = read_adapter(Path(folder), model)
    free = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    slots = [slot for slot in layer_map(model).slots if slot.name in stored.triplets]
    _check_fits(stored, {slot.name: (slot.out_features, slot.in_features) for slot in slots}, folder)
    ranks = {slot.name: len(stored.triplets[slot.name][1]) for slot in slots}
    costs = {slot.name: slot.in_features + slot.out_features for slot in slots}
    given = config is not None and (config.budget is not None or config.rank is not None)
    config = config or AdaLoraConfig()
    if not given:
        config = config.model_copy(update={"rank": sum(ranks.values()) / len(ranks)})
    plan = size_plan(config, ranks, costs, stored.scale, parameter_count(model))
    biases = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("bias")}
    adapted, matrices, untied = wrap(model, slots, plan, config, task=task, beyond=stored.beyond)
    for name, matrix in matrices.items():
        fill(matrix.tensors, stored.triplets[name])
    if stored.others:
        set_peft_model_state_dict(adapted, stored.others)
    trains_biases = stored.beyond.get("bias", "none") != "none"
    controller = Controller(adapted, matrices, plan, config, total_steps, trained=True)
    return AdaLora(adapted, matrices, controller, free, untied=untied, biases=biases if trains_biases else None)


def _check_fits(stored: Stored, shapes: dict[str, tuple[int, int]], folder: Path | str) -> None:
    for name, (P, _, Q) in stored.triplets.items():
        if shapes.get(name) != (P.shape[0], Q.shape[1]):
            has = "absent" if name not in shapes else f"{shapes[name][0]} x {shapes[name][1]}"
            raise ModelError(
                f"{folder}: {name} is {P.shape[0]} x {Q.shape[1]}, in this model {has}",
                remedy="give the model that the adapter was trained on (base_model_name_or_path in its configuration)",
            )
