"""A stack of feed-forward blocks with 200 MiB of weights, and plans for it: run as a script, it measures memory.

``python discarding.py METHOD DTYPE COMPILER`` compiles, calls, discards, calls again, and prints what it saw as JSON.
``COMPILER`` is ``inductor``, or ``none``: graphs run operator by operator.
"""

from __future__ import annotations

import gc
import json
import mmap
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import effcompile as ec
from effcompile.passes import backend
from effcompile.passes.carve_moe import CarveMoE
from effcompile.passes.low_rank import LowRank
from effcompile.runtime import discarded
from effcompile.runtime.plan import Record, digest

CARVED = CarveMoE(shared=2, active=2, experts=8)
THIN = LowRank(rank=32)


class Block(nn.Module):
    """A gated block, beside what it reads."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(size, width, bias=False), nn.Linear(size, width, bias=False)
        self.down = nn.Linear(width, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Stack(nn.Module):
    """Blocks one after another, behind an embedding."""

    def __init__(self, size: int, width: int, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(128, size)
        self.layers = nn.ModuleList(Block(size, width) for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


def carved(model: nn.Module) -> ec.Plan:
    """A plan in a random order: what is looked at is memory, not what a plan loses."""
    records = {}
    for name, block in model.named_modules():
        if isinstance(block, Block):
            width = block.up.out_features
            parameters = {role: digest(getattr(block, role).weight) for role in ("up", "gate", "down")}
            tensors = {"order": torch.randperm(width).int(), "heads": torch.arange(6).int()}
            options = json.loads(CARVED.text)
            records[name, CARVED.name] = Record(name, CARVED.name, options, parameters, tensors=tensors)
    return ec.Plan(records)


def thin(model: nn.Module) -> ec.Plan:
    """Random factors of every linear, small enough for eight blocks in a row to stay finite."""
    records = {}
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear):
            sides = {"up": (linear.out_features, THIN.rank), "down": (THIN.rank, linear.in_features)}
            tensors = {side: 0.03 * torch.randn(sizes) for side, sizes in sides.items()}
            options, parameters = json.loads(THIN.text), {"linear": digest(linear.weight)}
            records[name, THIN.name] = Record(name, THIN.name, options, parameters, tensors=tensors)
    return ec.Plan(records)


METHODS: dict[str, Any] = {
    "carve_moe": lambda model: {"plan": carved(model)},
    "low_rank": lambda model: {"plan": thin(model)},
    "quantize_weights": lambda _: {"quantize_weights": {"bits": 4, "group": 32}},
}


def resident() -> int:
    """Bytes of this process in memory, without what the allocator keeps for later."""
    gc.collect()
    discarded.trim()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


@torch.no_grad()
def main(method: str, dtype: str, compiler: str) -> None:
    if compiler == "none":
        backend.compile_fx = lambda gm, inputs, config_patches=None: gm.forward
    layers = {"float32": 4, "bfloat16": 8}[dtype]
    model = Stack(1024, 4096, layers).eval().to(getattr(torch, dtype))
    model.compile(backend="effcompile", options=METHODS[method](model))
    torch._dynamo.config.automatic_dynamic_shapes = False
    prompt, step = torch.arange(24)[None], torch.arange(1)[None]
    before = [model(ids) for ids in (prompt, step, prompt, step)]
    graphs = dict(torch._dynamo.utils.counters["stats"])
    held = resident()
    done = ec.discard_parameters(model)
    fallen = held - resident()
    after = [model(ids) for ids in (prompt, step, prompt, step)]
    still = held - resident()
    print(
        json.dumps(
            {
                "fallen": fallen,
                "still": still,
                "bytes": done.bytes,
                "names": len(done.names),
                "linears": 3 * layers,
                "kept": len(done.kept),
                "same": all(torch.equal(one, other) for one, other in zip(before, after, strict=True)),
                "finite": all(bool(t.isfinite().all()) for t in after),
                "recompiled": graphs != dict(torch._dynamo.utils.counters["stats"]),
                "told": ec.inspect(model).summary,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
