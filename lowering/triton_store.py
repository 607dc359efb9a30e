"""Store program to Triton source: quantise and append, and read back."""

from __future__ import annotations

import dataclasses

from effcompile.kernels.program import StoreProgram
from effcompile.lowering.triton_latent import sides_of
from effcompile.lowering.triton_side import (
    LOAD_PARTS,
    PACK_PARTS,
    ROPE_PARTS,
    Side,
    Vendor,
    indent,
    module_text,
    padded,
)


def store_block(program: StoreProgram) -> int:
    """Tokens per program of a store: one group, so that a program owns the groups it quantises."""
    return 32 if program.form.dense else program.form.group


def store_source(program: StoreProgram, vendor: Vendor) -> str:
    """The module of a store: the kernel that quantises and appends, and the one that reads everything back."""
    form, name = program.form, program.name
    sides = sides_of(program, vendor)
    packed = [side for side in sides if side.bits != 16]
    block = store_block(program)
    start = [
        "batch = head // groups",
        *(line for side in sides for line in side.offsets()),
    ]
    kernel = [
        f"blocks = tl.cdiv(tokens, {block})",
        "head, block = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0) % blocks",
        *start,
        "key += batch * key_batch" + ("" if form.latent else " + (head % groups) * key_head"),
        "value += batch * value_batch + (head % groups) * value_head",
        "old = tl.load(length)",
    ]
    if packed:
        kernel += [
            "if QUANTIZE:",
            f"    first = packed_length(old, {block}, {form.residual}) + block * {block}",
            f"    last = packed_length(tl.minimum(old + tokens, capacity), {block}, {form.residual})",
            "    if first < last:",
        ]
        for side in packed:
            c, new, words = side.kind[0], side.kind, dataclasses.replace(side, rotary=0)
            pack, table, turn = "pack_keys" if side.axis == "channel" else "pack_values", "", ", True" * side.fp8
            if side.rotary:
                pack, table = "pack_turned_keys", "table, "
                turn = f", {side.rotary}, {form.rope == 'pre_adjacent'}"
            call = (
                f"{pack}({c}0, {c}1, {c}2, {table}{new}, {new}_token, first, old, {side.size}, "
                f"{words.padded}, {side.size // words.width}, {side.bits}, {form.slots}, {block}{turn})"
            )
            kernel += indent(_once(side, call), 8)
    kernel.append("if APPEND:")
    for side in sides:
        c, new = side.kind[0], side.kind
        part, where, slots = ("dense", f"{c}0", "") if side.bits == 16 else ("ring", f"{c}2", f"{form.slots}, ")
        call = (
            f"append_{part}({where}, {new}, {new}_token, block * {block}, tokens, old, capacity, {side.size}, "
            f"{padded(side.size)}, {slots}{block})"
        )
        kernel += indent(_once(side, call))
    buffers = ", ".join(name for side in sides for name in side.buffers)
    strides = ", ".join(f"{kind}_{axis}" for kind in ("key", "value") for axis in ("batch", "head", "token"))
    store = [
        '@triton.jit(do_not_specialize=["tokens", "groups", "capacity"])',
        f"def {name}({buffers},",
        f"        length, key, value, tokens, groups, capacity, {strides},",
        "        QUANTIZE: tl.constexpr, APPEND: tl.constexpr):",
        *indent(kernel),
    ]
    if form.latent:  # whoever reads latents makes keys of them, and has an operator of its own for that
        return module_text(name, {"load": LOAD_PARTS, "pack": PACK_PARTS}, [store])
    lines = [
        f"blocks = tl.cdiv(capacity, {block})",
        f"head, start = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0) % blocks * {block}",
        *(["batch = head // groups"] if program.rotary else []),
        *(line for side in sides for line in side.offsets()),
        "n = tl.minimum(tl.load(length), capacity).to(tl.int32)",
        f"packed = packed_length(n, {block}, {form.residual})" if packed else "packed = n",
        f"token = tl.arange(0, {block})",
        *(f"{side.kind} += (head * capacity + start) * {side.size}" for side in sides),
        "keep = start + token < capacity",
        "# packed is a multiple of this block: a block is packed throughout, or not at all.",
        "if start < packed:",
        *indent(_read_back(sides, False)),
        "else:",
        *indent(_read_back(sides, True) if packed else _read_back(sides, False)),
    ]
    sizes = ["groups", "capacity"] if program.rotary else ["capacity"]
    load = [
        f"@triton.jit(do_not_specialize=[{', '.join(map(repr, sizes))}])",
        f"def load_{name}({buffers}, length, key, value, {', '.join(sizes)}, TILE: tl.constexpr):",
        '    """Every token dequantised to the model\'s dtype; 0 from the length on."""',
        *indent(lines),
    ]
    return module_text(name, {"load": LOAD_PARTS, "pack": PACK_PARTS, "rope": ROPE_PARTS}, [store, load])


def _once(side: Side, call: str) -> list[str]:
    """A call for each head of ``side``: all heads of values share one of latents, which the first of them writes."""
    return ["if head % groups == 0:", *indent([call])] if side.latent else [call]


def _read_back(sides: tuple[Side, Side], ring: bool) -> list[str]:
    """Load one block of tokens of both sides and store it densely."""
    lines = ["stop = n" if ring else "stop = tl.minimum(packed, n)"]
    for side in sides:
        c = side.kind[0]
        lines += side.ring() if ring else side.body(exact=True)
        for suffix, first in side.halves:
            x = f"tl.trans({c}{suffix})" if side.kind == "key" else f"{c}{suffix}"
            lines.append(f"store_rows({side.kind}, token, {x}, keep, {side.size}, {side.cut(first)})")
    return lines
