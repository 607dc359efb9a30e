"""C++ kernels for scales along either axis, and for fp8: the same checks as for the usual forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cpp_calls import (
    LOAD,
    STORE,
    assert_same,
    bits,
    check_attend,
    check_other_instructions,
    check_store_and_load,
    fresh,
    poisoned,
)
from pairs import pairwise
from stores import fp8_edges

from effcompile.kernels import ops
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import DTYPES, Predicate, Program
from effcompile.lowering import cpp

pytestmark = pytest.mark.usefixtures("no_fallback", "build_ahead")


def program_of(row: dict[str, Any]) -> Program:
    key_size, value_size, group = row["sizes"]
    window, pad = row["predicate"]
    form = KVForm(
        row["key_bits"], row["value_bits"], group, row["residual"] * group, row["key_axis"], row["value_axis"]
    )
    return Program(
        row["phase"], form, Predicate(row["causal"], window, pad), row["dtype"], row["ratio"], key_size, value_size
    )


FACTORS: dict[str, tuple[Any, ...]] = {
    "key_axis": ("token", "channel"),
    "value_axis": ("channel", "token"),
    "key_bits": ("fp8", 4, 8, 3, 2, 16),
    "value_bits": ("fp8", 4, 8, 3, 2, 16),
    "sizes": ((64, 64, 32), (48, 72, 16), (80, 96, 16), (256, 256, 64), (128, 128, 64), (208, 240, 16)),
    "phase": ("decode", "prefill"),
    "dtype": tuple(DTYPES),
    "ratio": (3, 1, 8, 7),
    "predicate": ((None, False), (40, True)),
    "residual": (4, 0),
    "causal": (True, False),
}
FEW = [
    Program("decode", KVForm("fp8", "fp8"), Predicate(), torch.float32, 3, 64, 64),
    Program("decode", KVForm("fp8", 4, 16, 32, "token", "channel"), Predicate(), torch.bfloat16, 3, 80, 96),
    Program(
        "prefill", KVForm(3, "fp8", 16, 0, "token", "channel"), Predicate(key_mask=True), torch.bfloat16, 3, 48, 72
    ),
    Program("prefill", KVForm("fp8", 2, 32, 32, "channel", "channel"), Predicate(window=40), torch.float32, 1, 64, 64),
]
# 72 channels are no whole vectors, and as values per token they hold no whole groups of 16.
COVER = [program for row in pairwise(**FACTORS) if cpp.refusal(program := program_of(row)) is None]
ALL = [*FEW, *(pytest.param(program, marks=pytest.mark.exhaustive) for program in dict.fromkeys(COVER))]


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.parametrize("program", ALL, ids=lambda p: p.name)
def test_attend_and_store(program: Program) -> None:
    check_attend(program)
    check_store_and_load(program)


def test_numbers_on_every_edge_of_fp8() -> None:
    """To the bit, -0 included."""
    x = fp8_edges()
    form = KVForm("fp8", "fp8", 32, 0, "token", "token")
    ours, theirs = (poisoned(form, 1, 1, 64, (32, 32), torch.float32) for _ in range(2))
    STORE(*ours, torch.tensor(0), x, x, form.name)
    with ops.reference_only():
        STORE(*theirs, torch.tensor(0), x, x, form.name)
        expected = LOAD(*theirs, torch.tensor(64), form.name)
    assert_same(ours, theirs)
    for got, wanted in zip(LOAD(*ours, torch.tensor(64), form.name), expected, strict=True):
        assert torch.equal(bits(got), bits(wanted))
    assert expected[0].flatten().unique().numel() >= 2 * 126 + 1
    assert (theirs[0] == 128).any()  # -0 was among them


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_extreme_values_in_fp8(axis: Any) -> None:
    form = KVForm("fp8", "fp8", 32, 0, axis, axis)
    x = fresh(1, 1, 64, 64, torch.float32)
    x[0, 0, 3, 0], x[0, 0, 4, 33], x[0, 0, 40, 2] = float("nan"), float("inf"), float("-inf")
    x[0, 0, :, 5], x[0, 0, 9], x[0, 0, 10] = -0.0, 1e38, -0.0
    x[0, 0, 11] = torch.linspace(0, 1e-9, 64)
    ours, theirs = (poisoned(form, 1, 1, 64, (64, 64), torch.float32) for _ in range(2))
    STORE(*ours, torch.tensor(0), x, x, form.name)
    with ops.reference_only():
        STORE(*theirs, torch.tensor(0), x, x, form.name)
    for a, b in zip(ours, theirs, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(bits(a.nan_to_num(1)), bits(b.nan_to_num(1)))


@pytest.mark.exhaustive
@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("width", [256, 1], ids=["avx2", "no vectors"])
def test_other_instruction_sets(width: int) -> None:
    check_other_instructions(FEW, width)
