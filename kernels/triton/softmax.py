# mypy: ignore-errors
"""Scores to output: the predicate, the online softmax step, the merge of partial results.

Scores are kept in base 2 (``scale * log2(e)`` is applied to them), so that the exponential is one instruction.
"""

import triton
import triton.language as tl

HEADROOM = tl.constexpr(15.0)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def visible(keep, key, position, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """``keep [N]`` narrowed by the rule of :class:`effcompile.kernels.program.Predicate`: bool ``[M or 1, N]``."""
    seen = keep[None, :]
    if CAUSAL:
        seen = seen & (key[None, :] <= position[:, None])
    if WINDOW >= 0:
        seen = seen & (key[None, :] > position[:, None] - WINDOW)
    return seen


@triton.jit
def tanh(x):
    """Hyperbolic tangent in fp32 within four units in the last place.

    Near 0, where ``1 - 2 / (e^2x + 1)`` cancels, it is a polynomial, interpolated at Chebyshev points.
    """
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(size * 2.8853900817779268) + 1.0)
    y = x * x
    p = ((-0.0069470031 * y + 0.021472721) * y - 0.053933789) * y + 0.13333227
    near = x + x * (y * (p * y - 0.33333333))
    return tl.where(size < 0.5, near, tl.where(x < 0, -far, far))


@triton.jit
def add_bias(score, bias, place, key, keep):
    """``score [M, N]`` (base 2) plus the bias at ``place [M]`` of keys ``key [N]``, which is read for ``keep [N]``."""
    added = tl.load(bias + place[:, None] + key[None, :], mask=keep[None, :], other=0.0)
    return score + added * LOG2E


@triton.jit
def with_sink(peak, total, sink):
    """Peak and total with one more logit, what everything that was accumulated is then worth, and the logit's weight.

    The lse of attention to other keys is such a logit, whose value is their output.
    """
    sink = sink.to(tl.float32) * LOG2E
    top = tl.maximum(peak, sink)
    at = tl.where(top == float("-inf"), 0.0, top)
    share = tl.exp2(peak - at)
    weight = tl.exp2(sink - at)
    return top, total * share + weight, share, weight


@triton.jit
def softmax_step(score, peak, total):
    """One step of the online softmax over ``score [M, N]`` (base 2), given the running ``peak`` and ``total`` ``[M]``.

    Returns weights ``[M, N]``, the factor for what is already accumulated ``[M]``, and the new peak and total.
    """
    # The largest weight is 2**15 instead of 1, so that small ones are still normal numbers in fp16.
    top = tl.maximum(peak, tl.max(score, 1) - HEADROOM)
    # A row that has seen no key yet has top = -inf, and -inf - -inf would be nan: its weights are 0 instead.
    at = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(score - at[:, None])
    decay = tl.exp2(peak - at)
    return weight, decay, top, total * decay + tl.sum(weight, 1)


@triton.jit
def log_total(peak, total):
    """Base-2 logarithm of the sum of exponentials, -inf for a row without keys. What is not a number stays so."""
    return tl.where(total != 0, peak + tl.log2(tl.where(total != 0, total, 1.0)), float("-inf"))


@triton.jit
def reciprocal(total):
    """``1 / total``, and 0 for a row without keys."""
    return tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)


@triton.jit
def merge_weights(lse, first, stride, COUNT: tl.constexpr, PADDED: tl.constexpr):
    """Peak, total and weights ``[PADDED]`` of ``COUNT`` partial results whose base-2 lse stand ``stride`` apart."""
    part = tl.arange(0, PADDED)
    each = tl.load(lse + first + part.to(tl.int64) * stride, mask=part < COUNT, other=float("-inf"))
    peak = tl.max(each, 0)
    weight = tl.exp2(each - tl.where(peak == float("-inf"), 0.0, peak))
    return peak, tl.sum(weight, 0), weight


@triton.jit
def merge_rows(out, first, stride, weight, SIZE: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr,
               PADDED: tl.constexpr):  # fmt: skip
    """Weighted sum ``[WIDTH]`` over ``COUNT`` partial rows of ``SIZE`` channels; a part of weight 0 is not read."""
    part = tl.arange(0, PADDED)
    channel = tl.arange(0, WIDTH)
    mask = (weight > 0)[:, None] & (part < COUNT)[:, None] & (channel < SIZE)[None, :]
    place = (first + part.to(tl.int64) * stride)[:, None] * SIZE + channel[None, :]
    return tl.sum(tl.load(out + place, mask=mask, other=0.0) * weight[:, None], 0)
