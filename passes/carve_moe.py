"""CMoE: a dense feed-forward block carved into shared and routed experts, with a router made of its own neurons.

Paper: Analytical FFN-to-MoE Restructuring via Activation Pattern Analysis (Pei et al., ACL 2026, arXiv 2502.04416),
sections 3 and 4; earlier versions are titled CMoE.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from sympy import Integer, ceiling  # type: ignore[import-untyped]
from torch import Tensor, fx

from effcompile.kernels import ffn_cost, ffn_ops
from effcompile.kernels.cost import Cost
from effcompile.kernels.ffn import ACTIVATIONS, FeedForward
from effcompile.passes.feed_forward import TOKENS, Calibrated, FeedForwardPass, Found, Put, Sizes, transposed
from effcompile.runtime.plan import Record
from effcompile.runtime.statistics import Statistic, TopMarkers


@dataclasses.dataclass(frozen=True)
class CarveMoE(FeedForwardPass):
    """Carve each block into ``experts`` of equal width: some for every token, of the others as many as a token needs.

    Neurons that are among the ``markers`` largest of many tokens are *shared*. The others are grouped by which tokens
    they fire for, all groups of one size (a linear assignment). The neuron nearest to the middle of a group stands for
    it: the router is a small block of these neurons, and a token takes the ``active`` groups whose neuron says most.
    No weight is changed or added; with all groups active the block is what it was.

    Parameters
    ----------
    shared, active, experts
        ``SxAyEz`` of the paper: experts for every token, routed experts of a token, and all. (shared + active) /
        experts of the neurons are active. ``experts`` divides the width.
    markers
        Neurons that count as firing for a token.
    profile
        ``"cosine"``: firing is judged with inputs and weights of length 1, as the official code does; ``"raw"``: as
        they are, as in the paper.
    router
        The same of the router's rows.
    distance
        Between the tokens that two neurons fire for: ``"l1"`` as in the code, ``"l2"`` as in the paper.
    iterations
        Of assigning and taking means, at most; the code has one.
    routing
        ``"topk"``; or ``"threshold"``: every group whose score is above one number for all tokens, which is fitted so
        that ``active`` are taken on average. Easy tokens then take fewer, hard ones more.

    Notes
    -----
    Blocks without a gate are scored by their activation alone. Later layers are calibrated on what the dense model
    gives, not on what carved layers before them give, so one pass over the data is enough for all methods.
    """

    shared: int = 3
    active: int = 3
    experts: int = 8
    markers: int = 10
    profile: Literal["cosine", "raw"] = "cosine"
    router: Literal["cosine", "raw"] = "cosine"
    distance: Literal["l1", "l2"] = "l1"
    iterations: int = 1
    routing: Literal["topk", "threshold"] = "topk"

    name: ClassVar[str] = "carve_moe"
    paper: ClassVar[str] = "CMoE (Pei et al., ACL 2026)"
    summary: ClassVar[str] = "feed-forward: carved into shared and routed experts, with an analytical router"
    limit: ClassVar[dict[str, Any]] = {"shared": 3, "active": 5, "experts": 8}

    def __post_init__(self) -> None:
        if self.experts < 1 or not 0 <= self.shared <= self.experts:
            raise ValueError(f"shared={self.shared!r} of experts={self.experts!r}; expected 0 to all of them.")
        if not (self.active or self.shared) or not 0 <= self.active <= self.routed:
            raise ValueError(
                f"active={self.active!r}: {self.routed} experts are routed, and one at least must be active or shared."
            )
        if self.markers < 1 or self.iterations < 1:
            raise ValueError("markers and iterations are 1 or more.")

    @property
    def routed(self) -> int:
        """Experts that a router chooses among."""
        return self.experts - self.shared

    def statistics(self, block: FeedForward) -> dict[str, Statistic]:
        """The largest neurons of each token."""
        return {"top": TopMarkers(min(self.markers, block.width), self.profile == "cosine")}

    def calibrate(self, sites: Sequence[Calibrated]) -> list[Found]:
        """Neurons in their new order, the neurons that stand for the groups, and the threshold."""
        return [self._carve(site) for site in sites]

    def _carve(self, site: Calibrated) -> Found:
        block, width = site.block, site.block.width
        if width % self.experts:
            near = [e for e in range(max(1, self.experts - 8), self.experts + 9) if width % e == 0]
            raise ValueError(
                f"{site.module} has {width} neurons, which {self.experts} experts do not divide; near are {near}."
            )
        group = width // self.experts
        top = site.statistics["top"]
        assert isinstance(top, TopMarkers)
        indices = top.indices.long()
        if indices.shape[0] < group:
            raise ValueError(
                f"{site.module}: {indices.shape[0]} tokens, and an expert has {group} neurons: too few to tell which "
                "neurons fire together. Give more text."
            )
        rates = torch.bincount(indices.flatten(), minlength=width)
        order = rates.argsort(descending=True, stable=True)
        count = self.shared * group
        shared, rest = order[:count].sort().values, order[count:].sort().values
        groups = torch.empty(0, group, dtype=torch.long)
        heads = torch.empty(0, dtype=torch.long)
        if self.routed:
            groups, heads = self._groups(indices, rates, rest, group)
        tensors = {"order": torch.cat([shared, groups.flatten()]).int(), "heads": heads.int()}
        if self.routed and self.routing == "threshold":
            scores = self._scores(block, heads)(site.samples.input)
            place = round(scores.numel() * (1 - self.active / self.routed))
            ranked = scores.flatten().sort().values
            limit = ranked[place - 1] if place else ranked.new_tensor(-1.0)
            tensors["threshold"] = limit.reshape(1).float()
        return Found(tensors, {"active_share": (self.shared + self.active) / self.experts})

    def _groups(self, indices: Tensor, rates: Tensor, rest: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """The neurons of each group ``[routed, group]``, and the one that stands for each ``[routed]``."""
        # Here, because importing it takes longer than importing all passes, and only calibration needs it.
        from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

        place = torch.full((rates.numel(),), -1).index_copy_(0, rest, torch.arange(rest.numel()))
        tokens = torch.arange(indices.shape[0])[:, None].expand_as(indices)
        own = place[indices]
        # Which tokens a neuron fires for: sparse, since a token has few markers and a text many tokens.
        fires = torch.sparse_coo_tensor(
            torch.stack([own[own >= 0], tokens[own >= 0]]),
            torch.ones(int((own >= 0).sum())),
            (rest.numel(), indices.shape[0]),
            check_invariants=True,
        ).coalesce()
        counts = torch.sparse.sum(fires, 1).to_dense()
        first = rates[rest].argsort(descending=True, stable=True)[: self.routed]
        centroids = torch.stack([fires[int(i)].to_dense() for i in first])
        assigned = torch.full((rest.numel(),), -1)
        for _ in range(self.iterations):
            costs = self._distances(fires, counts, centroids)
            _, columns = linear_sum_assignment(costs.repeat_interleave(group, 1).double().numpy())
            new = torch.as_tensor(columns) // group
            if (new == assigned).all():
                break
            assigned = new
            members = torch.nn.functional.one_hot(assigned, self.routed).float()
            centroids = torch.sparse.mm(fires.t(), members).t() / group
        distances = self._distances(fires, counts, centroids)
        outside = torch.nn.functional.one_hot(assigned, self.routed) == 0
        heads = rest[distances.masked_fill(outside, torch.inf).argmin(0)]
        return rest[assigned.argsort(stable=True)].view(self.routed, group), heads

    def _distances(self, fires: Tensor, counts: Tensor, centroids: Tensor) -> Tensor:
        """From each neuron to each centroid: ``[neurons, routed]``.

        Of a row of zeros and ones ``c`` and ``z`` within 0 and 1, the L1 distance is ``sum(c) + sum(z) - 2 c z``.
        """
        common: Tensor = torch.sparse.mm(fires, centroids.t())
        if self.distance == "l1":
            return counts[:, None] + centroids.sum(1) - 2 * common
        return (counts[:, None] + centroids.square().sum(1) - 2 * common).clamp(min=0).sqrt()

    def _rows(self, block: FeedForward, heads: Tensor) -> tuple[Tensor, Tensor | None]:
        """The router's rows, of gate and up; of up alone without a gate."""
        small = block.neurons(heads)
        if self.router == "cosine":
            small = dataclasses.replace(small.normalised(), up_bias=small.up_bias, gate_bias=small.gate_bias)
        up = small.up.to(block.up.dtype)
        return (up, None) if small.gate is None else (small.gate.to(up.dtype), up)

    def _arguments(self, block: FeedForward) -> tuple[int, str, str]:
        """``top_k``, ``score`` and ``weigh`` of the operator that routes."""
        if self.routing == "threshold":
            return self.routed, "abs" if block.gate is not None else "sigmoid", "unit"
        return self.active, "abs_softmax" if block.gate is not None else "softmax", "unit"

    def _scores(self, block: FeedForward, heads: Tensor) -> Callable[[Tensor], Tensor]:
        """What the router thinks of each group, for rows ``[n, d]``: ``[n, routed]``."""
        gate, up = self._rows(block, heads)

        def scores(x: Tensor) -> Tensor:
            logits = x.float() @ gate.float().t()
            if up is not None:
                logits = ACTIVATIONS[block.activation](logits) * (x.float() @ up.float().t())
            return ffn_ops.SCORES[self._arguments(block)[1]](logits)

        return scores

    def _threshold(self, record: Record) -> float | None:
        return float(record.tensor("threshold", 1)) if self.routing == "threshold" else None

    def _order(self, block: FeedForward, record: Record) -> Tensor:
        order = record.tensor("order", block.width).long()
        if not torch.equal(order.sort().values, torch.arange(block.width)):
            raise ValueError(f"plan: {self.name} at {record.module}: order is not a permutation of its neurons.")
        return order

    def approximate(self, block: FeedForward, record: Record) -> Callable[[Tensor], Tensor]:
        """The operators' reference bodies."""
        carved = block.neurons(self._order(block, record))
        rows = self._rows(block, record.tensor("heads", self.routed))
        shared, group = self.shared * (block.width // self.experts), block.width // self.experts
        top_k, score, weigh = self._arguments(block)

        def run(x: Tensor) -> Tensor:
            chosen = weights = None
            if self.active:
                chosen, weights, _ = ffn_ops.route_reference(
                    x, *rows, top_k, score, weigh, threshold=self._threshold(record), activation=block.activation
                )
            return ffn_ops.grouped_reference(
                x,
                carved.gate,
                carved.up,
                carved.down,
                chosen,
                weights,
                shared,
                group,
                block.activation,
                carved.gate_bias,
                carved.up_bias,
                carved.down_bias,
            )

        return run

    def describes(self, record: Record) -> str:
        """The name that the paper gives it."""
        return f"carve_moe S{self.shared}A{self.active}E{self.experts}"

    @property
    def operators(self) -> tuple[str, ...]:
        """Of a form whose groups are all shared there is nothing to route."""
        return ("route", "grouped_ffn") if self.active else ("grouped_ffn",)

    def cost(self, sizes: Sizes, record: Record) -> Cost:
        """Of the router, and of the groups that so many tokens are expected to use together."""
        width = sizes.neurons // self.experts
        if not self.active:
            return sizes.dense(self.shared * width)
        used = ceiling(ffn_cost.groups_used(self.routed, Integer(self.active), TOKENS))
        more: dict[str, Any] = {"itemsize": sizes.itemsize, "gated": sizes.gated}
        slots = self.routed if self.routing == "threshold" else self.active
        router = ffn_cost.route(TOKENS, sizes.size, self.routed, slots, **more)
        return router + ffn_cost.grouped_ffn(
            TOKENS,
            sizes.size,
            shared=self.shared * width,
            width=width,
            active=used,
            uses=TOKENS * self.active,
            **more,
        )

    def emit(self, put: Put, record: Record) -> fx.Node:
        """``route``, then ``grouped_ffn`` on the weights in their new order."""
        ours, block = torch.ops.effcompile, put.block

        def make() -> dict[str, Tensor]:
            gate, up = self._rows(block, record.tensor("heads", self.routed))
            rows = {"router_gate": gate} if up is None else {"router_gate": gate, "router_up": up}
            return transposed(block.neurons(self._order(block, record))) | rows

        w, group = put.weights(make), block.width // self.experts
        chosen = weights = None
        if self.active:
            top_k, score, weigh = self._arguments(block)
            made = put.call(
                ours.route.default,
                put.input,
                w["router_gate"],
                w.get("router_up"),
                top_k,
                score,
                weigh,
                threshold=self._threshold(record),
                activation=block.activation,
            )
            chosen, weights = put.item(made, 0), put.item(made, 1)
        return put.call(
            ours.grouped_ffn.default,
            put.input,
            w.get("gate"),
            w["up"],
            w["down"],
            chosen,
            weights,
            self.shared * group,
            group,
            block.activation,
            **{name: w[name] for name in ("gate_bias", "up_bias", "down_bias") if name in w},
        )
