"""How much of attention a sparse operator leaves: density, and the mass that is kept, measured by the operator itself.

Both are read off the lse. A row whose sparse lse is ``a`` and whose dense one is ``b`` keeps ``exp(a - b)`` of its
attention mass; and with a query of zeros ``exp(lse)`` is the number of keys that a row visits. So nothing here knows
how a method lists keys: only how the operator is told to visit everything (:func:`register`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
_everything: dict[Any, tuple[Callable[..., Arguments], tuple[str, ...]]] = {}


def register(operator: Any, everything: Callable[..., Arguments], mass: tuple[str, ...] = ()) -> None:
    """Let ``everything(*args, **kwargs)`` give the arguments with which ``operator`` visits all keys it may see.

    The operator's first argument is the query, its second result the lse, fp32 ``[B, H, T]``. ``mass`` names keyword
    arguments that give mass to a query of zeros or take it, and are left out where keys are counted.
    """
    _everything[operator] = everything, mass


def is_sparse(operator: Any) -> bool:
    """Whether :func:`observe` knows ``operator``."""
    return operator in _everything


def observe(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], lse: Tensor) -> Tensor:
    """Density and kept mass of one call whose result had this ``lse``: fp64 ``[2]``.

    Density is the pairs of query and key that were visited over those that may see each other; kept mass is the mean
    over rows that may see a key; what a sink takes counts as kept. Three more calls of the operator, two of them dense.
    """
    everything, mass = _everything[operator]
    all_args, all_kwargs = everything(*args, **kwargs)
    dense = operator(*all_args, **all_kwargs)[1].double()
    there = dense.isfinite()
    kept = (lse.double() - dense)[there].exp().mean()
    zeros = torch.zeros_like(args[0])
    seen, possible = (
        operator(zeros, *rest, **{k: v for k, v in more.items() if k not in mass})[1].double().exp().sum()
        for rest, more in ((args[1:], kwargs), (all_args[1:], all_kwargs))
    )
    return torch.stack([seen / possible, kept])
