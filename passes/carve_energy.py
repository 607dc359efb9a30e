"""Other groups for carved experts, and another router: both of how much neurons write, and not of how often they fire.

A group that a token leaves out costs what its neurons would have written. Taken one by one, the square of what neuron
``i`` would have written is ``|h_i|^2 * |down_i|^2``, its *energy*. Groups are sought that leave out least of it. The
router is a linear map fitted to the root, the norm of what a group writes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from effcompile.kernels.ffn import FeedForward

ROWS = 2048
"""Rows of the calibration text that are kept for both, at most twice as many."""

ROUNDS = 12
"""Of routing and grouping in turn; the last :data:`FITTED` of them with the router that will route."""

FITTED = 4

SWEEPS = 30
"""Over the prices of all groups: after so many the groups are of one size but for a few neurons."""

RIDGE = 1.0
"""Of the fit, in mean squares of an input channel: a router has as many inputs as a text has thousands of tokens."""


def energies(block: FeedForward, rows: Tensor) -> Tensor:
    """The energy of each neuron for rows ``[n, d]``: fp32 ``[n, F]``, on the CPU."""
    return (block.middle(rows).float().square() * block.down.float().square().sum(1)).cpu()


def norms(energy: Tensor, place: Tensor, routed: int) -> Tensor:
    """The norm of what each routed group writes: ``[n, routed]``; ``place`` ``[F]`` is 0 for shared neurons."""
    return (energy @ F.one_hot(place, routed + 1)[:, 1:].to(energy.dtype)).sqrt()


def group(energy: Tensor, rows: Tensor, shared: int, routed: int, active: int, fitted: bool) -> Tensor:
    """The group of each neuron, all of one size: 0 for the ``shared`` ones, and 1 to ``routed``; int64 ``[F]``.

    Neurons in the order of their energy, and then in turn: each row takes its ``active`` groups of most energy, or
    those that the router takes, and neurons go where less of their energy is left out. Neither step adds to what is
    left out, as long as rows take what they need most.

    Parameters
    ----------
    energy
        ``[n, F]``, where ``shared + routed`` divides ``F``.
    rows
        ``[n, d]``, to fit routers to.
    """
    neurons = energy.shape[1]
    size = neurons // (shared + routed)
    place = torch.empty(neurons, dtype=torch.long)
    order = energy.mean(0).argsort(descending=True, stable=True)
    place[order] = (torch.arange(neurons) // size - shared + 1).clamp(min=0)
    if active == routed:
        return place  # nothing is left out
    ridge = Ridge(rows) if fitted and active else None
    for turn in range(ROUNDS):
        scores = norms(energy, place, routed)
        if ridge is not None and turn >= ROUNDS - FITTED:
            scores = predict(rows, *ridge.fit(scores))
        left = torch.ones_like(scores).scatter(1, scores.topk(active).indices, 0)
        costs = F.pad(energy.t() @ left, (1, 0)).double()
        other = balanced(costs, [shared * size] + [size] * routed)
        if _cost(costs, other) < _cost(costs, place):
            place = other
    return place


def _cost(costs: Tensor, place: Tensor) -> float:
    return float(costs.gather(1, place[:, None]).sum())


def balanced(costs: Tensor, sizes: Sequence[int]) -> Tensor:
    """A group for each row of ``costs`` ``[F, groups]``, of these ``sizes``, such that the sum is near the least.

    Each group has a price, which is set in turn so that as many rows want it as it has room for (the dual of the
    assignment, a coordinate at a time); in the end those with most to lose choose first. An exact solver of ``F`` rows
    and columns takes the cube of ``F``, and this its logarithm times ``F``.
    """
    prices = costs.new_zeros(len(sizes))
    for _ in range(SWEEPS):
        for one, size in enumerate(sizes):
            elsewhere = (costs + prices).index_fill(1, torch.tensor(one), torch.inf).amin(1)
            saved = (elsewhere - costs[:, one]).sort(descending=True).values
            prices[one] = saved[size - 1 : size + 1].mean() if size else torch.inf
    ranked = (costs + prices).sort(1)
    lost = ranked.values[:, 1] - ranked.values[:, 0]
    choices, room = ranked.indices.tolist(), list(sizes)
    place = torch.empty(costs.shape[0], dtype=torch.long)
    for row in lost.argsort(descending=True, stable=True).tolist():
        first = next(choice for choice in choices[row] if room[choice])
        room[first] -= 1
        place[row] = first
    return place


class Ridge:
    """Linear maps of rows ``[n, d]``, fitted by ridge regression; the factorisation is made once."""

    def __init__(self, rows: Tensor) -> None:
        self.mean = rows.double().mean(0)
        self.rows = rows.double() - self.mean
        products = self.rows.t() @ self.rows
        penalty = RIDGE * products.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        self.factor = torch.linalg.cholesky(products + penalty * torch.eye(rows.shape[1], dtype=torch.float64))

    def fit(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Weights ``[routed, d]`` and bias ``[routed]``, fp32, of the map from the rows to ``wanted`` ``[n, routed]``.

        In units of the mean of ``wanted``, and with a constant added for all groups, which changes no order, so that
        what they predict is not negative: a score is the size of a logit.
        """
        y = wanted.double()
        y = y / y.mean().clamp(min=torch.finfo(torch.float32).tiny)
        centre = y.mean(0)
        weight = torch.cholesky_solve(self.rows.t() @ (y - centre), self.factor)
        most = (self.rows @ weight + centre).abs().max()
        # Twice what is needed here, since other text has other extremes.
        return weight.t().float().contiguous(), (centre - self.mean @ weight + 2 * most).float()


def predict(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What :meth:`Ridge.fit` predicts for rows ``[n, d]``: ``[n, routed]``."""
    return F.linear(rows.float(), weight, bias)


def representatives(energy: Tensor, place: Tensor, routed: int) -> Tensor:
    """Of each routed group the neuron whose size goes with its group's the most, by correlation: int64 ``[routed]``."""
    size = energy.sqrt()
    size, wanted = size - size.mean(0), norms(energy, place, routed)
    wanted = wanted - wanted.mean(0)
    close = (size.t() @ wanted) / size.norm(dim=0).clamp(min=torch.finfo(size.dtype).tiny)[:, None]
    outside = place[:, None] != torch.arange(1, routed + 1)
    found: Tensor = close.masked_fill(outside, -torch.inf).argmax(0)
    return found
