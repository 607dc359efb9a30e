"""``effcompile::select_blocks`` and ``effcompile::attend_blocks``: choosing blocks of keys, and attending to them.

As in :mod:`effcompile.kernels.ops`, an operator means its reference body. ``select_blocks`` runs the *policy* that its
``method`` names, a function of tensors which a pass has registered; ``select_stored_blocks`` the same for the keys that
a store holds, dequantised; ``attend_blocks`` is ``attend`` over the listed blocks only
(:mod:`effcompile.kernels.blocks`). ``mask_blocks`` lists the blocks of a mask that somebody gave; with the mask as
``allowed``, bool ``[B or 1, H or 1, T, >= S]``, ``attend_blocks`` then tests the pairs of partial blocks by it.
So it does by ``ranges``, int32 ``[B or 1, H or 1, T, R, 2]``: the keys of each query
(:mod:`effcompile.kernels.ranges`).

The parts of a score, ``softcap``, ``bias`` and ``sinks``, are those of ``attend``. A bias has a number for each token:
it is looked up by key positions. A number for each key times one for each head is a bias ``[B or 1, H, 1, S]``.

With the state of attention to other keys, ``before_out`` ``[B, H, T, E]`` and ``before_lse`` fp32 ``[B, H, T]``, the
result is that of both together, as :func:`effcompile.kernels.attention.merge_state` gives it. ``attend`` has no such
argument: merging its result costs next to nothing beside it. Sinks belong to one of the two.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from effcompile.kernels import attention, blocks, observe, ops, quantize
from effcompile.kernels.blocks import BlockError, BlockLists
from effcompile.kernels.columns import bias_at, blocks_at, check_both, check_columns, listed, visible_at
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import Predicate
from effcompile.kernels.ranges import check_ranges, tokens

ops.library.define(
    "select_blocks(Tensor query, Tensor key, Tensor? key_mask, str method, float scale, *, "
    "Tensor? key_positions=None) -> (Tensor, Tensor, Tensor, Tensor)"
)
ops.library.define(
    f"select_stored_blocks(Tensor query, {ops.READ}, Tensor length, Tensor? key_mask, str form, str method, "
    "float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    # It asks the host for the length, once for each layer of a chunk, which no recorded graph can.
    tags=(torch.Tag.cudagraph_unsafe,),
)
ops.library.define(
    f"attend_blocks(Tensor query, {ops.READ}, Tensor length, Tensor? key_mask, Tensor kv_num_blocks, "
    "Tensor kv_indices, Tensor? full_kv_num_blocks, Tensor? full_kv_indices, int block, str form, float scale, "
    "bool causal, int window, *, Tensor? key_positions=None, Tensor? columns=None, Tensor? column_counts=None, "
    "int span=1, Tensor? allowed=None, Tensor? before_out=None, Tensor? before_lse=None, "
    "Tensor? ranges=None, Tensor? query_positions=None, "
    "float? softcap=None, Tensor? bias=None, Tensor? sinks=None) -> (Tensor, Tensor)"
)
ops.library.define("mask_blocks(Tensor mask, int block) -> (Tensor, Tensor, Tensor, Tensor)")

Policy = Callable[..., Any]
_policies: dict[tuple[str, str], Policy] = {}


def register_policy(name: str, policy: Policy, kind: str = "blocks") -> None:
    """Let ``policy(query, key, *, scale, key_mask, **options)`` choose for the method ``name``.

    It gets ``query`` ``[B, H, T, D]``, ``key`` ``[B, G, S, D]`` and ``key_mask`` bool ``[B, S]`` or None, and gives
    the blocks to visit, bool, broadcastable to ``[B, H, nQ, nK]``. If the keys are not in the order of their tokens, it
    gets ``key_positions`` too. What policies of other kinds give, :mod:`effcompile.kernels.column_ops` says.
    """
    _policies[kind, name] = policy


def method_text(name: str, options: dict[str, Any]) -> str:
    """The ``method`` argument of ``select_blocks``: it travels in graphs, and so reaches every cache key."""
    return json.dumps({name: options}, sort_keys=True, separators=(",", ":"))


def method_options(method: str) -> tuple[str, dict[str, Any]]:
    """The inverse of :func:`method_text`."""
    ((name, options),) = json.loads(method).items()
    return name, options


def policy_of(method: str, kind: str = "blocks") -> tuple[Policy, dict[str, Any]]:
    """The policy that a ``method`` argument names, and its options."""
    name, options = method_options(method)
    if (kind, name) not in _policies:
        raise BlockError(f"no method {name!r} selects {kind}; import effcompile.passes first.")
    return _policies[kind, name], options


def _select_blocks(
    query: Tensor, key: Tensor, key_mask: Tensor | None, method: str, scale: float, key_positions: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    policy, options = policy_of(method)
    more = {} if key_positions is None else {"key_positions": key_positions}
    keep = policy(query, key, scale=scale, key_mask=key_mask, **more, **options)
    return as_results(keep, query, key, key_mask, options["block_size"], key_positions)


def as_results(
    keep: Tensor, query: Tensor, key: Tensor, key_mask: Tensor | None, block: int, key_positions: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The lists of the blocks in ``keep`` as an operator gives them: for each row of the batch and each head."""
    keep = keep.reshape((1,) * (4 - keep.dim()) + keep.shape)
    queries, keys = query.shape[2], key.shape[2]
    if key_mask is not None:
        # Padding is data: where there is some, every block is tested.
        full = torch.zeros_like(keep)
    elif key_positions is not None:
        full = blocks_at(key_positions, queries, block, query.shape[1])[1]
    else:
        full = blocks.whole(queries, keys, block, device=key.device)
    made = blocks.lists(keep, full, block)
    assert made.full_kv_num_blocks is not None
    assert made.full_kv_indices is not None
    listed = made.kv_num_blocks, made.kv_indices, made.full_kv_num_blocks, made.full_kv_indices
    # A policy may answer for all heads or rows of a batch at once; the operator's results have one shape.
    num, idx, full_num, full_idx = (x.expand(*query.shape[:2], *x.shape[2:]).contiguous() for x in listed)
    return num, idx, full_num, full_idx


def _fake_select_blocks(
    query: Tensor, key: Tensor, key_mask: Tensor | None, method: str, scale: float, key_positions: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fake_results(query, key, policy_of(method)[1]["block_size"])


def fake_results(query: Tensor, key: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tensors of the shapes of :func:`as_results`."""
    return _fake_lists(query, query.shape[:2], query.shape[2], key.shape[2], block)


def _select_stored_blocks(query: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *state, length, key_mask, name, method, scale = args
    keys, form = ops.split_state(tuple(state))[0], KVForm.parse(name)
    # The shapes of the result are those of a full store; which blocks hold a token is known on the host, or asked for.
    made = _select_blocks(query, quantize.load_side(keys, int(length), form, "key"), key_mask, method, scale)
    columns = blocks.count_blocks(ops.capacity_of(keys, form), policy_of(method)[1]["block_size"])
    num, idx, full_num, full_idx = made
    idx, full_idx = (torch.nn.functional.pad(x, (0, columns - x.shape[-1])) for x in (idx, full_idx))
    return num, idx, full_num, full_idx


def _fake_select_stored_blocks(query: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *state, _length, key_mask, name, method, scale = args
    keys, form = ops.split_state(tuple(state))[0], KVForm.parse(name)
    full = query.new_empty(query.shape[0], 1, ops.capacity_of(keys, form), 1)
    return _fake_select_blocks(query, full, key_mask, method, scale)


def _fake_lists(
    like: Tensor, given: Sequence[int], queries: int, keys: int, block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = blocks.count_blocks(queries, block), blocks.count_blocks(keys, block)
    counts, indices = (like.new_empty(*given, *size, dtype=torch.int32) for size in ((rows,), (rows, columns)))
    return counts, indices, torch.empty_like(counts), torch.empty_like(indices)


def _mask_blocks(mask: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    some, every = blocks.of_mask(mask, block)
    return *blocks.compact(some & ~every), *blocks.compact(every)


def _fake_mask_blocks(mask: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_lists(mask, mask.shape[:2], mask.shape[2], mask.shape[3], block)


def _attend_blocks(
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
    **parts: Any,
) -> tuple[Tensor, Tensor]:
    *state, length, key_mask, kv_num, kv_idx, full_num, full_idx, block, name, scale, causal, window = args
    if (columns is None) != (column_counts is None) or (columns is not None and key_positions is not None):
        raise BlockError("columns come with their counts, and not together with key positions.")
    if (allowed is not None or ranges is not None) and (columns is not None or key_positions is not None):
        given = "a mask of pairs, allowed, is" if ranges is None else "ranges are"
        raise BlockError(f"{given} for blocks alone: neither columns nor key positions go with it.")
    more = {"key_positions": key_positions, "columns": columns, "column_counts": column_counts, "allowed": allowed}
    more |= {"ranges": ranges, "query_positions": query_positions} | parts
    if before_out is not None or before_lse is not None:
        check_before(before_out, before_lse, query, _fake_attend_blocks(query, *args)[0].shape)
        more |= {"before_out": before_out, "before_lse": before_lse}
    try:
        result: tuple[Tensor, Tensor] = ops.launch(
            "attend_blocks", query.device.type, query, *args, **more, span=None if columns is None else span
        )
        return result
    except ops.KernelUnavailable:
        form, n, queries = KVForm.parse(name), int(length), query.shape[2]
        predicate = Predicate(causal, window if window >= 0 else None, key_mask is not None)
        keys, values = ops.split_state(tuple(state))
        check_lists(kv_num, kv_idx, full_num, full_idx, queries, n, block)
        if key_positions is None and query_positions is None:
            tested = attention.allowed(predicate, queries, n, key_mask, query.device)
        else:
            groups, by_token = keys[0].shape[1], key_mask is not None or parts.get("bias") is not None
            check_both(key_positions, query_positions, query.shape, groups, n, by_token)
            tested = visible_at(predicate, query.shape, groups, n, key_mask, key_positions, query_positions)
        if allowed is not None:
            check_allowed(allowed, query, n)
            tested = tested & allowed[..., :n]
        if ranges is not None:
            check_ranges(ranges, query, n)
            tested = tested & tokens(ranges, n)
        lists = BlockLists(kv_num, kv_idx, full_num, full_idx, block)
        over = blocks.tokens(lists.overflowed().unsqueeze(-1), queries, 1, block)
        total = max(kv_idx.shape[3], blocks.count_blocks(n, block))
        for counts in (kv_num, full_num):
            if counts is not None and bool(((counts < 0) | (counts > total)).any()):
                raise BlockError(f"a block list names a block that is not there; there are {total}.") from None
        keep = (blocks.tokens(blocks.visited(kv_num, kv_idx, total), queries, n, block) | over) & tested
        if full_num is not None:
            whole = blocks.tokens(blocks.visited(full_num, full_idx, total), queries, n, block)
            keep = keep | whole & ~over
        if columns is not None and column_counts is not None:
            check_columns(columns, column_counts, span, queries, block)
            single = listed(columns, column_counts, n).repeat_interleave(span * block, 2)[:, :, :queries]
            single = single & ~over  # which are visited already
            if bool((single & blocks.tokens(lists.keep(total), queries, n, block)).any()):
                raise BlockError("a column lies in a block that is visited; its key would count twice.") from None
            keep = keep | single & tested
        key, value = quantize.load_side(keys, n, form, "key"), quantize.load_side(values, n, form, "value")
        if key_positions is not None and parts.get("bias") is not None:
            parts["bias"] = bias_at(parts["bias"], key_positions, query.shape, keys[0].shape[1])
        out, lse = attention.attend(query, key, value, keep, scale, **parts)
        if before_out is not None and before_lse is not None:
            out, lse = attention.merge_state(out, lse, before_out, before_lse)
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
        if counts.shape[2] != rows or indices.shape[:3] != counts.shape:
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


def check_before(out: Tensor | None, lse: Tensor | None, query: Tensor, shape: torch.Size) -> None:
    """Raise :class:`BlockError` unless both are there and are a result of attention for this query. Looks at shapes."""
    if out is None or lse is None:
        raise BlockError("the state of earlier attention is two tensors, before_out and before_lse; one is missing.")
    if out.shape != shape or lse.shape != shape[:3] or out.dtype not in (query.dtype, torch.float32):
        raise BlockError(
            f"before_out is {out.dtype} of {tuple(out.shape)}, before_lse of {tuple(lse.shape)}; expected "
            f"{query.dtype} or fp32 of {tuple(shape)} and of {tuple(shape[:3])}."
        )
    if lse.dtype is not torch.float32:
        raise BlockError(f"before_lse is {lse.dtype}; expected fp32.")


def layout_of(
    kv_num: Tensor, kv_idx: Tensor, full_num: Tensor | None, full_idx: Tensor | None, batch: int, heads: int
) -> tuple[int, int, int]:
    """How kernels step through lists: rows from one batch entry and head to the next, and columns of a row.

    A step is 0 where one entry or head serves all. Raises :class:`BlockError` for other dtypes, batches or heads, and
    ``KernelUnavailable`` if partial and full lists have not one layout.
    """
    given = [t for t in (kv_num, full_num, kv_idx, full_idx) if t is not None]
    if any(t.dtype is not torch.int32 for t in given):
        raise BlockError(f"block lists are int32; these are {', '.join(str(t.dtype) for t in given)}.")
    counts = [t for t in (kv_num, full_num) if t is not None]
    for t in counts:
        if t.shape[0] not in (1, batch) or t.shape[1] not in (1, heads):
            raise BlockError(f"lists for {tuple(t.shape[:2])} batch entries and heads; the call has {batch}, {heads}.")
    widths = {t.shape[3] for t in (kv_idx, full_idx) if t is not None}
    if len({t.shape for t in counts}) > 1 or len(widths) > 1:
        raise ops.KernelUnavailable("partial and full lists of different shapes")
    entries, lists, rows = kv_num.shape
    return lists * rows if entries > 1 else 0, rows if lists > 1 else 0, widths.pop()


def _fake_attend_blocks(query: Tensor, *args: Any, **more: Any) -> tuple[Tensor, Tensor]:
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
    ("select_stored_blocks", _select_stored_blocks, _fake_select_stored_blocks),
    ("attend_blocks", _attend_blocks, _fake_attend_blocks),
    ("mask_blocks", _mask_blocks, _fake_mask_blocks),
):
    ops.library.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"effcompile::{_name}", _fake, lib=ops.library)


def _everything(query: Tensor, *args: Any, **more: Any) -> observe.Arguments:
    """The arguments of ``attend_blocks`` with every block listed, as partial, and so without columns."""
    *state, length, key_mask, kv_num, _kv_idx, _full_num, _full_idx, block, name, scale, causal, window = args
    rows, columns = kv_num.shape[2], blocks.count_blocks(int(length), block)
    more = {name: given for name, given in more.items() if name not in ("columns", "column_counts", "span")}
    made = blocks.lists(torch.ones(1, 1, rows, columns, dtype=torch.bool, device=query.device), None, block)
    return (query, *state, length, key_mask, *of(made), name, scale, causal, window), more


_MASS = ("bias", "sinks", "before_out", "before_lse")
observe.register(torch.ops.effcompile.attend_blocks.default, _everything, _MASS)
