"""GPU kernels: check every one against the reference on this chip, then time it against SDPA and FlexAttention.

    python benchmarks/gpu.py             on a machine with a GPU: checks, times, writes results/gpu-*.json
    python benchmarks/gpu.py --paper     anywhere: bytes, bounds and resources from the formulas and the compiler

A time is the median over calls that start with a cold L2. *Limit* is the compulsory bytes of the call over the
bandwidth that a plain device copy reaches here (decode), or its FLOPs over the rate of a bf16 GEMM here (prefill).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from effcompile.kernels import attention, block_ops, blocks, cost, ops, quantize
from effcompile.kernels.blocks import BLOCK
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import Predicate, Program
from effcompile.lowering import triton as lowering
from effcompile.lowering import triton_blocks
from effcompile.passes import base
from effcompile.passes.sparse_prefill import SparsePrefill

HEADS, GROUPS, SIZE = 32, 8, 128
FORMS = [KVForm(16, 16), KVForm(8, 8), KVForm(4, 4)]
DECODE = [(batch, length) for batch in (1, 16) for length in (4096, 32768, 131072)]
PREFILL = [(4096, 4096), (2048, 32768)]
SPARSE, DENSITIES = (8192, 32768, 131072), (0.1, 0.25, 0.5, 1.0)
PEAKS = {"A100 80GB": (2.039, 312), "H100 SXM": (3.35, 989), "H200": (4.8, 989), "B200": (8.0, 2250)}
"""Published memory bandwidth in TB/s and dense bf16 TFLOP/s: for ``--paper`` only."""
RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement: microseconds, and the part of the limit that it reaches."""

    phase: str
    side: str
    batch: int
    queries: int
    keys: int
    us: float
    limit_us: float
    max_error: float | None = None

    @property
    def reached(self) -> float:
        return self.limit_us / self.us


def sizes(batch: int, queries: int, keys: int) -> dict[str, int]:
    return {"B": batch, "H": HEADS, "G": GROUPS, "T": queries, "S": keys, "C": keys, "D": SIZE, "E": SIZE}


def call_cost(form: KVForm, batch: int, queries: int, keys: int) -> cost.Cost:
    return cost.attend(form, Predicate(), 2).at(**sizes(batch, queries, keys))


def random_state(form: KVForm, batch: int, capacity: int) -> list[torch.Tensor | None]:
    """A store full of plausible numbers, made on the device without going through ``kv_store``."""
    state: list[torch.Tensor | None] = []
    for kind in ("key", "value"):
        side: list[torch.Tensor | None] = []
        for shape, dtype in form.buffers(kind, batch, GROUPS, capacity, SIZE, torch.bfloat16):
            if dtype == torch.uint8:
                side.append(torch.randint(0, 256, shape, dtype=dtype, device="cuda"))
            elif dtype == torch.float16:
                side.append(torch.rand(shape, device="cuda", dtype=torch.float16) * 0.2)
            else:
                side.append(torch.randn(shape, device="cuda", dtype=dtype))
        state += side + [None] * (3 - len(side))
    return state


def microseconds(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench  # type: ignore[import-untyped]

    return 1e3 * float(do_bench(call, warmup=50, rep=200, return_mode="median"))


def bandwidth() -> float:
    """Bytes a second that a device copy of 2 GB reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-6 * microseconds(lambda: target.copy_(source)))


def gemm_rate() -> float:
    """FLOPs a second of an 8192-cubed bf16 GEMM."""
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    return float(2 * 8192**3 / (1e-6 * microseconds(lambda: a @ a)))


def check(console: Console) -> list[dict[str, Any]]:
    """Every kernel on this chip against the reference bodies on the CPU: stores bit for bit, attention by its error.

    The bodies run on the CPU because a GPU divides by a Python number through its reciprocal, one bit away.
    """
    found = []
    forms = [*FORMS, KVForm(4, 4, 16, 0), KVForm(8, 4, 32, 32), KVForm(4, 16), KVForm(16, 8)]
    forms += [
        KVForm("fp8", "fp8"),
        KVForm(4, 4, 32, 32, "token", "channel"),
        KVForm("fp8", 8, 16, 0, "token", "channel"),
    ]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for form in forms:
            for size, queries, length in ((128, 1, 500), (96, 3, 1000), (80, 65, 333), (64, 300, 700), (256, 1, 300)):
                if form.value_bits != 16 and size % form.group:
                    continue
                found.append(check_one(form, dtype, size, queries, length))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for size, block, queries, keys in ((128, 128, 700, 700), (64, 64, 300, 1000), (96, 48, 500, 500)):
            found.append(check_blocks(dtype, size, block, queries, keys))
    found += [check_choice(name) for name in base.REGISTRY if issubclass(base.get(name), SparsePrefill)]
    failed = [row for row in found if not row["ok"]]
    console.print(f"checked {len(found)} programs against the reference: {len(found) - len(failed)} agree")
    for row in failed:
        console.print(f"[red]differs[/red] {row}")
    return found


def check_one(form: KVForm, dtype: torch.dtype, size: int, queries: int, length: int) -> dict[str, Any]:
    torch.manual_seed(0)
    capacity = 1024
    host: list[torch.Tensor | None] = []
    for kind in ("key", "value"):
        shapes = form.buffers(kind, 2, 2, capacity, size, dtype)
        host += [torch.zeros(s, dtype=d) for s, d in shapes] + [None] * (3 - len(shapes))
    state = [None if t is None else t.cuda() for t in host]
    key, value = (torch.randn(2, length, 2, size).to(dtype).transpose(1, 2) for _ in range(2))
    query = torch.randn(2, queries, 8, size).to(dtype).transpose(1, 2)
    at, op = 0, torch.ops.effcompile
    for step in (length // 2, 1, length - length // 2 - 1):
        new = (key[:, :, at : at + step], value[:, :, at : at + step])
        with ops.reference_only():
            op.kv_store(*host, torch.tensor(at), *new, form.name)
        lowering.kv_store(*state, torch.tensor(at, device="cuda"), *(x.cuda() for x in new), form.name)
        at += step
    same = all(torch.equal(a, b.cpu()) for a, b in zip(host, state) if a is not None and b is not None)
    here, there = torch.tensor(at), torch.tensor(at, device="cuda")
    with ops.reference_only():
        loaded = op.kv_load(*host, here, form.name)
    same &= all(torch.equal(a, b.cpu()) for a, b in zip(loaded, lowering.kv_load(*state, there, form.name)))
    out, _ = lowering.attend(query.cuda(), *state, there, None, form.name, size**-0.5, True, -1)
    keys, values = ops.split_state(tuple(host))
    k, v = quantize.load_side(keys, at, form, "key"), quantize.load_side(values, at, form, "value")
    best = rounded_attention(query, k, v, size**-0.5, torch.float64)
    low = rounded_attention(query, k, v, size**-0.5, dtype)
    error = (out.cpu().double() - best).abs().max().item()
    lost = (low.double() - best).abs().max().item()
    budget = budget_of(query, k, v, best, lost)
    return {"form": form.name, "dtype": str(dtype), "size": size, "queries": queries, "length": length,
            "same_bits": same, "max_error": error, "budget": budget, "ok": same and error <= budget}  # fmt: skip


def budget_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, best: torch.Tensor, lost: float) -> float:
    """At most twice what PyTorch in the model's dtype loses, one rounding of the output, and of each fp32 score."""
    score = query.double().norm(dim=-1).amax().item() * key.double().norm(dim=-1).amax().item()
    score *= query.shape[-1] ** -0.5
    rounding = torch.finfo(query.dtype).eps * best.abs().max().item()
    return 2 * lost + rounding + 3 * 2.0**-24 * score * value.abs().max().item()


def random_lists(heads: int, queries: int, keys: int, block: int, density: float, device: str) -> blocks.BlockLists:
    """Lists of about ``density`` of the causal blocks, different in each head; the diagonal is always there."""
    rows, columns = blocks.count_blocks(queries, block), blocks.count_blocks(keys, block)
    keep = torch.rand(1, heads, rows, columns, device=device) < density
    keep = (keep | blocks.own(queries, keys, block, device=device)) & blocks.possible(
        queries, keys, block, device=device
    )
    return blocks.lists(keep, blocks.whole(queries, keys, block, device=device), block)


def check_blocks(
    dtype: torch.dtype, size: int, block: int, queries: int, keys: int, device: str = "cuda"
) -> dict[str, Any]:
    """The kernel over block lists against attention in fp64, and a wrong list, whose rows are NaN."""
    torch.manual_seed(0)
    key, value = (torch.randn(1, 2, keys, size).to(dtype) for _ in range(2))
    query = torch.randn(1, queries, 8, size).to(dtype).transpose(1, 2)
    lists = random_lists(8, queries, keys, block, 0.3, device)
    state = (key.to(device), None, None, value.to(device), None, None)
    rest = ("k16v16g32r128", size**-0.5, True, -1)
    length = torch.tensor(keys, device=device)
    out, _ = triton_blocks.attend_blocks(query.to(device), *state, length, None, *block_ops.of(lists), *rest)
    listed = blocks.tokens(lists.keep().cpu(), queries, keys, block)
    best = rounded_attention(query, key, value, size**-0.5, torch.float64, listed)
    low = rounded_attention(query, key, value, size**-0.5, dtype, listed)
    error = (out.cpu().double() - best).abs().max().item()
    budget = budget_of(query, key, value, best, (low.double() - best).abs().max().item())
    lists.kv_indices[0, 3, 1, 0] = 10**9
    wrong, _ = triton_blocks.attend_blocks(query.to(device), *state, length, None, *block_ops.of(lists), *rest)
    loud = bool(wrong[0, 3, block : 2 * block].isnan().all()) and int(wrong.isnan().any(-1).sum()) <= block
    return {"form": f"blocks of {block}", "dtype": str(dtype), "size": size, "queries": queries, "length": keys,
            "loud": loud, "max_error": error, "budget": budget, "ok": loud and error <= budget}  # fmt: skip


def check_choice(name: str, device: str = "cuda") -> dict[str, Any]:
    """A method chooses the same blocks as on the CPU, but for rounding, and nothing waits for the device."""
    query, key, _ = local_tokens(1, 4096, device)
    method = block_ops.method_text(name, dataclasses.asdict(base.get(name)()))
    choose = torch.ops.effcompile.select_blocks.default
    choose(query, key, None, method, SIZE**-0.5)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        made = choose(query, key, None, method, SIZE**-0.5)
        waited = ""
    except RuntimeError as error:
        waited = str(error)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    if waited:
        return {"form": f"choice of {name}", "waited": waited, "ok": False}
    here = choose(query.cpu(), key.cpu(), None, method, SIZE**-0.5)
    maps = [blocks.BlockLists(*lists, BLOCK).keep().cpu() for lists in (made, here)]
    differ = (maps[0] != maps[1]).float().mean().item()
    return {"form": f"choice of {name}", "blocks_that_differ": differ, "ok": differ < 0.01}


def local_tokens(batch: int, count: int, device: str) -> list[torch.Tensor]:
    """Queries, keys and values in bf16; queries attend to blocks of their own topic, near and far, most."""
    parts = blocks.count_blocks(count, BLOCK)
    topics = torch.randn(16, SIZE, device=device)
    topic = topics[torch.randint(0, 16, (batch, 1, parts), device=device)].repeat_interleave(BLOCK, 2)[:, :, :count]
    made = [torch.randn(batch, h, count, SIZE, device=device) for h in (HEADS, GROUPS, GROUPS)]
    return [(x + 1.2 * topic * (i < 2)).bfloat16() for i, x in enumerate(made)]


def sparse_rows(gemm: float, lengths: tuple[int, ...] = SPARSE, device: str = "cuda") -> list[Row]:
    """The kernel over random blocks of some densities, XAttention's choice and the kernel over it, and dense SDPA.

    The limit is the FLOPs of the visited blocks, and of the products of folds that choose them, at the rate of a GEMM.
    """
    rows = []
    for count in lengths:
        query, key, value = local_tokens(1, count, device)
        length, scale = torch.tensor(count, device=device), SIZE**-0.5
        rest = (FORMS[0].name, scale, True, -1)
        whole = 1e6 * call_cost(FORMS[0], 1, count, count).flops / gemm

        def attend(*lists: Any, q: Any = query, k: Any = key, v: Any = value, n: Any = length, r: Any = rest) -> Any:
            return triton_blocks.attend_blocks(q, k, None, None, v, None, None, n, None, *lists, *r)

        def row(side: str, us: float, share: float, n: int = count, limit: float = whole) -> Row:
            return Row("sparse prefill", side, 1, n, n, us, share * limit)

        def sdpa(q: Any = query, k: Any = key, v: Any = value) -> Any:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        rows.append(row("SDPA bf16", microseconds(sdpa), 1))
        for density in DENSITIES:
            random = random_lists(HEADS, count, count, BLOCK, density, device)
            share = blocks.density(random.keep(), count, count, BLOCK).mean().item()
            us = microseconds(lambda x=random, f=attend: f(*block_ops.of(x)))  # type: ignore[misc]
            rows.append(row(f"{share:.0%} of the blocks", us, share))
            del random
        for threshold, stride in ((0.9, 16), (0.95, 8)):
            made = base.get("xattention")(threshold=threshold, stride=stride)  # type: ignore[call-arg]
            method = block_ops.method_text("xattention", dataclasses.asdict(made))

            def choose(q: Any = query, k: Any = key, m: str = method) -> Any:
                return torch.ops.effcompile.select_blocks.default(q, k, None, m, SIZE**-0.5)

            chosen = choose()
            share = blocks.density(blocks.BlockLists(*chosen, BLOCK).keep(), count, count, BLOCK).mean().item()
            name = f"xattention {threshold}, stride {stride}"
            # The products of folds cost 1 / stride of the dense ones.
            rows.append(row(f"{name}: choice", microseconds(choose), 0.5 / stride))
            us = microseconds(lambda x=chosen, f=attend: f(*x, BLOCK))  # type: ignore[misc]
            rows.append(row(f"{name}: {share:.0%} of the blocks", us, share))
            both = microseconds(lambda f=attend, c=choose: f(*c(), BLOCK))  # type: ignore[misc]
            rows.append(row(f"{name}: both", both, share + 0.5 / stride))
        del query, key, value, chosen
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def rounded_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    dtype: torch.dtype,
    listed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention, with ``listed`` to these tokens only. Operands in ``dtype``, sums in fp32 (fp64 for fp64)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ratio = query.shape[1] // key.shape[1]
    q, k, v = (x.to(dtype).to(wide) for x in (query, key, value))
    k, v = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
    keep = attention.allowed(Predicate(), query.shape[2], key.shape[2], None, query.device)
    keep = keep if listed is None else keep & listed
    weight = (q @ k.mT * scale).masked_fill(~keep, float("-inf")).softmax(-1)
    return (weight.to(dtype).to(wide) @ v).to(dtype)


def peers(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> dict[str, Callable[[], Any]]:
    """SDPA and FlexAttention over dense bf16 keys and values of exactly the real length."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    queries, keys = query.shape[2], key.shape[2]
    sides: dict[str, Callable[[], Any]] = {}
    if not causal or queries == keys:
        sides["SDPA bf16"] = lambda: torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=causal, enable_gqa=True
        )
    mask = None
    if causal:
        past = keys - queries
        mask = create_block_mask(lambda b, h, i, j: j <= i + past, None, None, queries, keys, device="cuda")
    flex = torch.compile(flex_attention, dynamic=False)
    sides["FlexAttention bf16"] = lambda: flex(query, key, value, block_mask=mask, enable_gqa=True)
    return sides


def measure(phase: str, batch: int, queries: int, keys: int, limit: Callable[[cost.Cost], float]) -> list[Row]:
    """Ours in every form, and the peers, on one shape."""
    query = torch.randn(batch, HEADS, queries, SIZE, dtype=torch.bfloat16, device="cuda")
    length = torch.tensor(keys, device="cuda")
    rows = []
    for form in FORMS:
        floor = limit(call_cost(form, batch, queries, keys))
        if form.nbytes(batch, GROUPS, keys, SIZE, SIZE, torch.bfloat16) > 0.6 * torch.cuda.mem_get_info()[0]:
            print(f"skipped, out of memory: {form.name} batch {batch} keys {keys}", file=sys.stderr)
            continue
        state = random_state(form, batch, keys)
        sides: dict[str, Callable[[], Any]] = {
            form.name: lambda s=state, f=form: lowering.attend(  # type: ignore[misc]
                query, *s, length, None, f.name, SIZE**-0.5, True, -1
            )
        }
        if form.dense:
            key, value = state[0], state[3]
            assert key is not None
            assert value is not None
            sides |= peers(query, key, value, causal=phase == "prefill")
        for name, call in sides.items():
            try:
                rows.append(Row(phase, name, batch, queries, keys, microseconds(call), floor))
            except Exception as error:  # a peer that cannot run a shape is a result, not the end of the run
                print(f"{name} at batch {batch}, {queries} x {keys}: {error}", file=sys.stderr)
        del state, sides
        torch.cuda.empty_cache()
    return rows


def store_rows(limit: float) -> list[Row]:
    """One token appended to a store of 32k, and the store read back densely."""
    rows = []
    for form in FORMS:
        state = random_state(form, 1, 32768)
        new = torch.randn(1, GROUPS, 1, SIZE, dtype=torch.bfloat16, device="cuda")
        length = torch.tensor(32000, device="cuda")
        both = form.nbytes(1, GROUPS, 32768, SIZE, SIZE, torch.bfloat16) + 2 * 32768 * GROUPS * SIZE * 2
        append = microseconds(lambda s=state, f=form, x=new, n=length: lowering.kv_store(*s, n, x, x, f.name))  # type: ignore[misc]
        load = microseconds(lambda s=state, f=form, n=length: lowering.kv_load(*s, n, f.name))  # type: ignore[misc]
        rows.append(Row("kv_store", form.name, 1, 1, 32768, append, 1e6 * 4 * new.numel() * 2 / limit))
        rows.append(Row("kv_load", form.name, 1, 0, 32768, load, 1e6 * both / limit))
    return rows


def show(console: Console, rows: list[Row]) -> None:
    table = Table(title="GPU kernels", title_justify="left")
    for heading in ("phase", "side", "batch", "queries", "keys", "µs", "limit µs", "of limit", "SDPA / this"):
        table.add_column(heading, justify="left" if heading in ("phase", "side") else "right")
    dense = {(r.phase, r.batch, r.keys): r.us for r in rows if r.side.startswith("SDPA")}
    for r in rows:
        beside = dense.get((r.phase, r.batch, r.keys))
        table.add_row(
            r.phase, r.side, str(r.batch), str(r.queries), str(r.keys), f"{r.us:.1f}", f"{r.limit_us:.1f}",
            f"{r.reached:.0%}", f"{beside / r.us:.2f}x" if beside else "",
        )  # fmt: skip
    console.print(table)


def paper(console: Console) -> None:
    """What can be known without a GPU: bytes and bounds of a step, and what each program takes of a chip."""
    from effcompile.lowering.triton_aot import compile_ahead, resources
    from effcompile.lowering.triton_build import build

    console.print("On paper: no kernel has run. Bounds are published peak rates, which no kernel reaches.")
    bounds = Table(title="one decode step of one layer, 32/8 heads of 128, bf16 model", title_justify="left")
    for heading in ("form", "batch", "keys", "MB", "saved", *(f"{name.split()[0]} µs" for name in PEAKS)):
        bounds.add_column(heading, justify="left" if heading == "form" else "right")
    for batch, keys in DECODE:
        dense = call_cost(FORMS[0], batch, 1, keys).bytes
        for form in FORMS:
            moved = call_cost(form, batch, 1, keys).bytes
            times = (f"{moved / rate / 1e6:.1f}" for rate, _ in PEAKS.values())
            bounds.add_row(
                form.name.split("g")[0], str(batch), str(keys), f"{moved / 1e6:.1f}", f"{dense / moved:.2f}x", *times
            )
    console.print(bounds)
    used = Table(
        title="resources, from binaries compiled ahead of time (bf16, heads of 128, 4 per group)", title_justify="left"
    )
    for heading in ("program", "chip", "registers", "stack bytes", "shared bytes"):
        used.add_column(heading, justify="left" if heading in ("program", "chip") else "right")
    for phase in ("decode", "prefill"):
        for form in FORMS:
            for chip in ("sm_80", "sm_90", "sm_100", "gfx942"):
                program = Program(phase, form, Predicate(), torch.bfloat16, HEADS // GROUPS, SIZE, SIZE)
                constants = {"SPLITS": 66} if phase == "decode" else {}
                r = resources(compile_ahead(build(program, chip), program, chip, constants))
                used.add_row(f"{phase} {form.name}", chip, str(r["registers"]), str(r["spilled"]), str(r["shared"]))
    for chip in ("sm_80", "sm_90", "sm_100", "gfx942"):
        program = Program("prefill", FORMS[0], Predicate(), torch.bfloat16, HEADS // GROUPS, SIZE, SIZE, blocks=True)
        built = build(program, chip)
        assert built.blocks is not None
        cut = built.blocks.within(BLOCK)
        constants = {"FULL": True, "BLOCK": BLOCK, "ROWS": cut.rows, "TILE": cut.tile}
        r = resources(compile_ahead(built, program, chip, constants))
        used.add_row(f"blocks of {BLOCK}", chip, str(r["registers"]), str(r["spilled"]), str(r["shared"]))
    console.print(used)


def main() -> int:
    parser = argparse.ArgumentParser(description="Check and time the GPU kernels.")
    parser.add_argument("--paper", action="store_true", help="bounds and resources, without a GPU")
    parser.add_argument("--check-only", action="store_true", help="compare with the reference, time nothing")
    options = parser.parse_args()
    console = Console()
    if options.paper:
        paper(console)
        return 0
    if not torch.cuda.is_available():
        console.print("No GPU here: nothing was built, checked or timed. `--paper` shows what is known without one.")
        return 2
    import triton  # type: ignore[import-untyped]

    device = torch.cuda.get_device_name()
    checked = check(console)
    rows: list[Row] = []
    rates: dict[str, float] = {}
    if not options.check_only:
        rates = {"copy_bytes_per_s": bandwidth(), "gemm_flops_per_s": gemm_rate()}
        console.print(f"{device}: copy {rates['copy_bytes_per_s'] / 1e12:.2f} TB/s, GEMM "
                      f"{rates['gemm_flops_per_s'] / 1e12:.0f} TFLOP/s")  # fmt: skip
        for batch, keys in DECODE:
            rows += measure("decode", batch, 1, keys, lambda c: 1e6 * c.bytes / rates["copy_bytes_per_s"])
        for queries, keys in PREFILL:
            rows += measure("prefill", 1, queries, keys, lambda c: 1e6 * c.flops / rates["gemm_flops_per_s"])
        rows += store_rows(rates["copy_bytes_per_s"])
        rows += sparse_rows(rates["gemm_flops_per_s"])
        show(console, rows)
    now = datetime.datetime.now(datetime.UTC)
    record = {
        "device": device, "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda,
        "date": now.isoformat(timespec="seconds"), **rates, "checked": checked,
        "rows": [dataclasses.asdict(row) | {"reached": row.reached} for row in rows],
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"gpu-{device.lower().replace(' ', '-')}-{now:%Y%m%d-%H%M}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"written: {path.relative_to(Path(__file__).parent.parent)}")
    return 0 if all(row["ok"] for row in checked) else 1


if __name__ == "__main__":
    sys.exit(main())
