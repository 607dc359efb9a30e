"""Keys as latents at run time: the ranks and the factors of the projections that make the keys of each layer.

Which linear that is, :mod:`effcompile.runtime.projection` finds. The first ``r`` singular directions of its weight are
found once for each model and rank (LoRC, arXiv 2410.03111); see :mod:`effcompile.kernels.latent` for what is made of
them, and :mod:`effcompile.runtime.progressive` for ranks that fall with depth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effcompile.kernels import latent
from effcompile.kernels.form import FormError, KVForm, is_share
from effcompile.runtime import discarded, progressive
from effcompile.runtime.layer import lasting
from effcompile.runtime.projection import KINDS, Found, Weights, eps_of, find


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

    def __init__(self, found: Found, rank: int) -> None:
        module, made_of, linear = found.module(), found.side("key"), found.linear("key")
        assert module is not None
        discarded.refuse(module, f"latent={rank}")
        norm: Any = getattr(module, made_of.norm) if made_of.norm else None
        with lasting(), torch.no_grad():
            basis, down = latent.factorise(linear.weight, rank)
            weight = None if norm is None else norm.weight + made_of.offset
            self.up = latent.operand(basis, made_of.heads, linear.bias, weight)
            self.down = down.to(linear.weight.dtype).contiguous()
        self.eps = None if norm is None else eps_of(norm)
        self.weights: Weights = found.weights
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


def planned(model: nn.Module, forms: Sequence[KVForm], layers: Sequence[int]) -> list[KVForm]:
    """``forms`` with ranks in place of every share of the channels of ``layers``, by LoRC's schedule.

    Layers with the same share are planned together. A layer that keeps all its channels keeps whole keys.

    Raises
    ------
    CacheError
        For a layer whose projections of keys and values could not be shown.
    FormError
        For a share that the smallest ranks exceed.
    """
    new = list(forms)
    for kept in dict.fromkeys(forms[i].latent for i in layers if is_share(forms[i].latent)):
        chosen = [i for i in layers if forms[i].latent == kept]
        found = find(model, dict.fromkeys(chosen, f"latent={kept}"), KINDS)
        whole = [found[i].side("key").channels for i in chosen]
        logs = [found[i].log_condition for i in chosen]
        try:
            ranks = progressive.ranks(logs, whole, float(kept), [forms[i].step("key") for i in chosen])
        except ValueError as wrong:
            raise FormError(f"latent={kept}: {wrong} of the keys of layers {chosen}; give a larger share.") from None
        for i, rank, channels in zip(chosen, ranks, whole):
            new[i] = dataclasses.replace(forms[i], latent=0 if rank == channels else rank)
    return new


def factors(model: nn.Module, ranks: Mapping[int, int]) -> dict[int, Factor]:
    """The factors of the layers of ``model`` in ``ranks``, each at its rank; made once while weights stay as they are.

    Raises
    ------
    CacheError
        For a layer whose projection could not be shown; the error names it and says why.
    FormError
        For a rank beyond the channels of a layer's keys.
    """
    if not ranks:
        return {}
    made = {}
    for index, found in find(model, {i: f"latent={rank}" for i, rank in ranks.items()}, ["key"]).items():
        rank, whole = ranks[index], found.side("key").channels
        if rank > whole:
            raise FormError(
                f"layer {index}: latent={rank} is more than the {whole} channels that the keys of {found.path} have in "
                f"all; choose at most {whole}."
            )
        if rank not in found.made:
            found.made[rank] = Factor(found, rank)
        made[index] = found.made[rank]
    return made
