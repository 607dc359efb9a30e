"""What removing heads needs: the heads of an attention as numbers, and the smaller attention in their place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from effcompile.kernels.cost import Cost
from effcompile.kernels.heads import Heads
from effcompile.kernels.low_rank_ops import linear_cost
from effcompile.kernels.program import OperatorProgram
from effcompile.kernels.reason import Reason
from effcompile.passes import narrow
from effcompile.passes.feed_forward import TOKENS, check_weights
from effcompile.passes.rewrite import Rewrite
from effcompile.passes.weight_form import DENSE, WeightForm, asked, form_of, told
from effcompile.passes.weights import constant, prepared, real
from effcompile.patterns.attention import find_attention
from effcompile.patterns.linear import Linear, operands_of
from effcompile.patterns.narrow import Kept, Narrowing, narrowing, written
from effcompile.patterns.output_projection import HeadsSite, NoHeads, find_output_projections
from effcompile.patterns.walk import aten, same_shape, shape, value
from effcompile.runtime import discarded
from effcompile.runtime.plan import PlanError, Record


def plain(tensor: Tensor | None) -> bool:
    """Whether a tensor is PyTorch's own, and no quantised one of another library."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


def originals(site: HeadsSite) -> dict[str, Tensor] | Reason:
    """The user's tensors of a site by role: ``output``, ``output_bias``, and the projections that are known."""
    own = {"output": real(site.linear.weight)}
    if site.linear.bias is not None:
        own["output_bias"] = real(site.linear.bias)
    if not all(map(plain, own.values())):
        return Reason("computed-weight", "the linear behind the heads has a weight that is no parameter", site.source)
    for role, node in site.projections.items():
        linear = None if node is None else operands_of(node)
        weight = None if linear is None else real(linear.weight)
        if plain(weight):
            own[role] = weight
    return {role: t for role, t in own.items() if t is not None}


def heads_of(site: HeadsSite, own: Mapping[str, Tensor]) -> Heads:
    """The heads on the user's tensors, as views with a channel to a row."""
    weight, bias = own["output"].detach(), own.get("output_bias")
    down = weight if site.linear.flipped else weight.t()
    outputs = down.shape[1]

    def reads(role: str) -> int:
        """Channels that a projection reads; where it is not known, as many as the block writes."""
        node = site.projections[role]
        linear = None if node is None else operands_of(node)
        return outputs if linear is None else int(shape(linear.input)[-1])

    query = site.key_size * reads("query") + site.size * outputs
    key = site.key_size * reads("key") + site.size * reads("value")
    return Heads(down, None if bias is None else bias.detach(), site.heads, site.groups, query, key)


def found_heads(graph: fx.GraphModule) -> Iterator[tuple[HeadsSite | NoHeads, dict[str, Tensor] | Reason]]:
    """The heads of each attention of a graph, with the user's tensors, or why they cannot be removed."""
    for site in find_output_projections(find_attention(graph)):
        yield site, site.reason if isinstance(site, NoHeads) else originals(site)


def match_heads(name: str, site: HeadsSite, record: Record) -> Rewrite | Reason:
    """The attention of the heads that ``record`` keeps, or why it stays as it is.

    Raises :class:`PlanError` for other weights, and for heads that are not there.
    """

    def no(code: str, text: str) -> Reason:
        return Reason(code, text, site.source)

    own = originals(site)
    if isinstance(own, Reason):
        return own
    check_weights(record, {role: t for role, t in own.items() if role in record.parameters or role == "output"})
    kept = kept_of(record, site.heads)
    bias = record.tensor("bias", shape(site.anchor)[-1])
    if len(kept) == site.heads and not bias.any():
        return no("nothing-to-do", f"all {site.heads} heads stay")
    if torch.is_grad_enabled() and any(t.requires_grad for t in own.values()):
        return no("gradients", f"gradients are needed, and {name} has none; use torch.no_grad()")
    read = site.linear.input
    if len({value(n).dtype for n in (read, site.linear.weight, site.anchor)}) > 1:
        return no("mixed-dtypes", "this linear reads and writes different dtypes, as under autocast")
    # Where no head stays, what would be computed of one is what is not computed.
    found = _narrowing(site, kept or (0,))
    narrowed = {site.anchor: site.linear} | {n: linear for n in found.linears if (linear := operands_of(n)) is not None}
    answers = asked(site, {n: functools.partial(_whole, linear) for n, linear in narrowed.items() if kept})
    forms = {n: form_of(answers.get(n)) for n in narrowed}
    size: Any = {"itemsize": value(read).dtype.itemsize}
    before = after = Cost(0, 0)
    # Of the output projection fewer columns are read, of the others fewer rows are computed.
    outputs, some = shape(site.anchor)[-1], len(kept) * site.size
    before += linear_cost(TOKENS, outputs, site.heads * site.size, bias="output_bias" in own, **size)
    after += linear_cost(TOKENS, outputs, some, bias=True, **size) + forms[site.anchor].change(outputs, some, **size)
    for node, linear in narrowed.items():
        if node is site.anchor:
            continue
        inputs, has = shape(linear.input)[-1], linear.bias is not None
        before += linear_cost(TOKENS, linear.outputs, inputs, bias=has, **size)
        if kept:
            rows = len(found.kept[node].index)
            after += linear_cost(TOKENS, rows, inputs, bias=has, **size) + forms[node].change(rows, inputs, **size)
    few = any(form != DENSE for form in forms.values())
    return Rewrite(
        f"{name} {len(kept)} of {site.heads} heads" + told(forms.values()),
        lambda graph: emit(graph, site, own, record, found, forms),
        weights=_weights(site, own, found),
        cost=(before, after),
        rows=tuple(shape(read)[:-1]),
        linears=tuple(found.linears),
        operators=(OperatorProgram("quantized_linear", value(read).dtype),) * few,
        kept=answers,
    )


def _whole(linear: Linear) -> list[Tensor]:
    """The weight of a linear, unless it is discarded: then it was in range when another was prepared of it."""
    weight = real(linear.weight)
    return [] if weight is None or discarded.name_of(weight) is not None else [weight]


def kept_of(record: Record, heads: int) -> tuple[int, ...]:
    """The heads that stay. Raises :class:`PlanError` unless they are some of ``heads``, in their order."""
    kept = tuple(record.tensor("heads", -1).tolist())
    if any(type(h) is not int for h in kept) or list(kept) != sorted({*kept} & {*range(heads)}):
        raise PlanError(
            f"plan: {record.method} at {record.module}: heads are {list(kept)}; expected some of 0 to {heads - 1}, "
            "each once, in their order. Calibrate again."
        )
    return kept


def _narrowing(site: HeadsSite, kept: tuple[int, ...]) -> Narrowing:
    """What of the attention is computed in part."""
    if len(kept) == site.heads:
        return Narrowing({}, {})
    read = site.linear.input
    return narrowing(site.anchor, read, _channels(site, kept), written(read.graph), takes=_takes)


def _channels(site: HeadsSite, kept: tuple[int, ...]) -> Kept:
    own = [h * site.size + e for h in kept for e in range(site.size)]
    return Kept(len(shape(site.linear.input)) - 1, tuple(own))


def _takes(node: fx.Node) -> bool:
    """Whether rows of a linear can be had: a weight of ours to copy, one dtype, and no gradient."""
    linear = operands_of(node)
    if linear is None:
        return False
    tensors = [real(n) for n in (linear.weight, linear.bias) if n is not None]
    dtypes = {value(n).dtype for n in (linear.input, linear.weight, linear.bias, node) if n is not None}
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return all(map(plain, tensors)) and len(dtypes) == 1 and not wanted


def _weights(site: HeadsSite, own: Mapping[str, Tensor], found: Narrowing) -> tuple[tuple[str, fx.Node, Tensor], ...]:
    """The user's tensors that smaller ones are prepared from."""
    linears = [site.linear, *(linear for n in found.linears if (linear := operands_of(n)) is not None)]
    nodes = [n for linear in linears for n in (linear.weight, linear.bias) if n is not None]
    return tuple((site.module, n, t) for n in nodes if (t := real(n)) is not None)


def emit(
    graph: fx.Graph,
    site: HeadsSite,
    own: Mapping[str, Tensor],
    record: Record,
    found: Narrowing,
    forms: Mapping[fx.Node, WeightForm],
) -> fx.Node:
    """The output projection of the kept heads and the bias, where the insertion point is."""
    kept, read = kept_of(record, site.heads), site.linear.input
    block, form = heads_of(site, own), forms[site.anchor]

    def make() -> dict[str, Tensor]:
        weight, bias = _smaller(block, record)
        return form.tensors("weight", weight) | {"bias": bias.contiguous()}

    tensors = [own[role] for role in ("output", "output_bias") if role in own]
    made = prepared(f"{record.text} {form.text}", tensors, make)
    if not kept:
        bias = constant(graph, made["bias"], read)
        query = site.projections["query"]
        given = None if query is None else operands_of(query)
        # Sizes are read from what stays in the graph, so that the attention need not.
        same = given is not None and same_shape(shape(given.input)[:-1], shape(site.anchor)[:-1])
        source = given.input if given is not None and same else read
        sizes: list[Any] = []
        for dim, size in enumerate(shape(site.anchor)[:-1]):
            known = isinstance(size, int)
            sizes.append(size if known else narrow.call(graph, aten.sym_size.int, (source, dim), {}, read))
        return narrow.call(graph, aten.expand.default, (bias, [*sizes, block.down.shape[1]]), {}, read)
    part = narrow.emit(graph, found, record.text, own["output"], forms)
    some = read if len(kept) == site.heads else part(read, _channels(site, kept))
    nodes = {name: constant(graph, t, read) for name, t in made.items()}
    target, *arguments = form.call("weight", nodes, some, block.down.shape[1], nodes["bias"])
    return narrow.call(graph, target, tuple(arguments), {}, read)


def _smaller(block: Heads, record: Record) -> tuple[Tensor, Tensor]:
    """Weight ``[d, kept * E]`` and bias ``[d]`` of the output projection of the kept heads."""
    rows = block.channels(record.tensor("heads", -1)).to(block.down.device)
    bias = record.tensor("bias", block.down.shape[1]).to(block.down.device)
    if block.bias is not None:
        bias = bias + block.bias.float()
    return block.down[rows].t(), bias.to(block.down.dtype)


def approximate(block: Heads, record: Record) -> Callable[[Tensor], Tensor]:
    """What ``record`` makes of the output projection, for rows ``[n, H * E]`` of all heads: its one definition."""
    weight, bias = _smaller(block, record)
    rows = block.channels(record.tensor("heads", -1)).to(block.down.device)
    return lambda x: F.linear(x[:, rows], weight, bias)
