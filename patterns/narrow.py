"""Which part of a graph has to be computed if only some positions of a tensor are read.

From the tensor that is read, the search goes up, node by node: through elements, views, norms of each head, rotation,
products over a batch and ``scaled_dot_product_attention``, to the rows of a linear. A node is computed in part where
what it is is known, and where nobody else reads the whole of it; elsewhere the positions are picked out of the whole,
which is right for any node. So no rule here has to be there for the result to be right.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx

from effcompile.patterns.attention import strip_repeat
from effcompile.patterns.linear import VIEWS, is_linear, operands_of
from effcompile.patterns.walk import arguments, aten, is_call, mutated_arguments, root, same_size, shape, value


@dataclasses.dataclass(frozen=True)
class Kept:
    """The positions ``index`` of dimension ``dim``, counted from 0; ascending, but where keys serve several queries."""

    dim: int
    index: tuple[int, ...]


Wants = dict[fx.Node, Kept]
"""What of its operands a node needs; operands that it needs whole are not there."""


@dataclasses.dataclass(frozen=True)
class Narrowing:
    """What is computed in part: each node with its positions, in graph order, and what it wants of its operands."""

    kept: dict[fx.Node, Kept]
    wants: dict[fx.Node, Wants]

    @property
    def linears(self) -> list[fx.Node]:
        """The linears of which fewer rows are computed."""
        return [node for node in self.kept if is_linear(node)]


_ELEMENTS = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.neg.default,
    aten.pow.Tensor_Scalar,
    aten.square.default,
    aten.sqrt.default,
    aten.rsqrt.default,
    aten.exp.default,
    aten.sigmoid.default,
    aten.silu.default,
    aten.tanh.default,
    aten.clamp.default,
    aten.where.self,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
)
_PARTS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
SDPA = aten.scaled_dot_product_attention.default


def written(graph: fx.Graph) -> set[Any]:
    """The storages that some call of a graph writes to."""
    return {root(argument) for node in graph.nodes for argument in mutated_arguments(node)}


def narrowing(
    reader: fx.Node, of: fx.Node, kept: Kept, changed: Collection[Any], *, takes: Callable[[fx.Node], bool]
) -> Narrowing:
    """What of ``of``, and of all that it is made from, is computed in part if ``reader`` alone reads it, at ``kept``.

    ``changed`` are the storages that are written to (:func:`written`): a part of these would be a copy, which a later
    write does not reach. ``takes`` says of a linear whether rows of its weight can be had.
    """
    found: dict[fx.Node, Kept] = {}
    wants: dict[fx.Node, Wants] = {}
    asked: dict[fx.Node, Kept | None] = {of: kept}
    readers: dict[fx.Node, set[fx.Node]] = {of: {reader}}
    waiting = {of}
    while waiting:
        # The last one first: then all its readers have been seen.
        node = max(waiting)
        waiting.remove(node)
        part = asked[node]
        alone = part is not None and set(node.users) <= readers[node] and root(node) not in changed
        alone = alone and (not is_linear(node) or takes(node))
        needs = _wants(node, part) if alone and part is not None else None
        if needs is None or part is None:
            continue
        needs = {x: its for x, its in needs.items() if its.index != tuple(range(_size(x, its.dim)))}
        found[node], wants[node] = part, needs
        for operand, its in needs.items():
            # Parts that differ are picked by each reader for itself.
            asked[operand] = its if asked.setdefault(operand, its) == its else None
            readers.setdefault(operand, set()).add(node)
            waiting.add(operand)
    for node in [n for n in found if is_call(n, operator.getitem) and n.args[0] not in found]:
        del found[node], wants[node]  # nothing can be picked out of a list
    order = sorted(found)
    return Narrowing({n: found[n] for n in order}, {n: wants[n] for n in order})


def _size(node: fx.Node, dim: int) -> int:
    """The size of a dimension; 0 if it is not known."""
    sizes = shape(node)
    return sizes[dim] if sizes and isinstance(sizes[dim], int) else 0


def _wants(node: fx.Node, kept: Kept) -> Wants | None:
    """What ``node`` needs of its operands to make ``kept`` of itself; None if that is not known."""
    d, index = kept.dim, kept.index
    args: Any = node.args
    sizes = shape(node)
    if is_call(node, operator.getitem):
        return {args[0]: kept} if is_call(args[0], *_PARTS, aten.unbind.int) else None
    if is_call(node, *_PARTS, aten.unbind.int):
        return _of_parts(node, kept)
    if list(index) != sorted(set(index)):
        return None
    if is_linear(node):
        return {} if d == len(sizes) - 1 and operands_of(node) is not None else None
    if is_call(node, *_ELEMENTS):
        return _aligned(node, kept, node.all_input_nodes)
    if is_call(node, aten.dropout.default):
        return None if args[1] and args[2] else {args[0]: kept}
    if is_call(node, *VIEWS, aten.flatten.using_ints, aten.unflatten.int):
        return _of_view(node, kept)
    if is_call(node, SDPA):
        return _of_sdpa(node, kept)
    x: Any = args[0] if args else None
    n = len(sizes)
    if is_call(node, aten.transpose.int):
        a, b = (dim % n for dim in args[1:3])
        return {x: Kept({a: b, b: a}.get(d, d), index)}
    if is_call(node, aten.permute.default):
        return {x: Kept(args[1][d] % n, index)}
    if is_call(node, aten.unsqueeze.default):
        return {x: Kept(d - (d > args[1] % n), index)}
    if is_call(node, aten.select.int):
        return {x: Kept(d + (d >= args[1] % (n + 1)), index)}
    if is_call(node, aten.slice.Tensor):
        return None if arguments(node)["dim"] % n == d else {x: kept}
    if is_call(node, aten.expand.default):
        return _aligned(node, kept, [x])
    if is_call(node, aten.cat.default):
        return None if arguments(node)["dim"] % n == d else dict.fromkeys(x, kept)
    if is_call(node, aten.softmax.int, aten._softmax.default):
        return None if args[1] % n == d else {x: kept}
    if is_call(node, aten.mean.dim):
        named = arguments(node)
        whole = not named["keepdim"] or named["dim"] is None or d in [dim % n for dim in named["dim"]]
        return None if whole else {x: kept}
    if is_call(node, aten.rms_norm.default, aten.layer_norm.default):
        return None if d >= n - len(args[1]) else {x: kept}
    if is_call(node, aten.matmul.default, aten.bmm.default) and n > 2 and d < n - 2:
        return _aligned(node, kept, args[:2])
    return None


def _of_parts(node: fx.Node, kept: Kept) -> Wants | None:
    """Of a split along another dimension, whose parts are all read in part."""
    x: Any = node.args[0]
    n = len(shape(x))
    dim = arguments(node)["dim"] % n
    if is_call(node, aten.unbind.int):
        return {x: Kept(kept.dim + (kept.dim >= dim), kept.index)}
    return None if dim == kept.dim else {x: kept}


def _aligned(node: fx.Node, kept: Kept, operands: Any) -> Wants | None:
    """The same positions of each operand that has them; what is broadcast along them is needed whole."""
    sizes, found = shape(node), {}
    for x in operands:
        if not isinstance(value(x), Tensor):
            continue
        dim = kept.dim - (len(sizes) - len(shape(x)))
        if dim < 0 or same_size(shape(x)[dim], 1):
            continue
        if not same_size(shape(x)[dim], sizes[kept.dim]):
            return None
        found[x] = Kept(dim, kept.index)
    return found


def _of_view(node: fx.Node, kept: Kept) -> Wants | None:
    """The positions of the one dimension of the input that hold the same elements."""
    x: Any = node.args[0]
    inner = strip_repeat(node)
    sizes, before = shape(node), shape(x)
    found = viewed(before, sizes, kept)
    if found is not None:
        return {x: found}
    if inner is not node and kept.dim == 1:
        # Keys for some of the query heads of a group.
        ratio = sizes[1] // shape(inner)[1]
        return {inner: Kept(1, tuple(i // ratio for i in kept.index))}
    return None


def viewed(before: tuple[Any, ...], after: tuple[Any, ...], kept: Kept) -> Kept | None:
    """Where the positions ``kept`` of a tensor of sizes ``after`` are in one of sizes ``before``, seen in that way.

    None if they are no positions of one dimension there, or if a size that matters is not known.

    >>> viewed((2, 6), (2, 3, 2), Kept(1, (0, 2)))
    Kept(dim=1, index=(0, 1, 4, 5))
    """
    ends = [len(before), len(after)]
    while ends[1] > 0:
        # The next groups of dimensions, from the right, that hold the same elements.
        starts = [end - 1 for end in ends]
        if starts[0] < 0:
            return None
        if not same_size(before[starts[0]], after[starts[1]]):
            own = [before[starts[0]], after[starts[1]]]
            while own[0] != own[1]:
                if not all(isinstance(size, int) for size in own):
                    return None
                side = 0 if own[0] < own[1] else 1
                starts[side] -= 1
                if starts[side] < 0:
                    return None
                own[side] = own[side] * (before, after)[side][starts[side]]
        if starts[1] <= kept.dim < ends[1]:
            if ends[0] - starts[0] == ends[1] - starts[1] == 1:
                return Kept(starts[0], kept.index)
            groups = before[starts[0] : ends[0]], after[starts[1] : ends[1]]
            found = _position(*groups, Kept(kept.dim - starts[1], kept.index))
            return None if found is None else Kept(found.dim + starts[0], found.index)
        ends = starts
    return None


def _position(before: tuple[int, ...], after: tuple[int, ...], kept: Kept) -> Kept | None:
    """The same for sizes of as many elements, all of them known."""
    places = torch.arange(torch.Size(after).numel())
    elements = places.view(after).index_select(kept.dim, torch.tensor(kept.index)).flatten()
    for dim in range(len(before)):
        stride = torch.Size(before[dim + 1 :]).numel()
        index = (elements // stride % before[dim]).unique()
        if torch.equal(places.view(before).index_select(dim, index).flatten(), elements):
            return Kept(dim, tuple(index.tolist()))
    return None


def _of_sdpa(node: fx.Node, kept: Kept) -> Wants | None:
    """Queries, keys, values and mask of some heads."""
    named = arguments(node)
    query, key, val, mask = (named[name] for name in ("query", "key", "value", "attn_mask"))
    if len(shape(node)) != 4 or kept.dim != 1 or named["dropout_p"]:
        return None
    heads, groups = shape(query)[1], shape(key)[1]
    if not all(isinstance(size, int) for size in (heads, groups)) or heads % groups or shape(val)[1] != groups:
        return None
    if len({query, key, val, mask}) != 4:
        return None
    sides = Kept(1, serving(kept.index, heads // groups))
    found = {query: kept, key: sides, val: sides}
    if mask is not None:
        dim = len(shape(mask)) - 3
        if dim >= 0 and not same_size(shape(mask)[dim], 1):
            if not same_size(shape(mask)[dim], heads):
                return None
            found[mask] = Kept(dim, kept.index)
    return found


def serving(heads: tuple[int, ...], ratio: int) -> tuple[int, ...]:
    """The key heads that serve some query heads: each once if they are whole groups, else one for each query head.

    >>> serving((3, 4, 5), 3), serving((0, 4), 3)
    ((1,), (0, 1))
    """
    each = tuple(h // ratio for h in heads)
    groups = tuple(dict.fromkeys(each))
    return groups if len(heads) == len(groups) * ratio else each
