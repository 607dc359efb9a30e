"""Weights in few bits: decoding behind 512 tokens, what reading them must take, and what rounding loses.

The model comes from a file of 4-bit weights in groups of 32: rounding to nearest at 4 bits in such groups is nearly
free on it, and says little of other models. Fewer bits and wider groups say more.
"""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any

import torch
from carve import batches, damage, log_probabilities, texts
from common import (
    EAGER,
    INDUCTOR_DYNAMIC,
    INDUCTOR_STATIC,
    OURS_16,
    Measured,
    Side,
    ratio_of_rounds,
    say,
    shared,
    spread,
)
from decode import rounds_of
from sparse import _without_inductor

import effcompile as ec

SPEED: dict[str, dict[str, Any]] = {
    "w4g32": {"bits": 4, "group": 32},
    "w4g32, head in 8 bits": {"bits": 4, "group": 32, "head_bits": 8},
    "w4g32, head too": {"bits": 4, "group": 32, "head": True},
    "w8g32, head too": {"bits": 8, "group": 32, "head": True},
}
LOSS: dict[str, dict[str, Any]] = {
    "w8g32, head too": {"bits": 8, "group": 32, "head": True},
    "w4g32": {"bits": 4, "group": 32},
    "w4g32, head in 8 bits": {"bits": 4, "group": 32, "head_bits": 8},
    "w4g32, head too": {"bits": 4, "group": 32, "head": True},
    "w4g32 symmetric": {"bits": 4, "group": 32, "symmetric": True},
    "w4g64": {"bits": 4, "group": 64},
    "w4g128": {"bits": 4, "group": 128},
    "w3g32": {"bits": 3, "group": 32},
    "w3g64": {"bits": 3, "group": 64},
    "w3g128": {"bits": 3, "group": 128},
}
GOALS = {"w4g32": 4.0, "w4g32, head in 8 bits": 4.0, "w4g32, head too": 4.0}
LEARNED: dict[str, dict[str, Any]] = {
    "flexround": {"method": "flexround", "lr": 1e-2},
    "cbq": {"method": "cbq", "lr": 5e-3},
    "clipped only": {"method": "flexround", "clip": True, "iterations": 0},
    "flexround, clipped": {"method": "flexround", "clip": True, "lr": 1e-2},
}
"""Each with the rate that did best in trials on three layers."""
ITERATIONS, LENGTH, SEQUENCES = 20, 256, 16
"""Of learned rounding: far fewer steps than in the papers, and tokens and number of the texts."""


def bandwidth() -> float:
    """Bytes a second at which memory is read."""
    block = torch.ones(1 << 26)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - began)
    return block.nbytes / min(times)


def step_bytes(side: Side) -> int:
    """Of all linears of the model in one step, as the report has them: packed ones, and the rest in fp32."""
    torch._dynamo.reset()
    with _without_inductor(), torch.no_grad():
        model = side.model()
        model(torch.zeros(1, 1, dtype=torch.long), use_cache=False)
        # The newest graph: one of fewer decorators on the same weights may be alive, and would be this model's as well.
        done = [d for d in ec.inspect(model).graphs[-1].decisions if d.kind == "linear" and d.action == "rewritten"]
    linears = sum(m.weight.nbytes for m in model.modules() if isinstance(m, torch.nn.Linear))
    return linears + sum((d.bytes_after or 0) - (d.bytes_before or 0) for d in done)


def speed(quick: bool = False) -> list[Measured]:
    """Milliseconds a token behind 512, and what reading the weights alone would take."""
    sides = [Side(name, "effcompile", bits=(16, 16), weights=tuple(options.items())) for name, options in SPEED.items()]
    stock = [EAGER, INDUCTOR_DYNAMIC, INDUCTOR_STATIC]
    medians = rounds_of([*stock, OURS_16, *sides], 512, 1, 2 if quick else 7, 6 if quick else 12)
    rate = bandwidth()
    rows = [Measured("reading memory", rate / 1e9, " GB/s")]
    rows += [Measured(f"{n}, 512 tokens", statistics.median(t), " ms", note=spread(t)) for n, t in medians.items()]
    best = min((medians[side.name] for side in stock[1:]), key=statistics.median)
    for side in (OURS_16, *sides):
        ratios = spread([a / b for a, b in zip(best, medians[side.name])])
        value, goal = ratio_of_rounds(best, medians[side.name]), 2.2 if side.weights else None
        rows.append(Measured(f"{side.name}: over the better Inductor", value, "x", goal, note=ratios))
        size = step_bytes(side)
        note = f"{size / 1e6:.0f} MB; {1e3 * size / rate / statistics.median(medians[side.name]):.0%} of the step"
        rows.append(Measured(f"{side.name}: reading the weights", 1e3 * size / rate, " ms", note=note))
    return rows


@functools.cache
def learned(quick: bool) -> dict[str, tuple[dict[str, Any], Any, float]]:
    """Options, plan and seconds of calibrating of each of :data:`LEARNED`, at 3 bits in groups of 64."""
    found = {}
    given = batches(4 if quick else SEQUENCES, LENGTH)
    for name, chosen in LEARNED.items():
        options = {"bits": 3, "group": 64, "iterations": 10 if quick else ITERATIONS} | chosen
        say(f"weights: {name}")
        began = time.perf_counter()
        plan = ec.calibrate(shared()[0], given, [ec.quantize_weights(**options)], progress=False)
        found[f"w3g64 {name}"] = options, plan, time.perf_counter() - began
    return found


def loss(quick: bool = False) -> list[Measured]:
    """Perplexity over dense, rounded to nearest and learned."""
    model, measured = shared()[0], texts(1024 if quick else 4096)
    dense = [log_probabilities(model, text) for text in measured]
    plain = damage(model, dense, measured).perplexity
    rows, found = [Measured("dense: perplexity", plain)], {}
    settings: dict[str, tuple[dict[str, Any], Any]] = {name: (options, None) for name, options in LOSS.items()}
    for name, (options, plan, seconds) in learned(quick).items():
        rows.append(Measured(f"{name}: calibrating", seconds, " s"))
        settings[name] = (options, plan)
    for name, (options, plan) in settings.items():
        say(f"weights: {name}")
        torch._dynamo.reset()
        with _without_inductor():
            told = Side(name, "effcompile", weights=() if plan else tuple(options.items()), plan=plan).model()
            found[name] = damage(told, dense, measured)
            done = [d for d in ec.inspect(told).decisions if d.kind == "linear" and d.action == "rewritten"]
        if not done or len(done) % model.config.num_hidden_layers > 1:
            raise AssertionError(f"{name} is at {len(done)} linears")
        one = found[name]
        note = f"perplexity {one.perplexity:.2f}, KL {one.kl / one.count:.4f}, same choice {one.same / one.count:.1%}"
        value = 100 * (one.perplexity / plain - 1)
        rows.append(Measured(f"{name}: perplexity over dense", value, " %", GOALS.get(name), at_least=False, note=note))
    for better, worse in (("w3g64 flexround", "w3g64"), ("w3g64 cbq", "w3g64 flexround")):
        ratio = found[worse].perplexity / found[better].perplexity
        rows.append(Measured(f"perplexity, {worse} over {better}", ratio, " x", 1.0))
    return rows
