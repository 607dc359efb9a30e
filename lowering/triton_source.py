"""Attention program to Triton source: a small readable module that names the parts it is assembled from."""

from __future__ import annotations

import math

import torch

from effcompile.kernels.ops import KernelUnavailable
from effcompile.kernels.program import Program, ScoreParts
from effcompile.lowering.triton_side import (
    BLOCK_PARTS,
    LOAD_PARTS,
    NUMBER_PARTS,
    ROPE_PARTS,
    SOFTMAX_PARTS,
    TYPES,
    Blocks,
    Side,
    Vendor,
    indent,
    module_text,
    padded,
    sides_of,
)


def _tile(name: str, program: Program, keys: Side, values: Side, ring: bool, rows: int | str) -> list[str]:
    """The function that folds one tile of keys into the running softmax."""
    rule = program.predicate
    q, acc = keys.names("q"), values.names("acc")
    dtype = TYPES[program.dtype] if ring else values.operand
    # On NVIDIA three tf32 products give an fp32 product within two bits; AMD multiplies fp32 in its matrix units.
    precision = '"tf32x3"' if program.dtype == torch.float32 and keys.vendor == "cuda" else '"ieee"'
    buffers = ", ".join(keys.buffers + values.buffers)
    lines = [f'"""One tile of {"the newest tokens, from the ring" if ring else "keys, as stored"}."""']
    lines += ["key = start + tl.arange(0, TILE)", *(keys.ring() if ring else keys.body())]
    score = f"tl.zeros(({rows}, TILE), tl.float32)"
    for suffix, _ in keys.halves:
        lines.append(f"score = dot(q{suffix}, k{suffix}, {score}, {precision})")
        score = "score"
    # With a soft cap the scale is divided by it, and the cap is in base 2.
    lines.append("score = tanh(score * scale) * softcap" if program.score.softcap else "score = score * scale")
    if program.score.bias:
        lines.append("score = add_bias(score, bias, bias_place, key, stop)")
    lines += ["if CHECK:", "    keep = key < stop"]
    if rule.key_mask:
        lines.append("    keep = keep & (tl.load(key_mask + key, mask=keep, other=0) != 0)")
    window = -1 if rule.window is None else rule.window
    lines.append(f"    seen = visible(keep, key, position, {rule.causal}, {window})")
    lines.append('    score = tl.where(seen, score, float("-inf"))')
    lines += [
        "weight, decay, peak, total = softmax_step(score, peak, total)",
        *(values.ring() if ring else values.body()),
    ]
    for suffix, _ in values.halves:
        lines.append(
            f"acc{suffix} = dot(convert(weight, {dtype}), v{suffix}, acc{suffix} * decay[:, None], {precision})"
        )
    lines.append(f"return {acc}, peak, total")
    head = f"def {name}({q}, {acc}, peak, total, {buffers}, key_mask, position, start, stop, scale,{_extra(program)}"
    return ["@triton.jit", head, "         CHECK: tl.constexpr, TILE: tl.constexpr):", *indent(lines)]


def _extra(program: Program) -> str:
    """The further arguments of a tile function, for the score parts."""
    return (" softcap," if program.score.softcap else "") + (" bias, bias_place," if program.score.bias else "")


def _loop(
    name: str, first: str, stop: str, tile: int, limit: str, check: bool, program: Program, keys: Side, values: Side
) -> list[str]:
    fold = _fold(name, tile, limit, check, program, keys, values)
    return [f"for start in range({first}, {stop}, {tile}):", *indent(fold)]


def _fold(name: str, tile: int | str, limit: str, check: bool, program: Program, keys: Side, values: Side) -> list[str]:
    """The call of a tile function for the keys from ``start`` on."""
    q, acc, buffers = keys.names("q"), values.names("acc"), ", ".join(keys.buffers + values.buffers)
    scale = "body_scale" if name == "body_tile" and keys.fused else "scale"
    return [
        f"{acc}, peak, total = {name}({q}, {acc}, peak, total, {buffers},",
        f"    key_mask, position, start, {limit}, {scale},{_extra(program)} {check}, {tile})",
    ]


def _attend_start(program: Program, keys: Side, values: Side, rows: int | str, row: str) -> list[str]:
    """Rows, positions, pointers and query operands: what decode and prefill have in common."""
    lines = [
        "batch = head // groups",
        "n = tl.minimum(tl.load(length), capacity).to(tl.int32)",
        *keys.offsets(),
        *values.offsets(),
        *(["key_mask += batch * mask_stride"] if program.predicate.key_mask else []),
        f"row = {row}",
        f"live = row < queries * {program.ratio}",
        f"token, member = row // {program.ratio}, row % {program.ratio}",
        "position = n - queries + token",
        f"member = (head % groups) * {program.ratio} + member",
        "query += batch * query_batch",
        "place = member * query_head + token.to(tl.int64) * query_token",
    ]
    if program.score.bias:
        lines.append("bias += batch * bias_batch")
        lines.append("bias_place = tl.where(live, member * bias_head + token.to(tl.int64) * bias_token, 0)")
    lines += _queries(keys)
    if keys.fused:
        lines += ["body_scale = scale"] if program.dtype == torch.float16 else _normalise(keys)
    lines += [f"acc{suffix} = tl.zeros(({rows}, {values.columns}), tl.float32)" for suffix, _ in values.halves]
    lines += [f'peak = tl.full(({rows},), float("-inf"), tl.float32)', f"total = tl.zeros(({rows},), tl.float32)"]
    return lines


def _queries(keys: Side) -> list[str]:
    """Load the query operands in the model's dtype."""
    return [f"q{suffix} = load_rows(query, place, live, 1, {keys.cut(first)})" for suffix, first in keys.halves]


def _again(program: Program, keys: Side) -> list[str]:
    """The queries as they were given, for the ring, where the stored tokens needed them in another dtype."""
    return _queries(keys) if keys.fused and program.dtype != torch.float16 else []


def _normalise(keys: Side) -> list[str]:
    """Query operands in fp16: divided by a power of two per row, which goes into the scale of the scores."""
    first, last = f"q{keys.halves[0][0]}", f"q{keys.halves[-1][0]}"
    return [
        f"unit = unit_of({first}, {last})",
        *(f"q{suffix} = (q{suffix}.to(tl.float32) / unit[:, None]).to(tl.float16)" for suffix, _ in keys.halves),
        "body_scale = scale * unit[:, None]",
    ]


def _attend_end(program: Program, values: Side) -> list[str]:
    """Write output rows and their natural-log lse."""
    sink, worth = [], ""
    if program.score.sinks:
        sink, worth = ["peak, total, worth = with_sink(peak, total, tl.load(sinks + member))"], " * worth"
    return [
        *sink,
        f"factor = reciprocal(total){worth}",
        "place = (batch * (groups * RATIO) + member) * queries + token".replace("RATIO", "{ratio}"),
        *(
            f"store_rows(out, place, acc{suffix} * factor[:, None], live, {values.size}, {values.cut(first)})"
            for suffix, first in values.halves
        ),
        f"tl.store(lse + place, log_total(peak, total) * {math.log(2)!r}, mask=live)",
    ]


ATTEND_TAIL = [
    "length, key_mask, out, lse, queries, groups, capacity,",
    "query_batch, query_head, query_token, mask_stride, scale",
]
FIXED = '"queries", "groups", "capacity"'


def part_arguments(score: ScoreParts) -> list[str]:
    """The arguments of the kernel for score parts, behind the scale, in the order of the launcher."""
    names = ["softcap"] if score.softcap else []
    names += ["bias", "bias_batch", "bias_head", "bias_token"] if score.bias else []
    return names + (["sinks"] if score.sinks else [])


def attend_source(program: Program, blocks: Blocks, vendor: Vendor) -> str:
    """The module of an attention program: its kernel, and for decode the kernel that merges the splits."""
    keys, values = sides_of(program, vendor)
    ringed = keys.bits != 16 or values.bits != 16
    # How listed blocks are cut is known at the launch, which names their size.
    functions = [_tile("body_tile", program, keys, values, False, "peak.shape[0]" if program.blocks else blocks.rows)]
    if ringed:
        functions.append(_tile("ring_tiles", program, keys, values, True, blocks.rows))
    form, ratio = program.form, program.ratio
    packed = [f"packed = packed_length(n, {form.group}, {form.residual})" if ringed else "packed = n"]
    end = [line.replace("{ratio}", str(ratio)) for line in _attend_end(program, values)]
    write = _listed if program.blocks else _decode if program.phase == "decode" else _prefill
    arguments = ["query, " + ", ".join(keys.buffers + values.buffers) + ",", *ATTEND_TAIL]
    arguments[-1] += "".join(f", {name}" for name in part_arguments(program.score))
    functions += write(program, blocks, keys, values, packed, end, arguments, ringed)
    imports: dict[str, tuple[str, ...]] = {"load": LOAD_PARTS, "number": NUMBER_PARTS, "rope": ROPE_PARTS}
    imports |= {"softmax": SOFTMAX_PARTS, "blocks": BLOCK_PARTS}
    return module_text(program.name, imports, functions)


def _decode(
    program: Program,
    blocks: Blocks,
    keys: Side,
    values: Side,
    packed: list[str],
    end: list[str],
    args: list[str],
    ringed: bool,
) -> list[list[str]]:
    """Few rows: a program per head and split; splits share the *real* length evenly, so none is idle early."""
    tile, ratio, window = blocks.tile, program.ratio, program.predicate.window
    name = program.name
    first = "0" if window is None else f"tl.maximum(n - queries - {window - 1}, 0) // {tile} * {tile}"
    place = f"((head * SPLITS + split) * queries + token) * {ratio} + row % {ratio}"
    lines = [
        "head, split = tl.program_id(0).to(tl.int64) // SPLITS, tl.program_id(0) % SPLITS",
        *_attend_start(program, keys, values, blocks.rows, f"tl.arange(0, {blocks.rows})"),
        *packed,
        f"first = {first}",
        f"share = tl.cdiv(tl.cdiv(tl.maximum(n - first, 0), {tile}), SPLITS) * {tile}",
        "first = first + split * share",
        "last = tl.minimum(first + share, n)",
        *_loop(
            "body_tile",
            "first",
            "tl.minimum(last, packed)",
            tile,
            "tl.minimum(last, packed)",
            True,
            program,
            keys,
            values,
        ),
    ]
    if ringed:
        lines += _again(program, keys)
        lines += _loop(
            "ring_tiles", "tl.maximum(first, packed)", "last", blocks.ring, "last", True, program, keys, values
        )
    lines += ["if SPLITS == 1:", *indent(end), "else:", f"    place = {place}"]
    lines.append("    tl.store(part_lse + place, log_total(peak, total), mask=live)")
    lines.append("    if first < last:")
    lines.append("        factor = reciprocal(total)")
    lines += [
        f"        store_rows(part_out, place, acc{suffix} * factor[:, None], live, {values.size}, {values.cut(at)})"
        for suffix, at in values.halves
    ]
    kernel = [
        f"@triton.jit(do_not_specialize=[{FIXED}])",
        f"def {name}({args[0]}",
        *indent([*args[1:-1], args[-1] + ", part_out, part_lse, SPLITS: tl.constexpr):"], 8),
        *indent(lines),
    ]
    fixed, more, sink, worth = '"queries"', "", [], ""
    if program.score.sinks:
        fixed, more, worth = '"queries", "groups"', " sinks, groups,", " * worth"
        member = f"head % groups * {ratio} + row % {ratio}"
        sink = [f"    peak, total, worth = with_sink(peak, total, tl.load(sinks + {member}))"]
    merge = [
        f"@triton.jit(do_not_specialize=[{fixed}])",
        f"def merge_{name}(part_out, part_lse, out, lse, queries,{more} SPLITS: tl.constexpr, PADDED: tl.constexpr):",
        '    """One row of one head: its splits, weighted by their shares of the sum of exponentials."""',
        f"    rows = queries * {ratio}",
        "    head, row = tl.program_id(0).to(tl.int64) // rows, tl.program_id(0) % rows",
        "    first = head * SPLITS * rows + row",
        "    peak, total, weight = merge_weights(part_lse, first, rows, SPLITS, PADDED)",
        *sink,
        f"    o = merge_rows(part_out, first, rows, weight, {values.size}, {padded(values.size)}, SPLITS, PADDED)",
        f"    place = (head * {ratio} + row % {ratio}) * queries + row // {ratio}",
        f"    channel = tl.arange(0, {padded(values.size)})",
        f"    x = convert(o * reciprocal(total){worth}, {TYPES[program.dtype]})",
        f"    tl.store(out + place * {values.size} + channel, x, mask=channel < {values.size})",
        f"    tl.store(lse + place, log_total(peak, total) * {math.log(2)!r})",
    ]
    return [kernel, merge]


def _prefill(
    program: Program,
    blocks: Blocks,
    keys: Side,
    values: Side,
    packed: list[str],
    end: list[str],
    args: list[str],
    ringed: bool,
) -> list[list[str]]:
    """Many rows: a program per head and block of rows; rows are (token, head of group), so heads share tiles."""
    tile, rows, ratio, rule = blocks.tile, blocks.rows, program.ratio, program.predicate
    lines = [
        f"blocks = tl.cdiv(queries * {ratio}, {rows})",
        "head = tl.program_id(0).to(tl.int64) // blocks",
        "# The last rows see the most keys: they start first.",
        "block = blocks - 1 - tl.program_id(0) % blocks",
        *_attend_start(program, keys, values, rows, f"block * {rows} + tl.arange(0, {rows})"),
        *packed,
        f"low = n - queries + block * {rows} // {ratio}",
        f"high = n - queries + tl.minimum((block * {rows} + {rows - 1}) // {ratio}, queries - 1)",
        f"last = {'tl.minimum(n, tl.maximum(high + 1, 0))' if rule.causal else 'n'}",
        "middle = tl.minimum(last, packed)",
    ]
    if rule.window is None and not rule.key_mask:
        seen = "tl.minimum(middle, tl.maximum(low + 1, 0))" if rule.causal else "middle"
        lines += ["# Before this tile every row sees every key.", f"clear = {seen} // {tile} * {tile}"]
        lines += _loop("body_tile", "0", "clear", tile, "packed", False, program, keys, values)
        lines += _loop("body_tile", "clear", "middle", tile, "packed", True, program, keys, values)
        after = "packed"
    else:
        first = "0" if rule.window is None else f"tl.maximum(low - {rule.window - 1}, 0) // {tile} * {tile}"
        lines += [
            f"first = {first}",
            *_loop("body_tile", "first", "middle", tile, "packed", True, program, keys, values),
        ]
        after = "tl.maximum(first, packed)"
    if ringed:
        lines += _again(program, keys)
        lines += _loop("ring_tiles", after, "last", blocks.ring, "last", True, program, keys, values)
    return [
        [
            f"@triton.jit(do_not_specialize=[{FIXED}])",
            f"def {program.name}({args[0]}",
            *indent([*args[1:-1], args[-1] + "):"], 8),
            *indent(lines + end),
        ]
    ]


LISTS = [
    "kv_num, kv_idx, full_num, full_idx, batch_rows, head_rows, columns,",
    "FULL: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):",
]
"""Block lists: rows of lists from one batch entry and head to the next, columns of a row, and how blocks are cut."""


def _listed(
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
    ratio, acc = program.ratio, [f"acc{suffix}" for suffix, _ in values.halves]
    if ringed:
        raise KernelUnavailable("block lists over packed keys or values have no GPU kernel")
    lines = [
        "tiles = tl.cdiv(queries, ROWS)",
        f"head = tl.program_id(0).to(tl.int64) // (tiles * {ratio})",
        f"rest = tl.program_id(0) % (tiles * {ratio})",
        "# Heads that share keys are neighbours; the last rows see the most keys, and start first.",
        f"tile, sibling = tiles - 1 - rest // {ratio}, rest % {ratio}",
        *_attend_start(program, keys, values, "ROWS", f"(tile * ROWS + tl.arange(0, ROWS)) * {ratio} + sibling"),
        f"at = batch * batch_rows + (head % groups * {ratio} + sibling) * head_rows + tile * ROWS // BLOCK",
        "kv_idx += at * columns",
        "partial, bad = count_within(tl.load(kv_num + at), columns, n > columns * BLOCK)",
        "# The block that the end cuts short, or the number behind the last one.",
        "cut, short = n // BLOCK, 0",
        "if FULL:",
        "    full_idx += at * columns",
        "    whole, bad = count_within(tl.load(full_num + at), columns, bad)",
        "    # A cut block is tested, whoever lists it, so that no key is counted that is not there.",
        "    short = (tl.load(full_idx + whole - 1, mask=whole > 0, other=-1) == cut).to(tl.int32)",
        "    for step in range(0, (whole - short) * (BLOCK // TILE)):",
        "        index = tl.load(full_idx + step // (BLOCK // TILE))",
        "        start, bad = tile_at(index, step, cut, bad, BLOCK, TILE)",
        *indent(_fold("body_tile", "TILE", "n", False, program, keys, values), 8),
        "for step in range(0, (partial + short) * (BLOCK // TILE)):",
        "    index = step // (BLOCK // TILE)",
        "    index = tl.load(kv_idx + index, mask=index < partial, other=cut)",
        "    start, bad = tile_at(index, step, columns, bad, BLOCK, TILE)",
        *indent(_fold("body_tile", "TILE", "n", True, program, keys, values)),
        "# Raising would wait for the device: rows with a wrong list are NaN.",
        'poison = tl.where(bad, float("nan"), 0.0)',
        *(f"{name} += poison" for name in acc),
        "peak, total = peak + poison, tl.where(bad, 1.0, total)",
    ]
    return [
        [
            f'@triton.jit(do_not_specialize=[{FIXED}, "batch_rows", "head_rows", "columns"])',
            f"def {program.name}({args[0]}",
            *indent([*args[1:-1], args[-1] + ",", *LISTS], 8),
            *indent(lines + end),
        ]
    ]
