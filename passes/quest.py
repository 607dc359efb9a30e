"""Quest: for each new token the pages of the cache that may hold the keys with the largest scores.

Paper: Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference (Tang et al., ICML 2024), section 3.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from effcompile.kernels import pages
from effcompile.kernels.form import KVForm
from effcompile.kernels.reason import Reason
from effcompile.passes.paged_decode import PagedDecode, place_of
from effcompile.passes.rewrite import Rewrite
from effcompile.patterns.attention import AttentionSite


@dataclasses.dataclass(frozen=True)
class Quest(PagedDecode):
    """Attend to ``token_budget`` tokens, in the pages whose keys may have the largest products with the query.

    Of each page the least and the largest value of each channel are known. They bound the score of every key in it
    from above, and pages are ranked by that bound. A cache that packs keys per channel (``compress_kv``) has these
    numbers already: they are what its groups are scaled with, so Quest costs no memory and keeps no state. They hold
    for the keys as they are read back, so that the bound is one for the very scores that attention computes.

    The newest tokens, which are not packed yet, are always visited, and the page of the newest token; they count.

    Parameters
    ----------
    token_budget, page_size
        The paper's pages have 16 tokens (``compress_kv(group_size=16)``), its budgets 256 to 2048.
    skip_layers
        The first layers of the model, which attend to everything: attention is not sparse there (section 4.1).

    Notes
    -----
    The paper ranks for each query head. Query heads that share a key/value head read the same bytes, so here they
    share a list: a page is worth the largest of their bounds, each taken relative to all pages that are ranked, as in a
    softmax. With one query head for each key/value head it is the paper's ranking.
    """

    skip_layers: int = 2

    name: ClassVar[str] = "quest"
    paper: ClassVar[str] = "Quest (Tang et al., ICML 2024)"
    summary: ClassVar[str] = "decoding: pages of a packed cache, by a bound on the scores of their keys"
    shared: ClassVar[bool] = False
    limit: ClassVar[dict[str, Any]] = PagedDecode.limit

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.skip_layers < 0:
            raise ValueError(f"skip_layers={self.skip_layers!r}; expected a number of layers, 0 or more.")

    def scores(self, step: pages.Step) -> Tensor:
        """Logarithms of shares, ``[B, G, nP]``: +inf where tokens are not packed, -inf where no token can be seen."""
        bound, present = pages.bounds(step, self.page), step.present(self.page)
        # Not form.packed(): the length stays on its device.
        packed = (step.length - step.form.residual).clamp(min=0) // step.form.group * step.form.group
        open_ = step.ends_after(self.page, torch.minimum(packed, step.length - 1))
        ranked, unknown = (present & ~open_).unsqueeze(2), ~(bound < torch.inf)
        share = bound.masked_fill(unknown | ~ranked, -torch.inf).log_softmax(-1)
        # What cannot be ranked is not dropped; without any page to rank, a softmax is NaN and not looked at.
        best = share.masked_fill(unknown, torch.finfo(torch.float32).max).amax(2)
        return torch.where(present, torch.where(open_, torch.inf, best), -torch.inf)

    def serve(self, site: AttentionSite, load: fx.Node, form: KVForm) -> Rewrite | Reason:
        """The choice and attention over it, for a store whose groups know the ends of their channels."""

        def no(code: str, text: str) -> Reason:
            return Reason(code, text, site.source)

        layer, layers = place_of(load)
        if layer < self.skip_layers:
            text = f"layer {layer} of {layers} attends to everything (skip_layers={self.skip_layers})"
            return no("dense-layer", text)
        if form.key_axis != "channel" or form.pre or form.bits("key") == 16 or form.fp8("key"):
            return no(
                "no-page-bounds",
                f"a cache of {form.name} does not hold the least and the largest key of a page: that takes keys of 8 "
                'bits or fewer, key_axis="channel" and rope="post"; delta needs none of it',
            )
        newest = -(-form.slots // self.page) + 1
        if self.count <= newest:
            return no(
                "budget-too-small",
                f"token_budget={self.token_budget} is {self.count} pages of {self.page}, and the newest tokens, which "
                f"are always visited, can take {newest}",
            )

        def emit(graph: fx.Graph) -> fx.Node:
            return self.attend(graph, site, load, self.select(graph, site, load))

        return self.rewrite(site, load, emit)
