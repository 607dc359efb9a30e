"""Operators behind a router's choice: fewer experts for a token, and how often each is used.

Shapes: ``E`` experts, ``k`` slots of a token; leading dimensions are tokens. Their bodies are traced into the graph in
which they stand, so Inductor fuses them with what is around them, and they have gradients.

``reroute(values, indices, weights, top_k, threshold, normalised, repeat) -> indices, weights, used``
    Of the experts that a router gave to a token, the ``top_k`` of largest ``values``, of those the fewest whose
    ``weights`` sum to at least ``threshold`` times the sum over the ``top_k``, largest first; from 1 on, all of them.
    The first of equal ones is taken. ``indices`` int64 ``[..., k]``; ``weights`` ``[..., k]``, not negative; ``values``
    ``[..., k]``, or None where the slots are in descending order already. The shapes stay: a slot that is not ``used``
    (bool ``[..., k]``) weighs 0 and keeps its expert, or with ``repeat`` takes the one that weighs most, so that no
    expert is read for nothing. If ``normalised``, the weights that are left are scaled to the sum there was. A token
    of which nothing is left out keeps its weights bit by bit. Computed in fp32, or fp64 for fp64.

``count_experts(counts, indices, used) -> ()``
    Adds to ``counts`` (int64 ``[E]``, written in place) how many slots of ``indices`` hold each expert, of those that
    are ``used``; all of them if it is None.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effcompile.kernels import ops

ops.library.define(
    "reroute(Tensor? values, Tensor indices, Tensor weights, int top_k, float threshold, bool normalised, bool repeat) "
    "-> (Tensor, Tensor, Tensor)"
)
ops.library.define("count_experts(Tensor(a!) counts, Tensor indices, Tensor? used) -> ()")


def reroute(
    values: Tensor | None,
    indices: Tensor,
    weights: Tensor,
    top_k: int,
    threshold: float,
    normalised: bool,
    repeat: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The meaning of ``reroute``. Raises ``ValueError`` if the shapes differ, or the options choose nothing."""
    if indices.shape != weights.shape or (values is not None and values.shape != indices.shape):
        raise ValueError(f"indices {tuple(indices.shape)} and weights {tuple(weights.shape)} are of different slots.")
    if not 1 <= top_k <= indices.shape[-1] or not threshold > 0:
        raise ValueError(f"top_k={top_k} of {indices.shape[-1]} slots, threshold={threshold}; both are more than 0.")
    wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
    place = torch.arange(indices.shape[-1], device=indices.device)
    rank = place if values is None else _ranks(values)
    used = (rank < top_k).expand_as(indices)
    if threshold < 1:
        ranked, order = wide.where(used, -1).sort(dim=-1, descending=True, stable=True)
        ranked = ranked.clamp(min=0)
        before = torch.nn.functional.pad(ranked.cumsum(-1)[..., :-1], (1, 0))
        # Compared so that NaN leaves nothing out; a token keeps one expert, whatever the weights.
        reached = (before >= threshold * ranked.sum(-1, keepdim=True)) & (place > 0)
        used = used & ~torch.zeros_like(used).scatter(-1, order, reached)
    left = wide.where(used, 0)
    if normalised:
        total = left.sum(-1, keepdim=True)
        scaled = left * (wide.sum(-1, keepdim=True) / total).where(total > 0, 1)
        left = left.where(used.all(-1, keepdim=True), scaled)
    best = indices.gather(-1, left.argmax(-1, keepdim=True)) if repeat else indices
    return indices.where(used, best), left.to(weights.dtype), used


def _ranks(values: Tensor) -> Tensor:
    """The place of each value among those of its row, the largest first."""
    order: Tensor = values.sort(dim=-1, descending=True, stable=True).indices
    return order.sort(-1).indices


def count_experts(counts: Tensor, indices: Tensor, used: Tensor | None) -> None:
    """The meaning of ``count_experts``."""
    one = torch.ones_like(indices, dtype=counts.dtype) if used is None else used.to(counts.dtype)
    counts.scatter_add_(0, indices.flatten(), one.flatten())


ops.library.impl("reroute", reroute, "CompositeImplicitAutograd")
ops.library.impl("count_experts", count_experts, "CompositeImplicitAutograd")
REROUTE, COUNT_EXPERTS = torch.ops.effcompile.reroute.default, torch.ops.effcompile.count_experts.default
