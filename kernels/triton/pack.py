# mypy: ignore-errors
"""Quantise and pack whole groups, bit for bit as :mod:`effcompile.kernels.quantize` does, and append rows.

Division is IEEE (``div_rn``) and rounding is half to even; codes come from the fp16 scale and zero that are stored.
"""

import triton
import triton.language as tl

from effcompile.kernels.triton.load import store_rows

FP16_MAX = tl.constexpr(65504.0)


@triton.jit
def steps(low, high, BITS: tl.constexpr):
    """fp16 scale and zero of groups that span ``low .. high`` (fp32, any shape)."""
    levels = tl.full(low.shape, 2**BITS - 1, tl.float32)
    scale = tl.minimum(tl.div_rn(high - low, levels), FP16_MAX).to(tl.float16)
    zero = tl.minimum(tl.maximum(low, -FP16_MAX), FP16_MAX).to(tl.float16)
    return scale, zero


@triton.jit
def encode(x, scale, zero, BITS: tl.constexpr):
    """Codes (uint8) of ``x`` fp32; a group of scale 0 has codes 0."""
    step = tl.broadcast_to(scale.to(tl.float32), x.shape)
    code = tl.div_rn(x - zero.to(tl.float32), tl.where(step > 0, step, 1.0))
    code = tl.where(step > 0, tl.minimum(tl.maximum(code, 0.0), 2.0**BITS - 1), 0.0)
    # Clamping first gives the same code, and a number below 2**22 rounds half to even when 1.5 * 2**23 is added.
    return ((code + 12582912.0) - 12582912.0).to(tl.uint8)


@triton.jit
def group_rows(new, new_stride, tail, first, length, FIRST: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
               PADDED: tl.constexpr, SLOTS: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """``[GROUP, PADDED]`` fp32: the group at ``first``, from the tail before ``length``, else the new tokens."""
    token = first + tl.arange(0, GROUP)
    channel = tl.arange(0, PADDED)
    live = (channel < WIDTH)[None, :]
    fresh = (token >= length)[:, None]
    place = (FIRST + channel)[None, :]
    given = tl.load(new + (token - length)[:, None] * new_stride + place, mask=fresh & live, other=0.0)
    kept = tl.load(tail + (token % SLOTS)[:, None] * SIZE + place, mask=(token < length)[:, None] & live, other=0.0)
    return tl.where(fresh, given.to(tl.float32), kept.to(tl.float32))


@triton.jit
def encode_keys(x, scales, at, FIRST: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
                BITS: tl.constexpr):  # fmt: skip
    """Codes of a key group ``x [GROUP, PADDED]``, one scale per channel, stored in group row ``at``."""
    channel = tl.arange(0, PADDED)
    scale, zero = steps(tl.min(x, 0), tl.max(x, 0), BITS)
    place = scales + at * (2 * SIZE) + FIRST + channel
    tl.store(place, scale, mask=channel < WIDTH)
    tl.store(place + SIZE, zero, mask=channel < WIDTH)
    return encode(x, scale[None, :], zero[None, :], BITS)


@triton.jit
def store_key_codes(codes, at, byte, ROWS: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr):
    """Store bytes ``[GROUP, PADDED]`` as group ``at`` of ``[*, ROWS, GROUP]``: channel by channel."""
    channel = tl.arange(0, PADDED)
    place = at * (ROWS * GROUP) + (channel * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
    tl.store(codes + place, tl.trans(byte), mask=(channel < ROWS)[:, None])


@triton.jit
def pack_keys_8(codes, scales, tail, new, new_stride, first, length, SIZE: tl.constexpr, PADDED: tl.constexpr,
                SLOTS: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """Quantise the key group at token ``first`` to 8 bits."""
    x = group_rows(new, new_stride, tail, first, length, 0, SIZE, SIZE, PADDED, SLOTS, GROUP)
    code = encode_keys(x, scales, first // GROUP, 0, SIZE, SIZE, PADDED, 8)
    store_key_codes(codes, first // GROUP, code, SIZE, PADDED, GROUP)


@triton.jit
def pack_keys_4(codes, scales, tail, new, new_stride, first, length, SIZE: tl.constexpr, PADDED: tl.constexpr,
                SLOTS: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """Quantise the key group at token ``first`` to 4 bits; ``PADDED`` covers half a head."""
    HALF: tl.constexpr = SIZE // 2
    x = group_rows(new, new_stride, tail, first, length, 0, SIZE, HALF, PADDED, SLOTS, GROUP)
    low = encode_keys(x, scales, first // GROUP, 0, SIZE, HALF, PADDED, 4)
    x = group_rows(new, new_stride, tail, first, length, HALF, SIZE, HALF, PADDED, SLOTS, GROUP)
    high = encode_keys(x, scales, first // GROUP, HALF, SIZE, HALF, PADDED, 4)
    store_key_codes(codes, first // GROUP, low | (high << 4), HALF, PADDED, GROUP)


@triton.jit
def bounds(x, FIRST: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr, AT: tl.constexpr):
    """Least and greatest ``[T]`` of those channels of ``x [T, PADDED]`` (``FIRST`` on) that lie in group ``AT``."""
    channel = tl.arange(0, PADDED)
    inside = ((channel < WIDTH) & ((FIRST + channel) // GROUP == AT))[None, :]
    low = tl.min(tl.where(inside, x, float("inf")), 1)
    return inside, low, tl.max(tl.where(inside, x, float("-inf")), 1)


@triton.jit
def pack_values_8(codes, scales, tail, new, new_stride, first, length, SIZE: tl.constexpr, PADDED: tl.constexpr,
                  SLOTS: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """Quantise the values of ``GROUP`` tokens from ``first`` to 8 bits, one scale per token and channel group."""
    GROUPS: tl.constexpr = SIZE // GROUP
    token = tl.arange(0, GROUP)
    x = group_rows(new, new_stride, tail, first, length, 0, SIZE, SIZE, PADDED, SLOTS, GROUP)
    code = tl.zeros(x.shape, tl.uint8)
    for at in tl.static_range(GROUPS):
        inside, low, high = bounds(x, 0, SIZE, PADDED, GROUP, at)
        scale, zero = steps(low, high, 8)
        place = scales + (first + token) * (2 * GROUPS) + at
        tl.store(place, scale)
        tl.store(place + GROUPS, zero)
        code = tl.where(inside, encode(x, scale[:, None], zero[:, None], 8), code)
    store_rows(codes + first * SIZE, token, code, token >= 0, SIZE, 0, SIZE, PADDED)


@triton.jit
def pack_values_4(codes, scales, tail, new, new_stride, first, length, SIZE: tl.constexpr, PADDED: tl.constexpr,
                  SLOTS: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """Quantise the values of ``GROUP`` tokens from ``first`` to 4 bits; a channel group may lie in both halves."""
    HALF: tl.constexpr = SIZE // 2
    GROUPS: tl.constexpr = SIZE // GROUP
    token = tl.arange(0, GROUP)
    x = group_rows(new, new_stride, tail, first, length, 0, SIZE, HALF, PADDED, SLOTS, GROUP)
    y = group_rows(new, new_stride, tail, first, length, HALF, SIZE, HALF, PADDED, SLOTS, GROUP)
    code = tl.zeros(x.shape, tl.uint8)
    for at in tl.static_range(GROUPS):
        in_x, low_x, high_x = bounds(x, 0, HALF, PADDED, GROUP, at)
        in_y, low_y, high_y = bounds(y, HALF, HALF, PADDED, GROUP, at)
        scale, zero = steps(tl.minimum(low_x, low_y), tl.maximum(high_x, high_y), 4)
        place = scales + (first + token) * (2 * GROUPS) + at
        tl.store(place, scale)
        tl.store(place + GROUPS, zero)
        low = encode(x, scale[:, None], zero[:, None], 4)
        high = encode(y, scale[:, None], zero[:, None], 4)
        code = code | tl.where(in_x, low, 0) | (tl.where(in_y, high, 0) << 4)
    store_rows(codes + first * HALF, token, code, token >= 0, HALF, 0, HALF, PADDED)


@triton.jit
def append_dense(dense, new, new_stride, first, count, length, capacity, SIZE: tl.constexpr, PADDED: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """Copy new tokens ``first ..`` of ``count`` to their place in a dense side, never past ``capacity``."""
    token = tl.cast(first, tl.int64) + tl.arange(0, BLOCK)
    channel = tl.arange(0, PADDED)
    keep = (token < count) & (length + token < capacity)
    mask = keep[:, None] & (channel < SIZE)[None, :]
    x = tl.load(new + token[:, None] * new_stride + channel[None, :], mask=mask, other=0.0)
    store_rows(dense + length * SIZE, token, x, keep, SIZE, 0, SIZE, PADDED)


@triton.jit
def append_ring(tail, new, new_stride, first, count, length, capacity, SIZE: tl.constexpr, PADDED: tl.constexpr,
                SLOTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Copy those of the new tokens ``first ..`` that are among the newest ``SLOTS`` to their slot of the tail."""
    token = tl.cast(first, tl.int64) + tl.arange(0, BLOCK)
    channel = tl.arange(0, PADDED)
    keep = (token < count) & (token >= count - SLOTS) & (length + token < capacity)
    mask = keep[:, None] & (channel < SIZE)[None, :]
    x = tl.load(new + token[:, None] * new_stride + channel[None, :], mask=mask, other=0.0)
    store_rows(tail, (length + token) % SLOTS, x, keep, SIZE, 0, SIZE, PADDED)
