"""Carved experts: what the official code makes of a layer, and groups, a router and a bias made of energies."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from test_plans import block_of, logits, planned, replace
from test_sparse_methods import official
from torch import Tensor, nn

import effcompile as ec
from effcompile.kernels import ffn_ops
from effcompile.kernels.ffn import FeedForward
from effcompile.passes import carve_energy
from effcompile.passes.carve_moe import CarveMoE
from effcompile.passes.feed_forward import Calibrated, FeedForwardPass
from effcompile.passes.flap import Flap
from effcompile.passes.teal import Teal
from effcompile.passes.wina import Wina
from effcompile.runtime.plan import Record
from effcompile.runtime.statistics import Rows, Samples
from models import MODELS

BETTER: dict[str, Any] = {"grouping": "energy", "router": "fitted", "bias": True}


def site(method: FeedForwardPass, block: FeedForward, rows: Tensor) -> Calibrated:
    """What calibration collects at a block that sees ``rows``."""
    statistics, samples = method.statistics(block), Samples(256)
    for one in (*statistics.values(), samples):
        one.update(Rows(rows, block.middle(rows), block))
    return Calibrated("block", block, {}, statistics, samples)


def record_of(method: FeedForwardPass, block: FeedForward, rows: Tensor) -> Record:
    (found,) = method.calibrate([site(method, block, rows)])
    return Record("block", method.name, {}, {}, found.numbers, found.tensors)


def error(method: FeedForwardPass, block: FeedForward, rows: Tensor, held: Tensor) -> float:
    """The square of what is missing on other rows, over that of the output."""
    wanted = block(held)
    got = method.approximate(block, record_of(method, block, rows))(held)
    return float((got - wanted).square().sum() / wanted.square().sum())


def tiny(width: int = 96, size: int = 24, tokens: int = 700) -> tuple[FeedForward, Tensor]:
    """A block whose neurons differ in size, and rows of a few kinds, which use different neurons."""
    generator = torch.Generator().manual_seed(0)
    up, gate, down = (torch.randn(width, size, generator=generator) for _ in range(3))
    kinds = torch.randn(5, size, generator=generator)
    rows = kinds[torch.randint(0, 5, (tokens,), generator=generator)]
    rows = rows + 0.5 * torch.randn(tokens, size, generator=generator)
    return FeedForward(up, down * torch.rand(width, 1, generator=generator), gate, "silu"), rows


class Lap:
    """The solver that the official code asks for: cost, column of each row, row of each column."""

    @staticmethod
    def lapjv(costs: Any) -> tuple[float, Any, Any]:
        rows, columns = linear_sum_assignment(costs)
        return float(costs[rows, columns].sum()), columns, columns.argsort()


@pytest.mark.parametrize(("shared", "active", "experts"), [(3, 3, 8), (1, 1, 8), (2, 4, 12)])
def test_carved_as_the_official_code_does(shared: int, active: int, experts: int) -> None:
    """Markers, shared neurons, groups, representatives, choices and the output of one layer.

    Its slice of an assignment takes the cost for the rows, and the columns are what counts.
    """
    names: dict[str, Any] = {"torch": torch, "nn": nn, "F": nn.functional, "lap": Lap, "np": __import__("numpy")}
    names |= {"Optional": __import__("typing").Optional, "Tuple": tuple, "List": list}
    exec(official("JarvisPei/CMoE", "CMoE_model.py", "class LlamaMLP", None).replace("'cuda'", "'cpu'"), names)
    source = official(
        "JarvisPei/CMoE", "CMoE_utils.py", "@torch.no_grad()\ndef analyze", "@torch.no_grad()\ndef construct_moe"
    )
    exec(source, names)
    width, least = 96 // experts, shared * 96 // experts
    for tokens in range(6000, 9000, 100):
        block, rows = tiny(tokens=tokens)
        unit = block.normalised()
        hidden = unit.middle(nn.functional.normalize(rows, dim=-1))
        _, rates, markers = names["analyze_neuron_activations"](hidden[None], K=10)
        # Ties at the edge of the shared ones, or among the first centroids, would be broken another way.
        tied = rates.sort(descending=True).values[least - 1 : least + experts - shared + 1]
        if tied.unique().numel() == tied.numel():
            break
    else:
        raise AssertionError("some rates tie in every one of these")
    size = block.up.shape[1]
    method = CarveMoE(shared, active, experts)
    carved = record_of(method, block, rows)

    linears = []
    for weight in (block.gate, block.up, block.down.t()):
        assert weight is not None
        linears.append(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
        linears[-1].weight.data = weight
    groups, modules, heads = names["construct_experts_k_means"](rates, markers, experts, shared, size, *linears)

    order = carved.tensors["order"].long()
    assert set(order[: shared * width].tolist()) == set(groups[0])
    assert [sorted(g) for g in groups[1:]] == [sorted(g) for g in order[shared * width :].view(-1, width).tolist()]
    assert carved.tensors["heads"].tolist() == heads

    moe = names["MoE"](size, width, experts, shared, active)
    assert unit.gate is not None
    moe.gate.gate.weight.data, moe.gate.classifier.weight.data = unit.gate[heads], unit.up[heads]
    moe.experts, moe.shared_experts = modules[1:], modules[0]
    held = torch.randn(257, size)
    _, theirs = moe.gate(held)
    rows_of = method._rows(block, carved)
    chosen, weights, _ = ffn_ops.route_reference(held, rows_of["gate"], rows_of["up"], active, "abs_softmax", "unit")
    assert torch.equal(chosen.sort(-1).values.long(), theirs.sort(-1).values)
    assert torch.equal(weights, torch.ones_like(weights))
    with torch.no_grad():
        torch.testing.assert_close(method.approximate(block, carved)(held), moe(held), rtol=1e-4, atol=1e-3)


def left_out(energy: Tensor, place: Tensor, routed: int, active: int) -> float:
    """The energy that rows leave out which take the groups of most."""
    return float(carve_energy.norms(energy, place, routed).square().sort(-1).values[:, : routed - active].sum())


def test_rounds_leave_out_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of equal size; no round is worse than the one before; all are better than chance, and than no choice."""
    block, rows = tiny()
    energy = carve_energy.energies(block, rows)
    written = block.middle(rows)[:, 7:8] * block.down[7]
    torch.testing.assert_close(energy[:, 7], written.square().sum(-1))
    found = []
    for rounds in range(5):
        monkeypatch.setattr(carve_energy, "ROUNDS", rounds)
        place = carve_energy.group(energy, rows, 3, 5, 3, fitted=False)
        assert torch.bincount(place).tolist() == [36, *[12] * 5]
        found.append(left_out(energy, place, 5, 3))
    assert all(later <= before * (1 + 1e-6) for before, later in itertools.pairwise(found))
    assert found[-1] < 0.95 * found[0]
    static = energy.mean(0).sort().values[:24].sum() * rows.shape[0]
    assert found[0] < static
    assert found[-1] < left_out(energy, place[torch.randperm(96)], 5, 3)
    assert place[carve_energy.representatives(energy, place, 5)].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("sizes", [[36, 12, 12, 12, 12, 12], [0, 48, 48], [1, 94, 1]], ids=str)
def test_balanced_is_near_the_least(sizes: list[int]) -> None:
    """Of random costs, some of which nobody pays; the exact solver takes a column for each place."""
    for seed in range(5):
        costs = torch.rand(96, len(sizes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        costs[:, 0] = 0
        place = carve_energy.balanced(costs, sizes)
        assert torch.bincount(place, minlength=len(sizes)).tolist() == sizes
        columns = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        least, _, _ = Lap.lapjv(costs[:, columns].numpy())
        assert least - 1e-9 <= carve_energy._cost(costs, place) <= 1.02 * least + 1e-9


def test_fit_finds_a_linear_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """In units of the mean, with one constant for all; never below 0 on the rows, since its size is the score."""
    monkeypatch.setattr(carve_energy, "RIDGE", 1e-9)
    rows, weight = torch.randn(200, 12) + 3, torch.randn(12, 4)
    wanted = rows @ weight + 50
    found = carve_energy.predict(rows, *carve_energy.Ridge(rows).fit(wanted))
    constant = (found - wanted / wanted.mean()).flatten()
    torch.testing.assert_close(constant, constant[:1].expand_as(constant), rtol=1e-4, atol=1e-4)
    assert found.min() > 0


@pytest.mark.parametrize("options", [{}, BETTER, {"router": "fitted", "routing": "threshold"}], ids=str)
def test_bias_is_the_mean_of_what_is_missing(options: dict[str, Any]) -> None:
    """So it cannot add to the error on the rows it is from, and takes all of a constant error away."""
    block, rows = tiny()
    with_bias = CarveMoE(2, 2, 8, **{**options, "bias": True})
    without = CarveMoE(2, 2, 8, **{**options, "bias": False})
    one, two = record_of(with_bias, block, rows), record_of(without, block, rows)
    missing = block(rows) - without.approximate(block, two)(rows)
    torch.testing.assert_close(one.tensors["bias"], missing.mean(0), rtol=1e-4, atol=1e-4)
    better = block(rows) - with_bias.approximate(block, one)(rows)
    gain = missing.square().sum() - better.square().sum()
    torch.testing.assert_close(gain, rows.shape[0] * one.tensors["bias"].square().sum(), rtol=1e-3, atol=0)


def test_energy_loses_less_on_other_rows() -> None:
    """Than the groups of the official code, with its router and with one that is fitted."""
    block, rows = tiny(tokens=1400)
    rows, held = rows[:700], rows[700:]
    settings = ({}, {"router": "fitted"}, {"grouping": "energy", "router": "fitted"}, BETTER)
    errors = [error(CarveMoE(2, 2, 8, **options), block, rows, held) for options in settings]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", BETTER),
        ("gpt2", {**BETTER, "routing": "threshold"}),
        ("gpt2", {"bias": True}),
        ("llama", {"grouping": "energy"}),
    ],
    ids=str,
)
def test_graph_is_what_the_reference_says(architecture: str, options: dict[str, Any], no_inductor: list[Any]) -> None:
    """The last block alone is rewritten, as in the test of all methods; both blocks are gated or have biases."""
    model = MODELS[architecture]("sdpa")
    ids = torch.randint(0, 128, (2, 40))
    if architecture == "gpt2":
        nn.init.normal_(model.transformer.h[1].mlp.c_proj.bias)
    chosen = ec.carve_moe(2, 3, 8, **options)
    last = list(ec.calibrate(model, [ids], [chosen], progress=False))[-1]
    expected = copy.deepcopy(model)
    module = model.get_submodule(last.module)
    replace(
        expected.get_submodule(last.module),
        architecture,
        chosen.options.approximate(block_of(module, architecture), last),
    )
    told = planned(model, ec.Plan({(last.module, last.method): last}))
    torch.testing.assert_close(logits(told, ids), logits(expected, ids), rtol=3e-5, atol=3e-5)
    assert not torch.allclose(logits(expected, ids), logits(model, ids), atol=1e-3)


@pytest.mark.parametrize("experts", [(8, 0, 8), (3, 5, 8)], ids=str)
def test_with_all_groups_it_is_the_block(experts: tuple[int, int, int], no_inductor: list[Any]) -> None:
    model, ids = MODELS["llama"]("sdpa"), torch.randint(0, 128, (2, 24))
    plan = ec.calibrate(model, [ids], [ec.carve_moe(*experts, **BETTER)], progress=False)
    torch.testing.assert_close(logits(planned(model, plan), ids), logits(model, ids), rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_through_inductor_with_prompt_and_steps() -> None:
    model, ids = MODELS["llama"]("sdpa"), torch.randint(0, 128, (2, 24))
    plan = ec.calibrate(model, [ids], [ec.carve_moe(2, 3, 8, **BETTER)], progress=False)
    told = planned(model, plan)
    with torch.no_grad():
        out = told.generate(ids[:, :9], max_new_tokens=4, do_sample=False)
        again = told(out, use_cache=False).logits.argmax(-1)
    assert torch.equal(out[:, 9:], again[:, 8:-1])
    rows = [d for d in ec.inspect(told).decisions if d.kind == "ffn"]
    assert {d.form for d in rows} == {"carve_moe S2A3E8 energy fitted"}


LAYERS = (1, 15, 25)


@pytest.fixture(scope="module")
def blocks(smollm2: tuple[Any, Any]) -> list[tuple[FeedForward, Tensor, Tensor]]:
    """Some blocks of a real model, what goes into them on 2,048 tokens, and on 1,024 of other pages."""
    from effcompile import smollm2 as home

    model, tokenizer = smollm2
    text = home.topics(tokenizer)[0]
    seen: dict[int, list[Tensor]] = {layer: [] for layer in LAYERS}
    modules = {layer: model.model.layers[layer].mlp for layer in LAYERS}
    hooks = [
        m.register_forward_pre_hook(lambda _, x, n=n: seen[n].append(x[0].flatten(0, 1))) for n, m in modules.items()
    ]
    with torch.no_grad():
        for first in (40_000, 41_024, home.TOPICS[0]):
            model(text[None, first : first + 1024], use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return [(block_of(m, "llama"), torch.cat(seen[n][:2]), seen[n][2]) for n, m in modules.items()]


@pytest.mark.exhaustive
def test_orders_on_a_real_model(blocks: list[tuple[FeedForward, Tensor, Tensor]]) -> None:
    """Errors of blocks on held-out text; the static mask is that of the neurons of largest norm."""

    @functools.cache
    def mean(method: FeedForwardPass) -> float:
        with torch.no_grad():
            return sum(error(method, *block) for block in blocks) / len(blocks)

    def ordered(*methods: FeedForwardPass) -> None:
        errors = [mean(method) for method in methods]
        assert errors == sorted(errors), dict(zip(map(str, methods), errors, strict=True))

    def static(ratio: float) -> Flap:
        return Flap(ratio, metric="WIFN", structure="UL-UM", bias=False)

    for options in ({}, BETTER):
        ordered(*(CarveMoE(n, n, 8, **options) for n in (3, 2, 1)))
    ordered(CarveMoE(**BETTER), static(0.25), CarveMoE())
    ordered(CarveMoE(**BETTER), Flap(0.25, structure="UL-UM"), static(0.25))
    ordered(CarveMoE(2, 2, 8, **BETTER), Flap(0.5, structure="UL-UM"), static(0.5), CarveMoE(2, 2, 8))
    ordered(CarveMoE(**BETTER, routing="threshold"), CarveMoE(**BETTER))
    ordered(Flap(0.25), Flap(0.25, bias=False))
    for sparsity in (0.25, 0.5):
        ordered(Wina(sparsity), Teal(sparsity))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"grouping": "energy", "router": "fitted"}], ids=["paper", "energy"])
def test_routers_in_order(options: dict[str, Any], blocks: list[tuple[FeedForward, Tensor, Tensor]]) -> None:
    """Best choice, by looking at every one, then the true energies, then the router, then chance."""
    method, sums = CarveMoE(**options), torch.zeros(4)
    for block, rows, held in blocks:
        with torch.no_grad():
            record = record_of(method, block, rows)
            place = torch.empty(block.width, dtype=torch.long)
            place[record.tensors["order"].long()] = (torch.arange(block.width) // 192 - 2).clamp(min=0)
            parts = torch.stack([(block.middle(held) * (place == e)) @ block.down for e in range(1, 6)], 1)
            pairs = torch.tensor(list(itertools.combinations(range(5), 2)))
            cost = parts[:, pairs].sum(2).square().sum(-1)
            size = carve_energy.norms(carve_energy.energies(block, held), place, 5)
            worst = size.topk(2, largest=False).indices.sort(-1).values
            oracle = cost.gather(1, (worst[:, None] == pairs).all(-1).int().argmax(1, keepdim=True))
            wanted = block(held)
            own = (method.approximate(block, record)(held) - wanted).square().sum()
            found = torch.stack([cost.amin(1).sum(), oracle.sum(), own, cost.mean(1).sum()])
            sums += found / wanted.square().sum()
    assert sums.tolist() == sorted(sums.tolist()), sums
