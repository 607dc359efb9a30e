# mypy: ignore-errors
"""A linear that reads a weight in few bits (:mod:`effcompile.kernels.weight_ops`), unpacked inside the product.

One layout serves CPUs and GPUs. The 16 codes that lie side by side are four words of four bytes, and behind them come
those of the next word of inputs, of the next group too: what a program reads of a block of 16 outputs is one run of
memory, so that neighbouring threads read neighbouring words. Inputs come in the order of words: a code of each word of
a tile at a time, and ``x`` is read in that order, so nothing has to be moved between threads but the tile of a product.

A *run* is the largest power of two of words that lies in one group and in one tile. Groups of any length are whole
runs, and a tile is ``DEPTH`` words of some runs: ``T`` runs of ``HEIGHT`` words, by ``Q`` words of four outputs.
"""

import triton
import triton.language as tl

from effcompile.kernels.triton.number import convert, dot, exact, field, in_order


@triton.jit
def four_halves(at, mask):
    """Four fp16 numbers from each address of a word of eight bytes, in fp32.

    As one word they stay in the thread that multiplies by them.
    """
    word = tl.load(at, mask=mask, other=0)
    return half(word), half(word >> 16), half(word >> 32), half(word >> 48)


@triton.jit
def half(word):
    """The fp16 number in the lowest bits of a word, in fp32."""
    return (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def steps(scales, zeros, at, mask, BITS: tl.constexpr, ZEROS: tl.constexpr):
    """Scales and zeros of the four outputs of a word, in fp32; without zeros the middle code is 0.

    A code stays in its byte of the word, which saves an instruction for each: it becomes a number 1, 2**8, 2**16 or
    2**24 times as large, exactly, and the scale takes that back, exactly too. (What is added up between scales is as
    much larger: a single row of fp32 or bf16 with inputs beyond 1e25 would overflow.)
    """
    s0, s1, s2, s3 = four_halves(scales + at, mask)
    if ZEROS:
        z0, z1, z2, z3 = four_halves(zeros + at, mask)
    else:
        MIDDLE: tl.constexpr = -(2.0 ** (BITS - 1))
        z0, z1, z2, z3 = s0 * MIDDLE, s1 * MIDDLE, s2 * MIDDLE, s3 * MIDDLE
    return s0, s1 * 2.0**-8, s2 * 2.0**-16, s3 * 2.0**-24, z0, z1, z2, z3


@triton.jit
def planes(at, mask, WORDS: tl.constexpr, BYTES: tl.constexpr):
    """The bytes of words of inputs, one or three planes of them."""
    a = tl.load(at, mask=mask, other=0)
    b = a
    c = a
    if BYTES == 3:
        b = tl.load(at + WORDS * 4, mask=mask, other=0)
        c = tl.load(at + WORDS * 8, mask=mask, other=0)
    return a, b, c


@triton.jit
def unpacked(code, s0, s1, s2, s3, z0, z1, z2, z3, DTYPE: tl.constexpr):
    """Four codes of a word as the weights ``[T, H, 4 * Q]`` that the reference multiplies by, bit for bit."""
    w0 = exact(code & 0xFF, s0, z0, DTYPE)
    w1 = exact(code & 0xFF00, s1, z1, DTYPE)
    w2 = exact(code & 0xFF0000, s2, z2, DTYPE)
    w3 = exact(code & 0xFF000000, s3, z3, DTYPE)
    return in_order(w0, w1, w2, w3)


@triton.jit
def place_of(program, tiles, parts, BAND: tl.constexpr):
    """Tile of rows, and block of outputs: ``BAND`` neighbouring tiles read the same weights together."""
    band, at = program // (BAND * parts), program % (BAND * parts)
    height = tl.minimum(tiles - band * BAND, BAND)
    return band * BAND + at % height, at // height


@triton.jit(do_not_specialize=["rows", "each"])
def quantized_product(
    x, codes, scales, zeros, bias, out, rows, outputs, inputs, each,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, BIASED: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, BAND: tl.constexpr, HEIGHT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """``out`` ``[rows, outputs]``, or with ``WHOLE`` false fp32 ``[splits, rows, outputs]`` of ``each`` runs a split.

    A single row is multiplied number by number, and scales are applied to what the codes of a word add up to. For more
    rows weights are what the reference multiplies by, bit for bit: ``code * scale + zero`` rounded to the dtype of
    ``x``; and a product of matrices adds up.
    """
    CHANNELS: tl.constexpr = 8 if BITS == 3 else 8 // BITS
    BYTES: tl.constexpr = 3 if BITS == 3 else 1
    WORDS: tl.constexpr = GROUP // CHANNELS
    PER: tl.constexpr = WORDS // HEIGHT  # runs of a group
    TALL: tl.constexpr = DEPTH // HEIGHT
    QUADS: tl.constexpr = COLUMNS // 4
    # Eight codes of an output are added up between scales.
    TURNS: tl.constexpr = min(8 // CHANNELS, HEIGHT)
    blocks, tiles = tl.cdiv(outputs, COLUMNS), tl.cdiv(rows, ROWS)
    split, program = tl.program_id(0) // (blocks * tiles), tl.program_id(0) % (blocks * tiles)
    tile, block = place_of(program, tiles, blocks, BAND)
    groups = tl.cdiv(inputs, GROUP)
    stop = tl.minimum((split + 1) * each, groups * PER)

    # A block of 16 outputs is four words wide; the last one is there as a whole, and none behind it.
    quad = block * QUADS + tl.arange(0, QUADS)
    inside = quad < tl.cdiv(outputs, 16) * 4
    first = (quad // 4).to(tl.int64) * groups
    code_at = (first * (WORDS * BYTES * 4) + quad % 4)[None, None, :]
    step_at = (first * 4 + quad % 4)[None, None, :]
    codes = codes.to(tl.pointer_type(tl.uint32), bitcast=True)
    scales = scales.to(tl.pointer_type(tl.uint64), bitcast=True)
    zeros = zeros.to(tl.pointer_type(tl.uint64), bitcast=True)
    d = tl.arange(0, DEPTH)
    token = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = token < rows

    if ROWS == 1:
        y0 = tl.zeros([TALL, HEIGHT // TURNS, QUADS], tl.float32)
        y1 = tl.zeros([TALL, HEIGHT // TURNS, QUADS], tl.float32)
        y2 = tl.zeros([TALL, HEIGHT // TURNS, QUADS], tl.float32)
        y3 = tl.zeros([TALL, HEIGHT // TURNS, QUADS], tl.float32)
    else:
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(split * each, stop, TALL):
        run = start + tl.arange(0, TALL)
        group, used = run // PER, run < stop
        mask = used[:, None, None] & inside[None, None, :]
        at = step_at + (group * 4)[:, None, None]
        s0, s1, s2, s3, z0, z1, z2, z3 = steps(scales, zeros, at, mask, BITS, ZEROS)
        if ROWS == 1:
            p0 = tl.zeros([TALL, HEIGHT // TURNS, QUADS], tl.float32)
            p1 = tl.zeros([TALL, HEIGHT // TURNS, QUADS], tl.float32)
            p2 = tl.zeros([TALL, HEIGHT // TURNS, QUADS], tl.float32)
            p3 = tl.zeros([TALL, HEIGHT // TURNS, QUADS], tl.float32)
            total = tl.zeros([TALL, HEIGHT // TURNS], tl.float32)
            for turn in tl.static_range(TURNS):
                h = turn * (HEIGHT // TURNS) + tl.arange(0, HEIGHT // TURNS)
                row = (run % PER * HEIGHT)[:, None] + h[None, :]
                at = codes + code_at + (group[:, None] * (WORDS * BYTES * 4) + row * 4)[:, :, None]
                a, b, c = planes(at, mask, WORDS, BYTES)
                for k in tl.static_range(CHANNELS):
                    i = group[:, None] * GROUP + k * WORDS + row
                    v = tl.load(x + i, mask=used[:, None] & (i < inputs), other=0.0).to(tl.float32)
                    code = field(a, b, c, k, BITS)
                    wide = v[:, :, None]
                    p0 += (code & 0xFF).to(tl.float32) * wide
                    p1 += (code & 0xFF00).to(tl.float32) * wide
                    p2 += (code & 0xFF0000).to(tl.float32) * wide
                    p3 += (code & 0xFF000000).to(tl.float32) * wide
                    total += v
            shift = total[:, :, None]
            y0 += p0 * s0 + shift * z0
            y1 += p1 * s1 + shift * z1
            y2 += p2 * s2 + shift * z2
            y3 += p3 * s3 + shift * z3
        else:
            row = (run % PER * HEIGHT)[:, None] + tl.arange(0, HEIGHT)[None, :]
            at = codes + code_at + (group[:, None] * (WORDS * BYTES * 4) + row * 4)[:, :, None]
            a, b, c = planes(at, mask, WORDS, BYTES)
            # The same runs and words, as the one axis that is summed over.
            flat = start + d // HEIGHT
            i = flat // PER * GROUP + flat % PER * HEIGHT + d % HEIGHT
            for k in tl.static_range(CHANNELS):
                real = (flat < stop) & (i + k * WORDS < inputs)
                v = tl.load(x + token[:, None] * inputs + (i + k * WORDS)[None, :],
                            mask=there[:, None] & real[None, :], other=0.0)  # fmt: skip
                w = unpacked(field(a, b, c, k, BITS), s0, s1, s2, s3, z0, z1, z2, z3, v.dtype)
                acc = dot(v, tl.reshape(w, (DEPTH, COLUMNS)), acc, PRECISION)
    if ROWS == 1:
        acc = tl.sum(tl.reshape(in_order(y0, y1, y2, y3), (DEPTH // TURNS, COLUMNS)), 0)[None, :]
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    mask = there[:, None] & (column < outputs)[None, :]
    if BIASED:
        acc += tl.load(bias + column, mask=column < outputs, other=0.0).to(tl.float32)[None, :]
    to = out + (token[:, None] + (0 if WHOLE else split * rows)) * outputs + column[None, :]
    tl.store(to, convert(acc, out.dtype.element_ty), mask=mask)


@triton.jit
def write_weight(
    codes, scales, zeros, weight, outputs, inputs,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, HEIGHT: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """``weight`` ``[inputs, outputs]``, the outputs filled up to blocks of 16: what the reference multiplies by."""
    CHANNELS: tl.constexpr = 8 if BITS == 3 else 8 // BITS
    BYTES: tl.constexpr = 3 if BITS == 3 else 1
    WORDS: tl.constexpr = GROUP // CHANNELS
    PER: tl.constexpr = WORDS // HEIGHT
    TALL: tl.constexpr = DEPTH // HEIGHT
    QUADS: tl.constexpr = COLUMNS // 4
    blocks, groups = tl.cdiv(outputs, COLUMNS), tl.cdiv(inputs, GROUP)
    quad = tl.program_id(0) % blocks * QUADS + tl.arange(0, QUADS)
    run = tl.program_id(0) // blocks * TALL + tl.arange(0, TALL)
    group = run // PER
    mask = (run < groups * PER)[:, None, None] & (quad < tl.cdiv(outputs, 16) * 4)[None, None, :]
    first = (quad // 4).to(tl.int64) * groups
    row = (run % PER * HEIGHT)[:, None] + tl.arange(0, HEIGHT)[None, :]
    at = (first * (WORDS * BYTES * 4) + quad % 4)[None, None, :]
    at += (group[:, None] * (WORDS * BYTES * 4) + row * 4)[:, :, None]
    a, b, c = planes(codes.to(tl.pointer_type(tl.uint32), bitcast=True) + at, mask, WORDS, BYTES)
    at = (first * 4 + quad % 4)[None, None, :] + (group * 4)[:, None, None]
    scales = scales.to(tl.pointer_type(tl.uint64), bitcast=True)
    zeros = zeros.to(tl.pointer_type(tl.uint64), bitcast=True)
    s0, s1, s2, s3, z0, z1, z2, z3 = steps(scales, zeros, at, mask, BITS, ZEROS)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    width = tl.cdiv(outputs, 16) * 16
    for k in tl.static_range(CHANNELS):
        w = unpacked(field(a, b, c, k, BITS), s0, s1, s2, s3, z0, z1, z2, z3, weight.dtype.element_ty)
        i = group[:, None] * GROUP + k * WORDS + row
        to = weight + i.to(tl.int64)[:, :, None] * width + column[None, None, :]
        tl.store(to, w, mask=(i < inputs)[:, :, None] & (column < width)[None, None, :])
