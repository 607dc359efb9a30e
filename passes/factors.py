"""Factors of low rank for one linear, in plain PyTorch.

All of it is one formula. The SVD ``W S = U s V^T`` under a metric ``S`` of the inputs, cut to rank ``r`` and with the
metric taken out again, is ``U_r s_r V_r^T S^-1 = U_r U_r^T W``. So nothing is divided by a metric that may be singular,
``up = U_r`` has orthonormal columns, and ``down = U_r^T W``. What cutting loses at the outputs is a sum over the
directions that are left out: ``|(W - W_r) x|^2`` has the mean ``sum_{k >= r} u_k^T W M W^T u_k`` for inputs of second
moment ``M``, whatever the metric.

- ``svd``: ``S = 1``, which is best for the weight (Eckart and Young, 1936).
- ``asvd``: ``S = diag(mean |x_j| ^ alpha)`` (ASVD, Yuan et al., arXiv 2312.05821).
- ``whitened``: ``S S^T = M``, which is best for the outputs on the calibration text (SVD-LLM, Wang et al., ICLR 2025).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from effcompile.runtime.second_moment import SecondMoment

Metric = Literal["svd", "asvd", "whitened"]


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """The directions of a linear's outputs in the order in which they are kept.

    Parameters
    ----------
    weight
        ``[m, n]``, as the user has it.
    directions
        ``U``: fp32 ``[m, min(m, n)]``.
    lost
        Mean square of the outputs that leaving a direction out loses, fp64 ``[min(m, n)]``.
    mean
        Of the inputs, fp64 ``[n]``, if it is to be put back as a bias.
    energy
        Mean square of the outputs, around their mean if that is put back.
    damping
        Share of the mean of its diagonal that was added to ``M``.
    """

    weight: Tensor
    directions: Tensor
    lost: Tensor
    mean: Tensor | None
    energy: float
    damping: float

    def tail(self, rank: int) -> float:
        """Mean square of the outputs that rank ``rank`` loses."""
        return float(self.lost[rank:].sum())

    def error(self, rank: int) -> float:
        """The same over the whole, as a root."""
        return math.sqrt(self.tail(rank) / max(self.energy, torch.finfo(torch.float64).tiny))

    def factors(self, rank: int) -> dict[str, Tensor]:
        """``down`` ``[rank, n]`` and ``up`` ``[m, rank]`` in the dtype of the weight, and ``shift`` ``[m]``.

        ``shift`` is what is added to the outputs on average: there if the mean is to be put back.
        """
        weight, up = self.weight.double(), self.directions[:, :rank].double()
        down = up.t() @ weight
        found = {"down": down, "up": up}
        if self.mean is not None:
            found["shift"] = weight @ self.mean - up @ (down @ self.mean)
        return {name: t.to(self.weight.dtype).contiguous() for name, t in found.items()}


def spectrum(
    weight: Tensor, inputs: SecondMoment, metric: Metric, *, alpha: float, damping: float, mean: bool
) -> Spectrum:
    """The directions of ``weight`` ``[m, n]`` under a metric of its inputs.

    Parameters
    ----------
    alpha
        Exponent of ``asvd``.
    damping
        Share of its mean diagonal that is added to ``M`` for ``whitened``; ten times as much until it has a root.
    mean
        Whether the mean of what is lost is put back as a bias. Then ``M`` is the covariance.
    """
    wide = weight.detach().double()
    moment = inputs.covariance if mean else inputs.moment
    used = 0.0
    if metric == "svd":
        scaled = wide
    elif metric == "asvd":
        # A channel that never says anything would make the scaled weight singular, and its columns would be lost.
        size = inputs.size.clamp(min=max(float(inputs.size.max()), 1e-30) * 1e-6)
        scaled = wide * size**alpha
    else:
        root, used = damped_root(moment, damping)
        scaled = wide @ root
    directions = left_singular(scaled)
    through = directions.t() @ wide
    lost = ((through @ moment) * through).sum(1).clamp(min=0)
    energy = float(((wide @ moment) * wide).sum().clamp(min=0))
    return Spectrum(weight, directions.float(), lost, inputs.mean if mean else None, energy, used)


def left_singular(matrix: Tensor) -> Tensor:
    """The left singular vectors of a matrix ``[m, n]``, largest first: orthonormal ``[m, min(m, n)]``.

    By eigenvectors of its smaller side, several times faster than an SVD. Directions that hold less than the rounding
    of fp64 of the whole come in any order, which for cutting is no matter.
    """
    side, small = torch.linalg.qr(matrix) if matrix.shape[0] > matrix.shape[1] else (None, matrix)
    vectors: Tensor = torch.linalg.eigh(small @ small.t()).eigenvectors.flip(1)
    if side is not None:
        vectors = side @ vectors
    return vectors


def damped_root(moment: Tensor, damping: float) -> tuple[Tensor, float]:
    """A lower triangular ``S`` with ``S S^T = M + damping * mean(diag M)``, fp64 ``[n, n]``, and the share used.

    Raises
    ------
    ValueError
        If ``M`` is not finite.
    """
    if not moment.isfinite().all():
        raise ValueError("the second moment of the inputs holds NaN or infinity")
    size = moment.diagonal().mean()
    one = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    if size <= 0:
        return one, 0.0
    share = damping
    while True:
        root, failed = torch.linalg.cholesky_ex(moment + one * (size * share))
        if not failed:
            return root, share
        share = max(10 * share, torch.finfo(moment.dtype).eps)
