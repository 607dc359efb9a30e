"""Decoding over pages of the cache: what it costs and gains, layer by layer and with the whole model.

``python benchmarks/paged.py`` prints the times of attention alone, over all lengths; the rest is a section of
``run.py``.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from typing import Any

import decode
import quality
import torch
import torch.nn.functional as F
from common import Measured, Side, console, fill, ratio_of_rounds, say, shared, table
from cpu_kernels import GROUPS, OPS, RATIO, SIZE, interleaved, store
from sparse import _without_inductor
from torch import Tensor

import effcompile as ec
from effcompile import smollm2
from effcompile.kernels import pages
from effcompile.kernels.block_ops import method_text
from effcompile.kernels.form import KVForm
from effcompile.passes.delta import Delta
from effcompile.passes.paged_decode import PagedDecode
from effcompile.passes.quest import Quest

EIGHT: dict[str, Any] = {"backend": "effcompile", "bits": (8, 8), "group": 16}
ALL = Side("8 bits, all keys", **EIGHT)
QUEST = Side(
    "quest, 1,392 tokens",
    **EIGHT,
    sparse=("quest", (("token_budget", 1392), ("skip_layers", 0), ("radius", 0.5))),
)
MOMENTS = Side(
    "quest by moments, 1,392 tokens",
    **EIGHT,
    sparse=("quest", (("token_budget", 1392), ("skip_layers", 0), ("rank_by", "moments"))),
)
DELTA = Side("delta, 768 tokens", **EIGHT, sparse=("delta", (("token_budget", 768), ("full_cache_layers", (0, 3, 12)))))
"""A fifth of 7,000 tokens on the average over layers."""
LAYERS = 30
LENGTHS = (1000, 1500, 2000, 3000, 4000, 7000, 16_000)


def _stores(form: KVForm, length: int) -> tuple[list[list[Tensor | None]], list[Tensor]]:
    """A model's worth of filled stores, so that each layer's comes from memory, and the moments of their pages."""
    made, moments = [], []
    for _ in range(LAYERS):
        capacity, unit = -(-(length + 1) // 512) * 512, pages.unit_of(form)
        state, kept = store(form, 1, capacity), torch.zeros(1, GROUPS, capacity // unit, 2, SIZE)
        key, value = torch.randn(2, 1, GROUPS, length, SIZE).unbind()
        rows = state[0] if state[2] is None else state[2]
        OPS.bound_store(kept, rows, torch.tensor(0), key, unit, "moments")
        OPS.kv_store(*state, torch.tensor(0), key, value, form.name)
        made.append(state)
        moments.append(kept)
    return made, moments


def by_moments(method: PagedDecode) -> bool:
    """Whether the cache must keep moments for ``method``."""
    return isinstance(method, Quest) and method.rank_by == "moments"


def attention(form: KVForm, length: int, methods: dict[str, PagedDecode]) -> dict[str, Callable[[], Any]]:
    """One step of attention in all layers: over all keys, and over the pages that a method chooses, choice included."""
    (states, moments), total, scale, name = _stores(form, length), torch.tensor(length), SIZE**-0.5, form.name
    query = torch.randn(1, GROUPS * RATIO, 1, SIZE)

    def dense(state: list[Tensor | None]) -> Any:
        return OPS.attend(query, *state, total, None, name, scale, True, -1)

    def choose(method: PagedDecode, state: list[Tensor | None], **found: Tensor) -> Any:
        text = method_text(method.name, dataclasses.asdict(method))
        return OPS.select_pages(query, *state[:3], total, None, text, name, scale, **found)

    def quest(method: Quest) -> None:
        for layer, state in enumerate(states):
            if layer < method.skip_layers:
                dense(state)
            else:
                lists = choose(method, state, **({"bounds": moments[layer]} if by_moments(method) else {}))
                OPS.attend_pages(query, *state, total, None, *lists, method.page, name, scale)

    def delta(method: Delta) -> None:
        full = method.full(LAYERS)
        lists: Any = None
        for layer, state in enumerate(states):
            if layer not in full:
                OPS.attend_pages(query, *state, total, None, *lists, method.page, name, scale)
            elif layer + 1 in full:
                dense(state)
            else:
                mass = OPS.attend_mass(query, *state, total, None, method.page, name, scale)[2]
                lists = choose(method, state, mass=mass)

    made: dict[str, Callable[[], Any]] = {"dense": lambda: [dense(state) for state in states]}
    for title, method in methods.items():
        fitted: Any = method.for_store(form)
        run: Any = quest if isinstance(method, Quest) else delta
        if isinstance(method, Delta) or form.bounds_keys or by_moments(method):
            made[title] = lambda run=run, fitted=fitted: run(fitted)
    return made


def layers(
    forms: tuple[KVForm, ...], lengths: tuple[int, ...], rounds: int, methods: dict[str, PagedDecode]
) -> list[Measured]:
    """Attention of a step over all keys, over that over pages, by length."""
    rows = []
    for form in forms:
        for length in lengths:
            say(f"attention over pages: {form.name}, {length} tokens")
            times = interleaved(attention(form, length, methods), rounds)
            dense = times.pop("dense")
            for name, found in times.items():
                value = statistics.median(a / b for a, b in zip(dense, found))
                note = (
                    f"all keys {1000 * statistics.median(dense):.2f} ms, pages {1000 * statistics.median(found):.2f} ms"
                )
                rows.append(
                    Measured(f"{name}: attention at {length:,} in {form.name}, times faster", value, "x", note=note)
                )
    return rows


def loss(sides: list[Side], tokens: int, steps: int, windows: list[int]) -> list[Measured]:
    """Loss of the last ``steps`` of ``tokens`` tokens over all keys of the same cache, in several places of a text.

    The prompt is read once for all sides, densely; the error is the standard error over the places.
    """
    original, tokenizer = shared()
    text = smollm2.topics(tokenizer)
    nats: dict[str, list[float]] = {side.name: [] for side in sides}
    models = {side.name: side.model() for side in sides}
    with _without_inductor(), torch.no_grad():
        for model in models.values():
            model.compile(backend="effcompile")
        for first in windows:
            ids = text[:, first : first + tokens]
            dense = original(ids[:, :-steps], use_cache=True, logits_to_keep=1).past_key_values
            for side in sides:
                model = models[side.name]
                cache = side.cache(model, tokens)
                fill(cache, dense, 1)
                total = 0.0
                for at in range(tokens - steps, tokens - 1):
                    logits = model(ids[:, at : at + 1], past_key_values=cache).logits[0]
                    total += float(F.cross_entropy(logits.float(), ids[0, at + 1 : at + 2]))
                nats[side.name].append(total / (steps - 1))
                say(f"  {steps} tokens at {first}: {side.name} {math.exp(nats[side.name][-1]):.3f}")
    plain, *others = sides
    rows = [Measured(f"{plain.name}: perplexity", math.exp(statistics.mean(nats[plain.name])))]
    for side in others:
        more = [a - b for a, b in zip(nats[side.name], nats[plain.name])]
        error = statistics.stdev(more) / len(more) ** 0.5 if len(more) > 1 else math.nan
        done = sum(d.form.startswith(side.name.split()[0].strip(",")) for d in ec.inspect(models[side.name]).decisions)
        note = f"standard error {100 * error:.2f} over {len(more)} places of {steps} tokens, {done} layers"
        value = 100 * math.expm1(statistics.mean(more))
        rows.append(Measured(f"{side.name}: perplexity over all keys", value, " %", 1.0, False, note))
    return rows


def run(quick: bool = False) -> list[Measured]:
    """Attention alone, whole steps, loss and pass keys of a fifth of the keys."""
    sides = [ALL, QUEST, MOMENTS, DELTA]
    form = KVForm(8, 8, 16)
    options = {"quest": Quest(**dict(QUEST.sparse[1])), "delta": Delta(**dict(DELTA.sparse[1]))}  # type: ignore[index]
    options["quest by moments"] = Quest(**dict(MOMENTS.sparse[1]))  # type: ignore[index]
    rows = layers((form,), (2000,) if quick else (2000, 4000, 7000), 3 if quick else 15, options)
    for length in (1500,) if quick else (4000, 7000):
        found = decode.rounds_of(sides, length, 1, 2 if quick else 7, 6 if quick else 12)
        for side in sides[1:]:
            value = ratio_of_rounds(found[ALL.name], found[side.name])
            note = f"{statistics.median(found[ALL.name]):.1f} ms, and {statistics.median(found[side.name]):.1f} ms"
            rows.append(Measured(f"{side.name}: whole steps at {length:,}, times faster", value, "x", 1.0, note=note))
    windows = [20_000] if quick else [20_000 + 16_000 * i for i in range(6)]
    rows += loss(sides, 5000 if quick else 7000, 16 if quick else 128, windows)
    for side in sides[1:]:
        rows += quality.passkeys(side, (4000,) if quick else (7000,))
    return rows


if __name__ == "__main__":
    forms = KVForm(16, 16), KVForm(8, 8, 16), KVForm(8, 8), KVForm(4, 4)
    default = {"quest": Quest(), "delta": Delta()}
    console.print(table("Attention of a step, all keys over pages", layers(forms, LENGTHS, 15, default)))
