"""The heads of an attention as its output projection reads them, in plain PyTorch."""

from __future__ import annotations

import dataclasses

from torch import Tensor
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True, eq=False)
class Heads:
    """The output projection of an attention, ``concat(heads) down + bias``, and what its heads own besides.

    Parameters
    ----------
    down
        ``[H * E, d]``: row ``h * E + e`` is what channel ``e`` of head ``h`` writes.
    bias
        ``[d]`` or None.
    heads, groups
        Heads of the queries (``H``), and of keys and values.
    query, key
        Numbers of the weights that one query head owns, its rows of ``down`` among them, and that one head of keys and
        values owns.
    """

    down: Tensor
    bias: Tensor | None
    heads: int
    groups: int
    query: int = 0
    key: int = 0

    @property
    def width(self) -> int:
        """Channels of all heads."""
        return self.down.shape[0]

    @property
    def inputs(self) -> int:
        """The same: what goes in is what the last linear reads."""
        return self.width

    @property
    def size(self) -> int:
        """Channels of a head (``E``)."""
        return self.width // self.heads

    def __call__(self, x: Tensor) -> Tensor:
        """The output for rows ``[n, H * E]``: ``[n, d]``."""
        return F.linear(x, self.down.t(), self.bias)

    def channels(self, heads: Tensor) -> Tensor:
        """The channels of some heads, int64, in their order."""
        own = heads.long()[:, None] * self.size
        return (own + own.new_tensor(range(self.size))).flatten()
