"""Ranges: which runs of keys each query sees, token by token, where a structure is known and not chosen.

int32 ``[B or 1, H or 1, T, R, 2]``: for each query ``R`` pairs ``(start, length)``, in ascending order and without
overlap; a length of 0 is no range. They take ``8 * R`` bytes a query, where a mask takes a byte for each key. No shape
depends on data, since ``R`` is given.

Attention visits them as block lists (:func:`lists`): a block of keys that all queries of a block see whole is full, and
in the others ``attend_blocks`` tests each key by the ranges of its query. So block lists stay the one way in which a
kernel walks over keys, blocks of a packed store begin at its groups, and heads that share a block read it once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from effcompile.kernels import blocks
from effcompile.kernels.blocks import BlockError, BlockLists
from effcompile.kernels.columns import gathered

SLAB = 1 << 24
"""Pairs of a query and a block of keys that are looked at together: 64 MiB."""


def window(queries: int, keys: int, tokens: int, sink: int = 0, *, device: torch.device | None = None) -> Tensor:
    """The nearest ``tokens`` of each query, itself included, and the first ``sink``: ``[1, 1, T, 2, 2]``.

    Longformer (Beltagy et al., 2020), section 3.1; with a sink StreamingLLM (Xiao et al., ICLR 2024), section 3.

    >>> window(2, 6, 3, 2)[0, 0].tolist()
    [[[0, 2], [2, 3]], [[0, 2], [3, 3]]]
    """
    position = torch.arange(keys - queries, keys, device=device)
    start = (position - tokens + 1).clamp(min=0)
    head = start.clamp(max=sink)
    pairs = torch.zeros_like(head), head, start, position - start + 1
    made: Tensor = torch.stack(pairs, -1).unflatten(-1, (2, 2)).int()
    return made[None, None]


def sequences(lengths: Tensor, total: int) -> Tensor:
    """What causal queries of packed sequences see: ``[B or 1, 1, T, 1, 2]`` for ``total`` tokens.

    ``lengths`` are whole numbers ``[B or 1, n]``. Tokens behind the last sequence see themselves.

    >>> sequences(torch.tensor([[2, 1]]), 4)[0, 0, :, 0].tolist()
    [[0, 1], [0, 2], [2, 1], [3, 1]]
    """
    ends = lengths.long().cumsum(1)
    numbers = torch.arange(total, device=lengths.device).expand(len(lengths), -1).contiguous()
    begins = pad(ends, (1, 0))
    start = begins.gather(1, torch.searchsorted(ends, numbers, right=True))
    start = torch.where(numbers < ends[:, -1:], start, numbers)
    return torch.stack([start, numbers - start + 1], -1).int()[:, None, :, None]


def of_mask(mask: Tensor) -> Tensor:
    """The ranges of a mask, bool ``[B or 1, H or 1, T, S]``, as many as its row with the most: asks the host for that.

    >>> of_mask(torch.tensor([[[[1, 1, 0, 1], [0, 0, 0, 0]]]]).bool())[0, 0].tolist()
    [[[0, 2], [3, 1]], [[0, 0], [0, 0]]]
    """
    edges = pad(mask.int(), (1, 1)).diff(dim=-1)
    begins, ends = edges == 1, edges == -1
    most = int(begins.sum(-1).max())
    numbers = torch.arange(edges.shape[-1], device=mask.device)
    first, last = (gathered(numbers, x)[0][..., :most] for x in (begins, ends))
    return torch.stack([first, last - first], -1)


def tokens(ranges: Tensor, keys: int) -> Tensor:
    """The ranges as a map of pairs: bool ``[B or 1, H or 1, T, keys]``."""
    step = torch.zeros(*ranges.shape[:3], keys + 1, dtype=torch.int32, device=ranges.device)
    start, length = ranges.long().unbind(-1)
    for at, sign in ((start, 1), (start + length, -1)):
        step.scatter_add_(-1, at.clamp(0, keys), torch.where(length > 0, sign, 0).int())
    return step.cumsum(-1)[..., :keys] > 0


def of_blocks(ranges: Tensor, keys: int, block: int) -> tuple[Tensor, Tensor]:
    """Blocks of which any query of a block sees any key, and those of which all see all: bool ``[..., nQ, nK]`` both.

    As :func:`effcompile.kernels.blocks.of_mask` of :func:`tokens`, without a map of pairs.
    """
    count = blocks.count_blocks(keys, block)
    begin = torch.arange(count, device=ranges.device, dtype=torch.int32) * block
    rows = pad(ranges, (0, 0, 0, 0, 0, -ranges.shape[2] % block)).unflatten(2, (-1, block))
    # A row that is not there sees nothing, and hides nothing either.
    there = torch.arange(rows.shape[2] * block, device=ranges.device).unflatten(0, (-1, block)) < ranges.shape[2]
    some, every = [], []
    at_once = max(1, SLAB // max(1, ranges.shape[0] * ranges.shape[1] * block * count))
    for first in range(0, rows.shape[2], at_once):
        start, length = rows[:, :, first : first + at_once].unsqueeze(-1).unbind(-2)
        held = torch.zeros(*start.shape[:4], count, dtype=torch.int32, device=ranges.device)
        for begins, long in zip(start.unbind(-2), length.unbind(-2), strict=True):
            last = torch.minimum(begins + long, begin + block)
            held = held + (last - torch.maximum(begins, begin)).clamp(min=0)
        some.append((held > 0).any(-2))
        every.append(((held == block) | ~there[first : first + at_once, :, None]).all(-2))
    return torch.cat(some, 2), torch.cat(every, 2)


def lists(ranges: Tensor, keys: int, block: int, *, causal: bool = True, tested: bool = False) -> BlockLists:
    """The blocks that ``ranges`` touch, and of these the full ones unless every pair is to be ``tested``.

    Pairs are tested where a predicate hides more than causality does, such as padding or a window.
    """
    queries = ranges.shape[2]
    some, every = of_blocks(ranges, keys, block)
    some = some & blocks.possible(queries, keys, block, causal=causal, device=ranges.device)
    whole = blocks.whole(queries, keys, block, causal=causal, device=ranges.device)
    return blocks.lists(some, None if tested else every & whole, block)


def check_shape(ranges: Tensor, query: Tensor) -> None:
    """Raise :class:`BlockError` unless ``ranges`` are for the queries of a call. Looks at shapes only."""
    sizes, (batch, heads, queries) = tuple(ranges.shape), query.shape[:3]
    fits = len(sizes) == 5 and sizes[0] in (1, batch) and sizes[1] in (1, heads) and sizes[2::2] == (queries, 2)
    if not fits or ranges.dtype is not torch.int32:
        raise BlockError(
            f"ranges are {ranges.dtype} of {sizes}; expected int32 of [{batch} or 1, {heads} or 1, {queries}, R, 2]."
        )


def check_ranges(ranges: Tensor, query: Tensor, keys: int) -> None:
    """Raise :class:`BlockError` unless ``ranges`` fit a call, ascend without overlap, and name keys that are there."""
    check_shape(ranges, query)
    start, length = ranges.unbind(-1)
    end = torch.where(length > 0, start + length, 0)
    behind = pad(end[..., :-1], (1, 0)).cummax(-1).values
    if bool(((length < 0) | (length > 0) & ((start < behind) | (start < 0) | (end > keys))).any()):
        raise BlockError(f"ranges do not ascend without overlap, or name a key that is not there; there are {keys}.")
