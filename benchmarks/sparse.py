"""Sparse attention: what a program over lists costs, and what methods lose and gain on real queries and keys.

Queries, keys and values are those of SmolLM2 on ``pydoc_data.topics``, tokens 20,000 on. Time is that of attention
alone, the choice included, unless a row says otherwise; all candidates of a section take turns.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import quality
import torch
import torch.nn.functional as F
from common import (
    EAGER,
    INDUCTOR_STATIC,
    OURS_16,
    SIDES,
    SPARSE,
    Measured,
    Worker,
    ratio_of_rounds,
    say,
    serve,
    shared,
    spread,
)
from cpu_kernels import interleaved
from torch import Tensor

import effcompile as ec
from effcompile import smollm2
from effcompile.kernels import block_ops, blocks, estimate
from effcompile.kernels.form import KVForm
from effcompile.passes import backend, base
from effcompile.passes.sparse_prefill import SparsePrefill

OPS = torch.ops.effcompile
DENSE = KVForm(16, 16).name
FITTED = 40_000
"""The first token that thresholds are fitted on, far from those that are measured."""
LAYERS = (5, 15, 25)
"""Layers whose queries and keys are looked at."""
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "xattention": ("xattention", {}),
    "xattention, threshold .95": ("xattention", {"threshold": 0.95}),
    "xattention, threshold .95, stride 8": ("xattention", {"threshold": 0.95, "stride": 8}),
    "xattention, threshold .98": ("xattention", {"threshold": 0.98}),
    "flexprefill": ("flexprefill", {}),
    "proxyattn": ("proxyattn", {}),
    "pbs_attn": ("pbs_attn", {}),
    "anchor_attention": ("anchor_attention", {}),
    "vertical_slash": ("vertical_slash", {}),
    "streaming": ("streaming", {}),
}
"""Every method at its paper's default, and XAttention at more."""
Heads = tuple[Tensor, Tensor, Tensor]


def _text(tokens: int) -> Tensor:
    first, _ = smollm2.TOPICS
    return smollm2.topics(shared()[1])[:, first : first + tokens]


def heads_of(tokens: int) -> dict[int, Heads]:
    """Queries, keys and values of :data:`LAYERS` for a prompt of so many tokens, rotated as attention gets them."""
    found: dict[int, Heads] = {}
    real, layers = F.scaled_dot_product_attention, itertools.count()

    def spy(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if (layer := next(layers)) in LAYERS:
            found[layer] = query, key.contiguous(), value.contiguous()
        return real(query, key, value, *args, **kwargs)

    model = shared()[0]
    with torch.no_grad(), mock.patch.object(F, "scaled_dot_product_attention", spy):
        model(_text(tokens), use_cache=False, logits_to_keep=1)
    return found


def attend(heads: Heads, lists: Any) -> Tensor:
    """Attention over block lists."""
    query, key, value = heads
    length, scale = torch.tensor(key.shape[2]), query.shape[3] ** -0.5
    out: Tensor = OPS.attend_blocks(
        query, key, None, None, value, None, None, length, None, *lists, DENSE, scale, True, -1
    )[0]
    return out


def dense(heads: Heads) -> Tensor:
    """Our program over all keys."""
    query, key, value = heads
    length, scale = torch.tensor(key.shape[2]), query.shape[3] ** -0.5
    out: Tensor = OPS.attend(query, key, None, None, value, None, None, length, None, DENSE, scale, True, -1)[0]
    return out


def sdpa(heads: Heads) -> Tensor:
    """SDPA's flash kernel."""
    return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)


def _chosen(method: SparsePrefill, heads: Heads) -> Any:
    """A method's lists for one layer, as arguments of ``attend_blocks``."""
    query, key, _ = heads
    made = OPS.select_blocks(query, key, None, method.method, query.shape[3] ** -0.5)
    return *made, method.block_size


def _median(slow: list[float], fast: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast))


def lists(quick: bool = False) -> list[Measured]:
    """Time of the program over lists against all keys, at random lists; and XAttention with its choice."""
    tokens, rounds = (2048, 3) if quick else (7000, 7)
    say(f"lists, {tokens} tokens")
    heads = heads_of(tokens)
    one = heads[LAYERS[1]]
    torch.manual_seed(0)
    count = blocks.count_blocks(tokens, blocks.BLOCK)
    may, own = (f(tokens, tokens, blocks.BLOCK) for f in (blocks.possible, blocks.own))
    whole = blocks.whole(tokens, tokens, blocks.BLOCK)
    candidates: dict[str, Callable[[], Any]] = {"SDPA": lambda: sdpa(one), "dense": lambda: dense(one)}
    densities = {}
    for wanted in (0.1, 0.25, 0.5):
        # Of the blocks that are not on the diagonal, as many as make up the density with it.
        share = (wanted * may.sum() - own.sum()) / (may.sum() - own.sum())
        keep = (torch.rand(1, one[0].shape[1], count, count) < share) & may | own
        made = (*block_ops.of(blocks.lists(keep, whole, blocks.BLOCK)),)
        name = f"density {wanted}"
        densities[name] = float(blocks.density(keep, tokens, tokens, blocks.BLOCK).mean())
        candidates[name] = lambda made=made: attend(one, made)
    default = base.get("xattention")(min_length=0)
    candidates["xattention"] = lambda: [attend(h, _chosen(default, h)) for h in heads.values()]
    candidates["SDPA, three layers"] = lambda: [sdpa(h) for h in heads.values()]
    times = interleaved(candidates, rounds)
    value = _median(times["SDPA"], times["dense"])
    rows = [Measured("all keys, against SDPA", value, "x", 1.0, note=spread(times["dense"], " s"))]
    for name, found in densities.items():
        value = _median(times[name], times["dense"])
        rows.append(Measured(f"time over all keys at density {found:.2f}", value, "", found + 0.05, at_least=False))
    value = _median(times["SDPA, three layers"], times["xattention"])
    note = f"choice included, layers {', '.join(map(str, LAYERS))}"
    rows.append(Measured("xattention at its default, against SDPA", value, "x", 2.0, note=note))
    return rows


def crossover(quick: bool = False) -> list[Measured]:
    """The shortest prompt from which a method's attention, its choice included, is faster than over all keys."""
    lengths, rounds = ((512, 1024), 3) if quick else ((512, 1024, 1536, 2048, 3072, 4096, 6144, 8192), 7)
    ratios: dict[str, dict[int, float]] = {}
    for tokens in lengths:
        say(f"crossover, {tokens} tokens")
        one = heads_of(tokens)[LAYERS[1]]
        candidates: dict[str, Callable[[], Any]] = {"dense": lambda one=one: dense(one)}
        for name, (kind, options) in SETTINGS.items():
            method = base.get(kind)(min_length=0, **options)
            if isinstance(method, SparsePrefill) and not (method.gathers or method.reorders):
                candidates[name] = lambda one=one, method=method: attend(one, _chosen(method, one))
        times = interleaved(candidates, rounds)
        for name in candidates.keys() - {"dense"}:
            ratios.setdefault(name, {})[tokens] = _median(times[name], times["dense"])
    rows = []
    for name in SETTINGS:
        if name not in ratios:
            continue
        found = ratios[name]
        first = next((n for n in lengths if all(found[m] < 1 for m in lengths if m >= n)), None)
        note = "time over all keys: " + ", ".join(f"{n} {ratio:.2f}" for n, ratio in found.items())
        rows.append(Measured(f"{name}: faster from", math.inf if first is None else first, " tokens", note=note))
    return rows


def choices(quick: bool = False) -> list[Measured]:
    """Of methods that choose blocks: density, time with the choice over all keys, and mass against the best blocks."""
    tokens, rounds = (2048, 2) if quick else (7000, 3)
    say(f"choices, {tokens} tokens")
    heads, rows = heads_of(tokens), []
    # Of each block the exact mass: what an oracle would choose by.
    mass = {
        layer: estimate.pooled(q, k, scale=q.shape[3] ** -0.5, block=blocks.BLOCK, stride=1)
        for layer, (q, k, _) in heads.items()
    }
    for name, (kind, options) in SETTINGS.items():
        method = base.get(kind)(min_length=0, **options)
        if not isinstance(method, SparsePrefill) or method.gathers or method.reorders:
            continue
        say(f"choices: {name}")
        density, kept, best = [], [], []
        for layer, one in heads.items():
            made = blocks.BlockLists(*_chosen(method, one))
            keep = made.keep()
            density.append(float(blocks.density(keep, tokens, tokens, blocks.BLOCK).mean()))
            kept.append(float((mass[layer] * keep).sum() / mass[layer].sum()))
            ranked = mass[layer].sort(-1, descending=True).values.cumsum(-1)
            top = ranked.gather(-1, keep.sum(-1, keepdim=True) - 1)
            best.append(float(top.sum() / mass[layer].sum()))
        sides: dict[str, Callable[[], Any]] = {
            "dense": lambda: [dense(h) for h in heads.values()],
            "sparse": lambda method=method: [attend(h, _chosen(method, h)) for h in heads.values()],
        }
        times = interleaved(sides, rounds)
        note = f"density {statistics.mean(density):.2f}, keeps {statistics.mean(kept):.3f} of the mass"
        rows.append(
            Measured(f"{name}: time over all keys", _median(times["sparse"], times["dense"]), "", None, note=note)
        )
        share = statistics.mean(k / b for k, b in zip(kept, best))
        rows.append(Measured(f"{name}: mass over that of the best blocks, as many", share, "", 0.95))
    return rows


@contextmanager
def _without_inductor() -> Iterator[None]:
    """Rewritten graphs run operator by operator: losses are the same, and nothing is compiled but our kernels."""
    torch._dynamo.reset()
    with mock.patch.object(backend, "compile_fx", lambda gm, inputs, config_patches=None: gm.forward):
        yield


def _model(kind: str, options: dict[str, Any], **cache: Any) -> Any:
    """The model with a sparse method on it, sharing its weights with all others."""
    original = shared()[0]
    model = copy.deepcopy(original, {id(t): t for t in (*original.parameters(), *original.buffers())})
    if cache:
        ec.compress_kv(**cache)(model)
    if kind:
        ec.sparse_attention(kind, **options)(model)
    return model


def loss(quick: bool = False) -> list[Measured]:
    """Perplexity of one prompt of natural text, and density, at each paper's default and at more."""
    return _losses(1024 if quick else 4096, SETTINGS)


def thresholds(quick: bool = False) -> list[Measured]:
    """XAttention with a threshold fitted to each layer, against one threshold that visits as many blocks."""
    tokens = 1024 if quick else 4096
    text, rows = _text(tokens), []
    fitting = smollm2.topics(shared()[1])[:, FITTED : FITTED + tokens]
    for share in (0.9, 0.95):
        say(f"thresholds: fitting to {share}")
        plan = ec.calibrate(shared()[0], [fitting], [ec.xattention(threshold=share, min_length=0)], progress=False)
        found = {}
        one_for_all = {"xattention": {"threshold": share, "min_length": 0}}
        for name, options in {"one": one_for_all, "fitted": {"plan": plan}}.items():
            say(f"thresholds: {name}")
            with _without_inductor(), torch.no_grad():
                model = _model("", {})
                model.compile(backend="effcompile", options={"verify": True, **options})
                logits = model(text, use_cache=False).logits[0, :-1].float()
            seen = [d.density for d in ec.inspect(model).decisions if d.density is not None]
            if len(seen) != model.config.num_hidden_layers:
                raise AssertionError(f"{name} is at {len(seen)} layers")
            found[name] = math.exp(F.cross_entropy(logits, text[0, 1:]).item()), statistics.mean(seen)
        (one, dense), (fitted, fitted_dense) = found["one"], found["fitted"]
        note = f"perplexity {fitted:.3f} at density {fitted_dense:.3f}, and {one:.3f} at {dense:.3f} with one threshold"
        rows.append(Measured(f"fitted to {share}: perplexity over one threshold's", fitted / one, "", 1.0, False, note))
    return rows


def _losses(tokens: int, settings: dict[str, tuple[str, dict[str, Any]]], goal: float | None = None) -> list[Measured]:
    """Rows of perplexity over dense, with the density and the mass that ``verify`` reports."""
    text = _text(tokens)
    rows, plain = [], 0.0
    for name, (kind, options) in {"dense": ("", {}), **settings}.items():
        say(f"loss of {tokens} tokens: {name}")
        with _without_inductor(), torch.no_grad():
            model = _model(kind, options | {"min_length": 0} if kind else {})
            model.compile(backend="effcompile", options={"verify": True})
            logits = model(text, use_cache=False).logits[0, :-1].float()
            found = math.exp(F.cross_entropy(logits, text[0, 1:]).item())
        if not kind:
            plain = found
            rows.append(Measured("dense: perplexity", found))
            continue
        seen = [d for d in ec.inspect(model).decisions if d.density is not None]
        if len(seen) != model.config.num_hidden_layers:
            raise AssertionError(f"{name} is at {len(seen)} of {model.config.num_hidden_layers} layers")
        density, kept = (statistics.mean(getattr(d, what) for d in seen) for what in ("density", "kept"))
        note = f"perplexity {found:.2f}, density {density:.2f}, keeps {kept:.3f} of the mass"
        rows.append(Measured(f"{name}: perplexity over dense", 100 * (found / plain - 1), " %", goal, False, note))
    return rows


def prompt(quick: bool = False) -> list[Measured]:
    """Reading a natural prompt with the whole model: seconds, loss and pass keys of one setting."""
    tokens, rounds = (2100, 2) if quick else (7000, 4)
    sides = [EAGER, INDUCTOR_STATIC, OURS_16, SPARSE]
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    workers = {name: Worker("sparse.py", name) for name in seconds}
    try:
        for name, process in workers.items():
            say(f"prompt, warm-up: {name}")
            process.ask(tokens=tokens)
        for turn in range(rounds):
            for name in list(workers) if turn % 2 else list(workers)[::-1]:
                seconds[name].append(workers[name].ask(tokens=tokens)["seconds"])
                say(f"  round {turn + 1}: {name} {seconds[name][-1]:.1f} s")
    finally:
        for process in workers.values():
            process.close()
    rows = [Measured(f"{tokens} tokens, {n}", statistics.median(t), " s", note=spread(t)) for n, t in seconds.items()]
    best = [min(pair) for pair in zip(seconds[EAGER.name], seconds[INDUCTOR_STATIC.name])]
    for side, goal in ((OURS_16, None), (SPARSE, 1.4)):
        value = ratio_of_rounds(best, seconds[side.name])
        rows.append(Measured(f"{side.name} against the better of eager and Inductor", value, "x", goal))
    assert SPARSE.sparse is not None
    kind, options = SPARSE.sparse[0], dict(SPARSE.sparse[1])
    rows += [row for row in _losses(tokens, {SPARSE.name: (kind, options)}, 1.0) if row.what != "dense: perplexity"]
    return [*rows, *quality.passkeys(SPARSE, (tokens,))]


def _serve(name: str) -> None:
    """Answer ``{"tokens": n}`` with the seconds in which one side reads ``n`` tokens of natural text."""
    from effcompile import measure

    side = SIDES[name]
    model, more = side.model(), {"cache_implementation": "static"} if side.static else {}
    serve(lambda tokens: {"seconds": measure.generate(model, _text(tokens), 1, **more).first})


if __name__ == "__main__":
    _serve(sys.argv[1])
