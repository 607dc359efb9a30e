"""Block lists: which blocks of keys each block of queries attends to, as tensors that stay on the device.

Query block ``I`` holds the queries ``[I * block, (I + 1) * block)``, key block ``J`` the keys of the same numbers; the
last of each may be cut short. ``nQ = ceil(T / block)``, ``nK = ceil(S / block)``. The queries are the last tokens, so
query ``i`` stands at position ``S - T + i``.

The four tensors are those of PyTorch's ``BlockMask``, with its names. A *full* block needs no test of any pair in it,
a *partial* one is tested against the predicate. Lists ascend, and have room for every block, so that shapes do not
depend on data; what lies behind a count is not read. Batch and heads may be 1, which stands for all.

Lists may have room for fewer blocks, ``[B, H, nQ, room]``, where memory is short. A count is that of the blocks which
were chosen, whether they fit or not: where it is greater than the room the list has *overflowed*, nothing of its row is
read, and the row visits every block, tested. So an overflow costs time and is never wrong.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

BLOCK = 128
"""Tokens in a block, of queries and of keys, where nobody says otherwise."""


class BlockError(ValueError):
    """Block lists that cannot be built or do not fit the call; says what was expected."""


def count_blocks(tokens: int, block: int) -> int:
    """``ceil(tokens / block)``.

    >>> count_blocks(129, 128)
    2
    """
    return -(-tokens // block)


@dataclasses.dataclass(frozen=True)
class BlockLists:
    """The blocks that attention visits.

    Parameters
    ----------
    kv_num_blocks, kv_indices
        Partial blocks: int32 ``[B or 1, H or 1, nQ]`` and ``[B or 1, H or 1, nQ, nK]``, or of less room.
    full_kv_num_blocks, full_kv_indices
        Full blocks, of the same shapes, or ``None`` if there is none.
    block
        Tokens in a block, of queries and of keys.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor | None
    full_kv_indices: Tensor | None
    block: int

    def keep(self, total: int | None = None) -> Tensor:
        """Whether a block is visited: bool ``[B or 1, H or 1, nQ, nK]``; lists of less room need ``total``, ``nK``."""
        keep = visited(self.kv_num_blocks, self.kv_indices, total)
        if self.full_kv_num_blocks is not None and self.full_kv_indices is not None:
            keep = keep | visited(self.full_kv_num_blocks, self.full_kv_indices, total)
        return keep | self.overflowed().unsqueeze(-1)

    def overflowed(self) -> Tensor:
        """Whether a row of lists did not fit, and visits every block: bool ``[B or 1, H or 1, nQ]``."""
        over = self.kv_num_blocks > self.kv_indices.shape[-1]
        if self.full_kv_num_blocks is not None and self.full_kv_indices is not None:
            over = over | (self.full_kv_num_blocks > self.full_kv_indices.shape[-1])
        return over


def compact(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and ascending numbers of the true entries along the last axis: int32 ``[...]`` and ``[..., n]``.

    No size depends on data and nothing is copied to the host. Behind a count stand the numbers of the others.
    """
    indices = keep.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return keep.sum(-1, dtype=torch.int32), indices.to(torch.int32)


def visited(counts: Tensor, indices: Tensor, total: int | None = None) -> Tensor:
    """The inverse of :func:`compact`: bool, of the shape of ``indices``; of lists with less room ``[..., total]``."""
    width = indices.shape[-1] if total is None else total
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts.unsqueeze(-1)
    # What lies behind a count may be any number; it must not be written over a listed one.
    padded = torch.where(listed, indices.long(), width)
    keep = torch.zeros(*indices.shape[:-1], width + 1, dtype=torch.bool, device=indices.device)
    return keep.scatter(-1, padded, True)[..., :width]


def lists(keep: Tensor, full: Tensor | None, block: int, room: int | None = None) -> BlockLists:
    """Lists of the blocks in ``keep``, bool ``[B or 1, H or 1, nQ, nK]``, of which those in ``full`` need no test.

    ``room`` is the length of each list, which may overflow; by default as many as there are blocks.

    >>> made = lists(torch.tensor([[[[True, False, True], [True, True, True]]]]), None, 128, room=2)
    >>> made.kv_num_blocks.tolist(), made.overflowed().tolist()
    ([[[2, 3]]], [[[False, True]]])
    """
    if full is None:
        return BlockLists(*_cut(*compact(keep), room), None, None, block)
    return BlockLists(*_cut(*compact(keep & ~full), room), *_cut(*compact(keep & full), room), block)


def _cut(counts: Tensor, indices: Tensor, room: int | None) -> tuple[Tensor, Tensor]:
    return counts, indices if room is None else indices[..., :room].contiguous()


def possible(queries: int, keys: int, block: int, *, causal: bool = True, device: Any = None) -> Tensor:
    """Blocks in which the predicate lets any pair through: bool ``[nQ, nK]``."""
    rows, columns = count_blocks(queries, block), count_blocks(keys, block)
    if not causal:
        return torch.ones(rows, columns, dtype=torch.bool, device=device)
    last = (keys - queries + (torch.arange(rows, device=device) + 1) * block - 1).clamp(max=keys - 1)
    return torch.arange(columns, device=device) * block <= last[:, None]


def whole(queries: int, keys: int, block: int, *, causal: bool = True, device: Any = None) -> Tensor:
    """Blocks in which the predicate lets every pair through, and that no end cuts short: bool ``[nQ, nK]``."""
    rows, columns = count_blocks(queries, block), count_blocks(keys, block)
    last = (torch.arange(columns, device=device) + 1) * block - 1
    inside = last < keys
    if not causal:
        return inside.expand(rows, columns)
    first = keys - queries + torch.arange(rows, device=device) * block
    return inside & (last <= first[:, None])


def own(queries: int, keys: int, block: int, *, device: Any = None) -> Tensor:
    """The blocks that hold a block of queries' own positions, the diagonal: bool ``[nQ, nK]``.

    One block where the queries begin at a multiple of ``block``, else two.
    """
    rows, columns = count_blocks(queries, block), count_blocks(keys, block)
    first = keys - queries + torch.arange(rows, device=device)[:, None] * block
    last = (first + block - 1).clamp(max=keys - 1)
    begin = torch.arange(columns, device=device) * block
    return (begin <= last) & (begin + block > first)


def of_mask(mask: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Blocks in which a mask, bool ``[B or 1, H or 1, T, S]``, lets any pair through, and those where it lets all.

    Both bool ``[B or 1, H or 1, nQ, nK]``; a block of keys that the end cuts short does not count as one with all.
    """
    rows, columns = (count_blocks(n, block) for n in mask.shape[2:])
    short = rows * block - mask.shape[2], columns * block - mask.shape[3]
    tiles = torch.nn.functional.pad(mask, (0, short[1])).unflatten(3, (columns, block))
    some, every = (torch.nn.functional.pad(x, (0, 0, 0, short[0]), value=fill).unflatten(2, (rows, block))
                   for x, fill in ((tiles.any(4), False), (tiles.all(4), True)))  # fmt: skip
    return some.any(3), every.all(3)


def tokens(keep: Tensor, queries: int, keys: int, block: int) -> Tensor:
    """A map of blocks as a map of tokens: bool ``[..., T, S]``."""
    return keep.repeat_interleave(block, -2)[..., :queries, :].repeat_interleave(block, -1)[..., :keys]


def density(keep: Tensor, queries: int, keys: int, block: int, *, causal: bool = True) -> Tensor:
    """Visited blocks over those that the predicate lets through, per batch and head: fp32 ``[B, H]``."""
    allowed = possible(queries, keys, block, causal=causal, device=keep.device)
    return (keep & allowed).sum((-2, -1)) / allowed.sum()


def from_block_mask(mask: Any, queries: int, keys: int) -> BlockLists:
    """The lists of a PyTorch ``BlockMask``.

    Raises
    ------
    BlockError
        If its blocks are not square, or if it was made for other lengths.
    """
    rows, columns = mask.BLOCK_SIZE
    if rows != columns:
        raise BlockError(f"a BlockMask with blocks of {rows} queries and {columns} keys; expected square ones.")
    if tuple(mask.seq_lengths) != (queries, keys):
        raise BlockError(
            f"a BlockMask for {tuple(mask.seq_lengths)} queries and keys; this call has {queries}, {keys}."
        )
    return BlockLists(mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices, int(rows))
