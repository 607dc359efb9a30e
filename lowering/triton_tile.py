"""What all attention skeletons in Triton share: the function that folds a tile of keys in, rows, queries, results."""

from __future__ import annotations

import math
from typing import Literal

import torch

from effcompile.kernels.program import Program
from effcompile.lowering.triton_side import TYPES, Side, indent, padded

FIXED = '"queries", "groups", "capacity"'
"""Arguments of kernels that are not worth a variant of their own."""
Tile = Literal["body", "ring", "gathered"]
"""Where the keys of a tile are: as stored, among the newest tokens, or at places of their own. A :class:`Side` has a
method of that name, with the lines that load such a tile."""


def tile_name(kind: Tile) -> str:
    """The name of the function that folds such a tile."""
    return {"body": "body_tile", "ring": "ring_tiles", "gathered": "column_tile"}[kind]


def tile_function(program: Program, keys: Side, values: Side, kind: Tile, rows: int | str) -> list[str]:
    """The function that folds one tile of keys into the running softmax."""
    q, acc = keys.names("q"), values.names("acc")
    dtype = TYPES[program.dtype] if kind == "ring" else values.operand
    precision = keys.precision
    buffers = ", ".join(keys.buffers + values.buffers)
    what = {"body": "keys, as stored", "ring": "the newest tokens, from the ring", "gathered": "single keys"}[kind]
    lines = [f'"""One tile of {what}."""']
    if kind != "gathered":
        lines.append("key = start + tl.arange(0, TILE)")
    lines += getattr(keys, kind)()
    score = f"tl.zeros(({rows}, TILE), tl.float32)"
    for suffix, _ in keys.halves:
        lines.append(f"score = dot(q{suffix}, k{suffix}, {score}, {precision})")
        score = "score"
    # With a soft cap the scale is divided by it, and the cap is in base 2.
    lines.append("score = tanh(score * scale) * softcap" if program.score.softcap else "score = score * scale")
    if program.score.bias:
        # A bias has a number for each token, and is read where there is a key.
        place = "tokens" if program.positions else "key"
        there = "keep" if kind == "gathered" else "key < stop"
        lines.append(f"score = add_bias(score, bias, bias_place, {place}, {there})")
    seen = [*_seen(program), 'score = tl.where(seen, score, float("-inf"))']
    lines += seen if kind == "gathered" else ["if CHECK:", *indent(["keep = key < stop", *seen])]
    lines.append("weight, decay, peak, total = softmax_step(score, peak, total)")
    lines += getattr(values, kind)()
    for suffix, _ in values.halves:
        lines.append(
            f"acc{suffix} = dot(convert(weight, {dtype}), v{suffix}, acc{suffix} * decay[:, None], {precision})"
        )
    lines.append(f"return {acc}, peak, total")
    which = "key, keep" if kind == "gathered" else "start, stop"
    head = f"def {tile_name(kind)}({q}, {acc}, peak, total, {buffers}, key_mask, position, {which}, scale,"
    head += _extra(program)
    sizes = "TILE" if kind == "gathered" else "CHECK: tl.constexpr, TILE"
    return ["@triton.jit", head, f"         {sizes}: tl.constexpr):", *indent(lines)]


def _seen(program: Program) -> list[str]:
    """Lines that narrow ``keep [N]`` to ``seen``, bool ``[M or 1, N]``: what the predicate lets through."""
    rule, lines = program.predicate, []
    # Keys that stand elsewhere than their slots say are tested by their tokens.
    key = "tokens" if program.positions else "key"
    if rule.key_mask:
        lines.append(f"keep = keep & (tl.load(key_mask + {key}, mask=keep, other=0) != 0)")
    lines.append(f"seen = visible(keep, {key}, position, {rule.causal}, {-1 if rule.window is None else rule.window})")
    if rule.prefix:
        lines.append("seen = seen | (keep & (key < before))[None, :]")
    if rule.segments:
        lines.append("seen = seen & (tl.load(segments + key, mask=keep, other=0)[None, :] == segment[:, None])")
    if program.given:
        place = "allowed + allowed_place[:, None] + key[None, :]"
        lines.append(f"seen = seen & (tl.load({place}, mask=seen, other=0) != 0)")
    if program.ranges:
        lines.append("seen = seen & in_ranges(ranges, range_place, range_count, key)")
    return lines


def _extra(program: Program, check: bool = True) -> str:
    """The further arguments of a tile function, for the parts of a program; ``check`` says whether pairs are tested."""
    rule, score = program.predicate, program.score
    names = ["softcap"] * score.softcap + ["bias, bias_place"] * score.bias
    names += ["before"] * rule.prefix + ["segments, segment"] * rule.segments
    names += ["tokens" if check or score.bias else "0"] * program.positions + ["allowed, allowed_place"] * program.given
    names += ["ranges, range_place, range_count"] * program.ranges
    return "".join(f" {name}," for name in names)


def loop(
    kind: Tile, first: str, stop: str, tile: int, limit: str, check: bool, program: Program, keys: Side, values: Side
) -> list[str]:
    """A loop that folds the keys from ``first`` to ``stop`` in, in tiles of ``tile``."""
    body = fold(kind, tile, limit, check, program, keys, values)
    return [f"for start in range({first}, {stop}, {tile}):", *indent(body)]


def fold(kind: Tile, tile: int | str, limit: str, check: bool, program: Program, keys: Side, values: Side) -> list[str]:
    """The call of a tile function for the keys from ``start`` on."""
    q, acc, buffers = keys.names("q"), values.names("acc"), ", ".join(keys.buffers + values.buffers)
    scale = "body_scale" if kind == "body" and keys.fused else "scale"
    return [
        f"{acc}, peak, total = {tile_name(kind)}({q}, {acc}, peak, total, {buffers},",
        f"    key_mask, position, start, {limit}, {scale},{_extra(program, check)} {check}, {tile})",
    ]


def fold_gathered(program: Program, keys: Side, values: Side) -> list[str]:
    """The call of a tile function for the keys ``key`` as far as ``keep`` says."""
    q, acc, buffers = keys.names("q"), values.names("acc"), ", ".join(keys.buffers + values.buffers)
    return [
        f"{acc}, peak, total = column_tile({q}, {acc}, peak, total, {buffers},",
        f"    key_mask, position, key, keep, scale,{_extra(program)} TILE)",
    ]


def attend_start(program: Program, keys: Side, values: Side, rows: int | str, row: str) -> list[str]:
    """Rows, positions, pointers and query operands: what all skeletons have in common."""
    rule = program.predicate
    lines = [
        "batch = head // groups",
        "n = tl.minimum(tl.load(length), capacity).to(tl.int32)",
        *keys.offsets(),
        *values.offsets(),
        *(["key_mask += batch * mask_stride"] if rule.key_mask else []),
        f"row = {row}",
        f"live = row < queries * {program.ratio}",
        f"token, member = row // {program.ratio}, row % {program.ratio}",
        f"member = (head % groups) * {program.ratio} + member",
        *_positions(program),
        "query += batch * query_batch",
        "place = member * query_head + token.to(tl.int64) * query_token",
    ]
    for name, there in (("bias", program.score.bias), ("allowed", program.given)):
        if there:
            lines.append(f"{name} += batch * {name}_batch")
            place = f"member * {name}_head + token.to(tl.int64) * {name}_token"
            lines.append(f"{name}_place = tl.where(live, {place}, 0)")
    if program.ranges:
        # Rows that are not there have the ranges of the last one, so that they say nothing new.
        lines.append("range_place = batch * batch_ranges + member * head_ranges + tl.minimum(token, queries - 1)")
        lines.append("range_place *= 2 * range_count")
    if rule.prefix:
        lines.append("before = tl.minimum(tl.maximum(tl.load(prefix + batch * prefix_stride), 0), n).to(tl.int32)")
    if rule.segments:
        lines.append("segments += batch * segments_stride")
        lines.append("segment = tl.load(segments + position, mask=live & (position >= 0), other=0)")
    lines += keys.queries()
    if keys.fused:
        lines += ["body_scale = scale"] if program.dtype == torch.float16 else _normalise(keys)
    lines += [f"acc{suffix} = tl.zeros(({rows}, {values.columns}), tl.float32)" for suffix, _ in values.halves]
    lines += [f'peak = tl.full(({rows},), float("-inf"), tl.float32)', f"total = tl.zeros(({rows},), tl.float32)"]
    return lines


def _positions(program: Program) -> list[str]:
    """Where the rows stand: last, or where they are said to, which may be anywhere and so is compared in 64 bits."""
    if not program.moved:
        return ["position = n - queries + token"]
    place = "stands + batch * batch_stands + member * head_stands + token"
    return [f"position = tl.load({place}, mask=live, other=0).to(tl.int64)"]


def queries_again(program: Program, keys: Side) -> list[str]:
    """The queries as they were given, for the ring, where the stored tokens needed them in another dtype."""
    return keys.queries() if keys.fused and program.dtype != torch.float16 else []


def _normalise(keys: Side) -> list[str]:
    """Query operands in fp16: divided by a power of two per row, which goes into the scale of the scores."""
    first, last = f"q{keys.halves[0][0]}", f"q{keys.halves[-1][0]}"
    return [
        f"unit = unit_of({first}, {last})",
        *(f"q{suffix} = (q{suffix}.to(tl.float32) / unit[:, None]).to(tl.float16)" for suffix, _ in keys.halves),
        "body_scale = scale * unit[:, None]",
    ]


def attend_end(program: Program, values: Side) -> list[str]:
    """Write output rows and their natural-log lse."""
    sink, worth = [], ""
    if program.score.sinks:
        sink, worth = ["peak, total, worth, _ = with_sink(peak, total, tl.load(sinks + member))"], " * worth"
    lines = [*sink, f"place = (batch * (groups * {program.ratio}) + member) * queries + token"]
    if program.before:
        lines, worth = [*lines, *_take_in(values, worth)], ""
    return [
        *lines,
        f"factor = reciprocal(total){worth}",
        *(
            f"store_rows(out, place, acc{suffix} * factor[:, None], live, {values.size}, {values.cut(first)})"
            for suffix, first in values.halves
        ),
        f"tl.store(lse + place, log_total(peak, total) * {math.log(2)!r}, mask=live)",
    ]


def _take_in(values: Side, worth: str) -> list[str]:
    """Add the result of attention to other keys, which stands at ``place``: its lse is one more logit."""
    other = 'tl.load(before_lse + place, mask=live, other=float("-inf"))'
    lines = [f"peak, total, share, weight = with_sink(peak, total, {other})"]
    for suffix, first in values.halves:
        # Of a row without other keys nothing is read.
        row = f"load_rows(before_out, place, live & (weight > 0), {values.size}, {values.cut(first)})"
        lines.append(f"acc{suffix} = acc{suffix} * (share{worth})[:, None] + {row}.to(tl.float32) * weight[:, None]")
    return lines


def split_end(values: Side, end: list[str], place: str, some: str) -> list[str]:
    """Write the rows of one split: ``end`` where it is the only one, else those of a part, if it has ``some`` keys."""
    lines = ["if SPLITS == 1:", *indent(end), "else:", f"    place = {place}"]
    lines.append("    tl.store(part_lse + place, log_total(peak, total), mask=live)")
    lines.append(f"    if {some}:")
    lines.append("        factor = reciprocal(total)")
    lines += [
        f"        store_rows(part_out, place, acc{suffix} * factor[:, None], live, {values.size}, {values.cut(at)})"
        for suffix, at in values.halves
    ]
    return lines


def merge_kernel(program: Program, values: Side) -> list[str]:
    """The kernel that merges the splits of a row."""
    ratio, fixed, more, after, worth = program.ratio, '"queries"', "", [], ""
    if program.score.sinks:
        fixed, more, worth = '"queries", "groups"', " sinks, groups,", " * worth"
        member = f"head % groups * {ratio} + row % {ratio}"
        after = [f"    peak, total, worth, _ = with_sink(peak, total, tl.load(sinks + {member}))"]
    if program.blocks:
        after = ["    # One part with a wrong list makes the row NaN.", "    bad = total != total"]
        after.append("    peak, total = tl.where(bad, total, peak), tl.where(bad, 1.0, total)")
    return [
        f"@triton.jit(do_not_specialize=[{fixed}])",
        f"def merge_{program.name}(part_out, part_lse, out, lse, queries,{more} SPLITS: tl.constexpr, "
        "PADDED: tl.constexpr):",
        '    """One row of one head: its splits, weighted by their shares of the sum of exponentials."""',
        f"    rows = queries * {ratio}",
        "    head, row = tl.program_id(0).to(tl.int64) // rows, tl.program_id(0) % rows",
        "    first = head * SPLITS * rows + row",
        "    peak, total, weight = merge_weights(part_lse, first, rows, SPLITS, PADDED)",
        *after,
        f"    o = merge_rows(part_out, first, rows, weight, {values.size}, {padded(values.size)}, SPLITS, PADDED)",
        f"    place = (head * {ratio} + row % {ratio}) * queries + row // {ratio}",
        f"    channel = tl.arange(0, {padded(values.size)})",
        f"    x = convert(o * reciprocal(total){worth}, {TYPES[program.dtype]})",
        f"    tl.store(out + place * {values.size} + channel, x, mask=channel < {values.size})",
        f"    tl.store(lse + place, log_total(peak, total) * {math.log(2)!r})",
    ]


def poison(values: Side) -> list[str]:
    """Make rows NaN where ``bad``: raising would wait for the device."""
    return [
        "# Raising would wait for the device: rows with a wrong list are NaN.",
        'poison = tl.where(bad, float("nan"), 0.0)',
        *(f"acc{suffix} += poison" for suffix, _ in values.halves),
        "peak, total = peak + poison, tl.where(bad, 1.0, total)",
    ]


def part_arguments(program: Program) -> list[str]:
    """The arguments of the kernel for the parts of a program, behind the scale, in the order of the launcher."""
    rule, score = program.predicate, program.score
    names = ["softcap"] * score.softcap
    names += ["bias", "bias_batch", "bias_head", "bias_token"] if score.bias else []
    names += ["sinks"] * score.sinks
    names += ["prefix", "prefix_stride"] * rule.prefix + ["segments", "segments_stride"] * rule.segments
    names += ["allowed", "allowed_batch", "allowed_head", "allowed_token"] if program.given else []
    names += ["stands", "batch_stands", "head_stands"] * program.moved
    names += ["ranges", "batch_ranges", "head_ranges", "range_count"] if program.ranges else []
    return names + ["before_out", "before_lse"] * program.before
