"""Single keys that attention visits besides blocks, and keys that stand elsewhere than their slots say.

*Columns* are numbers of keys, ascending and each once: int32 ``[B or 1, H or 1, nR, C]`` with counts
``[B or 1, H or 1, nR]``. List ``r`` serves the query blocks ``[r * span, (r + 1) * span)``, so
``nR = ceil(nQ / span)``. What lies behind a count is not read. A column is tested against the predicate, as a partial
block is, and must not lie in a block that one of these query blocks visits: its keys would count twice.

*Key positions* say which token a slot of the store holds, int32 or int64 ``[B or 1, G or 1, S]``: the predicate is
tested by these in place of the slots, in every block that is not listed as full.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effcompile.kernels.blocks import BlockError, count_blocks


def gathered(numbers: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The ``numbers`` that are kept, in their order: int32 ``[..., n]``, and how many: int32 ``[...]``.

    ``numbers`` is broadcastable to ``keep``, bool ``[..., n]``. No size depends on data; zeros lie behind a count.
    """
    width = keep.shape[-1]
    place = torch.where(keep, keep.cumsum(-1) - 1, width)
    out = torch.zeros(*keep.shape[:-1], width + 1, dtype=torch.int32, device=keep.device)
    out.scatter_(-1, place, numbers.to(torch.int32).expand_as(keep))
    return out[..., :width].contiguous(), keep.sum(-1, dtype=torch.int32)


def listed(columns: Tensor, counts: Tensor, keys: int) -> Tensor:
    """Which keys are columns: bool ``[..., nR, keys]``.

    Raises
    ------
    BlockError
        If a list does not ascend, or names a key that is not there.
    """
    used = torch.arange(columns.shape[-1], device=columns.device) < counts.unsqueeze(-1)
    falls = (columns[..., 1:] <= columns[..., :-1]) & used[..., 1:]
    if bool(((counts < 0) | (counts > columns.shape[-1])).any() | ((columns < 0) | (columns >= keys))[used].any()):
        raise BlockError(f"a list of columns names a key that is not there; there are {keys}.")
    if bool(falls.any()):
        raise BlockError("a list of columns does not ascend.")
    keep = torch.zeros(*columns.shape[:-1], keys + 1, dtype=torch.bool, device=columns.device)
    return keep.scatter(-1, torch.where(used, columns.long(), keys), True)[..., :keys]


def check_columns(columns: Tensor, counts: Tensor, span: int, queries: int, block: int) -> None:
    """Raise :class:`BlockError` if lists of columns are for other lengths than the call. Looks at shapes only."""
    rows = count_blocks(count_blocks(queries, block), span) if span > 0 else 0
    if columns.ndim != 4 or counts.shape != columns.shape[:3] or counts.shape[2] != rows:
        raise BlockError(
            f"columns {tuple(columns.shape)} and their counts {tuple(counts.shape)} are not {rows} lists, one for each "
            f"{span} blocks of {block} queries of {queries}."
        )
    if columns.dtype is not torch.int32 or counts.dtype is not torch.int32:
        raise BlockError(f"columns and their counts are int32; these are {columns.dtype} and {counts.dtype}.")


def steps_of(lists: Tensor, batch: int, heads: int) -> tuple[int, int]:
    """Elements of ``lists`` ``[B or 1, H or 1, n]`` from one batch entry and head to the next; 0 where one is for all.

    Raises :class:`BlockError` for lists of other batch entries or heads.
    """
    if lists.shape[0] not in (1, batch) or lists.shape[1] not in (1, heads):
        raise BlockError(f"lists for {tuple(lists.shape[:2])} batch entries and heads; the call has {batch}, {heads}.")
    per_head, per_entry = lists.shape[2], lists.shape[1] * lists.shape[2]
    return (per_entry if lists.shape[0] > 1 else 0, per_head if lists.shape[1] > 1 else 0)


def check_positions(positions: Tensor, batch: int, groups: int, keys: int) -> None:
    """Raise :class:`BlockError` if key positions do not fit the call, or are of tokens that are not there."""
    fits = positions.ndim == 3 and positions.shape[0] in (1, batch) and positions.shape[1] in (1, groups)
    if not fits or positions.shape[2] != keys or positions.dtype not in (torch.int32, torch.int64):
        raise BlockError(
            f"key positions {tuple(positions.shape)} in {positions.dtype}; expected whole numbers "
            f"[{batch} or 1, {groups} or 1, {keys}]."
        )
    low, high = positions.aminmax()
    if bool((low < 0) | (high >= keys)):
        raise BlockError(f"key positions from {int(low)} to {int(high)}; there are {keys} tokens.")


def blocks_at(positions: Tensor, queries: int, block: int, heads: int) -> tuple[Tensor, Tensor]:
    """Blocks of slots in which causality lets any pair, and every pair, through: bool ``[B or 1, heads, nQ, nK]`` both.

    As :func:`effcompile.kernels.blocks.possible` and ``whole``, for keys at ``positions``, ``[B or 1, G or 1, S]``.
    """
    keys = positions.shape[2]
    # Slots that are not there stand behind everything: a block which the end cuts short is never whole.
    behind = count_blocks(keys, block) * block - keys
    tiles = torch.nn.functional.pad(positions, (0, behind), value=keys).unflatten(2, (-1, block))
    low, high = (x.repeat_interleave(heads // x.shape[1], 1).unsqueeze(2) for x in (tiles.amin(3), tiles.amax(3)))
    rows = torch.arange(count_blocks(queries, block), device=positions.device)[:, None]
    first = keys - queries + rows * block
    return low <= (first + block - 1).clamp(max=keys - 1), high <= first
