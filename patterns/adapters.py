"""Find adapters: what is added to a linear by two chained linears that read the same, as LoRA does."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, fx

from effcompile.patterns.walk import (
    arguments,
    aten,
    is_call,
    operand,
    same_shape,
    same_size,
    shape,
    strip_copies,
    value,
)

ROW_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
CASTS = (aten.to.dtype, aten._to_copy.default, aten.type_as.default)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """``scale * up (down x)``, each with its bias if it has one (LoRA, Hu et al., ICLR 2022, section 4.1).

    ``scale`` is NaN where the graph is for any: Dynamo makes a number that has changed between compilations a symbol.
    """

    down: fx.Node
    up: fx.Node
    scale: float


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A linear and the adapters that are added to it, one after another.

    ``input`` is what all of them read, ``[..., n]``, and ``output`` the last sum, ``[..., m]`` with the same leading
    sizes; casts and views of rows on the way are left out.
    """

    linear: fx.Node
    input: fx.Node
    output: fx.Node
    adapters: tuple[Adapter, ...]


def adapted(linear: fx.Node) -> Adapted | None:
    """The adapters of a linear, found by structure alone; None without any."""
    source = _behind(_input(linear))
    width, outputs = shape(_input(linear))[-1:], shape(linear)[-1:]
    if not isinstance(source, fx.Node) or not same_shape(shape(source)[-1:], width) or not width:
        return None
    node = last = linear
    found: list[Adapter] = []
    while len(node.users) == 1:
        user = next(iter(node.users))
        if _passes(user) and same_shape(shape(user)[-1:], outputs):
            node = user
            continue
        if not is_call(user, aten.add.Tensor) or not isinstance(user.args[1], fx.Node):
            break
        alpha = arguments(user)["alpha"]
        first = user.args[0] is node
        other = operand(user, 1 if first else 0)
        if not isinstance(alpha, int | float):
            break
        one = _adapter(other, source) if other is not node and (first or alpha == 1) else None
        # Nothing is broadcast: a row is added to its own.
        if one is None or not same_shape(shape(other), shape(node)):
            break
        found.append(dataclasses.replace(one, scale=one.scale * alpha))
        node = last = user
    if not found or not same_shape(shape(last)[:-1], shape(source)[:-1]):
        return None
    return Adapted(linear, source, last, tuple(found))


def _adapter(node: Any, source: fx.Node) -> Adapter | None:
    """The two linears whose product, times numbers, ``node`` is, if the first reads ``source``."""
    scale = 1.0
    before: Any = None
    while before is not node:
        before = node
        while isinstance(node, fx.Node) and _passes(node):
            node = node.args[0]
        if is_call(node, aten.mul.Tensor) and isinstance(node.args[1], int | float):
            node, scale = node.args[0], scale * float(node.args[1])
        elif is_call(node, aten.mul.Tensor) and isinstance(value(node.args[1]), torch.SymFloat | torch.SymInt):
            node, scale = node.args[0], math.nan
        elif is_call(node, aten.div.Tensor) and isinstance(node.args[1], int | float) and node.args[1]:
            node, scale = node.args[0], scale / float(node.args[1])
    if not _is_linear(node):
        return None
    down = _behind(_input(node))
    if not _is_linear(down) or not same_shape(shape(down)[-1:], shape(_input(node))[-1:]):
        return None
    start = _input(down)
    if _behind(start) is not source or not same_size(shape(start)[-1], shape(source)[-1]):
        return None
    rank, outputs, inputs = shape(down)[-1], shape(node)[-1], shape(source)[-1]
    # Wide ones are layers of their own, not adapters.
    if not all(isinstance(n, int) for n in (rank, outputs, inputs)) or rank * (outputs + inputs) >= outputs * inputs:
        return None
    return Adapter(down, node, scale)


def _behind(node: Any) -> Any:
    """Where a value comes from, without what :func:`_passes`."""
    while isinstance(node, fx.Node) and _passes(node):
        node = node.args[0]
    return node


def _passes(node: fx.Node) -> bool:
    """Whether a node hands rows on as they are: a view, another floating dtype, a dropout that is off."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    before, after = value(node.args[0]), value(node)
    if not all(isinstance(t, Tensor) and t.is_floating_point() for t in (before, after)):
        return False
    if is_call(node, aten.dropout.default):
        return not node.args[2] or not node.args[1]
    if before.device != after.device:
        return False
    return is_call(node, *ROW_VIEWS, *CASTS) or strip_copies(node) is not node


def _is_linear(node: Any) -> bool:
    """As :func:`effcompile.patterns.linear.is_linear`."""
    if is_call(node, aten.matmul.default):
        weight = node.args[1]
        while is_call(weight, aten.numpy_T.default, aten.t.default, aten.mT.default, aten.transpose.int):
            weight = weight.args[0]
        return isinstance(weight, fx.Node) and len(shape(weight)) == 2 and weight.op in ("placeholder", "get_attr")
    return is_call(node, aten.linear.default) or (is_call(node, aten.addmm.default) and not node.kwargs)


def _input(linear: fx.Node) -> Any:
    return operand(linear, 1 if is_call(linear, aten.addmm.default) else 0)
