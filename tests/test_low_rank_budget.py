"""Budgets in bytes and in milliseconds, and a sparse residual, from calibration to compiled code."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from test_low_rank import calibrated, codes, planned
from test_masa import ROWS, Layers
from torch import nn

import effcompile as ec
from effcompile.kernels import low_rank_ops
from effcompile.passes import calibrate_linear, timing
from effcompile.passes.timing import Times


def of_layers(**options: Any) -> tuple[Layers, ec.Plan]:
    model = Layers().eval()
    return model, calibrated(model, ROWS, **options)


WHOLE = sum(m.weight.numel() for m in Layers().modules() if isinstance(m, nn.Linear))


def spent(plan: ec.Plan) -> float:
    return sum(r.numbers["factors" if r.tensors else "dense"] for r in plan)


@pytest.mark.parametrize("planner", ["uniform", pytest.param("energy", marks=pytest.mark.slow)])
def test_a_budget_in_bytes(planner: str) -> None:
    """The same as a share of the bytes; what is above all of them leaves everything dense."""
    _, share = of_layers(ratio=0.75, budget="bytes", planner=planner)
    for budget in (WHOLE * 3, f"{WHOLE * 3 / 1000}kB"):
        _, plan = of_layers(budget=budget, planner=planner)
        assert [r.numbers for r in plan] == [r.numbers for r in share]
        assert 0.6 * 4 * WHOLE < spent(plan) <= 3 * WHOLE
    _, all_of_it = of_layers(budget="1GB", planner=planner)
    assert not any(r.tensors for r in all_of_it)


def test_a_budget_in_milliseconds(monkeypatch: pytest.MonkeyPatch, no_inductor: list[Any]) -> None:
    """Under a cost model that is known: a chain that is not faster leaves its linear dense, and says the times."""
    square, others = Times(0.100, 0.020, 0.010), Times(0.050, 0.050, 0.001)

    def measured(shapes: Any, dtype: Any, device: Any) -> dict[Any, Times]:
        return {shape: square if shape == (24, 24) else others for shape in shapes}

    monkeypatch.setattr(calibrate_linear, "measure", measured)
    model, plan = of_layers(milliseconds=1.3)
    assert spent(plan) <= 1.3 < sum(r.numbers["dense"] for r in plan)
    for record in plan:
        if record.module.rpartition(".")[2] in ("q", "o"):
            assert record.numbers["factors"] == pytest.approx(0.02 + 0.01 * record.numbers["rank"])
        else:
            assert not record.tensors
    assert plan.made["milliseconds"]["dense, fixed, each"]["24x24"] == [0.1, 0.02, 0.01]
    told = planned(model, plan)
    with torch.no_grad():
        told(ROWS[0])
    left = next(d.reason for d in ec.inspect(told).decisions if d.module == "layers.0.up")
    assert left.code == "break-even"
    assert left.text == "factors of rank 1 would have 0.051 ms, and the weight has 0.05"


def test_times_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that counts bytes read, the line is that of the bytes."""
    read = [0.0]

    def calls(target: Any, given: Any) -> float:
        return sum(t.nbytes for t in given[0] if t is not None) + 1000.0

    monkeypatch.setattr(timing, "POOL", 1 << 18)
    monkeypatch.setattr(timing, "_milliseconds", calls)
    found = timing.measure([(48, 80), (48, 80), (16, 16)], torch.float32, torch.device("cpu"))
    assert list(found) == [(48, 80), (16, 16)]
    assert found[48, 80].dense == 4 * (48 * 80 + 80) + 1000
    assert found[48, 80].each == pytest.approx(4 * 128)
    assert found[48, 80].fixed == pytest.approx(4 * 80 + 1000)
    monkeypatch.undo()
    monkeypatch.setattr(timing, "POOL", 1 << 18)
    ticks = iter([0.0, 9.0, 0.0, 0.5, 0.0, 0.3, 0.0, 0.4])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))
    one = timing._milliseconds(lambda x: read.append(x.sum()) or x, [(torch.ones(2),)] * 5)
    assert one == pytest.approx(300 / 5)
    assert len(read) == 1 + 5 * (timing.PASSES + 1)


@torch.no_grad()
def test_residual_in_a_plan(tmp_path: Path, no_inductor: list[Any]) -> None:
    """At the bytes of factors alone it loses less; what runs is what the record says; lists are checked."""
    model = Layers().eval()
    for layer in model.layers:
        for linear in (layer.q, layer.down):
            linear.weight[torch.rand(linear.weight.shape) < 0.03] += 1
    alone, plan = (calibrated(model, ROWS, ratio=0.7, residual=share) for share in (0.0, 0.3))
    for one, two in zip(alone, plan, strict=True):
        assert sum(t.nbytes for t in two.tensors.values()) <= sum(t.nbytes for t in one.tensors.values())
        # It is taken where it loses less, and nowhere else.
        assert (two.numbers["error"] < one.numbers["error"]) == ("entries" in two.numbers)
        if "entries" in two.numbers:
            assert two.numbers["entries"] == two.tensors["values"].numel() > 0
        else:
            assert two.numbers == one.numbers
    plan.save(tmp_path)
    assert sum("values" in r.tensors for r in plan) >= 5
    told, same = planned(model, tmp_path), copy.deepcopy(model)
    for record in plan:
        linear: Any = same.get_submodule(record.module)
        t, size = record.tensors, linear.weight.shape[1]
        weight = t["up"] @ t["down"]
        if "values" in t:
            weight = weight + low_rank_ops.dense_residual(t["values"], t["columns"], t["starts"], size)
        linear.weight = nn.Parameter(weight)
        linear.bias = nn.Parameter(record.tensors["shift"] + (0 if linear.bias is None else linear.bias.detach()))
    for rows in (3, 40):
        x = torch.randn(rows, 24)
        torch.testing.assert_close(told(x), same(x), rtol=1e-5, atol=1e-5)
    decision = next(d for d in ec.inspect(told).decisions if d.module == "layers.0.q")
    record = plan.get("layers.0.q", "low_rank")
    assert record is not None
    assert decision.form.endswith(f"+ {record.numbers['entries']:.0f} entries")
    columns, starts = record.tensors["columns"], record.tensors["starts"]
    for bad in (
        {"columns": columns + 24},
        {"columns": columns - 24},
        {"columns": columns.int()},
        {"starts": starts + 1},
        {"starts": starts.flip(0)},
    ):
        torch._dynamo.reset()
        edited = dataclasses.replace(record, tensors={**record.tensors, **bad})
        with pytest.raises(Exception, match="columns and starts are no rows of a matrix 24 x 24"):
            planned(model, ec.Plan({("layers.0.q", "low_rank"): edited}))(torch.randn(3, 24))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"budget": "a lot"}, "expected 'parameters', 'bytes', or a number of bytes"),
        ({"budget": 0}, "or a number of bytes"),
        ({"budget": "3MB", "milliseconds": 2.0}, "milliseconds, budget: each says how much is kept"),
        ({"budget": "3MB", "rank": 3}, "rank, budget: each says how much is kept"),
        ({"milliseconds": -1.0}, "expected a number above 0"),
        ({"milliseconds": 1.0, "ratio": 0.5}, "beside a whole budget"),
        ({"residual": 1.0}, "expected a share of 0 or more"),
        ({"residual": 0.2, "milliseconds": 1.0}, "is not measured"),
    ],
)
def test_bad_options(given: Any, said: str) -> None:
    with pytest.raises(ec.OptionError, match=said):
        ec.low_rank(**given)


def test_too_little_is_told() -> None:
    for given in ({"budget": 100}, {"budget": "0.1kB"}):
        with pytest.raises(ec.CalibrationError, match="give a larger ratio or budget"):
            of_layers(**given)


def test_codes_without_calibrating(no_inductor: list[Any]) -> None:
    told = copy.deepcopy(Layers().eval())
    told.compile(backend="effcompile", options={"low_rank": {"milliseconds": 2.0}})
    with torch.no_grad():
        told(ROWS[0])
    assert set(codes(told).values()) == {"no-plan"}
