"""A linear of few rows on CPUs: one C++ kernel for all shapes, reading the weights at the speed of memory.

Measured on two AVX-512 cores, one row, weights of 1536 x 576 that come from memory: 40 GB/s, where ``torch.mm`` (MKL)
reads 15 GB/s; at decode the weights are nearly all there is to read.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from effcompile.kernels import ops
from effcompile.kernels.ops import LINEAR_ROWS, KernelUnavailable
from effcompile.lowering import cpp_replay
from effcompile.lowering.cpp_operators import Library

LIBRARY = Library("linear", "a linear", ("linear.h",), {"linear": "LinearArgs"}, (torch.float32,))
# Fields of LinearArgs in kernels/cpp/linear.h.
_ARGS = struct.Struct("=4q 4q").pack
_ADDRESSES = cpp_replay.addresses({0: 0, 1: 1, 2: 2, 3: cpp_replay.RESULT})
SINGLE = 1 << 15
"""Weights up to which waking a second thread costs more than it saves."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Launcher of ``effcompile::linear`` on CPUs: ``x`` ``[..., K]`` fp32 of at most 8 rows, ``weight`` ``[N, K]``."""
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
    if not 1 <= rows <= LINEAR_ROWS or x.dtype is not torch.float32 or weight.dtype is not torch.float32:
        raise KernelUnavailable(f"a linear of {rows} rows in {x.dtype} by {weight.dtype}")
    entry = LIBRARY.entry("linear", x.dtype)
    x, weight = x.contiguous(), weight.contiguous()
    out = x.new_empty((*x.shape[:-1], outputs))
    bias = None if bias is None else bias.contiguous()  # held until the kernel has read it
    bias_pointer = 0 if bias is None else bias.data_ptr()
    threads = torch.get_num_threads() if outputs * inputs > SINGLE else 1
    packed = _ARGS(x.data_ptr(), weight.data_ptr(), bias_pointer, out.data_ptr(), rows, outputs, inputs, threads)
    entry(packed)
    cpp_replay.offer("linear", linear, entry, packed, _ADDRESSES)
    return out


ops.register_launcher("linear", "cpu", linear)
