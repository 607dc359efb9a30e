"""Recover an attention mask as a predicate, by proof.

A mask arrives as the subgraph that computes it. Its element at (row ``b``, head ``h``, query ``i``, key ``j``) is
expressed in these four indices (:mod:`effcompile.patterns.elements`) and brought to a conjunction. Each conjunct is

    j <= i + offset                 causal
    j >  i + offset - window        a sliding window, with the same offset
    padding[b, j] != 0              a 2-D tensor
    segment[b, i + offset] == segment[b, j]        packed sequences
    j <= i + offset  or  j < prefix[b]             causal behind a prefix

or always true. Anything else, and anything that is not understood, gives a
:class:`~effcompile.kernels.reason.Reason`, and the mask stays an operand. No name, shape or value is taken as a hint,
and no guard is added.

What is added to scores may be numbers besides (a bias: ALiBi, relative positions). Then the predicate is what is proved
of the rest, and the tensor stays an operand that is added whole. As with scores, it is taken that no bias is so large
that adding it to the lowest number of a dtype makes a key visible.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from effcompile.kernels.program import Predicate
from effcompile.kernels.reason import Reason
from effcompile.patterns import element_math as element_math
from effcompile.patterns import element_views as element_views
from effcompile.patterns.elements import Choice, Data, Element, Elements, Integer, Real, has_data
from effcompile.patterns.index_algebra import (
    FALSE,
    TRUE,
    Bit,
    Clause,
    Cnf,
    Domain,
    Ge,
    Literal,
    Opaque,
    expression,
)
from effcompile.patterns.rules import Prefix, prefix_bound, same_segment
from effcompile.patterns.storage import Writes
from effcompile.patterns.walk import arguments, aten, is_call, source_line, value

Size = int | torch.SymInt


@dataclasses.dataclass(frozen=True)
class Mask:
    """What was proved of a mask.

    Parameters
    ----------
    predicate
        Its rule. Without ``causal`` and ``window``, ``offset`` has no meaning and is 0.
    offset
        Position of query 0 relative to key 0: query ``i`` stands at ``offset + i``. A number, a size, or the node
        of an integer tensor with one element. A node stands for its value where it is made: the graph may write to
        it afterwards (a cache length that counts up), so whoever reads it later checks that.
    padding
        A node ``[B or 1, >= S]``: key ``j`` is visible in row ``b`` only if its element is nonzero. As with ``offset``,
        the value where it is made. Given iff ``predicate.key_mask``.
    bias
        What must be added to the scores besides, to be broadcast to ``[B, H, T, S]``; see :class:`Added`.
    segments
        An integer node ``[B or 1, >= S]``: key ``j`` is visible to query ``i`` only if its element is that of
        ``offset + i``. Given iff ``predicate.segments``.
    prefix
        Keys that every query sees, whatever causality says: an integer node with one element, or one for each row, and
        a number to add. Given iff ``predicate.prefix``.
    finite
        Whether masked scores got a large finite number instead of -inf. It makes a difference only for a query that may
        see no key at all: its weights are then uniform, and not 0.
    """

    predicate: Predicate
    offset: Size | fx.Node = 0
    padding: fx.Node | None = None
    finite: bool = False
    bias: tuple[Added, ...] = ()
    segments: fx.Node | None = None
    prefix: Prefix | None = None


@dataclasses.dataclass(frozen=True)
class Added:
    """A tensor that is added to scores, times ``factor``; always right, whatever is in it.

    ``folded`` where it is ``[B*H, T or 1, S]``, else it is aligned with ``[B, H, T, S]`` from the right.
    """

    node: fx.Node
    factor: float = 1.0
    folded: bool = False


@dataclasses.dataclass(frozen=True)
class Term:
    """Scores replaced where a condition holds (``dropped``, as in ``masked_fill``) or does not (as in ``where``).

    ``fill`` is what they are replaced by; it must be -inf, or at most the smallest number of the scores' dtype.
    """

    condition: fx.Node
    dropped: bool
    fill: float = float("-inf")


AnyTerm = fx.Node | Term | Added


def term_node(term: AnyTerm) -> fx.Node:
    """The tensor of a term."""
    return term if isinstance(term, fx.Node) else term.condition if isinstance(term, Term) else term.node


def recover(
    node: fx.Node | None,
    *,
    is_causal: bool,
    query_length: Size,
    key_length: Size,
    constants: Mapping[fx.Node, Tensor] | None = None,
) -> Mask | Reason:
    """The predicate of one mask: an ``attn_mask`` operand, ``is_causal`` (query 0 at key 0), or none."""
    terms = () if node is None else (node,)
    return recover_all(
        terms, is_causal=is_causal, query_length=query_length, key_length=key_length, constants=constants
    )


def recover_all(
    terms: Sequence[AnyTerm],
    *,
    is_causal: bool,
    query_length: Size,
    key_length: Size,
    constants: Mapping[fx.Node, Tensor] | None = None,
    writes: Writes | None = None,
) -> Mask | Reason:
    """The predicate of all terms together: a key is visible if every term keeps it.

    Parameters
    ----------
    terms
        Masks that broadcast to ``[B, H, T, S]``: bool (true is kept) or additive (0 is kept; -inf or the lowest number
        of the dtype is dropped, other numbers are a bias), conditions of ``masked_fill`` or ``where`` as :class:`Term`,
        and what was added before scores were scaled, or with heads folded into the batch, as :class:`Added`.
    is_causal
        SDPA's flag. SDPA takes no mask beside it.
    query_length, key_length
        ``T`` and ``S``.
    constants
        Nodes whose tensor never changes between calls, with their real data, which is read to prove what it is.
    writes
        The writes of the terms' graph, from whoever has looked for them already.

    Returns
    -------
    Mask or Reason
        Reasons: ``mask-and-causal``, ``mask-shape``, ``mask-mutated``, ``mask-unknown`` (an operation, or a tensor from
        outside), ``mask-values`` (additive, but not 0 and the lowest), ``additive-bias`` (numbers that are not known,
        and no causal mask beside them), ``mask-scaled`` (added before the scores are scaled), ``mask-not-affine``,
        ``mask-offsets-differ``, ``mask-offset-unknown``, ``mask-per-head``, ``mask-two-paddings``,
        ``mask-alternatives``, ``mask-empty``.
    """
    if is_causal and terms:
        return Reason("mask-and-causal", "a mask is given beside is_causal=True; attention takes one of the two")
    nodes = [term_node(t) for t in terms if not (isinstance(t, Added) and t.folded)]
    try:
        return _Recovery(nodes, query_length, key_length, constants or {}, writes).mask(terms, is_causal)
    except _Unproved as unproved:
        return unproved.reason
    except Opaque as why:
        return Reason("mask-unknown", f"the mask is {why}", source_line(nodes[0]) if nodes else "")


class Proofs:
    """Masks of one graph, while it does not change. Each is proved once: most models make one mask for all layers.

    Parameters
    ----------
    graph
        Where all terms are.
    constants
        As in :func:`recover_all`.
    """

    def __init__(self, graph: fx.Graph, constants: Mapping[fx.Node, Tensor]) -> None:
        self.graph, self.constants = graph, constants
        self._found: dict[object, Mask | Reason] = {}

    @functools.cached_property
    def writes(self) -> Writes:
        """What the graph writes to. Finding it costs more than a proof, so masks of single layers share it."""
        return Writes(self.graph)

    def mask(
        self, terms: tuple[AnyTerm, ...], *, is_causal: bool, query_length: Size, key_length: Size
    ) -> Mask | Reason:
        """What :func:`recover_all` says."""
        asked = terms, is_causal, expression(query_length), expression(key_length)
        if asked not in self._found:
            self._found[asked] = recover_all(
                terms,
                is_causal=is_causal,
                query_length=query_length,
                key_length=key_length,
                constants=self.constants,
                writes=self.writes if terms else None,
            )
        return self._found[asked]


class _Unproved(Exception):
    def __init__(self, code: str, text: str, node: fx.Node | None = None) -> None:
        self.reason = Reason(code, text, source_line(node) if node is not None else "")


class _Recovery:
    """One attempt: the four index variables, and the elements of one graph in them."""

    def __init__(
        self,
        nodes: Sequence[fx.Node],
        query_length: Size,
        key_length: Size,
        constants: Mapping[fx.Node, Tensor],
        writes: Writes | None,
    ) -> None:
        self.domain = Domain(_shape_env(nodes, query_length, key_length))
        self.queries, self.keys = expression(query_length), expression(key_length)
        shapes = [(n, [expression(s) for s in value(n).shape]) for n in nodes]
        for node, sizes in shapes:
            if len(sizes) > 4:
                raise _Unproved("mask-shape", f"expected at most [B, H, T, S], found {len(sizes)} dimensions", node)
        # A dimension of size 1 is read at 0, so that rows and heads which do not matter do not appear at all.
        self.sizes = [sympy.S.One, sympy.S.One, self.queries, self.keys]
        for dim in (0, 1):
            given = [sizes[dim - 4] for _, sizes in shapes if len(sizes) >= 4 - dim]
            self.sizes[dim] = next((s for s in given if s != 1), sympy.S.One)
        self.index = [
            sympy.S.Zero if size == 1 and name != "j" else self.domain.variable(name, size)
            for name, size in zip("bhij", self.sizes)
        ]
        _, self.head, self.query, self.key = self.index
        self.finite = False
        self.bias: list[tuple[Added, _Unproved]] = []
        graph = nodes[0].graph if nodes else fx.Graph()
        known = {**_literals(graph), **constants}
        self.elements = Elements(self.domain, writes or Writes(graph), known, (self.index[0], self.key))

    def mask(self, terms: Sequence[AnyTerm], is_causal: bool) -> Mask | Reason:
        """Prove all terms together."""
        if is_causal:
            return self.classified(self.domain.ge(self.query - self.key))
        found = self.classified(self.domain.conj(*map(self.kept, terms)))
        if self.bias and not found.predicate.causal:
            # Without a triangle it may well be a mask that is not understood.
            raise self.bias[0][1]
        return found

    def kept(self, term: AnyTerm) -> Cnf:
        """Where a term keeps the score."""
        node = term_node(term)
        if self.elements.writes.after(node):
            raise _Unproved("mask-mutated", f"{_name(node)} is written to in place after it is made", node)
        if isinstance(term, Added):
            return self.carried(term)
        element = self.elements.at(node, self.place(node))
        if isinstance(term, Term):
            self.finite |= term.fill != float("-inf")
            condition = self.elements.truth(element)
            return self.domain.negate(condition) if term.dropped else condition
        dtype = value(node).dtype
        if dtype == torch.bool:
            return self.elements.truth(element)
        if not dtype.is_floating_point:
            raise _Unproved("mask-values", f"expected a bool or float mask, found {dtype}", node)
        self.numbers: fx.Node | None = None
        kept = self.added(element, dtype, node)
        if self.numbers is not None:
            self.bias.append((Added(node), self.unknown(self.numbers)))
        return kept

    def carried(self, term: Added) -> Cnf:
        """A term that is no mask: an operand, with nothing to prove."""
        if not term.folded and not has_data(self.elements.at(term.node, self.place(term.node))):
            raise _Unproved("mask-scaled", "the mask is added before the scores are scaled", term.node)
        self.bias.append((term, self.unknown(term.node)))
        return TRUE

    def unknown(self, leaf: fx.Node) -> _Unproved:
        """The reason to give where numbers that are added may hide a mask."""
        text = f"adds numbers that are not known to be 0 or the lowest (a bias?), {self.described(leaf)}"
        return _Unproved("additive-bias", text, leaf)

    def place(self, node: fx.Node) -> tuple[sympy.Expr, ...]:
        """The index of a term's element, aligned to the right."""
        sizes, found = [expression(s) for s in value(node).shape], []
        for size, full, part in zip(sizes, self.sizes[4 - len(sizes) :], self.index[4 - len(sizes) :]):
            if size != 1 and not self.domain.same(size, full):
                expected = f"[B, H, {self.queries}, {self.keys}]"
                raise _Unproved("mask-shape", f"a mask of shape {sizes} does not belong to scores {expected}", node)
            found.append(sympy.S.Zero if size == 1 else part)
        return tuple(found)

    def added(self, element: Element, dtype: torch.dtype, node: fx.Node) -> Cnf:
        """Where an additive mask is not the lowest number or -inf; ``numbers`` becomes a leaf that else is not 0."""
        if isinstance(element, Choice):
            kept, other = (self.added(x, dtype, node) for x in (element.kept, element.other))
            return self.domain.choose(element.condition, kept, other)
        if isinstance(element, Real):
            if element.value == 0:
                return TRUE
            if element.value <= torch.finfo(dtype).min:
                self.finite |= element.value != float("-inf")
                return FALSE
            text = f"adds {element.value} to scores; only 0 and {torch.finfo(dtype).min} or -inf make a mask"
            raise _Unproved("mask-values", text, node)
        if isinstance(element, Data) and is_call(element.node, aten.add.Tensor):
            args = arguments(element.node)
            parts = args["self"], args["other"]
            if args["alpha"] == 1 and all(isinstance(x, fx.Node) for x in parts):
                # A bias and a mask, added to each other: what the mask drops is dropped.
                both = [self.elements.operand(x, element.node, element.index) for x in parts]
                return self.domain.conj(*(self.added(x, dtype, element.node) for x in both))
        self.numbers = element.node if isinstance(element, Data) else node
        return TRUE

    def classified(self, cnf: Cnf) -> Mask:
        """Name each conjunct, or say why not."""
        if cnf == FALSE:
            raise _Unproved("mask-empty", "no query may see any key")
        units = {next(iter(c)) for c in cnf if len(c) == 1}
        clauses = [clause for clause in cnf if len(clause) != 1]
        known = self.elements, self.query, self.key
        behind = prefix_bound(clauses[0], *known) if len(clauses) == 1 else None
        if clauses and behind is None:
            raise self.unnamed(clauses[0])
        segments, apart, said = same_segment(units, *known) or (None, None, set())
        units -= said
        # What follows from a padding tensor that is kept anyway need not be said again.
        optional = {x for x in units if isinstance(x, Ge) and self.implied(x) & units}
        paddings = {x.node for x in units if isinstance(x, Bit) and self.elements.is_padding(x)}
        causal: list[sympy.Expr] = [] if behind is None else [behind[0]]
        window: list[sympy.Expr] = []
        for literal in sorted(units, key=lambda x: x in optional):
            if isinstance(literal, Bit):
                if literal.node not in paddings or not self.elements.is_padding(literal):
                    raise self.unnamed(frozenset({literal}))
                continue
            sides = {-1: causal, 1: window}
            named = self.diagonal(literal)
            if named is None or (literal in optional and sides[named[0]]):
                if literal not in optional:
                    raise self.unnamed(frozenset({literal}))
                continue
            sides[named[0]].append(named[1])
        if len(paddings) > 1:
            names = ", ".join(sorted(map(_name, paddings)))
            raise _Unproved("mask-two-paddings", f"two padding tensors are combined: {names}", min(paddings))
        if behind is not None and window:
            raise self.unnamed(clauses[0])
        if len(causal) > 1 or len(window) > 1:
            raise _Unproved("mask-offsets-differ", f"several triangles with offsets {_list(causal + window)}")
        offset, width = self.offset_and_window(causal, window)
        if apart is not None and not causal and not window:
            offset = apart
        if apart is not None and sympy.expand(apart - offset) != 0:
            raise _Unproved("mask-offsets-differ", f"segments with offset {apart} beside a mask with offset {offset}")
        padding = next(iter(paddings), None)
        predicate = Predicate(bool(causal), width, padding is not None, segments is not None, behind is not None)
        bias, prefix = tuple(term for term, _ in self.bias), None if behind is None else behind[1]
        return Mask(predicate, self.resolved(offset), padding, self.finite, bias, segments, prefix)

    def implied(self, literal: Ge) -> set[Literal]:
        return set(self.elements.implied.get(literal, ()))

    def diagonal(self, literal: Ge) -> tuple[int, sympy.Expr] | None:
        """``i - j + c >= 0`` as ``(-1, c)`` and ``j - i + c >= 0`` as ``(1, c)``; with one query ``i`` is 0."""
        parts = self.domain.linear(literal.expr)
        if parts is None:
            return None
        coefficients, rest = parts
        side = coefficients.pop(self.key, None)
        if side not in (1, -1) or coefficients != ({} if self.query == 0 else {self.query: -side}):
            return None
        scalars = [self.domain.elements[s] for s in rest.free_symbols & self.domain.elements.keys()]
        if any(value(node).numel() != 1 for node, _ in scalars):
            return None
        return int(side), rest

    def offset_and_window(self, causal: list[sympy.Expr], window: list[sympy.Expr]) -> tuple[sympy.Expr, int | None]:
        """j > i + offset - w  is  j - i + c >= 0  with  c = w - 1 - offset.

        A window alone fixes only ``offset - w``: any offset with a positive width says the same, and the one that puts
        the last query at the last key is preferred.
        """
        if not window:
            return (causal[0] if causal else sympy.S.Zero), None
        (constant,) = window
        symbols = sympy.expand(constant.as_coeff_Add()[0] - constant)
        for offset in causal or [self.keys - self.queries, sympy.S.Zero, symbols, self.keys]:
            width = sympy.expand(constant + 1 + offset)
            if width.is_Integer and width >= 1:
                return sympy.expand(offset), int(width)
        raise _Unproved(
            "mask-offsets-differ", f"a window with {constant} beside a triangle with offset {_list(causal)}"
        )

    def resolved(self, offset: sympy.Expr) -> Size | fx.Node:
        """An offset as a number, a symbolic size or the node of a tensor with one element."""
        if offset.is_Integer:
            return int(offset)
        if not offset.free_symbols & self.domain.elements.keys():
            assert self.domain.shape_env is not None
            made = self.domain.shape_env.create_symintnode(offset, hint=None)
            assert isinstance(made, (int, torch.SymInt))
            return made
        if offset in self.domain.elements:
            return self.domain.elements[offset][0]
        for node, element in self.elements.scalars():
            if element == Integer(offset):
                return node
        raise _Unproved("mask-offset-unknown", f"no tensor of the graph holds the offset {offset}")

    def unnamed(self, clause: Clause) -> _Unproved:
        """Why a conjunct is none of ours."""
        nodes = [n for literal in clause for n, _ in self.reads(literal)]
        variables = {s for literal in clause for s in self.variables(literal)}
        nodes.sort(key=lambda n: (not self.elements.why.get(n), n.name))
        if self.head in variables:
            return _Unproved("mask-per-head", "the mask is not the same for all heads", nodes[0] if nodes else None)
        if nodes:
            text = f"cannot tell which keys are visible: {self.described(nodes[0])}"
            return _Unproved("mask-unknown", text, nodes[0])
        shown = " or ".join(sorted(f"{x.expr} >= 0" for x in clause if isinstance(x, Ge)))
        if len(clause) > 1:
            return _Unproved("mask-alternatives", f"keys are visible if {shown}")
        wanted = "j <= i + offset or j > i + offset - w"
        return _Unproved("mask-not-affine", f"keys are visible if {shown}; expected {wanted}")

    def reads(self, literal: Literal) -> list[tuple[fx.Node, tuple[sympy.Expr, ...]]]:
        if isinstance(literal, Bit):
            return [(literal.node, literal.index)]
        return [self.domain.elements[s] for s in literal.expr.free_symbols & self.domain.elements.keys()]

    def variables(self, literal: Literal) -> set[sympy.Symbol]:
        own = literal.expr.free_symbols if isinstance(literal, Ge) else set()
        return own.union(*(part.free_symbols for _, index in self.reads(literal) for part in index))

    def described(self, leaf: fx.Node) -> str:
        """A leaf, and why it is one."""
        why = self.elements.why.get(leaf)
        if why:
            return f"{_name(leaf)} is {why}" if why.startswith(("a", "an")) else f"{_name(leaf)} {why}"
        return f"it depends on the values of {_name(leaf)} in another way than padding[row, key] != 0"


def _shape_env(nodes: Sequence[fx.Node], *sizes: Size) -> ShapeEnv | None:
    """Where the symbolic sizes come from."""
    for size in sizes:
        if isinstance(size, torch.SymInt):
            env: ShapeEnv | None = size.node.shape_env
            return env
    return next((value(n).fake_mode.shape_env for n in nodes if isinstance(value(n), FakeTensor)), None)


def _literals(graph: fx.Graph) -> dict[fx.Node, Tensor]:
    """Tensors written as numbers in the user's code: tracing holds each as an attribute and copies it at every use."""
    found: dict[fx.Node, Tensor] = {}
    for node in graph.find_nodes(op="get_attr"):
        users = [getattr(u.target, "_schema", None) for u in node.users]
        held = getattr(graph.owning_module, str(node.target), None)
        if isinstance(held, Tensor) and all(s is not None and s.name == "aten::lift_fresh_copy" for s in users):
            found[node] = held
    return found


def _name(node: fx.Node) -> str:
    """A node for a reader: the operation, or the input's name."""
    return str(node.target) if node.op == "call_function" else f"{node.op} {node.target}"


def _list(items: Sequence[sympy.Expr]) -> str:
    return ", ".join(map(str, items))
