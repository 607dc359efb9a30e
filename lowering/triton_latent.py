"""Keys that are rebuilt from latents, as Triton source: the key side of attention over a store of latents."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from effcompile.kernels.form import KVForm, word
from effcompile.kernels.latent import BESIDES
from effcompile.kernels.ops import KernelUnavailable
from effcompile.kernels.program import HEAD_SIZES, Program, StoreProgram
from effcompile.lowering.triton_side import TYPES, Side, Vendor, indent, padded

CHUNK = 64
"""Latents, or words of their codes, that one product takes at most: the factor of a head is longer than registers."""


def factor_dtype(form: KVForm, dtype: torch.dtype) -> torch.dtype:
    """What the factor is rounded to for latents that are not in the ring, as these are: fp16 for those in few bits."""
    return dtype if form.bits("key") == 16 or dtype == torch.float32 else torch.float16


@dataclasses.dataclass(frozen=True)
class Operand:
    """Channels ``first``, ``first + step``, ... of a head, ``count`` of them, in columns up to a power of two."""

    suffix: str
    first: int
    step: int
    count: int

    @property
    def cut(self) -> str:
        """The channels as arguments of the functions of :mod:`effcompile.kernels.triton.latent`."""
        return f"{self.first}, {self.step}, {self.count}, {padded(self.count)}"


def chunk(rows: int, multiple: int = 1) -> int:
    """Of so many rows, the most that a product takes: a divisor up to :data:`CHUNK`, of whole ``multiple``.

    >>> chunk(128), chunk(48), chunk(176), chunk(272, 4)
    (64, 48, 44, 16)
    """
    return next(n for n in range(min(rows, CHUNK), 0, -1) if rows % n == 0 and n % multiple == 0)


@dataclasses.dataclass(frozen=True)
class LatentKeys(Side):
    """The key side of attention over latents. ``size`` is that of a rebuilt head; with ``normed`` it has a norm."""

    normed: bool = False

    def __post_init__(self) -> None:
        if self.size not in HEAD_SIZES:
            raise KernelUnavailable(f"no GPU kernel for key heads of {self.size} channels (16 to 256 are offered)")
        Side("key", self.form, self.latent, self.dtype, self.vendor)  # raises for latents that have no kernel

    @property
    def operands(self) -> list[Operand]:
        """The first channels of rotated pairs, the second ones, and those that are not rotated."""
        half, still = self.rotary // 2, Operand("", self.rotary, 1, self.size - self.rotary)
        if not half:
            return [still]
        step, second = (2, 1) if self.form.rope == "pre_adjacent" else (1, half)
        pairs = [Operand("_lo", 0, step, half), Operand("_hi", second, step, half)]
        return [*pairs, dataclasses.replace(still, suffix="_still")] if still.count else pairs

    @property
    def halves(self) -> tuple[tuple[str, int], ...]:
        """Suffix and first channel of each operand."""
        return tuple((operand.suffix, operand.first) for operand in self.operands)

    @property
    def buffers(self) -> list[str]:
        """The store and the angles; the factor for what is not in the ring, and whole; what the norm adds."""
        held = ["k0"] if self.bits == 16 else ["k0", "k1", "k2"]
        return [*held, *["table"] * (self.rotary > 0), "basis", "up", *["eps"] * self.normed]

    def offsets(self) -> list[str]:
        """Lines that move each pointer: to the one head of latents, and to the factor's rows of head ``head``."""
        place = "(head % groups) * "
        return [
            *super().offsets(),
            f"basis += {place}{self.size * self.latent}",
            f"up += {place}{self.size * (self.latent + BESIDES)}",
        ]

    def queries(self) -> list[str]:
        """Lines that load the query operands."""
        return [f"q{o.suffix} = load_channels(query, place, live, {o.cut})" for o in self.operands]

    @property
    def fused(self) -> bool:
        """Never: a rebuilt key has the model's dtype, and meets queries in it."""
        return False

    def body(self, exact: bool = False) -> list[str]:
        """Lines that rebuild tokens ``start ..`` below ``stop`` of what is not in the ring."""
        rank, g = self.latent, self.form.group
        dtype = TYPES[factor_dtype(self.form, self.dtype)]
        if self.bits == 16:
            width = chunk(rank)
            tile = f"tl.trans(dense_tile(k0 + at, start, stop, {rank}, 0, {width}, {padded(width)}, TILE))"
            return self._rebuilt([], [tile], rank, width, "basis", dtype)
        channels, size = word(self.bits)
        rows, by_channel = rank // channels, self.axis == "channel"
        width = chunk(rows, 1 if by_channel else 4)
        span = math.gcd(width, g)
        span &= -span
        cut = f"{g}" if by_channel else f"{span}"
        read, names = "key_codes" if by_channel else "value_codes", "abc"[:size]
        words = [
            f"{name} = {read}(k0 + ({byte * rows} + at){f' * {g}' * by_channel}, start, stop, {width}, "
            f"{padded(width)}, {cut}, TILE, 0, {rows // width * size})"
            for byte, name in enumerate(names)
        ]
        ptx = self.dtype != torch.float32 and self.vendor == "cuda"
        given = f"{', '.join(names if size == 3 else 'aaa')}, " + ("k1 + at, " if by_channel else "k1, at, ")
        sizes = f"{rows}, {rank}, {width}, {padded(width)}, " + ("" if by_channel else f"{span}, ") + f"{g}, TILE, "
        pieces = [
            f"latents_by_{self.axis}({given}start, stop, {k}, {sizes}{self.bits}, {self.fp8}, {dtype}, {ptx})"
            for k in range(channels)
        ]
        return self._rebuilt(words, pieces, rows, width, "basis", dtype)

    def ring(self) -> list[str]:
        """Lines that rebuild tokens ``start ..`` below ``stop`` of the tail (of the dense buffer, if there is none)."""
        if self.bits == 16:
            return self.body()
        rank, width = self.latent, chunk(self.latent)
        at = f"k2 + at, start, stop, {self.form.slots}, {rank}, 0, {width}, {padded(width)}, TILE"
        return self._rebuilt([], [f"tl.trans(ring_tile({at}))"], rank, width, "up", TYPES[self.dtype])

    def _rebuilt(
        self, words: Sequence[str], pieces: Sequence[str], rows: int, width: int, factor: str, dtype: str
    ) -> list[str]:
        """Lines that multiply ``factor`` with latents, add, norm and turn.

        ``words`` are lines that read ``width`` rows of codes from row ``at``, and ``pieces`` the latents ``[*, TILE]``
        that these hold, of which the ``k``-th begin at latent ``k * rows + at``.
        """
        row = self.latent + BESIDES * (factor == "up")
        product = [*words]
        for k, piece in enumerate(pieces):
            product.append(f"x = {piece}")
            for o in self.operands:
                cut = f"{o.cut}, {row}, {width}, {padded(width)}, {dtype}"
                rows_of = f"factor_rows({factor}, {k * rows} + at, {cut})"
                product.append(f"k{o.suffix} = dot({rows_of}, x, k{o.suffix}, {self.precision})")
        lines = [f"k{o.suffix} = tl.zeros(({padded(o.count)}, TILE), tl.float32)" for o in self.operands]
        lines += [f"for at in range(0, {rows}, {width}):", *indent(product)]
        whole = self.latent + BESIDES
        lines += [f"k{o.suffix} += factor_column(up, {o.cut}, {whole}, {self.latent})" for o in self.operands]
        if self.normed:
            squares = " + ".join(f"sum_of_squares(k{o.suffix})" for o in self.operands)
            lines.append(f"norm = 1.0 / tl.sqrt_rn(({squares}) / {self.size} + eps)")
            weight = f"{whole}, {self.latent + 1}"
            lines += [f"k{o.suffix} *= norm * factor_column(up, {o.cut}, {weight})" for o in self.operands]
        still, final = self.operands[-1], TYPES[self.dtype]
        if self.rotary:
            half = self.operands[0].count
            turn = f"table, start, stop, {self.rotary}, {half}, {padded(half)}, 1, TILE, {final}"
            lines.append(f"k_lo, k_hi = turn_halves(k_lo, k_hi, {turn})")
        if still.suffix in ("", "_still"):
            lines.append(f"k{still.suffix} = convert(k{still.suffix}, {final})")
        return lines


def sides_of(program: Program | StoreProgram, vendor: Vendor) -> tuple[Side, Side]:
    """Keys and values of a program."""
    sizes = program.key_size, program.dtype, vendor, program.rotary
    values = Side("value", program.form, program.value_size, program.dtype, vendor)
    if program.form.latent and isinstance(program, Program):
        return LatentKeys("key", program.form, *sizes, program.normed), values
    return Side("key", program.form, *sizes), values
