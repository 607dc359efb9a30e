"""FFNs that read a part of their weights, on GPUs: launchers of the operators of :mod:`effcompile.kernels.ffn_ops`.

Nothing waits for the device and no shape depends on data: tokens are sorted by group there, into as many tiles as there
could be. A slot that names a group that is not there counts as unused. Results are the same at every run: what tokens
get from their groups is added up in the order of their slots, and splits in their own order.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from effcompile.kernels import ffn_ops, ops
from effcompile.kernels.ops import KernelUnavailable
from effcompile.kernels.program import DTYPES
from effcompile.lowering.triton_build import Built

LEAST_WIDTH = 16
"""Neurons of a group that fill a tile of a matrix product; of narrower ones most of a tile would be nothing."""
SPLIT_INPUTS = 512
"""Inputs of one split of a column-sparse product: enough programs for the device, few results to add up."""
MAX_ROUTED = 256
"""Groups that one program can rank."""


@functools.cache
def _kernel(name: str) -> Built:
    try:
        from effcompile.kernels.triton import ffn
    except ImportError as error:
        raise KernelUnavailable("Triton is not installed") from error
    return Built(name, str(ffn.__file__), ffn, None, 0)


def _check_dtypes(dtype: torch.dtype, *tensors: Tensor | None) -> None:
    if dtype not in DTYPES:
        raise KernelUnavailable(f"an FFN in {dtype} ({', '.join(map(str, DTYPES))} have kernels)")
    for tensor in tensors:
        if tensor is not None and (tensor.dtype is not dtype or not tensor.is_contiguous()):
            raise KernelUnavailable(f"a {tensor.dtype} tensor with strides {tensor.stride()} beside x in {dtype}")


class Tiles(NamedTuple):
    """Slots sorted by group, and tiles of them; see :mod:`effcompile.kernels.triton.ffn`."""

    order: Tensor
    group: Tensor
    first: Tensor
    rows: Tensor


def tiles_of(chosen: Tensor, groups: int, rows: int) -> Tiles:
    """The tiles of at most ``rows`` slots of one group each, for slots ``[N, k]``, all on the device."""
    flat = chosen.flatten()
    group = flat.where((flat >= 0) & (flat < groups), groups)
    ranked, order = group.sort(stable=True)
    bounds = torch.searchsorted(ranked, torch.arange(groups + 1, dtype=torch.int32, device=flat.device))
    begin, counts = bounds[:-1], bounds[1:] - bounds[:-1]
    needed = (counts + rows - 1) // rows
    end = needed.cumsum(0)
    most = flat.numel() // rows + min(groups, flat.numel())
    tile = torch.arange(most, device=flat.device)
    of = torch.searchsorted(end, tile, right=True)
    at = of.clamp(max=groups - 1)
    done = (tile - (end[at] - needed[at])) * rows
    first, count = begin[at] + done, (counts[at] - done).clamp(max=rows)
    return Tiles(*(t.to(torch.int32) for t in (order, of.where(of < groups, -1), first, count)))


def grouped_ffn(
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
) -> Tensor:
    """Launcher of ``effcompile::grouped_ffn`` on GPUs: shared neurons by the library, chosen ones tile by tile."""
    groups = ffn_ops.check_grouped(x, gate, up, down_t, chosen, weights, shared, width, activation)
    _check_dtypes(x.dtype, gate, up, down_t, gate_bias, up_bias, down_bias)
    biases = (gate_bias, up_bias)
    parts = [None if t is None else t[:shared] for t in (gate, up, down_t, *biases)]
    size, x = up.shape[1], x.contiguous()
    tokens = x.view(-1, size)
    if chosen is None or not groups or not chosen.numel():
        return ffn_ops.grouped_reference(x, *parts[:3], None, None, shared, 1, activation, *parts[3:], down_bias)  # type: ignore[arg-type]
    if width < LEAST_WIDTH:
        raise KernelUnavailable(f"groups of {width} neurons; tiles hold {LEAST_WIDTH}")
    slots = chosen.shape[1]
    every = chosen.expand(len(tokens), slots)
    weights = chosen.new_ones((1, 1), dtype=torch.float32) if weights is None else weights
    weights = weights.expand(every.shape).contiguous()
    few = every.numel() // groups <= 16
    rows, columns, depth = (16, 32, 64) if few else (64, 64, 32)
    tiles = tiles_of(every, groups, rows)
    hidden = x.new_empty(every.numel(), width)
    # A slot that is not used is in no tile, and stays 0.
    added = x.new_zeros(every.numel(), size, dtype=torch.float32)
    absent = up  # stands for what is not there; never read
    # As in attention: on NVIDIA three tf32 products, on AMD its own fp32 ones.
    precision = "tf32x3" if x.dtype is torch.float32 and not torch.version.hip else "ieee"
    common = {"PRECISION": precision, "ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "num_warps": 4}
    count, where = len(tiles.group), (tiles.group, tiles.first, tiles.rows)
    biased = any(b is not None for b in biases)
    if biased:
        biases = tuple(up.new_zeros(len(up)) if b is None else b for b in biases)  # type: ignore[assignment]
    _kernel("grouped_hidden").launch(
        "", count * -(-width // columns),
        tokens, absent if gate is None else gate, up, *(absent if b is None else b for b in biases),
        tiles.order, weights, *where, hidden, shared, width, size, slots,
        GATED=gate is not None, BIASED=biased, ACT=activation, **common,
    )  # fmt: skip
    _kernel("grouped_down").launch(
        "", count * -(-size // columns),
        hidden, down_t, tiles.order, *where, added, shared, width, size, **common,
    )  # fmt: skip
    out = added.view(len(tokens), slots, size).sum(1)
    if shared:
        prefix = ffn_ops.grouped_reference(tokens, *parts[:3], None, None, shared, 1, activation, *parts[3:])  # type: ignore[arg-type]
        out = out + prefix
    if down_bias is not None:
        out = out + down_bias
    return out.to(x.dtype).view(x.shape)


def route(
    x: Tensor,
    gate: Tensor,
    up: Tensor | None,
    top_k: int,
    score: str,
    weigh: str,
    *,
    choice_bias: Tensor | None = None,
    logit_bias: Tensor | None = None,
    scale: Tensor | None = None,
    threshold: float | None = None,
    activation: str = "silu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Launcher of ``effcompile::route`` on GPUs: a program for each token."""
    ffn_ops.check_route(x, gate, up, top_k, score, weigh, activation)
    _check_dtypes(x.dtype, gate, up)
    groups, size = gate.shape
    if groups > MAX_ROUTED:
        raise KernelUnavailable(f"a router of {groups} groups; one program ranks {MAX_ROUTED}")
    vectors = (choice_bias, logit_bias, scale)
    _check_dtypes(torch.float32, *vectors)
    names = ("choice_bias", "logit_bias", "scale")
    ffn_ops.check_shapes(**{name: (t, (groups,)) for name, t in zip(names, vectors)})
    tokens = x.numel() // size
    chosen = x.new_empty((tokens, top_k), dtype=torch.int32)
    weights = x.new_empty((tokens, top_k), dtype=torch.float32)
    counts = x.new_zeros(groups, dtype=torch.int32)
    _kernel("route_token").launch(
        "", tokens,
        x.contiguous(), gate, gate if up is None else up, *(weights if t is None else t for t in vectors),
        chosen, weights, counts, 0.0 if threshold is None else threshold, size, groups,
        GATED=up is not None, CHOICE=choice_bias is not None, LOGIT=logit_bias is not None,
        SCALED=scale is not None and weigh == "unit", LIMITED=threshold is not None, ACT=activation, SCORE=score,
        WEIGH=weigh, SLOTS=top_k, ALL=_power(top_k), GROUPS=_power(groups), DEPTH=128, num_warps=4,
    )  # fmt: skip
    return chosen, weights, counts


def _power(count: int) -> int:
    """``count`` rounded up to a power of two."""
    return 1 << (count - 1).bit_length()


def column_linear(
    x: Tensor, weight_t: Tensor, threshold: Tensor, *, scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Launcher of ``effcompile::column_linear`` on GPUs; many tokens are multiplied by the library."""
    inputs, outputs = weight_t.shape
    rows = x.numel() // inputs
    if rows > ffn_ops.COLUMN_ROWS or not rows:
        return ffn_ops.column_linear_reference(x, weight_t, threshold, scale, bias)
    ffn_ops.check_columns(x, weight_t, threshold, 1, scale)
    _check_dtypes(x.dtype, weight_t, bias)
    _check_dtypes(torch.float32, threshold, scale)
    x = x.contiguous()
    splits, columns = -(-inputs // SPLIT_INPUTS), 64
    parts = x.new_empty((splits, rows, outputs), dtype=torch.float32)
    _kernel("column_product").launch(
        "", splits * -(-outputs // columns),
        x, weight_t, threshold, weight_t if scale is None else scale, parts, rows, inputs, outputs, SPLIT_INPUTS,
        SCALED=scale is not None, ROWS=_power(rows), DEPTH=16, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    out = parts.sum(0)
    out = out if bias is None else out + bias
    return out.to(x.dtype).view(*x.shape[:-1], outputs)


def column_ffn(
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
) -> Tensor:
    """Launcher of ``effcompile::column_ffn`` on GPUs: three ``column_linear``."""
    ffn_ops.check_column_ffn(x, gate_t, up_t, down_t, thresholds, activation)
    first, second, third = thresholds.unbind()
    gated = None if gate_t is None else column_linear(x, gate_t, first, scale=gate_scale, bias=gate_bias)
    hidden = column_linear(x, up_t, second, scale=up_scale, bias=up_bias)
    hidden = ffn_ops.middle(hidden, gated, activation)
    return column_linear(hidden, down_t, third, scale=down_scale, bias=down_bias)


for _launcher in (grouped_ffn, route, column_linear, column_ffn):
    ops.register_launcher(_launcher.__name__, "cuda", _launcher)
