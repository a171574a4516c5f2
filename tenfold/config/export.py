"""In which form a model leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tenfold.config.shape import Shape
from tenfold.config.stage import ArtefactKind, Needs, StageConfig, Takes
from tenfold.errors import ConfigError

VllmFormat = Literal[
    "fp8_row", "int8_row", "int8_row_a16", "int4_sym_g32", "int4_sym_g64", "int4_sym_g128", "nvfp4_a16"
]
"""What `tenfold.models.vllm_folder` writes."""


class ExportConfig(StageConfig):
    """Write a folder that transformers or PEFT opens without tenfold."""

    verb = "export"
    summary = "a folder that transformers or PEFT opens without tenfold"
    verb_summary = "write a folder that transformers or PEFT opens without tenfold"
    examples = (
        "tenfold export runs/quickstart/01-adalora/adapter --form merged --out runs/export",
        "tenfold export demo --form compressed-tensors --format fp8_row --out runs/packed",
    )
    needs: ClassVar[Needs] = Needs(task=("causal", "seq2seq", "classification", "reward"))
    run = "tenfold.models.stage:run_export"
    fits = "tenfold.models.stage:refuse_unwritable"

    form: Literal["merged", "adapter", "native", "dense", "compressed-tensors"] = "merged"
    """``merged``: a complete model with the adapters folded in. ``adapter``: the last adapter alone, which is small and
    needs its base. ``native``: a model with spans (MASFormer) in an architecture of transformers that knows them, for
    those who do not have tenfold. ``dense``: a compressed model (LoSparse) with plain layers again, as large as it was
    before, for those who do not have tenfold and for converters to other formats, such as GGUF.
    ``compressed-tensors``: packed weights for vLLM, in ``format`` or by ``plan``; embeddings and heads stay as they
    are."""
    format: VllmFormat | None = None
    """Of ``form: compressed-tensors``, the number format of all layers of the blocks. ``fp8_row`` and ``int8_row`` also
    round what layers read, ``_a16`` and ``int4`` weights alone, whose groups share a scale."""
    plan: Annotated[str | None, Takes(("plan",))] = None
    """Of ``form: compressed-tensors``, a plan that ``fpx.plan(..., fused=True)`` made of these weights: a format for
    each layer. Queries, keys and values get one, as do gate and up; where the plan has several, the most precise."""
    rows: Annotated[float, Field(ge=0, le=1)] | None = None
    """Of a model that was compressed with ``elastic: true`` (LoSparse), the share of its kept rows that stay, the most
    important ones. Lower it for a smaller model of the same folder. Default: all."""
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Number format of the merged weights. Default: that of the opened model. ``bfloat16`` halves the folder of a
    float32 model."""
    push_to_hub: str | None = None
    """Also upload the folder to this hub id (``user/name``), to share it; you must be logged in to the hub."""

    def artefacts(self) -> Mapping[str, ArtefactKind]:
        """A model or, alone, its last adapter."""
        return {"adapter": "adapter"} if self.form == "adapter" else {"model": "model"}

    def writes_weights(self) -> bool:
        """It opens the unpacked weights."""
        return False

    def needs_matrices(self, shape: Shape) -> bool:
        """Rows must divide by groups, and a plan be of this model."""
        return self.form == "compressed-tensors"

    def files(self) -> dict[str, Path]:
        """The plan, where it is a file."""
        return {} if self.plan is None or self.plan.startswith("${") else {"plan": Path(self.plan)}

    def leaves_model(self) -> bool:
        """An adapter that is only copied changes nothing for the stages that follow."""
        return self.form != "adapter"

    def applied_to(self, shape: Shape) -> Shape:
        """A form must be there to be written."""
        if self.form == "adapter" and not shape.adapted:
            raise ConfigError(f"form: {shape.name} carries no adapter", remedy="write form: merged, or adapt it first")
        if self.form != "adapter":
            shape.check_mergeable()
        if self.form == "native":
            _check_native(shape)
        if self.form == "compressed-tensors":
            shape.check_plain("vLLM")
        if self.form == "dense" and not shape.compressed:
            raise ConfigError(f"form: dense: {shape.name} has no compressed layers", remedy="write form: merged")
        if self.rows is not None and not shape.compressed:
            raise ConfigError(f"rows: {shape.name} has no compressed layers", remedy="leave rows out")
        if self.form == "adapter":
            return shape
        packed = self.form if self.form == "compressed-tensors" else shape.quantised
        return replace(shape, adapted=False, compressed=shape.compressed and self.form != "dense", quantised=packed)

    @model_validator(mode="after")
    def _keys_are_of_forms(self) -> Self:
        if self.rows is not None and self.form in ("adapter", "native", "compressed-tensors"):
            raise ValueError(f"rows: form: {self.form} has no compressed rows: write form: merged or dense")
        given = [key for key in ("format", "plan") if getattr(self, key) is not None]
        if self.form == "compressed-tensors" and len(given) != 1:
            raise ValueError("format, plan: form: compressed-tensors takes one of them: write format: fp8_row")
        if self.form != "compressed-tensors" and given:
            raise ValueError(f"{given[0]}: form: {self.form} packs nothing: write form: compressed-tensors")
        return self


def _check_native(shape: Shape) -> None:
    """What stock transformers has no layers for."""
    spans, remedy = shape.spans, "write form: merged, which keeps the spans for tenfold"
    if spans is None:
        raise ConfigError(f"form: native: {shape.name} has no local spans", remedy="write form: merged")
    if shape.compressed:
        raise ConfigError(
            f"form: native: the layers of {shape.name} are compressed, which stock transformers has no layers for",
            remedy="write form: dense, and that in form: native",
        )
    if spans.get("pattern", "sliding") != "sliding":
        raise ConfigError(f"form: native: stock layers know sliding windows, not pattern {spans['pattern']}", remedy)
    if spans.get("sinks"):
        raise ConfigError(
            f"form: native: a stock sliding window forgets the first tokens, and sinks is {spans['sinks']}",
            remedy="convert with sinks: 0, or write form: merged, which keeps the spans for tenfold",
        )
