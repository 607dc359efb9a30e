"""Attention in parts: the state of earlier attention, and merging two results."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from cpp_calls import assert_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st
from test_block_lists import ATTEND, FEW, Call
from test_block_lists import CALLS as EVERY
from torch import Tensor

from effcompile import merge_state
from effcompile.kernels import block_ops, blocks, ops
from effcompile.kernels.blocks import BlockError
from effcompile.kernels.form import KVForm
from effcompile.lowering import cpp_blocks  # noqa: F401  (registers the launcher)

pytestmark = pytest.mark.usefixtures("no_fallback")

DENSE, PACKED = KVForm(16, 16), KVForm(4, 4)
INF = float("inf")


def attend(call: Call, keep: Tensor, before: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The blocks in ``keep``, of which those without a hidden pair need no test, after earlier attention."""
    full = None if call.mask is not None or call.rest[3] >= 0 else blocks.whole(call.queries, call.keys, call.block)
    lists = block_ops.of(blocks.lists(keep, full, call.block))
    more = {} if before is None else {"before_out": before[0], "before_lse": before[1]}
    out: tuple[Tensor, Tensor] = ATTEND(
        call.query, *call.state, torch.tensor(call.keys), call.mask, *lists, *call.rest, **more
    )
    return out


def exact(call: Call, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to the blocks in ``keep`` in fp64."""
    with ops.reference_only():
        sides = torch.ops.effcompile.kv_load.default(*call.state, torch.tensor(call.keys), call.rest[0])
    position = torch.arange(call.keys - call.queries, call.keys)[:, None]
    seen = blocks.tokens(keep, call.queries, call.keys, call.block) & (torch.arange(call.keys) <= position)
    if call.rest[3] >= 0:
        seen = seen & (torch.arange(call.keys) > position - call.rest[3])
    if call.mask is not None:
        seen = seen & call.mask[:, None, None, : call.keys]
    ratio = call.query.shape[1] // sides[0].shape[1]
    key, value = (x[:, :, : call.keys].double().repeat_interleave(ratio, 1) for x in sides)
    scores = (call.query.double() @ key.mT * call.rest[1]).masked_fill(~seen, -INF)
    return scores.softmax(-1).nan_to_num(0) @ value, scores.logsumexp(-1)


CALLS: dict[str, Any] = {**FEW, "window": EVERY["window, no residual"]}


@pytest.mark.parametrize("split", ["random", "nothing first", "nothing after"])
@pytest.mark.parametrize("name", CALLS)
def test_any_split_is_the_whole(name: str, split: str) -> None:
    """In two calls, the second from the state of the first, and apart and merged: both are one call, by fp64."""
    call = Call(**{"block": 128, **CALLS[name]})
    keep = call.lists.keep()
    share = {"random": 0.5, "nothing first": 0.0, "nothing after": 1.0}[split]
    first = keep & (torch.rand(keep.shape) < share)
    truth = exact(call, keep)

    def parts() -> dict[str, tuple[Tensor, Tensor]]:
        one, two = attend(call, first), attend(call, keep & ~first)
        return {
            "chained": attend(call, keep & ~first, one),
            "in fp32": attend(call, keep & ~first, (one[0].float(), one[1])),
            "merged": merge_state(*one, *two),
            "merged the other way": merge_state(*two, *one),
        }

    found, whole = parts(), attend(call, keep)
    with ops.reference_only():
        reference = parts()
    for way, (out, lse) in found.items():
        # What is rounded between two calls is rounded twice more, of the largest number.
        assert_within_budget(out, reference[way][0], truth[0], way, roundings=3)
        assert_within_budget(lse, reference[way][1], truth[1], f"lse, {way}", roundings=4)
        assert_within_budget(reference[way][0], whole[0], truth[0], f"{way}, reference", roundings=4)
        assert not out[truth[1].isinf()].any()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.sampled_from([0.1, 1.0, 30.0]))
def test_merging_is_associative(seed: int, parts: int, spread: float) -> None:
    """Scores in any parts, also empty ones, in any order, against the softmax over all in fp64."""
    torch.manual_seed(seed)
    scores, value = torch.randn(2, 3, 5, 12) * spread, torch.randn(12, 7)
    part = torch.randint(0, parts, (2, 3, 5, 12))
    part[0, 0] = torch.randint(0, parts + 1, (5, 12))  # some keys nobody sees
    part[0, 1, 0] = parts
    states = []
    for i in torch.randperm(parts):
        some = scores.masked_fill(part != i, -INF)
        states.append((some.softmax(-1).nan_to_num(0) @ value, some.logsumexp(-1)))
    while len(states) > 1:
        states.append(merge_state(*states.pop(0), *states.pop(0)))
    exactly = scores.double().masked_fill(part >= parts, -INF)
    out, lse = states[0]
    assert torch.equal(lse == -INF, (part >= parts).all(-1))
    assert not out[lse == -INF].any()
    seen = lse > -INF
    # Each part, and each merge, rounds an lse of at most the largest score once, and with it the weights.
    error = 4 * parts * 2**-23 * float(scores.abs().max() + 4)
    torch.testing.assert_close(lse[seen].double(), exactly.logsumexp(-1)[seen], rtol=0, atol=error)
    wanted = exactly.softmax(-1).nan_to_num(0) @ value.double()
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=error * float(value.abs().max()))


def test_rows_without_keys_and_infinite_ones() -> None:
    one, none = torch.randn(1, 1, 4, 8), torch.zeros(1, 1, 4, 8)
    lse = torch.tensor([[[-INF, 3.0, 200.0, -3e38]]])
    nothing = torch.full_like(lse, -INF)
    for pair in ((one, lse, none, nothing), (none, nothing, one, lse)):
        out, both = merge_state(*pair)
        assert torch.equal(both, lse)
        assert torch.equal(out[..., 1:, :], one[..., 1:, :])
    # A sink that takes everything; and what is not a number is not hidden.
    out, both = merge_state(one, lse, none, torch.tensor([[[INF, INF, INF, float("nan")]]]))
    assert not out[..., :3, :].any()
    assert (both[..., :3] == INF).all()
    assert out[..., 3, :].isnan().all()
    out, both = merge_state(none, torch.full_like(lse, INF), none, torch.full_like(lse, INF))
    assert not out.any()


@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
def test_rows_that_only_one_side_sees(reference: bool) -> None:
    """A row with an empty list is what was given, bit by bit; nothing given is nothing, whatever the lists are."""
    call = Call(6, 2, 300, 300, (64, 64), DENSE, 64)
    out, lse = torch.randn(2, 6, 300, 64), torch.randn(2, 6, 300)
    out[:, :, :5], lse[:, :, :5] = 0, -INF
    with ops.reference_only() if reference else contextlib.nullcontext():
        found = attend(call, torch.zeros(1, 1, 5, 5, dtype=torch.bool), (out, lse))
        assert torch.equal(found[0], out)
        torch.testing.assert_close(found[1], lse, rtol=2**-23, atol=0)
        assert torch.equal(found[1] == -INF, lse == -INF)
        keep = call.lists.keep()
        plain = attend(call, keep)
        found = attend(call, keep, (torch.zeros_like(out), torch.full_like(lse, -INF)))
        assert torch.equal(found[0], plain[0])
        assert torch.equal(found[1], plain[1])
        zero = call.rest
        call.rest = (zero[0], 0.0, *zero[2:])  # a scale of 0: every key weighs the same
        found = attend(call, keep, (out, lse))
        wanted = merge_state(out, lse, *attend(call, keep))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
def test_a_state_that_does_not_fit_is_refused(reference: bool) -> None:
    call = Call(4, 2, 150, 150, (64, 96), DENSE, 64)
    out, lse = torch.randn(2, 4, 150, 96), torch.randn(2, 4, 150)
    wrong: dict[str, tuple[Any, Any]] = {
        "one is missing": (out, None),
        r"of \(2, 4, 150, 64\)": (out[..., :64], lse),
        r"before_lse of \(2, 4, 149\)": (out, lse[..., :149]),
        "float64": (out.double(), lse),
        "before_lse is torch.float64": (out, lse.double()),
    }
    with ops.reference_only() if reference else contextlib.nullcontext():
        for said, before in wrong.items():
            with pytest.raises(BlockError, match=said):
                attend(call, call.lists.keep(), before)


def test_operators_keep_torchs_contract() -> None:
    call = Call(4, 2, 150, 150, (64, 64), DENSE, 64)
    lists = block_ops.of(call.lists)
    args = (call.query, *call.state, torch.tensor(150), call.mask, *lists, *call.rest)
    state = {"before_out": torch.randn(2, 4, 150, 64), "before_lse": torch.randn(2, 4, 150)}
    torch.library.opcheck(ATTEND, args, state)


def test_merging_compiles_and_has_gradients() -> None:
    """One elementwise program of Inductor: the public function is plain PyTorch."""
    out, other = (torch.randn(2, 3, 33, 16, requires_grad=True) for _ in range(2))
    lse, other_lse = torch.randn(2, 3, 33, requires_grad=True), torch.randn(2, 3, 33)
    other_lse[0, 0] = -INF
    wanted = merge_state(out, lse, other, other_lse)
    found = torch.compile(merge_state, dynamic=True, fullgraph=True)(out, lse, other, other_lse)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    for grads in (torch.autograd.grad(x[0].sum() + x[1].sum(), (out, lse, other)) for x in (wanted, found)):
        assert all(g.isfinite().all() for g in grads)
