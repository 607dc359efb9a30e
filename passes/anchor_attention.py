"""AnchorAttention: single keys whose logits come close to the largest near by.

Paper: AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity (Zhang et al., EMNLP 2025).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from effcompile.kernels import blocks, columns, estimate
from effcompile.passes.sparse_columns import Picked, SparseColumns
from effcompile.passes.sparse_prefill import first_block


@dataclasses.dataclass(frozen=True)
class AnchorAttention(SparseColumns):
    """Visit the first block and a window, and of the keys between those whose logit is within ``theta`` of an anchor.

    ``step`` blocks of queries are a super-block; its window begins with its own first key. A block's *anchor* is the
    mean of its queries' largest logits in the first block and the window. A key between is visited by the whole
    super-block if, for the mean query of one of its blocks, the logit plus ``theta`` reaches that block's anchor.

    Parameters
    ----------
    theta
        Distance from the anchor in nats: a key further away weighs less than ``exp(-theta)`` of the largest. Infinity
        visits every key, -infinity only the first block and the window.
    step
        Blocks of queries in a super-block.

    Notes
    -----
    This is the exact form: the official kernels count keys of the first super-block twice and forget the last block
    before each window, so that they differ from dense attention even where every key is kept. Logits and anchors are
    compared in fp32 and not in the dtype of the model. Lengths need no divisibility: the last super-block is shorter,
    and its queries are not dense. Super-blocks are counted from the first slot, so that padding which is not whole
    super-blocks changes which queries share their columns. The lists have room for every key, which costs
    ``S * S / (step * block_size)`` numbers for each head. Logits in the window are computed twice, once for the
    anchors: the state that attention gives has their sum, and an anchor is the largest.
    """

    theta: float = 12.0
    step: int = 16

    name: ClassVar[str] = "anchor_attention"
    paper: ClassVar[str] = "AnchorAttention (Zhang et al., EMNLP 2025)"
    summary: ClassVar[str] = "prompts: the first block, a window, and single keys with logits near the largest there"
    # Any difference of logits is less; infinity, which is offered too, is no number in JSON.
    limit: ClassVar[dict[str, Any]] = {"theta": 1e30}

    def __post_init__(self) -> None:
        super().__post_init__()
        if math.isnan(self.theta) or self.step < 1:
            raise ValueError(f"theta={self.theta!r}, step={self.step!r}; expected a number, and at least 1 block.")

    @property
    def span(self) -> int:
        """A super-block has one list."""
        return self.step

    def longest(self, keys: int) -> int:
        """Every key may be within ``theta``."""
        return keys

    def pick(self, query: Tensor, key: Tensor, scale: float, key_mask: Tensor | None) -> Picked:
        """The first block and the window as blocks, and the columns between."""
        block, (queries, keys) = self.block_size, (query.shape[2], key.shape[2])
        allowed = blocks.possible(queries, keys, block, device=key.device)
        sink = first_block(query, key, key_mask, block)
        rows, numbers = torch.arange(allowed.shape[0], device=key.device), torch.arange(keys, device=key.device)
        window = (keys - queries + rows // self.step * self.step * block) // block
        keep = (sink | (torch.arange(allowed.shape[1], device=key.device) >= window[:, None])) & allowed
        outside = ~sink[:, :, 0].repeat_interleave(block, 2)[..., :keys]
        there = None
        if key_mask is not None:
            outside, there = outside & key_mask[:, None, :keys], key_mask[:, keys - queries : keys]
        lists, _ = self.room(queries, keys)
        made = torch.zeros(*query.shape[:2], lists, keys, dtype=torch.int32, device=key.device)
        counts = made.new_zeros(made.shape[:3])
        for i in range(lists):
            part = slice(i * self.step * block, min(queries, (i + 1) * self.step * block))
            begin = (keys - queries + part.start) // block * block
            some = None if there is None else there[:, part]
            # Means are over the queries that are there, and blocks without one look for nothing.
            highest = peaks(query, key, scale, key_mask, part, begin, sink, block)
            anchor, held = estimate.block_means(highest.unsqueeze(3), block, some)
            mean, _ = estimate.block_means(query[:, :, part], block, some)
            close = torch.zeros(*query.shape[:2], begin, dtype=torch.bool, device=key.device)
            width = max(1, estimate.SLAB // (mean.numel() // mean.shape[3]))
            for at in range(0, begin, width):
                logits = estimate.products(mean, key[:, :, at : min(begin, at + width)], scale)
                # What cannot be compared, a NaN, is kept.
                near = ~(logits + self.theta < anchor)
                close[..., at : at + width] = (near if held is None else near & held[:, None, :, None]).any(2)
            made[:, :, i, :begin], counts[:, :, i] = columns.gathered(numbers[:begin], close & outside[..., :begin])
        return Picked(keep, made, counts)


def peaks(
    query: Tensor,
    key: Tensor,
    scale: float,
    key_mask: Tensor | None,
    part: slice,
    begin: int,
    sink: Tensor,
    block: int,
) -> Tensor:
    """The largest logit in the block ``sink`` and from key ``begin`` on, of queries in ``part``: fp32 ``[B, H, n]``.

    ``sink`` is bool ``[B or 1, 1, 1, nK]``. A query that sees no key, as padding, has 0.
    """
    (batch, groups, keys, size), queries = key.shape, query.shape[2]
    last = min(keys, keys - queries + part.stop)
    # The keys of the first block with a token, which lies elsewhere in each row of a batch, and those of the window.
    first = sink[:, 0, 0].int().argmax(1, keepdim=True) * block + torch.arange(block, device=key.device)
    at = torch.cat([first, torch.arange(begin, last, device=key.device).expand(first.shape[0], -1)], 1)
    index = at.clamp(max=keys - 1).expand(batch, -1)
    looked = key.gather(2, index[:, None, :, None].expand(batch, groups, -1, size))
    shown = (
        (at < keys).expand(batch, -1) if key_mask is None else (at < keys) & key_mask.expand(batch, -1).gather(1, index)
    )
    out = []
    step = max(1, estimate.SLAB // max(1, batch * query.shape[1] * at.shape[1]))
    for start in range(part.start, part.stop, step):
        few = slice(start, min(part.stop, start + step))
        position = torch.arange(keys - queries + few.start, keys - queries + few.stop, device=key.device)
        seen = (at[:, None] <= position[:, None]) & shown[:, None]
        logits = estimate.products(query[:, :, few], looked, scale).masked_fill(~seen[:, None], -torch.inf)
        out.append(torch.where(seen.any(-1)[:, None], logits.amax(-1), 0))
    return torch.cat(out, 2)
