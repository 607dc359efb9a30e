# mypy: ignore-errors
"""Lists of blocks, pages and single keys (:mod:`effcompile.kernels.blocks`), taken so that no address is wrong.

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
def count_below(numbers, count, limit):
    """How many of a list of ``count`` numbers that ascends are below ``limit``. The others are few: from the end."""
    last = tl.load(numbers + count - 1, mask=count > 0, other=-1)
    while last >= limit:
        count -= 1
        last = tl.load(numbers + count - 1, mask=count > 0, other=-1)
    return count


@triton.jit
def tile_at(index, step, limit, bad, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The first key of tile ``step`` of a list, and ``bad`` or whether its block ``index`` is not one below ``limit``.

    ``step`` counts the tiles of all blocks of the list; tiles fill a block.
    """
    there = tl.minimum(tl.maximum(index, 0), tl.maximum(limit - 1, 0))
    return there * BLOCK + step % (BLOCK // TILE) * TILE, bad | (index < 0) | (index >= limit)


@triton.jit
def tokens_of(token_of, start, stop, bad, ANYWHERE: tl.constexpr, TILE: tl.constexpr):
    """The tokens ``[TILE]`` that slots ``start ..`` hold, and ``bad`` or whether one below ``stop`` is not there.

    ``ANYWHERE`` tokens may be any numbers, and are those that stand there, in 64 bits.
    """
    slot = start + tl.arange(0, TILE)
    token = tl.load(token_of + slot, mask=slot < stop, other=0)
    if ANYWHERE:
        there = token.to(tl.int64)
    else:
        there = tl.minimum(tl.maximum(token, 0), tl.maximum(stop - 1, 0)).to(tl.int32)
        bad = bad | (tl.max((there != token).to(tl.int32), 0) > 0)
    return there, bad


@triton.jit
def ranges_fit(ranges, place, count, limit, bad):
    """``bad``, or whether a row's ``count`` ranges, from ``place [M]`` on, do not ascend apart from 0 to ``limit``."""
    behind = tl.zeros_like(place).to(tl.int32)
    found = behind
    for at in range(0, count):
        first = tl.load(ranges + place + 2 * at)
        length = tl.load(ranges + place + 2 * at + 1)
        found |= ((length < 0) | ((length > 0) & ((first < behind) | (first > limit - length)))).to(tl.int32)
        behind = tl.where(length > 0, first + length, behind)
    return bad | (tl.max(found, 0) > 0)


@triton.jit
def in_ranges(ranges, place, count, key):
    """Whether ``key [N]`` lie in any of a row's ``count`` ranges, from ``place [M]`` on: bool ``[M, N]``."""
    inside = (place[:, None] < 0) & (key[None, :] < 0)
    for at in range(0, count):
        first = tl.load(ranges + place + 2 * at)
        behind = first + tl.load(ranges + place + 2 * at + 1)
        inside = inside | ((key[None, :] >= first[:, None]) & (key[None, :] < behind[:, None]))
    return inside


@triton.jit
def falls(numbers, count, limit, TILE: tl.constexpr):
    """Whether the first ``count`` of a list of numbers do not ascend from 0 to below ``limit``."""
    found = tl.zeros((TILE,), tl.int32)
    for first in range(0, count, TILE):
        place = first + tl.arange(0, TILE)
        number = tl.load(numbers + place, mask=place < count, other=0)
        before = tl.load(numbers + place - 1, mask=(place > 0) & (place < count), other=-1)
        found |= ((place < count) & ((number <= before) | (number >= limit))).to(tl.int32)
    return tl.max(found, 0) > 0


@triton.jit
def among(number, numbers, count, step):
    """Whether each of ``number [N]`` is among the first ``count`` of a list that ascends; ``step`` is a power of two.

    At least half of ``count``: a search by halves, from there on.
    """
    place = tl.zeros_like(number)
    while step > 0:
        probe = place + step
        place = tl.where(tl.load(numbers + probe, mask=probe < count, other=2147483647) <= number, probe, place)
        step = step // 2
    return tl.load(numbers + place, mask=place < count, other=-1) == number


@triton.jit
def check_columns(wrong, length, capacity, queries, heads, step, column_num, column_idx, batch_lists, head_lists, room,
                  span, kv_num, kv_idx, full_num, full_idx, batch_rows, head_rows, columns, FULL: tl.constexpr,
                  BLOCK: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Write to ``wrong [B, H, nQ]`` whether a block of queries has a list that is wrong, or visits a key twice.

    Lists of blocks and of single keys have to ascend, and no single key may lie in a listed block
    (:mod:`effcompile.kernels.columns`). A program of its own for each, since a search would cost attention registers.
    """
    n = tl.minimum(tl.load(length), capacity).to(tl.int32)
    rows = tl.cdiv(queries, BLOCK)
    head, row = tl.program_id(0).to(tl.int64) // rows, tl.program_id(0) % rows
    batch, member = head // heads, head % heads
    at = batch * batch_rows + member * head_rows + row
    kv_idx += at * columns
    partial, bad = count_within(tl.load(kv_num + at), columns, n > columns * BLOCK)
    bad = bad | falls(kv_idx, partial, columns, TILE)
    whole = 0
    if FULL:
        full_idx += at * columns
        whole, bad = count_within(tl.load(full_num + at), columns, bad)
        bad = bad | falls(full_idx, whole, columns, TILE)
    at = batch * batch_lists + member * head_lists + row // span
    column_idx += at * room
    count, bad = count_within(tl.load(column_num + at), room, bad)
    bad = bad | falls(column_idx, count, n, TILE)
    twice = tl.zeros((TILE,), tl.int32)
    for first in range(0, count, TILE):
        place = first + tl.arange(0, TILE)
        block = tl.load(column_idx + place, mask=place < count, other=-1) // BLOCK
        listed = among(block, kv_idx, partial, step)
        if FULL:
            listed = listed | among(block, full_idx, whole, step)
        twice |= ((place < count) & listed).to(tl.int32)
    tl.store(wrong + tl.program_id(0), (bad | (tl.max(twice, 0) > 0)).to(tl.int8))
