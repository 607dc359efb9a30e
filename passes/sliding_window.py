"""A sliding window of tokens: each query sees itself and the keys right before it.

Papers: Mistral 7B (Jiang et al., 2023), section 2, "Sliding Window Attention"; Longformer (Beltagy et al., 2020),
section 3.1, for its use without training.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

from torch import fx

from effcompile import lowering
from effcompile.kernels.reason import Reason
from effcompile.passes import compress_kv
from effcompile.passes.base import Pass
from effcompile.passes.rewrite import Rewrite
from effcompile.passes.sites import DENSE, fresh_store, unsupported
from effcompile.patterns.attention import AttentionSite
from effcompile.patterns.masks import Mask
from effcompile.patterns.walk import same_size, shape, value


@dataclasses.dataclass(frozen=True)
class SlidingWindow(Pass):
    """Key ``j`` is visible to the query at position ``p`` only if ``p - window < j <= p``, in prompts and at decoding.

    Exact to the token, where ``streaming`` keeps whole blocks: what a model with ``sliding_window`` in its config does.
    Where a model has a window of its own, the narrower of the two holds.

    Parameters
    ----------
    window
        Tokens that a query sees, itself included.

    Notes
    -----
    Positions are those of slots in the prompt or cache, as in transformers: padding on the left takes none from a
    window that lies behind it. Nothing is evicted: a compressed cache keeps all tokens, and reads the window's.
    Decoding reads the window where the cache is ours (``compress_kv``, 16 bits at the least); on a cache of
    transformers a step whose mask says nothing of causality is left as it is, with the reason ``mask-not-honoured``.
    """

    window: int = 4096

    name: ClassVar[str] = "sliding_window"
    paper: ClassVar[str] = "Mistral 7B (Jiang et al., 2023); Longformer (Beltagy et al., 2020)"
    summary: ClassVar[str] = "a window of the nearest tokens, exact to the token, in prompts and at decoding"
    phases: ClassVar[tuple[str, ...]] = ("prefill", "decode")
    family: ClassVar[str] = "sparse_attention"
    limit: ClassVar[dict[str, Any]] = {"window": 1 << 30}

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window={self.window!r}; expected at least 1 token, the query's own.")

    def match(self, site: AttentionSite) -> Rewrite | Reason:
        """Attention with the window in its predicate, or why the site stays as it is."""

        def no(code: str, text: str) -> Reason:
            return Reason(code, text, site.source)

        mask = site.mask
        if isinstance(mask, Reason):
            return no(mask.code, mask.text)
        rule = mask.predicate
        if not rule.causal or rule.prefix:
            return no("mask-not-honoured", f"{self.name} is for causal attention; the mask is {rule.name}")
        narrow = dataclasses.replace(rule, window=min(self.window, rule.window or self.window))
        site = dataclasses.replace(site, mask=dataclasses.replace(mask, predicate=narrow))
        made = compress_kv.match(site) if site.load is not None else self._fresh(site)
        return made if isinstance(made, Reason) else dataclasses.replace(made, form=f"{self.name}_{made.form}")

    def _fresh(self, site: AttentionSite) -> Rewrite | Reason:
        """Keys and values as they are; the program begins each tile of queries at the window of its first."""

        def no(code: str, text: str) -> Reason:
            return Reason(code, text, site.source)

        mask, (queries, keys) = site.mask, (shape(n)[2] for n in (site.query, site.key))
        assert isinstance(mask, Mask)
        if site.dropout:
            return no("dropout", f"attention dropout {site.dropout} is active; call model.eval()")
        if isinstance(mask.offset, fx.Node) or not same_size(keys, queries + mask.offset):
            return no("mask-offset", f"{self.name} needs the queries to be the last tokens of the keys")
        if mask.finite and mask.predicate.key_mask:
            return no("mask-not-honoured", "rows that see no key get a mean of all values here, and 0 from a window")
        if problem := unsupported(site):
            return problem
        made = compress_kv.fuse(site, DENSE, None, functools.partial(fresh_store, site=site))
        why = lowering.refusal(made.programs[0], value(site.query).device.type)
        return made if why is None else no("not-supported", why)
