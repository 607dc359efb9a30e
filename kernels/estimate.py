"""What attention would look at, estimated from few products: the scores from which blocks are selected.

Two estimators serve every method. :func:`pooled` folds runs of queries and keys, multiplies the folds and pools to
blocks. :func:`probe` is the exact attention of the last queries. Both are in fp32, have no shape that depends on data
and never ask the host.

Padding is a bool ``key_mask`` ``[B, S]``: hidden keys have no weight, and folds of hidden tokens alone no row.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from effcompile.kernels.blocks import count_blocks

Fold = Literal["antidiagonal", "mean", "first"]
Pool = Literal["sum", "max"]

SLAB = 1 << 26
"""Scores in memory at a time, of all heads together: 256 MiB."""


def _folds(x: Tensor, stride: int, fold: Fold, valid: Tensor | None, *, reverse: bool) -> tuple[Tensor, Tensor | None]:
    """Runs of ``stride`` tokens of ``x`` ``[B, H, N, D]`` as one row each, and which runs hold a token.

    ``valid`` is bool ``[B, N]``, or None if all are. Tokens behind the end and hidden ones count as zeros; a mean is
    over the others.
    """
    batch, heads, count, size = x.shape
    runs = count_blocks(count, stride)
    behind = runs * stride - count
    x = x.float()
    if valid is not None:
        x = x * valid[:, None, :, None]
    if behind:
        x = functional.pad(x, (0, 0, 0, behind))
        valid = functional.pad(
            torch.ones(1, count, dtype=torch.bool, device=x.device) if valid is None else valid, (0, behind)
        )
    there = None if valid is None else valid.unflatten(1, (runs, stride))
    x = x.unflatten(2, (runs, stride))
    if fold == "antidiagonal":
        rows = (x.flip(3) if reverse else x).flatten(3)
    elif fold == "mean":
        rows = x.mean(3) if there is None else x.sum(3) / there.sum(2).clamp(min=1)[:, None, :, None]
    elif there is None:
        rows = x[:, :, :, 0]
    else:
        # The first token that is not hidden, so that a run which begins in padding has one too.
        first = there.int().argmax(2)[:, None, :, None, None].expand(batch, heads, runs, 1, size)
        rows = x.gather(3, first).squeeze(3)
    return rows, None if there is None else there.any(2)


def pooled(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    block: int,
    stride: int,
    fold: Fold = "antidiagonal",
    pool: Pool = "sum",
    causal: bool = True,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Scores of blocks from folded tokens: fp32 ``[B, H, nQ, nK]``.

    Runs of ``stride`` queries and keys are folded to one row each; the products of folds go through a softmax over the
    keys, and the weights of a block are pooled. A fold of keys counts if its first key is visible to the fold's last
    query. With ``stride == block`` the softmax is over blocks, and pooling does nothing.

    Parameters
    ----------
    query, key
        ``[B, H, T, D]`` and ``[B, G, S, D]``, ``H`` a multiple of ``G``.
    fold
        ``antidiagonal``: the sum of the products of query ``j`` and key ``stride - 1 - j`` of a run, over ``stride``
        (XAttention, section 2.1). ``mean``: of the run's tokens. ``first``: the run's first token alone.
    """
    batch, heads, queries, _ = query.shape
    groups, keys = key.shape[1], key.shape[2]
    valid = None if key_mask is None else key_mask[:, :keys].expand(batch, keys)
    q, q_there = _folds(query, stride, fold, None if valid is None else valid[:, keys - queries :], reverse=False)
    # Which of the two is reversed makes no difference to an antidiagonal; there are fewer keys.
    k, k_there = _folds(key, stride, fold, valid, reverse=True)
    if fold == "antidiagonal":
        scale = scale / stride
    q = q.unflatten(1, (groups, heads // groups))
    k = k.unsqueeze(2).transpose(3, 4)
    per = block // stride
    rows, columns = count_blocks(queries, block), count_blocks(keys, block)
    begin = torch.arange(k.shape[-1], device=key.device) * stride
    out = query.new_empty(batch, groups, heads // groups, rows, columns, dtype=torch.float32)
    step = max(1, SLAB // max(1, batch * heads * k.shape[-1] * per))
    for first in range(0, rows, step):
        part = slice(first * per, min(rows, first + step) * per)
        logits = (q[..., part, :] @ k).mul_(scale)
        seen = torch.ones(1, 1, dtype=torch.bool, device=key.device)
        if causal:
            last = keys - queries + (torch.arange(q.shape[-2], device=key.device)[part] + 1) * stride - 1
            seen = begin <= last[:, None]
        if k_there is not None:
            seen = seen & k_there[:, None, None, None, :]
        # A row that sees nothing would be NaN; it gets no weights, as a fold of padding alone.
        there = seen.any(-1, keepdim=True)
        if q_there is not None:
            there = there & q_there[:, None, None, part, None]
        weights = logits.masked_fill_(~seen, -torch.inf).softmax(-1).masked_fill_(~there, 0)
        short = (0, columns * per - weights.shape[-1], 0, -weights.shape[-2] % per)
        tiles = functional.pad(weights, short).unflatten(-1, (columns, per)).unflatten(-3, (-1, per))
        out[..., first : first + step, :] = tiles.sum((-3, -1)) if pool == "sum" else tiles.amax((-3, -1))
    return out.flatten(1, 2)


def probe(
    query: Tensor, key: Tensor, *, scale: float, rows: int, causal: bool = True, key_mask: Tensor | None = None
) -> Tensor:
    """Exact attention weights of the last ``rows`` queries: fp32 ``[B, H, min(rows, T), S]``.

    Rows of padding, and rows that may see no key, have no weights.
    """
    _, heads, queries, _ = query.shape
    groups, keys = key.shape[1], key.shape[2]
    rows = min(rows, queries)
    q = (query[:, :, queries - rows :].float() * scale).unflatten(1, (groups, heads // groups))
    logits = q @ key.float().unsqueeze(2).transpose(3, 4)
    position = torch.arange(keys - rows, keys, device=key.device)
    seen = torch.ones(1, 1, 1, 1, keys, dtype=torch.bool, device=key.device)
    if causal:
        seen = seen & (torch.arange(keys, device=key.device) <= position[:, None])
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, None, :keys] & key_mask[:, None, None, keys - rows : keys, None]
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.where(seen.any(-1, keepdim=True), weights, 0).flatten(1, 2)


def products(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Logits of queries ``[B, H, T, D]`` and keys ``[B, G, S, D]``: fp32 ``[B, H, T, S]``."""
    q = (query.float() * scale).unflatten(1, (key.shape[1], -1))
    logits: Tensor = (q @ key.float().unsqueeze(2).mT).flatten(1, 2)
    return logits


def block_means(x: Tensor, block: int, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Means of blocks of tokens of ``x`` ``[B, H, N, D]``: fp32 ``[B, H, ceil(N / block), D]``.

    Only tokens that are there count, of a last block cut short and where ``valid``, bool ``[B, N]``, is given. Also
    says which blocks hold one, bool ``[B or 1, ceil(N / block)]``; None if all do.
    """
    return _folds(x, block, "mean", valid, reverse=False)


def block_sums(x: Tensor, block: int) -> Tensor:
    """Sums of blocks of the last axis, the last of which may be cut short: ``[..., ceil(N / block)]``."""
    short = -x.shape[-1] % block
    sums: Tensor = functional.pad(x, (0, short)).unflatten(-1, (-1, block)).sum(-1)
    return sums
