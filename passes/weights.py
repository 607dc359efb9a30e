"""Weights that a rewrite prepares: made once from the user's, shared by all graphs, and never silently out of date.

The user's parameters stay as they are. A graph gets a prepared tensor as a constant of its own, which Inductor treats
like any input; the prompt's graph and the decoding graph hold the same one. A prepared tensor is of the values that
the originals had then, so a compiled graph refuses to run once one of them was written to (:class:`Fresh`).
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource

from effcompile.kernels.ffn import FeedForward
from effcompile.patterns.ffn import BlockParts, Part
from effcompile.patterns.linear import Linear
from effcompile.patterns.walk import value
from effcompile.runtime import discarded
from effcompile.runtime.plan import PlanError, digest, version_of

_PARAMETER = re.compile(r"_(?:parameters|buffers)\['[^']+'\]$")


def parameter_of(node: fx.Node) -> tuple[str, Tensor] | None:
    """The name and the real tensor of a parameter or buffer that Dynamo lifted to an input, while a back end runs.

    Names begin at the module whose ``forward`` the graph is of. None for other inputs.
    """
    source = str(getattr(getattr(node, "_dynamo_source", None), "name", ""))
    tensor = getattr(node.meta.get("grapharg"), "example", None)
    if not _PARAMETER.search(source) or not isinstance(tensor, Tensor):
        return None
    return ".".join(re.findall(r"_(?:modules|parameters|buffers)\['([^']+)'\]", source)), tensor


def real(node: fx.Node) -> Tensor | None:
    """The real tensor behind a weight node: a lifted parameter, or a constant of the graph; None if it is neither."""
    if node.op == "get_attr":
        found: Any = node.graph.owning_module
        for name in str(node.target).split("."):
            found = getattr(found, name)
        return found if isinstance(found, Tensor) else None
    lifted = parameter_of(node)
    return None if lifted is None else lifted[1]


_CONSTANT = "effcompile_weight_"
LENT = "effcompile_lent"
"""In the ``meta`` of a constant: a tensor of somebody else, whose memory it may be."""


def wants_gradients(graph: fx.Graph) -> bool:
    """Whether something that goes into ``graph`` wants a gradient: an operator without one would not hand it on."""
    given = (getattr(n.meta.get("grapharg"), "example", None) for n in graph.find_nodes(op="placeholder"))
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in given)


def nodes_of(parts: BlockParts) -> dict[str, fx.Node]:
    """The nodes of a block's weights by role: ``up``, ``up_bias`` and so on."""
    linears = {"up": parts.up.linear, "down": parts.down}
    if parts.gate is not None:
        linears["gate"] = parts.gate.linear
    both = {name: x for role, one in linears.items() for name, x in ((role, one.weight), (f"{role}_bias", one.bias))}
    return {name: node for name, node in both.items() if node is not None}


def originals(parts: BlockParts) -> dict[str, Tensor] | None:
    """The user's tensors of a block by role, as they are; None if one of them is no parameter."""
    found = {name: real(node) for name, node in nodes_of(parts).items()}
    tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
    return tensors if len(tensors) == len(found) else None


def block_of(parts: BlockParts, tensors: Mapping[str, Tensor]) -> FeedForward:
    """The block on the user's tensors, as views with a neuron to a row."""

    def weight(part: Part, role: str) -> tuple[Tensor, Tensor | None]:
        linear: Linear = part.linear
        rows, bias = tensors[role].detach(), tensors.get(f"{role}_bias")
        rows = rows.t() if linear.flipped else rows
        bias = None if bias is None else bias.detach()
        if part.first is None:
            return rows, bias
        chosen = slice(part.first, part.first + part.width)
        return rows[chosen], None if bias is None else bias[chosen]

    up, up_bias = weight(parts.up, "up")
    gate, gate_bias = (None, None) if parts.gate is None else weight(parts.gate, "gate")
    down, down_bias = weight(Part(parts.down), "down")
    return FeedForward(up, down.t(), gate, parts.activation, up_bias, gate_bias, down_bias)


_prepared: dict[tuple[Any, ...], dict[str, weakref.ref[Tensor]]] = {}


def made_of(tensor: Tensor) -> list[Tensor]:
    """Everything that was prepared from ``tensor`` as it is now, and is still held."""
    own = id(tensor), version_of(tensor)
    found = [ref() for whole, made in _prepared.items() if own in whole[1:] for ref in made.values()]
    return [t for t in found if t is not None]


def prepared(key: str, of: Sequence[Tensor], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What ``make`` gives, made once for ``key`` and the tensors ``of`` while some graph still holds it.

    Raises :class:`~effcompile.runtime.discarded.DiscardError` if it is to be made of discarded parameters.
    """
    whole = (key, *((id(t), version_of(t)) for t in of))
    kept = {name: ref() for name, ref in _prepared.get(whole, {}).items()}
    if kept and all(t is not None for t in kept.values()):
        return {name: t for name, t in kept.items() if t is not None}
    discarded.refuse_reads(of, "preparing weights in another way than before")
    made = {name: nn.Parameter(t.detach(), requires_grad=False) for name, t in make().items()}
    _prepared[whole] = {name: weakref.ref(t) for name, t in made.items()}
    for t in of:
        # A new tensor may get the number of one that is gone.
        weakref.finalize(t, _prepared.pop, whole, None)
    return dict(made)


def constant(graph: fx.Graph, tensor: Tensor, like: fx.Node) -> fx.Node:
    """``tensor`` as a constant of the graph, where the insertion point is; ``like`` is any node with a fake value.

    One tensor has one name in a graph, however often it is read: AOTAutograd refuses two.
    """
    gm: Any = graph.owning_module
    number = 0
    while getattr(gm, name := f"{_CONSTANT}{number}", tensor) is not tensor:
        number += 1
    gm.register_parameter(name, tensor)
    sources = vars(gm).get("_param_name_to_source")
    if sources is not None:
        # AOTAutograd asks where each tensor is from; no guard is made of this one.
        vars(gm)["_param_name_to_source"] = sources | {name: ConstantSource(name)}
    node = graph.get_attr(name)
    node.meta["val"] = value(like).fake_mode.from_tensor(tensor, static_shapes=True)
    return node


def is_constant(node: fx.Node) -> bool:
    """Whether a node reads a tensor that :func:`constant` put into the graph."""
    return node.op == "get_attr" and str(node.target).startswith(_CONSTANT)


def drop_constants(gm: fx.GraphModule, nodes: Sequence[fx.Node]) -> None:
    """Take those of :func:`constant` that nobody reads any more out of a graph, and out of what it holds."""
    for node in nodes:
        if not node.users and not node._erased:
            gm.graph.erase_node(node)
    read = {node.target for node in gm.graph.find_nodes(op="get_attr")}
    for name in {str(node.target) for node in nodes} - read:
        delattr(gm, name)
        (vars(gm).get("_param_name_to_source") or {}).pop(name, None)


class Fresh:
    """Compiled code that runs only with the weights that its prepared ones were made from.

    The originals still are inputs of the code. A tensor that was written to or put in their place is read once more,
    and refused if it is another: a copy of the model, whose code Dynamo may share, has equal ones.
    """

    def __init__(self, compiled: Callable[..., Any], weights: Sequence[tuple[int, str, Tensor]]) -> None:
        self.compiled = compiled
        self.weights = [(place, where, digest(t)) for place, where, t in weights]
        self.seen = {place: (weakref.ref(t), version_of(t)) for place, _, t in weights}

    def __call__(self, *args: Any) -> Any:
        for place, where, expected in self.weights:
            ref, version = self.seen[place]
            tensor: Tensor = args[place]
            if ref() is tensor and version_of(tensor) == version:
                continue
            if digest(tensor) != expected:
                raise PlanError(
                    f"{where}: its weights are not those that were prepared for the compiled code. Call "
                    "torch._dynamo.reset() and compile again; a plan has to be made again by calibrating."
                )
            self.seen[place] = weakref.ref(tensor), version_of(tensor)
        return self.compiled(*args)
