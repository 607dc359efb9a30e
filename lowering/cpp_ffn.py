"""FFNs that read a part of their weights, on CPUs: launchers of the operators of :mod:`effcompile.kernels.ffn_ops`,
and of what counts votes for neurons (:mod:`effcompile.kernels.core_ops`).

Few tokens are limited by the weights that are read, and read none twice and none that do not count; many of them by
ATen's matrix products. All shapes share a library; the dtype chooses it.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from effcompile.kernels import core_ops, ffn_ops, ops
from effcompile.kernels.ops import KernelUnavailable
from effcompile.lowering.cpp_operators import Entry, Library, pointer

# Headers of ATen take long to compile, and decoding needs none: what multiplies with it is a library of its own.
LIBRARY = Library(
    "ffn",
    "an FFN",
    ("grouped.h", "route.h", "sparse.h", "core.h"),
    {
        "grouped_ffn": "GroupedArgs",
        "route": "RouteArgs",
        "column_linear": "ColumnArgs",
        "column_ffn": "ColumnFfnArgs",
        "core_votes": "VotesArgs",
    },
)
MANY = Library("ffn_many", "an FFN", ("grouped_many.h",), {"grouped_ffn_many": "GroupedArgs"})
# The fields of these.
_GROUPED = struct.Struct("=4q 3q 5q 9q").pack
_ROUTE = struct.Struct("=9q 8q d q").pack
_COLUMN = struct.Struct("=6q 4q").pack
_COLUMN_FFN = struct.Struct("=q 3q q 3q 3q q 5q").pack
_VOTES = struct.Struct("=3q 5q d q").pack
WITH_KERNELS = ("silu", "gelu", "gelu_tanh", "relu")
"""Those that have a kernel, in the order of ``kernels/cpp/rows.h``."""

GROUPED_ROWS = 64
"""Tokens up to which a group's weights are read row by row rather than multiplied by ATen."""

ROUTE_SINGLE = 1 << 16
"""Products of a router up to which waking a second thread costs more than it saves."""


def _activation(name: str) -> int:
    if name not in WITH_KERNELS:
        raise KernelUnavailable(f"an FFN with {name} ({', '.join(WITH_KERNELS)} have C++ kernels)")
    return WITH_KERNELS.index(name)


def _grouped(rows: int, dtype: torch.dtype) -> Entry:
    return LIBRARY.entry("grouped_ffn", dtype) if rows <= GROUPED_ROWS else MANY.entry("grouped_ffn_many", dtype)


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
    threshold: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> Tensor:
    """Launcher of ``effcompile::grouped_ffn`` on CPUs. Arguments and result are the operator's.

    Raises
    ------
    IndexError
        If a slot names a group that is not there.
    """
    biases = {"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias}
    limits = {"threshold": threshold, "down_scale": down_scale}
    groups = ffn_ops.check_grouped(
        x, gate, up, down_t, chosen, weights, shared, width, activation, **biases, **limits
    )  # fmt: skip
    neurons, size = up.shape
    rows, dtype = x.numel() // size, x.dtype
    x = x.contiguous()
    out = torch.empty_like(x)
    if not rows:
        return out
    chosen = None if chosen is None else chosen.contiguous()
    weights = None if weights is None else weights.contiguous()
    entry = _grouped(rows, dtype)
    code = entry(
        _GROUPED(
            x.data_ptr(),
            *(pointer(t, dtype) for t in (gate, up, down_t, *biases.values())),
            pointer(chosen, torch.int32),
            *(pointer(t, torch.float32) for t in (weights, *limits.values())),
            out.data_ptr(),
            rows,
            size,
            neurons,
            shared,
            width,
            _activation(activation),
            *((0, 0) if chosen is None else chosen.shape),
            torch.get_num_threads(),
        )
    )
    if code == 2:
        raise IndexError(f"chosen names a group that is not there; there are {groups}.")
    return out


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
    """Launcher of ``effcompile::route`` on CPUs. Arguments and results are the operator's."""
    vectors = {"choice_bias": choice_bias, "logit_bias": logit_bias, "scale": scale}
    ffn_ops.check_route(x, gate, up, top_k, score, weigh, activation, **vectors)
    groups, size = gate.shape
    rows, dtype = x.numel() // size, x.dtype
    x = x.contiguous()
    chosen = x.new_empty((rows, top_k), dtype=torch.int32)
    weights = x.new_empty((rows, top_k), dtype=torch.float32)
    counts = x.new_empty(groups, dtype=torch.int32)
    threads = torch.get_num_threads() if rows * groups * size > ROUTE_SINGLE else 1
    LIBRARY.entry("route", dtype)(
        _ROUTE(
            x.data_ptr(),
            pointer(gate, dtype),
            pointer(up, dtype),
            *(pointer(t, torch.float32) for t in vectors.values()),
            chosen.data_ptr(),
            weights.data_ptr(),
            counts.data_ptr(),
            rows,
            size,
            groups,
            top_k,
            list(ffn_ops.SCORES).index(score),
            ffn_ops.WEIGHTS.index(weigh),
            _activation(activation),
            threshold is not None,
            threshold or 0.0,
            threads,
        )
    )
    return chosen, weights, counts


def column_linear(
    x: Tensor, weight_t: Tensor, threshold: Tensor, *, scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Launcher of ``effcompile::column_linear`` on CPUs. Arguments and result are the operator's."""
    inputs, outputs = weight_t.shape
    rows, dtype = x.numel() // inputs, x.dtype
    if rows > ffn_ops.COLUMN_ROWS or not rows:
        return ffn_ops.column_linear_reference(x, weight_t, threshold, scale, bias)
    ffn_ops.check_columns(x, weight_t, threshold, 1, scale, bias)
    entry, x = LIBRARY.entry("column_linear", dtype), x.contiguous()
    out = x.new_empty((*x.shape[:-1], outputs))
    entry(
        _COLUMN(
            x.data_ptr(),
            pointer(weight_t, dtype),
            pointer(threshold, torch.float32),
            pointer(scale, torch.float32),
            pointer(bias, dtype),
            out.data_ptr(),
            rows,
            inputs,
            outputs,
            torch.get_num_threads(),
        )
    )
    return out


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
    """Launcher of ``effcompile::column_ffn`` on CPUs. Arguments and result are the operator's."""
    scales = {"gate_scale": gate_scale, "up_scale": up_scale, "down_scale": down_scale}
    biases = {"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias}
    size, neurons = up_t.shape
    rows, dtype = x.numel() // size, x.dtype
    if rows > ffn_ops.COLUMN_ROWS or not rows:
        return ffn_ops.column_ffn_reference(x, gate_t, up_t, down_t, thresholds, activation, **scales, **biases)
    ffn_ops.check_column_ffn(x, gate_t, up_t, down_t, thresholds, activation, **scales, **biases)
    entry, x = LIBRARY.entry("column_ffn", dtype), x.contiguous()
    out = torch.empty_like(x)
    entry(
        _COLUMN_FFN(
            x.data_ptr(),
            *(pointer(t, dtype) for t in (gate_t, up_t, down_t)),
            pointer(thresholds, torch.float32),
            *(pointer(t, torch.float32) for t in scales.values()),
            *(pointer(t, dtype) for t in biases.values()),
            out.data_ptr(),
            rows,
            size,
            neurons,
            _activation(activation),
            torch.get_num_threads(),
        )
    )
    return out


def core_votes(hidden: Tensor, counted: Tensor | None, rows: int, alpha: float, magnitude: bool) -> Tensor:
    """Launcher of ``effcompile::core_votes`` on CPUs. Arguments and result are the operator's."""
    core_ops.check_votes(hidden, counted, rows, alpha)
    neurons, dtype = hidden.shape[-1], hidden.dtype
    entry = LIBRARY.entry("core_votes", dtype)
    hidden = hidden.contiguous()
    counted = None if counted is None else counted.contiguous()
    votes = hidden.new_empty((rows, neurons), dtype=torch.int32)
    entry(
        _VOTES(
            hidden.data_ptr(),
            pointer(counted, torch.bool),
            votes.data_ptr(),
            rows,
            hidden.numel() // (rows * neurons),
            neurons,
            1 if counted is None else counted.shape[0],
            magnitude,
            alpha,
            torch.get_num_threads(),
        )
    )
    return votes


for _name, _launcher in (
    ("core_votes", core_votes),
    ("grouped_ffn", grouped_ffn),
    ("route", route),
    ("column_linear", column_linear),
    ("column_ffn", column_ffn),
):
    ops.register_launcher(_name, "cpu", _launcher)
