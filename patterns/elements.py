"""What one element of a tensor in a normalised graph is, as an expression in its index.

Abstract interpretation, on demand: ``at(node, index)`` asks each operation for its element at a symbolic index and
follows only what that element depends on. A view changes the index, arithmetic changes the value, and an operation that
is not described here makes its own result a *leaf*: a tensor of which nothing is known but its name. So the answer is
always true, and at worst says "some element of that tensor".

Writes are respected: an operation whose operand has been written to since it was made becomes a leaf itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from effcompile.patterns.bands import band
from effcompile.patterns.index_algebra import FALSE, TRUE, Bit, Cnf, Domain, Ge, Index, Opaque, expression, unit
from effcompile.patterns.storage import Writes, overlaps_itself
from effcompile.patterns.walk import arguments, value


@dataclasses.dataclass(frozen=True)
class Integer:
    """An integer, of any integer dtype."""

    expr: sympy.Expr


@dataclasses.dataclass(frozen=True)
class Real:
    """A known float, already rounded to its dtype."""

    value: float


@dataclasses.dataclass(frozen=True)
class Truth:
    """A boolean."""

    cnf: Cnf


@dataclasses.dataclass(frozen=True)
class Choice:
    """A number that depends on a condition."""

    condition: Cnf
    kept: Element
    other: Element


@dataclasses.dataclass(frozen=True)
class Data:
    """A float element of a leaf."""

    node: fx.Node
    index: Index


Element = Integer | Real | Truth | Choice | Data
Handler = Callable[["Elements", fx.Node, dict[str, Any], Index], Element]

HANDLERS: dict[str, Handler] = {}
"""From the name of an ATen operator, without overload and the underscore of an in-place form, to its elements."""


def describes(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler for operators, in ``element_views`` and ``element_math`` beside this file."""

    def add(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return add


def operator_name(node: fx.Node) -> str:
    """``aten.add_.Tensor`` -> ``add``: the result of an in-place form has the same elements."""
    schema = getattr(node.target, "_schema", None)
    space, _, name = schema.name.partition("::") if schema is not None else ("", "", "")
    if space != "aten":
        return ""
    return str(name.removesuffix("_") if not name.endswith("__") else name)


def is_in_place(node: fx.Node) -> bool:
    """Whether a call is the in-place form of an operation."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def has_data(element: Element) -> bool:
    """Whether a float element may be one that is not known."""
    if isinstance(element, Choice):
        return has_data(element.kept) or has_data(element.other)
    return isinstance(element, Data)


class Elements:
    """Elements of the tensors of one graph.

    Parameters
    ----------
    domain
        Index variables and sizes.
    writes
        Where the graph writes to memory.
    constants
        Nodes whose tensor never changes, with their real data.
    padding_index
        The index that means "row of the batch, key": a 2-D tensor read there is kept whole, as a padding mask.
    """

    def __init__(
        self,
        domain: Domain,
        writes: Writes,
        constants: Mapping[fx.Node, Tensor],
        padding_index: tuple[sympy.Expr, sympy.Symbol],
    ) -> None:
        self.domain = domain
        self.writes = writes
        self.constants = {n: t for n, v in constants.items() if (t := self._real(n, v)) is not None}
        self.padding_index = padding_index
        self.why: dict[fx.Node, str] = {}
        self.implied: dict[Ge, set[Bit]] = {}
        self._seen: dict[tuple[fx.Node, Index], Element] = {}

    def _real(self, node: fx.Node, given: Tensor) -> Tensor | None:
        """The data of a constant, unless the graph writes to it (the next call would see another value)."""
        held = given.constant if isinstance(given, FakeTensor) else given
        return None if held is None or isinstance(held, FakeTensor) or self.writes.ever(node) else held.detach()

    def at(self, node: fx.Node, index: Index, reader: fx.Node | None = None) -> Element:
        """The element of ``node`` at ``index``, as the operation ``reader`` sees it."""
        if reader is not None and self.writes.between(node, reader):
            raise Opaque("reads a tensor that has been written to in place")
        key = (node, index)
        if key not in self._seen:
            try:
                self._seen[key] = self._padding(node, index, self._apply(node, index))
            except Opaque as why:
                self.why.setdefault(node, str(why))
                self._seen[key] = self.leaf(node, index)
        return self._seen[key]

    def _apply(self, node: fx.Node, index: Index) -> Element:
        if node in self.constants:
            return self._constant(node, index)
        handler = HANDLERS.get(operator_name(node)) if node.op == "call_function" else None
        if handler is None:
            raise Opaque("" if node.op in ("placeholder", "get_attr") else "an operation that is not understood")
        args = arguments(node)
        if is_in_place(node) and overlaps_itself(value(args["self"])):
            raise Opaque("a write to a tensor that overlaps itself")
        return handler(self, node, args, index)

    def leaf(self, node: fx.Node, index: Index) -> Element:
        """An element of which only the place is known."""
        dtype = value(node).dtype
        if dtype == torch.bool:
            return Truth(unit(Bit(node, index)))
        if dtype.is_floating_point or dtype.is_complex:
            return Data(node, index)
        return Integer(self.domain.element(node, index))

    def depends(self, element: Element) -> bool:
        """Whether an element depends on tensor data that varies with the index (a 0-d tensor does not)."""
        if isinstance(element, Choice):
            return any(map(self.depends, (Truth(element.condition), element.kept, element.other)))
        if isinstance(element, Truth):
            return any(self._varies(literal) for clause in element.cnf for literal in clause)
        return self._varies(element) if isinstance(element, (Integer, Data)) else False

    def _varies(self, item: Ge | Bit | Integer | Data) -> bool:
        if isinstance(item, (Bit, Data)):
            indices = [item.index]
        else:
            indices = [self.domain.elements[s][1] for s in item.expr.free_symbols & self.domain.elements.keys()]
        return any(part.free_symbols & self.domain.sizes.keys() for index in indices for part in index)

    def _padding(self, node: fx.Node, index: Index, element: Element) -> Element:
        """Keep a 2-D tensor that is read at (row, key) whole:  p(b, j) -> p's own element  where p depends on data.

        Exact whatever ``p`` computes, since it is ``p``. What is known of ``p`` besides is kept too:
        p == known & rest  gives  p == known & p.
        """
        if not self.reads_padding(node, index) or not self.depends(element):
            return element
        if value(node).dtype.is_floating_point and not has_data(element):
            # An additive mask already: 0 here and -inf there.
            return element
        kept = self.truth(element)
        units = [next(iter(c)) for c in kept if len(c) == 1]
        if len(kept) == len(units) == 1 and self.is_padding(units[0]):
            return element
        if not isinstance(element, Truth):
            return self.leaf(node, index)
        own = Bit(node, index)
        known = [x for x in units if isinstance(x, Ge) and not self._varies(x)]
        for literal in known:
            self.implied.setdefault(literal, set()).add(own)
        return Truth(self.domain.conj(unit(own), *map(unit, known)))

    def is_padding(self, literal: Ge | Bit) -> bool:
        """Whether a literal says "kept iff nonzero" of a 2-D tensor at (row, key) that is long enough for every key."""
        if not isinstance(literal, Bit) or not literal.kept or not self.reads_padding(literal.node, literal.index):
            return False
        keys = self.domain.sizes[self.padding_index[1]]
        return self.domain.known(self.shape(literal.node)[1] - keys)

    def reads_padding(self, node: fx.Node, index: Index) -> bool:
        """Whether ``index`` reads a ``[B, S]`` (or ``[1, S]``) tensor at the row of the batch and the key."""
        row, key = self.padding_index
        if len(index) != 2 or index[1] != key:
            return False
        rows = self.shape(node)[0]
        if self.one(rows):
            return bool(index[0] == 0)
        return bool(index[0] == row) and row in self.domain.sizes and self.domain.same(rows, self.domain.sizes[row])

    def _constant(self, node: fx.Node, index: Index) -> Element:
        """Elements of a tensor with real data: one number, or two numbers told apart by a band of the index."""
        data, dtype = self.constants[node], value(node).dtype
        if tuple(data.shape) != tuple(value(node).shape):
            raise Opaque("a constant of another shape than the graph's")
        if any(part.free_symbols & self.domain.elements.keys() for part in index):
            raise Opaque("a constant read at a data-dependent place")
        if not data.numel():
            raise Opaque("an empty constant")
        low, high = data.min(), data.max()
        least, most, zero = number(low.item(), dtype), number(high.item(), dtype), number(0, dtype)
        if least == most:
            return least
        if zero not in (least, most) or not bool(((data == low) | (data == high)).all()):
            raise Opaque("a constant tensor that is no mask of two values, one of them zero")
        return self.select(band(self.domain, data != 0, index), least if most == zero else most, zero)

    def scalars(self) -> Iterator[tuple[fx.Node, Element]]:
        """Integer tensors with one element that the search came by, with that element."""
        for (node, _), element in list(self._seen.items()):
            dtype = value(node).dtype
            if all(self.one(s) for s in self.shape(node)) and dtype != torch.bool and not dtype.is_floating_point:
                yield node, element

    # Shapes and operands, for the handlers

    def shape(self, node: fx.Node) -> Index:
        """Sizes as expressions."""
        return tuple(expression(s) for s in value(node).shape)

    def size(self, given: Any) -> sympy.Expr:
        """An integer argument: a number, or a symbolic size."""
        given = value(given)
        if isinstance(given, bool) or not isinstance(given, (int, torch.SymInt)):
            raise Opaque("a number that is computed in the graph")
        return expression(given)

    def one(self, size: sympy.Expr) -> bool:
        """Whether a size is 1 for sure."""
        return bool(size == 1)

    def operand(self, given: Any, reader: fx.Node, index: Index) -> Element:
        """An argument of a pointwise operation, tensor or number, at the result's ``index``."""
        if isinstance(value(given), Tensor):
            return self.at(given, self.broadcast(given, self.shape(reader), index), reader)
        given = value(given)
        if isinstance(given, bool):
            return Truth(TRUE if given else FALSE)
        if isinstance(given, float):
            return number(given, torch.float64)
        return Integer(self.size(given))

    def broadcast(self, node: fx.Node, sizes: Index, index: Index) -> Index:
        """The index into ``node`` where a result of ``sizes`` has ``index``: dimensions of size 1 are read at 0."""
        own = self.shape(node)
        first = len(index) - len(own)
        if first < 0:
            raise Opaque("a broadcast to fewer dimensions")
        return tuple(self.stretched(s, o, part) for s, o, part in zip(own, sizes[first:], index[first:]))

    def stretched(self, own: sympy.Expr, outer: sympy.Expr, part: sympy.Expr) -> sympy.Expr:
        """One dimension's index through a broadcast from size ``own`` to ``outer``."""
        if self.one(own):
            return sympy.S.Zero
        if not self.domain.same(own, outer):
            raise Opaque("a broadcast between sizes that are not known to be equal")
        return part

    # Values

    def select(self, condition: Cnf, kept: Element, other: Element) -> Element:
        """``kept`` where ``condition``, else ``other``."""
        if condition == TRUE or kept == other:
            return kept
        if condition == FALSE:
            return other
        if isinstance(kept, Truth) and isinstance(other, Truth):
            return Truth(self.domain.choose(condition, kept.cnf, other.cnf))
        return Choice(condition, kept, other)

    def each(self, function: Callable[[Element], Element], element: Element) -> Element:
        """Apply a function to what an element can be:  f(c ? x : y)  ->  c ? f(x) : f(y)."""
        if isinstance(element, Choice):
            kept, other = self.each(function, element.kept), self.each(function, element.other)
            return self.select(element.condition, kept, other)
        return function(element)

    def pairs(self, function: Callable[[Element, Element], Element], a: Element, b: Element) -> Element:
        """The same for two arguments."""
        return self.each(lambda x: self.each(lambda y: function(x, y), b), a)

    def cast(self, element: Element, dtype: torch.dtype) -> Element:
        """``element`` in another dtype."""
        if isinstance(element, Truth):
            if dtype == torch.bool:
                return element
            return self.select(element.cnf, number(1, dtype), number(0, dtype))
        return self.each(lambda x: self._cast_number(x, dtype), element)

    def typed(self, element: Element, node: fx.Node) -> Element:
        """An element in the dtype of the node's result; data cannot change its dtype and stay known."""
        if isinstance(element, Data) and value(element.node).dtype == value(node).dtype:
            return element
        return self.cast(element, value(node).dtype)

    def _cast_number(self, x: Element, dtype: torch.dtype) -> Element:
        if dtype == torch.bool:
            return Truth(self.domain.negate(self.is_zero(x)))
        if isinstance(x, Integer):
            if dtype.is_floating_point:
                if not x.expr.is_Integer:
                    raise Opaque("an index turned into a float")
                return number(int(x.expr), dtype)
            return self.fitting(x, dtype)
        if isinstance(x, Real):
            return number(x.value, dtype)
        if isinstance(x, Truth):
            return self.cast(x, dtype)
        raise Opaque("a cast of data")

    def fitting(self, x: Integer, dtype: torch.dtype) -> Integer:
        """``x`` if ``dtype`` holds it without wrapping.

        Positions and lengths in int64 are taken to stay far below 2**63, with factors below 2**31. A narrower type must
        be proved to be wide enough.
        """
        bounds = torch.iinfo(dtype)
        if x.expr in self.domain.elements:
            own = torch.iinfo(value(self.domain.elements[x.expr][0]).dtype)
            fits = bounds.min <= own.min and own.max <= bounds.max
        elif dtype == torch.int64 and not x.expr.is_Integer:
            fits = all(abs(c) < 2**31 for c in x.expr.as_coefficients_dict().values())
        else:
            fits = self.domain.nonnegative(x.expr - bounds.min) and self.domain.nonnegative(bounds.max - x.expr)
        if not fits:
            raise Opaque(f"arithmetic that may not fit {str(dtype).removeprefix('torch.')}")
        return x

    def is_zero(self, x: Element) -> Cnf:
        """``x == 0``."""
        if isinstance(x, Integer):
            return self.domain.zero(x.expr)
        if isinstance(x, Real):
            return TRUE if x.value == 0 else FALSE
        if isinstance(x, Truth):
            return self.domain.negate(x.cnf)
        if isinstance(x, Data):
            return unit(Bit(x.node, x.index, kept=False))
        return self.domain.choose(x.condition, self.is_zero(x.kept), self.is_zero(x.other))

    def truth(self, element: Element) -> Cnf:
        """An element as a condition."""
        cast = self.cast(element, torch.bool)
        assert isinstance(cast, Truth)
        return cast.cnf


def number(given: float | bool, dtype: torch.dtype) -> Element:
    """A number as ``dtype`` holds it."""
    if dtype == torch.bool:
        return Truth(TRUE if given else FALSE)
    if dtype.is_complex:
        raise Opaque("complex numbers")
    if dtype.is_floating_point:
        held = torch.tensor(given, dtype=torch.float64).to(dtype).item()
        if held != held:
            raise Opaque("a number that is nan")
        return Real(held)
    if not torch.iinfo(dtype).min <= given <= torch.iinfo(dtype).max:
        raise Opaque("a number that its dtype cannot hold")
    return Integer(sympy.Integer(int(given)))
