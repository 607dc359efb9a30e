"""The C++ kernels for latents: against the reference body, and that against fp64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cpp_calls import Call, assert_same, assert_within_budget, check_attend, exact, fresh, poisoned
from pairs import pairwise
from stores import dequantised
from test_rope_kernels import turned
from torch import Tensor

from effcompile.kernels import latent, ops, rope
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import DTYPES, Predicate, Program
from effcompile.lowering import cpp
from effcompile.passes.compress_kv import stores

STORE, LOAD, ATTEND = (getattr(torch.ops.effcompile, name).default for name in ("kv_store", "kv_load", "attend"))

pytestmark = pytest.mark.usefixtures("no_fallback")


def angles(batch: int, capacity: int, rotary: int, tokens: int) -> Tensor:
    """fp32, NaN behind the tokens; each row begins at another position."""
    table = torch.full(rope.table_shape(batch, capacity, rotary), float("nan"))
    frequency = 10000.0 ** -(torch.arange(0, rotary, 2) / rotary)
    angle = (torch.arange(tokens)[None] - 5 * torch.arange(batch)[:, None])[..., None] * frequency
    torch.ops.effcompile.rope_store(table, torch.tensor(0), angle.cos(), angle.sin())
    return table


@dataclasses.dataclass
class LatentCall(Call):
    """A call on a store of latents."""

    def __post_init__(self) -> None:
        p = self.program
        rank, capacity = p.form.latent, (self.length // p.form.group + 2) * p.form.group
        before, plain = p, dataclasses.replace(p.form.buffered, key_bits=16)
        self.program = dataclasses.replace(p, form=plain, rotary=0, normed=False)
        super().__post_init__()  # the query, the values and the mask
        self.program = before
        self.state = poisoned(p.form, self.batch, self.groups, capacity, (p.key_size, p.value_size), p.dtype)
        # Singular values fall, and so do the channels of latents.
        self.latents = fresh(self.batch, 1, self.length, rank, p.dtype) * torch.linspace(2, 0.1, rank, dtype=p.dtype)
        STORE(*self.state, torch.tensor(0), self.latents, self.value, p.form.name)
        basis = torch.randn(self.groups * p.key_size, rank, dtype=torch.float64) / rank**0.5
        norm = torch.rand(p.key_size) + 0.5 if p.normed else None
        bias = torch.randn(self.groups * p.key_size)
        self.up = latent.operand(basis, self.groups, bias, norm)
        self.more: dict[str, Any] = {"up": self.up} | ({"eps": 1e-5} if p.normed else {})
        if p.rotary:
            self.more["table"] = angles(self.batch, capacity, p.rotary, self.length)

    def attend(self) -> tuple[Tensor, Tensor]:
        p = self.program
        window = -1 if p.predicate.window is None else p.predicate.window
        return ATTEND(  # type: ignore[no-any-return]
            self.query, *self.state, torch.tensor(self.length), self.mask, p.form.name, self.scale,
            p.predicate.causal, window, **self.more,
        )  # fmt: skip

    def dense(self) -> list[Tensor | None]:
        """Keys and values in fp64, rebuilt head by head."""
        p = self.program
        keys, values = ops.split_state(tuple(self.state))
        held, up = dequantised(keys, self.length, p.form.buffered, "key")[:, 0], self.up.double()
        rank, made = p.form.latent, []
        for g in range(self.groups):
            key = held @ up[g, :, :rank].T + up[g, :, rank]
            if p.normed:
                key = key / (key.square().mean(-1, keepdim=True) + 1e-5).sqrt() * up[g, :, rank + 1]
            made.append(key)
        key = torch.stack(made, 1)
        if p.rotary:
            key = turned(key, self.more["table"], p.form.rope)
        return [key, None, None, dequantised(values, self.length, p.form, "value"), None, None]

    def check(self) -> None:
        p = self.program
        out, lse = self.attend()
        with ops.reference_only():
            reference, reference_lse = self.attend()
        dense = self.dense()
        truth = exact(self.query, dense, self.length, self.mask, KVForm(16, 16), self.scale, p.predicate)
        what = f"{p.name}, {self.queries} queries on {self.length} keys"
        assert dense[0] is not None
        # A key is a sum of r products before it meets the query, so its roundings are those of the largest partial sum.
        products = self.query.abs().double().unflatten(1, (self.groups, -1)) @ dense[0].abs().unsqueeze(2).mT
        summed = float(products.max()) * self.scale
        assert_within_budget(out, reference, truth[0], what)
        assert_within_budget(lse, reference_lse, truth[1], f"lse of {what}", roundings=2, summed=summed)


def program(rank: int, bits: tuple[Any, Any], rotary: int = 64, kind: str = "pre", **other: Any) -> Program:
    sizes = other.pop("sizes", (64, 64, 32))
    axis, residual = other.pop("axis", "channel"), other.pop("residual", 0) * sizes[2]
    form = KVForm(*bits, sizes[2], residual, axis, rope=kind if rotary else "post", latent=rank)
    dtype, ratio = other.pop("dtype", torch.float32), other.pop("ratio", 3)
    predicate = other.pop("predicate", Predicate())
    return Program("decode", form, predicate, dtype, ratio, *sizes[:2], rotary=rotary, **other)


PROGRAMS = [
    program(128, (16, 16)),
    program(128, (8, 4), residual=1),
    program(48, (4, 16), dtype=torch.bfloat16, predicate=Predicate(key_mask=True), normed=True),
    program(96, (3, 3), 16, "pre_adjacent", ratio=8, predicate=Predicate(window=40, key_mask=True)),
    program(16, ("fp8", 2), 24, sizes=(80, 96, 16), ratio=1, dtype=torch.float16, normed=True),
    program(64, (8, 8), 0, sizes=(72, 80, 16), axis="token", residual=2),
]


@pytest.fixture(scope="module", autouse=True)
def _ahead() -> None:
    cpp.prebuild(p for one in PROGRAMS[:3] for p in (one, stores(one.form, one)))


FAST_AND_SLOW = [*PROGRAMS[:3], *(pytest.param(p, marks=pytest.mark.slow) for p in PROGRAMS[3:])]


@pytest.mark.parametrize("built", FAST_AND_SLOW, ids=lambda p: p.name)
def test_attend(built: Program) -> None:
    check_attend(built, call=LatentCall)


@pytest.mark.parametrize("built", FAST_AND_SLOW, ids=lambda p: p.name)
def test_store(built: Program) -> None:
    """Bit for bit, whole and in pieces; keys have one head and values two."""
    form, length = built.form, 2 * built.form.slots + 37
    capacity = (length // form.group + 1) * form.group
    key, value = fresh(2, 1, length, form.latent, built.dtype), fresh(2, 2, length, built.value_size, built.dtype)
    sizes = built.key_size, built.value_size
    expected = poisoned(form, 2, 2, capacity, sizes, built.dtype)
    with ops.reference_only():
        STORE(*expected, torch.tensor(0), key, value, form.name)
    for pieces in ([length], [1, 63, length - 64], [1] * length):
        state, done = poisoned(form, 2, 2, capacity, sizes, built.dtype), 0
        for n in pieces:
            STORE(*state, torch.tensor(done), key[:, :, done : done + n], value[:, :, done : done + n], form.name)
            done += n
        assert_same(state, expected)


def test_attend_with_all_parts_of_a_score() -> None:
    call = LatentCall(dataclasses.replace(PROGRAMS[1], predicate=Predicate(key_mask=True)), 300, 2)
    call.more |= {"softcap": 5.0, "bias": torch.randn(1, 6, 2, 320), "sinks": torch.randn(6)}
    out, lse = call.attend()
    with ops.reference_only():
        reference, reference_lse = call.attend()
    torch.testing.assert_close(out, reference, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse, reference_lse, rtol=0, atol=1e-5)


def test_an_up_projection_that_does_not_belong_is_refused() -> None:
    call = LatentCall(PROGRAMS[1], 65, 1)
    call.more["up"] = torch.cat([call.up, call.up], 2)
    with pytest.raises(UserWarning, match="an up-projection of 258 latents for the form k8l128"):
        call.attend()
    del call.more["up"]
    with pytest.raises(UserWarning, match="an up-projection of 0 latents"):
        call.attend()


MIXES = pairwise(
    bits=[(16, 4), (8, 4), (4, 4), (3, 4), (2, 4)], turn=[(64, "pre"), (16, "pre"), (32, "pre_adjacent")],
    dtype=list(DTYPES),
)  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize("mix", MIXES, ids=lambda m: "-".join(map(str, m.values())))
def test_attend_mixes(mix: dict[str, Any]) -> None:
    check_attend(program(80, mix["bits"], *mix["turn"], dtype=mix["dtype"], residual=1), call=LatentCall)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("width", [256, 1], ids=["avx2", "no vectors"])
def test_other_instructions(width: int) -> None:
    """AVX2, and at::vec without intrinsics in place of other CPUs."""
    from torch._inductor import config

    if width == 256 and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("this CPU has no AVX2")
    with config.patch({"cpp.simdlen": width}):
        for built in PROGRAMS[:3]:
            check_attend(built, (65, 500), call=LatentCall)
