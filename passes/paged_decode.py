"""What methods share that choose pages at each step of decoding: which sites they take, and what they put there.

``kv_load -> attention(mask)  ->  select_pages(query, keys), attend_pages(query, store, pages)``. The store is that of
``compress_kv``, in whatever form; a method is its options and :meth:`PagedDecode.scores`, by which pages are ranked
(:mod:`effcompile.kernels.pages`). Nothing is evicted: the next step chooses among all tokens again.

**Pages and groups.** The papers' pages have 16 tokens. A kernel reads a packed store by whole groups, and a page that
cuts one would make it read what it skips; so a page is a multiple of the group, by default the smallest, which is 16
for ``group_size=16`` and for a store of 16 bits. Budgets are in tokens, so they mean the same for pages of any size.
"""

from __future__ import annotations

import abc
import dataclasses
import operator
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, fx

from effcompile import lowering
from effcompile.kernels import block_ops, blocks, page_ops, pages
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import Program, StoreProgram
from effcompile.kernels.reason import Reason
from effcompile.kernels.rope import rotary_of
from effcompile.passes import compress_kv
from effcompile.passes.base import Pass
from effcompile.passes.rewrite import Rewrite
from effcompile.passes.sites import bool_mask
from effcompile.patterns.attention import AttentionSite, kv_load
from effcompile.patterns.masks import Mask
from effcompile.patterns.walk import same_size, shape, value

Self = TypeVar("Self", bound="PagedDecode")
select_pages = torch.ops.effcompile.select_pages.default


@dataclasses.dataclass(frozen=True)
class PagedDecode(Pass, abc.ABC):
    """A method that chooses pages of the cache for each new token.

    Parameters
    ----------
    token_budget
        Tokens that are attended to, in whole pages; while there are no more of them, all are.
    page_size
        Tokens in a page, a multiple of the group in which the cache is packed. None: the smallest there is.
    min_length
        Room in the cache, in tokens, below which everything is read. None: :attr:`gains_from` times the budget, since
        a page that is read by itself costs up to twice of what it costs among others, and choosing costs something too.
    """

    token_budget: int = 1024
    page_size: int | None = None
    min_length: int | None = None

    phases: ClassVar[tuple[str, ...]] = ("decode",)
    family: ClassVar[str] = "sparse_attention"
    limit: ClassVar[dict[str, Any]] = {"token_budget": 1 << 30}
    shared: ClassVar[bool]
    """Whether all heads have one list of pages; else each key/value head has its own."""
    gains_from: ClassVar[int]
    """Budgets in a cache from which attention over pages was measured to be faster (docs/sparse_attention.md)."""

    def __post_init__(self) -> None:
        if self.token_budget < 1:
            raise ValueError(f"token_budget={self.token_budget!r}; expected at least one token.")
        if self.page_size is not None and (self.page_size < pages.PAGE or self.page_size % pages.PAGE):
            raise ValueError(
                f"page_size={self.page_size!r} is not offered; choose a multiple of {pages.PAGE}, or None for the "
                "smallest that the cache allows."
            )
        if self.min_length is not None and self.min_length < 0:
            raise ValueError(f"min_length={self.min_length!r}; expected a number of tokens, or None.")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

        def scores(step: pages.Step, **options: Any) -> Tensor:
            return cls(**options).scores(step)

        def count(**options: Any) -> int:
            return cls(**options).count

        def always(**options: Any) -> tuple[int, int]:
            return cls(**options).always

        page_ops.register_policy(cls.name, page_ops.Policy(scores, count, always, cls.shared))

    @abc.abstractmethod
    def scores(self, step: pages.Step) -> Tensor:
        """The worth of each page: fp32 ``[B, G, nP]``, or ``[B, 1, nP]`` if lists are shared, infinities included.

        See :func:`effcompile.kernels.pages.take`. ``page_size`` is a number here.
        """

    @abc.abstractmethod
    def serve(self, site: AttentionSite, load: fx.Node, form: KVForm) -> Rewrite | Reason:
        """What to put at a site that pages can serve, or why this method has nothing to put there.

        ``load`` reads its store, of ``form``; ``page_size`` is a number here.
        """

    @property
    def page(self) -> int:
        """``page_size``, where it is a number."""
        assert self.page_size is not None
        return self.page_size

    @property
    def count(self) -> int:
        """``K``, the pages in the budget."""
        return max(1, self.token_budget // self.page)

    @property
    def always(self) -> tuple[int, int]:
        """How many of the first and of the newest pages that a query sees are always listed."""
        return 0, 1

    def for_store(self: Self, form: KVForm) -> Self:
        """These options with the size of pages that a store of ``form`` has."""
        smallest = pages.PAGE if form.dense else max(pages.PAGE, form.group)
        return dataclasses.replace(self, page_size=self.page_size or smallest)

    def match(self, site: AttentionSite) -> Rewrite | Reason:
        """Attention over chosen pages, or why the site reads the whole store."""

        def no(code: str, text: str) -> Reason:
            return Reason(code, text, site.source)

        load = site.load
        if load is None and site.store is None:
            return compress_kv.match(site)  # the reason why no cache of ours reaches this attention
        if load is None or not same_size(shape(site.query)[2], 1):
            return no("prompt", f"{self.name} chooses for one new token, and this call reads a prompt")
        if problem := compress_kv.unreadable(site, load):
            return problem
        assert isinstance(site.mask, Mask)
        rule = site.mask.predicate
        if rule.window is not None or rule.segments:
            return no("mask-not-honoured", f"{self.name} ranks all earlier keys, and the mask is {rule.name}")
        if site.softcap is not None or site.sinks is not None or site.factors or site.mask.bias:
            return no("not-supported", f"{self.name} does not choose by scores with a soft cap, a bias, or sinks yet")
        form, capacity = KVForm.parse(str(load.args[7])), shape(site.key)[2]
        if form.latents:
            return no("latent-cache", f"{self.name} ranks and gathers what is stored, and this cache holds latents")
        made = self.for_store(form)
        if not form.dense and made.page % form.group:
            text = f"page_size={made.page} does not hold whole groups of {form.group}, in which this cache is packed"
            return no("page-size", f"{text}; leave page_size out, or choose a multiple")
        if isinstance(capacity, int) and made.count >= blocks.count_blocks(capacity, made.page):
            text = f"token_budget={self.token_budget} has room for all of a cache of {capacity} tokens"
            return no("budget-covers-cache", text)
        least = self.gains_from * self.token_budget if self.min_length is None else self.min_length
        if isinstance(capacity, int) and capacity < least:
            text = f"a cache of {capacity} tokens is read faster than pages of it are chosen, below min_length={least}"
            return no("short-cache", text)
        program, device = program_of(site, load), value(site.query).device.type
        if why := lowering.refusal(program, device):
            return no("not-supported", why)
        return made.serve(site, load, form)

    def select(self, graph: fx.Graph, site: AttentionSite, load: fx.Node, **found: fx.Node | None) -> fx.Node:
        """Emit the choice of pages for the query of ``site``, by the mass or the bounds that were ``found``."""
        method = block_ops.method_text(self.name, dataclasses.asdict(self))
        args = (site.query, *load.args[:3], load.args[6], hidden(graph, site), method, load.args[7], site.scale)
        return graph.call_function(select_pages, args, {k: v for k, v in found.items() if v is not None})

    def attend(self, graph: fx.Graph, site: AttentionSite, load: fx.Node, chosen: fx.Node) -> fx.Node:
        """Emit attention to the ``chosen`` pages; returns its output."""
        lists = [graph.call_function(operator.getitem, (chosen, i)) for i in range(2)]
        call = graph.call_function(
            torch.ops.effcompile.attend_pages.default,
            (site.query, *load.args[:7], hidden(graph, site), *lists, self.page, load.args[7], site.scale),
            {k: v for k, v in load.kwargs.items() if k == "table"},
        )
        call.meta.update(site.output.meta)
        return graph.call_function(operator.getitem, (call, 0))

    def rewrite(self, site: AttentionSite, load: fx.Node, emit: Callable[[fx.Graph], fx.Node]) -> Rewrite:
        """The rewrite whose ``emit`` ends in :meth:`attend`."""
        name = f"{self.name}_{program_of(site, load).name}"
        return Rewrite(name, emit, self.programs(site, load), self.count * self.page)

    def programs(self, site: AttentionSite, load: fx.Node) -> tuple[Program | StoreProgram, ...]:
        """Kernels that decoding over pages of this store launches, but for the choice."""
        program = program_of(site, load)
        appended = StoreProgram(program.form, program.dtype, program.key_size, program.value_size, program.rotary)
        return program, appended


def place_of(load: fx.Node) -> tuple[int, int]:
    """Which of the stores that a graph reads this is, and how many there are.

    In a graph of a whole model that is the number of the layer, among those with a cache of ours.
    """
    loads = load.graph.find_nodes(op="call_function", target=kv_load)
    return loads.index(load), len(loads)


def hidden(graph: fx.Graph, site: AttentionSite) -> fx.Node | None:
    """Emit the mask of padding, if there is one."""
    assert isinstance(site.mask, Mask)
    return None if site.mask.padding is None else bool_mask(graph, site.mask.padding)


def program_of(site: AttentionSite, load: fx.Node) -> Program:
    """Decoding over pages of the store that ``load`` reads."""
    assert isinstance(site.mask, Mask)
    form, table = KVForm.parse(str(load.args[7])), load.kwargs.get("table")
    rotary, sizes = 0 if table is None else rotary_of(value(table)), (shape(site.query)[3], shape(site.value)[3])
    dtype = value(site.query).dtype
    return Program("decode", form, site.mask.predicate, dtype, site.ratio, *sizes, rotary=rotary, blocks=True)
