"""Statistics of activations, added up batch by batch: what calibration collects, in memory that does not grow.

A statistic is made for one site, is given the rows of each batch (:class:`Rows`), and keeps numbers. Which statistics a
site needs is what the passes ask for; equal ones are collected once. Sums are in fp64: thousands of rows of activations
with outliers lose digits in fp32.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from effcompile.kernels.ffn import FeedForward

Where = Literal["input", "middle"]
"""Of a feed-forward block: what goes into it, or what its last linear reads."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """What one batch showed at a site, padding left out: ``input`` ``[n, d]`` and ``middle`` ``[n, F]``."""

    input: Tensor
    middle: Tensor
    block: FeedForward


class Statistic(abc.ABC):
    """One statistic of one site. Equal statistics of a site are collected once."""

    @property
    @abc.abstractmethod
    def key(self) -> tuple[Any, ...]:
        """What is collected: statistics of one site with equal keys are one."""

    @abc.abstractmethod
    def update(self, rows: Rows) -> None:
        """Take the rows of one batch in."""


@dataclasses.dataclass(eq=False)
class Moments(Statistic):
    """Mean and variance of each channel. ``variance`` is that of the population (divided by the count of rows)."""

    where: Where
    count: int = 0
    mean: Tensor | None = None
    _square: Tensor | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Where it looks."""
        return "moments", self.where

    def update(self, rows: Rows) -> None:
        """Join the moments of the batch to those before (Chan, Golub and LeVeque, 1979)."""
        x = getattr(rows, self.where).double()
        mean, n = x.mean(0), x.shape[0]
        square = (x - mean).square().sum(0)
        if self.mean is None or self._square is None:
            self.count, self.mean, self._square = n, mean, square
            return
        total, delta = self.count + n, mean - self.mean
        self._square += square + delta.square() * (self.count * n / total)
        self.mean += delta * (n / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        """Of the population, fp64 ``[channels]``."""
        assert self._square is not None
        return self._square / self.count


BINS, LEAST, MOST = 8192, 2.0**-32, 2.0**32
"""Bins of equal ratio: neighbouring edges are 0.5 % apart."""


@dataclasses.dataclass(eq=False)
class Magnitudes(Statistic):
    """How large the inputs of a linear are: a histogram of ``|x| * scale``, with bins of equal ratio.

    ``scale`` ``[channels]`` is what each channel counts, 1 if it is None. Kept in fp32 whatever the dtype: products of
    small activations and norms underflow in 16 bits.
    """

    where: Where
    scale: Tensor | None = None
    counts: Tensor | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Where it looks, and what it multiplies with."""
        return "magnitudes", self.where, None if self.scale is None else self.scale.data_ptr()

    def update(self, rows: Rows) -> None:
        """Count the batch."""
        x = getattr(rows, self.where).float().abs()
        if self.scale is not None:
            x = x * self.scale.float()
        place = (x.clamp(LEAST, MOST) / LEAST).log2() * (BINS / torch.log2(torch.tensor(MOST / LEAST)))
        # What is exactly 0 stands below every bin: it is dropped at any threshold.
        place = torch.where(x == 0, -1, place.long().clamp(max=BINS - 1)) + 1
        found = torch.bincount(place.flatten(), minlength=BINS + 1)
        self.counts = found if self.counts is None else self.counts + found

    def quantile(self, share: float) -> float:
        """The value below which a ``share`` of the entries lies; 0 for a share of 0, at which nothing is dropped."""
        assert self.counts is not None
        if share <= 0:
            return 0.0
        below = self.counts.cumsum(0).double()
        place = int(torch.searchsorted(below, share * below[-1]))
        return float(LEAST * (MOST / LEAST) ** (min(place, BINS) / BINS))


@dataclasses.dataclass(eq=False)
class TopMarkers(Statistic):
    """For each row the ``k`` neurons with the largest activations: int32 ``[rows, k]``.

    ``normalised`` takes the activations of rows, gate and up of length 1 each, so that scores are products of cosines,
    as the official code of CMoE does; the paper takes those of the block itself.
    """

    k: int
    normalised: bool = False
    found: list[Tensor] = dataclasses.field(default_factory=list)

    @property
    def key(self) -> tuple[Any, ...]:
        """How many, of which activations."""
        return "top", self.k, self.normalised

    def update(self, rows: Rows) -> None:
        """Mark the batch."""
        middle = rows.middle
        if self.normalised:
            middle = rows.block.normalised().middle(torch.nn.functional.normalize(rows.input.float(), dim=-1))
        self.found.append(middle.float().abs().topk(self.k, dim=-1).indices.int())

    @property
    def indices(self) -> Tensor:
        """Of all rows, in the order they came."""
        return torch.cat(self.found)


@dataclasses.dataclass(eq=False)
class Samples(Statistic):
    """Some rows as they are, evenly from the batches: ``input`` ``[count, d]``, to measure an error on."""

    count: int
    _kept: Tensor | None = None
    _seen: int = 0
    _step: int = 1

    @property
    def key(self) -> tuple[Any, ...]:
        """How many."""
        return "samples", self.count

    def update(self, rows: Rows) -> None:
        """Keep every ``step``-th row; when twice as many as wanted are kept, every other one goes."""
        first = -self._seen % self._step
        new = rows.input[first :: self._step]
        self._kept = new.clone() if self._kept is None else torch.cat([self._kept, new])
        self._seen += rows.input.shape[0]
        while self._kept.shape[0] > 2 * self.count:
            self._kept = self._kept[::2].clone()
            self._step *= 2

    @property
    def input(self) -> Tensor:
        """At most twice ``count`` rows."""
        assert self._kept is not None
        return self._kept
