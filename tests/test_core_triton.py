"""The Triton kernel that counts votes: in the interpreter with the tests of its operator, and compiled ahead."""

from __future__ import annotations

from typing import Any

import pytest
import test_core_ops as conformance
import torch
from interpreter import INTERPRETED, interpreted
from test_triton_aot import SHARED

from effcompile.kernels import ops
from effcompile.kernels.core_ops import CORE_VOTES
from effcompile.lowering import triton_ffn
from effcompile.lowering.triton_aot import noted, resources

CASES = [(2, 3, 64, "some"), (1, 4, 65, "shared"), (1, 1, 1, "all")]


test_in_the_interpreter = interpreted(__file__)[0]


class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.fixture(autouse=True)
    def on_cpus(self, monkeypatch: pytest.MonkeyPatch, no_fallback: Any) -> None:
        """The launcher for GPUs serves CPUs, several tokens to a program."""
        monkeypatch.setitem(ops._launchers, ("core_votes", "cpu"), triton_ffn.core_votes)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_votes(self, dtype: torch.dtype) -> None:
        """Ties, padding and what is no number; a size that fills its tile, and one that does not."""
        for (rows, tokens, neurons, kind), magnitude in zip(CASES, (False, True, False)):
            hidden = conformance.said_of(rows, tokens, neurons, dtype)
            counted = conformance.counted_of(kind, rows, tokens)
            for alpha in (0.3, 1.0):
                got = CORE_VOTES(hidden, counted, rows, alpha, magnitude)
                assert got.tolist() == conformance.brute(hidden, counted, rows, alpha, magnitude)

    def test_shares(self) -> None:
        conformance.test_a_share_of_a_count_is_that_of_python()


class TestAhead:
    __test__ = not INTERPRETED

    @pytest.mark.parametrize(
        ("neurons", "dtype", "chip"),
        [
            (14336, torch.bfloat16, "sm_90"),
            *(
                pytest.param(neurons, dtype, chip, marks=pytest.mark.exhaustive)
                for neurons in (1536, 14336, 16384)
                for dtype in (torch.bfloat16, torch.float32)
                for chip in ("sm_80", "sm_90", "sm_100", "gfx942")
            ),
        ],
    )
    def test_fits_a_chip(self, neurons: int, dtype: torch.dtype, chip: str) -> None:
        hidden = torch.empty(2, 500, neurons, dtype=dtype, device="meta")
        with noted(chip) as launches:
            triton_ffn.core_votes(hidden, torch.empty(2, 500, dtype=torch.bool, device="meta"), 2, 0.4, False)
        (launch,) = launches
        used = resources(launch.compile(chip))
        print(neurons, dtype, chip, launch.grid, used)
        assert used["spilled"] == 0
        assert used["shared"] <= SHARED[chip]

    def test_what_has_no_kernel_is_declined(self) -> None:
        with pytest.raises(ops.KernelUnavailable, match="one program ranks 16384"):
            triton_ffn.core_votes(torch.zeros(1, 1, 16385), None, 1, 0.4, False)
        assert ops._launchers["core_votes", "cuda"] is triton_ffn.core_votes
