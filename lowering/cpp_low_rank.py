"""A linear of low rank on CPUs: both products of a few rows in one call, reading the factors at the speed of memory.

More rows are limited by products, which ATen does. All shapes share a library; the dtype chooses it.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from effcompile.kernels import low_rank_ops, ops
from effcompile.kernels.low_rank_ops import LOW_RANK_ROWS
from effcompile.lowering import cpp_replay
from effcompile.lowering.cpp_operators import Library, pointer

LIBRARY = Library("low_rank", "a linear of low rank", ("low_rank.h",), {"low_rank_linear": "LowRankArgs"})
# Fields of LowRankArgs in kernels/cpp/low_rank.h.
_ARGS = struct.Struct("=8q 6q").pack
_ADDRESSES = cpp_replay.addresses({0: 0, 1: 1, 2: 2, 3: 3, 4: cpp_replay.RESULT, 5: 4, 6: 5, 7: 6})
SINGLE = 1 << 15
"""Numbers in both factors up to which waking a second thread costs more than it saves."""


def low_rank_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    values: Tensor | None = None,
    columns: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """Launcher of ``effcompile::low_rank_linear`` on CPUs. Arguments and result are the operator's."""
    (rank, inputs), outputs = down.shape, up.shape[0]
    rows, dtype = x.numel() // max(inputs, 1), x.dtype
    if not 1 <= rows <= LOW_RANK_ROWS:
        return low_rank_ops.low_rank_reference(x, down, up, bias, values, columns, starts)
    low_rank_ops.check_low_rank(x, down, up, bias, values, columns, starts)
    entry = LIBRARY.entry("low_rank_linear", dtype)
    x = x.contiguous()
    out = x.new_empty((*x.shape[:-1], outputs))
    residual, numbers, narrow = (0, 0, 0), rank * (outputs + inputs), False
    if values is not None and columns is not None and starts is not None and values.numel():
        lists = pointer(columns, columns.dtype), pointer(starts, torch.int32)
        residual, narrow = (pointer(values, dtype), *lists), columns.dtype is torch.int16
        numbers += values.numel()
    threads = torch.get_num_threads() if numbers > SINGLE else 1
    pointers = pointer(down, dtype), pointer(up, dtype), pointer(bias, dtype)
    packed = _ARGS(x.data_ptr(), *pointers, out.data_ptr(), *residual, rows, inputs, rank, outputs, threads, narrow)
    entry(packed)
    cpp_replay.offer("low_rank_linear", low_rank_linear, entry, packed, _ADDRESSES)
    return out


ops.register_launcher("low_rank_linear", "cpu", low_rank_linear)
