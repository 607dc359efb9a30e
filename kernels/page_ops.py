"""``effcompile::select_pages`` and ``effcompile::attend_pages``: choosing pages of a store, and attending to them.

As in :mod:`effcompile.kernels.block_ops`: ``select_pages`` runs the policy that its ``method`` names, ``attend_pages``
is ``attend`` over the listed pages only (:mod:`effcompile.kernels.pages`). The store may have any form; tokens that
are not packed yet are read where they are listed, as all others. ``attend_mass`` is ``attend`` of one query, which also
says what each page was worth to it; a method that chooses by that gives it to ``select_pages``. ``bound_store`` comes
before the ``kv_store`` of the same keys, where bounds or moments of keys are kept beside the store.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from effcompile.kernels import attention, blocks, observe, ops, pages, quantize
from effcompile.kernels.block_ops import method_options
from effcompile.kernels.blocks import BlockError
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import Predicate

_KEYS = "Tensor k0, Tensor? k1, Tensor? k2"
ops.library.define(
    f"select_pages(Tensor query, {_KEYS}, Tensor length, Tensor? key_mask, str method, str form, float scale, *, "
    "Tensor? mass=None, Tensor? bounds=None) -> (Tensor, Tensor)"
)
ops.library.define("bound_store(Tensor(a!) bounds, Tensor rows, Tensor length, Tensor key, int unit, str kind) -> ()")
ops.library.define(
    f"attend_mass(Tensor query, {ops.READ}, Tensor length, Tensor? key_mask, int page, str form, float scale, *, "
    "Tensor? table=None) -> (Tensor, Tensor, Tensor)"
)
ops.library.define(
    f"attend_pages(Tensor query, {ops.READ}, Tensor length, Tensor? key_mask, Tensor pages, Tensor page_counts, "
    "int page, str form, float scale, *, Tensor? table=None) -> (Tensor, Tensor)"
)


@dataclasses.dataclass(frozen=True)
class Policy:
    """How a method chooses pages.

    Parameters
    ----------
    scores
        ``scores(step, **options)``: fp32 ``[B, G, nP]``, or ``[B, 1, nP]``, as :func:`effcompile.kernels.pages.take`
        wants them.
    count
        ``count(**options)``: pages to take.
    always
        ``always(**options)``: how many of the first and of the newest pages that the query sees are always taken;
        ``scores`` has +inf there.
    shared
        Whether there is one list for all heads: then ``scores`` are ``step.mass`` but for infinities, else shares of
        :func:`effcompile.kernels.pages.bounds`, with the option ``radius`` if there is one; with the option
        ``rank_by="moments"`` of :func:`effcompile.kernels.pages.likely`, with the option ``deviations``.
    """

    scores: Callable[..., Tensor]
    count: Callable[..., int]
    always: Callable[..., tuple[int, int]]
    shared: bool


_policies: dict[str, Policy] = {}


def register_policy(name: str, policy: Policy) -> None:
    """Let ``policy`` choose pages for the method ``name``."""
    _policies[name] = policy


def policy_of(method: str) -> tuple[Policy, dict[str, Any]]:
    """The policy that ``method`` names, and its options."""
    name, options = method_options(method)
    if name not in _policies:
        raise BlockError(f"no method {name!r} selects pages; import effcompile.passes first.")
    return _policies[name], options


def _select_pages(
    query: Tensor,
    k0: Tensor,
    k1: Tensor | None,
    k2: Tensor | None,
    length: Tensor,
    key_mask: Tensor | None,
    method: str,
    form: str,
    scale: float,
    *,
    mass: Tensor | None = None,
    bounds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    policy, options = policy_of(method)
    if policy.shared and mass is None:
        raise BlockError(f"{method} ranks pages by the mass that attend_mass found, and none is given.")
    if options.get("rank_by") == "moments" and bounds is None:
        raise BlockError(f"{method} ranks pages by moments of their keys, and none are given as bounds.")
    args = query, k0, k1, k2, length, key_mask, method, form, scale
    try:
        result: tuple[Tensor, Tensor] = ops.launch("select_pages", query.device.type, *args, mass=mass, bounds=bounds)
        return result
    except ops.KernelUnavailable:
        keys = [t for t in (k0, k1, k2) if t is not None]
        step = pages.Step(query, keys, length, key_mask, KVForm.parse(form), scale, mass, bounds)
        return pages.take(policy.scores(step, **options), policy.count(**options))


def _fake_select_pages(query: Tensor, k0: Tensor, *args: Any, **extra: Any) -> tuple[Tensor, Tensor]:
    *_, method, form, _scale = args
    policy, options = policy_of(method)
    total = blocks.count_blocks(k0.shape[2] * KVForm.parse(form).span("key"), options["page_size"])
    heads = 1 if policy.shared else k0.shape[1]
    count = min(policy.count(**options), total)
    return (
        query.new_empty(query.shape[0], heads, count, dtype=torch.int32),
        query.new_empty(query.shape[0], heads, dtype=torch.int32),
    )


def check_pages(listed: Tensor, counts: Tensor, batch: int, groups: int) -> None:
    """Raise :class:`BlockError` if the lists are not those of the call. Looks at shapes and dtypes only."""
    lead = tuple(counts.shape)
    if listed.dtype is not torch.int32 or counts.dtype is not torch.int32:
        raise BlockError(f"lists of pages are int32; these are {listed.dtype} and {counts.dtype}.")
    if listed.ndim != 3 or listed.shape[:2] != lead or lead not in {(b, g) for b in (1, batch) for g in (1, groups)}:
        raise BlockError(
            f"pages {tuple(listed.shape)} and counts {lead} do not list pages for {batch} batch entries and {groups} "
            "key/value heads; expected [B or 1, G or 1, K] and [B or 1, G or 1]."
        )


def not_there(total: int) -> BlockError:
    """The error for lists that name other pages than the first ``total`` in ascending order."""
    return BlockError(f"a list of pages does not ascend, or names one that is not there; there are {total}.")


def _attend_pages(query: Tensor, *args: Any, table: Tensor | None = None) -> tuple[Tensor, Tensor]:
    *state, length, key_mask, listed, counts, page, name, scale = args
    try:
        result: tuple[Tensor, Tensor] = ops.launch("attend_pages", query.device.type, query, *args, table=table)
        return result
    except ops.KernelUnavailable:
        form, n, queries = KVForm.parse(name), int(length), query.shape[2]
        keys, values = ops.split_state(tuple(state))
        key = quantize.load_side(keys, n, form, "key", table)
        value = quantize.load_side(values, n, form, "value")
        check_pages(listed, counts, query.shape[0], key.shape[1])
        total = blocks.count_blocks(n, page)
        there = torch.arange(listed.shape[-1], device=listed.device) < counts.unsqueeze(-1)
        steps = torch.where(there, listed, total).diff(prepend=listed.new_tensor(-1).expand(*counts.shape, 1))
        if bool(((steps <= 0) | (listed >= total)).logical_and(there).any()) or bool((counts > listed.shape[-1]).any()):
            raise not_there(total) from None
        visited = blocks.visited(counts, listed, total).repeat_interleave(page, -1)[:, :, None, :n]
        if visited.shape[1] != 1:
            visited = visited.repeat_interleave(query.shape[1] // key.shape[1], 1)
        keep = visited & attention.allowed(Predicate(key_mask=key_mask is not None), queries, n, key_mask, query.device)
        out, lse = attention.attend(query, key, value, keep, scale)
        return out.contiguous(), lse.contiguous()


def _fake_attend_pages(query: Tensor, *args: Any, table: Tensor | None = None) -> tuple[Tensor, Tensor]:
    state, name = args[:6], args[-2]
    value = state[3] if KVForm.parse(name).value_bits == 16 else state[5]
    batch, heads, rows = query.shape[:3]
    return (
        query.new_empty(batch, heads, rows, value.shape[3]),
        query.new_empty(batch, heads, rows, dtype=torch.float32),
    )


def _bound_store(bounds: Tensor, rows: Tensor, length: Tensor, key: Tensor, unit: int, kind: pages.Kept) -> None:
    if kind not in get_args(pages.Kept):
        raise BlockError(f"kind={kind!r} of page; expected one of {', '.join(get_args(pages.Kept))}.")
    # Once in `unit` steps a few operations of PyTorch, else none: no kernel of ours would gain.
    pages.store_bounds(bounds, rows, int(length), key, unit, kind)


def _on_host(length: Tensor) -> bool:
    """Whether asking for the number waits for nothing."""
    return length.device.type == "cpu"


def _attend_mass(query: Tensor, *args: Any, table: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    *state, length, key_mask, page, name, scale = args
    try:
        result: tuple[Tensor, Tensor, Tensor] = ops.launch("attend_mass", query.device.type, query, *args, table=table)
        return result
    except ops.KernelUnavailable:
        form = KVForm.parse(name)
        keys, values = ops.split_state(tuple(state))
        capacity = ops.capacity_of(keys, form)
        if not _on_host(length):
            # The length stays where it is: the kernel attends, and all that there is room for is weighed.
            whole = (*state, length, key_mask, name, scale, True, -1)
            out, lse = torch.ops.effcompile.attend(query, *whole, table=table)
            key = quantize.load_room(keys, length, form, "key", table)
            there = torch.arange(capacity, device=key.device) < length
            return out, lse, pages.mass(query, key, key_mask, scale, page, capacity, there)
        n = int(length)
        key = quantize.load_side(keys, n, form, "key", table)
        value = quantize.load_side(values, n, form, "value")
        keep = attention.allowed(Predicate(key_mask=key_mask is not None), 1, n, key_mask, query.device)
        out, lse = attention.attend(query, key, value, keep, scale)
        worth = pages.mass(query, key, key_mask, scale, page, capacity)
        return out.contiguous(), lse.contiguous(), worth


def _fake_attend_mass(query: Tensor, *args: Any, table: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    *state, _length, _mask, page, name, _scale = args
    total = blocks.count_blocks(state[0].shape[2] * KVForm.parse(name).span("key"), page)
    return (*_fake_attend_pages(query, *args), query.new_empty(query.shape[0], 1, total, dtype=torch.float32))


for _name, _body, _fake in (
    ("bound_store", _bound_store, lambda *args: None),
    ("attend_mass", _attend_mass, _fake_attend_mass),
    ("select_pages", _select_pages, _fake_select_pages),
    ("attend_pages", _attend_pages, _fake_attend_pages),
):
    ops.library.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"effcompile::{_name}", _fake, lib=ops.library)


def _everything(query: Tensor, *args: Any, table: Tensor | None = None) -> observe.Arguments:
    """The arguments of ``attend_pages`` with every page listed."""
    *state, length, key_mask, _listed, _counts, page, name, scale = args
    every = torch.arange(blocks.count_blocks(int(length), page), dtype=torch.int32, device=query.device)
    counts = torch.full((1, 1), len(every), dtype=torch.int32, device=query.device)
    return (query, *state, length, key_mask, every[None, None], counts, page, name, scale), {"table": table}


observe.register(torch.ops.effcompile.attend_pages.default, _everything)
