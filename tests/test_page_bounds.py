"""Bounds of keys beside a cache that does not bound them itself: what they hold, and Quest with them."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant
from test_cache_machine import CAPACITY, HEADS, MODEL, SIZE, Lives, _run
from test_page_selection import Chosen, assert_best, listed
from test_paged_decode import GREEDY, IDS, RATIO, Step, generated, llama
from test_pages import program

import effcompile as ec
from effcompile.kernels import ops, pages
from effcompile.kernels.form import KVForm
from effcompile.passes import report
from effcompile.passes.quest import Quest

BOUND = torch.ops.effcompile.bound_store.default
UNBOUNDED = [
    KVForm(16, 16, 16, 0),
    KVForm(16, 8, 32, 32, "channel", "channel"),
    KVForm(8, "fp8", 16, 32, "token"),
    KVForm("fp8", 2, 16, 0),
]
ASKED = ec.quest(skip_layers=1)(copy.deepcopy(MODEL))


class BoundedLives(Lives):
    """A cache whose second layer keeps bounds, through all that can happen to it."""

    @initialize(
        form=st.sampled_from(UNBOUNDED), batch=st.integers(1, 3), prompt=st.integers(0, 300), seed=st.integers(0, 2**31)
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
        if not self.length:
            return
        unit = 16 if self.form.dense else self.form.group
        for n in range(self.length // unit):
            keys = self.tokens[:, :, n * unit : (n + 1) * unit] * 2
            assert torch.equal(second.bounds[:, :, n, 0], keys.amin(2))
            assert torch.equal(second.bounds[:, :, n, 1], keys.amax(2))

    @invariant()
    def bytes_are_those_that_are_allocated(self) -> None:
        first, second = self.cache.compressed
        if first.is_initialized:
            unit = 16 if self.form.dense else self.form.group
            shape = second.shape
            assert sum(b.nbytes for b in second.buffers()) - sum(b.nbytes for b in first.buffers()) == (
                4 * shape[0] * HEADS * self.cache.capacity // unit * 2 * SIZE
            )


def test_lives_of_a_cache_with_bounds() -> None:
    _run(BoundedLives, 40)


@pytest.mark.exhaustive
def test_many_lives_of_a_cache_with_bounds() -> None:
    _run(BoundedLives, 600)


def test_a_cache_that_grows_keeps_its_bounds() -> None:
    cache = ec.Cache(ASKED, None, key_bits=16, value_bits=16)
    key = torch.randn(1, HEADS, 700, SIZE)
    for part in key.split([500, 1, 199], 2):
        cache.prepare(1, part.shape[2], torch.float32)
        for index in range(2):
            cache.update(part, part, index)
    bounds = cache.compressed[1].bounds
    assert bounds is not None
    assert bounds.shape[2] == cache.capacity // 16 == 64
    units = key[:, :, : 43 * 16].unflatten(2, (43, 16))
    assert torch.equal(bounds[:, :, :43, 0], units.amin(3))
    assert torch.equal(bounds[:, :, :43, 1], units.amax(3))


def test_only_the_layers_that_ask_keep_bounds() -> None:
    model = llama(layers=4)
    ec.quest(skip_layers=0)(model.model.layers[1])
    ec.quest(skip_layers=2)(model.model.layers[3].self_attn)
    dense = {"key_bits": 16, "value_bits": 16}
    assert [bool(layer.kept) for layer in ec.Cache(model, **dense).compressed] == [False, True, False, True]
    assert not any(layer.kept for layer in ec.Cache(model, key_bits=4).compressed)  # whose scales bound its keys
    ec.quest(skip_layers=2)(model)
    assert [bool(layer.kept) for layer in ec.Cache(model, **dense).compressed] == [False, True, True, True]
    ec.remove(model)
    assert not any(layer.kept for layer in ec.Cache(model, **dense).compressed)


def with_bounds(form: KVForm, dtype: torch.dtype, length: int, ratio: int = 3) -> tuple[Chosen, torch.Tensor]:
    call = Chosen(program(form, ratio=ratio, dtype=dtype), length, 1)
    unit = pages.unit_of(form)
    capacity = (length // form.group + 2) * form.group
    bounds = torch.full((2, 2, capacity // unit, 2, 64), torch.nan, dtype=dtype)
    rows = call.state[0] if call.state[2] is None else call.state[2]
    BOUND(bounds, rows, torch.tensor(0), call.key, unit, "bounds")
    return call, bounds


slow = pytest.mark.slow
KINDS = [(UNBOUNDED[0], torch.float32), (UNBOUNDED[2], torch.bfloat16)]
MORE = [(form, dtype) for form in UNBOUNDED for dtype in (torch.float32, torch.bfloat16) if (form, dtype) not in KINDS]


@pytest.mark.parametrize(("form", "dtype"), [*KINDS, *(pytest.param(*kind, marks=slow) for kind in MORE)], ids=str)
@pytest.mark.parametrize("length", [1, 15, 333, 1024])
def test_pages_of_the_largest_bounds(form: KVForm, dtype: torch.dtype, length: int, no_fallback: None) -> None:
    call, bounds = with_bounds(form, dtype, length)
    for page in (pages.unit_of(form), 3 * pages.unit_of(form)):
        method = Quest(token_budget=7 * page, page_size=page)
        found = call.select(method, bounds=bounds)
        assert_best(found, call.worth(method, bounds=bounds), 7)
        assert all((length - 1) // page in pages_of for pages_of in listed(found))


def test_no_key_scores_more_than_its_bound() -> None:
    call, bounds = with_bounds(KVForm(16, 16), torch.float32, 500)
    keys, _ = ops.split_state(tuple(call.state))
    step = pages.Step(call.query, keys, torch.tensor(500), None, call.program.form, 1.0, bounds=bounds)
    found = pages.bounds(step, 16)[:, :, :, :31].double()
    query = call.query.double().unflatten(1, (2, 3))[:, :, :, 0]
    scores = (query @ call.key.double().mT)[..., :496].unflatten(3, (31, 16)).amax(-1)
    assert (scores <= found + 1e-5 * found.abs().max()).all()
    assert int(step.bounded) == 496


def test_the_operator_keeps_torchs_contract() -> None:
    bounds, rows, key = torch.zeros(2, 1, 4, 2, 8), torch.randn(2, 1, 64, 8), torch.randn(2, 1, 20, 8)
    torch.library.opcheck(BOUND, (bounds, rows, torch.tensor(30), key, 16, "bounds"))
    before = bounds.clone()
    BOUND(bounds, rows, torch.tensor(3), key[:, :, :12], 16, "bounds")  # 15 tokens are no unit
    assert torch.equal(bounds, before)
    BOUND(bounds, rows, torch.tensor(50), key, 16, "bounds")  # more than there is room for, which kv_store says
    assert torch.equal(bounds[:, :, :3], before[:, :, :3])
    assert bounds[:, :, 3].any()


@pytest.mark.one_in(2, rest="exhaustive")
@pytest.mark.parametrize(
    "cache",
    [pytest.param(c, marks=slow) for c in ({"key_bits": 16, "value_bits": 16}, {"key_bits": "fp8", "rope": "pre"})],
    ids=str,
)
def test_a_model_decodes_over_pages_of_such_a_cache(cache: dict[str, Any], no_inductor: Any, no_fallback: None) -> None:
    """With a budget for all tokens it is the model; with less, the lists are made of the bounds."""
    wanted, _ = generated(ec.compress_kv(residual=32, **cache), layers=3)
    report._graphs.clear()  # a graph of that model that is still alive would count as one of the next
    method = Quest(token_budget=384, min_length=0, skip_layers=1)
    found, decided = generated(ec.quest(**dataclasses.asdict(method)), ec.compress_kv(residual=32, **cache), layers=3)
    assert [d.form.split("_")[0] for d in decided if d.form] == ["attend", "quest", "quest"]
    assert torch.equal(found.sequences, wanted.sequences)
    for ours, theirs in zip(found.logits, wanted.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    some, _ = generated(
        ec.quest(token_budget=128, min_length=0, skip_layers=1), ec.compress_kv(residual=32, **cache), layers=3
    )
    assert (some.logits[1] - wanted.logits[1]).abs().max() > 1e-3


def test_a_cache_that_was_made_before_has_none(no_inductor: Any) -> None:
    model = llama(layers=3)
    cache = ec.Cache(model, 512, key_bits=16, value_bits=16)
    ec.quest(token_budget=64, min_length=0)(model)
    model.compile(backend="effcompile")
    with torch.no_grad():
        model.generate(IDS, **{**GREEDY, "max_new_tokens": 2}, past_key_values=cache)
    (reason,) = {d.reason.text for d in ec.inspect(model).decisions if d.reason and d.reason.code == "no-page-bounds"}
    assert "after quest was put on the model" in reason


@pytest.mark.parametrize("radius", [0, 0.5])
def test_boxes_shrink_around_their_middles(radius: float) -> None:
    form, page = KVForm(4, 4), 64
    step, stop = Step(form, 777), form.packed(777) // page
    low, high = (x.double()[:, :, :stop].repeat_interleave(RATIO, 1) for x in pages.boxes(step.seen(), page))
    middle, half = (low + high) / 2, (high - low) / 2
    query = step.query.double() * step.query.shape[3] ** -0.5
    wanted = (query * middle + radius * query.abs() * half).sum(-1)
    found = pages.bounds(step.seen(), page, radius).flatten(1, 2)[:, :, :stop]
    summed = (query.abs() * torch.maximum(low.abs(), high.abs())).sum(-1)
    assert ((found - wanted).abs() <= 1e-6 * summed).all()
