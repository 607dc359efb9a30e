"""Keys as latents at run time: which projection makes the keys of a layer, shown by trying it, and its factors.

What stands between the hidden state and the keys no config says for sure: which module projects, with a bias or not,
with a norm behind it. So it is tried, as rotations are (:mod:`effcompile.runtime.rope`): every attention is run on a
few tokens with angles of 0, and its keys must be those of one of its own ``nn.Linear``, with a norm of heads behind it
or none, also for an input many times as large. Nothing of the model is changed: a tied weight stays tied, and a layer
of another library, whose weight is not its own, is refused.

The first ``r`` singular directions of that weight are found once for each model and rank (LoRC, arXiv 2410.03111); see
:mod:`effcompile.kernels.latent` for what is made of them.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from effcompile.kernels import latent
from effcompile.kernels.form import FormError
from effcompile.runtime import discarded, rope
from effcompile.runtime.adapter import attention_modules, hidden_in
from effcompile.runtime.layer import CacheError, lasting
from effcompile.runtime.plan import version_of

LOUDER = 64.0
"""The input is tried this many times as large too: a projection that is clipped, or not linear, shows there."""

WHAT_TO_DO = "use latent=0 here (compress_kv on this layer's attention, a rule, or for the whole cache)"


@dataclasses.dataclass(frozen=True)
class Projection:
    """What makes one layer's keys, before their rotation, of the attention's hidden state.

    Attributes
    ----------
    linear, norm
        Names of the attention's children; no norm: ``""``.
    offset
        What is added to the weight of the norm: 1 in models that keep it around 0.
    heads, size
        ``G`` and ``D``.
    """

    linear: str
    norm: str
    offset: float
    heads: int
    size: int


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


class Factor:
    """The factors of one layer's key projection at one rank.

    Attributes
    ----------
    down
        ``U^T W`` ``[r, d]`` in the dtype of the weight: makes latents of hidden states.
    up, eps
        What makes keys of latents (:mod:`effcompile.kernels.latent`).
    weights
        What it was made of, and stands for as long as that is unchanged.
    """

    def __init__(self, module: nn.Module, made_of: Projection, rank: int, weights: Weights) -> None:
        discarded.refuse(module, f"latent={rank}")
        linear: nn.Linear = getattr(module, made_of.linear)
        norm: Any = getattr(module, made_of.norm) if made_of.norm else None
        with lasting(), torch.no_grad():
            basis, down = latent.factorise(linear.weight, rank)
            weight = None if norm is None else norm.weight + made_of.offset
            self.up = latent.operand(basis, made_of.heads, linear.bias, weight)
            self.down = down.to(linear.weight.dtype).contiguous()
        self.eps = None if norm is None else _eps(norm)
        self.weights = weights
        for tensor in (self.up, self.down):
            torch._dynamo.mark_static_address(tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> Factor:
        """The same: copies of a cache are for the same model."""
        return self

    @property
    def rebuilds(self) -> dict[str, Any]:
        """The arguments of ``kv_load`` and ``attend`` that make keys of the latents."""
        return {"up": self.up} if self.eps is None else {"up": self.up, "eps": self.eps}

    def latents(self, hidden: Tensor) -> Tensor:
        """``[B, 1, T, r]`` of hidden states ``[B, T, d]``."""
        return nn.functional.linear(hidden, self.down).unsqueeze(1)


@dataclasses.dataclass(frozen=True)
class Found:
    """What was found of one attention module, and made of it by rank."""

    projection: Projection
    weights: Weights
    factors: dict[int, Factor] = dataclasses.field(default_factory=dict)


_found: weakref.WeakKeyDictionary[nn.Module, Found] = weakref.WeakKeyDictionary()


def factors(model: nn.Module, ranks: Mapping[int, int]) -> dict[int, Factor]:
    """The factors of the layers of ``model`` in ``ranks``, each at its rank; found once while weights stay as they are.

    Raises
    ------
    CacheError
        For a layer whose projection could not be shown; the error names it and says why.
    FormError
        For a rank beyond the channels of a layer's keys.
    """
    modules = {index: (path, module) for index, path, module in attention_modules(model, ranks)}
    held = [_found.get(modules[index][1]) if index in modules else None for index in ranks]
    if not all(found is not None and found.weights.unchanged for found in held):
        for index, answer in rope.try_attentions(model, list(ranks), _look).items():
            if isinstance(answer, str):
                raise CacheError(
                    f"layer {index}: latent={ranks[index]} needs the projection that makes its keys, and {answer}; "
                    f"{WHAT_TO_DO}."
                )
            module = modules[index][1]
            _found[module] = Found(answer, Weights(module))
    made = {}
    for index, rank in ranks.items():
        path, module = modules[index]
        found = _found[module]
        whole = found.projection.heads * found.projection.size
        if rank > whole:
            raise FormError(
                f"layer {index}: latent={rank} is more than the {whole} channels that the keys of {path} have in all; "
                f"choose at most {whole}."
            )
        if rank not in found.factors:
            found.factors[rank] = Factor(module, found.projection, rank, found.weights)
        made[index] = found.factors[rank]
    return made


def _state_of(weight: Tensor) -> tuple[int, int]:
    """What changes when a weight is written to, or moved to another dtype or device, which keeps the parameter."""
    return version_of(weight), discarded.address_of(weight)


def _eps(norm: nn.Module) -> float | None:
    found = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return float(found) if isinstance(found, float) else None


def _look(module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], given: Any) -> Projection | str:
    """What makes the keys of one attention, from its arguments in a call; or why that is not known."""
    hidden = hidden_in(args, kwargs)
    if hidden is None or hidden.ndim != 3:
        return f"{path} is not given hidden states [B, T, d]"
    swaps: list[tuple[Any, Any]] = []
    if given is not None:
        swaps.append((given, (torch.ones_like(given[0]), torch.zeros_like(given[1]))))
    plain = rope.keys_of(module, args, kwargs, swaps)
    loud = rope.keys_of(module, args, kwargs, [*swaps, (hidden, hidden * LOUDER)])
    if plain is None or loud is None or plain.ndim != 4 or plain.shape != loud.shape:
        return f"{path} did not give its keys to the cache in a trial call"
    _, heads, tokens, size = plain.shape
    if tokens != hidden.shape[1] or not bool(plain.any()):
        return f"the keys that {path} gives are all zero, or not of its tokens"
    norms: list[tuple[str, float, Any]] = [("", 0.0, None)]
    for name, child in module.named_children():
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and weight.shape == (size,) and _eps(child) is not None:
            norms += [(name, 0.0, child), (name, 1.0, child)]
    for name, linear in module.named_children():
        if not isinstance(linear, nn.Linear) or not _is_plain(linear, heads * size):
            continue
        for norm, offset, child in norms:
            if all(
                _same(_keys(linear, x, heads, child, offset), seen)
                for x, seen in ((hidden, plain), (hidden * LOUDER, loud))
            ):
                return Projection(name, norm, offset, heads, size)
    held = ", ".join(f"{name} ({type(child).__name__})" for name, child in module.named_children())
    return (
        f"no nn.Linear of {path} with a weight of its own makes its {heads} x {size} channels of the hidden states, "
        f"with a norm of each head or none: it holds {held or 'no modules'}. Projections that are fused, quantised by "
        "another library, clipped, or have an adapter are left alone"
    )


def _is_plain(linear: nn.Linear, outputs: int) -> bool:
    """Whether a linear is no subclass, and has ``outputs`` and a floating-point weight of its own."""
    own = type(linear) is nn.Linear and type(linear.weight) is nn.Parameter
    return own and linear.out_features == outputs and linear.weight.is_floating_point()


def _keys(linear: nn.Linear, hidden: Tensor, heads: int, norm: Any, offset: float) -> Tensor:
    """Keys ``[B, G, T, D]`` of hidden states as ``linear`` and ``norm`` would make them."""
    with torch.no_grad():
        # Without the hooks of the module, which factors would not know of.
        raw = nn.functional.linear(hidden, linear.weight, linear.bias)
        keys: Tensor = raw.unflatten(2, (heads, -1)).transpose(1, 2).float()
        if norm is None:
            return keys
        eps = _eps(norm)
        assert eps is not None  # others are no candidates
        scaled: Tensor = keys * (keys.square().mean(-1, keepdim=True) + eps).rsqrt()
        weight: Any = norm.weight
        scaled *= weight.float() + offset
        return scaled


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two ways to the same keys differ by a few roundings only."""
    bound = 8 * torch.finfo(theirs.dtype).eps * float(theirs.abs().max())
    return ours.shape == theirs.shape and float((ours - theirs.float()).abs().max()) <= bound
