"""A linear with weights in few bits on CPUs: launcher of ``effcompile::quantized_linear``.

Few rows are limited by what is read: codes are unpacked in registers. For many the weight is written out once, in the
dtype of ``x``, and ATen multiplies. All shapes share a library; the dtype chooses it.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from effcompile.kernels import ops, weight_ops
from effcompile.kernels.ops import KernelUnavailable
from effcompile.lowering import cpp_replay
from effcompile.lowering.cpp_operators import Library

LIBRARY = Library(
    "weights", "a linear", ("quantized.h",), {"quantized_linear": "QuantizedArgs", "dequantize": "QuantizedArgs"}
)
# Fields of QuantizedArgs in kernels/cpp/quantized.h.
_ARGS = struct.Struct("=6q 6q").pack
_ADDRESSES = cpp_replay.addresses({0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: cpp_replay.RESULT})
SINGLE = 1 << 16
"""Weights up to which waking a second thread costs more than it saves."""


def quantized_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    outputs: int,
    bits: int,
    group: int,
) -> Tensor:
    """Launcher of ``effcompile::quantized_linear`` on CPUs. Arguments and result are the operator's."""
    weight_ops.check(x, packed, scales, zeros, bias, outputs, bits, group)
    few = x.numel() <= weight_ops.ROWS * x.shape[-1]
    entry = LIBRARY.entry("quantized_linear" if few else "dequantize", x.dtype)
    for t in (packed, scales, zeros):
        if t is not None and not t.is_contiguous():
            raise KernelUnavailable(f"a packed weight with strides {t.stride()}")
    inputs = x.shape[-1]
    if not x.numel() or not outputs:
        return weight_ops.reference(x, packed, scales, zeros, bias, outputs, bits, group)
    rows = x.numel() // inputs
    weights = packed.data_ptr(), scales.data_ptr(), 0 if zeros is None else zeros.data_ptr()
    threads = torch.get_num_threads() if outputs * inputs > SINGLE else 1
    sizes = rows, outputs, inputs, group, bits, threads
    if few:
        x, out = x.contiguous(), x.new_empty((*x.shape[:-1], outputs))
        bias = None if bias is None else bias.contiguous()
        ends = 0 if bias is None else bias.data_ptr(), out.data_ptr()
        arguments = _ARGS(x.data_ptr(), *weights, *ends, *sizes)
        entry(arguments)
        cpp_replay.offer("quantized_linear", quantized_linear, entry, arguments, _ADDRESSES)
        return out
    weight = x.new_empty(inputs, scales.shape[0] * weight_ops.LANES)
    entry(_ARGS(0, *weights, 0, weight.data_ptr(), *sizes))
    return torch.nn.functional.linear(x, weight[:, :outputs].t(), bias)


ops.register_launcher("quantized_linear", "cpu", quantized_linear)
