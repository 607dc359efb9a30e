# mypy: ignore-errors
"""Keys rebuilt from latents, a tile at a time, on chip: the pieces of the product, the bias, the norm.

The counterpart of :mod:`effcompile.kernels.latent`. A rebuilt tile is some *operands*: the first channels of all pairs
that RoPE turns, the second ones, and the channels that it leaves. So a rotation works on whole operands, whichever
channels are pairs, and nothing is exchanged between threads. Channel ``i`` of an operand is ``FIRST + i * STEP`` of a
head.

Latents and the rows of the factor come in chunks of ``WIDTH`` latents and padding up to ``PADDED``, which are 0.
"""

import triton
import triton.language as tl

from effcompile.kernels.triton.load import contraction_first, key_steps, token_first, value_steps
from effcompile.kernels.triton.number import convert, dequantize_8, dequantize_fp8, field


@triton.jit
def load_channels(base, row, keep, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr,
                  PADDED: tl.constexpr):  # fmt: skip
    """``[R, PADDED]``: the ``COUNT`` channels of an operand, of rows that begin at ``base + row [R]``."""
    channel = tl.arange(0, PADDED)
    mask = keep[:, None] & (channel < COUNT)[None, :]
    return tl.load(base + row[:, None] + (FIRST + channel * STEP)[None, :], mask=mask, other=0.0)


@triton.jit
def factor_rows(up, rank, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr, CHANNELS: tl.constexpr,
                ROW: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """``[CHANNELS, PADDED]``: latents ``rank ..`` of the rows, of ``ROW`` numbers, of an operand's channels."""
    channel = tl.arange(0, CHANNELS)
    latent = tl.arange(0, PADDED)
    mask = (channel < COUNT)[:, None] & (latent < WIDTH)[None, :]
    place = ((FIRST + channel * STEP) * ROW)[:, None] + latent[None, :]
    return convert(tl.load(up + rank + place, mask=mask, other=0.0), DTYPE)


@triton.jit
def factor_column(up, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr, CHANNELS: tl.constexpr,
                  ROW: tl.constexpr, AT: tl.constexpr):  # fmt: skip
    """``[CHANNELS, 1]``: column ``AT`` of the rows of an operand's channels: the bias, or the weight of the norm."""
    channel = tl.arange(0, CHANNELS)
    return tl.load(up + (FIRST + channel * STEP) * ROW + AT, mask=channel < COUNT, other=0.0)[:, None]


@triton.jit
def sum_of_squares(x):
    """``[1, TILE]`` of an operand ``[CHANNELS, TILE]`` fp32."""
    return tl.sum(x * x, 0)[None, :]


@triton.jit
def latents_by_channel(a, b, c, scales, start, stop, K: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
                       WIDTH: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
                       BITS: tl.constexpr, E4M3: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """``[PADDED, TILE]``: code ``K`` of each of ``WIDTH`` words, whose bytes are ``a``, ``b``, ``c``, as numbers.

    ``scales`` are those of the first of these words' first codes; of ``SIZE`` latents ``ROWS`` lie between the codes of
    a word. As :func:`effcompile.kernels.triton.load.keys_joined` lays them out.
    """
    if E4M3:
        scale = key_steps(scales, start, stop, 0, SIZE, WIDTH, PADDED, GROUP, TILE, 1, 1)
        return contraction_first(dequantize_fp8(a, scale, DTYPE), PADDED, TILE)
    scale = key_steps(scales, start, stop, K * ROWS, SIZE, WIDTH, PADDED, GROUP, TILE)
    zero = key_steps(scales, start, stop, SIZE + K * ROWS, SIZE, WIDTH, PADDED, GROUP, TILE)
    return contraction_first(dequantize_8(field(a, b, c, K, BITS), scale, zero, DTYPE, PTX), PADDED, TILE)


@triton.jit
def latents_by_token(a, b, c, scales, rank, start, stop, K: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
                     WIDTH: tl.constexpr, PADDED: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr,
                     TILE: tl.constexpr, BITS: tl.constexpr, E4M3: tl.constexpr, DTYPE: tl.constexpr,
                     PTX: tl.constexpr):  # fmt: skip
    """The same of latents with a scale per token, of words ``rank ..``; ``SPAN`` words share one."""
    GROUPS: tl.constexpr = SIZE // GROUP
    first = rank + K * ROWS
    if E4M3:
        scale = value_steps(scales, start, stop, 0, first, GROUPS, WIDTH, PADDED, SPAN, GROUP, TILE, 1, 1)
        return tl.trans(token_first(dequantize_fp8(a, scale, DTYPE), TILE, PADDED))
    scale = value_steps(scales, start, stop, 0, first, GROUPS, WIDTH, PADDED, SPAN, GROUP, TILE)
    zero = value_steps(scales, start, stop, GROUPS, first, GROUPS, WIDTH, PADDED, SPAN, GROUP, TILE)
    x = dequantize_8(field(a, b, c, K, BITS), scale, zero, DTYPE, PTX)
    return tl.trans(token_first(x, TILE, PADDED))
