"""Ranges of keys for each query: what they are as blocks and as pairs, and attention over them."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from cpp_calls import assert_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st
from test_block_lists import ATTEND, FEW, Call
from torch import Tensor

import effcompile as ec
from effcompile.kernels import block_ops, blocks, ops, ranges
from effcompile.kernels.attention import allowed
from effcompile.kernels.blocks import BlockError
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import Predicate
from effcompile.lowering import cpp_blocks  # noqa: F401  (registers the launcher)

pytestmark = pytest.mark.usefixtures("no_fallback")

DENSE, PACKED = KVForm(16, 16), KVForm(4, 4)


def some(batch: int, heads: int, queries: int, keys: int, most: int = 4) -> Tensor:
    """Random ranges, ascending and without overlap, some of length 0 anywhere, some queries without any."""
    cuts = torch.rand(batch, heads, queries, 2 * most) * (keys + 1)
    cuts = cuts.int().sort(-1).values.unflatten(-1, (most, 2))
    start, end = cuts.unbind(-1)
    length = (end - start) * (torch.rand(start.shape) < 0.8)
    length[:, :, :: max(2, queries // 5)] = 0
    # What stands in front of an unused one is any number.
    return torch.stack([torch.where(length > 0, start, -9), length], -1).int()


def pairs(given: Tensor, keys: int) -> Tensor:
    """One query at a time: written apart from what is tested."""
    seen = torch.zeros(*given.shape[:3], keys, dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in given.shape[:3])):
        for start, length in given[b, h, i].tolist():
            if length:
                seen[b, h, i, start : start + length] = True
    return seen


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(1, 70), st.integers(1, 5), st.sampled_from([16, 32]))
def test_as_pairs_and_as_blocks(seed: int, queries: int, keys: int, most: int, block: int) -> None:
    torch.manual_seed(seed)
    made = some(2, 2, queries, keys, most)
    seen = pairs(made, keys)
    assert torch.equal(ranges.tokens(made, keys), seen)
    for ours, wanted in zip(ranges.of_blocks(made, keys, block), blocks.of_mask(seen, block), strict=True):
        assert torch.equal(ours, wanted)
    back = ranges.of_mask(seen)
    assert torch.equal(ranges.tokens(back, keys), seen)
    ranges.check_ranges(back, torch.empty(2, 2, queries, 1), keys)


def test_no_range_at_all() -> None:
    made = ranges.of_mask(torch.zeros(1, 1, 150, 150, dtype=torch.bool))
    assert made.shape == (1, 1, 150, 0, 2)
    assert not any(x.any() for x in ranges.of_blocks(made, 150, 64))
    call = Call(4, 2, 150, 150, (64, 64), DENSE, 64)
    out, lse = ATTEND(
        call.query, *call.state, torch.tensor(150), None, *block_ops.of(call.lists), *call.rest, ranges=made
    )
    seen = call.lists.full_kv_num_blocks.repeat_interleave(64, 2)[:, :, :150] > 0  # type: ignore[union-attr]
    assert torch.equal(lse.isfinite(), seen)
    assert not out[~seen].any()


def test_blocks_of_ranges_need_no_map_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    made = some(2, 3, 333, 300)
    whole = ranges.of_blocks(made, 300, 32)
    monkeypatch.setattr(ranges, "SLAB", 3000)  # a few blocks of queries at a time
    for ours, wanted in zip(ranges.of_blocks(made, 300, 32), whole, strict=True):
        assert torch.equal(ours, wanted)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(0, 40), st.integers(1, 50), st.integers(0, 30))
def test_windows(queries: int, before: int, window: int, sink: int) -> None:
    keys = queries + before
    causal = allowed(Predicate(), queries, keys, None, torch.device("cpu"))
    near = allowed(Predicate(window=window), queries, keys, None, torch.device("cpu"))
    made = ranges.window(queries, keys, window, sink)
    ranges.check_ranges(made, torch.empty(1, 1, queries, 1), keys)
    assert torch.equal(ranges.tokens(made, keys), near | causal & (torch.arange(keys) < sink))


def test_packed_sequences() -> None:
    """Against the predicate that compares the numbers of sequences."""
    lengths = torch.tensor([[3, 0, 60, 17], [80, 1, 2, 3]])
    made = ranges.sequences(lengths, 90)
    ranges.check_ranges(made, torch.empty(2, 1, 90, 1), 90)
    ids = torch.stack([torch.cat([torch.repeat_interleave(torch.arange(4), row), 4 + torch.arange(90 - int(row.sum()))])
                       for row in lengths])  # fmt: skip
    wanted = allowed(Predicate(segments=True), 90, 90, None, torch.device("cpu"), segments=ids)
    assert torch.equal(ranges.tokens(made, 90), wanted)


def attend(call: Call, made: Tensor) -> tuple[Tensor, Tensor]:
    lists = ranges.lists(made, call.keys, call.block, causal=call.rest[2], tested=call.mask is not None)
    out: tuple[Tensor, Tensor] = ATTEND(
        call.query, *call.state, torch.tensor(call.keys), call.mask, *block_ops.of(lists), *call.rest, ranges=made
    )
    return out


CASES = [
    pytest.param(name, shared, causal, marks=[pytest.mark.slow] * (not causal and name != "gqa, cut blocks"))
    for name in FEW
    for shared in ([False, True] if "gqa" in name else [False])
    for causal in (True, False)
]


@pytest.mark.parametrize(("name", "shared", "causal"), CASES)
def test_kernel_and_reference_and_fp64(name: str, shared: bool, causal: bool) -> None:
    call = Call(**{"block": 128, **FEW[name]})
    call.rest = (*call.rest[:2], causal, -1)
    lead = (1, 1) if shared else (2, call.query.shape[1])
    made = some(*lead, call.queries, call.keys)
    made[:, :, 100:140] = torch.tensor([[0, call.keys], [0, 0], [0, 0], [0, 0]])  # whole blocks, and rows in a row
    out, lse = attend(call, made)
    with ops.reference_only():
        reference, reference_lse = attend(call, made)
        key, value = torch.ops.effcompile.kv_load.default(*call.state, torch.tensor(call.keys), call.rest[0])
    seen = pairs(made, call.keys)
    if causal:
        seen = seen & (torch.arange(call.keys) <= torch.arange(call.keys - call.queries, call.keys)[:, None])
    if call.mask is not None:
        seen = seen & call.mask[:, None, None, : call.keys]
    ratio = call.query.shape[1] // key.shape[1]
    key, value = (x[:, :, : call.keys].double().repeat_interleave(ratio, 1) for x in (key, value))
    scores = (call.query.double() @ key.mT * call.rest[1]).masked_fill(~seen, float("-inf"))
    truth, truth_lse = scores.softmax(-1).nan_to_num(0) @ value, scores.logsumexp(-1)
    assert_within_budget(out, reference, truth, name)
    assert_within_budget(lse, reference_lse, truth_lse, name, roundings=2)
    assert not out[truth_lse.isinf()].any()


def test_a_window_of_ranges_is_that_of_the_predicate() -> None:
    call = Call(6, 2, 300, 300, (64, 64), DENSE, 64)
    wanted = torch.ops.effcompile.attend.default(
        call.query, *call.state, torch.tensor(300), None, *call.rest[:3], 77
    )  # fmt: skip
    torch.testing.assert_close(attend(call, ranges.window(300, 300, 77)), wanted, rtol=0, atol=2e-6)


def test_a_layout_as_ranges_is_its_mask() -> None:
    """The structure of a ranking prompt: few ranges a query, and attention as under the mask."""
    layout = ec.blockrank_layout(list(range(40)), [list(range(50 + 13 * i)) for i in range(4)], list(range(21)))
    mask = layout.attention_mask
    made, tokens = ranges.of_mask(mask), mask.shape[2]
    assert made.shape[3] == 2
    call = Call(4, 2, tokens, tokens, (64, 64), DENSE, 64, batch=1)
    given = torch.ops.effcompile.mask_blocks.default(mask, 64)
    rest = (*call.rest[:2], False, -1)
    wanted = ATTEND(call.query, *call.state, torch.tensor(tokens), None, *given, 64, *rest, allowed=mask)
    found = attend(call, made)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
def test_ranges_that_do_not_fit_are_refused(reference: bool) -> None:
    call = Call(4, 2, 150, 150, (64, 64), DENSE, 64)
    good = ranges.window(150, 150, 20, 3)

    def with_row(*row: list[int]) -> Tensor:
        made = good.clone()
        made[0, 0, 120] = torch.tensor(row)
        return made

    fits = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    lists = block_ops.of(blocks.lists(fits, None, 64))
    wrong: dict[str, list[tuple[str, Any]]] = {
        "do not ascend without overlap": [
            ("ranges", with_row([100, 3], [2, 1])),
            ("ranges", with_row([2, 8], [9, 1])),
            ("ranges", with_row([2, 8], [149, 2])),
            ("ranges", with_row([-1, 8], [149, 1])),
            ("ranges", with_row([2, 8], [20, -1])),
        ],
        r"expected int32 of \[2 or 1, 4 or 1, 150, R, 2\]": [
            ("ranges", good[:, :, 1:]),
            ("ranges", good.long()),
            ("ranges", good[..., :1]),
            ("ranges", good.expand(3, -1, -1, -1, -1)),
        ],
    }
    head = (call.query, *call.state, torch.tensor(150), None, *lists, *call.rest)
    with ops.reference_only() if reference else contextlib.nullcontext():
        for said, cases in wrong.items():
            for name, made in cases:
                with pytest.raises(BlockError, match=said):
                    ATTEND(*head, **{name: made})
        with pytest.raises(BlockError, match="ranges are for blocks alone"):
            ATTEND(*head, ranges=good, key_positions=torch.arange(150)[None, None])
        ATTEND(*head, ranges=with_row([0, 0], [149, 1]))


def test_operators_keep_torchs_contract() -> None:
    call = Call(4, 2, 150, 150, (64, 64), DENSE, 64)
    args = (call.query, *call.state, torch.tensor(150), None, *block_ops.of(call.lists), *call.rest)
    torch.library.opcheck(ATTEND, args, {"ranges": ranges.window(150, 150, 20, 3)})
