"""What methods share that choose single keys besides blocks: ``select_columns`` in place of ``select_blocks``."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, fx

from effcompile.kernels import block_ops, blocks, column_ops  # noqa: F401  (registers the operator)
from effcompile.passes.sites import State
from effcompile.passes.sparse_prefill import SparsePrefill, results
from effcompile.patterns.attention import AttentionSite


class Picked(NamedTuple):
    """Blocks, and single keys which lie in none of them (:mod:`effcompile.kernels.columns`).

    ``keep`` is bool, broadcastable to ``[B, H, nQ, nK]``; ``columns`` int32 ``[B, H, nR, C]`` and ``counts``
    ``[B, H, nR]``, of the sizes that :meth:`SparseColumns.room` tells.
    """

    keep: Tensor
    columns: Tensor
    counts: Tensor


@dataclasses.dataclass(frozen=True)
class SparseColumns(SparsePrefill, abc.ABC):
    """A method that chooses blocks of keys for each block of queries, and single keys for each run of such blocks."""

    gathers: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

        def policy(query: Tensor, key: Tensor, *, scale: float, key_mask: Tensor | None, **options: Any) -> Picked:
            return cls(**options).picked(query, key, scale, key_mask)

        def room(queries: int, keys: int, **options: Any) -> tuple[int, int]:
            return cls(**options).room(queries, keys)

        if "name" in vars(cls):
            block_ops.register_policy(cls.name, policy, "columns")
            block_ops.register_policy(cls.name, room, "room")

    @property
    @abc.abstractmethod
    def span(self) -> int:
        """Query blocks that share a list of columns."""

    @abc.abstractmethod
    def longest(self, keys: int) -> int:
        """The room for columns in a list, ``C``. The sizes may be symbolic."""

    @abc.abstractmethod
    def pick(self, query: Tensor, key: Tensor, scale: float, key_mask: Tensor | None) -> Picked:
        """Blocks and columns. Sees what :meth:`choose` sees, and is bound by the same rules."""

    def choose(self, query: Tensor, key: Tensor, scale: float, key_mask: Tensor | None) -> Tensor:
        """The blocks of :meth:`pick` alone."""
        return self.pick(query, key, scale, key_mask).keep

    def room(self, queries: int, keys: int) -> tuple[int, int]:
        """The number of lists, ``nR``, and their room, ``C``."""
        return blocks.count_blocks(blocks.count_blocks(queries, self.block_size), self.span), self.longest(keys)

    def picked(self, query: Tensor, key: Tensor, scale: float, key_mask: Tensor | None) -> Picked:
        """:meth:`pick`, or all blocks and no column where :meth:`is_short`."""
        queries, keys = query.shape[2], key.shape[2]
        if not self.is_short(queries, keys):
            return self.pick(query, key, scale, key_mask)
        lists, room = self.room(queries, keys)
        none = torch.zeros(1, 1, lists, room, dtype=torch.int32, device=key.device)
        return Picked(
            blocks.possible(queries, keys, self.block_size, device=key.device), none, none.new_zeros(1, 1, lists)
        )

    def operands(
        self, graph: fx.Graph, site: AttentionSite, state: State, hidden: fx.Node | None
    ) -> tuple[State, list[fx.Node], dict[str, Any]]:
        """The lists of ``select_columns``."""
        made = graph.call_function(
            torch.ops.effcompile.select_columns.default, (site.query, state[0], hidden, self.method, site.scale)
        )
        *lists, columns, counts = results(graph, made, 6)
        return state, lists, {"columns": columns, "column_counts": counts, "span": self.span}
