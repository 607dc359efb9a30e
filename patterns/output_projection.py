"""Find the linear behind the heads of an attention: the place where heads are removed.

Its input must be the heads side by side, in their order, whatever views lead there; elements may be multiplied on the
way, as by a gate. That is not read off but followed: a head of the input leads up to that head of the attention.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import fx

from effcompile.kernels.reason import Reason
from effcompile.patterns.attention import AttentionSite, Unmatched
from effcompile.patterns.linear import Linear, is_linear, operands_of
from effcompile.patterns.narrow import Kept, narrowing, written
from effcompile.patterns.site import Site
from effcompile.patterns.walk import shape

_REACH = 12
"""Nodes between attention and its projection at most."""


@dataclasses.dataclass
class HeadsSite(Site):
    """The heads of an attention, and the linear that reads them. ``anchor`` is that linear.

    ``heads`` are those of the queries, ``groups`` those of keys and values. A head of the values has ``size`` channels,
    one of the keys ``key_size``.
    """

    kind: ClassVar[str] = "heads"

    linear: Linear
    heads: int
    groups: int
    size: int
    key_size: int
    projections: dict[str, fx.Node | None]
    """The linears of query, key and value, where they are known; one node for all three if fused."""
    inside: str
    """The module that the attention is in."""
    number: int = 0
    """How many come before it under the same name."""

    @property
    def label(self) -> str:
        """What a plan calls it: the module of the linear; with ``#heads`` where that is the attention's own."""
        own = "#heads" if self.module == self.inside else ""
        return self.module + (own or "#" * bool(self.number)) + (str(self.number) if self.number else "")

    @property
    def output(self) -> fx.Node:
        """The node that a rewrite replaces: the linear."""
        return self.anchor


@dataclasses.dataclass
class NoHeads(Site):
    """Attention whose heads cannot be removed, and why."""

    kind: ClassVar[str] = "heads"

    reason: Reason

    @property
    def output(self) -> fx.Node:
        """The node that nothing replaces."""
        return self.anchor


def find_output_projections(found: Sequence[AttentionSite | Unmatched]) -> list[HeadsSite | NoHeads]:
    """The heads of each attention of a graph, in graph order, or why they cannot be told."""
    sites: list[HeadsSite | NoHeads] = []
    before: Counter[str] = Counter()
    changed: set[Any] | None = None
    for attention in found:
        if isinstance(attention, Unmatched):
            sites.append(NoHeads(attention.anchor, attention.reason))
            continue
        if changed is None:
            changed = written(attention.anchor.graph)
        site = _behind(attention, changed)
        if isinstance(site, Reason):
            sites.append(NoHeads(attention.anchor, site))
            continue
        site.number = before[site.module]
        before[site.module] += 1
        sites.append(site)
    return sites


def _behind(attention: AttentionSite, changed: set[Any]) -> HeadsSite | Reason:
    def no(text: str) -> Reason:
        return Reason("no-output-projection", text, attention.source)

    node = attention.output
    for _ in range(_REACH):
        users = list(node.users)
        if len(users) != 1:
            return no(f"the result of the heads is read {len(users)} times before a linear")
        before, node = node, users[0]
        if is_linear(node):
            break
    else:
        return no("no linear reads the result of the heads")
    linear = operands_of(node)
    if linear is None or linear.input is not before:
        return no("the linear behind the heads has a weight that is computed in the graph")
    heads, groups, size = shape(attention.query)[1], shape(attention.key)[1], shape(attention.value)[3]
    channels = shape(before)[-1]
    if channels != heads * size:
        return no(f"the linear behind {heads} heads of {size} channels reads {channels} channels")
    for head in {0, heads - 1} if heads > 1 else ():
        own = Kept(len(shape(before)) - 1, tuple(range(head * size, (head + 1) * size)))
        way = narrowing(node, before, own, changed, takes=lambda _: False)
        asked = own if before is attention.output else None
        asked = next((w[attention.output] for w in way.wants.values() if attention.output in w), asked)
        if asked != Kept(1, (head,)):
            return no("the linear behind the heads does not read them side by side, each as attention made it")
    sizes = heads, groups, size, shape(attention.query)[3]
    return HeadsSite(node, linear, *sizes, attention.projections, attention.module)
