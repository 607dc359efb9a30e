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
from effcompile.kernels.low_rank_ops import breaks_even
from effcompile.passes.calibrate import run_all, watching
from effcompile.passes.calibrate_linear import _LinearWatch, each_linear
from effcompile.passes.factors import spectrum
from effcompile.passes.low_rank import LowRank

RATIO = 0.8
SETTINGS = {
    "svd, uniform": LowRank("svd", RATIO, "uniform"),
    "asvd, uniform": LowRank("asvd", RATIO, "uniform"),
    "whitened, uniform, no bias": LowRank("whitened", RATIO, "uniform", bias=False),
    "whitened, uniform": LowRank("whitened", RATIO, "uniform"),
    "whitened, energy": LowRank("whitened", RATIO, "energy"),
    "whitened, lorc": LowRank("whitened", RATIO, "lorc"),
    "whitened, sensitivity": LowRank("whitened", RATIO, "sensitivity"),
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

    def chain(one: Any) -> Any:
        def run() -> list[Tensor]:
            return [one(layer, n, inputs[shape[1]]) for layer in range(LAYERS) for n, shape in enumerate(SHAPES)]

        return torch.compile(run)

    sides = {"dense, Inductor": dense, "dense, our linear": linear, "low rank, Inductor": two, "low rank": ours}
    made = {name: chain(one) for name, one in sides.items()}
    for run in made.values():
        run()
    return made
