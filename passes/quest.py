"""Quest: for each new token the pages of the cache that may hold the keys with the largest scores.

Paper: Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference (Tang et al., ICML 2024), section 3.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, fx, nn

from effcompile.kernels import pages
from effcompile.kernels.blocks import count_blocks
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import Program
from effcompile.kernels.reason import Reason
from effcompile.passes.paged_decode import PagedDecode, place_of
from effcompile.passes.rewrite import Rewrite
from effcompile.patterns.attention import AttentionSite
from effcompile.patterns.walk import operand, root, shape, value
from effcompile.runtime import adapter

bound_store = torch.ops.effcompile.bound_store.default


@dataclasses.dataclass(frozen=True)
class Quest(PagedDecode):
    """Attend to ``token_budget`` tokens, in the pages whose keys may have the largest products with the query.

    Of each page the least and the largest value of each channel are known. They bound the score of every key in it
    from above, and pages are ranked by that bound. A cache that packs keys per channel (``compress_kv``) has these
    numbers already: they are what its groups are scaled with, so Quest costs no memory and keeps no state. They hold
    for the keys as they are read back, so that the bound is one for the very scores that attention computes. Other
    caches, of a model that is decorated, keep them besides, for the keys as they are given: an eighth of the bytes of
    unpacked keys, with pages of 16. ``rank_by="moments"``, which is not the paper's, keeps as many other numbers, for
    caches of every form.

    The newest tokens, which have no bounds yet, are always visited, and the page of the newest token; they count.

    Parameters
    ----------
    token_budget, page_size
        The paper's pages have 16 tokens (``compress_kv(group_size=16)``), its budgets 256 to 2048.
    sink
        The first tokens that a query sees, in whole pages, which are always visited and count. The paper has none; a
        page with the first token is one that most heads give much weight to, and few bounds say so.
    radius
        How large the boxes are that pages are ranked by, around their middles: 1, the paper's, bounds the score from
        above; but no key of a page is at its best in every channel, and 0.5 ranks pages better. From 0 to 1.
    skip_layers
        The first layers of the model, which attend to everything: attention is not sparse there (section 4.1).
    rank_by
        What is known of a page: ``"bounds"``, the paper's, or ``"moments"``, the mean and the standard deviation of
        each channel of its keys. With these a page is worth the mean of the scores of its keys and ``deviations`` of
        their standard deviations (:func:`effcompile.kernels.pages.likely`), ``radius`` says nothing, and keys that
        padding hides count where they share a page with others: that is the first page that a query sees (``sink``).
    deviations
        Standard deviations above the mean. The best of 16 normal numbers is expected 1.77 above; 0 ranks pages by their
        mean key, as MoBA does (Lu et al., 2025, section 2.2).

    Notes
    -----
    The paper ranks for each query head. Query heads that share a key/value head read the same bytes, so here they
    share a list: a page is worth the largest of their bounds, each taken relative to all pages that are ranked, as in a
    softmax. With one query head for each key/value head it is the paper's ranking.
    """

    sink: int = 16
    radius: float = 1.0
    skip_layers: int = 2
    rank_by: pages.Kept = "bounds"
    deviations: float = 1.8

    name: ClassVar[str] = "quest"
    paper: ClassVar[str] = "Quest (Tang et al., ICML 2024)"
    summary: ClassVar[str] = "decoding: pages of a packed cache, by a bound on the scores of their keys"
    shared: ClassVar[bool] = False
    gains_from: ClassVar[int] = 5
    limit: ClassVar[dict[str, Any]] = PagedDecode.limit

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.skip_layers < 0:
            raise ValueError(f"skip_layers={self.skip_layers!r}; expected a number of layers, 0 or more.")
        if self.sink < 0:
            raise ValueError(f"sink={self.sink!r}; expected a number of tokens, 0 or more.")
        if not 0 <= self.radius <= 1:
            raise ValueError(f"radius={self.radius!r}; expected a share from 0 to 1, which is the paper's.")
        if self.rank_by not in get_args(pages.Kept):
            raise ValueError(f"rank_by={self.rank_by!r}; expected one of {', '.join(get_args(pages.Kept))}.")
        if not (self.deviations >= 0 and math.isfinite(self.deviations)):
            raise ValueError(f"deviations={self.deviations!r}; expected a finite number, 0 or more.")

    @property
    def always(self) -> tuple[int, int]:
        """``sink`` in whole pages, and the page of the newest token."""
        return count_blocks(self.sink, self.page), 1

    def on_decorate(self, module: nn.Module) -> None:
        """Have the caches of this model that are made from now on keep what pages are ranked by."""
        module.__dict__[adapter.BOUNDS] = self.skip_layers, self.rank_by

    def on_remove(self, module: nn.Module) -> None:
        """Undo that."""
        module.__dict__.pop(adapter.BOUNDS, None)

    def scores(self, step: pages.Step) -> Tensor:
        """Logarithms of shares, ``[B, G, nP]``: +inf where tokens are not packed, -inf where no token can be seen."""
        if self.rank_by == "moments":
            bound = pages.likely(step, self.page, self.deviations)
        else:
            bound = pages.bounds(step, self.page, self.radius)
        present = step.present(self.page)
        open_ = step.ends_after(self.page, torch.minimum(step.bounded, step.length - 1))
        ranked, unknown = (present & ~open_).unsqueeze(2), ~bound.isfinite()
        share = bound.masked_fill(unknown | ~ranked, -torch.inf).log_softmax(-1)
        # What cannot be ranked is not dropped; without any page to rank, a softmax is NaN and not looked at.
        best = share.masked_fill(unknown, torch.finfo(torch.float32).max).amax(2)
        always = open_ | (present.cumsum(-1) <= self.always[0])
        return torch.where(present, torch.where(always, torch.inf, best), -torch.inf)

    def serve(self, site: AttentionSite, load: fx.Node, form: KVForm) -> Rewrite | Reason:
        """The choice and attention over it, for a store of whose pages bounds or moments are known."""

        def no(code: str, text: str) -> Reason:
            return Reason(code, text, site.source)

        layer, layers = place_of(load)
        if layer < self.skip_layers:
            text = f"layer {layer} of {layers} attends to everything (skip_layers={self.skip_layers})"
            return no("dense-layer", text)
        free, kept = form.bounds_keys and self.rank_by == "bounds", kept_beside(load)
        bounds = None if free else kept.get(self.rank_by)
        if bounds is None and not free:
            option = "" if self.rank_by == "bounds" else "rank_by='moments'"
            what = "the least and the largest key" if self.rank_by == "bounds" else "mean and deviation of the keys"
            other = f", and holds {' and '.join(kept)} instead" if kept else ""
            return no(
                f"no-page-{self.rank_by}",
                f"a cache of {form.name} holds {what} of a page if it was made on a CPU, after quest was put on the "
                f"model as a decorator, ec.quest({option})(model); this one was not{other}. delta needs neither",
            )
        open_ = form.slots if bounds is None else self.page
        held = count_blocks(open_, self.page) + 1 + self.always[0]
        if self.count <= held:
            return no(
                "budget-too-small",
                f"token_budget={self.token_budget} is {self.count} pages of {self.page}, and the newest tokens and the "
                f"first {self.sink}, which are always visited, can take {held}",
            )

        def emit(graph: fx.Graph) -> fx.Node:
            return self.attend(graph, site, load, self.select(graph, site, load, bounds=bounds))

        unit = None if bounds is None else pages.unit_of(form)
        sizes = site.ratio, shape(site.query)[3], unit
        ranks = Program.for_select(form, value(site.query).dtype, *sizes)
        made = self.rewrite(site, load, emit)
        return dataclasses.replace(made, programs=(*made.programs, ranks))


def kept_beside(load: fx.Node) -> dict[str, fx.Node]:
    """The buffer of bounds or of moments that is kept beside the store that ``load`` reads, if any, by which it is."""
    stored = {root(x) for x in load.args[:3] if isinstance(x, fx.Node)}
    return {
        str(call.args[5]): operand(call, 0)
        for call in load.graph.find_nodes(op="call_function", target=bound_store)
        if root(call.args[1]) in stored
    }
