"""What crosses from Python to a C++ kernel: the structs of kernels/cpp/args.h, checked before a pointer is taken."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from effcompile.kernels.ops import KernelUnavailable
from effcompile.kernels.rope import rotary_of, table_shape
from effcompile.lowering.cpp_replay import RESULT, addresses

State: TypeAlias = tuple[Tensor | None, ...]

# Fields of AttendArgs, StoreArgs and LoadArgs in kernels/cpp/args.h, in their order; q is 8 bytes, as is every pointer.
ATTEND = struct.Struct("=8q 4q 4q 3q q q d").pack
# ScoreArgs, behind the former if a program has parts.
SCORE = struct.Struct("=q 3q q d q q q q").pack
# LatentArgs, behind ScoreArgs.
LATENT = struct.Struct("=q d q").pack
STORE = struct.Struct("=8q 2q 5q 6q q").pack
LOAD = struct.Struct("=8q 2q 3q q").pack

# The addresses in them, by the arguments of ``attend`` and ``kv_store``.
_ATTEND = {**{i: i + 1 for i in range(7)}, 7: 13, 8: 0, 9: 8, 10: RESULT, 11: RESULT - 1}
_SCORE = {22: 15, 26: 16, 28: 17, 30: 18}
ATTEND_ADDRESSES = {
    8 * 22: addresses(_ATTEND),
    8 * 32: addresses(_ATTEND | _SCORE),
    8 * 35: addresses(_ATTEND | _SCORE | {32: 19, 34: 21}),
}
"""Those of AttendArgs, alone or with what is behind it, by the bytes of what is packed."""
STORE_ADDRESSES = addresses({**{i: i for i in range(7)}, 7: 10, 8: 7, 9: 8})


def pointers_of(state: State, dtype: torch.dtype, key_size: int, value_size: int) -> list[int]:
    """Addresses of the six state tensors, 0 for an absent one."""
    pointers = []
    for tensor in state:
        if tensor is None:
            pointers.append(0)
            continue
        if not tensor.is_contiguous():
            raise KernelUnavailable("a state buffer is not contiguous")
        pointers.append(tensor.data_ptr())
    for first, tail, size in ((state[0], state[2], key_size), (state[3], state[5], value_size)):
        stored = first if tail is None else tail
        if stored is None or stored.dtype is not dtype or stored.shape[3] != size:
            raise KernelUnavailable(f"the store does not hold heads of {size} channels in {dtype}, as the call does")
    return pointers


def length_pointer(length: Tensor) -> int:
    """Address of the length. Raises :class:`KernelUnavailable` if it is not int64."""
    if length.dtype is not torch.int64:
        raise KernelUnavailable(f"length is {length.dtype}, not int64")
    return length.data_ptr()


def rotary(table: Tensor | None) -> int:
    """Channels that a table of angles rotates; 0 without one."""
    return 0 if table is None else rotary_of(table)


def table_pointer(table: Tensor | None, batch: int, capacity: int, dtype: torch.dtype = torch.float16) -> int:
    """Address of the table of angles, 0 without one."""
    if table is None:
        return 0
    shape = table_shape(batch, capacity, rotary_of(table))
    if table.shape != shape or table.dtype is not dtype or not table.is_contiguous():
        raise KernelUnavailable(
            f"a table of angles of {tuple(table.shape)} in {table.dtype}, and not {shape} in {dtype}"
        )
    return table.data_ptr()


def latent_arguments(up: Tensor | None, eps: float | None, value_up: Tensor | None, groups: int, size: int) -> bytes:
    """``LatentArgs``; the caller keeps the tensors alive."""
    pointers = []
    for given, fits in ((up, up is None or up.shape[:2] == (groups, size)), (value_up, True)):
        if given is not None and not (fits and given.dtype is torch.float32 and given.is_contiguous()):
            text = f"an up-projection of {tuple(given.shape)} in {given.dtype} for {groups} heads of {size}"
            raise KernelUnavailable(text)
        pointers.append(0 if given is None else given.data_ptr())
    return LATENT(pointers[0], 0.0 if eps is None else eps, pointers[1])


def capacity_of(keys: Tensor, values: Tensor) -> int:
    """Tokens that both sides have room for: codes per channel have a group of tokens in a fifth dimension."""
    tokens, room = (x.shape[2] * (x.shape[4] if x.ndim == 5 else 1) for x in (keys, values))
    if room != tokens:
        raise KernelUnavailable(f"keys have room for {tokens} tokens, values for {room}")
    return tokens


def mask_of(key_mask: Tensor, batch: int, capacity: int, length: Tensor) -> tuple[Tensor, int]:
    """The mask as the kernel reads it (the caller keeps it alive), and its stride over the batch."""
    rows, columns = key_mask.shape
    if rows not in (1, batch) or (columns < capacity and columns < int(length)):
        raise KernelUnavailable(f"a key mask of {tuple(key_mask.shape)} for batch {batch} and {int(length)} tokens")
    if key_mask.dtype is not torch.bool or key_mask.stride(1) != 1:
        key_mask = key_mask.bool().contiguous()
    return key_mask, key_mask.stride(0) if rows == batch else 0


def score_arguments(
    softcap: float | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    segments: Tensor | None,
    prefix: Tensor | None,
    query: Tensor,
    capacity: int,
    length: Tensor,
) -> tuple[bytes, list[Tensor]]:
    """``ScoreArgs``, and the tensors that it points to, for the caller to keep alive."""
    batch, heads, queries, _ = query.shape
    bias_pointer, strides, sinks_pointer = 0, [0, 0, 0], 0
    alive = []
    if bias is not None:
        sizes = bias.shape
        fits = len(sizes) == 4 and all(n in (1, full) for n, full in zip(sizes, (batch, heads, queries)))
        if not fits or (sizes[3] < capacity and sizes[3] < int(length)):
            raise KernelUnavailable(
                f"a bias of {tuple(sizes)} for {batch} x {heads} x {queries} queries and {int(length)} tokens"
            )
        if bias.dtype is not torch.float32 or bias.stride(3) != 1:
            bias = bias.float().contiguous()
        bias_pointer = bias.data_ptr()
        strides = [0 if n == 1 else stride for n, stride in zip(sizes, bias.stride()[:3])]
        alive.append(bias)
    if sinks is not None:
        if sinks.shape != (heads,):
            raise KernelUnavailable(f"sinks of {tuple(sinks.shape)} for {heads} heads")
        sinks = sinks.float().contiguous()
        sinks_pointer = sinks.data_ptr()
        alive.append(sinks)
    rows = [0, 0, 0, 0]
    for place, ids, rank in ((0, segments, 2), (2, prefix, 1)):
        if ids is not None:
            short = rank == 2 and ids.shape[1] < capacity and ids.shape[1] < int(length)
            if ids.ndim != rank or ids.shape[0] not in (1, batch) or short:
                what = "segments" if rank == 2 else "a prefix"
                raise KernelUnavailable(f"{what} of {tuple(ids.shape)} for batch {batch} and {int(length)} tokens")
            ids = ids.to(torch.int64).contiguous()
            rows[place : place + 2] = ids.data_ptr(), ids.stride(0) if ids.shape[0] > 1 else 0
            alive.append(ids)
    return SCORE(bias_pointer, *strides, sinks_pointer, 0.0 if softcap is None else softcap, *rows), alive


def attend_arguments(
    query: Tensor,
    state: Sequence[Tensor | None],
    length: Tensor,
    key_mask: Tensor | None,
    scale: float,
    table: Tensor | None = None,
    ranks: tuple[int, int] = (0, 0),
    values: tuple[int, int] | None = None,
) -> tuple[bytes, Tensor, Tensor, Any]:
    """``AttendArgs`` as bytes, the results they will be written to, and what the caller keeps alive meanwhile.

    ``ranks`` are the channels of latents of keys and values, and 0 where a side holds none; beside latents of keys the
    table is fp32. ``values`` are the heads and the size of what comes out, where that is not what the store holds.
    """
    k0, _, _, v0, _, v2 = state
    assert k0 is not None
    assert v0 is not None
    batch, heads, queries, size = query.shape
    groups, value_size = values or (v0.shape[1], (v0 if v2 is None else v2).shape[3])
    pointers = pointers_of(tuple(state), query.dtype, ranks[0] or size, ranks[1] or value_size)
    capacity = capacity_of(k0, v0)
    if query.stride(3) != 1:
        query = query.contiguous()
    mask_pointer = mask_stride = 0
    if key_mask is not None:
        key_mask, mask_stride = mask_of(key_mask, batch, capacity, length)
        mask_pointer = key_mask.data_ptr()
    out = query.new_empty((batch, heads, queries, value_size))
    lse = query.new_empty((batch, heads, queries), dtype=torch.float32)
    packed = ATTEND(
        *pointers,
        length_pointer(length),
        table_pointer(table, batch, capacity, torch.float32 if ranks[0] else torch.float16),
        query.data_ptr(),
        mask_pointer,
        out.data_ptr(),
        lse.data_ptr(),
        batch,
        groups,
        queries,
        capacity,
        *query.stride()[:3],
        mask_stride,
        torch.get_num_threads(),
        scale,
    )
    return packed, out, lse, (query, key_mask)
