"""PBS-Attn: keys are sorted inside segments, so that heavy ones share blocks; then blocks by pooled products.

Paper: Sparser Block-Sparse Attention via Token Permutation (ICML 2026), sections 3 and 4.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from effcompile.kernels import block_ops, blocks, column_ops, columns, estimate, select  # noqa: F401  (operators)
from effcompile.passes.sites import State
from effcompile.passes.sparse_prefill import SparsePrefill, check_share, results
from effcompile.patterns.attention import AttentionSite
from effcompile.patterns.walk import aten, shape


@dataclasses.dataclass(frozen=True)
class PBSAttn(SparsePrefill):
    """Sort the keys of each segment by what the last block of queries gives them, and visit the heaviest blocks.

    Attention does not depend on the order of keys, and causality is tested by the tokens that they are of. A block of
    queries visits those blocks of earlier segments that hold ``threshold`` of the mass which pooled products predict,
    its own segment, and the block into which the first token went. The cache keeps keys in their order.

    Parameters
    ----------
    threshold
        Share of the predicted mass, 0 to 1; 1 visits every block.
    segment
        Tokens among which keys move, a multiple of ``block_size``. What is left at the end of the prompt does not move.

    Notes
    -----
    In the official selection a row whose sums of floats stop short of a ``threshold`` of 1.0 keeps nothing; here it
    keeps everything. It moves the keys of each query head by themselves; here query heads that share keys share their
    order, by their mean (appendix G). It pools a last block of queries that is cut short together with zeros; here over
    its queries. Segments begin at the block with a row's first token. The choice looks at the end of the prompt, so
    that it is causal for given lists only.
    """

    min_length: int = 4096
    threshold: float = 0.9
    segment: int = 256

    name: ClassVar[str] = "pbs_attn"
    paper: ClassVar[str] = "PBS-Attn (ICML 2026)"
    summary: ClassVar[str] = "prompts: keys sorted inside segments, and blocks chosen by pooled products"
    limit: ClassVar[dict[str, Any]] = {"threshold": 1.0}
    reorders: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("threshold", self.threshold)
        if self.segment < 1 or self.segment % self.block_size:
            raise ValueError(f"segment={self.segment!r} is no multiple of block_size={self.block_size}.")

    def segments(self, tokens: Tensor, start: Tensor) -> Tensor:
        """The segments of ``tokens``, counted from the block with a row's first token, ``start`` ``[B or 1]``.

        ``tokens`` is ``[n]``, the result ``[B or 1, n]``. Segments before the first are negative.
        """
        return (tokens - (start // self.block_size * self.block_size)[:, None]) // self.segment

    def order(self, query: Tensor, key: Tensor, scale: float, key_mask: Tensor | None) -> Tensor:
        """The tokens in the order in which their keys are to lie, each within its segment: int64 ``[B, G, S]``.

        By their mean weight for the last block of queries, which looks at keys of whole segments, also later ones.
        """
        groups, keys = key.shape[1:3]
        numbers = torch.arange(keys, device=key.device)
        segment = self.segments(numbers, first_token(key, key_mask))
        # Segments before the one in which the next token would lie are whole.
        shown = whole = (segment >= 0) & (segment < self.segments(numbers[-1:] + 1, first_token(key, key_mask)))
        tail = query[:, :, -self.block_size :]
        if key_mask is not None:
            shown = whole & key_mask[:, :keys]
        weights = estimate.products(tail, key, scale).masked_fill(~shown[:, None, None], -torch.inf).softmax(-1)
        if key_mask is not None:
            weights = weights * key_mask[:, None, keys - tail.shape[2] : keys, None]
        score = weights.mean(2).unflatten(1, (groups, -1)).mean(2)
        # Hidden keys come last in each segment: which slots they take is the same for all heads.
        score = torch.where(shown[:, None], score, torch.where(whole, -1.0, 0.0)[:, None])
        rank = score.argsort(dim=-1, descending=True, stable=True)
        place = segment[:, None].expand_as(rank).gather(2, rank).argsort(dim=-1, stable=True)
        return rank.gather(2, place)

    def choose(self, query: Tensor, key: Tensor, scale: float, key_mask: Tensor | None) -> Tensor:
        """Blocks of keys that lie in :meth:`order`: bool ``[B, H, nQ, nK]``."""
        order = self.order(query, key, scale, key_mask)
        return self.choose_at(query, in_order(key, order), scale, key_mask, order)

    def choose_at(self, query: Tensor, key: Tensor, scale: float, key_mask: Tensor | None, order: Tensor) -> Tensor:
        """Blocks of ``key``, whose slots hold the tokens ``order``: bool ``[B, H, nQ, nK]``."""
        block, (heads, queries), keys = self.block_size, query.shape[1:3], key.shape[2]
        allowed, _ = columns.blocks_at(order, queries, block, heads)
        if self.threshold >= 1:
            return allowed
        start = first_token(key, key_mask)
        rows, wide = allowed.shape[2:]
        # Blocks of slots lie in one segment each; queries stay where they are, and may begin anywhere.
        of_keys = self.segments(torch.arange(wide, device=key.device) * block, start)
        of_queries = self.segments(keys - queries + torch.arange(rows, device=key.device) * block, start)
        earlier = of_keys[:, None, None] < of_queries[:, None, :, None]
        there = slots = None
        if key_mask is not None:
            key_mask = key_mask.expand(key.shape[0], -1)
            there, slots = key_mask[:, keys - queries : keys], key_mask.gather(1, order[:, 0])
        pooled, held = estimate.block_means(key, block, slots)
        mean, _ = estimate.block_means(query, block, there)
        candidates = earlier & allowed if held is None else earlier & allowed & held[:, None, None]
        logits = estimate.products(mean, pooled, scale).masked_fill(~candidates, -torch.inf)
        scores = torch.where(candidates.any(-1, keepdim=True), logits.softmax(-1), 0)
        nothing = torch.zeros((), dtype=torch.bool, device=key.device)
        chosen = select.cumulative(scores, self.threshold, candidates, nothing)
        sink = estimate.block_sums((order == start[:, None, None]).float(), block) > 0
        sink = sink.repeat_interleave(heads // sink.shape[1], 1)[:, :, None]
        return (chosen | ~earlier | sink) & allowed

    def operands(
        self, graph: fx.Graph, site: AttentionSite, state: State, hidden: fx.Node | None
    ) -> tuple[State, list[fx.Node], dict[str, Any]]:
        """Keys and values in another order, that order as their positions, and the blocks of ``select_blocks``."""
        how = (hidden, self.method, site.scale)
        order = graph.call_function(torch.ops.effcompile.order_keys.default, (site.query, state[0], *how))
        column = graph.call_function(aten.unsqueeze.default, (order, -1))
        moved = []
        for kept, size in ((state[0], shape(site.key)[3]), (state[3], shape(site.value)[3])):
            index = graph.call_function(aten.expand.default, (column, [-1, -1, -1, size]))
            moved.append(graph.call_function(aten.gather.default, (kept, 2, index)))
        key, value = moved
        positions: dict[str, Any] = {"key_positions": order}
        made = graph.call_function(torch.ops.effcompile.select_blocks.default, (site.query, key, *how), positions)
        return (key, None, None, value, None, None), results(graph, made, 4), positions


def first_token(key: Tensor, key_mask: Tensor | None) -> Tensor:
    """The first token that is not hidden, in each row: int64 ``[B or 1]``."""
    if key_mask is None:
        return torch.zeros(1, dtype=torch.int64, device=key.device)
    return key_mask[:, : key.shape[2]].int().argmax(1)


def in_order(x: Tensor, order: Tensor) -> Tensor:
    """Rows of ``x`` ``[B, G, S, D]`` in another order, ``[B, G, S]``."""
    return x.gather(2, order.unsqueeze(-1).expand(x.shape))


def _choose(
    query: Tensor, key: Tensor, *, scale: float, key_mask: Tensor | None, key_positions: Tensor, **options: Any
) -> Tensor:
    method = PBSAttn(**options)
    if method.is_short(query.shape[2], key.shape[2]):
        return columns.blocks_at(key_positions, query.shape[2], method.block_size, query.shape[1])[0]
    return method.choose_at(query, key, scale, key_mask, key_positions)


def _order(query: Tensor, key: Tensor, *, scale: float, key_mask: Tensor | None, **options: Any) -> Tensor:
    method = PBSAttn(**options)
    if method.is_short(query.shape[2], key.shape[2]):
        return torch.arange(key.shape[2], device=key.device).expand(key.shape[:3])
    return method.order(query, key, scale, key_mask)


block_ops.register_policy(PBSAttn.name, _choose)
block_ops.register_policy(PBSAttn.name, _order, "order")
