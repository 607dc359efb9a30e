"""One side of a store as Triton source, and the frame of a generated module.

The parts are the functions of :mod:`effcompile.kernels.triton`. A generated module holds one program, with its sizes as
literal numbers; batch, heads, lengths and strides stay arguments, so one module serves every step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from effcompile.kernels.form import Axis, Kind, KVForm, word
from effcompile.kernels.ops import KernelUnavailable
from effcompile.kernels.program import HEAD_SIZES

TYPES = {torch.float32: "tl.float32", torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16"}
GROUPS = (16, 32, 64, 128)
"""Groups a tile can be made of: powers of two, at most one tile of keys."""


Vendor = Literal["cuda", "hip"]
RANKS: dict[Vendor, int] = {"cuda": 1024, "hip": 512}
"""The most latents: a store packs those of a group of tokens in one piece, which goes through shared memory."""


def padded(width: int) -> int:
    """The power of two, at least 16 for the matrix instructions, that covers ``width`` channels."""
    return max(16, 1 << (width - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How one kernel is cut: query rows and keys per tile, keys per tile of the ring, warps, pipeline stages."""

    rows: int
    tile: int
    ring: int
    warps: int
    stages: int

    def within(self, block: int) -> Blocks:
        """The same for listed blocks of ``block`` tokens: the largest tiles of a power of two that fill them."""
        rows, tile = math.gcd(self.rows, block), math.gcd(self.tile, block)
        return dataclasses.replace(self, rows=rows, tile=tile, warps=self.warps if rows == self.rows else 4)


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of a store as source text: its buffers, its operands, and the lines that load a tile of it."""

    kind: Kind
    form: KVForm
    size: int
    dtype: torch.dtype
    vendor: Vendor
    rotary: int = 0

    def __post_init__(self) -> None:
        self.form.check_head(self.kind, self.size)
        if self.size not in HEAD_SIZES and not self.latent:
            raise KernelUnavailable(
                f"no GPU kernel for {self.kind} heads of {self.size} channels (16 to 256 are offered)"
            )
        if self.latent > RANKS[self.vendor]:
            raise KernelUnavailable(f"no GPU kernel for {self.latent} latents (up to {RANKS[self.vendor]} are offered)")
        if self.bits != 16 and self.form.group not in GROUPS:
            raise KernelUnavailable(f"no GPU kernel for groups of {self.form.group}; choose one of {GROUPS}")
        if self.rotary and (why := self._not_turned()):
            raise KernelUnavailable(f"no GPU kernel for keys before RoPE {why}; use rope='post' there")
        if self.axis == "token" and self.bits == 3 and self.held % 32:
            # Four words of eight channels are read together.
            raise KernelUnavailable(
                f"no GPU kernel for {self.kind} heads of {self.held} channels in 3 bits per token (multiples of 32 "
                "have one)"
            )

    @property
    def bits(self) -> int:
        """Bits of this side in its form."""
        return self.form.bits(self.kind)

    @property
    def latent(self) -> int:
        """Channels of the latents that this side holds in place of keys; 0 of others."""
        return self.form.rank("key") if self.kind == "key" else 0

    @property
    def held(self) -> int:
        """Channels of a head of the buffers."""
        return self.latent or self.size

    def _not_turned(self) -> str:
        """For which heads there is no kernel of keys before RoPE; '' if there is one."""
        if self.fp8:
            return "in fp8"
        if self.form.rope == "pre" and not self.halved:
            # One operand holds them all, in order, and falls into runs of a pair's distance.
            room = self.size // len(self.halves)
            fits = self.rotary & (self.rotary - 1) == 0 and self.rotary <= room
            if not fits or (self.parts > 1 and self.width != self.padded):
                return f"whose first {self.rotary} of {self.size} channels are rotated by halves"
        if self.halved and self.columns < 16:
            return f"in heads of {self.size} channels with {self.bits} bits"
        return f"in {self.width} channels a part, an odd number," if self.width % 2 and not self.halved else ""

    @property
    def halved(self) -> bool:
        """Whether all pairs are a channel of the lower half and one of the upper: each half is its own operand."""
        return self.rotary == self.size and self.form.rope == "pre"

    @property
    def axis(self) -> Axis | None:
        """What a scale of this side is shared along; None without scales."""
        return None if self.bits == 16 else self.form.axis(self.kind)

    @property
    def fp8(self) -> bool:
        """Whether the codes are e4m3 numbers, which have no zeros."""
        return self.form.fp8(self.kind)

    @property
    def width(self) -> int:
        """Channels of one part of an operand: those that lie in the same bits of all words of codes."""
        if self.halved and self.bits == 8:
            return self.size // 2
        return self.size if self.bits == 16 else self.size // word(self.bits)[0]

    @property
    def parts(self) -> int:
        """Parts of an operand: 1, but 8 with 3 bits and 4 with 2. With 4 bits each of the two is its own operand."""
        return self.size // self.width // (2 if self.halved else 1) if self.bits in (3, 2) else 1

    @property
    def padded(self) -> int:
        """Columns of one part: a power of two."""
        return padded(self.width) if self.parts == 1 else 1 << (self.width - 1).bit_length()

    @property
    def columns(self) -> int:
        """Columns of one operand."""
        return self.parts * self.padded

    def cut(self, first: int) -> str:
        """The operand from channel ``first`` on, as the last arguments of ``load_rows`` and ``store_rows``."""
        return f"{first}, {self.width}, {self.padded}" + (f", {self.parts}" if self.parts > 1 else "")

    @property
    def halves(self) -> tuple[tuple[str, int], ...]:
        """Suffix and first channel of each operand."""
        return (("_lo", 0), ("_hi", self.size // 2)) if self.bits == 4 or self.halved else (("", 0),)

    @property
    def buffers(self) -> list[str]:
        """Argument names of this side's buffers."""
        letter = self.kind[0]
        packed = [f"{letter}{i}" for i in range(3)]
        return packed[:1] if self.bits == 16 else [*packed, "table"] if self.rotary else packed

    def offsets(self) -> list[str]:
        """Lines that move each buffer's pointer to head ``head`` (int64), of latents to the one of ``batch``."""
        letter, g, row, head = self.kind[0], self.form.group, self.held * self.bits // 8, self.head
        turned = [f"table += batch * capacity * {self.rotary}"] if self.rotary else []
        if self.bits == 16:
            return [f"{letter}0 += {head} * capacity * {self.held}", *turned]
        steps = 1 if self.fp8 else 2
        per_channel, per_token = steps * self.held, steps * (self.held // g)
        count = f"capacity // {g} * {per_channel}" if self.axis == "channel" else f"capacity * {per_token}"
        return [
            f"{letter}0 += {head} * capacity * {row}",
            f"{letter}1 += {head} * ({count})",
            f"{letter}2 += {head} * {self.form.slots * self.held}",
            *turned,
        ]

    @property
    def head(self) -> str:
        """What counts the heads of the buffers."""
        return "batch" if self.latent else "head"

    def queries(self) -> list[str]:
        """Lines that load the query operands in the model's dtype."""
        return [f"q{suffix} = load_rows(query, place, live, 1, {self.cut(first)})" for suffix, first in self.halves]

    def names(self, stem: str) -> str:
        """``stem`` with each operand's suffix, separated by commas."""
        return ", ".join(stem + suffix for suffix, _ in self.halves)

    @property
    def fused(self) -> bool:
        """Whether attention takes packed tiles in fp16: exact codes, one rounding, two numbers an instruction.

        Also for a bf16 model, whose own dtype would keep 8 bits of each number instead of 11.
        """
        return self.bits != 16 and self.dtype != torch.float32

    @property
    def precision(self) -> str:
        """How fp32 operands are multiplied."""
        # On NVIDIA three tf32 products give an fp32 product within two bits; AMD multiplies fp32 in its matrix units.
        return '"tf32x3"' if self.dtype == torch.float32 and self.vendor == "cuda" else '"ieee"'

    @property
    def operand(self) -> str:
        """dtype of this side's operands for attention over what is not in the ring."""
        return "tl.float16" if self.fused else TYPES[self.dtype]

    def body(self, exact: bool = False) -> list[str]:
        """Lines that load tokens ``start ..`` below ``stop`` of what is not in the ring.

        ``exact`` gives the reference's numbers in the model's dtype, else it is :attr:`operand`.
        """
        letter = self.kind[0]
        if self.bits == 16:
            tile = f"dense_tile({letter}0, start, stop, {self.size}, 0, {self.size}, {padded(self.size)}, TILE)"
            return [f"{letter} = " + (f"tl.trans({tile})" if self.kind == "key" else tile)]
        shared = math.gcd(self.width, self.form.group)
        part = f"{self.width}, " if self.parts > 1 else ""
        numbers = f"{self.size}, {part}{self.padded}, {self.form.group}, "
        numbers += f"{shared & -shared}, " if self.axis == "token" and self.bits < 8 else ""
        final = TYPES[self.dtype] if exact else self.operand
        dtype = "tl.float32" if exact and self.rotary else final
        ptx = f", {self.fused and self.vendor == 'cuda' and not exact}"
        name, bits = ("joined", f"{self.bits}, ") if self.parts > 1 else (str(self.bits), "")
        if self.fp8:
            name, ptx = "fp8", ""
        name += "_halves" if self.halved and self.bits == 8 else ""
        function = f"{'keys' if self.axis == 'channel' else 'values'}_{name}"
        call = f"{function}({letter}0, {letter}1, start, stop, {numbers}TILE, {bits}{dtype}{ptx})"
        if self.halved and self.parts > 1:
            call = f"two_halves({call}, TILE)"
        lines = [f"{self.names(letter)} = {call}"]
        if (self.axis == "channel") != (self.kind == "key"):
            lines += [f"{letter}{suffix} = tl.trans({letter}{suffix})" for suffix, _ in self.halves]
        cut = f"{self.width}, {self.padded}, {self.parts}, TILE, {final})"
        if self.halved:
            lines.append(f"k_lo, k_hi = turn_halves(k_lo, k_hi, table, start, stop, {self.rotary}, {cut}")
        elif self.form.rope == "pre" and self.rotary:
            k = f"k{self.halves[0][0]}"
            lines.append(f"{k} = turn_within({k}, table, start, stop, {self.rotary}, TILE, {final})")
        elif self.rotary:
            for suffix, first in self.halves:
                k = f"k{suffix}"
                lines.append(f"{k} = turn_adjacent({k}, table, start, stop, {self.rotary}, {first}, {cut}")
        return lines

    def gathered(self) -> list[str]:
        """Lines that load the tokens ``key`` of a dense side as far as ``keep`` says."""
        letter = self.kind[0]
        tile = f"load_rows({letter}0, key.to(tl.int64), keep, {self.size}, {self.cut(0)})"
        return [f"{letter} = " + (f"tl.trans({tile})" if self.kind == "key" else tile)]

    def ring(self) -> list[str]:
        """Lines that load tokens ``start ..`` below ``stop`` of the tail (of the dense buffer, if there is no tail)."""
        if self.bits == 16:
            return self.body()
        letter, lines = self.kind[0], []
        for suffix, first in self.halves:
            tile = (
                f"ring_tile({letter}2, start, stop, {self.form.slots}, {self.size}, {first}, {self.width}, "
                f"{self.padded}, TILE{f', {self.parts}' if self.parts > 1 else ''})"
            )
            lines.append(f"{letter}{suffix} = " + (f"tl.trans({tile})" if self.kind == "key" else tile))
        return lines


def module_text(title: str, imports: Mapping[str, Sequence[str]], functions: Sequence[list[str]]) -> str:
    """The text of a module: its title, the imports that its functions use, and the functions."""
    head = [f'"""{title}: written by effcompile.lowering.triton_source; one program, nothing to edit."""', ""]
    head += ["import triton", "import triton.language as tl", ""]
    text = "\n\n\n".join("\n".join(lines) for lines in functions)
    for file, names in imports.items():
        used = [name for name in sorted(names) if f"{name}(" in text]
        if used:
            head.append(f"from effcompile.kernels.triton.{file} import {', '.join(used)}  # noqa: E501")
    return "\n".join(head) + "\n\n\n" + text + "\n"


def indent(lines: Sequence[str], by: int = 4) -> list[str]:
    """The lines, moved to the right."""
    return [" " * by + line if line else line for line in lines]


BLOCK_PARTS = ("check_columns", "count_below", "count_within", "in_ranges", "ranges_fit", "tile_at", "tokens_of")
LATENT_PARTS = (
    "factor_column",
    "factor_rows",
    "latents_by_channel",
    "latents_by_token",
    "load_channels",
    "sum_of_squares",
)
LOAD_PARTS = (
    "dense_tile",
    "key_codes",
    "keys_4",
    "keys_8",
    "keys_fp8",
    "keys_8_halves",
    "keys_joined",
    "load_rows",
    "packed_length",
    "ring_tile",
    "store_rows",
    "value_codes",
    "values_4",
    "values_8",
    "values_fp8",
    "values_joined",
)
NUMBER_PARTS = ("convert", "dot", "unit_of")
SOFTMAX_PARTS = (
    "add_bias",
    "log_total",
    "merge_rows",
    "merge_weights",
    "reciprocal",
    "softmax_step",
    "tanh",
    "visible",
    "with_sink",
)
PACK_PARTS = ("append_dense", "append_ring", "pack_keys", "pack_turned_keys", "pack_values")
ROPE_PARTS = ("turn_adjacent", "turn_halves", "turn_within", "two_halves")
