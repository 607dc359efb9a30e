# mypy: ignore-errors
"""Block lists: counts and numbers of blocks (:mod:`effcompile.kernels.blocks`), taken so that no address is wrong.

What a list says is data, and raising an error would wait for the device. So a count or a number that cannot be is
replaced by one that can, and noted in ``bad``; the rows of that list then become NaN.
"""

import triton
import triton.language as tl


@triton.jit
def count_within(count, columns, bad):
    """``count``, from 0 to ``columns``, and ``bad`` or whether it was not."""
    there = tl.minimum(tl.maximum(count, 0), columns)
    return there, bad | (there != count)


@triton.jit
def tile_at(index, step, limit, bad, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The first key of tile ``step`` of a list, and ``bad`` or whether its block ``index`` is not one below ``limit``.

    ``step`` counts the tiles of all blocks of the list; tiles fill a block.
    """
    there = tl.minimum(tl.maximum(index, 0), tl.maximum(limit - 1, 0))
    return there * BLOCK + step % (BLOCK // TILE) * TILE, bad | (index < 0) | (index >= limit)
