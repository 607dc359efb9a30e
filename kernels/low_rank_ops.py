"""A linear of low rank: two thin products in the place of one.

As in :mod:`effcompile.kernels.ops`, the operator means its reference body. Shapes: ``m`` outputs, ``n`` inputs, rank
``r``.

``low_rank_linear(x, down, up, bias, values, columns, starts)``
    ``y = up (down x) + S x + bias`` for ``x`` ``[..., n]``, ``down`` ``[r, n]``, ``up`` ``[m, r]``, ``bias`` ``[m]`` or
    None. ``S`` ``[m, n]`` is a sparse residual in CSR, or all three are None: ``values`` ``[k]``, ``columns`` ``[k]``
    (int16, or int32 for ``n`` above 32768), each once in its row, and ``starts`` int32 ``[m + 1]``, from 0 to ``k``.
    The result is contiguous, in the dtype of ``x``. What is between the products is of that dtype or wider.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effcompile.kernels import ops
from effcompile.kernels.cost import Cost

LOW_RANK_ROWS = 8
"""Rows up to which reading the factors is all that counts, and a kernel reads each once for all of them."""

ops.library.define(
    "low_rank_linear(Tensor x, Tensor down, Tensor up, Tensor? bias, Tensor? values=None, Tensor? columns=None, "
    "Tensor? starts=None) -> Tensor"
)

Residual = tuple[Tensor, Tensor, Tensor]
"""``values``, ``columns`` and ``starts``."""


def index_dtype(inputs: int) -> torch.dtype:
    """Of the columns of a residual with so many inputs."""
    return torch.int16 if inputs <= 1 << 15 else torch.int32


def entry_bytes(inputs: int, itemsize: int) -> int:
    """What an entry of a residual takes."""
    return itemsize + index_dtype(inputs).itemsize


def breaks_even(outputs: int, inputs: int) -> float:
    """The rank at which factors have as many numbers as the weight: at this rank and above nothing is gained.

    >>> breaks_even(576, 1536)
    418.90909090909093
    """
    return outputs * inputs / (outputs + inputs)


def low_rank_cost(
    rows: Any, outputs: int, inputs: int, rank: int, *, itemsize: int, bias: bool, entries: int = 0
) -> Cost:
    """What ``low_rank_linear`` must move and compute, as :mod:`effcompile.kernels.cost` counts."""
    read = rank * (outputs + inputs) + outputs * bias
    sparse = entries * entry_bytes(inputs, itemsize) + 4 * (outputs + 1) * bool(entries)
    products = rank * (outputs + inputs) + entries
    return Cost((read + rows * (outputs + inputs)) * itemsize + sparse, 2 * rows * products)


def linear_cost(rows: Any, outputs: int, inputs: int, *, itemsize: int, bias: bool) -> Cost:
    """The same of a dense linear."""
    read = outputs * inputs + outputs * bias
    return Cost((read + rows * (outputs + inputs)) * itemsize, 2 * rows * outputs * inputs)


def check_low_rank(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    values: Tensor | None = None,
    columns: Tensor | None = None,
    starts: Tensor | None = None,
) -> None:
    """Raise ``ValueError`` if arguments of ``low_rank_linear`` do not fit each other."""
    if down.dim() != 2 or up.dim() != 2 or x.shape[-1] != down.shape[1] or up.shape[1] != down.shape[0]:
        raise ValueError(
            f"x {tuple(x.shape)}, down {tuple(down.shape)} and up {tuple(up.shape)} do not fit: they are "
            "[..., inputs], [rank, inputs] and [outputs, rank]."
        )
    if bias is not None and bias.shape != (up.shape[0],):
        raise ValueError(f"bias is {tuple(bias.shape)}, and should be {(up.shape[0],)}.")
    if values is None and columns is None and starts is None:
        return
    if values is None or columns is None or starts is None:
        raise ValueError("values, columns and starts of a residual are given together, or none of them.")
    wanted = index_dtype(x.shape[-1])
    if values.dim() != 1 or columns.shape != values.shape or starts.shape != (up.shape[0] + 1,):
        raise ValueError(
            f"values {tuple(values.shape)}, columns {tuple(columns.shape)} and starts {tuple(starts.shape)} do not "
            f"fit: they are [entries], [entries] and {(up.shape[0] + 1,)}."
        )
    if columns.dtype is not wanted or starts.dtype is not torch.int32:
        raise ValueError(
            f"columns are {columns.dtype} and starts {starts.dtype}, and should be {wanted} and torch.int32."
        )


def dense_residual(values: Tensor, columns: Tensor, starts: Tensor, inputs: int) -> Tensor:
    """A residual as a matrix ``[m, inputs]``."""
    counts, outputs = starts.diff().long(), starts.numel() - 1
    rows = torch.arange(outputs, device=values.device).repeat_interleave(counts, output_size=values.numel())
    return values.new_zeros(outputs, inputs).index_put((rows, columns.long()), values)


def low_rank_reference(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    values: Tensor | None = None,
    columns: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """The meaning of ``low_rank_linear``."""
    check_low_rank(x, down, up, bias, values, columns, starts)
    y = F.linear(F.linear(x, down), up, bias)
    if values is not None and columns is not None and starts is not None:
        y = y + F.linear(x, dense_residual(values, columns, starts, x.shape[-1]))
    return y.contiguous()


def _body(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, *residual: Tensor | None) -> Tensor:
    try:
        result: Tensor = ops.launch("low_rank_linear", x.device.type, x, down, up, bias, *residual)
        return result
    except ops.KernelUnavailable:
        return low_rank_reference(x, down, up, bias, *residual)


def _fake(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, *residual: Tensor | None) -> Tensor:
    check_low_rank(x, down, up, bias, *residual)
    return x.new_empty((*x.shape[:-1], up.shape[0]))


ops.library.impl("low_rank_linear", _body, "CompositeExplicitAutograd")
torch.library.register_fake("effcompile::low_rank_linear", _fake, lib=ops.library)
