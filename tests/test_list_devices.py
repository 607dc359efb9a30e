"""Choices that are more than blocks, on a GPU as far as can be seen without one: as in ``test_block_devices.py``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_block_devices import waits
from test_packed_masks import Fresh, packed_rows, prefix_by_row
from test_paged_decode import Step, generated
from transformers import LlamaConfig, LlamaForCausalLM

import effcompile as ec
from effcompile import lowering
from effcompile.kernels import block_ops, column_ops, page_ops
from effcompile.kernels.form import KVForm
from effcompile.lowering import triton, triton_blocks
from effcompile.lowering.triton_build import Built
from effcompile.passes import base, report

REFUSAL = lowering.refusal
DENSE = KVForm(16, 16).name


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device has the kernels of a GPU, and no others."""
    monkeypatch.setattr(lowering, "refusal", lambda program, _: REFUSAL(program, "cuda"))


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["vertical_slash", "anchor_attention", "pbs_attn"])
def test_choosing_does_not_wait(name: str, padded: bool) -> None:
    """The operators of columns and of an order: with the defaults, at the limit, and below the least length."""
    cls = base.get(name)
    query, key = meta(2, 8, 3000, 64), meta(2, 2, 3000, 64)
    mask = meta(2, 3000, dtype=torch.bool) if padded else None
    operator: Callable[..., Any] = column_ops._order_keys if cls.reorders else column_ops._select_columns  # type: ignore[attr-defined]
    options: dict[str, Any]
    for options in ({}, dict(cls.limit), {"min_length": 10**6}):
        method = block_ops.method_text(name, dataclasses.asdict(cls(**{"min_length": 0} | options)))
        assert waits(lambda m=method: operator(query, key, mask, m, 0.125)) == []


def test_reading_a_mask_by_blocks_does_not_wait() -> None:
    assert waits(lambda: block_ops._mask_blocks(meta(2, 1, 300, 400, dtype=torch.bool), 64)) == []


@pytest.mark.parametrize(
    "form", [KVForm(8, 4), KVForm(16, 16), KVForm(4, 4, rope="pre"), KVForm("fp8", 4, 32, 32, "token")]
)
@pytest.mark.parametrize("name", ["quest", "delta"])
def test_choosing_pages_does_not_wait(name: str, form: KVForm) -> None:
    if name == "quest" and form.name != KVForm(8, 4).name:
        return
    keys = [meta(*shape, dtype=dtype) for shape, dtype in form.buffers("key", 2, 2, 2048, 64, torch.bfloat16)]
    values = [meta(*shape, dtype=dtype) for shape, dtype in form.buffers("value", 2, 2, 2048, 64, torch.bfloat16)]
    table = meta(2, 128, 2, 32, 16, dtype=torch.float16) if form.pre else None
    made: Any = base.get(name)(**{"token_budget": 512}).for_store(form)  # type: ignore[attr-defined]
    method = block_ops.method_text(name, dataclasses.asdict(made))
    k, v = ([*side, *[None] * (3 - len(side))] for side in (keys, values))
    query, length, mask = meta(2, 8, 1, 64), meta(dtype=torch.int64), meta(2, 2048, dtype=torch.bool)

    def choose() -> None:
        mass = None
        if name == "delta":
            weighed = page_ops._attend_mass(query, *k, *v, length, mask, made.page, form.name, 0.125, table=table)
            mass = weighed[2]
        page_ops._select_pages(query, *k, length, mask, method, form.name, 0.125, mass=mass)

    assert waits(choose) == []


def test_launching_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that a launcher does beside the launch, with every part."""
    launched: list[str] = []
    monkeypatch.setattr(Built, "launch", lambda self, kernel, grid, *args, **options: launched.append(kernel))
    query, key, length = meta(2, 8, 300, 64), meta(2, 2, 300, 64), meta(dtype=torch.int64)
    store, mask = (key, None, None, key, None, None), meta(2, 300, dtype=torch.bool)
    counts, indices = meta(2, 8, 5, dtype=torch.int32), meta(2, 8, 5, 5, dtype=torch.int32)
    lists = (counts, indices, counts, indices, 64, DENSE, 0.125, True, -1)
    columns = {
        "columns": meta(2, 8, 3, 40, dtype=torch.int32),
        "column_counts": meta(2, 8, 3, dtype=torch.int32),
        "span": 2,
    }
    for more in (
        {}, columns, {"key_positions": meta(1, 2, 300, dtype=torch.int64)},
        {"allowed": meta(2, 1, 300, 300, dtype=torch.bool)},
    ):  # fmt: skip
        assert waits(lambda m=more: triton_blocks.attend_blocks(query, *store, length, mask, *lists, **m)) == []
    pages = (meta(2, 1, 6, dtype=torch.int32), meta(2, 1, dtype=torch.int32), 32, DENSE, 0.125)
    assert waits(lambda: triton_blocks.attend_pages(query[:, :, :1], *store, length, mask, *pages)) == []
    rules = {"segments": meta(2, 300, dtype=torch.int32), "prefix": meta(2, dtype=torch.int64)}
    assert waits(lambda: triton.attend(query, *store, length, mask, DENSE, 0.125, True, -1, **rules)) == []
    assert launched == ["", "check_", "", "", "", "", ""]


OPTIONS: dict[str, dict[str, Any]] = {
    "vertical_slash": {"min_length": 64}, "anchor_attention": {"min_length": 64}, "pbs_attn": {"min_length": 64},
    "blockrank": {}, "graph_kv": {},
}  # fmt: skip


@pytest.mark.one_in(2, rest="exhaustive")
@pytest.mark.parametrize("name", OPTIONS)
def test_a_site_is_taken(name: str, no_inductor: list[Any], gpu: None) -> None:
    """A model on the meta device; the compiled model does not wait."""
    config = LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=64, vocab_size=60, head_dim=64, attn_implementation="sdpa")  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval().to(torch.bfloat16)
        ids, mask = torch.zeros(2, 300, dtype=torch.int64), torch.ones(2, 300, dtype=torch.int64)
        if name in ("blockrank", "graph_kv"):
            mask = torch.ones(2, 1, 300, 300, dtype=torch.bool)
    getattr(ec, name)(**OPTIONS[name])(model)
    with torch.no_grad():
        torch.compile(model, backend="effcompile")(ids, attention_mask=mask, use_cache=False)
    assert [(d.action, d.reason) for d in ec.inspect(model).decisions] == [("rewritten", None)]
    (graph,) = no_inductor
    inputs = [n.meta["val"] for n in graph.graph.find_nodes(op="placeholder")]
    assert waits(lambda: graph(*(torch.empty(x.shape, dtype=x.dtype, device="meta") for x in inputs))) == []


@pytest.mark.parametrize("name", [pytest.param("quest", marks=pytest.mark.slow), "delta"])
def test_steps_over_pages_are_taken(name: str, no_inductor: list[Any], gpu: None) -> None:
    options: dict[str, Any] = {"full_cache_layers": (0,), "recency": 32} if name == "delta" else {}
    method = getattr(ec, name)(token_budget=256, min_length=0, **options)
    _, decided = generated(ec.compress_kv(residual=32), method, layers=3)
    assert sum("attend_pages" in d.form for d in decided) == (2 if name == "delta" else 1)


@pytest.mark.parametrize(
    "form", [KVForm(16, 16), KVForm(4, 4, 32, 64), KVForm(8, 4, 16, 0, "token")], ids=lambda f: f.name
)
def test_mass_over_all_room_is_mass(form: KVForm, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a device sums it, which does not know the length: what lies behind it is NaN here."""
    for hidden in (0, 100):
        step = Step(form, 333, hidden=hidden)
        monkeypatch.setattr(page_ops, "_on_host", lambda length: True)
        wanted = step.mass(32)
        monkeypatch.setattr(page_ops, "_on_host", lambda length: False)
        torch.testing.assert_close(step.mass(32), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("rule", "form"), [(packed_rows, "seg"), (prefix_by_row, "pre")])
def test_a_packed_first_call_is_taken(rule: Callable[..., Any], form: str, no_inductor: list[Any], gpu: None) -> None:
    """SDPA would need a mask of all pairs; plain causal attention it does best."""
    for made, ending in ((rule, f"causal_{form}"), (lambda i, j, ids: j <= i, "sdpa_causal")):
        report._graphs.clear()
        with torch.device("meta"):
            model = Fresh(made)
        model.compile(backend="effcompile")
        with torch.no_grad(), torch.device("meta"):
            model(*(meta(2, 4, 33, 16, dtype=torch.float32) for _ in range(3)), meta(2, 33, dtype=torch.int64))
        (found,) = report.inspect(model).decisions
        assert found.form.endswith(ending), found
