"""Block lists with room for fewer blocks than there are: what does not fit visits everything."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from test_block_lists import ATTEND, CALLS, Call
from torch import Tensor

from effcompile.kernels import block_ops, blocks, columns, ops
from effcompile.kernels.blocks import BlockError, BlockLists
from effcompile.kernels.form import KVForm
from effcompile.lowering import cpp_blocks  # noqa: F401  (registers the launcher)

pytestmark = pytest.mark.usefixtures("no_fallback")

REFERENCE = pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])


def attend(call: Call, lists: BlockLists, **more: Any) -> tuple[Tensor, Tensor]:
    head = (call.query, *call.state, torch.tensor(call.keys), call.mask, *block_ops.of(lists))
    return ATTEND(*head, *call.rest, **more)  # type: ignore[no-any-return]


def causal(call: Call) -> Tensor:
    return blocks.possible(call.queries, call.keys, call.block).expand(call.lists.keep().shape)


@pytest.mark.one_in(5, rest="exhaustive")
@pytest.mark.parametrize("room", [0, 1, 2])
@pytest.mark.parametrize("name", CALLS)
def test_rows_that_overflow_are_dense(name: str, room: int) -> None:
    """A row of the lists is what was chosen if it fits, and everything if not, each head and entry for itself."""
    call = Call(**{"block": 64, **CALLS[name]})
    keep = call.lists.keep()
    full = None if call.lists.full_kv_num_blocks is None else blocks.whole(call.queries, call.keys, call.block)
    narrow = blocks.lists(keep, full, call.block, room)
    assert narrow.kv_indices.shape[-1] == room
    parts = [keep] if full is None else [keep & ~full, keep & full]
    over = torch.stack([(part.sum(-1) > room) for part in parts]).any(0)
    assert torch.equal(narrow.overflowed(), over)
    assert over.any() or room == 2
    expected = torch.where(over[..., None], causal(call), keep)
    assert torch.equal(narrow.keep(keep.shape[-1]) & causal(call), expected)
    wide = blocks.lists(expected, None, call.block)
    wanted = attend(call, wide)
    # The same tiles in the same order, tested or not.
    for ours, theirs in zip(attend(call, narrow), wanted, strict=True):
        assert torch.equal(ours, theirs)
    with ops.reference_only():
        for ours, theirs in zip(attend(call, narrow), attend(call, wide), strict=True):
            assert torch.equal(ours, theirs)


def test_a_list_that_just_fits_is_no_overflow() -> None:
    call = Call(4, 2, 300, 300, (64, 64), KVForm(16, 16), 64)
    keep = call.lists.keep()
    room = int(keep.sum(-1).max())
    narrow = blocks.lists(keep, None, 64, room)
    assert not narrow.overflowed().any()
    for ours, wanted in zip(attend(call, narrow), attend(call, blocks.lists(keep, None, 64)), strict=True):
        assert torch.equal(ours, wanted)


def test_what_is_tested_stays_tested() -> None:
    """A row that overflows obeys what its blocks are tested by: a mask of pairs, and ranges."""
    call = Call(6, 2, 300, 300, (64, 64), KVForm(16, 16), 64, batch=1)
    call.rest = (*call.rest[:2], False, -1)
    mask = torch.rand(1, 6, 300, 300) < 0.3
    some, every = blocks.of_mask(mask, 64)
    wanted = attend(call, blocks.lists(some, every, 64), allowed=mask)
    found = attend(call, blocks.lists(some, every, 64, 1), allowed=mask)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


@REFERENCE
def test_columns_beside_a_list_that_overflows_count_once(reference: bool) -> None:
    call = Call(4, 2, 300, 300, (64, 64), KVForm(16, 16), 64)
    own = blocks.own(300, 300, 64).expand(2, 4, -1, -1).clone()
    own[:, 1, 3, 0] = True  # the one list that does not fit
    before = torch.arange(300) < torch.arange(5)[:, None] * 64
    before = before.expand(2, 4, -1, -1).clone()
    before[:, 1, 3, :64] = False
    made, counts = columns.gathered(torch.arange(300), before)
    more: dict[str, Any] = {"columns": made, "column_counts": counts}
    with ops.reference_only() if reference else contextlib.nullcontext():
        narrow = blocks.lists(own, None, 64, 1)
        assert narrow.overflowed().nonzero().tolist() == [[0, 1, 3], [1, 1, 3]]
        found, wanted = attend(call, narrow, **more), attend(call, blocks.lists(causal(call), None, 64))
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


@REFERENCE
def test_counts_that_cannot_be_are_refused(reference: bool) -> None:
    """More blocks than there are were never chosen: that is no overflow."""
    call = Call(4, 2, 300, 300, (64, 64), KVForm(16, 16), 64)
    narrow = blocks.lists(call.lists.keep(), None, 64, 2)
    with ops.reference_only() if reference else contextlib.nullcontext():
        for count in (6, -1):
            narrow.kv_num_blocks[0, 0, 0] = count
            with pytest.raises(BlockError, match="not there"):
                attend(call, narrow)
        narrow.kv_num_blocks[0, 0, 0] = 5
        attend(call, narrow)


def test_lists_of_less_room_in_a_compiled_graph() -> None:
    """No shape depends on data: building and attending are one graph."""
    call = Call(4, 2, 300, 300, (64, 64), KVForm(16, 16), 64)
    keep = call.lists.keep()

    def step(keep: Tensor) -> tuple[Tensor, Tensor]:
        return attend(call, blocks.lists(keep, None, 64, 2))

    for ours, wanted in zip(torch.compile(step, fullgraph=True, backend="aot_eager")(keep), step(keep), strict=True):
        assert torch.equal(ours, wanted)
    args = (call.query, *call.state, torch.tensor(300), None, *block_ops.of(blocks.lists(keep, None, 64, 2)))
    torch.library.opcheck(ATTEND, (*args, *call.rest))
