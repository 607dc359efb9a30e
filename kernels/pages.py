"""Pages of a store, from which each step of decoding chooses: their scores, and lists of them.

Page ``I`` holds the tokens ``[I * page, (I + 1) * page)``; ``nP = ceil(C / page)`` pages make a store of capacity
``C``, of which a step sees the first ``ceil(length / page)``, the last perhaps cut short. ``R = H / G`` query heads
share a key/value head.

A list is int32 ``[B, G or 1, K]`` with counts ``[B, G or 1]``; 1 stands for all heads. Lists ascend, and what lies
behind a count is not read. ``K`` is a number of the program, so no shape depends on data, and nothing here waits for
a device: on CPUs :func:`mass` reads the keys that there are, elsewhere all that there is room for.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from effcompile.kernels import quantize
from effcompile.kernels.blocks import count_blocks
from effcompile.kernels.form import KVForm

PAGE = 16
"""Tokens in a page in the papers."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of decoding, as a method that chooses pages sees it.

    Parameters
    ----------
    query
        ``[B, H, 1, D]``, the newest token's.
    keys
        The buffers of the key side of a store of ``form``, that token's key included.
    length
        Tokens in the store, int64 0-d.
    key_mask
        Bool ``[B or 1, C or more]``, False where padding hides a key, or None.
    scale
        Of the scores.
    table
        The angles, if keys are kept before RoPE.
    lse
        Of this query's attention to all keys, fp32 ``[B, H, 1]``, where that is known.
    """

    query: Tensor
    keys: list[Tensor]
    length: Tensor
    key_mask: Tensor | None
    form: KVForm
    scale: float
    table: Tensor | None = None
    lse: Tensor | None = None

    @property
    def capacity(self) -> int:
        """``C``."""
        return self.keys[0].shape[2] * self.form.span("key")

    def present(self, page: int) -> Tensor:
        """Pages that hold a token which the query may see: bool ``[B or 1, 1, nP]``."""
        seen = torch.arange(self.capacity, device=self.length.device) < self.length
        if self.key_mask is not None:
            mask = self.key_mask[:, : self.capacity]
            seen = seen & functional.pad(mask, (0, self.capacity - mask.shape[1]))
        return _paged(seen.reshape(-1, 1, self.capacity), page, False).any(-1)

    def ends_after(self, page: int, token: Tensor) -> Tensor:
        """Pages whose end lies behind ``token``, a number of one: bool ``[nP]``."""
        return torch.arange(1, count_blocks(self.capacity, page) + 1, device=token.device) * page > token


def _paged(x: Tensor, page: int, fill: float) -> Tensor:
    """The last axis, tokens, as pages: ``[..., nP, page]``."""
    whole: Tensor = functional.pad(x, (0, -x.shape[-1] % page), value=fill)
    return whole.reshape(*x.shape[:-1], -1, page)


def boxes(step: Step, page: int) -> tuple[Tensor, Tensor]:
    """The least and the largest of each channel of the keys in each page: fp32 ``[B, G, nP, D]``, two of them.

    Keys that are quantised along tokens carry them: of a group they are the zero, and the zero and all levels of the
    scale. They hold for the keys as attention reads them; in pages that are not packed yet they mean nothing.
    """
    scale, zero = step.keys[1].float().unbind(3)
    ends = zero, scale * (2 ** step.form.bits("key") - 1) + zero
    groups = page // step.form.group
    low, high = (_paged(x.mT, groups, fill) for x, fill in zip(ends, (torch.inf, -torch.inf)))
    return low.amin(-1).mT, high.amax(-1).mT


def bounds(step: Step, page: int) -> Tensor:
    """The score that no key of a page exceeds, for each query head: fp32 ``[B, G, R, nP]``.

    ``sum_d max(q_d * low_d, q_d * high_d)`` over :func:`boxes` (Quest, section 3.3).
    """
    low, high = boxes(step, page)
    query = (step.query.float() * step.scale).flatten(1, 2).unflatten(1, (low.shape[1], -1))
    most: Tensor = query.clamp(min=0) @ high.mT + query.clamp(max=0) @ low.mT
    return most


def _on_host(length: Tensor) -> bool:
    """Whether asking for a number of ``length`` waits for nothing."""
    return length.device.type == "cpu"


def mass(step: Step, page: int) -> Tensor:
    """The softmax of the scores, its largest value over all query heads, summed in pages: fp32 ``[B, 1, nP]``.

    A sum over all pages lies between 1 and ``H`` (DELTA, section 3).
    """
    if _on_host(step.length):
        n = int(step.length)
        key = quantize.load_side(step.keys, n, step.form, "key", step.table).float()
        seen = torch.ones(n, dtype=torch.bool, device=key.device)
    else:
        n = step.capacity
        key = quantize.load_room(step.keys, step.length, step.form, "key", step.table).float()
        seen = torch.arange(n, device=key.device) < step.length
    query = (step.query.float() * step.scale).flatten(1, 2).unflatten(1, (key.shape[1], -1))
    if step.key_mask is not None:
        mask = step.key_mask[:, None, None, :n]
        seen = seen & functional.pad(mask, (0, n - mask.shape[3]))
    logits = (query @ key.mT).masked_fill(~seen, -torch.inf)
    lse = logits.logsumexp(-1) if step.lse is None else step.lse.reshape(logits.shape[:-1])
    # A row of a batch that sees no key has weights of exp(-inf - -inf); nothing of it is present, whatever they are.
    best = (logits - lse.unsqueeze(-1)).exp().amax((1, 2)).unsqueeze(1)
    return _paged(functional.pad(best, (0, step.capacity - n)), page, 0).sum(-1)


def take(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` best pages, ascending, and how many there are: int32 ``[..., K]`` and ``[...]``.

    ``scores`` is fp32 ``[..., nP]``: +inf for pages that are always visited, -inf for those that are never, of which
    none is listed even if ``count`` has room. ``K = min(count, nP)``. Ties go to the earlier page. A NaN comes right
    after what is always visited: what cannot be ranked is not dropped.
    """
    total = scores.shape[-1]
    scores = torch.where(scores.isnan(), torch.finfo(scores.dtype).max, scores)
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    there = scores.gather(-1, order) > -torch.inf
    pages = torch.where(there, order, total).sort(dim=-1).values
    return pages.to(torch.int32), there.sum(-1, dtype=torch.int32)
