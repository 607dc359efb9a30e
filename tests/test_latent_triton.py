"""Triton kernels for keys as latents: in the interpreter against the reference bodies, and compiled ahead of time.

As in ``test_triton_kernels.py`` the interpreter needs a child process, which the first test starts.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from interpreter import INTERPRETED, interpreted
from pairs import pairwise
from stores import dequantised
from test_latent_kernels import angles
from test_rope_kernels import turned
from test_triton_aot import SHARED, check
from test_triton_kernels import assert_same, attend, empty, largest_score, name_of, tokens
from torch import Tensor

from effcompile import lowering as all_lowerings
from effcompile.kernels import attention, latent, ops
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import Predicate, Program, ScoreParts, StoreProgram
from effcompile.lowering import triton as lowering
from effcompile.lowering.triton_aot import compile_ahead, resources
from effcompile.lowering.triton_build import build
from effcompile.lowering.triton_latent import factor_dtype

Case = dict[str, Any]


def case(form: KVForm, **more: Any) -> Case:
    """A case of attention; ``rotary`` channels are turned, all by default, if the form says that any are."""
    given: Case = {"sizes": (64, 64), "dtype": torch.bfloat16, "queries": 1, "length": 300, "ratio": 3, "batch": 2}
    given |= {"normed": False, "masked": False, "window": None, "rotary": None}
    return {"form": form} | given | more


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CASES = [
    case(KVForm(16, 16, latent=128, rope="pre"), dtype=F32, masked=True, length=200),
    case(KVForm(8, 4, 32, 0, latent=192, rope="pre"), masked=True, batch=1),
    case(KVForm(4, 4, 32, 32, latent=96, rope="pre"), dtype=F16, normed=True, queries=3, length=200),
    case(KVForm(16, 4, 16, 0, latent=48, rope="pre_adjacent"), normed=True, sizes=(96, 80), length=65),
    case(KVForm(4, 16, 16, 16, latent=16, rope="pre"), dtype=F32, sizes=(80, 96), rotary=24, ratio=1, length=63),
    case(KVForm(8, 8, 16, 0, "token", latent=112), masked=True, window=40, sizes=(72, 64), length=150),
    case(KVForm(3, 4, 32, 0, latent=176, rope="pre_adjacent"), dtype=F16, rotary=16, length=70),
    case(KVForm("fp8", 8, 32, 0, latent=80, rope="pre"), sizes=(32, 32), window=50, length=100),
    case(KVForm(8, 4, latent=128, rope="pre"), batch=1, length=1),
]
OTHERS = [
    case(KVForm(4, 3, 32, 0, "token", latent=96, rope="pre"), dtype=F16, sizes=(128, 64), rotary=64, queries=2),
    case(KVForm(2, "fp8", 16, 0, "token", latent=64, rope="pre"), normed=True, length=70),
    case(KVForm("fp8", 16, 16, 0, "token", latent=64, rope="pre"), dtype=F16, sizes=(32, 32), length=70),
    case(KVForm(4, 4, 32, 32, latent=192, rope="pre"), dtype=F32, normed=True, queries=5, ratio=3, masked=True),
]
MORE = OTHERS + [
    made
    for made in pairwise(
        form=[
            KVForm(bits, values, group, residual, axis, latent=rank, rope=rope)
            for bits, values, group, residual, axis, rank, rope in (
                (16, 16, 32, 128, "channel", 16, "pre"),
                (16, 3, 32, 0, "channel", 144, "pre_adjacent"),
                (8, 4, 16, 16, "channel", 192, "pre"),
                (8, 2, 32, 32, "token", 160, "pre"),
                (4, 8, 64, 64, "channel", 64, "pre_adjacent"),
                (4, 16, 16, 0, "token", 80, "pre"),
                (3, 4, 32, 0, "token", 96, "pre"),
                (2, 4, 32, 32, "channel", 272, "pre"),
            )
        ],
        sizes=[(64, 64), (80, 128), (128, 96), (256, 64)],
        dtype=[F32, BF16, F16],
        queries=[1, 2, 5],
        length=[5, 63, 65, 300],
        ratio=[1, 3],
        batch=[1, 2],
        normed=[False, True],
        masked=[False, True],
        window=[None, 40],
        rotary=[None, 32],
    )
    if made["form"].value_bits == 16 or made["sizes"][1] % made["form"].group == 0
]

test_in_the_interpreter, test_more_in_the_interpreter = interpreted(__file__)


@pytest.fixture(autouse=True)
def few_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few splits, not a power of two, over the small capacities of these tests."""
    monkeypatch.setattr(lowering, "splits_for", lambda heads, capacity, _: max(1, min(3, capacity // 128)))


class Made:
    """A store of latents for a case, what makes keys of them, and a query."""

    def __init__(self, given: Case) -> None:
        self.form, sizes, self.dtype = given["form"], given["sizes"], given["dtype"]
        batch, self.length, groups = given["batch"], given["length"], 2
        capacity, rank = (self.length // self.form.group + 4) * self.form.group, self.form.latent
        self.state = empty(self.form, batch, groups, capacity, sizes, self.dtype)
        # Singular values fall, and so do the channels of latents.
        self.latents = tokens(batch, self.length, 1, rank, self.dtype, 0) * torch.linspace(1, 0.1, rank).to(self.dtype)
        self.values = tokens(batch, self.length, groups, sizes[1], self.dtype, 1)
        with ops.reference_only():
            torch.ops.effcompile.kv_store(*self.state, torch.tensor(0), self.latents, self.values, self.form.name)
        random = torch.Generator().manual_seed(4)
        whole, self.normed = groups * sizes[0], given["normed"]
        wide = torch.randn(max(whole, rank), max(whole, rank), generator=random, dtype=torch.float64)
        norm = torch.rand(sizes[0], generator=random) + 0.5 if self.normed else None
        basis = torch.linalg.qr(wide)[0][:whole, :rank]
        self.up = latent.operand(basis, groups, 2 * torch.randn(whole, generator=random), norm)
        self.more: dict[str, Any] = {"up": self.up} | ({"eps": 1e-5} if self.normed else {})
        if self.form.pre:
            self.more["table"] = angles(batch, capacity, given["rotary"] or sizes[0], self.length)
        self.query = tokens(batch, given["queries"], groups * given["ratio"], sizes[0], self.dtype, 2)
        self.mask = None
        if given["masked"]:
            self.mask = torch.rand(batch, capacity, generator=torch.Generator().manual_seed(3)) > 0.3
            self.mask[0, : self.length // 3] = False
        self.predicate = Predicate(True, given["window"], self.mask is not None)
        self.scale = sizes[0] ** -0.5 / 6

    @property
    def args(self) -> tuple[Any, ...]:
        """The positional arguments of ``attend``."""
        window = -1 if self.predicate.window is None else self.predicate.window
        return (
            self.query, *self.state, torch.tensor(self.length), self.mask, self.form.name, self.scale, True, window,
        )  # fmt: skip

    def dense(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Keys and values in fp64, rebuilt head by head of latents and a factor in ``dtype``."""
        keys, values = ops.split_state(tuple(self.state))
        held = dequantised(keys, self.length, self.form.buffered, "key")[:, 0].to(dtype).double()
        rank, made, up = self.form.latent, [], self.up.double()
        for g in range(2):
            key = held @ up[g, :, :rank].to(dtype).double().T + up[g, :, rank]
            if self.normed:
                key = key / (key.square().mean(-1, keepdim=True) + 1e-5).sqrt() * up[g, :, rank + 1]
            made.append(key)
        key = torch.stack(made, 1)
        if self.form.pre:
            key = turned(key, self.more["table"], self.form.rope)
        return key, dequantised(values, self.length, self.form, "value")


class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("given", MORE, ids=name_of)
    def test_more_within_twice_the_loss_of_the_dtype(self, given: Case) -> None:
        self.test_within_twice_the_loss_of_the_dtype(given)

    @pytest.mark.parametrize("given", CASES, ids=name_of)
    def test_within_twice_the_loss_of_the_dtype(self, given: Case) -> None:
        """The budget of ``test_triton_kernels``, against keys that are rebuilt in fp64.

        What is lost in a dtype is what attention in it loses of keys that were rebuilt of rounded operands, or in fp32,
        where each of ``r`` partial sums is rounded, what the reference body loses.
        """
        made = Made(given)
        dtype = made.dtype
        out, lse = lowering.attend(*made.args, **made.more)
        k, v = made.dense()
        keep = attention.allowed(made.predicate, given["queries"], made.length, made.mask, k.device)
        best, best_lse = attend(made.query.double(), k, v, keep, made.scale, torch.float64)
        # What is in the ring meets a factor in the model's dtype, and what was packed maybe one in fp16.
        stored, newest = (made.dense(of)[0] for of in (factor_dtype(made.form, dtype), dtype))
        packed = made.form.packed(made.length)
        coarse = torch.cat([stored[:, :, :packed], newest[:, :, packed:]], 2)
        lows = [attend(made.query, coarse, v, keep, made.scale, dtype)]
        with ops.reference_only():
            lows.append(torch.ops.effcompile.attend(*made.args, **made.more))
        blind = best_lse.isinf()
        assert torch.equal(lse.isinf(), blind)
        assert out[blind].eq(0).all()
        rounding = torch.finfo(dtype).eps * best.abs().max()
        shifting = 3 * 2.0**-24 * largest_score(made.query, k, made.scale)
        lost = max(float((low.double() - best).abs().max()) for low, _ in lows)
        error = float((out.double() - best).abs().max())
        print(name_of(given), error, 2 * lost, float(rounding))
        assert error <= 2 * lost + rounding + shifting * v.abs().max()
        # The lse is fp32, whatever the dtype: what summing D products in fp32 may lose is added.
        summing = given["sizes"][0] * 2.0**-23 * made.scale * float(made.query.double().abs().max() * k.abs().max())
        lost, error = (
            max(float((x - best_lse).masked_fill(blind, 0).abs().max()) for x in found)
            for found in ([low for _, low in lows], [lse])
        )
        assert error <= 2 * lost + summing + 1e-6

    def test_all_parts_of_a_score(self) -> None:
        made = Made(case(KVForm(8, 4, 32, 32, latent=128, rope="pre"), dtype=F32, masked=True, ratio=2))
        parts = {"softcap": 0.7, "bias": torch.randn(1, 4, 1, 512), "sinks": torch.randn(4)}
        found = lowering.attend(*made.args, **made.more, **parts)
        with ops.reference_only():
            wanted = torch.ops.effcompile.attend(*made.args, **made.more, **parts)
        for x, y in zip(found, wanted):
            torch.testing.assert_close(x, y, rtol=0, atol=2e-5)

    def test_empty_store(self) -> None:
        made = Made(case(KVForm(4, 4, latent=64, rope="pre")))
        query, *state = made.args[:7]
        out, lse = lowering.attend(query, *state, torch.tensor(0), *made.args[8:], **made.more)
        assert out.eq(0).all()
        assert torch.equal(lse, torch.full_like(lse, float("-inf")))

    @pytest.mark.parametrize(
        ("form", "dtype"),
        [
            (KVForm(16, 16, 16, latent=48), BF16),
            (KVForm(4, 8, 16, 16, latent=272), BF16),
            pytest.param(KVForm(8, 4, 32, 32, latent=128), F16, marks=pytest.mark.exhaustive),
            pytest.param(KVForm(3, 4, 32, 0, "token", latent=96), F32, marks=pytest.mark.exhaustive),
            pytest.param(KVForm("fp8", 2, 16, 16, latent=112), F32, marks=pytest.mark.exhaustive),
        ],
        ids=lambda x: getattr(x, "name", str(x)),
    )
    def test_store_bit_for_bit(self, form: KVForm, dtype: torch.dtype) -> None:
        """One head of latents beside two of values, whole, in pieces and one by one."""
        key, value = tokens(2, 90, 1, form.latent, dtype, 0), tokens(2, 90, 2, 64, dtype, 1)
        expected = empty(form, 2, 2, 96, (64, 64), dtype)
        with ops.reference_only():
            torch.ops.effcompile.kv_store(*expected, torch.tensor(0), key, value, form.name)
        for cuts in ([0, 90], [0, 63, 64, 65, 90]):
            state = empty(form, 2, 2, 96, (64, 64), dtype)
            for start, stop in itertools.pairwise(cuts):
                new = key[:, :, start:stop], value[:, :, start:stop]
                lowering.kv_store(*state, torch.tensor(start), *new, form.name)
            assert_same(state, expected)


ANY = Predicate()


def name_of_program(value: Any) -> str:
    return getattr(value, "name", str(value))


def program(form: KVForm, size: int = 128, rotary: int = 128, **more: Any) -> Program:
    """Decoding at the heads of Llama 3 8B, in bf16."""
    dtype, ratio = more.pop("dtype", BF16), more.pop("ratio", 4)
    return Program("decode", form, more.pop("rule", ANY), dtype, ratio, size, size, rotary=rotary, **more)


def pre(*bits: Any, rank: int, **more: Any) -> KVForm:
    return KVForm(*bits, latent=rank, rope=more.pop("rope", "pre"), **more)


BUDGET = [(program(pre(8, 4, rank=512)), "sm_90")]
MORE_BUDGET = [
    (program(form, **more), chip)
    for chip in ("sm_80", "sm_90", "sm_100", "gfx942")
    for form, more in (
        (pre(4, 4, rank=128), {}),
        (pre(16, 16, rank=256), {}),
        (pre(8, 8, rank=192), {"size": 64, "rotary": 64, "ratio": 3, "normed": True}),
    )
]
MORE_BUDGET += [
    (program(pre(4, 4, rank=512, rope="pre_adjacent"), rotary=64, rule=Predicate(key_mask=True)), "sm_90"),
    (program(pre(4, 4, rank=1024), rule=Predicate(window=4096), score=ScoreParts(True, True, True)), "sm_90"),
    (program(pre(8, 4, rank=128), dtype=F32), "sm_90"),
    (program(pre(8, 4, rank=128), size=256, rotary=256), "sm_90"),
    (program(pre(3, 3, rank=256, group=64), dtype=F16), "sm_90"),
    (program(pre(8, 8, rank=256, key_axis="token"), normed=True), "sm_90"),
    (program(pre("fp8", "fp8", rank=256)), "sm_90"),
]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize(("built", "chip"), BUDGET, ids=name_of_program)
def test_within_the_budget_of_a_chip(built: Program, chip: str) -> None:
    check(built, chip)


@pytest.mark.exhaustive
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize(("built", "chip"), MORE_BUDGET, ids=name_of_program)
def test_more_within_the_budget_of_a_chip(built: Program, chip: str) -> None:
    check(built, chip)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize(
    ("form", "chip"),
    [
        (KVForm(8, 4, latent=512), "sm_90"),
        pytest.param(KVForm(4, 4, latent=1024), "sm_80", marks=pytest.mark.exhaustive),
        pytest.param(KVForm(4, 4, latent=512), "gfx942", marks=pytest.mark.exhaustive),
        pytest.param(KVForm(16, 16, latent=1024), "sm_90", marks=pytest.mark.exhaustive),
    ],
    ids=name_of_program,
)
def test_store_compiles(form: KVForm, chip: str) -> None:
    made = StoreProgram(form, BF16, form.latent, 128)
    built = build(made, chip)
    constants = {"QUANTIZE": not form.dense, "APPEND": True}
    used = resources(compile_ahead(built, made, chip, constants, warps=lowering.store_warps(form.latent)))
    print(made.name, chip, used)
    assert used["spilled"] <= 16
    assert used["shared"] <= SHARED[chip]


def test_declined_with_a_reason() -> None:
    def why(made: Program) -> str:
        return str(all_lowerings.refusal(made, "cuda"))

    form = pre(8, 4, rank=128)
    assert why(program(form)) == why(program(pre(16, 16, rank=1024))) == "None"
    assert why(dataclasses.replace(program(form), phase="prefill")) == latent.FOR_DECODING
    assert why(dataclasses.replace(program(form), blocks=True)) == latent.FOR_DECODING
    assert "1040 latents (up to 1024 are offered)" in why(program(pre(8, 4, rank=1040)))
    assert "key heads of 320 channels" in why(dataclasses.replace(program(form), key_size=320))
    assert "groups of 48" in why(program(pre(8, 16, rank=96, group=48, residual=48)))
    assert "48 channels in 3 bits per token" in why(program(pre(3, 4, rank=48, group=16, key_axis="token")))


def test_operands_that_do_not_fit() -> None:
    made = Made(case(KVForm(8, 4, 32, 0, latent=32, rope="pre"), length=5))

    def why(*args: Any, **more: Any) -> str:
        with pytest.raises(ops.KernelUnavailable) as error:
            lowering.attend(*(args or made.args), **(made.more | more))
        return str(error.value)

    assert "an up-projection of 0 latents for the form k8l32" in why(up=None)
    assert "an up-projection of 30 latents for the form" in why(up=made.up[..., 2:])
    assert "an up-projection of (1, 64, 34)" in why(up=made.up[:1])
    assert "in torch.float64" in why(up=made.up.double())
    assert "needs a table" in why(table=None)
    assert "torch.float16, and not a contiguous one of (2, 8, 2, 32, 16) in torch.float32" in why(
        table=made.more["table"].half()
    )
    many = torch.cat([made.query] * 40, 2)
    assert why(many, *made.args[1:]) == latent.FOR_DECODING
