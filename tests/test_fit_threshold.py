"""Thresholds fitted to layers: the search, the plan it makes, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effcompile as ec
from effcompile.passes.fit_threshold import STEPS, Layer, allocate, options_that_fit
from models import MODELS

MIDDLE = len(STEPS) // 2


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """Density rises with the threshold, error falls."""
    rises = draw(st.lists(st.floats(1e-3, 1), min_size=len(STEPS), max_size=len(STEPS)))
    falls = draw(st.lists(st.floats(0, 1), min_size=len(STEPS), max_size=len(STEPS)))
    density = torch.tensor(rises).cumsum(0)
    error = torch.tensor(falls, dtype=torch.float64).flip(0).cumsum(0).flip(0)
    return Layer("", density, error, draw(st.floats(0, 10)), 1)


@settings(max_examples=200, deadline=None)
@given(st.lists(layers(), min_size=1, max_size=6))
def test_no_more_blocks_and_no_more_loss(found: list[Layer]) -> None:
    choice = allocate(found)
    budget = sum(float(layer.density[MIDDLE]) for layer in found)
    assert sum(float(layer.density[i]) for layer, i in zip(found, choice, strict=True)) <= budget * (1 + 1e-6)
    before = sum(float(layer.losses[MIDDLE]) for layer in found)
    after = sum(float(layer.losses[i]) for layer, i in zip(found, choice, strict=True))
    assert after <= before * (1 + 1e-6) + 1e-9


def test_blocks_go_where_they_count() -> None:
    """Of two equal layers, one of which costs the model a hundred times as much."""
    density, error = torch.linspace(0.1, 0.9, len(STEPS)), torch.linspace(1, 0.1, len(STEPS)).double()
    dear, cheap = Layer("dear", density, error, 100.0, 1), Layer("cheap", density, error, 1.0, 1)
    assert allocate([dear, cheap]) == [len(STEPS) - 1, 0]
    assert allocate([dear, dear]) == [MIDDLE, MIDDLE]


def test_what_is_tried() -> None:
    tried = options_that_fit(ec.xattention(threshold=0.9).options)  # type: ignore[arg-type]
    shares: list[Any] = [method.threshold for method in tried]  # type: ignore[attr-defined]
    assert shares == sorted(shares)
    assert shares[MIDDLE] == pytest.approx(0.9)
    assert 0 < shares[0] < 0.9 < shares[-1] < 1


@pytest.mark.one_in(2, rest="exhaustive")
@pytest.mark.parametrize("method", ["xattention", "flexprefill", "proxyattn"])
def test_a_plan_by_layer(method: str, no_inductor: list[Any]) -> None:
    model = MODELS["llama"]("sdpa")
    ids = torch.randint(0, 128, (1, 320))
    sparse = getattr(ec, method)(block_size=32, min_length=64, **({"stride": 8} if method == "xattention" else {}))
    plan = ec.calibrate(model, [ids], [sparse], progress=False)
    assert [record.module for record in plan] == [f"model.layers.{n}.self_attn" for n in range(2)]
    assert all(record.options["block_size"] == 32 for record in plan)
    told = copy.deepcopy(model)
    told.compile(backend="effcompile", options={"plan": plan, "verify": True})
    with torch.no_grad():
        told(ids, use_cache=False)
    rows = [d for d in ec.inspect(told).decisions if d.action == "rewritten"]
    assert [d.rule for d in rows] == ["plan", "plan"]
    for row, record in zip(rows, plan, strict=True):
        # Blocks that the diagonal or the end cuts short count as whole ones in a record.
        assert row.density == pytest.approx(record.numbers["density"], abs=0.15)
    text = [d.form for d in rows]
    assert all(form.startswith(method) for form in text)


def test_other_weights_and_other_models(no_inductor: list[Any]) -> None:
    model = MODELS["llama"]("sdpa")
    ids = torch.randint(0, 128, (1, 128))
    plan = ec.calibrate(model, [ids], [ec.xattention(block_size=32, stride=8, min_length=0)], progress=False)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight[0, 0] += 1
    other.compile(backend="effcompile", options={"plan": plan})
    with pytest.raises(Exception, match=r"layers\.1\.self_attn: k_proj\.weight is not what the plan"), torch.no_grad():
        other(ids, use_cache=False)
    third = MODELS["gpt2"]("sdpa")
    third.compile(backend="effcompile", options={"plan": plan})
    with pytest.raises(Exception, match="has no such module; nearest"), torch.no_grad():
        third(ids, use_cache=False)


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        (ec.xattention(threshold=1.0), "not between 0 and 1"),
        (ec.streaming(), "no share of blocks"),
        (ec.vertical_slash(), "no share of blocks"),
    ],
)
def test_nothing_to_fit(chosen: Any, told: str) -> None:
    with pytest.raises(ec.CalibrationError, match=told):
        ec.calibrate(MODELS["llama"]("sdpa"), [torch.randint(0, 128, (1, 64))], [chosen], progress=False)


def test_padding_is_refused() -> None:
    ids, mask = torch.randint(0, 128, (1, 64)), torch.ones(1, 64, dtype=torch.long)
    mask[0, :5] = 0
    with pytest.raises(ec.CalibrationError, match=r"no layer to fit.*without padding"):
        ec.calibrate(
            MODELS["llama"]("sdpa"),
            [{"input_ids": ids, "attention_mask": mask}],
            [ec.xattention(block_size=32, stride=8)],
            progress=False,
        )
