"""What attention over a store must move and compute, in sympy: bytes and FLOPs as functions of the sizes.

The letters are those of :mod:`effcompile.kernels.form`: :data:`B` batch, :data:`H` query heads, :data:`G` key/value
heads, :data:`T` query length, :data:`S` key length after this call, :data:`C` capacity, :data:`D` and :data:`E` head
sizes.

*Bytes* are the compulsory traffic of one call: each operand read once, each result written once, whatever a kernel
reads again because its caches are too small. *FLOPs* are two for each multiply-add of the two products, over the pairs
of query and key that the predicate lets through, and two for each value that is dequantised; the exponentials are left
out.

>>> attend(KVForm(4, 4), Predicate(), 4).at(B=1, H=9, G=3, T=1, S=8192, C=8192, D=64, E=64)
Cost(bytes=2136612, flops=25067520)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from fractions import Fraction
from typing import Any

import sympy  # type: ignore[import-untyped]
from sympy import Expr, Integer, Max, Min, Symbol, ceiling, floor

from effcompile.kernels.form import Kind, KVForm
from effcompile.kernels.program import Predicate


def _size(name: str) -> Any:
    return Symbol(name, integer=True, positive=True)


B, H, G, T, S, C, D, E = (_size(name) for name in "BHGTSCDE")
_LETTERS = {symbol.name: symbol for symbol in (B, H, G, T, S, C, D, E)}

_KINDS: tuple[Kind, Kind] = ("key", "value")
_SIZES: dict[Kind, Any] = {"key": D, "value": E}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Bytes moved and floating-point operations: sympy expressions, or integers once every size is known."""

    bytes: Any
    flops: Any

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def at(self, **sizes: Any) -> Cost:
        """This cost with sizes put in by letter, such as ``cost.at(B=1, S=8192)``; integers if no letter is left.

        Raises
        ------
        TypeError
            For a name that is no size.
        """
        return Cost(at(self.bytes, **sizes), at(self.flops, **sizes))


def at(expression: Any, **sizes: Any) -> Any:
    """``expression`` with sizes put in by letter; an ``int`` if that leaves a number."""
    if unknown := sizes.keys() - _LETTERS.keys():
        raise TypeError(f"{sorted(unknown)} are no sizes of an attention; the letters are {', '.join(_LETTERS)}.")
    expression = sympy.sympify(expression)
    if {symbol.name for symbol in expression.free_symbols} <= {k for k, v in sizes.items() if type(v) is int}:
        value = _number(expression, sizes)
        return int(value) if value.denominator == 1 else value
    value = expression.subs({_LETTERS[name]: size for name, size in sizes.items()}, simultaneous=True)
    return int(value) if value.is_Integer else value


_EXACT: dict[Any, Any] = {
    sympy.Add: lambda *terms: sum(terms),
    sympy.Mul: lambda *factors: math.prod(factors),
    sympy.Pow: lambda base, exponent: base ** int(exponent),
    Max: max,
    Min: min,
    floor: math.floor,
    ceiling: math.ceil,
}


def _number(expression: Any, sizes: dict[str, int]) -> Fraction:
    """``expression`` at whole sizes, exactly; a hundred times faster than ``subs``."""
    if expression.is_Symbol:
        return Fraction(sizes[expression.name])
    if expression.is_Rational:
        return Fraction(int(expression.p), int(expression.q))
    return Fraction(_EXACT[expression.func](*(_number(part, sizes) for part in expression.args)))


def packed_length(form: KVForm, length: Any) -> Expr:
    """Tokens of the first ``length`` that are packed; the formula of :func:`effcompile.kernels.form.packed_length`."""
    return form.group * floor(Max(0, length - form.residual) / form.group)


def pairs(predicate: Predicate) -> Expr:
    """Pairs of query and key that ``predicate`` lets through, for one head: at most ``T * S``.

    Query ``i`` stands at position ``S - T + i``. Causality hides the keys after it, a window those before
    ``S - T + i - window + 1``. Padding is data, so it is not counted.
    """
    seen = T * S
    if predicate.causal:
        seen -= T * (T - 1) / 2
    if predicate.window is not None:
        # The sum over i of max(0, first + i), where first is what the window hides from the first query.
        first = S - T - predicate.window + 1
        start = Min(T, Max(0, -first))
        seen -= (T - start) * first + (T * (T - 1) - start * (start - 1)) / 2
    return seen


def tokens_read(predicate: Predicate) -> Expr:
    """Tokens of the store that some query can see."""
    return S if predicate.window is None else Min(S, predicate.window + T - 1)


def scale_bytes(form: KVForm, kind: Kind) -> int:
    """What one quantised group carries besides its codes: an fp16 scale and, but with fp8, an fp16 zero."""
    return 2 if form.fp8(kind) else 4


def _held(form: KVForm, kind: Kind) -> tuple[Any, Any]:
    """Heads and channels of one side's buffers: latents are one head, whatever the keys or values are."""
    rank = form.rank(kind)
    return (Integer(1), Integer(rank)) if rank else (G, _SIZES[kind])


def _side_allocation(form: KVForm, kind: Kind, itemsize: int) -> Expr:
    (heads, size), bits = _held(form, kind), form.bits(kind)
    if bits == 16:
        return B * heads * C * size * itemsize
    codes, groups = C * size * bits / 8, C * size / form.group
    return B * heads * (codes + groups * scale_bytes(form, kind) + form.slots * size * itemsize)


@functools.cache
def allocation(form: KVForm, itemsize: int) -> Expr:
    """Bytes of all buffers of one layer, in ``B, G, C, D, E``; :meth:`KVForm.nbytes` as a formula."""
    return sympy.expand(_side_allocation(form, "key", itemsize) + _side_allocation(form, "value", itemsize))


TABLE_BYTES = 2
"""Of one cos or sin in the table of angles that keys before RoPE need; beside latents it is fp32, and twice that."""


def table(rotary: int, latents: bool = False) -> Expr:
    """Bytes of a cache's table of angles, in ``B, C``: cos and sin of ``rotary / 2`` pairs for each token."""
    return B * C * rotary * TABLE_BYTES * (2 if latents else 1)


def _side_read(form: KVForm, kind: Kind, itemsize: int, count: Expr, length: Any, rotary: int = 0) -> Cost:
    """Reading the newest ``count`` of ``length`` tokens of one side: codes, scales, tail, and dequantisation.

    Packed keys before RoPE need their angles too, and two products and a sum for each rotated channel. All latents of
    keys need them, and are multiplied by their up-projection, fp32, which is read as well.
    """
    (heads, size), bits = _held(form, kind), form.bits(kind)
    latents = kind == "key" and form.rank(kind) > 0
    tail = length - packed_length(form, length) if bits != 16 else count
    packed = Max(0, count - tail) if bits != 16 else Integer(0)
    channel = form.axis(kind) == "channel"
    groups = ceiling(packed / form.group) * size if channel else packed * size / form.group
    moved = packed * size * bits / 8 + groups * scale_bytes(form, kind) + Min(count, tail) * size * itemsize
    turned = rotary if kind == "key" else 0
    rotated, angle = (count, 2 * TABLE_BYTES) if latents else (packed, TABLE_BYTES)
    read = Cost(B * heads * moved + B * rotated * turned * angle, B * heads * packed * 2 * size)
    read += Cost(Integer(0), B * G * rotated * 3 * turned)
    return read + Cost(G * D * (size + 2) * 4, B * G * count * D * 2 * size) if latents else read


def _store_read(form: KVForm, itemsize: int, count: Expr, length: Any, rotary: int) -> Cost:
    key, value = (_side_read(form, kind, itemsize, count, length, rotary) for kind in _KINDS)
    return key + value


def _ends(itemsize: int, lse: bool) -> Expr:
    """Bytes of the query and of the results."""
    return B * H * T * (D * itemsize + E * itemsize + (4 if lse else 0))


@functools.cache
def attend(form: KVForm, predicate: Predicate, itemsize: int, rotary: int = 0) -> Cost:
    """``effcompile::attend``: attention that reads the store itself, tail included; in decode and prefill alike.

    ``rotary`` channels of keys before RoPE are rotated. All layers read the same table, which is counted for each.
    """
    read = _store_read(form, itemsize, tokens_read(predicate), S, rotary)
    mask = B * tokens_read(predicate) if predicate.key_mask else Integer(0)
    rank = form.rank("value")
    if rank:  # latents are summed, and each row of sums is multiplied by the up-projection
        read += Cost(_value_up(rank), B * H * T * 2 * (rank + 1) * E)
    met = D + (rank or E)
    return Cost(_ends(itemsize, True) + read.bytes + mask, B * H * pairs(predicate) * 2 * met + read.flops)


def _value_up(rank: int) -> Expr:
    """Bytes of the up-projection of latents of values, with their bias."""
    return G * E * (rank + 1) * 4


@functools.cache
def score_operands(predicate: Predicate, bias: tuple[bool, bool, bool] | None, sinks: bool) -> Cost:
    """What score parts read besides: an fp32 bias, and an fp32 sink for each head.

    ``bias`` says whether it has rows of the batch, heads and queries of its own, or one for all.
    """
    read = 4 * H if sinks else Integer(0)
    if bias is not None:
        read += 4 * tokens_read(predicate) * math.prod(size for size, own in zip((B, H, T), bias) if own)
    return Cost(read, Integer(0))


@functools.cache
def dense(predicate: Predicate, itemsize: int) -> Cost:
    """The strong baseline: attention over a dense cache in the model's dtype, stopping at the real length."""
    read = B * G * tokens_read(predicate) * (D + E) * itemsize
    mask = B * tokens_read(predicate) if predicate.key_mask else Integer(0)
    return Cost(_ends(itemsize, False) + read + mask, B * H * pairs(predicate) * 2 * (D + E))


@functools.cache
def load(form: KVForm, itemsize: int, rotary: int = 0) -> Cost:
    """``effcompile::kv_load``: the store is read, and ``C`` dense keys and values are written."""
    read = _store_read(form, itemsize, S, S, rotary)
    if rank := form.rank("value"):
        read += Cost(_value_up(rank), B * G * S * E * 2 * (rank + 1))
    return Cost(read.bytes + B * G * C * (D + E) * itemsize, read.flops)


@functools.cache
def unfused(form: KVForm, itemsize: int, mask_itemsize: int = 1, rotary: int = 0) -> Cost:
    """The same site before a rewrite: ``kv_load`` to dense keys and values, then attention over the whole capacity.

    ``kv_load`` writes all ``C`` tokens; SDPA reads them and a mask ``[B, 1, T, C]`` of ``mask_itemsize`` bytes, and
    computes every pair, hidden or not.
    """
    dense, mask = B * G * C * (D + E) * itemsize, B * T * C * mask_itemsize
    attended = Cost(dense + mask + _ends(itemsize, False), 2 * B * H * T * C * (D + E))
    return load(form, itemsize, rotary) + attended


@functools.cache
def store(form: KVForm, itemsize: int, rotary: int = 0) -> Cost:
    """``effcompile::kv_store`` of ``T`` tokens after which ``S`` are cached.

    Reads the new tokens and those that leave the tail, writes the groups that became complete and the newest tokens.
    Quantising is counted as two FLOPs a value, rotating back as four a channel. Writing the angles is left out: it is
    done once for all layers.
    """
    total = Cost(Integer(0), Integer(0))
    for kind in _KINDS:
        (heads, size), bits = _held(form, kind), form.bits(kind)
        if bits == 16:
            total += Cost(2 * B * heads * T * size * itemsize, Integer(0))
            continue
        start, stop = packed_length(form, S - T), packed_length(form, S)
        packed = stop - start
        groups = packed / form.group * size
        from_tail = Min(packed, S - T - start)
        moved = (T + from_tail + Min(T, form.slots)) * size * itemsize + packed * size * bits / 8
        moved += groups * scale_bytes(form, kind)
        turned = rotary if kind == "key" and not form.latent else 0
        angles = B * packed * turned * TABLE_BYTES
        total += Cost(B * heads * moved + angles, B * heads * packed * (2 * size + 4 * turned))
    return total
