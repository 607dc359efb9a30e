"""Adapters beside linears, as LoRA has them (Hu et al., ICLR 2022, section 4.1): kept as a chain, or folded.

``y = W x + b + sum_i s_i B_i (A_i x)``. Kept, an adapter is one product of low rank on the user's own tensors. Folded,
``W + sum_i s_i B_i A_i`` is a prepared weight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from effcompile.kernels import low_rank_ops, ops
from effcompile.kernels.program import DTYPES, OperatorProgram
from effcompile.kernels.reason import Reason
from effcompile.passes.feed_forward import TOKENS
from effcompile.passes.rewrite import Rewrite
from effcompile.passes.weights import real, wants_gradients
from effcompile.patterns.adapters import Adapted
from effcompile.patterns.linear import LinearSite, operands_of
from effcompile.patterns.walk import module_path, same_shape, shape, value


@dataclasses.dataclass(frozen=True, eq=False)
class Folded:
    """An adapter's tensors with an output to a row: ``scale * (up (down x + down_bias) + up_bias)``."""

    down: Tensor
    up: Tensor
    down_bias: Tensor | None
    up_bias: Tensor | None
    scale: float
    named: Mapping[str, tuple[fx.Node, Tensor]]
    """The user's tensors as they are and their nodes, by role."""

    @property
    def weight(self) -> Tensor:
        """What it adds to a weight, fp64 ``[m, n]``."""
        return self.up.detach().double() @ self.down.detach().double() * self.scale

    @property
    def bias(self) -> Tensor | None:
        """What it adds to a bias, fp64 ``[m]``."""
        parts = []
        if self.down_bias is not None:
            parts.append(self.up.detach().double() @ self.down_bias.detach().double())
        if self.up_bias is not None:
            parts.append(self.up_bias.detach().double())
        return sum(parts[1:], parts[0]) * self.scale if parts else None


def adapters_of(site: Adapted) -> list[Folded] | str:
    """The tensors of all adapters of a linear, or what stands in the way of folding them."""
    found = []
    for one in site.adapters:
        if math.isnan(one.scale):
            return (
                "the factor of an adapter is a symbol, as after a change of it; torch._dynamo.reset() makes it a number"
            )
        tensors: dict[str, Tensor] = {}
        named: dict[str, tuple[fx.Node, Tensor]] = {}
        for role, node in (("down", one.down), ("up", one.up)):
            linear = operands_of(node)
            if linear is None:
                return f"the {role} weight of an adapter is computed in the graph"
            for name, n in ((role, linear.weight), (f"{role}_bias", linear.bias)):
                tensor = None if n is None else real(n)
                if n is None:
                    continue
                if tensor is None or type(tensor) not in (Tensor, torch.nn.Parameter) or not tensor.is_floating_point():
                    return f"the {name} of an adapter is no parameter, or a tensor of another library"
                named[name] = n, tensor
                tensors[name] = tensor.t() if name == role and linear.flipped else tensor
        biases = tensors.get("down_bias"), tensors.get("up_bias")
        found.append(Folded(tensors["down"], tensors["up"], *biases, one.scale, named))
    return found


def match_adapter(site: LinearSite, name: str, adapters: str) -> Rewrite | Reason:
    """One half of an adapter: the first stands for both of a chain that is kept, in one product of low rank."""

    def no(code: str, text: str) -> Reason:
        return Reason(code, text, site.source)

    assert site.adapter is not None
    one, base = site.adapter
    if adapters == "fold":
        where = module_path(base.linear) or base.linear.name
        return no("adapter", f"it is half of an adapter of {where}, and leaves the graph if that linear is covered")
    if site.anchor is not one.down:
        return no("adapter", "it is the second product of an adapter, and stays as the first one does")
    down, up = operands_of(one.down), operands_of(one.up)
    weights = [None if x is None else real(x.weight) for x in (down, up)]
    if down is None or up is None or any(type(t) not in (Tensor, torch.nn.Parameter) for t in weights):
        return no("computed-weight", "a weight of this adapter is computed in the graph, or of another library")
    own = [t for t in (*weights, None if up.bias is None else real(up.bias)) if t is not None]
    if down.bias is not None or down.flipped or up.flipped or not all(t.is_contiguous() for t in own):
        return no("not-supported", "this adapter has a bias between its products, or weights with inputs to a row")
    x, out = value(down.input), value(one.up)
    if not ops.has_launcher("low_rank_linear", x.device.type):
        return no("no-kernel", f"there is no kernel for adapters on {x.device.type}; Inductor has both products")
    if len({x.dtype, value(one.down).dtype, value(up.input).dtype, out.dtype, *(t.dtype for t in own)}) > 1:
        return no("mixed-dtypes", "this adapter reads and writes different dtypes, as under autocast")
    if x.dtype not in DTYPES or not same_shape(shape(down.input)[:-1], shape(one.up)[:-1]):
        return no("not-supported", f"this adapter is {x.dtype}, or changes the leading sizes of what it reads")
    if wants_gradients(site.anchor.graph):
        return no("gradients", f"gradients are needed, and {name} has none; use torch.no_grad()")
    (rank, inputs), outputs = shape(down.weight), up.outputs
    size: Any = {"itemsize": x.dtype.itemsize}
    bias = up.bias is not None
    first = low_rank_ops.linear_cost(TOKENS, rank, inputs, bias=False, **size)
    second = low_rank_ops.linear_cost(TOKENS, outputs, rank, bias=bias, **size)
    arguments = down.input, down.weight, up.weight, up.bias

    def emit(graph: fx.Graph) -> fx.Node:
        node = graph.call_function(torch.ops.effcompile.low_rank_linear.default, arguments)
        with x.fake_mode:
            node.meta["val"] = torch.ops.effcompile.low_rank_linear.default(*map(value, arguments))
        return node

    return Rewrite(
        f"{name} adapter {rank}",
        emit,
        cost=(first + second, low_rank_ops.low_rank_cost(TOKENS, outputs, inputs, rank, bias=bias, **size)),
        rows=tuple(shape(down.input)[:-1]),
        operators=(OperatorProgram("low_rank_linear", x.dtype),),
        output=one.up,
        takes=(one.up,),
    )
