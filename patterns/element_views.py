"""Elements of tensors that are made, copied, viewed, cut and put together: mostly, only the index changes.

A handler gets the node, its arguments by name and the index of an element of the result. An index of a cut or padded
tensor may point outside of an operand where a condition excludes it: that condition decides, whatever the value there.
"""

from __future__ import annotations

from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from effcompile.patterns.elements import Element, Elements, Integer, describes, number, operator_name
from effcompile.patterns.index_algebra import Index, Opaque
from effcompile.patterns.walk import value

Args = dict[str, Any]


# Creation


@describes("arange")
def _arange(of: Elements, node: fx.Node, args: Args, index: Index) -> Element:
    # start + step * i
    start = of.size(args.get("start") or 0)
    return of.typed(Integer(start + of.size(args.get("step") or 1) * index[0]), node)


_FILLS = {"zeros": 0, "new_zeros": 0, "zeros_like": 0, "zero": 0, "ones": 1, "new_ones": 1, "ones_like": 1}


@describes(*_FILLS)
def _fill(of: Elements, node: fx.Node, args: Args, index: Index) -> Element:
    return number(_FILLS[operator_name(node)], value(node).dtype)


@describes("full", "new_full", "full_like", "fill", "scalar_tensor")
def _full(of: Elements, node: fx.Node, args: Args, index: Index) -> Element:
    given = args.get("fill_value", args.get("value", args.get("s")))
    return of.cast(of.operand(given, node, index), value(node).dtype)


# Copies and casts


@describes("to", "_to_copy", "type_as", "clone", "contiguous", "alias", "detach", "lift_fresh_copy", "lift_fresh")
@describes("expand", "expand_as", "broadcast_to")
def _copy(of: Elements, node: fx.Node, args: Args, index: Index) -> Element:
    return of.typed(of.operand(args["self"] if "self" in args else args["input"], node, index), node)


@describes("copy")
def _copy_in(of: Elements, node: fx.Node, args: Args, index: Index) -> Element:
    if isinstance(args["src"], fx.Node) and of.writes.shared(args["self"], args["src"]):
        raise Opaque("a copy within one tensor, whose order is not defined")
    return of.typed(of.operand(args["src"], node, index), node)


# Views: only the index changes


@describes("unsqueeze")
def _unsqueeze(of: Elements, node: fx.Node, args: Args, index: Index) -> Element:
    dim = args["dim"] % len(index)
    return of.at(args["self"], index[:dim] + index[dim + 1 :], node)


@describes("squeeze")
def _squeeze(of: Elements, node: fx.Node, args: Args, index: Index) -> Element:
    sizes, dims = of.shape(args["self"]), args.get("dim")
    dims = list(range(len(sizes))) if dims is None else [dims] if isinstance(dims, int) else dims
    chosen = [d % len(sizes) for d in dims]
    gone = {d for d in chosen if of.one(sizes[d])}
    return of.at(args["self"], _with_zeros(len(sizes), gone, index), node)


@describes("view", "reshape", "_unsafe_view", "view_as", "reshape_as")
def _reshape(of: Elements, node: fx.Node, args: Args, index: Index) -> Element:
    # Dimensions of size 1 come and go; the others must stay as they are, in order.
    before, after = of.shape(args["self"]), of.shape(node)
    ones = {d for d, s in enumerate(before) if of.one(s)}
    rest = [(s, part) for s, part in zip(after, index) if not of.one(s)]
    kept = [s for d, s in enumerate(before) if d not in ones]
    if len(kept) != len(rest) or not all(of.domain.same(s, r[0]) for s, r in zip(kept, rest)):
        raise Opaque("a reshape that mixes dimensions")
    return of.at(args["self"], _with_zeros(len(before), ones, tuple(part for _, part in rest)), node)


@describes("permute", "transpose", "t", "mT", "swapaxes", "movedim")
def _permute(of: Elements, node: fx.Node, args: Args, index: Index) -> Element:
    rank, name = len(index), operator_name(node)
    order = list(range(rank))
    if name == "permute":
        order = [d % rank for d in args["dims"]]
    elif name in ("transpose", "t", "mT") and ("dim0" in args or name != "transpose"):
        a, b = (args["dim0"] % rank, args["dim1"] % rank) if name == "transpose" else (rank - 2, rank - 1)
        if rank > 1:
            order[a], order[b] = order[b], order[a]
    else:
        raise Opaque("a permutation that is not described")
    inverse: list[sympy.Expr] = [sympy.S.Zero] * rank
    for position, source in enumerate(order):
        inverse[source] = index[position]
    return of.at(args["self"], tuple(inverse), node)


@describes("slice", "narrow")
def _slice(of: Elements, node: fx.Node, args: Args, index: Index) -> Element:
    dim, step = args["dim"] % len(index), of.size(args.get("step", 1))
    size = of.shape(args["self"])[dim]
    start = of.size(args["start"] if args["start"] is not None else 0)
    if of.domain.known(-start - 1):
        start = start + size
    # A start past the end gives no elements at all, so it needs no clamp; one before the beginning does.
    if not of.domain.known(start):
        raise Opaque("a slice whose start is not known to be positive")
    place = sympy.expand(start + step * index[dim])
    return of.at(args["self"], (*index[:dim], place, *index[dim + 1 :]), node)


@describes("select")
def _select(of: Elements, node: fx.Node, args: Args, index: Index) -> Element:
    sizes = of.shape(args["self"])
    dim = args["dim"] % len(sizes)
    place = _wrapped(of, of.size(args["index"]), sizes[dim])
    return of.at(args["self"], (*index[:dim], place, *index[dim:]), node)


@describes("index")
def _index(of: Elements, node: fx.Node, args: Args, index: Index) -> Element:
    # x[i, j] at k  ->  x at (i at k, j at k): the index tensors are broadcast together.
    source, given = args["self"], list(args["indices"])
    sizes = of.shape(source)
    given += [None] * (len(sizes) - len(given))
    dims = [d for d, n in enumerate(given) if n is not None]
    if any(value(given[d]).dtype in (torch.bool, torch.uint8) for d in dims):
        raise Opaque("an index by a boolean mask")
    rank = max(len(of.shape(given[d])) for d in dims)
    together = dims == list(range(dims[0], dims[-1] + 1))
    first = dims[0] if together else 0
    shared, own = index[first : first + rank], list(index[:first] + index[first + rank :])
    outer = of.shape(node)[first : first + rank]
    places: list[sympy.Expr] = []
    for dim, tensor in enumerate(given):
        if tensor is None:
            places.append(own.pop(0))
            continue
        element = of.at(tensor, of.broadcast(tensor, outer, shared), node)
        if not isinstance(element, Integer):
            raise Opaque("an index that is no affine expression")
        places.append(_wrapped(of, element.expr, sizes[dim]))
    return of.at(source, tuple(places), node)


@describes("index_select")
def _index_select(of: Elements, node: fx.Node, args: Args, index: Index) -> Element:
    if not index or len(of.shape(args["index"])) != 1:
        raise Opaque("an index that is a scalar")
    dim, size = args["dim"] % len(index), of.shape(args["self"])
    element = of.at(args["index"], (index[dim],), node)
    if not isinstance(element, Integer):
        raise Opaque("an index that is no affine expression")
    place = _wrapped(of, element.expr, size[dim])
    return of.at(args["self"], (*index[:dim], place, *index[dim + 1 :]), node)


@describes("repeat")
def _repeat(of: Elements, node: fx.Node, args: Args, index: Index) -> Element:
    sizes = of.shape(args["self"])
    first = len(index) - len(sizes)
    places = []
    for size, outer, part in zip(sizes, of.shape(node)[first:], index[first:]):
        # Repeated once it is itself; a dimension of size 1 is read at 0; anything else would be a remainder.
        places.append(of.stretched(size, outer, part))
    return of.at(args["self"], tuple(places), node)


# Pieces: where the index falls decides


@describes("cat", "concat", "concatenate")
def _cat(of: Elements, node: fx.Node, args: Args, index: Index) -> Element:
    parts = list(args["tensors"])
    if any(len(of.shape(p)) != len(index) for p in parts):
        raise Opaque("a concatenation of tensors of different rank")
    dim = args["dim"] % len(index)
    ends, total = [], sympy.S.Zero
    for part in parts:
        ends.append((total, total := sympy.expand(total + of.shape(part)[dim])))
    result: Element | None = None
    for part, (start, end) in reversed(list(zip(parts, ends))):
        place = sympy.expand(index[dim] - start)
        inside = of.domain.ge(end - 1 - index[dim])
        # An excluded part is not looked at: its element may not even exist.
        element = of.at(part, (*index[:dim], place, *index[dim + 1 :]), node)
        result = element if result is None else of.select(inside, element, result)
    if result is None:
        raise Opaque("a concatenation of nothing")
    return of.typed(result, node)


@describes("constant_pad_nd", "pad")
def _pad(of: Elements, node: fx.Node, args: Args, index: Index) -> Element:
    if args.get("mode", "constant") != "constant":
        raise Opaque(f"padding in mode {args['mode']}")
    sizes, widths = of.shape(args["self"]), list(args["pad"])
    places, inside = list(index), []
    for k in range(len(widths) // 2):
        dim = len(sizes) - 1 - k
        place = sympy.expand(index[dim] - of.size(widths[2 * k]))
        places[dim] = place
        inside += [of.domain.ge(place), of.domain.ge(sizes[dim] - 1 - place)]
    filler = of.cast(of.operand(args["value"] if args["value"] is not None else 0, node, index), value(node).dtype)
    return of.select(of.domain.conj(*inside), of.at(args["self"], tuple(places), node), filler)


@describes("tril", "triu")
def _triangle(of: Elements, node: fx.Node, args: Args, index: Index) -> Element:
    # tril keeps column - row <= d, triu keeps column - row >= d
    distance = index[-1] - index[-2] - of.size(args["diagonal"])
    kept = of.domain.ge(-distance if operator_name(node) == "tril" else distance)
    return of.select(kept, of.at(args["self"], index, node), number(0, value(node).dtype))


@describes("where")
def _where(of: Elements, node: fx.Node, args: Args, index: Index) -> Element:
    if "self" not in args:
        raise Opaque("the positions of a condition")
    kept, other = (of.typed(of.operand(args[name], node, index), node) for name in ("self", "other"))
    return of.select(of.truth(of.operand(args["condition"], node, index)), kept, other)


@describes("masked_fill")
def _masked_fill(of: Elements, node: fx.Node, args: Args, index: Index) -> Element:
    kept, filled = (of.typed(of.operand(args[name], node, index), node) for name in ("self", "value"))
    return of.select(of.truth(of.operand(args["mask"], node, index)), filled, kept)


# Helpers


def _with_zeros(rank: int, zeros: set[int], index: Index) -> Index:
    """An index of ``rank`` places: 0 at ``zeros``, the given places elsewhere in order."""
    rest = iter(index)
    places = tuple(sympy.S.Zero if d in zeros else next(rest, None) for d in range(rank))
    if None in places or next(rest, None) is not None:
        raise Opaque("a squeeze of dimensions that are not known to be 1")
    return places


def _wrapped(of: Elements, place: sympy.Expr, size: sympy.Expr) -> sympy.Expr:
    """An index as Python means it: negative ones count from the end. The sign must be known."""
    if of.domain.nonnegative(place):
        return place
    if of.domain.nonnegative(sympy.expand(-place - 1)):
        return sympy.expand(place + size)
    raise Opaque("an index that may be negative")
