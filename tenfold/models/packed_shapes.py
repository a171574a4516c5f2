"""Stand-ins for the layers of a quantised model: their sizes and what they keep in memory, without bitsandbytes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from tenfold.config.shape import Load

SCALES = "packed_scales"
"""The buffer of a stand-in that stands for what its codes are multiplied by."""
BLOCK, BLOCK_OF_SCALES = 64, 256
"""Weights that share a scale in NF4, and scales that share one of their own (double quantisation)."""
TABLES = 4 * (16 + 256 + 1)
"""Bytes of the values that codes of weights and of scales stand for, and of the scales' offset; once a matrix."""


def with_packed_shapes(model: Any, load: Load) -> Any:
    """A model on the meta device with stand-ins where transformers packs the weights: all linear layers but the head.

    Args:
        model: a ``transformers`` model without storage; changed in place.
        load: ``4bit`` or ``8bit``.

    >>> from tenfold.models.tiny import tiny_model
    >>> model = with_packed_shapes(tiny_model("llama").model.to("meta"), "4bit")
    >>> model.model.layers[0].self_attn.q_proj.weight.nbytes, type(model.lm_head).__name__
    (2048, 'Linear')
    """
    kept = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
    for name, module in list(model.named_modules()):
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept):
            model.set_submodule(name, PackedLinear(module, load))
    return model


def predicted_bytes(model: nn.Module) -> int:
    """Bytes of all weights of a model on the meta device, with the scales of packed ones."""
    scales = [buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] == SCALES]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *scales))


class PackedLinear(nn.Linear):
    """A linear layer on the meta device that unpacks its weight for each product, forwards and backwards.

    Args:
        layer: the plain one.
        load: ``4bit`` or ``8bit``.
    """

    def __init__(self, layer: Any, load: Load) -> None:
        out, inner = layer.weight.shape if isinstance(layer, nn.Linear) else reversed(layer.weight.shape)
        super().__init__(inner, out, bias=layer.bias is not None, device="meta")
        count, codes = inner * out, {"4bit": (math.ceil(inner * out / 2), 1), "8bit": (out, inner)}[load]
        blocks = math.ceil(count / BLOCK)
        scales = blocks + 4 * math.ceil(blocks / BLOCK_OF_SCALES) + TABLES if load == "4bit" else 4 * out
        packed = torch.empty(codes, dtype=torch.uint8 if load == "4bit" else torch.int8, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = layer.bias
        self.register_buffer(SCALES, torch.empty(scales, dtype=torch.uint8, device="meta"))
        self.keeps_input = load == "8bit"  # LLM.int8() holds on to it, though only a trained weight would need it

    def forward(self, x: Tensor) -> Tensor:
        """Shapes as of any linear layer; values are none."""
        y: Tensor = _Product.apply(x, (self.out_features, self.in_features), self.keeps_input)
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int], keeps_input: bool) -> Tensor:
        ctx.shape = shape
        ctx.save_for_backward(*([x] if keeps_input else []))
        return x @ x.new_empty(shape).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient @ gradient.new_empty(ctx.shape), None, None
