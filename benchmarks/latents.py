"""What latents of keys and values cost and save: bytes, the distance to the dense model, the time of a decode step."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
from common import EAGER, Measured, say, shared
from formats import LENGTH, Distance, distance, log_probabilities
from transformers import DynamicCache

import effcompile as ec
from effcompile import smollm2

FORMS: dict[str, dict[str, Any]] = {
    "r192 16 bits, V16": {"latent": 192, "key_bits": 16, "value_bits": 16},
    "r160 16 bits, V16": {"latent": 160, "key_bits": 16, "value_bits": 16},
    "r128 16 bits, V16": {"latent": 128, "key_bits": 16, "value_bits": 16},
    "r96 16 bits, V16": {"latent": 96, "key_bits": 16, "value_bits": 16},
    "0.67 16 bits, V16": {"latent": 0.67, "key_bits": 16, "value_bits": 16},
    "r128 8 bits, V4": {"latent": 128, "key_bits": 8, "value_bits": 4},
    "r128 4 bits, V4": {"latent": 128, "key_bits": 4, "value_bits": 4},
}
"""Ranks of 192, or a share of all of them, and bits of latents and values, as options of a cache."""
BY_WEIGHTS: dict[str, dict[str, Any]] = {
    "16 bits, V r176 16 bits": {"value_latent": 176, "key_bits": 16, "value_bits": 16},
}
"""The same with latents of values, cut by their weights alone."""
FITTED: dict[str, dict[str, Any]] = {
    "r128 16 bits, V16": {"latent": 128, "key_bits": 16, "value_bits": 16},
    "r96 16 bits, V16": {"latent": 96, "key_bits": 16, "value_bits": 16},
    "0.67 16 bits, V16": {"latent": 0.67, "key_bits": 16, "value_bits": 16},
    "16 bits, V r160 16 bits": {"value_latent": 160, "key_bits": 16, "value_bits": 16},
    "16 bits, V r128 16 bits": {"value_latent": 128, "key_bits": 16, "value_bits": 16},
    "16 bits, V r96 16 bits": {"value_latent": 96, "key_bits": 16, "value_bits": 16},
    "16 bits, V 0.67 16 bits": {"value_latent": 0.67, "key_bits": 16, "value_bits": 16},
    "r128 8 bits, V r128 8 bits": {"latent": 128, "value_latent": 128, "key_bits": 8, "value_bits": 8},
    "r128 8 bits, V r128 4 bits": {"latent": 128, "value_latent": 128, "key_bits": 8, "value_bits": 4},
}
"""The same once latents were fitted on other text."""
FIT = 8192
"""Tokens that they are fitted on, the first of the topics."""
GOAL = "r128 8 bits, V4"
TIMED = {
    "K8V4": {"key_bits": 8, "value_bits": 4},
    GOAL: FORMS[GOAL],
    "K8V8": {"key_bits": 8, "value_bits": 8},
    "K8, V r128 8 bits": {"key_bits": 8, "value_bits": 8, "value_latent": 128},
}
TOKENS = 2000
"""Tokens that a timed step follows."""


def run(quick: bool = False) -> list[Measured]:
    """Bytes a token against bf16 keys and values, KL and perplexity with nothing left unquantised, and step times."""
    model, tokenizer = shared()
    first, last = smollm2.TOPICS
    texts = smollm2.topics(tokenizer)[:, first : first + LENGTH if quick else last].split(LENGTH, 1)
    config, rows, plain = model.config, [], Distance()
    tokens = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    say(f"latents, {len(texts)} texts of {LENGTH} tokens: dense")
    dense = [list(log_probabilities(model, DynamicCache(config=config), text)) for text in texts]
    for text, theirs in zip(texts, dense):
        distance(model, DynamicCache(config=config), text, theirs, plain)
    fitted = copy.deepcopy(model)
    for kind, forms in (("", FORMS), ("by weights ", BY_WEIGHTS), ("fitted ", FITTED)):
        if kind:
            fit = smollm2.topics(tokenizer)[:, : FIT // 4 if quick else FIT].split(LENGTH, 1)
            ec.fit_latents(fitted, fit if kind == "fitted " else None)
        for name, form in forms.items():
            say(f"latents: {kind}{name}")
            found, used = Distance(), fitted if kind else model
            for text, theirs in zip(texts, dense):
                distance(used, ec.Cache(used, LENGTH, **form, residual=0), text, theirs, found)
            over = 100 * (found.perplexity / plain.perplexity - 1)
            note = f"KL {1e3 * found.kl / found.count:.2f} mnat, same first choice {found.same / found.count:.1%}"
            goal = {"r192 16 bits, V16": 0.05, GOAL: 15.0}.get(kind + name)
            what = f"{kind}{name}: perplexity over dense ({plain.perplexity:.2f})"
            rows.append(Measured(what, over, " %", goal, False, note))
    cache = ec.Cache(model, 8192, **FORMS[GOAL], residual=0, batch_size=1)
    share = cache.nbytes / (8192 * tokens)
    rows.append(Measured(f"{GOAL}: bytes of 8,192 tokens over bf16", share, "", 0.4, at_least=False))
    return rows + _steps(quick)


def _steps(quick: bool) -> list[Measured]:
    """Milliseconds of a step, each side in turn."""
    sides = {}
    _, tokenizer = shared()
    text = smollm2.topics(tokenizer)[:, :TOKENS]
    for name, form in TIMED.items():
        say(f"latents: a step after {TOKENS} tokens, {name}")
        model = EAGER.model()
        if "value_latent" in form:
            ec.fit_latents(model)  # how fast it is does not depend on what it is fitted to
        model.compile(backend="effcompile")
        cache = ec.Cache(model, TOKENS + 400, **form)
        with torch.no_grad():
            model(input_ids=text, past_key_values=cache)
            for _ in range(3):
                model(input_ids=text[:, :1], past_key_values=cache)
        sides[name] = model, cache
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(10 if quick else 100):
        for name, (model, cache) in sides.items():
            start = time.perf_counter()
            with torch.no_grad():
                model(input_ids=text[:, :1], past_key_values=cache)
            times[name].append(time.perf_counter() - start)
    mean = {name: 1e3 * statistics.median(found) for name, found in times.items()}
    rows = [Measured(f"{name}: a step after {TOKENS:,} tokens", value, " ms") for name, value in mean.items()]
    names = list(TIMED)
    for whole, ours in zip(names[::2], names[1::2]):
        ratio = statistics.median(b / a for a, b in zip(times[whole], times[ours]))
        rows.append(Measured(f"{ours} over {whole}: time of a step", ratio, " x"))
    return rows
