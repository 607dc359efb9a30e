"""Find mixtures of experts: a linear that scores the experts, of which top-k takes a few for each token."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, ClassVar

from torch import fx

from effcompile.patterns.linear import VIEWS, is_linear
from effcompile.patterns.site import Site
from effcompile.patterns.walk import aten, is_call, operand, shape, strip_casts

_BETWEEN = (
    *(aten.softmax, aten.log_softmax, aten.sigmoid, aten.softplus, aten.tanh, aten.relu, aten.exp, aten.sqrt),
    *(aten.add, aten.add_, aten.sub, aten.mul, aten.mul_, aten.div, aten.div_, aten.neg, aten.pow),
    *(aten.clamp, aten.clamp_min, aten.clamp_max, aten.dropout, aten.where, aten.masked_fill, aten.masked_fill_),
    *(aten.sum, aten.amax, aten.topk, aten.unsqueeze, operator.getitem),
    *VIEWS,
)
_DEEP = 64
"""Calls between the scores and a choice, at most. Whether they are a router's is not asked here."""


@dataclasses.dataclass
class ExpertsSite(Site):
    """A router (the anchor), how many experts it scores, and the call of top-k that chooses ``chosen`` of them."""

    kind: ClassVar[str] = "moe"

    experts: int
    chosen: Any
    choice: fx.Node


def find_experts(gm: fx.GraphModule) -> list[ExpertsSite]:
    """All mixtures of experts of a normalised graph, once each: some choose groups of experts first."""
    found: dict[fx.Node, ExpertsSite] = {}
    for choice in gm.graph.find_nodes(op="call_function", target=aten.topk.default):
        if (node := _scored_by(choice)) is not None:
            # Later calls overwrite earlier ones: the last one chooses among the experts themselves.
            found[node] = ExpertsSite(node, shape(node)[-1], operand(choice, 1), choice)
    return list(found.values())


def _scored_by(choice: fx.Node) -> fx.Node | None:
    """The linear whose result a call of top-k ranks, first operands first; None if there is none."""
    queue: list[fx.Node] = [operand(choice, 0)]
    seen: set[fx.Node] = set()
    while queue and len(seen) < _DEEP:
        node: fx.Node = strip_casts(queue.pop())
        if is_linear(node):
            return node
        if node not in seen and is_call(node, *_BETWEEN):
            seen.add(node)
            queue += reversed(node.all_input_nodes)
    return None
