"""What FFNs that read a part of their weights move and compute: bytes and FLOPs of the operators of ``ffn_ops``.

*Bytes* are the compulsory traffic of one call, as in :mod:`effcompile.kernels.cost`: each weight that counts for some
token is read once, input and result once. *FLOPs* are two for each multiply-add; activations are left out. All sizes
may be numbers or sympy expressions.

>>> half = grouped_ffn(1, 576, shared=384, width=192, active=2, uses=2)
>>> round(half.bytes / grouped_ffn(1, 576, shared=1536).bytes, 4)
0.5002
>>> round(groups_used(groups=6, slots=2, tokens=8), 3)
5.766
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from effcompile.kernels.cost import Cost


def groups_used(groups: int, slots: int, tokens: int) -> float:
    """Groups that ``tokens`` tokens are expected to use together, each taking ``slots`` of them, independently.

    With all of them in use, a carved FFN reads every weight, and gains nothing where reading is the limit.
    """
    return groups * (1 - (1 - slots / groups) ** tokens)


def grouped_ffn(
    tokens: Any,
    size: Any,
    *,
    shared: Any,
    width: Any = 0,
    active: Any = 0,
    uses: Any = 0,
    itemsize: int = 4,
    gated: bool = True,
    kept: Sequence[Any] | None = None,
) -> Cost:
    """``effcompile::grouped_ffn``: ``active`` groups are used by some token; tokens use ``uses`` groups in all.

    ``kept`` are the rows of down that some token keeps, of the shared ones and of a group; all of them if it is None.
    """
    first = 2 if gated else 1
    last, each = (shared, width) if kept is None else kept
    read = size * (first * (shared + active * width) + last + active * each) * itemsize
    ends = 2 * tokens * size * itemsize + uses * 8
    return Cost(read + ends, 2 * size * (first * (tokens * shared + uses * width) + tokens * last + uses * each))


def route(tokens: Any, size: Any, groups: Any, slots: Any, *, itemsize: int = 4, gated: bool = True) -> Cost:
    """``effcompile::route`` without biases."""
    matrices = 2 if gated else 1
    read = (matrices * groups + tokens) * size * itemsize
    return Cost(read + tokens * slots * 8 + groups * 4, 2 * matrices * tokens * size * groups)


def column_linear(
    tokens: Any, inputs: Any, outputs: Any, *, kept: Any, itemsize: int = 4, scaled: bool = False
) -> Cost:
    """``effcompile::column_linear`` without a bias, of which ``kept`` inputs are kept by some token."""
    ends = tokens * (inputs + outputs) * itemsize + (inputs * 4 if scaled else 0) + 4
    return Cost(kept * outputs * itemsize + ends, 2 * tokens * kept * outputs)


def column_ffn(tokens: Any, size: Any, neurons: Any, *, kept: tuple[Any, Any, Any], itemsize: int = 4) -> Cost:
    """``effcompile::column_ffn`` without scales and biases: ``kept`` inputs of gate (0 without one), up and down."""
    gate, up, down = kept
    read = (gate + up) * neurons + down * size
    return Cost(read * itemsize + 2 * tokens * size * itemsize + 12, 2 * tokens * read)
