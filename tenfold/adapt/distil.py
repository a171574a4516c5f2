r"""Distillation of hidden states: a converted model learns to think what it thought before, without any label.

The distance of a token in a layer is relative, :math:`\lVert h - h^*\rVert^2 / \lVert h^*\rVert^2`, so that layers
and tokens of large norm do not rule. The teacher is the model itself with full attention and without its adapter; only
where all weights are trained is it a copy. MASFormer specification, section 8.6.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from tenfold.attend.masformer.conversion import full_attention
from tenfold.attend.spans import FIELD
from tenfold.data.encode import IGNORED
from tenfold.errors import ConfigError
from tenfold.models.inference import evaluating, input_device, takes_logits_to_keep

Teacher = Callable[[dict[str, Tensor]], Sequence[Tensor]]
"""From the inputs of a batch to hidden states, one ``[batch, tokens, channels]`` for each layer."""


def unconverted(model: Any) -> Teacher:
    """The teacher of a converted model: what it computes with full attention everywhere, as it is now.

    Args:
        model: converted by `tenfold.attend.masformer.convert`, with a PEFT adapter that is going to be trained, or with
            all of its weights trainable; then a frozen copy is taken.

    Raises:
        ConfigError: the model has no spans.

    >>> from tenfold.attend import masformer
    >>> from tenfold.kernels.local import AttentionWindow
    >>> from tenfold.models.tiny import tiny_model
    >>> model = tiny_model("llama").model
    >>> handle = masformer.convert(model, full_layers=[0], span=AttentionWindow("sliding", 8))
    >>> [tuple(states.shape) for states in unconverted(model)({"input_ids": torch.arange(5, 25)[None]})]
    [(1, 20, 64), (1, 20, 64)]
    """
    if getattr(model.config.get_text_config(decoder=True), FIELD, None) is None:
        raise ConfigError(
            "distil: the model has no local spans, so it has nothing to learn from itself",
            remedy="put a stage masformer before this one, or leave distil out",
        )
    adapted = hasattr(model, "disable_adapter")
    teacher: Any = model if adapted else copy.deepcopy(model).requires_grad_(False)
    without: Callable[[], AbstractContextManager[Any]] = model.disable_adapter if adapted else nullcontext

    def states(inputs: dict[str, Tensor]) -> Sequence[Tensor]:
        with evaluating(teacher), without(), full_attention(teacher):
            return states_to_match(teacher, inputs)

    return states


def keeps_apart(model: Any, *, converted: bool = False) -> bool:
    """Whether a model sees where packed rows begin, by positions that begin again: tried on two short rows.

    Args:
        model: a causal language model.
        converted: whether it has to hold for the teacher of a converted model as well.

    >>> from tenfold.models.tiny import tiny_model
    >>> keeps_apart(tiny_model("llama").model)
    True
    """
    ids = torch.arange(3, 19, device=input_device(model))[None]
    positions = torch.arange(8, device=ids.device).repeat(2)[None]
    with evaluating(model), full_attention(model) if converted else nullcontext():
        try:
            packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 8:].float()
        except TypeError:  # it takes no positions
            return False
        alone = model(input_ids=ids[:, 8:], use_cache=False).logits.float()
    same = torch.allclose(packed, alone, atol=1e-2 * float(alone.std()))
    return same and (not converted or keeps_apart(model))


def states_to_match(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """What comes out of each layer, ``[batch, tokens, channels]``; of the last one after the final norm."""
    given = {key: value for key, value in inputs.items() if key != "labels"}
    keep = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}
    output = model(**given, output_hidden_states=True, use_cache=False, **keep)
    states: tuple[Tensor, ...] = output.hidden_states[1:]
    return states


def distance(states: Sequence[Tensor], wanted: Sequence[Tensor], seen: Tensor) -> Tensor:
    """Mean relative squared distance of hidden states; with a gradient for ``states``.

    Args:
        states: ``[batch, tokens, channels]`` of each layer.
        wanted: the teacher's.
        seen: which tokens count, ``[batch, tokens]``, bool.

    Returns:
        A number; 0 where all are equal, 1 where ``states`` are 0.

    >>> wanted = torch.ones(1, 2, 3)
    >>> distance([0 * wanted, wanted], [wanted, wanted], torch.tensor([[True, True]]))
    tensor(0.5000)
    """
    layers = []
    for state, target in zip(states, wanted, strict=True):
        target = target[seen].float()
        gap = (state[seen].float() - target).square().sum(-1)
        layers.append((gap / target.square().sum(-1).clamp(min=1e-12)).mean())
    return torch.stack(layers).mean()


class DistilTrainer(Trainer):
    """transformers' Trainer on a loss that is partly, or all, the distance to a teacher's hidden states.

    Args:
        *args: of the Trainer.
        teacher: see `unconverted`; made before training.
        share: of the distance in the loss, above 0 and up to 1; the rest is the loss on the labels.
        **kwargs: of the Trainer.
    """

    # Both parts are means over the batch, so the Trainer divides by the number of accumulated batches.
    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, teacher: Teacher, share: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.share = teacher, share

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch, as the Trainer asks for it."""
        wanted = self.teacher(inputs)
        if "attention_mask" in inputs:
            seen = inputs["attention_mask"].bool()
        elif "labels" in inputs:  # a batch of packed rows has no mask; there padding shows by having no label
            seen = inputs["labels"] != IGNORED
        else:
            seen = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
        if self.share == 1:
            outputs: Any = {}
            loss = distance(states_to_match(model, inputs), wanted, seen)
        else:
            outputs = model(**inputs, output_hidden_states=True, use_cache=False)
            apart = distance(outputs.hidden_states[1:], wanted, seen)
            loss = torch.lerp(outputs.loss.float(), apart, self.share)
        return (loss, outputs) if return_outputs else loss
