"""Vertical-slash: single columns and diagonals, as the last queries tell.

Paper: MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention (Jiang et al.,
NeurIPS 2024), section 3.2 and algorithm 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from effcompile.kernels import blocks, columns, estimate
from effcompile.passes.flexprefill import diagonals
from effcompile.passes.sparse_columns import Picked, SparseColumns
from effcompile.passes.sparse_prefill import bounds

PROBED = 64
"""Queries at the end of the prompt from which columns and diagonals are chosen."""
SINKS, NEAREST = 30, 100
"""First tokens, and nearest diagonals, that are taken before any other."""


@dataclasses.dataclass(frozen=True)
class VerticalSlash(SparseColumns):
    """Visit the columns and the diagonals with the largest sums of attention of the last 64 queries.

    Columns are single keys, gathered; diagonals are visited as the blocks that they cross. The first 30 tokens and the
    nearest 100 diagonals are taken first, and count. The blocks with the first token and of a query's own position
    are always visited.

    Parameters
    ----------
    vertical
        Columns for each head, in tokens; at least as many as the prompt has tokens: every key.
    slash
        Diagonals for each head; at least as many as the prompt has tokens: every block.

    Notes
    -----
    Every head is vertical-slash with the same sizes, those that MInference's released search gives most heads of
    Llama 3.1 8B (and falls back to); rules give layers others. The paper's other two patterns, blocks and A-shape, are
    not here: the released search rewrites both to this one. The official kernel crosses diagonals by tiles of 64 which
    begin anywhere; here they are the blocks of the prompt, so that a little more is visited. It takes at least 30
    columns and 50 diagonals; here the options mean what they say.
    """

    min_length: int = 16384
    vertical: int = 1000
    slash: int = 6096

    name: ClassVar[str] = "vertical_slash"
    paper: ClassVar[str] = "MInference (Jiang et al., NeurIPS 2024)"
    summary: ClassVar[str] = "prompts: single columns and diagonals, as a probe of the last queries tells"
    limit: ClassVar[dict[str, Any]] = {"vertical": 1 << 30, "slash": 1 << 30}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vertical < 0 or self.slash < 0:
            raise ValueError(f"vertical={self.vertical!r}, slash={self.slash!r}; expected 0 or more tokens.")

    @property
    def span(self) -> int:
        """Each block of queries has its own list: the columns that it does not visit in blocks."""
        return 1

    def longest(self, keys: int) -> int:
        """As many as are chosen."""
        return torch.sym_min(self.vertical, keys)  # type: ignore[no-any-return]

    def pick(self, query: Tensor, key: Tensor, scale: float, key_mask: Tensor | None) -> Picked:
        """The blocks that the chosen diagonals cross, and the chosen columns which these leave out."""
        block, (queries, keys) = self.block_size, (query.shape[2], key.shape[2])
        allowed, forced = bounds(query, key, key_mask, block)
        vertical, slash = strongest(query, key, scale, key_mask, self.vertical, self.slash)
        keep = crossed(slash, queries, keys, block) & allowed | forced
        last = keys - queries + ((torch.arange(keep.shape[2], device=key.device) + 1) * block).clamp(max=queries) - 1
        wide = (*query.shape[:2], keep.shape[2], vertical.shape[2])
        at = vertical.unsqueeze(2).expand(wide)
        free = ~keep.expand(*query.shape[:2], -1, -1).gather(3, at // block)
        return Picked(keep, *columns.gathered(at, free & (at <= last[:, None])))


def strongest(
    query: Tensor, key: Tensor, scale: float, key_mask: Tensor | None, vertical: int, slash: int
) -> tuple[Tensor, Tensor]:
    """The columns, ascending int64 ``[B, H, min(vertical, S)]``, and which diagonals: bool ``[B, H, S]`` by distance.

    A head with a NaN among its weights takes every diagonal, as it cannot be said which.
    """
    keys = key.shape[2]
    weights = estimate.probe(query, key, scale=scale, rows=PROBED, key_mask=key_mask)
    at = torch.arange(keys, device=key.device)
    start = torch.zeros(1, dtype=torch.int64, device=key.device)
    if key_mask is not None:
        start = key_mask[:, :keys].int().argmax(1)
    first = (at >= start[:, None]) & (at < start[:, None] + SINKS)
    sums = weights.sum(2)
    if key_mask is not None:
        sums = sums.masked_fill(~key_mask[:, None, :keys], -1)  # behind those that are there and have no weight
    # Of sinks, and of near diagonals, those in front come first, should there be room for some only.
    sums = torch.where(first[:, None], torch.inf, sums)
    rank = sums.argsort(dim=-1, descending=True, stable=True)
    chosen = rank[..., : min(vertical, keys)].sort(-1).values
    sums = torch.where(at < NEAREST, torch.inf, diagonals(weights).flip(-1))
    rank = sums.argsort(dim=-1, descending=True, stable=True)
    taken = torch.zeros_like(sums, dtype=torch.bool).scatter(-1, rank[..., :slash], True)
    return chosen, taken | weights.isnan().any(-1).any(-1)[..., None]


def crossed(slash: Tensor, queries: int, keys: int, block: int) -> Tensor:
    """The blocks that diagonals cross, bool ``[..., nQ, nK]``: those with a query and a key at a chosen distance.

    ``slash`` is bool ``[..., S]`` by distance.
    """
    rows, width = blocks.count_blocks(queries, block), blocks.count_blocks(keys, block)
    first = keys - queries + torch.arange(rows, device=slash.device)[:, None] * block
    last = (first + block - 1).clamp(max=keys - 1)
    begin = torch.arange(width, device=slash.device) * block
    # Distances of pairs in a block are a range; how many of these are chosen is the difference of two running counts.
    upto = torch.nn.functional.pad(slash.cumsum(-1), (1, 0))
    far = (last - begin + 1).clamp(min=0)
    near = (first - (begin + block).clamp(max=keys) + 1).clamp(min=0)
    return upto[..., far] > upto[..., torch.minimum(near, far)]
