"""Every GPU kernel on this chip against the reference bodies: stores bit for bit, attention by its error.

The reference bodies run on the CPU because a GPU divides by a Python number through its reciprocal, one bit away.
With ``device="cpu"`` and TRITON_INTERPRET=1 a check runs anywhere, slowly.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console

from effcompile.kernels import attention, block_ops, blocks, columns, latent, ops, pages, quantize, ranges, rope
from effcompile.kernels.blocks import BLOCK
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import Predicate
from effcompile.lowering import triton as lowering
from effcompile.lowering import triton_blocks
from effcompile.lowering.triton_latent import factor_dtype
from effcompile.passes import base
from effcompile.passes.paged_decode import PagedDecode
from effcompile.passes.sparse_columns import SparseColumns
from effcompile.passes.sparse_prefill import SparsePrefill

HEADS, GROUPS, SIZE = 32, 8, 128
FORMS = [KVForm(16, 16), KVForm(8, 8), KVForm(4, 4)]
DENSE = FORMS[0].name
LATENTS = [
    KVForm(16, 16, latent=128, rope="pre"),
    KVForm(8, 4, latent=192, rope="pre"),
    KVForm(4, 4, 32, 32, latent=512, rope="pre_adjacent"),
    KVForm("fp8", 8, 16, 0, "token", latent=48),
]
PARTS = ("", "columns", "positions", "given", "moved", "ranges")
"""What ``attend_blocks`` may have besides blocks."""


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
        for part in PARTS:
            for size, block, queries, keys in ((128, 128, 700, 700), (64, 64, 300, 1000), (96, 48, 500, 500)):
                found.append(check_blocks(dtype, size, block, queries, keys, part))
        for form in FORMS[1:]:
            found += [check_stored_blocks(form, dtype, 128, block, 300, 900) for block in (64, 128)]
        for form, page in ((KVForm(16, 16), 16), (KVForm(8, 8), 32), (KVForm(4, 4), 64), (KVForm(8, 4, 32, 32), 128)):
            found.append(check_pages(form, dtype, 128, page, 1000))
            found += [check_rules(form, dtype, 64, queries, 700) for queries in (1, 300)]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for form in LATENTS:
            found += [check_latents(form, dtype, *sizes) for sizes in ((128, 1, 500, False), (64, 3, 700, True))]
    found += [check_choice(name) for name in base.REGISTRY if issubclass(base.get(name), SparsePrefill)]
    found += [check_page_choice(name) for name in base.REGISTRY if issubclass(base.get(name), PagedDecode)]
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


def parts_of(
    part: str, lists: blocks.BlockLists, queries: int, keys: int, device: str
) -> tuple[blocks.BlockLists, torch.Tensor, dict[str, Any], bool]:
    """Lists, the pairs of tokens that they and ``part`` let through, its operands, and whether to test causality."""
    block, heads = lists.block, lists.kv_num_blocks.shape[1]
    visited = blocks.tokens(lists.keep().cpu(), queries, keys, block)
    causal = attention.allowed(Predicate(), queries, keys, None, visited.device)
    if part == "columns":
        rows = lists.kv_num_blocks.shape[2]
        free = torch.stack([~visited[:, :, i * block : (i + 1) * block].any(2) for i in range(rows)], 2)
        chosen = free & (torch.rand(free.shape) < 0.3)
        single, counts = columns.gathered(torch.arange(keys), chosen)
        seen = (visited | chosen.repeat_interleave(block, 2)[:, :, :queries]) & causal
        return lists, seen, {"columns": single.to(device), "column_counts": counts.to(device)}, True
    if part == "positions":
        order = torch.stack([torch.randperm(keys) for _ in range(2)])[None]
        tested = blocks.lists(lists.keep(), None, block)
        by_slot = order.repeat_interleave(heads // 2, 1)[:, :, None].expand(visited.shape)
        seen = visited & causal.expand(visited.shape).gather(3, by_slot)
        return tested, seen, {"key_positions": order.to(device)}, True
    if part == "given":
        mask = (visited & (torch.rand(visited.shape) < 0.5)).to(device)
        made = torch.ops.effcompile.mask_blocks.default(mask, block)
        return blocks.BlockLists(*made, block), mask.cpu(), {"allowed": mask}, False
    tested = blocks.lists(lists.keep(), None, block)
    if part == "moved":
        stands = torch.randint(0, keys, (1, heads, queries))
        return tested, visited & (torch.arange(keys) <= stands[..., None]), {"query_positions": stands.to(device)}, True
    if part == "ranges":
        near = ranges.window(queries, keys, 100, 3)
        return tested, visited & ranges.tokens(near, keys), {"ranges": near.to(device)}, True
    return lists, visited & causal, {}, True


def check_blocks(
    dtype: torch.dtype, size: int, block: int, queries: int, keys: int, part: str = "", device: str = "cuda"
) -> dict[str, Any]:
    """The kernel over block lists against attention in fp64, and a wrong list, whose rows are NaN."""
    torch.manual_seed(0)
    key, value = (torch.randn(1, 2, keys, size).to(dtype) for _ in range(2))
    query = torch.randn(1, queries, 8, size).to(dtype).transpose(1, 2)
    random = random_lists(8, queries, keys, block, 0.3, device)
    lists, seen, more, causal = parts_of(part, random, queries, keys, device)
    state = (key.to(device), None, None, value.to(device), None, None)
    rest, length = (DENSE, size**-0.5, causal, -1), torch.tensor(keys, device=device)

    def attend() -> torch.Tensor:
        args = (query.to(device), *state, length, None, *block_ops.of(lists), *rest)
        return triton_blocks.attend_blocks(*args, **more)[0].cpu()

    result = judged(attend(), query, key, value, seen)
    lists.kv_num_blocks[0, 3, 1], lists.kv_indices[0, 3, 1, 0] = 1, 10**9
    wrong = attend()
    loud = bool(wrong[0, 3, block : 2 * block].isnan().all()) and int(wrong.isnan().any(-1).sum()) <= block
    return result | {"form": f"blocks of {block} {part}", "loud": loud, "ok": loud and result["ok"]}


def check_stored_blocks(
    form: KVForm, dtype: torch.dtype, size: int, block: int, queries: int, length: int, device: str = "cuda"
) -> dict[str, Any]:
    """The kernel over block lists of a store in few bits against attention in fp64."""
    torch.manual_seed(0)
    host, key, value = filled(form, dtype, size, length)
    query = torch.randn(2, queries, 8, size).to(dtype).transpose(1, 2)
    lists = random_lists(8, queries, length, block, 0.3, device)
    seen = blocks.tokens(lists.keep().cpu(), queries, length, block)
    seen = seen & attention.allowed(Predicate(), queries, length, None, query.device)
    state = [None if t is None else t.to(device) for t in host]
    args = (query.to(device), *state, torch.tensor(length, device=device), None, *block_ops.of(lists))
    out = triton_blocks.attend_blocks(*args, form.name, size**-0.5, True, -1)[0].cpu()
    return judged(out, query, key, value, seen) | {"form": f"blocks of {block} {form.name}"}


def check_pages(
    form: KVForm, dtype: torch.dtype, size: int, page: int, length: int, device: str = "cuda"
) -> dict[str, Any]:
    """The kernel over pages against attention in fp64, and a wrong list, whose heads are NaN."""
    torch.manual_seed(0)
    host, key, value = filled(form, dtype, size, length)
    query = torch.randn(2, 1, 8, size).to(dtype).transpose(1, 2)
    scores = torch.rand(2, 2, blocks.count_blocks(length, page))
    listed, counts = pages.take(scores.masked_fill(scores > 0.4, -torch.inf), 10**6)
    state = [None if t is None else t.to(device) for t in host]
    at = torch.tensor(length, device=device)

    def attend() -> torch.Tensor:
        lists = (listed.to(device), counts.to(device), page, form.name, size**-0.5)
        return triton_blocks.attend_pages(query.to(device), *state, at, None, *lists)[0].cpu()

    seen = blocks.visited(counts, listed, scores.shape[2]).repeat_interleave(page, 2)[:, :, None, :length]
    result = judged(attend(), query, key, value, seen.repeat_interleave(4, 1))
    counts[1, 0] = 10**9
    loud = torch.equal(attend().isnan().all(-1).sum((1, 2)), torch.tensor([0, 4]))
    return result | {"form": f"pages of {page} {form.name}", "loud": loud, "ok": loud and result["ok"]}


def check_rules(
    form: KVForm, dtype: torch.dtype, size: int, queries: int, length: int, device: str = "cuda"
) -> dict[str, Any]:
    """Packed sequences behind a prefix that all see, against attention in fp64."""
    torch.manual_seed(0)
    host, key, value = filled(form, dtype, size, length)
    query = torch.randn(2, queries, 8, size).to(dtype).transpose(1, 2)
    given = (torch.arange(1024) // 97).expand(2, -1) % 5, torch.tensor([7, length // 2])
    rules = dict(zip(("segments", "prefix"), (x.to(device) for x in given), strict=True))
    state = [None if t is None else t.to(device) for t in host]
    args = (query.to(device), *state, torch.tensor(length, device=device), None, form.name, size**-0.5, True, -1)
    seen = attention.allowed(Predicate(segments=True, prefix=True), queries, length, None, query.device, *given)
    result = judged(lowering.attend(*args, **rules)[0].cpu(), query, key, value, seen)
    return result | {"form": f"packed, behind a prefix, {form.name}"}


def check_latents(
    form: KVForm, dtype: torch.dtype, size: int, queries: int, length: int, normed: bool, device: str = "cuda"
) -> dict[str, Any]:
    """Keys as latents: the store bit for bit, and decoding over it against attention in fp64 to keys rebuilt in it."""
    torch.manual_seed(0)
    groups, rank, eps = 8, form.latent, 1e-5 if normed else None
    host: list[torch.Tensor | None] = []
    for kind in ("key", "value"):
        shapes = form.buffers(kind, 2, groups, 1024, size, dtype)  # type: ignore[arg-type]
        host += [torch.zeros(s, dtype=d) for s, d in shapes] + [None] * (3 - len(shapes))
    state = [None if t is None else t.to(device) for t in host]
    new = [torch.randn(2, length, n, wide).to(dtype).transpose(1, 2) for n, wide in ((1, rank), (groups, size))]
    with ops.reference_only():
        torch.ops.effcompile.kv_store(*host, torch.tensor(0), *new, form.name)
    lowering.kv_store(*state, torch.tensor(0, device=device), *(x.to(device) for x in new), form.name)
    same = all(torch.equal(a, b.cpu()) for a, b in zip(host, state) if a is not None and b is not None)
    basis = torch.linalg.qr(torch.randn(groups * size, rank, dtype=torch.float64))[0]
    up = latent.operand(basis, groups, torch.randn(groups * size), torch.rand(size) + 0.5 if normed else None)
    table = torch.zeros(rope.table_shape(2, 1024, size))
    angle = 40 * torch.rand(2, length, size // 2)
    rope.write(table, torch.tensor(0), angle.cos(), angle.sin())
    keys, values = ops.split_state(tuple(host))
    held = quantize.load_side(keys, length, form.buffered, "key")[:, 0].double()

    def rebuilt(as_dtype: torch.dtype) -> torch.Tensor:
        u = up.double()
        key = torch.einsum("bsr,gdr->bgsd", held.to(as_dtype).double(), u[..., :rank].to(as_dtype).double())
        key = key + u[:, None, :, rank]
        if eps is not None:
            key = key * (key.square().mean(-1, keepdim=True) + eps).rsqrt() * u[:, None, :, rank + 1]
        return (
            rope.rotate(key, *(x[:, :, :length] for x in rope.angles(table, 0, 1024)), form.rope) if form.pre else key
        )

    more: dict[str, Any] = {"up": up.to(device)} | ({} if eps is None else {"eps": eps})
    more |= {"table": table.to(device)} if form.pre else {}
    query = torch.randn(2, queries, 4 * groups, size).to(dtype).transpose(1, 2)
    args = (query.to(device), *state, torch.tensor(length, device=device), None, form.name, size**-0.5, True, -1)
    out = lowering.attend(*args, **more)[0].cpu()
    value = quantize.load_side(values, length, form, "value")
    seen = attention.allowed(Predicate(), queries, length, None, query.device)
    # What is in the ring meets a factor in the model's dtype, and what was packed maybe one in fp16.
    packed = form.packed(length)
    coarse = [rebuilt(factor_dtype(form, dtype))[:, :, :packed], rebuilt(dtype)[:, :, packed:]]
    result = judged(out, query, rebuilt(torch.float64), value, seen, torch.cat(coarse, 2))
    return result | {"form": form.name, "same_bits": same, "ok": same and result["ok"]}


def filled(
    form: KVForm, dtype: torch.dtype, size: int, length: int
) -> tuple[list[torch.Tensor | None], torch.Tensor, torch.Tensor]:
    """A store of random tokens, and its keys and values as attention reads them."""
    host: list[torch.Tensor | None] = []
    for kind in ("key", "value"):
        shapes = form.buffers(kind, 2, 2, 1024, size, dtype)
        host += [torch.zeros(s, dtype=d) for s, d in shapes] + [None] * (3 - len(shapes))
    new = [torch.randn(2, length, 2, size).to(dtype).transpose(1, 2) for _ in range(2)]
    with ops.reference_only():
        torch.ops.effcompile.kv_store(*host, torch.tensor(0), *new, form.name)
    keys, values = ops.split_state(tuple(host))
    return host, quantize.load_side(keys, length, form, "key"), quantize.load_side(values, length, form, "value")


def judged(
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor,
    coarse: torch.Tensor | None = None,
) -> dict[str, Any]:
    """The error of ``out`` against attention to ``seen`` in fp64, and what it may be.

    ``coarse`` are the keys as they are when they are made in the model's dtype, if they are made.
    """
    size, dtype = query.shape[3], query.dtype
    best = rounded_attention(query, key, value, size**-0.5, torch.float64, seen)
    low = rounded_attention(query, key if coarse is None else coarse, value, size**-0.5, dtype, seen)
    error = (out.double() - best).abs().max().item()
    budget = budget_of(query, key, value, best, (low.double() - best).abs().max().item())
    return {"dtype": str(dtype), "size": size, "queries": query.shape[2], "length": key.shape[2], "max_error": error,
            "budget": budget, "ok": error <= budget}  # fmt: skip


def check_choice(name: str, device: str = "cuda") -> dict[str, Any]:
    """A method chooses the same as on the CPU, but for rounding, and nothing waits for the device."""
    query, key, _ = local_tokens(1, 4096, device)
    choose = choice_of(name)
    choose(query, key)
    try:
        with waiting_is_an_error(device):
            made = choose(query, key)
    except RuntimeError as error:
        return {"form": f"choice of {name}", "waited": str(error), "ok": False}
    differ = (made.cpu() != choose(query.cpu(), key.cpu())).float().mean().item()
    return {"form": f"choice of {name}", "share_that_differs": differ, "ok": differ < 0.01}


def choice_of(name: str) -> Any:
    """A function of queries and keys that gives a method's choice as one tensor: blocks, columns too, or the order."""
    cls, op = base.get(name), torch.ops.effcompile
    method = block_ops.method_text(name, dataclasses.asdict(cls()))

    def choose(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        args = (query, key, None, method, SIZE**-0.5)
        if issubclass(cls, SparseColumns):
            *lists, single, counts = op.select_columns.default(*args)
            keep = blocks.BlockLists(*lists, BLOCK).keep()
            there = torch.arange(single.shape[3], device=single.device) < counts.unsqueeze(-1)
            return torch.cat([keep.flatten().int(), torch.where(there, single, -1).flatten()])
        if issubclass(cls, SparsePrefill) and cls.reorders:
            order: torch.Tensor = op.order_keys.default(*args)
            return order
        return blocks.BlockLists(*op.select_blocks.default(*args), BLOCK).keep()

    return choose


def check_page_choice(name: str, device: str = "cuda") -> dict[str, Any]:
    """The same for pages of a cache in 8 bits."""
    form, cls = KVForm(8, 8), base.get(name)
    assert issubclass(cls, PagedDecode)
    torch.manual_seed(0)
    host, _, _ = filled(form, torch.bfloat16, SIZE, 1000)
    query = torch.randn(2, 8, 1, SIZE).bfloat16()
    method = block_ops.method_text(name, dataclasses.asdict(cls(token_budget=512).for_store(form)))

    def choose(place: str) -> torch.Tensor:
        keys, length = [None if t is None else t.to(place) for t in host[:3]], torch.tensor(1000, device=place)
        args = (query.to(place), *keys, length, None, method, form.name, SIZE**-0.5)
        with waiting_is_an_error(place):
            listed, counts = torch.ops.effcompile.select_pages.default(*args)
        return blocks.visited(counts, listed, 32).cpu()

    try:
        differ = (choose(device) != choose("cpu")).float().mean().item()
    except RuntimeError as error:
        return {"form": f"choice of {name}", "waited": str(error), "ok": False}
    return {"form": f"choice of {name}", "share_that_differs": differ, "ok": differ < 0.05}


@contextlib.contextmanager
def waiting_is_an_error(device: str) -> Iterator[None]:
    """Within this context PyTorch raises where it waits for a GPU."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def local_tokens(batch: int, count: int, device: str) -> list[torch.Tensor]:
    """Queries, keys and values in bf16; queries attend to blocks of their own topic, near and far, most."""
    parts = blocks.count_blocks(count, BLOCK)
    topics = torch.randn(16, SIZE, device=device)
    topic = topics[torch.randint(0, 16, (batch, 1, parts), device=device)].repeat_interleave(BLOCK, 2)[:, :, :count]
    made = [torch.randn(batch, h, count, SIZE, device=device) for h in (HEADS, GROUPS, GROUPS)]
    return [(x + 1.2 * topic * (i < 2)).bfloat16() for i, x in enumerate(made)]


def rounded_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    dtype: torch.dtype,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention, or to ``seen``. Operands in ``dtype``, sums in fp32 (fp64 for fp64). No key gives 0."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ratio = query.shape[1] // key.shape[1]
    q, k, v = (x.to(dtype).to(wide) for x in (query, key, value))
    k, v = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
    keep = attention.allowed(Predicate(), query.shape[2], key.shape[2], None, query.device) if seen is None else seen
    weight = (q @ k.mT * scale).masked_fill(~keep, float("-inf")).softmax(-1).nan_to_num(0)
    return (weight.to(dtype).to(wide) @ v).to(dtype)
