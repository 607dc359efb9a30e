"""How one attention layer keeps its keys and values: the form, its buffers and its bytes.

Letters used in every shape: ``B`` batch, ``H`` query heads, ``G`` key/value heads, ``T`` query length, ``S`` key
length, ``C`` capacity in tokens, ``D`` key head size, ``E`` value head size, ``g`` quantisation group, ``W`` tail
slots.

A side (keys, or values) is either *dense*, one buffer in the model's dtype, or *packed*: codes with an fp16 scale and
zero per group, and a ring of the last tokens in the model's dtype. A group lies along one *axis*: ``g`` tokens of one
channel, which is the default of keys, or ``g`` channels of one token, the default of values. For ``D`` channels:

========== ====================================== ======================================
buffer     axis ``channel`` (``g`` tokens a group) axis ``token`` (``g`` channels a group)
========== ====================================== ======================================
dense      ``[B, G, C, D]`` model dtype            the same
codes      ``[B, G, C/g, D*bits/8, g]`` uint8      ``[B, G, C, D*bits/8]`` uint8
scales     ``[B, G, C/g, 2, D]`` fp16              ``[B, G, C, 2, D/g]`` fp16
tail       ``[B, G, W, D]`` model dtype            the same
========== ====================================== ======================================

``scales[..., 0, :]`` is the scale, ``scales[..., 1, :]`` the zero: ``x = code * scale + zero``. Token ``p`` of the tail
lives in slot ``p % W`` with ``W = residual + g``, so a group is contiguous in the ring and no live token is ever
overwritten. Tokens are packed ``g`` at a time on either axis, so that both sides pack the same length.

``"fp8"`` stands for codes that are the bits of e4m3 numbers (``float8_e4m3fn``), 8 a value: ``x = e4m3(code) * scale``
with ``scale`` the largest magnitude of the group over 448, the largest e4m3 number. It has no zero, so the 2 in the
shape of its scales is 1. e4m3 is symmetric, and finer near 0 than at the ends; a scale for each group, and not one for
a tensor as in serving engines, since groups exist here anyway and keep an outlier from costing others their subnormals.

Codes are packed in *words*, the shortest runs of whole bytes that hold whole codes (:func:`word`): 1 channel in a byte
with 8 bits, 2 in a byte with 4, 8 in three bytes with 3, 4 in a byte with 2. With ``n`` channels a word there are
``R = D/n`` words in a head; word ``r`` holds channel ``r + k*R`` in its bits ``k*bits`` to ``k*bits + bits - 1``, and
its byte ``b``, lowest first, is row ``r + b*R`` of the codes. So consecutive bytes belong to consecutive channels, and
one shift of a vector of words gives codes of consecutive channels, whatever the width. For 3 bits a plane of two bits
and a plane of one would take as many bytes, but two shifts and a merge for every code.

With ``rope="pre"`` packed keys are quantised as they were before their rotary embedding; their tail stays rotated. The
angles of all tokens are in one more buffer, shared by the layers of a cache (:mod:`effcompile.kernels.rope`).

With ``latent=r`` the key side holds no keys but their latents (:mod:`effcompile.kernels.latent`): one head of ``r``
channels for all key heads, in any of the forms above, so ``G`` is 1 and ``D`` is ``r`` in the table. They are made
before the rotary embedding; ``rope`` then says which pairs of channels a rebuilt key is rotated in. The same for the
value side with ``value_latent=r``.

Sources: KIVI (Liu et al., ICML 2024), sections 3.2 and 4: keys per channel, values per token, a full-precision
residual. KVTuner (Li et al., ICML 2025) serves keys per channel and keys per token. KVQuant (Hooper et al., NeurIPS
2024), section 3.2: keys before RoPE. FP8 Formats for Deep Learning (Micikevicius et al., 2022), section 3: e4m3.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch

BITS = (16, 8, 4, 3, 2)
"""Bit widths on offer; 16 means unquantised, in the model's dtype."""

Bits = int | Literal["fp8"]
Kind = Literal["key", "value"]
Axis = Literal["channel", "token"]
"""What the numbers of a group have in common, and so share a scale along: one channel, or one token."""
_AXES: dict[Kind, Axis] = {"key": "channel", "value": "token"}
"""The axes that need no word in the name of a form."""

LATENT: dict[Kind, str] = {"key": "latent", "value": "value_latent"}
"""The option that says how many channels the latents of a side have."""

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


def is_share(latent: object) -> bool:
    """Whether latents are given as a share of the channels of all layers, and not as channels.

    >>> is_share(0.67), is_share(128), is_share(0), is_share(1.0)
    (True, False, False, False)
    """
    return isinstance(latent, float) and 0 < latent < 1


def _is_rank(latent: object) -> bool:
    return isinstance(latent, int) and not isinstance(latent, bool) and latent >= 0 and latent % 16 == 0


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
        One of :data:`BITS` or ``"fp8"``, chosen separately. 16 keeps that side dense in the model's dtype.
    group
        Tokens in a group of one channel, channels in a group of one token. A multiple of 16.
    residual
        The newest tokens that stay in the model's dtype. A multiple of ``group``, 0 allowed.
    key_axis, value_axis
        What a scale is shared along. An unquantised side has no axis: it is set to the default.
    rope
        One of :data:`ROPE`: whether packed keys hold the rotary embedding.
    latent, value_latent
        ``r``, the channels of the latents that stand for the keys, or the values, of all heads. A multiple of 16; 0:
        keys, or values, themselves. A share between 0 and 1 stands for ranks that a cache chooses; such a form has no
        buffers.

    Raises
    ------
    FormError
        If a value is not on offer.

    >>> KVForm(4, 4).name
    'k4v4g32r128'
    >>> KVForm.parse('k8v4g32r0') == KVForm(key_bits=8, value_bits=4, group=32, residual=0)
    True
    >>> KVForm('fp8', 4, key_axis='token').name
    'kfp8v4g32r128kt'
    >>> KVForm(8, 4, latent=128, value_latent=96).name
    'k8l128v4l96g32r128'
    """

    key_bits: Bits = 4
    value_bits: Bits = 4
    group: int = 32
    residual: int = 128
    key_axis: Axis = "channel"
    value_axis: Axis = "token"
    rope: str = "post"
    latent: int | float = 0
    value_latent: int | float = 0

    def __post_init__(self) -> None:
        for kind, axis in _AXES.items():
            name, bits = f"{kind}_bits", getattr(self, f"{kind}_bits")
            if isinstance(bits, bool) or not (bits == "fp8" or bits in BITS):
                raise FormError(f"{name}={bits!r} is not offered; choose one of {', '.join(map(str, BITS))}, or 'fp8'.")
            if bits == "fp8" and not hasattr(torch, "float8_e4m3fn"):
                raise FormError(f"{name}='fp8' needs torch.float8_e4m3fn, which this torch does not have; choose 8.")
            if getattr(self, f"{kind}_axis") not in ("channel", "token"):
                raise FormError(
                    f"{kind}_axis={getattr(self, f'{kind}_axis')!r} is not offered; choose 'channel' or 'token'."
                )
            if bits == 16:
                object.__setattr__(self, f"{kind}_axis", axis)
        if not isinstance(self.group, int) or self.group < 16 or self.group % 16:
            raise FormError(f"group_size={self.group!r} is not offered; choose a multiple of 16, such as 32.")
        if not isinstance(self.residual, int) or self.residual < 0 or self.residual % self.group:
            raise FormError(
                f"residual={self.residual!r} does not hold whole groups; choose a multiple of group_size={self.group}, "
                "or 0."
            )
        if self.rope not in ROPE:
            raise FormError(f"rope={self.rope!r} is not offered; choose 'post' or 'pre'.")
        for kind, name in LATENT.items():
            given = getattr(self, name)
            if not (is_share(given) or _is_rank(given)):
                raise FormError(
                    f"{name}={given!r} is not offered; choose the channels that stand for the {kind}s of all heads, a "
                    "multiple of 16 such as 128, a share of all layers' channels such as 0.67, or 0 to keep whole "
                    f"{kind}s."
                )
            if given and not is_share(given):
                self.check_head(kind, self.rank(kind))
        if self.latent:
            return  # latents are made before RoPE, whatever their bits and axis
        if self.rope != "post" and self.key_bits == 16:
            raise FormError(
                f"rope={self.rope!r} is about how keys are quantised, and key_bits=16 does not quantise them; leave "
                "one of the two out."
            )
        if self.rope != "post" and self.key_axis == "token":
            raise FormError(
                f"rope={self.rope!r} is for scales of channels, which rotation mixes; it needs key_axis='channel'."
            )

    @property
    def name(self) -> str:
        """The form as one word; it travels in graphs as an operator argument and so reaches every cache key."""
        axes = ("kt" if self.key_axis == "token" else "") + ("vc" if self.value_axis == "channel" else "")
        key, value = (f"l{given}" if given else "" for given in (self.latent, self.value_latent))
        plain = f"k{self.key_bits}{key}v{self.value_bits}{value}g{self.group}r{self.residual}{axes}"
        return plain + self.rope.removeprefix("post")

    @classmethod
    def parse(cls, name: str) -> KVForm:
        """The form whose :attr:`name` is ``name``. Raises :class:`FormError` for anything else."""
        side = r"(\d+|fp8)(?:l(\d+))?"
        found = re.fullmatch(rf"k{side}v{side}g(\d+)r(\d+)(kt)?(vc)?({'|'.join(ROPE[1:])})?", name)
        if not found:
            raise FormError(f"{name!r} is not the name of a form; expected for example 'k4v4g32r128'.")
        key, latent, value, value_latent, group, residual, key_token, value_channel, rope = found.groups()
        return cls(
            "fp8" if key == "fp8" else int(key),
            "fp8" if value == "fp8" else int(value),
            int(group),
            int(residual),
            "token" if key_token else "channel",
            "channel" if value_channel else "token",
            rope or "post",
            int(latent or 0),
            int(value_latent or 0),
        )

    @property
    def options(self) -> dict[str, Any]:
        """The form in the words of users: the arguments of ``ec.compress_kv`` and ``ec.Cache`` that describe it."""
        fields = dataclasses.asdict(self)
        return {("group_size" if name == "group" else name): value for name, value in fields.items()}

    @classmethod
    def of_options(cls, options: Mapping[str, Any]) -> KVForm:
        """The form that :attr:`options` of it describe."""
        return cls(**{("group" if name == "group_size" else name): value for name, value in options.items()})

    @property
    def dense(self) -> bool:
        """Whether nothing is quantised."""
        return self.key_bits == 16 and self.value_bits == 16

    @property
    def pre(self) -> bool:
        """Whether packed keys are without their rotary embedding, so that operators need the table of angles."""
        return self.rope != "post"

    @property
    def buffered(self) -> KVForm:
        """The form of the buffers by themselves, which know nothing of what latents become."""
        if not self.latents:
            return self
        return dataclasses.replace(self, latent=0, value_latent=0, rope="post" if self.latent else self.rope)

    @property
    def latents(self) -> bool:
        """Whether keys, values or both are latents."""
        return bool(self.latent or self.value_latent)

    @property
    def bounds_keys(self) -> bool:
        """Whether scale and zero of a group of packed keys are the ends of a channel of them, as attention reads it."""
        plain = self.bits("key") != 16 and not self.fp8("key") and not self.latent
        return plain and self.key_axis == "channel" and not self.pre

    @property
    def slots(self) -> int:
        """``W``, the ring slots of a packed side's tail."""
        return self.residual + self.group

    def bits(self, kind: Kind) -> int:
        """Bits that a key or a value takes: 8 for ``"fp8"``."""
        bits = self.key_bits if kind == "key" else self.value_bits
        return 8 if bits == "fp8" else bits

    def fp8(self, kind: Kind) -> bool:
        """Whether codes are e4m3 numbers, which have a scale and no zero."""
        return (self.key_bits if kind == "key" else self.value_bits) == "fp8"

    def axis(self, kind: Kind) -> Axis:
        """What a scale of the keys or of the values is shared along."""
        return self.key_axis if kind == "key" else self.value_axis

    def rank(self, kind: Kind) -> int:
        """The channels of a side's latents; 0 for whole keys or values. Raises :class:`FormError` for a share."""
        given = getattr(self, LATENT[kind])
        if is_share(given):
            raise FormError(f"{LATENT[kind]}={given!r} is a share; make a cache of this form, which chooses the ranks.")
        return int(given)

    def step(self, kind: Kind) -> int:
        """What the channels of a side's latents are a multiple of."""
        return self.group if self.bits(kind) != 16 and self.axis(kind) == "token" else 16

    def span(self, kind: Kind) -> int:
        """Tokens that one row of a side's first buffer stands for: a group of channels that are packed, else 1."""
        return self.group if self.bits(kind) != 16 and self.axis(kind) == "channel" else 1

    def packed(self, length: int) -> int:
        """:func:`packed_length` of this form."""
        return packed_length(length, self.group, self.residual)

    def check_head(self, kind: Kind, size: int) -> None:
        """Raise :class:`FormError` if a head of ``size`` channels cannot be packed with this form."""
        bits, size = self.bits(kind), self.rank(kind) or size
        if bits == 16:
            return
        if self.axis(kind) == "token" and size % self.group:
            raise FormError(
                f"{kind} heads of {size} channels do not divide into groups of {self.group}; choose a group_size that "
                f"divides {size}, {kind}_axis='channel', or {kind}_bits=16."
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
        if rank := self.rank(kind):
            heads, size = 1, rank
        if bits == 16:
            return [((batch, heads, capacity, size), dtype)]
        self.check_head(kind, size)
        if capacity % self.group:
            raise FormError(f"capacity {capacity} does not hold whole groups of {self.group} tokens.")
        row, steps = size * bits // 8, 1 if self.fp8(kind) else 2
        codes: tuple[int, ...]
        scales: tuple[int, ...]
        if self.axis(kind) == "channel":
            groups = capacity // self.group
            codes, scales = (batch, heads, groups, row, self.group), (batch, heads, groups, steps, size)
        else:
            codes, scales = (batch, heads, capacity, row), (batch, heads, capacity, steps, size // self.group)
        return [(codes, torch.uint8), (scales, torch.float16), ((batch, heads, self.slots, size), dtype)]

    def nbytes(self, batch: int, heads: int, capacity: int, key_size: int, value_size: int, dtype: torch.dtype) -> int:
        """Bytes of all buffers of one layer; equal to what is allocated, exactly."""
        total = 0
        for kind, size in (("key", key_size), ("value", value_size)):
            for shape, kind_dtype in self.buffers(kind, batch, heads, capacity, size, dtype):  # type: ignore[arg-type]
                total += torch.Size(shape).numel() * kind_dtype.itemsize
        return total
