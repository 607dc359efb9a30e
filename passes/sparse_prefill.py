"""What sparse prefill methods share: which sites they take, and the operators they put there.

``attention(mask)  ->  select_blocks(query, key), attend_blocks(query, key, value, lists)``, of fresh keys or, for a
later chunk of a prompt, of what a store holds, which for latents is what ``kv_load`` makes of them. A method is its
options and :meth:`SparsePrefill.choose`, which gives the blocks to visit (:mod:`effcompile.kernels.blocks`). It sees
plain logits, products times the scale: a soft cap, a bias and sinks, which no paper's estimator knows, act in the
attention, which is exact on what is visited. Where a paper and its official code disagree, the method's docstring says
which was followed.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import operator
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from effcompile import lowering
from effcompile.kernels import block_ops, blocks
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import DECODE_ROWS, Program
from effcompile.kernels.reason import Reason
from effcompile.passes.base import Pass
from effcompile.passes.operands import parts_of, query_of, score_of
from effcompile.passes.rewrite import Rewrite
from effcompile.passes.sites import DENSE, State, bool_mask, fresh_store, not_this_store, unsupported
from effcompile.patterns.attention import AttentionSite
from effcompile.patterns.masks import Mask
from effcompile.patterns.walk import same_size, shape, value


@dataclasses.dataclass(frozen=True)
class SparsePrefill(Pass, abc.ABC):
    """A method that chooses blocks of keys for each block of queries of a prompt.

    Parameters
    ----------
    block_size
        Tokens in a block of queries and of keys; a multiple of 16.
    min_length
        Keys below which every block is visited: there the choice costs more than it saves. Each method's default is
        where that was measured on two CPU cores (docs/sparse_attention.md); 16,384 where it never gained up to 8,192.
    """

    block_size: int = blocks.BLOCK
    min_length: int = 2048

    phases: ClassVar[tuple[str, ...]] = ("prefill",)
    family: ClassVar[str] = "sparse_attention"
    gathers: ClassVar[bool] = False
    """Whether it chooses single keys besides blocks."""
    share: ClassVar[str | None] = None
    """The option, from 0 to 1, that calibration can fit to each layer."""
    reorders: ClassVar[bool] = False
    """Whether it lays keys in another order than that of their tokens."""

    def __post_init__(self) -> None:
        if self.block_size < 16 or self.block_size % 16:
            raise ValueError(f"block_size={self.block_size!r} is not offered; choose a multiple of 16, such as 128.")
        if self.min_length < 0:
            raise ValueError(f"min_length={self.min_length!r}; expected a number of tokens, 0 or more.")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

        def policy(query: Tensor, key: Tensor, *, scale: float, key_mask: Tensor | None, **options: Any) -> Tensor:
            return cls(**options).visited(query, key, scale, key_mask)

        if "name" in vars(cls):
            block_ops.register_policy(cls.name, policy)

    @abc.abstractmethod
    def choose(self, query: Tensor, key: Tensor, scale: float, key_mask: Tensor | None) -> Tensor:
        """The blocks to visit: bool, broadcastable to ``[B, H, nQ, nK]``.

        Looks at ``query`` ``[B, H, T, D]``, ``key`` ``[B, G, S, D]`` and ``key_mask`` bool ``[B, S]`` only, on their
        device, without asking the host.
        """

    def is_short(self, queries: int, keys: int) -> bool:
        """Whether a choice costs more than it saves: of few keys, or for a chunk of less than a block."""
        return keys < self.min_length or queries < min(self.block_size, keys)

    def visited(self, query: Tensor, key: Tensor, scale: float, key_mask: Tensor | None) -> Tensor:
        """:meth:`choose`, or all blocks where :meth:`is_short`, which may be known only at the call."""
        queries, keys = query.shape[2], key.shape[2]
        if self.is_short(queries, keys):
            return blocks.possible(queries, keys, self.block_size, device=key.device)
        return self.choose(query, key, scale, key_mask)

    def serves(self, site: AttentionSite) -> Reason | None:
        """Why this method cannot serve a site that others of its family can."""
        return None

    @property
    def method(self) -> str:
        """The ``method`` argument of the operators that choose."""
        return block_ops.method_text(self.name, dataclasses.asdict(self))

    def operands(
        self, graph: fx.Graph, site: AttentionSite, state: State, hidden: fx.Node | None
    ) -> tuple[State, list[fx.Node], dict[str, Any]]:
        """What ``attend_blocks`` gets: its state, the four lists, and keyword arguments. Emits what makes them.

        ``state`` holds the keys and values of ``site`` in their order, ``hidden`` is the padding mask, if there is one.
        """
        made = graph.call_function(
            torch.ops.effcompile.select_blocks.default, (site.query, state[0], hidden, self.method, site.scale)
        )
        return state, results(graph, made, 4), {}

    def match(self, site: AttentionSite) -> Rewrite | Reason:
        """Attention over the blocks that the policy chooses, or why the site stays dense."""
        program = self._attends(site) or self._gains(site) or self._program(site)
        if isinstance(program, Reason):
            return program
        emit = functools.partial(self._emit, site=site, program=program)
        return Rewrite(f"{self.name}_{program.name}", emit, (program,))

    def _attends(self, site: AttentionSite) -> Reason | None:
        """Why a site is not causal attention of a prompt to its own keys, and those before them."""

        def no(code: str, text: str) -> Reason:
            return Reason(code, text, site.source)

        mask, queries, keys = site.mask, shape(site.query)[2], shape(site.key)[2]
        if isinstance(queries, int) and queries * site.ratio <= DECODE_ROWS:
            return no("decode", f"{self.name} is for prompts, and this call has {queries} query rows")
        if isinstance(mask, Reason):
            return no(mask.code, mask.text)
        if site.dropout:
            return no("dropout", f"attention dropout {site.dropout} is active; call model.eval()")
        rule = mask.predicate
        if rule.window is not None or not rule.causal or rule.segments or rule.prefix:
            return no("mask-not-honoured", f"{self.name} is for causal attention; the mask is {mask.predicate.name}")
        if site.load is not None:
            if problem := not_this_store(site):
                return problem
            if self.gathers or self.reorders:
                return no("reads-store", f"{self.name} chooses among the keys of a first call; this one reads a cache")
        elif not (isinstance(mask.offset, int) and same_size(keys, queries + mask.offset)):
            return no("mask-offset", f"{self.name} needs the queries to be the last tokens of the keys")
        return None

    def _gains(self, site: AttentionSite) -> Reason | None:
        """Why a choice would cost more than it saves, whatever it is."""
        queries, keys = shape(site.query)[2], shape(site.key)[2]
        # Of a store this is its room: a cache in which no prompt can be long enough.
        if isinstance(keys, int) and keys < self.min_length:
            text = f"{keys} tokens, and {self.name} gains from {self.min_length} on (min_length)"
            return Reason("short-prompt", text, site.source)
        if isinstance(queries, int) and queries < self.block_size and site.load is not None:
            text = f"a chunk of {queries} tokens; {self.name} chooses for whole blocks of {self.block_size}"
            return Reason("short-prompt", text, site.source)
        return None

    def _program(self, site: AttentionSite) -> Program | Reason:
        """The program over lists for a site with a proved mask, or why there is none."""

        def no(code: str, text: str) -> Reason:
            return Reason(code, text, site.source)

        mask = site.mask
        assert isinstance(mask, Mask)
        # A sink takes all of the mass of a row that sees no key, whatever its scores were replaced by.
        if mask.finite and mask.predicate.key_mask and site.sinks is None:
            return no("mask-not-honoured", "rows that see no key get a mean of all values here, and 0 from block lists")
        if problem := unsupported(site) or self.serves(site):
            return problem
        form = form_of(site)
        if form.pre:
            return no("not-supported", "no program visits blocks of keys that are stored before RoPE")
        if not form.dense and self.block_size % form.group:
            text = f"blocks of {self.block_size} tokens do not hold whole groups of {form.group}"
            return no("not-supported", f"{text}; choose a block_size that is a multiple")
        dtype, sizes = value(site.query).dtype, (shape(site.query)[3], shape(site.value)[3])
        parts: dict[str, Any] = {"blocks": True, "columns": self.gathers, "positions": self.reorders}
        program = Program("prefill", form, mask.predicate, dtype, site.ratio, *sizes, score_of(site), **parts)
        if why := lowering.refusal(program, value(site.query).device.type):
            return no("not-supported", why)
        return program

    def _emit(self, graph: fx.Graph, site: AttentionSite, program: Program) -> fx.Node:
        ours, mask, form = torch.ops.effcompile, site.mask, program.form
        assert isinstance(mask, Mask)
        hidden = None if mask.padding is None else bool_mask(graph, mask.padding)
        # What multiplies scores is a part of the logits that estimators see; a cap, a bias and sinks are not.
        logits = dataclasses.replace(site, query=query_of(graph, site))
        state: State
        length: Any
        if site.load is None:
            state, length = fresh_store(graph, site)
            state, lists, more = self.operands(graph, logits, state, hidden)
        else:
            state, length, more = *read_store(graph, site.load), {}
            chosen = (logits.query, *state, length, hidden, form.name, self.method, site.scale)
            lists = results(graph, graph.call_function(ours.select_stored_blocks.default, chosen), 4)
        call = graph.call_function(
            ours.attend_blocks.default,
            (logits.query, *state, length, hidden, *lists, self.block_size, form.name, site.scale, True, -1),
            more | parts_of(graph, site),
        )
        call.meta.update(site.output.meta)
        return graph.call_function(operator.getitem, (call, 0))


def form_of(site: AttentionSite) -> KVForm:
    """The form of what a site reads: of the store, or of keys and values as they are or as they are rebuilt.

    No tile of keys is rebuilt from latents for each block of queries again: ``kv_load``, which has done it, is read.
    """
    form = DENSE if site.load is None else KVForm.parse(str(site.load.args[7]))
    return DENSE if form.latents else form


def read_store(graph: fx.Graph, load: fx.Node) -> tuple[State, Any]:
    """The state of the form :func:`form_of` that a site with ``load`` reads, and its length."""
    if not KVForm.parse(str(load.args[7])).latents:
        return load.args[:6], load.args[6]
    key, value = results(graph, load, 2)
    return (key, None, None, value, None, None), load.args[6]


def results(graph: fx.Graph, call: fx.Node, count: int) -> list[fx.Node]:
    """The ``count`` results of an operator, each as a node."""
    return [graph.call_function(operator.getitem, (call, i)) for i in range(count)]


def check_share(name: str, share: float) -> None:
    """Raise ``ValueError`` unless ``share``, the option ``name``, is from 0 to 1."""
    if not 0 <= share <= 1:
        raise ValueError(f"{name}={share!r}; expected a share from 0 to 1.")


def check_stride(stride: int, block_size: int) -> None:
    """Raise ``ValueError`` unless runs of ``stride`` tokens fill a block."""
    if stride < 1 or block_size % stride:
        raise ValueError(f"stride={stride!r} does not divide block_size={block_size}.")


def first_block(query: Tensor, key: Tensor, key_mask: Tensor | None, block: int) -> Tensor:
    """The block with each row's first token, the attention sink: bool ``[B or 1, 1, 1, nK]``."""
    count = blocks.count_blocks(key.shape[2], block)
    columns = torch.arange(count, device=key.device)
    if key_mask is None:
        return (columns == 0)[None, None, None]
    first = key_mask[:, : key.shape[2]].int().argmax(1)
    return (columns == (first // block)[:, None])[:, None, None]


def bounds(query: Tensor, key: Tensor, key_mask: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    """Blocks that causality allows, and of these the sink and the diagonal: bool, broadcastable to lists."""
    queries, keys = query.shape[2], key.shape[2]
    allowed = blocks.possible(queries, keys, block, device=key.device)
    forced = blocks.own(queries, keys, block, device=key.device) | first_block(query, key, key_mask, block)
    return allowed, forced & allowed
