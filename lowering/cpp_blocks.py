"""Attention over listed blocks on CPUs: the launcher of ``effcompile::attend_blocks``."""

from __future__ import annotations

import struct
from typing import Any

from torch import Tensor

from effcompile.kernels import block_ops, ops
from effcompile.kernels.blocks import BlockError
from effcompile.kernels.form import KVForm
from effcompile.kernels.ops import CapacityError, KernelUnavailable
from effcompile.kernels.program import Predicate, Program
from effcompile.lowering import cpp
from effcompile.lowering.cpp_arguments import attend_arguments

# Fields of BlockArgs in kernels/cpp/blocks.h behind its AttendArgs.
_LISTS = struct.Struct("=4q 2q 3q").pack


def attend_blocks(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Launcher of ``effcompile::attend_blocks`` on CPUs. Arguments and results are the operator's.

    Raises
    ------
    BlockError
        If the lists are of other lengths, or name a block that is not there.
    """
    *state, length, key_mask, kv_num, kv_idx, full_num, full_idx, block, name, scale, causal, window = args
    batch, heads, queries, size = query.shape
    k0, _, _, v0, _, v2 = state
    groups, dtype = k0.shape[1], query.dtype
    ratio, value_size = heads // groups, (v0 if v2 is None else v2).shape[3]
    form, keys = KVForm.parse(name), int(length)
    if not form.dense and block % form.group:
        raise KernelUnavailable(f"blocks of {block} tokens, which do not hold whole groups of {form.group}")
    predicate = Predicate(causal, window if window >= 0 else None, key_mask is not None)
    entry = cpp.bind(
        ("attend_blocks", name, dtype, size, value_size, ratio, causal, window, key_mask is None),
        "attend_blocks",
        lambda: Program("prefill", form, predicate, dtype, ratio, size, value_size, blocks=True),
    )
    block_ops.check_lists(kv_num, kv_idx, full_num, full_idx, queries, keys, block)
    if ratio * groups != heads or k0.shape[0] != batch:
        raise KernelUnavailable(f"{heads} query heads and batch {batch} do not fit a store of {tuple(k0.shape)}")
    *strides, columns = block_ops.layout_of(kv_num, kv_idx, full_num, full_idx, batch, heads)
    held = [None if t is None else t.contiguous() for t in (kv_num, full_num, kv_idx, full_idx)]
    packed, out, lse, alive = attend_arguments(query, state, length, key_mask, scale)
    code = entry(
        packed
        + _LISTS(
            *(0 if t is None else t.data_ptr() for t in held),
            *strides,
            block,
            kv_num.shape[2],
            columns,
        )
    )
    del alive
    if code == 1:
        raise CapacityError(f"the length, {keys}, is not within the capacity of the store.")
    if code == 2:
        raise BlockError(f"a block list names a block that is not there; there are {kv_idx.shape[3]}.")
    return out, lse


ops.register_launcher("attend_blocks", "cpu", attend_blocks)
