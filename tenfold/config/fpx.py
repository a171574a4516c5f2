"""FPX: the number format of each matrix, chosen for a size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tenfold.config.budget import FileBudget, parse_budget
from tenfold.config.data import DataFields
from tenfold.config.shape import Shape
from tenfold.config.stage import ArtefactKind, RowsRead, Takes, check_kind

Metric = Literal["fisher", "kl", "relative_l2", "token_mean"]
GgufType = Literal[
    "f16", "bf16", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "iq4_nl", "iq4_xs", "mxfp4", "q3_k",
    "q2_k",
]  # fmt: skip
"""Those that can be written without knowing which inputs are large."""


class FpxConfig(DataFields):
    """FPX (Kang et al. 2025, arXiv 2505.19481): many bits where the model needs them, few where it does not.

    A pass over texts of yours says how much the loss would grow if one matrix alone were in a format, for each matrix
    and each format. One budget, of the whole file, then buys bits wherever they save most. What comes out is a GGUF
    file with a type for each tensor, which llama.cpp runs and which all stages here open.
    """

    verb = "compress"
    summary = "FPX: the number format of each matrix; a GGUF file of the size that you name"
    examples = (
        "tenfold compress demo --method fpx --data python-reference --budget 5bits --out runs/mixed",
        "tenfold compress demo --method fpx --data my.jsonl --budget 80MB --out runs/mixed",
    )
    reads = ("text", "completion", "chat")
    makes: ClassVar[Mapping[str, ArtefactKind]] = {"model": "model", "plan": "plan"}
    run = "tenfold.compress.fpx.stage:run_fpx"
    fits = "tenfold.compress.fpx.checks:refuse_unplannable"

    budget: FileBudget = "5bits"
    """What the file may hold: bytes (``80MB``, ``76MiB``) or bits for each weight (``5bits``). Every byte counts:
    scales, norms, the embedding, once where the head shares it. Never exceeded. Lower it for a smaller and faster file,
    raise it where the perplexity suffers; llama.cpp's Q4_K_M has about 5 bits."""
    palette: tuple[GgufType, ...] = ()
    """GGUF types to choose from, such as ``q4_k q6_k q8_0``. Default: those that llama.cpp has fast code for, with 2 to
    8 bits; rows that do not divide by a type's block get the nearest type that fits, and the report counts them. Name
    fewer where your device is slow with some."""
    metric: Metric = "fisher"
    """What says how much a matrix matters. ``fisher``: the squared error of its outputs, each weighed by how much the
    loss depends on it, from one backward pass. ``kl``: the change of the predictions themselves, which takes a forward
    pass for each matrix and format. ``relative_l2``: the error of its outputs relative to them (the paper), which
    overlooks matrices with a few huge outputs; ``token_mean``: the same, token by token."""
    calibration: Annotated[int, Field(ge=128)] = 2048
    """Tokens of the data that are looked at. Raise it where the report says that two plans differ little."""
    max_length: Annotated[int, Field(ge=2)] = 512
    """Tokens of a sequence. Raise it where your texts are long and memory allows."""
    batch_size: Annotated[int, Field(ge=1)] = 1
    """Sequences that are scored at once. Raise it on a GPU."""
    plan: Annotated[str | None, Takes(("plan",))] = None
    """The plan of an earlier run: its scores are used as they are, so that another budget costs no pass over the model.
    It must be of the same weights, and has its own palette and metric."""

    def needs_matrices(self, shape: Shape) -> bool:
        """The smallest file, and what GGUF has a place for."""
        return True

    def check(self, rows: RowsRead | None) -> None:
        """Rows to look at, of which some can be held out."""
        check_kind(rows, self.reads, "compressing")
        assert rows is not None
        rows.split(self.holdout)
        super().check(rows)

    def files(self) -> dict[str, Path]:
        """The plan, where it is a file."""
        return {} if self.plan is None or self.plan.startswith("${") else {"plan": Path(self.plan)}

    def applied_to(self, shape: Shape) -> Shape:
        """Whole weights of full attention, as llama.cpp knows them."""
        shape.check_plain("GGUF")
        shape.check_mergeable()
        shape.check_positions("max_length", self.max_length)
        return replace(shape, adapted=False)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if parse_budget(self.budget).amount <= 0:
            raise ValueError(f"budget: {self.budget} holds nothing: write 80MB or 5bits")
        for key in ("palette", "metric") if self.plan is not None else ():
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: the plan has its own: leave {key} out, or plan")
        return self
