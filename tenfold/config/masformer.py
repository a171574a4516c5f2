"""MASFormer: which layers keep full attention, and what the others see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tenfold.config.budget import LayerBudget, parse_budget
from tenfold.config.data import DataFields
from tenfold.config.shape import Shape
from tenfold.config.stage import ArtefactKind, RowsRead, check_kind
from tenfold.errors import ConfigError


class MasformerConfig(DataFields):
    """Full attention in a few layers, local attention in the rest (Zhang et al. 2023, arXiv 2310.12442).

    ``data`` has texts: layers are profiled on passages of its first part, and the model is measured on the rest.
    """

    verb = "lengthen"
    summary = "MASFormer: full attention where it matters, local attention in the other layers"
    verb_summary = "local attention in most layers: long context at near-linear cost"
    examples = ("tenfold lengthen demo --data python-reference --budget 25% --window 256 --out runs/long",)
    reads: ClassVar[tuple[str, ...]] = ("text",)
    makes: ClassVar[Mapping[str, ArtefactKind]] = {"model": "model"}
    run = "tenfold.attend.masformer.stage:run_masformer"

    budget: LayerBudget = "25%"
    """Layers, or heads, that keep full attention: a share of all, or a count such as ``6``. Raise it where ``copying``
    or ``needle`` suffers, lower it for cheaper long contexts."""
    by: Literal["layers", "heads"] = "layers"
    """Whether whole layers keep full attention or single KV heads, which ``profile`` alone can find (not in the paper).
    ``heads`` spends a small budget in finer parts."""
    full_layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """The layers themselves, counted from 0, instead of ``budget`` and ``placement``; for layers that are known
    already."""
    placement: Literal["profile", "bottom", "top", "middle", "interleave"] = "profile"
    """Which layers: ``profile`` finds those that lose most; the paper's is ``bottom``, with training afterwards. Turn
    it to repeat the paper, or to compare."""
    pattern: Literal["sliding", "block"] = "sliding"
    """``sliding``: the last ``window`` tokens; ``block``: the own block of ``window`` tokens and ``previous`` before it
    (the paper's). Turn it to repeat the paper."""
    window: Annotated[int, Field(ge=1)] = 1024
    """Span in tokens, the token itself among them. Sensible: 64 to 4096. Raise it where perplexity suffers, lower it
    for speed and smaller caches."""
    previous: Annotated[int, Field(ge=0)] = 1
    """Blocks to the left that a token sees; ``block`` only. 0 sees the own block alone, which is the cheapest; raise it
    where perplexity suffers."""
    sinks: Annotated[int, Field(ge=0)] = 4
    """First tokens that every token sees (not in the paper; decisive without training); 0 repeats the paper, and is
    what a folder that plain transformers opens must have."""
    passages: Annotated[int, Field(ge=1)] = 3
    """Texts that layers are profiled on, and as many that the model is measured on; raise it where two profiles of one
    model disagree."""
    passage: Annotated[int, Field(ge=8)] = 384
    """Tokens of a passage that comes twice; the second copy is scored, which needs copying from afar. Shorten it for
    models that read few tokens, or where profiling takes too long."""
    between: Annotated[int, Field(ge=1)] | None = None
    """Tokens between the copies. Default: so many that no local layer reaches from the second to the first. Give fewer
    where the two copies do not fit what the model can read."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.by == "heads" and (self.full_layers is not None or self.placement != "profile"):
            raise ValueError("by: heads are found by placement profile: leave full_layers and placement out")
        if self.full_layers is not None and ("placement" in self.model_fields_set or "budget" in self.model_fields_set):
            # A resolved recipe spells defaults out, so what counts is whether a value is another one.
            for key in ("placement", "budget"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key}: full_layers names the layers already: leave {key} out")
        return self

    def check(self, rows: RowsRead | None) -> None:
        """Texts to profile layers on."""
        check_kind(rows, self.reads, "profiling layers")

    def applied_to(self, shape: Shape) -> Shape:
        """Layers must be there, and passages within what the model can read."""
        layers = shape.layers
        if shape.spans is not None:
            raise ConfigError(f"{shape.name} has local spans already", remedy="start from the model before it got them")
        if layers is not None:
            if wrong := [layer for layer in self.full_layers or () if layer >= layers]:
                raise ConfigError(
                    f"full_layers: {wrong[0]}; the model has layers 0 to {layers - 1}", remedy="correct the layer"
                )
            if self.full_layers is None and (self.by == "layers" or shape.kv_heads is not None):
                self.count(layers * (shape.kv_heads or 1 if self.by == "heads" else 1))
        reach = self.window - 1 if self.pattern == "sliding" else (self.previous + 1) * self.window - 1
        between = self.between or max(self.passage, reach)
        what = f" tokens, twice and {between} between,"
        if shape.positions is not None and 2 * self.passage + between > shape.positions:
            raise ConfigError(
                f"passage: {self.passage}{what} are more than the {shape.positions} positions that the model has",
                remedy="give a shorter passage, a smaller window, or between",
            )
        known = {} if self.full_layers is None else {"full_layers": list(self.full_layers)}
        return replace(shape, adapted=False, spans={"pattern": self.pattern, "sinks": self.sinks, **known})

    def count(self, layers: int) -> int:
        """Layers, or heads, of full attention out of so many: at most what the budget says, one at least.

        >>> MasformerConfig(budget="25%").count(30), MasformerConfig(budget="6").count(30)
        (7, 6)
        """
        budget = parse_budget(self.budget)
        # A share that buys something buys one at least; the sum keeps 0.29 * 100 from becoming 28.
        count = (
            max(budget.amount > 0, int(budget.amount * layers + 1e-9)) if budget.unit == "share" else int(budget.amount)
        )
        if count > layers:
            raise ConfigError(
                f"budget: {self.budget} is {count} {self.by} of {layers}", remedy=f"give at most {layers}"
            )
        return count
