"""Linears of low rank: each weight in two thin factors, with ranks chosen under one budget.

Papers: SVD-LLM (Wang et al., ICLR 2025, arXiv 2403.07378, section 3.1), ASVD (Yuan et al., arXiv 2312.05821, section
3.2), LoRC (arXiv 2410.03111) for the schedule of that name. The factors are made in :mod:`effcompile.passes.factors`,
the ranks chosen in :mod:`effcompile.passes.ranks`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from effcompile.kernels import low_rank_ops
from effcompile.kernels.program import OperatorProgram
from effcompile.kernels.reason import Reason
from effcompile.passes.base import Pass
from effcompile.passes.factors import Metric
from effcompile.passes.feed_forward import TOKENS, check_weights
from effcompile.passes.ranks import PLANNERS, Item, Ranks
from effcompile.passes.rewrite import Rewrite
from effcompile.passes.weights import constant, prepared, real
from effcompile.patterns.linear import Linear, LinearSite, operands_of, readers_of
from effcompile.patterns.walk import module_path, shape, value
from effcompile.runtime.plan import Record

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclasses.dataclass(frozen=True, eq=False)
class Covered:
    """A linear that may be factored: its operands, and the user's tensors."""

    linear: Linear
    weight: Tensor
    bias: Tensor | None

    @property
    def rows(self) -> Tensor:
        """The weight with an output to a row, ``[m, n]``: a view."""
        weight = self.weight.detach()
        return weight.t() if self.linear.flipped else weight

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By role, for digests."""
        return {"linear": self.weight} | ({} if self.bias is None else {"bias": self.bias})


@dataclasses.dataclass(frozen=True)
class LowRank(Pass):
    """Two thin linears in the place of each, ``up (down x)``, where that is less to read and to compute.

    All linears are covered but heads, routers, and those whose weight has another reader.

    Parameters
    ----------
    method
        Under which metric of the inputs the weight is cut: ``"svd"`` none, ``"asvd"`` the mean size of each channel,
        ``"whitened"`` the second moment.
    ratio
        Share of the covered linears that is kept, 0 to 1.
    planner
        What shares ranks out: ``"sensitivity"`` the measured growth of the loss, ``"energy"`` the same share of what
        outputs hold, ``"lorc"`` more for what is followed by more amplification, ``"uniform"`` the same share of each.
    budget
        What ``ratio`` is a share of: ``"parameters"`` or ``"bytes"``.
    rank
        One rank for all of them, in place of a budget.
    alpha
        Exponent of ``"asvd"``.
    damping
        Share of its mean diagonal that is added to the second moment of ``"whitened"``; more, if it has no root.
    bias
        Put the mean of what is lost back, as a bias.
    round_to
        Ranks are multiples of this.
    break_even
        Leave a linear dense where its factors would have as many parameters.
    head
        Cover the linear that makes the logits, too.
    """

    method: Metric = "whitened"
    ratio: float = 0.8
    planner: Literal["sensitivity", "energy", "lorc", "uniform"] = "sensitivity"
    budget: Literal["parameters", "bytes"] = "parameters"
    rank: int | None = None
    alpha: float = 0.5
    damping: float = 1e-6
    bias: bool = True
    round_to: int = 16
    break_even: bool = True
    head: bool = False

    name: ClassVar[str] = "low_rank"
    paper: ClassVar[str] = "SVD-LLM (Wang et al., ICLR 2025); ASVD (Yuan et al., 2023); LoRC (2024)"
    summary: ClassVar[str] = "linears as two thin ones, with ranks chosen under one budget"
    phases: ClassVar[tuple[str, ...]] = ("prefill", "decode")
    site_kind: ClassVar[str] = "linear"
    limit: ClassVar[dict[str, Any]] = {"ratio": 1.0}

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio!r}; expected a share above 0, at most 1.")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank!r}; expected 1 or more.")
        if self.round_to < 1:
            raise ValueError(f"round_to={self.round_to!r}; expected 1 or more.")
        if self.alpha < 0 or self.damping < 0:
            raise ValueError(f"alpha={self.alpha!r}, damping={self.damping!r}; expected 0 or more.")
        if self.rank is None and not self.break_even:
            raise ValueError("break_even=False is for one rank for all; give rank, too.")

    def covers(self, site: LinearSite) -> Covered | Reason:
        """The linear of a site, or why it is left alone."""

        def no(code: str, text: str) -> Reason:
            return Reason(code, text, site.source)

        if site.role == "router":
            return no("router", "this linear scores experts, and with another choice nothing is as it was")
        if site.role == "head" and not self.head:
            return no("head", "it makes logits, or shares the embedding's weight; low_rank(head=True) covers it")
        linear = operands_of(site.anchor)
        weight = None if linear is None else real(linear.weight)
        if linear is None or weight is None:
            return no("computed-weight", "the weight is computed in the graph, or belongs to another library")
        bias = None if linear.bias is None else real(linear.bias)
        if linear.bias is not None and bias is None:
            return no("computed-weight", "the bias of this linear is no parameter")
        for t in (weight, *([] if bias is None else [bias])):
            if type(t) not in (Tensor, torch.nn.Parameter):
                where = f"{type(t).__module__}.{type(t).__qualname__}"
                return no("computed-weight", f"a tensor of this linear is a {where}, of another library")
        if weight.dtype not in DTYPES:
            return no("not-supported", f"the weight is {weight.dtype}; {', '.join(map(str, DTYPES))} can be factored")
        if weight.ndim != 2 or (bias is not None and bias.shape != (linear.outputs,)) or len(shape(linear.input)) < 2:
            return no(
                "not-supported", "the weight is no matrix, the bias no vector of its outputs, or the input no rows"
            )
        if others := readers_of(linear.weight) - {linear.node}:
            places = ", ".join(sorted({f"{n.name} in {module_path(n) or 'the model'}" for n in others}))
            text = (
                f"its weight is also read by {places}: that stays as it is, so the factors would be memory on top, and "
                "the two would no longer be of one tensor"
            )
            return no("tied-weight", text)
        return Covered(linear, weight, bias)

    def match(self, site: LinearSite) -> Rewrite | Reason:
        """The factors that the plan gives to this linear, or why it stays as it is."""

        def no(code: str, text: str) -> Reason:
            return Reason(code, text, site.source)

        record: Record | None = getattr(site, "record", None)
        covered = self.covers(site)
        if isinstance(covered, Reason):
            return covered
        if record is None:
            return no("no-plan", f"no plan says what {self.name} does here; see effcompile.calibrate")
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        if defaults | dict(record.options) != json.loads(self.text):
            told = f"made with {dict(record.options)}, and here {json.loads(self.text)} is asked for"
            return no("other-options", f"the plan was {told}")
        check_weights(record, covered.tensors)
        if "up" not in record.tensors:
            return Reason(*stays_dense(record), site.source)
        linear, (outputs, inputs) = covered.linear, covered.rows.shape
        x, out = value(linear.input), value(linear.node)
        if torch.is_grad_enabled() and any(t.requires_grad for t in covered.tensors.values()):
            return no("gradients", f"gradients are needed, and {self.name} has none; use torch.no_grad()")
        if len({x.dtype, out.dtype, covered.weight.dtype, *([] if covered.bias is None else [covered.bias.dtype])}) > 1:
            return no("mixed-dtypes", "this linear reads and writes different dtypes, as under autocast")
        up = record.tensor("up", outputs, -1)
        rank = up.shape[1]
        record.tensor("down", rank, inputs)
        if not 1 <= rank <= min(outputs, inputs):
            return no("not-supported", f"rank {rank} of a weight {outputs} x {inputs}; expected 1 to its smaller side")
        shifted = "shift" in record.tensors
        if shifted:
            record.tensor("shift", outputs)
        nodes = {"linear": linear.weight, "bias": linear.bias}
        size = {"itemsize": x.dtype.itemsize}
        before = low_rank_ops.linear_cost(TOKENS, outputs, inputs, bias=covered.bias is not None, **size)
        after = low_rank_ops.low_rank_cost(
            TOKENS, outputs, inputs, rank, bias=shifted or covered.bias is not None, **size
        )
        programs = (OperatorProgram("low_rank_linear", x.dtype),) if x.device.type == "cpu" else ()
        return Rewrite(
            f"{self.name} {self.method} {rank} of {min(outputs, inputs)}",
            lambda graph: emit(graph, covered, record),
            weights=tuple((site.module, n, covered.tensors[role]) for role, n in nodes.items() if n is not None),
            cost=(before, after),
            rows=tuple(shape(linear.input)[:-1]),
            operators=programs,
        )

    def plan_ranks(self, items: Sequence[Item], names: Sequence[str]) -> Ranks:
        """A rank for each linear, None for those that stay dense. Raises ``ValueError`` if that cannot be said."""
        if self.rank is None:
            return PLANNERS[self.planner](items, self.ratio * sum(item.dense for item in items), self.round_to)
        for item, name in zip(items, names, strict=True):
            if self.rank > len(item.lost):
                raise ValueError(f"rank={self.rank}, but {name} has at most {len(item.lost)}; give a smaller rank.")
        return [None if self.break_even and i.cost(self.rank) >= i.dense else self.rank for i in items]


def stays_dense(record: Record) -> tuple[str, str]:
    """Why a linear that was calibrated stays dense: a code, and a text with both numbers."""
    # Told, not used: a plan that was edited may lack them.
    rank, factors, dense = (record.numbers.get(name, math.nan) for name in ("tried", "factors", "dense"))
    what = record.options.get("budget", "parameters")
    if factors >= dense:
        text = f"factors of rank {rank:.0f} would have {factors:,.0f} {what}, and the weight has {dense:,.0f}"
        return "break-even", text
    text = (
        f"the planner keeps the weight with its {dense:,.0f} {what}: even rank {rank:.0f}, with {factors:,.0f}, would "
        "lose more here than the same elsewhere"
    )
    return "kept-dense", text


def emit(graph: fx.Graph, covered: Covered, record: Record) -> fx.Node:
    """``low_rank_linear`` on prepared factors, where the insertion point is."""
    linear, weight, bias = covered.linear, covered.weight, covered.bias

    def make() -> dict[str, Tensor]:
        made = {name: record.tensors[name].to(weight).contiguous() for name in ("down", "up")}
        both = [t.to(weight.device).double() for t in (bias, record.tensors.get("shift")) if t is not None]
        return made | ({"bias": sum(both, torch.zeros_like(both[0])).to(weight.dtype)} if both else {})

    made = prepared(record.text, list(covered.tensors.values()), make)
    nodes = {name: constant(graph, t, linear.input) for name, t in made.items()}
    arguments = linear.input, nodes["down"], nodes["up"], nodes.get("bias")
    node = graph.call_function(torch.ops.effcompile.low_rank_linear.default, arguments)
    with value(linear.input).fake_mode:
        fakes = [None if n is None else value(n) for n in arguments]
        node.meta["val"] = torch.ops.effcompile.low_rank_linear.default(*fakes)
    return node
