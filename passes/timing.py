"""What a linear and its factors take at one token on this machine, measured, as a line in the rank."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from effcompile.kernels.low_rank_ops import breaks_even
from effcompile.passes.linear import SMALLEST

POOL = 1 << 26
"""Bytes that are read in turn, so that no weight is in a cache when it is read again."""
PASSES = 3


@dataclasses.dataclass(frozen=True)
class Times:
    """Milliseconds of one call: the linear as it is, and factors of rank ``r``, ``fixed + each * r``."""

    dense: float
    fixed: float
    each: float


Shape = tuple[int, int]
"""Outputs and inputs."""


def measure(shapes: Iterable[Shape], dtype: torch.dtype, device: torch.device) -> dict[Shape, Times]:
    """The times of linears of one row, with the kernels that a step would run."""
    with torch.no_grad():
        pool = torch.zeros(POOL // dtype.itemsize, dtype=dtype, device=device)
        return {shape: _measure(*shape, pool) for shape in dict.fromkeys(shapes)}


def _measure(outputs: int, inputs: int, pool: Tensor) -> Times:
    x = pool.new_ones(1, inputs)
    size = outputs * inputs
    # Beside rewritten sites, as in effcompile.passes.linear.
    own = pool.device.type == "cpu" and pool.dtype == torch.float32 and size >= SMALLEST
    target: Callable[..., Tensor] = torch.ops.effcompile.linear if own else F.linear
    dense = _milliseconds(target, [(x, w.view(outputs, inputs), None) for w in _parts(pool, size)])
    most = max(1, int(breaks_even(outputs, inputs)))
    ranks = sorted({max(1, most * part // 4) for part in (1, 2, 3, 4)})
    times = []
    for rank in ranks:
        sides = (p.split([rank * inputs, rank * outputs]) for p in _parts(pool, rank * (outputs + inputs)))
        given = [(x, down.view(rank, inputs), up.view(outputs, rank), None) for down, up in sides]
        times.append(_milliseconds(torch.ops.effcompile.low_rank_linear, given))
    each, fixed = np.polyfit(ranks, times, 1) if len(ranks) > 1 else (times[0] / ranks[0], 0.0)
    # A line through noise may begin below 0, or fall.
    each = max(float(each), times[-1] / ranks[-1] * 1e-3)
    return Times(dense, max(float(fixed), 0.0), each)


def _parts(pool: Tensor, size: int) -> Sequence[Tensor]:
    """The pool in weights of this size, at least one."""
    pool = pool if pool.numel() >= size else pool.new_zeros(size)
    parts: Sequence[Tensor] = pool[: pool.numel() // size * size].split(size)
    return parts


def _milliseconds(target: Callable[..., Tensor], given: Sequence[tuple[Any, ...]]) -> float:
    """Of one call: the least over passes through all of them, after one to warm up: what else runs only adds."""
    taken = []
    for _ in range(PASSES + 1):
        start = time.perf_counter()
        for arguments in given:
            target(*arguments)
        if given[0][0].is_cuda:
            torch.cuda.synchronize()
        taken.append((time.perf_counter() - start) * 1e3 / len(given))
    return min(taken[1:])
