"""Weights in few bits: the ``effcompile::`` operator of a linear that reads them, its reference body, and packing.

``N`` outputs, ``K`` inputs, ``g`` inputs of a group, ``J = ceil(N / 16)`` blocks of 16 outputs, ``G = ceil(K / g)``
groups of a row.

``quantized_linear(x, packed, scales, zeros, bias, outputs, bits, group)``
    ``x`` ``[..., K]``; the result is ``[..., N]`` in the dtype of ``x``. A weight is ``code * scale + zero`` in fp32,
    and ``(code - 2 ** (bits - 1)) * scale`` where ``zeros`` is None. ``scales`` and ``zeros`` fp16 ``[J, G, 16]``, one
    for each group of each output; ``bias`` ``[N]`` in the dtype of ``x``; ``outputs`` is ``N``.

``packed`` uint8 ``[J, G, g * bits / 8, 16]``: the codes of a group of inputs in words (:mod:`effcompile.kernels.form`),
16 outputs side by side. So a vector of codes is one input's for neighbouring outputs: it is multiplied by one number,
sums of outputs need no adding of lanes, and a block of outputs is read from one end to the other. Outputs and inputs
that are missing in the last block and the last group count for nothing, whatever stands there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effcompile.kernels import ops, quantize
from effcompile.kernels.form import word

BITS = (8, 4, 3, 2)
"""Bits of a code on offer."""

LANES = 16
"""Outputs whose codes lie side by side."""

ROWS = 16
"""Rows of ``x`` up to which codes are unpacked in registers; for more a weight is written out, and ATen multiplies."""

ops.library.define(
    "quantized_linear(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? bias, int outputs, int bits, "
    "int group) -> Tensor"
)


class Packed(NamedTuple):
    """A weight in few bits, as the operator takes it."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes that are read of it."""
        return sum(t.nbytes for t in self if t is not None)


def grouped(weight: Tensor, group: int) -> Tensor:
    """The groups of each row of ``weight`` ``[N, K]``, in fp32: ``[N, G, g]``.

    The last one is filled up with the last input's weights, which change neither the least nor the largest of it.
    """
    short = -weight.shape[1] % group
    wide = weight.float().contiguous()
    if short:
        wide = torch.cat([wide, wide[:, -1:].expand(-1, short)], 1)
    return wide.view(wide.shape[0], -1, group)


def round_to_nearest(weight: Tensor, bits: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes ``[N, G, g]`` uint8, scales and zeros fp16 ``[N, G, 1]`` of ``weight`` ``[N, K]``; no zeros if symmetric.

    Asymmetric: the least and the largest weight of a group are the first and the last code. Symmetric: the scale is
    the largest magnitude over ``(2**bits - 1) / 2``, as in GPTQ. Either way codes are found from the stored fp16
    numbers. A weight is at most half a step off, up to the rounding of those.
    """
    wide = grouped(weight, group)
    if not symmetric:
        return quantize.quantize(wide, bits, 2)
    levels = 2**bits - 1
    scales = (wide.abs().amax(2, keepdim=True) * (2 / levels)).half()
    step = scales.float()
    codes = (wide / step.where(step > 0, 1)).round() + 2 ** (bits - 1)
    return codes.clamp(0, levels).to(torch.uint8), scales, None


def pack(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Packed:
    """The layout of the operator, from codes ``[N, G, g]`` and scales and zeros ``[N, G, 1]``."""
    short = -codes.shape[0] % LANES

    def blocks(t: Tensor) -> Tensor:
        t = torch.cat([t, t.new_zeros(short, *t.shape[1:])]) if short else t
        return t.reshape(-1, LANES, *t.shape[1:]).permute(0, 2, 3, 1)

    packed = quantize.pack(blocks(codes), bits, dim=2).contiguous()
    steps = blocks(scales.half()).squeeze(2).contiguous()
    return Packed(packed, steps, None if zeros is None else blocks(zeros.half()).squeeze(2).contiguous())


def dequantize(packed: Packed, outputs: int, inputs: int, bits: int) -> Tensor:
    """The weight that the operator multiplies by, in fp32: ``[N, K]``."""
    step = packed.scales.float().unsqueeze(2)
    zero = -(2 ** (bits - 1)) * step if packed.zeros is None else packed.zeros.float().unsqueeze(2)
    wide = quantize.unpack(packed.codes, bits, dim=2).float() * step + zero
    return wide.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)[:outputs, :inputs]


def check(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    outputs: int,
    bits: int,
    group: int,
) -> None:
    """Raise ``ValueError`` if arguments of ``quantized_linear`` do not fit each other."""
    if bits not in BITS:
        raise ValueError(f"bits is {bits}; there are {', '.join(map(str, BITS))}.")
    channels, _ = word(bits)
    if group < 1 or group % channels:
        raise ValueError(f"group is {group}; with {bits} bits it has to be a multiple of {channels}.")
    blocks, groups = -(-outputs // LANES), -(-x.shape[-1] // group)
    side = (blocks, groups, LANES)
    for name, tensor, shape, dtype in (
        ("packed", packed, (blocks, groups, group * bits // 8, LANES), torch.uint8),
        ("scales", scales, side, torch.float16),
        ("zeros", zeros, side, torch.float16),
        ("bias", bias, (outputs,), x.dtype),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.dtype is not dtype):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, and should be {dtype} {shape}.")


def reference(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    outputs: int,
    bits: int,
    group: int,
) -> Tensor:
    """The meaning of ``quantized_linear``: the weight in the dtype of ``x``, and a linear."""
    check(x, packed, scales, zeros, bias, outputs, bits, group)
    weight = dequantize(Packed(packed, scales, zeros), outputs, x.shape[-1], bits)
    return F.linear(x, weight.to(x.dtype), bias)


def _body(x: Tensor, *args: Tensor) -> Tensor:
    try:
        result: Tensor = ops.launch("quantized_linear", x.device.type, x, *args)
        return result
    except ops.KernelUnavailable:
        return reference(x, *args)  # type: ignore[arg-type]


def _fake(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, *sizes: int) -> Tensor:
    check(x, packed, scales, zeros, bias, *sizes)
    return x.new_empty((*x.shape[:-1], sizes[0]))


ops.library.impl("quantized_linear", _body, "CompositeExplicitAutograd")
torch.library.register_fake("effcompile::quantized_linear", _fake, lib=ops.library)
QUANTIZED_LINEAR = torch.ops.effcompile.quantized_linear.default
