"""Linears in few bits and of low rank, for ``gpu.py``: checks, sides to time, and what is known on paper.

With ``device="cpu"`` and TRITON_INTERPRET=1 a check runs anywhere, slowly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from gpu_checks import waiting_is_an_error
from gpu_ffn import CHIPS, Timed, judged
from rich.console import Console
from rich.table import Table
from torch import Tensor

from effcompile.kernels import low_rank_ops, weight_ops
from effcompile.kernels.cost import Cost
from effcompile.kernels.weight_ops import BITS, Packed
from effcompile.lowering import triton_low_rank, triton_weights

TOKENS = (1, 8, 64, 512, 4096)
SHAPES = {"q, o": (4096, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)}
"""Outputs and inputs of linears of Llama-3-8B."""
RANKS = (16, 256, 512, 1024)


def check(console: Console, device: str = "cuda") -> list[dict[str, Any]]:
    """The operator against its reference body in fp64, on this chip; and nothing waits for the device."""
    found = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for bits, tokens in itertools.product(BITS, (1, 3, 16, 33, 300, 1500)):
            for outputs, inputs, group in ((576, 1536, 32), (1000, 999, 128), (70, 4000, 40)):
                found.append(check_quantized(outputs, inputs, bits, group, tokens, dtype, device))
        for tokens, rank in itertools.product((1, 3, 16, 33, 3000), (16, 48, 250)):
            found += [check_low_rank(*size, rank, tokens, dtype, device) for size in ((576, 1536), (1000, 999))]
    failed = [row for row in found if not row["ok"]]
    console.print(f"checked {len(found)} linears in few bits and of low rank: {len(found) - len(failed)} agree")
    for row in failed:
        console.print(f"[red]differs[/red] {row}")
    return found


def check_quantized(
    outputs: int, inputs: int, bits: int, group: int, tokens: int, dtype: torch.dtype, device: str = "cuda"
) -> dict[str, Any]:
    """With and without zeros, and with a bias."""
    torch.manual_seed(0)
    weight, x = torch.randn(outputs, inputs) * 0.05, torch.randn(tokens, inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype)
    result: dict[str, Any] = {"form": f"quantized_linear {outputs} x {inputs}, {bits} bits in groups of {group}",
                              "tokens": tokens, "dtype": str(dtype), "ok": True}  # fmt: skip
    for symmetric in (False, True):
        packed = weight_ops.pack(*weight_ops.round_to_nearest(weight, bits, group, symmetric), bits)
        sizes = outputs, bits, group
        exact = F.linear(x.double(), weight_ops.dequantize(packed, outputs, inputs, bits).double(), bias.double())
        low = weight_ops.reference(x, *packed, bias, *sizes)
        # Codes and zeros are added up by themselves.
        apart = packed.scales.double() * 2**bits + (0 if packed.zeros is None else packed.zeros.double().abs())
        terms = (
            x.double().abs()
            @ apart.permute(0, 2, 1).flatten(0, 1)[:outputs].repeat_interleave(group, 1)[:, :inputs].t()
        )
        there = [None if t is None else t.to(device) for t in (x, *packed, bias)]
        triton_weights.quantized_linear(*there, *sizes)  # type: ignore[arg-type]  # compiles, which may wait
        try:
            with waiting_is_an_error(device):
                got = triton_weights.quantized_linear(*there, *sizes)  # type: ignore[arg-type]
        except RuntimeError as error:
            return result | {"waited": str(error), "ok": False}
        error, budget = judged(got, exact, low, terms.max().item())
        name = "symmetric" if symmetric else "asymmetric"
        result |= {f"error_{name}": error, f"budget_{name}": budget}
        result["ok"] = result["ok"] and error <= budget
    return result


def check_low_rank(
    outputs: int, inputs: int, rank: int, tokens: int, dtype: torch.dtype, device: str = "cuda"
) -> dict[str, Any]:
    """With and without a bias."""
    torch.manual_seed(0)
    shapes = {(tokens, inputs): 1.0, (rank, inputs): inputs**-0.5, (outputs, rank): rank**-0.5, (outputs,): 1.0}
    x, down, up, bias = ((torch.randn(shape) * scale).to(dtype) for shape, scale in shapes.items())
    result: dict[str, Any] = {"form": f"low_rank_linear {outputs} x {inputs}, rank {rank}", "tokens": tokens,
                              "dtype": str(dtype), "ok": True}  # fmt: skip
    for name, shift in (("bias", bias), ("plain", None)):
        given = (x, down, up, shift)
        wide = [None if t is None else t.double() for t in given]
        exact, low = (low_rank_ops.low_rank_reference(*g) for g in (wide, given))  # type: ignore[arg-type]
        terms = (x.double().abs() @ down.double().abs().t()) @ up.double().abs().t()
        there = [None if t is None else t.to(device) for t in given]
        triton_low_rank.low_rank_linear(*there)  # type: ignore[arg-type]  # compiles, which may wait
        try:
            with waiting_is_an_error(device):
                got = triton_low_rank.low_rank_linear(*there)  # type: ignore[arg-type]
        except RuntimeError as error:
            return result | {"waited": str(error), "ok": False}
        error, budget = judged(got, exact, low, terms.max().item())
        result |= {f"error_{name}": error, f"budget_{name}": budget}
        result["ok"] = result["ok"] and error <= budget
    return result


def random_packed(outputs: int, inputs: int, bits: int, group: int, device: str) -> Packed:
    """A weight of random codes, made on the device."""
    blocks, groups = -(-outputs // weight_ops.LANES), -(-inputs // group)
    with torch.device(device):
        codes = torch.randint(0, 256, (blocks, groups, group * bits // 8, weight_ops.LANES), dtype=torch.uint8)
        scales = torch.rand(blocks, groups, weight_ops.LANES).half() * 0.01
        return Packed(codes, scales, scales * -(2 ** (bits - 1)))


def quantized_cost(tokens: int, packed: Packed, outputs: int, inputs: int) -> Cost:
    """What the linear must move and multiply, in 16 bits."""
    return Cost(packed.nbytes + 2 * tokens * (inputs + outputs), 2 * tokens * outputs * inputs)


def sides(
    device: str = "cuda", shapes: dict[str, tuple[int, int]] = SHAPES, counts: tuple[int, ...] = TOKENS
) -> Iterator[Timed]:
    """A dense linear of the library in bf16; every number of bits in groups of 32, and 4 in groups of 128; ranks in one
    call, and in the two products of the library."""
    for (name, (outputs, inputs)), tokens in itertools.product(shapes.items(), counts):
        x, weight = (torch.randn(n, inputs, device=device, dtype=torch.bfloat16) for n in (tokens, outputs))
        needs = low_rank_ops.linear_cost(tokens, outputs, inputs, itemsize=2, bias=False)
        phase = f"linear, {name}"
        yield Timed(phase, "dense bf16", tokens, lambda x=x, w=weight: F.linear(x, w), needs)  # type: ignore[misc]
        for bits, group in (*((bits, 32) for bits in BITS), (4, 128)):
            packed = random_packed(outputs, inputs, bits, group, device)
            call = _call(x, packed, outputs, bits, group)
            cost = quantized_cost(tokens, packed, outputs, inputs)
            yield Timed(phase, f"{bits} bits, groups of {group}", tokens, call, cost)
        for rank in RANKS:
            down, up = (torch.randn(*n, device=device, dtype=torch.bfloat16) for n in ((rank, inputs), (outputs, rank)))
            cost = low_rank_ops.low_rank_cost(tokens, outputs, inputs, rank, itemsize=2, bias=False)
            given = (x, down, up, None)
            yield Timed(phase, f"rank {rank}", tokens, lambda g=given: triton_low_rank.low_rank_linear(*g), cost)  # type: ignore[misc]
            two = lambda g=given: low_rank_ops.low_rank_reference(*g)  # noqa: E731
            yield Timed(phase, f"rank {rank}, two products", tokens, two, cost)


def _call(x: Tensor, packed: Packed, outputs: int, bits: int, group: int) -> Callable[[], Tensor]:
    return lambda: triton_weights.quantized_linear(x, *packed, None, outputs, bits, group)


def paper(console: Console, peaks: dict[str, tuple[float, float]]) -> None:
    """Bytes and bounds of the shapes, and what each kernel takes of a chip."""
    from effcompile.lowering.triton_aot import noted, resources

    bounds = Table(title="linears of Llama-3-8B in bf16, weights asymmetric in groups of 32", title_justify="left")
    for heading in ("linear", "tokens", "bits", "MB", "of dense", *(f"{name.split()[0]} µs" for name in peaks)):
        bounds.add_column(heading, justify="left" if heading == "linear" else "right")
    for (name, (outputs, inputs)), tokens, bits in itertools.product(SHAPES.items(), (1, 512), (16, *BITS)):
        cost = dense = low_rank_ops.linear_cost(tokens, outputs, inputs, itemsize=2, bias=False)
        if bits != 16:
            cost = quantized_cost(tokens, random_packed(outputs, inputs, bits, 32, "meta"), outputs, inputs)
        times = (f"{max(cost.bytes / rate / 1e6, cost.flops / flops / 1e6):.1f}" for rate, flops in peaks.values())
        share = f"{cost.bytes / dense.bytes:.0%}"
        bounds.add_row(name, str(tokens), str(bits), f"{cost.bytes / 1e6:.1f}", share, *times)
    console.print(bounds)
    used = Table(
        title="registers, stack bytes and KiB shared of linears in few bits (groups of 32) and of low rank, in bf16",
        title_justify="left",
    )  # fmt: skip
    for heading in ("tokens", "bits", "kernel", *CHIPS):
        used.add_column(heading, justify="left" if heading == "kernel" else "right")
    outputs, inputs = SHAPES["gate, up"]
    for tokens, bits in itertools.product((1, 16, 64, 512, 4096), BITS):
        cells, kernel = [], ""
        for chip in CHIPS:
            with noted(chip) as found:
                packed = random_packed(outputs, inputs, bits, 32, "meta")
                x = torch.empty(tokens, inputs, dtype=torch.bfloat16, device="meta")
                triton_weights.quantized_linear(x, *packed, None, outputs, bits, 32)
            r, kernel = resources(found[0].compile(chip)), found[0].kernel.__name__
            cells.append(f"{r['registers']}, {r['spilled']}, {r['shared'] / 1024:.0f}")
        used.add_row(str(tokens), str(bits), kernel, *cells)
    for tokens, rank in itertools.product((1, 16, 8192), RANKS):
        launches = []
        for chip in CHIPS:
            with noted(chip) as found, torch.device("meta"):
                given = (
                    torch.empty(s, dtype=torch.bfloat16) for s in ((tokens, inputs), (rank, inputs), (outputs, rank))
                )
                triton_low_rank.low_rank_linear(*given, None)
            launches.append(list(found))
        for chips in zip(*launches, strict=True):
            several = [resources(launch.compile(chip)) for chip, launch in zip(CHIPS, chips, strict=True)]
            text = (f"{r['registers']}, {r['spilled']}, {r['shared'] / 1024:.0f}" for r in several)
            used.add_row(str(tokens), f"rank {rank}", chips[0].kernel.__name__, *text)
    console.print(used)
