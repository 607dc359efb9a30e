"""Attention sinks: the first tokens and a window, whatever the content.

Paper: Efficient Streaming Language Models with Attention Sinks (Xiao et al., ICLR 2024), section 3.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from effcompile.passes.sparse_prefill import SparsePrefill, bounds


@dataclasses.dataclass(frozen=True)
class Streaming(SparsePrefill):
    """Visit the first tokens and the nearest ones, in whole blocks.

    Parameters
    ----------
    window
        The nearest tokens; every block that holds one of them is visited. At least as many as the prompt has tokens:
        every block.
    sink
        The first tokens, in whole blocks. 0: a plain sliding window.

    Notes
    -----
    The paper keeps 4 sinks and a rolling cache, and moves positions to within the cache. Here nothing is evicted and
    positions stay: it is a mask over a prompt, the plain baseline for the methods that look at content.
    """

    window: int = 1024
    sink: int = 128

    name: ClassVar[str] = "streaming"
    paper: ClassVar[str] = "StreamingLLM (Xiao et al., ICLR 2024)"
    summary: ClassVar[str] = "prompts: the first tokens and a window, in blocks, whatever the content"
    limit: ClassVar[dict[str, Any]] = {"window": 1 << 30}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1 or self.sink < 0:
            raise ValueError(f"window={self.window!r}, sink={self.sink!r}; expected at least 1 and at least 0 tokens.")

    def choose(self, query: Tensor, key: Tensor, scale: float, key_mask: Tensor | None) -> Tensor:
        """Sink and window: bool ``[B, 1, nQ, nK]``, the same for all heads."""
        queries, keys, block_size, sink = query.shape[2], key.shape[2], self.block_size, self.sink
        allowed, _ = bounds(query, key, None, block_size)
        rows, columns = allowed.shape
        begin = torch.arange(columns, device=key.device) * block_size
        # The first query of a block looks back furthest: its window decides.
        first = keys - queries + torch.arange(rows, device=key.device)[:, None] * block_size
        near = (begin + block_size > first - self.window + 1) & allowed
        if sink == 0:
            return near[None, None]
        start = torch.zeros(1, dtype=torch.int64, device=key.device)
        if key_mask is not None:
            start = key_mask[:, :keys].int().argmax(1)
        head = (begin < (start + sink)[:, None]) & (begin + block_size > start[:, None])
        return (near | head[:, None] & allowed)[:, None]
