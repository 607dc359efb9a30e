# mypy: ignore-errors
"""FFNs that read a part of their weights: routing, products over tiles of tokens of one group, listed columns.

A *tile* is up to ``ROWS`` slots of one group: ``order`` has the numbers of all slots, ``token * slots + slot``, sorted
by group, and a tile is a range of it. There is room for the most tiles that can be; those not needed have group -1.
"""

import triton
import triton.language as tl

from effcompile.kernels.triton.number import convert, dot


@triton.jit
def activate(x, ACT: tl.constexpr):
    """The activation named ``ACT``, in fp32."""
    if ACT == "silu":
        y = x * tl.sigmoid(x)
    elif ACT == "gelu":
        y = x * 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # tanh(z) is 2 sigmoid(2 z) - 1.
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        y = tl.where(x <= 0, 0.0, x)
    return y


@triton.jit
def grouped_hidden(
    x, gate, up, gate_bias, up_bias, order, weights, tile_group, tile_first, tile_rows, hidden,
    shared, width, size, slots,
    GATED: tl.constexpr, BIASED: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``hidden`` ``[all slots, width]``, in sorted order: weight times ``act(gate x) * up x`` of a tile's group."""
    parts = tl.cdiv(width, COLUMNS)
    tile, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    group = tl.load(tile_group + tile).to(tl.int64)
    if group >= 0:
        rows = tl.load(tile_first + tile) + tl.arange(0, ROWS)
        there = tl.arange(0, ROWS) < tl.load(tile_rows + tile)
        slot = tl.load(order + rows, mask=there, other=0)
        token = (slot // slots).to(tl.int64)
        column = part * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < width
        neuron = shared + group * width + column
        a = tl.zeros([ROWS, COLUMNS], tl.float32)
        b = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, size, DEPTH):
            k = start + tl.arange(0, DEPTH)
            from_x = tl.load(
                x + token[:, None] * size + k[None, :], mask=there[:, None] & (k < size)[None, :], other=0.0
            )
            which = (k < size)[:, None] & inside[None, :]
            at = neuron[None, :] * size + k[:, None]
            b = dot(from_x, tl.load(up + at, mask=which, other=0.0), b, PRECISION)
            if GATED:
                a = dot(from_x, tl.load(gate + at, mask=which, other=0.0), a, PRECISION)
        if BIASED:
            b += tl.load(up_bias + neuron, mask=inside, other=0.0).to(tl.float32)[None, :]
            if GATED:
                a += tl.load(gate_bias + neuron, mask=inside, other=0.0).to(tl.float32)[None, :]
        h = activate(a, ACT) * b if GATED else activate(b, ACT)
        h *= tl.load(weights + slot, mask=there, other=0.0)[:, None]
        to = hidden + rows[:, None].to(tl.int64) * width + column[None, :]
        tl.store(to, convert(h, hidden.dtype.element_ty), mask=there[:, None] & inside[None, :])


@triton.jit
def grouped_down(
    hidden, down, order, tile_group, tile_first, tile_rows, out, shared, width, size,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``out`` ``[all slots, size]`` fp32, by slot: a tile's part of ``hidden`` times its group's ``down``."""
    parts = tl.cdiv(size, COLUMNS)
    tile, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    group = tl.load(tile_group + tile).to(tl.int64)
    if group >= 0:
        rows = tl.load(tile_first + tile) + tl.arange(0, ROWS)
        there = tl.arange(0, ROWS) < tl.load(tile_rows + tile)
        column = part * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < size
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, width, DEPTH):
            k = start + tl.arange(0, DEPTH)
            at = rows[:, None].to(tl.int64) * width + k[None, :]
            h = tl.load(hidden + at, mask=there[:, None] & (k < width)[None, :], other=0.0)
            neuron = shared + group * width + k
            at = neuron[:, None] * size + column[None, :]
            acc = dot(h, tl.load(down + at, mask=(k < width)[:, None] & inside[None, :], other=0.0), acc, PRECISION)
        slot = tl.load(order + rows, mask=there, other=0)
        to = out + slot[:, None].to(tl.int64) * size + column[None, :]
        tl.store(to, acc, mask=there[:, None] & inside[None, :])


@triton.jit
def column_product(
    x, weight, threshold, scale, out, rows, inputs, outputs, each,
    SCALED: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``out`` ``[splits, rows, outputs]`` fp32: a split takes ``each`` inputs, and loads rows of those that count."""
    parts = tl.cdiv(outputs, COLUMNS)
    split, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    limit = tl.load(threshold)
    token = tl.arange(0, ROWS)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(split * each, tl.minimum((split + 1) * each, inputs), DEPTH):
        k = start + tl.arange(0, DEPTH)
        inside = (token < rows)[:, None] & (k < tl.minimum((split + 1) * each, inputs))[None, :]
        v = tl.load(x + token[:, None] * inputs + k[None, :], mask=inside, other=0.0).to(tl.float32)
        size = tl.abs(v)
        if SCALED:
            size *= tl.load(scale + k, mask=k < inputs, other=0.0)[None, :]
        # Not greater: NaN is kept.
        small = (size <= limit) | (inside == 0)
        v = tl.where(small, 0.0, v)
        counts = tl.max(tl.where(small, 0, 1), 0) > 0
        at = k[:, None].to(tl.int64) * outputs + column[None, :]
        w = tl.load(weight + at, mask=counts[:, None] & (column < outputs)[None, :], other=0.0).to(tl.float32)
        acc += tl.sum(v[:, :, None] * w[None, :, :], 1)
    to = out + (split * rows + token)[:, None] * outputs + column[None, :]
    tl.store(to, acc, mask=(token < rows)[:, None] & (column < outputs)[None, :])


@triton.jit
def route_token(
    x, gate, up, choice_bias, logit_bias, scale, chosen, weights, counts, threshold, size, groups,
    GATED: tl.constexpr, CHOICE: tl.constexpr, LOGIT: tl.constexpr, SCALED: tl.constexpr, LIMITED: tl.constexpr,
    ACT: tl.constexpr, SCORE: tl.constexpr, WEIGH: tl.constexpr, SLOTS: tl.constexpr, ALL: tl.constexpr,
    GROUPS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The slots of one token. ``GROUPS`` is ``groups`` rounded up, and ``ALL`` is ``SLOTS`` rounded up."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    there = group < groups
    a = tl.zeros([GROUPS], tl.float32)
    b = tl.zeros([GROUPS], tl.float32)
    for start in range(0, size, DEPTH):
        k = start + tl.arange(0, DEPTH)
        v = tl.load(x + token * size + k, mask=k < size, other=0.0).to(tl.float32)
        at, which = group[:, None] * size + k[None, :], there[:, None] & (k < size)[None, :]
        a += tl.sum(tl.load(gate + at, mask=which, other=0.0).to(tl.float32) * v[None, :], 1)
        if GATED:
            b += tl.sum(tl.load(up + at, mask=which, other=0.0).to(tl.float32) * v[None, :], 1)
    if GATED:
        a = activate(a, ACT) * b
    if LOGIT:
        a += tl.load(logit_bias + group, mask=there, other=0.0)
    if SCORE == "abs_softmax" or SCORE == "abs":
        a = tl.abs(a)
    if SCORE == "sigmoid":
        a = tl.sigmoid(a)
    if SCORE == "softmax" or SCORE == "abs_softmax":
        e = tl.where(there, tl.exp(a - tl.max(tl.where(there, a, -float("inf")), 0)), 0.0)
        a = e / tl.sum(e, 0)
    rank = a
    if CHOICE:
        rank += tl.load(choice_bias + group, mask=there, other=0.0)
    # Integers in the order of the numbers, NaN before all; adding 0 makes -0 a 0.
    bits = (rank + 0.0).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(rank != rank, 0x7FFFFFFF, key)
    key = tl.where(there, key, -0x80000000)
    slot = tl.arange(0, ALL)
    order = tl.full([ALL], -1, tl.int32)
    p = tl.zeros([ALL], tl.float32)
    factor = tl.zeros([ALL], tl.float32)
    for s in tl.static_range(SLOTS):
        best = tl.argmax(key, 0, tie_break_left=True)
        hit = group == best
        value = tl.sum(tl.where(hit, a, 0.0), 0)
        here = slot == s
        if LIMITED:
            here = here & ((tl.sum(tl.where(hit, rank, 0.0), 0) <= threshold) == 0)
        order = tl.where(here, best, order)
        p = tl.where(here, value, p)
        if SCALED:
            factor = tl.where(here, tl.load(scale + best), factor)
        key = tl.where(hit, -0x80000000, key)
    if WEIGH == "normalized":
        p = tl.where(order < 0, 0.0, p / tl.sum(p, 0))
    if WEIGH == "unit":
        one = tl.full([ALL], 1.0, tl.float32)
        if SCALED:
            one += p * factor
        p = tl.where(order < 0, 0.0, one)
    tl.store(chosen + token * SLOTS + slot, order, mask=slot < SLOTS)
    tl.store(weights + token * SLOTS + slot, p, mask=slot < SLOTS)
    # Integers: the sum is the same in any order.
    tl.atomic_add(counts + order, 1, mask=(order >= 0) & (slot < SLOTS), sem="relaxed")
