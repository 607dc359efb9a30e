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
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from effcompile import lowering
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import DTYPES, HEAD_SIZES, Predicate, Program, ScoreParts, StoreProgram
from effcompile.kernels.reason import Reason
from effcompile.passes.base import Pass
from effcompile.passes.operands import parts_of, query_of
from effcompile.passes.rewrite import Rewrite
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
from effcompile.runtime import adapter

NO_CACHE = (
    "no compressed cache reaches this attention, and a cache exists before a back end does, so options alone cannot "
    "make one. Decorate the model, ec.compress_kv(key_bits=4, value_bits=4)(model), or pass "
    "past_key_values=ec.Cache(model)"
)

DENSE = KVForm(16, 16)


@dataclasses.dataclass(frozen=True)
class CompressKV(Pass):
    """Keep keys and values in few bits, and attend to them without unpacking them to memory.

    Parameters
    ----------
    key_bits, value_bits
        16, 8, 4, 3 or 2, separately; 16 is unquantised, in the model's dtype. Keys need the bits more (KVTuner,
        section 4).
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
    summary: ClassVar[str] = "key/value cache in 8 to 2 bits, keys per channel, values per token, read inside attention"
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
        return no(*_elsewhere(site))
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
    if predicate.prefix:
        return no("mask-prefix", "a prefix may reach past the tokens that are stored, where queries would see zeros")
    if problem := _unsupported(site):
        return problem
    device = value(site.query).device.type
    if predicate.segments and (why := lowering.refusal(_program(site, form), device)):
        return no("not-supported", why)
    return _fuse(site, form, form, lambda graph: (load.args[:6], total))


def _elsewhere(site: AttentionSite) -> tuple[str, str]:
    """Code and text of why a site has nothing to do with a compressed store."""
    if site.latent:
        return "latent-keys", (
            "keys and values are computed from what the cache holds (multi-head latent attention), so the store is "
            "read densely and multiplied first"
        )
    if site.cross:
        return "cross-attention", "its keys are those of other tokens (an encoder's), made once and kept as they are"
    if site.anchor.graph.find_nodes(op="call_function", target=torch.ops.effcompile.kv_store.default):
        return "other-cache", (
            "the model has a compressed cache, but not for this layer: layers with a sliding window or chunks keep the "
            "cache that transformers gives them"
        )
    return "no-compressed-cache", NO_CACHE


def _fresh(site: AttentionSite) -> Rewrite | Reason:
    """The first call attends to the fresh keys and values, which are a full store of 16 bits.

    So on CPUs it is our prefill program, twice as fast as SDPA there. On GPUs SDPA's flash kernel is the best form of
    plain causal attention, and arithmetic becomes that.
    """

    def no(code: str, text: str) -> Reason:
        return Reason(code, text, site.source)

    mask, tokens = site.mask, shape(site.query)[2]
    if isinstance(mask, Reason):
        return no(mask.code, mask.text)
    square = same_size(tokens, shape(site.key)[2])
    if not (mask.predicate.causal and isinstance(mask.offset, int) and mask.offset == 0 and square):
        return no(
            "fresh-keys",
            f"the first call attends to its own keys, and its mask ({mask.predicate.name}) does not begin with them",
        )
    if value(site.query).device.type == "cpu" and _serves_fresh(site, mask):

        def dense(graph: fx.Graph) -> tuple[tuple[fx.Node | None, ...], fx.Node]:
            key, val = (
                graph.call_function(aten.clone.default, (n,), {"memory_format": torch.contiguous_format})
                for n in (site.key, site.value)
            )
            count = tokens if isinstance(tokens, int) else graph.call_function(aten.sym_size.int, (site.query, 2))
            length = graph.call_function(aten.full.default, ([], count), {"dtype": torch.int64, "device": "cpu"})
            return (key, None, None, val, None, None), length

        return _fuse(site, DENSE, KVForm.parse(str(site.store.args[9])), dense)  # type: ignore[union-attr]
    if parts := _score_parts(site).name or ("factors" if site.factors else ""):
        return no("fresh-keys", f"the first call attends to its own keys, and SDPA has no such scores ({parts})")
    if site.spelling == "sdpa" and not site.mask_terms:
        return no(
            "fresh-keys", "the first call attends to its own keys; SDPA without a mask is already the best form of that"
        )
    if mask.predicate != Predicate(causal=True):
        return no(
            "fresh-keys", f"the first call attends to its own keys, and SDPA needs the mask ({mask.predicate.name})"
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


def _serves_fresh(site: AttentionSite, mask: Mask) -> bool:
    """Whether the C++ prefill program computes what the site does."""
    if _unsupported(site) is not None or site.dropout:
        return False
    # A query that may see no key gets 0 from us, and a mean from a mask of large finite numbers.
    blind = mask.finite and mask.predicate.key_mask
    return not blind and lowering.refusal(_program(site, DENSE), "cpu") is None


def _unsupported(site: AttentionSite) -> Reason | None:
    """Why no attention program can serve a site, whatever it reads."""
    query, size, value_size = value(site.query), shape(site.query)[3], shape(site.value)[3]
    if query.dtype not in DTYPES or size not in HEAD_SIZES or value_size not in HEAD_SIZES:
        text = f"no kernel for {query.dtype} with head sizes {size} and {value_size}"
        return Reason("not-supported", text, site.source)
    dtypes = [value(n).dtype for n in (site.query, site.key, site.value, site.output)]
    if len(set(dtypes)) > 1:
        text = f"query, key, value and result are in {', '.join(map(str, dtypes))}; a kernel needs one dtype"
        return Reason("not-supported", text, site.source)
    if torch.is_grad_enabled() and query.requires_grad:
        text = "gradients are needed and attention over a store has none; use torch.no_grad()"
        return Reason("gradients", text, site.source)
    return None


def _program(site: AttentionSite, form: KVForm) -> Program:
    """The attention program of a site with a proved mask, over a store of ``form``."""
    assert isinstance(site.mask, Mask)
    queries = shape(site.query)[2]
    # A symbolic query length is a prompt's; a launcher looks at the real one anyway.
    phase = Program.phase_for(queries, site.ratio) if isinstance(queries, int) else "prefill"
    sizes = shape(site.query)[3], shape(site.value)[3]
    dtype = value(site.query).dtype
    return Program(phase, form, site.mask.predicate, dtype, site.ratio, *sizes, score=_score_parts(site))


def _score_parts(site: AttentionSite) -> ScoreParts:
    """What happens to the scores of a site with a proved mask."""
    assert isinstance(site.mask, Mask)
    return ScoreParts(site.softcap is not None, bool(site.mask.bias), site.sinks is not None)


State = tuple[Any, ...]


def _fuse(site: AttentionSite, form: KVForm, stored: KVForm, read: Callable[[fx.Graph], tuple[State, Any]]) -> Rewrite:
    """``attend`` over a store of ``form``; ``read`` gives its six state arguments and its length.

    ``stored`` is the form that the call appends to, whose kernel it will need too.
    """
    assert isinstance(site.mask, Mask)
    padding, program = site.mask.padding, _program(site, form)

    def emit(graph: fx.Graph) -> fx.Node:
        mask = None if padding is None else _bool_mask(graph, padding)
        window = -1 if program.predicate.window is None else program.predicate.window
        state, length = read(graph)
        call = graph.call_function(
            torch.ops.effcompile.attend.default,
            (query_of(graph, site), *state, length, mask, form.name, site.scale, True, window),
            parts_of(graph, site),
        )
        call.meta.update(site.output.meta)
        return graph.call_function(operator.getitem, (call, 0))

    return Rewrite(
        program.name, emit, (program, StoreProgram(stored, program.dtype, program.key_size, program.value_size))
    )


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
