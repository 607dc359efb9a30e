"""Prove that a table of booleans is a band: ``low <= column - row <= high``."""

from __future__ import annotations

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor

from effcompile.patterns.index_algebra import FALSE, TRUE, Cnf, Domain, Index, Opaque

LARGEST = 1 << 26
"""Tables with more elements than this are not read."""


def band(domain: Domain, table: Tensor, index: Index) -> Cnf:
    """The condition ``table[index]``, by evaluation of every element that the index can reach.

    At most two of the indices may vary, each as ``variable + anything that does not vary``. Compared is the part that
     is reached where the sizes are numbers, and the whole table where they are symbolic.
    """
    if table.numel() > LARGEST:
        raise Opaque("a constant too large to be read")
    places: list[tuple[sympy.Expr, int]] = []
    for dim in reversed(range(table.ndim)):
        place, size = index[dim], table.shape[dim]
        if place.is_Integer:
            if not 0 <= place < size:
                raise Opaque("a constant read outside of its bounds")
            table = table.select(dim, int(place))
            continue
        start, stop = _reach(domain, place, size)
        table = table.narrow(dim, start, stop - start)
        # From here on the table's index along this dimension is place - start.
        places.insert(0, (place - start, stop - start))
    if not places:
        return TRUE if bool(table) else FALSE
    if len(places) == 1:
        # One index varies: a table of one row.
        places.insert(0, (sympy.S.Zero, 1))
        table = table[None]
    if len(places) != 2:
        raise Opaque("a constant read at more than two indices")
    (row, rows), (column, columns) = places
    offsets = torch.arange(columns, device=table.device) - torch.arange(rows, device=table.device)[:, None]
    inside = offsets[table]
    if not inside.numel():
        return FALSE
    low, high = int(inside.min()), int(inside.max())
    if not torch.equal(table, (offsets >= low) & (offsets <= high)):
        raise Opaque("a constant that is no band")
    return domain.conj(
        TRUE if low == 1 - rows else domain.ge(column - row - low),
        TRUE if high == columns - 1 else domain.ge(row - column + high),
    )


def _reach(domain: Domain, place: sympy.Expr, size: int) -> tuple[int, int]:
    """The half-open range of a dimension that ``place`` reaches, as far as that is known."""
    parts = domain.linear(place)
    if parts is None or list(parts[0].values()) not in ([sympy.S.One], []):
        raise Opaque("a constant read at an index that is not a variable plus an offset")
    coefficients, start = parts
    length = domain.sizes[next(iter(coefficients))] if coefficients else sympy.S.One
    if not start.is_Integer or not length.is_Integer:
        return 0, size
    if start < 0 or start + length > size:
        raise Opaque("a constant read outside of its bounds")
    return int(start), int(start + length)
