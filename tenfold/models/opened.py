"""What opening a model gives, whatever it was opened from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from tenfold.config.shape import Task
from tenfold.errors import ConfigError, ModelError
from tenfold.models.quantised import is_quantised, parameter_count, quantisation


@dataclass(frozen=True)
class Opened:
    """A model with its tokenizer and the facts that tell it from every other model.

    Args:
        model: a ``transformers`` model, or a ``peft.PeftModel`` when an adapter is attached; in evaluation mode.
        tokenizer: its tokenizer, always with a pad token.
        identity: ``source`` (as the caller gave it), ``resolved`` (the folder or hub id that was read), ``weights``
            (a hash of configuration, tokenizer and weights that does not depend on where the files lie),
            ``adapters`` (the same hash of each), ``parameters`` (a count, adapters included), ``dtype`` and, of
            quantised weights, ``quantised``.
        notes: sentences that the reader of a result must know, such as of tokens whose rows nothing holds.

    >>> from tenfold.models.tiny import tiny_model
    >>> opened = tiny_model("llama")
    >>> opened.identity["source"], opened.identity["dtype"]
    ('tiny:llama', 'float32')
    """

    model: Any
    tokenizer: Any
    identity: dict[str, Any]
    notes: tuple[str, ...] = ()


def check_task(task: str) -> None:
    """Refuse a task that no head exists for.

    Raises:
        ConfigError: naming the tasks there are.
    """
    if task not in get_args(Task):
        raise ConfigError(f"task: unknown task {task!r}", remedy=f"give one of: {', '.join(get_args(Task))}")


def describe(model: Any, source: str, resolved: str, weights: str, adapters: tuple[str, ...] = ()) -> dict[str, Any]:
    """The ``identity`` of an opened model; the arguments are its first entries, counts and dtype are read off."""
    return {
        "source": source,
        "resolved": resolved,
        "weights": weights,
        "adapters": list(adapters),
        "parameters": parameter_count(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        **({"quantised": quantisation(model)} if is_quantised(model) else {}),
    }


def settle_padding(model: Any, tokenizer: Any) -> None:
    """Make sure that batches can be padded, and that model and tokenizer agree on the pad token: the tokenizer's.

    That is what pads a batch, in training too, where TRL writes it into the configuration. A head for classification
    looks for the last token that is not the configuration's, so that two pad tokens are two rewards. In a composite
    configuration it is the text part that is read; the whole has the field in few architectures.

    A tokenizer without a pad token gets its end-of-sequence token as pad token, as is usual for decoders: the
    attention mask hides the padding, and labels must be masked by position, not by token. The padding side is left
    as it is; generation needs ``tokenizer.padding_side = "left"``, which is the caller's to set.

    Raises:
        ModelError: the tokenizer has neither token.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                "the tokenizer has neither a pad token nor an end-of-sequence token",
                remedy="set pad_token in its tokenizer_config.json",
            )
        tokenizer.pad_token = tokenizer.eos_token
    for config in (model.config.get_text_config(), model.config, getattr(model, "generation_config", None)):
        if config is not None and hasattr(config, "pad_token_id"):
            config.pad_token_id = tokenizer.pad_token_id
