"""Attention over listed blocks on CPUs: the launcher of ``effcompile::attend_blocks``."""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from effcompile.kernels import block_ops, ops
from effcompile.kernels.blocks import BlockError, count_blocks
from effcompile.kernels.columns import check_both, check_columns, steps_of
from effcompile.kernels.form import KVForm
from effcompile.kernels.ops import CapacityError, KernelUnavailable
from effcompile.kernels.program import Predicate, Program, ScoreParts
from effcompile.kernels.ranges import check_ranges
from effcompile.lowering import cpp
from effcompile.lowering.cpp_arguments import attend_arguments, capacity_of, score_arguments

# Fields of BlockArgs in kernels/cpp/blocks.h behind its AttendArgs and ScoreArgs.
_LISTS = struct.Struct("=4q 2q 4q q 3q q 3q q 2q 2q").pack
# ColumnArgs and PositionArgs in kernels/cpp/columns.h, behind that.
_COLUMNS = struct.Struct("=2q 2q 2q").pack
_POSITIONS = struct.Struct("=q 2q").pack


def attend_blocks(
    query: Tensor,
    *args: Any,
    key_positions: Tensor | None = None,
    columns: Tensor | None = None,
    column_counts: Tensor | None = None,
    span: int = 1,
    allowed: Tensor | None = None,
    before_out: Tensor | None = None,
    before_lse: Tensor | None = None,
    ranges: Tensor | None = None,
    query_positions: Tensor | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launcher of ``effcompile::attend_blocks`` on CPUs. Arguments and results are the operator's.

    Raises
    ------
    BlockError
        If lists or another operand are of other lengths, or name a block or a key that is not there, or one twice.
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
    gathers, moved, given = columns is not None, key_positions is not None, allowed is not None
    parts = (softcap is not None, bias is not None, sinks is not None)
    sizes = (dtype, ratio, size, value_size, ScoreParts(*parts))
    entry = cpp.bind(
        ("attend_blocks", name, *sizes, causal, window, key_mask is None, gathers, moved, given),
        "attend_blocks",
        lambda: Program("prefill", form, predicate, *sizes, blocks=True, columns=gathers, positions=moved, given=given),
    )
    block_ops.check_lists(kv_num, kv_idx, full_num, full_idx, queries, keys, block)
    if ratio * groups != heads or k0.shape[0] != batch:
        raise KernelUnavailable(f"{heads} query heads and batch {batch} do not fit a store of {tuple(k0.shape)}")
    *strides, width = block_ops.layout_of(kv_num, kv_idx, full_num, full_idx, batch, heads)
    pairs: tuple[int, ...] = (0, 0, 0, 0)
    if allowed is not None:
        block_ops.check_allowed(allowed, query, keys)
        allowed = allowed if allowed.stride(3) == 1 else allowed.contiguous()
        pairs = (allowed.data_ptr(), *(0 if n == 1 else by for n, by in zip(allowed.shape[:3], allowed.stride())))
    runs: tuple[int, ...] = (0, 0, 0, 0)
    if ranges is not None:
        check_ranges(ranges, query, keys)
        # Without any there would be no address, which stands for no operand.
        ranges = (ranges if ranges.shape[3] else ranges.new_zeros(*ranges.shape[:3], 1, 2)).contiguous()
        runs = (ranges.data_ptr(), *steps_of(ranges, batch, heads), ranges.shape[3])
    check_both(key_positions, query_positions, query.shape, groups, keys, key_mask is not None or bias is not None)
    stands: tuple[int, ...] = (0, 0, 0)
    if query_positions is not None:
        query_positions = query_positions.to(torch.int32).contiguous()
        stands = (query_positions.data_ptr(), *steps_of(query_positions, batch, heads))
    before = [None if t is None else t.float().contiguous() for t in (before_out, before_lse)]
    held = [None if t is None else t.contiguous() for t in (kv_num, full_num, kv_idx, full_idx)]
    more = b""
    if columns is not None and column_counts is not None:
        check_columns(columns, column_counts, span, queries, block)
        columns, column_counts = columns.contiguous(), column_counts.contiguous()
        step = steps_of(column_counts, batch, heads)
        more = _COLUMNS(columns.data_ptr(), column_counts.data_ptr(), *step, columns.shape[3], span)
    if key_positions is not None:
        key_positions = key_positions.to(torch.int32).contiguous()
        more = _POSITIONS(key_positions.data_ptr(), *steps_of(key_positions, batch, groups))
    score, kept = score_arguments(softcap, bias, sinks, None, None, query, capacity_of(k0, v0), length)
    packed, out, lse, alive = attend_arguments(query, state, length, key_mask, scale)
    code = entry(
        packed
        + score
        + _LISTS(
            *(0 if t is None else t.data_ptr() for t in held),
            *strides,
            block,
            kv_num.shape[2],
            width,
            max(width, count_blocks(keys, block)),
            *pairs,
            *runs,
            *stands,
            *(0 if t is None else t.data_ptr() for t in before),
        )
        + more
    )
    del alive, held, before, kept
    if code == 1:
        raise CapacityError(f"the length, {keys}, is not within the capacity of the store.")
    if code == 2:
        single = f", or the columns do not ascend within {keys} keys, or one lies in a block that is visited"
        text = f"a block list names a block that is not there; there are {max(width, count_blocks(keys, block))}"
        raise BlockError(f"{text}{'' if columns is None else single}.")
    return out, lse


ops.register_launcher("attend_blocks", "cpu", attend_blocks)
