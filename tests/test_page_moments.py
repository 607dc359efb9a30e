"""Moments of keys beside a cache of any form: what they hold, the scores that are made of them, and Quest with them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant
from test_cache_machine import CAPACITY, FORMS, HEADS, MODEL, SIZE, _run
from test_page_bounds import BoundedLives
from test_page_selection import Chosen, assert_best, listed
from test_paged_decode import GREEDY, IDS, generated, llama
from test_pages import program
from torch import Tensor

import effcompile as ec
from effcompile.kernels import ops, pages
from effcompile.kernels.block_ops import method_text
from effcompile.kernels.blocks import BlockError, count_blocks
from effcompile.kernels.form import KVForm
from effcompile.passes import report
from effcompile.passes.quest import Quest

BOUND = torch.ops.effcompile.bound_store.default
SELECT = torch.ops.effcompile.select_pages.default
ASKED = ec.quest(skip_layers=1, rank_by="moments")(copy.deepcopy(MODEL))
PACKED = KVForm(4, 4, 16, 32)
slow = pytest.mark.slow


def close(found: Tensor, units: Tensor) -> None:
    """Mean and deviation ``[..., 2, D]`` of units ``[..., u, D]`` against fp64: one rounding of theirs, and of sums."""
    exact = units.double()
    mean = exact.mean(-2)
    deviation = (exact - mean.unsqueeze(-2)).square().mean(-2).sqrt()
    summed = units.shape[-2] * torch.finfo(torch.float32).eps * exact.abs().amax(-2)
    for ours, truth in zip(found.double().unbind(-2), (mean, deviation), strict=True):
        assert ((ours - truth).abs() <= summed + torch.finfo(found.dtype).eps / 2 * truth.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_moments_of_units(dtype: torch.dtype) -> None:
    """Also of large numbers, whose squares are out of the range of fp16, around a mean that is large beside them."""
    units = (torch.randn(2, 3, 5, 16, 8) * torch.tensor([1e-3, 1, 10, 3000]).repeat(2) + 5 * torch.randn(8)).to(dtype)
    found = pages.summarise(units, "moments")
    assert found.dtype is dtype
    close(found, units)
    assert torch.equal(pages.summarise(units, "bounds"), torch.stack([units.amin(3), units.amax(3)], 3))


class LivesWithMoments(BoundedLives):
    """A cache whose second layer keeps moments, in forms that bound keys and in others."""

    @initialize(
        form=st.sampled_from(FORMS), batch=st.integers(1, 3), prompt=st.integers(0, 300), seed=st.integers(0, 2**31)
    )
    def start(self, form: KVForm, batch: int, prompt: int, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.form, self.batch, self.recording = form, batch, False
        self.cache = ec.Cache(ASKED, CAPACITY, **form.options)
        self.tokens = torch.zeros(batch, HEADS, 0, SIZE)
        self.safe = 0
        self.append(prompt, True)

    @invariant()
    def bounds_are_those_of_the_tokens(self) -> None:
        first, second = self.cache.compressed
        assert first.bounds is None
        unit = 16 if self.form.dense else self.form.group
        if whole := self.length // unit:
            close(second.bounds[:, :, :whole], self.tokens[:, :, : whole * unit].unflatten(2, (whole, unit)) * 2)


def test_lives_of_a_cache_with_moments() -> None:
    _run(LivesWithMoments, 8)


@pytest.mark.exhaustive
def test_many_lives_of_a_cache_with_moments() -> None:
    _run(LivesWithMoments, 1500)


def test_a_cache_that_grows_keeps_its_moments() -> None:
    cache = ec.Cache(ASKED, None, key_bits=4, value_bits=4, group_size=16, residual=32)
    key = torch.randn(1, HEADS, 700, SIZE)
    for part in key.split([500, 1, 199], 2):
        cache.prepare(1, part.shape[2], torch.float32)
        for index in range(2):
            cache.update(part, part, index)
    kept = cache.compressed[1].bounds
    assert kept is not None
    assert kept.shape[2] == cache.capacity // 16 == 64
    close(kept[:, :, :43], key[:, :, : 43 * 16].unflatten(2, (43, 16)))


def with_moments(
    form: KVForm, dtype: torch.dtype, length: int, ratio: int = 3, size: int = 64, pad: bool = False
) -> tuple[Chosen, Tensor]:
    call = Chosen(program(form, ratio=ratio, dtype=dtype, sizes=(size, 64), pad=pad), length, 1)
    unit, capacity = pages.unit_of(form), (length // form.group + 2) * form.group
    kept = torch.full((2, 2, capacity // unit, 2, size), torch.nan, dtype=dtype)
    rows = call.state[0] if call.state[2] is None else call.state[2]
    BOUND(kept, rows, torch.tensor(0), call.key, unit, "moments")
    return call, kept


@pytest.mark.parametrize("form", [KVForm(16, 16), PACKED], ids=str)
@pytest.mark.parametrize("units", [1, 2, 3])
def test_scores_are_mean_and_deviations(form: KVForm, units: int) -> None:
    """By a loop over the keys of each page, in fp64, with the variances of channels as if they were independent."""
    call, kept = with_moments(form, torch.float32, 500)
    page = units * 16
    keys, _ = ops.split_state(tuple(call.state))
    step = pages.Step(call.query, keys, torch.tensor(500), None, form, call.scale, bounds=kept)
    assert int(step.bounded) == 496
    for deviations in (0.0, 1.8):
        found = pages.likely(step, page, deviations)
        assert found.shape == (2, 2, 3, count_blocks(step.capacity, page))
        for b, g, r, p in (
            (b, g, r, p) for b in range(2) for g in range(2) for r in range(3) for p in range(496 // page)
        ):
            q = call.query[b, 3 * g + r, 0].double() * call.scale
            k = call.key[b, g, p * page : (p + 1) * page].double()
            mean = k.sum(0) / page
            variance = ((k - mean) ** 2).sum(0) / page
            wanted = (q * mean).sum() + deviations * (q**2 * variance).sum().sqrt()
            summed = (q.abs() * k.abs().amax(0)).sum()
            assert (found[b, g, r, p] - wanted).abs() <= 1e-6 * (1 + deviations) * summed


KINDS = [
    (KVForm(16, 16, 16, 0), torch.float32, 3, 64),
    (PACKED, torch.float32, 3, 64),
    (KVForm(8, "fp8", 16, 32, "token"), torch.bfloat16, 1, 80),
    (KVForm(4, 4), torch.bfloat16, 4, 64),
]


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.parametrize(("form", "dtype", "ratio", "size"), KINDS, ids=str)
@pytest.mark.parametrize("length", [1, 15, 333, 1024])
def test_pages_of_the_largest_scores(
    form: KVForm, dtype: torch.dtype, ratio: int, size: int, length: int, no_fallback: None
) -> None:
    """What the kernel lists are the best pages of the reference body, with padding, and units that are no page."""
    call, kept = with_moments(form, dtype, length, ratio, size, pad=True)
    for page in (pages.unit_of(form), 3 * pages.unit_of(form)):
        for deviations in (0, 1.8):
            method = Quest(token_budget=7 * page, page_size=page, rank_by="moments", deviations=deviations)
            found = call.select(method, bounds=kept)
            assert_best(found, call.worth(method, bounds=kept), 7)
            # The newest page, whole or not, and the first that the query sees, which padding may have cut.
            padded, others = listed(found)[:2], listed(found)[2:]
            assert all(length // 3 // page == pages_of[0] for pages_of in padded)
            # Of one token the mask hides that from the other row.
            assert all((length - 1) // page in pages_of for pages_of in (padded if length == 1 else padded + others))


@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
def test_deviations_say_how_much_one_key_counts(reference: bool, no_fallback: None) -> None:
    """Of a page whose keys are all a little good and one of 15 bad keys and one very good: 0 takes the first."""
    call, kept = with_moments(KVForm(16, 16, 16, 0), torch.float32, 1000)
    assert call.state[0] is not None
    call.query.zero_()
    call.query[..., 0] = 1
    call.state[0][:, :, :1000] = 0
    call.state[0][:, :, 160:176, 0] = 1
    call.state[0][:, :, 333, 0] = 10
    BOUND(kept, call.state[0], torch.tensor(0), call.state[0][:, :, :1000].clone(), 16, "moments")
    with ops.reference_only() if reference else contextlib.nullcontext():
        for deviations, wanted in ((0, 10), (1.8, 20)):
            method = Quest(token_budget=48, rank_by="moments", deviations=deviations)
            assert listed(call.select(method, bounds=kept)) == [[0, wanted, 62]] * 4


@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
def test_pages_that_cannot_be_ranked_are_kept(reference: bool, no_fallback: None) -> None:
    """And spoil no other page."""
    call, kept = with_moments(PACKED, torch.float32, 1000)
    kept[0, 1, 2, 0, 5] = torch.nan
    kept[1, 0, 9, 1, 3] = torch.inf
    with ops.reference_only() if reference else contextlib.nullcontext():
        found = listed(call.select(Quest(token_budget=160, rank_by="moments"), bounds=kept))
    assert 2 in found[1]
    assert 9 in found[2]
    assert all(len(pages_of) == 10 for pages_of in found)


def test_operators_keep_torchs_contract() -> None:
    kept, rows, key = torch.zeros(2, 1, 4, 2, 8), torch.randn(2, 1, 64, 8), torch.randn(2, 1, 20, 8)
    torch.library.opcheck(BOUND, (kept, rows, torch.tensor(30), key, 16, "moments"))
    with pytest.raises(BlockError, match="expected one of bounds, moments"):
        BOUND(kept, rows, torch.tensor(30), key, 16, "median")
    call, kept = with_moments(PACKED, torch.float32, 300)
    text = method_text("quest", dataclasses.asdict(Quest(token_budget=128, page_size=16, rank_by="moments")))
    args = (call.query, *call.state[:3], torch.tensor(300), None, text, PACKED.name, 0.2)
    torch.library.opcheck(SELECT, args, {"bounds": kept})
    with pytest.raises(BlockError, match="by moments of their keys, and none are given"):
        SELECT(*args)


# Models.

MOMENTS: dict[str, Any] = {"rank_by": "moments", "min_length": 0, "skip_layers": 1}


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.parametrize(
    "cache",
    [
        pytest.param({"key_bits": 8, "group_size": 16}, marks=slow),
        pytest.param({"key_bits": 16, "value_bits": 16}, marks=slow),
        pytest.param({"key_bits": 4, "rope": "pre"}, marks=slow),
    ],
    ids=str,
)
def test_a_model_decodes_over_pages(cache: dict[str, Any], no_inductor: Any, no_fallback: None) -> None:
    """With a budget for all tokens it is the model; with less, the lists are made of the moments."""
    wanted, _ = generated(ec.compress_kv(residual=32, **cache), layers=2)
    report._graphs.clear()  # a graph of that model that is still alive would count as one of the next
    found, decided = generated(ec.quest(token_budget=384, **MOMENTS), ec.compress_kv(residual=32, **cache), layers=2)
    assert [d.form.split("_")[0] for d in decided if d.form] == ["attend", "quest"]
    assert torch.equal(found.sequences, wanted.sequences)
    for ours, theirs in zip(found.logits, wanted.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    some, _ = generated(ec.quest(token_budget=128, **MOMENTS), ec.compress_kv(residual=32, **cache), layers=2)
    assert (some.logits[1] - wanted.logits[1]).abs().max() > 1e-3


def test_the_deepest_decides_what_a_layer_keeps() -> None:
    model = llama(layers=4)
    ec.quest(skip_layers=1)(model)
    ec.quest(skip_layers=0, rank_by="moments")(model.model.layers[2])
    dense = {"key_bits": 16, "value_bits": 16}
    assert [layer.kept for layer in ec.Cache(model, **dense).compressed] == [None, "bounds", "moments", "bounds"]
    # Groups of 4 bits bound their keys, and nothing tells their moments.
    assert [layer.kept for layer in ec.Cache(model, key_bits=4).compressed] == [None, None, "moments", None]
    ec.quest(skip_layers=1, rank_by="moments")(model)
    assert [layer.kept for layer in ec.Cache(model, key_bits=4).compressed] == [None, "moments", "moments", "moments"]


@pytest.mark.parametrize(
    ("bits", "before", "after", "reason"),
    [
        (4, None, "moments", "ec.quest(rank_by='moments')(model); this one was not. delta"),
        (16, "bounds", "moments", "this one was not, and holds bounds instead"),
        (16, "moments", "bounds", "ec.quest()(model); this one was not, and holds moments instead"),
        (4, "moments", "bounds", ""),  # which its groups have
    ],
)
def test_a_cache_that_keeps_something_else(bits: int, before: Any, after: Any, reason: str, no_inductor: Any) -> None:
    model = llama(layers=1)
    if before:
        ec.quest(skip_layers=0, rank_by=before)(model)
    cache = ec.Cache(model, 512, key_bits=bits, value_bits=16, residual=32)
    ec.quest(token_budget=256, min_length=0, skip_layers=0, rank_by=after)(model)
    model.compile(backend="effcompile")
    with torch.no_grad():
        model.generate(IDS, **{**GREEDY, "max_new_tokens": 2}, past_key_values=cache)
    decided = [d for d in ec.inspect(model).decisions if dict(d.sizes)["T"] == 1]
    if not reason:
        assert [d.form.split("_")[0] for d in decided if d.form] == ["quest"]
        return
    (text,) = {d.reason.text for d in decided if d.reason and d.reason.code == f"no-page-{after}"}
    assert reason in text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank_by": "mean"}, "takes 'bounds' | 'moments'"),
        ({"deviations": -0.1}, "a finite number, 0 or more"),
        ({"deviations": float("inf")}, "a finite number, 0 or more"),
        ({"deviations": float("nan")}, "a finite number, 0 or more"),
    ],
)
def test_options_that_cannot_be_are_refused(options: Any, text: str) -> None:
    with pytest.raises(ec.OptionError) as raised:
        ec.quest(**options)
    assert text in str(raised.value)
