"""Elements of arithmetic, comparisons and logic: where a mask's condition comes from."""

from __future__ import annotations

import operator
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from effcompile.patterns.elements import (
    Data,
    Element,
    Elements,
    Integer,
    Real,
    Truth,
    describes,
    number,
    operator_name,
)
from effcompile.patterns.index_algebra import Cnf, Index, Opaque
from effcompile.patterns.walk import value

Args = dict[str, Any]


# Arithmetic


@describes("add", "sub", "rsub", "mul")
def _arithmetic(of: Elements, node: fx.Node, args: Args, index: Index) -> Element:
    name, dtype = operator_name(node), value(node).dtype
    a, b = (of.cast(of.operand(args[k], node, index), dtype) for k in ("self", "other"))
    if dtype == torch.bool:
        # On booleans + is "or" and * is "and".
        if name not in ("add", "mul") or args.get("alpha", 1) != 1:
            raise Opaque("a difference of booleans")
        join = of.domain.disj if name == "add" else of.domain.conj
        return Truth(join(of.truth(a), of.truth(b)))
    factor = args.get("alpha", 1)
    if factor != 1:
        if dtype.is_floating_point:
            raise Opaque("a scaled sum of floats, which may be rounded once or twice")
        scale = Integer(of.size(factor))
        b = of.each(lambda x: _combine(of, operator.mul, x, scale, dtype), b)
    if name == "rsub":
        a, b = b, a
    function = {"add": operator.add, "sub": operator.sub, "rsub": operator.sub, "mul": operator.mul}[name]
    return of.pairs(lambda x, y: _combine(of, function, x, y, dtype), a, b)


@describes("neg")
def _neg(of: Elements, node: fx.Node, args: Args, index: Index) -> Element:
    dtype, zero = value(node).dtype, number(0, value(node).dtype)
    element = of.operand(args["self"], node, index)
    return of.each(lambda x: _combine(of, operator.sub, zero, x, dtype), element)


@describes("minimum", "maximum")
def _extremum(of: Elements, node: fx.Node, args: Args, index: Index) -> Element:
    a, b = (of.cast(of.operand(args[k], node, index), value(node).dtype) for k in ("self", "other"))
    # minimum(a, b) = a where a <= b, else b; maximum the other way round.
    least = operator_name(node) == "minimum"
    return of.pairs(lambda x, y: of.select(_at_most(of, x, y), x if least else y, y if least else x), a, b)


@describes("diff")
def _diff(of: Elements, node: fx.Node, args: Args, index: Index) -> Element:
    # y = cat(prepend, x, append);  y[k + 1] - y[k]
    if args["n"] != 1 or args["append"] is not None:
        raise Opaque("a repeated difference")
    dim, source, before = args["dim"] % len(index), args["self"], args["prepend"]
    ahead = of.shape(before)[dim] if before is not None else sympy.S.Zero

    def joined(place: sympy.Expr) -> Element:
        def of_part(part: fx.Node, at: sympy.Expr) -> Element:
            return of.typed(of.at(part, (*index[:dim], sympy.expand(at), *index[dim + 1 :]), node), node)

        element = of_part(source, place - ahead)
        if before is None:
            return element
        return of.select(of.domain.ge(ahead - 1 - place), of_part(before, place), element)

    dtype = value(node).dtype
    if dtype == torch.bool:
        raise Opaque("a difference of booleans")
    return of.pairs(lambda x, y: _combine(of, operator.sub, x, y, dtype), joined(index[dim] + 1), joined(index[dim]))


@describes("cumsum")
def _cumsum(of: Elements, node: fx.Node, args: Args, index: Index) -> Element:
    # The sum of a number over 0..k is k + 1 times the number. It must be that number everywhere, so it is read at a new
    # variable that runs over the whole dimension.
    if not index:
        raise Opaque("a running sum of a scalar")
    dim, dtype = args["dim"] % len(index), value(node).dtype
    anywhere = of.domain.variable("k", of.shape(args["self"])[dim])
    element = of.cast(of.at(args["self"], (*index[:dim], anywhere, *index[dim + 1 :]), node), dtype)
    if not isinstance(element, Integer) or not element.expr.is_Integer:
        raise Opaque("a running sum of data")
    return of.fitting(Integer(sympy.expand(element.expr * (index[dim] + 1))), dtype)


# Conditions


@describes("le", "lt", "ge", "gt", "eq", "ne", "less_equal", "less", "greater_equal", "greater", "not_equal")
def _compare(of: Elements, node: fx.Node, args: Args, index: Index) -> Element:
    name = operator_name(node)
    a, b = (of.operand(args[k], node, index) for k in ("self", "other"))
    if not isinstance(value(args["other"]), torch.Tensor):
        b = _beside(b, value(args["self"]).dtype)
    a, b = (of.cast(x, torch.int64) if isinstance(x, Truth) else x for x in (a, b))
    if name in ("ge", "greater_equal", "lt", "less"):
        a, b = b, a
    relation = _equal if name in ("eq", "ne", "not_equal") else _at_most
    flip = name in ("ne", "not_equal", "lt", "less", "gt", "greater")
    result = of.truth(of.pairs(lambda x, y: Truth(relation(of, x, y)), a, b))
    return Truth(of.domain.negate(result) if flip else result)


@describes("bitwise_and", "bitwise_or", "bitwise_xor", "__and__", "__or__", "__xor__")
@describes("logical_and", "logical_or", "logical_xor")
def _logical(of: Elements, node: fx.Node, args: Args, index: Index) -> Element:
    name = operator_name(node).strip("_")
    if value(node).dtype != torch.bool:
        raise Opaque("bit operations on numbers")
    a, b = (of.truth(of.operand(args[k], node, index)) for k in ("self", "other"))
    if name.endswith("xor"):
        return Truth(of.domain.choose(a, of.domain.negate(b), b))
    return Truth(of.domain.conj(a, b) if name.endswith("and") else of.domain.disj(a, b))


@describes("bitwise_not", "logical_not")
def _not(of: Elements, node: fx.Node, args: Args, index: Index) -> Element:
    if value(node).dtype != torch.bool:
        raise Opaque("bit operations on numbers")
    return Truth(of.domain.negate(of.truth(of.operand(args["self"], node, index))))


@describes("abs")
def _abs(of: Elements, node: fx.Node, args: Args, index: Index) -> Element:
    def one(x: Element) -> Element:
        if isinstance(x, Integer):
            return of.select(of.domain.ge(x.expr), x, of.fitting(Integer(sympy.expand(-x.expr)), dtype))
        raise Opaque("an absolute value of data")

    dtype = value(node).dtype
    return of.each(one, of.operand(args["self"], node, index))


# Helpers


def _beside(b: Element, dtype: torch.dtype) -> Element:
    """A Python number compared with a tensor takes the tensor's dtype if it is of the same kind."""
    if isinstance(b, Integer) and dtype != torch.bool and not dtype.is_floating_point:
        if not b.expr.is_Integer:
            return b
        return number(int(b.expr), dtype)
    if dtype.is_floating_point and isinstance(b, (Integer, Real)):
        if isinstance(b, Real):
            return number(b.value, dtype)
        if b.expr.is_Integer:
            return number(int(b.expr), dtype)
    return b


def _combine(of: Elements, function: Any, x: Element, y: Element, dtype: torch.dtype) -> Element:
    """Arithmetic on two elements that are no choices, in ``dtype``."""
    if isinstance(x, Integer) and isinstance(y, Integer):
        return of.fitting(Integer(sympy.expand(function(x.expr, y.expr))), dtype)
    if isinstance(x, Real) and isinstance(y, Real):
        a, b = (torch.tensor(v.value, dtype=dtype) for v in (x, y))
        return number(function(a, b).item(), dtype)
    raise Opaque("arithmetic on data")


def _at_most(of: Elements, x: Element, y: Element) -> Cnf:
    """x <= y  ->  y - x >= 0."""
    if isinstance(x, Integer) and isinstance(y, Integer):
        return of.domain.ge(y.expr - x.expr)
    if isinstance(x, Real) and isinstance(y, Real):
        return of.truth(number(x.value <= y.value, torch.bool))
    raise Opaque("a comparison of data")


def _equal(of: Elements, x: Element, y: Element) -> Cnf:
    """x == y; a float element compared with 0 is the element's truth."""
    if isinstance(x, Integer) and isinstance(y, Integer):
        return of.domain.zero(x.expr - y.expr)
    if isinstance(x, Real) and isinstance(y, Real):
        return of.truth(number(x.value == y.value, torch.bool))
    for data, other in ((x, y), (y, x)):
        if isinstance(data, Data) and isinstance(other, Real) and other.value == 0:
            return of.is_zero(data)
    raise Opaque("a comparison of data")
