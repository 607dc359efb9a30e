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
    operand,
    shape,
    source_line,
    strip_casts,
    strip_copies,
    value,
)

_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
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
    "soft-cap": "the scores go through tanh (a soft cap), which our attention does not compute yet",
    "sinks": "a column is added to the scores before the softmax and cut off after it (attention sinks), which our "
    "attention does not compute yet",
    "additive-bias": "a bias of its own for each head or query is added to the scores (ALiBi, relative positions), "
    "which our attention does not compute",
    "einsum": "the products are written with einsum; written with matmul on [B, H, T, D] they would be recognised",
    "folded-heads": "the heads are folded into the batch for the products; written as [B, H, T, D] @ [B, H, D, S] they "
    "would be recognised",
    "weights-used": "the attention weights are used a second time, and ours are never made; do not ask for them "
    "(output_attentions, need_weights)",
}
"""What attention may have that ours has not: code of the reason -> sentence. The first that holds is told."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What an attention in arithmetic is made of. ``terms`` are added to or put over the scores."""

    output: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float
    terms: tuple[fx.Node | masks.Term, ...]
    dropout: float


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
    for code, text in MISSING.items():
        if code in lacks:
            return Reason(code, text, source)
    if isinstance(got, Reason):
        return got
    if "cut" in lacks or len(shape(softmax)) != 4 or not is_call(product, aten.matmul.default, aten.bmm.default):
        sizes = "[" + ", ".join(map(str, shape(softmax))) + "]"
        return Reason("attention-arithmetic", f"softmax weights of shape {sizes} are not [B, H, T, S] @ values", source)
    return Parts(product, got.query, got.key, operand(product, 1), got.scale, got.terms, dropout)


def _weights_product(softmax: fx.Node) -> tuple[fx.Node, float, set[str]] | None:
    """The matrix product that the weights go into, the dropout on the way, and what stands in the way of taking it."""
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
            elif strip_casts(user) is not user:
                queue.append((user, way))
            elif is_call(user, *_VIEWS):
                queue.append((user, way | {"folded-heads"}))
            elif is_call(user, *_MOVES) or (is_call(user, aten.mul.Tensor) and shape(user) == shape(softmax)):
                queue.append((user, way | {"cut"}))
    return None


@dataclasses.dataclass
class _Scores:
    """The scores taken apart, and the codes of what is missing for taking them."""

    query: fx.Node
    key: fx.Node
    scale: float
    terms: tuple[fx.Node | masks.Term, ...]
    lacks: set[str]


def _scores(scores: Any, source: str) -> _Scores | Reason:
    """Walk from the softmax up to the product of queries and keys."""
    scale, current = 1.0, _unshifted(strip_casts(scores))
    terms: list[fx.Node | masks.Term] = []
    lacks: set[str] = set()
    scaled_last = False

    def no(text: str) -> Reason:
        return Reason("attention-arithmetic", text, source)

    for _ in range(24):
        current = strip_casts(current)
        if terms and scaled_last:
            return no("the mask is added before the scores are scaled")
        if is_call(current, aten.mul.Tensor, aten.div.Tensor) and isinstance(current.args[1], (int, float)):
            factor = float(current.args[1])
            scale *= factor if is_call(current, aten.mul.Tensor) else 1.0 / factor
            scaled_last = scaled_last or not terms
            current = current.args[0]
        elif is_call(current, aten.add.Tensor) and all(isinstance(a, fx.Node) for a in current.args[:2]):
            left, right = current.args[:2]
            if arguments(current)["alpha"] != 1:
                return no("scores and mask are added with a factor (alpha)")
            first = _reaches_product(left)
            if first == _reaches_product(right):
                return no("cannot tell the scores from the mask in an addition")
            terms.append(right if first else left)
            current = left if first else right
        elif is_call(current, aten.masked_fill.Scalar, aten.where.self, aten.where.ScalarOther):
            # The whole expression is the mask term: it is proved with the scores standing for "kept".
            filled = _filled(current)
            if filled is None:
                return no("scores are replaced where a condition holds, but not by -inf")
            terms.append(filled)
            current = current.args[0] if is_call(current, aten.masked_fill.Scalar) else current.args[1]
        elif is_call(current, aten.tanh.default):
            return Reason("soft-cap", MISSING["soft-cap"], source)
        elif is_call(current, aten.cat.default):
            return Reason("sinks", MISSING["sinks"], source)
        elif is_call(current, *_VIEWS):
            lacks.add("folded-heads")
            current = current.args[0]
        else:
            break
    if is_call(current, aten.baddbmm.default):
        bias = operand(current, 0)
        # One row for all heads is a mask; it is the folding that stands in the way then.
        return Reason("folded-heads" if shape(bias)[:-2] in ((), (1,)) else "additive-bias", "", source)
    if is_call(current, aten.einsum.default):
        return Reason("einsum", MISSING["einsum"], source)
    if not is_call(current, aten.matmul.default, aten.bmm.default):
        what = current.target if isinstance(current, fx.Node) else current
        return no(f"between the product of queries and keys and the softmax stands {what}")
    query, transposed = current.args
    query, q_scale = _scaled(query)
    transposed, k_scale = _scaled(transposed)
    key = _untransposed(transposed)
    if key is None and not lacks:
        return no("the second factor of the scores is not a transposed key")
    return _Scores(query, query if key is None else key, scale * q_scale * k_scale, tuple(terms), lacks)


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
        elif is_call(
            node, aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.masked_fill.Scalar, aten.tanh.default
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
    flipped = strip_copies(node)
    swapped = (
        (is_call(flipped, aten.transpose.int) and {d % 4 for d in flipped.args[1:3]} == {2, 3})
        or (is_call(flipped, aten.permute.default) and [d % 4 for d in flipped.args[1]] == [0, 1, 3, 2])
        or is_call(flipped, aten.mT.default)
    )
    return flipped.args[0] if swapped else None
