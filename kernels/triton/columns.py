# mypy: ignore-errors
"""Products of few rows that skip what is small in them: rows of a transposed weight that nobody keeps are not read."""

import triton
import triton.language as tl

from effcompile.kernels.triton.ffn import middle
from effcompile.kernels.triton.number import convert


@triton.jit
def kept_product(v, inside, weight, limit, scale, k, stop, column, outputs, SCALED: tl.constexpr):
    """``[ROWS, DEPTH, COLUMNS]``: what each input ``v [ROWS, DEPTH]`` that is kept adds to each output."""
    size = tl.abs(v)
    if SCALED:
        size *= tl.load(scale + k, mask=k < stop, other=0.0)[None, :]
    # Not greater: NaN is kept.
    keep = inside & ((size <= limit) == 0)
    counts = tl.max(keep.to(tl.int32), 0) > 0
    at = k[:, None].to(tl.int64) * outputs + column[None, :]
    w = tl.load(weight + at, mask=counts[:, None] & (column < outputs)[None, :], other=0.0).to(tl.float32)
    return tl.where(keep, v, 0.0)[:, :, None] * w[None, :, :]


@triton.jit(do_not_specialize=["rows", "each"])
def column_product(
    x, gate, up, thresholds, gate_scale, up_scale, parts, rows, inputs, outputs, each,
    GATED: tl.constexpr, GATE_SCALED: tl.constexpr, UP_SCALED: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """``parts`` ``[splits, 1 or 2, rows, outputs]`` fp32: what a split of ``each`` inputs adds, to gate first."""
    blocks = tl.cdiv(outputs, COLUMNS)
    split, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.arange(0, ROWS)
    stop = tl.minimum((split + 1) * each, inputs)
    a = tl.zeros([ROWS, DEPTH, COLUMNS], tl.float32)
    b = tl.zeros([ROWS, DEPTH, COLUMNS], tl.float32)
    for start in range(split * each, stop, DEPTH):
        k = start + tl.arange(0, DEPTH)
        inside = (token < rows)[:, None] & (k < stop)[None, :]
        v = tl.load(x + token[:, None] * inputs + k[None, :], mask=inside, other=0.0).to(tl.float32)
        if GATED:
            a += kept_product(v, inside, gate, tl.load(thresholds), gate_scale, k, stop, column, outputs, GATE_SCALED)
            b += kept_product(v, inside, up, tl.load(thresholds + 1), up_scale, k, stop, column, outputs, UP_SCALED)
        else:
            b += kept_product(v, inside, up, tl.load(thresholds), up_scale, k, stop, column, outputs, UP_SCALED)
    to = parts + (split * (2 if GATED else 1) * rows + token)[:, None] * outputs + column[None, :]
    there = (token < rows)[:, None] & (column < outputs)[None, :]
    if GATED:
        tl.store(to, tl.sum(a, 1), mask=there)
        to += rows * outputs
    tl.store(to, tl.sum(b, 1), mask=there)


@triton.jit
def sum_of(parts, count, step, inside, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """``[1, COLUMNS]``: the sum of ``count`` rows that lie ``step`` apart, from pointers ``parts [COLUMNS]`` on."""
    acc = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, count, PARTS):
        p = start + tl.arange(0, PARTS)
        at = parts[None, :] + p.to(tl.int64)[:, None] * step
        acc += tl.sum(tl.load(at, mask=(p < count)[:, None] & inside[None, :], other=0.0), 0)
    return acc[None, :]


@triton.jit(do_not_specialize=["count", "rows"])
def column_middle(
    parts, gate_bias, up_bias, hidden, count, rows, outputs,
    GATED: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, ACT: tl.constexpr, PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """A row of ``hidden`` ``[rows, outputs]``: the splits of :func:`column_product` added up, and the activation."""
    blocks = tl.cdiv(outputs, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < outputs
    step = rows.to(tl.int64) * outputs
    own = parts + row * outputs + column
    b = sum_of(own + (step if GATED else 0), count, step * (2 if GATED else 1), inside, PARTS, COLUMNS)
    a = sum_of(own, count, step * 2, inside, PARTS, COLUMNS) if GATED else b
    h = middle(a, b, gate_bias, up_bias, column, inside, GATED, GATE_BIAS, UP_BIAS, ACT)
    to = hidden + row * outputs + column[None, :]
    tl.store(to, convert(h, hidden.dtype.element_ty), mask=inside[None, :])
