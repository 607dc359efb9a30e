"""FLAP: neurons that fluctuate least are removed, and what they said on average becomes a bias.

Paper: Fluctuation-based Adaptive Structured Pruning for Large Language Models (An et al., AAAI 2024).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from effcompile.kernels.cost import Cost
from effcompile.kernels.ffn import FeedForward
from effcompile.passes.feed_forward import Calibrated, FeedForwardPass, Found, Put, Sizes
from effcompile.patterns.walk import aten
from effcompile.runtime.plan import Record
from effcompile.runtime.statistics import Moments, Statistic

_ATEN = {
    "silu": (aten.silu.default, {}),
    "gelu": (aten.gelu.default, {}),
    "gelu_tanh": (aten.gelu.default, {"approximate": "tanh"}),
    "relu": (aten.relu.default, {}),
    "tanh": (aten.tanh.default, {}),
    "sigmoid": (aten.sigmoid.default, {}),
}


@dataclasses.dataclass(frozen=True)
class Flap(FeedForwardPass):
    """Remove the neurons of feed-forward blocks whose removal costs least once their mean is put back as a bias.

    Parameters
    ----------
    ratio
        Share of the neurons to remove, over all layers, 0 to 1; 0 removes none.
    metric
        ``"WIFV"``: variance of what a neuron writes, the error of removing it; ``"IFV"``: variance of the neuron;
        ``"WIFN"``: its norm times the mean of its weights, as Wanda.
    structure
        ``"AL-AM"``: scores standardised in each layer and compared over all layers; ``"UL-UM"``: the same share in
        each layer.
    round_to
        Widths become multiples of this, the nearest that is not 0 unless all neurons go.
    bias
        Put the mean of what was removed back.

    Notes
    -----
    The official code updates its variance with the new mean twice and divides by the count of sequences; here the
    variance is that of the tokens. It overwrites an output bias that the model has; here it is added to. Heads are left
    alone: this covers the feed-forward half of the paper's search.
    """

    ratio: float = 0.2
    metric: Literal["WIFV", "IFV", "WIFN"] = "WIFV"
    structure: Literal["AL-AM", "UL-UM"] = "AL-AM"
    round_to: int = 16
    bias: bool = True

    name: ClassVar[str] = "flap"
    paper: ClassVar[str] = "FLAP (An et al., AAAI 2024)"
    summary: ClassVar[str] = "feed-forward: neurons that fluctuate least removed, their mean as a bias"
    limit: ClassVar[dict[str, Any]] = {"ratio": 0.0}

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio!r}; expected a share from 0 to 1.")
        if self.round_to < 1:
            raise ValueError(f"round_to={self.round_to!r}; expected 1 or more.")

    def statistics(self, block: FeedForward) -> dict[str, Statistic]:
        """Mean and variance of each neuron."""
        return {"middle": Moments("middle")}

    def calibrate(self, sites: Sequence[Calibrated]) -> list[Found]:
        """The neurons that stay, in their order, and the output bias."""
        scores = [self._scores(site) for site in sites]
        if self.structure == "AL-AM":
            scores = [(s - s.mean()) / s.std().clamp(min=torch.finfo(s.dtype).tiny) for s in scores]
            together = torch.cat(scores)
            # Neurons of all layers own the same number of weights where widths are equal, and count alike.
            removed = together.argsort(stable=True)[: round(self.ratio * together.numel())]
            stays = torch.ones_like(together, dtype=torch.bool).index_fill_(0, removed, False)
            widths = [int(part.sum()) for part in stays.split([s.numel() for s in scores])]
        else:
            widths = [round((1 - self.ratio) * s.numel()) for s in scores]
        return [self._found(site, s, self._rounded(w, s.numel())) for site, s, w in zip(sites, scores, widths)]

    def _rounded(self, width: int, of: int) -> int:
        if width in (0, of):
            return width
        return min(of, max(1, round(width / self.round_to)) * self.round_to)

    def _scores(self, site: Calibrated) -> Tensor:
        """What each neuron's removal costs, fp64 ``[F]``."""
        moments = site.statistics["middle"]
        assert isinstance(moments, Moments)
        assert moments.mean is not None
        down = site.block.down.double()
        if self.metric == "WIFV":
            return moments.variance * down.square().sum(1)
        if self.metric == "IFV":
            return moments.variance
        return (moments.variance + moments.mean.square()).sqrt() * down.abs().mean(1)

    def _found(self, site: Calibrated, scores: Tensor, width: int) -> Found:
        moments = site.statistics["middle"]
        assert isinstance(moments, Moments)
        assert moments.mean is not None
        order = scores.argsort(descending=True, stable=True)
        kept, gone = order[:width].sort().values, order[width:]
        bias = moments.mean[gone] @ site.block.down[gone].double() * self.bias
        return Found({"kept": kept.int(), "bias": bias.float()}, {"width": float(width)})

    def approximate(self, block: FeedForward, record: Record) -> Callable[[Tensor], Tensor]:
        """The smaller block."""
        return self._smaller(block, record)

    def _smaller(self, block: FeedForward, record: Record) -> FeedForward:
        kept = record.tensor("kept", -1).long()
        bias = record.tensor("bias", block.down.shape[1]).to(block.down)
        if block.down_bias is not None:
            bias = (bias.float() + block.down_bias.float()).to(bias.dtype)
        return dataclasses.replace(block.neurons(kept), down_bias=bias)

    def describes(self, record: Record) -> str:
        """The width that is left."""
        return f"flap {record.tensors['kept'].numel()} neurons"

    def cost(self, sizes: Sizes, record: Record) -> Cost:
        """That of the neurons that are left."""
        return sizes.dense(record.tensors["kept"].numel())

    def emit(self, put: Put, record: Record) -> fx.Node:
        """The same linears, narrower: Inductor's own products serve them."""
        small = self._smaller(put.block, record)

        def make() -> dict[str, Tensor]:
            return {
                role: t.contiguous()
                for role, t in (
                    ("up", small.up),
                    ("up_bias", small.up_bias),
                    ("gate", small.gate),
                    ("gate_bias", small.gate_bias),
                    ("down", small.down.t()),
                    ("down_bias", small.down_bias),
                )
                if t is not None
            }

        w = put.weights(make)
        if small.width == 0:
            shape = [*_sizes(put, put.input)[:-1], w["down_bias"].meta["val"].shape[0]]
            return put.call(aten.expand.default, w["down_bias"], shape)
        middle = put.call(aten.linear.default, put.input, w["up"], w.get("up_bias"))
        first = (
            middle if small.gate is None else put.call(aten.linear.default, put.input, w["gate"], w.get("gate_bias"))
        )
        active = _activated(put, first, small.activation)
        if small.gate is not None:
            active = put.call(aten.mul.Tensor, active, middle)
        return put.call(aten.linear.default, active, w["down"], w["down_bias"])


def _activated(put: Put, x: fx.Node, name: str) -> fx.Node:
    if name in _ATEN:
        target, options = _ATEN[name]
        return put.call(target, x, **options)
    if name == "relu2":
        return put.call(aten.square.default, put.call(aten.relu.default, x))
    assert name == "quick_gelu"
    return put.call(aten.mul.Tensor, x, put.call(aten.sigmoid.default, put.call(aten.mul.Tensor, x, 1.702)))


def _sizes(put: Put, node: fx.Node) -> list[Any]:
    sizes: list[Any] = []
    for dim, size in enumerate(node.meta["val"].shape):
        sizes.append(size if isinstance(size, int) else put.call(aten.sym_size.int, node, dim))
    return sizes
