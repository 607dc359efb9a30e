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
    aten.softmax.int,
    aten.sigmoid.default,
    aten.add.Tensor,
    aten.sum.dim_IntList,
    aten.masked_fill.Scalar,
    aten.topk.default,
    aten.unsqueeze.default,
    operator.getitem,
    *VIEWS,
)


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
        node = strip_casts(choice.args[0])
        for _ in range(16):
            if is_linear(node) or not is_call(node, *_BETWEEN):
                break
            node = strip_casts(node.args[0])
        if is_linear(node):
            # Later calls overwrite earlier ones: the last one chooses among the experts themselves.
            found[node] = ExpertsSite(node, shape(node)[-1], operand(choice, 1), choice)
    return list(found.values())
