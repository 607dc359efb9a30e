"""The text that a router of token ids has read (``ec.read_me``), for the user to look at and forget."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from effcompile.runtime.router_state import states


class RoutedText(NamedTuple):
    """What a router knows of its text, or the texts of a batch.

    Parameters
    ----------
    place
        Of the next token.
    texts
        How many there are; 0 before the first call.
    elsewhere
        How many calls began neither a text nor at this place, so that the router saw none of what was before them.
    """

    place: int
    texts: int
    elsewhere: int


def routed_text(model: nn.Module) -> dict[str, RoutedText]:
    """Where the router of ``model`` (:func:`effcompile.read_me`) stands in its text, by the module of token ids.

    Waits for the device. Empty before the first call.
    """
    found = states("route_text", getattr(model, "_orig_mod", model))
    return {name: RoutedText(*map(int, text.tolist())) for name, text in found.items()}


def forget_routed_text(model: nn.Module) -> None:
    """Let the router of ``model`` see nothing of what it has read, and count anew."""
    with torch.no_grad():
        for text in states("route_text", getattr(model, "_orig_mod", model)).values():
            text.zero_()
