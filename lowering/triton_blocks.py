"""GPU launchers of ``effcompile::attend_blocks`` and ``attend_pages``: attention over lists, which stay on the device.

Raising an error would wait for the device. So rows whose list is wrong are NaN, where a CPU raises ``BlockError``; and
nothing is read outside the tensors, whatever a list says.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from effcompile.kernels import block_ops, ops, page_ops
from effcompile.kernels.columns import check_columns, steps_of
from effcompile.kernels.form import KVForm
from effcompile.kernels.ops import KernelUnavailable
from effcompile.kernels.program import DECODE_ROWS, ScoreParts
from effcompile.kernels.ranges import check_shape
from effcompile.lowering import triton
from effcompile.lowering.triton import Call, attend_program, call_of, row_major
from effcompile.lowering.triton_side import Blocks


def _call(
    query: Tensor, state: list[Tensor | None], length: Tensor, key_mask: Tensor | None, name: str, table: Any = None
) -> Call:
    """As :func:`call_of`, with a key mask that is long enough for every key there may be."""
    call = call_of(query, state, length, key_mask, name, table)
    batch = query.shape[0]
    if key_mask is not None and (key_mask.shape[0] not in (1, batch) or key_mask.shape[1] < call.capacity):
        raise KernelUnavailable(f"a key mask of {tuple(key_mask.shape)} for batch {batch} and {call.capacity} tokens")
    return call


def attend_blocks(
    query: Tensor,
    *args: Any,
    key_positions: Tensor | None = None,
    columns: Tensor | None = None,
    column_counts: Tensor | None = None,
    span: int = 1,
    allowed: Tensor | None = None,
    query_positions: Tensor | None = None,
    ranges: Tensor | None = None,
    before_out: Tensor | None = None,
    before_lse: Tensor | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    **unknown: Any,
) -> tuple[Tensor, Tensor]:
    """Launch ``effcompile::attend_blocks``: ``o`` ``[B, H, T, E]`` in the query's dtype, ``lse`` ``[B, H, T]`` fp32.

    A row is NaN if its list names a block that is not there, or counts more blocks than there are; if its columns do
    not ascend, are not there, or lie in a block that is listed too; if ranges of a row that is computed together with
    it do not ascend without overlap, or name a key that is not there; if a slot of a block that is tested holds a token
    that is not there, unless queries stand elsewhere too and nothing else is looked up by tokens.

    Raises
    ------
    BlockError
        If the lists are of other dtypes or shapes than the call.
    """
    if unknown:
        raise KernelUnavailable(f"no GPU kernel visits block lists with {', '.join(sorted(unknown))}")
    *state, length, key_mask, kv_num, kv_idx, full_num, full_idx, block, name, scale, causal, window = args
    (query, *_), out, lse, ratio, pairs, capacity = call = _call(query, state, length, key_mask, name)
    batch, heads, queries, size = query.shape
    given = {"columns": columns, "positions": key_positions, "given": allowed, "moved": query_positions}
    given |= {"ranges": ranges, "before": before_out}
    built = attend_program(
        "prefill", name, causal, window, (key_mask is not None, False, False), ratio, size, out.shape[3], query.dtype,
        query.device, triton.score_of(softcap, bias, sinks), 0,
        ("blocks", *(part for part, x in given.items() if x is not None)),
    )  # fmt: skip
    assert built.blocks is not None
    form = KVForm.parse(name)
    if not form.dense and block % form.group:
        raise KernelUnavailable(f"blocks of {block} tokens, which do not hold whole groups of {form.group}")
    layout = block_ops.layout_of(kv_num, kv_idx, full_num, full_idx, batch, heads)
    # How many keys there are is known on the device alone; lists that end before them are noticed there.
    block_ops.check_lists(kv_num, kv_idx, full_num, full_idx, queries, layout[2] * block, block)
    lists = [(kv_num if t is None else t).contiguous() for t in (kv_num, kv_idx, full_num, full_idx)]
    cut = built.blocks.within(block)
    sizes = {"FULL": full_num is not None} | block_tiles(cut, block, form)
    parts = triton.part_values(query, capacity, softcap, bias, sinks)
    more: list[Any] = []
    if allowed is not None:
        if allowed.shape[-1] < capacity:
            raise KernelUnavailable(f"a mask of {tuple(allowed.shape)} for a store with room for {capacity} tokens")
        block_ops.check_allowed(allowed, query, capacity)
        allowed = row_major(allowed)
        parts += [allowed, *triton.steps_of(allowed)]
    if query_positions is not None:
        parts += _positions("query", query_positions, batch, heads, queries)
    if ranges is not None:
        check_shape(ranges, query)
        parts += [ranges.contiguous(), *steps_of(ranges, batch, heads), ranges.shape[3]]
    if before_out is not None and before_lse is not None:
        parts += [before_out.contiguous(), before_lse.contiguous()]
    if key_positions is not None:
        more = _positions("key", key_positions, batch, heads // ratio, capacity)
    if columns is not None and column_counts is not None:
        check_columns(columns, column_counts, span, queries, block)
        single = [column_counts.contiguous(), columns.contiguous(), *steps_of(column_counts, batch, heads)]
        single += [columns.shape[3], span]
        wrong = torch.empty(batch * heads * kv_num.shape[2], dtype=torch.int8, device=query.device)
        half = 1 << layout[2].bit_length() >> 1
        checked = (wrong, length, capacity, queries, heads, half, *single, *lists, *layout)
        built.launch("check_", wrong.numel(), *checked, **sizes, num_warps=4)
        more = [wrong, *single]
    built.launch(
        "", pairs * ratio * -(-queries // cut.rows), *call.operands, triton.base_2(scale, softcap), *parts, *more,
        *lists, *layout, **sizes, ROWS=cut.rows, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return out, lse


def _positions(what: str, positions: Tensor, batch: int, heads: int, tokens: int) -> list[Any]:
    """Positions as kernels take them, and their steps from one batch entry and head to the next. Looks at shapes."""
    if positions.ndim != 3 or positions.shape[2] != tokens or positions.dtype not in (torch.int32, torch.int64):
        found = f"{tuple(positions.shape)} in {positions.dtype}"
        raise KernelUnavailable(f"{what} positions of {found} for {tokens} tokens, as many as there is room for")
    return [positions.contiguous(), *steps_of(positions, batch, heads)]


def attend_pages(query: Tensor, *args: Any, table: Tensor | None = None, **unknown: Any) -> tuple[Tensor, Tensor]:
    """Launch ``effcompile::attend_pages``: ``o`` ``[B, H, T, E]`` in the query's dtype, ``lse`` ``[B, H, T]`` fp32.

    The heads of a key/value head are NaN if its list does not ascend, names a page that is not there, or counts more
    pages than it has room for.

    Raises
    ------
    BlockError
        If the lists are of other dtypes or shapes than the call.
    """
    if unknown:
        raise KernelUnavailable(f"no GPU kernel visits pages with {', '.join(sorted(unknown))}")
    *state, length, key_mask, listed, counts, page, name, scale = args
    (query, *_), out, _, ratio, pairs, _ = call = _call(query, state, length, key_mask, name, table)
    batch, heads, queries, size = query.shape
    form = KVForm.parse(name)
    if page % 16 or (not form.dense and page % form.group):
        raise KernelUnavailable(f"pages of {page} tokens, which do not hold whole groups of {form.group}")
    if queries * ratio > DECODE_ROWS:
        raise KernelUnavailable(f"{queries} queries of {ratio} heads; pages are for decoding")
    page_ops.check_pages(listed, counts, batch, heads // ratio)
    built = attend_program(
        "decode", name, True, -1, (key_mask is not None, False, False), ratio, size, out.shape[3], query.dtype,
        query.device, ScoreParts(), triton.rotary(table), ("blocks",),
    )  # fmt: skip
    assert built.blocks is not None
    lists, room = listed.shape[1:]
    found = (listed.contiguous(), counts.contiguous(), lists if listed.shape[0] > 1 else 0, int(lists > 1), room)
    sizes = page_tiles(built.blocks, page, form)
    splits = triton.splits_for(pairs, room * page, triton.multiprocessors(query.device))
    arguments = (*call.operands, triton.base_2(scale))
    return triton.launch_splits(built, call, splits, arguments, found, sizes=sizes)


def block_tiles(cut: Blocks, block: int, form: KVForm) -> dict[str, int]:
    """Tiles that fill a block, for ``cut`` within one, and those of the newest tokens, if a form has any."""
    return {"BLOCK": block, "TILE": cut.tile} | (
        {} if form.dense else {"RING": math.gcd(cut.ring, cut.tile, form.group)}
    )


def page_tiles(cut: Blocks, page: int, form: KVForm) -> dict[str, int]:
    """Tiles that fill a page, and those of its newest tokens: tokens that are packed and others share none of these."""
    tile = math.gcd(cut.tile, page)
    return {"PAGE": page, "TILE": tile, "RING": math.gcd(cut.ring, tile, form.group)}


for _launcher in (attend_blocks, attend_pages):
    ops.register_launcher(_launcher.__name__, "cuda", _launcher)
