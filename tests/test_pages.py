"""Lists of pages, and attention over them: the C++ kernel against the reference, fp64, and decoding over all keys."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from cpp_calls import ATTEND, Call, assert_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import dequantised
from torch import Tensor

from effcompile.kernels import ops, pages
from effcompile.kernels.blocks import BlockError, count_blocks
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import Predicate, Program
from effcompile.lowering import cpp_pages  # noqa: F401  (registers the launcher)

PAGES = torch.ops.effcompile.attend_pages.default
HEADS = 2

pytestmark = pytest.mark.usefixtures("no_fallback")


def program(form: KVForm, *, ratio: int = 3, dtype: Any = torch.float32, sizes: tuple[int, int] = (64, 64),
            pad: bool = False) -> Program:  # fmt: skip
    return Program("decode", form, Predicate(key_mask=pad), dtype, ratio, *sizes)


class Paged(Call):
    """One query on a store with padding if the program has it, and random lists of pages for each head."""

    def lists(self, page: int, density: float = 0.4, shared: bool = False) -> tuple[Tensor, Tensor]:
        total = count_blocks(self.length, page)
        scores = torch.rand(self.batch, 1 if shared else self.groups, total)
        scores[scores > density] = -torch.inf
        return pages.take(scores, total)

    def attend_pages(self, page: int, lists: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        p = self.program
        return PAGES(  # type: ignore[no-any-return]
            self.query, *self.state, torch.tensor(self.length), self.mask, *lists, page, p.form.name, self.scale
        )

    def listed(self, page: int, lists: tuple[Tensor, Tensor]) -> Tensor:
        """Which tokens the lists name, one by one: bool ``[B, G, S]``."""
        keep = torch.zeros(self.batch, self.groups, self.length, dtype=torch.bool)
        for b in range(self.batch):
            for g in range(self.groups):
                row = lists[0][b, g % lists[0].shape[1]]
                for index in row[: lists[1][b, g % lists[0].shape[1]]].tolist():
                    keep[b, g, index * page : (index + 1) * page] = True
        return keep

    def exact(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of one query to the tokens in ``keep``, in fp64."""
        keys, values = ops.split_state(tuple(self.state))
        form, ratio = self.program.form, self.program.ratio
        k, v = dequantised(keys, self.length, form, "key"), dequantised(values, self.length, form, "value")
        if self.mask is not None:
            keep = keep & self.mask[:, None, : self.length]
        query = self.query.double().unflatten(1, (self.groups, ratio))[:, :, :, 0]
        scores = (query @ k.mT * self.scale).masked_fill(~keep[:, :, None], -torch.inf)
        out = scores.softmax(-1).nan_to_num(0) @ v
        return out.flatten(1, 2)[:, :, None], scores.logsumexp(-1).flatten(1, 2)[:, :, None]


DENSE = KVForm(16, 16)
CASES: dict[str, tuple[Program, int, int, bool]] = {
    "dense, pages of 16": (program(DENSE), 500, 16, False),
    "dense, padding": (program(DENSE, pad=True), 487, 16, False),
    "dense, bf16, one head a group": (program(DENSE, ratio=1, dtype=torch.bfloat16, sizes=(80, 96)), 333, 48, False),
    "4 bits, pages of a group": (program(KVForm(4, 4)), 700, 32, False),
    "4 bits, padding, one list": (program(KVForm(4, 4), pad=True), 611, 64, True),
    "bf16, no residual": (program(KVForm(8, 4, 16, 0), ratio=7, dtype=torch.bfloat16), 321, 16, False),
    "3 and 2 bits, keys per token": (program(KVForm(3, 2, 32, 32, key_axis="token"), ratio=4), 450, 32, False),
    "values packed alone": (program(KVForm(16, "fp8", 32, 64), sizes=(64, 96)), 450, 64, False),
}


@pytest.mark.parametrize("name", CASES)
def test_kernel_and_reference_and_fp64(name: str) -> None:
    made, length, page, shared = CASES[name]
    call = Paged(made, length, 1)
    lists = call.lists(page, shared=shared)
    out, lse = call.attend_pages(page, lists)
    with ops.reference_only():
        reference, reference_lse = call.attend_pages(page, lists)
    truth, truth_lse = call.exact(call.listed(page, lists))
    assert_within_budget(out, reference, truth, name)
    query, key = call.query.float().abs().unflatten(1, (call.groups, -1)), call.key.float().abs().unsqueeze(2)
    summed = float((query @ key.mT).max()) * call.scale
    assert_within_budget(lse, reference_lse, truth_lse, f"lse of {name}", roundings=2, summed=summed)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
def test_a_list_of_all_pages_is_decoding(name: str, reference: bool) -> None:
    """Bit for bit: pages that follow each other are read as one run, and these keys are few enough for one part."""
    made, length, page, _ = CASES[name]
    call = Paged(made, length, 1)
    total = count_blocks(length, page)
    everything = torch.arange(total, dtype=torch.int32).expand(2, HEADS, -1), torch.full((2, HEADS), total).int()
    with ops.reference_only() if reference else contextlib.nullcontext():
        ours, theirs = call.attend_pages(page, everything), call.attend()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_long_lists_are_parts_of_several_threads() -> None:
    call = Paged(program(KVForm(4, 4)), 6000, 1)
    lists = call.lists(32, 0.9)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        out, lse = call.attend_pages(32, lists)
        torch.set_num_threads(1)
        one, one_lse = call.attend_pages(32, lists)
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(lse, one_lse)  # the parts were other ones
    torch.testing.assert_close(out, one, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse, one_lse, rtol=0, atol=4e-6)


@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
def test_every_key_is_counted_once(reference: bool) -> None:
    """Equal scores and values that tell keys apart: the output is each key's share, and an empty list gives 0."""
    length, page = 75, 16
    value = torch.eye(80)[None, None]
    zero = torch.zeros(1, 1, 80, 64)
    for listed in ([0, 1, 2, 3, 4], [1, 4], [4], []):
        tokens = [t for i in listed for t in range(i * page, min(length, (i + 1) * page))]
        padded = torch.tensor([*listed, 10**6])[None, None].int()  # what lies behind a count is not read
        counts = torch.tensor([[len(listed)]]).int()
        with ops.reference_only() if reference else contextlib.nullcontext():
            out, lse = PAGES(zero[:, :, :1], zero, None, None, value, None, None, torch.tensor(length), None, padded,
                             counts, page, DENSE.name, 1.0)  # fmt: skip
        wanted = torch.zeros(80)
        wanted[tokens] = 1 / max(1, len(tokens))
        torch.testing.assert_close(out[0, 0, 0], wanted, rtol=1e-6, atol=0)
        torch.testing.assert_close(lse, torch.tensor([[[len(tokens)]]]).log(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
def test_lists_that_do_not_fit_are_refused(reference: bool) -> None:
    call = Paged(program(DENSE), 100, 1)
    good, counts = torch.arange(4).int().expand(2, HEADS, -1).contiguous(), torch.full((2, HEADS), 4).int()
    for place, number in ((3, 7), (3, 2), (0, -1)):
        bad = good.clone()
        bad[1, 1, place] = number
        with (
            ops.reference_only() if reference else contextlib.nullcontext(),
            pytest.raises(BlockError, match="there are 7"),
        ):
            call.attend_pages(16, (bad, counts))
    for listed, count, text in (
        (good.long(), counts, "int32"),
        (good, counts[:1], "expected"),
        (good.expand(2, 2, -1)[:, :, None], counts, "expected"),
        (good.repeat(1, 2, 1), counts.repeat(1, 2), "2 batch entries and 2 key/value heads"),
        (good, counts + 1, "there are 7"),
    ):
        with (
            ops.reference_only() if reference else contextlib.nullcontext(),
            pytest.raises(BlockError, match=text),
        ):
            call.attend_pages(16, (listed, count))


def test_pages_that_cut_groups_run_the_reference() -> None:
    call = Paged(program(KVForm(4, 4)), 500, 1)
    lists = call.lists(16)
    with pytest.warns(UserWarning, match="do not hold whole groups of 32"):
        out, _ = call.attend_pages(16, lists)
    torch.testing.assert_close(out.double(), call.exact(call.listed(16, lists))[0], rtol=0, atol=5e-6)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 40))
def test_take_is_the_best_few_in_order(seed: int, total: int, count: int) -> None:
    """Against a loop over numbers with many ties, forced pages, absent ones and NaN."""
    torch.manual_seed(seed)
    scores = torch.randint(0, 4, (2, 3, total)).float()
    scores[torch.rand(scores.shape) < 0.2] = -torch.inf
    scores[torch.rand(scores.shape) < 0.1] = torch.inf
    scores[torch.rand(scores.shape) < 0.1] = torch.nan
    made, counts = pages.take(scores, count)
    assert made.shape == (2, 3, min(count, total))
    for row, listed, n in zip(scores.flatten(0, 1).tolist(), made.flatten(0, 1).tolist(), counts.flatten().tolist()):
        there = [i for i, s in enumerate(row) if s != -torch.inf]
        rank = {i: (-1e38 if row[i] != row[i] else -row[i], i) for i in there}
        assert listed[:n] == sorted(sorted(there, key=rank.__getitem__)[:count])


def test_operators_keep_torchs_contract() -> None:
    call = Paged(program(KVForm(4, 4), pad=True), 300, 1)
    lists = call.lists(32)
    args = (call.query, *call.state, torch.tensor(300), call.mask, *lists, 32, call.program.form.name, call.scale)
    torch.library.opcheck(PAGES, args)
    assert ATTEND is not PAGES
