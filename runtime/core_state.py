"""The neurons that feed-forward blocks have chosen for a text (``ec.coreinfer``), for the user to read and forget."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effcompile.runtime.router_state import states


def core_neurons(model: nn.Module) -> dict[str, Tensor]:
    """The neurons with which each block goes on with the text, or the texts of a batch, that ``model`` read last.

    They are chosen by calls of several tokens, of which the first begins a text, for :func:`effcompile.coreinfer`.

    Returns
    -------
    dict
        Block (its last linear) -> int32 ``[texts, kept]``, ascending, a copy on its device; ``[0, 0]`` where the next
        token finds no choice, so that all neurons are used. Empty before the first call.
    """
    model = getattr(model, "_orig_mod", model)
    texts = states("text", model)
    found = {}
    for name, core in states("core", model).items():
        rows = int(texts[name][1])
        kept = int((core[:1] >= 0).sum()) if rows else 0
        found[name] = core[:rows, :kept].detach().clone()
    return found


def forget_core_neurons(model: nn.Module) -> None:
    """Let every block of ``model`` use all its neurons until a new text begins."""
    with torch.no_grad():
        for text in states("text", getattr(model, "_orig_mod", model)).values():
            text.zero_()
