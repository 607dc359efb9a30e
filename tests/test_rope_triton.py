"""Triton kernels for keys before RoPE: in the interpreter against the reference bodies, and compiled ahead of time.

As in ``test_triton_kernels.py`` the interpreter needs a child process, which the first test starts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreter import INTERPRETED, interpreted
from pairs import pairwise
from test_triton_aot import SHARED, check
from test_triton_kernels import assert_same, attend, divides, empty, largest_score, name_of, tokens

from effcompile import lowering as all_lowerings
from effcompile.kernels import attention, ops, quantize, rope
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import Predicate, Program, StoreProgram
from effcompile.lowering import triton as lowering
from effcompile.lowering.triton_aot import compile_ahead, resources
from effcompile.lowering.triton_build import build

HALVES = [
    KVForm(2, 2, rope="pre"),
    KVForm(4, 4, 32, 32, rope="pre"),
    KVForm(3, 16, 16, 0, rope="pre"),
    KVForm(8, 4, rope="pre"),
]
ADJACENT = [
    KVForm(2, 3, 32, 0, rope="pre_adjacent"),
    KVForm(4, 4, 16, 32, rope="pre_adjacent"),
    KVForm(3, 2, 32, 32, rope="pre_adjacent"),
    KVForm(8, 16, 32, 64, rope="pre_adjacent"),
]
CASES = [
    case
    for case in pairwise(
        form=HALVES + ADJACENT,
        sizes=[(64, 64), (80, 80), (128, 128), (64, 96)],
        dtype=[torch.float32, torch.bfloat16, torch.float16],
        queries=[1, 3, 40],
        length=[1, 65, 300],
        ratio=[1, 3],
        batch=[1, 2],
        part=[1, 2],
        masked=[False, True],
    )
    if case["queries"] <= case["length"] and divides(case["form"], case["sizes"])
]


PART_CASES = [
    {"form": form, "sizes": (size, 64), "dtype": dtype, "queries": queries, "length": length, "ratio": 3, "batch": 2,
     "rotary": rotary, "masked": masked}
    for form, size, rotary, dtype, queries, length, masked in (
        (KVForm(4, 4, rope="pre"), 64, 16, torch.float16, 1, 300, True),
        (KVForm(4, 4, 32, 32, rope="pre"), 80, 32, torch.bfloat16, 40, 100, False),
        (KVForm(8, 8, 16, 0, rope="pre"), 80, 32, torch.float32, 1, 65, False),
        (KVForm(2, 2, rope="pre"), 128, 64, torch.bfloat16, 1, 200, False),
        (KVForm(3, 3, 32, 0, rope="pre"), 64, 32, torch.float16, 40, 100, False),
    )
]  # fmt: skip
"""Heads of which the first channels only are rotated, by halves."""
CASES += PART_CASES


def rotary_of(case: dict[str, Any]) -> int:
    """The case's own number, or all channels; of the adjacent ones half, where the case says so."""
    return int(case.get("rotary") or case["sizes"][0] // (case["part"] if case["form"] in ADJACENT else 1))


def table_of(batch: int, capacity: int, rotary: int, length: int) -> torch.Tensor:
    table = torch.full(rope.table_shape(batch, capacity, rotary), float("nan"), dtype=torch.float16)
    angle = 40 * torch.rand(batch, length, rotary // 2, generator=torch.Generator().manual_seed(7))
    torch.ops.effcompile.rope_store(table, torch.tensor(0), 1.1 * angle.cos(), 1.1 * angle.sin())
    return table


test_in_the_interpreter, test_more_in_the_interpreter = interpreted(__file__)


@pytest.fixture(autouse=True)
def few_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few splits, not a power of two, over the small capacities of these tests."""
    monkeypatch.setattr(lowering, "splits_for", lambda heads, capacity, _: max(1, min(3, capacity // 128)))


class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.mark.one_in(3, rest="exhaustive")
    @pytest.mark.parametrize("case", CASES, ids=name_of)
    def test_attend_within_twice_the_loss_of_the_dtype(self, case: dict[str, Any]) -> None:
        """The budget of ``test_triton_kernels``, and one more rounding of packed keys: before and after they turn."""
        form, sizes, dtype = case["form"], case["sizes"], case["dtype"]
        batch, ratio, queries, length = case["batch"], case["ratio"], case["queries"], case["length"]
        groups, capacity = 2, (length // form.group + 4) * form.group
        table = table_of(batch, capacity, rotary_of(case), length)
        state = empty(form, batch, groups, capacity, sizes, dtype)
        key, value = (tokens(batch, length, groups, size, dtype, seed) for seed, size in enumerate(sizes))
        with ops.reference_only():
            torch.ops.effcompile.kv_store(*state, torch.tensor(0), key, value, form.name, table=table)
        query = tokens(batch, queries, groups * ratio, sizes[0], dtype, 2)
        mask = None
        if case["masked"]:
            mask = torch.rand(batch, capacity, generator=torch.Generator().manual_seed(3)) > 0.3
        scale = sizes[0] ** -0.5 / 6
        predicate = Predicate(key_mask=mask is not None)
        out, lse = lowering.attend(query, *state, torch.tensor(length), mask, form.name, scale, True, -1, table=table)
        keys, values = ops.split_state(tuple(state))
        k = quantize.load_side(keys, length, form, "key", table)
        v = quantize.load_side(values, length, form, "value")
        keep = attention.allowed(predicate, queries, length, mask, query.device)
        best, best_lse = attend(query.double(), k.double(), v.double(), keep, scale, torch.float64)
        low, low_lse = attend(query, k, v, keep, scale, dtype)
        blind = best_lse.isinf()
        assert torch.equal(lse.isinf(), blind)
        rounding = torch.finfo(dtype).eps * best.abs().max()
        shifting = 3 * 2.0**-24 * largest_score(query, k, scale) * v.abs().max()
        allowed = 2 * (low.double() - best).abs().max() + rounding + shifting
        assert (out.double() - best).abs().max() <= allowed
        summing = sizes[0] * 2.0**-23 * scale * (query.double().abs().amax() * k.double().abs().amax())
        difference = (lse - best_lse).masked_fill(blind, 0).abs().max()
        assert difference <= 2 * (low_lse - best_lse).masked_fill(blind, 0).abs().max() + summing + 1e-6

    @pytest.mark.one_in(3, rest="exhaustive")
    @pytest.mark.parametrize("case", [c for c in CASES if c["queries"] == 1], ids=name_of)
    def test_store_and_load_bit_for_bit(self, case: dict[str, Any]) -> None:
        form, sizes, dtype, batch = (case[k] for k in ("form", "sizes", "dtype", "batch"))
        length = 200
        table = table_of(batch, 256, rotary_of(case), length)
        key, value = (tokens(batch, length, 2, size, dtype, seed) for seed, size in enumerate(sizes))
        states = [empty(form, batch, 2, 256, sizes, dtype) for _ in range(2)]
        for op, state in zip((torch.ops.effcompile.kv_store, lowering.kv_store), states):
            with ops.reference_only():
                for start, stop in ((0, 99), (99, 100), (100, 200)):
                    new = key[:, :, start:stop], value[:, :, start:stop]
                    op(*state, torch.tensor(start), *new, form.name, table=table)
        assert_same(*states)
        with ops.reference_only():
            expected = torch.ops.effcompile.kv_load(*states[0], torch.tensor(length), form.name, table=table)
        for x, y in zip(expected, lowering.kv_load(*states[1], torch.tensor(length), form.name, table=table)):
            assert torch.equal(x, y)


ANY = Predicate()
BUDGET = [
    (Program(phase, form, ANY, torch.bfloat16, 4, 128, 128, rotary=128), chip)
    for phase, form, chip in (
        ("decode", KVForm(2, 2, rope="pre"), "sm_90"),
        ("prefill", KVForm(2, 2, rope="pre"), "sm_90"),
        ("decode", KVForm(3, 3, rope="pre"), "sm_80"),
        ("decode", KVForm(4, 4, rope="pre"), "sm_80"),
        ("prefill", KVForm(4, 4, rope="pre"), "sm_100"),
        ("decode", KVForm(8, 8, rope="pre"), "gfx942"),
        ("prefill", KVForm(8, 4, rope="pre"), "sm_90"),
        ("decode", KVForm(4, 4, rope="pre_adjacent"), "sm_90"),
    )
]
BUDGET += [
    (Program("decode", KVForm(4, 4, rope="pre"), ANY, torch.bfloat16, 4, 128, 128, rotary=64), "sm_90"),
    (Program("prefill", KVForm(4, 4, 16, rope="pre"), ANY, torch.float16, 4, 80, 80, rotary=32), "sm_90"),
    (Program("decode", KVForm(2, 2, rope="pre"), ANY, torch.bfloat16, 4, 128, 128, rotary=64), "sm_90"),
]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize(("program", "chip"), BUDGET, ids=lambda x: getattr(x, "name", x))
def test_within_the_budget_of_a_chip(program: Program, chip: str) -> None:
    check(program, chip)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize(
    ("form", "chip"),
    [(KVForm(2, 2, rope="pre"), "sm_90"), (KVForm(8, 4, rope="pre_adjacent"), "gfx942")],
    ids=lambda x: getattr(x, "name", x),
)
def test_store_and_load_compile(form: KVForm, chip: str) -> None:
    program = StoreProgram(form, torch.bfloat16, 128, 128, 128)
    built = build(program, chip)
    for prefix, constants in (("", {"QUANTIZE": True, "APPEND": True}), ("load_", {"TILE": built.block})):
        used = resources(compile_ahead(built, program, chip, constants, prefix))
        assert used["spilled"] <= 16
        assert used["shared"] <= SHARED[chip]


def test_declined_with_a_reason() -> None:
    def why(form: KVForm, size: int, rotary: int) -> str:
        text = all_lowerings.refusal(Program("decode", form, ANY, torch.float16, 1, size, 64, rotary=rotary), "cuda")
        state = empty(form, 1, 1, 128, (size, 64), torch.float16)
        query, table = torch.zeros(1, 1, 1, size, dtype=torch.float16), table_of(1, 128, rotary, 8)
        with pytest.raises(ops.KernelUnavailable) as error:
            lowering.attend(query, *state, torch.tensor(8), None, form.name, 1.0, True, -1, table=table)
        assert str(error.value) == text
        return str(text)

    assert "first 24 of 96 channels are rotated by halves; use rope='post'" in why(KVForm(4, 4, rope="pre"), 96, 24)
    assert "first 64 of 80 channels" in why(KVForm(4, 4, rope="pre"), 80, 64)
    assert "first 32 of 80 channels" in why(KVForm(2, 4, rope="pre"), 80, 32)
    assert "heads of 16 channels with 2 bits" in why(KVForm(2, 4, rope="pre"), 16, 16)
    assert "9 channels a part, an odd number" in why(KVForm(3, 4, 32, rope="pre_adjacent"), 72, 72)
    form = KVForm(4, 4, rope="pre")
    state = empty(form, 1, 1, 128, (64, 64), torch.float16)
    args = (torch.zeros(1, 1, 1, 64, dtype=torch.float16), *state, torch.tensor(8), None, form.name, 1.0, True, -1)
    with pytest.raises(ops.KernelUnavailable, match="needs a table"):
        lowering.attend(*args)
    with pytest.raises(ops.KernelUnavailable, match="a table of angles of"):
        lowering.attend(*args, table=table_of(1, 64, 64, 8))
    assert all_lowerings.refusal(Program("decode", form, ANY, torch.float16, 1, 64, 64, rotary=64), "cuda") is None
