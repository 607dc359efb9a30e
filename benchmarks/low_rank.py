"""Linears of low rank: what methods and planners lose with a fifth of the parameters gone, and what half of them gain.

Calibrated and measured on the texts of ``carve.py``, which have nothing in common.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
import torch.nn.functional as F
from carve import batches, damage, log_probabilities, texts
from common import Measured, Side, say, shared, spread
from cpu_kernels import interleaved
from sparse import _without_inductor
from torch import Tensor

import effcompile as ec
from effcompile.kernels.low_rank_ops import breaks_even, dense_residual
from effcompile.passes.calibrate import run_all, watching
from effcompile.passes.calibrate_linear import _LinearWatch, each_linear
from effcompile.passes.factors import spectrum
from effcompile.passes.low_rank import LowRank
from effcompile.passes.residual import STEPS, low_rank_and_sparse, split, to_rows
from effcompile.runtime.second_moment import SecondMoment

RATIO = 0.8
SETTINGS = {
    "svd, uniform": LowRank("svd", RATIO, "uniform"),
    "asvd, uniform": LowRank("asvd", RATIO, "uniform"),
    "whitened, uniform, no bias": LowRank("whitened", RATIO, "uniform", bias=False),
    "whitened, uniform": LowRank("whitened", RATIO, "uniform"),
    "whitened, energy": LowRank("whitened", RATIO, "energy"),
    "whitened, lorc": LowRank("whitened", RATIO, "lorc"),
    "whitened, sensitivity": LowRank("whitened", RATIO, "sensitivity"),
    "whitened, sensitivity, no bias": LowRank("whitened", RATIO, "sensitivity", bias=False),
}
"""What is calibrated, all in one pass over the text; each has a plan of its own."""
SHAPES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
"""The linears of a layer, ``[outputs, inputs]``."""
LAYERS = 30


def loss(quick: bool = False) -> list[Measured]:
    """Growth of the loss for each of :data:`SETTINGS`, in nats a token, and who is nearer to dense on each linear."""
    model, measured = shared()[0], texts(1024 if quick else 4096)
    given = batches(2, 1024) if quick else batches()
    dense = [log_probabilities(model, text) for text in measured]
    plain = damage(model, dense, measured)
    rows, grown = [Measured("dense: perplexity", plain.perplexity)], {}
    say("low-rank: calibrating")
    plans = each_linear(model, given, list(SETTINGS.values()), progress=False)
    for name, plan in zip(SETTINGS, plans, strict=True):
        say(f"low-rank: {name}")
        with _without_inductor():
            told = Side(name, "effcompile", plan=plan).model()
            one = damage(told, dense, measured)
            done = [d for d in ec.inspect(told).decisions if d.kind == "linear" and d.action == "rewritten"]
        wanted = sum(bool(record.tensors) for record in plan)
        if len(done) % wanted:
            raise AssertionError(f"{name} is at {len(done)} linears, and planned for {wanted}")
        kept = sum(r.numbers["parameters"] for r in plan) / sum(r.numbers["dense"] for r in plan)
        grown[name] = (one.nats - plain.nats) / one.count
        note = (
            f"perplexity {one.perplexity:.2f}, KL {one.kl / one.count:.3f}, same first {one.same / one.count:.1%}, "
            f"{kept:.3f} of the parameters, {wanted} of {len(plan)} factored"
        )
        rows.append(Measured(f"{name}: growth of the loss", grown[name], " nats", note=note))
    ours, theirs = grown["whitened, sensitivity"], grown["whitened, uniform"]
    rows.append(Measured("sensitivity against uniform: growth", ours / theirs, " x", 0.85, at_least=False))
    return rows + order(given, measured)


def order(given: list[Tensor], measured: list[Tensor]) -> list[Measured]:
    """Linears at which whitened loses no more than ASVD, and ASVD no more than plain SVD, on other text."""
    say("low-rank: errors on other text")
    moments = []
    for some in (given, measured):
        watch = _LinearWatch([LowRank()])
        with watching(shared()[0], watch) as copied:
            run_all(copied, some, watch, progress=False)
        moments.append(watch.sites)
    count = {"whitened, asvd": 0, "asvd, svd": 0, "whitened, svd": 0}
    for name, site in moments[0].items():
        weight, other = site.covered.rows, moments[1][name].inputs.moment
        rank = int(RATIO * breaks_even(*weight.shape))
        lost = {}
        for method in ("svd", "asvd", "whitened"):
            made = spectrum(weight, site.inputs, method, alpha=0.5, damping=1e-6, mean=False).factors(rank)
            rest = weight.double() - made["up"].double() @ made["down"].double()
            lost[method] = float(((rest @ other) * rest).sum())
        for pair in count:
            better, worse = pair.split(", ")
            count[pair] += lost[better] <= lost[worse]
    whole = len(moments[0])
    return [
        Measured(f"{pair.replace(', ', ' loses no more than ')}", n / whole, "", 1.0, note=f"at {n} of {whole} linears")
        for pair, n in count.items()
    ]


PLACES = [
    f"model.layers.{n}.{name}"
    for n in (2, 15, 27)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
]


def residual(quick: bool = False) -> list[Measured]:
    """What a sparse residual, or a second low rank, loses of outputs on other text, over factors of as many bytes."""
    model = shared()[0]
    linears = {place: model.get_submodule(place) for place in PLACES[: 4 if quick else None]}
    given, measured = batches(2, 1024), texts(1024)[:2]
    seen, other = (_moments(model, linears, some) for some in (given, measured))
    ratios: dict[str, list[float]] = {}
    for place, linear in linears.items():
        say(f"low-rank: residual of {place}")
        weight = linear.weight.detach()
        wide, size = weight.double(), tuple(weight.shape)
        planned, moment = int(RATIO * breaks_even(*size)), other[place].moment
        how: Any = {"metric": "whitened", "alpha": 0.5, "damping": 1e-6, "mean": False}

        def lost(rest: Tensor, moment: Tensor = moment) -> float:
            return float(((rest @ moment) * rest).sum().clamp(min=0)) ** 0.5

        def product(made: Any) -> Tensor:
            return made["up"].double() @ made["down"].double()

        found = spectrum(weight, seen[place], **how)
        alone = lost(wide - product(found.factors(planned)))
        for share in (0.1, 0.3, 0.5):
            rank, entries = split(planned, share, *size, 4, 1)
            for name, steps in (("in turn", STEPS), ("once", 0)):
                made, _, _ = low_rank_and_sparse(weight, seen[place], rank, entries, steps=steps, **how)
                rest = wide - product(made)
                rest -= dense_residual(made["values"], made["columns"], made["starts"], size[1]).double()
                ratios.setdefault(f"entries fitted {name}, {share}", []).append(lost(rest) / alone)
            rest = wide - product(found.factors(rank))
            u, s, v = torch.linalg.svd(rest, full_matrices=False)
            more = planned - rank
            rest -= (u[:, :more] * s[:more]) @ v[:more]
            ratios.setdefault(f"second low rank, {share}", []).append(lost(rest) / alone)
    rows = []
    for name, each in ratios.items():
        mean = statistics.geometric_mean(each)
        goal = 0.8 if name == "entries fitted in turn, 0.3" else None
        rows.append(
            Measured(
                f"{name}: error",
                mean,
                " x",
                goal,
                at_least=False,
                note=f"{min(each):.3f} to {max(each):.3f} of {len(each)} linears",
            )
        )
    return rows


@torch.no_grad()
def _moments(model: Any, linears: dict[str, Any], some: list[Tensor]) -> dict[str, SecondMoment]:
    """What linears read."""
    found = {place: SecondMoment(linear.weight.shape[1]) for place, linear in linears.items()}
    hooks = [
        linear.register_forward_pre_hook(lambda _, given, one=found[place]: one.update(given[0].flatten(0, -2)))
        for place, linear in linears.items()
    ]
    for ids in some:
        model(ids.view(-1, ids.shape[-1]), use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return found


def speed(quick: bool = False) -> list[Measured]:
    """The linears of 30 layers at half of their parameters and FLOPs, at one token and at eight, beside dense ones."""
    rows = []
    for tokens in (1, 8):
        made = _sides(tokens)
        times = interleaved(made, 5 if quick else 31)
        dense = times["dense, Inductor"]
        for name, each in times.items():
            ratio = statistics.median(a / b for a, b in zip(dense, each))
            goal = 1.5 if name == "low rank" and tokens == 1 else None
            note = f"{statistics.median(each) * 1e3 / LAYERS:.3f} ms a layer; " + spread(
                [a / b for a, b in zip(dense, each)]
            )
            rows.append(Measured(f"{name}, {tokens} rows: times dense Inductor", ratio, "x", goal, note=note))
    return rows


def _sides(tokens: int) -> dict[str, Any]:
    """A chain of all layers for each side, compiled by Inductor, with weights of their own as in a model."""
    wide = [[torch.randn(m, n).div_(n**0.5) for m, n in SHAPES] for _ in range(LAYERS)]
    ranks = [int(0.5 * breaks_even(m, n)) // 16 * 16 for m, n in SHAPES]
    thin = [
        [(torch.randn(r, n).div_(n**0.5), torch.randn(m, r).div_(r**0.5)) for (m, n), r in zip(SHAPES, ranks)]
        for _ in range(LAYERS)
    ]
    inputs = {n: torch.randn(tokens, n) for _, n in SHAPES}
    # As many bytes as the factors: three tenths of them in entries.
    less = [split(r, 0.3, m, n, 4, 16) for r, (m, n) in zip(ranks, SHAPES)]
    entries = [
        [
            to_rows(torch.randn(m, n) * (torch.rand(m, n) < k / (m * n)), torch.float32)
            for (_, k), (m, n) in zip(less, SHAPES)
        ]
        for _ in range(LAYERS)
    ]
    smaller = [
        [(torch.randn(r, n).div_(n**0.5), torch.randn(m, r).div_(r**0.5)) for (r, _), (m, n) in zip(less, SHAPES)]
        for _ in range(LAYERS)
    ]
    ops = torch.ops.effcompile

    def dense(layer: int, n: int, x: Tensor) -> Tensor:
        return F.linear(x, wide[layer][n])

    def linear(layer: int, n: int, x: Tensor) -> Tensor:
        return ops.linear(x, wide[layer][n], None)

    def two(layer: int, n: int, x: Tensor) -> Tensor:
        down, up = thin[layer][n]
        return F.linear(F.linear(x, down), up)

    def ours(layer: int, n: int, x: Tensor) -> Tensor:
        return ops.low_rank_linear(x, *thin[layer][n], None)

    def sparse(layer: int, n: int, x: Tensor) -> Tensor:
        return ops.low_rank_linear(x, *smaller[layer][n], None, *entries[layer][n])

    def chain(one: Any) -> Any:
        def run() -> list[Tensor]:
            return [one(layer, n, inputs[shape[1]]) for layer in range(LAYERS) for n, shape in enumerate(SHAPES)]

        return torch.compile(run)

    sides = {"dense, Inductor": dense, "dense, our linear": linear, "low rank, Inductor": two, "low rank": ours}
    sides["low rank and entries"] = sparse
    torch._dynamo.reset()  # what is compiled is one function to Dynamo, which stops after eight
    made = {name: chain(one) for name, one in sides.items()}
    for run in made.values():
        run()
    return made
