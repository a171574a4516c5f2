r"""Distillation: a changed model learns to think, or to say, what it thought and said before, without any label.

The distance of a token in a layer is relative, :math:`\lVert h - h^*\rVert^2 / \lVert h^*\rVert^2`, so that layers
and tokens of large norm do not rule (MASFormer specification, section 8.6). What is said is compared by the divergence
of the predictions. The teacher of a converted model is the model itself with full attention and without its adapter;
only where all weights are trained is it a copy. Any other model can be one, such as the model before it was compressed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import Trainer

from tenfold.attend.masformer.conversion import full_attention
from tenfold.attend.spans import FIELD
from tenfold.data.encode import IGNORED
from tenfold.errors import ConfigError
from tenfold.models.inference import evaluating, input_device, takes_logits_to_keep


class Target(NamedTuple):
    """What a teacher makes of a batch.

    Args:
        states: hidden states, one ``[batch, tokens, channels]`` for each layer; empty where these are not compared.
        logits: ``[batch, tokens, vocabulary]``, or None where what is said is not compared.
    """

    states: Sequence[Tensor] = ()
    logits: Tensor | None = None


Teacher = Callable[[dict[str, Tensor]], Target]
"""From the inputs of a batch to what is to be learnt of them."""


def by_model(model: Any, *, states: bool = True, logits: bool = True) -> Teacher:
    """The teacher that a model is; its weights must stay as they are while another is trained.

    Args:
        model: of the same layers and vocabulary as the one that learns; what it was before it was compressed, for one.
        states: whether hidden states are to be learnt, of any number of layers.
        logits: whether predictions are.

    Raises:
        ConfigError: neither.

    >>> from tenfold.models.tiny import tiny_model
    >>> wanted = by_model(tiny_model("llama").model)({"input_ids": torch.arange(5, 25)[None]})
    >>> len(wanted.states), wanted.logits.shape[:2], wanted.logits.requires_grad
    (2, torch.Size([1, 20]), False)
    """
    if not states and not logits:
        raise ConfigError("distil: neither hidden states nor predictions are to be learnt", remedy="name one of them")

    def target(inputs: dict[str, Tensor]) -> Target:
        with evaluating(model):
            if not logits:
                return Target(states_to_match(model, inputs))
            given = {key: value for key, value in inputs.items() if key != "labels"}
            output = model(**given, output_hidden_states=states, use_cache=False)
            return Target(output.hidden_states[1:] if states else (), output.logits)

    return target


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
    >>> [tuple(states.shape) for states in unconverted(model)({"input_ids": torch.arange(5, 25)[None]}).states]
    [(1, 20, 64), (1, 20, 64)]
    """
    if not is_converted(model):
        raise ConfigError(
            "distil: the model has no local spans, so it has nothing to learn from itself",
            remedy="put a stage masformer before this one, or leave distil out",
        )
    adapted = hasattr(model, "disable_adapter")
    teacher: Any = model if adapted else copy.deepcopy(model).requires_grad_(False)
    without: Callable[[], AbstractContextManager[Any]] = model.disable_adapter if adapted else nullcontext

    def target(inputs: dict[str, Tensor]) -> Target:
        with evaluating(teacher), without(), full_attention(teacher):
            return Target(states_to_match(teacher, inputs))

    return target


def is_converted(model: Any) -> bool:
    """Whether a model has local spans that `tenfold.attend.masformer.convert` gave it."""
    return getattr(model.config.get_text_config(decoder=True), FIELD, None) is not None


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


TEMPERATURE = 2.0
"""That predictions are softened with before they are compared."""


def divergence(logits: Tensor, wanted: Tensor, seen: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    r"""Mean of :math:`T^2\,\mathrm{KL}(p^*_T\Vert p_T)` over tokens, in nats; with a gradient for ``logits``.

    The square keeps the gradient at the size that it has without softening (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        logits: ``[batch, tokens, vocabulary]``.
        wanted: the teacher's.
        seen: which tokens count, ``[batch, tokens]``, bool.
        temperature: :math:`T`, above 0; logits are divided by it.

    >>> wanted = torch.tensor([[[2.0, 0.0]]])
    >>> seen = torch.tensor([[True]])
    >>> divergence(wanted, wanted, seen).item(), round(divergence(0 * wanted, wanted, seen).item(), 3)
    (0.0, 0.444)
    """
    mine = (logits[seen].float() / temperature).log_softmax(-1)
    theirs = (wanted[seen].float() / temperature).log_softmax(-1)
    return temperature**2 * kl_div(mine, theirs, reduction="batchmean", log_target=True)


class DistilTrainer(Trainer):
    """transformers' Trainer on a loss that is partly, or all, the distance to what a teacher thinks and says.

    Args:
        *args: of the Trainer.
        teacher: see `unconverted` and `by_model`; made before training.
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
        if self.share == 1 and wanted.logits is None:
            outputs: Any = {}
            loss = distance(states_to_match(model, inputs), wanted.states, seen)
        else:
            given = inputs if self.share < 1 else {key: value for key, value in inputs.items() if key != "labels"}
            outputs = model(**given, output_hidden_states=len(wanted.states) > 0, use_cache=False)
            apart = self._apart(outputs, wanted, seen)
            loss = apart if self.share == 1 else torch.lerp(outputs.loss.float(), apart, self.share)
        return (loss, outputs) if return_outputs else loss

    @staticmethod
    def _apart(outputs: Any, wanted: Target, seen: Tensor) -> Tensor:
        parts = []
        if len(wanted.states):
            parts.append(distance(outputs.hidden_states[1:], wanted.states, seen))
        if wanted.logits is not None:
            parts.append(divergence(outputs.logits, wanted.logits, seen))
        return sum(parts[1:], parts[0])
