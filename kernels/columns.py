"""Single keys that attention visits besides blocks, and keys that stand elsewhere than their slots say.

*Columns* are numbers of keys, ascending and each once: int32 ``[B or 1, H or 1, nR, C]`` with counts
``[B or 1, H or 1, nR]``. List ``r`` serves the query blocks ``[r * span, (r + 1) * span)``, so
``nR = ceil(nQ / span)``. What lies behind a count is not read. A column is tested against the predicate, as a partial
block is, and must not lie in a block that one of these query blocks visits: its keys would count twice.

*Key positions* say which token a slot of the store holds, int32 or int64 ``[B or 1, G or 1, S]``: the predicate is
tested by these in place of the slots, in every block that is not listed as full. *Query positions*, ``[B or 1, H or 1,
T]``, say where queries stand, in place of the last tokens. With both, positions are any whole numbers, and several
queries or keys may share one: key ``j`` at ``k`` is visible to query ``i`` at ``q`` if ``k <= q``. A padding mask is
looked up by token, so with one key positions must be numbers of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effcompile.kernels.blocks import BlockError, count_blocks
from effcompile.kernels.program import Predicate

FAR = 1 << 40
"""Behind every position, which is of 32 bits."""


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


def check_positions(
    positions: Tensor, batch: int, heads: int, tokens: int, what: str = "key", anywhere: bool = False
) -> None:
    """Raise :class:`BlockError` if positions do not fit the call, or are of tokens that are not there.

    ``anywhere`` those of other tokens are taken too, as far as 32 bits reach.
    """
    fits = positions.ndim == 3 and positions.shape[0] in (1, batch) and positions.shape[1] in (1, heads)
    if not fits or positions.shape[2] != tokens or positions.dtype not in (torch.int32, torch.int64):
        raise BlockError(
            f"{what} positions {tuple(positions.shape)} in {positions.dtype}; expected whole numbers "
            f"[{batch} or 1, {heads} or 1, {tokens}]."
        )
    low, high = map(int, positions.aminmax())
    if low < (-(1 << 31) if anywhere else 0) or high >= (1 << 31 if anywhere else tokens):
        there = "they must fit into 32 bits" if anywhere else f"there are {tokens} tokens"
        raise BlockError(f"{what} positions from {low} to {high}; {there}.")


def check_both(
    keys_at: Tensor | None, queries_at: Tensor | None, sizes: tuple[int, ...], groups: int, keys: int, by_token: bool
) -> None:
    """Raise :class:`BlockError` if the positions of a call do not fit it; ``sizes`` are the query's.

    ``by_token`` something besides the predicate is looked up by key positions.
    """
    batch, heads, queries = sizes[:3]
    if keys_at is not None:
        check_positions(keys_at, batch, groups, keys, anywhere=queries_at is not None and not by_token)
    if queries_at is not None:
        check_positions(queries_at, batch, heads, queries, "query", anywhere=True)


def visible_at(
    predicate: Predicate,
    sizes: tuple[int, ...],
    groups: int,
    keys: int,
    key_mask: Tensor | None,
    keys_at: Tensor | None,
    queries_at: Tensor | None,
) -> Tensor:
    """What :func:`effcompile.kernels.attention.allowed` says, of tokens at these positions: bool ``[B, H, T, S]``.

    ``sizes`` are the query's; ``None`` are the positions of tokens in their order.
    """
    batch, heads, queries = sizes[:3]
    device = next(x.device for x in (keys_at, queries_at) if x is not None)
    key = torch.arange(keys, device=device)[None, None] if keys_at is None else keys_at.long()
    key = key.expand(batch, groups, -1).repeat_interleave(heads // groups, 1)
    query = torch.arange(keys - queries, keys, device=device)[None, None] if queries_at is None else queries_at.long()
    key_, query = key.unsqueeze(2), query.expand(batch, heads, -1).unsqueeze(3)
    keep = torch.ones(batch, heads, queries, keys, dtype=torch.bool, device=device)
    if predicate.causal:
        keep &= key_ <= query
    if predicate.window is not None:
        keep &= key_ > query - predicate.window
    if key_mask is not None:
        keep &= key_mask.bool()[:, None].expand(batch, heads, -1).gather(2, key).unsqueeze(2)
    return keep


def bias_at(bias: Tensor, positions: Tensor, sizes: tuple[int, ...], groups: int) -> Tensor:
    """A bias, which has a number for each token, for keys at ``positions``: ``[B, H, T or 1, S]``."""
    batch, heads = sizes[:2]
    at = positions.long().expand(batch, groups, -1).repeat_interleave(heads // groups, 1).unsqueeze(2)
    wide = bias.expand(batch, heads, -1, -1)
    return wide.gather(3, at.expand(-1, -1, wide.shape[2], -1))


def blocks_at(
    positions: Tensor, queries: int, block: int, heads: int, queries_at: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Blocks of slots in which causality lets any pair, and every pair, through: bool ``[B or 1, heads, nQ, nK]`` both.

    As :func:`effcompile.kernels.blocks.possible` and ``whole``, for keys at ``positions``, ``[B or 1, G or 1, S]``, and
    for queries that stand at ``queries_at``, ``[B or 1, H or 1, T]``, if not last.
    """
    keys = positions.shape[2]
    # Slots that are not there stand behind everything: a block which the end cuts short is never whole.
    behind = count_blocks(keys, block) * block - keys
    tiles = torch.nn.functional.pad(positions.long(), (0, behind), value=FAR).unflatten(2, (-1, block))
    low, high = (x.repeat_interleave(heads // x.shape[1], 1).unsqueeze(2) for x in (tiles.amin(3), tiles.amax(3)))
    rows = torch.arange(count_blocks(queries, block), device=positions.device)[:, None]
    if queries_at is not None:
        short = count_blocks(queries, block) * block - queries
        last, first = (
            torch.nn.functional.pad(queries_at.long(), (0, short), value=fill).unflatten(2, (-1, block))
            for fill in (-FAR, FAR)
        )
        return low <= last.amax(3).unsqueeze(3), high <= first.amin(3).unsqueeze(3)
    first = keys - queries + rows * block
    return low <= (first + block - 1).clamp(max=keys - 1), high <= first
