"""How one attention layer keeps its keys and values: the form, its buffers and its bytes.

Letters used in every shape: ``B`` batch, ``H`` query heads, ``G`` key/value heads, ``T`` query length, ``S`` key
length, ``C`` capacity in tokens, ``D`` key head size, ``E`` value head size, ``g`` quantisation group, ``W`` tail
slots.

A side (keys, or values) is either *dense*, one buffer in the model's dtype, or *packed*: integer codes with an fp16
scale and zero per group, and a ring of the last tokens in the model's dtype.

========== ======================================== ======================================
buffer     keys (per channel, ``g`` tokens a group)  values (per token, ``g`` channels)
========== ======================================== ======================================
dense      ``[B, G, C, D]`` model dtype              ``[B, G, C, E]`` model dtype
codes      ``[B, G, C/g, D*bits/8, g]`` uint8        ``[B, G, C, E*bits/8]`` uint8
scales     ``[B, G, C/g, 2, D]`` fp16                ``[B, G, C, 2, E/g]`` fp16
tail       ``[B, G, W, D]`` model dtype              ``[B, G, W, E]`` model dtype
========== ======================================== ======================================

``scales[..., 0, :]`` is the scale, ``scales[..., 1, :]`` the zero: ``x = code * scale + zero``. Token ``p`` of the tail
lives in slot ``p % W`` with ``W = residual + g``, so a group is contiguous in the ring and no live token is ever
overwritten.

Codes are packed in *words*, the shortest runs of whole bytes that hold whole codes (:func:`word`): 1 channel in a byte
with 8 bits, 2 in a byte with 4, 8 in three bytes with 3, 4 in a byte with 2. With ``n`` channels a word there are
``R = D/n`` words in a head; word ``r`` holds channel ``r + k*R`` in its bits ``k*bits`` to ``k*bits + bits - 1``, and
its byte ``b``, lowest first, is row ``r + b*R`` of the codes. So consecutive bytes belong to consecutive channels, and
one shift of a vector of words gives codes of consecutive channels, whatever the width. For 3 bits a plane of two bits
and a plane of one would take as many bytes, but two shifts and a merge for every code.

With ``rope="pre"`` packed keys are quantised as they were before their rotary embedding; their tail stays rotated. The
angles of all tokens are in one more buffer, shared by the layers of a cache (:mod:`effcompile.kernels.rope`).

Source: KIVI (Liu et al., ICML 2024), sections 3.2 and 4: keys per channel, values per token, a full-precision residual.
KVQuant (Hooper et al., NeurIPS 2024), section 3.2: keys before RoPE.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Literal

import torch

BITS = (16, 8, 4, 3, 2)
"""Bit widths on offer; 16 means unquantised, in the model's dtype."""

Kind = Literal["key", "value"]

ROPE = ("post", "pre", "pre_adjacent")
"""Packed keys with their rotary embedding, or without it: the pairs that were rotated are channels ``i`` and
``i + r/2`` of the first ``r`` with ``"pre"``, ``2*i`` and ``2*i + 1`` with ``"pre_adjacent"``. A model has one of the
two; a user says ``"pre"`` for both."""


def word(bits: int) -> tuple[int, int]:
    """Channels and bytes of a word of packed codes.

    >>> [word(bits) for bits in (8, 4, 3, 2)]
    [(1, 1), (2, 1), (8, 3), (4, 1)]
    """
    shared = math.gcd(8, bits)
    return 8 // shared, bits // shared


class FormError(ValueError):
    """A compressed form that cannot be built: bits not offered, or a group that does not divide."""


def packed_length(length: int, group: int, residual: int) -> int:
    """Tokens of the first ``length`` that are packed: ``g * floor(max(0, length - residual) / g)``.

    A pure function of the length, so any way of cutting a prompt into chunks packs the same groups.
    """
    return group * (max(0, length - residual) // group)


@dataclasses.dataclass(frozen=True)
class KVForm:
    """Bits, group and residual of one layer's cache.

    Parameters
    ----------
    key_bits, value_bits
        One of :data:`BITS`, chosen separately. 16 keeps that side dense in the model's dtype.
    group
        Tokens in a key group and channels in a value group. A multiple of 16.
    residual
        The newest tokens that stay in the model's dtype. A multiple of ``group``, 0 allowed.
    rope
        One of :data:`ROPE`: whether packed keys hold the rotary embedding.

    Raises
    ------
    FormError
        If a value is not on offer.

    >>> KVForm(4, 4).name
    'k4v4g32r128'
    >>> KVForm.parse('k8v4g32r0')
    KVForm(key_bits=8, value_bits=4, group=32, residual=0, rope='post')
    """

    key_bits: int = 4
    value_bits: int = 4
    group: int = 32
    residual: int = 128
    rope: str = "post"

    def __post_init__(self) -> None:
        for name in ("key_bits", "value_bits"):
            bits = getattr(self, name)
            if isinstance(bits, bool) or bits not in BITS:
                raise FormError(f"{name}={bits!r} is not offered; choose one of {', '.join(map(str, BITS))}.")
        if not isinstance(self.group, int) or self.group < 16 or self.group % 16:
            raise FormError(f"group_size={self.group!r} is not offered; choose a multiple of 16, such as 32.")
        if not isinstance(self.residual, int) or self.residual < 0 or self.residual % self.group:
            raise FormError(
                f"residual={self.residual!r} does not hold whole groups; choose a multiple of group_size={self.group}, "
                "or 0."
            )
        if self.rope not in ROPE:
            raise FormError(f"rope={self.rope!r} is not offered; choose 'post' or 'pre'.")
        if self.rope != "post" and self.key_bits == 16:
            raise FormError(
                f"rope={self.rope!r} is about how keys are quantised, and key_bits=16 does not quantise them; leave "
                "one of the two out."
            )

    @property
    def name(self) -> str:
        """The form as one word; it travels in graphs as an operator argument and so reaches every cache key."""
        plain = f"k{self.key_bits}v{self.value_bits}g{self.group}r{self.residual}"
        return plain + self.rope.removeprefix("post")

    @classmethod
    def parse(cls, name: str) -> KVForm:
        """The form whose :attr:`name` is ``name``. Raises :class:`FormError` for anything else."""
        found = re.fullmatch(rf"k(\d+)v(\d+)g(\d+)r(\d+)({'|'.join(ROPE[1:])})?", name)
        if not found:
            raise FormError(f"{name!r} is not the name of a form; expected for example 'k4v4g32r128'.")
        key_bits, value_bits, group, residual = map(int, found.groups()[:4])
        return cls(key_bits, value_bits, group, residual, found[5] or "post")

    @property
    def dense(self) -> bool:
        """Whether nothing is quantised."""
        return self.key_bits == 16 and self.value_bits == 16

    @property
    def pre(self) -> bool:
        """Whether packed keys are without their rotary embedding, so that operators need the table of angles."""
        return self.rope != "post"

    @property
    def slots(self) -> int:
        """``W``, the ring slots of a packed side's tail."""
        return self.residual + self.group

    def bits(self, kind: Kind) -> int:
        """Bits of the keys or of the values."""
        return self.key_bits if kind == "key" else self.value_bits

    def packed(self, length: int) -> int:
        """:func:`packed_length` of this form."""
        return packed_length(length, self.group, self.residual)

    def check_head(self, kind: Kind, size: int) -> None:
        """Raise :class:`FormError` if a head of ``size`` channels cannot be packed with this form."""
        bits = self.bits(kind)
        if bits == 16:
            return
        if kind == "value" and size % self.group:
            raise FormError(
                f"value heads of {size} channels do not divide into groups of {self.group}; choose a group_size that "
                f"divides {size}, or value_bits=16."
            )
        channels, _ = word(bits)
        if size % channels:
            raise FormError(
                f"{kind} heads of {size} channels cannot be packed {channels} at a time, as {bits} bits are; "
                f"use {kind}_bits=16."
            )

    def buffers(
        self, kind: Kind, batch: int, heads: int, capacity: int, size: int, dtype: torch.dtype
    ) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of one side's buffers, in operator order: dense, or codes, scales, tail."""
        bits = self.bits(kind)
        if bits == 16:
            return [((batch, heads, capacity, size), dtype)]
        self.check_head(kind, size)
        if capacity % self.group:
            raise FormError(f"capacity {capacity} does not hold whole groups of {self.group} tokens.")
        row = size * bits // 8
        codes: tuple[int, ...]
        scales: tuple[int, ...]
        if kind == "key":
            groups = capacity // self.group
            codes, scales = (batch, heads, groups, row, self.group), (batch, heads, groups, 2, size)
        else:
            codes, scales = (batch, heads, capacity, row), (batch, heads, capacity, 2, size // self.group)
        return [(codes, torch.uint8), (scales, torch.float16), ((batch, heads, self.slots, size), dtype)]

    def nbytes(self, batch: int, heads: int, capacity: int, key_size: int, value_size: int, dtype: torch.dtype) -> int:
        """Bytes of all buffers of one layer; equal to what is allocated, exactly."""
        total = 0
        for kind, size in (("key", key_size), ("value", value_size)):
            for shape, kind_dtype in self.buffers(kind, batch, heads, capacity, size, dtype):  # type: ignore[arg-type]
                total += torch.Size(shape).numel() * kind_dtype.itemsize
        return total
