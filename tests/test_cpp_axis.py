"""C++ kernels for scales along either axis, and for fp8: the same checks as for the usual forms."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from stores import E4M3
from test_cpp_kernels import (  # noqa: F401  (two are fixtures)
    LENGTHS,
    LOAD,
    STORE,
    Call,
    _build_ahead,
    _no_fallback,
    assert_same,
    fresh,
    pairwise,
    poisoned,
    queries_for,
    store_of,
)
from test_cpp_kernels import test_store_and_load as store_and_load

from effcompile.kernels import ops
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import DTYPES, Predicate, Program
from effcompile.lowering import cpp

store_and_load.__test__ = False  # type: ignore[attr-defined]  # here it is called, not collected


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
    "sizes": ((64, 64, 32), (80, 96, 16), (128, 128, 64), (32, 64, 32)),
    "phase": ("decode", "prefill"),
    "dtype": tuple(DTYPES),
    "ratio": (3, 1, 8),
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
COVER = [program_of(row) for row in pairwise(FACTORS)]
# 72 channels are no whole vectors, and as values per token they hold no whole groups of 16.
MORE_SIZES = {"sizes": ((48, 72, 16), (256, 256, 64), (16, 48, 16), (208, 240, 16)), "ratio": (4, 7, 1)}
COVER += [program for row in pairwise(FACTORS | MORE_SIZES) if cpp.refusal(program := program_of(row)) is None]
ALL = [*FEW, *(pytest.param(program, marks=pytest.mark.slow) for program in dict.fromkeys(COVER))]


@pytest.mark.parametrize("program", ALL, ids=lambda p: p.name)
def test_attend_and_store(program: Program) -> None:
    for length in LENGTHS:
        for queries in queries_for(program, length):
            Call(program, length, queries).check()
    store_and_load(program)
