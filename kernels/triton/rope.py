# mypy: ignore-errors
"""Keys before RoPE: tiles of angles, tiles of keys rotated by them, and a group's keys rotated back.

The table is ``[C/16, 2, r/2, 16]`` fp16 (:mod:`effcompile.kernels.rope`); a tile begins at a multiple of 16. Rotations
are computed in fp32, also between two operands in fp16.
"""

import triton
import triton.language as tl

from effcompile.kernels.triton.load import channels
from effcompile.kernels.triton.number import convert


@triton.jit
def angle_tile(table, start, stop, pair, turned, ROTARY: tl.constexpr, TILE: tl.constexpr):
    """cos and sin, two of ``[N, TILE]`` fp32, of pairs ``pair [N]``; 1 and 0 for those that are not ``turned``."""
    token = tl.arange(0, TILE)
    base = table + tl.cast(start // 16, tl.int64) * (ROTARY * 16)
    place = (pair * 16)[:, None] + (token // 16 * (ROTARY * 16) + token % 16)[None, :]
    mask = turned[:, None] & (start + token < stop)[None, :]
    cos = tl.load(base + place, mask=mask, other=1.0)
    sin = tl.load(base + place + ROTARY // 2 * 16, mask=mask, other=0.0)
    return cos.to(tl.float32), sin.to(tl.float32)


@triton.jit
def two_halves(x, TILE: tl.constexpr):
    """``[2 * N, TILE]`` as two of ``[N, TILE]``."""
    return tl.split(tl.permute(tl.reshape(x, (2, x.shape[0] // 2, TILE)), (1, 2, 0)))


@triton.jit
def turn_halves(low, high, table, start, stop, ROTARY: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
                PARTS: tl.constexpr, TILE: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """The lower and the upper half of the channels of keys ``[PARTS * PADDED, TILE]``, all of which are rotated."""
    pair, real = channels(WIDTH, PADDED, PARTS)
    cos, sin = angle_tile(table, start, stop, pair, real, ROTARY, TILE)
    a = low.to(tl.float32)
    b = high.to(tl.float32)
    return convert(a * cos - b * sin, DTYPE), convert(b * cos + a * sin, DTYPE)


@triton.jit
def turn_within(x, table, start, stop, ROTARY: tl.constexpr, TILE: tl.constexpr, DTYPE: tl.constexpr):
    """Keys ``[N, TILE]``, channels in order, the first ``ROTARY`` of which, a power of two, are rotated by halves."""
    HALF: tl.constexpr = ROTARY // 2
    RUNS: tl.constexpr = x.shape[0] // ROTARY
    pair = tl.arange(0, RUNS * HALF)
    cos, sin = angle_tile(table, start, stop, pair, pair < HALF, ROTARY, TILE)
    a, b = tl.split(tl.permute(tl.reshape(x.to(tl.float32), (RUNS, 2, HALF, TILE)), (0, 2, 3, 1)))
    a = tl.reshape(a, (RUNS * HALF, TILE))
    b = tl.reshape(b, (RUNS * HALF, TILE))
    y = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (RUNS, HALF, TILE, 2))
    return convert(tl.reshape(tl.permute(y, (0, 3, 1, 2)), (2 * RUNS * HALF, TILE)), DTYPE)


@triton.jit
def turn_adjacent(x, table, start, stop, ROTARY: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
                  PADDED: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Keys ``[PARTS * PADDED, TILE]``, channels ``FIRST ..`` of an even ``WIDTH`` a part, rotated in pairs of two."""
    HALF: tl.constexpr = PARTS * PADDED // 2
    column = tl.arange(0, HALF) * 2
    pair = (FIRST + column // PADDED * WIDTH + column % PADDED) // 2
    cos, sin = angle_tile(table, start, stop, pair, (column % PADDED < WIDTH) & (pair < ROTARY // 2), ROTARY, TILE)
    a, b = tl.split(tl.permute(tl.reshape(x.to(tl.float32), (HALF, 2, TILE)), (0, 2, 1)))
    y = tl.permute(tl.join(a * cos - b * sin, b * cos + a * sin), (0, 2, 1))
    return convert(tl.reshape(y, (2 * HALF, TILE)), DTYPE)


@triton.jit
def partner(channel, ROTARY: tl.constexpr, ADJACENT: tl.constexpr):
    """The other channel of each channel's pair, the pair's number, and whether the channel is its second."""
    HALF: tl.constexpr = ROTARY // 2
    if ADJACENT:
        second = channel % 2 == 1
        other = channel + 1 - 2 * (channel % 2)
        pair = channel // 2
    else:
        second = channel >= HALF
        other = tl.where(second, channel - HALF, channel + HALF)
        pair = channel % HALF
    return tl.where(channel < ROTARY, other, channel), pair, second


@triton.jit
def turn_back(x, other, table, first, channel, real, ROTARY: tl.constexpr, ADJACENT: tl.constexpr,
              GROUP: tl.constexpr):  # fmt: skip
    """``[GROUP, N]`` keys ``x`` before RoPE, bit for bit as the reference rounds them (without fused products).

    ``other`` are the values of each channel's :func:`partner`.
    """
    _, pair, second = partner(channel, ROTARY, ADJACENT)
    token = tl.arange(0, GROUP)
    base = table + tl.cast(first // 16, tl.int64) * (ROTARY * 16)
    place = (token // 16 * (ROTARY * 16) + token % 16)[:, None] + (pair * 16)[None, :]
    mask = (real & (channel < ROTARY))[None, :] & (token >= 0)[:, None]
    cos = tl.load(base + place, mask=mask, other=1.0).to(tl.float32)
    sin = tl.load(base + place + ROTARY // 2 * 16, mask=mask, other=0.0).to(tl.float32)
    side = other * tl.where(second[None, :], -sin, sin)
    return tl.div_rn(x * cos + side, cos * cos + sin * sin)
