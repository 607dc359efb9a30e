"""Find attention: ``scaled_dot_product_attention`` in all its argument forms, arithmetic, and kernels from elsewhere.

The search starts at a rare node (an SDPA call, a softmax) and walks outward. Nothing depends on the name of a module or
of a parameter. A walk that ends early gives a :class:`~effcompile.kernels.reason.Reason` that says where.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from effcompile.kernels import ops  # noqa: F401  (defines the operators named below)
from effcompile.kernels.form import KVForm
from effcompile.kernels.reason import Reason
from effcompile.patterns import arithmetic, masks
from effcompile.patterns.heads import per_head
from effcompile.patterns.site import Site
from effcompile.patterns.walk import (
    arguments,
    aten,
    first_mutation,
    is_call,
    operand,
    root,
    same_shape,
    same_size,
    shape,
    source_line,
    strip_copies,
    tied,
    value,
)

kv_load = torch.ops.effcompile.kv_load.default
kv_store = torch.ops.effcompile.kv_store.default

_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


@dataclasses.dataclass
class AttentionSite(Site):
    """One attention in a graph.

    ``query`` ``[B, H, T, D]``, ``key`` ``[B, G, S, D]`` and ``value`` ``[B, G, S, E]`` are nodes; an expansion of the
    key heads to the query heads has been walked through, so ``H = ratio * G``. ``output`` ``[B, H, T, E]`` is the node
    that a rewrite replaces.
    """

    kind: ClassVar[str] = "attention"

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
    softcap: float | None = None
    """Scores are ``softcap * tanh(scores / softcap)``, before the mask."""
    sinks: fx.Node | float | None = None
    """One more logit for each head: a tensor of ``H`` elements, or one number."""
    factors: tuple[tuple[fx.Node, bool], ...] = ()
    """What multiplies or, with True, divides the query: tensors ``[B or 1, H or 1, T or 1, 1]`` or with fewer sizes."""

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
            if load is None and all(
                _fills(fresh, read, rank) for fresh, read, rank in zip(node.args[7:9], (key, val), _ranks(node))
            ):
                return node
        return None

    @property
    def latent(self) -> bool:
        """Whether keys and values are made from what a compressed store holds, and are not what it holds."""
        made = producer(self.value)
        if self.load is not None or self.store is not None or made is None:
            return False
        inner = strip_copies(made.args[0])
        while is_call(inner, *_VIEWS) or is_call(inner, aten.transpose.int):
            inner = strip_copies(inner.args[0])
        if is_call(inner, operator.getitem) and is_call(inner.args[0], kv_load):
            return True
        stores = self.anchor.graph.find_nodes(op="call_function", target=kv_store)
        return any(root(made.args[0]) is root(fresh) for store in stores for fresh in store.args[7:9])

    @property
    def cross(self) -> bool:
        """Whether the keys are those of other tokens than the queries: made from another length, or ready before.

        Keys of the same tokens come from a linear over as many tokens, or from a store that this call writes to.
        """
        keys = strip_copies(self.key)
        made = producer(keys)
        if made is None:
            # Ready before: an input with no write on the way. What a cache holds of the same tokens is written to.
            source = root(keys)
            return source.op == "placeholder" and first_mutation(source) is None
        tokens = math.prod(shape(made)[:-1]), shape(self.key)[0] * shape(self.key)[2]
        queries = shape(self.query)[0] * shape(self.query)[2]
        return same_size(*tokens) and not same_size(tokens[1], queries) and self.load is None

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


@dataclasses.dataclass
class Unmatched(Site):
    """Attention that was seen and cannot be described: where it is, and why. ``queries`` is their number, if known."""

    kind: ClassVar[str] = "attention"

    reason: Reason
    queries: Any = None

    @property
    def source(self) -> str:
        """The user's line."""
        return self.reason.source or source_line(self.anchor)


def find_attention(gm: fx.GraphModule) -> list[AttentionSite | Unmatched]:
    """All attention in a normalised graph, in graph order.

    An attention that we cannot describe is there too, with a typed reason (``attention-shape``,
    ``attention-arithmetic``, ``foreign-kernel`` and those of :data:`effcompile.patterns.arithmetic.MISSING`); a softmax
    that no matrix product follows is none and is passed over.
    """
    found: list[AttentionSite | Unmatched] = []
    proofs = masks.Proofs(gm.graph, _constants(gm))
    for node in gm.graph.nodes:
        site: AttentionSite | Reason | None
        if is_call(node, aten.scaled_dot_product_attention):
            site = _from_sdpa(node, proofs)
        elif is_call(node, aten.softmax.int, aten._softmax.default):
            site = _from_arithmetic(node, proofs)
        else:
            site = _foreign(node)
        if isinstance(site, Reason):
            found.append(Unmatched(node, site, _rows(node)))
        elif site is not None:
            found.append(site)
    return found


def hidden_attention(gm: fx.GraphModule, why: Reason) -> list[Unmatched]:
    """The calls of attention in a graph that was not normalised for the reason ``why``, nested regions included."""

    def calls(graph: fx.GraphModule) -> Iterator[fx.Node]:
        for node in graph.graph.nodes:
            if str(node.target) == "flex_attention" or node.target is nn.functional.scaled_dot_product_attention:
                yield node
            held = getattr(graph, node.target, None) if node.op == "get_attr" else None
            if isinstance(held, fx.GraphModule):
                yield from calls(held)

    found = []
    for node in calls(gm):
        query = node.args[0].meta.get("example_value") if node.args and isinstance(node.args[0], fx.Node) else None
        flex = Reason("flex-attention", FLEX, source_line(node))
        reason = flex if str(node.target) == "flex_attention" else dataclasses.replace(why, source=source_line(node))
        found.append(Unmatched(node, reason, query.shape[2] if isinstance(query, Tensor) and query.ndim == 4 else None))
    return found


FLEX = (
    "attention is a call of flex_attention, whose score and mask functions are not read; with "
    'attn_implementation="sdpa" it would be recognised'
)


def _foreign(node: fx.Node) -> Reason | None:
    """A reason for a call of somebody else's attention kernel: an operator that takes queries, keys and values.

    That is three tensors of one rank (3 or 4), dtype and last size, of which it makes a tensor like the first.
    """
    name = str(node.target)
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if node.target.namespace in ("aten", "prims", "prim", "effcompile"):
        fused = node.target.namespace == "aten" and ("scaled_dot_product" in name or "_attention" in name)
        if not fused:
            return None
    else:
        given = [value(a) for a in node.args[:3]]
        if len(given) < 3 or not all(isinstance(x, Tensor) and x.ndim in (3, 4) for x in given):
            return None
        made = value(node)
        first = made[0] if isinstance(made, (list, tuple)) and made else made
        alike = {(x.ndim, x.dtype, x.shape[-1]) for x in given}
        if len(alike) != 1 or not isinstance(first, Tensor) or not same_shape(first.shape, given[0].shape):
            return None
    return Reason(
        "foreign-kernel",
        f"{name} takes queries, keys and values, but what it computes of them is not known here; with "
        'attn_implementation="sdpa" or scaled_dot_product_attention it would be recognised',
        source_line(node),
    )


def _rows(node: fx.Node) -> Any:
    """Queries of an SDPA call or a softmax; ``None`` for other calls, whose layouts are their own."""
    known = is_call(node, aten.scaled_dot_product_attention, aten.softmax.int, aten._softmax.default)
    sizes = shape(node.args[0]) if known and isinstance(node.args[0], fx.Node) else ()
    return sizes[-2] if len(sizes) > 1 else None


def _from_arithmetic(node: fx.Node, proofs: masks.Proofs) -> AttentionSite | Reason | None:
    """A site, or why it is none, from the parts of an attention in arithmetic."""
    parts = arithmetic.parts_of(node)
    if parts is None or isinstance(parts, Reason):
        return parts
    sinks = None
    if parts.column is not None:
        sinks = per_head(parts.column, proofs.writes, proofs.constants)
        if sinks is None:
            return Reason("sinks", arithmetic.MISSING["sinks"], source_line(node))
    writes = proofs.writes
    changed = any(writes.after(factor) for factor, _ in parts.factors)
    if changed or any(writes.between(operand(n, 0), n) or writes.after(n) for n in parts.in_place):
        text = "the scores, or a factor of them, are written to in place after they are made"
        return Reason("attention-arithmetic", text, source_line(node))
    found = _site(
        proofs,
        anchor=node,
        output=parts.output,
        query=parts.query,
        key=parts.key,
        val=parts.value,
        scale=parts.scale,
        is_causal=False,
        terms=parts.terms,
        dropout=parts.dropout,
        spelling="arithmetic",
        gqa_flag=False,
    )
    if isinstance(found, Reason):
        return found
    return dataclasses.replace(found, softcap=parts.softcap, sinks=sinks, factors=parts.factors)


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
    terms: tuple[masks.AnyTerm, ...],
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
    made = same_shape(shape(output), (*q[:3], v[3]))
    if k[1] != v[1] or q[1] % k[1] or q[3] != k[3] or not tied(k[2], v[2]) or not made:
        return Reason("attention-shape", f"query, key and value do not belong together: {sizes}", source)
    expanded = shape(arguments(anchor)["key"])[1] if spelling == "sdpa" else q[1]
    if expanded != q[1] and not gqa_flag:
        return Reason(
            "attention-shape", f"{q[1]} query heads over {expanded} key heads without enable_gqa: {sizes}", source
        )
    mask = proofs.mask(terms, is_causal=is_causal, query_length=q[2], key_length=k[2])
    nodes = tuple(map(masks.term_node, terms))
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
    if not is_call(thin, aten.unsqueeze.default) or thin.args[1] not in (2, -3):
        return node
    inner = thin.args[0]
    b, g, s, d = shape(inner) if len(shape(inner)) == 4 else (0, 0, 0, 0)
    r = shape(wide)[2] if len(shape(wide)) == 5 else 0
    ok = same_shape(shape(wide), (b, g, r, s, d)) and same_shape(shape(outer), (b, g * r, s, d))
    return inner if ok else node


def _ranks(store: fx.Node) -> tuple[int, int]:
    """Of the latents that a ``kv_store`` takes in place of keys and of values."""
    form = KVForm.parse(str(store.args[9]))
    return form.rank("key"), form.rank("value")


def _fills(fresh: Any, read: fx.Node, rank: int) -> bool:
    """Whether what a store takes in is what attention reads, or latents of the same hidden states."""
    if not rank:
        return strip_copies(fresh) is read
    # A norm may have its weight first: weight * x.
    ours, theirs = producer(fresh, aten.mul.Tensor), producer(read, aten.mul.Tensor)
    return ours is not None and theirs is not None and strip_copies(ours.args[0]) is strip_copies(theirs.args[0])


def producer(node: Any, *wide: Any) -> fx.Node | None:
    """The linear that ``node`` comes from, through reshapes, splits, norms of heads and rotation.

    Of an operation the first input is followed, and all of sums, of parts put together, and of those in ``wide``.
    """
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
            if not is_call(current, aten.add.Tensor, aten.cat.default, *wide)
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
