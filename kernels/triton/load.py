# mypy: ignore-errors
"""Tile loads: query rows, dense keys or values, the ring of newest tokens, and packed codes.

A tile is addressed as an int64 start plus small int32 offsets, so long caches do not overflow and short offsets stay
cheap. Everything outside ``keep`` or past a head's last channel is read as 0, never from memory.

A side with 4 bits lives in two halves everywhere: channels ``[0, D/2)`` and ``[D/2, D)``. A byte holds one channel of
each, so a tile of bytes becomes two operands without any exchange between threads. A side with 3 or 2 bits is one
operand of ``PARTS`` = 8 or 4 parts side by side, since products of an eighth of a head would be too small: column
``k*PADDED + r`` is channel ``k*WIDTH + r``, ``WIDTH`` channels and padding up to a power of two in each part.

Functions named after keys read what is packed per channel, those named after values what is packed per token, as both
are by default. Where a side has the other axis, the generated source takes the other function and transposes.
"""

import triton
import triton.language as tl

from effcompile.kernels.triton.number import convert, dequantize_4, dequantize_8, dequantize_fp8, fields


@triton.jit
def packed_length(length, GROUP: tl.constexpr, RESIDUAL: tl.constexpr):
    """Tokens of the first ``length`` that are packed (:func:`effcompile.kernels.form.packed_length`)."""
    return tl.maximum(length - RESIDUAL, 0) // GROUP * GROUP


@triton.jit
def channels(WIDTH: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr):
    """The channels ``[PARTS * PADDED]`` that the columns of an operand stand for, and whether they do (padding)."""
    column = tl.arange(0, PARTS * PADDED)
    if PARTS == 1:
        return column, column < WIDTH
    return column // PADDED * WIDTH + column % PADDED, column % PADDED < WIDTH


@triton.jit
def load_rows(base, row, keep, SIZE: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
              PARTS: tl.constexpr = 1):  # fmt: skip
    """``[R, PARTS * PADDED]``: channels ``FIRST ..`` of ``WIDTH`` from rows ``row [R]`` of a ``[*, SIZE]`` matrix."""
    channel, real = channels(WIDTH, PADDED, PARTS)
    mask = keep[:, None]
    if WIDTH < PADDED:
        mask = mask & real[None, :]
    return tl.load(base + (row * SIZE)[:, None] + (FIRST + channel)[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, row, x, keep, SIZE: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
               PARTS: tl.constexpr = 1):  # fmt: skip
    """The counterpart of :func:`load_rows`; ``x`` is converted to the matrix's dtype."""
    channel, real = channels(WIDTH, PADDED, PARTS)
    mask = keep[:, None]
    if WIDTH < PADDED:
        mask = mask & real[None, :]
    tl.store(base + (row * SIZE)[:, None] + (FIRST + channel)[None, :], convert(x, base.dtype.element_ty), mask=mask)


@triton.jit
def dense_tile(base, start, stop, SIZE: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
               TILE: tl.constexpr):  # fmt: skip
    """``[TILE, PADDED]``: tokens ``start ..`` of a dense side, 0 from ``stop`` on."""
    token = tl.arange(0, TILE)
    return load_rows(base + tl.cast(start, tl.int64) * SIZE, token, start + token < stop, SIZE, FIRST, WIDTH, PADDED)


@triton.jit
def ring_tile(base, start, stop, SLOTS: tl.constexpr, SIZE: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
              PADDED: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr = 1):  # fmt: skip
    """``[TILE, PARTS * PADDED]``: tokens ``start ..`` of a tail, token ``p`` being in slot ``p % SLOTS``."""
    token = start + tl.arange(0, TILE)
    return load_rows(base, token % SLOTS, token < stop, SIZE, FIRST, WIDTH, PADDED, PARTS)


@triton.jit
def key_codes(codes, start, stop, ROWS: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
              BYTE: tl.constexpr = 0, BYTES: tl.constexpr = 1):  # fmt: skip
    """``[TILE/GROUP, PADDED, GROUP/4]``, four tokens together, of the key groups from token ``start``.

    ``ROWS`` rows of contiguous memory: byte ``BYTE`` of the ``BYTES`` of each word of codes.
    """
    first = tl.cast(start // GROUP, tl.int64)
    group = tl.arange(0, TILE // GROUP)
    channel = tl.arange(0, PADDED)
    # Whole groups are kept or not, so the mask is constant along a group and 16-byte loads survive it.
    mask = (first + group < stop // GROUP)[:, None, None]
    if ROWS < PADDED:
        mask = mask & (channel < ROWS)[None, :, None]
    words = (codes + first * (ROWS * BYTES * GROUP)).to(tl.pointer_type(tl.uint32), bitcast=True)
    words += BYTE * ROWS * GROUP // 4
    place = (group * (ROWS * BYTES * GROUP // 4))[:, None, None] + (channel * (GROUP // 4))[None, :, None]
    return tl.load(words + place + tl.arange(0, GROUP // 4)[None, None, :], mask=mask, other=0)


@triton.jit
def key_steps(scales, start, stop, AT: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
              GROUP: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr = 1, STEPS: tl.constexpr = 2):  # fmt: skip
    """Scales (``AT`` = first channel) or zeros (``AT`` = ``SIZE`` + it): ``[TILE/GROUP, PARTS * PADDED, 1]`` fp16.

    ``STEPS`` is 1 where there are no zeros.
    """
    first = tl.cast(start // GROUP, tl.int64)
    group = tl.arange(0, TILE // GROUP)
    channel, real = channels(ROWS, PADDED, PARTS)
    mask = (first + group < stop // GROUP)[:, None]
    if ROWS < PADDED:
        mask = mask & real[None, :]
    place = (group * (STEPS * SIZE))[:, None] + (AT + channel)[None, :]
    return tl.load(scales + first * (STEPS * SIZE) + place, mask=mask, other=0.0)[:, :, None]


@triton.jit
def contraction_first(x, PADDED: tl.constexpr, TILE: tl.constexpr):
    """``[groups, channels, tokens of a group]`` to ``[PADDED, TILE]``, the right operand of ``q @ k.T``."""
    return tl.reshape(tl.permute(x, (1, 0, 2)), (PADDED, TILE))


@triton.jit
def keys_8(codes, scales, start, stop, SIZE: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr,
           TILE: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """``[PADDED, TILE]``: keys of 8 bits, transposed. ``start`` and ``stop`` are multiples of ``GROUP``."""
    code = key_codes(codes, start, stop, SIZE, PADDED, GROUP, TILE)
    scale = key_steps(scales, start, stop, 0, SIZE, SIZE, PADDED, GROUP, TILE)
    zero = key_steps(scales, start, stop, SIZE, SIZE, SIZE, PADDED, GROUP, TILE)
    return contraction_first(dequantize_8(code, scale, zero, DTYPE, PTX), PADDED, TILE)


@triton.jit
def keys_fp8(codes, scales, start, stop, SIZE: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr,
             TILE: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """``[PADDED, TILE]``: keys of e4m3 codes, transposed; :func:`keys_8` without zeros."""
    code = key_codes(codes, start, stop, SIZE, PADDED, GROUP, TILE)
    scale = key_steps(scales, start, stop, 0, SIZE, SIZE, PADDED, GROUP, TILE, 1, 1)
    return contraction_first(dequantize_fp8(code, scale, DTYPE), PADDED, TILE)


@triton.jit
def keys_8_halves(codes, scales, start, stop, SIZE: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr,
                  TILE: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """:func:`keys_8` as two of ``[PADDED, TILE]``: the lower and the upper half of the channels."""
    HALF: tl.constexpr = SIZE // 2
    low = key_codes(codes, start, stop, HALF, PADDED, GROUP, TILE, 0, 2)
    high = key_codes(codes, start, stop, HALF, PADDED, GROUP, TILE, 1, 2)
    scale = key_steps(scales, start, stop, 0, SIZE, HALF, PADDED, GROUP, TILE)
    zero = key_steps(scales, start, stop, SIZE, SIZE, HALF, PADDED, GROUP, TILE)
    high_scale = key_steps(scales, start, stop, HALF, SIZE, HALF, PADDED, GROUP, TILE)
    high_zero = key_steps(scales, start, stop, SIZE + HALF, SIZE, HALF, PADDED, GROUP, TILE)
    low = contraction_first(dequantize_8(low, scale, zero, DTYPE, PTX), PADDED, TILE)
    return low, contraction_first(dequantize_8(high, high_scale, high_zero, DTYPE, PTX), PADDED, TILE)


@triton.jit
def keys_4(codes, scales, start, stop, SIZE: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr,
           TILE: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """Two of ``[PADDED, TILE]``: the lower and the upper half of the channels of keys of 4 bits, transposed."""
    HALF: tl.constexpr = SIZE // 2
    code = key_codes(codes, start, stop, HALF, PADDED, GROUP, TILE)
    scale = key_steps(scales, start, stop, 0, SIZE, HALF, PADDED, GROUP, TILE)
    zero = key_steps(scales, start, stop, SIZE, SIZE, HALF, PADDED, GROUP, TILE)
    high_scale = key_steps(scales, start, stop, HALF, SIZE, HALF, PADDED, GROUP, TILE)
    high_zero = key_steps(scales, start, stop, SIZE + HALF, SIZE, HALF, PADDED, GROUP, TILE)
    low, high = dequantize_4(code, scale, zero, high_scale, high_zero, DTYPE, PTX)
    return contraction_first(low, PADDED, TILE), contraction_first(high, PADDED, TILE)


@triton.jit
def keys_joined(codes, scales, start, stop, SIZE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
                GROUP: tl.constexpr, TILE: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr,
                PTX: tl.constexpr):  # fmt: skip
    """``[SIZE/WIDTH * PADDED, TILE]``: all parts of keys of 3 or 2 bits, transposed."""
    PARTS: tl.constexpr = SIZE // WIDTH
    BYTES: tl.constexpr = PARTS * BITS // 8
    a = key_codes(codes, start, stop, WIDTH, PADDED, GROUP, TILE, 0, BYTES)
    b = a
    c = a
    if BYTES == 3:
        b = key_codes(codes, start, stop, WIDTH, PADDED, GROUP, TILE, 1, BYTES)
        c = key_codes(codes, start, stop, WIDTH, PADDED, GROUP, TILE, 2, BYTES)
    code = tl.permute(fields(a, b, c, BITS), (0, 3, 1, 2))
    code = tl.reshape(code, (TILE // GROUP, PARTS * PADDED, GROUP // 4))
    scale = key_steps(scales, start, stop, 0, SIZE, WIDTH, PADDED, GROUP, TILE, PARTS)
    zero = key_steps(scales, start, stop, SIZE, SIZE, WIDTH, PADDED, GROUP, TILE, PARTS)
    return contraction_first(dequantize_8(code, scale, zero, DTYPE, PTX), PARTS * PADDED, TILE)


@triton.jit
def value_codes(codes, start, stop, ROW: tl.constexpr, PADDED: tl.constexpr, SPAN: tl.constexpr, TILE: tl.constexpr,
                BYTE: tl.constexpr = 0, BYTES: tl.constexpr = 1):  # fmt: skip
    """``[PADDED/SPAN, TILE, SPAN/4]``, four channels together, of the value rows from token ``start``.

    ``SPAN`` bytes share a scale; a row is ``BYTES`` times ``ROW`` bytes: byte ``BYTE`` of each word of codes is read.
    """
    token = tl.arange(0, TILE)
    place = (tl.arange(0, PADDED // SPAN) * (SPAN // 4))[:, None] + tl.arange(0, SPAN // 4)[None, :]
    mask = (start + token < stop)[None, :, None]
    if ROW < PADDED:
        mask = mask & (place < ROW // 4)[:, None, :]
    words = (codes + tl.cast(start, tl.int64) * (ROW * BYTES)).to(tl.pointer_type(tl.uint32), bitcast=True)
    words += BYTE * ROW // 4
    return tl.load(words + (token * (ROW * BYTES // 4))[None, :, None] + place[:, None, :], mask=mask, other=0)


@triton.jit
def value_steps(scales, start, stop, AT: tl.constexpr, FIRST, GROUPS: tl.constexpr, ROW: tl.constexpr,
                PADDED: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
                PARTS: tl.constexpr = 1, STEPS: tl.constexpr = 2):  # fmt: skip
    """Scales (``AT`` = 0) or zeros (``AT`` = ``GROUPS``) of :func:`value_codes`, channel ``FIRST`` on, fp16.

    ``[PARTS * PADDED/SPAN, TILE, 1]``, one per span. ``STEPS`` is 1 where there are no zeros.
    """
    token = tl.arange(0, TILE)
    # ROW holds whole spans, so spans lie in parts as channels do.
    span, real = channels(ROW // SPAN, PADDED // SPAN, PARTS)
    mask = (start + token < stop)[None, :]
    if ROW < PADDED:
        mask = mask & real[:, None]
    place = (token * (STEPS * GROUPS))[None, :] + (AT + (FIRST + span * SPAN) // GROUP)[:, None]
    return tl.load(scales + tl.cast(start, tl.int64) * (STEPS * GROUPS) + place, mask=mask, other=0.0)[:, :, None]


@triton.jit
def token_first(x, TILE: tl.constexpr, PADDED: tl.constexpr):
    """``[spans, tokens, channels of a span]`` to ``[TILE, PADDED]``, the right operand of ``weights @ v``.

    Spans stand first so that a thread dequantises many channels of one token with one scale, and the result, not the
    codes, is what threads exchange: with tokens first the compiler hands each thread single bytes of many tokens.
    """
    return tl.reshape(tl.permute(x, (1, 0, 2)), (TILE, PADDED))


@triton.jit
def values_8(codes, scales, start, stop, SIZE: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr,
             TILE: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """``[TILE, PADDED]``: values of 8 bits."""
    GROUPS: tl.constexpr = SIZE // GROUP
    code = value_codes(codes, start, stop, SIZE, PADDED, GROUP, TILE)
    scale = value_steps(scales, start, stop, 0, 0, GROUPS, SIZE, PADDED, GROUP, GROUP, TILE)
    zero = value_steps(scales, start, stop, GROUPS, 0, GROUPS, SIZE, PADDED, GROUP, GROUP, TILE)
    return token_first(dequantize_8(code, scale, zero, DTYPE, PTX), TILE, PADDED)


@triton.jit
def values_fp8(codes, scales, start, stop, SIZE: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr,
               TILE: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """``[TILE, PADDED]``: values of e4m3 codes; :func:`values_8` without zeros."""
    code = value_codes(codes, start, stop, SIZE, PADDED, GROUP, TILE)
    scale = value_steps(scales, start, stop, 0, 0, SIZE // GROUP, SIZE, PADDED, GROUP, GROUP, TILE, 1, 1)
    return token_first(dequantize_fp8(code, scale, DTYPE), TILE, PADDED)


@triton.jit
def values_4(codes, scales, start, stop, SIZE: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr,
             SPAN: tl.constexpr, TILE: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """Two of ``[TILE, PADDED]``: the lower and the upper half of the channels of values of 4 bits.

    ``SPAN`` is the largest power of two of channels that share a scale in both halves: the group itself where half a
    head holds whole groups, less where a group straddles the halves (96 channels in groups of 32).
    """
    HALF: tl.constexpr = SIZE // 2
    GROUPS: tl.constexpr = SIZE // GROUP
    code = value_codes(codes, start, stop, HALF, PADDED, SPAN, TILE)
    scale = value_steps(scales, start, stop, 0, 0, GROUPS, HALF, PADDED, SPAN, GROUP, TILE)
    zero = value_steps(scales, start, stop, GROUPS, 0, GROUPS, HALF, PADDED, SPAN, GROUP, TILE)
    high_scale = value_steps(scales, start, stop, 0, HALF, GROUPS, HALF, PADDED, SPAN, GROUP, TILE)
    high_zero = value_steps(scales, start, stop, GROUPS, HALF, GROUPS, HALF, PADDED, SPAN, GROUP, TILE)
    low, high = dequantize_4(code, scale, zero, high_scale, high_zero, DTYPE, PTX)
    return token_first(low, TILE, PADDED), token_first(high, TILE, PADDED)


@triton.jit
def values_joined(codes, scales, start, stop, SIZE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
                  GROUP: tl.constexpr, SPAN: tl.constexpr, TILE: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr,
                  PTX: tl.constexpr):  # fmt: skip
    """``[TILE, SIZE/WIDTH * PADDED]``: all parts of values of 3 or 2 bits; ``SPAN`` as in :func:`values_4`."""
    PARTS: tl.constexpr = SIZE // WIDTH
    BYTES: tl.constexpr = PARTS * BITS // 8
    GROUPS: tl.constexpr = SIZE // GROUP
    a = value_codes(codes, start, stop, WIDTH, PADDED, SPAN, TILE, 0, BYTES)
    b = a
    c = a
    if BYTES == 3:
        b = value_codes(codes, start, stop, WIDTH, PADDED, SPAN, TILE, 1, BYTES)
        c = value_codes(codes, start, stop, WIDTH, PADDED, SPAN, TILE, 2, BYTES)
    code = tl.permute(fields(a, b, c, BITS), (3, 0, 1, 2))
    code = tl.reshape(code, (PARTS * PADDED // SPAN, TILE, SPAN // 4))
    scale = value_steps(scales, start, stop, 0, 0, GROUPS, WIDTH, PADDED, SPAN, GROUP, TILE, PARTS)
    zero = value_steps(scales, start, stop, GROUPS, 0, GROUPS, WIDTH, PADDED, SPAN, GROUP, TILE, PARTS)
    return token_first(dequantize_8(code, scale, zero, DTYPE, PTX), TILE, PARTS * PADDED)
