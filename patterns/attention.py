"""Find attention: ``scaled_dot_product_attention`` in all its argument forms, and attention written out in arithmetic.

The search starts at a rare node (an SDPA call, a softmax) and walks outward. Nothing depends on the name of a module or
of a parameter. A walk that ends early gives a :class:`~effcompile.kernels.reason.Reason` that says where.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from effcompile.kernels import ops  # noqa: F401  (defines the operators named below)
from effcompile.kernels.reason import Reason
from effcompile.patterns import masks
from effcompile.patterns.walk import (
    arguments,
    aten,
    is_call,
    module_path,
    operand,
    same_shape,
    same_size,
    shape,
    source_line,
    strip_casts,
    strip_copies,
    value,
)

kv_load = torch.ops.effcompile.kv_load.default
kv_store = torch.ops.effcompile.kv_store.default

_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


@dataclasses.dataclass
class AttentionSite:
    """One attention in a graph.

    ``query`` ``[B, H, T, D]``, ``key`` ``[B, G, S, D]`` and ``value`` ``[B, G, S, E]`` are nodes; an expansion of the
    key heads to the query heads has been walked through, so ``H = ratio * G``. ``output`` ``[B, H, T, E]`` is the node
    that a rewrite replaces.
    """

    kind = "attention"

    anchor: fx.Node
    output: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float
    is_causal: bool
    mask_terms: tuple[fx.Node, ...]
    dropout: float
    ratio: int
    spelling: str
    mask: masks.Mask | Reason
    problem: Reason | None = None

    @property
    def module(self) -> str:
        """Path of the module that the site was traced in."""
        return module_path(self.anchor)

    @property
    def source(self) -> str:
        """The user's line."""
        return source_line(self.anchor)

    @property
    def load(self) -> fx.Node | None:
        """The ``kv_load`` whose keys and values this attention reads, if it reads a compressed store."""
        key, val = (strip_copies(n) for n in (self.key, self.value))
        for side, index in ((key, 0), (val, 1)):
            if not is_call(side, operator.getitem) or side.args[1] != index or not is_call(side.args[0], kv_load):
                return None
        return key.args[0] if key.args[0] is val.args[0] else None

    @property
    def store(self) -> fx.Node | None:
        """The ``kv_store`` of this site: of the buffers it loads, or of the fresh keys and values it attends to."""
        graph = self.anchor.graph
        load = self.load
        key, val = strip_copies(self.key), strip_copies(self.value)
        node: fx.Node
        for node in graph.find_nodes(op="call_function", target=kv_store):
            if load is not None and node.args[0] is load.args[0]:
                return node
            if load is None and strip_copies(node.args[7]) is key and strip_copies(node.args[8]) is val:
                return node
        return None

    @property
    def output_projection(self) -> fx.Node | None:
        """The linear that consumes the heads, if there is one."""
        node = self.output
        for _ in range(8):
            users = list(node.users)
            if len(users) != 1:
                return None
            node = users[0]
            if is_call(node, aten.linear.default, aten.addmm.default):
                return node
        return None

    @property
    def projections(self) -> dict[str, fx.Node | None]:
        """The linear that makes the query, the fresh key and the fresh value; one node for all three if fused."""
        store = self.store
        fresh = (store.args[7], store.args[8]) if store is not None else (self.key, self.value)
        return {name: producer(node) for name, node in (("query", self.query), ("key", fresh[0]), ("value", fresh[1]))}

    @property
    def rope(self) -> tuple[fx.Node, fx.Node] | None:
        """The cos and sin nodes that rotate the query, if it is rotated (by halves or interleaved)."""
        return rotation(self.query)


def find_attention(gm: fx.GraphModule) -> list[AttentionSite | Reason]:
    """All attention in a normalised graph, in graph order.

    A softmax or SDPA call that is not an attention we can describe gives a typed reason instead of a site
    (``attention-shape``, ``attention-arithmetic``); a softmax that no matrix product follows is none and is passed
    over.
    """
    found: list[AttentionSite | Reason] = []
    proofs = masks.Proofs(gm.graph, _constants(gm))
    for node in gm.graph.nodes:
        if is_call(node, aten.scaled_dot_product_attention):
            found.append(_from_sdpa(node, proofs))
        elif is_call(node, aten.softmax.int, aten._softmax.default):
            site = _from_arithmetic(node, proofs)
            if site is not None:
                found.append(site)
    return found


def _from_sdpa(node: fx.Node, proofs: masks.Proofs) -> AttentionSite | Reason:
    args = arguments(node)
    query, scale = args["query"], args["scale"]
    if len(shape(query)) != 4:
        return Reason("attention-shape", f"expected [B, H, T, D], found {_sizes(query)}", source_line(node))
    if scale is None:
        if not isinstance(shape(query)[3], int):
            return Reason("attention-shape", "the head size is symbolic", source_line(node))
        scale = 1.0 / math.sqrt(shape(query)[3])
    if not isinstance(scale, float):
        return Reason(
            "attention-scale", f"the scale is computed in the graph ({scale}), not a number", source_line(node)
        )
    terms = () if args["attn_mask"] is None else (args["attn_mask"],)
    return _site(
        proofs,
        anchor=node,
        output=node,
        query=query,
        key=args["key"],
        val=args["value"],
        scale=scale,
        is_causal=bool(args["is_causal"]),
        terms=terms,
        dropout=args["dropout_p"],
        spelling="sdpa",
        gqa_flag=bool(args["enable_gqa"]),
    )


def _from_arithmetic(node: fx.Node, proofs: masks.Proofs) -> AttentionSite | Reason | None:
    """``softmax((q @ k.transpose) * scale + mask) @ v``, in the orders and spellings that models use."""
    dim = arguments(node)["dim"]
    scores = node.args[0]
    if dim not in (-1, len(shape(node)) - 1):
        return None
    out = _weights_product(node)
    if out is None:
        return None
    source = source_line(node)
    product, weights_index, dropout = out
    if weights_index != 0 or len(shape(node)) != 4:
        return Reason(
            "attention-arithmetic", f"softmax weights of shape {_sizes(node)} are not [B, H, T, S] @ values", source
        )
    scale, current = 1.0, strip_casts(scores)
    terms: list[fx.Node | masks.Term] = []
    scaled_last = False
    for _ in range(16):
        current = strip_casts(current)
        if terms and scaled_last:
            return Reason("attention-arithmetic", "the mask is added before the scores are scaled", source)
        if is_call(current, aten.mul.Tensor, aten.div.Tensor) and isinstance(current.args[1], (int, float)):
            factor = float(current.args[1])
            scale *= factor if is_call(current, aten.mul.Tensor) else 1.0 / factor
            scaled_last = scaled_last or not terms
            current = current.args[0]
        elif is_call(current, aten.add.Tensor) and all(isinstance(a, fx.Node) for a in current.args[:2]):
            left, right = current.args[:2]
            if arguments(current)["alpha"] != 1:
                return Reason("attention-arithmetic", "scores and mask are added with a factor (alpha)", source)
            first = _reaches_product(left)
            if first == _reaches_product(right):
                return Reason("attention-arithmetic", "cannot tell the scores from the mask in an addition", source)
            terms.append(right if first else left)
            current = left if first else right
        elif is_call(current, aten.masked_fill.Scalar, aten.where.self, aten.where.ScalarOther):
            # The whole expression is the mask term: it is proved with the scores standing for "kept".
            filled = _filled(current)
            if filled is None:
                return Reason(
                    "attention-arithmetic", "scores are replaced where a condition holds, but not by -inf", source
                )
            terms.append(filled)
            current = current.args[0] if is_call(current, aten.masked_fill.Scalar) else current.args[1]
        else:
            break
    if not is_call(current, aten.matmul.default, aten.bmm.default):
        what = current.target if isinstance(current, fx.Node) else current
        return Reason(
            "attention-arithmetic", f"between the product of queries and keys and the softmax stands {what}", source
        )
    query, transposed = current.args
    query, q_scale = _scaled(query)
    transposed, k_scale = _scaled(transposed)
    key = _untransposed(transposed)
    if key is None:
        return Reason("attention-arithmetic", "the second factor of the scores is not a transposed key", source)
    return _site(
        proofs,
        anchor=node,
        output=product,
        query=query,
        key=key,
        val=operand(product, 1),
        scale=scale * q_scale * k_scale,
        is_causal=False,
        terms=tuple(terms),
        dropout=dropout,
        spelling="arithmetic",
        gqa_flag=False,
    )


def _site(
    proofs: masks.Proofs,
    *,
    anchor: fx.Node,
    output: fx.Node,
    query: fx.Node,
    key: fx.Node,
    val: fx.Node,
    scale: float,
    is_causal: bool,
    terms: tuple[fx.Node | masks.Term, ...],
    dropout: float,
    spelling: str,
    gqa_flag: bool,
) -> AttentionSite | Reason:
    """Walk through the expansion of key heads, recover the mask, and check that the shapes make sense."""
    source = source_line(anchor)
    key, val = strip_repeat(key), strip_repeat(val)
    q, k, v = shape(query), shape(key), shape(val)
    sizes = f"query {_sizes(query)}, key {_sizes(key)}, value {_sizes(val)}"
    if not len(q) == len(k) == len(v) == 4 or not all(isinstance(n, int) for n in (q[1], k[1], v[1], q[3], k[3], v[3])):
        return Reason(
            "attention-shape", f"expected [B, H, T, D] with fixed heads and head sizes, found {sizes}", source
        )
    if k[1] != v[1] or q[1] % k[1] or q[3] != k[3] or not same_size(k[2], v[2]):
        return Reason("attention-shape", f"query, key and value do not belong together: {sizes}", source)
    expanded = shape(arguments(anchor)["key"])[1] if spelling == "sdpa" else q[1]
    if expanded != q[1] and not gqa_flag:
        return Reason(
            "attention-shape", f"{q[1]} query heads over {expanded} key heads without enable_gqa: {sizes}", source
        )
    mask = proofs.mask(terms, is_causal=is_causal, query_length=q[2], key_length=k[2])
    nodes = tuple(term.condition if isinstance(term, masks.Term) else term for term in terms)
    ratio = q[1] // k[1]
    return AttentionSite(anchor, output, query, key, val, scale, is_causal, nodes, dropout, ratio, spelling, mask)


def _constants(gm: fx.GraphModule) -> dict[fx.Node, Tensor]:
    """Graph attributes with real data, for masks that are constants of the graph."""
    found = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        held: Any = gm
        for part in str(node.target).split("."):
            held = getattr(held, part, None)
        if isinstance(held, Tensor):
            found[node] = held
    return found


def strip_repeat(node: fx.Node) -> fx.Node:
    """Walk up through the expansion of key heads to query heads.

    That is ``[B, G, S, D] -> [B, G, 1, S, D] -> [B, G, r, S, D] -> [B, G*r, S, D]``, or ``repeat_interleave``.
    """
    inner: fx.Node
    outer = strip_copies(node)
    if is_call(outer, aten.repeat_interleave.self_int) and arguments(outer)["dim"] in (1, -3):
        inner = outer.args[0]
        return inner
    if not is_call(outer, *_VIEWS):
        return node
    wide = strip_copies(outer.args[0])
    if not is_call(wide, aten.expand.default):
        return node
    thin = strip_copies(wide.args[0])
    while is_call(thin, aten.slice.Tensor) and same_shape(shape(thin), shape(thin.args[0])):
        thin = thin.args[0]
    if not is_call(thin, aten.unsqueeze.default) or thin.args[1] not in (2, -3):
        return node
    inner = thin.args[0]
    b, g, s, d = shape(inner) if len(shape(inner)) == 4 else (0, 0, 0, 0)
    r = shape(wide)[2] if len(shape(wide)) == 5 else 0
    ok = same_shape(shape(wide), (b, g, r, s, d)) and same_shape(shape(outer), (b, g * r, s, d))
    return inner if ok else node


def _weights_product(softmax: fx.Node) -> tuple[fx.Node, int, float] | None:
    """The matrix product that the softmax weights go into, which operand they are, and the dropout on the way."""
    node, dropout = softmax, 0.0
    for _ in range(6):
        users = list(node.users)
        if len(users) != 1:
            return None
        user = users[0]
        if is_call(user, aten.dropout.default):
            dropout = float(operand(user, 1)) if user.args[2] else 0.0
        elif is_call(user, aten.matmul.default, aten.bmm.default):
            return user, list(user.args).index(node), dropout
        elif strip_casts(user) is user:
            return None
        node = user
    return None


def _reaches_product(node: Any) -> bool:
    """Whether the scores (a matrix product) lie up this operand, through scaling, casts and masking."""
    for _ in range(16):
        node = strip_casts(node)
        if is_call(node, aten.matmul.default, aten.bmm.default):
            return True
        if is_call(node, aten.where.self, aten.where.ScalarOther):
            node = node.args[1]
        elif is_call(node, aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.masked_fill.Scalar):
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


def producer(node: Any) -> fx.Node | None:
    """The linear that ``node`` comes from, through reshapes, splits, norms of heads and rotation."""
    seen: set[fx.Node] = set()
    queue = [node]
    while queue and len(seen) < 200:
        current = queue.pop(0)
        if not isinstance(current, fx.Node) or current in seen:
            continue
        seen.add(current)
        if is_call(current, aten.linear.default, aten.addmm.default):
            return current
        queue += (
            current.all_input_nodes[:1]
            if not is_call(current, aten.add.Tensor, aten.cat.default)
            else list(current.all_input_nodes)
        )
    return None


def rotation(query: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """``(cos, sin)`` of ``x * cos + rotated(x) * sin``, ``rotated`` made from slices of ``x`` and a negation."""
    node = strip_copies(query)
    if is_call(node, aten.cat.default):
        # Partial rotary embedding: the rotated channels come first, the rest passes through.
        node = strip_copies(node.args[0][0])
    if not is_call(node, aten.add.Tensor):
        return None
    left, right = (strip_copies(a) for a in node.args[:2])
    if not (is_call(left, aten.mul.Tensor) and is_call(right, aten.mul.Tensor)):
        return None
    plain, turned = (left, right) if _is_turned(right.args[0]) else (right, left)
    if not _is_turned(turned.args[0]) or not all(isinstance(m.args[1], fx.Node) for m in (plain, turned)):
        return None
    return plain.args[1], turned.args[1]


def _is_turned(node: Any) -> bool:
    """Whether a node is made of a negated part and an unchanged part of one tensor: ``cat([-x2, x1])`` and the like."""
    node = strip_copies(node)
    while is_call(node, *_VIEWS) or is_call(node, aten.flatten.using_ints):
        node = strip_copies(node.args[0])
    if not is_call(node, aten.cat.default, aten.stack.default):
        return False
    parts = [strip_copies(p) for p in node.args[0]]
    return any(is_call(p, aten.neg.default) for p in parts)


def _sizes(node: fx.Node) -> str:
    return "[" + ", ".join(str(s) for s in shape(node)) + "]"
