"""What a linear reads, as one matrix: the statistic that factors and their errors are computed from."""

from __future__ import annotations

import torch
from torch import Tensor


class SecondMoment:
    """Mean, mean size and scatter of rows ``[n, d]``, joined batch by batch in fp64: ``8 d (d + 2)`` bytes.

    Products of activations with outliers lose the small channels in fp32. The room is made once and written in place
    (see :mod:`effcompile.runtime.statistics`).
    """

    def __init__(self, channels: int, device: torch.device | None = None) -> None:
        self.count = 0
        self.mean, self._sizes = (torch.zeros(channels, dtype=torch.float64, device=device) for _ in range(2))
        self._scatter = torch.zeros(channels, channels, dtype=torch.float64, device=device)

    def update(self, rows: Tensor) -> None:
        """Take rows ``[n, d]`` in (Chan, Golub and LeVeque, 1979)."""
        n = rows.shape[0]
        if not n:
            return
        x, total = rows.double(), self.count + n
        mean = x.mean(0)
        delta = mean - self.mean
        self._sizes += x.abs().sum(0)
        centred = x - mean
        self._scatter.addmm_(centred.t(), centred)
        self._scatter.addr_(delta, delta, alpha=self.count * n / total)
        self.mean += delta * (n / total)
        self.count = total

    @property
    def size(self) -> Tensor:
        """Mean of ``|x|``, fp64 ``[d]``."""
        return self._sizes / self.count

    @property
    def covariance(self) -> Tensor:
        """Of the population, fp64 ``[d, d]``."""
        return self._scatter / self.count

    @property
    def moment(self) -> Tensor:
        """Mean of ``x x^T``, fp64 ``[d, d]``."""
        return torch.addr(self.covariance, self.mean, self.mean)
