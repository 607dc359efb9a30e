# mypy: ignore-errors
"""Tile loads: query rows, dense keys or values, the ring of newest tokens, and packed codes.

A tile is addressed as an int64 start plus small int32 offsets, so long caches do not overflow and short offsets stay
cheap. Everything outside ``keep`` or past a head's last channel is read as 0, never from memory.

A side with 4 bits lives in two halves everywhere: channels ``[0, D/2)`` and ``[D/2, D)``. A byte holds one channel of
each, so a tile of bytes becomes two operands without any exchange between threads.
"""

import triton
import triton.language as tl

from effcompile.kernels.triton.number import convert, dequantize_4, dequantize_8


@triton.jit
def packed_length(length, GROUP: tl.constexpr, RESIDUAL: tl.constexpr):
    """Tokens of the first ``length`` that are packed (:func:`effcompile.kernels.form.packed_length`)."""
    return tl.maximum(length - RESIDUAL, 0) // GROUP * GROUP


@triton.jit
def load_rows(base, row, keep, SIZE: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """``[R, PADDED]``: channels ``FIRST ..`` of ``WIDTH`` from rows ``row [R]`` of a ``[*, SIZE]`` matrix."""
    channel = tl.arange(0, PADDED)
    mask = keep[:, None]
    if WIDTH < PADDED:
        mask = mask & (channel < WIDTH)[None, :]
    return tl.load(base + (row * SIZE)[:, None] + (FIRST + channel)[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, row, x, keep, SIZE: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """The counterpart of :func:`load_rows`; ``x`` ``[R, PADDED]`` is converted to the matrix's dtype."""
    channel = tl.arange(0, PADDED)
    mask = keep[:, None]
    if WIDTH < PADDED:
        mask = mask & (channel < WIDTH)[None, :]
    tl.store(base + (row * SIZE)[:, None] + (FIRST + channel)[None, :], convert(x, base.dtype.element_ty), mask=mask)


@triton.jit
def dense_tile(base, start, stop, SIZE: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
               TILE: tl.constexpr):  # fmt: skip
    """``[TILE, PADDED]``: tokens ``start ..`` of a dense side, 0 from ``stop`` on."""
    token = tl.arange(0, TILE)
    return load_rows(base + tl.cast(start, tl.int64) * SIZE, token, start + token < stop, SIZE, FIRST, WIDTH, PADDED)


@triton.jit
def ring_tile(base, start, stop, SLOTS: tl.constexpr, SIZE: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
              PADDED: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """``[TILE, PADDED]``: tokens ``start ..`` of a tail, token ``p`` being in slot ``p % SLOTS``."""
    token = start + tl.arange(0, TILE)
    return load_rows(base, token % SLOTS, token < stop, SIZE, FIRST, WIDTH, PADDED)


@triton.jit
def key_codes(codes, start, stop, ROWS: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr):
    """Words ``[TILE/GROUP, PADDED, GROUP/4]`` of the key groups from token ``start``: contiguous memory."""
    first = tl.cast(start // GROUP, tl.int64)
    group = tl.arange(0, TILE // GROUP)
    channel = tl.arange(0, PADDED)
    # Whole groups are kept or not, so the mask is constant along a group and 16-byte loads survive it.
    mask = (first + group < stop // GROUP)[:, None, None]
    if ROWS < PADDED:
        mask = mask & (channel < ROWS)[None, :, None]
    words = (codes + first * (ROWS * GROUP)).to(tl.pointer_type(tl.uint32), bitcast=True)
    place = (group * (ROWS * GROUP // 4))[:, None, None] + (channel * (GROUP // 4))[None, :, None]
    return tl.load(words + place + tl.arange(0, GROUP // 4)[None, None, :], mask=mask, other=0)


@triton.jit
def key_steps(scales, start, stop, AT: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
              GROUP: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Scales (``AT`` = first channel) or zeros (``AT`` = ``SIZE`` + it): ``[TILE/GROUP, PADDED, 1]`` fp16."""
    first = tl.cast(start // GROUP, tl.int64)
    group = tl.arange(0, TILE // GROUP)
    channel = tl.arange(0, PADDED)
    mask = (first + group < stop // GROUP)[:, None]
    if ROWS < PADDED:
        mask = mask & (channel < ROWS)[None, :]
    place = (group * (2 * SIZE))[:, None] + (AT + channel)[None, :]
    return tl.load(scales + first * (2 * SIZE) + place, mask=mask, other=0.0)[:, :, None]


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
def value_codes(codes, start, stop, ROW: tl.constexpr, PADDED: tl.constexpr, SPAN: tl.constexpr, TILE: tl.constexpr):
    """Words ``[PADDED/SPAN, TILE, SPAN/4]`` of the value rows from token ``start``; ``SPAN`` bytes share a scale."""
    token = tl.arange(0, TILE)
    place = (tl.arange(0, PADDED // SPAN) * (SPAN // 4))[:, None] + tl.arange(0, SPAN // 4)[None, :]
    mask = (start + token < stop)[None, :, None]
    if ROW < PADDED:
        mask = mask & (place < ROW // 4)[:, None, :]
    words = (codes + tl.cast(start, tl.int64) * ROW).to(tl.pointer_type(tl.uint32), bitcast=True)
    return tl.load(words + (token * (ROW // 4))[None, :, None] + place[:, None, :], mask=mask, other=0)


@triton.jit
def value_steps(scales, start, stop, AT: tl.constexpr, FIRST: tl.constexpr, GROUPS: tl.constexpr, ROW: tl.constexpr,
                PADDED: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Scales (``AT`` = 0) or zeros (``AT`` = ``GROUPS``) of :func:`value_codes`, channel ``FIRST`` on, fp16.

    ``[PADDED/SPAN, TILE, 1]``, one per span.
    """
    token = tl.arange(0, TILE)
    byte = tl.arange(0, PADDED // SPAN) * SPAN
    mask = (start + token < stop)[None, :]
    if ROW < PADDED:
        mask = mask & (byte < ROW)[:, None]
    place = (token * (2 * GROUPS))[None, :] + (AT + (FIRST + byte) // GROUP)[:, None]
    return tl.load(scales + tl.cast(start, tl.int64) * (2 * GROUPS) + place, mask=mask, other=0.0)[:, :, None]


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
