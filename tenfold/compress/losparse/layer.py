"""A linear layer whose weight is low rank plus kept rows, stored as some of its own rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from scipy.linalg import qr, solve_triangular
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tenfold.compress.losparse.factors import Factors
from tenfold.compress.losparse.unmade import UnmadeWeight
from tenfold.errors import ModelError
from tenfold.kernels.low_rank_rows import product

Kind = Literal["linear", "conv1d"]


class LowRankRowsLinear(nn.Linear):
    """A linear layer of which ``rank + kept`` rows are stored; the others are combinations of the first ``rank``.

    To the libraries around it, it is a linear layer: PEFT puts adapters on it, and its shape outwards is that of the
    layer that it replaces. Its weight exists only when it is asked for.

    Args:
        in_features: columns of the matrix.
        out_features: its rows.
        rank: of what is not kept.
        kept: rows that are kept as a whole.
        bias: whether a bias is added.
        kind: of the layer that it replaces, which `to_dense` gives back.
        device: of all tensors.
        dtype: of rows, mix and bias.

    >>> layer = LowRankRowsLinear(6, 4, rank=1, kept=1)
    >>> layer(torch.ones(2, 3, 6)).shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([2, 3, 4]), 18)
    """

    place: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        kept: int,
        *,
        bias: bool = True,
        kind: Kind = "linear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make the weight
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.kept, self.kind = rank, kept, kind
        stored = rank + kept
        make: dict[str, Any] = {"device": device, "dtype": dtype}
        self.rows = nn.Parameter(torch.zeros(stored, in_features, **make))
        """``[rank + kept, in]``: the rows that the others are made of, then the kept ones, the most important first."""
        self.mix = nn.Parameter(torch.zeros(out_features - stored, rank, **make))
        """``[out - rank - kept, rank]``: the other rows as combinations of the first."""
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, **make)) if bias else None)
        self.register_buffer("place", torch.arange(out_features, dtype=torch.int32, device=device))

    @classmethod
    def from_factors(
        cls, factors: Factors, bias: Tensor | None = None, dtype: torch.dtype | None = None, kind: Kind = "linear"
    ) -> LowRankRowsLinear:
        """The layer that multiplies with a compressed matrix; exact but for one rounding to ``dtype``.

        Rows that span the others are found by QR with column pivoting, in float64, so that the combinations have small
        coefficients. Where the part that is not kept has a lower rank than its factors, the layer has that rank.

        Args:
            factors: the matrix. Its bias, where it has one, goes before ``bias``.
            bias: ``[out]``.
            dtype: of the parameters. Default: that of the kept rows.
            kind: of the layer that it replaces.
        """
        out, device, dtype = factors.left.shape[0], factors.rows.device, dtype or factors.rows.dtype
        bias = bias if factors.bias is None else factors.bias
        keeps = factors.kept.cpu()
        others = torch.ones(out, dtype=torch.bool).index_fill(0, keeps, False).nonzero()[:, 0]
        left, right = factors.left.detach().cpu().double()[others], factors.right.detach().cpu().double()
        chosen, mix = spanning_rows(left, right)
        rest = torch.ones(len(others), dtype=torch.bool).index_fill(0, chosen, False)
        order = torch.cat((others[chosen], keeps, others[rest]))
        layer = cls(
            right.shape[1], out, len(chosen), len(keeps), bias=bias is not None, kind=kind, device=device, dtype=dtype
        )
        with torch.no_grad():
            layer.rows[: len(chosen)] = (left[chosen] @ right).to(layer.rows)
            layer.rows[len(chosen) :] = factors.rows.detach().to(layer.rows)
            layer.mix.copy_(mix[rest])
            layer.place[order.to(device)] = torch.arange(out, dtype=torch.int32, device=device)
            if bias is not None:
                layer.bias.data.copy_(bias.detach())
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        out = product(input, self.rows, self.mix, self.place)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def dense_weight(self) -> Tensor:
        """The matrix itself, ``[out, in]``, with a gradient to rows and mix."""
        return torch.cat((self.rows, self.mix @ self.rows[: self.rank])).index_select(0, self.place)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The same for those who know linear layers: of its shape and type, read-only, made when it is read."""
        shape = (self.out_features, self.in_features)
        return UnmadeWeight(self.dense_weight, shape, self.rows.dtype, self.rows.device)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of it."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, rank={self.rank}, kept={self.kept}, bias={self.bias is not None}"


def spanning_rows(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a product of two factors that span it, and all its rows as combinations of these.

    Args:
        left: ``[rows, rank]``, float64.
        right: ``[rank, columns]``, float64.

    Returns:
        Which rows, ``[true rank]``; the combinations, ``[rows, true rank]``, of which those of the chosen rows are unit
        vectors.

    >>> left, right = torch.tensor([[1.0], [3.0], [2.0]]).double(), torch.ones(1, 4).double()
    >>> chosen, mix = spanning_rows(left, right)
    >>> chosen.tolist(), [round(float(value), 3) for value in mix]
    ([1], [0.333, 1.0, 0.667])
    """
    if 0 in left.shape or right.shape[1] == 0:
        return torch.empty(0, dtype=torch.int64), left.new_empty(left.shape[0], 0)
    small = left @ torch.linalg.qr(right.mT).R.mT  # the same products of rows with one another, in fewer columns
    upper, order = qr(small.mT.numpy(), mode="r", pivoting=True, check_finite=True)
    sizes = abs(upper.diagonal())
    rank = int((sizes > sizes[0] * max(small.shape) * torch.finfo(torch.float64).eps).sum())
    mix = torch.empty(left.shape[0], rank, dtype=torch.float64)
    mix[order[:rank]] = torch.eye(rank, dtype=torch.float64)
    mix[order[rank:]] = torch.from_numpy(solve_triangular(upper[:rank, :rank], upper[:rank, rank:])).mT
    return torch.from_numpy(order[:rank].astype("int64")), mix


def install(model: nn.Module, factors: Mapping[str, Factors]) -> nn.Module:
    """Put compressed layers in the place of a model's linear layers.

    Modules and weights that are shared stay shared. What is put in has the dtype, device and ``requires_grad`` of what
    was there; a bias stays, unless its factors bring another one.

    Args:
        model: changed in place.
        factors: by the name of an ``nn.Linear`` or ``Conv1D``.

    Returns:
        The model.

    Raises:
        ModelError: a name that the model does not have, a module of another kind or shape, a weight that is shared with
            a module of another kind or that is given two matrices.
    """
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(weight := module._parameters.get("weight"), nn.Parameter):
            owners.setdefault(id(weight), []).append((name, module))
    done: dict[int, LowRankRowsLinear] = {}
    for name, matrix in factors.items():
        module = _replaceable(model, name, matrix)
        if id(module.weight) in done:
            raise ModelError(f"{name}: shares its weight with a layer that is compressed too", "name one of them")
        layer = _like(module, matrix)
        done[id(module.weight)] = layer
        twins: dict[int, LowRankRowsLinear] = {id(module): layer}
        for other, owner in owners[id(module.weight)]:
            if id(owner) not in twins:
                if type(owner) is not type(module):
                    raise ModelError(
                        f"{name}: shares its weight with {other} ({type(owner).__name__})",
                        remedy="leave it out, or untie the two first",
                    )
                twins[id(owner)] = _twin(layer, owner)
            replace_module(model, other, twins[id(owner)])
    return model


def to_dense(model: nn.Module) -> nn.Module:
    """Put plain layers in the place of the compressed ones, in place; ``model`` is then one of plain transformers."""
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
    return model


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module where another one stands."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _replaceable(model: nn.Module, name: str, matrix: Factors) -> Any:
    module: Any
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ModelError(f"{name}: the model has no such module", "give names of its linear layers") from None
    if type(module) not in (nn.Linear, Conv1D):
        raise ModelError(f"{name}: a {type(module).__name__} cannot be compressed", "give an nn.Linear or a Conv1D")
    shape = tuple(module.weight.shape) if isinstance(module, nn.Linear) else tuple(module.weight.mT.shape)
    wanted = (matrix.left.shape[0], matrix.right.shape[1])
    if shape != wanted:
        raise ModelError(f"{name}: is {shape}, and its factors make {wanted}", "take the factors of this model")
    return module


def _like(module: Any, matrix: Factors) -> LowRankRowsLinear:
    kind: Kind = "conv1d" if isinstance(module, Conv1D) else "linear"
    layer = LowRankRowsLinear.from_factors(matrix, module.bias, module.weight.dtype, kind).to(module.weight.device)
    layer.requires_grad_(module.weight.requires_grad)
    if layer.bias is not None and module.bias is not None:
        layer.bias.requires_grad_(module.bias.requires_grad)
    return layer.train(module.training)


def _twin(layer: LowRankRowsLinear, module: Any) -> LowRankRowsLinear:
    """A layer for another module with the same weight: all is shared but the bias."""
    twin = LowRankRowsLinear(
        layer.in_features, layer.out_features, layer.rank, layer.kept, bias=False, kind=layer.kind, device="meta"
    )
    twin.rows, twin.mix, twin.place, twin.bias = layer.rows, layer.mix, layer.place, module.bias
    return twin.train(module.training)


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
