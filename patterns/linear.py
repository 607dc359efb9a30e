"""Find linears, and among them the head that makes the logits."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from torch import fx

from effcompile.patterns.adapters import ROW_VIEWS, Adapted, Adapter, adapted
from effcompile.patterns.site import Site
from effcompile.patterns.walk import aten, is_call, operand, same_size, shape, strip_casts

VIEWS = ROW_VIEWS


@dataclasses.dataclass
class LinearSite(Site):
    """``x @ weight.T + bias`` (``linear``), ``x @ weight + bias`` (``addmm``), or a product with a weight."""

    kind: ClassVar[str] = "linear"

    role: Literal["", "head", "router", "adapter"] = ""
    """What it is for, where that matters: it makes the logits, chooses experts, or is half of an adapter."""
    number: int = 0
    """How many linears of the same module come before it in the graph."""
    adapted: Adapted | None = None
    """The adapters that are added to it, if there are any."""
    adapter: tuple[Adapter, Adapted] | None = None
    """The adapter that it is a half of, and what that is added to."""

    @property
    def label(self) -> str:
        """``module``, or ``module#1`` for the second linear in one module, as hand-written models have them."""
        return self.module + (f"#{self.number}" if self.number else "")

    @property
    def output(self) -> fx.Node:
        """The node that a rewrite replaces: the linear itself."""
        return self.anchor


@dataclasses.dataclass
class HeadSite(Site):
    """The linear to another width whose result leaves the graph, but for scaling and capping."""

    kind: ClassVar[str] = "lm-head"


def is_linear(node: Any) -> bool:
    """Whether a node is a linear in one of its spellings."""
    if is_call(node, aten.matmul.default):
        weight = node.args[1]
        if is_call(weight, aten.numpy_T.default, aten.t.default, aten.mT.default, aten.transpose.int):
            weight = weight.args[0]
        return len(shape(weight)) == 2 and weight.op in ("placeholder", "get_attr")
    return is_call(node, aten.linear.default, aten.addmm.default)


def input_of(linear: fx.Node) -> fx.Node:
    """What a linear is applied to, without views and casts."""
    node = strip_casts(operand(linear, 1 if is_call(linear, aten.addmm.default) else 0))
    while is_call(node, *VIEWS):
        node = strip_casts(node.args[0])
    found: fx.Node = node
    return found


@dataclasses.dataclass(frozen=True)
class Linear:
    """The operands of a linear: ``input @ weight.T + bias``, or ``input @ weight + bias`` if ``flipped``."""

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    flipped: bool
    bias: fx.Node | None

    @property
    def outputs(self) -> Any:
        """Width of what comes out."""
        return shape(self.weight)[1 if self.flipped else 0]


def operands_of(linear: fx.Node) -> Linear | None:
    """The operands of a linear whose weight is a tensor of the graph as it came in; None if it is computed."""
    bias = None
    if is_call(linear, aten.linear.default):
        x, weight, bias = (*linear.args, None)[:3]
        flipped = False
    elif is_call(linear, aten.addmm.default):
        bias, x, weight = linear.args
        if linear.kwargs:  # alpha and beta
            return None
        flipped = True
    else:
        x, weight = linear.args[:2]
        flipped = True
    while is_call(weight, aten.numpy_T.default, aten.t.default, aten.mT.default, aten.transpose.int):
        weight, flipped = weight.args[0], not flipped  # type: ignore[union-attr]
    if not all(isinstance(n, fx.Node) for n in (x, weight)) or weight.op not in ("placeholder", "get_attr"):  # type: ignore[union-attr]
        return None
    if bias is not None and (not isinstance(bias, fx.Node) or bias.op not in ("placeholder", "get_attr")):
        return None
    return Linear(linear, x, weight, flipped, bias)  # type: ignore[arg-type]


def find_linears(gm: fx.GraphModule, routers: Collection[fx.Node] = ()) -> list[LinearSite]:
    """All linears of a normalised graph, in graph order. Those that choose experts are among ``routers``.

    A head is what makes a result of the graph, of another width if tokens are not looked up in the same graph; what a
    loss reads; or what has the weight of an embedding.
    """
    whole = bool(gm.graph.find_nodes(op="call_function", target=aten.embedding.default))
    bases = {node: one for node in gm.graph.nodes if is_linear(node) and (one := adapted(node)) is not None}
    halves = {n: (each, one) for one in bases.values() for each in one.adapters for n in (each.down, each.up)}
    sums = {one.output: base for base, one in bases.items()}
    heads = {*_last(gm, sums)} if whole else {site.anchor for site in find_heads(gm, sums)}
    for loss in gm.graph.find_nodes(op="call_function", target=aten.cross_entropy_loss.default):
        node = strip_casts(loss.args[0])
        while is_call(node, aten.slice.Tensor, *VIEWS):
            node = strip_casts(node.args[0])
        heads.add(node)
    found = []
    before: Counter[str] = Counter()
    for node in gm.graph.nodes:
        if is_linear(node):
            parts = operands_of(node)
            tied = parts is not None and any(is_call(user, aten.embedding.default) for user in parts.weight.users)
            roles = {"router": node in routers, "head": node in heads or tied, "adapter": node in halves}
            role: Any = next((name for name, holds in roles.items() if holds), "")
            site = LinearSite(node, role, adapted=bases.get(node), adapter=halves.get(node))
            site.number = before[site.module]
            before[site.module] += 1
            found.append(site)
    return found


def readers_of(weight: fx.Node) -> set[fx.Node]:
    """The calls that read a weight, behind transposes of it."""
    found: set[fx.Node] = set()
    for user in weight.users:
        transposed = is_call(user, aten.numpy_T.default, aten.t.default, aten.mT.default, aten.transpose.int)
        found |= readers_of(user) if transposed else {user}
    return found


def find_heads(gm: fx.GraphModule, sums: Mapping[fx.Node, fx.Node] = MappingProxyType({})) -> list[HeadSite]:
    """The linears that make what the graph returns, of another width than they read, and feed nothing else.

    ``sums`` are those of linears with adapters.
    """
    return [HeadSite(node) for node in _last(gm, sums) if not same_size(shape(node)[-1], shape(input_of(node))[-1])]


def _last(gm: fx.GraphModule, sums: Mapping[fx.Node, fx.Node]) -> list[fx.Node]:
    """The linears whose result leaves the graph, but for adapters, scaling and capping, and feeds nothing else."""
    found = []
    for made in gm.graph.output_node().all_input_nodes:
        node: Any = made
        for _ in range(8):
            node = strip_casts(node)
            node = sums.get(node, node)
            numbers = is_call(node, aten.mul.Tensor, aten.div.Tensor) and not isinstance(node.args[1], fx.Node)
            if not (numbers or is_call(node, aten.tanh.default, aten.slice.Tensor, *VIEWS)):
                break
            node = node.args[0]
        if is_linear(node) and len(node.users) == 1:
            found.append(node)
    return found
