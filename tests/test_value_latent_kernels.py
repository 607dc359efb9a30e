"""Latents of values: the operators against fp64, and the C++ kernels against the reference body."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cpp_calls import Call, assert_same, assert_within_budget, check_attend, exact, fresh, poisoned
from stores import dequantised
from test_latent_kernels import angles
from test_rope_kernels import turned
from torch import Tensor

from effcompile.kernels import latent, ops
from effcompile.kernels.form import FormError, KVForm
from effcompile.kernels.program import Predicate, Program
from effcompile.lowering import cpp
from effcompile.passes.compress_kv import stores

STORE, LOAD, ATTEND = (getattr(torch.ops.effcompile, name).default for name in ("kv_store", "kv_load", "attend"))
EPS32 = torch.finfo(torch.float32).eps

pytestmark = pytest.mark.usefixtures("no_fallback")


@dataclasses.dataclass
class ValueCall(Call):
    """A call on a store with latents of values, and of keys if the form says so."""

    def __post_init__(self) -> None:
        p = self.program
        form, capacity = p.form, (self.length // p.form.group + 2) * p.form.group
        plain = dataclasses.replace(form.buffered, key_bits=16, value_bits=16, rope="post")
        self.program = dataclasses.replace(p, form=plain, rotary=0)
        super().__post_init__()  # the query, the keys and the mask
        self.program = p
        self.state = poisoned(form, self.batch, self.groups, capacity, (p.key_size, p.value_size), p.dtype)
        self.more: dict[str, Any] = {}
        if p.rotary:
            self.more["table"] = angles(self.batch, capacity, p.rotary, self.length)
            if not form.latent:
                self.more["table"] = self.more["table"].half()
        sides = [self.key, self.value]
        for n, (kind, heads) in enumerate((("key", p.key_size), ("value", p.value_size))):
            if rank := form.rank(kind):  # type: ignore[arg-type]
                # Singular values fall, and so do the channels of latents.
                fall = torch.linspace(2, 0.1, rank, dtype=p.dtype)
                sides[n] = fresh(self.batch, 1, self.length, rank, p.dtype) * fall
                basis = torch.randn(self.groups * heads, rank, dtype=torch.float64) / rank**0.5
                bias = torch.randn(self.groups * heads)
                if kind == "key":
                    self.more["up"] = latent.operand(basis, self.groups, bias)
                else:
                    self.basis, self.bias = basis, bias.double()
                    self.more["value_up"] = latent.value_operand(basis, self.groups, bias)
        table = {} if form.latent or not p.rotary else {"table": self.more["table"]}
        STORE(*self.state, torch.tensor(0), *sides, form.name, **table)

    def attend(self) -> tuple[Tensor, Tensor]:
        p = self.program
        window = -1 if p.predicate.window is None else p.predicate.window
        return ATTEND(  # type: ignore[no-any-return]
            self.query, *self.state, torch.tensor(self.length), self.mask, p.form.name, self.scale,
            p.predicate.causal, window, **self.more,
        )  # fmt: skip

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and latents of values in fp64, made head by head."""
        p = self.program
        keys, values = ops.split_state(tuple(self.state))
        held = dequantised(values, self.length, p.form.buffered, "value")[:, 0]
        by_head = zip(self.basis.float().double().chunk(self.groups), self.bias.chunk(self.groups))
        value = torch.stack([held @ u.T + b for u, b in by_head], 1)
        if not p.form.latent:
            key = dequantised(keys, self.length, p.form.buffered, "key")
            if p.rotary:  # the packed ones; a tail has its rotation
                packed = p.form.packed(self.length)
                key = torch.cat([turned(key, self.more["table"], p.form.rope)[:, :, :packed], key[:, :, packed:]], 2)
            return key, value, held
        up, rank = self.more["up"].double(), p.form.rank("key")
        low = dequantised(keys, self.length, p.form.buffered, "key")[:, 0]
        key = torch.stack([low @ up[g, :, :rank].T + up[g, :, rank] for g in range(self.groups)], 1)
        return (turned(key, self.more["table"], p.form.rope) if p.rotary else key), value, held

    def check(self) -> None:
        p = self.program
        out, lse = self.attend()
        with ops.reference_only():
            reference, reference_lse = self.attend()
        key, value, held = self.dense()
        state = [key, None, None, value, None, None]
        truth = exact(self.query, state, self.length, self.mask, KVForm(16, 16), self.scale, p.predicate)
        what = f"{p.name}, {self.queries} queries on {self.length} keys"
        # A value is a sum of r products, each rounded in fp32: the largest of the sums of their sizes counts.
        largest = float((held.abs().amax((0, 1)) @ self.basis.abs().T + self.bias.abs()).max())
        summed = largest * EPS32 / torch.finfo(p.dtype).eps
        assert_within_budget(out, reference, truth[0], what, summed=summed)
        products = self.query.abs().double().unflatten(1, (self.groups, -1)) @ key.abs().unsqueeze(2).mT
        score = float(products.max()) * self.scale
        assert_within_budget(lse, reference_lse, truth[1], f"lse of {what}", roundings=2, summed=score)


def program(ranks: tuple[int, int], bits: tuple[Any, Any], **other: Any) -> Program:
    sizes, residual = other.pop("sizes", (64, 64, 32)), other.pop("residual", 0)
    rotary = other.pop("rotary", 64 if ranks[0] else 0)
    rope = "pre" if rotary else "post"
    axes = other.pop("axes", ("channel", "token"))
    form = KVForm(*bits, sizes[2], residual * sizes[2], *axes, rope, *ranks)
    dtype, ratio = other.pop("dtype", torch.float32), other.pop("ratio", 3)
    return Program("decode", form, other.pop("predicate", Predicate()), dtype, ratio, *sizes[:2], rotary=rotary)


PROGRAMS = [
    program((64, 96), (8, 4), residual=1, predicate=Predicate(key_mask=True)),
    program((0, 48), (16, 16), dtype=torch.bfloat16, predicate=Predicate(window=40)),
    program((0, 320), (4, 8), rotary=64, residual=1),
    program((0, 96), (4, 3), dtype=torch.float16, ratio=8, sizes=(80, 96, 16)),
    program((96, 80), (2, "fp8"), sizes=(64, 72, 16), ratio=1, predicate=Predicate(window=70, key_mask=True)),
    program((0, 64), (8, 4), axes=("token", "channel"), ratio=2),
]
SLOW, RARE = pytest.mark.slow, pytest.mark.exhaustive
CHOSEN = [
    PROGRAMS[0],
    *(pytest.param(p, marks=SLOW) for p in PROGRAMS[1:3]),
    *(pytest.param(p, marks=RARE) for p in PROGRAMS[3:]),
]


@pytest.mark.parametrize("built", CHOSEN, ids=lambda p: p.name)
def test_attend(built: Program) -> None:
    check_attend(built, call=ValueCall)


@pytest.mark.parametrize("built", CHOSEN[:2], ids=lambda p: p.name)
def test_store(built: Program) -> None:
    """Bit for bit, whole and in pieces; each side has the heads that it has."""
    form, length = built.form, 2 * built.form.slots + 37
    capacity = (length // form.group + 1) * form.group
    heads = 1 if form.latent else 2
    key = fresh(2, heads, length, form.rank("key") or built.key_size, built.dtype)
    value = fresh(2, 1, length, form.rank("value"), built.dtype)
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


@pytest.mark.slow
def test_attend_with_sinks_and_the_other_parts() -> None:
    """A sink takes mass, so that the bias of values counts less: the sum of weights says how much."""
    call = ValueCall(dataclasses.replace(PROGRAMS[1], dtype=torch.float32), 300, 2)
    call.more |= {"softcap": 5.0, "bias": torch.randn(1, 6, 2, 320), "sinks": 3 + torch.randn(6)}
    out, lse = call.attend()
    with ops.reference_only():
        reference, reference_lse = call.attend()
    torch.testing.assert_close(out, reference, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse, reference_lse, rtol=0, atol=1e-5)
    call.more["sinks"] = torch.full((6,), 1e4)
    assert float(call.attend()[0].abs().max()) == 0


def test_the_reference_bodies_are_those_of_fp64() -> None:
    """All of them, with rows that see no key; loading gives what attention sums."""
    for built in PROGRAMS:
        with ops.reference_only():
            call = ValueCall(built, 77, 2)
        key, value, _ = call.dense()
        with ops.reference_only():
            out, _ = call.attend()
            loaded = LOAD(*call.state, torch.tensor(77), built.form.name, **call.more)
        state = [key, None, None, value, None, None]
        truth, _ = exact(call.query, state, 77, call.mask, KVForm(16, 16), call.scale, built.predicate)
        bound = (built.form.rank("value") + 80) * EPS32 + 2 * torch.finfo(built.dtype).eps
        assert float((out - truth).abs().max()) <= bound * float(value.abs().max())
        assert float((loaded[1][:, :, :77] - value).abs().max()) <= bound * float(value.abs().max())
        assert loaded[0].shape[:3] == loaded[1].shape[:3] == (2, 2, call.state[0].shape[2] * built.form.span("key"))
        assert not loaded[1][:, :, 77:].any()
        assert not loaded[0][:, :, 77:].any()


@pytest.mark.slow
def test_opcheck() -> None:
    call = ValueCall(PROGRAMS[0], 65, 2)
    name, length = call.program.form.name, torch.tensor(65)
    with torch.no_grad():
        torch.library.opcheck(LOAD, (*call.state, length, name), call.more)
        torch.library.opcheck(ATTEND, (call.query, *call.state, length, call.mask, name, 0.1, True, -1), call.more)


def test_up_projections_that_do_not_belong() -> None:
    call = ValueCall(PROGRAMS[0], 65, 2)
    name, length = call.program.form.name, torch.tensor(65)
    plain = dataclasses.replace(call.program.form, value_latent=0).name
    with ops.reference_only():
        with pytest.raises(ValueError, match="needs an up-projection of latents of values, not none"):
            LOAD(*call.state, length, name, **{k: v for k, v in call.more.items() if k != "value_up"})
        with pytest.raises(ValueError, match=r"latents of values, not one of \(2, 96, 64\)"):
            LOAD(*call.state, length, name, **call.more | {"value_up": call.more["value_up"][:, 1:]})
        with pytest.raises(ValueError, match="needs no up-projection of latents of values"):
            LOAD(*call.state, length, plain, **call.more)


def test_what_the_kernels_refuse() -> None:
    assert "multiplied out once" in str(cpp.refusal(dataclasses.replace(PROGRAMS[1], phase="prefill")))
    assert "multiplied out once" in str(cpp.refusal(dataclasses.replace(PROGRAMS[1], blocks=True)))
    call = ValueCall(PROGRAMS[0], 65, 1)
    call.more["value_up"] = torch.cat([call.more["value_up"], call.more["value_up"]], 1)
    with pytest.raises(UserWarning, match="an up-projection of 193 latents of values for the form"):
        call.attend()
    # A device whose kernels do not know of these never gets to see them.
    state = [None if x is None else x.to("meta") for x in call.state]
    fed = torch.zeros(2, 1, 3, 64, device="meta"), torch.zeros(2, 1, 3, 96, device="meta")
    with pytest.raises(UserWarning, match="no kernel for 'meta' reads or writes latents of values"):
        ops._kv_store(*state, torch.tensor(0), *fed, call.program.form.name)


def test_names_and_forms() -> None:
    for form in (KVForm(value_latent=32), KVForm("fp8", 2, 64, 64, "token", latent=128, value_latent=64)):
        assert KVForm.parse(form.name) == form
        assert KVForm.of_options(form.options) == form
    assert KVForm(4, 8, latent=64, value_latent=32, rope="pre").buffered == KVForm(4, 8)
    assert KVForm(4, 8, value_latent=32, rope="pre").buffered == KVForm(4, 8, rope="pre")
    for wrong in (8, 100, -16, True, 16.0, "16"):
        with pytest.raises(FormError, match=r"value_latent=.* for the values of all heads, a multiple of 16"):
            KVForm(value_latent=wrong)  # type: ignore[arg-type]
    with pytest.raises(FormError, match="value heads of 48 channels do not divide into groups of 32"):
        KVForm(4, 4, value_latent=48)
    assert stores(PROGRAMS[2].form, PROGRAMS[2], 64).value_size == 320
