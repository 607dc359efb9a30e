"""The operands of score parts, emitted into a graph: what the model added to, multiplied or put beside the scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from effcompile.kernels.program import ScoreParts
from effcompile.patterns.attention import AttentionSite
from effcompile.patterns.masks import Added, Mask
from effcompile.patterns.walk import aten, shape, value


def score_of(site: AttentionSite) -> ScoreParts:
    """What happens to the scores of a site with a proved mask."""
    assert isinstance(site.mask, Mask)
    return ScoreParts(site.softcap is not None, bool(site.mask.bias), site.sinks is not None)


def query_of(graph: fx.Graph, site: AttentionSite) -> fx.Node:
    """The query times what multiplies the scores, in its own dtype."""
    query = site.query
    for factor, divides in site.factors:
        query = graph.call_function((aten.div if divides else aten.mul).Tensor, (query, factor))
    if site.factors:
        query = graph.call_function(aten.to.dtype, (query, value(site.query).dtype))
    return query


def parts_of(graph: fx.Graph, site: AttentionSite) -> dict[str, Any]:
    """The keyword arguments of ``effcompile::attend`` for the parts of ``site``; none for plain attention."""
    assert isinstance(site.mask, Mask)
    parts: dict[str, Any] = {}
    if site.softcap is not None:
        parts["softcap"] = site.softcap
    if site.mask.bias:
        first, *others = (_bias(graph, term, shape(site.query)[1]) for term in site.mask.bias)
        for other in others:
            first = graph.call_function(aten.add.Tensor, (first, other))
        parts["bias"] = first
    if site.sinks is not None:
        parts["sinks"] = _sinks(graph, site)
    if site.mask.segments is not None:
        parts["segments"] = _integers(graph, site.mask.segments, 0)
    if site.mask.prefix is not None:
        node, number = site.mask.prefix
        if node is None:
            options = {"dtype": torch.int64, "device": value(site.query).device}
            parts["prefix"] = graph.call_function(aten.full.default, ([1], number), options)
        else:
            parts["prefix"] = _integers(graph, node, number, flat=True)
    return parts


def _integers(graph: fx.Graph, node: fx.Node, number: int, flat: bool = False) -> fx.Node:
    """An integer tensor plus a number in int64, as it is or in one dimension. Made once for all layers."""

    def make(call: Callable[..., fx.Node]) -> fx.Node:
        made = call(aten.to.dtype, node, torch.int64) if value(node).dtype != torch.int64 else node
        if flat and len(shape(node)) != 1:
            made = call(aten.reshape.default, made, [-1])
        return call(aten.add.Tensor, made, number) if number else made

    return once(graph, node, ("integers", number, flat), make)


def _bias(graph: fx.Graph, term: Added, heads: int) -> fx.Node:
    """A bias as fp32 ``[B or 1, H or 1, T or 1, S]``: kernels read nothing else. Made once for all layers."""

    def make(call: Callable[..., fx.Node]) -> fx.Node:
        made = term.node
        if term.folded:
            made = call(aten.unflatten.int, made, 0, [-1, heads])
        for _ in range(4 - (len(shape(term.node)) + term.folded)):
            made = call(aten.unsqueeze.default, made, 0)
        if value(term.node).dtype != torch.float32:
            made = call(aten.to.dtype, made, torch.float32)
        if term.factor != 1:
            made = call(aten.mul.Tensor, made, term.factor)
        return made

    return once(graph, term.node, ("bias", term.factor, term.folded), make)


def _sinks(graph: fx.Graph, site: AttentionSite) -> fx.Node:
    """The sinks as fp32 ``[H]``."""
    heads, sinks = shape(site.query)[1], site.sinks
    if not isinstance(sinks, fx.Node):
        options = {"dtype": torch.float32, "device": value(site.query).device}
        return graph.call_function(aten.full.default, ([heads], sinks), options)

    def make(call: Callable[..., fx.Node]) -> fx.Node:
        made = sinks if shape(sinks) == (heads,) else call(aten.reshape.default, sinks, [heads])
        return made if value(sinks).dtype == torch.float32 else call(aten.to.dtype, made, torch.float32)

    return once(graph, sinks, ("sinks",), make)


def once(
    graph: fx.Graph, source: fx.Node, what: tuple[Any, ...], make: Callable[[Callable[..., fx.Node]], fx.Node]
) -> fx.Node:
    """What ``make`` makes of ``source``, right behind it; the same node for the same question."""
    node: fx.Node
    for node in graph.nodes:
        if node.meta.get("effcompile_operand") == (source.name, *what):
            return node
    after = source
    while after.next.op == "placeholder":
        after = after.next
    last = [after]

    def call(target: Any, *args: Any) -> fx.Node:
        with graph.inserting_after(last[0]):
            made = graph.call_function(target, args)
        made.meta["val"] = target(*(value(a) for a in args))
        last[0] = made
        return made

    made = make(call)
    if made is not source:
        made.meta["effcompile_operand"] = (source.name, *what)
    return made
