"""Feed-forward blocks that do less: what each method loses at each sparsity, beside a static mask of equal width.

Calibrated on ``pydoc_data.topics`` from token 40,000 on, 8 texts of 2,048 tokens; measured on other tokens of it.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from common import EAGER, INDUCTOR_STATIC, OURS_16, Measured, Side, ratio_of_rounds, say, shared, spread
from decode import rounds_of
from formats import Distance
from sparse import _without_inductor
from torch import Tensor

import effcompile as ec
from effcompile import smollm2
from effcompile.passes.calibrate import each

CALIBRATION, SEQUENCES, LENGTH = 40_000, 8, 2048
"""First token, number of texts, tokens of each."""
MEASURED = 1024
"""Tokens of each text that is measured on."""
STATIC = "static mask"
ENERGY: dict[str, Any] = {"grouping": "energy", "router": "fitted", "bias": True}
"""Carved by what neurons write, and not as in the paper."""
SETTINGS: dict[str, Any] = {
    f"{STATIC}, 25 %": ec.flap(0.25, metric="WIFN", structure="UL-UM", bias=False),
    "flap 25 %, no bias": ec.flap(0.25, bias=False),
    "flap 25 %": ec.flap(0.25),
    "carve_moe S3A3E8": ec.carve_moe(3, 3, 8),
    "carve_moe S3A3E8, threshold": ec.carve_moe(3, 3, 8, routing="threshold"),
    "carve_moe S3A3E8, raw": ec.carve_moe(3, 3, 8, profile="raw", router="raw"),
    "carve_moe S3A3E8, energy": ec.carve_moe(3, 3, 8, **ENERGY),
    "carve_moe S3A3E8, energy, threshold": ec.carve_moe(3, 3, 8, routing="threshold", **ENERGY),
    "teal 25 %": ec.teal(0.25),
    "wina 25 %": ec.wina(0.25),
    f"{STATIC}, 50 %": ec.flap(0.5, metric="WIFN", structure="UL-UM", bias=False),
    "flap 50 %": ec.flap(0.5),
    "carve_moe S2A2E8": ec.carve_moe(2, 2, 8),
    "carve_moe S2A2E8, energy": ec.carve_moe(2, 2, 8, **ENERGY),
    "teal 50 %": ec.teal(0.5),
    "wina 50 %": ec.wina(0.5),
    "carve_moe S1A1E8": ec.carve_moe(1, 1, 8),
    "carve_moe S1A1E8, energy": ec.carve_moe(1, 1, 8, **ENERGY),
}
"""What is calibrated, all in one pass over the text; each has a plan of its own."""
GOALS = {
    "teal 25 %": 4.0,
    "wina 25 %": 4.0,
    "carve_moe S3A3E8": 45.0,
    "carve_moe S3A3E8, energy": 45.0,
    "flap 25 %": 45.0,
}


def batches(sequences: int = SEQUENCES, length: int = LENGTH) -> list[Tensor]:
    """The texts that are calibrated on."""
    text = smollm2.topics(shared()[1])[0, CALIBRATION : CALIBRATION + sequences * length]
    return list(text.view(sequences, 1, length))


def texts(tokens: int) -> list[Tensor]:
    """The texts that are measured on."""
    first, _ = smollm2.TOPICS
    return list(smollm2.topics(shared()[1])[:, first : first + tokens].split(MEASURED, 1))


@torch.no_grad()
def log_probabilities(model: Any, text: Tensor) -> Tensor:
    """``[T - 1, V]`` of the next token."""
    found: Tensor = model(text, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return found


def damage(model: Any, dense: list[Tensor], measured: list[Tensor]) -> Distance:
    """How far a model is from ``dense``."""
    found = Distance()
    for text, theirs in zip(measured, dense, strict=True):
        found.add(log_probabilities(model, text), theirs, text[0, 1:])
    return found


def speed(quick: bool = False) -> list[Measured]:
    """Milliseconds a token behind 512, with about half of the neurons or of the inputs, beside dense."""
    methods = {name: SETTINGS[name] for name in ("flap 50 %", "carve_moe S2A2E8", "wina 50 %")}
    say("carve: calibrating")
    plans = each(shared()[0], batches(1, 1024), [decorator.options for decorator in methods.values()])
    sides = [Side(name, "effcompile", bits=(16, 16), plan=plan) for name, plan in zip(methods, plans, strict=True)]
    stock = [EAGER, INDUCTOR_STATIC]
    medians = rounds_of([*stock, OURS_16, *sides], 512, 1, 2 if quick else 7, 6 if quick else 12)
    rows = [Measured(f"{n}, 512 tokens", statistics.median(t), " ms", note=spread(t)) for n, t in medians.items()]
    best = min((medians[side.name] for side in stock), key=statistics.median)
    for side in (OURS_16, *sides):
        ratios = spread([a / b for a, b in zip(best, medians[side.name])])
        goal = 1.25 if side.plan else None
        value = ratio_of_rounds(best, medians[side.name])
        rows.append(Measured(f"{side.name}: over the better of eager and Inductor", value, "x", goal, note=ratios))
        if side.plan:
            own = ratio_of_rounds(medians[OURS_16.name], medians[side.name])
            rows.append(Measured(f"{side.name}: over our dense blocks", own, "x"))
    return rows


def loss(quick: bool = False) -> list[Measured]:
    """Perplexity, KL, agreement and the error of the blocks, for each of :data:`SETTINGS`."""
    model, measured = shared()[0], texts(1024 if quick else 4096)
    given = batches(2, 1024) if quick else batches()
    dense = [log_probabilities(model, text) for text in measured]
    plain = damage(model, dense, measured).perplexity
    rows, found = [Measured("dense: perplexity", plain)], {}
    say("carve: calibrating")
    plans = each(model, given, [decorator.options for decorator in SETTINGS.values()])
    for name, plan in zip(SETTINGS, plans, strict=True):
        say(f"carve: {name}")
        with _without_inductor():
            told = Side(name, "effcompile", plan=plan).model()
            one = damage(told, dense, measured)
            done = [d for d in ec.inspect(told).decisions if d.kind == "ffn" and d.action == "rewritten"]
        if len(done) % model.config.num_hidden_layers or not done:
            raise AssertionError(f"{name} is at {len(done)} of {model.config.num_hidden_layers} blocks")
        error = sum(record.numbers["error"] for record in plan) / len(plan)
        found[name] = one
        note = (
            f"perplexity {one.perplexity:.2f}, KL {one.kl / one.count:.3f}, same first choice "
            f"{one.same / one.count:.1%}, error of a block {error:.3f}"
        )
        value, goal = 100 * (one.perplexity / plain - 1), GOALS.get(name)
        rows.append(Measured(f"{name}: perplexity over dense", value, " %", goal, at_least=False, note=note))
    for better, worse in (
        ("flap 25 %", "flap 25 %, no bias"),
        ("flap 25 %", f"{STATIC}, 25 %"),
        ("carve_moe S3A3E8", f"{STATIC}, 25 %"),
        ("carve_moe S3A3E8, energy", f"{STATIC}, 25 %"),
        ("carve_moe S3A3E8, energy", "flap 25 %"),
        ("carve_moe S3A3E8, energy", "carve_moe S3A3E8"),
        ("carve_moe S2A2E8, energy", f"{STATIC}, 50 %"),
        ("carve_moe S2A2E8, energy", "flap 50 %"),
        ("carve_moe S3A3E8, threshold", "carve_moe S3A3E8"),
        ("carve_moe S3A3E8, energy, threshold", "carve_moe S3A3E8, energy"),
        ("wina 25 %", "teal 25 %"),
        ("wina 50 %", "teal 50 %"),
        ("carve_moe S3A3E8", "carve_moe S2A2E8"),
        ("carve_moe S2A2E8", "carve_moe S1A1E8"),
        ("carve_moe S3A3E8, energy", "carve_moe S2A2E8, energy"),
        ("carve_moe S2A2E8, energy", "carve_moe S1A1E8, energy"),
    ):
        rows.append(Measured(f"KL, {worse} over {better}", found[worse].kl / found[better].kl, " x", 1.0))
    return rows
