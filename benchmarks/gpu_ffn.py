"""Kernels of FFNs that read a part of their weights, for ``gpu.py``: checks, sides to time, and what is known on paper.

With ``device="cpu"`` and TRITON_INTERPRET=1 a check runs anywhere, slowly.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from gpu_checks import waiting_is_an_error
from rich.console import Console
from rich.table import Table
from torch import Tensor

from effcompile.kernels import ffn_cost, ffn_ops
from effcompile.kernels.cost import Cost
from effcompile.lowering import triton_ffn

CHIPS = ("sm_80", "sm_90", "sm_100", "gfx942")
TOKENS = (1, 8, 64, 4096)


@dataclasses.dataclass(frozen=True)
class Shape:
    """An FFN with a gate: channels, neurons for all tokens, and groups of which a token has some."""

    name: str
    size: int
    shared: int
    width: int
    groups: int
    slots: int

    @property
    def neurons(self) -> int:
        return self.shared + self.groups * self.width

    @property
    def active(self) -> int:
        """Neurons of one token."""
        return self.shared + self.slots * self.width

    def cost(self, tokens: int, itemsize: int = 2) -> Cost:
        """With groups as many as tokens that choose by themselves are expected to use."""
        active = round(ffn_cost.groups_used(self.groups, self.slots, tokens))
        given = {"shared": self.shared, "width": self.width, "active": active, "uses": tokens * self.slots}
        return ffn_cost.grouped_ffn(tokens, self.size, **given, itemsize=itemsize)


SHAPES = (
    Shape("SmolLM2-135M, S3A3E8", 576, 576, 192, 5, 3),
    Shape("Llama-3-8B, S3A3E8", 4096, 5376, 1792, 5, 3),
    Shape("Mixtral-8x7B", 4096, 0, 14336, 8, 2),
)


class Case(NamedTuple):
    """A block, tokens, and their choice."""

    x: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    chosen: Tensor
    weights: Tensor

    def to(self, device: str, dtype: torch.dtype | None = None) -> Case:
        def cast(t: Tensor) -> Tensor:
            return t.to(device, dtype if t.is_floating_point() and dtype is not None else t.dtype)

        return Case(*map(cast, self))


def made(shape: Shape, tokens: int, dtype: torch.dtype, device: str) -> Case:
    """Random weights, and a choice of each token's own."""

    def rows(count: int) -> Tensor:
        return torch.randn(count, shape.size, device=device, dtype=dtype) / shape.size**0.5

    chosen = torch.rand(tokens, shape.groups, device=device).argsort(-1)[:, : shape.slots].int().contiguous()
    weights = torch.rand(tokens, shape.slots, device=device) + 0.5
    x = torch.randn(tokens, shape.size, device=device, dtype=dtype)
    return Case(x, *(rows(shape.neurons) for _ in range(3)), chosen, weights)


def check(console: Console, device: str = "cuda") -> list[dict[str, Any]]:
    """Every operator against its reference body in fp64, on this chip; and nothing waits for the device."""
    found = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for tokens in (1, 3, 20, 64, 300):
            for shape in (Shape("", 576, 192, 64, 7, 3), Shape("", 200, 0, 72, 5, 2)):
                found.append(check_grouped(shape, tokens, dtype, device))
            found.append(check_route(tokens, dtype, device))
            if tokens <= ffn_ops.COLUMN_ROWS:
                found.append(check_columns(tokens, dtype, device))
    failed = [row for row in found if not row["ok"]]
    console.print(f"checked {len(found)} FFNs against the reference: {len(found) - len(failed)} agree")
    for row in failed:
        console.print(f"[red]differs[/red] {row}")
    return found


def judged(got: Tensor, exact: Tensor, low: Tensor, terms: float) -> tuple[float, float]:
    """The error, and what it may be: twice what PyTorch loses, a rounding of the result, and one of its terms."""
    error, lost = ((t.cpu().double() - exact).abs().max().item() for t in (got, low))
    rounding = torch.finfo(got.dtype).eps * exact.abs().max().item() + torch.finfo(torch.float32).eps * terms
    return error, 2 * lost + rounding


def check_grouped(shape: Shape, tokens: int, dtype: torch.dtype, device: str = "cuda") -> dict[str, Any]:
    """Lists for each token and one list for all, unused slots, and a group that is not there."""
    torch.manual_seed(0)
    case = made(shape, tokens, dtype, "cpu")
    case = case._replace(chosen=case.chosen.where(torch.rand(case.chosen.shape) < 0.8, -1))
    result: dict[str, Any] = {"form": f"grouped_ffn {shape.size}, groups of {shape.width}", "tokens": tokens,
                              "dtype": str(dtype), "ok": True}  # fmt: skip
    for name in ("each", "one"):
        if name == "one":
            case = case._replace(chosen=case.chosen[:1], weights=case.weights[:1])
        rest = (shape.shared, shape.width, "silu")
        wide = case.to("cpu", torch.float64)
        exact, low = (ffn_ops.grouped_reference(*c, *rest) for c in (wide, case))
        _, total = ffn_ops.factors(case.chosen, case.weights, tokens, shape.groups)
        hidden = ffn_ops.middle(F.linear(wide.x, wide.up), F.linear(wide.x, wide.gate), "silu").abs()
        hidden[:, shape.shared :] *= total.repeat_interleave(shape.width, 1)
        there = case.to(device)
        triton_ffn.grouped_ffn(*there, *rest)  # the first call compiles, which may wait
        try:
            with waiting_is_an_error(device):
                got = triton_ffn.grouped_ffn(*there, *rest)
        except RuntimeError as error:
            return result | {"waited": str(error), "ok": False}
        error, budget = judged(got, exact, low, (hidden @ wide.down.abs()).max().item())
        wrong = there.chosen.clone()
        wrong[-1, 0] = shape.groups
        bad = triton_ffn.grouped_ffn(*there._replace(chosen=wrong), *rest).isnan()
        loud = bool(bad[-1].all()) and (name == "one" or int(bad.any(1).sum()) == 1)
        result |= {f"error_{name}": error, f"budget_{name}": budget, f"loud_{name}": loud}
        result["ok"] = result["ok"] and error <= budget and loud
    return result


def check_route(tokens: int, dtype: torch.dtype, device: str = "cuda") -> dict[str, Any]:
    """The groups of largest score, but where rounding decides, and their weights."""
    torch.manual_seed(0)
    x, gate, up = (torch.randn(n, 576).to(dtype) / 24 for n in (tokens, 60, 60))
    rest = (6, "abs_softmax", "unit")
    args = [t.to(device) for t in (x, gate, up)]
    triton_ffn.route(*args, *rest, scale=torch.ones(60, device=device))
    chosen, weights, counts = triton_ffn.route(*args, *rest, scale=torch.ones(60, device=device))
    exact = ffn_ops.route_reference(x.double(), gate, up, *rest, scale=torch.ones(60, dtype=torch.float64))
    differ = (chosen.cpu() != exact[0]).float().mean().item()
    error = (weights.cpu().double() - exact[1]).abs().max().item()
    counted = torch.bincount(chosen.cpu().flatten(), minlength=60)
    ok = differ < 0.01 and error < 1e-5 and torch.equal(counts.cpu().long(), counted)
    return {"form": "route", "tokens": tokens, "dtype": str(dtype), "share_that_differs": differ, "max_error": error,
            "ok": ok}  # fmt: skip


def check_columns(tokens: int, dtype: torch.dtype, device: str = "cuda") -> dict[str, Any]:
    """Half of the inputs, with a scale; a channel that nobody keeps is not read."""
    torch.manual_seed(0)
    x, weight, scale = torch.randn(tokens, 576).to(dtype), torch.randn(576, 1000).to(dtype), torch.rand(576)
    limit = (x.float().abs() * scale).median()
    kept = x.double() * ~(x.float().abs() * scale <= limit)
    low = ffn_ops.column_linear_reference(x, weight, limit, scale)
    nobody = (kept == 0).all(0)
    got = triton_ffn.column_linear(
        x.to(device), weight.masked_fill(nobody[:, None], torch.nan).to(device), limit.to(device),
        scale=scale.to(device),
    )  # fmt: skip
    error, budget = judged(
        got, kept @ weight.double(), low, (kept.abs() @ weight.double().abs()).max().item()
    )  # fmt: skip
    return {"form": "column_linear", "tokens": tokens, "dtype": str(dtype), "max_error": error, "budget": budget,
            "ok": error <= budget}  # fmt: skip


class Timed(NamedTuple):
    """Something to time, and what it must read and multiply."""

    phase: str
    side: str
    tokens: int
    call: Callable[[], Any]
    cost: Cost


def sides(
    device: str = "cuda", shapes: tuple[Shape, ...] = SHAPES, counts: tuple[int, ...] = TOKENS
) -> Iterator[Timed]:
    """Ours, dense blocks with as many neurons as a token has, and ``_grouped_mm`` over slots sorted beforehand."""
    for shape, tokens in itertools.product(shapes, counts):
        case = made(shape, tokens, torch.bfloat16, device)
        whole = ffn_cost.grouped_ffn(tokens, shape.size, shared=shape.active, itemsize=2)
        yield Timed(shape.name, f"dense, {shape.active} neurons", tokens, dense(shape, case), whole)
        cost, rest = shape.cost(tokens), (shape.shared, shape.width, "silu")
        yield Timed(shape.name, "grouped_ffn", tokens, lambda c=case, r=rest: triton_ffn.grouped_ffn(*c, *r), cost)  # type: ignore[misc]
        given = (case.x, *routers(shape, device), shape.slots, "abs_softmax", "unit")
        needs = ffn_cost.route(tokens, shape.size, shape.groups, shape.slots, itemsize=2)
        yield Timed(shape.name, "route", tokens, lambda g=given: triton_ffn.route(*g), needs)  # type: ignore[misc]
        if not shape.shared:
            yield Timed(shape.name, "_grouped_mm", tokens, library(shape, case), cost)
        if tokens <= ffn_ops.COLUMN_ROWS:
            yield from listed(shape, case)


def routers(shape: Shape, device: str) -> list[Tensor]:
    """The gate and the up of a router."""
    return [torch.randn(shape.groups, shape.size, device=device, dtype=torch.bfloat16) for _ in range(2)]


def dense(shape: Shape, case: Case) -> Callable[[], Tensor]:
    """A dense block of the first neurons, as many as a token has."""
    gate, up, down = (t[: shape.active] for t in (case.gate, case.up, case.down))
    turned = down.t().contiguous()
    return lambda: F.linear(F.silu(F.linear(case.x, gate)) * F.linear(case.x, up), turned)


def library(shape: Shape, case: Case) -> Callable[[], Tensor]:
    """The same by ``torch._grouped_mm``. Sorting is not counted, only what follows it."""
    flat = case.chosen.flatten().long()
    order = flat.argsort()
    ends = torch.bincount(flat, minlength=shape.groups).cumsum(0).int()
    token, weight = order // shape.slots, case.weights.flatten()[order, None]
    gate, up = (t.view(shape.groups, shape.width, -1).mT for t in (case.gate, case.up))
    down = case.down.view(shape.groups, shape.width, -1)

    def call() -> Tensor:
        x = case.x[token]
        hidden = F.silu(torch._grouped_mm(x, gate, offs=ends)) * torch._grouped_mm(x, up, offs=ends)
        parts = torch._grouped_mm((hidden * weight).to(hidden.dtype), down, offs=ends)
        return torch.zeros_like(case.x).index_add_(0, token, parts)

    return call


def listed(shape: Shape, case: Case) -> Iterator[Timed]:
    """Half of the neurons, one by one, for all tokens together; and half of the inputs of each linear."""
    tokens, device, item = len(case.x), case.x.device, case.x.element_size()
    half = torch.randperm(shape.neurons, device=device)[: shape.neurons // 2].sort().values.int()[None].contiguous()
    cost = ffn_cost.grouped_ffn(tokens, shape.size, shared=shape.neurons // 2, itemsize=item)
    rest = (half, None, 0, 1, "silu")
    yield Timed(shape.name, "half of the neurons, listed", tokens,
                lambda: triton_ffn.grouped_ffn(*case[:4], *rest), cost)  # fmt: skip
    turned = [t.t().contiguous() for t in (case.gate, case.up)]
    first = case.x.float().abs().median()
    some = case.x.where(case.x.float().abs() > first, 0)
    hidden = F.silu(F.linear(some, case.gate)) * F.linear(some, case.up)
    last = hidden.float().abs().median()
    limits = torch.stack([first, first, last])
    kept = [int((t.float().abs() > limit).any(0).sum()) for t, limit in ((case.x, first), (hidden, last))]
    cost = ffn_cost.column_ffn(tokens, shape.size, shape.neurons, kept=(kept[0], kept[0], kept[1]), itemsize=item)
    yield Timed(shape.name, "half of the inputs", tokens,
                lambda: triton_ffn.column_ffn(case.x, *turned, case.down, limits, "silu"), cost)  # fmt: skip


def paper(console: Console, peaks: dict[str, tuple[float, float]]) -> None:
    """Bytes, FLOPs and bounds of the shapes, and what each kernel takes of a chip."""
    from effcompile.lowering.triton_aot import resources

    bounds = Table(title="a grouped FFN in bf16, each token with groups of its own", title_justify="left")
    names = [name.split()[0] for name in peaks]
    for heading in ("shape", "tokens", "MB", "of all weights", "GFLOP", *(f"{name} µs" for name in names)):
        bounds.add_column(heading, justify="left" if heading == "shape" else "right")
    for shape, tokens in itertools.product(SHAPES, TOKENS):
        cost = shape.cost(tokens)
        times = (f"{max(cost.bytes / rate / 1e6, cost.flops / flops / 1e6):.1f}" for rate, flops in peaks.values())
        share = cost.bytes / ffn_cost.grouped_ffn(tokens, shape.size, shared=shape.neurons, itemsize=2).bytes
        bounds.add_row(shape.name, str(tokens), f"{cost.bytes / 1e6:.1f}", f"{share:.0%}", f"{cost.flops / 1e9:.2f}",
                       *times)  # fmt: skip
    console.print(bounds)
    used = Table(
        title="registers, stack bytes and KiB shared of FFN kernels in bf16, at the sizes of Mixtral-8x7B",
        title_justify="left",
    )  # fmt: skip
    for heading in ("tokens", "kernel", *CHIPS):
        used.add_column(heading, justify="left" if heading == "kernel" else "right")
    for tokens in TOKENS:
        launches = [_launches(SHAPES[-1], tokens, chip) for chip in CHIPS]
        for chips in zip(*launches, strict=True):
            cells = [resources(launch.compile(chip)) for chip, launch in zip(CHIPS, chips, strict=True)]
            text = (f"{r['registers']}, {r['spilled']}, {r['shared'] / 1024:.0f}" for r in cells)
            used.add_row(str(tokens), chips[0].kernel.__name__, *text)
    console.print(used)


def _launches(shape: Shape, tokens: int, chip: str) -> list[Any]:
    """What each operator would launch on a chip."""
    from effcompile.lowering.triton_aot import noted

    with noted(chip) as found:
        case = made(shape, tokens, torch.bfloat16, "meta")
        triton_ffn.route(case.x, *routers(shape, "meta"), shape.slots, "abs_softmax", "unit")
        triton_ffn.grouped_ffn(*case, shape.shared, shape.width, "silu")
        if tokens <= ffn_ops.COLUMN_ROWS:
            turned = (t.t().contiguous() for t in (case.gate, case.up))
            triton_ffn.column_ffn(case.x, *turned, case.down, torch.empty(3, device="meta"), "silu")
    return found
