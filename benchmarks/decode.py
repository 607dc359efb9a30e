"""Milliseconds a token of the whole model, every side in turn within one run."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from common import (
    EAGER,
    INDUCTOR_DYNAMIC,
    INDUCTOR_STATIC,
    K4V4,
    OURS_16,
    Measured,
    Side,
    fill,
    ratio_of_rounds,
    say,
    shared,
    spread,
)

from effcompile import measure, smollm2


def rounds_of(sides: list[Side], length: int, batch: int, rounds: int, tokens: int) -> dict[str, list[float]]:
    """For each side the median milliseconds a token of each round; in a round every side generates ``tokens`` tokens.

    Every side has a cache of its own which one dense prefill filled, so all continue the same text.
    """
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64
    original, tokenizer = shared()
    say(f"decode, {length} tokens, batch {batch}: prefill")
    prompt = smollm2.passkey(tokenizer, length, smollm2.DEPTHS[1])
    start = measure.generate(original, prompt, 1)
    ids = torch.cat([prompt, start.new_tokens], 1).expand(batch, -1)
    room = ids.shape[1] + tokens * (rounds + 1) + 1
    state: dict[str, list[Any]] = {}
    for side in sides:
        model = side.model()
        cache = side.cache(model, room)
        with torch.no_grad():
            fill(cache, start.cache, batch)
        state[side.name] = [model, cache, ids]
    del start
    medians: dict[str, list[float]] = {side.name: [] for side in sides}
    for turn in range(rounds + 1):
        # Forwards and backwards in turn, so that a drift of the machine's speed favours nobody.
        for side in sides if turn % 2 else sides[::-1]:
            model, cache, text = state[side.name]
            run = measure.generate(model, text, tokens, past_key_values=cache)
            state[side.name][2] = torch.cat([text, run.new_tokens], 1)
            if turn:
                medians[side.name].append(run.milliseconds)
                late = "; compiled in a timed round" if run.compiling else ""
                say(f"  round {turn}: {side.name} {run.milliseconds:.1f} ms{late}")
            else:
                say(f"  warm-up: {side.name}, compiling {run.compiling:.0f} s")
    return medians


def _shown(medians: dict[str, list[float]], where: str) -> list[Measured]:
    return [
        Measured(f"{name}, {where}", statistics.median(times), " ms", note=spread(times))
        for name, times in medians.items()
    ]


def _ratio(medians: dict[str, list[float]], slow: list[Side], fast: Side, where: str, goal: float) -> Measured:
    best = min((side.name for side in slow), key=lambda name: statistics.median(medians[name]))
    value = ratio_of_rounds(medians[best], medians[fast.name])
    rounds = spread([a / b for a, b in zip(medians[best], medians[fast.name])])
    return Measured(f"{fast.name}, {where}: times faster", value, "x", goal, note=f"against {best}; {rounds}")


def run(quick: bool = False) -> list[Measured]:
    """All decode rows."""
    rounds, tokens = (2, 6) if quick else (7, 12)
    stock = [EAGER, INDUCTOR_DYNAMIC, INDUCTOR_STATIC]
    rows = []

    medians = rounds_of([*stock, OURS_16, K4V4], 7000, 1, rounds, tokens)
    where = "7,000 tokens"
    rows += _shown(medians, where)
    rows.append(_ratio(medians, stock, OURS_16, where, 1.8))
    rows.append(_ratio(medians, stock, K4V4, where, 2.5))
    rows.append(_ratio(medians, [OURS_16], K4V4, where, 1.15))

    medians = rounds_of([OURS_16, K4V4], 7000, 4, rounds, tokens)
    where = "7,000 tokens, batch 4"
    rows += _shown(medians, where)
    rows.append(_ratio(medians, [OURS_16], K4V4, where, 1.6))

    medians = rounds_of([*stock, OURS_16, K4V4], 512, 1, rounds, tokens)
    where = "512 tokens"
    rows += _shown(medians, where)
    rows.append(_ratio(medians, [INDUCTOR_DYNAMIC, INDUCTOR_STATIC], K4V4, where, 0.95))
    return rows
