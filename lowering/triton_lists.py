"""Attention over listed blocks and pages as Triton source: the skeletons beside prefill and decode."""

from __future__ import annotations

from effcompile.kernels.program import Program
from effcompile.lowering.triton_side import Blocks, Side, indent
from effcompile.lowering.triton_tile import (
    FIXED,
    attend_start,
    fold,
    fold_gathered,
    merge_kernel,
    poison,
    queries_again,
    split_end,
    tile_function,
)

LISTS = [
    "kv_num, kv_idx, full_num, full_idx, batch_rows, head_rows, columns,",
    "FULL: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):",
]
"""Block lists: rows of lists from one batch entry and head to the next, columns of a row, and how blocks are cut."""
ROWS_FIXED = '"batch_rows", "head_rows", "columns"'
SINGLE = ["column_num, column_idx, batch_lists, head_lists, room, span,"]
"""Lists of single keys: lists from one batch entry and head to the next, their room, and the blocks that share one."""
SINGLE_FIXED = '"batch_lists", "head_lists", "room", "span"'
PAGES = [
    "pages, page_num, batch_lists, head_lists, room,",
    "PAGE: tl.constexpr, TILE: tl.constexpr, RING: tl.constexpr, SPLITS: tl.constexpr):",
]
"""Lists of pages: lists from one batch entry and key/value head to the next, their room, and how pages are cut."""
POSITIONS = ["token_of, batch_slots, head_slots,"]
"""Tokens of slots, and slots from one batch entry and key/value head to the next."""


def blocks(
    program: Program,
    blocks: Blocks,
    keys: Side,
    values: Side,
    packed: list[str],
    end: list[str],
    args: list[str],
    ringed: bool,
) -> list[list[str]]:
    """Many rows that visit listed blocks only: a program per query head and tile of a block of queries."""
    ratio = program.ratio
    functions, lists, fixed = [], LISTS, [FIXED, ROWS_FIXED]
    # All slots have a token where slots do not say which.
    bad = "(n > columns * BLOCK) | (n < capacity)" if program.positions else "n > columns * BLOCK"
    # What something besides the predicate is looked up by has to be a token.
    anywhere = program.moved and not program.predicate.key_mask and not program.score.bias
    # Before the last of them, which may be the one that is cut, all blocks are packed: else the list does not ascend.
    limit = "tl.where(step < old * (BLOCK // TILE), cut, cut + 1)" if ringed else "columns"
    stop = "packed" if ringed else "n"
    tokens = [f"    tokens, bad = tokens_of(token_of, start, n, bad, {anywhere}, TILE)"] * program.positions
    lines = [
        "tiles = tl.cdiv(queries, ROWS)",
        f"head = tl.program_id(0).to(tl.int64) // (tiles * {ratio})",
        f"rest = tl.program_id(0) % (tiles * {ratio})",
        "# Heads that share keys are neighbours; the last rows see the most keys, and start first.",
        f"tile, sibling = tiles - 1 - rest // {ratio}, rest % {ratio}",
        *attend_start(program, keys, values, "ROWS", f"(tile * ROWS + tl.arange(0, ROWS)) * {ratio} + sibling"),
        f"at = batch * batch_rows + (head % groups * {ratio} + sibling) * head_rows + tile * ROWS // BLOCK",
        "kv_idx += at * columns",
        f"partial, bad = count_within(tl.load(kv_num + at), columns, {bad})",
        *["bad = ranges_fit(ranges, range_place, range_count, n, bad)"] * program.ranges,
        *(packed if ringed else []),
        f"# The block that the end{' of what is packed' * ringed} cuts short, or the number behind the last one.",
        f"cut, short = {stop} // BLOCK, 0",
        *([*_newest("kv_idx", "partial", "old", "inner"), "whole, past = 0, 0"] if ringed else []),
        *(["token_of += batch * batch_slots + head % groups * head_slots"] * program.positions),
        "if FULL:",
        "    full_idx += at * columns",
        "    whole, bad = count_within(tl.load(full_num + at), columns, bad)",
        "    # A cut block is tested, whoever lists it, so that no key is counted that is not there.",
        *(
            indent([*_newest("full_idx", "whole", "past", "short"), "short -= past"])
            if ringed
            else ["    short = (tl.load(full_idx + whole - 1, mask=whole > 0, other=-1) == cut).to(tl.int32)"]
        ),
        f"    for step in range(0, {'past' if ringed else '(whole - short)'} * (BLOCK // TILE)):",
        "        index = tl.load(full_idx + step // (BLOCK // TILE))",
        "        start, bad = tile_at(index, step, cut, bad, BLOCK, TILE)",
        *(indent(tokens) if program.score.bias else []),
        *indent(fold("body", "TILE", stop, False, program, keys, values), 8),
    ]
    if program.moved:
        fixed = [*fixed, '"batch_stands", "head_stands"']
    if program.ranges:
        fixed = [*fixed, '"batch_ranges", "head_ranges", "range_count"']
    if program.positions:
        lists, fixed = [*POSITIONS, *LISTS], [*fixed, '"batch_slots", "head_slots"']
    entries = "inner" if ringed else "partial"
    lines += [
        f"for step in range(0, ({entries} + short) * (BLOCK // TILE)):",
        "    index = step // (BLOCK // TILE)",
        f"    index = tl.load(kv_idx + index, mask=index < {entries}, other=cut)",
        f"    start, bad = tile_at(index, step, {limit}, bad, BLOCK, TILE)",
        *tokens,
        *indent(fold("body", "TILE", stop, True, program, keys, values)),
    ]
    if ringed:
        lists = [LISTS[0], LISTS[1].replace("):", ", RING: tl.constexpr):")]
        lines += _newest_tiles(program, keys, values)
    if program.columns:
        functions = [tile_function(program, keys, values, "gathered", "peak.shape[0]"), _check(program)]
        lists, fixed = ["wrong,", *SINGLE, *LISTS], [*fixed, SINGLE_FIXED]
        lines += [
            f"member = head * {ratio} + sibling",
            "bad = bad | (tl.load(wrong + member * tl.cdiv(queries, BLOCK) + tile * ROWS // BLOCK) != 0)",
            f"member = head % groups * {ratio} + sibling",
            "at = batch * batch_lists + member * head_lists + tile * ROWS // BLOCK // span",
            "column_idx += at * room",
            "count, bad = count_within(tl.load(column_num + at), room, bad)",
            "for first in range(0, count, TILE):",
            "    keep = first + tl.arange(0, TILE) < count",
            "    key = tl.load(column_idx + first + tl.arange(0, TILE), mask=keep, other=0)",
            "    # A list that is wrong is noted already; nothing may be read there.",
            "    keep = keep & (key >= 0) & (key < n)",
            *indent(fold_gathered(program, keys, values)),
        ]
    kernel = [
        f"@triton.jit(do_not_specialize=[{', '.join(fixed)}])",
        f"def {program.name}({args[0]}",
        *indent([*args[1:-1], args[-1] + ",", *lists], 8),
        *indent(lines + poison(values) + end),
    ]
    return [*functions, kernel]


def _newest(numbers: str, count: str, below: str, within: str) -> list[str]:
    """Lines that count entries before block ``cut``, and with it, of a list; those behind hold newest tokens alone."""
    lines = [f"{below} = count_below({numbers}, {count}, cut)"]
    first = f"tl.load({numbers} + {below}, mask={below} < {count}, other=-1)"
    return [*lines, f"{within} = {below} + ({first} == cut).to(tl.int32)"]


def _newest_tiles(program: Program, keys: Side, values: Side) -> list[str]:
    """Lines that fold in the tokens that are not packed, of block ``cut`` and those behind it in both lists, tested."""
    return [
        *queries_again(program, keys),
        "# Tiles of which all tokens are packed, or none.",
        "for step in range(old * (BLOCK // RING), (partial + whole - past) * (BLOCK // RING)):",
        "    entry = step // (BLOCK // RING)",
        "    index = tl.load(kv_idx + entry, mask=entry < partial, other=0)",
        "    if FULL:",
        "        index += tl.load(full_idx + past + entry - partial, mask=entry >= partial, other=0)",
        "    start, bad = tile_at(index, step, columns, bad, BLOCK, RING)",
        *indent(fold("ring", "RING", "tl.where(start < packed, 0, n)", True, program, keys, values)),
    ]


def _check(program: Program) -> list[str]:
    """The kernel that finds wrong lists of single keys, for each query head and block of queries."""
    names = "wrong, length, capacity, queries, heads, step,"
    return [
        f'@triton.jit(do_not_specialize=["queries", "heads", "capacity", "step", {ROWS_FIXED}, {SINGLE_FIXED}])',
        f"def check_{program.name}({names}",
        *indent([*SINGLE, LISTS[0], "FULL: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):"], 8),
        f"    check_columns({names}",
        *indent([*SINGLE, LISTS[0], "FULL, BLOCK, TILE)"], 18),
    ]


def pages(
    program: Program,
    blocks: Blocks,
    keys: Side,
    values: Side,
    packed: list[str],
    end: list[str],
    args: list[str],
    ringed: bool,
) -> list[list[str]]:
    """Few rows that visit listed pages only: a program per key/value head and split of its list."""
    ratio = program.ratio
    lines = [
        "head, split = tl.program_id(0).to(tl.int64) // SPLITS, tl.program_id(0) % SPLITS",
        *attend_start(program, keys, values, blocks.rows, f"tl.arange(0, {blocks.rows})"),
        *packed,
        "at = batch * batch_lists + head % groups * head_lists",
        "pages += at * room",
        "count, bad = count_within(tl.load(page_num + at), room, n < 0)",
        "share = tl.cdiv(count, SPLITS)",
        "first = tl.minimum(split * share, count)",
        "last = tl.minimum(first + share, count)",
        "there, newest = tl.cdiv(n, PAGE), 0",
        "for step in range(first * (PAGE // TILE), last * (PAGE // TILE)):",
        "    entry = step // (PAGE // TILE)",
        "    index = tl.load(pages + entry)",
        "    bad = bad | (index <= tl.load(pages + entry - 1, mask=entry > 0, other=-1))",
        "    start, bad = tile_at(index, step, there, bad, PAGE, TILE)",
        *indent(fold("body", "TILE", "packed", True, program, keys, values)),
    ]
    if ringed:
        lines += [
            "    newest += (start + TILE > packed).to(tl.int32)",
            *queries_again(program, keys),
            "# Lists ascend: the tiles with tokens that are not packed are the last ones.",
            "for step in range((last * (PAGE // TILE) - newest) * (TILE // RING), last * (PAGE // RING)):",
            "    index = tl.load(pages + step // (PAGE // RING))",
            "    start, bad = tile_at(index, step, there, bad, PAGE, RING)",
            *indent(fold("ring", "RING", "tl.where(start < packed, 0, n)", True, program, keys, values)),
        ]
    place = f"((head * SPLITS + split) * queries + token) * {ratio} + row % {ratio}"
    lines += poison(values) + split_end(values, end, place, "first < last")
    kernel = [
        f'@triton.jit(do_not_specialize=[{FIXED}, "batch_lists", "head_lists", "room"])',
        f"def {program.name}({args[0]}",
        *indent([*args[1:-1], args[-1] + ", part_out, part_lse,", *PAGES], 8),
        *indent(lines),
    ]
    return [kernel, merge_kernel(program, values)]
