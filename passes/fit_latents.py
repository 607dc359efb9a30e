"""Which directions of keys and values latents keep, found on text: whitened factors with the mean put back.

LoRC (Zhang et al., 2024, arXiv 2410.03111) cuts the weights by themselves. A direction of the outputs in which a weight
is small may meet inputs that are large, as it does where a model cancels an outlier that all hidden states share; cut
under the covariance of what the projection reads, what is left out is what says least on the text (SVD-LLM, Wang et
al., ICLR 2025). The mean of what is lost is known then, and comes back as a bias.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from effcompile.kernels.form import Kind
from effcompile.passes import batches as calls
from effcompile.passes.batches import CalibrationError
from effcompile.passes.factors import left_singular, spectrum
from effcompile.runtime.adapter import hidden_in
from effcompile.runtime.cache import compressible
from effcompile.runtime.latent import FITTED, Fitted
from effcompile.runtime.layer import lasting
from effcompile.runtime.plan import digest
from effcompile.runtime.projection import KINDS, Found, Projection, look
from effcompile.runtime.second_moment import SecondMoment


def fit_latents(model: Any, batches: Iterable[Any] | None = None, *, damping: float = 1e-6) -> dict[str, int]:
    """Fit the latents of a transformers model's keys and values to text, for all caches that are made from then on.

    What was fitted stays with the attentions of the model, through ``copy.deepcopy`` and pickling, for any rank; it is
    in no ``state_dict``, and changes nothing but latents. Weights that change later need another fit.

    Parameters
    ----------
    batches
        What the model is called on: tensors of ids, or dictionaries of its arguments; a padding mask hides tokens.
        Some thousand tokens that are like those of use. Without any the weights are cut by themselves (LoRC), which
        keys stand and values of small models do not.
    damping
        Share of its mean diagonal that is added to the covariance; ten times as much until it has a root.

    Returns
    -------
    The tokens that were read, by the path of each attention that was fitted. An attention whose projections could not
    be shown is left out, and a cache that asks for latents there says why.

    Raises
    ------
    CalibrationError
        Without a token, for hidden states that are not finite, or if no attention could be fitted.

    Examples
    --------
    >>> ec.fit_latents(model, [ids])                                         # doctest: +SKIP
    >>> cache = ec.Cache(model, latent=128, value_latent=128)                # doctest: +SKIP
    """
    found = [one for one in look(model, compressible(model), ()).values() if _sides(one)]
    if not found:
        raise CalibrationError(
            f"fit_latents(...): no layer of {type(model).__name__} makes keys or values by an nn.Linear of its own "
            "that could be shown; ec.Cache(model, latent=16) says why."
        )
    moments = None if batches is None else _moments(model, found, batches)
    for one in found:
        module, made = one.module(), {}
        assert module is not None
        for kind in _sides(one):
            weight = one.linear(kind).weight
            with lasting(), torch.no_grad():
                made[kind] = _fitted(weight, None if moments is None else moments[one.path], damping, one.path)
        module.__dict__[FITTED] = made
    return {one.path: 0 if moments is None else moments[one.path].count for one in found}


def _sides(found: Found) -> list[Kind]:
    return [kind for kind in KINDS if isinstance(found.sides[kind], Projection)]


def _fitted(weight: Tensor, seen: SecondMoment | None, damping: float, path: str) -> Fitted:
    if seen is None:
        return Fitted(left_singular(weight.detach().double()).float(), None, digest(weight))
    if not seen.count:
        raise CalibrationError(
            f"fit_latents(...): {path} has read no token; give batches that the model can be called on."
        )
    try:
        one = spectrum(weight, seen, "whitened", alpha=0.0, damping=damping, mean=True)
    except ValueError as wrong:
        raise CalibrationError(f"fit_latents(...): {path}: {wrong}.") from None
    return Fitted(one.directions, one.mean, digest(weight))


def _moments(model: Any, found: list[Found], batches: Iterable[Any]) -> dict[str, SecondMoment]:
    """What the attentions read, by their paths."""
    if isinstance(batches, Tensor) or hasattr(batches, "keys"):
        raise CalibrationError("fit_latents(...): give a list of batches, such as [ids].")
    seen: dict[str, SecondMoment] = {}
    counted: list[Tensor | None] = [None]
    handles = []
    for one in found:
        module, channels = one.module(), one.linear(_sides(one)[0]).in_features
        assert module is not None
        moment = seen[one.path] = SecondMoment(channels, one.linear(_sides(one)[0]).weight.device)

        def read(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], moment: SecondMoment = moment
        ) -> None:
            hidden, mask = hidden_in(args, kwargs), counted[0]
            if hidden is not None:
                moment.update(hidden.flatten(0, 1) if mask is None else hidden[mask.to(hidden.device)])

        handles.append(module.register_forward_pre_hook(read, with_kwargs=True))
    try:
        with lasting(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for batch in batches:
                counted[0] = calls.mask_of(batch)
                calls.call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen
