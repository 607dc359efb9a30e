# mypy: ignore-errors
"""Quantise and pack whole groups, bit for bit as :mod:`effcompile.kernels.quantize` does, and append rows.

Division is IEEE (``div_rn``) and rounding is half to even; codes come from the fp16 scale and zero that are stored.
"""

import triton
import triton.language as tl

from effcompile.kernels.triton.load import channels, store_rows
from effcompile.kernels.triton.rope import partner, turn_back

FP16_MAX = tl.constexpr(65504.0)
E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def ends(x, AXIS: tl.constexpr):
    """Smallest and largest number of groups along ``AXIS``; NaN if there is one, which maxima on a GPU pass over."""
    bad = tl.max((x != x).to(tl.int32), AXIS) > 0
    low = tl.where(bad, float("nan"), tl.min(x, AXIS))
    return low, tl.where(bad, float("nan"), tl.max(x, AXIS))


@triton.jit
def steps(low, high, BITS: tl.constexpr):
    """fp16 scale and zero of groups that span ``low .. high`` (fp32, any shape). NaN stays NaN."""
    levels = tl.full(low.shape, 2**BITS - 1, tl.float32)
    scale = tl.div_rn(high - low, levels)
    scale = tl.where(scale > FP16_MAX, FP16_MAX, scale).to(tl.float16)
    zero = tl.where(low > FP16_MAX, FP16_MAX, tl.where(low < -FP16_MAX, -FP16_MAX, low)).to(tl.float16)
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
def step_fp8(low, high):
    """fp16 scale of groups of e4m3 numbers that span ``low .. high`` (fp32, any shape). NaN stays NaN."""
    peak = tl.where(tl.abs(low) > tl.abs(high), tl.abs(low), tl.abs(high))
    scale = tl.div_rn(peak, tl.full(low.shape, E4M3_MAX, tl.float32))
    return tl.where(scale > FP16_MAX, FP16_MAX, scale).to(tl.float16)


@triton.jit
def encode_fp8(x, scale):
    """e4m3 codes (uint8) of ``x`` fp32, nearest even and saturating; a group of scale 0 has codes 0."""
    step = tl.broadcast_to(scale.to(tl.float32), x.shape)
    x = tl.div_rn(x, tl.where(step > 0, step, 1.0))
    x = tl.where(step > 0, tl.minimum(tl.maximum(x, -E4M3_MAX), E4M3_MAX), 0.0)
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Below 2**-6 the last bit is worth 2**-9, as that of a number at 2**14. Above, the bias goes from 127 to 7.
    small = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    return (tl.where(size < 0x3C800000, small, code) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def group_rows(new, new_stride, tail, first, length, SIZE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
               PARTS: tl.constexpr, SLOTS: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """``[GROUP, PARTS * PADDED]`` fp32: the group at ``first``, its tokens before ``length`` from the tail."""
    channel, real = channels(WIDTH, PADDED, PARTS)
    return rows_of(new, new_stride, tail, first, length, channel, real, SIZE, SLOTS, GROUP)


@triton.jit
def rows_of(new, new_stride, tail, first, length, channel, real, SIZE: tl.constexpr, SLOTS: tl.constexpr,
            GROUP: tl.constexpr):  # fmt: skip
    """:func:`group_rows` of any channels ``[N]``, 0 where one is not ``real``."""
    token = first + tl.arange(0, GROUP)
    live = real[None, :]
    fresh = (token >= length)[:, None]
    place = channel[None, :]
    given = tl.load(new + (token - length)[:, None] * new_stride + place, mask=fresh & live, other=0.0)
    kept = tl.load(tail + (token % SLOTS)[:, None] * SIZE + place, mask=(token < length)[:, None] & live, other=0.0)
    return tl.where(fresh, given.to(tl.float32), kept.to(tl.float32))


@triton.jit
def words_of(code, PADDED: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr):
    """Codes ``[X, PARTS * PADDED]`` as words ``[X, PADDED]`` of one code of each part: uint32."""
    part = tl.reshape(code.to(tl.uint32), (code.shape[0], PARTS, PADDED))
    # Every bit is set by one part only: the sum puts them together.
    return tl.sum(part << (tl.arange(0, PARTS) * BITS).to(tl.uint32)[None, :, None], 1)


@triton.jit
def pack_keys(codes, scales, tail, new, new_stride, first, length, SIZE: tl.constexpr, PADDED: tl.constexpr,
              PARTS: tl.constexpr, BITS: tl.constexpr, SLOTS: tl.constexpr, GROUP: tl.constexpr,
              E4M3: tl.constexpr = False):  # fmt: skip
    """Quantise the group at token ``first``, as keys are by default: a scale per channel, ``PARTS`` channels a word."""
    WIDTH: tl.constexpr = SIZE // PARTS
    x = group_rows(new, new_stride, tail, first, length, SIZE, WIDTH, PADDED, PARTS, SLOTS, GROUP)
    write_keys(codes, scales, x, first, SIZE, PADDED, PARTS, BITS, GROUP, E4M3)


@triton.jit
def pack_turned_keys(codes, scales, tail, table, new, new_stride, first, length, SIZE: tl.constexpr,
                     PADDED: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr, SLOTS: tl.constexpr,
                     GROUP: tl.constexpr, ROTARY: tl.constexpr, ADJACENT: tl.constexpr):  # fmt: skip
    """:func:`pack_keys` of keys before RoPE: their group is rotated back first."""
    channel, real = channels(SIZE // PARTS, PADDED, PARTS)
    other, _, _ = partner(channel, ROTARY, ADJACENT)
    x = rows_of(new, new_stride, tail, first, length, channel, real, SIZE, SLOTS, GROUP)
    y = rows_of(new, new_stride, tail, first, length, other, real, SIZE, SLOTS, GROUP)
    x = turn_back(x, y, table, first, channel, real, ROTARY, ADJACENT, GROUP)
    write_keys(codes, scales, x, first, SIZE, PADDED, PARTS, BITS, GROUP)


@triton.jit
def write_keys(codes, scales, x, first, SIZE: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr,
               BITS: tl.constexpr, GROUP: tl.constexpr, E4M3: tl.constexpr = False):  # fmt: skip
    """Quantise and write the key group ``x`` ``[GROUP, PARTS * PADDED]`` fp32 at token ``first``."""
    WIDTH: tl.constexpr = SIZE // PARTS
    BYTES: tl.constexpr = PARTS * BITS // 8
    at = first // GROUP
    channel, real = channels(WIDTH, PADDED, PARTS)
    low, high = ends(x, 0)
    if E4M3:
        scale = step_fp8(low, high)
        tl.store(scales + at * SIZE + channel, scale, mask=real)
        code = encode_fp8(x, scale[None, :])
    else:
        scale, zero = steps(low, high, BITS)
        place = scales + at * (2 * SIZE) + channel
        tl.store(place, scale, mask=real)
        tl.store(place + SIZE, zero, mask=real)
        code = encode(x, scale[None, :], zero[None, :], BITS)
    word = tl.trans(words_of(code, PADDED, PARTS, BITS))
    row = tl.arange(0, PADDED)
    place = codes + at * (SIZE * BITS // 8 * GROUP) + (row * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
    for byte in tl.static_range(BYTES):
        tl.store(place + byte * WIDTH * GROUP, (word >> (8 * byte)).to(tl.uint8), mask=(row < WIDTH)[:, None])


@triton.jit
def pack_values(codes, scales, tail, new, new_stride, first, length, SIZE: tl.constexpr, PADDED: tl.constexpr,
                PARTS: tl.constexpr, BITS: tl.constexpr, SLOTS: tl.constexpr, GROUP: tl.constexpr,
                E4M3: tl.constexpr = False):  # fmt: skip
    """Quantise ``GROUP`` tokens from ``first``, as values are by default: one scale per token and channel group.

    A channel group may lie in several parts, and a part hold several groups.
    """
    WIDTH: tl.constexpr = SIZE // PARTS
    BYTES: tl.constexpr = PARTS * BITS // 8
    GROUPS: tl.constexpr = SIZE // GROUP
    token = tl.arange(0, GROUP)
    x = group_rows(new, new_stride, tail, first, length, SIZE, WIDTH, PADDED, PARTS, SLOTS, GROUP)
    channel, real = channels(WIDTH, PADDED, PARTS)
    code = tl.zeros(x.shape, tl.uint8)
    for at in tl.static_range(GROUPS):
        inside = (real & (channel // GROUP == at))[None, :]
        low, _ = ends(tl.where(inside, x, float("inf")), 1)
        high = tl.where(low != low, low, tl.max(tl.where(inside, x, float("-inf")), 1))
        if E4M3:
            scale = step_fp8(low, high)
            tl.store(scales + (first + token) * GROUPS + at, scale)
            found = encode_fp8(x, scale[:, None])
        else:
            scale, zero = steps(low, high, BITS)
            place = scales + (first + token) * (2 * GROUPS) + at
            tl.store(place, scale)
            tl.store(place + GROUPS, zero)
            found = encode(x, scale[:, None], zero[:, None], BITS)
        code = tl.where(inside, found, code)
    word = words_of(code, PADDED, PARTS, BITS)
    row = codes + first * (WIDTH * BYTES)
    for byte in tl.static_range(BYTES):
        part = (word >> (8 * byte)).to(tl.uint8)
        store_rows(row, token, part, token >= 0, WIDTH * BYTES, byte * WIDTH, WIDTH, PADDED)


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
