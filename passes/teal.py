"""TEAL: input channels that are small for a token are not multiplied.

Paper: Training-Free Activation Sparsity in Large Language Models (Liu et al., ICLR 2025, arXiv 2408.14690).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from sympy import Rational, ceiling  # type: ignore[import-untyped]
from torch import Tensor, fx

from effcompile.kernels import ffn_cost, ffn_ops
from effcompile.kernels.cost import Cost
from effcompile.kernels.ffn import FeedForward
from effcompile.passes.feed_forward import TOKENS, Calibrated, FeedForwardPass, Found, Put, Sizes
from effcompile.runtime.plan import Record
from effcompile.runtime.statistics import Magnitudes, Statistic

_PARTS = ("gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Teal(FeedForwardPass):
    """Drop, for each token, the input channels of gate, up and down that are small: ``|x| <= threshold``.

    Parameters
    ----------
    sparsity
        Share of the entries that thresholds drop on the calibration text, the same for every linear, 0 to 1.

    Notes
    -----
    Thresholds are quantiles of what was seen; the official code assumes a symmetric distribution. Every token is
    treated alike; the published figures leave half of each prompt dense.
    """

    sparsity: float = 0.25

    name: ClassVar[str] = "teal"
    paper: ClassVar[str] = "TEAL (Liu et al., ICLR 2025)"
    summary: ClassVar[str] = "feed-forward: input channels that are small for a token are not multiplied"
    limit: ClassVar[dict[str, Any]] = {"sparsity": 0.0}

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity!r}; expected a share from 0 to below 1.")

    def scales(self, block: FeedForward) -> dict[str, Tensor]:
        """What each channel counts in each linear, fp32 ``[channels]``; empty for ones."""
        return {}

    def statistics(self, block: FeedForward) -> dict[str, Statistic]:
        """Histograms of what the linears read."""
        scales = self.scales(block)
        return {
            part: Magnitudes("middle" if part == "down" else "input", scales.get(part))
            for part in _PARTS
            if part != "gate" or block.gate is not None
        }

    def calibrate(self, sites: Sequence[Calibrated]) -> list[Found]:
        """The thresholds of gate, up and down."""
        found = []
        for site in sites:
            thresholds = torch.zeros(3)
            for part, statistic in site.statistics.items():
                assert isinstance(statistic, Magnitudes)
                thresholds[_PARTS.index(part)] = statistic.quantile(self.sparsity)
            found.append(Found({"thresholds": thresholds}, {"sparsity": self.sparsity}))
        return found

    def _extra(self, block: FeedForward) -> dict[str, Tensor]:
        """Scales and biases by the names of the operator's arguments."""
        biases = {f"{part}_bias": getattr(block, f"{part}_bias") for part in _PARTS}
        return {f"{part}_scale": t for part, t in self.scales(block).items()} | {
            name: t for name, t in biases.items() if t is not None
        }

    def approximate(self, block: FeedForward, record: Record) -> Callable[[Tensor], Tensor]:
        """The operator's reference body."""
        thresholds, extra = record.tensor("thresholds", 3), self._extra(block)
        gate = None if block.gate is None else block.gate.t()

        def run(x: Tensor) -> Tensor:
            return ffn_ops.column_ffn_reference(
                x, gate, block.up.t(), block.down, thresholds.to(x.device), block.activation, **extra
            )

        return run

    def describes(self, record: Record) -> str:
        """How much is dropped."""
        return f"{self.name} {self.sparsity:.0%}"

    @property
    def operators(self) -> tuple[str, ...]:
        """Gate, up and down are one."""
        return ("column_ffn",)

    def cost(self, sizes: Sizes, record: Record) -> Cost:
        """With as many inputs as tokens that drop them independently are expected to keep together."""
        kept = 1 - Rational(str(self.sparsity)) ** TOKENS
        first, last = ceiling(sizes.size * kept), ceiling(sizes.neurons * kept)
        read = (first if sizes.gated else 0, first, last)
        return ffn_cost.column_ffn(TOKENS, sizes.size, sizes.neurons, kept=read, itemsize=sizes.itemsize)

    def emit(self, put: Put, record: Record) -> fx.Node:
        """``column_ffn`` on weights with an input channel to a row."""
        block = put.block

        def make() -> dict[str, Tensor]:
            thresholds = record.tensor("thresholds", 3).to(block.up.device)
            rows = {"up": block.up.t(), "down": block.down, "thresholds": thresholds}
            rows |= {} if block.gate is None else {"gate": block.gate.t()}
            return {name: t.contiguous() for name, t in (rows | self._extra(block)).items()}

        w = put.weights(make)
        fixed = ("up", "down", "gate", "thresholds")
        return put.call(
            torch.ops.effcompile.column_ffn.default,
            put.input,
            w.get("gate"),
            w["up"],
            w["down"],
            w["thresholds"],
            block.activation,
            **{name: node for name, node in w.items() if name not in fixed},
        )
