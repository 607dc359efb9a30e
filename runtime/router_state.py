"""What belongs to a router and outlives a call: how often each of its experts was used, and what adapts it.

It belongs to the router's weight and lives as long as that does, so prompts and steps, and graphs compiled anew, go on
with the same tensors. They are constants of the graphs, and no part of any module: ``state_dict()`` stays as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

What = Literal["counts", "vector"]
"""How many tokens each expert got, int64; and what is added to the logits, fp32: both ``[experts]``."""
_states = {what: WeakTensorKeyDictionary() for what in get_args(What)}
"""Weight of a router -> its state."""


def state_of(what: What, weight: Tensor, experts: int) -> nn.Parameter:
    """The state of the router with this weight, ``[experts]``; made, with zeros, when it is first asked for."""
    made: nn.Parameter | None = _states[what].get(weight)
    if made is None or made.device != weight.device:
        dtype = torch.int64 if what == "counts" else torch.float32
        before = torch.zeros(experts, dtype=dtype) if made is None else made
        made = nn.Parameter(before.detach().to(weight.device), requires_grad=False)
        _states[what][weight] = made
    return made


def has_state(what: What, weight: Tensor) -> bool:
    """Whether the router with this weight has that state: some compiled code has asked for it."""
    return weight in _states[what]


def states(what: What, model: nn.Module) -> dict[str, nn.Parameter]:
    """The states of the routers of ``model``, by their modules, or the names of weights that are no ``weight``."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name.removesuffix(".weight"): _states[what][t] for name, t in named if t in _states[what]}


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
    return {name: count.detach() for name, count in states("counts", getattr(model, "_orig_mod", model)).items()}


@contextlib.contextmanager
def not_counting(model: nn.Module) -> Iterator[None]:
    """What is called within this context leaves the counts of ``model`` as they were."""
    before = {name: count.detach().clone() for name, count in states("counts", model).items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, count in states("counts", model).items():
                count.copy_(before[name]) if name in before else count.zero_()


class Owned:
    """Compiled code that works on the state of the router whose weight it is given.

    Dynamo keeps code by the code of ``forward``: what was compiled for one layer, or one model, may serve its likes,
    while the state in a graph is that of one router. Then the other's takes its place for this call.

    Parameters
    ----------
    compiled
        The code.
    states
        Place of a router's weight among the arguments, what it is, and the tensor in the graph.
    """

    def __init__(self, compiled: Callable[..., Any], states: Sequence[tuple[int, What, Tensor]]) -> None:
        # Each once, also where layers share a router.
        self.compiled, self.states = compiled, {(place, what): state for place, what, state in states}

    def __call__(self, *args: Any) -> Any:
        others = []
        for (place, what), state in self.states.items():
            home = state_of(what, args[place], state.numel())
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
