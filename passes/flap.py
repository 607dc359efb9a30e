"""FLAP: neurons and heads that fluctuate least are removed, and what they said on average becomes a bias.

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
from effcompile.kernels.heads import Heads
from effcompile.kernels.reason import Reason
from effcompile.passes.feed_forward import Calibrated, CalibratedHeads, FeedForwardPass, Found, Put, Sizes
from effcompile.passes.heads import match_heads
from effcompile.passes.rewrite import Rewrite
from effcompile.patterns.output_projection import HeadsSite, NoHeads
from effcompile.patterns.walk import aten
from effcompile.runtime.plan import Record
from effcompile.runtime.statistics import Block, Moments, Statistic

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
    """Remove the neurons, and the heads, whose removal costs least once their mean is put back as a bias.

    Parameters
    ----------
    ratio
        Share of the weights to remove, over all layers, 0 to 1: of those of feed-forward blocks, where a neuron owns
        its rows of gate and up and its column of down; with ``heads`` of those of attention, too. 0 removes none.
    metric
        ``"WIFV"``: variance of what a neuron writes, the error of removing it; ``"IFV"``: variance of the neuron;
        ``"WIFN"``: its norm times the mean of its weights, as Wanda. Of a head: see the notes.
    structure
        ``"AL-AM"``: scores standardised in each layer and compared over all layers; ``"UL-UM"``: the same share of the
        units in each layer.
    round_to
        Widths of feed-forward blocks become multiples of this, the nearest that is not 0 unless all neurons go.
    bias
        Put the mean of what was removed back.
    heads
        Remove heads of attention besides neurons. All heads of a layer may go: then its attention is a constant.
    unit
        What is removed of attention: a whole ``"group"``, a head of keys and values with the query heads that it
        serves, or one ``"query"`` head, while its keys and values stay. Without grouped heads the two are the same.

    Notes
    -----
    A head's score is the mean over its channels of the scores at the input of the output projection, which are squared
    before they are standardised over the layer's channels, as in the official code. A neuron counts in the search with
    its weights, and so does a head; a query head that leaves its group alone counts without keys and values.

    The official code updates its variance with the new mean twice and divides by the count of sequences; here the
    variance is that of the tokens. It overwrites an output bias that the model has; here it is added to. It knows no
    grouped heads. ``heads`` is off where it is not asked for, since plans for feed-forward blocks alone are what this
    option was first, and compare with the other methods for these.
    """

    ratio: float = 0.2
    metric: Literal["WIFV", "IFV", "WIFN"] = "WIFV"
    structure: Literal["AL-AM", "UL-UM"] = "AL-AM"
    round_to: int = 16
    bias: bool = True
    heads: bool = False
    unit: Literal["group", "query"] = "group"

    name: ClassVar[str] = "flap"
    paper: ClassVar[str] = "FLAP (An et al., AAAI 2024)"
    summary: ClassVar[str] = "neurons, and heads if asked, that fluctuate least removed, their mean as a bias"
    also: ClassVar[tuple[str, ...]] = ("heads",)
    limit: ClassVar[dict[str, Any]] = {"ratio": 0.0}

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio!r}; expected a share from 0 to 1.")
        if self.round_to < 1:
            raise ValueError(f"round_to={self.round_to!r}; expected 1 or more.")

    def takes(self, kind: str) -> bool:
        """Blocks, and heads if they are asked for."""
        return kind == self.site_kind or (kind == "heads" and self.heads)

    def statistics(self, block: Block) -> dict[str, Statistic]:
        """Mean and variance of each neuron, or of each channel of the heads."""
        return {"middle": Moments("middle")}

    def calibrate(self, sites: Sequence[Calibrated]) -> list[Found]:
        """The neurons that stay, in their order, and the output bias."""
        return self.calibrate_all(sites, ())[0]

    def calibrate_all(
        self, sites: Sequence[Calibrated], heads: Sequence[CalibratedHeads]
    ) -> tuple[list[Found], list[Found]]:
        """The same, and the heads that stay of each attention; all compete for one share of the weights."""
        blocks = [self._scores(site) for site in sites]
        attention = [self._units(site) for site in heads]
        counts = [s.numel() for s in (*blocks, *attention)]
        if self.structure == "AL-AM" and counts:
            scores = torch.cat([*map(_standard, blocks), *attention])
            owned = [_owned(site.block) for site in sites] + [self._owned(site.block) for site in heads]
            each = torch.tensor(owned).double().repeat_interleave(torch.tensor(counts))
            shared = sum(site.block.groups * site.block.key for site in heads if self._alone(site.block))
            stays = self._stays(scores, each, self.ratio * (float(each.sum()) + shared))
            widths = [int(part.sum()) for part in stays.split(counts)]
        else:
            widths = [round((1 - self.ratio) * count) for count in counts]
        found = [self._found(s, scores, self._rounded(w, s.block.width)) for s, scores, w in zip(sites, blocks, widths)]
        kept = zip(heads, attention, widths[len(blocks) :], strict=True)
        return found, [self._heads(site, scores, width) for site, scores, width in kept]

    def _stays(self, scores: Tensor, owned: Tensor, wanted: float) -> Tensor:
        """Which units stay, so that those that go own as nearly as possible as many weights as ``wanted``."""
        order = scores.cpu().argsort(stable=True)
        gone = torch.cat([torch.zeros(1, dtype=torch.float64), owned[order].cumsum(0)])
        count = int((gone - wanted).abs().argmin())
        return torch.ones(len(scores), dtype=torch.bool).index_fill_(0, order[:count], False)

    def _alone(self, block: Heads) -> bool:
        """Whether query heads go without their keys and values."""
        return self.unit == "query" and block.heads > block.groups

    def _owned(self, block: Heads) -> int:
        """Weights of a unit of attention."""
        return block.query if self._alone(block) else block.heads // block.groups * block.query + block.key

    def _units(self, site: CalibratedHeads) -> Tensor:
        """What each unit's removal costs, fp64 ``[units]``, beside that of neurons."""
        units = site.block.heads if self.unit == "query" else site.block.groups
        return _standard(self._scores(site).square()).view(units, -1).mean(1)

    def _heads(self, site: CalibratedHeads, scores: Tensor, width: int) -> Found:
        """The heads of the best ``width`` units."""
        own = torch.arange(site.block.heads).view(len(scores), -1)
        order = scores.cpu().argsort(descending=True, stable=True)
        kept, gone = order[:width].sort().values, order[width:].sort().values
        bias = self._bias(site, site.block.channels(own[gone].flatten()).to(site.block.down.device))
        return Found(
            {"heads": own[kept].flatten().int(), "bias": bias},
            {"heads": float(own[kept].numel()), "of": float(own.numel())},
        )

    def _rounded(self, width: int, of: int) -> int:
        if width in (0, of):
            return width
        return min(of, max(1, round(width / self.round_to)) * self.round_to)

    def _scores(self, site: Calibrated | CalibratedHeads) -> Tensor:
        """What the removal of each neuron, or channel of the heads, costs: fp64 ``[F]``."""
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
        order = scores.argsort(descending=True, stable=True)
        kept, gone = order[:width].sort().values, order[width:]
        return Found({"kept": kept.int(), "bias": self._bias(site, gone)}, {"width": float(width)})

    def _bias(self, site: Calibrated | CalibratedHeads, gone: Tensor) -> Tensor:
        """What the rows ``gone`` of the last linear write on average, fp32 ``[d]``."""
        moments = site.statistics["middle"]
        assert isinstance(moments, Moments)
        assert moments.mean is not None
        return (moments.mean[gone] @ site.block.down[gone].double() * self.bias).float()

    def match(self, site: Any) -> Rewrite | Reason:
        """What the plan leaves of a block, or of the heads of an attention; or why that stays as it is."""
        if isinstance(site, NoHeads):
            return site.reason
        if not isinstance(site, HeadsSite):
            return super().match(site)
        record = self.told(site)
        return record if isinstance(record, Reason) else match_heads(self.name, site, record)

    def approximate(self, block: FeedForward, record: Record) -> Callable[[Tensor], Tensor]:
        """The smaller block."""
        return self.leaves(block, record)

    def leaves(self, block: FeedForward, record: Record) -> FeedForward:
        """The neurons that stay, with the bias."""
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

    def linears(self, sizes: Sizes, record: Record) -> dict[str, tuple[int, int]]:
        """All of the block; none where no neuron is left."""
        width = record.tensors["kept"].numel()
        roles = {"up": (width, sizes.size), "down": (sizes.size, width)}
        return (roles | ({"gate": (width, sizes.size)} if sizes.gated else {})) if width else {}

    def emit(self, put: Put, record: Record) -> fx.Node:
        """The same linears, narrower: Inductor's own products serve them."""
        small = self.leaves(put.block, record)

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

        w, width = put.weights(make), small.width
        if width == 0:
            shape = [*_sizes(put, put.input)[:-1], w["down_bias"].meta["val"].shape[0]]
            return put.call(aten.expand.default, w["down_bias"], shape)
        middle = put.linear(put.input, w, "up", width)
        first = middle if small.gate is None else put.linear(put.input, w, "gate", width)
        active = _activated(put, first, small.activation)
        if small.gate is not None:
            active = put.call(aten.mul.Tensor, active, middle)
        return put.linear(active, w, "down", small.down.shape[1])


def _standard(scores: Tensor) -> Tensor:
    """Scores of a layer as it compares with others: of mean 0 and deviation 1."""
    return (scores - scores.mean()) / scores.std().clamp(min=torch.finfo(scores.dtype).tiny)


def _owned(block: FeedForward) -> int:
    """Weights of a neuron."""
    return (1 if block.gate is None else 2) * block.inputs + block.down.shape[1]


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
