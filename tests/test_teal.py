"""TEAL and WINA: sparsities found greedily, rotated inputs, and what the norms of columns are good for."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from test_carve_energy import record_of, site, tiny
from test_plans import block_of, logits, planned, replace
from torch import Tensor

import effcompile as ec
from effcompile.kernels import ffn_ops
from effcompile.kernels.ffn import FeedForward
from effcompile.passes import teal
from effcompile.passes.feed_forward import Sizes
from effcompile.passes.teal import Teal, rotated, rotation_of, weights_of
from effcompile.passes.wina import Wina
from effcompile.runtime.plan import Record
from models import MODELS


def uneven() -> tuple[FeedForward, Tensor]:
    """A block whose linears differ in what can be left out of them: most of its neurons say next to nothing."""
    block, rows = tiny()
    down = block.down * torch.rand(96, 1, generator=torch.Generator().manual_seed(1)).pow(4)
    return FeedForward(block.up, down, block.gate, "silu"), rows


def moved(block: FeedForward, method: Teal, record: Record, rows: Tensor) -> float:
    """How far the output moves, as the search measures it."""
    wanted = block(rows)
    return float(((method.approximate(block, record)(rows) - wanted).norm(dim=1) / wanted.norm(dim=1)).mean())


@pytest.mark.parametrize("method", [Teal, Wina])
@pytest.mark.parametrize("transform", [False, True])
def test_greedy_reaches_the_target_and_loses_less(method: type[Teal], transform: bool) -> None:
    block, rows = uneven()
    for sparsity in (0.3, 0.5):
        one = method(sparsity, "greedy", transform)
        found = record_of(one, block, rows)
        levels = found.tensors["levels"]
        assert float(levels.mean()) == pytest.approx(sparsity, abs=1e-6)
        assert levels.max() > levels.min() + 0.1
        other = method(sparsity, transform=transform)
        assert moved(block, one, found, rows) < 0.97 * moved(block, other, record_of(other, block, rows), rows)


@pytest.mark.parametrize("gated", [True, False])
def test_each_step_is_the_best_there_is(gated: bool) -> None:
    """Step by step, beside thresholds that are tried on the whole block here."""
    block, rows = uneven()
    if not gated:
        block = FeedForward(block.up, block.down, None, "gelu", torch.randn(96), None, torch.randn(24))
    rows = rows[: teal.ROWS]
    parts, steps = (["gate", "up", "down"] if gated else ["up", "down"]), 8
    levels = dict.fromkeys(parts, 0.0)
    statistics = site(Wina(), block, rows).statistics

    def error(tried: dict[str, float]) -> float:
        limits: dict[str, Any] = {p: statistics[p].quantile(level) for p, level in tried.items()}  # type: ignore[attr-defined]
        at = torch.tensor([limits.get("gate", 0), limits["up"], limits["down"]])
        return moved(block, Wina(), Record("block", "wina", {}, {}, {}, {"thresholds": at}), rows)

    for _ in range(steps):
        levels = min(({**levels, p: levels[p] + 0.025} for p in parts), key=error)
    found = record_of(Wina(steps * 0.025 / len(parts), "greedy"), block, rows)
    wanted = torch.tensor([levels.get(p, 0.0) for p in ("gate", "up", "down")])
    torch.testing.assert_close(found.tensors["levels"], wanted)
    assert not gated or wanted.unique().numel() > 1


def test_one_huge_row_does_not_decide() -> None:
    """As the first token of a text, whose activations are hundreds of times those of others."""
    block, rows = uneven()
    huge = rows.clone()
    huge[::100, 0] = 1000
    plain, other = (record_of(Teal(0.3, "greedy"), block, some).tensors["levels"] for some in (rows, huge))
    assert (plain - other).abs().max() < 0.06


def test_greedy_counts_weights_and_not_linears() -> None:
    """With a narrower output, down weighs less, so its steps are longer; the share of weights is what was asked for."""
    block, rows = uneven()
    narrow = FeedForward(block.up, block.down[:, :8], block.gate, "silu")
    levels = record_of(Teal(0.4, "greedy"), narrow, rows).tensors["levels"]
    numel = torch.tensor([96.0 * 24, 96 * 24, 96 * 8])
    assert float((levels * numel).sum() / numel.sum()) == pytest.approx(0.4, abs=1e-6)


@pytest.mark.parametrize("gated", [True, False])
def test_rotation_changes_nothing_by_itself(gated: bool) -> None:
    block, rows = tiny()
    if not gated:
        block = FeedForward(block.up, block.down, None, "relu", torch.randn(96))
    rotation = rotation_of(block)
    turned = rotated(block, rotation)
    first = turned.up if turned.gate is None else turned.gate
    product = first.t() @ first
    torch.testing.assert_close(product, product.diag().diag(), rtol=0, atol=1e-3)
    torch.testing.assert_close(turned(rows @ rotation), block(rows), rtol=1e-4, atol=1e-3)
    zero = Wina(0.0, transform=True)
    torch.testing.assert_close(
        zero.approximate(block, record_of(zero, block, rows))(rows), block(rows), rtol=1e-4, atol=1e-3
    )


def test_of_orthogonal_columns_no_others_lose_less() -> None:
    """The K inputs of largest ``|x| * norm``, beside every other choice of K; by size alone more is lost."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 10, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, 10)
    block = FeedForward(weight.float(), weight.float(), None, "relu")
    rotation = rotation_of(block).double()
    turned = weight @ rotation
    norms, worse = turned.norm(dim=0), 0
    for x in torch.randn(20, 10, generator=generator, dtype=torch.float64) @ rotation:
        for kept in (3, 6):
            lost = {
                some: float((turned[:, list(some)] @ x[list(some)]).norm())
                for some in itertools.combinations(range(10), 10 - kept)
            }
            own, plain = (
                lost[tuple(sorted(size.topk(10 - kept, largest=False).indices.tolist()))]
                for size in (x.abs() * norms, x.abs())
            )
            assert own <= min(lost.values()) * (1 + 1e-5)
            worse += plain > own * (1 + 1e-5)
    assert worse > 20


@pytest.mark.parametrize(
    ("architecture", "options", "dtype"),
    [
        ("llama", {"allocation": "greedy"}, torch.float32),
        ("llama", {"transform": True}, torch.bfloat16),
        ("gpt2", {"allocation": "greedy", "transform": True}, torch.float32),
        pytest.param("phi3", {"transform": True}, torch.float32, marks=pytest.mark.slow),
        pytest.param("opt", {"allocation": "greedy", "transform": True}, torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_graph_is_what_the_reference_says(
    architecture: str, options: dict[str, Any], dtype: torch.dtype, no_inductor: list[Any]
) -> None:
    model, ids = MODELS[architecture]("sdpa").to(dtype), torch.randint(0, 128, (2, 24))
    for chosen in (ec.wina(0.4, **options), ec.teal(0.4, **options)):
        last = list(ec.calibrate(model, [ids], [chosen], progress=False))[-1]
        expected = copy.deepcopy(model)
        block = block_of(model.get_submodule(last.module), architecture)
        replace(expected.get_submodule(last.module), architecture, chosen.options.approximate(block, last))
        told = planned(model, ec.Plan({(last.module, last.method): last}))
        got, wanted, dense = logits(told, ids), logits(expected, ids), logits(model, ids)
        if dtype is torch.float32:
            torch.testing.assert_close(got, wanted, rtol=3e-5, atol=3e-5)
        assert (got - wanted).float().norm() < 0.2 * (dense - wanted).float().norm()
        words = [w for name, w in (("allocation", " greedy"), ("transform", " rotated")) if name in options]
        forms = {d.form for d in ec.inspect(told).decisions if d.kind == "ffn" and d.action == "rewritten"}
        assert f"{chosen.options.name} 40%{''.join(words)}" in forms


def test_the_rotation_is_counted() -> None:
    """As one more product that reads its whole matrix."""
    model, ids = MODELS["llama"]("sdpa"), torch.randint(0, 128, (1, 24))
    size, found = model.config.hidden_size, []
    for transform in (False, True):
        method = ec.wina(0.5, transform=transform).options
        record = next(iter(ec.calibrate(model, [ids], [method], progress=False)))
        sizes = Sizes(size, model.config.intermediate_size, 4, True)
        cost = method.cost(sizes, record).at(B=1, T=1)
        found.append([cost.bytes, cost.flops])
    (plain_bytes, plain_flops), (bytes_, flops) = found
    assert flops - plain_flops == 2 * size * size
    assert bytes_ - plain_bytes >= size * size * 4


def test_too_sparse_to_be_shared_out() -> None:
    block, rows = tiny()
    with pytest.raises(ValueError, match="leaves nothing of a linear"):
        record_of(Teal(0.99, "greedy"), block, rows)


def test_plans_of_other_allocations_are_told_apart(no_inductor: list[Any]) -> None:
    model, ids = MODELS["llama"]("sdpa"), torch.randint(0, 128, (2, 24))
    plan = ec.calibrate(model, [ids], [ec.teal(0.4)], progress=False)
    told = planned(model, plan, rules={"model.layers.0.mlp": {"teal": {"sparsity": 0.4, "allocation": "greedy"}}})
    logits(told, ids)
    rows = {d.module: d for d in ec.inspect(told).decisions if d.kind == "ffn"}
    left = rows["model.layers.0.mlp"].reason
    assert left is not None
    assert left.code == "other-options"
    with pytest.raises(ec.OptionError, match="allocation='best'"):
        ec.teal(allocation="best")  # type: ignore[arg-type]


def kept_mask(x: Tensor, norms: Tensor | None, sparsity: float) -> Tensor:
    """The entries of a token that are kept, equally many of each token."""
    size = x.abs() if norms is None else x.abs() * norms
    return torch.zeros_like(x).scatter(1, size.topk(round(x.shape[1] * (1 - sparsity)), dim=1).indices, 1.0)


@pytest.fixture(scope="module")
def layers(smollm2: tuple[Any, Any]) -> list[tuple[FeedForward, Tensor, Tensor]]:
    """Every block of a real model, what goes into it on 1,024 tokens, and on 1,024 of other pages."""
    from effcompile import smollm2 as home

    model, tokenizer = smollm2
    text = home.topics(tokenizer)[0]
    modules = [layer.mlp for layer in model.model.layers]
    seen: list[list[Tensor]] = [[] for _ in modules]
    hooks = [
        m.register_forward_pre_hook(lambda _, x, n=n: seen[n].append(x[0].flatten(0, 1))) for n, m in enumerate(modules)
    ]
    with torch.no_grad():
        for first in (40_000, home.TOPICS[0]):
            model(text[None, first : first + 1024], use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return [(block_of(m, "llama"), *rows) for m, rows in zip(modules, seen, strict=True)]


@pytest.mark.exhaustive
@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_norms_help_each_linear_of_each_layer(
    sparsity: float, layers: list[tuple[FeedForward, Tensor, Tensor]]
) -> None:
    """Held-out text, equally many inputs of each token: WINA's error of gate, of up and of down is at most TEAL's.

    That is what its criterion is about: a linear's error, if inputs were independent. The text is finite and they are
    not, so a tie may go the other way by a thousandth.
    """
    ratios = []
    for block, _, held in layers:
        hidden = block.middle(held)
        for part, weight_t in weights_of(block).items():
            x = hidden if part == "down" else held
            plain, informed = (
                float(((x * kept_mask(x, norms, sparsity) - x) @ weight_t).square().sum())
                for norms in (None, weight_t.norm(dim=1))
            )
            ratios.append(informed / plain)
    assert len(ratios) == 90
    assert max(ratios) < 1.001, ratios
    assert sum(ratio < 1 for ratio in ratios) >= 85
    assert sum(ratios) / 90 < 0.992


@pytest.mark.exhaustive
@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_norms_and_whole_blocks(sparsity: float, layers: list[tuple[FeedForward, Tensor, Tensor]]) -> None:
    """With the thresholds of a plan, as compiled: the same share of inputs is left out, whichever of both chooses.

    Of a whole block's output it is not so in each layer: a norm counts every neuron alike, and a block does not. A
    token's mean error is less in most layers, and in no layer more by over 2 %.
    """
    ratios = []
    for block, rows, held in layers:
        errors, shares = [], []
        for method in (Teal(sparsity), Wina(sparsity)):
            record = record_of(method, block, rows)
            got, wanted = method.approximate(block, record)(held), block(held)
            errors.append(float(((got - wanted).norm(dim=1) / wanted.norm(dim=1)).mean()))
            scales = method.scales(block)
            dropped = [
                (ffn_ops.kept(x, limit, scales.get(part)) == 0).float().mean()
                for (part, x), limit in zip(
                    {"gate": held, "up": held, "down": block.middle(held)}.items(), record.tensors["thresholds"]
                )
            ]
            shares.append(torch.stack(dropped))
        assert (shares[0] - shares[1]).abs().max() < 0.005
        assert (shares[0] - sparsity).abs().max() < 0.05
        ratios.append(errors[1] / errors[0])
    assert max(ratios) < 1.02, ratios
    assert sum(ratio <= 1 for ratio in ratios) >= 18, ratios
    assert sum(ratios) / 30 < 1


@pytest.mark.exhaustive
def test_greedy_loses_less_on_other_text(layers: list[tuple[FeedForward, Tensor, Tensor]]) -> None:
    """Some layers of a real model at one sparsity: a token's mean error on held-out text."""
    for number in (2, 11, 15, 27):
        block, rows, held = layers[number]
        for method in (Teal, Wina):
            plain, greedy = (
                moved(block, one, record_of(one, block, rows), held) for one in (method(0.5), method(0.5, "greedy"))
            )
            assert greedy < plain, number
