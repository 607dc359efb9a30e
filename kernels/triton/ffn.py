# mypy: ignore-errors
"""FFNs that read a part of their weights: products over lists of neurons, and over tiles of tokens of one group.

*One list* for a few tokens (any batch of 1): blocks of neurons, or single ones, in one kernel up to the activation and
one behind it. A slot is negative where it is unused; raising would wait for the device, so one that names a group which
is not there makes rows NaN.

*A list for each token*: :func:`sort_slots` puts the numbers of slots, ``token * slots + slot``, in the order of their
groups. A *tile* is up to ``ROWS`` slots of one group. The grid has room for the most tiles there can be; a program
finds its own from where groups begin, and ends if there is none.
"""

import triton
import triton.language as tl

from effcompile.kernels.triton.number import convert, dot
from effcompile.kernels.triton.softmax import tanh


@triton.jit
def activate(x, ACT: tl.constexpr):
    """The activation of this name in :data:`effcompile.kernels.ffn.ACTIVATIONS`, in fp32."""
    if ACT == "silu":
        y = x * tl.sigmoid(x)
    elif ACT == "gelu":
        y = x * 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # tanh(z) is 2 sigmoid(2 z) - 1.
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "quick_gelu":
        y = x * tl.sigmoid(1.702 * x)
    elif ACT == "tanh":
        y = tanh(x)
    elif ACT == "sigmoid":
        y = tl.sigmoid(x)
    else:
        tl.static_assert(ACT == "relu" or ACT == "relu2", "an activation that this kernel does not have")
        # A comparison, because a maximum passes over NaN.
        y = tl.where(x <= 0, 0.0, x)
        if ACT == "relu2":
            y = y * y
    return y


@triton.jit
def middle(a, b, gate_bias, up_bias, row, used, GATED: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr,
           ACT: tl.constexpr):  # fmt: skip
    """What neurons ``row [COLUMNS]`` say, from the products ``[ROWS, COLUMNS]`` of gate and up."""
    if UP_BIAS:
        b += tl.load(up_bias + row, mask=used, other=0.0).to(tl.float32)[None, :]
    if GATE_BIAS:
        a += tl.load(gate_bias + row, mask=used, other=0.0).to(tl.float32)[None, :]
    return activate(a, ACT) * b if GATED else activate(b, ACT)


@triton.jit
def gate_and_up(x, gate, up, place, there, row, used, size, GATED: tl.constexpr, PRECISION: tl.constexpr,
                ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):  # fmt: skip
    """``[ROWS, COLUMNS]`` twice: rows of ``x`` at ``place`` times rows ``row`` of gate, 0 without one, and of up.

    A single row is multiplied number by number and added up at the end: no exchange of threads within the loop.
    """
    k = tl.arange(0, DEPTH)
    if ROWS == 1:
        a = tl.zeros([COLUMNS, DEPTH], tl.float32)
        b = tl.zeros([COLUMNS, DEPTH], tl.float32)
        for start in range(0, size, DEPTH):
            inside = (start + k < size)[None, :]
            v = tl.load(x + (place + start)[:, None] + k[None, :], mask=there[:, None] & inside, other=0.0)
            at = (row * size + start)[:, None] + k[None, :]
            which = used[:, None] & inside
            b += tl.load(up + at, mask=which, other=0.0).to(tl.float32) * v.to(tl.float32)
            if GATED:
                a += tl.load(gate + at, mask=which, other=0.0).to(tl.float32) * v.to(tl.float32)
        a = tl.sum(a, 1)[None, :]
        b = tl.sum(b, 1)[None, :]
    else:
        a = tl.zeros([ROWS, COLUMNS], tl.float32)
        b = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, size, DEPTH):
            inside = start + k < size
            at = (place + start)[:, None] + k[None, :]
            v = tl.load(x + at, mask=there[:, None] & inside[None, :], other=0.0)
            at = (row * size + start)[None, :] + k[:, None]
            which = used[None, :] & inside[:, None]
            b = dot(v, tl.load(up + at, mask=which, other=0.0), b, PRECISION)
            if GATED:
                a = dot(v, tl.load(gate + at, mask=which, other=0.0), a, PRECISION)
    return a, b


@triton.jit
def listed(i, stop, chosen, shared, width, groups, LISTED: tl.constexpr):
    """Of the neurons ``i`` of a list that ends at ``stop``: row, slot, whether it counts, whether it is not there."""
    slot = tl.maximum(i - shared, 0) // width
    if LISTED:
        own = i >= shared
        group = tl.load(chosen + slot, mask=own & (i < stop), other=0)
        row = tl.where(own, shared + group.to(tl.int64) * width + (i - shared) % width, i)
        return row, slot, (i < stop) & (group >= 0) & (group < groups), group >= groups
    return i.to(tl.int64), slot, i < stop, i < 0


@triton.jit(do_not_specialize=["rows", "active"])
def listed_hidden(
    x, gate, up, gate_bias, up_bias, chosen, weights, hidden,
    rows, active, shared, width, groups, size,
    GATED: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, LISTED: tl.constexpr, WEIGHTED: tl.constexpr,
    ACT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``hidden`` ``[rows, active]``: what the neurons of one list say, times their weight; 0 where a slot is unused."""
    i = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row, slot, used, wrong = listed(i, active, chosen, shared, width, groups, LISTED)
    token = tl.arange(0, ROWS).to(tl.int64)
    there = token < rows
    a, b = gate_and_up(
        x, gate, up, token * size, there, row, used, size, GATED, PRECISION, ROWS, COLUMNS, DEPTH
    )  # fmt: skip
    h = middle(a, b, gate_bias, up_bias, row, used, GATED, GATE_BIAS, UP_BIAS, ACT)
    if WEIGHTED:
        h *= tl.where(i < shared, 1.0, tl.load(weights + slot, mask=used & (i >= shared), other=0.0))[None, :]
    h = tl.where(used[None, :], h, tl.where(wrong[None, :], float("nan"), 0.0))
    to = hidden + token[:, None] * active + i[None, :]
    tl.store(to, convert(h, hidden.dtype.element_ty), mask=there[:, None] & (i < active)[None, :])


@triton.jit(do_not_specialize=["rows", "active", "each"])
def listed_down(
    hidden, down, chosen, parts, rows, active, shared, width, groups, size, each,
    LISTED: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``parts`` ``[splits, rows, size]`` fp32: what a split of ``each`` neurons of the list writes."""
    blocks = tl.cdiv(size, COLUMNS)
    split, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < size
    token = tl.arange(0, ROWS).to(tl.int64)
    there = token < rows
    stop = tl.minimum((split + 1) * each, active)
    acc = tl.zeros([DEPTH if ROWS == 1 else ROWS, COLUMNS], tl.float32)
    for start in range(split * each, stop, DEPTH):
        i = start + tl.arange(0, DEPTH)
        row, _, used, _ = listed(i, stop, chosen, shared, width, groups, LISTED)
        at = row[:, None] * size + column[None, :]
        w = tl.load(down + at, mask=used[:, None] & inside[None, :], other=0.0)
        if ROWS == 1:
            h = tl.load(hidden + i, mask=i < stop, other=0.0)
            acc += h.to(tl.float32)[:, None] * w.to(tl.float32)
        else:
            at = token[:, None] * active + i[None, :]
            h = tl.load(hidden + at, mask=there[:, None] & (i < stop)[None, :], other=0.0)
            acc = dot(h, w, acc, PRECISION)
    if ROWS == 1:
        acc = tl.sum(acc, 0)[None, :]
    to = parts + (split * rows + token)[:, None] * size + column[None, :]
    tl.store(to, acc, mask=there[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["total"])
def sort_slots(chosen, order, bounds, total, groups, BLOCK: tl.constexpr):
    """One group's part of ``order``, in the order of slots, and where it begins; ``bounds`` ``[groups + 1]``."""
    group = tl.program_id(0)
    begin = tl.full([], 0, tl.int32)
    for start in range(0, total, BLOCK):
        at = start + tl.arange(0, BLOCK)
        found = tl.load(chosen + at, mask=at < total, other=-1)
        begin += tl.sum(((found >= 0) & (found < group)).to(tl.int32), 0)
    tl.store(bounds + group, begin)
    for start in range(0, total, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mine = (tl.load(chosen + at, mask=at < total, other=-1) == group).to(tl.int32)
        tl.store(order + begin + tl.cumsum(mine, 0) - 1, at, mask=mine > 0)
        begin += tl.sum(mine, 0)
    if group == groups - 1:
        tl.store(bounds + groups, begin)


@triton.jit
def tile_of(bounds, tile, groups, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Group of a tile, first of its sorted slots, and how many there are: 0 for a tile that is not needed."""
    g = tl.arange(0, GROUPS)
    first = tl.load(bounds + g, mask=g < groups, other=0)
    last = tl.load(bounds + g + 1, mask=g < groups, other=0)
    tiles = (last - first + ROWS - 1) // ROWS
    end = tl.cumsum(tiles, 0)
    group = tl.sum((end <= tile).to(tl.int32), 0)
    mine = g == group
    begin = tl.sum(tl.where(mine, first + (tile - end + tiles) * ROWS, 0), 0)
    return group.to(tl.int64), begin, tl.minimum(tl.sum(tl.where(mine, last, 0), 0) - begin, ROWS)


@triton.jit
def place_of(tiles, parts, BAND: tl.constexpr):
    """Tile and part of a program: ``BAND`` neighbouring tiles, mostly of one group, read the same weights together."""
    band, at = tl.program_id(0) // (BAND * parts), tl.program_id(0) % (BAND * parts)
    height = tl.minimum(tiles - band * BAND, BAND)
    return band * BAND + at % height, at // height


@triton.jit(do_not_specialize=["tiles"])
def grouped_hidden(
    x, gate, up, gate_bias, up_bias, order, bounds, weights, hidden, tiles, shared, width, groups, size, slots,
    GATED: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, WEIGHTED: tl.constexpr, ACT: tl.constexpr,
    PRECISION: tl.constexpr, BAND: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """``hidden`` ``[all slots, width]``, in sorted order: weight times what the neurons of a slot's group say."""
    tile, part = place_of(tiles, tl.cdiv(width, COLUMNS), BAND)
    group, begin, count = tile_of(bounds, tile, groups, ROWS, GROUPS)
    if count > 0:
        there = tl.arange(0, ROWS) < count
        at = begin + tl.arange(0, ROWS)
        slot = tl.load(order + at, mask=there, other=0)
        column = part * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < width
        row = shared + group * width + column
        a, b = gate_and_up(
            x, gate, up, (slot // slots).to(tl.int64) * size, there, row, inside, size, GATED, PRECISION, ROWS,
            COLUMNS, DEPTH,
        )  # fmt: skip
        h = middle(a, b, gate_bias, up_bias, row, inside, GATED, GATE_BIAS, UP_BIAS, ACT)
        if WEIGHTED:
            h *= tl.load(weights + slot, mask=there, other=0.0)[:, None]
        to = hidden + at[:, None].to(tl.int64) * width + column[None, :]
        tl.store(to, convert(h, hidden.dtype.element_ty), mask=there[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["tiles"])
def grouped_down(
    hidden, down, order, bounds, parts, tiles, shared, width, groups, size,
    PRECISION: tl.constexpr, BAND: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """``parts`` ``[all slots, size]`` fp32, by slot: a tile's part of ``hidden`` times its group's ``down``."""
    tile, part = place_of(tiles, tl.cdiv(size, COLUMNS), BAND)
    group, begin, count = tile_of(bounds, tile, groups, ROWS, GROUPS)
    if count > 0:
        there = tl.arange(0, ROWS) < count
        at = begin + tl.arange(0, ROWS)
        column = part * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < size
        place, first = at.to(tl.int64) * width, shared + group * width
        k = tl.arange(0, DEPTH)
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, width, DEPTH):
            real = start + k < width
            h = tl.load(
                hidden + (place + start)[:, None] + k[None, :], mask=there[:, None] & real[None, :], other=0.0
            )  # fmt: skip
            w = tl.load(
                down + (first + start + k)[:, None] * size + column[None, :], mask=real[:, None] & inside[None, :],
                other=0.0,
            )  # fmt: skip
            acc = dot(h, w, acc, PRECISION)
        slot = tl.load(order + at, mask=there, other=0)
        to = parts + slot[:, None].to(tl.int64) * size + column[None, :]
        tl.store(to, acc, mask=there[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["count"])
def add_up(
    parts, chosen, first, bias, out, count, groups, size, part_step, row_step,
    LISTED: tl.constexpr, FIRST: tl.constexpr, BIASED: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A row of ``out``: the sum of its ``count`` parts, of ``first`` and of a bias, always in the same order.

    With a list only parts of slots that are used count, and those of others are not read.
    """
    blocks = tl.cdiv(size, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < size
    acc = tl.zeros([COLUMNS], tl.float32)
    if FIRST:
        acc += tl.load(first + row * size + column, mask=inside, other=0.0).to(tl.float32)
    for start in range(0, count, PARTS):
        p = start + tl.arange(0, PARTS)
        there = p < count
        if LISTED:
            group = tl.load(chosen + row * count + p, mask=there, other=-1)
            there = (group >= 0) & (group < groups)
            acc += tl.where(tl.max(group, 0) >= groups, float("nan"), 0.0)
        at = row * row_step + p.to(tl.int64)[:, None] * part_step + column[None, :]
        acc += tl.sum(tl.load(parts + at, mask=there[:, None] & inside[None, :], other=0.0), 0)
    if BIASED:
        acc += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, convert(acc, out.dtype.element_ty), mask=inside)
