"""FFNs that read half of their neurons, or half of each matrix, beside dense ones: 576 channels, 1536 neurons, SiLU.

``python benchmarks/ffn.py`` prints a table; ``--json FILE`` writes the same figures. A side is a chain of 30 layers
with weights of their own, as in a model, because those of one layer would stay in the CPU's cache; each is compiled by
Inductor as one graph, with the operators called from it. Sides take turns, and a ratio is the median of the ratios of
neighbours. Weights are random and thresholds are those at which half is kept: times do not depend on what is learnt.

``dense`` is what a user has today; ``dense, our linear`` the same with the linear of few rows; ``dense, grouped`` all
neurons in one operator; ``static, Inductor`` a dense FFN of half the width. The router is part of ``routed``.
``indexed`` are single neurons from one list, and ``prompted`` the same with what ``coreinfer`` keeps of its text.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cpu_kernels import interleaved
from rich.console import Console
from rich.table import Table
from torch import Tensor

import effcompile.lowering  # noqa: F401  (registers the kernels)
from effcompile.kernels import core_ops  # noqa: F401  (registers an operator)

SIZE, NEURONS, LAYERS = 576, 1536, 30
GROUPS, SHARED, CHOSEN = 8, 2, 2
"""S2A2E8 in CMoE's words: two groups for every token, two of the other six by choice: half of the neurons."""

OPS = torch.ops.effcompile
GOALS = {"routed": 1.6, "static": 1.9, "column-sparse": 1.6}
Layer = Callable[[Tensor, int], Tensor]


def matrices(dtype: torch.dtype, columns: int = NEURONS) -> list[tuple[Tensor, Tensor]]:
    """Gate and up of each layer, and down transposed, as ``[neurons, size]``."""
    return [torch.randn(3, columns, SIZE, dtype=dtype).div_(SIZE**0.5).unbind(0) for _ in range(LAYERS)]  # type: ignore[misc]


def sides(rows: int, dtype: torch.dtype) -> tuple[dict[str, Layer], Tensor]:
    """For each side, what computes the FFN of a layer; and the input."""
    x = torch.randn(1, rows, SIZE, dtype=dtype)
    full = matrices(dtype)
    down = [d.t().contiguous() for _, _, d in full]
    turned = [(g.t().contiguous(), u.t().contiguous()) for g, u, _ in full]
    half = [tuple(w[: NEURONS // 2].contiguous() for w in layer) for layer in full]
    half_down = [d.t().contiguous() for _, _, d in half]
    width = NEURONS // GROUPS
    routers = [torch.randn(2, GROUPS - SHARED, SIZE, dtype=dtype).unbind(0) for _ in range(LAYERS)]
    frozen = [torch.randperm(NEURONS)[: NEURONS // 2].sort()[0].to(torch.int32).unsqueeze(0) for _ in range(LAYERS)]
    thresholds: list[Tensor] = []
    # As coreinfer has it: a list with room for all, and where its text goes on.
    core = [F.pad(one, (0, NEURONS - one.shape[1]), value=-1) for one in frozen]
    texts = [torch.tensor([9, 1]) for _ in range(LAYERS)]

    def dense(x: Tensor, i: int) -> Tensor:
        gate, up, _ = full[i]
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down[i])

    def linear(x: Tensor, i: int) -> Tensor:
        gate, up, _ = full[i]
        return OPS.linear(F.silu(OPS.linear(x, gate, None)) * OPS.linear(x, up, None), down[i], None)

    def narrow(x: Tensor, i: int) -> Tensor:
        gate, up, _ = half[i]
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), half_down[i])

    def static(x: Tensor, i: int) -> Tensor:
        return OPS.grouped_ffn(x, *half[i], None, None, NEURONS // 2, 1, "silu")

    def everything(x: Tensor, i: int) -> Tensor:
        return OPS.grouped_ffn(x, *full[i], None, None, NEURONS, 1, "silu")

    def routed(x: Tensor, i: int) -> Tensor:
        chosen, weights, _ = OPS.route(x, *routers[i], CHOSEN, "abs_softmax", "unit")
        return OPS.grouped_ffn(x, *full[i], chosen, weights, SHARED * width, width, "silu")

    def indexed(x: Tensor, i: int) -> Tensor:
        return OPS.grouped_ffn(x, *full[i], frozen[i], None, 0, 1, "silu")

    def prompted(x: Tensor, i: int) -> Tensor:
        chosen = OPS.core_list(texts[i], core[i], texts[i][0].clone(), 1)
        return OPS.grouped_ffn(x, *full[i], chosen, None, 0, 1, "silu")

    def columns(x: Tensor, i: int) -> Tensor:
        return OPS.column_ffn(x, *turned[i], full[i][2], thresholds[i], "silu")

    def three(x: Tensor, i: int) -> Tensor:
        first, second, third = thresholds[i].unbind()
        gate, up = OPS.column_linear(x, turned[i][0], first), OPS.column_linear(x, turned[i][1], second)
        return OPS.column_linear(F.silu(gate) * up, full[i][2], third)

    # The chain that column-sparse layers see is their own, so its medians come out of it.
    at = x
    for i, (gate, up, _) in enumerate(full):
        keep = at.float().abs().median()
        some = at.where(at.abs() > keep, 0)
        hidden = F.silu(F.linear(some, gate)) * F.linear(some, up)
        thresholds.append(torch.stack([keep, keep, hidden.float().abs().median()]))
        at = at + columns(at, i)
    found = {"dense": dense, "dense, grouped": everything, "static, Inductor": narrow, "static": static}
    found |= {
        "routed": routed,
        "indexed": indexed,
        "prompted": prompted,
        "column-sparse": columns,
        "three columns": three,
    }
    if rows <= 8 and dtype is torch.float32:
        found["dense, our linear"] = linear
    return found, x


def chain(layer: Layer) -> Callable[[Tensor], Tensor]:
    """All layers, one after another, compiled as one graph."""

    def call(x: Tensor) -> Tensor:
        for i in range(LAYERS):
            x = x + layer(x, i)
        return x

    return torch.compile(call, fullgraph=True, dynamic=False)


def measure(rows: int = 1, dtype: torch.dtype = torch.float32, rounds: int = 60) -> list[dict[str, Any]]:
    """A row for each side: milliseconds a layer, and how many times faster than dense Inductor."""
    made, x = sides(rows, dtype)
    compiled = {name: chain(layer) for name, layer in made.items()}
    times = interleaved({name: lambda call=call: call(x) for name, call in compiled.items()}, rounds)
    return [
        {
            "rows": rows,
            "dtype": str(dtype).removeprefix("torch."),
            "side": name,
            "ms": statistics.median(taken) / LAYERS * 1e3,
            "times_faster": statistics.median(d / t for d, t in zip(times["dense"], taken)),
            "goal": GOALS.get(name) if rows == 1 and dtype is torch.float32 else None,
        }
        for name, taken in times.items()
    ]


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1", help="numbers of tokens, with commas")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    results: list[dict[str, Any]] = []
    # All chains are one function to Dynamo.
    with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=64):
        for rows in map(int, chosen.rows.split(",")):
            torch.compiler.reset()
            results += measure(rows, getattr(torch, chosen.dtype), chosen.rounds)
    capability = torch.backends.cpu.get_cpu_capability()
    where = f"{platform.machine()} {capability}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    table = Table("tokens", "side", "ms a layer", "x dense", "goal", title=f"FFN, {chosen.dtype}: {where}")
    for row in results:
        goal = "" if row["goal"] is None else f"{row['goal']}"
        table.add_row(str(row["rows"]), row["side"], f"{row['ms']:.3f}", f"{row['times_faster']:.2f}", goal)
    Console().print(table)
    if chosen.json:
        chosen.json.write_text(json.dumps({"machine": where, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
