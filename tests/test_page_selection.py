"""The C++ kernels that rank pages, against their reference bodies: attention that weighs them, bounds, the choice."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
from cpp_calls import assert_within_budget, bits, poisoned
from test_pages import DENSE, Paged, program
from torch import Tensor

from effcompile.kernels import ops, pages
from effcompile.kernels.block_ops import method_text
from effcompile.kernels.blocks import BlockError, count_blocks
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import Program
from effcompile.lowering import cpp_pages  # noqa: F401  (registers the launchers)
from effcompile.passes.delta import Delta
from effcompile.passes.paged_decode import PagedDecode
from effcompile.passes.quest import Quest

MASS = torch.ops.effcompile.attend_mass.default
SELECT = torch.ops.effcompile.select_pages.default

pytestmark = pytest.mark.usefixtures("no_fallback")


class Chosen(Paged):
    """One query on a store, and the ways in which pages are ranked for it."""

    def __post_init__(self) -> None:
        with ops.reference_only():  # kernels that append are another file's
            super().__post_init__()

    def attend_mass(self, page: int) -> tuple[Tensor, Tensor, Tensor]:
        p = self.program
        length = torch.tensor(self.length)
        return MASS(self.query, *self.state, length, self.mask, page, p.form.name, self.scale)  # type: ignore[no-any-return]

    def exact_mass(self, page: int) -> Tensor:
        """In fp64, by loops over entries and pages."""
        keys, _ = ops.split_state(tuple(self.state))
        from stores import dequantised

        key = dequantised(keys, self.length, self.program.form, "key").repeat_interleave(self.program.ratio, 1)
        scores = (self.query.double() @ key.mT)[:, :, 0] * self.scale
        if self.mask is not None:
            scores = scores.masked_fill(~self.mask[:, None, : self.length], -torch.inf)
        best = scores.softmax(-1).nan_to_num(0).amax(1)
        capacity = (self.length // self.program.form.group + 2) * self.program.form.group
        total = count_blocks(capacity, page)
        made = torch.zeros(self.batch, 1, total, dtype=torch.float64)
        for b in range(self.batch):
            for p in range(count_blocks(self.length, page)):
                made[b, 0, p] = best[b, p * page : (p + 1) * page].sum()
        return made

    def select(self, method: PagedDecode, **found: Tensor) -> tuple[Tensor, Tensor]:
        method = method.for_store(self.program.form)
        text = method_text(method.name, dataclasses.asdict(method))
        args = (self.query, *self.state[:3], torch.tensor(self.length), self.mask, text, self.program.form.name)
        return SELECT(*args, self.scale, **found)  # type: ignore[no-any-return]

    def worth(self, method: PagedDecode, **found: Tensor) -> Tensor:
        method = method.for_store(self.program.form)
        keys, _ = ops.split_state(tuple(self.state))
        form, length = self.program.form, torch.tensor(self.length)
        return method.scores(pages.Step(self.query, keys, length, self.mask, form, self.scale, **found))


def listed(made: tuple[Tensor, Tensor]) -> list[list[int]]:
    """The lists, one after the other, without what lies behind the counts."""
    return [row[:n].tolist() for row, n in zip(made[0].flatten(0, 1), made[1].flatten())]


def assert_best(made: tuple[Tensor, Tensor], worth: Tensor, budget: int) -> None:
    """Ascending, as many as there are up to the budget, and none left out that is clearly worth more than one taken."""
    slack = 1e-4
    for row, pages_of in zip(worth.flatten(0, 1), listed(made), strict=True):
        there = (row > -torch.inf).sum().item()
        assert pages_of == sorted(set(pages_of))
        assert len(pages_of) == min(there, budget)
        taken = torch.zeros_like(row, dtype=torch.bool)
        taken[pages_of] = True
        assert not (row[taken] == -torch.inf).any()
        if (~taken & (row > -torch.inf)).any():
            assert row[taken].min() >= row[~taken].max() - slack


WEIGHED: dict[str, tuple[Program, int, int]] = {
    "dense": (program(DENSE), 500, 16),
    "dense, padding": (program(DENSE, pad=True), 487, 32),
    "dense, bf16, one head a group": (program(DENSE, ratio=1, dtype=torch.bfloat16, sizes=(80, 96)), 333, 48),
    "4 bits, padding": (program(KVForm(4, 4), pad=True), 611, 64),
    "one token": (program(KVForm(8, 4, 16, 0), ratio=7, dtype=torch.bfloat16), 1, 16),
    "keys per token, long": (program(KVForm(3, 2, 32, 32, key_axis="token"), ratio=4), 5001, 32),
}


@pytest.mark.one_in(2, rest="exhaustive")
@pytest.mark.parametrize("name", WEIGHED)
def test_attention_that_weighs_pages(name: str) -> None:
    """Its output is that of decoding, and the mass that of fp64, within twice what the reference body loses."""
    made, length, page = WEIGHED[name]
    call = Chosen(made, length, 1)
    out, lse, mass = call.attend_mass(page)
    with ops.reference_only():
        reference, reference_lse, reference_mass = call.attend_mass(page)
    truth = call.exact(torch.ones(2, 2, length, dtype=torch.bool))
    assert_within_budget(out, reference, truth[0], name)
    query, key = call.query.float().abs().unflatten(1, (call.groups, -1)), call.key.float().abs().unsqueeze(2)
    summed = float((query @ key.mT).max()) * call.scale
    assert_within_budget(lse, reference_lse, truth[1], f"lse of {name}", roundings=2, summed=summed)
    # A score is off by what its sum loses, and a weight by as much of itself; a page has a mass of up to H.
    heads = call.query.shape[1]
    assert_within_budget(
        mass, reference_mass, call.exact_mass(page), f"mass of {name}", roundings=4, summed=summed * heads
    )
    assert not mass[:, :, count_blocks(length, page) :].any()
    with ops.reference_only():
        assert torch.equal(call.attend()[0], reference)


def test_a_key_that_is_not_a_number_makes_its_row_unknown() -> None:
    call = Chosen(program(DENSE), 300, 1)
    assert call.state[0] is not None
    call.state[0][0, 0, 40, 3] = torch.nan
    for reference in (False, True):
        if reference:
            with ops.reference_only():
                mass = call.attend_mass(16)[2]
        else:
            mass = call.attend_mass(16)[2]
        assert mass[0, :, :18].isnan().all()
        assert mass[1].isfinite().all()
    assert listed(call.select(Delta(token_budget=96, recency=32), mass=mass))[0] == [0, 1, 2, 3, 17, 18]


FORMS = [KVForm(4, 4), KVForm(3, 2, 32, 0)]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("length", [1, 31, 200, 501, 1024])
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("radius", [0.5, 1])
def test_pages_of_the_largest_bounds(form: KVForm, length: int, pad: bool, radius: float) -> None:
    call = Chosen(program(form, ratio=3, pad=pad), length, 1)
    for page in (form.group, 3 * form.group):
        method = Quest(token_budget=5 * page + form.slots, page_size=page, radius=radius)
        found = call.select(method)
        assert_best(found, call.worth(method), method.for_store(form).count)


@pytest.mark.parametrize(("ratio", "dtype"), [(1, torch.bfloat16), (4, torch.float16)], ids=str)
def test_bounds_in_other_dtypes_and_head_sizes(ratio: int, dtype: Any) -> None:
    call = Chosen(program(KVForm(8, 8, 16, 16), ratio=ratio, dtype=dtype, sizes=(80, 64)), 700, 1)
    method = Quest(token_budget=160)
    assert_best(call.select(method), call.worth(method), 10)


@pytest.mark.parametrize("radius", [0.25, 1])
def test_what_has_no_bound_is_taken_first(radius: float) -> None:
    """Behind what is always taken, as in the reference body; and a bound of a NaN spoils its own page alone."""
    call = Chosen(program(KVForm(4, 4)), 1000, 1)
    assert call.state[1] is not None
    call.state[1][0, 1, 2, 0, 5] = torch.nan
    call.state[1][1, 0, 9, 1, 3] = torch.inf
    method = Quest(token_budget=8 * 32, radius=radius)
    found = listed(call.select(method))
    with ops.reference_only():
        assert found == listed(call.select(method))
    assert 2 in found[1]
    assert 9 in found[2]


@pytest.mark.parametrize("length", [1, 40, 501, 3000])
@pytest.mark.parametrize("pad", [False, True])
def test_pages_of_the_largest_mass(length: int, pad: bool) -> None:
    """The same lists as the reference body's: both read one mass. With ties, and more pages than there are."""
    call = Chosen(program(DENSE, pad=pad), length, 1)
    mass = call.attend_mass(16)[2]
    for given in (mass, (mass * 1e3).round(), torch.zeros_like(mass), torch.full_like(mass, torch.nan)):
        for budget, recency in ((128, 32), (1024, 128), (16, 16)):
            method = Delta(token_budget=budget, recency=recency)
            found = call.select(method, mass=given)
            with ops.reference_only():
                wanted = call.select(method, mass=given)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_rows_that_see_nothing_list_nothing() -> None:
    call = Chosen(program(DENSE, pad=True), 300, 1)
    assert call.mask is not None
    call.mask[0] = False
    out, lse, mass = call.attend_mass(16)
    assert not out[0].any()
    assert (lse[0] == -torch.inf).all()
    assert not mass[0].any()
    counts = call.select(Delta(token_budget=64, recency=16), mass=mass)[1]
    assert counts.tolist() == [[0], [4]]


def test_nothing_behind_the_length_is_read() -> None:
    """A store with NaN behind its length: scores of an earlier, longer call stay in the kernel's memory."""
    longer = Chosen(program(DENSE), 900, 1)
    longer.attend_mass(16)
    call = Chosen(program(DENSE), 301, 1)
    assert call.attend_mass(16)[2].isfinite().all()
    first = call.attend_mass(16)
    longer.attend_mass(16)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(first, call.attend_mass(16), strict=True))
    assert poisoned(DENSE, 1, 1, 32, (16, 16), torch.float32)[0].isnan().all()  # type: ignore[union-attr]


def test_many_keys_are_weighed_by_several_threads() -> None:
    call = Chosen(program(KVForm(4, 4)), 6000, 1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = call.attend_mass(32)
        torch.set_num_threads(1)
        one = call.attend_mass(32)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=4e-6)


def test_delta_needs_the_mass() -> None:
    call = Chosen(program(DENSE), 100, 1)
    with pytest.raises(BlockError, match="attend_mass"):
        call.select(Delta(token_budget=64, recency=16))


def test_operators_keep_torchs_contract() -> None:
    call = Chosen(program(KVForm(4, 4), pad=True), 300, 1)
    args = (call.query, *call.state, torch.tensor(300), call.mask, 32, call.program.form.name, call.scale)
    torch.library.opcheck(MASS, args)


@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
def test_the_first_tokens_that_a_query_sees_are_listed(reference: bool) -> None:
    """Whatever their bounds, here the lowest of all."""
    call = Chosen(program(KVForm(8, 8, 16, 16), pad=True), 600, 1)
    call.query.fill_(1)
    assert call.state[1] is not None
    call.state[1][:, :, :, 1] = 1  # zeros of 1
    call.state[1][:, :, [0, 1, 12, 13], 1] = -1  # 12 is the first page that the first row sees
    with ops.reference_only() if reference else contextlib.nullcontext():
        for sink in (0, 16, 17):
            first, second = call.select(Quest(token_budget=192, sink=sink))[0][:, 0]
            assert (first[0] == 12, second[0] == 0) == (sink > 0, sink > 0)
            assert (first[1] == 13, second[1] == 1) == (sink > 16, sink > 16)
