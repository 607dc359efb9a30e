"""Exact algebra of booleans over integer index variables: what a mask's elements are written in.

An integer is a sympy expression in index variables (each with a range ``0 <= v < size``), symbolic sizes, and symbols
that stand for elements of tensors. A boolean is kept in one normal form: a conjunction of clauses, each a disjunction
of literals; a literal is ``expression >= 0`` or the truth of one element of a tensor. Every step is an equivalence on
the whole index domain, and nothing is ever assumed about an element.

Sizes are compared by what the shape environment knows already: its ranges and its guards. No guard is added, and what
it does not know is not used.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true

Index = tuple[sympy.Expr, ...]

MOST_CLAUSES = 48
"""A condition with more clauses than this is no mask that anybody would write; it is treated as unknown."""


class Opaque(Exception):
    """An operation, or a use of it, that the algebra does not describe. The text says which."""


@dataclasses.dataclass(frozen=True)
class Ge:
    """``expr >= 0`` in the integers."""

    expr: sympy.Expr


@dataclasses.dataclass(frozen=True)
class Bit:
    """Whether element ``index`` of ``node`` is nonzero (``kept``) or zero."""

    node: fx.Node
    index: Index
    kept: bool = True


Literal = Ge | Bit
Clause = frozenset[Literal]
Cnf = frozenset[Clause]

TRUE: Cnf = frozenset()
FALSE: Cnf = frozenset({frozenset[Literal]()})


def unit(literal: Literal) -> Cnf:
    """The condition that is one literal."""
    return frozenset({frozenset({literal})})


def opposite(literal: Literal) -> Literal:
    """not (e >= 0)  ->  -e - 1 >= 0, because ``e`` is an integer."""
    if isinstance(literal, Bit):
        return dataclasses.replace(literal, kept=not literal.kept)
    return Ge(sympy.expand(-literal.expr - 1))


def expression(size: int | torch.SymInt | sympy.Expr) -> sympy.Expr:
    """A size as sympy sees it."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.sympify(size)


class Domain:
    """The index variables with their ranges, and what is known of symbolic sizes.

    Parameters
    ----------
    shape_env
        Where symbolic sizes come from; ``None`` if all sizes are numbers.
    """

    def __init__(self, shape_env: ShapeEnv | None) -> None:
        self.shape_env = shape_env
        self.sizes: dict[sympy.Symbol, sympy.Expr] = {}
        self.elements: dict[sympy.Symbol, tuple[fx.Node, Index]] = {}
        self._symbols: dict[tuple[fx.Node, Index], sympy.Symbol] = {}
        # Per object, not on the method: a cache on the method would keep every graph alive.
        self.nonnegative = functools.cache(self._nonnegative)

    def variable(self, name: str, size: sympy.Expr) -> sympy.Symbol:
        """A new index variable that runs from 0 to ``size - 1``."""
        made = sympy.Dummy(name, integer=True)
        self.sizes[made] = size
        return made

    def element(self, node: fx.Node, index: Index) -> sympy.Symbol:
        """The symbol of one integer element of a tensor: the same symbol for the same element."""
        if (node, index) not in self._symbols:
            made = sympy.Dummy(f"{node.name}{list(index) or ''}", integer=True)
            self._symbols[node, index] = made
            self.elements[made] = (node, index)
        return self._symbols[node, index]

    def linear(self, expr: sympy.Expr) -> tuple[dict[sympy.Symbol, sympy.Expr], sympy.Expr] | None:
        """``expr`` as ``sum(coefficient * index variable) + rest``, or None if it is not affine in the variables."""
        coefficients: dict[sympy.Symbol, sympy.Expr] = {}
        rest = []
        for term in sympy.Add.make_args(sympy.expand(expr)):
            variables = term.free_symbols & self.sizes.keys()
            if not variables:
                rest.append(term)
                continue
            factor, power = term.as_independent(*variables)
            if power not in self.sizes:
                return None
            coefficients[power] = coefficients.get(power, sympy.S.Zero) + factor
        return coefficients, sympy.Add(*rest)

    def _nonnegative(self, expr: sympy.Expr) -> bool:
        """Whether ``expr >= 0`` for every index in range and every value of elements and sizes; False if not known.

        An affine expression is least at a corner of the box. A box with an empty side has no index at all.
        """
        parts = self.linear(expr)
        if parts is None:
            return False
        coefficients, least = parts
        for variable, factor in coefficients.items():
            if not factor.is_number:
                return False
            if factor < 0:
                least = least + factor * (self.sizes[variable] - 1)
        return self.known(sympy.expand(least))

    def known(self, expr: sympy.Expr) -> bool:
        """Whether a number, or an expression of sizes, is >= 0 for sure."""
        if expr.is_number:
            return bool(expr >= 0)
        if self.shape_env is None or expr.free_symbols & self.elements.keys():
            return False
        relation = sympy.Ge(expr, 0)
        if isinstance(relation, sympy.logic.boolalg.BooleanAtom):
            return bool(relation)
        if statically_known_true(self.shape_env.create_symboolnode(relation)):
            return True
        slack = (sympy.expand(expr - fact) for fact in self._facts if fact.free_symbols == expr.free_symbols)
        return any(s.is_number and s >= 0 for s in slack)

    @functools.cached_property
    def _facts(self) -> list[sympy.Expr]:
        """Expressions of sizes that are >= 0 by guards already taken: the graph runs only where these hold."""
        assert self.shape_env is not None
        facts = []
        for guard in self.shape_env.guards:
            match self.shape_env.replace(guard.expr):
                case sympy.Ge(lhs=a, rhs=b) | sympy.Le(lhs=b, rhs=a):
                    facts.append(a - b)
                case sympy.Gt(lhs=a, rhs=b) | sympy.Lt(lhs=b, rhs=a):
                    facts.append(a - b - 1)
        return facts

    def same(self, a: sympy.Expr, b: sympy.Expr) -> bool:
        """Whether two sizes are equal for sure."""
        difference = sympy.expand(a - b)
        return difference == 0 or (self.known(difference) and self.known(-difference))

    # Conditions

    def ge(self, expr: sympy.Expr) -> Cnf:
        """``expr >= 0``, decided where its range decides it."""
        expr = _reduced(sympy.expand(expr))
        if self.nonnegative(expr):
            return TRUE
        if self.nonnegative(sympy.expand(-expr - 1)):
            return FALSE
        return unit(Ge(expr))

    def zero(self, expr: sympy.Expr) -> Cnf:
        """``expr == 0``; for one element alone its truth, negated, which is what a padding mask says."""
        expr = sympy.expand(expr)
        for symbol in (expr, -expr):
            if symbol in self.elements:
                return unit(Bit(*self.elements[symbol], kept=False))
        return self.conj(self.ge(expr), self.ge(-expr))

    def conj(self, *conditions: Cnf) -> Cnf:
        """All of the conditions."""
        clauses = {c for condition in conditions for c in condition}
        return self._simplified(clauses)

    def disj(self, a: Cnf, b: Cnf) -> Cnf:
        """Either condition:  (p & q) | r  ->  (p | r) & (q | r)."""
        if len(a) * len(b) > MOST_CLAUSES:
            raise Opaque("a condition with too many alternatives")
        return self._simplified({c for x in a for y in b if (c := self._clause(x | y)) is not None})

    def negate(self, a: Cnf) -> Cnf:
        """not (p & q)  ->  not p | not q."""
        result = FALSE
        for clause in a:
            result = self.disj(result, self.conj(*(unit(opposite(x)) for x in clause)))
        return result

    def choose(self, condition: Cnf, a: Cnf, b: Cnf) -> Cnf:
        """``a`` where ``condition``, else ``b``:  (not c | a) & (c | b), which is  c & a  where ``b`` never holds."""
        if b == FALSE:
            return self.conj(condition, a)
        if a == FALSE:
            return self.conj(self.negate(condition), b)
        return self.conj(self.disj(self.negate(condition), a), self.disj(condition, b))

    def implies(self, a: Literal, b: Literal) -> bool:
        """Whether ``b`` holds wherever ``a`` holds:  x >= 0  and  y - x >= 0  give  y >= 0."""
        if a == b:
            return True
        return isinstance(a, Ge) and isinstance(b, Ge) and self.nonnegative(sympy.expand(b.expr - a.expr))

    def _excludes(self, a: Literal, b: Literal) -> bool:
        """Whether ``a`` and ``b`` never hold together."""
        return self.implies(a, opposite(b))

    def _clause(self, clause: Clause) -> Clause | None:
        """A disjunction without literals that imply another; None if it is always true (not a  implies  b)."""
        literals = sorted(clause, key=str)
        if any(self.implies(opposite(a), b) for a in literals for b in literals if a is not b):
            return None
        weakest: list[Literal] = []
        for literal in literals:
            if any(self.implies(literal, other) for other in weakest):
                continue
            weakest = [w for w in weakest if not self.implies(w, literal)] + [literal]
        return frozenset(weakest)

    def _simplified(self, clauses: Iterable[Clause]) -> Cnf:
        """A conjunction without clauses that follow from others and without literals that a unit clause excludes."""
        current = set(clauses)
        while True:
            units = [next(iter(c)) for c in current if len(c) == 1]
            shorter = set()
            for clause in current:
                shorter.add(
                    frozenset(x for x in clause if not any(self._excludes(u, x) for u in units if clause != {u}))
                )
            if frozenset() in shorter:
                return FALSE
            if shorter == current:
                break
            current = shorter
        kept: list[Clause] = []
        for clause in sorted(current, key=lambda c: (len(c), str(sorted(map(str, c))))):
            if not any(self._follows(clause, other) for other in kept):
                kept = [k for k in kept if not self._follows(k, clause)] + [clause]
        if len(kept) > MOST_CLAUSES:
            raise Opaque("a condition with too many alternatives")
        return frozenset(kept)

    def _follows(self, clause: Clause, other: Clause) -> bool:
        """Whether ``clause`` holds wherever ``other`` does: each literal of ``other`` implies one of ``clause``."""
        return all(any(self.implies(x, y) for y in clause) for x in other)


def _reduced(expr: sympy.Expr) -> sympy.Expr:
    """2*i - 2*j + 3 >= 0  ->  i - j + 1 >= 0: divide by the common factor of the coefficients, rounding down."""
    constant, rest = expr.as_coeff_Add()
    factors = [term.as_coeff_Mul()[0] for term in sympy.Add.make_args(rest)]
    if rest == 0 or not all(isinstance(f, sympy.Integer) for f in factors) or not isinstance(constant, sympy.Integer):
        return expr
    common = math.gcd(*(int(f) for f in factors))
    return expr if common <= 1 else sympy.expand(rest / common) + int(constant) // common
