"""A linear of low rank: two thin products in the place of one.

As in :mod:`effcompile.kernels.ops`, the operator means its reference body. Shapes: ``m`` outputs, ``n`` inputs, rank
``r``.

``low_rank_linear(x, down, up, bias)``
    ``y = up (down x) + bias`` for ``x`` ``[..., n]``, ``down`` ``[r, n]``, ``up`` ``[m, r]``, ``bias`` ``[m]`` or None.
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

ops.library.define("low_rank_linear(Tensor x, Tensor down, Tensor up, Tensor? bias) -> Tensor")


def breaks_even(outputs: int, inputs: int) -> float:
    """The rank at which factors have as many numbers as the weight: at this rank and above nothing is gained.

    >>> breaks_even(576, 1536)
    418.90909090909093
    """
    return outputs * inputs / (outputs + inputs)


def low_rank_cost(rows: Any, outputs: int, inputs: int, rank: int, *, itemsize: int, bias: bool) -> Cost:
    """What ``low_rank_linear`` must move and compute, as :mod:`effcompile.kernels.cost` counts."""
    read = rank * (outputs + inputs) + outputs * bias
    return Cost((read + rows * (outputs + inputs)) * itemsize, 2 * rows * rank * (outputs + inputs))


def linear_cost(rows: Any, outputs: int, inputs: int, *, itemsize: int, bias: bool) -> Cost:
    """The same of a dense linear."""
    read = outputs * inputs + outputs * bias
    return Cost((read + rows * (outputs + inputs)) * itemsize, 2 * rows * outputs * inputs)


def check_low_rank(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> None:
    """Raise ``ValueError`` if arguments of ``low_rank_linear`` do not fit each other."""
    if down.dim() != 2 or up.dim() != 2 or x.shape[-1] != down.shape[1] or up.shape[1] != down.shape[0]:
        raise ValueError(
            f"x {tuple(x.shape)}, down {tuple(down.shape)} and up {tuple(up.shape)} do not fit: they are "
            "[..., inputs], [rank, inputs] and [outputs, rank]."
        )
    if bias is not None and bias.shape != (up.shape[0],):
        raise ValueError(f"bias is {tuple(bias.shape)}, and should be {(up.shape[0],)}.")


def low_rank_reference(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    """The meaning of ``low_rank_linear``."""
    check_low_rank(x, down, up, bias)
    return F.linear(F.linear(x, down), up, bias).contiguous()


def _body(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    try:
        result: Tensor = ops.launch("low_rank_linear", x.device.type, x, down, up, bias)
        return result
    except ops.KernelUnavailable:
        return low_rank_reference(x, down, up, bias)


def _fake(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    check_low_rank(x, down, up, bias)
    return x.new_empty((*x.shape[:-1], up.shape[0]))


ops.library.impl("low_rank_linear", _body, "CompositeExplicitAutograd")
torch.library.register_fake("effcompile::low_rank_linear", _fake, lib=ops.library)
