"""Decoding over listed pages on CPUs: the launcher of ``effcompile::attend_pages``."""

from __future__ import annotations

import struct
from typing import Any

from torch import Tensor

from effcompile.kernels import blocks, ops, page_ops
from effcompile.kernels.form import KVForm
from effcompile.kernels.ops import CapacityError, KernelUnavailable
from effcompile.kernels.program import DECODE_ROWS, Predicate, Program
from effcompile.lowering import cpp
from effcompile.lowering.cpp_arguments import attend_arguments, rotary

# Fields of PageArgs in kernels/cpp/pages.h behind its AttendArgs.
_LISTS = struct.Struct("=2q 2q 2q").pack


def attend_pages(query: Tensor, *args: Any, table: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Launcher of ``effcompile::attend_pages`` on CPUs. Arguments and results are the operator's.

    Raises
    ------
    BlockError
        If the lists are for other heads, do not ascend, or name a page that is not there.
    """
    *state, length, key_mask, listed, counts, page, name, scale = args
    batch, heads, queries, size = query.shape
    k0, _, _, v0, _, v2 = state
    groups, dtype = k0.shape[1], query.dtype
    ratio, value_size = heads // groups, (v0 if v2 is None else v2).shape[3]
    form = KVForm.parse(name)
    if not form.dense and page % form.group:
        raise KernelUnavailable(f"pages of {page} tokens, which do not hold whole groups of {form.group}")
    if queries * ratio > DECODE_ROWS:
        raise KernelUnavailable(f"{queries} queries of {ratio} heads; pages are for decoding")
    entry = cpp.bind(
        ("attend_pages", name, dtype, size, value_size, ratio, key_mask is None, rotary(table)),
        "attend_pages",
        lambda: Program(
            "decode",
            form,
            Predicate(key_mask=key_mask is not None),
            dtype,
            ratio,
            size,
            value_size,
            rotary=rotary(table),
            blocks=True,
        ),
    )
    if ratio * groups != heads or k0.shape[0] != batch:
        raise KernelUnavailable(f"{heads} query heads and batch {batch} do not fit a store of {tuple(k0.shape)}")
    page_ops.check_pages(listed, counts, batch, groups)
    listed, counts = listed.contiguous(), counts.contiguous()
    rows, lists, width = listed.shape
    strides = lists if rows > 1 else 0, 1 if lists > 1 else 0
    packed, out, lse, alive = attend_arguments(query, state, length, key_mask, scale, table)
    code = entry(packed + _LISTS(listed.data_ptr(), counts.data_ptr(), *strides, width, page))
    del alive
    if code == 1:
        raise CapacityError(f"the length, {int(length)}, is not within the capacity of the store.")
    if code == 2:
        raise page_ops.not_there(blocks.count_blocks(int(length), page))
    return out, lse


ops.register_launcher("attend_pages", "cpu", attend_pages)
