"""Compressed key/value cache: fuse reading a packed store into the attention that follows.

Papers: KIVI (Liu et al., ICML 2024, sections 3-4): keys per channel, values per token, a full-precision residual, each
group quantised once. KVTuner (Li et al., ICML 2025, section 4): key and value bits chosen separately, per layer.
KVQuant (Hooper et al., NeurIPS 2024, section 3.2): keys quantised before RoPE. LoRC (Zhang et al., 2024, arXiv
2410.03111): keys and values as low-rank latents.

The choice of bits lives in the cache (:class:`effcompile.runtime.cache.Cache`), which a decorated model makes for
itself; the meaning is the store's in eager and compiled alike. What this pass does is an optimisation:
``kv_load -> expand heads -> attention(mask)  ->  attend(store, predicate)``.
"""

from __future__ import annotations

import dataclasses
import operator
import types
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import fx, nn

from effcompile import lowering
from effcompile.kernels.form import Axis, Bits, KVForm
from effcompile.kernels.program import Predicate, Program, StoreProgram
from effcompile.kernels.reason import Reason
from effcompile.kernels.rope import rotary_of
from effcompile.passes.base import Pass, Target
from effcompile.passes.operands import parts_of, query_of, score_of
from effcompile.passes.rewrite import Rewrite
from effcompile.passes.sites import DENSE, State, bool_mask, fresh_store, mixed_dtypes, not_this_store, unsupported
from effcompile.patterns.attention import AttentionSite
from effcompile.patterns.masks import Mask
from effcompile.patterns.walk import (
    aten,
    is_call,
    same_size,
    shape,
    strip_casts,
    value,
)
from effcompile.runtime import adapter
from effcompile.runtime import rules as by_layer

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
        16, 8, 4, 3 or 2, or ``"fp8"`` (e4m3), separately; 16 is unquantised, in the model's dtype. Keys need the bits
        more (KVTuner, section 4).
    group_size
        Tokens of a channel, or channels of a token, that share a scale.
    residual
        The newest tokens kept in the model's dtype; a multiple of ``group_size``, 0 allowed.
    key_axis, value_axis
        Whether a scale belongs to one ``"channel"`` of some tokens or to one ``"token"`` and some of its channels. Keys
        have channels that are large throughout, which cost the others nothing per channel (KIVI, section 3.1).
    rope
        Whether keys are quantised with their rotary embedding ("post") or before it ("pre": KVQuant, section 3.2).
    latent
        Channels that stand for the keys of all heads, which are rebuilt from them inside attention (LoRC); a multiple
        of 16, at most the channels of all key heads together. ``key_bits`` are then those of the latents. A share
        between 0 and 1, such as 0.67: that share of the channels of all layers, most in shallow ones (LoRC's schedule).
        0: keys themselves.
    value_latent
        The same for values, of which attention sums latents. What their projection is cut by has to be fitted on text
        first, with ``ec.fit_latents(model, batches)``: by its weights alone, as LoRC does, values lose far more.
    rules
        Other values of these options for some layers: a pattern of module paths (as seen from the decorated module)
        and what differs there, such as ``{"model.layers.[0-3]": {"key_bits": 8}}``. The deepest match wins, of equally
        deep ones the last.
    """

    key_bits: Bits = 4
    value_bits: Bits = 4
    group_size: int = 32
    residual: int = 128
    key_axis: Axis = "channel"
    value_axis: Axis = "token"
    rope: Literal["post", "pre"] = "post"
    latent: int | float = 0
    value_latent: int | float = 0
    rules: by_layer.Rules = None

    name: ClassVar[str] = "compress_kv"
    paper: ClassVar[str] = (
        "KIVI (Liu et al., ICML 2024); KVTuner (Li et al., ICML 2025); KVQuant (Hooper et al., NeurIPS 2024); "
        "LoRC (Zhang et al., 2024)"
    )
    summary: ClassVar[str] = "key/value cache in 8 to 2 bits, keys per channel, values per token, read inside attention"
    phases: ClassVar[tuple[str, ...]] = ("prefill", "decode")
    limit: ClassVar[dict[str, Any]] = {"key_bits": 16, "value_bits": 16}
    elsewhere: ClassVar[dict[Target, str]] = {
        "method": (
            "A model has one cache, whichever of its methods is called: put it above the class, on an instance, "
            "ec.compress_kv()(model), or pass past_key_values=ec.Cache(model) to this call alone."
        ),
        "function": (
            "A cache belongs to a model: put it on the one that the function calls, ec.compress_kv()(model), or pass "
            "past_key_values=ec.Cache(model) to that call."
        ),
    }

    def __post_init__(self) -> None:
        by_layer.parse(self.rules, self.form)
        object.__setattr__(self, "rules", by_layer.freeze(self.rules))

    @property
    def form(self) -> KVForm:
        """The store that these options describe."""
        bits = self.key_bits, self.value_bits
        latents = self.latent, self.value_latent
        return KVForm(*bits, self.group_size, self.residual, self.key_axis, self.value_axis, self.rope, *latents)

    def check(self, module: nn.Module) -> None:
        """Raise ``FormError`` for a rule that names no layer of ``module``."""
        adapter.check_rules(module, by_layer.parse(self.rules, self.form))

    def on_decorate(self, module: nn.Module) -> None:
        """Choose the form for the caches of this model, and attach the hooks that make them."""
        adapter.set_form(module, self.form, by_layer.parse(self.rules, self.form))

    def on_remove(self, module: nn.Module) -> None:
        """Take the hooks and the choice off again."""
        adapter.detach(module)

    def match(self, site: AttentionSite) -> Rewrite | Reason:
        """The fused attention for ``site``, or why it stays as it is."""
        return match(site)


def match(site: AttentionSite) -> Rewrite | Reason:
    """Fuse a ``kv_load`` into ``site``. The form is the cache's own, so no options are needed to decide."""
    load, store = site.load, site.store
    if load is None and store is None:
        return Reason(*_elsewhere(site), site.source)
    if load is None:
        return _fresh(site)
    if problem := unreadable(site, load):
        return problem
    form = KVForm.parse(str(load.args[7]))
    return fuse(site, form, form, lambda graph: (load.args[:6], load.args[6]), dict(load.kwargs))


def unreadable(site: AttentionSite, load: fx.Node) -> Reason | None:
    """Why attention cannot read the store that ``load`` makes dense where it is, or None."""

    def no(code: str, text: str) -> Reason:
        return Reason(code, text, site.source)

    form = KVForm.parse(str(load.args[7]))
    if site.dropout:
        return no("dropout", f"attention dropout {site.dropout} is active; call model.eval()")
    if isinstance(site.mask, Reason):
        return no(site.mask.code, site.mask.text)
    predicate = site.mask.predicate
    if problem := not_this_store(site):
        return problem
    if problem := unsupported(site):
        return problem
    device = value(site.query).device.type
    asked = predicate.segments or form.latents
    if asked and (why := lowering.refusal(_program(site, form, load.kwargs), device)):
        return no("not-supported", why)
    return None


def _elsewhere(site: AttentionSite) -> tuple[str, str]:
    """Code and text of why a site has nothing to do with a compressed store."""
    if site.latent:
        return "latent-keys", (
            "keys and values are computed from what the cache holds (multi-head latent attention), so the store is "
            "read densely and multiplied first"
        )
    if _is_cast(site):
        return "mixed-dtypes", mixed_dtypes(site)
    if site.cross:
        return "cross-attention", "its keys are those of other tokens (an encoder's), made once and kept as they are"
    if site.anchor.graph.find_nodes(op="call_function", target=torch.ops.effcompile.kv_store.default):
        return "other-cache", (
            "the model has a compressed cache, but not for this layer: layers with a sliding window or chunks keep the "
            "cache that transformers gives them"
        )
    return "no-compressed-cache", NO_CACHE


def _is_cast(site: AttentionSite) -> bool:
    """Whether attention reads what the cache holds or what this call gives to it, but for a cast in between."""
    sides, ours = [strip_casts(n) for n in (site.key, site.value)], torch.ops.effcompile
    stores = site.anchor.graph.find_nodes(op="call_function", target=ours.kv_store.default)
    loaded = all(is_call(n, operator.getitem) and is_call(n.args[0], ours.kv_load.default) for n in sides)
    return loaded or sides in [[strip_casts(node) for node in store.args[7:9]] for store in stores]


def _fresh(site: AttentionSite) -> Rewrite | Reason:
    """The first call attends to the fresh keys and values, which are a full store of 16 bits.

    So on CPUs it is our prefill program, twice as fast as SDPA there. On GPUs SDPA's flash kernel is the best form of
    plain causal attention, and arithmetic becomes that; packed sequences and prefixes, which SDPA takes as a mask of
    all pairs only, are our program there too.
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
    pairs = mask.predicate.segments or mask.predicate.prefix
    if (pairs or value(site.query).device.type == "cpu") and _serves_fresh(site, mask):
        store = site.store
        assert store is not None
        stored, table = KVForm.parse(str(store.args[9])), store.kwargs.get("table")
        return fuse(site, DENSE, stored, lambda graph: fresh_store(graph, site), stored_table=table)
    if parts := score_of(site).name or ("factors" if site.factors else ""):
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
    """Whether the prefill program computes what the site does."""
    if unsupported(site) is not None or site.dropout:
        return False
    # A query that may see no key gets 0 from us, and a mean from a mask of large finite numbers.
    blind = mask.finite and mask.predicate.key_mask
    return not blind and lowering.refusal(_program(site, DENSE), value(site.query).device.type) is None


def _rotary(table: Any) -> int:
    """The channels that a table of angles rotates; 0 without one."""
    return rotary_of(value(table)) if isinstance(table, fx.Node) else 0


def _program(site: AttentionSite, form: KVForm, more: Mapping[str, Any] = types.MappingProxyType({})) -> Program:
    """The attention program of a site with a proved mask, over a store of ``form`` that ``more`` belongs to."""
    assert isinstance(site.mask, Mask)
    queries = shape(site.query)[2]
    # A symbolic query length is a prompt's; a launcher looks at the real one anyway.
    phase = Program.phase_for(queries, site.ratio) if isinstance(queries, int) else "prefill"
    sizes = shape(site.query)[3], shape(site.value)[3]
    dtype, turned = value(site.query).dtype, _rotary(more.get("table"))
    program = Program(phase, form, site.mask.predicate, dtype, site.ratio, *sizes, score=score_of(site), rotary=turned)
    return dataclasses.replace(program, normed="eps" in more)


def stores(form: KVForm, program: Program, rotary: int = 0) -> StoreProgram:
    """What appends to a store of ``form``, for attention by ``program``; latents are stored as they come."""
    sizes = (form.rank("key") or program.key_size, form.rank("value") or program.value_size)
    return StoreProgram(form.buffered, program.dtype, *sizes, 0 if form.latent else rotary)


def fuse(
    site: AttentionSite,
    form: KVForm,
    stored: KVForm | None,
    read: Callable[[fx.Graph], tuple[State, Any]],
    more: Mapping[str, Any] = types.MappingProxyType({}),
    stored_table: Any = None,
) -> Rewrite:
    """``attend`` over a store of ``form``; ``read`` gives its six state arguments and its length.

    ``stored`` is the form that the call appends to, if it does, whose kernel it will need too. ``more`` are the angles,
    and what makes keys of latents, that reading needs, and ``stored_table`` the angles that appending does.
    """
    assert isinstance(site.mask, Mask)
    padding, program = site.mask.padding, _program(site, form, more)
    programs: tuple[Program | StoreProgram, ...] = (program,)
    if stored is not None:
        programs += (stores(stored, program, _rotary(more.get("table") or stored_table)),)

    def emit(graph: fx.Graph) -> fx.Node:
        mask = None if padding is None else bool_mask(graph, padding)
        window = -1 if program.predicate.window is None else program.predicate.window
        state, length = read(graph)
        call = graph.call_function(
            torch.ops.effcompile.attend.default,
            (query_of(graph, site), *state, length, mask, form.name, site.scale, True, window),
            parts_of(graph, site) | dict(more),
        )
        call.meta.update(site.output.meta)
        return graph.call_function(operator.getitem, (call, 0))

    return Rewrite(program.name, emit, programs)
