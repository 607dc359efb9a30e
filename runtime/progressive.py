"""LoRC's progressive schedule: what is followed by much amplification keeps most.

An error in an early layer is amplified by all layers behind it, by at most the product of the condition numbers of
their weights. So the share that a layer keeps falls from the first to the last with the logarithm of that product
(Zhang et al., 2024, arXiv 2410.03111).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FLOOR = 1e-3
"""Singular values below this share of the largest do not count: one tiny one would decide alone."""


def log_condition(weight: Tensor) -> float:
    """The logarithm of the condition number of a weight ``[m, n]``, in fp64, above :data:`FLOOR`; 0 for zeros."""
    values = torch.linalg.svdvals(weight.detach().double())
    kept = values[values >= FLOOR * values[0]]
    return float((kept[0] / kept[-1]).log()) if float(values[0]) > 0 else 0.0


def places(log_conditions: Sequence[float]) -> list[float]:
    """Where each product of the condition numbers from a layer to the last lies: 1 for the largest, 0 for the least."""
    logs = torch.tensor(log_conditions, dtype=torch.float64)
    behind = logs.flip(0).cumsum(0).flip(0)
    return ((behind - behind.min()) / (behind.max() - behind.min()).clamp(min=1e-30)).tolist()


def share(x: float, place: float) -> float:
    """What a layer at ``place`` keeps: from ``d_min`` to ``d_max``, both shares of the whole that grow with ``x``.

    ``d_max`` is 1 from ``x = 1/2`` on, and ``d_min`` is 0 up to there.

    >>> share(0.75, 1.0), share(0.75, 0.0), share(0.25, 1.0), share(0.25, 0.5)
    (1.0, 0.5, 0.5, 0.25)
    """
    least, most = max(0.0, 2 * x - 1), min(1.0, 2 * x)
    return most - (most - least) * (1 - place)


def largest(fits: Callable[[float], bool]) -> float:
    """The largest ``x`` from 0 to 1 that fits, where whatever is less than one that fits does so too."""
    if fits(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def ranks(log_conditions: Sequence[float], whole: Sequence[int], kept: float, steps: Sequence[int]) -> list[int]:
    """Ranks that keep at most the share ``kept`` of ``whole``, the channels of each layer in the order of the model.

    Each is a multiple of its ``steps``, at least one of them, or all channels of the layer.

    Raises
    ------
    ValueError
        If the smallest ranks are more.
    """
    found, room = places(log_conditions), kept * sum(whole)

    def at(x: float) -> list[int]:
        shares = [share(x, place) for place in found]
        return [
            n if s >= 1 else min(n, max(step, int(s * n) // step * step)) for s, n, step in zip(shares, whole, steps)
        ]

    if (least := sum(at(0.0))) > room:
        raise ValueError(f"the smallest ranks keep {least / sum(whole):.3f} of the channels")
    return at(largest(lambda x: sum(at(x)) <= room))
