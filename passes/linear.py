"""Linears of few rows, at decode on CPUs: ``linear(x, W, b) -> effcompile::linear(x, W, b)``, the same up to rounding.

Not a method and not an option: with a cache in few bits, reading the weights is what is left of a step, and the
library's product for few rows does not read them at the speed of memory (:mod:`effcompile.lowering.cpp_linear`). It is
done only in graphs in which a site was rewritten, so that a graph nobody asked us to change stays as it is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from effcompile.kernels.ops import LINEAR_ROWS
from effcompile.patterns.walk import aten, value

SMALLEST = 1 << 14
"""Weights below which calling an operator costs more than the product."""


def lower_linears(gm: fx.GraphModule) -> int:
    """Replace what :func:`fits`, in place; returns how many."""
    found = [n for n in gm.graph.find_nodes(op="call_function", target=aten.linear.default) if fits(n)]
    for node in found:
        x, weight, bias = (*node.args, None)[:3]
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(torch.ops.effcompile.linear.default, (x, weight, bias))
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    gm.graph.lint()
    gm.recompile()
    return len(found)


def fits(node: fx.Node) -> bool:
    """Whether a linear has a fixed number of rows, at most 8, fp32 on the CPU, contiguous weights, and no gradient."""
    x, weight = value(node.args[0]), value(node.args[1])
    rows = math.prod(x.shape[:-1]) if isinstance(x, Tensor) and all(isinstance(s, int) for s in x.shape) else 0
    return bool(
        1 <= rows <= LINEAR_ROWS
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and weight.ndim == 2
        and weight.is_contiguous()
        and weight.numel() >= SMALLEST
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )
