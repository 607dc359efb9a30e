"""Calls of the operators on stores full of NaN, and the checks of a C++ kernel that all its tests share."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from stores import dequantised
from torch import Tensor

from effcompile.kernels import ops
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import DECODE_ROWS, Predicate, Program, StoreProgram
from effcompile.lowering import cpp

STORE, LOAD, ATTEND = (getattr(torch.ops.effcompile, name).default for name in ("kv_store", "kv_load", "attend"))
LENGTHS = (1, 63, 65, 500)
BASE = Program("decode", KVForm(), Predicate(), torch.float32, 3, 64, 64)

State = list[Tensor | None]


def store_of(program: Program) -> StoreProgram:
    """The store that an attention program reads."""
    return StoreProgram(program.form, program.dtype, program.key_size, program.value_size, program.rotary)


def poisoned(form: KVForm, batch: int, heads: int, capacity: int, sizes: tuple[int, int], dtype: torch.dtype) -> State:
    """Six buffers full of NaN (255 for codes): whatever is read before it is written shows."""
    state: State = []
    for kind, size in zip(("key", "value"), sizes, strict=True):
        made: State = [
            torch.full(shape, 255 if kind_dtype == torch.uint8 else float("nan"), dtype=kind_dtype)
            for shape, kind_dtype in form.buffers(kind, batch, heads, capacity, size, dtype)  # type: ignore[arg-type]
        ]
        state += made + [None] * (3 - len(made))
    return state


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bit pattern, so that NaN equals NaN and 0 differs from -0."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def assert_same(ours: State, theirs: State) -> None:
    for name, a, b in zip(("k0", "k1", "k2", "v0", "v1", "v2"), ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert torch.equal(bits(a), bits(b)), f"{name} differs in {int((bits(a) != bits(b)).sum())} places"


def copy(state: State) -> State:
    return [None if t is None else t.clone() for t in state]


def fresh(batch: int, groups: int, tokens: int, size: int, dtype: torch.dtype) -> Tensor:
    """Keys or values ``[B, G, T, D]`` as models give them: a view of ``[B, T, G, D]``, with an offset per channel."""
    return (torch.randn(batch, tokens, groups, size) + 2 * torch.randn(size)).to(dtype).transpose(1, 2)


def exact(
    query: Tensor, state: State, length: int, mask: Tensor | None, form: KVForm, scale: float, p: Predicate
) -> Any:
    """Attention over the store in fp64, one batch entry and head at a time: written apart from the reference body."""
    keys, values = ops.split_state(tuple(state))
    k, v = dequantised(keys, length, form, "key"), dequantised(values, length, form, "value")
    batch, heads, queries, _ = query.shape
    ratio = heads // k.shape[1]
    hidden = torch.zeros(batch, queries, length, dtype=torch.bool)
    for t in range(queries):
        position = length - queries + t
        if p.window is not None:
            hidden[:, t, : max(0, position - p.window + 1)] = True
        if p.causal:
            hidden[:, t, position + 1 :] = True
    if mask is not None:
        hidden |= ~mask[:, None, :length]
    out = torch.zeros(batch, heads, queries, v.shape[3], dtype=torch.float64)
    lse = torch.full((batch, heads, queries), float("-inf"), dtype=torch.float64)
    for b, h in itertools.product(range(batch), range(heads)):
        s = (query[b, h].double() @ k[b, h // ratio].T * scale).masked_fill(hidden[b], float("-inf"))
        lse[b, h] = s.logsumexp(-1)
        out[b, h] = s.softmax(-1).nan_to_num(0) @ v[b, h // ratio]
    return out, lse


def assert_within_budget(
    ours: Tensor, reference: Tensor, truth: Tensor, what: str, roundings: int = 1, summed: float = 0.0
) -> None:
    """At most twice what the reference loses against fp64, plus a number of roundings in the result's dtype.

    An lse has two, one of the largest score and one of the sum with its logarithm; of one query the reference may by
    luck lose next to nothing. ``summed``: the largest sum of absolute products behind a score, of which a partial sum
    is rounded too, however small the score is in the end.
    """
    seen = truth.isfinite()
    assert torch.equal(ours.isfinite(), seen), what
    if bool(seen.any()):
        truth = truth[seen]
        error = (ours[seen].double() - truth).abs().max()
        lost = (reference[seen].double() - truth).abs().max()
        budget = 2 * lost + (roundings * truth.abs().max() + summed) * torch.finfo(ours.dtype).eps / 2
        assert error <= budget, f"{what}: {error:.3g} > {budget:.3g} (the reference loses {lost:.3g})"


@dataclasses.dataclass
class Call:
    """One attention call: a store with ``length`` tokens in it and queries for the last of them."""

    program: Program
    length: int
    queries: int
    batch: int = 2
    groups: int = 2

    def __post_init__(self) -> None:
        p = self.program
        capacity = (self.length // p.form.group + 2) * p.form.group
        self.state = poisoned(p.form, self.batch, self.groups, capacity, (p.key_size, p.value_size), p.dtype)
        self.key = fresh(self.batch, self.groups, self.length, p.key_size, p.dtype)
        self.value = fresh(self.batch, self.groups, self.length, p.value_size, p.dtype)
        STORE(*self.state, torch.tensor(0), self.key, self.value, p.form.name)
        self.query = fresh(self.batch, self.groups * p.ratio, self.queries, p.key_size, p.dtype)
        self.mask = None
        if p.predicate.key_mask:
            # Left padding in the first entry, a hole in the last; beyond the length the mask says True on purpose.
            self.mask = torch.ones(self.batch, capacity, dtype=torch.bool)
            self.mask[0, : self.length // 3] = False
            self.mask[-1, self.length // 2 : self.length // 2 + 2] = False

    def attend(self) -> tuple[Tensor, Tensor]:
        p = self.program
        window = -1 if p.predicate.window is None else p.predicate.window
        return ATTEND(  # type: ignore[no-any-return]
            self.query,
            *self.state,
            torch.tensor(self.length),
            self.mask,
            p.form.name,
            self.scale,
            p.predicate.causal,
            window,
        )

    @property
    def scale(self) -> float:
        return float(self.program.key_size**-0.5)

    def check(self) -> None:
        p = self.program
        out, lse = self.attend()
        with ops.reference_only():
            reference, reference_lse = self.attend()
        truth = exact(self.query, self.state, self.length, self.mask, p.form, self.scale, p.predicate)
        what = f"{p.name}, {self.queries} queries on {self.length} keys"
        assert_within_budget(out, reference, truth[0], what)
        query = self.query.float().abs().unflatten(1, (self.groups, -1))
        summed = float((query @ self.key.float().abs().unsqueeze(2).mT).max()) * self.scale
        assert_within_budget(lse, reference_lse, truth[1], f"lse of {what}", roundings=2, summed=summed)
        assert not out[truth[1].isinf()].any(), what


def queries_for(program: Program, length: int) -> list[int]:
    """One row and the most rows that fit the phase, for each length."""
    most = DECODE_ROWS // program.ratio
    counts = (1, most) if program.phase == "decode" else (most + 1, min(length, 70))
    return sorted({n for n in counts if Program.phase_for(n, program.ratio) == program.phase and n <= length})


def check_attend(
    program: Program, lengths: Iterable[int] = LENGTHS, call: Callable[[Program, int, int], Call] = Call
) -> None:
    """One row and the most rows that fit the phase, at each length: the kernel, the reference body and fp64."""
    for length in lengths:
        for queries in queries_for(program, length):
            call(program, length, queries).check()


def check_store_and_load(program: Program, table: Callable[[int, int], Tensor] | None = None) -> None:
    """Bit for bit: whole, in pieces, and one by one; and read back. ``table`` makes angles for capacity and length."""
    form, sizes, dtype = program.form, (program.key_size, program.value_size), program.dtype
    length = 2 * form.slots + 37
    capacity = (length // form.group + 1) * form.group
    angles = {} if table is None else {"table": table(capacity, length)}
    key, value = (fresh(2, 2, length, size, dtype) for size in sizes)
    expected = poisoned(form, 2, 2, capacity, sizes, dtype)
    with ops.reference_only():
        STORE(*expected, torch.tensor(0), key, value, form.name, **angles)
    for pieces in ([length], [1, 63, length - 64], [form.group] * (length // form.group), [1] * length):
        state = poisoned(form, 2, 2, capacity, sizes, dtype)
        done = 0
        for n in [*pieces, length - sum(pieces)]:
            new = key[:, :, done : done + n], value[:, :, done : done + n]
            STORE(*state, torch.tensor(done), *new, form.name, **angles)
            done += n
        assert_same(state, expected)
    for n in (0, 1, form.residual, form.slots, length):
        if form.packed(n) == form.packed(length) or form.dense:  # earlier groups are gone from the ring
            with ops.reference_only():
                theirs = LOAD(*expected, torch.tensor(n), form.name, **angles)
            for ours, wanted in zip(LOAD(*expected, torch.tensor(n), form.name, **angles), theirs, strict=True):
                assert torch.equal(bits(ours), bits(wanted))


def check_other_instructions(programs: list[Program], width: int) -> None:
    """The parts are written for any vector width: AVX2, and at::vec without intrinsics in place of other CPUs."""
    from torch._inductor import config

    if width == 256 and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("this CPU has no AVX2")
    with config.patch({"cpp.simdlen": width}):
        cpp.prebuild(p for program in programs for p in (program, store_of(program)))
        for program in programs:
            check_attend(program, (65, 500))
            check_store_and_load(program)
