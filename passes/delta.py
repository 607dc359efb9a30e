"""DELTA: a few layers attend to everything and choose pages of the cache, which the layers after them read alone.

Paper: DELTA: Dynamic Layer-Aware Token Attention for Efficient Long-Context Reasoning (Findings of ACL 2026).
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from effcompile.kernels import pages
from effcompile.kernels.block_ops import method_options
from effcompile.kernels.blocks import count_blocks
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import BY_MASS
from effcompile.kernels.reason import Reason
from effcompile.passes.paged_decode import PagedDecode, hidden, place_of, program_of, select_pages
from effcompile.passes.rewrite import Rewrite
from effcompile.patterns.attention import AttentionSite
from effcompile.patterns.walk import operand, root, same_size, shape, strip_copies

PAPERS = (0, 1, 2, 14, 22), 28
"""The paper's layers of full attention, and of how many."""


def placement(kept: Tensor, count: int) -> tuple[int, ...]:
    """The ``count`` layers of full attention that keep most, for ``full_cache_layers``.

    ``kept`` ``[L, L]``: at ``[s, l]``, ``s < l``, the share of its softmax that layer ``l`` keeps with the pages that
    layer ``s`` chooses, on a text like those that will be read; other entries are not looked at. Layer 0 is always one,
    since no layer chooses for it. By dynamic programming over the last layer that selects, so no other placement keeps
    more in all layers together; what a layer loses is taken as it is while the layers before it lose nothing. (The
    paper looks at how much attention changes from a layer to the next; its code lists layers that were found so.)

    >>> kept = torch.ones(4, 4)
    >>> kept[0, 2:] = kept[1, 2:] = 0.5  # the last two layers look elsewhere than the first two
    >>> placement(kept, 2)
    (0, 2)
    """
    layers = len(kept)
    if kept.shape != (layers, layers) or not 1 <= count <= layers:
        raise ValueError(f"kept is {tuple(kept.shape)} and count {count}; expected [L, L] and 1 to L layers.")
    lost = (1 - kept.double()).triu(1).cumsum(1)
    # best[l]: what layers before l lose, and the full ones among them, if so many are full.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for _ in range(count):
        found: dict[int, tuple[float, tuple[int, ...]]] = {}
        for start, (before, chosen) in best.items():
            for end in range(start + 1, layers + 1):
                total = before + float(lost[start, end - 1])
                if end not in found or total < found[end][0]:
                    found[end] = total, (*chosen, start)
        best = found
    return best[layers][1]


@dataclasses.dataclass(frozen=True)
class Delta(PagedDecode):
    """Attend to the ``token_budget`` tokens that the nearest earlier layer of full attention found to matter most.

    A layer of full attention before one that is not *selects*: the weights of its softmax, of each token the largest
    over all query heads, are summed in pages; the newest ``recency`` tokens and the best pages make one list for all
    heads of the layers that follow, up to the next one that selects. The list is that of this step alone. Layers of
    full attention that are followed by another only attend.

    Parameters
    ----------
    token_budget
        The paper's 64 pages of 16 (and 128), ``recency`` included.
    recency
        The newest tokens, in whole pages, that are always in the list: the paper's 8 pages of 16.
    full_cache_layers
        Layers that attend to everything, by number among those with a compressed cache. None: 0, 1, 2, and those in
        the middle and at 22/28 of the model, as in the paper's model of 28 layers. The paper places the last three by
        how much attention changes from a layer to the next; which they are matters more than how many:
        :func:`placement` finds them from what layers keep with each other's pages.

    Notes
    -----
    The official code breaks ties by subtracting 1e-7 for each page, which reorders pages of nearly equal scores; here
    ties, and they only, go to the earlier page. Its budget is in pages. It starts when there are more pages than the
    budget, as here.

    The list goes from one layer to others as a value in the graph, so all must be in one: in a model whose layers are
    compiled one by one, or with graph breaks between them, the others have no list and say so.
    """

    recency: int = 128
    full_cache_layers: tuple[int, ...] | None = None

    name: ClassVar[str] = "delta"
    paper: ClassVar[str] = "DELTA (Findings of ACL 2026)"
    summary: ClassVar[str] = "decoding: a few layers choose pages of the cache for the layers after them"
    shared: ClassVar[bool] = True
    limit: ClassVar[dict[str, Any]] = PagedDecode.limit

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.recency <= self.token_budget:
            raise ValueError(f"recency={self.recency!r}; expected 1 to token_budget={self.token_budget} tokens.")
        if self.full_cache_layers is not None:
            if any(isinstance(i, bool) or i < 0 for i in self.full_cache_layers):
                raise ValueError(f"full_cache_layers={self.full_cache_layers!r}; expected numbers of layers from 0 on.")
            object.__setattr__(self, "full_cache_layers", tuple(sorted(set(self.full_cache_layers))))

    def full(self, layers: int) -> tuple[int, ...]:
        """The layers of full attention among so many.

        >>> Delta().full(28), Delta().full(64)
        ((0, 1, 2, 14, 22), (0, 1, 2, 32, 50))
        """
        if self.full_cache_layers is not None:
            return self.full_cache_layers
        scaled = {i if i <= 2 else i * layers // PAPERS[1] for i in PAPERS[0]}
        return tuple(sorted(i for i in scaled if i < layers))

    @property
    def always(self) -> tuple[int, int]:
        """``recency`` in whole pages; what comes first is there by its mass, if it matters."""
        return 0, min(count_blocks(self.recency, self.page), self.count)

    def scores(self, step: pages.Step) -> Tensor:
        """Mass, ``[B, 1, nP]``: +inf for the newest pages, -inf where no token can be seen."""
        assert step.mass is not None
        near = step.ends_after(self.page, step.length - 1 - (self.always[1] - 1) * self.page)
        worth = torch.where(near, torch.inf, step.mass)
        return torch.where(step.present(self.page), worth, -torch.inf)

    def serve(self, site: AttentionSite, load: fx.Node, form: KVForm) -> Rewrite | Reason:
        """At a layer that selects attention to everything and the choice; at those after it attention to the list."""

        def no(code: str, text: str) -> Reason:
            return Reason(code, text, site.source)

        layer, layers = place_of(load)
        full = self.full(layers)
        if full and full[-1] >= layers:
            return no("no-such-layer", f"full_cache_layers names layer {full[-1]}, and this graph has {layers}")
        if layer in full:
            if layer + 1 in full or layer + 1 == layers:
                return no("dense-layer", f"layer {layer} of {layers} attends to everything (full_cache_layers={full})")
            program = program_of(site, load)

            def emit(graph: fx.Graph) -> fx.Node:
                given = (site.query, *load.args[:7], hidden(graph, site), self.page, load.args[7], site.scale)
                table = {k: v for k, v in load.kwargs.items() if k == "table"}
                call = graph.call_function(torch.ops.effcompile.attend_mass.default, given, table)
                call.meta.update(site.output.meta)
                out, mass = (graph.call_function(operator.getitem, (call, i)) for i in (0, 2))
                self.select(graph, site, load, mass=mass)
                return out

            name = dataclasses.replace(program, blocks=False).name
            return Rewrite(f"{self.name}_select_{name}", emit, (*self.programs(site, load), BY_MASS))
        chosen = self._earlier(site, load)
        if chosen is None:
            return no(
                "no-selection",
                f"no layer before layer {layer} in this graph selects pages with these options "
                f"(full_cache_layers={full})",
            )
        # The list is in pages of the layer that selects, whose store may have another form.
        page = method_options(str(chosen.args[6]))[1]["page_size"]
        if not form.dense and page % form.group:
            return no("page-size", f"the pages selected before have {page} tokens, and groups here {form.group}")
        here = dataclasses.replace(self, page_size=page)
        return here.rewrite(site, load, lambda graph: here.attend(graph, site, load, chosen))

    def _earlier(self, site: AttentionSite, load: fx.Node) -> fx.Node | None:
        """The nearest earlier choice with these options, but for the size of pages, over the same tokens."""
        found: fx.Node
        tokens, rows = _tokens(load.args[6]), shape(site.query)[0]
        for found in reversed(load.graph.find_nodes(op="call_function", target=select_pages)):
            name, options = method_options(str(found.args[6]))
            if name != self.name or dataclasses.replace(Delta(**options), page_size=self.page_size) != self:
                continue
            if _tokens(found.args[4]) is tokens and same_size(shape(operand(found, 0))[0], rows):
                return found
        return None


def _tokens(total: Any) -> fx.Node:
    """The cache's length, to which ``total`` adds one.

    ``unreadable`` has seen that it does, and that nothing writes to it in between; so of one length all totals are one.
    """
    length: fx.Node = root(strip_copies(strip_copies(total).args[0]))
    return length
