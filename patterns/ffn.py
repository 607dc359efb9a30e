"""Find feed-forward blocks: ``down(act(up(x)))``, and gated, ``down(act(gate(x)) * up(x))``.

The search starts at each linear and goes up through arithmetic on elements. It is a block's last linear if there is an
activation on the way, every way ends at a linear of one and the same input, and it leads back to the width of that.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx

from effcompile.kernels.ffn import ACTIVATIONS as NAMED
from effcompile.kernels.reason import Reason
from effcompile.patterns.linear import VIEWS, Linear, input_of, is_linear, operands_of
from effcompile.patterns.site import Site
from effcompile.patterns.walk import aten, is_call, module_path, operand, same_size, shape, value

if TYPE_CHECKING:
    from effcompile.patterns.text import Text

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
    between: frozenset[fx.Node] = frozenset()
    """The calls between the linears, arithmetic on elements all of them."""
    number: int = 0
    """How many blocks of the same module come before it in the graph."""
    text: Callable[[], Text | Reason] | None = None
    """Its tokens, or why they are not known (:func:`effcompile.patterns.text.locate`)."""
    depth: float = 0.0
    """The share of the graph's blocks that come before it."""

    @property
    def down(self) -> fx.Node:
        """The linear out of the block."""
        return self.anchor

    @property
    def label(self) -> str:
        """``module``, or ``module#1`` for the second block in one module, as hand-written models have them."""
        return self.module + (f"#{self.number}" if self.number else "")

    @property
    def middle(self) -> fx.Node:
        """What the linear out of the block reads."""
        middle: fx.Node = operand(self.anchor, 1 if is_call(self.anchor, aten.addmm.default) else 0)
        return middle

    @property
    def output(self) -> fx.Node:
        """The node that a rewrite replaces: the linear out of the block."""
        return self.anchor

    @property
    def module(self) -> str:
        """The module that all linears are in."""
        paths = [module_path(node).split(".") for node in (*self.ups, self.anchor)]
        same = [names[0] for names in zip(*paths, strict=False) if len(set(names)) == 1]
        return ".".join(same)


@dataclasses.dataclass(frozen=True)
class Part:
    """One of the linears of a block: the whole of ``linear``, or the half of its outputs that begins at ``first``."""

    linear: Linear
    first: int | None = None
    width: Any = None


@dataclasses.dataclass(frozen=True)
class BlockParts:
    """What a feed-forward block is made of, as :func:`describe` found it."""

    up: Part
    gate: Part | None
    down: Linear
    activation: str

    @property
    def input(self) -> fx.Node:
        """What the first linears read."""
        return self.up.linear.input


def find_feed_forward(gm: fx.GraphModule) -> list[FeedForwardSite]:
    """All feed-forward blocks of a normalised graph, in graph order."""
    found = [site for node in gm.graph.nodes if is_linear(node) and (site := _block(node)) is not None]
    before: Counter[str] = Counter()
    for site in found:
        site.number = before[site.module]
        before[site.module] += 1
    return found


def _block(down: fx.Node) -> FeedForwardSite | None:
    queue, seen = [input_of(down)], set()
    ups: list[fx.Node] = []
    activation, halves = None, False
    while queue:
        node = queue.pop()
        if node in seen or not isinstance(value(node), (Tensor, list, tuple)):
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
    between = frozenset(seen.difference(ups))
    return FeedForwardSite(down, tuple(sorted(ups)), activation, halves or len(ups) > 1, between)


def describe(site: FeedForwardSite) -> BlockParts | Reason:
    """The linears of a block by their roles, and its activation by name; or why that cannot be told.

    What is between the linears is not read but *tried*: it is run on random numbers, and compared with each activation
    in each arrangement. So a spelling does not matter, and what is like none of them is never taken for one.
    """

    def no(code: str, text: str) -> Reason:
        return Reason(code, text, site.source)

    linears = [operands_of(node) for node in (*site.ups, site.down)]
    if any(linear is None for linear in linears):
        return no("computed-weight", "a weight of this block is computed in the graph, or belongs to another library")
    *ups, down = [linear for linear in linears if linear is not None]
    if len({up.input for up in ups}) != 1 or len(ups) > 2:
        return no("not-supported", "the first linears of this block do not read one and the same tensor")
    widths = [up.outputs for up in ups]
    if not all(isinstance(w, int) for w in widths):
        return no("not-supported", "the width of this block is not known when compiling")
    generator = torch.Generator().manual_seed(0)
    given = {up.node: 3 * torch.randn(16, w, generator=generator, dtype=torch.float64) for up, w in zip(ups, widths)}
    found = _run(site, given)
    if isinstance(found, str):
        return no("not-supported", found)
    for roles in _arrangements(ups):
        up, gate = (None if role is None else _taken(given[role.linear.node], role) for role in roles)
        for name, act in NAMED.items():
            assert up is not None
            expected = act(up) if gate is None else act(gate) * up
            if expected.shape == found.shape and torch.allclose(expected, found, rtol=1e-6, atol=1e-9):
                assert roles[0] is not None
                return BlockParts(roles[0], roles[1], down, name)
    return no("unknown-activation", f"what is between the linears is none of {', '.join(NAMED)}, gated or not")


def _taken(x: Tensor, part: Part) -> Tensor:
    return x if part.first is None else x[:, part.first : part.first + part.width]


def _arrangements(ups: list[Linear]) -> list[tuple[Part, Part | None]]:
    """Which linear, or half of one, may be up and which the gate."""
    if len(ups) == 2:
        one, two = (Part(up) for up in ups)
        return [(one, two), (two, one)]
    (both,) = ups
    half = both.outputs // 2
    one, two = Part(both, 0, half), Part(both, half, half)
    return [(Part(both), None), (one, two), (two, one)]


def _run(site: FeedForwardSite, given: dict[fx.Node, Tensor]) -> Tensor | str:
    """What the last linear reads if the first ones give ``given``, ``[rows, width]`` each; or why it cannot be run.

    In fp64 and without the sizes of the graph: casts do nothing, and neither do views that keep the channels.
    """
    known: dict[fx.Node, Any] = dict(given)
    for node in sorted(site.between):
        target: Any = node.target
        first: Any = node.args[0]
        if target is aten.dropout.default:
            if node.args[2] and node.args[1]:
                return "dropout is active; call model.eval()"
            known[node] = known[first]
        elif target in (aten.to.dtype, aten.contiguous.default, aten.clone.default):
            known[node] = known[first]
        elif target in VIEWS:
            if not same_size(shape(node)[-1], shape(first)[-1]):
                return "a view within this block folds its channels"
            known[node] = known[first]
        elif target in _PARTS and _dimension(node) not in (-1, len(shape(first)) - 1):
            return "this block is split along another dimension than its channels"
        else:
            arguments = [known.get(a, a) if isinstance(a, fx.Node) else a for a in node.args]
            keywords = {name: known.get(a, a) if isinstance(a, fx.Node) else a for name, a in node.kwargs.items()}
            if target in _PARTS:
                arguments, keywords = [*arguments[:2], -1], {}
            if any(isinstance(a, (fx.Node, torch.SymInt)) for a in (*arguments, *keywords.values())):
                return "a number within this block is not known when compiling"
            known[node] = target(*(a.clone() if isinstance(a, Tensor) else a for a in arguments), **keywords)
    last = site.down.args[1 if is_call(site.down, aten.addmm.default) else 0]
    while last not in known and isinstance(last, fx.Node):  # views and casts that no search has walked
        last = last.args[0]
    found = known.get(last)  # type: ignore[arg-type]
    return found if isinstance(found, Tensor) else "what the last linear reads is not made of the first ones alone"


def _dimension(node: fx.Node) -> Any:
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
