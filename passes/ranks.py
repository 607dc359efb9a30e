"""Ranks for many linears under one budget.

A planner sees each linear as an :class:`Item`: what it costs as it is, what a unit of rank costs, and what each rank
loses. Its answer is a rank for each, or None for a linear that stays dense: where its factors would cost as much as the
weight there is nothing to gain.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from effcompile.runtime import progressive

Ranks = list[int | None]
UNITS = 1 << 16
"""Parts of the budget that the knapsack counts in, at most; costs are rounded up to them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """One linear.

    Parameters
    ----------
    dense
        Its cost as it is, in whatever the budget is in.
    each, fixed
        Cost of its factors: ``fixed + each * rank``.
    lost
        What each direction is worth, in the order in which they are kept, fp64 ``[largest rank]``.
    sensitivity
        How much the model's loss grows for what this linear loses.
    log_condition
        Logarithm of the weight's condition number, for ``lorc``.
    """

    dense: float
    each: float
    fixed: float
    lost: Tensor
    sensitivity: float = 1.0
    log_condition: float = 0.0

    def cost(self, rank: int | None) -> float:
        """Of factors of this rank, or of the weight."""
        return self.dense if rank is None else self.fixed + self.each * rank

    def grid(self, round_to: int) -> list[int]:
        """The multiples of ``round_to`` at which factors cost less than the weight."""
        most = math.ceil((self.dense - self.fixed) / self.each) - 1
        return list(range(round_to, min(most, len(self.lost)) + 1, round_to))


_UNITS = {"": 1, **{f"{p}B": 1000**n for n, p in enumerate(("", "k", "M", "G"))}, "KB": 1000}
_UNITS |= {f"{p}iB": 1024**n for n, p in enumerate(("K", "M", "G"), 1)}


def bytes_of(budget: int | str) -> int:
    """A number of bytes as people write it. Raises ``ValueError`` for what is none.

    >>> bytes_of("300MB"), bytes_of("1.5 GiB"), bytes_of(4096)
    (300000000, 1610612736, 4096)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMG]?i?B?)", str(budget).strip())
    if isinstance(budget, bool) or found is None or found[2] not in _UNITS or not float(found[1]):
        raise ValueError(
            f"budget={budget!r}; expected 'parameters', 'bytes', or a number of bytes such as 300_000_000 or '300MB'."
        )
    return int(float(found[1]) * _UNITS[found[2]])


def cost(items: Sequence[Item], ranks: Ranks) -> float:
    """Of all together."""
    return sum(item.cost(rank) for item, rank in zip(items, ranks, strict=True))


def largest(items: Sequence[Item], budget: float, ranks_at: Callable[[float], Ranks]) -> Ranks:
    """The ranks of the largest ``x`` from 0 to 1 that cost no more than ``budget``; they grow with ``x``.

    Raises
    ------
    ValueError
        If even the smallest cost more.
    """

    def fits(x: float) -> bool:
        return cost(items, ranks_at(x)) <= budget

    if not fits(1.0) and not fits(0.0):
        raise ValueError(_too_little(items, budget, cost(items, ranks_at(0.0))))
    return ranks_at(progressive.largest(fits))


def _too_little(items: Sequence[Item], budget: float, least: float) -> str:
    whole = sum(item.dense for item in items)
    return (
        f"the smallest ranks keep {least / whole:.3f} of these linears, and {budget / whole:.3f} are asked for; give a "
        "larger ratio or budget, or a smaller round_to."
    )


def _at_most(grid: Sequence[int], rank: float) -> int | None:
    """The largest rank of the grid up to ``rank``, at least its smallest; None (dense) without a grid."""
    return max((r for r in grid if r <= rank), default=grid[0]) if grid else None


def uniform(items: Sequence[Item], budget: float, round_to: int) -> Ranks:
    """The same share of each linear's parameters."""
    grids = [item.grid(round_to) for item in items]

    def ranks_at(share: float) -> Ranks:
        if share == 1:
            return [None] * len(items)
        return [_at_most(g, (share * i.dense - i.fixed) / i.each) for i, g in zip(items, grids, strict=True)]

    return largest(items, budget, ranks_at)


def energy(items: Sequence[Item], budget: float, round_to: int) -> Ranks:
    """The same share of what each linear's outputs hold: the smallest rank that keeps it, or the weight itself."""
    shares = []
    for item in items:
        grid = item.grid(round_to)
        kept = item.lost.cumsum(0) / item.lost.sum().clamp(min=torch.finfo(item.lost.dtype).tiny)
        shares.append((grid, [float(kept[r - 1]) for r in grid]))

    def ranks_at(share: float) -> Ranks:
        return [next((r for r, k in zip(g, kept, strict=True) if k >= share), None) for g, kept in shares]

    return largest(items, budget, lambda x: ranks_at(x) if x < 1 else [None] * len(items))


def lorc(items: Sequence[Item], budget: float, round_to: int) -> Ranks:
    """LoRC's progressive schedule (:mod:`effcompile.runtime.progressive`) over all linears in the order of the model.

    The paper applies it to keys and values of each layer.
    """
    grids = [item.grid(round_to) for item in items]
    places = progressive.places([item.log_condition for item in items])

    def ranks_at(x: float) -> Ranks:
        shares = [progressive.share(x, place) for place in places]
        return [
            None if share >= 1 else _at_most(g, (share * i.dense - i.fixed) / i.each)
            for i, g, share in zip(items, grids, shares, strict=True)
        ]

    return largest(items, budget, ranks_at)


def sensitivity(items: Sequence[Item], budget: float, round_to: int) -> Ranks:
    """The ranks of least ``sum of sensitivity * what is lost`` within the budget: a knapsack, solved exactly.

    One choice for each linear (multiple-choice knapsack), by dynamic programming over the budget in at most
    :data:`UNITS` parts. Where costs have a common divisor as large as that nothing is rounded.
    """
    options: list[list[tuple[int | None, float, float]]] = []
    for item in items:
        tails = [*(item.lost.flip(0).cumsum(0).flip(0) * item.sensitivity).tolist(), 0.0]
        options.append([(None, item.dense, 0.0)] + [(r, item.cost(r), tails[r]) for r in item.grid(round_to)])
    least = sum(min(c for _, c, _ in one) for one in options)
    if least > budget:
        raise ValueError(_too_little(items, budget, least))
    unit = _unit([c for one in options for _, c, _ in one], budget)
    room = int(budget / unit * (1 + 1e-12))
    best = np.zeros(room + 1)
    taken = np.zeros((len(items), room + 1), dtype=np.int16)
    for n, one in enumerate(options):
        found = np.full(room + 1, np.inf)
        for k, (_, price, loss) in enumerate(one):
            at = math.ceil(price / unit * (1 - 1e-12))
            if at > room:
                continue
            total = best[: room + 1 - at] + loss
            better = total < found[at:]
            found[at:][better] = total[better]
            taken[n, at:][better] = k
        best = found
    if not np.isfinite(best[room]):  # rounding up has cost what there was
        return uniform(items, budget, round_to)
    ranks: Ranks = []
    for n in range(len(items) - 1, -1, -1):
        rank, price, _ = options[n][taken[n, room]]
        ranks.append(rank)
        room -= math.ceil(price / unit * (1 - 1e-12))
    return ranks[::-1]


def _unit(prices: Sequence[float], budget: float) -> float:
    """What the knapsack counts in: a divisor of all prices if there is one that is large enough."""
    if all(float(p).is_integer() for p in prices):
        common = math.gcd(*(int(p) for p in prices))
        if budget / common <= UNITS:
            return float(common)
    return budget / UNITS


PLANNERS = {"sensitivity": sensitivity, "energy": energy, "lorc": lorc, "uniform": uniform}
"""By name: items, budget, and what ranks are rounded to -> ranks."""
