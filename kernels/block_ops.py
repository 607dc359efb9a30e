"""``effcompile::select_blocks`` and ``effcompile::attend_blocks``: choosing blocks of keys, and attending to them.

As in :mod:`effcompile.kernels.ops`, an operator means its reference body. ``select_blocks`` runs the *policy* that its
``method`` names, a function of tensors which a pass has registered; ``attend_blocks`` is ``attend`` over the listed
blocks only (:mod:`effcompile.kernels.blocks`). ``mask_blocks`` lists the blocks of a mask that somebody gave; with the
mask as ``allowed``, bool ``[B or 1, H or 1, T, >= S]``, ``attend_blocks`` then tests the pairs of partial blocks by it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from effcompile.kernels import attention, blocks, ops, quantize
from effcompile.kernels.blocks import BlockError, BlockLists
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import Predicate

ops.library.define(
    "select_blocks(Tensor query, Tensor key, Tensor? key_mask, str method, float scale) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)
ops.library.define(
    f"attend_blocks(Tensor query, {ops.READ}, Tensor length, Tensor? key_mask, Tensor kv_num_blocks, "
    "Tensor kv_indices, Tensor? full_kv_num_blocks, Tensor? full_kv_indices, int block, str form, float scale, "
    "bool causal, int window, *, Tensor? allowed=None) -> (Tensor, Tensor)"
)
ops.library.define("mask_blocks(Tensor mask, int block) -> (Tensor, Tensor, Tensor, Tensor)")

Policy = Callable[..., Tensor]
_policies: dict[str, Policy] = {}


def register_policy(name: str, policy: Policy) -> None:
    """Let ``policy(query, key, *, scale, key_mask, **options)`` choose blocks for the method ``name``.

    It gets ``query`` ``[B, H, T, D]``, ``key`` ``[B, G, S, D]`` and ``key_mask`` bool ``[B, S]`` or None, and gives
    the blocks to visit, bool, broadcastable to ``[B, H, nQ, nK]``.
    """
    _policies[name] = policy


def method_text(name: str, options: dict[str, Any]) -> str:
    """The ``method`` argument of ``select_blocks``: it travels in graphs, and so reaches every cache key."""
    return json.dumps({name: options}, sort_keys=True, separators=(",", ":"))


def policy_of(method: str) -> tuple[Policy, dict[str, Any]]:
    """The policy that a ``method`` argument names, and its options."""
    ((name, options),) = json.loads(method).items()
    if name not in _policies:
        raise BlockError(f"no method {name!r} selects blocks; import effcompile.passes first.")
    return _policies[name], options


def _select_blocks(
    query: Tensor, key: Tensor, key_mask: Tensor | None, method: str, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    policy, options = policy_of(method)
    block, (queries, keys) = options["block_size"], (query.shape[2], key.shape[2])
    keep = policy(query, key, scale=scale, key_mask=key_mask, **options)
    keep = keep.reshape((1,) * (4 - keep.dim()) + keep.shape)
    # Padding is data: where there is some, every block is tested.
    full = blocks.whole(queries, keys, block, device=key.device) if key_mask is None else torch.zeros_like(keep)
    made = blocks.lists(keep, full, block)
    assert made.full_kv_num_blocks is not None
    assert made.full_kv_indices is not None
    listed = made.kv_num_blocks, made.kv_indices, made.full_kv_num_blocks, made.full_kv_indices
    # A policy may answer for all heads or rows of a batch at once; the operator's results have one shape.
    num, idx, full_num, full_idx = (x.expand(*query.shape[:2], *x.shape[2:]).contiguous() for x in listed)
    return num, idx, full_num, full_idx


def _fake_select_blocks(
    query: Tensor, key: Tensor, key_mask: Tensor | None, method: str, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    block = policy_of(method)[1]["block_size"]
    return _fake_lists(query, query.shape[:2], query.shape[2], key.shape[2], block)


def _fake_lists(
    like: Tensor, given: Sequence[int], queries: int, keys: int, block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = blocks.count_blocks(queries, block), blocks.count_blocks(keys, block)
    counts, indices = (like.new_empty(*given, *size, dtype=torch.int32) for size in ((rows,), (rows, columns)))
    return counts, indices, torch.empty_like(counts), torch.empty_like(indices)


def _mask_blocks(mask: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    some, every = blocks.of_mask(mask, block)
    return *blocks.compact(some & ~every), *blocks.compact(every)


def _attend_blocks(query: Tensor, *args: Any, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    *state, length, key_mask, kv_num, kv_idx, full_num, full_idx, block, name, scale, causal, window = args
    try:
        result: tuple[Tensor, Tensor] = ops.launch("attend_blocks", query.device.type, query, *args, allowed=allowed)
        return result
    except ops.KernelUnavailable:
        form, n, queries = KVForm.parse(name), int(length), query.shape[2]
        predicate = Predicate(causal, window if window >= 0 else None, key_mask is not None)
        tested = attention.allowed(predicate, queries, n, key_mask, query.device)
        check_lists(kv_num, kv_idx, full_num, full_idx, queries, n, block)
        if allowed is not None:
            check_allowed(allowed, query, n)
            tested = tested & allowed[..., :n]
        keep = blocks.tokens(blocks.visited(kv_num, kv_idx), queries, n, block) & tested
        if full_num is not None:
            keep = keep | blocks.tokens(blocks.visited(full_num, full_idx), queries, n, block)
        keys, values = ops.split_state(tuple(state))
        key, value = quantize.load_side(keys, n, form, "key"), quantize.load_side(values, n, form, "value")
        out, lse = attention.attend(query, key, value, keep, scale)
        return out.contiguous(), lse.contiguous()


def check_lists(
    kv_num: Tensor,
    kv_idx: Tensor,
    full_num: Tensor | None,
    full_idx: Tensor | None,
    queries: int,
    keys: int,
    block: int,
) -> None:
    """Raise :class:`BlockError` if the lists are of other lengths than the call. Looks at shapes only."""
    rows, columns = blocks.count_blocks(queries, block), blocks.count_blocks(keys, block)
    for what, counts, indices in (("kv", kv_num, kv_idx), ("full_kv", full_num, full_idx)):
        if counts is None or indices is None:
            continue
        if counts.shape[2] != rows or indices.shape[:3] != counts.shape or indices.shape[3] < columns:
            raise BlockError(
                f"{what}_num_blocks {tuple(counts.shape)} and {what}_indices {tuple(indices.shape)} do not list "
                f"{rows} rows of up to {columns} blocks, as {queries} queries and {keys} keys, {block} a block, need."
            )


def check_allowed(allowed: Tensor, query: Tensor, keys: int) -> None:
    """Raise :class:`BlockError` unless ``allowed`` says of every pair of a call whether it may be. Looks at shapes."""
    sizes, dims = tuple(allowed.shape), ((1, query.shape[0]), (1, query.shape[1]), (query.shape[2],))
    fits = len(sizes) == 4 and all(n in some for n, some in zip(sizes, dims)) and sizes[3] >= keys
    if not fits or allowed.dtype is not torch.bool:
        raise BlockError(
            f"allowed is {allowed.dtype} of {sizes}; expected bool of [B or 1, H or 1, T, S] with {keys} keys and "
            f"queries of {tuple(query.shape[:3])}."
        )


def _fake_attend_blocks(query: Tensor, *args: Any, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    *state, _length, _mask, _kn, _ki, _fn, _fi, _block, name, _scale, _causal, _window = args
    value = state[3] if KVForm.parse(name).value_bits == 16 else state[5]
    batch, heads, rows = query.shape[:3]
    return (
        query.new_empty(batch, heads, rows, value.shape[3]),
        query.new_empty(batch, heads, rows, dtype=torch.float32),
    )


def of(lists: BlockLists) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]:
    """Lists as the arguments of ``attend_blocks``."""
    return (
        lists.kv_num_blocks,
        lists.kv_indices,
        lists.full_kv_num_blocks,
        lists.full_kv_indices,
        lists.block,
    )


for _name, _body, _fake in (
    ("select_blocks", _select_blocks, _fake_select_blocks),
    ("attend_blocks", _attend_blocks, _fake_attend_blocks),
    ("mask_blocks", _mask_blocks, lambda x, block: _fake_lists(x, x.shape[:2], x.shape[2], x.shape[3], block)),
):
    ops.library.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"effcompile::{_name}", _fake, lib=ops.library)
