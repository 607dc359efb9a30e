"""What stands in the place of a linear of low rank, or with adapters folded into it: the user's tensors, and the nodes.

Which linears, and with which factors, :mod:`effcompile.passes.low_rank` says.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from effcompile.passes.adapters import Folded
from effcompile.passes.feed_forward import check_weights
from effcompile.passes.masa import materialized
from effcompile.passes.weight_form import DENSE, WeightForm
from effcompile.passes.weights import constant, prepared
from effcompile.patterns.adapters import Adapted
from effcompile.patterns.linear import Linear
from effcompile.patterns.walk import aten, value
from effcompile.runtime.plan import PlanError, Record


@dataclasses.dataclass(frozen=True, eq=False)
class Covered:
    """A linear that may be factored: its operands, the user's tensors, and adapters that are folded into it."""

    linear: Linear
    weight: Tensor
    bias: Tensor | None
    adapted: Adapted | None = None
    adapters: Sequence[Folded] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Outputs and inputs."""
        one, two = self.weight.shape
        return (two, one) if self.linear.flipped else (one, two)

    @functools.cached_property
    def rows(self) -> Tensor:
        """The weight with an output to a row, ``[m, n]``: a view, or with adapters a tensor that was rounded once."""
        weight = self.weight.detach()
        weight = weight.t() if self.linear.flipped else weight
        if not self.adapters:
            return weight
        return sum((one.weight for one in self.adapters), weight.double()).to(weight.dtype)

    @functools.cached_property
    def shift(self) -> Tensor | None:
        """The bias with those of adapters, fp64 ``[m]``; None without any."""
        given = [None if self.bias is None else self.bias.detach().double(), *(one.bias for one in self.adapters)]
        parts = [t for t in given if t is not None]
        return sum(parts[1:], parts[0]) if parts else None

    @property
    def output(self) -> fx.Node:
        """The node that a replacement stands for."""
        return self.linear.node if self.adapted is None else self.adapted.output

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By role, for digests; the factor of an adapter is a part of the role, since it is a number in the graph."""
        return {role: t for role, (_, t) in self._named.items()}

    @property
    def nodes(self) -> dict[str, fx.Node]:
        """Of :attr:`tensors`."""
        return {role: node for role, (node, _) in self._named.items()}

    @property
    def _named(self) -> dict[str, tuple[fx.Node, Tensor]]:
        found = {"linear": (self.linear.weight, self.weight)}
        if self.bias is not None and self.linear.bias is not None:
            found["bias"] = self.linear.bias, self.bias
        for n, one in enumerate(self.adapters):
            for name, (node, tensor) in one.named.items():
                found[f"adapter {n} * {one.scale!r}: {name}"] = node, tensor
        return found

    def check(self, record: Record) -> None:
        """Raise :class:`PlanError` unless ``record`` was made from these weights, with these adapters."""
        check_weights(record, self.tensors)
        if gone := sorted(set(record.parameters) - set(self.tensors)):
            raise PlanError(
                f"plan: {record.method} at {record.module}: it was made with {', '.join(gone)}, which the model no "
                "longer has. Calibrate this model, or take the record out of the plan."
            )


def emit(graph: fx.Graph, covered: Covered, record: Record | None, bits: WeightForm) -> fx.Node:
    """A linear on prepared tensors, where the insertion point is: on the factors of ``record``, or whole without.

    Factors in few bits are two linears; only a weight or factors without a residual are kept so.
    """
    linear, adapted, weight = covered.linear, covered.adapted, covered.weight
    own = {} if record is None else record.tensors
    sharing = "atoms" in own and record is not None and not record.options.get("materialize", True)

    def make() -> dict[str, Tensor]:
        if "atoms" in own and not sharing:
            made = {"weight": materialized(own).to(weight).contiguous()}
        else:
            made = {name: own[name].to(weight).contiguous() for name in ("down", "up", "values") if name in own}
            lists = ("columns", "starts", "coefficients")
            made |= {name: own[name].to(weight.device).contiguous() for name in lists if name in own}
            made = made or {"weight": covered.rows.contiguous()}
        made = {part: t for name, whole in made.items() for part, t in bits.tensors(name, whole).items()}
        both = [t.to(weight.device).double() for t in (covered.shift, own.get("shift")) if t is not None]
        return made | ({"bias": sum(both[1:], both[0]).to(weight.dtype)} if both else {})

    # An adapter's factor is a number in the graph, so it is in the names of what is folded.
    key = f"{'dense' if record is None else record.text} {sorted(covered.tensors)} {linear.flipped} {bits.text}"
    made = prepared(key, list(covered.tensors.values()), make)
    nodes = {name: constant(graph, t, linear.input) for name, t in made.items()}
    read = linear.input if adapted is None else adapted.input
    read = _in_dtype(graph, read, value(linear.input).dtype)
    bias = nodes.get("bias")
    if not own or ("atoms" in own and not sharing):
        node = _call(graph, *bits.call("weight", nodes, read, covered.size[0], bias))
    elif bits != DENSE:
        middle = _call(graph, *bits.call("down", nodes, read, own["down"].shape[0], None))
        node = _call(graph, *bits.call("up", nodes, middle, covered.size[0], bias))
    elif "up" in nodes:
        target = torch.ops.effcompile.low_rank_linear.default
        residual = [nodes[name] for name in ("values", "columns", "starts") if name in nodes]
        node = _call(graph, target, read, nodes["down"], nodes["up"], bias, *residual)
    if sharing:
        # One tensor for all layers of the group, of which each takes its sum.
        atoms = own["atoms"]
        both = prepared(
            f"atoms {weight.dtype} {weight.device}", [atoms], lambda: {"atoms": atoms.to(weight).flatten(0, 1)}
        )
        every = _call(graph, aten.linear.default, read, constant(graph, both["atoms"], linear.input))
        apart = _call(graph, aten.unflatten.int, every, -1, [len(atoms), covered.size[0]])
        parts = _call(graph, aten.mul.Tensor, apart, _call(graph, aten.unsqueeze.default, nodes["coefficients"], -1))
        total = _in_dtype(graph, _call(graph, aten.sum.dim_IntList, parts, [-2]), weight.dtype)
        rest = node if "up" in nodes else bias
        node = total if rest is None else _call(graph, aten.add.Tensor, total, rest)
    return _in_dtype(graph, node, value(covered.output).dtype)


def _in_dtype(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node if value(node).dtype is dtype else _call(graph, aten.to.dtype, node, dtype)


def _call(graph: fx.Graph, target: Any, *arguments: Any) -> fx.Node:
    """A call with its fake value."""
    node = graph.call_function(target, arguments)
    with value(arguments[0]).fake_mode:
        node.meta["val"] = target(*map(value, arguments))
    return node
