"""Back from compressed layers to plain ones, for those who do not have tenfold."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tenfold.compress.losparse.layer import LowRankRowsLinear, compressed_layers, remark, replace_module
from tenfold.errors import ModelError


def to_dense(model: nn.Module) -> nn.Module:
    """Put plain layers in the place of the compressed ones; the model is then one of plain transformers.

    Args:
        model: changed in place; may have adapters on it.

    Returns:
        The model.

    Raises:
        ModelError: a layer was given a bias that plain models of this architecture do not have.
    """
    _check_biases(model)
    plain: dict[int, nn.Module] = {}
    weights: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, LowRankRowsLinear):
            continue
        if id(module) not in plain:
            if id(module.rows) not in weights:
                weight = module.dense_weight().detach()
                weight = weight.mT.contiguous() if module.kind == "conv1d" else weight
                weights[id(module.rows)] = nn.Parameter(weight, requires_grad=module.rows.requires_grad)
            plain[id(module)] = _plain(module, weights[id(module.rows)])
        replace_module(model, name, plain[id(module)])
        around = model.get_submodule(name.rpartition(".")[0])
        if isinstance(around, LoraLayer):
            around.fan_in_fan_out = module.kind == "conv1d"  # how an adapter on it is to be merged
    return remark(model)


def _check_biases(model: Any) -> None:
    biased = [name for name, layer in compressed_layers(model).items() if layer.bias is not None]
    own = model.get_base_model() if isinstance(model, PeftModel) else model
    if not biased or not isinstance(own, PreTrainedModel):
        return
    with torch.device("meta"):
        stock = dict(type(own)(copy.deepcopy(own.config)).named_modules())
    prefix = "base_model.model." if isinstance(model, PeftModel) else ""
    for name in biased:
        module = stock.get(name.removeprefix(prefix).removesuffix(".base_layer"))
        if getattr(module, "bias", None) is None:
            raise ModelError(
                f"{name}: has a bias, which a plain {own.config.model_type} model has not", "keep it compressed"
            )


def _plain(module: LowRankRowsLinear, weight: nn.Parameter) -> nn.Module:
    with torch.device("meta"):
        plain = (
            Conv1D(module.out_features, module.in_features)
            if module.kind == "conv1d"
            else nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        )
    plain.weight = weight
    if module.bias is not None or module.kind == "linear":
        plain.bias = module.bias
    return plain.train(module.training)
