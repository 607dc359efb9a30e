"""Keys and values as latents at run time: ranks and factors of the projections that make them, layer by layer.

Which linears these are, :mod:`effcompile.runtime.projection` finds. Their factors are made once for each model and rank
(LoRC, arXiv 2410.03111): of the first ``r`` left singular directions ``U`` of a weight ``W``, ``U^T W`` makes latents
and ``U`` what they stand for. The directions are those of ``W`` itself, or those of ``W S`` for inputs of covariance
``S S^T`` where a model was fitted (:mod:`effcompile.passes.fit_latents`). See :mod:`effcompile.kernels.latent` for what
is made of them, and :mod:`effcompile.runtime.progressive` for ranks that fall with depth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effcompile.kernels import latent
from effcompile.kernels.form import LATENT, FormError, Kind, KVForm, is_share
from effcompile.runtime import discarded, progressive
from effcompile.runtime.layer import CacheError, lasting
from effcompile.runtime.plan import digest
from effcompile.runtime.projection import KINDS, Found, Weights, eps_of, find

if TYPE_CHECKING:
    from effcompile.runtime.layer import CompressedLayer

FITTED = "_effcompile_latents"
"""Instance attribute of an attention with what was :class:`Fitted` to its projections, by kind."""


@dataclasses.dataclass(frozen=True, eq=False)
class Fitted:
    """In which order the directions of a projection's outputs are kept, found on text.

    Attributes
    ----------
    directions
        ``U`` ``[m, k]`` fp32, orthonormal columns, those that say most first.
    mean
        Of the inputs, fp64 ``[d]``: what is lost on average is put back as a bias. None: it is not.
    digest
        Of the weight that it was fitted to.
    """

    directions: Tensor
    mean: Tensor | None
    digest: str

    def factors(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """``U`` ``[m, r]``, ``U^T W`` ``[r, d]``, and what is to be added to the outputs, all fp64."""
        wide = weight.detach().double()
        basis = self.directions[:, :rank].to(wide)
        down = basis.mT @ wide
        if self.mean is None:
            return basis, down, None
        mean = self.mean.to(wide)
        return basis, down, wide @ mean - basis @ (down @ mean)


class Factor:
    """The factors of one layer's projection of keys, or of values, at one rank.

    Attributes
    ----------
    asked
        What the user has asked for, such as ``latent=128``.
    down
        ``U^T W`` ``[r, d]`` in the dtype of the weight: makes latents of hidden states.
    rebuilds
        The arguments of ``kv_load`` and ``attend`` that the other factor is in (:mod:`effcompile.kernels.latent`).
    weights
        What it was made of, and stands for as long as that is unchanged.
    """

    def __init__(self, found: Found, kind: Kind, rank: int, fitted: Fitted | None) -> None:
        module, made_of, linear = found.module(), found.side(kind), found.linear(kind)
        assert module is not None
        self.asked = f"{LATENT[kind]}={rank}"
        discarded.refuse(module, self.asked)
        with lasting(), torch.no_grad():
            shift: Tensor | None = None
            if fitted is None:
                basis, down = latent.factorise(linear.weight, rank)
            else:
                basis, down, shift = fitted.factors(linear.weight, rank)
            bias = linear.bias if shift is None else shift if linear.bias is None else shift + linear.bias
            if kind == "key":
                norm: Any = getattr(module, made_of.norm) if made_of.norm else None
                weight = None if norm is None else norm.weight + made_of.offset
                self.rebuilds: dict[str, Any] = {"up": latent.operand(basis, made_of.heads, bias, weight)}
                self.rebuilds |= {} if norm is None else {"eps": eps_of(norm)}
            else:
                self.rebuilds = {"value_up": latent.value_operand(basis, made_of.heads, bias)}
            self.down = down.to(linear.weight.dtype).contiguous()
        self.weights: Weights = found.weights
        for tensor in (self.down, *self.rebuilds.values()):
            if isinstance(tensor, Tensor):
                torch._dynamo.mark_static_address(tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> Factor:
        """The same: copies of a cache are for the same model."""
        return self

    def latents(self, hidden: Tensor) -> Tensor:
        """``[B, 1, T, r]`` of hidden states ``[B, T, d]``."""
        return nn.functional.linear(hidden, self.down).unsqueeze(1)


def planned(model: nn.Module, forms: Sequence[KVForm], layers: Sequence[int]) -> list[KVForm]:
    """``forms`` with ranks in place of every share of the channels of ``layers``, by LoRC's schedule.

    Layers with the same share are planned together. A layer that keeps all its channels keeps whole keys, or values,
    unless the form has none of that size: then latents of full rank.

    Raises
    ------
    CacheError
        For a layer whose projections of keys and values could not be shown.
    FormError
        For a share that the smallest ranks exceed.
    """
    new = list(forms)
    for kind, name in LATENT.items():
        given = {i: getattr(forms[i], name) for i in layers if is_share(getattr(forms[i], name))}
        for kept in dict.fromkeys(given.values()):
            chosen = [i for i, share in given.items() if share == kept]
            found = find(model, dict.fromkeys(chosen, f"{name}={kept}"), KINDS)
            whole = [found[i].side(kind).channels for i in chosen]
            logs = [found[i].log_condition for i in chosen]
            try:
                ranks = progressive.ranks(logs, whole, kept, [forms[i].step(kind) for i in chosen])
            except ValueError as wrong:
                raise FormError(
                    f"{name}={kept}: {wrong} of the {kind}s of layers {chosen}; give a larger share."
                ) from None
            for i, rank, channels in zip(chosen, ranks, whole):
                rest = None if rank < channels else _without(new[i], kind, found[i].side(kind).size)
                step = forms[i].step(kind)
                changed: dict[str, Any] = {name: rank // step * step}
                new[i] = rest or dataclasses.replace(new[i], **changed)
    return new


def _without(form: KVForm, kind: Kind, size: int) -> KVForm | None:
    """``form`` with whole keys, or values, of heads of ``size`` channels; None where these cannot be kept so."""
    whole: dict[str, Any] = {LATENT[kind]: 0}
    try:
        made = dataclasses.replace(form, **whole)
        made.check_head(kind, size)
    except FormError:
        return None
    # Beside latents of keys in other layers there are no keys before RoPE.
    return None if kind == "key" and made.rope != "post" else made


def factors(model: nn.Module, forms: Mapping[int, KVForm]) -> dict[int, dict[Kind, Factor]]:
    """The factors of the layers in ``forms``, by kind; made once while weights and what was fitted stay as they are.

    Raises
    ------
    CacheError
        For a layer whose projection could not be shown, or whose values were not fitted; the error names it.
    FormError
        For a rank beyond the channels of a layer's keys, or values.
    """
    made: dict[int, dict[Kind, Factor]] = {index: {} for index in forms}
    for kind, name in LATENT.items():
        ranks = {index: form.rank(kind) for index, form in forms.items() if form.rank(kind)}
        asked = {index: f"{name}={rank}" for index, rank in ranks.items()}
        for index, found in (find(model, asked, [kind]) if asked else {}).items():
            made[index][kind] = _factor(found, kind, ranks[index], f"layer {index}: {asked[index]}")
    return made


def _factor(found: Found, kind: Kind, rank: int, where: str) -> Factor:
    module, whole = found.module(), found.side(kind).channels
    if rank > whole:
        raise FormError(
            f"{where} is more than the {whole} channels that the {kind}s of {found.path} have in all; choose at most "
            f"{whole}."
        )
    fitted: Fitted | None = module.__dict__.get(FITTED, {}).get(kind)
    if fitted is not None:
        if fitted.digest != digest(found.linear(kind).weight):
            raise CacheError(
                f"{where}: ec.fit_latents was called for other weights of {found.path} than it has now; call it again."
            )
        if rank > (most := fitted.directions.shape[1]):
            raise FormError(f"{where} is more than the {most} channels of its hidden states; choose at most {most}.")
    elif kind == "value" and rank < whole:
        raise CacheError(
            f"{where}: call ec.fit_latents(model, batches) first, on some text. By the weights alone the values of "
            "small models lose far more than their keys; ec.fit_latents(model) asks for that."
        )
    key = kind, rank, fitted
    if key not in found.made:
        found.made[key] = Factor(found, kind, rank, fitted)
    factor: Factor = found.made[key]
    return factor


def outdated(layer: CompressedLayer) -> str:
    """Why the factors of a layer are no longer those of the model's weights; '' if they are."""
    for kind, factor in (("key", layer.factor), ("value", layer.value_factor)):
        if factor is not None and not factor.weights.unchanged:
            return (
                f"layer {layer.index}: the weights that make its {kind}s were changed or replaced since the cache was "
                f"made of their factors ({factor.asked}); make a new cache."
            )
    return ""
