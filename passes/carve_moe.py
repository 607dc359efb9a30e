"""CMoE: a dense feed-forward block carved into shared and routed experts, with a router made of its own neurons.

Paper: Analytical FFN-to-MoE Restructuring via Activation Pattern Analysis (Pei et al., ACL 2026, arXiv 2502.04416),
sections 3 and 4; earlier versions are titled CMoE.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from sympy import Integer, Rational, ceiling  # type: ignore[import-untyped]
from torch import Tensor, fx

from effcompile.kernels import ffn_cost, ffn_ops
from effcompile.kernels.cost import Cost
from effcompile.kernels.ffn import ACTIVATIONS, FeedForward
from effcompile.passes import carve_energy
from effcompile.passes.feed_forward import TOKENS, Calibrated, FeedForwardPass, Found, Put, Sizes, transposed
from effcompile.runtime.plan import Record
from effcompile.runtime.statistics import Samples, Statistic, TopMarkers

Limits = Callable[[FeedForward], dict[str, Tensor]]
"""From the neurons of a form, what leaves out some of them for each token, by the arguments of ``grouped_ffn``."""
_OPTIONAL = ("gate_bias", "up_bias", "down_bias", "threshold", "down_scale")


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
        The same of the router's rows; or ``"fitted"``: not rows of the block but a linear map of its input, fitted to
        the norm of what each group writes.
    distance
        Between the tokens that two neurons fire for: ``"l1"`` as in the code, ``"l2"`` as in the paper.
    iterations
        Of assigning and taking means, at most; the code has one.
    routing
        ``"topk"``; or ``"threshold"``: every group whose score is above one number for all tokens, which is fitted so
        that ``active`` are taken on average. Easy tokens then take fewer, hard ones more.
    grouping
        ``"markers"``, as above; or ``"energy"``: shared neurons and groups are those for which least is lost of what
        the neurons write, while each token leaves out the groups that write least (``markers``, ``profile``,
        ``distance`` and ``iterations`` play no part).
    bias
        Put the mean of what is left out back, as FLAP does.

    Notes
    -----
    The defaults are those of the official code. Without training, ``grouping="energy", router="fitted", bias=True``
    loses far less on the model that was measured, with ``routing="threshold"`` least: there, a router of single neurons
    hardly does better than chance, and groups of neurons that fire together mix those that matter with others.

    Blocks without a gate are scored by their activation alone. Later layers are calibrated on what the dense model
    gives, not on what carved layers before them give, so one pass over the data is enough for all methods.
    """

    shared: int = 3
    active: int = 3
    experts: int = 8
    markers: int = 10
    profile: Literal["cosine", "raw"] = "cosine"
    router: Literal["cosine", "raw", "fitted"] = "cosine"
    distance: Literal["l1", "l2"] = "l1"
    iterations: int = 1
    routing: Literal["topk", "threshold"] = "topk"
    grouping: Literal["markers", "energy"] = "markers"
    bias: bool = False

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
        """The largest neurons of each token; rows, where energies are needed."""
        found: dict[str, Statistic] = {}
        if self.grouping == "markers":
            found["top"] = TopMarkers(min(self.markers, block.width), self.profile == "cosine")
        if self.grouping == "energy" or self.router == "fitted" or self.bias:
            found["rows"] = Samples(carve_energy.ROWS)
        return found

    def calibrate(self, sites: Sequence[Calibrated]) -> list[Found]:
        """Neurons in their new order, what the router is made of, the threshold, and the bias."""
        return [self._carve(site) for site in sites]

    def _carve(self, site: Calibrated) -> Found:
        block, width = site.block, site.block.width
        if width % self.experts:
            near = [e for e in range(max(1, self.experts - 8), self.experts + 9) if width % e == 0]
            raise ValueError(
                f"{site.module} has {width} neurons, which {self.experts} experts do not divide; near are {near}."
            )
        group = width // self.experts
        kept = site.statistics.get("rows")
        rows = kept.input if isinstance(kept, Samples) else site.samples.input
        energy = carve_energy.energies(block, rows) if self.grouping == "energy" or self.router == "fitted" else None
        top = site.statistics.get("top")
        tokens = top.indices.shape[0] if isinstance(top, TopMarkers) else rows.shape[0]
        if tokens < group:
            raise ValueError(
                f"{site.module}: {tokens} tokens, and an expert has {group} neurons: too few to tell which "
                "neurons fire together. Give more text."
            )
        if isinstance(top, TopMarkers):
            place, heads = self._by_markers(top.indices.long().cpu(), width, group)
        else:
            assert energy is not None
            fitted = self.router == "fitted"
            place = carve_energy.group(energy, rows.cpu(), self.shared, self.routed, self.active, fitted)
            heads = carve_energy.representatives(energy, place, self.routed)
        tensors = {"order": place.argsort(stable=True).int()}
        if self.router == "fitted" and self.active:
            assert energy is not None
            weight, bias = carve_energy.Ridge(rows.cpu()).fit(carve_energy.norms(energy, place, self.routed))
            tensors |= {"router": weight, "router_bias": bias}
        else:
            tensors["heads"] = heads.int()

        def record() -> Record:
            return Record(site.module, self.name, {}, {}, tensors=tensors)

        if self.active and self.routing == "threshold":
            scores = self._scores(block, record())(site.samples.input)
            place_of = round(scores.numel() * (1 - self.active / self.routed))
            ranked = scores.flatten().sort().values
            limit = ranked[place_of - 1] if place_of else ranked.new_tensor(-1.0)
            tensors["threshold"] = limit.reshape(1).float().cpu()
        if self.bias:
            tensors["bias"] = torch.zeros(block.down.shape[1])
            missing = block(rows).double() - self.approximate(block, record())(rows).double()
            tensors["bias"] = missing.mean(0).float().cpu()
        return Found(tensors, {"active_share": (self.shared + self.active) / self.experts})

    def _by_markers(self, indices: Tensor, width: int, group: int) -> tuple[Tensor, Tensor]:
        """The group of each neuron, 0 for shared ones, and the neuron that stands for each ``[routed]``."""
        rates = torch.bincount(indices.flatten(), minlength=width)
        order = rates.argsort(descending=True, stable=True)
        place = torch.zeros(width, dtype=torch.long)
        if not self.routed:
            return place, torch.empty(0, dtype=torch.long)
        groups, heads = self._groups(indices, rates, order[self.shared * group :].sort().values, group)
        for number, members in enumerate(groups, 1):
            place[members] = number
        return place, heads

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

    def _rows(self, block: FeedForward, record: Record) -> dict[str, Tensor]:
        """The router by the arguments of the operator: ``gate``, and ``up`` or ``logit_bias``; empty if none routes."""
        if not self.active:
            return {}
        if self.router == "fitted":
            weight = record.tensor("router", self.routed, block.up.shape[1])
            bias = record.tensor("router_bias", self.routed)
            return {"gate": weight.to(block.up), "logit_bias": bias.to(block.up.device)}
        small = block.neurons(record.tensor("heads", self.routed))
        if self.router == "cosine":
            small = dataclasses.replace(small.normalised(), up_bias=small.up_bias, gate_bias=small.gate_bias)
        up = small.up.to(block.up.dtype)
        return {"gate": up} if small.gate is None else {"gate": small.gate.to(up.dtype), "up": up}

    def _arguments(self, block: FeedForward) -> tuple[int, str, str]:
        """``top_k``, ``score`` and ``weigh`` of the operator that routes."""
        # What is fitted is a size already, and a softmax of sizes that are far apart would round some of them to 0.
        sizes = self.router == "fitted"
        if self.routing == "threshold":
            return self.routed, "abs" if sizes or block.gate is not None else "sigmoid", "unit"
        return self.active, "abs" if sizes else "abs_softmax" if block.gate is not None else "softmax", "unit"

    def _scores(self, block: FeedForward, record: Record) -> Callable[[Tensor], Tensor]:
        """What the router thinks of each group, for rows ``[n, d]``: ``[n, routed]``."""
        rows = {name: t.float() for name, t in self._rows(block, record).items()}

        def scores(x: Tensor) -> Tensor:
            logits = torch.nn.functional.linear(x.float(), rows["gate"], rows.get("logit_bias"))
            if "up" in rows:
                logits = ACTIVATIONS[block.activation](logits) * (x.float() @ rows["up"].t())
            return ffn_ops.SCORES[self._arguments(block)[1]](logits)

        return scores

    def _threshold(self, record: Record) -> float | None:
        return float(record.tensor("threshold", 1)) if self.routing == "threshold" else None

    def _order(self, block: FeedForward, record: Record) -> Tensor:
        order = record.tensor("order", block.width).long()
        if not torch.equal(order.sort().values, torch.arange(block.width)):
            raise ValueError(f"plan: {self.name} at {record.module}: order is not a permutation of its neurons.")
        return order

    def carved(self, block: FeedForward, record: Record) -> FeedForward:
        """The neurons in their order, with the bias."""
        carved = block.neurons(self._order(block, record))
        if not self.bias:
            return carved
        bias = record.tensor("bias", block.down.shape[1]).to(block.down.device)
        if block.down_bias is not None:
            bias = bias + block.down_bias.float()
        return dataclasses.replace(carved, down_bias=bias.to(block.down.dtype))

    def _trained(self, record: Record) -> dict[str, Tensor]:
        """What :func:`effcompile.recover` found, by the arguments of ``route``; empty if it was not asked."""
        names = [name for name in ("scale", "choice_bias") if name in record.tensors]
        return {name: record.tensor(name, self.routed).float() for name in names}

    def routed_form(
        self, block: FeedForward, record: Record, limits: Limits = lambda block: {}
    ) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
        """The operators' reference bodies, and with the output of rows ``[n, d]`` the groups that each takes.

        These are int32 ``[n, slots]``, negative where a slot is unused; None if none is routed. The output has
        gradients of ``scale`` in ``record``. ``limits`` are of the neurons in the order of the form.
        """
        carved, rows = self.carved(block, record), self._rows(block, record)
        limited = limits(carved)
        shared, group = self.shared * (block.width // self.experts), block.width // self.experts
        trained = {name: t.to(block.up.device) for name, t in self._trained(record).items()}
        top_k, score, weigh = self._arguments(block)

        def run(x: Tensor) -> tuple[Tensor, Tensor | None]:
            chosen = weights = None
            if self.active:
                chosen, weights, _ = ffn_ops.route_reference(
                    x,
                    rows["gate"],
                    rows.get("up"),
                    top_k,
                    score,
                    weigh,
                    logit_bias=rows.get("logit_bias"),
                    threshold=self._threshold(record),
                    activation=block.activation,
                    **trained,
                )
            out = ffn_ops.grouped_reference(
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
                **limited,
            )
            return out, chosen

        return run

    def approximate(
        self, block: FeedForward, record: Record, limits: Limits = lambda block: {}
    ) -> Callable[[Tensor], Tensor]:
        """The operators' reference bodies."""
        run = self.routed_form(block, record, limits)
        return lambda x: run(x)[0]

    def leaves(self, block: FeedForward, record: Record) -> FeedForward | None:
        """The shared experts, if no other is ever active."""
        shared = torch.arange(self.shared * (block.width // self.experts))
        return None if self.active else self.carved(block, record).neurons(shared)

    def used(self, chosen: Tensor, neurons: int) -> Tensor:
        """Which of ``neurons`` in the order of the form tokens use that chose these groups: bool ``[n, neurons]``."""
        tokens, width = chosen.shape[0], neurons // self.experts
        routed = ffn_ops.factors(chosen, None, tokens, self.routed)[0].repeat_interleave(width, 1)
        return torch.cat([routed.new_ones(tokens, self.shared * width), routed], 1)

    def describes(self, record: Record) -> str:
        """The name that the paper gives it."""
        other: list[str] = [self.grouping] * (self.grouping != "markers")
        other += ["fitted"] * (self.router == "fitted") + ["recovered"] * bool(self._trained(record))
        return " ".join([f"carve_moe S{self.shared}A{self.active}E{self.experts}", *other])

    @property
    def operators(self) -> tuple[str, ...]:
        """Of a form whose groups are all shared there is nothing to route."""
        return ("route", "grouped_ffn") if self.active else ("grouped_ffn",)

    def cost(self, sizes: Sizes, record: Record, dropped: float = 0.0) -> Cost:
        """Of the router, and of the groups that so many tokens are expected to use together.

        ``dropped`` is the share of its neurons whose rows of down a token leaves out, independently of others.
        """
        width = sizes.neurons // self.experts
        if not self.active:
            return sizes.dense(self.shared * width)
        used = ceiling(ffn_cost.groups_used(self.routed, Integer(self.active), TOKENS))
        more: dict[str, Any] = {"itemsize": sizes.itemsize, "gated": sizes.gated}
        slots = self.routed if self.routing == "threshold" else self.active
        # Rows that are fitted have no gate of their own.
        rows = more | {"gated": sizes.gated and self.router != "fitted"}
        router = ffn_cost.route(TOKENS, sizes.size, self.routed, slots, **rows)
        if dropped:
            share, each = Rational(f"{dropped:.6f}"), TOKENS * self.active / used
            more["kept"] = [ceiling(n * (1 - share**of)) for n, of in ((self.shared * width, TOKENS), (width, each))]
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
            routing = self._rows(block, record) | {n: t.to(block.up.device) for n, t in self._trained(record).items()}
            rows = {f"router_{name}": t for name, t in routing.items()}
            carved = self.carved(block, record)
            return transposed(carved) | rows | {name: t.contiguous() for name, t in put.limits(carved).items()}

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
                choice_bias=w.get("router_choice_bias"),
                logit_bias=w.get("router_logit_bias"),
                scale=w.get("router_scale"),
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
            **{name: w[name] for name in _OPTIONAL if name in w},
        )
