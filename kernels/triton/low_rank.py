# mypy: ignore-errors
"""A linear of low rank, ``up (down x) + bias`` (:mod:`effcompile.kernels.low_rank_ops`).

*A few rows* are limited by what is read of the factors, and one program cannot read them fast enough: ``down`` is cut
into splits of its inputs, whose sums go through memory in fp32, and every program of ``up`` adds them up once more. For
a rank of 512 and 8 splits these are 16 KB a row, from the cache, beside 64 KB of the 64 rows of ``up`` that it reads:
less than a third launch costs, and no program waits for another.

*Many rows* are limited by products: a tile of rows keeps its small product on the chip, from ``down`` to the last
output, so that what is read and written is ``x``, the factors and the result.
"""

import triton
import triton.language as tl

from effcompile.kernels.triton.number import convert, dot


# A split is a multiple of 16 inputs, which has to be known: loads are of 16 bytes then.
@triton.jit(do_not_specialize=["rows"])
def few_down(
    x, down, parts, rows, inputs, rank, each,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``parts`` ``[splits, rows, rank]`` fp32: what a split of ``each`` inputs adds to the small product."""
    blocks = tl.cdiv(rank, COLUMNS)
    split, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    r = block * COLUMNS + tl.arange(0, COLUMNS)
    used = r < rank
    token = tl.arange(0, ROWS)
    there = token < rows
    stop = tl.minimum((split + 1) * each, inputs)
    at = r.to(tl.int64) * inputs
    acc = tl.zeros([COLUMNS, DEPTH] if ROWS == 1 else [ROWS, COLUMNS], tl.float32)
    for start in range(split * each, stop, DEPTH):
        k = start + tl.arange(0, DEPTH)
        inside = k < stop
        if ROWS == 1:
            v = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(down + at[:, None] + k[None, :], mask=used[:, None] & inside[None, :], other=0.0)
            acc += w.to(tl.float32) * v[None, :]
        else:
            v = tl.load(x + token[:, None] * inputs + k[None, :], mask=there[:, None] & inside[None, :], other=0.0)
            w = tl.load(down + at[None, :] + k[:, None], mask=used[None, :] & inside[:, None], other=0.0)
            acc = dot(v, w, acc, PRECISION)
    if ROWS == 1:
        acc = tl.sum(acc, 1)[None, :]
    to = parts + (split * rows + token)[:, None] * rank + r[None, :]
    tl.store(to, acc, mask=there[:, None] & used[None, :])


@triton.jit(do_not_specialize=["rows", "count"])
def few_up(
    parts, up, bias, out, rows, rank, outputs, count,
    BIASED: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """``out`` ``[rows, outputs]``: the ``count`` parts of the small product added up, times ``up``.

    A single row stays in fp32 from end to end; for more the small product is rounded to the dtype of ``up``, as the
    reference rounds it.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < outputs
    token = tl.arange(0, ROWS)
    there = token < rows
    split = tl.arange(0, PARTS)
    at = column.to(tl.int64) * rank
    acc = tl.zeros([COLUMNS, DEPTH] if ROWS == 1 else [ROWS, COLUMNS], tl.float32)
    for start in range(0, rank, DEPTH):
        r = start + tl.arange(0, DEPTH)
        used = r < rank
        # All parts at once: one after another each would be waited for.
        of = parts + (split[:, None, None] * rows + token[None, :, None]) * rank + r[None, None, :]
        real = (split < count)[:, None, None] & there[None, :, None] & used[None, None, :]
        h = tl.sum(tl.load(of, mask=real, other=0.0), 0)
        if ROWS == 1:
            w = tl.load(up + at[:, None] + r[None, :], mask=inside[:, None] & used[None, :], other=0.0)
            acc += w.to(tl.float32) * h
        else:
            w = tl.load(up + at[None, :] + r[:, None], mask=inside[None, :] & used[:, None], other=0.0)
            acc = dot(convert(h, w.dtype), w, acc, PRECISION)
    if ROWS == 1:
        acc = tl.sum(acc, 1)[None, :]
    if BIASED:
        acc += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    to = out + token[:, None].to(tl.int64) * outputs + column[None, :]
    tl.store(to, convert(acc, out.dtype.element_ty), mask=there[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["rows", "share"])
def chain(
    x, down, up, bias, out, rows, inputs, rank, outputs, share,
    BIASED: tl.constexpr, PRECISION: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of rows of ``out``, ``share`` blocks of its outputs; the small product ``[ROWS, RANK]`` stays here."""
    blocks = tl.cdiv(outputs, COLUMNS)
    parts = tl.cdiv(blocks, share)
    tile, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    token = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = token < rows
    r = tl.arange(0, RANK)
    used = r < rank
    k = tl.arange(0, DEPTH)
    h = tl.zeros([ROWS, RANK], tl.float32)
    for start in range(0, inputs, DEPTH):
        inside = start + k < inputs
        v = tl.load(
            x + token[:, None] * inputs + (start + k)[None, :], mask=there[:, None] & inside[None, :], other=0.0
        )  # fmt: skip
        w = tl.load(
            down + r.to(tl.int64)[None, :] * inputs + (start + k)[:, None], mask=used[None, :] & inside[:, None],
            other=0.0,
        )  # fmt: skip
        h = dot(v, w, h, PRECISION)
    small = convert(h, x.dtype.element_ty)
    for block in range(part * share, tl.minimum((part + 1) * share, blocks)):
        column = block * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < outputs
        w = tl.load(
            up + column.to(tl.int64)[None, :] * rank + r[:, None], mask=inside[None, :] & used[:, None], other=0.0
        )  # fmt: skip
        acc = dot(small, w, tl.zeros([ROWS, COLUMNS], tl.float32), PRECISION)
        if BIASED:
            acc += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        to = out + token[:, None] * outputs + column[None, :]
        tl.store(to, convert(acc, out.dtype.element_ty), mask=there[:, None] & inside[None, :])
