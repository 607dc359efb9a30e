"""Gradients through a choice, for training a router: ReinMax and SparseMixer.

A router draws an expert, and a draw has no derivative. Both estimate that of the expected loss from the one expert that
was drawn, as straight-through does, but right to a higher order; forward and backward cost as much.

ReinMax: Bridging Discrete and Backpropagation: Straight-Through and Beyond (Liu et al., NeurIPS 2023, 2304.08612).
SparseMixer: Sparse Backpropagation for MoE Training (Liu et al., 2023, arXiv 2310.00811), and its second version, which
GRIN trains with (Liu et al., 2024, arXiv 2409.12136).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _jacobian(p: Tensor, g: Tensor) -> Tensor:
    """What the softmax whose result is ``p`` makes of the gradient ``g``: ``(diag(p) - p p^T) g``."""
    product = p * g
    return product - p * product.sum(-1, keepdim=True)


class ReinMaxFunction(torch.autograd.Function):
    """``(logits, sample, tau) -> (one_hot, p)``; see :func:`reinmax`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, sample: Tensor, tau: float) -> tuple[Tensor, Tensor]:
        """The draw as ones and zeros, and the probabilities."""
        p = logits.softmax(-1)
        one_hot = torch.zeros_like(p).scatter(-1, sample.unsqueeze(-1), 1)
        # Half way from the distribution to what was drawn: where the trapezoid's second slope is taken.
        half = ((p if tau == 1 else (logits / tau).softmax(-1)) + one_hot) / 2
        ctx.save_for_backward(p, half)
        return one_hot, p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_one_hot: Tensor, grad_p: Tensor) -> tuple[Tensor, None, None]:
        """Twice the slope half way, less half the slope at the beginning."""
        p, half = ctx.saved_tensors
        return _jacobian(half, 2 * grad_one_hot) + _jacobian(p, grad_p - grad_one_hot / 2), None, None


def reinmax(
    logits: Tensor, tau: float = 1.0, *, sample: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw from ``softmax(logits)``, with a gradient that is right to second order.

    On average over the draws the gradient is that of the expected loss, exactly so for a loss that is quadratic in the
    result (Heun's method); straight-through is exact for a linear one only.

    Parameters
    ----------
    logits
        ``[..., E]``, of a floating dtype.
    tau
        Temperature of the distribution that the gradient looks at, 1 or more; more is less noise and more bias.
    sample
        int64 ``[...]``, what was drawn; None draws.
    generator
        To draw with.

    Returns
    -------
    tuple[Tensor, Tensor]
        The draw as ones and zeros, and ``softmax(logits)``, both ``[..., E]`` in the dtype of ``logits``.

    Raises
    ------
    ValueError
        For ``tau`` below 1, or a ``sample`` of another shape.

    Examples
    --------
    >>> logits = torch.tensor([[0.0, 1.0]], requires_grad=True)
    >>> one_hot, p = reinmax(logits, sample=torch.tensor([1]))
    >>> (one_hot * torch.tensor([3.0, 2.0])).sum().backward()
    >>> one_hot.detach(), bool(logits.grad.sum().abs() < 1e-6)
    (tensor([[0., 1.]]), True)
    """
    if not tau >= 1:
        raise ValueError(f"tau={tau!r}; expected 1 or more (temperatures below 1 are for the Gumbel softmax).")
    if sample is None:
        sample = _draw(logits.detach(), generator)
    elif sample.shape != logits.shape[:-1]:
        raise ValueError(f"sample is {tuple(sample.shape)}, and should be {tuple(logits.shape[:-1])}.")
    made: tuple[Tensor, Tensor] = ReinMaxFunction.apply(logits, sample, float(tau))  # type: ignore[no-untyped-call]
    return made


class SparseMixerFunction(torch.autograd.Function):
    """``(multiplier, share, gain) -> multiplier * share``, the gradient times ``gain``; see :func:`sparsemixer`."""

    @staticmethod
    def forward(ctx: Any, multiplier: Tensor, share: Tensor, gain: float) -> Tensor:
        """What stands of the multiplier."""
        ctx.gain = gain
        return multiplier * share

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """As if all of it stood, times the gain."""
        return grad * ctx.gain, None, None


_RULES = {2: (1 / 2, 1 / 2, 2.0), 3: (1 / 4, 1 / 3, 1.0)}
"""By order: the chance that the whole multiplier stands, what of it stands otherwise, and what the gradient is times.

``f(1) - f(0)`` is ``f'(1/2)`` up to second order (mid-point), and ``f'(1) / 4 + 3 f'(1/3) / 4`` up to third (Heun).
"""


def sparsemixer(
    logits: Tensor,
    *,
    top_k: int = 1,
    jitter: float = 0.1,
    order: Literal[2, 3] = 2,
    training: bool = True,
    sample: Tensor | None = None,
    whole: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw the experts of each token, with multipliers whose gradient tells the router what the others would have done.

    The expert's output is to be multiplied with its multiplier, so that a multiplier of 0 is the output without it. The
    loss there is what a choice is judged against, and the slope between there and here says how much is lost: that is
    why a part of the tokens runs on a part of the multiplier. The most likely expert always has all of its own, which
    is what the model is run with later.

    Parameters
    ----------
    logits
        ``[..., E]``, of a floating dtype.
    top_k
        Experts of a token, drawn one after another without putting back.
    jitter
        Experts are drawn only whose logit is within ``2 * jitter`` of the largest, relative to the larger of that and
        their own size.
    order
        2: the mid-point rule, and the multiplier's own gradient besides (SparseMixer). 3: Heun's third-order rule for
        the choice alone (its second version).
    training
        False takes the largest logits, with their probabilities.
    sample
        int64 ``[..., top_k]``, what was drawn; None draws.
    whole
        bool ``[..., top_k]``, where the whole multiplier stands besides the most likely experts; None draws.
    generator
        To draw with.

    Returns
    -------
    tuple[Tensor, Tensor]
        The experts, int64, and their multipliers in the dtype of ``logits``, both ``[..., top_k]``.

    Raises
    ------
    ValueError
        For values that are not possible, or tensors of another shape.

    Notes
    -----
    The first version multiplies the output with a learned vector besides (``omega``, ones at first), which is a
    parameter of the model and no part of this. The official code has ``top_k`` 1, and 1 or 2 in its second version.

    Examples
    --------
    >>> sample, multiplier = sparsemixer(torch.tensor([[1.0, 2.0, 2.1]]), training=False)
    >>> sample.tolist(), round(multiplier.item(), 3)  # the first is too far behind to be drawn
    ([[2]], 0.525)
    """
    if order not in _RULES or not 1 <= top_k <= logits.shape[-1] or jitter < 0:
        raise ValueError(
            f"order={order!r}, top_k={top_k!r}, jitter={jitter!r}; expected 2 or 3, 1 to {logits.shape[-1]}, 0 or more."
        )
    shape = (*logits.shape[:-1], top_k)
    for name, given in (("sample", sample), ("whole", whole)):
        if given is not None and given.shape != shape:
            raise ValueError(f"{name} is {tuple(given.shape)}, and should be {shape}.")
    chance, part, gain = _RULES[order]
    left, experts, multipliers = logits, [], []
    for k in range(top_k):
        with torch.no_grad():
            most, likely = left.max(-1, keepdim=True)
            far = (most - logits) / torch.maximum(logits.abs(), most) > 2 * jitter
        near = left.masked_fill(far, -torch.inf)
        expert = likely
        if training:
            expert = sample[..., k : k + 1] if sample is not None else _draw(near.detach(), generator).unsqueeze(-1)
        multiplier = near.softmax(-1).gather(-1, expert)
        if training:
            if whole is None:
                lucky = torch.rand(multiplier.shape, device=logits.device, generator=generator) < chance
            else:
                lucky = whole[..., k : k + 1]
            share = torch.full_like(multiplier, part).masked_fill(lucky | (expert == likely), 1)
            multiplier = SparseMixerFunction.apply(multiplier, share, gain)  # type: ignore[no-untyped-call]
        left = left.scatter(-1, expert, -torch.inf)
        experts.append(expert)
        multipliers.append(multiplier)
    return torch.cat(experts, -1), torch.cat(multipliers, -1)


def _draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """One index of each row ``[..., E]``, with the probabilities of its softmax: the largest under Gumbel noise.

    In fp32 at least: the noise of a narrow dtype has so few values that ties would decide.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (wide - torch.empty_like(wide).exponential_(generator=generator).log()).argmax(-1)
