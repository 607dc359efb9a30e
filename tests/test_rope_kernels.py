"""Kernels for keys before RoPE: C++ and Triton against the reference body, and that against fp64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cpp_calls import (
    Call,
    assert_within_budget,
    check_attend,
    check_store_and_load,
    dequantised,
    exact,
    poisoned,
)
from pairs import pairwise
from torch import Tensor

from effcompile.kernels import ops, rope
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import DTYPES, Predicate, Program, StoreProgram

STORE, LOAD, ATTEND = (getattr(torch.ops.effcompile, name).default for name in ("kv_store", "kv_load", "attend"))


pytestmark = pytest.mark.usefixtures("no_fallback", "build_ahead")


def table_of(batch: int, capacity: int, rotary: int, tokens: int, scale: float = 1.0) -> Tensor:
    """Angles of a real RoPE for the first ``tokens`` tokens, NaN behind; each row begins at another position."""
    table = torch.full(rope.table_shape(batch, capacity, rotary), float("nan"), dtype=torch.float16)
    frequency = 10000.0 ** -(torch.arange(0, rotary, 2) / rotary)
    angle = (torch.arange(tokens)[None] - 5 * torch.arange(batch)[:, None])[..., None] * frequency
    torch.ops.effcompile.rope_store(table, torch.tensor(0), scale * angle.cos(), scale * angle.sin())
    return table


def turned(key: Tensor, table: Tensor, kind: str) -> Tensor:
    """``key`` ``[B, G, S, D]`` fp64 rotated token by token and pair by pair, in complex numbers."""
    out, half = key.clone(), table.shape[3]
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    if kind == "pre":
        first, second = slice(0, half), slice(half, 2 * half)
    for t in range(key.shape[2]):
        cos, sin = table[:, t // 16, :, :, t % 16].double().unbind(1)
        z = torch.complex(key[:, :, t, first], key[:, :, t, second]) * torch.complex(cos, sin)[:, None]
        out[:, :, t, first], out[:, :, t, second] = z.real, z.imag
    return out


@dataclasses.dataclass
class PreCall(Call):
    """A call on a store of keys before RoPE."""

    factor: float = 1.0

    def __post_init__(self) -> None:
        p = self.program
        capacity = (self.length // p.form.group + 2) * p.form.group
        self.table = table_of(self.batch, capacity, p.rotary, self.length, self.factor)
        before, self.program = p, dataclasses.replace(p, form=dataclasses.replace(p.form, rope="post"))
        super().__post_init__()
        self.program = before
        self.state = poisoned(p.form, self.batch, self.groups, capacity, (p.key_size, p.value_size), p.dtype)
        self.store()

    def store(self) -> None:
        STORE(*self.state, torch.tensor(0), self.key, self.value, self.program.form.name, table=self.table)

    def attend(self) -> tuple[Tensor, Tensor]:
        p = self.program
        window = -1 if p.predicate.window is None else p.predicate.window
        return ATTEND(  # type: ignore[no-any-return]
            self.query, *self.state, torch.tensor(self.length), self.mask, p.form.name, self.scale,
            p.predicate.causal, window, table=self.table,
        )  # fmt: skip

    def dense(self) -> list[Tensor | None]:
        """The store in fp64: its keys rotated, its values, as a store of 16 bits."""
        p = self.program
        keys, values = ops.split_state(tuple(self.state))
        key, stop = dequantised(keys, self.length, p.form, "key"), p.form.packed(self.length)
        key[:, :, :stop] = turned(key[:, :, :stop], self.table, p.form.rope)
        return [key, None, None, dequantised(values, self.length, p.form, "value"), None, None]

    def check(self, roundings: int = 1) -> None:
        p = self.program
        out, lse = self.attend()
        with ops.reference_only():
            reference, reference_lse = self.attend()
        plain = KVForm(16, 16)
        truth = exact(self.query, self.dense(), self.length, self.mask, plain, self.scale, p.predicate)
        what = f"{p.name}, {self.queries} queries on {self.length} keys"
        assert_within_budget(out, reference, truth[0], what, roundings)
        assert_within_budget(lse, reference_lse, truth[1], f"lse of {what}", roundings=2)


def program(kind: str, rotary: int, bits_: tuple[int, int], phase: Any = "decode", **other: Any) -> Program:
    sizes = other.pop("sizes", (64, 64, 32))
    form = KVForm(*bits_, sizes[2], other.pop("residual", 0) * sizes[2], rope=kind)
    predicate = other.pop("predicate", Predicate())
    return Program(
        phase, form, predicate, other.pop("dtype", torch.float32), other.pop("ratio", 3), *sizes[:2], rotary=rotary
    )


PADDED = Predicate(key_mask=True)
PROGRAMS = [
    program("pre", 64, (2, 2)),
    program("pre", 64, (4, 4), "prefill", residual=2),
    program("pre", 16, (3, 16), dtype=torch.bfloat16, predicate=PADDED),
    program("pre", 24, (8, 4), sizes=(80, 96, 16), ratio=1, dtype=torch.float16),
    program("pre", 10, (2, 8), "prefill", sizes=(72, 80, 16), ratio=8, predicate=Predicate(window=40)),
    program("pre_adjacent", 64, (4, 2)),
    program("pre_adjacent", 128, (2, 4), "prefill", sizes=(128, 128, 64), dtype=torch.bfloat16, residual=1),
    program("pre_adjacent", 32, (3, 3), ratio=8, predicate=Predicate(window=40, key_mask=True)),
    program("pre_adjacent", 32, (8, 8), "prefill", residual=1, predicate=PADDED),
]


def store_program(p: Program) -> StoreProgram:
    return StoreProgram(p.form, p.dtype, p.key_size, p.value_size, p.rotary)


@pytest.mark.parametrize(
    "built", [*PROGRAMS[1:], pytest.param(PROGRAMS[0], marks=pytest.mark.slow)], ids=lambda p: p.name
)
def test_attend(built: Program) -> None:
    check_attend(built, call=PreCall)


def test_attend_with_a_scale_in_the_angles() -> None:
    """YaRN multiplies cos and sin by a number."""
    PreCall(PROGRAMS[0], 500, 1, factor=1.3).check()


@pytest.mark.parametrize("built", PROGRAMS, ids=lambda p: p.name)
def test_store_and_load(built: Program) -> None:
    check_store_and_load(built, lambda capacity, length: table_of(2, capacity, built.rotary, length, 1.1))


MIXES = pairwise(
    turn=[("pre", 64), ("pre", 16), ("pre_adjacent", 64), ("pre_adjacent", 32)], bits=[(8, 4), (4, 4), (3, 4), (2, 4)],
    dtype=list(DTYPES), phase=["decode", "prefill"],
)  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize("mix", MIXES, ids=lambda m: "-".join(map(str, m.values())))
def test_attend_mixes(mix: dict[str, Any]) -> None:
    check_attend(program(*mix["turn"], mix["bits"], mix["phase"], dtype=mix["dtype"]), call=PreCall)
