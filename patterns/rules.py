"""Rules of masks that compare data: packed sequences, and a prefix that all queries see."""

from __future__ import annotations

import sympy  # type: ignore[import-untyped]
from torch import fx

from effcompile.patterns.elements import Elements
from effcompile.patterns.index_algebra import Clause, Ge, Index, Literal
from effcompile.patterns.walk import value

Prefix = tuple[fx.Node | None, int]
"""How many keys from the first on everyone sees: an element for each row (or one for all), plus a number."""


def same_segment(
    units: set[Literal], of: Elements, query: sympy.Expr, key: sympy.Symbol
) -> tuple[fx.Node, sympy.Expr, set[Literal]] | None:
    """Two literals that say ``x[b, i + offset] == x[b, j]``, with ``x`` ``[B or 1, >= S]`` of integers and the offset.

    ``a == b`` arrives as ``a - b >= 0`` and ``b - a >= 0``.
    """
    for literal in units:
        if not isinstance(literal, Ge) or (other := Ge(sympy.expand(-literal.expr))) not in units:
            continue
        terms = literal.expr.as_coefficients_dict()
        if sorted(terms.values()) != [-1, 1] or not terms.keys() <= of.domain.elements.keys():
            continue
        for own, seen in (tuple(terms), tuple(terms)[::-1]):
            (node, at), (again, place) = (of.domain.elements[symbol] for symbol in (own, seen))
            offset = sympy.expand(at[-1] - query) if at else query
            fixed = not offset.free_symbols & of.domain.sizes.keys()
            if node is again and at[:-1] == place[:-1] and fixed and of.reads_padding(node, place) and _long(of, node):
                return node, offset, {literal, other}
    return None


def _long(of: Elements, node: fx.Node) -> bool:
    """Whether a ``[B, N]`` tensor has an element for every key, and keeps it."""
    keys = of.domain.sizes[of.padding_index[1]]
    return of.domain.known(of.shape(node)[1] - keys) and not of.writes.after(node)


def prefix_bound(
    clause: Clause, of: Elements, query: sympy.Expr, key: sympy.Symbol
) -> tuple[sympy.Expr, Prefix] | None:
    """Offset and prefix of ``j <= i + offset  or  j < prefix``. With one query the two cannot be told apart."""
    if len(clause) != 2 or query == 0 or not all(isinstance(x, Ge) for x in clause):
        return None
    found: dict[bool, sympy.Expr] = {}
    for literal in clause:
        parts = of.domain.linear(literal.expr)  # type: ignore[union-attr]
        if parts is None or parts[0].pop(key, None) != -1:
            return None
        if parts[0] not in ({}, {query: 1}):
            return None
        found[bool(parts[0])] = parts[1]
    if len(found) != 2 or (prefix := _by_row(found[False] + 1, of)) is None:
        return None
    return found[True], prefix


def _by_row(length: sympy.Expr, of: Elements) -> Prefix | None:
    """A number, or a number plus one element of an integer tensor that has one for each row or one for all."""
    number, rest = length.as_coeff_Add()
    if not number.is_Integer:
        return None
    if rest == 0:
        return None, int(number)
    if rest not in of.domain.elements:
        return None
    node, index = of.domain.elements[rest]
    dims = [d for d, part in enumerate(index) if part != 0]
    rows = [of.shape(node)[d] for d in dims]
    others = [size for d, size in enumerate(of.shape(node)) if d not in dims]
    row: Index = of.padding_index[:1]
    whole = not dims or (tuple(index[d] for d in dims) == row and of.domain.same(rows[0], of.domain.sizes[row[0]]))
    if not whole or not all(map(of.one, others)) or of.writes.after(node) or value(node).dtype.is_floating_point:
        return None
    return node, int(number)
