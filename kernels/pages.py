"""Pages of a store, from which each step of decoding chooses: their scores, and lists of them.

Page ``I`` holds the tokens ``[I * page, (I + 1) * page)``; ``nP = ceil(C / page)`` pages make a store of capacity
``C``, of which a step sees the first ``ceil(length / page)``, the last perhaps cut short. ``R = H / G`` query heads
share a key/value head.

A list is int32 ``[B, G or 1, K]`` with counts ``[B, G or 1]``; 1 stands for all heads. Lists ascend, and what lies
behind a count is not read. ``K`` is a number of the program, so no shape depends on data, and nothing here asks the
host.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from effcompile.kernels.blocks import count_blocks
from effcompile.kernels.form import KVForm

PAGE = 16
"""Tokens in a page in the papers."""

Kept = Literal["bounds", "moments"]
"""What a cache keeps of the keys of a page, channel by channel (:func:`summarise`)."""


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
    mass
        What attention to all keys found each page to be worth (:func:`mass`), fp32 ``[B, 1, nP]``, where that is known.
    bounds
        What the cache keeps of the keys in every unit of ``u`` tokens that is whole, where it does: their bounds or
        their moments (:func:`summarise`), in the model's dtype ``[B, G, C/u, 2, D]``; ``u`` divides pages.
    """

    query: Tensor
    keys: list[Tensor]
    length: Tensor
    key_mask: Tensor | None
    form: KVForm
    scale: float
    mass: Tensor | None = None
    bounds: Tensor | None = None

    @property
    def bounded(self) -> Tensor:
        """The first tokens whose keys have bounds, or moments: int64 0-d. On the device, as the length is."""
        if self.bounds is not None:
            unit = self.capacity // self.bounds.shape[2]
            return self.length // unit * unit
        return (self.length - self.form.residual).clamp(min=0) // self.form.group * self.form.group

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


def unit_of(form: KVForm) -> int:
    """``u``, the tokens whose keys a cache of ``form`` keeps bounds or moments for: what pages are multiples of."""
    return PAGE if form.dense else form.group


def summarise(units: Tensor, kind: Kept) -> Tensor:
    """What is kept of units of keys ``[..., u, D]``: two numbers for each channel, in their dtype ``[..., 2, D]``.

    ``"bounds"``: the least and the largest. ``"moments"``: the mean, and the standard deviation around it, of the ``u``
    keys as a whole (no sample, so ``u`` divides); a variance would leave the range of fp16.
    """
    if kind == "bounds":
        return torch.stack([units.amin(-2), units.amax(-2)], -2)
    deviation, mean = torch.std_mean(units.float(), -2, correction=0)
    return torch.stack([mean, deviation], -2).to(units.dtype)


def store_bounds(bounds: Tensor, rows: Tensor, length: int, key: Tensor, unit: int, kind: Kept) -> None:
    """Note in place the bounds or the moments of each channel in every unit that ``key`` makes whole.

    ``bounds`` ``[B, G, C/u, 2, D]``; ``key`` ``[B, G, T, D]``, which comes behind ``length`` tokens. ``rows`` is what
    the store holds in the model's dtype before it takes ``key``: all keys, or the ring of the newest. So what is kept
    of a unit follows from its tokens alone, however they came and whatever was removed meanwhile: while it is not whole
    nothing is kept of it but the tokens, which no crop takes from the ring (``CompressedLayer.removable``).
    """
    first, stop = length // unit, min((length + key.shape[2]) // unit, bounds.shape[2])
    if stop <= first:
        return
    old = torch.arange(first * unit, length, device=key.device) % rows.shape[2]
    whole = torch.cat([rows[:, :, old], key[:, :, : stop * unit - length]], 2).unflatten(2, (-1, unit))
    bounds[:, :, first:stop] = summarise(whole, kind)


def boxes(step: Step, page: int) -> tuple[Tensor, Tensor]:
    """The least and the largest of each channel of the keys in each page: fp32 ``[B, G, nP, D]``, two of them.

    Keys that are quantised along tokens carry them: of a group they are the zero, and the zero and all levels of the
    scale. They hold for the keys as attention reads them. :attr:`Step.bounds` hold for the keys as they were given.
    Behind :attr:`Step.bounded` they mean nothing.
    """
    if step.bounds is not None:
        low, high = step.bounds.float().unbind(3)
    else:
        scale, low = step.keys[1].float().unbind(3)
        high = scale * (2 ** step.form.bits("key") - 1) + low
    units = page * low.shape[2] // step.capacity
    least, most = (_paged(x.mT, units, fill) for x, fill in ((low, torch.inf), (high, -torch.inf)))
    return least.amin(-1).mT, most.amax(-1).mT


def bounds(step: Step, page: int, radius: float = 1.0) -> Tensor:
    """The score that no key of a page exceeds, for each query head: fp32 ``[B, G, R, nP]``.

    ``sum_d max(q_d * low_d, q_d * high_d)`` over :func:`boxes` (Quest, section 3.3). With a ``radius`` below 1 the
    boxes are so much smaller around their middles: no bound then, but nearer to the best score there is.
    """
    low, high = boxes(step, page)
    if radius < 1:
        low, high = low.lerp(high, (1 - radius) / 2), high.lerp(low, (1 - radius) / 2)
    query = _grouped(step)
    most: Tensor = query.clamp(min=0) @ high.mT + query.clamp(max=0) @ low.mT
    return most


def _grouped(step: Step) -> Tensor:
    """The query, scaled, by key/value heads: fp32 ``[B, G, R, D]``."""
    query: Tensor = (step.query.float() * step.scale).flatten(1, 2).unflatten(1, (step.keys[0].shape[1], -1))
    return query


def moments(step: Step, page: int) -> tuple[Tensor, Tensor]:
    """The mean and the variance of each channel of the keys in each page: fp32 ``[B, G, nP, D]``, two of them.

    Of several units in a page, which are equally long: the mean of their means, and the mean of their variances with
    the variance of their means. They hold for the keys as they were given, and mean nothing behind
    :attr:`Step.bounded`.
    """
    assert step.bounds is not None
    units = page * step.bounds.shape[2] // step.capacity
    means, deviations = (_paged(x.mT, units, 0) for x in step.bounds.float().unbind(3))
    mean = means.mean(-1, keepdim=True)
    variance = (deviations.square() + (means - mean).square()).mean(-1)
    return mean[..., 0].mT, variance.mT


def likely(step: Step, page: int, deviations: float) -> Tensor:
    """About the best score in a page, for each query head: fp32 ``[B, G, R, nP]``.

    ``q . mean + deviations * sqrt(sum_d q_d^2 variance_d)`` over :func:`moments`: the mean of the scores, which is
    exact, and so many standard deviations, as they would be if channels did not depend on each other.
    """
    mean, variance = moments(step, page)
    query = _grouped(step)
    best: Tensor = query @ mean.mT + deviations * (query.square() @ variance.mT).sqrt()
    return best


def mass(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    scale: float,
    page: int,
    capacity: int,
    there: Tensor | None = None,
) -> Tensor:
    """The softmax of the scores, its largest value over all query heads, summed in pages: fp32 ``[B, 1, nP]``.

    ``query`` ``[B, H, 1, D]``, ``key`` ``[B, G, S, D]``, ``key_mask`` as in :class:`Step`; ``there`` bool ``[S]``, for
    keys that are room only in part. A sum over all pages lies between 1 and ``H`` (DELTA, section 3).
    """
    tokens = key.shape[2]
    grouped = (query.float() * scale).flatten(1, 2).unflatten(1, (key.shape[1], -1))
    logits = grouped @ key.float().mT
    if there is not None:
        logits = logits.masked_fill(~there, -torch.inf)
    if key_mask is not None:
        mask = key_mask[:, None, None, :tokens]
        logits = logits.masked_fill(~functional.pad(mask, (0, tokens - mask.shape[3])), -torch.inf)
    lse = logits.logsumexp(-1, keepdim=True)
    # A row of a batch that sees no key has weights of 0.
    best = (logits - lse.masked_fill(lse == -torch.inf, 0)).exp().amax((1, 2)).unsqueeze(1)
    return _paged(functional.pad(best, (0, capacity - tokens)), page, 0).sum(-1)


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
