"""C++ for CPUs: a program becomes a small readable file that includes its parts, is built once and called directly.

The parts are the headers of :mod:`effcompile.kernels.cpp`; what is generated here is only the choice of them, a struct
of constants named ``P``. Importing registers the launchers of ``attend``, ``kv_store`` and ``kv_load`` on CPUs.

Measured by ``benchmarks/cpu_kernels.py`` beside SDPA in fp32 (9 query and 3 key/value heads of 64, one AVX-512 core of
a busy machine, caches of 30 layers so that they come from memory): decoding at 8,192 keys takes 3.3 ms a layer in SDPA,
1.2 ms with 16 bits, 0.5 ms with 8, 0.3 ms with 4. From there on arithmetic is the limit, and not memory: 3 bits take
1.1 to 1.2 times as long as 4, 2 bits 0.9 to 0.95 times. Where it gains least: short caches; at 512 keys the call itself
is half of the time.
"""

from __future__ import annotations

import contextvars
import ctypes
import dataclasses
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

import torch
from torch import Tensor

from effcompile.kernels import latent, ops
from effcompile.kernels.form import FormError, KVForm
from effcompile.kernels.ops import CapacityError, KernelUnavailable
from effcompile.kernels.program import DECODE_ROWS, DTYPES, HEAD_SIZES, Predicate, Program, ScoreParts, StoreProgram
from effcompile.lowering import cpp_replay, toolchain
from effcompile.lowering.cpp_arguments import (
    ATTEND_ADDRESSES,
    LOAD,
    STORE,
    STORE_ADDRESSES,
    attend_arguments,
    capacity_of,
    latent_arguments,
    length_pointer,
    pointers_of,
    rotary,
    score_arguments,
    table_pointer,
)

AnyProgram: TypeAlias = Program | StoreProgram
Entry: TypeAlias = Callable[[bytes], int]

LATENT_SIZE = 8192
"""Channels that a store takes at most."""
_CPP_TYPES = {torch.float32: "float", torch.bfloat16: "c10::BFloat16", torch.float16: "c10::Half"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A built program.

    Parameters
    ----------
    program
        What it was generated from; ``program.name`` is the name of its files.
    source_path, library_path
        The generated file, and the library built from it.
    entries
        The compiled entry points by name: each takes a packed argument struct and returns 0, or 1 if out of capacity.
    """

    program: AnyProgram
    source_path: str
    library_path: str
    entries: dict[str, Entry]


def source(program: AnyProgram) -> str:
    """The C++ file of ``program``: constants, the header of its skeleton, and its entry points."""
    form = program.form
    constants: dict[str, object] = {
        "int key_bits": form.bits("key"),
        "int value_bits": form.bits("value"),
        "int64_t group": form.group,
        "int64_t residual": form.residual,
        "int64_t key_size": program.key_size,
        "int64_t value_size": program.value_size,
        "int64_t rotary": program.rotary,
        "int64_t latent": form.rank("key"),
        "int64_t value_latent": form.rank("value"),
        "bool adjacent": str(form.rope == "pre_adjacent").lower(),
    }
    entries: dict[str, tuple[str, str]]
    if isinstance(program, Program):
        predicate = program.predicate
        constants |= {
            "int ratio": program.ratio,
            "bool normed": str(program.normed).lower(),
            "bool causal": str(predicate.causal).lower(),
            "int64_t window": -1 if predicate.window is None else predicate.window,
            "bool key_mask": str(predicate.key_mask).lower(),
        }
        header, entries = f"{program.phase}.h", {"attend": ("AttendArgs", program.phase)}
        if program.blocks and program.phase == "prefill":
            header, entries = "blocks.h", {"attend_blocks": ("BlockArgs", "attend_blocks")}
        elif program.blocks:
            header, entries = "pages.h", {name: ("PageArgs", name) for name in ("attend_pages", "attend_mass")}
        elif program.phase == "select":
            entries = {"select_pages": ("SelectArgs", "select_pages")}
        more = {"gathered_columns": program.columns, "key_positions": program.positions}
    else:
        header, entries = "store.h", {"kv_store": ("StoreArgs", "append"), "kv_load": ("LoadArgs", "read")}
        more = {}
    unusual = {
        "keys_per_token": form.key_axis == "token",
        "values_per_channel": form.value_axis == "channel",
        "keys_e4m3": form.fp8("key"),
        "values_e4m3": form.fp8("value"),
    } | more
    bases = ", ".join(f"ec::{name}" for name, holds in unusual.items() if holds)
    body = "\n".join(f"  static constexpr {name} = {value};" for name, value in constants.items())
    rules = ("segments", "prefix")
    if isinstance(program, Program) and (program.score.name or any(getattr(program.predicate, r) for r in rules)):
        chosen = dataclasses.asdict(program.score) | {rule: getattr(program.predicate, rule) for rule in rules}
        parts = ", ".join(f"{k} = {str(v).lower()}" for k, v in chosen.items())
        body += f"\n  struct score {{\n    static constexpr bool {parts};\n  }};"
    calls = "\n".join(
        f'extern "C" int64_t {entry}(const ec::{args}* args) {{ return ec::{call}<P>(*args); }}'
        for entry, (args, call) in entries.items()
    )
    return (
        f"// {program.name}\n"
        "// Generated by effcompile/lowering/cpp.py; the parts are in effcompile/kernels/cpp.\n"
        f'#include "{header}"\n\n'
        f"namespace {{\nstruct P {f': {bases} ' if bases else ''}{{\n"
        f"  using scalar = {_CPP_TYPES[program.dtype]};\n{body}\n}};\n}}  // namespace\n\n"
        f"{calls}\n"
    )


def refusal(program: AnyProgram) -> str | None:
    """Why no C++ kernel can serve ``program``, or None."""
    if program.form.latents and not (isinstance(program, Program) and program.phase == "decode" and not program.blocks):
        return latent.FOR_DECODING
    if program.form.pre != (0 < program.rotary <= program.key_size):
        return f"the form {program.form.name} with a table of angles of {program.rotary} channels"
    # Latents of all heads together are more than a head, and storing them keeps nothing in registers.
    largest = HEAD_SIZES[-1] if isinstance(program, Program) else LATENT_SIZE
    for kind, size in (("key", program.key_size), ("value", program.value_size)):
        if not HEAD_SIZES[0] <= size <= largest or size % 8:
            offered = f"multiples of 8 from {HEAD_SIZES[0]} to {largest}"
            return f"{kind} heads of {size} channels ({offered} have C++ kernels)"
        try:
            program.form.check_head(kind, size)  # type: ignore[arg-type]
        except FormError as error:
            return str(error)
    if isinstance(program, Program) and program.columns and not program.form.dense:
        return f"single keys of the form {program.form.name} (keys and values of 16 bits can be gathered)"
    if program.dtype not in DTYPES:
        return f"dtype {program.dtype} ({', '.join(str(d) for d in DTYPES)} have kernels)"
    return None


def build(program: AnyProgram) -> Kernel:
    """Generate, build (or find in the cache) and load ``program``. Raises :class:`toolchain.BuildError`."""
    library = toolchain.build(program.name, source(program))
    loaded = toolchain.load(library)
    entries = {}
    names: tuple[str, ...] = ("kv_store", "kv_load")
    if isinstance(program, Program):
        listed = ("attend_blocks",) if program.phase == "prefill" else ("attend_pages", "attend_mass")
        names = listed if program.blocks else ("select_pages" if program.phase == "select" else "attend",)
    for name in names:
        entry = getattr(loaded, name)
        entry.argtypes, entry.restype = [ctypes.c_char_p], ctypes.c_int64
        entries[name] = entry
    return Kernel(program, str(library.with_suffix(".cpp")), str(library), entries)


_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_builds: dict[AnyProgram, Future[Kernel]] = {}


def prebuild(programs: Iterable[AnyProgram]) -> list[Future[Kernel]]:
    """Start building ``programs`` in background threads; a launch waits for its own program only."""
    global _pool
    started = []
    cpp_replay.prebuild()
    with _lock:
        for program in programs:
            if program not in _builds:
                if _pool is None:
                    _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="effcompile-cpp")
                # Settings of Inductor, such as the compiler, belong to the calling context.
                _builds[program] = _pool.submit(contextvars.copy_context().run, build, program)
            started.append(_builds[program])
    return started


def kernels() -> list[Kernel]:
    """The kernels built or loaded by this process so far."""
    with _lock:
        builds = list(_builds.values())
    return [build.result() for build in builds if build.done() and build.exception() is None]


def kernel(program: AnyProgram) -> Kernel:
    """The kernel of ``program``, built on first use. Raises :class:`KernelUnavailable` if there is none."""
    why = refusal(program)
    if why is None:
        try:
            return prebuild([program])[0].result()
        except toolchain.BuildError as error:
            why = f"the C++ kernel {program.name} could not be built: {error}"
    raise KernelUnavailable(why)


def clear() -> None:
    """Forget every kernel and every failed build of this process; files stay."""
    with _lock:
        _builds.clear()
        _bound.clear()
        cpp_replay.forget()


# Entry points by the facts of a call that choose a program. A string is the reason why there is none.
_bound: dict[tuple[Any, ...], Entry | str] = {}


def bind(key: tuple[Any, ...], op: str, make: Callable[[], AnyProgram]) -> Entry:
    """The entry point for these facts; ``make`` gives its program the first time. Raises :class:`KernelUnavailable`."""
    entry = _bound.get(key)
    if entry is None:
        try:
            entry = kernel(make()).entries[op]
        except (KernelUnavailable, FormError) as error:
            entry = str(error)
        _bound[key] = entry
    if isinstance(entry, str):
        raise KernelUnavailable(entry)
    return entry


def _of_ranks(name: str, *ranks: int) -> KVForm:
    """The form ``name``, of which a call gives the up-projections of ``ranks`` latents, or none for 0."""
    form = KVForm.parse(name)
    for kind, rank in zip(("key", "value"), ranks, strict=True):
        if form.rank(kind) != rank:  # type: ignore[arg-type]
            what = "latents" if kind == "key" else "latents of values"
            raise KernelUnavailable(f"an up-projection of {rank} {what} for the form {name}")
    return form


def attend(
    query: Tensor,
    k0: Tensor,
    k1: Tensor | None,
    k2: Tensor | None,
    v0: Tensor,
    v1: Tensor | None,
    v2: Tensor | None,
    length: Tensor,
    key_mask: Tensor | None,
    form: str,
    scale: float,
    causal: bool,
    window: int,
    *,
    table: Tensor | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    segments: Tensor | None = None,
    prefix: Tensor | None = None,
    up: Tensor | None = None,
    eps: float | None = None,
    value_up: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launcher of ``effcompile::attend`` on CPUs. Arguments and results are the operator's."""
    batch, heads, queries, size = query.shape
    groups, value_size = (v0.shape[1], (v0 if v2 is None else v2).shape[3]) if value_up is None else value_up.shape[::2]
    dtype = query.dtype
    ratio = heads // groups
    few = queries * ratio <= DECODE_ROWS
    ranks = latent.rank_of(up), latent.value_rank_of(value_up)
    parts = (softcap is not None, bias is not None, sinks is not None)
    rules = (key_mask is not None, segments is not None, prefix is not None)
    key = (form, dtype, size, value_size, ratio, few, causal, window, rules, parts, rotary(table), ranks, eps is None)
    entry = bind(
        key,
        "attend",
        lambda: Program(
            "decode" if few else "prefill",
            _of_ranks(form, *ranks),
            Predicate(causal, window if window >= 0 else None, *rules),
            dtype,
            ratio,
            size,
            value_size,
            ScoreParts(*parts),
            rotary(table),
            normed=eps is not None,
        ),
    )
    held_heads = tuple(1 if rank else groups for rank in ranks)
    if ratio * groups != heads or k0.shape[0] != batch or (k0.shape[1], v0.shape[1]) != held_heads:
        shapes = f"{tuple(k0.shape)} and {tuple(v0.shape)}"
        raise KernelUnavailable(f"{heads} query heads and batch {batch} do not fit a store of {shapes}")
    more, held = b"", None
    if any(parts) or any(rules[1:]) or any(ranks):
        more, held = score_arguments(softcap, bias, sinks, segments, prefix, query, capacity_of(k0, v0), length)
    if any(ranks):
        more += latent_arguments(up, eps, value_up, groups, size)
    state = (k0, k1, k2, v0, v1, v2)
    packed, out, lse, alive = attend_arguments(
        query, state, length, key_mask, scale, table, ranks, (groups, value_size)
    )
    packed += more
    beyond = entry(packed)
    del alive, held
    if beyond:
        raise CapacityError(f"the length, {int(length)}, is not within the capacity of the store.")
    capacity = capacity_of(k0, v0)
    # Those that are shorter have been compared with the length.
    if all(t is None or t.shape[-1] >= capacity for t in (key_mask, bias, segments)):
        cpp_replay.offer("attend", attend, entry, packed, ATTEND_ADDRESSES[len(packed)])
    return out, lse


def kv_store(
    k0: Tensor,
    k1: Tensor | None,
    k2: Tensor | None,
    v0: Tensor,
    v1: Tensor | None,
    v2: Tensor | None,
    length: Tensor,
    key: Tensor,
    value: Tensor,
    form: str,
    *,
    table: Tensor | None = None,
) -> None:
    """Launcher of ``effcompile::kv_store`` on CPUs. Raises :class:`CapacityError`, having written nothing."""
    batch, groups, tokens, key_size = key.shape
    value_size = value.shape[3]
    dtype = key.dtype
    entry = bind(
        ("kv_store", form, dtype, key_size, value_size, rotary(table)),
        "kv_store",
        lambda: StoreProgram(KVForm.parse(form).buffered, dtype, key_size, value_size, rotary(table)),
    )
    pointers = pointers_of((k0, k1, k2, v0, v1, v2), dtype, key_size, value_size)
    capacity = capacity_of(k0, v0)
    fits = all(x.shape == (*held.shape[:2], tokens, x.shape[3]) for x, held in ((key, k0), (value, v0)))
    if not fits or value.shape[0] != batch or value.dtype is not dtype:
        shapes = f"{tuple(key.shape)} and {tuple(value.shape)}"
        raise KernelUnavailable(f"keys and values of {shapes} do not fit each other or the store")
    if key.stride(3) != 1:
        key = key.contiguous()
    if value.stride(3) != 1:
        value = value.contiguous()
    packed = STORE(
        *pointers,
        length_pointer(length),
        table_pointer(table, batch, capacity),
        key.data_ptr(),
        value.data_ptr(),
        batch,
        groups,
        value.shape[1],
        tokens,
        capacity,
        *key.stride()[:3],
        *value.stride()[:3],
        torch.get_num_threads(),
    )
    beyond = entry(packed)
    if beyond:
        raise CapacityError(
            f"{int(length)} tokens are cached and {tokens} more were given, but the capacity is {capacity}; "
            "make the cache with a larger capacity."
        )
    cpp_replay.offer("kv_store", kv_store, entry, packed, STORE_ADDRESSES)


def kv_load(
    k0: Tensor,
    k1: Tensor | None,
    k2: Tensor | None,
    v0: Tensor,
    v1: Tensor | None,
    v2: Tensor | None,
    length: Tensor,
    form: str,
    *,
    table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launcher of ``effcompile::kv_load`` on CPUs: dense keys and values, zeros beyond the length."""
    key_like, value_like = k0 if k2 is None else k2, v0 if v2 is None else v2
    key_size, value_size = key_like.shape[3], value_like.shape[3]
    dtype = key_like.dtype
    entry = bind(
        ("kv_load", form, dtype, key_size, value_size, rotary(table)),
        "kv_load",
        lambda: StoreProgram(KVForm.parse(form), dtype, key_size, value_size, rotary(table)),
    )
    batch, groups = k0.shape[:2]
    if v0.shape[1] != groups:
        raise KernelUnavailable(f"{groups} heads of keys and {v0.shape[1]} of values")
    capacity = capacity_of(k0, v0)
    key_out = key_like.new_empty((batch, groups, capacity, key_size))
    value_out = value_like.new_empty((batch, groups, capacity, value_size))
    beyond = entry(
        LOAD(
            *pointers_of((k0, k1, k2, v0, v1, v2), dtype, key_size, value_size),
            length_pointer(length),
            table_pointer(table, batch, capacity),
            key_out.data_ptr(),
            value_out.data_ptr(),
            batch,
            groups,
            capacity,
            torch.get_num_threads(),
        )
    )
    if beyond:
        raise CapacityError(f"the length, {int(length)}, is not within the capacity, {capacity}.")
    return key_out, value_out


for _op, _launcher in (("attend", attend), ("kv_store", kv_store), ("kv_load", kv_load)):
    ops.register_launcher(_op, "cpu", _launcher)
