"""Feed-forward networks that read a part of their weights: groups of neurons, and columns that matter for one input.

As in :mod:`effcompile.kernels.ops`, an operator means its reference body. Shapes: ``N`` tokens, all leading dimensions
of ``x`` together; ``d`` channels; ``F`` neurons; ``E`` groups of neurons (experts); ``k`` slots of a token. Results are
contiguous, in the dtype of ``x``.

``grouped_ffn(x, gate, up, down_t, chosen, weights, shared, width, activation, *, gate_bias, up_bias, down_bias,
threshold, down_scale)``
    ``y = down (act(gate x) * up x) + down_bias`` over some neurons only: the first ``shared`` ones for every token, and
    of the others, which form ``E = (F - shared) / width`` groups, those that the token has chosen, times their weight.
    ``x`` ``[..., d]``; ``gate`` ``[F, d]``, or None for an FFN without a gate, ``act(up x)``; ``up`` ``[F, d]``;
    ``down_t`` ``[F, d]``, the down projection *transposed*, so that a neuron is a row of all three and a group a block
    of rows; ``chosen`` int32 ``[N, k]``, or ``[1, k]`` for all tokens alike, negative where a slot is unused, or None
    for no group; ``weights`` fp32 of the same shape, or None for ones. A group listed twice counts twice. Biases
    ``[F]``, ``[F]``, ``[d]``; ``down_bias`` is added once whatever is chosen, so it holds compensations too (FLAP).
    With a ``threshold``, fp32 with one element, a neuron that says ``h`` counts for a token unless ``|h| * down_scale
    <= threshold``, before any weight; ``down_scale`` fp32 ``[F]``, None for ones. Its row of down need not be read.
    FLAP is ``shared = F``; CMoE what ``route`` chooses; Read-ME one ``chosen`` for all layers; CoreInfer ``width = 1``
    and one ``chosen`` for a request.

``route(x, gate, up, top_k, score, weigh, *, choice_bias, logit_bias, scale, threshold, activation) -> chosen, weights,
counts``
    Which groups a token uses. The logits are ``x gate^T``, or ``act(x gate^T) * (x up^T)`` with ``up``, plus
    ``logit_bias`` ``[E]``; ``gate`` and ``up`` are ``[E, d]``. ``score`` makes ``p`` of them (:data:`SCORES`). The
    ``top_k`` groups of largest ``p + choice_bias`` are chosen, largest first, the lower index where they tie, NaN
    before all numbers; with a ``threshold`` of these only those above it, and the remaining slots are -1 with weight 0,
    so that ``top_k = E`` leaves the number free. ``weigh`` makes weights of the chosen ``p`` (:data:`WEIGHTS`); only
    ``unit`` looks at ``scale`` ``[E]``. All of it is computed in fp32, and biases, ``scale`` and weights are fp32.
    ``counts`` int32 ``[E]``: how many tokens chose each group. CMoE is ``up`` given, ``abs_softmax``, ``unit``.

``column_linear(x, weight_t, threshold, *, scale, bias)``
    ``y = W (kept * x) + bias`` where a channel is kept unless ``|x| * scale <= threshold``, in fp32: so NaN is kept,
    and a negative threshold keeps everything. ``weight_t`` ``[inputs, outputs]``, the weight *transposed*;
    ``threshold`` fp32 with one element; ``scale`` fp32 ``[inputs]``, None for ones. TEAL has no scale, WINA the norms
    of the columns of ``W``.

``column_ffn(x, gate_t, up_t, down_t, thresholds, activation, *, gate_scale, up_scale, down_scale, gate_bias, up_bias,
down_bias)``
    A whole FFN of three ``column_linear``: ``thresholds`` fp32 ``[3]`` are those of gate, up and down; ``gate_t`` and
    ``up_t`` ``[d, F]``, ``down_t`` ``[F, d]``; without ``gate_t`` the first threshold is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effcompile.kernels import ops
from effcompile.kernels.ffn import ACTIVATIONS

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "abs_softmax": lambda logits: logits.abs().softmax(-1),
    "sigmoid": torch.sigmoid,
    "abs": torch.abs,
}
"""What a router makes of its logits; ``abs`` is for thresholds that are the same for all tokens."""

WEIGHTS = ("score", "normalized", "unit")
"""``p`` itself; ``p`` over the sum of those chosen; ``1 + p * scale``, which is 1 without a scale."""

COLUMN_ROWS = 8
"""Tokens up to which column-sparse products skip columns; with more, too few columns are skipped by all of them."""

ops.library.define(
    "grouped_ffn(Tensor x, Tensor? gate, Tensor up, Tensor down_t, Tensor? chosen, Tensor? weights, int shared, "
    "int width, str activation, *, Tensor? gate_bias=None, Tensor? up_bias=None, Tensor? down_bias=None, "
    "Tensor? threshold=None, Tensor? down_scale=None) -> Tensor"
)
ops.library.define(
    "route(Tensor x, Tensor gate, Tensor? up, int top_k, str score, str weigh, *, Tensor? choice_bias=None, "
    'Tensor? logit_bias=None, Tensor? scale=None, float? threshold=None, str activation="silu") '
    "-> (Tensor, Tensor, Tensor)"
)
ops.library.define(
    "column_linear(Tensor x, Tensor weight_t, Tensor threshold, *, Tensor? scale=None, Tensor? bias=None) -> Tensor"
)
ops.library.define(
    "column_ffn(Tensor x, Tensor? gate_t, Tensor up_t, Tensor down_t, Tensor thresholds, str activation, *, "
    "Tensor? gate_scale=None, Tensor? up_scale=None, Tensor? down_scale=None, "
    "Tensor? gate_bias=None, Tensor? up_bias=None, Tensor? down_bias=None) -> Tensor"
)


def known(name: str, names: Any, what: str) -> None:
    """Raise ``ValueError`` if ``name`` is not one of ``names``."""
    if name not in names:
        raise ValueError(f"{what} {name!r} is unknown; there are {', '.join(names)}.")


def groups_of(neurons: int, shared: int, width: int) -> int:
    """Groups of ``width`` neurons behind the first ``shared`` of ``neurons``.

    Raises
    ------
    ValueError
        If they do not come out even.

    >>> groups_of(1536, 192, 96)
    14
    """
    if not 0 <= shared <= neurons or width < 1 or (neurons - shared) % width:
        raise ValueError(f"{neurons} neurons are not {shared} shared ones and groups of {width}; pad the last group.")
    return (neurons - shared) // width


def check_shapes(**given: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raise ``ValueError`` if a tensor that is there has another shape than the one beside it."""
    for name, (tensor, shape) in given.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, and should be {shape}.")


def check_grouped(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down_t: Tensor,
    chosen: Tensor | None,
    weights: Tensor | None,
    shared: int,
    width: int,
    activation: str,
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    threshold: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> int:
    """The number of groups. Raises ``ValueError`` if arguments of ``grouped_ffn`` do not fit each other."""
    known(activation, ACTIVATIONS, "activation")
    neurons, size = up.shape
    groups = groups_of(neurons, shared, width)
    if x.shape[-1] != size:
        raise ValueError(f"x has {x.shape[-1]} channels, and up {size}.")
    check_shapes(gate=(gate, (neurons, size)), down_t=(down_t, (neurons, size)))
    check_shapes(gate_bias=(gate_bias, (neurons,)), up_bias=(up_bias, (neurons,)), down_bias=(down_bias, (size,)))
    check_shapes(down_scale=(down_scale, (neurons,)))
    if threshold is None and down_scale is not None:
        raise ValueError("down_scale is for a threshold, and none is given.")
    if threshold is not None and threshold.numel() != 1:
        raise ValueError(f"threshold has {threshold.numel()} elements, and should have one.")
    if chosen is not None:
        tokens = x.numel() // size
        if chosen.dim() != 2 or chosen.shape[0] not in (1, tokens) or chosen.dtype is not torch.int32:
            raise ValueError(f"chosen is {chosen.dtype} {tuple(chosen.shape)}, and should be int32 ({tokens}, slots).")
        check_shapes(weights=(weights, tuple(chosen.shape)))
    elif weights is not None:
        raise ValueError("weights are of chosen groups, and none are given.")
    return groups


def middle(up: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """What goes into the down projection, from what comes out of up and gate."""
    act = ACTIVATIONS[activation]
    return act(up) if gate is None else act(gate) * up


def factors(chosen: Tensor, weights: Tensor | None, tokens: int, groups: int) -> tuple[Tensor, Tensor]:
    """Which groups each token uses, bool, and the sum of their weights: both ``[N, E]``."""
    weights = torch.ones_like(chosen, dtype=torch.float32) if weights is None else weights
    # One column more takes what is not used.
    at = chosen.where(chosen >= 0, groups).long()
    used = torch.zeros(at.shape[0], groups + 1, dtype=torch.bool, device=at.device).scatter(1, at, True)
    total = weights.new_zeros(used.shape).scatter_add(1, at, weights)
    return used[:, :groups].expand(tokens, -1), total[:, :groups].expand(tokens, -1)


def grouped_reference(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down_t: Tensor,
    chosen: Tensor | None,
    weights: Tensor | None,
    shared: int,
    width: int,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    threshold: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> Tensor:
    """The meaning of ``grouped_ffn``: every neuron, and then those that count."""
    biases = {"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias}
    limits = {"threshold": threshold, "down_scale": down_scale}
    groups = check_grouped(x, gate, up, down_t, chosen, weights, shared, width, activation, **biases, **limits)
    gated = None if gate is None else F.linear(x, gate, gate_bias)
    hidden = middle(F.linear(x, up, up_bias), gated, activation).flatten(0, -2)
    if threshold is not None:
        hidden = kept(hidden, threshold.reshape(()), down_scale)
    if chosen is None:
        hidden, down_t = hidden[:, :shared], down_t[:shared]
    else:
        used, total = factors(chosen, weights, hidden.shape[0], groups)
        # Not a product with 0, which would let an infinite activation of a group through that nobody chose.
        rest = (hidden[:, shared:].unflatten(1, (groups, width)) * total.unsqueeze(2)).to(hidden.dtype)
        rest = rest.where(used.unsqueeze(2), torch.zeros_like(rest)).flatten(1)
        hidden = torch.cat([hidden[:, :shared], rest], 1)
    return F.linear(hidden, down_t.t(), down_bias).view(x.shape)


def route_reference(
    x: Tensor,
    gate: Tensor,
    up: Tensor | None,
    top_k: int,
    score: str,
    weigh: str,
    choice_bias: Tensor | None = None,
    logit_bias: Tensor | None = None,
    scale: Tensor | None = None,
    threshold: float | None = None,
    activation: str = "silu",
) -> tuple[Tensor, Tensor, Tensor]:
    """The meaning of ``route``."""
    vectors = {"choice_bias": choice_bias, "logit_bias": logit_bias, "scale": scale}
    check_route(x, gate, up, top_k, score, weigh, activation, **vectors)
    groups = gate.shape[0]
    # In fp32, since a rounding decides which group is taken; fp64 stays what it is.
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.flatten(0, -2).to(wide)
    logits = rows @ gate.to(wide).t()
    if up is not None:
        logits = ACTIVATIONS[activation](logits) * (rows @ up.to(wide).t())
    if logit_bias is not None:
        logits = logits + logit_bias
    p = SCORES[score](logits)
    ranked, order = (p if choice_bias is None else p + choice_bias).sort(dim=-1, descending=True, stable=True)
    ranked, order = ranked[:, :top_k], order[:, :top_k]
    used = torch.ones_like(order, dtype=torch.bool) if threshold is None else ~(ranked <= threshold)
    taken = p.gather(1, order).where(used, 0)
    if weigh == "normalized":
        taken = taken / taken.sum(1, keepdim=True)
    elif weigh == "unit":
        taken = torch.ones_like(taken) if scale is None else 1 + taken * scale[order]
    chosen = order.where(used, -1).to(torch.int32)
    at = order.where(used, groups).flatten()
    counts = torch.zeros(groups + 1, dtype=torch.int32, device=x.device)
    counts.scatter_add_(0, at, torch.ones_like(at, dtype=torch.int32))
    return chosen, taken.where(used, 0), counts[:groups].clone()


def check_route(
    x: Tensor,
    gate: Tensor,
    up: Tensor | None,
    top_k: int,
    score: str,
    weigh: str,
    activation: str,
    **vectors: Tensor | None,
) -> None:
    """Raise ``ValueError`` if arguments of ``route`` do not fit. ``vectors`` have a number for each group."""
    known(activation, ACTIVATIONS, "activation")
    known(score, SCORES, "score")
    known(weigh, WEIGHTS, "weigh")
    check_shapes(gate=(gate, (gate.shape[0], x.shape[-1])), up=(up, tuple(gate.shape)))
    check_shapes(**{name: (vector, (gate.shape[0],)) for name, vector in vectors.items()})
    if not 1 <= top_k <= gate.shape[0]:
        raise ValueError(f"top_k is {top_k}; there are {gate.shape[0]} groups.")


def kept(x: Tensor, threshold: Tensor, scale: Tensor | None) -> Tensor:
    """``x``, and 0 in channels that are not kept."""
    size = x.to(torch.promote_types(x.dtype, torch.float32)).abs()
    return x.masked_fill((size if scale is None else size * scale) <= threshold, 0)


def column_linear_reference(
    x: Tensor, weight_t: Tensor, threshold: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """The meaning of ``column_linear``."""
    check_columns(x, weight_t, threshold, 1, scale, bias)
    return F.linear(kept(x, threshold.reshape(()), scale), weight_t.t(), bias).contiguous()


def check_columns(
    x: Tensor,
    weight_t: Tensor,
    threshold: Tensor,
    count: int,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Raise ``ValueError`` if ``x``, a transposed weight and what chooses its rows do not fit each other."""
    if x.shape[-1] != weight_t.shape[0] or threshold.numel() != count:
        raise ValueError(
            f"x {tuple(x.shape)}, weight_t {tuple(weight_t.shape)} and {threshold.numel()} thresholds do not fit: "
            f"weight_t is [inputs, outputs], and the thresholds are {count}."
        )
    check_shapes(scale=(scale, (x.shape[-1],)), bias=(bias, (weight_t.shape[1],)))


def column_ffn_reference(
    x: Tensor,
    gate_t: Tensor | None,
    up_t: Tensor,
    down_t: Tensor,
    thresholds: Tensor,
    activation: str,
    gate_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """The meaning of ``column_ffn``."""
    scales = {"gate_scale": gate_scale, "up_scale": up_scale, "down_scale": down_scale}
    biases = {"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias}
    check_column_ffn(x, gate_t, up_t, down_t, thresholds, activation, **scales, **biases)
    first, second, third = thresholds.unbind()
    gated = None if gate_t is None else column_linear_reference(x, gate_t, first, gate_scale, gate_bias)
    hidden = middle(column_linear_reference(x, up_t, second, up_scale, up_bias), gated, activation)
    return column_linear_reference(hidden, down_t, third, down_scale, down_bias)


def check_column_ffn(
    x: Tensor,
    gate_t: Tensor | None,
    up_t: Tensor,
    down_t: Tensor,
    thresholds: Tensor,
    activation: str,
    *,
    gate_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> None:
    """Raise ``ValueError`` if arguments of ``column_ffn`` do not fit each other."""
    known(activation, ACTIVATIONS, "activation")
    check_columns(x, up_t, thresholds, 3)
    size, neurons = up_t.shape
    check_shapes(gate_t=(gate_t, (size, neurons)), down_t=(down_t, (neurons, size)))
    check_shapes(gate_scale=(gate_scale, (size,)), up_scale=(up_scale, (size,)), down_scale=(down_scale, (neurons,)))
    check_shapes(gate_bias=(gate_bias, (neurons,)), up_bias=(up_bias, (neurons,)), down_bias=(down_bias, (size,)))


def _body(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    def body(*args: Any, **given: Any) -> Any:
        try:
            return ops.launch(name, args[0].device.type, *args, **given)
        except ops.KernelUnavailable:
            return reference(*args, **given)

    return body


def _fake_grouped_ffn(x: Tensor, *args: Any, **given: Any) -> Tensor:
    check_grouped(x, *args, **given)
    return x.new_empty(x.shape)


def _fake_route(
    x: Tensor,
    gate: Tensor,
    up: Tensor | None,
    top_k: int,
    score: str,
    weigh: str,
    threshold: float | None = None,
    activation: str = "silu",
    **vectors: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_route(x, gate, up, top_k, score, weigh, activation, **vectors)
    tokens = x.numel() // x.shape[-1]
    chosen, counts = (x.new_empty(shape, dtype=torch.int32) for shape in ((tokens, top_k), (gate.shape[0],)))
    return chosen, x.new_empty(tokens, top_k, dtype=torch.promote_types(x.dtype, torch.float32)), counts


def _fake_column_linear(x: Tensor, weight_t: Tensor, threshold: Tensor, **given: Any) -> Tensor:
    check_columns(x, weight_t, threshold, 1, **given)
    return x.new_empty((*x.shape[:-1], weight_t.shape[1]))


def _fake_column_ffn(x: Tensor, *args: Any, **given: Any) -> Tensor:
    check_column_ffn(x, *args, **given)
    return x.new_empty(x.shape)


for _name, _reference, _fake in (
    ("grouped_ffn", grouped_reference, _fake_grouped_ffn),
    ("route", route_reference, _fake_route),
    ("column_linear", column_linear_reference, _fake_column_linear),
    ("column_ffn", column_ffn_reference, _fake_column_ffn),
):
    ops.library.impl(_name, _body(_name, _reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"effcompile::{_name}", _fake, lib=ops.library)
