"""Put the part of a graph that :mod:`effcompile.patterns.narrow` found beside the whole: fewer heads, fewer rows."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from effcompile.passes.weight_form import WeightForm
from effcompile.passes.weights import constant, prepared, real
from effcompile.patterns.attention import strip_repeat
from effcompile.patterns.linear import VIEWS, is_linear, operands_of
from effcompile.patterns.narrow import SDPA, Kept, Narrowing
from effcompile.patterns.walk import arguments, aten, is_call, shape, value


def emit(
    graph: fx.Graph, found: Narrowing, key: str, like: Tensor, forms: Mapping[fx.Node, WeightForm]
) -> Callable[[fx.Node, Kept], fx.Node]:
    """Make the nodes of ``found`` in part, each before its original.

    Parameters
    ----------
    key
        What the narrower weights are prepared for (:func:`effcompile.passes.weights.prepared`).
    like
        A weight of the site, which lives as long as the indices do.
    forms
        How the rows of each linear are kept.

    Returns
    -------
    Callable
        Gives ``kept`` of a node, at the graph's insertion point where it is picked out of the whole.
    """
    made: dict[fx.Node, fx.Node] = {}

    def part(node: fx.Node, kept: Kept) -> fx.Node:
        return made[node] if found.kept.get(node) == kept else _picked(graph, node, kept, key, like)

    for node, kept in found.kept.items():
        with graph.inserting_before(node):
            parts = {x: part(x, its) for x, its in found.wants[node].items()}
            new = _linear(graph, node, kept, key, forms[node]) if is_linear(node) else _made(graph, node, kept, parts)
        for name, item in node.meta.items():
            new.meta.setdefault(name, item)
        made[node] = new
    return part


def call(graph: fx.Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: fx.Node) -> fx.Node:
    """A call with the fake value of its result; ``like`` is a node with a fake tensor."""
    node = graph.call_function(target, args, kwargs)
    fakes, named = fx.map_arg((args, kwargs), value)
    with value(like).fake_mode:
        node.meta["val"] = target(*fakes, **named)
    return node


def _picked(graph: fx.Graph, node: fx.Node, kept: Kept, key: str, like: Tensor) -> fx.Node:
    """``kept`` out of the whole: a view where the positions lie side by side, a copy elsewhere."""
    first, count = kept.index[0], len(kept.index)
    if kept.index == tuple(range(first, first + count)):
        return call(graph, aten.slice.Tensor, (node, kept.dim, first, first + count), {}, node)
    device = value(node).device

    def make() -> dict[str, Tensor]:
        return {"index": torch.tensor(kept.index, device=device)}

    index = constant(graph, prepared(f"{key} at {kept.index}", [like], make)["index"], node)
    return call(graph, aten.index_select.default, (node, kept.dim, index), {}, node)


def _made(graph: fx.Graph, node: fx.Node, kept: Kept, parts: dict[fx.Node, fx.Node]) -> fx.Node:
    """The call of ``node`` on ``parts`` in the place of their wholes."""
    own: Any = (node.args, dict(node.kwargs))
    args, kwargs = fx.map_arg(own, lambda x: parts.get(x, x))
    like = next(iter(parts.values()), node)
    if is_call(node, *VIEWS) and node.args[0] not in parts:
        inner = strip_repeat(node)  # keys of some groups, one for each query head
        return parts.get(inner, inner)
    count = len(kept.index)
    if is_call(node, *VIEWS, aten.expand.default):
        sizes = [*args[1]]
        sizes[kept.dim] = count
        return call(graph, node.target, (args[0], sizes, *args[2:]), kwargs, like if parts else node)
    if is_call(node, aten.unflatten.int):
        x, dim, given = args
        at = kept.dim - dim % (len(shape(node)) - len(given) + 1)
        sizes = [count if n == at else size for n, size in enumerate(given)]
        return call(graph, node.target, (x, dim, sizes), kwargs, like)
    if is_call(node, SDPA):
        named = arguments(node)
        kwargs = {name: given for name, given in kwargs.items() if name != "enable_gqa"}
        if named["enable_gqa"] and shape(parts.get(named["key"], named["key"]))[1] != count:
            kwargs["enable_gqa"] = True
        return call(graph, node.target, args, kwargs, like)
    if is_call(node, operator.getitem):
        new = graph.call_function(operator.getitem, args)
        new.meta["val"] = value(args[0])[args[1]]
        return new
    return call(graph, node.target, args, kwargs, like)


def _linear(graph: fx.Graph, node: fx.Node, kept: Kept, key: str, form: WeightForm) -> fx.Node:
    """Some rows of a linear."""
    linear = operands_of(node)
    assert linear is not None
    weight, bias = real(linear.weight), None if linear.bias is None else real(linear.bias)
    assert weight is not None
    rows = weight.detach().t() if linear.flipped else weight.detach()

    def make() -> dict[str, Tensor]:
        index = torch.tensor(kept.index, device=rows.device)
        some = {} if bias is None else {"bias": bias.detach()[index]}
        return form.tensors("weight", rows[index]) | some

    own = [t for t in (weight, bias) if t is not None]
    made = prepared(f"{key} rows {kept.index} {form.text}", own, make)
    nodes = {name: constant(graph, t, linear.input) for name, t in made.items()}
    target, *arguments = form.call("weight", nodes, linear.input, len(kept.index), nodes.get("bias"))
    return call(graph, target, tuple(arguments), {}, linear.input)
