"""Layers whose weight is packed: linear ones that multiply by torch's kernels, and embeddings that look up rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tenfold.compress.fpx.units import Unit
from tenfold.compress.losparse.unmade import UnmadeWeight
from tenfold.errors import ModelError
from tenfold.kernels.packed_choice import fastest, step_of
from tenfold.kernels.packed_matrix import Layout, PackedMatrix
from tenfold.kernels.packed_product import Kernel, packed_product

REMEDY = "open the model again, in its original precision"


class _Packed(nn.Module):
    """What both kinds hold: buffers of whole numbers, and the type that they compute in."""

    codes: Tensor
    scales: Tensor | None
    typed: Tensor
    _form: str
    _shape: tuple[int, int]
    _layout: Layout | None

    def _hold(self, matrix: PackedMatrix, dtype: torch.dtype) -> None:
        self._form, self._shape, self._layout = matrix.form, (matrix.out, matrix.inner), matrix.layout
        self.register_buffer("codes", matrix.codes)
        self.register_buffer("scales", matrix.scales)
        # Follows `.to(dtype)`, as the codes do not.
        self.register_buffer("typed", torch.empty(0, dtype=dtype, device=matrix.codes.device), persistent=False)

    @property
    def matrix(self) -> PackedMatrix:
        """The weight as it is stored."""
        held: dict[str, Any] = self._buffers
        return PackedMatrix(self._form, *self._shape, held["codes"], held["scales"], self._layout)

    def _expanded(self) -> Tensor:
        dtype = self.typed.dtype
        return UnmadeWeight(lambda: self.matrix.dense().to(dtype), self._shape, dtype, self.codes.device, REMEDY)


class CodedLinear(_Packed, nn.Linear):
    """A linear layer with a packed weight.

    To the libraries around it, it is a linear layer: PEFT puts adapters on it, which learn through it.

    Args:
        matrix: the weight.
        bias: ``[out]``.
        dtype: of inputs, as far as they are looked for.

    >>> from tenfold.kernels.packed_matrix import packed_format
    >>> layer = CodedLinear(packed_format("int8_row").pack(torch.eye(4)), None, torch.float32)
    >>> layer(torch.ones(2, 3, 4)).shape, layer.weight.shape
    (torch.Size([2, 3, 4]), torch.Size([4, 4]))
    """

    def __init__(self, matrix: PackedMatrix, bias: Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make the weight
        self.out_features, self.in_features = matrix.out, matrix.inner
        self._hold(matrix, dtype)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.kernels: tuple[Kernel, ...] = ()
        """For each of `tenfold.kernels.packed_choice.STEPS`; empty until they are looked for."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``; the bias is added to what the scales have been applied to."""
        x = input.reshape(-1, self.in_features)
        kernels = self.kernels or self.settle(input.dtype)
        found = packed_product(x, self.matrix, kernels[step_of(len(x))])
        bias = self._parameters["bias"]
        if bias is not None:
            found = found + bias.to(found.dtype)
        return found.view(*input.shape[:-1], self.out_features)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The matrix for those who know layers: of its shape and type, read-only, expanded when it is read."""
        return self._expanded()

    def settle(self, dtype: torch.dtype) -> tuple[Kernel, ...]:
        """Take the kernels that are fastest here, measured where this shape has not been yet."""
        self.kernels = fastest(self._form, self._shape, dtype, self.codes.device)
        return self.kernels

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """To another device: other kernels are there."""
        before = self.codes.device
        super()._apply(*args, **kwargs)
        if self.codes.device != before:
            self.kernels = ()
        return self

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._form}"


class CodedEmbedding(_Packed, nn.Embedding):
    """An embedding with packed rows.

    Args:
        matrix: the table.
        dtype: of what is looked up.
        scale: factor of it, as Gemma has one.

    >>> from tenfold.kernels.packed_matrix import packed_format
    >>> layer = CodedEmbedding(packed_format("bf16").pack(torch.eye(4)), torch.float32)
    >>> layer(torch.tensor([[2]]))
    tensor([[[0., 0., 1., 0.]]])
    """

    embed_scale: Tensor

    def __init__(self, matrix: PackedMatrix, dtype: torch.dtype, scale: Tensor | float = 1.0) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = matrix.out, matrix.inner
        self._hold(matrix, dtype)
        self.register_buffer("embed_scale", torch.as_tensor(scale), persistent=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The table, as the weight of `CodedLinear`."""
        return self._expanded()

    def forward(self, input: Tensor) -> Tensor:
        """Map ids ``[...]`` to ``[..., embedding_dim]``."""
        found = self.matrix.rows(input.reshape(-1)).to(self.typed.dtype)
        return (found * self.embed_scale.to(found.dtype)).view(*input.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of it."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._form}"


def refuse_unpackable(modules: Mapping[str, Any], units: Iterable[Unit]) -> None:
    """Refuse what no packed layer can stand for: it would be left as it is, or compute something else.

    Args:
        modules: of the plain model, by name.
        units: that are to be packed.

    Raises:
        ModelError: experts that are stacked in a parameter, or a module of another kind; names it.
    """
    for unit in units:
        for weight in unit.weights:
            if weight.count > 1:
                raise ModelError(
                    f"{weight.name}: no kernel here multiplies with {weight.count} matrices of one parameter",
                    remedy="plan the model for a file (codec='gguf'), or one whose experts are layers",
                )
        for name in unit.modules:
            if not (_is_linear(modules[name]) or _is_embedding(modules[name])):
                raise ModelError(
                    f"{name}: a {type(modules[name]).__name__} does more than multiply with a matrix or look up rows",
                    remedy="plan another model, or simulate the plan (fpx.apply)",
                )


def packed_like(module: Any, matrix: PackedMatrix) -> CodedLinear | CodedEmbedding:
    """The layer that takes a module's place, with its bias or scale and in its mode.

    Args:
        module: one that `refuse_unpackable` takes.
        matrix: its weight.
    """
    dtype = module.weight.dtype
    layer: CodedLinear | CodedEmbedding
    if isinstance(module, nn.Embedding):
        layer = CodedEmbedding(matrix, dtype, getattr(module, "embed_scale", 1.0))
    else:
        layer = CodedLinear(matrix, module.bias, dtype)
    return layer.train(module.training)


def _is_linear(module: Any) -> bool:
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def _is_embedding(module: Any) -> bool:
    plain = type(module) is nn.Embedding or hasattr(module, "embed_scale")
    return isinstance(module, nn.Embedding) and plain and module.max_norm is None
