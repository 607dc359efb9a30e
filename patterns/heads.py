"""Prove that a tensor holds one number for each head, and find the vector of these numbers."""

from __future__ import annotations

from collections.abc import Mapping

import sympy  # type: ignore[import-untyped]
from torch import Tensor, fx

from effcompile.patterns import element_math as element_math
from effcompile.patterns import element_views as element_views
from effcompile.patterns.elements import Data, Elements, Real
from effcompile.patterns.index_algebra import Domain, Opaque, expression
from effcompile.patterns.storage import Writes
from effcompile.patterns.walk import shape, value


def per_head(node: fx.Node, writes: Writes, constants: Mapping[fx.Node, Tensor]) -> fx.Node | float | None:
    """What ``node`` ``[B, H, T, 1]`` holds if that depends on the head alone.

    Returns
    -------
    Node, float or None
        A tensor of ``H`` elements whose element ``h`` is the number of head ``h``, the number that all heads share, or
        None if neither can be shown.
    """
    sizes = shape(node)
    if len(sizes) != 4 or not value(node).dtype.is_floating_point or writes.after(node):
        return None
    domain = Domain(next((s.node.shape_env for s in sizes if not isinstance(s, int)), None))
    index = tuple(
        sympy.S.Zero if size == 1 else domain.variable(name, expression(size)) for name, size in zip("bhij", sizes)
    )
    try:
        element = Elements(domain, writes, constants, (index[0], index[3])).at(node, index)
    except Opaque:
        return None
    if isinstance(element, Real):
        return element.value
    if not isinstance(element, Data) or writes.after(element.node):
        return None
    own = shape(element.node)
    # One dimension is read at the head, all others have one element.
    dims = [d for d, part in enumerate(element.index) if part != 0]
    whole = [sizes[1] if d in dims else 1 for d in range(len(own))]
    if own != tuple(whole) or [element.index[d] for d in dims] != [index[1]] * (sizes[1] != 1):
        return None
    return element.node
