"""C++ kernels beside torch's SDPA: attention layers with 9 query and 3 key/value heads of 64, fp32.

``python benchmarks/cpu_kernels.py`` prints a table; ``--json FILE`` writes the same figures. All candidates of a
section take turns, over and over, so that whatever else the machine does falls on all alike: read the ratios. Decoding
goes through as many layers as a model has, because a cache of one layer stays in the CPU's own cache and then shows
nothing; times are per layer.

Baselines: for decode, SDPA on dense fp32 keys and values of exactly the cached length (a static cache would make it
attend to its whole capacity); for prefill, SDPA's flash kernel with ``is_causal``; both with ``enable_gqa``. For
appends, a plain copy into dense buffers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import effcompile.lowering  # noqa: F401  (registers the kernels)
from effcompile.kernels.form import KVForm

GROUPS, RATIO, SIZE = 3, 3, 64
FORMS = (KVForm(16, 16), KVForm(8, 8), KVForm(4, 4), KVForm(3, 3), KVForm(2, 2))
OPS = torch.ops.effcompile


def interleaved(candidates: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate in each round; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call()
    for _ in range(rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def store(form: KVForm, batch: int, capacity: int) -> list[Tensor | None]:
    """An empty store of one layer."""
    state: list[Tensor | None] = []
    for kind in ("key", "value"):
        shapes = form.buffers(kind, batch, GROUPS, capacity, SIZE, torch.float32)  # type: ignore[arg-type]
        state += [torch.zeros(shape, dtype=dtype) for shape, dtype in shapes] + [None] * (3 - len(shapes))
    return state


Candidates = dict[str, Callable[[], Any]]


def attention(batch: int, queries: int, length: int, layers: int) -> Candidates:
    """SDPA, and one call for each form, of the last ``queries`` of ``length`` tokens, in each of ``layers`` layers."""
    dense = [torch.randn(2, batch, GROUPS, length, SIZE).unbind(0) for _ in range(layers)]
    query = torch.randn(batch, GROUPS * RATIO, queries, SIZE)
    full = torch.tensor(length)

    def sdpa() -> None:
        for key, value in dense:
            F.scaled_dot_product_attention(query, key, value, is_causal=queries > 1, enable_gqa=True)

    calls: Candidates = {"sdpa": sdpa}
    for form in FORMS:
        stores = [store(form, batch, -(-length // form.group) * form.group) for _ in dense]
        for state, (key, value) in zip(stores, dense, strict=True):
            OPS.kv_store(*state, torch.tensor(0), key, value, form.name)

        def ours(stores: list[list[Tensor | None]] = stores, name: str = form.name) -> None:
            for state in stores:
                OPS.attend(query, *state, full, None, name, SIZE**-0.5, True, -1)

        calls[form.name] = ours
    return calls


def appending(batch: int, queries: int, length: int, layers: int) -> Candidates:
    """A plain copy, and one append for each form, of the last ``queries`` of ``length`` tokens in each layer."""
    key, value = torch.randn(2, batch, queries, GROUPS, SIZE).transpose(2, 3).unbind(0)
    before = torch.tensor(length - queries)
    room = torch.zeros(layers, 2, batch, GROUPS, length, SIZE)

    def copy() -> None:
        for layer in room:
            layer[0, :, :, length - queries :] = key
            layer[1, :, :, length - queries :] = value

    calls: Candidates = {"copy": copy}
    for form in FORMS:
        stores = [store(form, batch, -(-length // form.group) * form.group) for _ in range(layers)]

        def ours(stores: list[list[Tensor | None]] = stores, name: str = form.name) -> None:
            for state in stores:
                OPS.kv_store(*state, before, key, value, name)

        calls[form.name] = ours
    return calls


@dataclasses.dataclass(frozen=True)
class Section:
    """One comparison: which candidates, at which sizes, how often."""

    title: str
    make: Callable[[int, int, int, int], Candidates]
    batch: int
    queries: int
    length: int
    layers: int
    rounds: int


SECTIONS = (
    Section("decode, 8,192 keys, batch 1, 30 layers", attention, 1, 1, 8192, 30, 15),
    Section("decode, 8,192 keys, batch 4, 8 layers", attention, 4, 1, 8192, 8, 15),
    Section("decode, 512 keys, batch 1, 30 layers", attention, 1, 1, 512, 30, 50),
    Section("prefill, 7,000 tokens, 1 layer", attention, 1, 7000, 7000, 1, 5),
    Section("append 7,000 tokens, 8 layers", appending, 1, 7000, 7000, 8, 10),
    Section("append 1 token at 7,000, 30 layers", appending, 1, 1, 7000, 30, 100),
)


def measure(only: str | None, rounds: int | None) -> list[dict[str, Any]]:
    """One row for each section and candidate: milliseconds a layer, and the baseline's over ours."""
    rows = []
    for s in SECTIONS:
        if only and only not in s.title:
            continue
        times = interleaved(s.make(s.batch, s.queries, s.length, s.layers), rounds or s.rounds)
        baseline = next(iter(times.values()))
        for name, taken in times.items():
            rows.append(
                {
                    "section": s.title,
                    "candidate": name,
                    "median_ms": statistics.median(taken) / s.layers * 1e3,
                    "best_ms": min(taken) / s.layers * 1e3,
                    "times_faster": statistics.median(baseline) / statistics.median(taken),
                    "times_faster_best": min(baseline) / min(taken),
                }
            )
    return rows


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--only", help="sections whose title contains this")
    parser.add_argument("--rounds", type=int, help="rounds of each section instead of the default")
    parser.add_argument("--threads", type=int, help="threads instead of torch's default")
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = measure(chosen.only, chosen.rounds)
    capability = torch.backends.cpu.get_cpu_capability()
    where = f"{platform.machine()} {capability}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    table = Table(
        "section", "candidate", title=f"C++ kernels, fp32, {GROUPS * RATIO}/{GROUPS} heads of {SIZE}: {where}"
    )
    for column in ("median ms", "best ms", "x baseline", "x by best"):
        table.add_column(column, justify="right")
    last = None
    for row in rows:
        if last not in (None, row["section"]):
            table.add_section()
        cells = f"{row['median_ms']:.3f}", f"{row['best_ms']:.3f}"
        ratios = f"{row['times_faster']:.2f}", f"{row['times_faster_best']:.2f}"
        table.add_row(row["section"] if row["section"] != last else "", row["candidate"], *cells, *ratios)
        last = row["section"]
    Console().print(table)
    if chosen.json:
        chosen.json.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
