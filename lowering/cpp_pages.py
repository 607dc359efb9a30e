"""Decoding over pages on CPUs: the launchers of ``select_pages``, ``attend_pages`` and ``attend_mass``."""

from __future__ import annotations

import functools
import struct
from typing import Any

import torch
from torch import Tensor

from effcompile.kernels import blocks, ops, page_ops
from effcompile.kernels.form import KVForm
from effcompile.kernels.ops import CapacityError, KernelUnavailable
from effcompile.kernels.program import BY_MASS, DECODE_ROWS, Predicate, Program
from effcompile.lowering import cpp
from effcompile.lowering.cpp import Entry
from effcompile.lowering.cpp_arguments import (
    ATTEND,
    attend_arguments,
    capacity_of,
    length_pointer,
    mask_of,
    rotary,
)

# Fields of PageArgs in kernels/cpp/pages.h, and of SelectArgs in kernels/cpp/select.h, behind their AttendArgs.
_LISTS = struct.Struct("=2q 2q 2q q").pack
_SELECT = struct.Struct("=4q 5q d").pack


def _whole_groups(form: KVForm, page: int) -> None:
    if not form.dense and page % form.group:
        raise KernelUnavailable(f"pages of {page} tokens, which do not hold whole groups of {form.group}")


def _entry(op: str, query: Tensor, state: list[Any], key_mask: Any, page: int, name: str, table: Any) -> Entry:
    """The entry point ``op`` of the program over pages for this call."""
    batch, heads, queries, size = query.shape
    k0, _, _, v0, _, v2 = state
    groups, dtype = k0.shape[1], query.dtype
    ratio, value_size = heads // groups, (v0 if v2 is None else v2).shape[3]
    if queries * ratio > DECODE_ROWS:
        raise KernelUnavailable(f"{queries} queries of {ratio} heads; pages are for decoding")
    if ratio * groups != heads or k0.shape[0] != batch:
        raise KernelUnavailable(f"{heads} query heads and batch {batch} do not fit a store of {tuple(k0.shape)}")

    def make() -> Program:
        form, rule, turned = KVForm.parse(name), Predicate(key_mask=key_mask is not None), rotary(table)
        _whole_groups(form, page)
        return Program("decode", form, rule, dtype, ratio, size, value_size, rotary=turned, blocks=True)

    return cpp.bind((op, page, name, dtype, size, value_size, ratio, key_mask is None, rotary(table)), op, make)


def attend_pages(query: Tensor, *args: Any, table: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Launcher of ``effcompile::attend_pages`` on CPUs. Arguments and results are the operator's.

    Raises
    ------
    BlockError
        If the lists are for other heads, do not ascend, or name a page that is not there.
    """
    *state, length, key_mask, listed, counts, page, name, scale = args
    entry = _entry("attend_pages", query, state, key_mask, page, name, table)
    page_ops.check_pages(listed, counts, query.shape[0], state[0].shape[1])
    listed, counts = listed.contiguous(), counts.contiguous()
    rows, lists, width = listed.shape
    strides = lists if rows > 1 else 0, 1 if lists > 1 else 0
    packed, out, lse, alive = attend_arguments(query, state, length, key_mask, scale, table)
    code = entry(packed + _LISTS(listed.data_ptr(), counts.data_ptr(), *strides, width, page, 0))
    del alive
    if code == 1:
        raise CapacityError(f"the length, {int(length)}, is not within the capacity of the store.")
    if code == 2:
        raise page_ops.not_there(blocks.count_blocks(int(length), page))
    return out, lse


def attend_mass(query: Tensor, *args: Any, table: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Launcher of ``effcompile::attend_mass`` on CPUs. Arguments and results are the operator's."""
    *state, length, key_mask, page, name, scale = args
    if query.shape[2] != 1:
        raise KernelUnavailable(f"{query.shape[2]} queries; pages are chosen for one")
    entry = _entry("attend_mass", query, state, key_mask, page, name, table)
    packed, out, lse, alive = attend_arguments(query, state, length, key_mask, scale, table)
    total = blocks.count_blocks(capacity_of(state[0], state[3]), page)
    mass = query.new_empty((query.shape[0], 1, total), dtype=torch.float32)
    if entry(packed + _LISTS(0, 0, 0, 0, 0, page, mass.data_ptr())):
        raise CapacityError(f"the length, {int(length)}, is not within the capacity of the store.")
    del alive
    return out, lse, mass


@functools.cache
def _numbers(method: str) -> tuple[bool, int, int, tuple[int, int], bool, float]:
    """Of a method: whether heads share a list, tokens in a page, pages, how many always are taken, whether by moments.

    And the deviations above the mean if so, else the radius of boxes.
    """
    policy, options = page_ops.policy_of(method)
    count, always, moments = policy.count(**options), policy.always(**options), options.get("rank_by") == "moments"
    reach = options["deviations"] if moments else options.get("radius", 1.0)
    return policy.shared, options["page_size"], count, always, moments, reach


def select_pages(
    query: Tensor,
    k0: Tensor,
    k1: Tensor | None,
    k2: Tensor | None,
    length: Tensor,
    key_mask: Tensor | None,
    method: str,
    name: str,
    scale: float,
    *,
    mass: Tensor | None = None,
    bounds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launcher of ``effcompile::select_pages`` on CPUs. Arguments and results are the operator's."""
    shared, page, count, always, moments, reach = _numbers(method)
    (batch, heads, _, size), groups, dtype = query.shape, k0.shape[1], query.dtype
    capacity, ratio = k0.shape[2] * (k0.shape[4] if k0.ndim == 5 else 1), heads // groups
    unit = None if bounds is None else capacity // bounds.shape[2]

    def make() -> Program:
        if shared:
            return BY_MASS
        form = KVForm.parse(name)
        if unit is None and not form.bounds_keys:
            raise KernelUnavailable(f"a cache of {name}, which does not bound its keys")
        program = Program.for_select(form, dtype, ratio, size, unit)
        _whole_groups(program.form, page)
        return program

    entry = cpp.bind(("select_pages", shared, page, name, dtype, ratio, size, unit), "select_pages", make)
    total = blocks.count_blocks(capacity, page)
    if query.stride(3) != 1:
        query = query.contiguous()
    mask_pointer = mask_stride = 0
    if key_mask is not None:
        key_mask, mask_stride = mask_of(key_mask, batch, capacity, length)
        mask_pointer = key_mask.data_ptr()
    for given, shape, kind in (
        (mass, (batch, 1, total), torch.float32),
        (bounds, (batch, groups, capacity // (unit or 1), 2, size), dtype),
    ):
        if given is not None and (given.shape != shape or given.dtype is not kind or not given.is_contiguous()):
            raise KernelUnavailable(f"mass or bounds of {tuple(given.shape)} in {given.dtype}, and not {shape}")
    width, lists = min(count, total), 1 if shared else groups
    listed = query.new_empty((batch, lists, width), dtype=torch.int32)
    counts = query.new_empty((batch, lists), dtype=torch.int32)
    # What is ranked by follows from the method, and not from what else was given.
    found = (mass, None) if shared else (None, bounds)
    pointers = [0 if t is None else t.data_ptr() for t in (k0, k1, k2, *found)]
    packed = ATTEND(
        *pointers[:3],
        *(0, 0, 0),
        length_pointer(length),
        0,
        query.data_ptr(),
        mask_pointer,
        *(0, 0),
        batch,
        groups,
        1,
        capacity,
        *query.stride()[:3],
        mask_stride,
        torch.get_num_threads(),
        scale,
    )
    results = listed.data_ptr(), counts.data_ptr()
    if entry(packed + _SELECT(*pointers[3:], *results, width, page, *always, moments, reach)):
        raise CapacityError(f"the length, {int(length)}, is not within the capacity of the store.")
    return listed, counts


for _op, _launcher in (("attend_pages", attend_pages), ("attend_mass", attend_mass), ("select_pages", select_pages)):
    ops.register_launcher(_op, "cpu", _launcher)
