"""What a store holds, written apart from the reference bodies: from what was given, and from the bytes themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from effcompile.kernels import quantize
from effcompile.kernels.form import Kind, KVForm, word


def e4m3(code: int) -> float:
    """The number that a byte stands for: a sign, four bits of exponent with bias 7, three of mantissa."""
    exponent, mantissa = code >> 3 & 15, code & 7
    assert (exponent, mantissa) != (15, 7), "NaN"
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -size if code & 128 else size


E4M3 = torch.tensor([e4m3(code) if code & 127 != 127 else float("nan") for code in range(256)], dtype=torch.float64)


def fp8_edges() -> Tensor:
    """``[1, 1, 64, 32]``: each e4m3 number, the middles between them, and what lies a little to either side.

    Every row ends in 448, so that a group of a row has a scale of 1.
    """
    steps = E4M3[:127].float()
    edges = torch.cat([steps, (steps[1:] + steps[:-1]) / 2])
    near = torch.stack([edges, edges.nextafter(torch.tensor(0.0)), edges.nextafter(torch.tensor(1e9))], 1).flatten()
    near = torch.cat([near, -near]).clamp(-448, 448)
    rows = torch.cat([near, near.new_zeros(64 * 31 - len(near))]).view(64, 31)
    return torch.cat([rows, torch.full((64, 1), 448.0)], 1)[None, None]


def plain(given: Tensor, form: KVForm, kind: Kind) -> Tensor:
    """What a store gives back of tokens ``[B, G, n, D]``: each whole group quantised once, and the newest as given."""
    bits, stop, g = form.bits(kind), form.packed(given.shape[2]), form.group
    if bits == 16 or not stop:
        return given
    # A group is split from the tokens or from the channels: either way it is the dimension after that.
    at = 2 if form.axis(kind) == "channel" else 3
    groups = given[:, :, :stop].unflatten(at, (-1, g))
    found = quantize.quantize_fp8(groups, at + 1) if form.fp8(kind) else quantize.quantize(groups, bits, at + 1)
    return torch.cat([quantize.dequantize(*found).flatten(at, at + 1), given[:, :, stop:]], 2)


def element(side: list[Tensor], row: int, head: int, token: int, channel: int, form: KVForm, kind: Kind) -> float:
    """One number of a packed side in fp64, found bit by bit where the documentation of the form says it is."""
    codes, scales, _ = (t[row, head] for t in side)
    size, g, bits = side[2].shape[3], form.group, form.bits(kind)
    channels, _ = word(bits)
    words = size // channels
    code = 0
    for bit in range(bits):
        at = channel // words * bits + bit
        place = channel % words + at // 8 * words
        byte = codes[token // g, place, token % g] if form.axis(kind) == "channel" else codes[token, place]
        code |= (int(byte) >> at % 8 & 1) << bit
    steps = scales[token // g, :, channel] if form.axis(kind) == "channel" else scales[token, :, channel // g]
    if form.fp8(kind):
        (scale,) = steps.tolist()
        return e4m3(code) * scale
    scale, zero = steps.tolist()
    return code * scale + zero


def dequantised(state: list[Tensor], length: int, form: KVForm, kind: Kind) -> Tensor:
    """What the store holds, in fp64 and without any rounding: ``code * scale + zero`` is exact there."""
    if form.bits(kind) == 16:
        return state[0][:, :, :length].double()
    codes, scales, tail = state
    stop, g = form.packed(length), form.group
    if form.axis(kind) == "channel":
        q = quantize.unpack(codes[:, :, : stop // g].transpose(3, 4), form.bits(kind), 4)
        steps = scales[:, :, : stop // g].double().split(1, 3)
    else:
        q = quantize.unpack(codes[:, :, :stop], form.bits(kind), 3).unflatten(3, (-1, g))
        steps = scales[:, :, :stop].double().unsqueeze(5).unbind(3)
    body = E4M3[q.long()] * steps[0] if form.fp8(kind) else q.double() * steps[0] + steps[1]
    ring = torch.arange(stop, length) % form.slots
    return torch.cat(
        [body.flatten(2, 3) if form.axis(kind) == "channel" else body.flatten(3), tail[:, :, ring].double()], 2
    )
