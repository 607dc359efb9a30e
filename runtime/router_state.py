"""What belongs to a router or a block and outlives a call: uses of experts, what adapts a router, chosen neurons.

It belongs to a weight and lives as long as that does, so prompts and steps, and graphs compiled anew, go on with the
same tensors. They are constants of the graphs, and no part of any module: ``state_dict()`` stays as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

What = Literal["counts", "vector", "votes", "core", "text", "route_keys", "route_values", "route_seen", "route_text"]
"""Of a router: how many tokens each expert got, int64; and what is added to the logits, fp32: both ``[experts]``. Of a
feed-forward block: the state of :mod:`effcompile.kernels.core_ops`. Of an embedding: that of
:mod:`effcompile.kernels.token_router`."""
_DTYPES: dict[What, torch.dtype] = {
    "counts": torch.int64, "vector": torch.float32, "text": torch.int64, "route_keys": torch.float32,
    "route_values": torch.float32, "route_seen": torch.bool, "route_text": torch.int64,
}  # fmt: skip
_states: dict[What, WeakTensorKeyDictionary] = {what: WeakTensorKeyDictionary() for what in get_args(What)}
"""Weight -> its state."""


def state_of(what: What, weight: Tensor, *shape: int) -> nn.Parameter:
    """The state that belongs to this weight; made, with zeros, when it is first asked for in this shape."""
    made: nn.Parameter | None = _states[what].get(weight)
    made = None if made is None or made.shape != shape else made
    if made is None or made.device != weight.device:
        before = torch.zeros(shape, dtype=_DTYPES.get(what, torch.int32)) if made is None else made
        made = nn.Parameter(before.detach().to(weight.device), requires_grad=False)
        _states[what][weight] = made
    return made


def has_state(what: What, weight: Tensor) -> bool:
    """Whether this weight has that state: some compiled code has asked for it."""
    return weight in _states[what]


def states(what: What, model: nn.Module) -> dict[str, nn.Parameter]:
    """The states in ``model``, by the modules of their weights, or the names of weights that are no ``weight``."""
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
def unchanged(model: nn.Module) -> Iterator[None]:
    """What is called within this context leaves the states in ``model`` as they were."""
    before = {(what, name): t.detach().clone() for what in _states for name, t in states(what, model).items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for what in _states:
                for name, t in states(what, model).items():
                    old = before.get((what, name))
                    t.zero_() if old is None or old.shape != t.shape else t.copy_(old)


class Owned:
    """Compiled code that works on the state of the weight that it is given.

    Dynamo keeps code by the code of ``forward``: what was compiled for one layer, or one model, may serve its likes,
    while the state in a graph is that of one weight. Then the other's takes its place for this call.

    Parameters
    ----------
    compiled
        The code.
    states
        Place of a weight among the arguments, what its state is, and the tensor in the graph.
    """

    def __init__(self, compiled: Callable[..., Any], states: Sequence[tuple[int, What, Tensor]]) -> None:
        # Each once, also where layers share a weight.
        self.compiled, self.states = compiled, {(place, what): state for place, what, state in states}

    def __call__(self, *args: Any) -> Any:
        others = []
        for (place, what), state in self.states.items():
            home = state_of(what, args[place], *state.shape)
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
