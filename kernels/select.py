"""From scores of blocks to blocks: cumulative, top-k and global budgets, with sets that are always kept.

All functions take ``scores`` fp32 ``[B, H, nQ, nK]`` and ``possible`` bool broadcastable to it, and give bool of that
shape. Nothing is copied to the host and no shape depends on data. Ties go to the lower block. A row of scores with a
NaN keeps everything that is possible: what cannot be ranked is not dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _ranked(scores: Tensor, possible: Tensor, forced: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks in the order in which they are taken, forced ones first, and their scores in that order."""
    scores = torch.where(possible, scores, 0)
    key = torch.where(forced & possible, torch.inf, torch.where(possible, scores, -torch.inf))
    order = key.argsort(dim=-1, descending=True, stable=True)
    return order, scores.gather(-1, order)


def _back(taken: Tensor, order: Tensor) -> Tensor:
    """``taken``, which is in the order ``order``, by block."""
    return torch.zeros_like(taken).scatter(-1, order, taken)


def _number(x: float | Tensor, dtype: torch.dtype, like: Tensor) -> Tensor:
    """``x`` beside ``like``. A number is written there: ``torch.as_tensor`` would copy it, and wait for the copy."""
    return x.to(dtype) if isinstance(x, Tensor) else torch.full((), x, dtype=dtype, device=like.device)


def _safe(keep: Tensor, scores: Tensor, possible: Tensor) -> Tensor:
    unknown = (scores.isnan() & possible).any(-1, keepdim=True)
    return (keep | unknown) & possible


def cumulative(scores: Tensor, threshold: float | Tensor, possible: Tensor, forced: Tensor) -> Tensor:
    """The smallest set that holds ``threshold`` of a row's mass, counting what is ``forced``, which is always in it.

    A block is taken while the mass taken before it is less than ``threshold`` of the row's: the one that crosses is in.
    ``threshold >= 1`` takes every possible block, by definition, since sums of floats may stop short of 1.

    ``threshold`` is a number, or a tensor broadcastable to ``[B, H, nQ]``.
    """
    bound = _number(threshold, torch.float64, scores).unsqueeze(-1)
    order, ranked = _ranked(scores, possible, forced)
    ranked = ranked.double()
    before = ranked.cumsum(-1) - ranked
    keep = _back(before < bound * ranked.sum(-1, keepdim=True), order) | forced | (bound >= 1)
    return _safe(keep, scores, possible)


def top_k(scores: Tensor, count: int | Tensor, possible: Tensor, forced: Tensor) -> Tensor:
    """The ``count`` best blocks of a row, counting what is ``forced``, which is always in it.

    ``count`` is a number, or an integer tensor broadcastable to ``[B, H, nQ]``.
    """
    count = _number(count, torch.int64, scores).unsqueeze(-1)
    order, _ = _ranked(scores, possible, forced)
    rank = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return _safe(_back(rank < count, order) | forced, scores, possible)


def global_cumulative(scores: Tensor, threshold: float, possible: Tensor, forced: Tensor) -> Tensor:
    """One budget for all rows of a head: the best blocks of the whole map that hold ``threshold`` of its mass.

    The block that crosses is in. ``threshold >= 1`` takes every possible block.
    """
    flat = cumulative(
        scores.flatten(2).unsqueeze(2),
        threshold,
        possible.expand_as(scores).flatten(2).unsqueeze(2),
        torch.zeros((), dtype=torch.bool, device=scores.device),
    )
    keep = flat.squeeze(2).unflatten(2, scores.shape[2:]) | forced
    return _safe(keep, scores, possible)
