"""What belongs to a router and outlives a call: how often each of its experts was used.

It belongs to the router's weight and lives as long as that does, so prompts and steps, and graphs compiled anew, go on
with the same tensors. They are constants of the graphs, and no part of any module: ``state_dict()`` stays as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_counts = WeakTensorKeyDictionary()
"""Weight of a router -> int64 ``[experts]``."""


def counts_of(weight: Tensor, experts: int) -> nn.Parameter:
    """The counts of the router with this weight, int64 ``[experts]``; made, with zeros, when first asked for."""
    made: nn.Parameter | None = _counts.get(weight)
    if made is None or made.device != weight.device:
        before = torch.zeros(experts, dtype=torch.int64) if made is None else made
        made = nn.Parameter(before.detach().to(weight.device), requires_grad=False)
        _counts[weight] = made
    return made


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name.removesuffix(".weight"): _counts[t] for name, t in named if t in _counts}


def expert_counts(model: nn.Module) -> dict[str, Tensor]:
    """How many tokens each expert of each counted router got, in prompts and steps, since counting began.

    Counting is asked for with ``ec.reroute(count=True)``. Tokens that a mask hides are routed and count like others;
    experts that ``top_k`` or ``threshold`` leave out do not.

    Returns
    -------
    dict
        Router (its module, or the name of its weight if that is no ``weight``) -> int64 ``[experts]`` on its device.
        These are the tensors that compiled code adds to: ``clone()`` them to keep numbers, ``zero_()`` them to begin
        anew. Empty before the first call, and if nothing is counted.
    """
    return {name: count.detach() for name, count in _named(getattr(model, "_orig_mod", model)).items()}


@contextlib.contextmanager
def not_counting(model: nn.Module) -> Iterator[None]:
    """What is called within this context leaves the counts of ``model`` as they were."""
    before = {name: count.detach().clone() for name, count in _named(model).items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, count in _named(model).items():
                count.copy_(before[name]) if name in before else count.zero_()


class Owned:
    """Compiled code that works on the state of the router whose weight it is given.

    Dynamo keeps code by the code of ``forward``: what was compiled for one layer, or one model, may serve its likes,
    while the state in a graph is that of one router. Then the other's takes its place for this call.

    Parameters
    ----------
    compiled
        The code.
    counts
        Place of a router's weight among the arguments, and the counts in the graph.
    """

    def __init__(self, compiled: Callable[..., Any], counts: Sequence[tuple[int, Tensor]]) -> None:
        self.compiled, self.counts = compiled, dict(counts)  # each once, also where layers share a router

    def __call__(self, *args: Any) -> Any:
        others = []
        for place, state in self.counts.items():
            home = counts_of(args[place], state.numel())
            if home is not state:
                others.append((home, state, state.detach().clone()))
                with torch.no_grad():
                    state.copy_(home)
        try:
            return self.compiled(*args)
        finally:
            with torch.no_grad():
                for home, state, before in others:
                    home.copy_(state)
                    state.copy_(before)
