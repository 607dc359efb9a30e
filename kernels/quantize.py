"""Reference bodies of packing: quantise a group once, pack codes, append to a store, read it back densely.

Plain PyTorch, and the meaning of the ``effcompile::kv_store`` and ``effcompile::kv_load`` operators. Kernels agree with
these functions; they never define behaviour. Layouts are in :mod:`effcompile.kernels.form`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from effcompile.kernels import rope
from effcompile.kernels.form import Kind, KVForm, word

FP16_MAX = 65504.0
E4M3_MAX = 448.0


def quantize(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric round-to-nearest of every group of ``x`` along ``dim``, a whole group being one slice of ``dim``.

    Returns codes (uint8, shape of ``x``), scale and zero (fp16, ``dim`` kept with size 1). Codes are found from the
    *stored* fp16 scale and zero, so the error of a value is at most half a step plus the rounding of the zero.
    """
    x = x.float()
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    levels = float(2**bits - 1)
    scale = ((high - low) / levels).clamp(max=FP16_MAX).half()
    zero = low.clamp(-FP16_MAX, FP16_MAX).half()
    step = scale.float()
    # A constant group has scale 0: all codes are 0 and the value is the zero itself.
    codes = ((x - zero.float()) / torch.where(step > 0, step, torch.ones_like(step))).round().clamp(0, levels)
    codes = torch.where(step > 0, codes, torch.zeros_like(codes))
    return codes.to(torch.uint8), scale, zero


def quantize_fp8(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Every group of ``x`` along ``dim`` as e4m3 numbers, round to nearest even, and one scale: see :func:`quantize`.

    Returns codes (the bits of ``float8_e4m3fn``, uint8, shape of ``x``) and scale (fp16, ``dim`` kept with size 1): the
    largest magnitude over 448. Numbers that the rounding of the scale, or its end, leaves beyond 448 saturate, so no
    code is NaN. As with integers a NaN makes the scale NaN, and with it all that its group gives back; an infinity
    becomes 448 times the largest scale.

    Source: FP8 Formats for Deep Learning (Micikevicius et al., 2022), section 3.
    """
    x = x.float()
    scale = (x.abs().amax(dim, keepdim=True) / E4M3_MAX).clamp(max=FP16_MAX).half()
    step = scale.float()
    numbers = (x / torch.where(step > 0, step, torch.ones_like(step))).clamp(-E4M3_MAX, E4M3_MAX)
    numbers = torch.where(step > 0, numbers, torch.zeros_like(numbers))
    return numbers.to(torch.float8_e4m3fn).view(torch.uint8), scale


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """``code * scale + zero`` in fp32; without a zero, codes are e4m3 numbers: ``e4m3(code) * scale``."""
    if zero is None:
        return codes.view(torch.float8_e4m3fn).float() * scale.float()
    return codes.float() * scale.float() + zero.float()


def _together(x: Tensor, count: int, bits: int, dim: int) -> Tensor:
    """The ``count`` equal parts of ``x`` along ``dim``, one above the other in steps of ``bits`` bits: int32."""
    first, *others = x.int().chunk(count, dim)
    for k, part in enumerate(others, 1):
        first = first | part << (k * bits)
    return first


def pack(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Codes to bytes along ``dim``, in words (:mod:`effcompile.kernels.form`): ``size`` become ``size * bits / 8``."""
    channels, length = word(bits)
    words = _together(codes, channels, bits, dim)
    return torch.cat([(words >> (8 * b) & 255).to(torch.uint8) for b in range(length)], dim)


def unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    """The inverse of :func:`pack`."""
    channels, length = word(bits)
    words = _together(packed, length, 8, dim)
    return torch.cat([(words >> (k * bits) & 2**bits - 1).to(torch.uint8) for k in range(channels)], dim)


def _needed(table: Tensor | None, form: KVForm) -> Tensor:
    if table is None:
        raise ValueError(f"the form {form.name} needs a table of angles.")
    return table


def store_side(
    state: list[Tensor], length: int, new: Tensor, form: KVForm, kind: Kind, table: Tensor | None = None
) -> None:
    """Append ``new`` ``[B, G, T, D]`` to one side's buffers, in place, at token ``length``.

    Groups that become complete (older than ``residual`` tokens) are quantised now, once, from the tail and the new
    tokens as they were given; then the newest tokens go to the tail. With ``table``, which has the angles of the new
    tokens already, the groups of a form of keys before RoPE are rotated back first.
    """
    total = length + new.shape[2]
    if form.bits(kind) == 16:
        state[0][:, :, length:total] = new
        return
    codes, scales, tail = state
    start, stop = form.packed(length), form.packed(total)
    if stop > start:
        old = torch.arange(start, min(length, stop), device=new.device) % form.slots
        fresh = torch.cat([tail[:, :, old], new[:, :, max(0, start - length) : max(0, stop - length)]], dim=2)
        batch, heads, count, size = fresh.shape
        g, bits = form.group, form.bits(kind)
        if form.axis(kind) == "channel":
            if kind == "key" and form.pre:
                fresh = rope.unrotate(fresh.float(), *rope.angles(_needed(table, form), start, stop), form.rope)
            grouped = fresh.reshape(batch, heads, count // g, g, size)
            q, *steps = quantize_fp8(grouped, dim=3) if form.fp8(kind) else quantize(grouped, bits, dim=3)
            codes[:, :, start // g : stop // g] = pack(q, bits, dim=4).transpose(3, 4)
            scales[:, :, start // g : stop // g] = torch.cat(steps, dim=3)
        else:
            grouped = fresh.reshape(batch, heads, count, size // g, g)
            q, *steps = quantize_fp8(grouped, dim=4) if form.fp8(kind) else quantize(grouped, bits, dim=4)
            codes[:, :, start:stop] = pack(q.flatten(3), bits, dim=3)
            scales[:, :, start:stop] = torch.stack([step.squeeze(4) for step in steps], dim=3)
    first = max(length, total - form.slots)
    tail[:, :, torch.arange(first, total, device=new.device) % form.slots] = new[:, :, first - length :]


def load_side(state: list[Tensor], length: int, form: KVForm, kind: Kind, table: Tensor | None = None) -> Tensor:
    """The first ``length`` tokens of one side, dequantised: ``[B, G, length, D]``, fp32 if packed, else as stored."""
    if form.bits(kind) == 16:
        return state[0][:, :, :length]
    codes, scales, tail = state
    bits, g = form.bits(kind), form.group
    stop = form.packed(length)
    if form.axis(kind) == "channel":
        q = unpack(codes[:, :, : stop // g].transpose(3, 4), bits, dim=4)
        body = dequantize(q, *scales[:, :, : stop // g].split(1, dim=3)).flatten(2, 3)
        if kind == "key" and form.pre:
            body = rope.rotate(body, *rope.angles(_needed(table, form), 0, stop), form.rope)
    else:
        q = unpack(codes[:, :, :stop], bits, dim=3).unflatten(3, (-1, g))
        body = dequantize(q, *scales[:, :, :stop].unsqueeze(5).unbind(3)).flatten(3)
    slots = torch.arange(stop, length, device=tail.device) % form.slots
    return torch.cat([body, tail[:, :, slots].float()], dim=2)


def load_room(state: list[Tensor], length: Tensor, form: KVForm, kind: Kind, table: Tensor | None = None) -> Tensor:
    """As :func:`load_side`, of a length that stays on its device: ``[B, G, C, D]``, anything from ``length`` on."""
    if form.bits(kind) == 16:
        return state[0]
    capacity, tail = state[0].shape[2] * form.span(kind), state[2]
    packed = (length - form.residual).clamp(min=0) // form.group * form.group
    token = torch.arange(capacity, device=tail.device)
    body = load_side(state, capacity, dataclasses.replace(form, residual=0), kind, table)
    return torch.where((token < packed)[:, None], body, tail[:, :, token % form.slots].float())
