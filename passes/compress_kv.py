"""Compressed key/value cache: fuse reading a packed store into the attention that follows.

Papers: KIVI (Liu et al., ICML 2024, sections 3-4): keys per channel, values per token, a full-precision residual, each
group quantised once. KVTuner (Li et al., ICML 2025, section 4): key and value bits chosen separately, per layer.

The choice of bits lives in the cache (:class:`effcompile.runtime.cache.Cache`), which a decorated model makes for
itself; the meaning is the store's in eager and compiled alike. What this pass does is an optimisation:
``kv_load -> expand heads -> attention(mask)  ->  attend(store, predicate)``.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from effcompile.kernels.form import KVForm
from effcompile.kernels.program import DTYPES, HEAD_SIZES, Predicate, Program, StoreProgram
from effcompile.kernels.reason import Reason
from effcompile.passes.base import Pass
from effcompile.passes.rewrite import Rewrite
from effcompile.patterns.attention import AttentionSite
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
from effcompile.runtime import adapter

NO_CACHE = (
    "no compressed cache reaches this attention, and a cache exists before a back end does, so options alone cannot "
    "make one. Decorate the model, ec.compress_kv(key_bits=4, value_bits=4)(model), or pass "
    "past_key_values=ec.Cache(model)"
)


@dataclasses.dataclass(frozen=True)
class CompressKV(Pass):
    """Keep keys and values in few bits, and attend to them without unpacking them to memory.

    Parameters
    ----------
    key_bits, value_bits
        16, 8 or 4, separately; 16 is unquantised, in the model's dtype. Keys need the bits more (KVTuner, section 4).
    group_size
        Tokens in a key group (per channel), channels in a value group (per token).
    residual
        The newest tokens kept in the model's dtype; a multiple of ``group_size``, 0 allowed.
    """

    key_bits: int = 4
    value_bits: int = 4
    group_size: int = 32
    residual: int = 128

    name: ClassVar[str] = "compress_kv"
    paper: ClassVar[str] = "KIVI (Liu et al., ICML 2024); KVTuner (Li et al., ICML 2025)"
    summary: ClassVar[str] = "key/value cache in 8 or 4 bits, keys per channel, values per token, read inside attention"
    phases: ClassVar[tuple[str, ...]] = ("prefill", "decode")
    limit: ClassVar[dict[str, Any]] = {"key_bits": 16, "value_bits": 16}

    def __post_init__(self) -> None:
        self.form  # noqa: B018  (building the form checks every value)

    @property
    def form(self) -> KVForm:
        """The store that these options describe."""
        return KVForm(self.key_bits, self.value_bits, self.group_size, self.residual)

    def on_decorate(self, module: nn.Module) -> None:
        """Choose the form for the caches of this model, and attach the hooks that make them."""
        adapter.set_form(module, self.form)

    def on_remove(self, module: nn.Module) -> None:
        """Take the hooks and the choice off again."""
        adapter.detach(module)

    def match(self, site: AttentionSite) -> Rewrite | Reason:
        """The fused attention for ``site``, or why it stays as it is."""
        return match(site)


def match(site: AttentionSite) -> Rewrite | Reason:
    """Fuse a ``kv_load`` into ``site``. The form is the cache's own, so no options are needed to decide."""

    def no(code: str, text: str) -> Reason:
        return Reason(code, text, site.source)

    load, store = site.load, site.store
    if load is None and store is None:
        return no("no-compressed-cache", NO_CACHE)
    if load is None:
        return _fresh(site)
    form = KVForm.parse(str(load.args[7]))
    if site.dropout:
        return no("dropout", f"attention dropout {site.dropout} is active; call model.eval()")
    if isinstance(site.mask, Reason):
        return no(site.mask.code, site.mask.text)
    predicate, total = site.mask.predicate, load.args[6]
    if not predicate.causal:
        return no("mask-not-causal", "the mask lets queries see past the end of the store, so it stays an operand")
    if not _ends_here(total, site.mask.offset, shape(site.query)[2]):
        return no("mask-offset", "the mask's first query does not stand at the length of the store before this call")
    state = [n for n in load.args[:6] if isinstance(n, fx.Node)]
    roots = {root(n) for n in state}
    for node in between(load, site.output):
        if any(root(a) in roots for a in mutated_arguments(node)):
            return no("store-changes", f"{node.name} writes to the store between reading it and attending to it")
    query, heads = value(site.query), shape(site.query)
    dtype, size, value_size = query.dtype, heads[3], shape(site.value)[3]
    if dtype not in DTYPES or size not in HEAD_SIZES or value_size not in HEAD_SIZES:
        return no("not-supported", f"no kernel for {dtype} with head sizes {size} and {value_size}")
    if torch.is_grad_enabled() and query.requires_grad:
        return no("gradients", "gradients are needed and attention over a store has none; use torch.no_grad()")
    # A symbolic query length is a prompt's; a launcher looks at the real one anyway.
    phase = Program.phase_for(heads[2], site.ratio) if isinstance(heads[2], int) else "prefill"
    program = Program(phase, form, predicate, dtype, site.ratio, size, value_size)

    def emit(graph: fx.Graph) -> fx.Node:
        mask = _bool_mask(graph, site.mask.padding) if isinstance(site.mask.padding, fx.Node) else None  # type: ignore[union-attr]
        window = -1 if predicate.window is None else predicate.window
        call = graph.call_function(
            torch.ops.effcompile.attend.default,
            (site.query, *load.args[:6], total, mask, form.name, site.scale, True, window),
        )
        call.meta.update(site.output.meta)
        return graph.call_function(operator.getitem, (call, 0))

    return Rewrite(program.name, emit, (program, StoreProgram(form, dtype, size, value_size)))


def _fresh(site: AttentionSite) -> Rewrite | Reason:
    """The first call: attention over the fresh keys and values, for which SDPA with a causal flag is the best form."""

    def no(code: str, text: str) -> Reason:
        return Reason(code, text, site.source)

    if isinstance(site.mask, Reason):
        return no(site.mask.code, site.mask.text)
    plain = Predicate(causal=True)
    if site.spelling == "sdpa" and not site.mask_terms:
        return no(
            "fresh-keys", "the first call attends to its own keys; SDPA without a mask is already the best form of that"
        )
    square = same_size(shape(site.query)[2], shape(site.key)[2])
    if site.mask.predicate != plain or not isinstance(site.mask.offset, int) or site.mask.offset != 0 or not square:
        return no(
            "fresh-keys",
            f"the first call attends to its own keys, and SDPA needs the mask ({site.mask.predicate.name})",
        )
    if torch.is_grad_enabled() and value(site.query).requires_grad and site.spelling != "sdpa":
        return no("gradients", "gradients are needed; the arithmetic is left as the user wrote it")

    def emit(graph: fx.Graph) -> fx.Node:
        return graph.call_function(
            aten.scaled_dot_product_attention.default,
            (site.query, site.key, site.value, None, site.dropout, True),
            {"scale": site.scale, "enable_gqa": site.ratio > 1},
        )

    return Rewrite("sdpa_causal", emit, ())


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


def _bool_mask(graph: fx.Graph, padding: fx.Node) -> fx.Node:
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
