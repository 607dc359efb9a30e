"""What tests of Triton kernels share: budgets of errors, and of what a chip has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from test_triton_aot import SHARED
from test_triton_kernels import attend, largest_score
from torch import Tensor

from effcompile.kernels.program import Program
from effcompile.lowering.triton_aot import compile_ahead, resources
from effcompile.lowering.triton_blocks import block_tiles
from effcompile.lowering.triton_build import build

INSTRUCTION = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
"""The product of matrices that a chip should be using; ``mma.sync`` on others."""


def assert_within_budget(
    out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float, **parts: Any
) -> None:
    """Twice what PyTorch in the model's dtype loses, plus one rounding of the result and those of scores in fp32.

    ``key`` and ``value`` are those that attention reads, dequantised; ``seen`` is bool ``[B or 1, H or 1, T, S]``.
    """
    dtype = query.dtype
    assert out.dtype == dtype
    assert out.is_contiguous()
    best, best_lse = attend(query.double(), key.double(), value.double(), seen, scale, torch.float64, **parts)
    low, low_lse = attend(query, key, value, seen, scale, dtype, **parts)
    blind = best_lse.isinf()
    assert torch.equal(lse.isinf(), blind)
    assert out[blind].eq(0).all()
    rounding = torch.finfo(dtype).eps * best.abs().max()
    # Scores are summed, scaled to base 2 and shifted: each rounding moves a weight by as much of it; parts have more.
    shifting = (8 if parts else 3) * 2.0**-24 * largest_score(query, key, scale) * value.double().abs().max()
    assert (out.double() - best).abs().max() <= 2 * (low.double() - best).abs().max() + rounding + shifting
    # The lse is fp32, whatever the dtype: what summing D products in fp32 may lose is added.
    summing = query.shape[3] * 2.0**-23 * scale * (query.double().abs().amax() * key.double().abs().amax())
    difference = (lse - best_lse).masked_fill(blind, 0).abs().max()
    assert difference <= 2 * (low_lse - best_lse).masked_fill(blind, 0).abs().max() + summing + 1e-6


def spill_budget(program: Program, rows: int) -> int:
    """Bytes that a thread may spill: none for heads up to 128 in 16-bit types.

    As elsewhere more for larger heads and fp32, and a few where tiles are small and the assembler makes room
    for another program in a multiprocessor.
    """
    wide, single = max(program.key_size, program.value_size) > 128, program.dtype == torch.float32
    return (1024 if wide else 320) if single else 256 if wide else 0 if rows >= 64 else 16


def assert_fits(program: Program, chip: str, block: int) -> None:
    """A program over block lists, built ahead: shared memory, spills, the chip's products, and copies in a pipeline."""
    built = build(program, chip)
    assert built.blocks is not None
    cut = built.blocks.within(block)
    sizes = {"FULL": True} | block_tiles(cut, block, program.form)
    binary = compile_ahead(built, program, chip, sizes | {"ROWS": cut.rows})
    used = resources(binary)
    print(program.name, chip, block, cut, used)
    assert used["shared"] <= SHARED[chip]
    # As for decoding, a few where the assembler makes room for another program in a multiprocessor.
    assert used["spilled"] <= max(spill_budget(program, cut.rows), 16 if used["registers"] in (128, 168) else 0)
    if program.dtype != torch.float32 and block >= 64:
        assembly = binary.asm.get("ptx") or binary.asm["amdgcn"]
        assert INSTRUCTION.get(chip, "mma.sync") in assembly
        # Two tiles of keys and values are under way while one is used: the loop over a list is a pipeline.
        assert chip == "gfx942" or "cp.async.wait_group" in assembly
    if program.columns:
        used = resources(compile_ahead(built, program, chip, sizes, "check_"))
        assert used["spilled"] == 0


def fits(cases: Sequence[tuple[Program, str, int]]) -> Callable[..., None]:
    """A test of a class: each program over block lists, for a chip and blocks of so many tokens, fits the chip."""

    @pytest.mark.parametrize(("program", "chip", "block"), cases, ids=lambda v: getattr(v, "name", str(v)))
    def test(self: Any, program: Program, chip: str, block: int) -> None:
        assert_fits(program, chip, block)

    return test
