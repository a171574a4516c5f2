"""The adapter in SVD form, as one of PEFT's LoRA layers."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from peft import LoraConfig as PeftLoraConfig
from peft.tuners import lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tenfold.adapt.cutting import replace_data
from tenfold.errors import ModelError

ADAPTER = "default"
"""The name under which PEFT, the Trainer and TRL keep the adapter that is trained."""


class Triplets(nn.Module):
    r"""What stands in the place of LoRA's B: :math:`z\mapsto P(\lambda\odot z)`.

    Multiplying the ``rank`` numbers of each token is cheaper than multiplying Q or P. As LoRA's B the product
    :math:`P\,\mathrm{diag}(\lambda)` appears under ``weight``: PEFT merges it, and plain LoRA readers of a saved
    folder find it, while P and lambda are saved beside it so that training goes on exactly.

    Args:
        like: B as PEFT made it, ``[out, rank]``; its type and device are taken.
    """

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.zeros_like(like))
        """P, ``[out, rank]``."""
        self.singular = nn.Parameter(like.new_zeros(like.shape[1], 1))
        """Lambda, ``[rank, 1]``."""
        self.bias = None
        self.loaded = False
        """Whether its values came from a file."""

    @property
    def weight(self) -> Tensor:
        """B = P diag(lambda), ``[out, rank]``."""
        return self.left * self.singular.mT

    def forward(self, z: Tensor) -> Tensor:
        """Map ``[..., rank]`` to ``[..., out]``."""
        return nn.functional.linear(z * self.singular.flatten(), self.left)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        B = state_dict.pop(prefix + "weight", None)
        if B is not None and prefix + "left" not in state_dict:
            # A plain LoRA: columns of length 1, and their lengths as lambda.
            length = B.norm(dim=0)
            state_dict[prefix + "left"] = B / length.clamp_min(torch.finfo(B.dtype).tiny)
            state_dict[prefix + "singular"] = length[:, None]
        self.loaded = prefix + "left" in state_dict
        super()._load_from_state_dict(state_dict, prefix, *args)


class SvdLinear(lora.Linear):
    r"""A linear layer plus :math:`\frac{\alpha}{r_0}P\,\mathrm{diag}(\lambda)\,Q`; Q is LoRA's A.

    The base may be any layer that maps ``in_features`` to ``out_features``, also a quantised one: only its output is
    used, except to merge.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: PeftLoraConfig, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: PeftLoraConfig, **kwargs: Any) -> None:
        """PEFT's way to add an adapter, called for every name (TRL adds a frozen copy as the reference model)."""
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)
        self.lora_B[adapter_name] = Triplets(self.lora_B[adapter_name].weight)
        initialise(self, adapter_name, "normal")
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the update to the base weight, as PEFT does.

        Raises:
            ModelError: a base whose weight is not stored as floating-point numbers.
        """
        weight = getattr(self.get_base_layer(), "weight", None)
        if weight is None or not weight.is_floating_point():
            raise ModelError(
                f"{type(self.get_base_layer()).__name__}: its weight is quantised, so the adapter cannot be merged",
                remedy="export the adapter, and merge it into the model in its original precision",
            )
        super().merge(safe_merge, adapter_names)

    def resize(self, adapter_name: str, rank: int) -> None:
        """Make room for other numbers of triplets; their values are undefined until they are loaded."""
        A, B = self.lora_A[adapter_name], self.lora_B[adapter_name]
        replace_data(A.weight, A.weight.new_empty(rank, A.in_features))
        replace_data(B.left, B.left.new_empty(B.left.shape[0], rank))
        replace_data(B.singular, B.singular.new_empty(rank, 1))
        self.set_rank(adapter_name, rank)

    def set_rank(self, adapter_name: str, rank: int) -> None:
        """Tell PEFT a new rank at the same scale."""
        self.lora_A[adapter_name].out_features = rank
        self.r[adapter_name] = rank
        self.lora_alpha[adapter_name] = self.scaling[adapter_name] * rank

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A checkpoint from the final phase holds only the triplets that are left.
        for name, A in self.lora_A.items():
            saved = state_dict.get(f"{prefix}lora_A.{name}.weight")
            if saved is not None and saved.shape[0] != A.weight.shape[0]:
                self.resize(name, saved.shape[0])
        super()._load_from_state_dict(state_dict, prefix, *args)


@torch.no_grad()
def initialise(layer: SvdLinear, adapter_name: str, kind: Literal["lora", "normal", "orthonormal"]) -> None:
    """Fill P, lambda and Q so that the layer still computes what its base does.

    Args:
        layer: to fill.
        adapter_name: which adapter of it.
        kind: ``lora``: P is 0, lambda is 1 and Q is drawn as LoRA's A, so that the first steps are LoRA's. Otherwise
            lambda is 0, and P and Q are normal with standard deviation 0.02, or have orthonormal columns and rows.
    """
    P, Q = layer.lora_B[adapter_name].left, layer.lora_A[adapter_name].weight
    singular = layer.lora_B[adapter_name].singular
    singular.fill_(float(kind == "lora"))
    if kind == "lora":
        nn.init.kaiming_uniform_(Q, a=math.sqrt(5))  # as PEFT draws it
        P.zero_()
        return
    for factor in (Q, P):
        if kind == "normal":
            nn.init.normal_(factor, std=0.02)
        else:
            nn.init.orthogonal_(factor)
