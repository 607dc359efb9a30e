"""Density and kept mass, as ``verify`` reports them, against maps of single pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_block_lists import ATTEND, CALLS, Call
from test_pages import PAGES, Paged, program
from test_sparse_chunks import in_chunks, llama  # noqa: F401  (a fixture)
from test_sparse_methods import FAMILY, LEAST

import effcompile as ec
from effcompile.kernels import block_ops, blocks, observe, ops
from effcompile.kernels.form import KVForm
from effcompile.passes import base

pytestmark = pytest.mark.usefixtures("no_fallback")


@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_against_a_map_of_pairs(name: str, reference: bool) -> None:
    call = Call(**{"block": 128, **CALLS[name]})
    key = torch.ops.effcompile.kv_load.default(*call.state, torch.tensor(call.keys), call.rest[0])[0]
    position = torch.arange(call.keys - call.queries, call.keys)[:, None]
    may = (torch.arange(call.keys) <= position)[None, None]
    if call.rest[3] >= 0:
        may = may & (torch.arange(call.keys) > position - call.rest[3])
    if call.mask is not None:
        may = may & call.mask[:, None, None, : call.keys]
    may = may.expand(2, call.query.shape[1], -1, -1)
    seen = blocks.tokens(call.lists.keep(), call.queries, call.keys, call.block) & may
    wide = key[:, :, : call.keys].double().repeat_interleave(call.query.shape[1] // key.shape[1], 1)
    weights = (call.query.double() @ wide.mT * call.rest[1]).masked_fill(~may, -torch.inf).softmax(-1)
    kept = (weights * seen).sum(-1)[may.any(-1)].mean()
    args = (call.query, *call.state, torch.tensor(call.keys), call.mask, *block_ops.of(call.lists), *call.rest)
    if reference:
        with ops.reference_only():
            found = observe.observe(ATTEND, args, {}, call.attend()[1])
    else:
        found = observe.observe(ATTEND, args, {}, call.attend()[1])
    assert 0.02 < seen.sum() / may.sum() < 0.98
    torch.testing.assert_close(found[0], (seen.sum() / may.sum()).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1], kept, rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", [KVForm(16, 16), KVForm(4, 4, 32, 64)], ids=lambda form: form.name)
def test_pages(form: KVForm) -> None:
    call = Paged(program(form, pad=True), 333, 1)
    lists = call.lists(32)
    seen, may = (
        x.repeat_interleave(3, 1) & call.mask[:, None, :333]  # type: ignore[index]
        for x in (call.listed(32, lists), torch.ones(2, 2, 333, dtype=torch.bool))
    )
    kept = (call.exact(call.listed(32, lists))[1] - call.exact(torch.ones(2, 2, 333, dtype=torch.bool))[1]).exp()
    args = (call.query, *call.state, torch.tensor(333), call.mask, *lists, 32, form.name, call.scale)
    found = observe.observe(PAGES, args, {}, call.attend_pages(32, lists)[1])
    assert 0.1 < seen.sum() / may.sum() < 0.9
    torch.testing.assert_close(found[0], (seen.sum() / may.sum()).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1], kept.mean(), rtol=1e-5, atol=0)


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.parametrize("name", FAMILY)
def test_every_method_is_told_to_visit_everything(name: str, llama: Any, no_inductor: list[Any]) -> None:  # noqa: F811
    """At its limit a method keeps all, and at its least something else: columns and moved keys are in the count."""
    for options, whole in ((base.get(name).limit, True), (LEAST[name], False)):
        torch._dynamo.reset()
        llama._compiled_call_impl = None
        ec.sparse_attention(name, min_length=0, block_size=64, **options)(llama)
        llama.compile(backend="effcompile", options={"verify": True})
        in_chunks(llama, sizes=(400,), key_bits=16, value_bits=16)
        found = [d for d in ec.inspect(llama).decisions if d.form.startswith(name)]
        assert len(found) == 2
        for d in found:
            assert d.density is not None
            assert d.kept is not None
            if whole:
                assert d.density == pytest.approx(1, abs=1e-6)
                assert d.kept == pytest.approx(1, abs=1e-6)
            else:
                assert 0.1 < d.density < 0.9
                assert 0.1 < d.kept < 0.99


@pytest.mark.slow
def test_the_report_shows_them(llama: Any, no_inductor: list[Any]) -> None:  # noqa: F811
    """Of the first call of each graph, on fresh keys and on a store; nothing where attention stays whole."""
    ec.sparse_attention("xattention", min_length=0, block_size=64, threshold=0.3)(llama)
    llama.compile(backend="effcompile", options={"verify": True})
    in_chunks(llama, sizes=(256, 64, 1), key_bits=4, value_bits=4)
    found = ec.inspect(llama)
    sparse = [d for d in found.decisions if d.form.startswith("xattention")]
    assert {d.graph for d in sparse} == {0, 1}
    for d in sparse:
        assert d.density is not None
        assert d.kept is not None
        assert 0.3 < d.density < 0.95
        assert 0.3 < d.kept < 0.999
        assert d.kept > d.density - 0.1  # the blocks were chosen for what they hold
    assert all(d.density is None for d in found.decisions if d.form.startswith("attend_decode"))
    assert "density" in str(found)
    assert f"{max(d.kept for d in sparse if d.graph == 0):.3f}" in str(found)  # type: ignore[type-var]
    assert '"density": 0.' in found.to_json()


def test_everything_visited_is_all_of_the_mass(llama: Any, no_inductor: list[Any]) -> None:  # noqa: F811
    ec.sparse_attention("xattention", min_length=0, block_size=64, threshold=1.0)(llama)
    llama.compile(backend="effcompile", options={"verify": True})
    in_chunks(llama, sizes=(256, 64), key_bits=16, value_bits=16)
    for d in ec.inspect(llama).decisions:
        if d.form:
            assert d.density == pytest.approx(1, abs=1e-6)
            assert d.kept == pytest.approx(1, abs=1e-6)
