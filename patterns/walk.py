"""Small predicates and steps for walking a normalised graph."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

aten = torch.ops.aten

_TORCH = os.path.join(os.path.dirname(torch.__file__), "")

# Ops that hand their first argument on with the same values when dtype and shape are the same.
_COPIES = {
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.type_as.default,
}


def value(node: Any) -> Any:
    """The fake value of a node, or the constant itself."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def operand(node: fx.Node, index: int) -> Any:
    """A positional argument of a call; its type is the one that the schema of the operation says."""
    return node.args[index]


def shape(node: fx.Node) -> tuple[Any, ...]:
    """Sizes of a tensor node; an empty tuple if it is not one."""
    fake = value(node)
    return tuple(fake.shape) if isinstance(fake, Tensor) else ()


def is_call(node: Any, *targets: Any) -> bool:
    """Whether ``node`` calls one of ``targets`` (overloads, or packets meaning any overload)."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    packet = getattr(node.target, "overloadpacket", None)
    return node.target in targets or (packet is not None and packet in targets)


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for sure. Never adds a guard: unknown is False."""
    return bool(statically_known_true(a == b))


def tied(a: Any, b: Any) -> bool:
    """Whether two sizes are equal that the operator could not work with if they were not.

    What is not known becomes a guard of the graph: the lengths of keys and values in a cache that grows are symbols of
    their own, and an operator that takes both says nothing of it before it runs. Lengths that only the data tell stay
    unknown, which is False.
    """
    return bool(guard_or_false(a == b))


def same_shape(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether two shapes are equal for sure."""
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b))


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name, defaults filled in.

    An operation is written with positional, keyword or missing arguments; ignoring one silently changes the meaning.
    """
    schema = node.target._schema  # type: ignore[union-attr]
    named = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    named.update({a.name: v for a, v in zip(schema.arguments, node.args)})
    named.update(node.kwargs)
    return named


def strip_copies(node: Any) -> Any:
    """Walk up through copies, casts and slices that do not change dtype, shape or device."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        # A slice of everything stays in a graph whose sizes are symbols; of equal size, it is the whole.
        if not (
            node.target in _COPIES
            or (node.target is aten.slice.Tensor and same_shape(shape(node), shape(operand(node, 0))))
        ):
            break
        before, after = value(node.args[0]), value(node)
        if not isinstance(before, Tensor) or before.dtype != after.dtype or before.device != after.device:
            break
        node = node.args[0]
    return node


def strip_casts(node: Any) -> Any:
    """Walk up through copies and casts, whatever their dtype."""
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target in _COPIES:
        node = node.args[0]
    return node


def mutated_arguments(node: fx.Node) -> Iterator[fx.Node]:
    """The argument nodes that a call writes to."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            for item in given if isinstance(given, (list, tuple)) else [given]:
                if isinstance(item, fx.Node):
                    yield item


def root(node: Any) -> Any:
    """The storage a node looks at, as far as views and no-op copies are followed: used to see what a mutation hits."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        views = schema is not None and any(r.alias_info is not None for r in schema.returns)
        if not (views or node.target in _COPIES) or not node.args or not isinstance(node.args[0], fx.Node):
            break
        node = node.args[0]
    return node


def first_mutation(target: fx.Node) -> fx.Node | None:
    """The first node that writes to the storage of ``target``, as far as :func:`root` sees it."""
    wanted: fx.Node = root(target)
    # Down from the storage to its views and their users, which are far fewer than the nodes of a graph.
    views, writers = {wanted}, set()
    queue = [wanted]
    while queue:
        for user in queue.pop().users:
            if any(root(argument) is wanted for argument in mutated_arguments(user)):
                writers.add(user)
            if user not in views and root(user) is wanted:
                views.add(user)
                queue.append(user)
    return min(writers, default=None)


def between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    """The nodes after ``first`` and before ``last`` in graph order."""
    node = first.next
    while node is not last and node.op != "root":
        yield node
        node = node.next


def only_user(node: fx.Node, accept: Callable[[fx.Node], bool]) -> fx.Node | None:
    """The single user of ``node`` if there is just one and ``accept`` holds for it."""
    users = list(node.users)
    return users[0] if len(users) == 1 and accept(users[0]) else None


def module_path(node: fx.Node) -> str:
    """The module a node was traced in, such as ``model.layers.3.self_attn``; '' for the root or a plain function."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = stack_path = list(stack.values())[-1][0].replace(".forward.__self__", "")
    path = re.sub(r"^[A-Z]\['[^']*'\](\.__self__|\._orig_mod)*\.?", "", stack_path)
    path = re.sub(
        r"\._?modules\['([^']*)'\]|\['([^']*)'\]|\[(\d+)\]", lambda m: "." + next(g for g in m.groups() if g), path
    )
    return path.strip(".")


def source_line(node: fx.Node) -> str:
    """The user's line, ``file:line: code``: the innermost frame in the file that defines the node's module.

    Without one, it is the innermost frame outside of torch.
    """
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    kind = stack[-1][1] if stack else None
    home = getattr(sys.modules.get(getattr(kind, "__module__", "")), "__file__", None)
    own = [f for f in frames if not f[0].startswith(_TORCH)] or frames
    chosen = next((f for f in reversed(frames) if f[0] == home), own[-1])
    return f"{chosen[0]}:{chosen[1]}: {chosen[2].strip()}"
