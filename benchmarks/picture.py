"""Perplexity against bytes: every way of making a step read less, on one text, and a drawing of it.

Bytes are those that a step behind 4,096 tokens reads of linears and of the cache. Keys and values have nothing left
unquantised while perplexity is measured, 256 tokens a call. The model is in fp32, which is what "dense" takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import weights
from carve import batches
from common import Measured, Side, say, shared
from formats import LENGTH, Distance, distance, log_probabilities
from low_rank import each_linear
from sparse import _without_inductor
from transformers import DynamicCache

from effcompile import smollm2
from effcompile.passes.low_rank import LowRank

TOKENS = 4096
"""Tokens in the cache of which bytes are told."""
RANKS = {
    "low rank 0.9": LowRank("whitened", 0.9, "sensitivity"),
    "low rank 0.8": LowRank("whitened", 0.8, "sensitivity"),
    "low rank 0.8, uniform": LowRank("whitened", 0.8, "uniform"),
    "low rank 0.8, residual": LowRank("whitened", 0.8, "sensitivity", residual=0.3),
}
WEIGHTS = ("w8g32, head too", "w4g32", "w4g32, head in 8 bits", "w4g32, head too", "w4g64", "w4g128", "w3g32", "w3g64")
"""Of :data:`weights.LOSS`."""
CACHES: dict[str, dict[str, Any]] = {
    "K8V8": {"key_bits": 8, "value_bits": 8},
    "K8V4": {"key_bits": 8, "value_bits": 4},
    "K4V4": {"key_bits": 4, "value_bits": 4},
    "latents r128 8 bits, V4": {"latent": 128, "key_bits": 8, "value_bits": 4},
    "latents r128 4 bits, V4": {"latent": 128, "key_bits": 4, "value_bits": 4},
}
TOGETHER = (("w8g32, head too", "K8V8"), ("w4g32", "K4V4"), ("low rank 0.9", "K8V4"))
"""What stands together: weights, and a cache."""
UNITS = "perplexity", "MB"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A family, for the drawing; a side that runs the model; options of its cache."""

    family: str
    side: Side
    cache: dict[str, Any] | None = None


def variants(quick: bool) -> dict[str, Variant]:
    """All of them, calibrated."""
    model = shared()[0]
    chosen = dict(list(RANKS.items())[2:3]) if quick else RANKS
    say("picture: ranks")
    plans = each_linear(model, batches(1, 1024) if quick else batches(), list(chosen.values()), progress=False)
    found = {"dense": Variant("dense", Side("dense", "effcompile"))}
    for name, plan in zip(chosen, plans, strict=True):
        found[name] = Variant("low rank", Side(name, "effcompile", plan=plan))
    for name in WEIGHTS:
        found[name] = Variant("few bits", Side(name, "effcompile", weights=tuple(weights.LOSS[name].items())))
    for name, (_, plan, _) in weights.learned(quick).items():
        found[name] = Variant("few bits, learned", Side(name, "effcompile", plan=plan))
    for name, cache in CACHES.items():
        found[name] = Variant("cache", Side(name, "effcompile"), cache)
    for one, other in TOGETHER:
        if one in found:
            found[f"{one} + {other}"] = Variant("together", found[one].side, CACHES[other])
    return found


def run(quick: bool = False) -> list[Measured]:
    """Perplexity and bytes of each variant; :func:`draw` makes a picture of these rows."""
    import effcompile as ec

    if not quick:
        import matplotlib  # noqa: F401  what draw() needs: told now, and not after an hour

    model, tokenizer = shared()
    first, last = smollm2.TOPICS
    texts = smollm2.topics(tokenizer)[:, first : first + LENGTH if quick else last].split(LENGTH, 1)
    config, rows = model.config, []
    dense = [list(log_probabilities(model, DynamicCache(config=config), text)) for text in texts]
    keys = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * TOKENS * model.dtype.itemsize
    read: dict[str, int] = {}
    for name, variant in variants(quick).items():
        say(f"picture: {name}")
        torch._dynamo.reset()
        if variant.side.name not in read:
            read[variant.side.name] = weights.step_bytes(variant.side)
        found, size = Distance(), keys
        torch._dynamo.reset()
        with _without_inductor():
            told = variant.side.model()
            for text, theirs in zip(texts, dense):
                cache: Any = DynamicCache(config=config)
                if variant.cache is not None:
                    cache = ec.Cache(told, LENGTH, **variant.cache, residual=0)
                distance(told, cache, text, theirs, found)
        if variant.cache is not None:
            size = ec.Cache(told, TOKENS, **variant.cache, batch_size=1).nbytes
        size += read[variant.side.name]
        note = f"{variant.family}; KL {found.kl / found.count:.4f}, same first choice {found.same / found.count:.1%}"
        rows += [
            Measured(name, found.perplexity, f" {UNITS[0]}", note=note),
            Measured(name, size / 1e6, f" {UNITS[1]}"),
        ]
    return rows


def draw(rows: Iterable[Measured], path: Path) -> None:
    """A PNG at ``path`` of what :func:`run` found: bytes to the right, perplexity upwards, both on a log scale.

    Raises ``ModuleNotFoundError`` without matplotlib, which ``requirements/picture.txt`` names.
    """
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("Agg")
    every = list(rows)
    points = {r.what: [r.value, 0.0, r.note.partition(";")[0]] for r in every if r.unit.strip() == UNITS[0]}
    for row in every:
        if row.unit.strip() == UNITS[1]:
            points[row.what][1] = row.value
    figure, axes = pyplot.subplots(figsize=(11, 7), layout="constrained")
    families = list(dict.fromkeys(family for *_, family in points.values()))
    for family in families:
        own = {name: point for name, point in points.items() if point[2] == family}
        axes.scatter([p[1] for p in own.values()], [p[0] for p in own.values()], label=family, s=36)
        for name, (perplexity, size, _) in own.items():
            axes.annotate(name, (size, perplexity), xytext=(5, 3), textcoords="offset points", fontsize=7)
    best, edge = float("inf"), []
    for perplexity, size, _ in sorted(points.values(), key=lambda p: (p[1], p[0])):
        if perplexity < best:
            best = perplexity
            edge.append((size, perplexity))
    axes.step(*zip(*edge), where="post", color="grey", linewidth=0.8, zorder=0, label="least so far")
    axes.set(xscale="log", yscale="log", xlabel=f"MB that a step behind {TOKENS:,} tokens reads", ylabel="perplexity")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.set_title("SmolLM2-135M-Instruct: perplexity against bytes")
    axes.legend()
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
