"""Which linears make the keys and values of a layer, shown by trying it.

What stands between the hidden state and the keys no config says for sure: which module projects, with a bias or not,
with a norm behind it. So it is tried, as rotations are (:mod:`effcompile.runtime.rope`): every attention is run on a
few tokens with angles of 0, and its keys must be those of one of its own ``nn.Linear``, with a norm of heads behind it
or none, also for an input many times as large; and its values those of one without a norm. Nothing of the model is
changed: a tied weight stays tied, and a layer of another library, whose weight is not its own, is refused.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from effcompile.kernels.form import Kind
from effcompile.runtime import discarded, progressive, rope
from effcompile.runtime.adapter import attention_modules, hidden_in
from effcompile.runtime.layer import CacheError
from effcompile.runtime.plan import version_of

KINDS: tuple[Kind, ...] = ("key", "value")
LOUDER = 64.0
"""The input is tried this many times as large too: a projection that is clipped, or not linear, shows there."""


@dataclasses.dataclass(frozen=True)
class Projection:
    """What makes one layer's keys, before their rotation, or its values of the attention's hidden state.

    Attributes
    ----------
    linear, norm
        Names of the attention's children; no norm: ``""``.
    offset
        What is added to the weight of the norm: 1 in models that keep it around 0.
    heads, size
        ``G``, and ``D`` or ``E``.
    """

    linear: str
    norm: str
    offset: float
    heads: int
    size: int

    @property
    def channels(self) -> int:
        """Of all heads."""
        return self.heads * self.size


class Weights:
    """The parameters of one attention as they were when something was found of them.

    All of them: which of two equal weights makes the keys shows only once one of them changes.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._seen = [(weakref.ref(p), _state_of(p)) for p in module.parameters()]

    @property
    def unchanged(self) -> bool:
        """Whether they are the same parameters, and none was written to or moved."""
        module = self._module()
        if module is None:
            return False
        now = list(module.parameters())
        return len(now) == len(self._seen) and all(
            ref() is parameter and seen == _state_of(parameter) for parameter, (ref, seen) in zip(now, self._seen)
        )


@dataclasses.dataclass(frozen=True)
class Found:
    """What was found of one attention module.

    Attributes
    ----------
    path, module
        Its path in the model, and itself.
    sides
        What makes its keys and its values, or why that is not known.
    weights
        It is true for as long as these are unchanged.
    made
        What was made of the weights, by what asked for it.
    """

    path: str
    module: weakref.ref[nn.Module]
    sides: dict[Kind, Projection | str]
    weights: Weights
    made: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def side(self, kind: Kind) -> Projection:
        """What makes the keys or the values, of a kind that was asked for."""
        answer = self.sides[kind]
        assert isinstance(answer, Projection)
        return answer

    def serves(self, kinds: Iterable[Kind]) -> bool:
        """Whether it still holds, and says what is asked of it."""
        return self.weights.unchanged and all(isinstance(self.sides[kind], Projection) for kind in kinds)

    def linear(self, kind: Kind) -> nn.Linear:
        """The linear that makes them."""
        linear: nn.Linear = getattr(self.module(), self.side(kind).linear)
        return linear

    @property
    def log_condition(self) -> float:
        """Of the condition numbers of both weights together; computed once."""
        if "log_condition" not in self.made:
            weights = [self.linear(kind).weight for kind in KINDS]
            self.made["log_condition"] = sum(map(progressive.log_condition, weights))
        return float(self.made["log_condition"])


_found: weakref.WeakKeyDictionary[nn.Module, Found] = weakref.WeakKeyDictionary()


def look(model: nn.Module, layers: Iterable[int], kinds: Iterable[Kind]) -> dict[int, Found]:
    """What makes keys and values in ``layers`` of ``model``; tried again if weights changed or a kind is not known."""
    modules = {index: (path, module) for index, path, module in attention_modules(model, list(layers))}
    held = [_found.get(module) for _, module in modules.values()]
    if not all(found is not None and found.serves(kinds) for found in held):
        for index, answer in rope.try_attentions(model, list(modules), _look).items():
            path, module = modules[index]
            sides: dict[Kind, Projection | str] = {k: answer for k in KINDS} if isinstance(answer, str) else answer
            _found[module] = Found(path, weakref.ref(module), sides, Weights(module))
    return {index: _found[module] for index, (_, module) in modules.items()}


def find(model: nn.Module, asked: Mapping[int, str], kinds: Iterable[Kind]) -> dict[int, Found]:
    """What makes keys, values or both in some layers of ``model``.

    ``asked`` says of each layer what the user has asked for there. Raises :class:`CacheError`, which repeats it, for a
    layer of which that is not known.
    """
    found = look(model, asked, kinds)
    for index, what in asked.items():
        for kind in kinds:
            why = found[index].sides[kind] if index in found else f"no module has layer_idx {index}"
            if isinstance(why, str):
                raise CacheError(
                    f"layer {index}: {what} needs the projection that makes its {kind}s, and {why}; use "
                    f"{what.partition('=')[0]}=0 here (compress_kv on this layer's attention, a rule, or for the whole "
                    "cache)."
                )
    return found


def _state_of(weight: Tensor) -> tuple[int, int]:
    """What changes when a weight is written to, or moved to another dtype or device, which keeps the parameter."""
    return version_of(weight), discarded.address_of(weight)


def eps_of(norm: nn.Module) -> float | None:
    """What a norm adds under the root, by the names that models have for it; None for what is no norm."""
    found = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return float(found) if isinstance(found, float) else None


def _look(
    module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], given: Any
) -> dict[Kind, Projection | str] | str:
    """What makes keys and values of one attention, from its arguments in a call; or why that is not known."""
    hidden = hidden_in(args, kwargs)
    if hidden is None or hidden.ndim != 3:
        return f"{path} is not given hidden states [B, T, d]"
    swaps: list[tuple[Any, Any]] = []
    if given is not None:
        swaps.append((given, (torch.ones_like(given[0]), torch.zeros_like(given[1]))))
    plain = rope.states_of(module, args, kwargs, swaps)
    loud = rope.states_of(module, args, kwargs, [*swaps, (hidden, hidden * LOUDER)])
    inputs = hidden, hidden * LOUDER
    return {
        "key": _makes(module, path, inputs, (plain[0], loud[0]), "key"),
        "value": _makes(module, path, inputs, (plain[1], loud[1]), "value"),
    }


def _makes(
    module: nn.Module, path: str, inputs: tuple[Tensor, Tensor], states: tuple[Tensor | None, Tensor | None], kind: Kind
) -> Projection | str:
    """What makes ``states`` of ``inputs``, both as they were seen and for a louder input."""
    plain, loud = states
    if plain is None or loud is None or plain.ndim != 4 or plain.shape != loud.shape:
        return f"{path} did not give its {kind}s to the cache in a trial call"
    _, heads, tokens, size = plain.shape
    if tokens != inputs[0].shape[1] or not bool(plain.any()):
        return f"the {kind}s that {path} gives are all zero, or not of its tokens"
    norms: list[tuple[str, float, Any]] = [("", 0.0, None)]
    for name, child in module.named_children() if kind == "key" else ():
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and weight.shape == (size,) and eps_of(child) is not None:
            norms += [(name, 0.0, child), (name, 1.0, child)]
    for name, linear in module.named_children():
        if not isinstance(linear, nn.Linear) or not _is_plain(linear, heads * size):
            continue
        for norm, offset, child in norms:
            if all(_same(_states(linear, x, heads, child, offset), seen) for x, seen in zip(inputs, (plain, loud))):
                return Projection(name, norm, offset, heads, size)
    held = ", ".join(f"{name} ({type(child).__name__})" for name, child in module.named_children())
    behind = ", with a norm of each head or none" if kind == "key" else ""
    return (
        f"no nn.Linear of {path} with a weight of its own makes its {heads} x {size} channels of the hidden states"
        f"{behind}: it holds {held or 'no modules'}. Projections that are fused, quantised by another library, "
        "clipped, or have an adapter are left alone"
    )


def _is_plain(linear: nn.Linear, outputs: int) -> bool:
    """Whether a linear is no subclass, and has ``outputs`` and a floating-point weight of its own."""
    own = type(linear) is nn.Linear and type(linear.weight) is nn.Parameter
    return own and linear.out_features == outputs and linear.weight.is_floating_point()


def _states(linear: nn.Linear, hidden: Tensor, heads: int, norm: Any, offset: float) -> Tensor:
    """Keys or values ``[B, G, T, D]`` of hidden states as ``linear`` and ``norm`` would make them."""
    with torch.no_grad():
        # Without the hooks of the module, which factors would not know of.
        raw = nn.functional.linear(hidden, linear.weight, linear.bias)
        keys: Tensor = raw.unflatten(2, (heads, -1)).transpose(1, 2).float()
        if norm is None:
            return keys
        eps = eps_of(norm)
        assert eps is not None  # others are no candidates
        scaled: Tensor = keys * (keys.square().mean(-1, keepdim=True) + eps).rsqrt()
        weight: Any = norm.weight
        scaled *= weight.float() + offset
        return scaled


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two ways to the same keys differ by a few roundings only."""
    bound = 8 * torch.finfo(theirs.dtype).eps * float(theirs.abs().max())
    return ours.shape == theirs.shape and float((ours - theirs.float()).abs().max()) <= bound
