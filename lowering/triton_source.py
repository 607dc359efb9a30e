"""Attention program to Triton source: a small readable module that names the parts it is assembled from."""

from __future__ import annotations

from effcompile.kernels.program import Program
from effcompile.lowering import triton_lists
from effcompile.lowering.triton_latent import sides_of
from effcompile.lowering.triton_side import (
    BLOCK_PARTS,
    LATENT_PARTS,
    LOAD_PARTS,
    NUMBER_PARTS,
    ROPE_PARTS,
    SOFTMAX_PARTS,
    Blocks,
    Side,
    Vendor,
    indent,
    module_text,
)
from effcompile.lowering.triton_tile import (
    FIXED,
    attend_end,
    attend_start,
    loop,
    merge_kernel,
    part_arguments,
    queries_again,
    split_end,
    tile_function,
)

ATTEND_TAIL = [
    "length, key_mask, out, lse, queries, groups, capacity,",
    "query_batch, query_head, query_token, mask_stride, scale",
]


def attend_source(program: Program, blocks: Blocks, vendor: Vendor) -> str:
    """The module of an attention program: its kernel, and for decode the kernel that merges the splits."""
    keys, values = sides_of(program, vendor)
    ringed = keys.bits != 16 or values.bits != 16
    # How listed blocks are cut is known at the launch, which names their size.
    cut_later = program.blocks and program.phase == "prefill"
    rows = "peak.shape[0]" if cut_later else blocks.rows
    functions = [tile_function(program, keys, values, "body", rows)]
    if ringed:
        functions.append(tile_function(program, keys, values, "ring", rows))
    form = program.form
    packed = [f"packed = packed_length(n, {form.group}, {form.residual})" if ringed else "packed = n"]
    end = attend_end(program, values)
    if program.blocks:
        write = triton_lists.pages if program.phase == "decode" else triton_lists.blocks
    else:
        write = _decode if program.phase == "decode" else _prefill
    arguments = ["query, " + ", ".join(keys.buffers + values.buffers) + ",", *ATTEND_TAIL]
    arguments[-1] += "".join(f", {name}" for name in part_arguments(program))
    functions += write(program, blocks, keys, values, packed, end, arguments, ringed)
    imports: dict[str, tuple[str, ...]] = {"load": LOAD_PARTS, "number": NUMBER_PARTS, "rope": ROPE_PARTS}
    imports |= {"softmax": SOFTMAX_PARTS, "blocks": BLOCK_PARTS, "latent": LATENT_PARTS}
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
        *attend_start(program, keys, values, blocks.rows, f"tl.arange(0, {blocks.rows})"),
        *packed,
        f"first = {first}",
        f"share = tl.cdiv(tl.cdiv(tl.maximum(n - first, 0), {tile}), SPLITS) * {tile}",
        "first = first + split * share",
        "last = tl.minimum(first + share, n)",
        *loop(
            "body",
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
        lines += queries_again(program, keys)
        lines += loop("ring", "tl.maximum(first, packed)", "last", blocks.ring, "last", True, program, keys, values)
    lines += split_end(values, end, place, "first < last")
    kernel = [
        f"@triton.jit(do_not_specialize=[{FIXED}])",
        f"def {name}({args[0]}",
        *indent([*args[1:-1], args[-1] + ", part_out, part_lse, SPLITS: tl.constexpr):"], 8),
        *indent(lines),
    ]
    return [kernel, merge_kernel(program, values)]


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
    known = "before" if rule.prefix else "0"
    lines = [
        f"blocks = tl.cdiv(queries * {ratio}, {rows})",
        "head = tl.program_id(0).to(tl.int64) // blocks",
        "# The last rows see the most keys: they start first.",
        "block = blocks - 1 - tl.program_id(0) % blocks",
        *attend_start(program, keys, values, rows, f"block * {rows} + tl.arange(0, {rows})"),
        *packed,
        f"low = n - queries + block * {rows} // {ratio}",
        f"high = n - queries + tl.minimum((block * {rows} + {rows - 1}) // {ratio}, queries - 1)",
        f"last = {f'tl.minimum(n, tl.maximum(high + 1, {known}))' if rule.causal else 'n'}",
        "middle = tl.minimum(last, packed)",
    ]
    if rule.window is None and not rule.key_mask and not rule.segments:
        seen = f"tl.minimum(middle, tl.maximum(low + 1, {known}))" if rule.causal else "middle"
        lines += ["# Before this tile every row sees every key.", f"clear = {seen} // {tile} * {tile}"]
        lines += loop("body", "0", "clear", tile, "packed", False, program, keys, values)
        lines += loop("body", "clear", "middle", tile, "packed", True, program, keys, values)
        after = "packed"
    else:
        first = "0" if rule.window is None else f"tl.maximum(low - {rule.window - 1}, 0) // {tile} * {tile}"
        lines += [
            f"first = {first}",
            *loop("body", "first", "middle", tile, "packed", True, program, keys, values),
        ]
        after = "tl.maximum(first, packed)"
    if ringed:
        lines += queries_again(program, keys)
        lines += loop("ring", after, "last", blocks.ring, "last", True, program, keys, values)
    return [
        [
            f"@triton.jit(do_not_specialize=[{FIXED}])",
            f"def {program.name}({args[0]}",
            *indent([*args[1:-1], args[-1] + "):"], 8),
            *indent(lines + end),
        ]
    ]
