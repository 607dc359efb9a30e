"""FlexPrefill: each head takes columns and diagonals, or blocks by pooled products, as its last queries tell.

Paper: FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference (Lai et al., ICLR
2025), section 3 and algorithms 1 to 3.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from effcompile.kernels import blocks, estimate, select
from effcompile.passes.sparse_prefill import SparsePrefill, bounds, check_share, first_block


@dataclasses.dataclass(frozen=True)
class FlexPrefill(SparsePrefill):
    """Visit what holds ``gamma`` of the attention of the last block of queries, by columns and diagonals.

    A head whose pooled estimate is close to the truth there (Jensen-Shannon distance below ``tau``) is *query-aware*:
    it also takes the best blocks of the whole map of pooled products, one budget for all its rows.

    Parameters
    ----------
    gamma
        Share of attention to cover, 0 to 1; 1 visits every block.
    tau
        Distance below which a head is query-aware; 0: none is.
    min_budget
        Tokens of columns, and of diagonals, that are visited at least.

    Notes
    -----
    The official code counts the tokens it needs as if they lay together, so ``min_budget`` matters; its authors use
    1024 and ``gamma`` 0.95 for Llama. Its distance is NaN where a probability underflows, which makes the head
    vertical-slash in silence; here 0 log 0 is 0. It pools diagonals from the first token, so that with a cut last
    block an offset means two diagonals; here they are pooled from the last. It drops the block that crosses the budget
    of a query-aware head; the paper, and this, keep it.
    """

    gamma: float = 0.95
    tau: float = 0.1
    min_budget: int = 1024

    name: ClassVar[str] = "flexprefill"
    paper: ClassVar[str] = "FlexPrefill (Lai et al., ICLR 2025)"
    summary: ClassVar[str] = "prompts: columns and diagonals, or pooled blocks, as a probe of the last queries tells"
    share: ClassVar[str | None] = "gamma"
    limit: ClassVar[dict[str, Any]] = {"gamma": 1.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("gamma", self.gamma)
        if self.tau < 0 or self.min_budget < 0:
            raise ValueError(f"tau={self.tau!r}, min_budget={self.min_budget!r}; expected 0 or more.")

    def choose(self, query: Tensor, key: Tensor, scale: float, key_mask: Tensor | None) -> Tensor:
        """Columns, diagonals and, for query-aware heads, blocks: bool ``[B, H, nQ, nK]``."""
        block_size, gamma = self.block_size, self.gamma
        allowed, forced = bounds(query, key, key_mask, block_size)
        if gamma >= 1:
            return allowed
        queries, keys = query.shape[2], key.shape[2]
        weights = estimate.probe(query, key, scale=scale, rows=block_size, key_mask=key_mask)
        vertical, slash = weights.mean(2), diagonals(weights) / weights.shape[2]
        least = blocks.count_blocks(self.min_budget, block_size)
        many = [(_cover(x, gamma) // block_size + 1).clamp(min=least) for x in (vertical, slash)]
        columns = estimate.block_sums(vertical, block_size)
        pooled = estimate.pooled(
            query, key, scale=scale, block=block_size, stride=block_size, fold="mean", key_mask=key_mask
        )
        # Of the last block's map: it is the block that was probed, if the last block is not cut short.
        last = _last_row(query, key, scale, key_mask, block_size)
        aware = (_distance(last, columns) < self.tau)[:, :, None]
        many = [torch.where(aware, least, count[:, :, None]) for count in many]
        everything = torch.ones((), dtype=torch.bool, device=key.device)
        kept = select.top_k(columns[:, :, None], many[0], everything, first_block(query, key, key_mask, block_size))
        # Diagonals are pooled from the last one, so that offset 0 holds the main diagonal and those next to it.
        offsets = estimate.block_sums(slash.flip(-1), block_size)
        nearest = torch.arange(offsets.shape[-1], device=key.device) == 0
        chosen = select.top_k(offsets[:, :, None], many[1], everything, nearest)
        rows = torch.arange(allowed.shape[0], device=key.device)
        at = (keys - queries + ((rows + 1) * block_size).clamp(max=queries) - 1) // block_size
        behind = (at[:, None] - torch.arange(allowed.shape[1], device=key.device)).clamp(min=0)
        keep = kept | chosen[:, :, 0][..., behind] | forced
        whole = select.global_cumulative(pooled, gamma, allowed, forced)
        return (keep | whole & aware[..., None]) & allowed


def diagonals(weights: Tensor) -> Tensor:
    """Sums along the diagonals of ``[..., R, S]``, by the column where a diagonal meets the last row: ``[..., S]``."""
    rows, columns = weights.shape[-2:]
    # Row r, counted from the last, moves r columns to the right when rows of one element more are read as rows without.
    wide = torch.nn.functional.pad(weights.flip(-2), (0, rows)).flatten(-2)
    shifted = wide[..., : rows * (columns + rows - 1)].unflatten(-1, (rows, columns + rows - 1))
    sums: Tensor = shifted.sum(-2)[..., :columns]
    return sums


def _cover(x: Tensor, share: float) -> Tensor:
    """How many of the largest entries hold ``share`` of a distribution: int64, without the last axis."""
    count: Tensor = (x.sort(dim=-1, descending=True).values.cumsum(-1) <= share).sum(-1) + 1
    return count


def _last_row(query: Tensor, key: Tensor, scale: float, key_mask: Tensor | None, block: int) -> Tensor:
    """What pooling predicts of the probe: the softmax over blocks of the mean of its queries by mean keys."""
    tail = query[:, :, -block:]
    if key_mask is None:
        mean = tail.float().mean(2, keepdim=True)
    else:
        there = key_mask[:, : key.shape[2]][:, -tail.shape[2] :, None].float()
        mean = ((tail.float() * there[:, None]).sum(2) / there.sum(1)[:, None].clamp(min=1)).unsqueeze(2)
    return estimate.pooled(
        mean, key, scale=scale, block=block, stride=block, fold="mean", causal=False, key_mask=key_mask
    )[:, :, 0]


def _distance(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence in nats."""
    m = (p + q) / 2
    terms = torch.xlogy(p, p) - torch.xlogy(p, m) + torch.xlogy(q, q) - torch.xlogy(q, m)
    distance: Tensor = (0.5 * terms.sum(-1)).clamp(min=0).sqrt()
    return distance
