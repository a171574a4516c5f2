"""Plans: the format of each unit of a model within a budget, and all scores, so that another budget is a lookup."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError
from torch import Tensor

from tenfold.compress.fpx.assign import most_tolerant
from tenfold.compress.fpx.decode_time import rest_seconds, unit_seconds
from tenfold.compress.fpx.digests import tokens_digest, weights_digest
from tenfold.compress.fpx.knapsack import solve
from tenfold.compress.fpx.losses import MetricName, unit_losses
from tenfold.compress.fpx.packed_layers import refuse_unpackable
from tenfold.compress.fpx.rounding import Codec, format_of, stored_size
from tenfold.compress.fpx.units import READ_FROM_FILES, Kept, Unit, UnitWeight, kept_by, units_of
from tenfold.compress.losparse.calibration import Tell
from tenfold.config.budget import Budget, parse_budget
from tenfold.core.weight_formats import WeightFormat
from tenfold.errors import ConfigError, DataError
from tenfold.files import write_text
from tenfold.models.gguf_write import ALIGNMENT, gguf_sizes
from tenfold.models.inference import input_device, machine
from tenfold.models.layer_map import plain_modules
from tenfold.models.simulated import refuse_simulated

VERSION = 1
PALETTE = ("fp8_row", "nvfp4")
KERNEL_PALETTE = ("bf16", "int8_row", "int4_g32")
PAPER_PALETTE = ("fp8_tensor", "fp4_tensor")
"""FP8 and FP4 with one scale for each tensor, weights and inputs (arXiv 2505.19481, section 4)."""
_FORMS = "write 6bits or 95MB"


@dataclass(frozen=True)
class FormatScore:
    """A format that a unit could have.

    Args:
        format: its name.
        loss: by the plan's metric.
        bytes: of the unit's weights in it, scales included.
        seconds: of its products for one token, where kernels were timed.
    """

    format: str
    loss: NonNegativeFloat
    bytes: NonNegativeInt
    seconds: NonNegativeFloat = 0.0
    __pydantic_config__: ClassVar[ConfigDict] = READ_FROM_FILES


@dataclass(frozen=True)
class PlannedUnit:
    """A unit and its format.

    Args:
        name: as in `tenfold.compress.fpx.units.Unit`.
        format: that it gets.
        weights: that are stored in it.
        candidates: all formats of the palette, in its order.
    """

    name: str
    format: str
    weights: tuple[UnitWeight, ...]
    candidates: tuple[FormatScore, ...]
    __pydantic_config__: ClassVar[ConfigDict] = READ_FROM_FILES

    @property
    def unit(self) -> Unit:
        """Without what was measured."""
        return Unit(self.name, self.weights)

    @property
    def chosen(self) -> FormatScore:
        """The candidate that it gets."""
        return next(each for each in self.candidates if each.format == self.format)


@dataclass(frozen=True)
class Plan:
    """The format of each unit of a model.

    Args:
        model: kind of the model, ``model_type`` of its configuration.
        weights_hash: of its numbers.
        calibration_hash: of the tokens.
        tokens: of them.
        metric: that losses are measured by, `tenfold.compress.fpx.losses`.
        codec: whose formats these are: the references (``reference``), those of GGUF files (``gguf``), or those that
            are multiplied in here (``kernels``).
        palette: names of the formats, the base first.
        budget: as it was asked for: ``6bits``, ``95MB``, ``20ms`` or ``gamma=0.3``.
        paper: whether the published algorithm chose.
        extra_bytes: of a GGUF file beside its matrices, over what ``kept`` takes; 0 of the references.
        units: in model order.
        kept: what else is stored, as it is.
        timed_on: the machine that kernels were timed on, and its threads; empty of other codecs.
        rest_seconds: of decoding a token there, beside the units.
    """

    model: str
    weights_hash: str
    calibration_hash: str
    tokens: PositiveInt
    metric: MetricName
    codec: Codec
    palette: tuple[str, ...]
    budget: str
    paper: bool
    extra_bytes: int
    units: tuple[PlannedUnit, ...]
    kept: tuple[Kept, ...]
    timed_on: str = ""
    rest_seconds: NonNegativeFloat = 0.0
    __pydantic_config__: ClassVar[ConfigDict] = READ_FROM_FILES

    def __post_init__(self) -> None:
        names = [unit.name for unit in self.units]
        if len(set(names)) < len(names) or not names:
            raise ConfigError("units: none, or two of one name")
        for unit in self.units:
            if tuple(each.format for each in unit.candidates) != self.palette:
                raise ConfigError(f"units: the candidates of {unit.name} are not the formats of the palette")
            if unit.format not in self.palette:
                raise ConfigError(f"units: {unit.name} has the format {unit.format!r}, which is not in the palette")

    @property
    def formats(self) -> dict[str, str]:
        """By unit."""
        return {unit.name: unit.format for unit in self.units}

    @property
    def by_module(self) -> dict[str, str]:
        """By module, each of those that share a weight: what `tenfold.models.gguf_write.write_gguf` takes."""
        return {module: unit.format for unit in self.units for module in unit.unit.modules}

    @property
    def numbers(self) -> int:
        """Numbers of the model, planned and kept; what is tied counts once."""
        return sum(unit.unit.numbers for unit in self.units) + sum(each.numbers for each in self.kept)

    @property
    def bytes(self) -> int:
        """All that is stored: weights, scales, what is kept, and what a file holds beside these."""
        return sum(unit.chosen.bytes for unit in self.units) + _fixed_bytes(self)

    @property
    def bits(self) -> float:
        """Of all stored bytes, on average over all numbers of the model."""
        return 8 * self.bytes / self.numbers

    @property
    def seconds(self) -> float | None:
        """Of decoding one token after 128 others on the machine that was timed; None of codecs that have no kernels."""
        if not self.timed_on:
            return None
        return self.rest_seconds + math.fsum(unit.chosen.seconds for unit in self.units)

    @property
    def loss(self) -> float:
        """Of all units together, were their effects to add up."""
        return math.fsum(unit.chosen.loss for unit in self.units)

    def replan(self, budget: str | None = None, *, gamma: float | None = None) -> Plan:
        """The plan for another budget, from the losses of this one; no model is needed.

        Args:
            budget: as `plan` takes it.
            gamma: as `plan` takes it.

        Raises:
            ConfigError: as `plan`.
        """
        places = _choices(self, budget, gamma)
        units = (replace(unit, format=self.palette[place]) for unit, place in zip(self.units, places, strict=True))
        said = f"gamma={gamma:g}" if budget is None else budget
        return replace(self, budget=said, units=tuple(units))

    def to_json(self) -> str:
        """The plan as text; the same plan is the same text. Totals stand on top, for who reads it."""
        fields = _READER.dump_python(self, mode="json")
        return json.dumps({"fpx_plan": VERSION, "bytes": self.bytes, "bits": self.bits, **fields}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "plan") -> Plan:
        """Read what `to_json` wrote.

        Args:
            text: of the plan.
            source: where it comes from, for errors.

        Raises:
            DataError: not a plan, of another version, or with a field that is missing, unknown or impossible; names it.
        """
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise DataError(f"{source}: not readable as JSON: {error}", remedy="write the plan again") from error
        version = fields.pop("fpx_plan", None) if isinstance(fields, dict) else None
        if version != VERSION:
            found = "no plan of FPX" if version is None else f"a plan of version {version!r}"
            raise DataError(f"{source}: {found}", remedy=f"write it with this version, which reads version {VERSION}")
        totals = {name: fields.pop(name, None) for name in ("bytes", "bits")}
        try:
            plan = _READER.validate_json(json.dumps(fields))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "plan"
            raise DataError(f"{source}: {place}: {first['msg']}", remedy="write the plan again") from error
        if totals != {"bytes": plan.bytes, "bits": plan.bits}:
            raise DataError(
                f"{source}: says {totals['bytes']} bytes where its units take {plan.bytes}",
                remedy="change a plan by replan, not by hand",
            )
        return plan

    def save(self, path: Path | str) -> None:
        """Write the plan to a file, whole or not at all."""
        write_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """Read a file that `save` wrote.

        Raises:
            DataError: missing or unreadable; or as `from_json`.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: {error}", remedy="give a file that Plan.save wrote") from error
        return cls.from_json(text, str(path))


_READER = TypeAdapter(Plan)


def plan(
    model: Any,
    passages: Sequence[Tensor],
    *,
    budget: str | None = None,
    gamma: float | None = None,
    palette: Sequence[str] | None = None,
    metric: MetricName | None = None,
    codec: Codec = "reference",
    fused: bool = False,
    paper: bool = False,
    tokenizer: Any = None,
    seed: int = 0,
    tell: Tell | None = None,
) -> Plan:
    """Choose the format of each unit of a model, such that it loses the least within a budget.

    The model stays as it is. Losses are measured once, for all budgets: `Plan.replan`.

    Args:
        model: a ``transformers`` model, also with adapters, which stay as they are beside the planned base.
        passages: token ids, ``[tokens]`` each, of texts like those that the model will see: some hundred tokens.
        budget: ``95MB``, of all that is stored; or ``6bits``, all stored bits (scales, norms and biases included)
            divided by all numbers of the model, a tied weight once; or, of kernels, ``20ms``, of decoding one token
            after 128 others here. Never exceeded, as far as measured times hold.
        gamma: instead of a budget, the share of units, by number, that get the second format of the palette.
        palette: names of the formats; with ``gamma`` two, the base first. Default: ``fp8_row``, ``nvfp4``; of kernels
            ``bf16``, ``int8_row``, ``int4_g32``.
        metric: of `tenfold.compress.fpx.losses`. Default: ``fisher``.
        codec: whose formats these are: the references; those of GGUF files, whose bytes are then counted: norms in
            float32, and the gaps between tensors; or ``kernels``, those that `tenfold.compress.fpx.packing.pack` stores
            weights in.
        fused: plan queries, keys and values together, and gate and up, and leave embeddings and heads as they are, as
            vLLM needs it: `tenfold.models.vllm_folder.write_compressed_tensors`.
        paper: the published algorithm: FP8 and FP4 with a scale for each tensor, linear layers of the blocks alone,
            ``relative_l2``, and ``gamma``.
        tokenizer: that goes into the GGUF file; with it the file's metadata counts, too.
        seed: of the labels for ``fisher``.
        tell: hears of the batches.

    Raises:
        ConfigError: no budget or two, one that is too small (names the smallest), a time of formats that have no
            kernel, an unknown format.
        DataError: no token.
        ModelError: a model that cannot be planned; as `tenfold.compress.fpx.units.units_of` and `unit_losses`.

    >>> import torch
    >>> from tenfold.models.tiny import tiny_model
    >>> ids = torch.randint(6, 262, (64,), generator=torch.Generator().manual_seed(0))
    >>> found = plan(tiny_model("llama").model, [ids], budget="6bits")
    >>> found.bits <= 6, sorted(set(found.formats.values())), found.replan("8.5bits").loss < found.loss
    (True, ['fp8_row', 'nvfp4'], True)
    """
    if paper and (gamma is None or palette or metric or fused or codec != "reference"):
        raise ConfigError(
            "paper: the published algorithm has its own formats, metric and layers, and no budget but gamma",
            remedy="give gamma and leave out palette, metric, codec and fused; or leave out paper",
        )
    names = tuple(palette or (PAPER_PALETTE if paper else KERNEL_PALETTE if codec == "kernels" else PALETTE))
    forms = [format_of(name, codec) for name in names]
    if len(set(names)) < len(names):
        raise ConfigError(f"palette: {', '.join(names)} names a format twice", remedy="name each once")
    _amount(budget, gamma, len(names), codec)  # before anything is measured
    refuse_simulated(model, "plan", "remove the plan first")
    units = units_of(model, fused=fused, blocks_only=paper or fused)
    timed_on, rest, seconds = _timed(model, units, names) if codec == "kernels" else ("", 0.0, {})
    kept = kept_by(model, units)
    extra, align = _of_file(model, units, forms[0], kept, tokenizer) if codec == "gguf" else (0, 1)
    how: MetricName = metric or ("relative_l2" if paper else "fisher")
    losses = unit_losses(model, passages, units, forms, how, seed=seed, tell=tell)
    planned = (
        PlannedUnit(
            unit.name,
            names[0],
            unit.weights,
            tuple(
                FormatScore(form.name, loss, stored_size(form, unit, align), seconds.get((unit.name, form.name), 0.0))
                for form, loss in zip(forms, losses[unit.name], strict=True)
            ),
        )
        for unit in units
    )
    return Plan(
        model=model.config.get_text_config().model_type,
        weights_hash=weights_digest(model),
        calibration_hash=tokens_digest(passages),
        tokens=sum(map(len, passages)),
        metric=how,
        codec=codec,
        palette=names,
        budget="",
        paper=paper,
        extra_bytes=extra,
        units=tuple(planned),
        kept=kept,
        timed_on=timed_on,
        rest_seconds=rest,
    ).replan(budget, gamma=gamma)


def _timed(
    model: Any, units: tuple[Unit, ...], names: Sequence[str]
) -> tuple[str, float, dict[tuple[str, str], float]]:
    """Where kernels are timed, seconds of a token beside the units, and those of each unit in each format."""
    refuse_unpackable(dict(plain_modules(model)), units)
    seconds = {(unit.name, name): unit_seconds(model, unit, name) for unit in units for name in names}
    return machine(input_device(model)), rest_seconds(model, units), seconds


def _of_file(
    model: Any, units: Sequence[Unit], form: WeightFormat, kept: Sequence[Kept], tokenizer: Any
) -> tuple[int, int]:
    """What a GGUF file takes beside its matrices and what is kept as the model has it; and the grid of its tensors."""
    sizes = gguf_sizes(model, form.name, tokenizer)
    whole = sizes.tensor_bytes if tokenizer is None else sizes.total
    matrices = sum(stored_size(form, unit, ALIGNMENT) for unit in units)
    return whole - matrices - sum(each.bytes for each in kept), ALIGNMENT


def _choices(plan: Plan, budget: str | None, gamma: float | None) -> list[int]:
    """The place in the palette of each unit's format."""
    amount = _amount(budget, gamma, len(plan.palette), plan.codec)
    losses = [[each.loss for each in unit.candidates] for unit in plan.units]
    if amount is None:
        assert gamma is not None
        # The paper looks at the low format alone; of losses that add up, it is what the change to it costs.
        errors = [low if plan.paper else low - base for base, low in losses]
        low = set(most_tolerant(errors, gamma))
        return [int(place in low) for place in range(len(losses))]
    if amount.unit == "seconds":
        return _within_time(plan, losses, amount.amount)
    costs = [[each.bytes for each in unit.candidates] for unit in plan.units]
    allowed = math.floor(amount.amount * (plan.numbers / 8 if amount.unit == "bits" else 1) + 1e-9)
    least = sum(map(min, costs)) + _fixed_bytes(plan)
    if allowed < least:
        raise too_small(str(budget), allowed, least, plan.numbers, plan.palette)
    return solve(losses, costs, allowed - _fixed_bytes(plan))


def _within_time(plan: Plan, losses: Sequence[Sequence[float]], seconds: float) -> list[int]:
    """In whole nanoseconds, whose sums are exact."""
    costs = [[math.ceil(1e9 * each.seconds) for each in unit.candidates] for unit in plan.units]
    rest = math.ceil(1e9 * plan.rest_seconds)
    allowed, least = math.floor(1e9 * seconds + 1e-3) - rest, sum(map(min, costs))
    if allowed < least:
        raise ConfigError(
            f"budget: the fastest plan of {', '.join(plan.palette)} takes {(rest + least) / 1e6:.4g} ms a token, "
            f"{rest / 1e6:.4g} of them beside its matrices, and {1e3 * seconds:g} ms are given",
            remedy=f"give {math.ceil((rest + least) / 1e4) / 100:g}ms or more, or a palette with a faster format",
        )
    return solve(losses, costs, allowed)


def too_small(budget: str, allowed: int, least: int, numbers: int, palette: Sequence[str]) -> ConfigError:
    """That no plan fits into a budget, and which would.

    Args:
        budget: as it was asked for.
        allowed: bytes that it is.
        least: bytes of the smallest plan.
        numbers: of the model.
        palette: of the plan.
    """
    bits = math.ceil(800 * least / numbers) / 100
    return ConfigError(
        f"budget: {budget} is {allowed:,} bytes, and the smallest plan of {', '.join(palette)} takes {least:,}",
        remedy=f"give {bits:g}bits or more, or a palette with a smaller format",
    )


def _amount(budget: str | None, gamma: float | None, formats: int, codec: Codec) -> Budget | None:
    """What may be spent; None where gamma says it."""
    if (budget is None) == (gamma is None):
        raise ConfigError("budget, gamma: give one of them", remedy=f"{_FORMS}; or give gamma from 0 to 1")
    if budget is None:
        if formats != 2:
            raise ConfigError(f"gamma: a share between two formats, and the palette has {formats}", "give two formats")
        return None
    try:
        amount = parse_budget(budget)
    except ValueError as error:
        raise ConfigError(f"budget: {error}", remedy=_FORMS) from error
    if amount.unit == "seconds" and codec != "kernels":
        raise ConfigError(
            f"budget: {budget}: a time needs formats that kernels here multiply in (codec='kernels')",
            remedy=f"{_FORMS}: decoding takes time in proportion to the bytes that are read",
        )
    if amount.unit not in ("bits", "bytes", "seconds"):
        raise ConfigError(f"budget: a plan spends bytes, bits or a time, not {budget!r}", remedy=_FORMS)
    return amount


def _fixed_bytes(plan: Plan) -> int:
    return plan.extra_bytes + sum(each.bytes for each in plan.kept)
