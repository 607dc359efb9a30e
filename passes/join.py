"""Linears in few bits that read one tensor are one call: ``q``, ``k`` and ``v`` of an attention, ``gate`` and ``up``.

At one row a call costs more in Python, dispatch and waking of threads than a small weight takes to read. A block of
outputs is a run of memory (:mod:`effcompile.kernels.weight_ops`), so packed weights one behind the other are a packed
weight, each output of which has the sum that it had. Not a method and not an option: sites, rules and reports are
about linears, and know nothing of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator

from effcompile.kernels.weight_ops import LANES, QUANTIZED_LINEAR
from effcompile.passes.weights import LENT, constant, drop_constants, is_constant, made_of, prepared, real
from effcompile.patterns.storage import Writes
from effcompile.patterns.walk import aten, mutated_arguments, operand, value

_READ = "effcompile_read"
"""Attribute of a constant that a graph reads, wherever it lies."""

NEAR = 8
"""Linears in few bits from one to the next that it is joined with, about those of a layer. All results are made at
once: of those that read an encoder's output, say, in each layer of a decoder, the last would wait for long."""


def join_linears(gm: fx.GraphModule) -> int:
    """Put one call in the place of those that read the same tensor, in place; returns how many linears share calls.

    Results are copied out of the common one, which Inductor does inside whatever reads them: strides, views and writes
    are what they were. Weights move into one memory (:func:`_together`), which all graphs share.
    """
    joined = 0
    for group in _groups(gm):
        weights = [[_weight(node.args[place]) for node in group] for place in (1, 2, 3) if group[0].args[place]]
        # What lies in the memory of another group stays there, and so does what compiled code reads where it is: a
        # thread may be running that.
        if all(_beside(parts) or not any(made_of(t) or _READ in vars(t) for t in parts) for parts in weights):
            _join(gm, group, weights)
            joined += len(group)
    for node in gm.graph.find_nodes(op="get_attr"):
        if is_constant(node):
            vars(_weight(node))[_READ] = True
    gm.graph.lint()
    gm.recompile()
    return joined


def _groups(gm: fx.GraphModule) -> list[list[fx.Node]]:
    """Calls that can be one, two or more in each list, in graph order."""
    calls = gm.graph.find_nodes(op="call_function", target=QUANTIZED_LINEAR)
    if len(calls) < 2:
        return []
    writes, live = Writes(gm.graph), _live(gm.graph)
    found: list[list[fx.Node]] = []
    latest: dict[Any, tuple[int, list[fx.Node]]] = {}
    for index, node in enumerate(calls):
        x, codes, scales, zeros, bias, _, bits, size = node.args
        if node not in live or not all(is_constant(t) for t in (codes, scales, zeros) if t is not None):
            continue
        if bias is not None and (bias.op not in ("placeholder", "get_attr") or writes.ever(bias)):
            continue
        key = x, bits, size, zeros is None, bias is None
        last, group = latest.get(key, (-NEAR - 1, []))
        # One weight twice would have to lie in two places.
        near = index - last <= NEAR and all(_weight(codes) is not _weight(other.args[1]) for other in group)
        if not near or writes.between(x, node):
            found.append(group := [])
        group.append(node)
        latest[key] = index, group
    return [group for group in found if len(group) > 1]


def _live(graph: fx.Graph) -> set[fx.Node]:
    """What the output or a write needs: a projection to keys that nobody reads any more is not there at run time."""
    queue = [n for n in graph.nodes if isinstance(n.target, HigherOrderOperator) or next(mutated_arguments(n), None)]
    queue.append(graph.output_node())
    found = set(queue)
    while queue:
        more = set(queue.pop().all_input_nodes) - found
        found |= more
        queue += more
    return found


def _weight(node: Any) -> Tensor:
    found = real(node)
    assert found is not None  # packed weights are constants, whoever put them there
    return found


def _join(gm: fx.GraphModule, group: Sequence[fx.Node], weights: Sequence[Sequence[Tensor]]) -> None:
    """One call in the place of the first of a group, and a piece of its result in the place of each."""
    graph, first = gm.graph, group[0]
    old = [node for call in group for node in call.args[1:4] if isinstance(node, fx.Node)]
    # Learned codes may be the plan's own memory, which moves with them.
    lent = [(t, part) for node in old if (t := node.meta.get(LENT)) is not None and _same(t, part := _weight(node))]
    wholes = [_together(parts) for parts in weights]
    for t, part in lent:
        t.data = part.data
    made = prepared("joined", weights[0], lambda: {str(n): whole for n, whole in enumerate(wholes)})
    # Other graphs find the whole by its parts, which take no memory of their own.
    vars(made["0"])["parts"] = weights
    x, bits, size = operand(first, 0), first.args[6], first.args[7]
    widths = [operand(node, 5) for node in group]
    # Where blocks of outputs end: outputs that fill the last one of each linear are computed and not read.
    ends = [0, *itertools.accumulate(-(-width // LANES) * LANES for width in widths)]
    with graph.inserting_before(first):
        sides: list[fx.Node | None] = [constant(graph, tensor, x) for tensor in made.values()]
        bias = None
        if first.args[4] is not None:
            old += [node for call in group if (node := operand(call, 4)).op == "get_attr"]
            biases = [_first(graph, operand(node, 4)) for node in group]
            biases = [_padded(graph, node, -width % LANES) for node, width in zip(biases, widths)]
            bias = _call(graph, aten.cat.default, biases)
        sides += [None] * (3 - len(sides))
        whole = _call(graph, QUANTIZED_LINEAR, x, *sides, bias, ends[-1], bits, size)
        for node, begin, width in zip(group, ends, widths):
            piece = _call(graph, aten.slice.Tensor, whole, -1, begin, begin + width)
            piece = graph.call_function(aten.clone.default, (piece,), {"memory_format": torch.contiguous_format})
            piece.meta.update(node.meta)
            node.replace_all_uses_with(piece)
    for node in group:
        graph.erase_node(node)
    drop_constants(gm, old)


def _first(graph: fx.Graph, bias: fx.Node) -> fx.Node:
    """A bias where the insertion point is: a constant may stand right before the call that it was made for."""
    if bias.op == "placeholder":
        return bias
    again = graph.get_attr(str(bias.target))
    again.meta.update(bias.meta)
    return again


def _padded(graph: fx.Graph, bias: fx.Node, short: int) -> fx.Node:
    return _call(graph, aten.constant_pad_nd.default, bias, [0, short]) if short else bias


def _call(graph: fx.Graph, target: Any, *arguments: Any) -> fx.Node:
    """A call with its fake value."""
    node = graph.call_function(target, arguments)
    given: Any = fx.node.map_arg(arguments, value)
    first = given[0][0] if isinstance(given[0], (list, tuple)) else given[0]
    with first.fake_mode:
        node.meta["val"] = target(*given)
    return node


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr()


def _beside(parts: Sequence[Tensor]) -> bool:
    """Whether tensors lie one behind the other in one memory."""
    ends = itertools.accumulate((t.nbytes for t in parts), initial=parts[0].data_ptr())
    memory = {t.untyped_storage().data_ptr() for t in parts}
    return len(memory) == 1 and all(t.data_ptr() == at and t.is_contiguous() for t, at in zip(parts, ends))


def _together(parts: Sequence[Tensor]) -> Tensor:
    """Tensors ``[J, ...]`` as one, one behind the other; they move there unless they lie so, and are not kept twice."""
    first, sizes = parts[0], [len(t) for t in parts]
    if _beside(parts):
        return first.as_strided((sum(sizes), *first.shape[1:]), first.stride())
    whole = torch.cat(list(parts))
    for part, piece in zip(parts, whole.split(sizes)):
        part.data = piece
    return whole
