"""What a model's configuration says without a weight: enough to see whether a stage can work on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tenfold.errors import ConfigError

Task = Literal["causal", "seq2seq", "classification", "reward"]
"""What a model's head is for."""

Load = Literal["4bit", "8bit"]
"""What the weights are packed into when a model is opened."""


@dataclass(frozen=True)
class Shape:
    """A model as a stage finds it; None where its configuration does not say.

    Args:
        name: as the user calls it.
        model_type: as transformers names the architecture.
        layers: blocks of the decoder.
        hidden: width of the residual stream.
        heads: query heads of a layer.
        kv_heads: key and value heads of a layer.
        vocabulary: rows of the embedding.
        positions: tokens that the model was built for.
        task: what its head is for.
        adapted: whether an adapter is on it.
        spans: the table of local spans of a converted model.
        quantised: how the weights are packed: ``4bit`` or ``8bit`` on opening, or the method of files that are so
            already, such as ``gptq``.
    """

    name: str
    model_type: str = ""
    layers: int | None = None
    hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    vocabulary: int | None = None
    positions: int | None = None
    task: Task = "causal"
    adapted: bool = False
    spans: Mapping[str, Any] | None = None
    quantised: str | None = None
    compressed: bool = False

    def check_positions(self, key: str, tokens: int, what: str = "") -> None:
        """Refuse more tokens than the model was built for.

        Raises:
            ConfigError: naming the key and the most that is possible.

        >>> Shape("tiny", positions=512).check_positions("max_length", 512)
        """
        if self.positions is not None and tokens > self.positions:
            raise ConfigError(
                f"{key}: {tokens}{what} is above the {self.positions} positions that the model has",
                remedy=f"give {self.positions} or less" if not what else f"give a smaller {key}",
            )

    def check_plain(self, what: str) -> None:
        """Refuse compressed layers and local spans, which other programs do not know.

        Args:
            what: knows none of them.

        Raises:
            ConfigError: naming what is there.

        >>> Shape("base").check_plain("GGUF")
        """
        if self.compressed:
            raise ConfigError(
                f"the layers of {self.name} are compressed, and {what} knows none of that kind",
                remedy="write it as dense first (`tenfold export --form dense`)",
            )
        if self.spans is not None:
            raise ConfigError(
                f"{self.name} has local spans, and {what} knows none that differ from head to head",
                remedy="take the model from before it was lengthened",
            )

    def check_mergeable(self) -> None:
        """Refuse an adapter that is to be added to weights that the files themselves hold packed.

        Weights that are packed on opening (``load``) have whole ones behind them, to which it is added.

        Raises:
            ConfigError: naming how they are packed.

        >>> Shape("base", adapted=True, quantised="4bit").check_mergeable()
        """
        if self.adapted and self.quantised not in (None, *get_args(Load)):
            raise ConfigError(
                f"the files of {self.name} hold quantised weights ({self.quantised}), and an adapter cannot be added "
                "to those",
                remedy="start from the unquantised model with load: 4bit, or keep one adapter (form: adapter)",
            )

    def check_rank(self, rank: float) -> None:
        """Refuse a rank that no matrix of the model can have.

        Raises:
            ConfigError: naming the width.
        """
        if self.hidden is not None and rank > self.hidden:
            raise ConfigError(
                f"rank: {rank:g} is above the width of the model, {self.hidden}, where an update is free of any limit",
                remedy="give a rank far below it, such as 8, or train all weights (use: full)",
            )
