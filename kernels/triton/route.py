# mypy: ignore-errors
"""Which groups of neurons tokens use: logits, scores, the largest of them, and their weights, in one kernel."""

import triton
import triton.language as tl

from effcompile.kernels.triton.ffn import activate, gate_and_up

LEAST = tl.constexpr(-0x80000000)
MOST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def sortable(x):
    """Integers in the order of the numbers ``x``, which are never -0; NaN before all."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x != x, MOST, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit(do_not_specialize=["rows"])
def route_tokens(
    x, gate, up, choice_bias, logit_bias, scale, chosen, weights, counts, threshold, rows, size, groups,
    GATED: tl.constexpr, CHOICE: tl.constexpr, LOGIT: tl.constexpr, SCALED: tl.constexpr, LIMITED: tl.constexpr,
    ACT: tl.constexpr, SCORE: tl.constexpr, WEIGH: tl.constexpr, TOP: tl.constexpr, SLOTS: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The ``TOP`` slots of ``ROWS`` tokens. ``GROUPS`` is ``groups`` rounded up, ``SLOTS`` is ``TOP`` rounded up."""
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    live = token < rows
    group = tl.arange(0, GROUPS)
    there = group < groups
    a, b = gate_and_up(
        x, up, gate, token * size, live, group, there, size, GATED, PRECISION, ROWS, GROUPS, DEPTH
    )  # fmt: skip
    # The gate alone stands where an FFN without a gate has its up.
    p = activate(b, ACT) * a if GATED else b
    if LOGIT:
        p += tl.load(logit_bias + group, mask=there, other=0.0)[None, :]
    if SCORE == "sigmoid":
        p = tl.sigmoid(p)
    elif SCORE != "softmax":
        p = tl.abs(p)
    if SCORE == "softmax" or SCORE == "abs_softmax":
        peak = tl.max(tl.where(there[None, :], p, -float("inf")), 1)
        p = tl.where(there[None, :], tl.exp(p - peak[:, None]), 0.0)
        p = p / tl.sum(p, 1)[:, None]
    # No score is -0, and a bias makes none of them that.
    rank = p
    if CHOICE:
        rank += tl.load(choice_bias + group, mask=there, other=0.0)[None, :]
    key = tl.where(there[None, :], sortable(rank), LEAST)
    slot = tl.arange(0, SLOTS)[None, :]
    order = tl.full([ROWS, SLOTS], -1, tl.int32)
    taken = tl.zeros([ROWS, SLOTS], tl.float32)
    factor = tl.zeros([ROWS, SLOTS], tl.float32)
    for s in tl.static_range(TOP):
        best = tl.argmax(key, 1, tie_break_left=True)[:, None]
        hit = group[None, :] == best
        here = slot == s
        if LIMITED:
            own = tl.sum(tl.where(hit, rank, 0.0), 1)[:, None]
            here = here & ((own <= threshold) == 0)
        order = tl.where(here, best, order)
        taken = tl.where(here, tl.sum(tl.where(hit, p, 0.0), 1)[:, None], taken)
        if SCALED:
            factor = tl.where(here, tl.load(scale + best), factor)
        key = tl.where(hit, LEAST, key)
    if WEIGH == "normalized":
        taken = taken / tl.sum(taken, 1)[:, None]
    if WEIGH == "unit":
        # Without a scale 1, also where the score is no number.
        taken = taken * factor + 1.0 if SCALED else tl.full([ROWS, SLOTS], 1.0, tl.float32)
    taken = tl.where(order < 0, 0.0, taken)
    mask = live[:, None] & (slot < TOP)
    tl.store(chosen + token[:, None] * TOP + slot, order, mask=mask)
    tl.store(weights + token[:, None] * TOP + slot, taken, mask=mask)
    # Integers: the sum is the same in any order.
    tl.atomic_add(counts + order, 1, mask=mask & (order >= 0), sem="relaxed")
