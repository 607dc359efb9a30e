"""A linear with weights in few bits on GPUs: launcher of ``effcompile::quantized_linear``.

One row is limited by what is read and by unpacking it; more rows by the product. Either way codes are unpacked in the
kernel, and where outputs and rows make too few programs, the sum is split over the inputs. Of many rows the weight is
written out once, in the dtype of ``x``, and the library multiplies.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effcompile.kernels import ops, weight_ops
from effcompile.kernels.form import word
from effcompile.kernels.ops import KernelUnavailable
from effcompile.lowering import triton_operators as operators
from effcompile.lowering.triton_operators import Cut
from effcompile.lowering.triton_side import Vendor

BAND = 8
"""Tiles of rows that are multiplied with the same outputs at a time, so that codes are read from the cache."""
SPLIT_ROWS = 128
"""Rows up to which a sum is split: the parts of more would be as much to write as there is to read."""

WRITTEN_ROWS = 1024
"""Rows above which a weight is written out. On paper: every tile of 128 rows unpacks its codes again, about nine
instructions each, which take as long as its products; writing costs four bytes a weight, once, so that with half of
the matrix units' rate in the one case and three quarters in the other, both take as long at 1000 rows of an H100."""


def quantized_cut(rows: int, bits: int, dtype: torch.dtype, who: Vendor) -> Cut:
    """Tiles of a product with a weight of so many bits; the depth is in words of inputs.

    Chosen from ahead-of-time builds, as those without spills; ``tests/test_weights_triton.py`` holds the budgets.
    """
    if rows == 1:
        return Cut(1, 64, 128 // word(bits)[0])
    depth = {8: 64, 4: 32, 3: 16, 2: 16}[bits]
    if dtype is torch.float32:
        return Cut(16 if rows <= 16 else 32, 64, max(16, depth // 2), 4, 2)
    stages = 2 if who == "hip" else 3
    if rows <= 16:
        return Cut(16, 64, depth, 4, stages)
    # Eight codes of a word of 3 bits take registers, of which sm_80 has none left with 128 columns; and each has a
    # product of its own, whose sum takes a part of sm_100's tensor memory: all 512 columns of it with these.
    columns = 64 if bits == 3 else 128
    if rows <= 64 or who == "hip":
        return Cut(32 if rows <= 32 else 64, columns, depth, 4, stages)
    return Cut(128, columns, depth, 8, stages)


def run_of(group: int, bits: int, depth: int) -> int:
    """Words of a run: the largest power of two of them that lies in a group and in a tile.

    >>> [run_of(group, 4, 32) for group in (32, 128, 40)]
    [16, 32, 4]
    """
    words = group // word(bits)[0]
    return min(words & -words, depth)


def quantized_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    outputs: int,
    bits: int,
    group: int,
) -> Tensor:
    """Launcher of ``effcompile::quantized_linear`` on GPUs. Arguments and result are the operator's."""
    weight_ops.check(x, packed, scales, zeros, bias, outputs, bits, group)
    kernel = operators.kernel("weights", "quantized_product", x.dtype)
    for t in (packed, scales, zeros):
        if t is not None and not t.is_contiguous():
            raise KernelUnavailable(f"a packed weight with strides {t.stride()}")
    inputs = x.shape[-1]
    if not x.numel() or not outputs:
        return weight_ops.reference(x, packed, scales, zeros, bias, outputs, bits, group)
    x = x.contiguous()
    rows = x.numel() // inputs
    cut = quantized_cut(rows, bits, x.dtype, operators.vendor())
    run = run_of(group, bits, cut.depth)
    how: dict[str, Any] = {"BITS": bits, "GROUP": group, "ZEROS": zeros is not None}
    sides = packed, scales, scales if zeros is None else zeros
    if rows > WRITTEN_ROWS:
        return torch.nn.functional.linear(x, _weight(x, sides, outputs, how), bias)
    runs = scales.shape[1] * (group // word(bits)[0] // run)
    blocks = -(-outputs // cut.columns) * -(-rows // cut.rows)
    splits, each = 1, runs
    if rows <= SPLIT_ROWS:
        splits, each = operators.splits(runs * run, blocks, cut.depth, x.device)
        each //= run
    whole = splits == 1
    out = x.new_empty((*x.shape[:-1], outputs))
    parts = out if whole else x.new_empty((splits, rows, outputs), dtype=torch.float32)
    bias = None if bias is None else bias.contiguous()
    kernel.launch(
        "", splits * blocks, x, *sides, x if bias is None else bias, parts, rows, outputs, inputs, each, **how,
        BIASED=whole and bias is not None, WHOLE=whole,
        PRECISION=operators.precision_of(x.dtype, operators.vendor()), BAND=BAND, HEIGHT=run, **cut.options,
    )  # fmt: skip
    if not whole:
        operators.add_up(parts, out.view(rows, outputs), splits, (rows * outputs, outputs), bias)
    return out


def _weight(x: Tensor, sides: tuple[Tensor, ...], outputs: int, how: dict[str, Any]) -> Tensor:
    """The weight that the operator multiplies by, in the dtype of ``x``, with outputs side by side."""
    inputs, (blocks, groups, lanes), words = x.shape[-1], sides[1].shape, how["GROUP"] // word(how["BITS"])[0]
    columns, depth = 64, 128 // word(how["BITS"])[0]
    weight = x.new_empty(inputs, blocks * lanes)
    operators.kernel("weights", "write_weight", x.dtype).launch(
        "", -(-groups * words // depth) * -(-outputs // columns), *sides, weight, outputs, inputs, **how,
        HEIGHT=run_of(how["GROUP"], how["BITS"], depth), COLUMNS=columns, DEPTH=depth, num_warps=4,
    )  # fmt: skip
    return weight[:, :outputs].t()


def written(dtype: torch.dtype) -> tuple[str, str]:
    """The file of the kernels, which Triton builds for each dtype and size it meets, and its text."""
    file = Path(weight_ops.__file__).parent / "triton" / "weights.py"
    return str(file), file.read_text()


ops.register_launcher("quantized_linear", "cuda", quantized_linear)
