"""AdaLoRA's mathematics: functions on tensors, without models, optimizers or files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Form = Literal["mean_norm", "sum_squared"]


@torch.no_grad()
def penalty(P: Sequence[Tensor], Q: Sequence[Tensor], form: Form) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    r"""How far the factors are from orthonormal, and what the gradient of that is made of.

    ``sum_squared`` is what the paper prints (section 3.1),
    :math:`R=\sum_k\lVert P_k^\top P_k-I\rVert_F^2+\lVert Q_kQ_k^\top-I\rVert_F^2`, with :math:`\nabla_P R=P\,E` and
    :math:`\nabla_Q R=E\,Q` for :math:`E=4(\cdot-I)`. ``mean_norm`` is what the published code minimises: the mean over
    the :math:`2n` factors of the un-squared norms, for which
    :math:`E=\frac{2}{2n}(\cdot-I)/\lVert\cdot-I\rVert_F`, and 0 at exactly orthonormal factors.

    The gradients are left as products, so that they can be added to others without being stored.

    Args:
        P: left factors, each ``[out, rank]``.
        Q: right factors, each ``[rank, in]``; as many.
        form: which of the two.

    Returns:
        The value (0-dimensional), and E of each P and of each Q, each ``[rank, rank]``.

    >>> eye = torch.eye(4)
    >>> value, EP, EQ = penalty([2 * eye[:, :2]], [eye[:3]], "sum_squared")
    >>> value.item(), EP[0][0, 0].item(), EQ[0].abs().max().item()
    (18.0, 12.0, 0.0)
    """
    grams = [factor.T @ factor for factor in P] + [factor @ factor.T for factor in Q]
    alike = defaultdict(list)
    for index, gram in enumerate(grams):
        alike[len(gram), gram.dtype, gram.device].append(index)
    terms: list[Tensor] = []
    found = list(grams)
    for (rank, dtype, device), indices in alike.items():
        error = torch.stack([grams[index] for index in indices]) - torch.eye(rank, dtype=dtype, device=device)
        square = error.square().sum((1, 2))
        if form == "sum_squared":
            terms.append(square.sum())
            error *= 4
        else:
            norm = square.sqrt()
            terms.append(norm.sum() / len(grams))
            # At norm 0 the error is 0 as well, and so must be the gradient.
            error *= (2 / len(grams)) / norm.clamp_min(torch.finfo(dtype).tiny)[:, None, None]
        for index, one in zip(indices, error, strict=True):
            found[index] = one
    value = torch.stack([term.to(terms[0]) for term in terms]).sum() if terms else torch.zeros(())
    return value, found[: len(P)], found[len(P) :]


def fold(P: Tensor, singular: Tensor, Q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    r"""The update as plain LoRA of scale 1: :math:`B=\text{scale}\cdot P\,\mathrm{diag}(\lambda)`, :math:`A=Q`.

    Exact but for one rounding of each entry of B, and no decomposition: :math:`O(r(d_1+d_2))`.

    Args:
        P: ``[out, rank]``.
        singular: ``[rank]`` or ``[rank, 1]``.
        Q: ``[rank, in]``.
        scale: :math:`\alpha/r_0`.

    Returns:
        B ``[out, rank]`` and A ``[rank, in]``.
    """
    return P * (singular.flatten() * scale), Q


def decompose(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""The singular triplets of :math:`BA`, largest first, by two thin QR and one small SVD.

    Args:
        B: ``[out, rank]``.
        A: ``[rank, in]``.

    Returns:
        P ``[out, rank]`` with orthonormal columns, the singular values ``[rank]``, Q ``[rank, in]`` with orthonormal
        rows, of the rank given or the smaller side of the update; ``P @ diag(values) @ Q`` equals ``B @ A``. In the
        precision of the input, at least float32.

    >>> B, A = torch.tensor([[3.0], [4.0]]), torch.tensor([[2.0, 0.0, 0.0]])
    >>> decompose(B, A)[1].item()
    10.0
    """
    dtype = torch.promote_types(B.dtype, torch.float32)
    left, R = torch.linalg.qr(B.to(dtype))
    right, S = torch.linalg.qr(A.to(dtype).mT)
    U, values, V = torch.linalg.svd(R @ S.mT, full_matrices=False)
    return left @ U, values, V @ right.mT
