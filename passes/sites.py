"""What passes that rewrite attention share: which sites a program can serve, and the operands they put there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from effcompile.kernels.form import KVForm
from effcompile.kernels.program import DTYPES, HEAD_SIZES
from effcompile.kernels.reason import Reason
from effcompile.patterns.attention import AttentionSite
from effcompile.patterns.masks import Mask
from effcompile.patterns.walk import (
    aten,
    between,
    first_mutation,
    is_call,
    mutated_arguments,
    root,
    same_size,
    shape,
    strip_copies,
    value,
)

DENSE = KVForm(16, 16)
"""The form of keys and values as they are: a store that this call fills whole."""
State = tuple[Any, ...]


def unsupported(site: AttentionSite) -> Reason | None:
    """Why no attention program can serve a site, whatever it reads."""
    query, size, value_size = value(site.query), shape(site.query)[3], shape(site.value)[3]
    if query.dtype not in DTYPES or size not in HEAD_SIZES or value_size not in HEAD_SIZES:
        text = f"no kernel for {query.dtype} with head sizes {size} and {value_size}"
        return Reason("not-supported", text, site.source)
    if len(set(_dtypes(site))) > 1:
        return Reason("mixed-dtypes", mixed_dtypes(site), site.source)
    if torch.is_grad_enabled() and any(map(_wants_gradient, site.anchor.graph.find_nodes(op="placeholder"))):
        text = "gradients are needed and attention over a store has none; use torch.no_grad()"
        return Reason("gradients", text, site.source)
    return None


def not_this_store(site: AttentionSite) -> Reason | None:
    """Why a site that reads a store, with a proved mask, is not causal attention over what the store holds then."""

    def no(code: str, text: str) -> Reason:
        return Reason(code, text, site.source)

    load, mask = site.load, site.mask
    assert load is not None
    assert isinstance(mask, Mask)
    if not mask.predicate.causal:
        return no("mask-not-causal", "the mask lets queries see past the end of the store, so it stays an operand")
    if not _ends_here(load.args[6], mask.offset, shape(site.query)[2]):
        return no("mask-offset", "the mask's first query does not stand at the length of the store before this call")
    state = [n for n in (*load.args[:6], load.kwargs.get("table")) if isinstance(n, fx.Node)]
    roots = {root(n) for n in state}
    for node in between(load, site.output):
        if any(root(a) in roots for a in mutated_arguments(node)):
            return no("store-changes", f"{node.name} writes to the store between reading it and attending to it")
    if mask.predicate.prefix:
        return no("mask-prefix", "a prefix may reach past the tokens that are stored, where queries would see zeros")
    return None


def _ends_here(total: Any, offset: Any, queries: Any) -> bool:
    """Whether ``total == offset + queries``, ``offset`` read from the tensor of ``total`` before any write to it."""
    if not isinstance(offset, fx.Node) or not is_call(total, aten.add.Tensor) or total.kwargs.get("alpha", 1) != 1:
        return False
    length, count = total.args
    if isinstance(count, fx.Node):
        count = value(count)
    if isinstance(count, Tensor) or not same_size(count, queries):
        return False
    if root(strip_copies(length)) is not root(strip_copies(offset)):
        return False
    # Both were read while the length still was the length before this call: no write to it comes earlier in the graph.
    write = first_mutation(strip_copies(length))
    return write is None or (total < write and all(user < write for user in offset.users if _reads(user)))


def _reads(node: fx.Node) -> bool:
    return not list(mutated_arguments(node)) and not is_call(node, torch.ops.effcompile.kv_store.default)


def _wants_gradient(placeholder: fx.Node) -> bool:
    """Whether an input of the graph has gradients. Fake values have none: tracing detaches them."""
    return bool(getattr(placeholder.meta.get("example_value"), "requires_grad", False))


def mixed_dtypes(site: AttentionSite) -> str:
    """The text of the reason ``mixed-dtypes``."""
    return (
        f"query, key, value and result are in {', '.join(map(str, _dtypes(site)))}, and a kernel needs the one dtype "
        "of the cache; autocast does that: load the model in the narrow dtype and call it without autocast"
    )


def _dtypes(site: AttentionSite) -> list[torch.dtype]:
    return [value(n).dtype for n in (site.query, site.key, site.value, site.output)]


def fresh_store(graph: fx.Graph, site: AttentionSite) -> tuple[State, fx.Node]:
    """The keys and values of a site as a full store of 16 bits: its six state arguments and its length."""
    key, val = (
        graph.call_function(aten.clone.default, (n,), {"memory_format": torch.contiguous_format})
        for n in (site.key, site.value)
    )
    tokens = shape(site.key)[2]
    count = tokens if isinstance(tokens, int) else graph.call_function(aten.sym_size.int, (site.key, 2))
    device = value(site.query).device
    length = graph.call_function(aten.full.default, ([], count), {"dtype": torch.int64, "device": device})
    return (key, None, None, val, None, None), length


def bool_mask(graph: fx.Graph, padding: fx.Node) -> fx.Node:
    """The padding mask as bool ``[B, S]``, made once right after the node it comes from."""
    if value(padding).dtype == torch.bool:
        return padding
    for user in padding.users:
        if is_call(user, aten.ne.Scalar) and user.args[1] == 0:
            return user
    after = padding
    while after.next.op == "placeholder":
        after = after.next
    with graph.inserting_after(after):
        made = graph.call_function(aten.ne.Scalar, (padding, 0))
    made.meta["val"] = value(padding) != 0
    return made
