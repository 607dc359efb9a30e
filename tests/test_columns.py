"""Single keys besides blocks, and keys at other positions than their slots: operator, kernel, and refusals."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from effcompile import lowering
from effcompile.kernels import block_ops, blocks, columns, ops
from effcompile.kernels.blocks import BlockError
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import Predicate, Program
from effcompile.lowering import cpp

ATTEND = torch.ops.effcompile.attend_blocks.default
pytestmark = pytest.mark.usefixtures("no_fallback")


def test_gathered_and_listed_are_inverse() -> None:
    keep = torch.rand(2, 3, 4, 50) < torch.rand(2, 3, 4, 1)
    made, counts = columns.gathered(torch.arange(50), keep)
    for row, found, count in zip(keep.flatten(0, 2), made.flatten(0, 2), counts.flatten(), strict=True):
        assert found[:count].tolist() == row.nonzero().flatten().tolist()
    made = torch.where(torch.arange(50) < counts[..., None], made, 10**6)  # what lies behind is not read
    assert torch.equal(columns.listed(made, counts, 50), keep)


@dataclasses.dataclass
class Call:
    """Random blocks with the diagonal, and random columns beside them or keys in another order."""

    heads: int
    groups: int
    queries: int
    keys: int
    size: int
    block: int = 64
    span: int = 1
    dtype: torch.dtype = torch.float32
    pad: bool = False
    window: int = -1
    shared: bool = False
    permuted: bool = False

    def __post_init__(self) -> None:
        batch, count = 2, self.keys
        self.query = torch.randn(batch, self.queries, self.heads, self.size).to(self.dtype).transpose(1, 2)
        self.key, self.value = (torch.randn(batch, self.groups, count, self.size).to(self.dtype) for _ in range(2))
        self.mask = None
        if self.pad:
            self.mask = torch.ones(batch, count, dtype=torch.bool)
            self.mask[0, : count // 3] = False
            self.mask[1, 5] = False
        lead = (1, 1) if self.shared else (batch, self.heads)
        rows, wide = blocks.count_blocks(self.queries, self.block), blocks.count_blocks(count, self.block)
        keep = torch.rand(*lead, rows, wide) < 0.3
        keep = (keep | blocks.own(self.queries, count, self.block)) & blocks.possible(self.queries, count, self.block)
        full = None if self.pad or self.window >= 0 else blocks.whole(self.queries, count, self.block)
        self.extra: dict[str, Any] = {}
        visible = torch.arange(count) <= torch.arange(count - self.queries, count)[:, None]
        if self.window >= 0:
            visible &= torch.arange(count) > torch.arange(count - self.queries, count)[:, None] - self.window
        seen = visible if self.mask is None else visible & self.mask[:, None, None]
        if self.permuted:
            # Any order within each four blocks of keys, which every query of these visits.
            run = 4 * self.block
            order = torch.stack([torch.randperm(count) for _ in range(lead[0] * (1 if self.shared else self.groups))])
            order = order.gather(1, (order // run).argsort(dim=1, stable=True)).view(lead[0], -1, count)
            self.extra = {"key_positions": order}
            own = torch.arange(wide) // 4 == (torch.arange(rows) * self.block + count - self.queries)[:, None] // run
            keep, full = keep | own, None if full is None else full & ~own
            wide_order = order.expand(batch, self.groups, -1).repeat_interleave(self.heads // self.groups, 1)
            shape = (batch, self.heads, self.queries, count)
            seen = seen.expand(shape).gather(3, wide_order[:, :, None].expand(shape))
            self.seen = blocks.tokens(keep, self.queries, count, self.block) & seen
        else:
            taken = blocks.tokens(keep, self.queries, count, self.block)
            lists = blocks.count_blocks(rows, self.span)
            run = self.span * self.block
            # Random keys, also later ones than some of the queries, but in no block that a query of the run visits.
            free = torch.stack([~taken[:, :, r * run : (r + 1) * run].any(2) for r in range(lists)], 2)
            chosen = (torch.rand(*lead, lists, count) < 0.4) & free
            made, counts = columns.gathered(torch.arange(count), chosen)
            # What lies behind a count is not read.
            made = torch.where(torch.arange(count) < counts[..., None], made, -7)
            self.extra = {"columns": made, "column_counts": counts, "span": self.span}
            self.seen = (taken | chosen.repeat_interleave(run, 2)[:, :, : self.queries]) & seen
        self.lists = blocks.lists(keep, full, self.block)
        self.form = KVForm(16, 16)

    def attend(self) -> tuple[Tensor, Tensor]:
        args = (self.query, self.key, None, None, self.value, None, None, torch.tensor(self.keys), self.mask)
        rest = (self.form.name, self.size**-0.5, True, self.window)
        return ATTEND(*args, *block_ops.of(self.lists), *rest, **self.extra)  # type: ignore[no-any-return]


CALLS: dict[str, dict[str, Any]] = {
    "runs of three, cut": {"heads": 4, "groups": 2, "queries": 321, "keys": 500, "size": 64, "span": 3, "block": 32},
    "padding, bf16": {
        "heads": 7, "groups": 1, "queries": 450, "keys": 450, "size": 64, "span": 2, "pad": True,
        "dtype": torch.bfloat16,
    },
    "window, one list for all": {
        "heads": 2, "groups": 2, "queries": 401, "keys": 401, "size": 24, "window": 150, "shared": True,
    },
    "permuted": {"heads": 4, "groups": 2, "queries": 500, "keys": 500, "size": 64, "permuted": True},
    "permuted, padding, fp16, chunk": {
        "heads": 4, "groups": 4, "queries": 320, "keys": 512, "size": 80, "permuted": True, "pad": True,
        "dtype": torch.float16, "block": 32,
    },
    "permuted, window, one order for all": {
        "heads": 2, "groups": 2, "queries": 401, "keys": 401, "size": 40, "window": 150, "permuted": True,
        "shared": True,
    },
}  # fmt: skip
SLOW = {"window, one list for all", "permuted, window, one order for all"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CALLS])
def test_kernel_and_reference_and_fp64(name: str) -> None:
    call = Call(**CALLS[name])
    out, lse = call.attend()
    with ops.reference_only():
        reference, reference_lse = call.attend()
    ratio = call.heads // call.groups
    key, value = (x.double().repeat_interleave(ratio, 1) for x in (call.key, call.value))
    scores = (call.query.double() @ key.mT * call.size**-0.5).masked_fill(~call.seen, -torch.inf)
    truth, truth_lse = scores.softmax(-1).nan_to_num(0) @ value, scores.logsumexp(-1)
    visible = call.seen.any(-1).expand(truth_lse.shape)
    assert torch.equal(lse.isfinite(), visible)
    assert torch.equal(reference_lse.isfinite(), visible)
    assert not out[~visible].any()
    # The reference works in fp32 on operands of the dtype: a rounding of the result, and of sums of fp32.
    for theirs, exact in ((reference, truth), (reference_lse[visible], truth_lse[visible])):
        roundings = torch.finfo(theirs.dtype).eps + 16 * torch.finfo(torch.float32).eps
        assert (theirs.double() - exact).abs().max() <= roundings * exact.abs().max()
    for ours, theirs, exact in ((out, reference, truth), (lse[visible], reference_lse[visible], truth_lse[visible])):
        lost = (theirs.double() - exact).abs().max()
        # Twice what the reference loses, and two roundings of the largest value.
        budget = 2 * lost + torch.finfo(ours.dtype).eps * exact.abs().max()
        assert (ours.double() - exact).abs().max() <= budget


@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
def test_columns_that_do_not_fit_are_refused(reference: bool) -> None:
    call = Call(4, 2, 300, 300, 64)
    good = dict(call.extra)
    counts = good["column_counts"]
    row = int(counts[0, 0].argmax())
    most = int(counts[0, 0, row])

    def with_columns(*changes: tuple[int, int]) -> dict[str, Any]:
        made = good["columns"].clone()
        for place, number in changes:
            made[0, 0, row, place] = number
        return {**good, "columns": made}

    first = int(good["columns"][0, 0, row, 0])
    own = row * 64
    wrong = {
        "columns": with_columns((most - 1, 300)),  # behind the last key
        "not there|do not ascend": with_columns((0, -1)),
        "ascend": with_columns((1, first)),  # one twice
        "visited": {**with_columns((0, own)), "column_counts": counts.clamp(max=1)},  # its own block
        "not 5 lists": {**good, "span": 2},
        "int32": {**good, "columns": good["columns"].long()},
        "with their counts": {**good, "column_counts": None},
        "not together": {**good, "key_positions": torch.arange(300)[None, None]},
        "for blocks alone": {**good, "allowed": torch.ones(1, 1, 300, 300, dtype=torch.bool)},
    }
    context = ops.reference_only() if reference else contextlib.nullcontext()
    with context:
        call.attend()
        for said, extra in wrong.items():
            call.extra = {k: v for k, v in extra.items() if v is not None}
            said = "not 3 lists" if said == "not 5 lists" else said
            with pytest.raises(BlockError, match=said):
                call.attend()


@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
@pytest.mark.parametrize(
    ("positions", "said"),
    [
        (torch.arange(1, 301)[None, None], "from 1 to 300; there are 300"),
        (torch.arange(299)[None, None], "expected whole numbers"),
        (torch.arange(300)[None, None].float(), "expected whole numbers"),
        (torch.arange(300).expand(1, 3, -1), r"\[2 or 1, 2 or 1, 300\]"),
    ],
)
def test_positions_that_do_not_fit_are_refused(positions: Tensor, said: str, reference: bool) -> None:
    call = Call(4, 2, 300, 300, 64, permuted=True)
    call.extra = {"key_positions": positions}
    with ops.reference_only() if reference else contextlib.nullcontext(), pytest.raises(BlockError, match=said):
        call.attend()


def test_every_key_in_single_columns_is_dense_attention() -> None:
    """The diagonal in blocks, everything before it key by key: each pair counts once."""
    call = Call(4, 2, 333, 333, 64)
    own = blocks.own(333, 333, 64)
    call.lists = blocks.lists(own[None, None], None, 64)
    before = torch.arange(333) < torch.arange(6)[:, None] * 64
    made, counts = columns.gathered(torch.arange(333), before[None, None])
    call.extra = {"columns": made, "column_counts": counts}
    wanted = torch.nn.functional.scaled_dot_product_attention(
        call.query, call.key, call.value, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(call.attend()[0], wanted, rtol=0, atol=2e-6)


def test_what_no_kernel_serves() -> None:
    program = Program("prefill", KVForm(4, 4), Predicate(), torch.float32, 2, 64, 64, blocks=True, columns=True)
    assert "can be gathered" in str(cpp.refusal(program))
    moved = dataclasses.replace(program, columns=False, positions=True)
    assert cpp.refusal(moved) is None
    for served in (moved, dataclasses.replace(program, form=KVForm(16, 16))):
        assert lowering.refusal(served, "cpu") is None


def test_programs_without_these_parts_are_as_they_were() -> None:
    plain = Program("prefill", KVForm(16, 16), Predicate(), torch.float32, 2, 64, 64, blocks=True)
    assert plain.name == "attend_blocks_k16v16g32r128_d64_h2_f32_causal"
    assert "struct P {" in cpp.source(plain)
    for part, tag in (("columns", "gathered_columns"), ("positions", "key_positions")):
        changed = dataclasses.replace(plain, **{part: True})  # type: ignore[arg-type]
        assert changed.name == f"attend_blocks_{part[:3]}_k16v16g32r128_d64_h2_f32_causal"
        assert cpp.source(changed).replace(changed.name, plain.name).replace(f" : ec::{tag} ", " ") == cpp.source(plain)


@pytest.mark.parametrize("permuted", [False, True])
def test_operators_keep_torchs_contract(permuted: bool) -> None:
    call = Call(4, 2, 150, 150, 64, permuted=permuted)
    args = (call.query, call.key, None, None, call.value, None, None, torch.tensor(150), None)
    rest = (*block_ops.of(call.lists), call.form.name, 0.125, True, -1)
    torch.library.opcheck(ATTEND, (*args, *rest), call.extra)
