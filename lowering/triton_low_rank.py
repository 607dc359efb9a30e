"""A linear of low rank on GPUs: launcher of ``effcompile::low_rank_linear``, in two kernels or, for many rows, one.

Between the two, and for large ranks, are rows for which tiles would be too few to fill a GPU, or would not hold the
small product: these are two products of the library.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from effcompile.kernels import low_rank_ops, ops
from effcompile.kernels.ops import KernelUnavailable
from effcompile.lowering import triton_operators as operators
from effcompile.lowering.triton_operators import Cut
from effcompile.lowering.triton_side import Vendor

FEW_ROWS = 16
"""Rows up to which reading the factors is all that counts."""
CHAIN_RANK = {2: 256, 4: 128}
"""The largest rank whose small product a tile of rows holds, by the bytes of a number."""
MAX_SPLITS = 8
"""Splits of the inputs of ``down`` at most: every program of ``up`` adds them up."""
MAX_PARTS = 4
"""Programs that share a tile of rows, each with a part of the outputs, at most: all of them compute the small one."""


def few_cuts(rows: int, dtype: torch.dtype, who: Vendor) -> tuple[Cut, Cut]:
    """Tiles for a few rows: of ``down``, columns being ranks, and of ``up``; from ahead-of-time builds."""
    wide = 1 if dtype is torch.float32 else 2
    if rows == 1:
        return Cut(1, 8, 256 * wide), Cut(1, 32, 64 * wide)
    stages = 2 if who == "hip" or wide == 1 else 3
    return Cut(16, 16, 64 * wide, 4, stages), Cut(16, 64, 32, 4, stages)


def chain_cut(rank: int, dtype: torch.dtype, who: Vendor) -> Cut:
    """Tiles of many rows, for ranks filled up to a power of two; from ahead-of-time builds."""
    if dtype is torch.float32:
        return Cut(32, 32, 32, 4, 2)
    if rank <= 128:
        return Cut(64, 64 if who == "hip" else 128, 64 if rank <= 64 else 32, 4, 2)
    return Cut(64, 32 if who == "hip" else 64, 32, 8, 2)


def low_rank_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    values: Tensor | None = None,
    columns: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """Launcher of ``effcompile::low_rank_linear`` on GPUs. Arguments and result are the operator's."""
    low_rank_ops.check_low_rank(x, down, up, bias, values, columns, starts)
    kernel = operators.kernel("low_rank", "chain", x.dtype)
    if values is not None:
        raise KernelUnavailable("a sparse residual, whose entries no kernel for GPUs reads")
    operators.check(x.dtype, down=down, up=up, bias=bias)
    (rank, inputs), outputs = down.shape, up.shape[0]
    rows, who = x.numel() // max(inputs, 1), operators.vendor()
    if not rows or not rank or not outputs:
        return low_rank_ops.low_rank_reference(x, down, up, bias)
    if rows <= FEW_ROWS:
        return _few(x.contiguous(), down, up, bias, rows)
    room = max(16, operators.power(rank))
    cut = chain_cut(room, x.dtype, who)
    tiles, blocks = -(-rows // cut.rows), -(-outputs // cut.columns)
    parts = min(-(-operators.multiprocessors(x.device) // tiles), blocks)
    if rank > CHAIN_RANK[x.dtype.itemsize] or parts > MAX_PARTS:
        return low_rank_ops.low_rank_reference(x, down, up, bias)
    x, out = x.contiguous(), x.new_empty((*x.shape[:-1], outputs))
    share = -(-blocks // parts)
    kernel.launch(
        "", tiles * -(-blocks // share), x, down, up, x if bias is None else bias, out, rows, inputs, rank, outputs,
        share, BIASED=bias is not None, PRECISION=operators.precision_of(x.dtype, who), RANK=room, **cut.options,
    )  # fmt: skip
    return out


def _few(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """Two kernels, for rows of which each reads the factors once for all."""
    (rank, inputs), outputs, who = down.shape, up.shape[0], operators.vendor()
    first, second = few_cuts(rows, x.dtype, who)
    blocks = -(-rank // first.columns)
    splits, each = operators.splits(inputs, blocks, first.depth, x.device, MAX_SPLITS)
    parts = x.new_empty((splits, rows, rank), dtype=torch.float32)
    precision = operators.precision_of(x.dtype, who)
    operators.kernel("low_rank", "few_down", x.dtype).launch(
        "", splits * blocks, x, down, parts, rows, inputs, rank, each, PRECISION=precision, **first.options
    )
    out = x.new_empty((*x.shape[:-1], outputs))
    operators.kernel("low_rank", "few_up", x.dtype).launch(
        "", -(-outputs // second.columns), parts, up, parts if bias is None else bias, out, rows, rank, outputs, splits,
        BIASED=bias is not None, PRECISION=precision, PARTS=operators.power(splits), **second.options,
    )  # fmt: skip
    return out


def written(dtype: torch.dtype) -> tuple[str, str]:
    """The file of the kernels, which Triton builds for each dtype and size it meets, and its text."""
    file = Path(low_rank_ops.__file__).parent / "triton" / "low_rank.py"
    return str(file), file.read_text()


ops.register_launcher("low_rank_linear", "cuda", low_rank_linear)
