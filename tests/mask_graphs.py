"""Random graphs that compute masks, and the oracle: what each tensor of a graph held when it was made."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from effcompile.patterns.elements import Choice, Data, Element, Integer, Real, Truth
from effcompile.patterns.index_algebra import Bit, Domain, Index, Literal
from effcompile.patterns.masks import Mask

aten = torch.ops.aten


class Build:
    """A graph built one call at a time and run at the same time: ``held`` is every tensor as it was when made."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.held: dict[fx.Node, Tensor] = {}

    def input(self, tensor: Tensor) -> fx.Node:
        return self._add(self.graph.placeholder(f"x{len(self.held)}"), tensor)

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Run ``op`` on what the nodes hold *now*, which differs from ``held`` if something has written to them."""
        real = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        result = op(*real[0], **real[1])
        return self._add(self.graph.call_function(op, args, kwargs), result)

    def _add(self, node: fx.Node, tensor: Tensor) -> fx.Node:
        node.meta["val"] = tensor
        self.held[node] = tensor.clone()
        return node


def number(given: Element | Literal, point: dict[Any, Any], domain: Domain, held: dict[fx.Node, Tensor]) -> Any:
    """An element at a point of the index space, with what the leaves held."""

    def integer(expr: sympy.Expr) -> int:
        values = dict(point)
        for symbol in expr.free_symbols & domain.elements.keys():
            node, index = domain.elements[symbol]
            values[symbol] = sympy.Integer(int(read(node, index)))
        return int(expr.xreplace(values))

    def read(node: fx.Node, index: Index) -> Any:
        return held[node][tuple(integer(part) for part in index)].item()

    def holds(literal: Literal) -> bool:
        if isinstance(literal, Bit):
            return (read(literal.node, literal.index) != 0) == literal.kept
        return integer(literal.expr) >= 0

    def truth(cnf: Any) -> bool:
        return all(any(guarded(x) for x in clause) for clause in cnf)

    def guarded(literal: Literal) -> bool:
        # An excluded part of a cut or padded tensor may be read outside of its bounds: its value must not matter.
        try:
            return holds(literal)
        except IndexError:
            return False

    match given:
        case Integer(expr):
            return integer(expr)
        case Real(value):
            return value
        case Truth(cnf):
            return truth(cnf)
        case Data(node, index):
            return read(node, index)
        case Choice(condition, kept, other):
            return number(kept if truth(condition) else other, point, domain, held)
    raise TypeError(given)


def predicted(mask: Mask, held: dict[fx.Node, Tensor], batch: int, queries: int, keys: int) -> Tensor:
    """What a recovered mask says: bool ``[B, T, S]``."""
    offset = int(held[mask.offset]) if isinstance(mask.offset, fx.Node) else int(mask.offset)
    position, key = offset + torch.arange(queries)[:, None], torch.arange(keys)
    keep = torch.ones(batch, queries, keys, dtype=torch.bool)
    if mask.predicate.causal:
        keep &= key <= position
    if mask.predicate.window is not None:
        keep &= key > position - mask.predicate.window
    assert mask.predicate.key_mask == (mask.padding is not None)
    assert mask.predicate.prefix == (mask.prefix is not None)
    if mask.prefix is not None:
        node, number = mask.prefix
        lengths = (0 if node is None else held[node].flatten()) + torch.tensor([number])
        keep |= key < lengths[:, None, None]
    assert mask.predicate.segments == (mask.segments is not None)
    if mask.segments is not None:
        ids = held[mask.segments]
        keep &= ids[:, position.flatten(), None] == ids[:, None, :keys]
    if mask.padding is not None:
        keep &= (held[mask.padding][:, None, :keys] != 0).expand(batch, queries, keys)
    return keep


def kept(term: Tensor, batch: int, queries: int, keys: int) -> Tensor:
    """What a mask tensor says: bool ``[B, H, T, S]``."""
    keep = term if term.dtype == torch.bool else term == 0
    heads = term.shape[1] if term.ndim == 4 else term.shape[0] if term.ndim == 3 else 1
    return keep.expand(batch, heads, queries, keys)


NUMBERS: tuple[Any, ...] = (0, 1, 2, 3, -1, -2, True, False, 0.0, 1.0, float("-inf"), torch.finfo(torch.float32).min)
DTYPES = (torch.bool, torch.int64, torch.int64, torch.int32, torch.uint8, torch.float32, torch.float16)


class Soup:
    """Operations in any order on small tensors. A draw that PyTorch refuses is left out."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.build = Build()
        torch.manual_seed(seed)
        r = self.random
        self.sizes = (r.randint(1, 3), r.randint(1, 5), r.randint(1, 6))
        b, t, s = self.sizes
        self.pool: list[fx.Node] = [
            self.build.input(torch.tensor(r.randint(-2, 5))),
            self.build.input(torch.tensor(r.randint(0, 5), dtype=torch.int32)),
            self.build.input(torch.randint(0, 2, (b, s), dtype=r.choice((torch.bool, torch.int64)))),
            self.build.input(torch.randint(0, 3, (b, t))),
            self.build.input(torch.randint(-1, 2, (t, s)).float()),
        ]
        self.inputs = list(self.pool)
        table = torch.ones(7, 7, dtype=r.choice(DTYPES)).tril(r.randint(-2, 2))
        if r.random() < 0.3:
            table[r.randrange(7), r.randrange(7)] = r.randint(0, 1)
        self.constant = self.build.input(table)
        self.pool.append(self.constant)
        for size in (b, t, s, s, t):
            self.add(aten.arange.default, size)

    def add(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node | None:
        try:
            before = len(self.build.graph.nodes)
            node = self.build.call(op, *args, **kwargs)
        except (RuntimeError, IndexError, TypeError, ValueError):
            assert len(self.build.graph.nodes) == before
            return None
        made = node.meta["val"]
        # int64 is taken not to overflow, which an infinity turned into an integer would soon do.
        huge = not made.dtype.is_floating_point and made.dtype != torch.bool and bool((made.abs() > 2**40).any())
        if 0 < made.numel() <= 128 and made.ndim <= 4 and not huge:
            self.pool.append(node)
        return node

    def pick(self) -> fx.Node:
        # Later nodes are deeper, and are preferred.
        return self.random.choice(self.pool[-12:] if self.random.random() < 0.8 else self.pool)

    def step(self) -> None:
        r, x = self.random, self.pick()
        rank, sizes = x.meta["val"].ndim, list(x.meta["val"].shape)
        dim = r.randint(-rank, rank - 1) if rank else 0
        size = sizes[dim] if rank else 1
        other = self.pick() if r.random() < 0.6 else r.choice(NUMBERS)
        suffix = "Tensor" if isinstance(other, fx.Node) else "Scalar"
        some = r.randint(-3, 6)

        def arithmetic() -> None:
            name = r.choice(("add", "sub", "mul", "add_", "sub_"))
            self.add(getattr(aten, name).Tensor, x, other, **({"alpha": 2} if r.random() < 0.1 else {}))

        def compare() -> None:
            self.add(getattr(getattr(aten, r.choice(("le", "lt", "ge", "gt", "eq", "ne"))), suffix), x, other)

        def logical() -> None:
            names = ("bitwise_and", "bitwise_or", "bitwise_xor", "__and__", "__or__", "bitwise_and_")
            self.add(getattr(getattr(aten, r.choice(names)), suffix), x, other)
            name = r.choice(("logical_and", "logical_or", "logical_xor"))
            self.add(getattr(aten, name).default, x, self.pick())

        def choose() -> None:
            condition, second = self.pick(), self.pick()
            self.add(aten.where.self, condition, x, second)
            self.add(aten.where.ScalarOther, condition, x, r.choice(NUMBERS))
            self.add(aten.where.ScalarSelf, condition, r.choice(NUMBERS), x)
            self.add(r.choice((aten.masked_fill.Scalar, aten.masked_fill_.Scalar)), x, condition, r.choice(NUMBERS))

        def views() -> None:
            self.add(aten.unsqueeze.default, x, r.randint(-rank - 1, rank))
            if rank:
                bounds = r.choice((None, 0, 1, -1, -2, 2)), r.choice((None, 3, 5, -1)), r.choice((1, 1, 1, 2))
                self.add(aten.slice.Tensor, x, dim, *bounds)
                self.add(aten.select.int, x, dim, r.randint(-size, size - 1))
                self.add(aten.transpose.int, x, dim, r.randint(-rank, rank - 1))
                self.add(aten.permute.default, x, r.sample(range(rank), rank))
                self.add(aten.squeeze.dim, x, dim)
                self.add(aten.squeeze.default, x)
                self.add(
                    aten.expand.default, x, [r.choice((2, 1)), *(r.choice((1, 3)) if n == 1 else n for n in sizes)]
                )
                self.add(aten.repeat.default, x, [1] * r.randint(0, 1) + [r.choice((1, 1, 2)) for _ in sizes])
                ones = [n for n in sizes if n != 1]
                for _ in range(2):
                    ones.insert(r.randint(0, len(ones)), 1)
                self.add(aten.view.default, x, ones)
                self.add(aten.reshape.default, x, r.choice(([-1], [*sizes, 1], [1, *sizes])))

        def index() -> None:
            tensors = [r.choice((None, self.pick(), self.pick())) for _ in range(r.randint(1, max(rank, 1)))]
            self.add(aten.index.Tensor, x, tensors)
            self.add(aten.index_select.default, x, dim, self.pick())

        def pieces() -> None:
            self.add(aten.cat.default, r.choice(([x, x], [x, self.pick()], [self.pick(), x, x])), dim)
            widths = [r.randint(-1, 2) for _ in range(2 * r.randint(1, max(rank, 1)))]
            self.add(aten.constant_pad_nd.default, x, widths, r.choice(NUMBERS))
            self.add(aten.pad.default, x, widths)
            self.add(aten.diff.default, x, 1, dim, r.choice((None, x, self.pick())))
            self.add(aten.cumsum.default, x, dim)

        def triangles() -> None:
            ops = (aten.tril.default, aten.triu.default, aten.tril_.default, aten.triu_.default)
            self.add(r.choice(ops), x, some)

        def casts() -> None:
            self.add(aten.to.dtype, x, r.choice(DTYPES))
            self.add(r.choice((aten.clone, aten.alias, aten.contiguous, aten.detach)).default, x)
            self.add(aten.zeros_like.default, x)
            self.add(aten.full_like.default, x, r.choice(NUMBERS), dtype=r.choice(DTYPES))
            self.add(aten.new_ones.default, x, r.choice(([], sizes)), dtype=r.choice(DTYPES))

        def unary() -> None:
            self.add(r.choice((aten.bitwise_not.default, aten.logical_not.default)), x)
            self.add(r.choice((aten.neg.default, aten.abs.default)), x)
            self.add(aten.rsub.Scalar, x, r.choice(NUMBERS))
            self.add(r.choice((aten.minimum.default, aten.maximum.default)), x, self.pick())

        def writes() -> None:
            self.add(aten.copy_.default, x, self.pick())
            self.add(aten.fill_.Scalar, x, r.choice(NUMBERS))

        families: list[tuple[Callable[[], None], int]] = [
            (arithmetic, 4), (compare, 6), (logical, 4), (choose, 3), (views, 4), (index, 3), (pieces, 2),
            (triangles, 1), (casts, 2), (unary, 2), (writes, 1),
        ]  # fmt: skip
        r.choices([f for f, _ in families], [w for _, w in families])[0]()
