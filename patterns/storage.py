"""Which nodes may share memory, and where the graph writes to it: a value read after a write is another value."""

from __future__ import annotations

import operator

import torch
from torch import fx

from effcompile.patterns.walk import value

_HARMLESS = {"aten::detach_", "aten::requires_grad_"}
_NUMBERS = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)


class Writes:
    """Writes of one graph, by groups of nodes that may share memory.

    Groups are coarse on purpose: any result that the schema marks as an alias, and any result of something without a
    schema (a higher-order operator), is joined with all tensor arguments, and the latter is taken to write to them.
    Inputs of the graph are taken to be separate, as AOTAutograd also takes them.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._parent: dict[fx.Node, fx.Node] = {}
        self._order: dict[fx.Node, int] = {}
        writes: list[tuple[fx.Node, fx.Node]] = []
        held: dict[str, fx.Node] = {}
        for position, node in enumerate(graph.nodes):
            self._order[node] = position
            if node.op == "get_attr":
                self._join(held.setdefault(str(node.target), node), node)
            if node.op not in ("call_function", "call_method", "call_module"):
                continue
            inputs = [n for n in node.all_input_nodes if not isinstance(value(n), _NUMBERS)]
            schema = getattr(node.target, "_schema", None)
            if schema is None or any(r.alias_info is not None for r in schema.returns):
                for other in inputs:
                    self._join(other, node)
            if schema is None and node.target is not operator.getitem:
                writes += [(node, n) for n in inputs]
            elif schema is not None and schema.is_mutable and schema.name not in _HARMLESS:
                writes += [(node, n) for n in _written(node)]
        self._writes: dict[fx.Node, list[int]] = {}
        for writer, written in writes:
            self._writes.setdefault(self._root(written), []).append(self._order[writer])

    def between(self, made: fx.Node, reader: fx.Node) -> bool:
        """Whether memory of ``made`` is written after it is made and before ``reader`` runs."""
        low, high = self._order[made], self._order[reader]
        return any(low < at < high for at in self._writes.get(self._root(made), ()))

    def after(self, made: fx.Node) -> bool:
        """Whether memory of ``made`` is written at any time after it is made."""
        return any(at > self._order[made] for at in self._writes.get(self._root(made), ()))

    def ever(self, node: fx.Node) -> bool:
        """Whether memory of ``node`` is written anywhere."""
        return self._root(node) in self._writes

    def shared(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether two nodes may share memory."""
        return self._root(a) is self._root(b)

    def _root(self, node: fx.Node) -> fx.Node:
        while (up := self._parent.get(node, node)) is not node:
            node = up
        return node

    def _join(self, a: fx.Node, b: fx.Node) -> None:
        self._parent[self._root(b)] = self._root(a)


def _written(node: fx.Node) -> list[fx.Node]:
    """The arguments that the schema says are written to."""
    found: list[fx.Node] = []
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            found += [n for n in (given if isinstance(given, (list, tuple)) else [given]) if isinstance(n, fx.Node)]
    return found


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two indices may mean one place in memory, as in an expanded tensor; symbolic sizes count as unknown."""
    dims = [(st, n) for st, n in zip(tensor.stride(), tensor.shape) if not (isinstance(n, int) and n == 1)]
    if not all(isinstance(x, int) for dim in dims for x in dim):
        return True
    reach = 0
    for stride, size in sorted(dims):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False
