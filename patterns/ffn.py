"""Find feed-forward blocks: ``down(act(up(x)))``, and gated, ``down(act(gate(x)) * up(x))``.

The search starts at each linear and goes up through arithmetic on elements. It is a block's last linear if there is an
activation on the way, every way ends at a linear of one and the same input, and it leads back to the width of that.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import ClassVar

from torch import fx

from effcompile.patterns.linear import VIEWS, input_of, is_linear
from effcompile.patterns.site import Site
from effcompile.patterns.walk import aten, is_call, same_size, shape

ACTIVATIONS = (
    aten.silu.default,
    aten.gelu.default,
    aten.relu.default,
    aten.tanh.default,
    aten.sigmoid.default,
    aten.erf.default,
    aten.silu_.default,
    aten.relu_.default,
    aten.elu.default,
    aten.leaky_relu.default,
    aten.mish.default,
)
_ELEMENTWISE = (
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.pow.Tensor_Scalar,
    aten.square.default,
    aten.clamp.default,
    aten.dropout.default,
    aten.to.dtype,
    aten.contiguous.default,
    aten.clone.default,
    *VIEWS,
)
_PARTS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)


@dataclasses.dataclass
class FeedForwardSite(Site):
    """A feed-forward block. ``ups`` are the linears into it: one, or gate and up; one for both if ``gated`` is set."""

    kind: ClassVar[str] = "ffn"

    ups: tuple[fx.Node, ...]
    activation: fx.Node
    gated: bool

    @property
    def down(self) -> fx.Node:
        """The linear out of the block."""
        return self.anchor


def find_feed_forward(gm: fx.GraphModule) -> list[FeedForwardSite]:
    """All feed-forward blocks of a normalised graph, in graph order."""
    found = [_block(node) for node in gm.graph.nodes if is_linear(node)]
    return [site for site in found if site is not None]


def _block(down: fx.Node) -> FeedForwardSite | None:
    queue, seen = [input_of(down)], set()
    ups: list[fx.Node] = []
    activation, halves = None, False
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_linear(node):
            ups.append(node)
        elif is_call(node, *ACTIVATIONS):
            activation = node
            queue += node.all_input_nodes
        elif is_call(node, operator.getitem, *_PARTS):
            halves = True
            queue += node.all_input_nodes[:1]
        elif is_call(node, *_ELEMENTWISE) and len(seen) < 40:
            queue += node.all_input_nodes
        else:
            return None
    if not ups or activation is None or len({input_of(up) for up in ups}) != 1:
        return None
    if not same_size(shape(input_of(ups[0]))[-1], shape(down)[-1]):
        return None
    return FeedForwardSite(down, tuple(sorted(ups)), activation, halves or len(ups) > 1)
