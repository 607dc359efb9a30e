"""Which tokens a graph is about, and where they stand in their texts: known from its attention.

A call may be a prompt, a part of one, or a step. What a feed-forward block does with that is in none of its own nodes.
The first query's place is the offset of a causal mask, or the number of keys before the call's own; which tokens are
padding is what the mask hides.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from effcompile.kernels.reason import Reason
from effcompile.patterns import masks
from effcompile.patterns.attention import AttentionSite, Unmatched, strip_repeat
from effcompile.patterns.ffn import FeedForwardSite
from effcompile.patterns.walk import arguments, aten, first_mutation, is_call, same_size, shape, value


@dataclasses.dataclass(frozen=True)
class Text:
    """The tokens of one graph.

    Parameters
    ----------
    query, key
        Of an attention over the texts so far: ``[B, H, T, D]`` and ``[B, G, S, D]``.
    offset
        Place of the first token: a number, the node of an integer tensor with one element, or None: ``S - T``.
    padding
        A node ``[B or 1, >= S]`` whose elements are nonzero for tokens that count, or None: all do.
    window
        Whether the attention sees a window only.
    """

    query: fx.Node
    key: fx.Node
    offset: int | fx.Node | None
    padding: fx.Node | None
    window: bool = False

    @property
    def batch(self) -> Any:
        """The number of texts."""
        return shape(self.query)[0]

    @property
    def tokens(self) -> Any:
        """The number of tokens of each text in this call."""
        return shape(self.query)[2]

    @property
    def ready(self) -> fx.Node:
        """The last node that is needed to say anything about the tokens."""
        nodes = (self.query, self.key, self.offset, self.padding)
        return max(node for node in nodes if isinstance(node, fx.Node))

    def size(self, graph: fx.Graph, dim: int) -> Any:
        """A size of the query, as an argument of a call."""
        size = shape(self.query)[dim]
        return size if isinstance(size, int) else self._once(graph, f"size {dim}", aten.sym_size.int, self.query, dim)

    def at(self, graph: fx.Graph) -> fx.Node:
        """The place of the first token, int64 0-d, as it is when the call begins."""
        if isinstance(self.offset, fx.Node):
            # Right behind where it is made: the graph may count it up later.
            flat = self._once(graph, "flat", aten.reshape.default, self.offset, [], after=self.offset)
            wide = self._once(graph, "wide", aten.to.dtype, flat, torch.int64, after=flat)
            return self._once(graph, "at", aten.clone.default, wide, after=wide)
        first: Any = self.offset
        if first is None:
            keys = shape(self.key)[2]
            keys = keys if isinstance(keys, int) else self._once(graph, "keys", aten.sym_size.int, self.key, 2)
            queries = self.size(graph, 2)
            fixed = isinstance(keys, int) and isinstance(queries, int)
            first = keys - queries if fixed else self._once(graph, "first", _minus, keys, queries)
        options = {"dtype": torch.int64, "device": value(self.query).device}
        return self._once(graph, "at", aten.full.default, [], first, **options)

    def counted(self, graph: fx.Graph) -> fx.Node | None:
        """Which tokens of this call count: bool ``[B or 1, T]``, or None: all of them."""
        if self.padding is None:
            return None
        options = {"dtype": torch.int64, "device": value(self.query).device}
        place = self._once(graph, "places", aten.arange.default, self.size(graph, 2), **options)
        place = self._once(graph, "here", aten.add.Tensor, place, self.at(graph))
        own = self._once(graph, "padding", aten.index_select.default, self.padding, 1, place)
        return own if value(own).dtype is torch.bool else self._once(graph, "counted", aten.ne.Scalar, own, 0)

    def _once(
        self, graph: fx.Graph, what: str, target: Any, *args: Any, after: fx.Node | None = None, **kwargs: Any
    ) -> fx.Node:
        """A call, made once for all blocks, behind ``after`` or all that was made so far; with its fake value."""
        last = self.ready if after is None else after
        node: fx.Node
        for node in graph.nodes:
            if node.meta.get("effcompile_text") == what:
                return node
            if after is None and "effcompile_text" in node.meta and node > last:
                last = node
        while last.next.op == "placeholder":
            last = last.next
        with graph.inserting_after(last):
            made = graph.call_function(target, args, kwargs)
        with value(self.query).fake_mode:
            made.meta["val"] = target(*fx.node.map_arg(args, value), **kwargs)
        made.meta["effcompile_text"] = what
        return made


def _minus(a: Any, b: Any) -> Any:
    return a - b


def find_text(attention: Sequence[AttentionSite | Unmatched]) -> Text | Reason:
    """The tokens of a graph with these attentions, or why that is not known.

    Reasons: ``no-text`` without attention whose mask is known, ``text-not-causal`` for encoders, ``text-packed``.
    """
    found: list[Text] = []
    reasons: list[Reason] = []
    for one in attention:
        site = _alike(one) if isinstance(one, Unmatched) else one
        if isinstance(site, AttentionSite) and site.cross:
            continue
        told = _text(site)
        if isinstance(told, Text):
            found.append(told)
        elif told.code in ("text-not-causal", "text-packed"):
            return told
        else:
            reasons.append(told)
    if not found:
        why = f": {reasons[0].text}" if reasons else ", since no attention is in its graph"
        return Reason("no-text", f"where the tokens of a call stand in their text is not known{why}")
    # A cache of a window alone forgets tokens, so that its first key is not the first token.
    return min(found, key=lambda text: text.window)


def _alike(unmatched: Unmatched) -> AttentionSite | Reason:
    """What an attention that is no site says of its tokens all the same.

    A cache that grows has keys and values of lengths that are not known to be one, so that no step with it is a site.
    """
    node = unmatched.anchor
    if not is_call(node, aten.scaled_dot_product_attention):
        return unmatched.reason
    given = arguments(node)
    query, key, val, term = (given[name] for name in ("query", "key", "value", "attn_mask"))
    if not len(shape(query)) == len(shape(key)) == len(shape(val)) == 4:
        return unmatched.reason
    causal = bool(given["is_causal"])
    mask = masks.recover(term, is_causal=causal, query_length=shape(query)[2], key_length=shape(key)[2])
    terms = () if term is None else (term,)
    return AttentionSite(node, node, query, strip_repeat(key), strip_repeat(val), 1.0, causal, terms, 0.0, 1, "", mask)


def _text(site: AttentionSite | Reason) -> Text | Reason:
    if isinstance(site, Reason):
        return site
    mask, queries, keys = site.mask, shape(site.query)[2], shape(site.key)[2]
    if isinstance(mask, Reason):
        return mask
    if mask.predicate.segments:
        return Reason("text-packed", "several texts stand in one row, and a choice is made for a row", site.source)
    offset: int | fx.Node | None = None
    if mask.predicate.causal:
        if isinstance(mask.offset, int | fx.Node):
            offset = mask.offset
        elif not same_size(keys, queries + mask.offset):
            return Reason("mask-offset", "the place of the first query is a size that is computed", site.source)
    elif not same_size(queries, 1):
        return Reason("text-not-causal", "tokens see those after them, so no text goes on here", site.source)
    if mask.padding is not None and first_mutation(mask.padding) is not None:
        return Reason("mask-mutated", "the graph writes to the padding mask", site.source)
    return Text(site.query, site.key, offset, mask.padding, mask.predicate.window is not None)


def locate(blocks: Sequence[FeedForwardSite], attention: Sequence[AttentionSite | Unmatched]) -> None:
    """Tell each block its place among the blocks of the graph, and how to find its tokens, once if anyone asks."""
    text = functools.cache(lambda: find_text(attention))
    for number, block in enumerate(blocks):
        block.text, block.depth = text, number / len(blocks)
