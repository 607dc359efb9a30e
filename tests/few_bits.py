"""Small models, plans by hand and eager twins for tests of few bits beside other methods."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import effcompile as ec
from effcompile.passes.flap import Flap
from effcompile.passes.low_rank import LowRank
from effcompile.runtime.plan import Record, digest

SIZE, WIDTH = 64, 104
X, STEP = torch.randn(3, 7, SIZE, generator=torch.Generator().manual_seed(1)), slice(0, 1)
FOUR: dict[str, Any] = {"bits": 4, "group": 32}


class Block(nn.Module):
    """A gated block; with ``fused`` gate and up are one linear."""

    def __init__(self, fused: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.fused = fused
        widths = {"gate_up": 2 * WIDTH} if fused else {"gate": WIDTH, "up": WIDTH}
        for name, width in widths.items():
            setattr(self, name, nn.Linear(SIZE, width, bias=bias))
        self.down = nn.Linear(WIDTH, SIZE, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1) if self.fused else (self.gate(x), self.up(x))
        return x + self.down(F.silu(gate) * up)


class Net(nn.Module):
    def __init__(self, layers: int = 1, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(**options) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.tanh()


class Hidden(nn.Module):
    """One linear, which makes no logits: what it gives is averaged."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def rest(self, x: Tensor) -> Tensor:
        return x.tanh().mean(-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.layer(x))


def by_hand(weight: Tensor, bits: int = 4, group: int = 32, symmetric: bool = False) -> Tensor:
    """A weight rounded to nearest, group by group, as the page of the docs says it."""
    made = []
    for part in weight.float().split(group, 1):
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        if symmetric:
            step = (part.abs().amax(1, keepdim=True) * (2 / (2**bits - 1))).half().float()
            codes = ((part / step).round() + 2 ** (bits - 1)).clamp(0, 2**bits - 1)
            made.append((codes - 2 ** (bits - 1)) * step)
        else:
            step, zero = ((high - low) / (2**bits - 1)).half().float(), low.half().float()
            made.append(((part - zero) / step).round().clamp(0, 2**bits - 1) * step + zero)
    return torch.cat(made, 1).to(weight.dtype)


def factors(model: nn.Module, rank: int = 40, shift: bool = True, only: str = "", **options: Any) -> ec.Plan:
    """Random factors of every linear: what is looked at is what becomes of them."""
    told = json.loads(LowRank(**{"rank": rank, "break_even": False} | options).text)
    made = torch.Generator().manual_seed(2)
    records = {}
    for name, linear in model.named_modules():
        if not isinstance(linear, nn.Linear) or only not in name:
            continue
        outputs, inputs = linear.weight.shape
        tensors = {"down": torch.randn(rank, inputs, generator=made), "up": torch.randn(outputs, rank, generator=made)}
        tensors |= {"shift": torch.randn(outputs, generator=made)} if shift else {}
        tensors = {n: (t / inputs**0.5).to(linear.weight.dtype) for n, t in tensors.items()}
        own = {"linear": linear.weight} | ({} if linear.bias is None else {"bias": linear.bias})
        records[name, "low_rank"] = Record(name, "low_rank", told, {r: digest(t) for r, t in own.items()}, {}, tensors)
    return ec.Plan(records)


KEPT = torch.arange(WIDTH)[torch.arange(WIDTH) % 3 > 0].int()


def narrower(model: Net) -> ec.Plan:
    """Two thirds of the neurons of each block, and a bias."""
    told, records = json.loads(Flap(0.3).text), {}
    for n, layer in enumerate(model.layers):
        own = {"up": layer.gate_up, "gate": layer.gate_up} if layer.fused else {"up": layer.up, "gate": layer.gate}
        own |= {"down": layer.down}
        parameters = {role: digest(linear.weight) for role, linear in own.items()}
        parameters |= {f"{role}_bias": digest(m.bias) for role, m in own.items() if m.bias is not None}
        tensors = {"kept": KEPT, "bias": torch.linspace(-1, 1, SIZE)}
        records[f"layers.{n}", "flap"] = Record(f"layers.{n}", "flap", told, parameters, {}, tensors)
    return ec.Plan(records)


def compiled(model: nn.Module, plan: Any = None, few: Any = FOUR, **options: Any) -> nn.Module:
    """On the same weights."""
    told = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    given = {"quantize_weights": few} if few else {}
    told.compile(backend="effcompile", options={"plan": plan, **given, **options})
    return told


@torch.no_grad()
def run(model: nn.Module, x: Tensor = X) -> Tensor:
    out: Tensor = model(x)
    return out


def factored(x: Tensor, linear: nn.Linear, record: Record, keep: Any) -> Tensor:
    """The two products on factors that ``keep`` has rounded."""
    t = record.tensors
    both = [b.double() for b in (linear.bias, t.get("shift")) if b is not None]
    bias = sum(both[1:], both[0]).to(x.dtype) if both else None
    return F.linear(F.linear(x, keep(t["down"])), keep(t["up"]), bias)


def with_factors(model: nn.Module, plan: ec.Plan, keep: Any) -> nn.Module:
    """The eager model of which each linear with a record is those products."""
    twin = copy.deepcopy(model)
    for record in plan:
        linear: Any = twin.get_submodule(record.module)
        linear.forward = lambda x, linear=linear, record=record: factored(x, linear, record, keep)
    return twin


def with_neurons(model: Net, plan: ec.Plan, keep: Any = lambda w, role: w) -> nn.Module:
    """The eager model of fewer neurons; ``keep`` is what becomes of the weight of each role."""
    twin = copy.deepcopy(model)
    for record, layer in zip(plan, twin.layers, strict=True):
        kept = record.tensors["kept"].long()
        sides = {"up": layer.gate_up, "gate": layer.gate_up} if layer.fused else {"up": layer.up, "gate": layer.gate}
        rows = {"gate": kept, "up": kept + WIDTH} if layer.fused else {"gate": kept, "up": kept}
        for role, linear in sides.items():
            small = nn.Linear(SIZE, len(kept))
            small.weight = nn.Parameter(keep(linear.weight.detach()[rows[role]], role))
            small.bias = nn.Parameter(linear.bias.detach()[rows[role]])
            setattr(layer, f"small_{role}", small)
        down = layer.down
        down.weight = nn.Parameter(keep(down.weight.detach()[:, kept], "down"))
        down.bias = nn.Parameter(down.bias.detach() + record.tensors["bias"])
        layer.fused, layer.gate, layer.up = False, layer.small_gate, layer.small_up
    return twin


def rows_of(model: nn.Module, kind: str = "linear") -> dict[str, Any]:
    """The last decision on each site of the newest graph, which an equal model may have had compiled before."""
    return {d.module: d for d in ec.inspect(model).graphs[-1].decisions if d.kind == kind}


def told(model: nn.Module) -> dict[str, list[str]]:
    """Of each linear all that is said: the form, or code and text of the reason."""
    found: dict[str, list[str]] = {}
    for d in ec.inspect(model).graphs[-1].decisions:
        if d.kind == "linear":
            found.setdefault(d.module, []).append(f"{d.reason.code}: {d.reason.text}" if d.reason else d.form)
    return found
