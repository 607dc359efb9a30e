"""Plans in which a method stands on another: the report, reasons, errors, files, and what else is done with plans."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_plans import planned
from test_stack import CARVED, logits, made, model_of, on, texts, without
from torch import Tensor, nn
from torch.nn import functional as F

import effcompile as ec
from effcompile.kernels import ffn_cost
from effcompile.passes import report


def rows_of(model: nn.Module, plan: ec.Plan, ids: Tensor, **options: Any) -> tuple[Tensor, dict[str, list[Any]]]:
    """What the model says with a plan, and the report's rows about blocks, by their modules."""
    report._graphs.clear()  # models that share weights share reports
    told = planned(model, plan, **options)
    return logits(told, ids), decisions(told)


def decisions(told: nn.Module) -> dict[str, list[Any]]:
    """The report's rows about blocks, by their modules."""
    found: dict[str, list[Any]] = {}
    for d in ec.inspect(told).decisions:
        if d.kind == "ffn":
            found.setdefault(d.module, []).append(d)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 17])
def test_report_and_cost(tokens: int, no_inductor: list[Any]) -> None:
    model = model_of()
    size, neurons, item = 32, 96, 4
    plan, both = made(model, ec.flap(0.3, round_to=1), ec.wina(0.4))
    _, rows = rows_of(model, both, texts()[0][:1, :tokens])
    for module, found in rows.items():
        (row,) = found
        kept = int(plan.get(module, "flap").numbers["width"])  # type: ignore[union-attr]
        assert (row.form, row.rule, row.kernels) == (f"flap {kept} neurons, wina 40%", "plan", ("column_ffn_f32",))
        first, last = (math.ceil(n * (1 - 0.4**tokens)) for n in (size, kept))
        wanted = ffn_cost.column_ffn(tokens, size, kept, kept=(first, first, last), itemsize=item)
        assert (row.bytes_after, row.flops_after) == (wanted.bytes, wanted.flops)
        assert row.flops_before == 2 * tokens * 3 * size * neurons
    carved, both = made(model, ec.carve_moe(**CARVED), ec.wina(0.4))
    (_, rows), (_, only) = (rows_of(model, p, texts()[0][:1, :tokens]) for p in (both, carved))
    width, used, slots = 12, min(6, math.ceil(6 * (1 - 0.5**tokens))), 3 * tokens
    shared_gone = 24 - math.ceil(24 * (1 - 0.4**tokens))
    each_gone = width - math.ceil(width * (1 - 0.4 ** (slots / used)))
    for (row,), (before,) in zip(rows.values(), only.values(), strict=True):
        assert row.form == "carve_moe S2A3E8, wina 40% of down"
        assert row.kernels == ("route_f32", "grouped_ffn_f32")
        assert before.bytes_after - row.bytes_after == size * item * (shared_gone + used * each_gone)
        assert before.flops_after - row.flops_after == 2 * size * (tokens * shared_gone + slots * each_gone)


def test_what_does_not_stand_on_each_other(no_inductor: list[Any]) -> None:
    """A reason that names both methods, and what stands instead."""
    model, ids = model_of(), texts()[0]
    first = "layers.0"
    plan, both = made(model, ec.flap(0.3, round_to=1), ec.wina(0.4))
    plain, flap = logits(model, ids), logits(planned(model, plan), ids)

    def told(plan: ec.Plan, **options: Any) -> tuple[Tensor, list[Any]]:
        got, rows = rows_of(model, plan, ids, **options)
        return got, rows[first]

    # Switched off above, so that what is below stands alone; and below, so that nothing does.
    got, rows = told(both, rules={"layers.*": {"wina": False}})
    assert torch.equal(got, flap)
    left = f"flap {len(next(iter(plan)).tensors['kept'])} neurons"
    assert [d.form or d.reason.code for d in rows] == [left, "switched-off"]
    got, rows = told(both, rules={"layers.*": {"wina": {"sparsity": 0.5}}})
    assert torch.equal(got, flap)
    assert [d.form or d.reason.code for d in rows] == [left, "other-options"]
    got, rows = told(both, rules={"layers.*": {"flap": False}})
    assert torch.equal(got, plain)
    assert [d.reason.code for d in rows] == ["switched-off", "other-block"]
    assert "wina was calibrated on what flap leaves" in rows[1].reason.text
    assert "switched off" in rows[1].reason.text
    # The record below taken out, or another.
    got, rows = told(without(both, "flap"))
    assert torch.equal(got, plain)
    assert [d.reason.code for d in rows] == ["other-block"]
    assert "no record of flap" in rows[0].reason.text
    other = ec.calibrate(model, texts(), [ec.flap(0.5)], progress=False)
    mixed = ec.Plan({(r.module, r.method): r for r in (*other, *without(both, "flap"))})
    got, rows = told(mixed)
    assert torch.equal(got, logits(planned(model, other), ids))
    assert [d.form or d.reason.code for d in rows][1] == "other-block"
    assert "another record of flap" in rows[1].reason.text
    # Measured numbers are not what it depends on.
    noted = {(r.module, r.method): dataclasses.replace(r, numbers={}) for r in both}
    assert [d.action for d in told(ec.Plan(noted))[1]] == ["rewritten"]
    # Side by side without on=, and two above.
    alone = ec.calibrate(model, texts(), [ec.flap(0.3, round_to=1), ec.wina(0.4)], progress=False)
    got, rows = told(alone)
    assert torch.equal(got, flap)
    assert "flap stands here" in rows[1].reason.text
    assert "on=plan" in rows[1].reason.text
    two = on(model, both, ec.teal(0.4))
    _, rows = told(two)
    assert "teal 40%" in rows[0].form
    assert rows[1].reason.code == "taken"
    assert f"{rows[0].form} stands here" in rows[1].reason.text
    # A record that a method cannot have.
    wrong = {(r.module, r.method): dataclasses.replace(r, on={"wina": ""}) for r in plan}
    _, rows = told(ec.Plan(wrong))
    assert [d.reason.code for d in rows] == ["other-block"]


@pytest.mark.parametrize(
    ("below", "above", "error", "text"),
    [
        (
            ec.flap(0.3, round_to=1),
            ec.flap(0.3, round_to=1),
            TypeError,
            "flap cannot stand on another method; teal and wina can",
        ),
        (ec.flap(0.3, round_to=1), ec.low_rank(), TypeError, "low_rank cannot stand"),
        (ec.teal(0.3), ec.teal(0.4), ec.CalibrationError, "records of teal already"),
        (ec.teal(0.3), ec.wina(0.4), ec.CalibrationError, "wina cannot stand on teal"),
        (ec.flap(1.0), ec.wina(0.4), ec.CalibrationError, "flap leaves no neuron here"),
        (ec.carve_moe(), ec.wina(0.4, "greedy"), ec.CalibrationError, "cannot stand on carve_moe.*'greedy'"),
        (ec.carve_moe(), ec.teal(0.4, transform=True), ec.CalibrationError, "cannot stand on carve_moe.*transform"),
    ],
)
def test_bad_input(below: Any, above: Any, error: type[Exception], text: str) -> None:
    model = model_of()
    plan, _ = made(model, below)
    with pytest.raises(error, match=text):
        on(model, plan, above)


def test_other_weights() -> None:
    plan, _ = made(model_of(), ec.flap(0.3, round_to=1))
    other = model_of()
    with torch.no_grad():
        other.layers[1].up.weight[0, 0] += 1
    with pytest.raises(ec.PlanError, match=r"flap at layers\.1: the up weights are not those"):
        on(other, plan, ec.wina(0.4))


def test_blocks_without_a_record_are_taken_whole(no_inductor: list[Any]) -> None:
    model = model_of()
    first, second = made(model, ec.flap(0.3, round_to=1))[0]
    both = on(model, ec.Plan({(first.module, "flap"): first}), ec.wina(0.4))
    assert [bool(r.on) for r in both if r.method == "wina"] == [True, False]
    _, rows = rows_of(model, both, texts()[0])
    forms = {m: [d.form for d in found] for m, found in rows.items()}
    assert forms[second.module] == ["wina 40%"]
    assert forms[first.module][0].endswith("neurons, wina 40%")


def test_files(tmp_path: Path, no_inductor: list[Any]) -> None:
    model = model_of()
    plan, both = made(model, ec.flap(0.3, round_to=1), ec.wina(0.4))
    both.save(tmp_path)
    again = ec.Plan.load(tmp_path)
    assert again.text == both.text
    assert again.made["on top"] == both.made["on top"]
    assert torch.equal(*(logits(planned(model, p), texts()[0]) for p in (both, tmp_path)))
    cut = {(r.module, r.method): dataclasses.replace(r, on={}) for r in both}
    (one, *_) = both.diff(ec.Plan(cut))
    assert one.startswith("wina at layers.0: on: flap: ")
    assert one.endswith(" -> nothing")
    assert not plan.diff(without(both, "wina"))


@pytest.mark.slow
def test_recovering(no_inductor: list[Any]) -> None:
    """What stands on a smaller block stays on it; on a routed block it would stand on another one afterwards."""
    model = model_of()
    flap, carved = (made(model, method)[0] for method in (ec.flap(0.3, round_to=1), ec.carve_moe(**CARVED)))
    (first, _), (_, second) = flap, carved
    mixed = ec.Plan({(first.module, "flap"): first, (second.module, "carve_moe"): second})
    both = on(model, mixed, ec.wina(0.9))
    with pytest.raises(ec.CalibrationError, match=r"wina at layers\.1 was calibrated on carve_moe"):
        ec.recover(model, both, texts(), progress=False)
    half = ec.Plan({(r.module, r.method): r for r in both if r.on != {"carve_moe": second.identity}})
    assert len(half) == 3
    losses = [ec.recover(model, p, texts(), progress=False).made["recovered"]["loss"][0] for p in (half, mixed)]
    told = planned(model, half)
    ids = texts()[0]
    loss = F.cross_entropy(logits(told, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert float(loss) == pytest.approx(losses[0], rel=1e-4)
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.one_in(2, rest="exhaustive")
@pytest.mark.slow
@pytest.mark.parametrize("below", [ec.flap(0.3, round_to=1), ec.carve_moe(**CARVED)], ids=lambda m: m.options.name)
def test_through_inductor_prompt_and_steps(below: Any) -> None:
    model = model_of("llama")
    _, both = made(model, below, ec.wina(0.3))
    told, ids = planned(model, both), texts()[0][:, :9]
    with torch.no_grad():
        out = told.generate(ids, max_new_tokens=4, do_sample=False)
        again = told(out, use_cache=False).logits.argmax(-1)
    assert torch.equal(out[:, ids.shape[1] :], again[:, ids.shape[1] - 1 : -1])
    assert {d.action for found in decisions(told).values() for d in found} == {"rewritten"}
