"""A sparse residual beside factors: the largest entries of what they lose, kept as they are.

Factors and residual are fitted to what the other one leaves, in turn, as OATS does (Zhang and Papyan, ICLR 2025;
there the metric is the diagonal of the second moment alone). An entry counts by its size and by that of the
channel that it reads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from effcompile.kernels.low_rank_ops import Residual, entry_bytes, index_dtype
from effcompile.passes.factors import spectrum
from effcompile.runtime.second_moment import SecondMoment

STEPS = 4


def split(planned: int, share: float, outputs: int, inputs: int, itemsize: int, round_to: int) -> tuple[int, int]:
    """The rank and the entries that take no more bytes than factors of the ``planned`` rank do.

    >>> split(100, 0.25, 576, 576, 4, 16)
    (64, 27263)
    """
    rank = max(round_to, int((1 - share) * planned) // round_to * round_to)
    spare = (planned - rank) * (outputs + inputs) * itemsize - 4 * (outputs + 1)
    return (rank, spare // entry_bytes(inputs, itemsize)) if spare > 0 and rank < planned else (planned, 0)


def low_rank_and_sparse(
    weight: Tensor, inputs: SecondMoment, rank: int, entries: int, *, mean: bool, steps: int = STEPS, **metric: Any
) -> tuple[dict[str, Tensor], float, float]:
    """``down``, ``up``, ``shift`` as of a :class:`~effcompile.passes.factors.Spectrum`, and the residual in CSR.

    Parameters
    ----------
    weight
        ``[m, n]``.
    steps
        Times that both are fitted again after the first.
    mean, metric
        As of :func:`~effcompile.passes.factors.spectrum`.

    Returns
    -------
    tuple
        Tensors in the dtype of the weight (``columns`` and ``starts`` are integers); the mean square of the outputs
        that is lost; and its root over the whole.
    """
    wide = weight.detach().double()
    moment = inputs.covariance if mean else inputs.moment
    sizes = moment.diagonal().clamp(min=0).sqrt()
    if metric["metric"] == "svd":
        sizes = torch.ones_like(sizes)
    elif metric["metric"] == "asvd":
        sizes = inputs.size ** metric["alpha"]
    sparse = torch.zeros_like(wide)
    best: tuple[float, Tensor, Tensor, Tensor] | None = None
    whole = 0.0
    for _ in range(steps + 1):
        found = spectrum(wide - sparse, inputs, mean=mean, **metric)
        factors = found.factors(rank)
        left = wide - factors["up"] @ factors["down"]
        sparse = _largest(left, sizes, entries)
        left = left - sparse
        lost = float(((left @ moment) * left).sum().clamp(min=0))
        whole = whole or float(((wide @ moment) * wide).sum())
        if best is None or lost < best[0]:
            best = lost, factors["down"], factors["up"], sparse
    assert best is not None
    lost, down, up, sparse = best
    made = {"down": down, "up": up}
    if mean:
        made["shift"] = (wide - up @ down - sparse) @ inputs.mean
    made = {name: t.to(weight.dtype).contiguous() for name, t in made.items()}
    made |= dict(zip(("values", "columns", "starts"), to_rows(sparse, weight.dtype), strict=True))
    return made, lost, math.sqrt(lost / max(whole, torch.finfo(torch.float64).tiny))


def _largest(left: Tensor, sizes: Tensor, entries: int) -> Tensor:
    """``left`` at the ``entries`` places where it counts most, 0 elsewhere."""
    places = (left.abs() * sizes).flatten().topk(min(entries, left.numel())).indices
    kept = torch.zeros_like(left).flatten()
    kept[places] = left.flatten()[places]
    return kept.view_as(left)


def to_rows(sparse: Tensor, dtype: torch.dtype) -> Residual:
    """A matrix ``[m, n]`` in CSR: what is not 0, row by row."""
    rows, columns = sparse.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=sparse.shape[0])
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    return sparse[rows, columns].to(dtype), columns.to(index_dtype(sparse.shape[1])), starts
