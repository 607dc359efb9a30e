"""Statistics of activations, added up batch by batch: what calibration collects, in memory that does not grow.

A statistic is made for one site, is given the rows of each batch (:class:`Rows`), and keeps numbers. Which statistics a
site needs is what the passes ask for; equal ones are collected once. Sums are in fp64: thousands of rows of activations
with outliers lose digits in fp32.

What is kept is made before the first batch and written in place. A new tensor for it would land in the room that a
batch's activations leave, and keep the rest of that room from the next ones: memory would grow by much more than that.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from effcompile.kernels.ffn import FeedForward
from effcompile.kernels.heads import Heads

Block = FeedForward | Heads

Where = Literal["input", "middle"]
"""Of a feed-forward block: what goes into it, or what its last linear reads."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """What one batch showed at a site, padding left out: ``input`` ``[n, d]`` and ``middle`` ``[n, F]``.

    ``counts``, bool ``[n, F]``, says which entries of ``middle`` there are where tokens choose neurons; None for all.
    """

    input: Tensor
    middle: Tensor
    block: Block
    counts: Tensor | None = None


def channels(block: Block, where: Where) -> int:
    """How many numbers a row has there."""
    return block.inputs if where == "input" else block.width


class Statistic(abc.ABC):
    """One statistic of one site. Equal statistics of a site are collected once."""

    @property
    @abc.abstractmethod
    def key(self) -> tuple[Any, ...]:
        """What is collected: statistics of one site with equal keys are one."""

    @abc.abstractmethod
    def prepare(self, block: Block) -> None:
        """Make room for what is kept of ``block``; once, before the first batch."""

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

    def prepare(self, block: Block) -> None:
        """Moments of no rows."""
        self.mean, self._square = (
            block.down.new_zeros(channels(block, self.where), dtype=torch.float64) for _ in range(2)
        )

    def update(self, rows: Rows) -> None:
        """Join the moments of the batch to those before (Chan, Golub and LeVeque, 1979)."""
        if self.mean is None or self._square is None:
            self.prepare(rows.block)
        assert self.mean is not None
        assert self._square is not None
        x = getattr(rows, self.where).double()
        mean, n = x.mean(0), x.shape[0]
        square = (x - mean).square().sum(0)
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

    ``scale`` ``[channels]`` is what each channel counts, 1 if it is None; with ``rotation`` ``[channels, channels]``
    the channels are those of ``x @ rotation``. Kept in fp32 whatever the dtype: products of small activations and
    norms underflow in 16 bits.
    """

    where: Where
    scale: Tensor | None = None
    counts: Tensor | None = None
    rotation: Tensor | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Where it looks, and what it multiplies with."""
        return "magnitudes", self.where, *(None if t is None else t.data_ptr() for t in (self.scale, self.rotation))

    def prepare(self, block: Block) -> None:
        """Empty bins."""
        self.counts = block.down.new_zeros(BINS + 1, dtype=torch.int64)

    def update(self, rows: Rows) -> None:
        """Count the batch."""
        if self.counts is None:
            self.prepare(rows.block)
        assert self.counts is not None
        x = getattr(rows, self.where).float()
        x = (x if self.rotation is None else x @ self.rotation.float()).abs()
        if self.scale is not None:
            x = x * self.scale.float()
        place = (x.clamp(LEAST, MOST) / LEAST).log2() * (BINS / torch.log2(torch.tensor(MOST / LEAST)))
        # What is exactly 0 stands below every bin: it is dropped at any threshold.
        place = torch.where(x == 0, -1, place.long().clamp(max=BINS - 1)) + 1
        if self.where == "middle" and rows.counts is not None:
            place = place[rows.counts]
        self.counts += torch.bincount(place.flatten(), minlength=BINS + 1)

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
    _kept: Tensor | None = None
    _seen: int = 0

    @property
    def key(self) -> tuple[Any, ...]:
        """How many, of which activations."""
        return "top", self.k, self.normalised

    def prepare(self, block: Block) -> None:
        """Room for some batches."""
        self._kept = block.down.new_empty((1 << 14, self.k), dtype=torch.int32)

    def update(self, rows: Rows) -> None:
        """Mark the batch."""
        if self._kept is None:
            self.prepare(rows.block)
        assert self._kept is not None
        middle = rows.middle
        if self.normalised:
            assert isinstance(rows.block, FeedForward)
            middle = rows.block.normalised().middle(torch.nn.functional.normalize(rows.input.float(), dim=-1))
        found = middle.float().abs().topk(self.k, dim=-1).indices
        stop = self._seen + found.shape[0]
        if stop > self._kept.shape[0]:
            # Twice the room each time, so that it is made anew a few times only.
            more = self._kept.new_empty((2 * stop, self.k))
            more[: self._seen] = self._kept[: self._seen]
            self._kept = more
        self._kept[self._seen : stop] = found
        self._seen = stop

    @property
    def indices(self) -> Tensor:
        """Of all rows, in the order they came."""
        assert self._kept is not None
        return self._kept[: self._seen]


@dataclasses.dataclass(eq=False)
class Samples(Statistic):
    """Some rows as they are, evenly from the batches: ``input`` ``[count, d]``, to measure an error on."""

    count: int
    _kept: Tensor | None = None
    _held: int = 0
    _seen: int = 0
    _step: int = 1

    @property
    def key(self) -> tuple[Any, ...]:
        """How many."""
        return "samples", self.count

    def prepare(self, block: Block) -> None:
        """Room for twice the count, in the dtype of the weights."""
        self._kept = block.down.new_empty((2 * self.count, block.inputs))

    def update(self, rows: Rows) -> None:
        """Keep every ``step``-th row; when twice as many as wanted are kept, every other one goes."""
        if self._kept is None:
            self.prepare(rows.block)
        assert self._kept is not None
        room = 2 * self.count
        first = -self._seen % self._step
        self._seen += rows.input.shape[0]
        new = rows.input[first :: self._step]
        while self._held + new.shape[0] > room:
            # Every other one of both, counted through.
            new = new[self._held % 2 :: 2]
            half = self._kept[: self._held : 2].clone()
            self._held, self._step = half.shape[0], 2 * self._step
            self._kept[: self._held] = half
        self._kept[self._held : self._held + new.shape[0]] = new
        self._held += new.shape[0]

    @property
    def input(self) -> Tensor:
        """At most twice ``count`` rows."""
        assert self._kept is not None
        return self._kept[: self._held]


@dataclasses.dataclass(eq=False)
class DomainSizes(Statistic):
    """The mean size of each neuron in each domain, and some rows of each. ``domain`` is that of the rows to come."""

    samples: int
    domain: int = 0
    inputs: dict[int, Samples] = dataclasses.field(default_factory=dict)
    _sums: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    _counts: dict[int, int] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        """How many rows."""
        return "domain sizes", self.samples

    def prepare(self, block: Block) -> None:
        """Sums of no rows, in the domain that is set."""
        assert isinstance(block, FeedForward)
        self.inputs[self.domain] = Samples(self.samples)
        self.inputs[self.domain].prepare(block)
        self._sums[self.domain] = block.up.new_zeros(block.width, dtype=torch.float64)
        self._counts[self.domain] = 0

    def update(self, rows: Rows) -> None:
        """Add the batch to its domain."""
        if self.domain not in self._sums:
            self.prepare(rows.block)
        self.inputs[self.domain].update(rows)
        self._sums[self.domain] += rows.middle.double().abs().sum(0)
        self._counts[self.domain] += rows.middle.shape[0]

    def means(self, domains: int) -> Tensor:
        """Of each neuron in each domain, fp64 ``[domains, F]``. Raises ``ValueError`` for one without rows."""
        if empty := [n for n in range(domains) if not self._counts.get(n)]:
            raise ValueError(f"no row of the domains {empty} was seen.")
        return torch.stack([self._sums[n] / self._counts[n] for n in range(domains)])
