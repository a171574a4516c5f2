"""Weights that the input embedding and the head share, and adapters that change only one of the two.

An adapter on one of them leaves the other as it was. To add it to the shared weight would change both, so each gets a
weight of its own first. ``peft`` 0.21.2 warns of this and merges all the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from tenfold.errors import ModelError


def untie(model: Any, targets: Collection[str] = ()) -> list[tuple[str, str]]:
    """Give tied layers a weight each where an adapter changes one of them; the outputs stay what they were.

    The configuration then says ``tie_word_embeddings: false``, so that a saved model opens untied everywhere. An
    encoder-decoder keeps its entry, which T5 and its kin also read to scale the decoder's output; ``transformers``
    does not tie saved weights that differ.

    Args:
        model: a ``transformers`` model, or a ``PeftModel`` around one.
        targets: names of modules that are about to be adapted, beside those that already are.

    Returns:
        The parameters that were one and are not any more, in pairs: the one that is a copy now and the one that was
        copied. It costs the memory of one embedding.

    Raises:
        ModelError: the shared weight is quantised, and its copy would not be the same layer.
    """
    from transformers import PreTrainedModel

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        return []
    # As they were before PEFT gave the layers other names. BERT's kin list the bias of the head beside its weight.
    named = base.all_tied_weights_keys.items()
    shared = [pair for pair in named if _parameter(base, pair[0]) is _parameter(base, pair[1])]
    modules = {name: name.rpartition(".")[0] for pair in shared for name in pair}
    changed = {name for name, at in modules.items() if at in targets or _adapted(base.get_submodule(at))}
    if not changed:
        return []
    if base.config.is_encoder_decoder:  # it goes on tying the others
        shared = [pair for pair in shared if changed.intersection(pair)]
    else:
        _set_entry(base, False)
    for target, source in shared:
        _set_parameter(base, target, _copy(_parameter(base, source), target))
    return shared


def tie_again(model: Any, pairs: list[tuple[str, str]]) -> None:
    """Undo `untie`, which returned these pairs, on a model whose adapters were taken off without merging."""
    for target, source in pairs:
        _set_parameter(model, target, _parameter(model, source))
    if pairs and not model.config.is_encoder_decoder:
        _set_entry(model, True)


@contextmanager
def tying_handled() -> Iterator[None]:
    """Without PEFT's warning of an adapter on tied weights, for code that calls `untie` itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        yield


def _layer(base: Any, name: str) -> Any:
    """The plain layer of this name, under whatever PEFT has put around it."""
    layer = base.get_submodule(name)
    while (inner := layer._modules.get("base_layer", layer._modules.get("original_module"))) is not None:
        layer = inner
    return layer


def _parameter(base: Any, name: str) -> Any:
    module, _, own = name.rpartition(".")
    return getattr(_layer(base, module), own)


def _set_parameter(base: Any, name: str, parameter: nn.Parameter) -> None:
    module, _, own = name.rpartition(".")
    setattr(_layer(base, module), own, parameter)


def _adapted(layer: nn.Module) -> bool:
    """Whether an adapter changes this layer alone. Trained tokens are ties' equals: PEFT gives them to both."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    return isinstance(layer, BaseTunerLayer | ModulesToSaveWrapper) and not isinstance(layer, TrainableTokensLayer)


def _copy(parameter: nn.Parameter, name: str) -> nn.Parameter:
    if not parameter.is_floating_point():
        raise ModelError(
            f"{name}: shares a quantised weight with the input embedding, so it cannot be adapted alone",
            remedy="leave it out of targets, or open the model in its original precision",
        )
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


def _set_entry(base: Any, tied: bool) -> None:
    from transformers import PreTrainedModel

    for config in (base.config, base.config.get_text_config()):
        if hasattr(config, "tie_word_embeddings"):
            config.tie_word_embeddings = tied
    for module in base.modules():
        if isinstance(module, PreTrainedModel):
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)
