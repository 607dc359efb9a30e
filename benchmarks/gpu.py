"""GPU kernels: check every one against the reference on this chip, then time it against SDPA and FlexAttention.

    python benchmarks/gpu.py             on a machine with a GPU: checks, times, writes results/gpu-*.json
    python benchmarks/gpu.py --paper     anywhere: bytes, bounds and resources from the formulas and the compiler

A time is the median over calls that start with a cold L2. *Limit* is the compulsory bytes of the call over the
bandwidth that a plain device copy reaches here (decode), or its FLOPs over the rate of a bf16 GEMM here (prefill); of
FFNs and linears it is the larger of the two.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_ffn
import gpu_weights
import torch
from gpu_checks import FORMS, GROUPS, HEADS, PARTS, SIZE, check, local_tokens, random_lists
from rich.console import Console
from rich.table import Table

from effcompile.kernels import block_ops, blocks, cost, rope
from effcompile.kernels.blocks import BLOCK
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import Predicate, Program
from effcompile.lowering import triton as lowering
from effcompile.lowering import triton_blocks
from effcompile.passes import base

DECODE = [(batch, length) for batch in (1, 16) for length in (4096, 32768, 131072)]
LATENT, RANKS = [(1, 32768), (16, 32768), (1, 131072)], (128, 256, 512)
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


def other_rows(gemm: float, lengths: tuple[int, ...] = SPARSE[:2], device: str = "cuda") -> list[Row]:
    """The parts besides blocks, a tenth of which are visited: single keys, keys in another order, a mask that is given.

    The limit is the FLOPs of the visited pairs at the rate of a GEMM.
    """
    rows = []
    for count in lengths:
        query, key, value = local_tokens(1, count, device)
        length = torch.tensor(count, device=device)
        whole = 1e6 * call_cost(FORMS[0], 1, count, count).flops / gemm
        lists = random_lists(HEADS, count, count, BLOCK, 0.1, device)
        share = blocks.density(lists.keep(), count, count, BLOCK).mean().item()
        # 256 single keys for each block of queries, in blocks that it does not visit; the first blocks have none.
        room = ~lists.keep() & blocks.possible(count, count, BLOCK, device=device)
        free = room.int().argsort(dim=-1, descending=True, stable=True)[..., :2].sort(-1).values
        single = (free[..., None] * BLOCK + torch.arange(BLOCK, device=device)).flatten(3).int().contiguous()
        counts = (room.sum(-1) >= 2).int() * single.shape[3]
        more = counts.float().mean().item() / (count / 2)
        order = torch.arange(count, device=device).expand(1, GROUPS, -1).contiguous()
        mask = torch.ones(count, count, dtype=torch.bool, device=device).tril()[None, None]
        tested = blocks.lists(lists.keep(), None, BLOCK)
        cases = (
            ("blocks", lists, {}, share),
            ("blocks, 256 single keys", lists, {"columns": single, "column_counts": counts}, share + more),
            ("blocks, all of them tested", tested, {}, share),
            ("blocks, tested by positions", tested, {"key_positions": order}, share),
            ("blocks, tested by a given mask", tested, {"allowed": mask}, share),
        )
        for side, listed, parts, part in cases:
            args = (query, key, None, None, value, None, None, length, None, *block_ops.of(listed))
            rest = (FORMS[0].name, SIZE**-0.5, True, -1)
            us = microseconds(lambda a=(*args, *rest), p=parts: triton_blocks.attend_blocks(*a, **p))  # type: ignore[misc]
            rows.append(Row("parts of lists", side, 1, count, count, us, part * whole))
        del mask, query, key, value
    return rows


def page_rows(limit: float, device: str = "cuda") -> list[Row]:
    """Decoding over a tenth of the pages of a store of 32k; the limit is the bytes of these at the rate of a copy."""
    rows, count = [], 32768
    query, length = (
        torch.randn(1, HEADS, 1, SIZE, dtype=torch.bfloat16, device=device),
        torch.tensor(count, device=device),
    )
    for form, page in ((FORMS[0], 16), (FORMS[0], 64), (FORMS[1], 32), (FORMS[2], 32), (FORMS[2], 128)):
        state, taken = random_state(form, 1, count), count // page // 10
        listed = torch.rand(1, GROUPS, count // page, device=device).argsort(-1)[..., :taken].sort(-1).values.int()
        counts = torch.full((1, GROUPS), taken, dtype=torch.int32, device=device)
        args = (query, *state, length, None, listed, counts, page, form.name, SIZE**-0.5)
        us = microseconds(lambda a=args: triton_blocks.attend_pages(*a))  # type: ignore[misc]
        floor = 1e6 * call_cost(form, 1, 1, taken * page).bytes / limit
        rows.append(Row("decode, pages", f"{form.name}, pages of {page}", 1, 1, count, us, floor))
    return rows


def latent_rows(limit: float, gemm: float, device: str = "cuda") -> list[Row]:
    """Decoding over latents of a few ranks; the limit is the larger of bytes and FLOPs, since every key is rebuilt."""
    rows = []
    for batch, keys in LATENT:
        query = torch.randn(batch, HEADS, 1, SIZE, dtype=torch.bfloat16, device=device)
        length = torch.tensor(keys, device=device)
        table = torch.rand(rope.table_shape(batch, keys, SIZE), device=device)
        for rank in RANKS:
            form = KVForm(8, 4, latent=rank, rope="pre")
            state = random_state(form, batch, keys)
            up = torch.randn(GROUPS, SIZE, rank + 2, device=device) / rank**0.5
            args = (query, *state, length, None, form.name, SIZE**-0.5, True, -1)
            us = microseconds(lambda a=args, u=up, t=table: lowering.attend(*a, table=t, up=u))  # type: ignore[misc]
            needs = cost.attend(form, Predicate(), 2, SIZE).at(**sizes(batch, 1, keys))
            floor = 1e6 * max(needs.bytes / limit, needs.flops / gemm)
            rows.append(Row("decode", f"{form.name}, latents", batch, 1, keys, us, floor))
            del state
    return rows


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


def operator_rows(sides: Iterator[gpu_ffn.Timed], limit: float, gemm: float) -> list[Row]:
    """FFNs that read a part of their weights, or linears in few bits, beside dense ones."""
    rows = []
    for phase, side, tokens, call, needs in sides:
        floor = 1e6 * max(needs.bytes / limit, needs.flops / gemm)
        try:
            rows.append(Row(phase, side, 1, tokens, 0, microseconds(call), floor))
        except Exception as error:  # a peer that cannot run a shape is a result, not the end of the run
            print(f"{side} at {phase}, {tokens} tokens: {error}", file=sys.stderr)
    return rows


def show(console: Console, rows: list[Row]) -> None:
    table = Table(title="GPU kernels", title_justify="left")
    for heading in ("phase", "side", "batch", "queries", "keys", "µs", "limit µs", "of limit", "dense / this"):
        table.add_column(heading, justify="left" if heading in ("phase", "side") else "right")
    # Attention is compared with SDPA, whatever the number of queries, an FFN and a linear with a dense one.
    dense = {(r.phase, r.batch, r.keys or -r.queries): r.us for r in rows if r.side.startswith(("SDPA", "dense"))}
    for r in rows:
        beside = dense.get((r.phase, r.batch, r.keys or -r.queries))
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
    for rank in RANKS:
        for chip in ("sm_80", "sm_90", "sm_100", "gfx942"):
            form = KVForm(8, 4, latent=rank, rope="pre")
            program = Program("decode", form, Predicate(), torch.bfloat16, HEADS // GROUPS, SIZE, SIZE, rotary=SIZE)
            r = resources(compile_ahead(build(program, chip), program, chip, {"SPLITS": 66}))
            used.add_row(f"decode {form.name}", chip, str(r["registers"]), str(r["spilled"]), str(r["shared"]))
    for part in PARTS:
        rule, more = Predicate(causal=part != "given"), {part: True} if part else {}
        for chip in ("sm_80", "sm_90", "sm_100", "gfx942"):
            program = Program(
                "prefill", FORMS[0], rule, torch.bfloat16, HEADS // GROUPS, SIZE, SIZE, blocks=True, **more
            )
            built = build(program, chip)
            assert built.blocks is not None
            cut = built.blocks.within(BLOCK)
            constants = {"FULL": True, "BLOCK": BLOCK, "ROWS": cut.rows, "TILE": cut.tile}
            r = resources(compile_ahead(built, program, chip, constants))
            name = f"blocks of {BLOCK} {part}"
            used.add_row(name, chip, str(r["registers"]), str(r["spilled"]), str(r["shared"]))
    for form, page in ((FORMS[0], 16), (FORMS[1], 32), (FORMS[2], 32)):
        for chip in ("sm_80", "sm_90", "sm_100", "gfx942"):
            program = Program("decode", form, Predicate(), torch.bfloat16, HEADS // GROUPS, SIZE, SIZE, blocks=True)
            built = build(program, chip)
            assert built.blocks is not None
            constants = triton_blocks.page_tiles(built.blocks, page, form) | {"SPLITS": 66}
            r = resources(compile_ahead(built, program, chip, constants))
            name = f"pages of {page} {form.name}"
            used.add_row(name, chip, str(r["registers"]), str(r["spilled"]), str(r["shared"]))
    console.print(used)
    gpu_ffn.paper(console, PEAKS)
    gpu_weights.paper(console, PEAKS)


def main() -> int:
    parser = argparse.ArgumentParser(description="Check and time the GPU kernels.")
    parser.add_argument("--paper", action="store_true", help="bounds and resources, without a GPU")
    parser.add_argument("--check-only", action="store_true", help="compare with the reference, time nothing")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    if options.paper:
        paper(console)
        return 0
    if not torch.cuda.is_available():
        console.print("No GPU here: nothing was built, checked or timed. `--paper` shows what is known without one.")
        return 2
    import triton  # type: ignore[import-untyped]

    device = torch.cuda.get_device_name()
    checked = check(console) + gpu_ffn.check(console) + gpu_weights.check(console)
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
        rows += other_rows(rates["gemm_flops_per_s"])
        rows += page_rows(rates["copy_bytes_per_s"])
        rows += latent_rows(rates["copy_bytes_per_s"], rates["gemm_flops_per_s"])
        for sides in (gpu_ffn.sides(), gpu_weights.sides()):
            rows += operator_rows(sides, rates["copy_bytes_per_s"], rates["gemm_flops_per_s"])
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
