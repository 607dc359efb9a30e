"""Weights that layers share: matrix PCA, who is in a group, and the three ways of one product."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from test_low_rank import calibrated, codes, planned
from torch import Tensor, nn

import effcompile as ec
from effcompile.passes.factors import spectrum
from effcompile.passes.masa import groups_of, materialized, matrix_pca
from effcompile.runtime.second_moment import SecondMoment


def alike(layers: int, outputs: int, inputs: int, seed: int = 0) -> list[Tensor]:
    """Weights that have a part in common, and a part each."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(2, outputs, inputs, generator=generator)
    shares = torch.rand(layers, 2, generator=generator)
    own = torch.randn(layers, outputs, inputs, generator=generator)
    return list(torch.einsum("ls,smn->lmn", shares, common) + 0.4 * own)


class Block(nn.Module):
    """Two linears of one shape, one of another, and one whose width depends on the layer."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(24, 24), nn.Linear(24, 24, bias=False)
        self.up, self.down = nn.Linear(24, 32 + 8 * (n == 2), bias=False), nn.Linear(32 + 8 * (n == 2), 24)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(self.q(x).tanh())
        return x + self.down(self.up(x).relu())


class Layers(nn.Module):
    """Five of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(n) for n in range(5)])
        for n, weight in enumerate(alike(5, 24, 24)):
            self.layers[n].q.weight.data.copy_(weight / 5)
            self.layers[n].o.weight.data.copy_(alike(5, 24, 24, 1)[n] / 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.sigmoid()


ROWS = [torch.randn(64, 24, generator=torch.Generator().manual_seed(n)) + 0.3 for n in range(2)]


def shared(**options: Any) -> tuple[Layers, ec.Plan]:
    model = Layers().eval()
    return model, calibrated(model, ROWS, method="masa", planner="sensitivity", **options)


def substituted(model: Layers, plan: ec.Plan) -> Layers:
    """An eager copy with the weights that the records stand for."""
    made = Layers().eval()
    made.load_state_dict(model.state_dict())
    for record in plan:
        linear: Any = made.get_submodule(record.module)
        if "atoms" in record.tensors:
            linear.weight = nn.Parameter(materialized(record.tensors).float())
            shift = record.tensors.get("shift", torch.zeros(len(linear.weight)))
            linear.bias = nn.Parameter(shift.float() + (0 if linear.bias is None else linear.bias.detach()))
    return made


def test_matrix_pca() -> None:
    """All atoms give the weights back, fewer lose what their eigenvalues say; atoms are orthonormal but for a scale."""
    weights = [w.double() for w in alike(5, 12, 20)]
    for atoms in range(1, 6):
        found, coefficients, values = matrix_pca(weights, atoms)
        assert found.shape == (atoms, 12, 20)
        lost = torch.stack(weights) - torch.einsum("ls,smn->lmn", coefficients, found)
        torch.testing.assert_close(lost.square().sum(), values[atoms:].sum(), rtol=1e-10, atol=1e-9)
        gram = found.flatten(1) @ found.flatten(1).t() / 240
        torch.testing.assert_close(gram, torch.eye(atoms, dtype=torch.float64), rtol=0, atol=1e-10)
    assert float(lost.abs().max()) < 1e-12


def test_no_sharing_of_as_many_matrices_loses_less() -> None:
    """Of the mean, and of every way to let layers use one of S matrices, the best of which are the means of groups."""
    weights = torch.stack(alike(5, 12, 20)).double()
    for atoms in (1, 2, 3):
        _, _, values = matrix_pca(list(weights), atoms)
        ours = float(values[atoms:].sum())
        hard = []
        for choice in itertools.product(range(atoms), repeat=5):
            means = torch.stack([weights[[c == k for c in choice]].mean(0) for k in range(atoms) if k in choice])
            used = [sorted(set(choice)).index(c) for c in choice]
            hard.append(float((weights - means[used]).square().sum()))
        assert ours < min(hard)


def test_weights_that_span_less_than_atoms() -> None:
    one = torch.randn(6, 7)
    found, coefficients, _ = matrix_pca([one, 2 * one, -one], 3)
    assert len(found) == 1
    torch.testing.assert_close(coefficients[1, 0] * found[0], 2 * one.double())


def test_groups_are_of_consecutive_layers_and_one_shape() -> None:
    places = [(f"model.layers.{n}.attn.{p}", (8, 4 if p == "k" else 8)) for n in range(7) for p in ("q", "k")]
    found = groups_of(places, 3)
    assert [sorted(places[n][0] for n in group) for group in found if places[group[0]][0].endswith("q")] == [
        [f"model.layers.{n}.attn.q" for n in part] for part in ((0, 1), (2, 3), (4, 5, 6))
    ]
    assert sorted(n for group in found for n in group) == list(range(14))
    # Layer 10 comes after layer 9, and what has no number is alone.
    assert groups_of([("h.10.x", 1), ("h.9.x", 1), ("x", 1), ("h.9.y", 1)], 4) == [[1, 0], [2], [3]]


@pytest.mark.parametrize("materialize", [True, False])
@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=pytest.mark.slow)])
@torch.no_grad()
def test_what_runs_is_what_the_records_say(
    materialize: bool, bias: bool, tmp_path: Path, no_inductor: list[Any]
) -> None:
    """Made when compiled, or never: the same product. In a file an atom is there once."""
    model, plan = shared(ratio=0.8, group=3, materialize=materialize, bias=bias)
    plan.save(tmp_path)
    loaded = ec.Plan.load(tmp_path)
    assert not plan.diff(loaded)
    told, wanted = planned(model, loaded), substituted(model, plan)
    for rows in (3, 40):
        x = torch.randn(2, rows, 24)
        torch.testing.assert_close(told(x), wanted(x), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(wanted(x), model(x), atol=1e-3)
    found = codes(told)
    assert {name for name, code in found.items() if code == "no-group"} == {"layers.2.up", "layers.2.down"}
    assert sum(code == "rewritten" for code in found.values()) == 18
    kept = sum(t.nbytes for t in {id(t): t for r in loaded for t in r.tensors.values()}.values())
    dense = sum(4 * r.numbers["dense"] for r in plan if r.tensors)
    assert plan.made["masa"] == {"bytes of the weights": dense, "bytes of the plan": kept}
    assert kept <= 0.8 * dense
    assert (tmp_path / "plan.safetensors").stat().st_size < kept + 20_000
    form = next(d.form for d in ec.inspect(told).decisions if d.module == "layers.0.q")
    assert f"a step costs {'what the dense one does' if materialize else 'more than the dense one'}" in form
    one = plan.get("layers.0.q", "low_rank")
    assert one is not None
    assert f"masa {one.numbers['atoms']:.0f} atoms for 2 layers" in form
    # Atoms that graphs read are one tensor for the layers of a group.
    read = Counter(n.target for n in no_inductor[-1].graph.nodes if n.op == "get_attr")
    assert max(read.values()) == (1 if materialize else 3)


@torch.no_grad()
def test_all_of_it_is_the_model(no_inductor: list[Any]) -> None:
    model, plan = shared(ratio=1.0)
    told, x = planned(model, plan), torch.randn(5, 24)
    assert torch.equal(told(x), model(x))
    assert set(codes(told).values()) == {"kept-dense", "no-group"}


@torch.no_grad()
def test_as_many_atoms_as_layers_give_the_model(no_inductor: list[Any]) -> None:
    model, plan = shared(atoms=5, group=5, rank=1, bias=False)
    x = torch.randn(9, 24)
    for record in plan:
        if "atoms" in record.tensors:
            weight = model.get_submodule(record.module).weight
            torch.testing.assert_close(materialized(record.tensors).float(), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(planned(model, plan)(x), model(x), rtol=1e-5, atol=1e-5)


def test_the_best_number_of_atoms_is_taken() -> None:
    """Of all that the budget allows; and what atoms leave is cut for the outputs and not for the weight."""
    _, best = shared(ratio=0.55, round_to=1, group=5)
    each = [shared(ratio=0.55, round_to=1, group=5, atoms=n)[1] for n in (1, 2)]

    def lost(plan: ec.Plan) -> float:
        return sum(r.numbers["error"] ** 2 for r in plan if r.module.endswith(".q"))

    assert lost(best) == pytest.approx(min(map(lost, each)), rel=1e-6)
    # What is told is what is lost, on the rows that were seen.
    model, plan = shared(ratio=0.9, round_to=1, bias=False)
    record = plan.get("layers.0.q", "low_rank")
    assert record is not None
    rows, weight = torch.cat(ROWS), model.layers[0].q.weight.detach()
    error = (rows @ (weight - materialized(record.tensors).float()).t()).norm() / (rows @ weight.t()).norm()
    assert float(error) == pytest.approx(record.numbers["error"], rel=1e-3)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_whitened_residual_loses_no_more(rank: int) -> None:
    weights, inputs = alike(3, 20, 16), SecondMoment(16)
    inputs.update(torch.randn(300, 16) * torch.logspace(0, -2, 16))
    atoms, coefficients, _ = matrix_pca(weights, 1)
    rest = weights[0].double() - coefficients[0, 0] * atoms[0]
    how: dict[str, Any] = {"alpha": 0.5, "damping": 0.0, "mean": False}
    assert spectrum(rest, inputs, "whitened", **how).tail(rank) < spectrum(rest, inputs, "svd", **how).tail(rank)


@pytest.mark.slow
@torch.no_grad()
def test_bf16(no_inductor: list[Any]) -> None:
    model = Layers().eval().bfloat16()
    plan = calibrated(model, [r.bfloat16() for r in ROWS], method="masa", planner="sensitivity", ratio=0.8)
    record = plan.get("layers.1.q", "low_rank")
    assert record is not None
    assert record.tensors["atoms"].dtype == torch.bfloat16
    # An entry of an atom is of order 1, so that no format runs out of numbers.
    assert float(record.tensors["atoms"].double().square().mean()) == pytest.approx(1, rel=1e-2)
    x = torch.randn(6, 24).bfloat16()
    got, wanted = planned(model, plan)(x), substituted(copy.deepcopy(model).float(), plan)(x.float())
    torch.testing.assert_close(got, wanted.bfloat16(), rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: ec.low_rank(method="masa", group=1), "expected 2 or more"),
        (lambda: ec.low_rank(group=3), "options of method='masa'"),
        (lambda: ec.low_rank(method="masa", planner="lorc"), "the same share for each group"),
        (lambda: ec.low_rank(method="masa", budget="3MB"), "the same share for each group"),
        (lambda: ec.low_rank(method="masa", residual=0.1), "the same share for each group"),
        (lambda: ec.low_rank(method="masa", rank=4), "give atoms, too"),
        (lambda: shared(ratio=0.2), r"leaves no room for one atom in a group of \d layers \(layers\.0"),
    ],
)
def test_bad_input(call: Any, said: str) -> None:
    with pytest.raises((ec.OptionError, ec.CalibrationError), match=said):
        call()


@pytest.mark.slow
@torch.no_grad()
def test_an_edited_plan_is_refused(no_inductor: list[Any]) -> None:
    import dataclasses

    model, plan = shared()
    record = plan.get("layers.0.q", "low_rank")
    assert record is not None
    for name, tensor in (("coefficients", torch.ones(9)), ("atoms", record.tensors["atoms"][:, 1:])):
        torch._dynamo.reset()
        bad = dataclasses.replace(record, tensors={**record.tensors, name: tensor})
        with pytest.raises(Exception, match=f"low_rank at layers.0.q: {name} has shape"):
            planned(model, ec.Plan({("layers.0.q", "low_rank"): bad}))(torch.randn(4, 24))
