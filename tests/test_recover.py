"""``ec.recover``: routers of carved blocks that are trained for a few steps, on a model that stays as it is."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from test_carve_energy import BETTER, record_of, tiny
from test_plans import block_of, logits, planned, replace
from torch import Tensor, nn

import effcompile as ec
from effcompile.kernels.ffn import FeedForward
from effcompile.passes.carve_moe import CarveMoE
from effcompile.passes.recover import _Routed
from effcompile.runtime.plan import Record
from models import MODELS

THRESHOLD = {"router": "fitted", "routing": "threshold"}

_plans: dict[Any, ec.Plan] = {}
"""Each test begins with the same seed, so its model has the weights that such a plan was made for."""


def carved(architecture: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any, Any]:
    """A small model, text in which few tokens are frequent, and a plan."""
    model = MODELS[architecture]("sdpa").to(dtype)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.rand(2, 24, generator=generator).pow(3).mul(128).long() for _ in range(2)]
    key = (architecture, dtype, *sorted(options.items()))
    if key not in _plans:
        _plans[key] = ec.calibrate(model, texts, [ec.carve_moe(2, 2, 8, **options)], progress=False)
    return model, texts, _plans[key]


def with_vectors(record: Record, scale: Tensor, bias: Tensor) -> Record:
    return dataclasses.replace(record, tensors={**record.tensors, "scale": scale, "choice_bias": bias})


def one_by_one(method: CarveMoE, block: FeedForward, record: Record, x: Tensor) -> Tensor:
    """Shared neurons, and for each token the groups of largest ``p + b``, each times ``1 + p u``: fp64, as written."""
    unit, heads, wide = block.normalised(), record.tensors["heads"].long(), block.width // method.experts
    assert unit.gate is not None
    order, (u, b) = record.tensors["order"].long(), (record.tensors[n].double() for n in ("scale", "choice_bias"))
    p = (nn.functional.silu(x @ unit.gate[heads].double().t()) * (x @ unit.up[heads].double().t())).abs().softmax(-1)
    written = block.middle(x)
    out = []
    for row, score in zip(written, p, strict=True):
        factor = torch.zeros(block.width, dtype=torch.float64)
        factor[order[: method.shared * wide]] = 1
        for e in (score + b).argsort(descending=True)[: method.active].tolist():
            first = (method.shared + e) * wide
            factor[order[first : first + wide]] = 1 + score[e] * u[e]
        out.append((row * factor) @ block.down)
    return torch.stack(out)


def test_gates_and_choice_are_the_papers() -> None:
    block, rows = tiny()
    method = CarveMoE(2, 2, 8)
    record = with_vectors(record_of(method, block, rows), torch.randn(6) * 3, torch.randn(6) * 0.02)
    held = torch.randn(65, block.up.shape[1], dtype=torch.float64)
    wide = FeedForward(block.up.double(), block.down.double(), block.gate.double(), "silu")  # type: ignore[union-attr]
    expected = one_by_one(method, wide, record, held)
    got = method.approximate(block, record)(held.float())
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-3)
    for gone in ("scale", "choice_bias"):
        plain = {**record.tensors, gone: torch.zeros(6)}
        other = method.approximate(block, dataclasses.replace(record, tensors=plain))(held.float())
        assert not torch.allclose(got, other, rtol=1e-3, atol=1e-2)


@pytest.mark.one_in(2, rest="exhaustive")
@pytest.mark.parametrize("options", [{}, {**BETTER, **THRESHOLD}], ids=str)
def test_zeros_are_the_form_that_was(options: dict[str, Any], no_inductor: list[Any]) -> None:
    model, texts, plan = carved(**options)
    zeros = [with_vectors(r, torch.zeros(6), torch.zeros(6)) for r in plan]
    again = ec.Plan({(r.module, r.method): r for r in zeros})
    assert torch.equal(logits(planned(model, again), texts[0]), logits(planned(model, plan), texts[0]))


@pytest.mark.parametrize(
    ("architecture", "options", "dtype"),
    [
        ("llama", {}, torch.float32),
        ("llama", BETTER, torch.bfloat16),
        ("gpt2", THRESHOLD, torch.float32),
        pytest.param("phi3", {"bias": True}, torch.float32, marks=pytest.mark.slow),
        pytest.param("opt", BETTER, torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_recovered(
    architecture: str, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path, no_inductor: list[Any]
) -> None:
    """Loss falls, the model stays as it was, and what is compiled is what the reference body says."""
    model, texts, plan = carved(architecture, dtype, **options)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    wants = [p.requires_grad for p in model.parameters()]
    found = ec.recover(model, plan, texts, epochs=6, lr=0.5, gamma=1e-3, progress=False)
    one, two = found.made["recovered"]["loss"]
    assert two < one - 0.005
    assert found.made["recovered"]["steps"] == 12
    after = model.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    assert [p.requires_grad for p in model.parameters()] == wants
    assert all(p.grad is None for p in model.parameters())
    assert all("scale" not in r.tensors for r in plan)

    found.save(tmp_path)
    found = ec.Plan.load(tmp_path)
    last = list(found)[-1]
    assert last.tensors["scale"].abs().max() > 0.05
    assert last.tensors["choice_bias"].abs().max() > 0
    expected = copy.deepcopy(model)
    form = CarveMoE(**last.options).approximate(block_of(model.get_submodule(last.module), architecture), last)
    replace(expected.get_submodule(last.module), architecture, form)
    told = planned(model, ec.Plan({(last.module, last.method): last}))
    near = {"rtol": 3e-5, "atol": 3e-5} if dtype is torch.float32 else {"rtol": 0.03, "atol": 0.03}
    torch.testing.assert_close(logits(told, texts[0]), logits(expected, texts[0]), **near)
    forms = {d.form for d in ec.inspect(told).decisions if d.kind == "ffn" and d.action == "rewritten"}
    assert [form.split()[-1] for form in forms] == ["recovered"]
    # In bf16 too, kernel and reference are closer than either is to what was there before.
    first = ec.Plan({(r.module, r.method): r for r in plan if r.module == last.module})
    moved = (logits(planned(model, first), texts[0]) - logits(told, texts[0])).float().norm()
    apart = (logits(expected, texts[0]) - logits(told, texts[0])).float().norm()
    assert apart < 0.2 * moved


@pytest.mark.slow
def test_biases_make_loads_equal() -> None:
    """Without scales, steps of one size: the load comes nearer to the mean in each block, and not without them."""
    model, texts, plan = carved()
    found = ec.recover(model, plan, texts[:1], epochs=30, lr=0.0, gamma=2e-3, progress=False)
    still = ec.recover(model, plan, texts[:1], epochs=3, lr=0.0, gamma=0.0, progress=False)
    for record, other in zip(found, still, strict=True):
        assert record.numbers["load_before"] == other.numbers["load_before"] == other.numbers["load_after"] > 1.4
        assert record.numbers["load_after"] < 1 + 0.6 * (record.numbers["load_before"] - 1)
        assert torch.equal(record.tensors["scale"], torch.zeros(6))
        steps = record.tensors["choice_bias"] / 2e-3
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)


def test_a_bias_moves_against_its_load() -> None:
    method = CarveMoE(2, 2, 8, routing="threshold")
    for threshold, expected in ((False, [-1.0, 1, 1, 1, 0, 1]), (True, [-1.5, 0.5, 0.5, 0.5, -0.5, 0.5])):
        routed = _Routed.of(Record("m", "carve_moe", {}, {}), method, torch.device("cpu"))
        routed.threshold = threshold
        routed.see(torch.tensor([[0, 4], [0, -1], [0, 2], [0, 4], [0, -1], [0, 3], [0, 1]], dtype=torch.int32))
        assert routed.load.tolist() == [7, 1, 1, 1, 2, 0]
        routed.balance(0.01)
        torch.testing.assert_close(routed.bias, 0.01 * torch.tensor(expected))


def test_padding_is_neither_learned_nor_counted() -> None:
    model, texts, plan = carved()
    row = texts[0][:1, :20]
    padded, mask = (nn.functional.pad(t, (7, 0)) for t in (row, torch.ones_like(row)))
    position = (mask.cumsum(1) - 1).clamp(min=0)
    alone = ec.recover(model, plan, [row], epochs=4, lr=0.1, progress=False)
    batch = {"input_ids": padded, "attention_mask": mask, "position_ids": position}
    with_padding = ec.recover(model, plan, [batch], epochs=4, lr=0.1, progress=False)
    assert alone.made["recovered"]["loss"] == pytest.approx(with_padding.made["recovered"]["loss"], abs=1e-4)
    for one, two in zip(alone, with_padding, strict=True):
        torch.testing.assert_close(one.tensors["choice_bias"], two.tensors["choice_bias"])
        torch.testing.assert_close(one.tensors["scale"], two.tensors["scale"], rtol=1e-2, atol=1e-3)
        assert one.numbers["load_after"] == two.numbers["load_after"]


@pytest.mark.exhaustive
def test_goes_on_and_leaves_other_methods(no_inductor: list[Any]) -> None:
    """A plan that was recovered goes on from there; a block of another method stands in the model as it is."""
    model, texts, plan = carved()
    first, last = plan
    flap = ec.calibrate(model, texts, [ec.flap(0.5)], progress=False)
    both = ec.Plan({(r.module, r.method): r for r in (*flap, last) if r is last or r.module == first.module})
    loss = [ec.recover(model, p, texts, lr=0.0, gamma=0.0, progress=False) for p in (both, plan)]
    mixed, alone = (one.made["recovered"]["loss"][0] for one in loss)
    target = logits(planned(model, both), texts[0])[:, :-1].flatten(0, 1)
    assert mixed == pytest.approx(float(nn.functional.cross_entropy(target, texts[0][:, 1:].flatten())), abs=1e-5)
    assert mixed != pytest.approx(alone, abs=1e-4)
    once = ec.recover(model, both, texts, epochs=2, lr=0.1, progress=False)
    again = ec.recover(model, once, texts, epochs=2, lr=0.1, progress=False)
    assert again.made["recovered"]["loss"][0] == pytest.approx(once.made["recovered"]["loss"][1], abs=1e-5)
    assert {r.module for r in again if "scale" in r.tensors} == {last.module}


def other_weights(model: Any) -> Any:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[3, 5] += 1
    return other


def too_long(plan: ec.Plan) -> ec.Plan:
    return ec.Plan({(r.module, r.method): with_vectors(r, torch.zeros(7), torch.zeros(6)) for r in plan})


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda m, b, p: ec.recover(m, p, []), ec.CalibrationError, "batches is empty"),
        (lambda m, b, p: ec.recover(m, p, b, gamma=-1.0), ec.CalibrationError, "gamma=-1.0; expected 0 or more"),
        (lambda m, b, p: ec.recover(m, p, [b[0][:, :1]]), ec.CalibrationError, "two tokens or more"),
        (lambda m, b, p: ec.recover(m.model, p, b), ec.CalibrationError, r"no logits \[B, T, V\]"),
        (lambda m, b, p: ec.recover(m, ec.Plan({}), b), ec.CalibrationError, "no record of carve_moe"),
        (lambda m, b, p: ec.recover(other_weights(m), p, b), ec.PlanError, "the down weights are not those"),
        (lambda m, b, p: ec.recover(m, too_long(p), b), ec.PlanError, r"scale has shape \(7,\); expected \(6,\)"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], told: str) -> None:
    model, texts, plan = carved()
    with pytest.raises(error, match=told):
        call(model, texts, plan)


def test_inside_inference_mode() -> None:
    model, texts, plan = carved()
    with torch.inference_mode(), pytest.raises(ec.CalibrationError, match="inference_mode"):
        ec.recover(model, plan, texts)


def test_inside_no_grad() -> None:
    model, texts, plan = carved()
    with torch.no_grad():
        found = ec.recover(model, plan, texts, lr=0.1, progress=False)
    assert all(r.tensors["scale"].abs().max() > 0 for r in found)
