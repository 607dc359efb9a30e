"""Find layers: a residual block that holds attention and a feed-forward block or a mixture of experts.

Attention and the blocks between it and the next attention belong together. Each must lead back to the stream it reads:
an addition of what it makes to something that its input was made from. In sequence or side by side, with the norm
before, after or both: nothing else is asked. A layer may hold two attentions, as a decoder of an encoder-decoder does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from torch import fx

from effcompile.patterns.attention import AttentionSite, Unmatched
from effcompile.patterns.ffn import FeedForwardSite
from effcompile.patterns.linear import input_of
from effcompile.patterns.moe import ExpertsSite
from effcompile.patterns.site import Site
from effcompile.patterns.walk import aten, is_call, strip_casts

Attention = AttentionSite | Unmatched
Block = FeedForwardSite | ExpertsSite

_ADDITIONS = (aten.add.Tensor, aten.add_.Tensor)
_REACH = 400
"""Nodes that are looked at upward of a part, for the stream that it reads: a norm and projections are some thirty."""


@dataclasses.dataclass
class LayerSite(Site):
    """One layer. ``anchor`` is the last addition to the stream, whose value leaves the layer or is normalised."""

    kind: ClassVar[str] = "layer"

    attentions: tuple[Attention, ...]
    blocks: tuple[Block, ...]

    @property
    def module(self) -> str:
        """The module that all parts are in."""
        paths = [site.module.split(".") for site in (*self.attentions, *self.blocks)]
        same = [names[0] for names in zip(*paths, strict=False) if len(set(names)) == 1]
        return ".".join(same)


def find_layers(gm: fx.GraphModule, attentions: Sequence[Attention], blocks: Sequence[Block]) -> list[LayerSite]:
    """All layers of a normalised graph, in graph order, from its attentions, feed-forward blocks and mixtures."""
    parts: list[Attention | Block] = sorted((*attentions, *blocks), key=lambda part: _end(part))
    groups: list[list[Attention | Block]] = []
    for part in parts:
        begins = isinstance(part, Attention) and (not groups or not isinstance(groups[-1][-1], Attention))
        if begins:
            groups.append([])
        if groups:
            groups[-1].append(part)
    found = []
    for group in groups:
        additions: dict[int, fx.Node | None] = {}
        streams: dict[fx.Node, fx.Node] = {}
        for part in group:
            addition, stream = _addition(part, streams)
            additions[id(part)] = addition
            if addition is not None and stream is not None:
                streams[addition] = stream
        own = tuple(p for p in group if isinstance(p, Attention) and additions[id(p)] is not None)
        held = tuple(p for p in group if not isinstance(p, Attention) and additions[id(p)] is not None)
        if own and held:
            last = max(node for p in (*own, *held) if (node := additions[id(p)]) is not None)
            found.append(LayerSite(last, own, held))
    return found


def _end(part: Attention | Block) -> fx.Node:
    return part.output if isinstance(part, AttentionSite) else part.anchor


def _input(part: Attention | Block) -> fx.Node:
    if isinstance(part, AttentionSite):
        return part.query
    if isinstance(part, FeedForwardSite):
        return input_of(part.ups[0])
    return input_of(part.anchor) if isinstance(part, ExpertsSite) else part.anchor


def _addition(part: Attention | Block, earlier: dict[fx.Node, fx.Node]) -> tuple[fx.Node | None, fx.Node | None]:
    """The addition of what ``part`` makes to a stream that its input was made from, and that stream.

    Side by side, what it is added to may be the sum of the stream and of an ``earlier`` part.
    """
    stream: set[fx.Node] = set()
    queue = [_input(part)]
    while queue and len(stream) < _REACH:
        node = queue.pop(0)
        if node not in stream:
            stream.add(node)
            queue += node.all_input_nodes
    stream = {strip_casts(node) for node in stream}
    node = _end(part)
    made = {node}
    while (node := node.next).op != "root":
        if made.isdisjoint(node.all_input_nodes):
            continue
        if is_call(node, *_ADDITIONS):
            sides = [a for a in node.args[:2] if isinstance(a, fx.Node)]
            rest = [strip_casts(a) for a in sides if a not in made]
            if len(sides) == 2 and len(rest) == 1:
                found = rest[0] if rest[0] in stream else earlier.get(rest[0])
                if found in stream:
                    return node, found
        made.add(node)
    return None, None
