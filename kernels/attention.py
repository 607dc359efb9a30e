"""Reference body of attention over a store: the meaning of ``effcompile::attend``, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from effcompile.kernels.program import Predicate


def allowed(
    predicate: Predicate,
    queries: int,
    length: int,
    key_mask: Tensor | None,
    device: torch.device,
    segments: Tensor | None = None,
    prefix: Tensor | None = None,
) -> Tensor:
    """Which keys each query may see: bool ``[B or 1, 1, T, S]`` with ``S = length``.

    Query ``i`` stands at position ``length - T + i``: the queries are the last tokens of the store.
    """
    key = torch.arange(length, device=device)
    position = torch.arange(length - queries, length, device=device)[:, None]
    keep = torch.ones(queries, length, dtype=torch.bool, device=device)
    if predicate.causal:
        keep &= key <= position
    if predicate.window is not None:
        keep &= key > position - predicate.window
    keep = keep[None, None]
    if prefix is not None:
        keep = keep | (key < prefix[:, None, None, None])
    if segments is not None:
        keep = keep & (segments[:, None, position] == segments[:, None, None, :length])
    if key_mask is not None:
        keep = keep & key_mask[:, None, None, :length]
    return keep


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    scale: float,
    *,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention with grouped heads, in fp32.

    ``query`` ``[B, H, T, D]``, ``key`` ``[B, G, S, D]``, ``value`` ``[B, G, S, E]``, ``keep`` bool
    ``[B or 1, H or 1, T, S]``. Returns ``o`` ``[B, H, T, E]`` in the query's dtype and ``lse`` ``[B, H, T]`` fp32, the
    natural logarithm of the sum of exponentials. A row that may see no key gives 0 and -inf.

    The parts of :class:`~effcompile.kernels.program.ScoreParts`, in the order in which models apply them: scores are
    scaled, then ``softcap * tanh(score / softcap)``, then ``bias`` float ``[B or 1, H or 1, T or 1, S or more]`` is
    added, then the predicate hides keys. ``sinks`` float ``[H]`` are one more logit of each row, after everything else
    and never hidden; ``lse`` includes it, so a row that sees no key gives 0 and its sink.
    """
    batch, heads, rows, size = query.shape
    groups = key.shape[1]
    q = query.float().reshape(batch, groups, heads // groups, rows, size)
    scores = torch.einsum("bgrtd,bgsd->bgrts", q, key.float()) * scale
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if bias is not None:
        wide = bias[..., : key.shape[2]].float().expand(batch, heads, rows, -1)
        scores = scores + wide.unflatten(1, (groups, -1))
    per_head = keep.shape[1] != 1
    keep = keep.unflatten(1, (groups, heads // groups)) if per_head else keep.unsqueeze(2)
    scores = scores.masked_fill(~keep, float("-inf"))
    lse = scores.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.float().reshape(1, groups, -1, 1))
    # exp(-inf - -inf) would be nan: a row without keys gets weight 0 everywhere.
    weights = (scores - torch.where(lse.isinf(), torch.zeros_like(lse), lse).unsqueeze(-1)).exp()
    out = torch.einsum("bgrts,bgse->bgrte", weights, value.float())
    return out.reshape(batch, heads, rows, -1).to(query.dtype), lse.reshape(batch, heads, rows)


def merge_state(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from attention over each.

    Milakov and Gimelshein (2018), section 3: softmax is associative in this form, so any split of the keys in any
    order gives the whole. Elementwise, in fp32; a row that saw no key on one side, 0 and -inf, is the other side.

    Parameters
    ----------
    out, other
        ``[B, H, T, E]``, as ``attend`` and ``attend_blocks`` give them.
    lse, other_lse
        ``[B, H, T]`` fp32. Sinks belong to one of the two calls only, as their mass would count twice.

    Returns
    -------
    tuple
        ``out`` in the dtype of the first, and ``lse`` in fp32.

    >>> one, two = (torch.full((1, 1, 1, 2), x) for x in (1.0, 3.0))
    >>> same, nothing = torch.zeros(1, 1, 1), torch.full((1, 1, 1), -torch.inf)
    >>> merge_state(one, same, two, same)[0].flatten().tolist()
    [2.0, 2.0]
    >>> merge_state(one, same, torch.zeros_like(two), nothing)[0].flatten().tolist()
    [1.0, 1.0]
    """
    # Equal ones, which two infinities are as well, have no difference that says more.
    apart = torch.where(lse == other_lse, 0.0, lse - other_lse)
    first, second = (x.sigmoid().unsqueeze(-1) for x in (apart, -apart))
    merged = out.float() * first + other.float() * second
    return merged.to(out.dtype), torch.logaddexp(lse, other_lse)
