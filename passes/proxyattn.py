"""ProxyAttn: a few averaged heads rank the blocks for all heads; each head cuts the ranking at its own length.

Paper: ProxyAttn: Guided Sparse Attention via Representative Heads (Wang et al., ICLR 2026).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from effcompile.kernels import blocks, estimate, select
from effcompile.kernels.reason import Reason
from effcompile.passes.sparse_prefill import SparsePrefill, bounds, check_share, check_stride
from effcompile.patterns.attention import AttentionSite
from effcompile.patterns.walk import shape


@dataclasses.dataclass(frozen=True)
class ProxyAttn(SparsePrefill):
    """Visit the blocks with the largest single weight of a proxy head, as many as each head's own probe asks for.

    Query heads, and key heads, are averaged in ``proxy_heads`` groups; of every ``stride`` tokens of a proxy the first
    is kept. The largest weight in a block is its score. The last block of queries of each real head tells which share
    of the blocks it needs for ``gamma`` of its attention.

    Parameters
    ----------
    gamma
        Share of a head's attention to cover, 0 to 1; 1 visits every block.
    proxy_heads
        Averaged heads in a layer; divides the key/value heads. The paper takes 1 for Llama-3.1-8B, 4 for
        Qwen2.5-7B-1M.
    stride
        Of this many tokens one is looked at, among queries and among keys.
    min_budget
        Tokens that every row visits at least.

    Notes
    -----
    No code was published. Not told by the paper, and chosen here: the stride is on both sides, rows scale a head's
    share by the number of blocks before them, the sink and the diagonal are always visited, ties go to the lower block.
    """

    gamma: float = 0.95
    proxy_heads: int = 1
    stride: int = 4
    min_budget: int = 2048

    name: ClassVar[str] = "proxyattn"
    paper: ClassVar[str] = "ProxyAttn (Wang et al., ICLR 2026)"
    summary: ClassVar[str] = "prompts: blocks ranked by averaged heads, with a budget for each head"
    share: ClassVar[str | None] = "gamma"
    limit: ClassVar[dict[str, Any]] = {"gamma": 1.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("gamma", self.gamma)
        check_stride(self.stride, self.block_size)
        if self.proxy_heads < 1 or self.min_budget < 0:
            raise ValueError(f"proxy_heads={self.proxy_heads!r}, min_budget={self.min_budget!r}; expected 1 and 0 up.")

    def serves(self, site: AttentionSite) -> Reason | None:
        """A proxy's heads are whole groups of heads that share keys."""
        groups = shape(site.key)[1]
        if isinstance(groups, int) and groups % self.proxy_heads:
            text = f"proxy_heads={self.proxy_heads} does not divide the {groups} key/value heads of this layer"
            return Reason("not-supported", text, site.source)
        return None

    def choose(self, query: Tensor, key: Tensor, scale: float, key_mask: Tensor | None) -> Tensor:
        """The best blocks by proxy, as many as each head needs: bool ``[B, H, nQ, nK]``."""
        block, proxy_heads = self.block_size, self.proxy_heads
        allowed, forced = bounds(query, key, key_mask, block)
        if self.gamma >= 1:
            return allowed
        proxies = [x.float().unflatten(1, (proxy_heads, -1)).mean(2) for x in (query, key)]
        scores = estimate.pooled(
            *proxies, scale=scale, block=block, stride=self.stride, fold="first", pool="max", key_mask=key_mask
        )
        share = needed(query, key, scale, key_mask, block, self.gamma)
        before = allowed.sum(-1)
        least = blocks.count_blocks(self.min_budget, block)
        count = (share[..., None] * before).ceil().long().clamp(min=least)
        return select.top_k(scores.repeat_interleave(query.shape[1] // proxy_heads, 1), count, allowed, forced)


def needed(query: Tensor, key: Tensor, scale: float, key_mask: Tensor | None, block: int, gamma: float) -> Tensor:
    """The share of blocks that holds ``gamma`` of what the last block of queries attends to: fp32 ``[B, H]``."""
    weights = estimate.probe(query, key, scale=scale, rows=block, key_mask=key_mask).mean(2)
    mass = estimate.block_sums(weights, block)
    mass = mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    held = mass.sort(dim=-1, descending=True).values.cumsum(-1)
    share: Tensor = ((held < gamma).sum(-1) + 1).clamp(max=mass.shape[-1]) / mass.shape[-1]
    return share
