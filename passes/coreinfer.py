"""CoreInfer: the prompt is read densely and chooses the neurons with which its continuation is written.

Paper: CoreInfer: Accelerating Large Language Model Inference with Semantics-Inspired Adaptive Sparse Activation (Wang
et al., arXiv 2410.18311), the stability-guided variant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from sympy import Integer, ceiling  # type: ignore[import-untyped]
from torch import Tensor, fx

from effcompile.kernels import core_ops, ffn_cost
from effcompile.kernels.cost import Cost
from effcompile.kernels.program import OperatorProgram
from effcompile.kernels.reason import Reason
from effcompile.passes.base import Pass
from effcompile.passes.feed_forward import TOKENS, Put, Sizes, parts_of, prepared_from, sizes_of, transposed
from effcompile.passes.rewrite import Rewrite
from effcompile.passes.weights import constant
from effcompile.patterns.ffn import BlockParts, FeedForwardSite
from effcompile.patterns.linear import is_linear
from effcompile.patterns.text import Text
from effcompile.patterns.walk import same_size, shape, value
from effcompile.runtime.router_state import What, state_of


@dataclasses.dataclass(frozen=True)
class CoreInfer(Pass):
    """Choose the neurons of feed-forward blocks by the prompt, and use these alone for the tokens that follow it.

    Calls of several tokens run as they are, and each token votes for its *core neurons*: the share ``alpha`` of its
    positive activations that is largest. The neurons of most votes are those of the text, ``beta`` of all; a call of
    one token computes only them. Nothing is calibrated. Each row of a batch has its own.

    Parameters
    ----------
    alpha
        Share of a token's positive neurons that it votes for, 0 to 1.
    beta
        Share of a block's neurons that are kept, above 0, up to 1; 1 keeps all.
    score
        ``"signed"``: activations as they are, as in the paper; ``"magnitude"``: by their size, so that strongly
        negative ones of gated blocks, which write as much, count too.
    start, end
        The blocks that are rewritten, from one share of the depth up to another: those before and behind them stay
        dense. The default is layers 6 to 26 of 32, as in the official code; 0 and 1: all.
    max_batch_size
        Texts that there is room for; larger batches stay dense.

    Notes
    -----
    ``alpha`` and ``beta`` are the paper's, which has ``beta=0.2`` for extraction and answers; the official code has
    ``alpha=0.2``, takes it of the mean count of positive neurons over the prompt, and keeps fewer neurons where fewer
    were voted for. Here each token's own count is taken, as in the paper's text, so that a prompt may come in chunks
    and beside others; where votes tie, the lower index is kept.
    """

    alpha: float = 0.4
    beta: float = 0.4
    score: Literal["signed", "magnitude"] = "signed"
    start: float = 6 / 32
    end: float = 27 / 32
    max_batch_size: int = 8

    name: ClassVar[str] = "coreinfer"
    paper: ClassVar[str] = "CoreInfer (Wang et al., 2024)"
    summary: ClassVar[str] = "feed-forward: neurons chosen by the prompt, and fixed for what follows it"
    phases: ClassVar[tuple[str, ...]] = ("prefill", "decode")
    site_kind: ClassVar[str] = "ffn"
    family: ClassVar[str] = "ffn"
    limit: ClassVar[dict[str, Any]] = {"beta": 1.0, "start": 0.0, "end": 1.0}

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha!r}; expected a share from 0 to 1.")
        if not 0 < self.beta <= 1:
            raise ValueError(f"beta={self.beta!r}; expected a share above 0, up to 1.")
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(f"start={self.start!r}, end={self.end!r}; expected ascending shares of the depth, 0 to 1.")
        if self.max_batch_size < 1:
            raise ValueError(f"max_batch_size={self.max_batch_size!r}; expected 1 or more.")

    def match(self, site: FeedForwardSite) -> Rewrite | Reason:
        """Votes and a choice behind a call of several tokens, the chosen neurons for one; or why it stays dense."""

        def no(code: str, text: str) -> Reason:
            return Reason(code, text, site.source)

        if not self.start <= site.depth < self.end:
            told = f"from {self.start:g} to {self.end:g} of the depth blocks are rewritten"
            return no("outer-layer", f"{told}, and this one is at {site.depth:.2f}")
        assert site.text is not None
        text = site.text()
        if isinstance(text, Reason):
            return text
        found = parts_of(site, self.name)
        if isinstance(found, Reason):
            return found
        parts, own = found
        count = 1
        for size in shape(parts.input)[:-1]:
            count = count * size
        if not same_size(count, text.batch * text.tokens) or not site.anchor > text.ready:
            return no("no-text", "the rows of this block are not known to be the tokens that attention sees")
        # With a size that is open this is a guard, so that a larger batch is another graph.
        if text.batch > self.max_batch_size:
            return no("batch-too-large", f"a batch of {text.batch}; choose max_batch_size for as many texts")
        if sum(map(is_linear, parts.down.weight.users)) > 1:
            return no("shared-weight", "layers share the weights of this block, and what it chooses belongs to them")
        sizes = sizes_of(parts)
        keep = max(1, int(self.beta * sizes.neurons))
        shapes: dict[What, tuple[int, ...]] = {
            "votes": (self.max_batch_size, sizes.neurons),
            "core": (self.max_batch_size, sizes.neurons),
            "text": (2,),
        }
        state = {what: state_of(what, own["down"], *of) for what, of in shapes.items()}
        states = tuple((parts.down.weight, what, tensor) for what, tensor in state.items())
        rows = tuple(value(parts.input).shape[:-1])
        if not same_size(text.tokens, 1):

            def vote(graph: fx.Graph) -> fx.Node:
                return self._vote(Put(graph, parts, own, self.name), site, text, state, keep)

            votes = (sizes.dense(sizes.neurons),) * 2
            return Rewrite(
                f"coreinfer, {keep} neurons chosen", vote, states=states, cost=votes, rows=rows, placed=True,
                operators=(OperatorProgram("core_votes", value(parts.input).dtype),),
            )  # fmt: skip

        def emit(graph: fx.Graph) -> fx.Node:
            return self._few(Put(graph, parts, own, self.name), parts, text, state)

        return Rewrite(
            f"coreinfer {keep} of {sizes.neurons} neurons",
            emit,
            weights=prepared_from(site, parts, own),
            cost=(sizes.dense(sizes.neurons), self._cost(sizes, keep)),
            rows=rows,
            operators=(OperatorProgram("grouped_ffn", value(parts.input).dtype),),
            states=states,
        )

    def _cost(self, sizes: Sizes, keep: int) -> Cost:
        """Of the neurons that rows which choose independently are expected to use together."""
        used = ceiling(ffn_cost.groups_used(sizes.neurons, Integer(keep), TOKENS))
        more: dict[str, Any] = {"itemsize": sizes.itemsize, "gated": sizes.gated}
        return ffn_cost.grouped_ffn(TOKENS, sizes.size, shared=0, width=1, active=used, uses=TOKENS * keep, **more)

    def _vote(self, put: Put, site: FeedForwardSite, text: Text, state: Mapping[What, Tensor], keep: int) -> fx.Node:
        """Votes and the choice, before the block's last linear, which stays."""
        graph, middle = put.graph, site.middle
        rows, tokens, at = text.size(graph, 0), text.size(graph, 2), text.at(graph)
        new = put.call(
            core_ops.CORE_VOTES, middle, text.counted(graph), rows, self.alpha, self.score == "magnitude"
        )  # fmt: skip
        kept = [constant(graph, state[what], put.input) for what in ("votes", "core", "text")]
        put.call(core_ops.CHOOSE_CORE, *kept, new, at, tokens, keep)
        return site.anchor

    def _few(self, put: Put, parts: BlockParts, text: Text, state: Mapping[What, Tensor]) -> fx.Node:
        """The neurons that were chosen."""
        graph, block = put.graph, put.block
        known, core = (constant(graph, state[what], put.input) for what in ("text", "core"))
        chosen = put.call(core_ops.CORE_LIST, known, core, text.at(graph), text.size(graph, 0))
        w = put.weights(lambda: transposed(block))
        return put.call(
            torch.ops.effcompile.grouped_ffn.default, put.input, w.get("gate"), w["up"], w["down"], chosen, None, 0, 1,
            block.activation, **{name: w[name] for name in ("gate_bias", "up_bias", "down_bias") if name in w},
        )  # fmt: skip
