"""Queries, and keys, that stand elsewhere than their places in a call say."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
from cpp_calls import assert_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st
from test_block_lists import ATTEND, Call
from torch import Tensor

from effcompile.kernels import block_ops, blocks, columns, ops
from effcompile.kernels.blocks import BlockError
from effcompile.kernels.form import KVForm
from effcompile.lowering import cpp_blocks  # noqa: F401  (registers the launcher)

pytestmark = pytest.mark.usefixtures("no_fallback")

DENSE, PACKED = KVForm(16, 16), KVForm(4, 4)


def attend(call: Call, keep: Tensor, full: Tensor | None = None, **more: Any) -> tuple[Tensor, Tensor]:
    lists = block_ops.of(blocks.lists(keep, full, call.block))
    out: tuple[Tensor, Tensor] = ATTEND(
        call.query, *call.state, torch.tensor(call.keys), call.mask, *lists, *call.rest, **more
    )
    return out


def seen_at(call: Call, keys_at: Tensor, queries_at: Tensor) -> Tensor:
    """One batch entry and head at a time: which slots a query sees. Padding is looked up by token."""
    (batch, heads, queries, _), groups = call.query.shape, call.key.shape[1]
    seen = torch.zeros(batch, heads, queries, call.keys, dtype=torch.bool)
    window = call.rest[3]
    for b, h in itertools.product(range(batch), range(heads)):
        k = keys_at[b % keys_at.shape[0], h * groups // heads % keys_at.shape[1]]
        q = queries_at[b % queries_at.shape[0], h % queries_at.shape[1]][:, None]
        seen[b, h] = k <= q
        if window >= 0:
            seen[b, h] &= k > q - window
        if call.mask is not None:
            seen[b, h] &= call.mask[b, k]
    return seen


CALLS: dict[str, dict[str, Any]] = {
    "gqa, cut blocks": {"heads": 4, "groups": 2, "queries": 300, "keys": 300, "sizes": (64, 64), "form": DENSE},
    "padding": {"heads": 3, "groups": 1, "queries": 300, "keys": 300, "sizes": (64, 64), "form": DENSE, "pad": True},
    "chunk on packed": {"heads": 6, "groups": 2, "queries": 150, "keys": 333, "sizes": (64, 96), "form": PACKED},
    "bf16, small blocks, window": {
        "heads": 8, "groups": 1, "queries": 150, "keys": 333, "sizes": (80, 80), "form": DENSE, "block": 32,
        "dtype": torch.bfloat16, "window": 90,
    },
}  # fmt: skip


FAST = {("gqa, cut blocks", "queries"), ("gqa, cut blocks", "both"), ("padding", "queries")}


@pytest.mark.parametrize(
    ("name", "moved"),
    [pytest.param(n, m, marks=[pytest.mark.slow] * ((n, m) not in FAST)) for n in CALLS for m in ("queries", "both")],
)
def test_kernel_and_reference_and_fp64(name: str, moved: str) -> None:
    """Random positions, many of them shared; some queries stand before every key, some behind all."""
    call = Call(**{"block": 128, **CALLS[name]})
    (batch, heads, queries, _), groups = call.query.shape, call.key.shape[1]
    slots = torch.arange(call.keys)[None, None]
    queries_at = torch.randint(-3, call.keys + 40, (batch, heads, queries))
    more: dict[str, Any] = {"query_positions": queries_at}
    if moved == "both":
        # Without padding positions are any numbers, such as those behind an offset.
        high = call.keys if call.mask is not None else 3 * call.keys
        slots = torch.randint(0, high, (batch, groups, call.keys), dtype=torch.int32)
        more["key_positions"] = slots
        more["query_positions"] = (queries_at * high // call.keys).int()
    keep = call.lists.keep() | (torch.rand(call.lists.keep().shape) < 0.3)
    out, lse = attend(call, keep, **more)
    with ops.reference_only():
        reference, reference_lse = attend(call, keep, **more)
        key, value = torch.ops.effcompile.kv_load.default(*call.state, torch.tensor(call.keys), call.rest[0])
    seen = seen_at(call, slots.long(), more["query_positions"].long())
    seen &= blocks.tokens(keep, queries, call.keys, call.block)
    key, value = (x[:, :, : call.keys].double().repeat_interleave(heads // groups, 1) for x in (key, value))
    scores = (call.query.double() @ key.mT * call.rest[1]).masked_fill(~seen, float("-inf"))
    truth, truth_lse = scores.softmax(-1).nan_to_num(0) @ value, scores.logsumexp(-1)
    assert_within_budget(out, reference, truth, name)
    assert_within_budget(lse, reference_lse, truth_lse, name, roundings=2)
    blind = truth_lse.isinf()
    assert blind.any()
    assert not blind.all()
    assert not out[blind].any()


@pytest.mark.parametrize("shared", [True, False])
def test_queries_in_another_order_are_the_same_rows(shared: bool) -> None:
    """Queries and keys, permuted together and apart: attention does not depend on either order, with every block."""
    call = Call(4, 2, 300, 300, (64, 64), DENSE, 64)
    every = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    wanted = attend(call, blocks.possible(300, 300, 64)[None, None])
    lead = (1, 1) if shared else (2, 4)
    order = torch.rand(*lead, 300).argsort(-1)
    at = order.expand(2, 4, -1)
    call.query = call.query.gather(2, at[..., None].expand(call.query.shape))
    out, lse = attend(call, every, query_positions=order)
    torch.testing.assert_close(out, wanted[0].gather(2, at[..., None].expand(out.shape)), rtol=0, atol=2e-6)
    torch.testing.assert_close(lse, wanted[1].gather(2, at), rtol=0, atol=2e-6)
    turned = torch.rand(1, 2, 300).argsort(-1)
    call.state[0], call.state[3] = (
        x[:, :, :300].gather(2, turned[..., None].expand(2, 2, 300, 64)) for x in (call.state[0], call.state[3])
    )  # type: ignore[index]
    _, full = columns.blocks_at(turned, 300, 64, 4, order)
    out, lse = attend(call, every, full, query_positions=order, key_positions=turned)
    torch.testing.assert_close(out, wanted[0].gather(2, at[..., None].expand(out.shape)), rtol=0, atol=2e-6)
    torch.testing.assert_close(lse, wanted[1].gather(2, at), rtol=0, atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(1, 70), st.sampled_from([16, 32]), st.booleans())
def test_blocks_at_positions(seed: int, queries: int, keys: int, block: int, narrow: bool) -> None:
    torch.manual_seed(seed)
    kind = torch.int32 if narrow else torch.int64
    # From below 0 on, so that what stands for a query that is not there must be lower than that.
    keys_at, queries_at = (torch.randint(-30, 50, (2, n, t), dtype=kind) for n, t in ((2, keys), (1, queries)))
    # Low numbers first, so that whole blocks are seen.
    keys_at, queries_at = keys_at.sort(-1).values, queries_at.sort(-1).values + keys % 20
    seen = keys_at[:, :, None] <= queries_at[:, :, :, None]
    wanted = blocks.of_mask(seen, block)
    found = columns.blocks_at(keys_at, queries, block, 4, queries_at)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs.repeat_interleave(2, 1))


def test_columns_are_seen_from_where_a_query_stands() -> None:
    """Single keys for queries in another order: each pair counts once, so with every key it is dense attention."""
    call = Call(4, 2, 300, 300, (64, 64), DENSE, 64)
    wanted = attend(call, blocks.possible(300, 300, 64)[None, None])
    order = torch.arange(299, -1, -1)
    call.query = call.query.flip(2)
    keep = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    keep[..., 1] = True
    outside = ~blocks.tokens(keep, 300, 300, 64)[0, 0, ::64]
    made, counts = columns.gathered(torch.arange(300), outside[None, None])
    found = attend(call, keep, columns=made, column_counts=counts, query_positions=order[None, None])
    torch.testing.assert_close([x.flip(2) for x in found], list(wanted), rtol=0, atol=2e-6)


@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
def test_positions_that_do_not_fit_are_refused(reference: bool) -> None:
    call = Call(4, 2, 150, 150, (64, 64), DENSE, 64, pad=True)
    keep, far = call.lists.keep(), torch.arange(150)[None, None] + 1
    good = torch.arange(150)[None, None]
    wrong: dict[str, dict[str, Any]] = {
        r"query positions \(1, 1, 149\)": {"query_positions": good[..., 1:]},
        r"query positions .* in torch.float32": {"query_positions": good.float()},
        r"query positions .*\[2 or 1, 4 or 1, 150\]": {"query_positions": good.expand(1, 2, -1)},
        "must fit into 32 bits": {"query_positions": good + (1 << 31)},
        # Padding is looked up by token.
        "key positions from 1 to 150; there are 150": {"query_positions": good, "key_positions": far},
    }
    with ops.reference_only() if reference else contextlib.nullcontext():
        for said, more in wrong.items():
            with pytest.raises(BlockError, match=said):
                attend(call, keep, **more)
        call.mask = None
        with pytest.raises(BlockError, match="from 1 to 150"):
            attend(call, keep, key_positions=far)
        found = attend(call, keep, key_positions=far, query_positions=good + 1)
        for ours, wanted in zip(found, attend(call, keep), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("both", [False, True])
def test_operators_keep_torchs_contract(both: bool) -> None:
    call = Call(4, 2, 150, 150, (64, 64), DENSE, 64)
    args = (call.query, *call.state, torch.tensor(150), None, *block_ops.of(call.lists), *call.rest)
    more = {"query_positions": torch.arange(150)[None, None]}
    more |= {"key_positions": torch.arange(150)[None, None]} if both else {}
    torch.library.opcheck(ATTEND, args, more)
