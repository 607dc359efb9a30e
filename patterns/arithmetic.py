"""Attention written out in arithmetic: ``softmax((q @ k.transpose) * scale + mask) @ v`` and its spellings.

The walk starts at a softmax whose result is a factor of a matrix product and goes up to the product of queries and
keys. Where it cannot go on, the :class:`~effcompile.kernels.reason.Reason` names the part that our attention lacks.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx

from effcompile.kernels.reason import Reason
from effcompile.patterns import masks
from effcompile.patterns.walk import (
    arguments,
    aten,
    is_call,
    only_user,
    operand,
    same_shape,
    same_size,
    shape,
    source_line,
    strip_casts,
    strip_copies,
    value,
)

_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_SCALES = (aten.mul.Tensor, aten.div.Tensor)
_SCALES_IN_PLACE = (aten.mul_.Tensor, aten.div_.Tensor)
_FOLDS = (*_VIEWS, aten.flatten.using_ints)
_MOVES = (
    *_VIEWS,
    aten.slice.Tensor,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)

MISSING = {
    "soft-cap": "the scores go through tanh in another way than cap * tanh(scores / cap) before the mask",
    "sinks": "a column is added to the scores before the softmax and cut off after it, but not one number for each "
    "head as the last column (attention sinks)",
    "einsum": "the products are written with einsum; written with matmul on [B, H, T, D] they would be recognised",
    "folded-heads": "the heads are folded into the batch for the products; written as [B, H, T, D] @ [B, H, D, S] they "
    "would be recognised",
    "weights-used": "the attention weights are used a second time, and ours are never made; do not ask for them "
    "(output_attentions, need_weights)",
}
"""What attention may have that ours has not: code of the reason -> sentence. The first that holds is told."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What an attention in arithmetic is made of.

    ``terms`` are added to or put over the scores, after ``softcap * tanh(scores / softcap)``. ``column``
    ``[B, H, T, 1]`` is concatenated to them before the softmax. ``factors`` multiply or, with True, divide the scores
    and have one number for each query at most. ``in_place`` are the steps that write over the scores.
    """

    output: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float
    terms: tuple[masks.AnyTerm, ...]
    dropout: float
    softcap: float | None = None
    column: fx.Node | None = None
    factors: tuple[tuple[fx.Node, bool], ...] = ()
    in_place: tuple[fx.Node, ...] = ()


def parts_of(softmax: fx.Node) -> Parts | Reason | None:
    """The attention around ``softmax``; a reason if it is one that we cannot describe, ``None`` if it is none."""
    source = source_line(softmax)
    found = _weights_product(softmax)
    if found is None:
        return None
    product, dropout, lacks = found
    if arguments(softmax)["dim"] not in (-1, len(shape(softmax)) - 1):
        # Over another dimension it is attention only if it is made of a product as well, as in soft mixtures it is not.
        if not _reaches_product(softmax.args[0]):
            return None
        return Reason("attention-arithmetic", "the softmax does not run over the last dimension, the keys'", source)
    got = _scores(softmax.args[0], source)
    lacks |= {got.code} if isinstance(got, Reason) else got.lacks
    if is_call(product, aten.einsum.default):
        lacks.add("einsum")
    if len(shape(softmax)) == 3:
        lacks.add("folded-heads")
    if not isinstance(got, Reason) and (got.column is not None) != ("last-cut" in lacks):
        lacks.add("cut" if got.column is None else "sinks")
    output, val = product, operand(product, 1)
    if "folded" in lacks and not lacks & {"folded-heads", "einsum", "cut", "sinks"}:
        # Both products are of [B*H, ., .]: the site is between [B, H, ., .] on both sides of them.
        heads = shape(softmax)[1]
        val, unfolded = _unfolded(val, heads), _refolded(product, heads)
        if val is None or unfolded is None:
            lacks.add("folded-heads")
        else:
            output = unfolded
    for code, text in MISSING.items():
        if code in lacks:
            return Reason(code, text, source)
    if isinstance(got, Reason):
        return got
    if "cut" in lacks or len(shape(softmax)) != 4 or not is_call(product, aten.matmul.default, aten.bmm.default):
        sizes = "[" + ", ".join(map(str, shape(softmax))) + "]"
        return Reason("attention-arithmetic", f"softmax weights of shape {sizes} are not [B, H, T, S] @ values", source)
    rest = got.softcap, got.column, tuple(got.factors), tuple(got.in_place)
    return Parts(output, got.query, got.key, val, got.scale, got.terms, dropout, *rest)


def _weights_product(softmax: fx.Node) -> tuple[fx.Node, float, set[str]] | None:
    """The matrix product that the weights go into, the dropout on the way, and what stands in the way of taking it.

    Two codes say what may be in order: ``folded`` for ``[B, H, T, S] -> [B*H, T, S]``, ``last-cut`` for weights without
    their last column.
    """
    dropout = 0.0
    queue: list[tuple[fx.Node, frozenset[str]]] = [(softmax, frozenset())]
    for node, way in queue:
        if len(queue) > 64:
            break
        if len(node.users) > 1:
            way |= {"weights-used"}
        for user in node.users:
            if is_call(user, *_PRODUCTS):
                factors = operand(user, 1) if is_call(user, aten.einsum.default) else user.args[-2:]
                return user, dropout, set(way if factors[0] is node else way | {"cut"})
            if is_call(user, aten.dropout.default):
                dropout = float(operand(user, 1)) if user.args[2] else dropout
                queue.append((user, way))
            elif strip_casts(user) is not user or _same_view(user):
                queue.append((user, way))
            elif _without_last(user):
                queue.append((user, way | {"last-cut"}))
            elif is_call(user, *_FOLDS):
                queue.append((user, way | {"folded" if _folds(user) else "folded-heads"}))
            elif is_call(user, *_MOVES) or (is_call(user, aten.mul.Tensor) and shape(user) == shape(softmax)):
                queue.append((user, way | {"cut"}))
    return None


@dataclasses.dataclass
class _Scores:
    """The scores taken apart, and the codes of what is missing for taking them. Filled in while walking up."""

    query: fx.Node
    key: fx.Node
    scale: float = 1.0
    terms: tuple[masks.AnyTerm, ...] = ()
    lacks: set[str] = dataclasses.field(default_factory=set)
    softcap: float | None = None
    column: fx.Node | None = None
    factors: list[tuple[fx.Node, bool]] = dataclasses.field(default_factory=list)
    in_place: list[fx.Node] = dataclasses.field(default_factory=list)


def _scores(scores: Any, source: str) -> _Scores | Reason:
    """Walk from the softmax up to the product of queries and keys."""
    current = _unshifted(strip_casts(scores))
    got = _Scores(current, current)
    # Heads are folded into the batch above this view, from [B*H, T, S] to [B, H, T, S].
    unfolding: fx.Node | None = None

    def no(text: str) -> Reason:
        return Reason("attention-arithmetic", text, source)

    for _ in range(24):
        current = strip_casts(current)
        if is_call(current, *_SCALES, *_SCALES_IN_PLACE) and isinstance(current.args[1], (int, float)):
            factor = float(current.args[1])
            got.scale *= factor if is_call(current, aten.mul.Tensor, aten.mul_.Tensor) else 1.0 / factor
            if is_call(current, *_SCALES_IN_PLACE):
                got.in_place.append(current)
            current = current.args[0]
        elif is_call(current, *_SCALES):
            divides, (left, right) = is_call(current, aten.div.Tensor), current.args[:2]
            if not divides and _reaches_product(right):
                left, right = right, left
            # One number for each query at most: it may as well multiply the query.
            thin = shape(right) == () or shape(right)[-1] == 1
            if unfolding is not None or not thin or not same_shape(shape(current), shape(left)):
                return no("the scores are multiplied by numbers that differ from key to key")
            got.factors.append((right, divides))
            current = left
        elif is_call(current, aten.add.Tensor) and all(isinstance(a, fx.Node) for a in current.args[:2]):
            left, right = current.args[:2]
            if arguments(current)["alpha"] != 1:
                return no("scores and mask are added with a factor (alpha)")
            first = _reaches_product(left)
            if first == _reaches_product(right):
                return no("cannot tell the scores from the mask in an addition")
            term = right if first else left
            if got.softcap is not None or got.factors:
                return no("something is added to the scores before a soft cap, or a factor of a tensor")
            if unfolding is not None:
                got.lacks.add("folded-heads")
            got.terms += (term if got.scale == 1 else masks.Added(term, got.scale),)
            current = left if first else right
        elif is_call(current, aten.masked_fill.Scalar, aten.where.self, aten.where.ScalarOther):
            # The whole expression is the mask term: it is proved with the scores standing for "kept".
            filled = _filled(current)
            if filled is None:
                return no("scores are replaced where a condition holds, but not by -inf")
            if got.scale != 1 or got.softcap is not None or got.factors:
                return no("the mask is put over the scores before they are scaled")
            if unfolding is not None:
                got.lacks.add("folded-heads")
            got.terms += (filled,)
            current = current.args[0] if is_call(current, aten.masked_fill.Scalar) else current.args[1]
        elif is_call(current, aten.tanh.default):
            # f * tanh(x) is c * tanh((f * x) / c)  for  c = |f|.
            if got.softcap is not None or got.factors or got.scale == 0:
                return Reason("soft-cap", MISSING["soft-cap"], source)
            got.softcap = abs(got.scale)
            current = current.args[0]
        elif is_call(current, aten.cat.default):
            pieces, dim = arguments(current)["tensors"], arguments(current)["dim"]
            first = got.column is None and got.scale == 1 and not (got.terms or got.factors or got.softcap)
            if not first or len(pieces) != 2 or dim % len(shape(current)) != 3 or shape(pieces[1])[3] != 1:
                return Reason("sinks", MISSING["sinks"], source)
            got.column, current = pieces[1], pieces[0]
        elif is_call(current, *_VIEWS):
            if not _same_view(current):
                if unfolding is not None or not _folds(current, back=True):
                    got.lacks.add("folded-heads")
                unfolding = current
            current = current.args[0]
        else:
            break
    return _product(current, unfolding, got, source)


def _product(current: Any, unfolding: fx.Node | None, got: _Scores, source: str) -> _Scores | Reason:
    """The end of the walk: the product of queries and keys, whose factors and whose own addend go into ``got``."""

    def no(text: str) -> Reason:
        return Reason("attention-arithmetic", text, source)

    if is_call(current, aten.einsum.default):
        return Reason("einsum", MISSING["einsum"], source)
    if not is_call(current, aten.matmul.default, aten.bmm.default, aten.baddbmm.default):
        what = current.target if isinstance(current, fx.Node) else current
        return no(f"between the product of queries and keys and the softmax stands {what}")
    query, transposed = current.args[-2:]
    if unfolding is None and len(shape(current)) == 3:
        got.lacks.add("folded-heads")
    if is_call(current, aten.baddbmm.default):
        given = arguments(current)
        bias, beta, alpha = given["self"], given["beta"], given["alpha"]
        query, transposed = given["batch1"], given["batch2"]
        if not all(isinstance(x, (int, float)) for x in (beta, alpha)):
            return no("the products are added with factors that are computed in the graph")
        if beta != 0:
            if got.softcap is not None or got.factors:
                return no("something is added to the scores before a soft cap, or a factor of a tensor")
            whole = len(shape(bias)) == 3 and same_size(shape(bias)[0], shape(current)[0])
            factor = float(beta) * got.scale
            plain = not whole and factor == 1
            got.terms += (bias if plain else masks.Added(bias, factor, whole),)
        got.scale *= float(alpha)
    got.query, q_scale = _scaled(query)
    transposed, k_scale = _scaled(transposed)
    key = _untransposed(transposed)
    got.scale *= q_scale * k_scale
    if unfolding is not None and not got.lacks:
        heads = shape(unfolding)[1]
        folded = [_unfolded(x, heads) for x in (got.query, key)]
        if folded[0] is None or folded[1] is None:
            got.lacks.add("folded-heads")
        else:
            got.query, key = folded[0], folded[1]
    if key is None and not got.lacks:
        return no("the second factor of the scores is not a transposed key")
    got.key = got.query if key is None else key
    return got


def _same_view(node: fx.Node) -> bool:
    """Whether a view has the shape of what it looks at."""
    return is_call(node, *_VIEWS) and same_shape(shape(node), shape(operand(node, 0)))


def _folds(node: fx.Node, *, back: bool = False) -> bool:
    """Whether a view makes ``[B*H, x, y]`` of ``[B, H, x, y]``, or with ``back`` the reverse."""
    wide, narrow = shape(operand(node, 0)), shape(node)
    if back:
        wide, narrow = narrow, wide
    if len(wide) != 4 or len(narrow) != 3 or not is_call(node, *_FOLDS):
        return False
    return same_shape((wide[0] * wide[1], *wide[2:]), narrow)


def _unfolded(node: Any, heads: Any) -> fx.Node | None:
    """``x`` ``[B, H, ., .]`` of ``x.view(B * H, ., .)``."""
    node = strip_copies(node)
    if not isinstance(node, fx.Node) or not is_call(node, *_FOLDS) or not _folds(node):
        return None
    inner: fx.Node = operand(node, 0)
    return inner if same_size(shape(inner)[1], heads) else None


def _refolded(product: fx.Node, heads: Any) -> fx.Node | None:
    """The view ``[B, H, ., .]`` of a product ``[B*H, ., .]``, if nothing else uses it."""
    user = only_user(product, lambda n: is_call(n, *_VIEWS) and _folds(n, back=True))
    return user if user is not None and same_size(shape(user)[1], heads) else None


def _without_last(node: fx.Node) -> bool:
    """Whether a slice leaves out the last column, and nothing else."""
    if not is_call(node, aten.slice.Tensor):
        return False
    given = arguments(node)
    before, after = shape(given["self"]), shape(node)
    begins = given["start"] in (None, 0) and given["step"] == 1
    return begins and given["dim"] % len(before) == len(before) - 1 and same_size(after[-1], before[-1] - 1)


def _unshifted(node: Any) -> Any:
    """Scores without the subtraction of their own maximum, which a softmax does not see."""
    if not is_call(node, aten.sub.Tensor) or not isinstance(node.args[1], fx.Node):
        return node
    top = strip_casts(node.args[1])
    if is_call(top, operator.getitem) and top.args[1] == 0:
        top = top.args[0]
    own = is_call(top, aten.max.dim, aten.amax.default) and strip_casts(top.args[0]) is strip_casts(node.args[0])
    return strip_casts(node.args[0]) if own else node


def _reaches_product(node: Any) -> bool:
    """Whether the scores (a matrix product) lie up this operand, through scaling, casts and masking."""
    for _ in range(16):
        node = strip_casts(node)
        if is_call(node, *_PRODUCTS):
            return True
        if is_call(node, aten.where.self, aten.where.ScalarOther):
            node = node.args[1]
        elif is_call(node, aten.mul.Tensor) and _reaches_product(node.args[1]):
            return True
        elif is_call(
            node, *_SCALES, *_SCALES_IN_PLACE, aten.add.Tensor, aten.masked_fill.Scalar, aten.tanh.default
        ) or is_call(node, *_VIEWS):
            node = node.args[0]
        else:
            return False
    return False


def _filled(node: fx.Node) -> masks.Term | None:
    """``masked_fill(scores, c, -inf)`` as the term "dropped where c", ``where(c, scores, -inf)`` as "kept where c"."""
    if is_call(node, aten.masked_fill.Scalar):
        condition, fill, drop = operand(node, 1), operand(node, 2), True
    else:
        condition, fill, drop = operand(node, 0), operand(node, 2), False
        if isinstance(fill, fx.Node):
            fill = _number(fill)
    lowest = torch.finfo(value(node).dtype).min
    if not isinstance(fill, (int, float)) or fill > lowest:
        return None
    return masks.Term(condition, dropped=drop, fill=float(fill))


def _number(node: fx.Node) -> float | None:
    """The number of a constant tensor made by ``full``, ``scalar_tensor`` or a 0-d literal."""
    node = strip_casts(node)
    if is_call(node, aten.scalar_tensor.default):
        return node.args[0] if isinstance(node.args[0], (int, float)) else None
    if is_call(node, aten.full.default, aten.new_full.default, aten.full_like.default):
        fill = arguments(node)["fill_value"]
        return fill if isinstance(fill, (int, float)) else None
    return None


def _scaled(node: fx.Node) -> tuple[fx.Node, float]:
    """An operand without the constant factor that multiplies it."""
    inner = strip_copies(node)
    if is_call(inner, aten.mul.Tensor, aten.div.Tensor) and isinstance(inner.args[1], (int, float)):
        factor = float(inner.args[1])
        return inner.args[0], factor if is_call(inner, aten.mul.Tensor) else 1.0 / factor
    return node, 1.0


def _untransposed(node: fx.Node) -> fx.Node | None:
    """``k`` from ``k.transpose(-1, -2)`` in its spellings."""
    flipped, rank = strip_copies(node), len(shape(node))
    order = [*range(rank - 2), rank - 1, rank - 2]
    swapped = (
        (is_call(flipped, aten.transpose.int) and {d % rank for d in flipped.args[1:3]} == {rank - 2, rank - 1})
        or (is_call(flipped, aten.permute.default) and [d % rank for d in flipped.args[1]] == order)
        or is_call(flipped, aten.mT.default)
    )
    return flipped.args[0] if swapped else None
