"""A model that is named and not yet opened: what recipes carry from stage to stage."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenfold.config.shape import Load, Task
from tenfold.models.opened import Opened
from tenfold.models.source import content_hash, resolve_source, weights_hash


@dataclass(frozen=True)
class ModelRef:
    """Everything `open_model` needs, as plain values that can be compared, stored and sent to another process.

    Args:
        source: ``demo``, a hub id, a folder, a GGUF file, an adapter folder or ``tiny:<kind>``.
        task: ``causal``, ``seq2seq``, ``classification`` or ``reward``.
        dtype: name of a floating-point type. Default: as `open_model`.
        load: ``4bit`` or ``8bit``, to pack the weights on opening.
        device: Default: as `open_model`.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run code that comes with the model.
        adapters: PEFT folders on top of the source, in order.

    >>> ModelRef("demo").with_adapter("runs/first/1-lora/adapter").adapters
    ('runs/first/1-lora/adapter',)
    """

    source: str
    task: Task = "causal"
    dtype: str | None = None
    load: Load | None = None
    device: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    adapters: tuple[str, ...] = ()

    def open(self, merge: bool = False) -> Opened:
        """Open the model.

        Args:
            merge: add the last adapter into the weights too, if there is one: a plain ``transformers`` model. Weights
                that are packed are so afterwards.

        Raises:
            ModelError: as `open_model`.
        """
        from tenfold.models.open import open_model

        return open_model(**dataclasses.asdict(self), merged=merge)

    def tokenizer(self) -> Any:
        """Its tokenizer alone; no weights are loaded.

        Raises:
            ModelError: as `open_model`.
        """
        from tenfold.models.open import open_tokenizer

        return open_tokenizer(
            self.source,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            adapters=self.adapters,
        )

    def with_adapter(self, folder: str | Path) -> ModelRef:
        """The same model with one more adapter on top."""
        return dataclasses.replace(self, adapters=(*self.adapters, str(folder)))

    def identity(self) -> dict[str, Any]:
        """What decides the outputs of this model, for the fingerprint of a run; no weights are loaded.

        Returns:
            ``weights`` (a hash of the base), ``adapters`` (one hash each, in order), ``task``, ``dtype`` and, where
            weights are packed on opening, ``load``. Paths are not part of it: a run folder that was moved is still the
            same run.

        Raises:
            ModelError: the source or an adapter is missing or damaged, or the hub cannot be reached.

        >>> sorted(ModelRef("tiny:llama").identity())
        ['adapters', 'dtype', 'task', 'weights']
        """
        located, _, chain = resolve_source(self.source, self.adapters)
        return {
            "weights": weights_hash(located, self.revision),
            "adapters": [content_hash(folder) for folder in chain],
            "task": self.task,
            "dtype": self.dtype,
            **({"load": self.load} if self.load is not None else {}),
        }
