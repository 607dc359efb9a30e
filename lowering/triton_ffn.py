"""FFNs that read a part of their weights, on GPUs: launchers of the operators of :mod:`effcompile.kernels.ffn_ops`,
and of what counts votes for neurons (:mod:`effcompile.kernels.core_ops`).

Nothing waits for the device and no shape depends on data: slots are sorted by group there, into as many tiles as there
could be. So a slot that names a group which is not there makes its token NaN, where a CPU raises ``IndexError``. Sums
are taken in one order, so that results are the same at every run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effcompile.kernels import core_ops, ffn_ops, ops
from effcompile.kernels.ops import KernelUnavailable
from effcompile.lowering import triton_operators as operators
from effcompile.lowering.triton_operators import Cut
from effcompile.lowering.triton_side import Vendor

LISTED_ROWS = 16
"""Tokens that one list of neurons serves in a kernel: more are limited by products, for which rows are gathered."""
LEAST_WIDTH = 16
"""Neurons of a group that fill a tile of a matrix product; of narrower ones most of a tile would be nothing."""
ROUTED_ALONE = 64
"""Tokens up to which each has a program of its own in a router; with more, 16 share what they read of it."""
MAX_ROUTED = 256
"""Groups that one program can rank."""
MAX_VOTED = 16384
"""Neurons of which one program can tell the largest: it holds all that a token says."""
BAND = 8
"""Tiles that are multiplied with the same part of a weight at a time, so that it is read from the cache."""


def grouped_cuts(each: int, dtype: torch.dtype, who: Vendor) -> tuple[Cut, Cut]:
    """Tiles of a grouped FFN with about ``each`` tokens in a group: of gate and up together, and of down.

    Chosen from ahead-of-time builds, as those without spills; ``tests/test_ffn_triton.py`` holds the budgets.
    """
    if dtype is torch.float32:
        rows = 16 if each <= 16 else 32
        return Cut(rows, 32, 32, 4, 2), Cut(rows, 64, 32, 4, 2)
    stages = 2 if who == "hip" else 3
    if each <= 16:
        return Cut(16, 32, 128, 4, stages), Cut(16, 64, 64, 4, stages)
    if each <= 64 or who == "hip":
        return Cut(64, 64, 64, 4, stages), Cut(64, 128, 64, 4, stages)
    return Cut(128, 64, 64, 8, stages), Cut(128, 128, 64, 8, stages)


def listed_cuts(rows: int, dtype: torch.dtype, who: Vendor) -> tuple[Cut, Cut]:
    """Tiles of an FFN over one list of neurons: of gate and up, columns being neurons, and of down."""
    wide = 1 if dtype is torch.float32 else 2
    if rows == 1:
        return Cut(1, 8, 256 * wide), Cut(1, 128 * wide, 16)
    stages = 2 if who == "hip" or wide == 1 else 3
    return Cut(16, 32, 64 * wide, 4, stages), Cut(16, 64, 32 * wide, 4, stages)


def column_cut(rows: int, gated: bool) -> Cut:
    """Tiles of column-sparse products of a power of two of rows: of one matrix, or of two."""
    depth = 16 if gated else 32
    return Cut(rows, 128, depth) if rows == 1 else Cut(rows, 64, depth // 2, 4 if rows <= 4 else 8)


def route_cut(rows: int, groups: int, dtype: torch.dtype) -> Cut:
    """Tiles of a router: about as much is read at a time however many groups there are."""
    columns = operators.power(groups)
    if rows <= ROUTED_ALONE:
        return Cut(1, columns, max(16, min(1024, 8192 // columns)), 8)
    # Products of matrices have 16 columns at least; of two stages, with as many rows, gfx942 has 64 KiB to hold.
    columns = max(16, columns)
    depth = min(32 if dtype is torch.float32 else 64, 16384 // (columns * dtype.itemsize))
    return Cut(16, columns, depth, 8 if columns > 64 else 4, 2)


def written(operator: str, dtype: torch.dtype) -> tuple[str, str]:
    """The file of an operator's kernels, which Triton builds for each dtype and size it meets, and its text."""
    names = {"route": "route", "column_linear": "columns", "column_ffn": "columns", "core_votes": "core"}
    file = Path(ffn_ops.__file__).parent / "triton" / f"{names.get(operator, 'ffn')}.py"
    return str(file), file.read_text()


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
    """Launcher of ``effcompile::grouped_ffn`` on GPUs. There is no kernel for a threshold.

    A few tokens with one list: three kernels, which read what is listed. Many with lists of their own: products over
    tiles, and the shared neurons by the library. Many with one list: the library, on what was gathered.
    """
    biases = {"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias}
    limits = {"threshold": threshold, "down_scale": down_scale}
    groups = ffn_ops.check_grouped(
        x, gate, up, down_t, chosen, weights, shared, width, activation, **biases, **limits
    )  # fmt: skip
    if threshold is not None:
        raise KernelUnavailable("neurons of groups that a threshold leaves out (C++ kernels have them)")
    size = up.shape[1]
    operators.check(x.dtype, gate=gate, up=up, down_t=down_t, **biases)
    operators.check(torch.float32, weights=weights)
    if chosen is not None and not groups:
        raise KernelUnavailable("lists of groups for an FFN that has none")
    tokens = x.contiguous().view(-1, size)
    block = _Block(gate, up, down_t, gate_bias, up_bias, down_bias, activation, shared, width, groups)
    chosen = None if chosen is None else chosen.contiguous()
    if chosen is None or chosen.shape[0] == 1:
        compute = block.listed if len(tokens) <= LISTED_ROWS else block.gathered
        return compute(tokens, chosen, weights).view(x.shape)
    if width < LEAST_WIDTH:
        raise KernelUnavailable(f"groups of {width} neurons and a list for each token; tiles hold {LEAST_WIDTH}")
    return block.tiled(tokens, chosen, weights).view(x.shape)


class _Block(NamedTuple):
    """The weights of a call of ``grouped_ffn``, and the ways to compute it for rows ``[N, d]``."""

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str
    shared: int
    width: int
    groups: int

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """Gate and up with their biases, as arguments of a kernel; ``up`` stands for what is absent."""
        given = (self.gate, self.up, self.gate_bias, self.up_bias)
        return tuple(self.up if t is None else t for t in given)

    @property
    def parts(self) -> dict[str, Any]:
        """What the kernels of gate and up are made of."""
        biases = {"GATE_BIAS": self.gate_bias is not None, "UP_BIAS": self.up_bias is not None}
        return {"GATED": self.gate is not None, **biases, "ACT": self.activation}

    def listed(self, x: Tensor, chosen: Tensor | None, weights: Tensor | None) -> Tensor:
        """A few tokens and one list for all."""
        rows, size = x.shape
        active = self.shared + (0 if chosen is None else chosen.shape[1] * self.width)
        hidden_cut, cut = listed_cuts(rows, x.dtype, operators.vendor())
        hidden = x.new_empty(rows, active)
        sizes, listed = (self.shared, self.width, self.groups, size), chosen is not None
        slots = x if chosen is None else chosen
        how = {"LISTED": listed, "PRECISION": operators.precision_of(x.dtype, operators.vendor())}
        operators.kernel("ffn", "listed_hidden", x.dtype).launch(
            "", -(-active // hidden_cut.columns), x, *self.matrices, slots, x if weights is None else weights, hidden,
            rows, active, *sizes, **self.parts, WEIGHTED=weights is not None, **how, **hidden_cut.options,
        )  # fmt: skip
        blocks = -(-size // cut.columns)
        splits, each = operators.splits(active, blocks, cut.depth, x.device)
        parts = x.new_empty(splits, rows, size, dtype=torch.float32)
        operators.kernel("ffn", "listed_down", x.dtype).launch(
            "", splits * blocks, hidden, self.down, slots, parts, rows, active, *sizes, each, **how,
            **cut.options,
        )  # fmt: skip
        return operators.add_up(parts, torch.empty_like(x), splits, (rows * size, size), self.down_bias)

    def gathered(self, x: Tensor, chosen: Tensor | None, weights: Tensor | None) -> Tensor:
        """Many tokens and one list for all, by the library: the rows that count are copied, once for all tokens."""
        rows: Any = slice(0, self.shared)
        if chosen is not None:
            device, slots = x.device, chosen.shape[1]
            base = torch.arange(self.shared, self.shared + self.width, device=device)
            there = chosen.view(-1, 1).clamp(0, self.groups - 1)
            rows = torch.cat([torch.arange(self.shared, device=device), (there * self.width + base).flatten()])
            weights = torch.ones_like(chosen, dtype=torch.float32) if weights is None else weights
            weights = weights.masked_fill(chosen >= self.groups, torch.nan)
            chosen = torch.arange(slots, dtype=torch.int32, device=device).where(chosen >= 0, -1)
        gate, up, down, gate_bias, up_bias = (
            None if t is None else t[rows] for t in (self.gate, self.up, self.down, self.gate_bias, self.up_bias)
        )
        assert up is not None
        assert down is not None
        sizes = (self.shared, self.width, self.activation)
        return ffn_ops.grouped_reference(
            x, gate, up, down, chosen, weights, *sizes, gate_bias, up_bias, self.down_bias
        )  # fmt: skip

    def tiled(self, x: Tensor, chosen: Tensor, weights: Tensor | None) -> Tensor:
        """A list for each token: its slots sorted by group, and tiles of them multiplied with their group's rows."""
        size, total, (_, slots) = x.shape[1], chosen.numel(), chosen.shape
        hidden_cut, cut = grouped_cuts(total // self.groups, x.dtype, operators.vendor())
        order, bounds = (chosen.new_empty(n) for n in (total, self.groups + 1))
        operators.kernel("ffn", "sort_slots", x.dtype).launch(
            "", self.groups, chosen, order, bounds, total, self.groups, BLOCK=1024, num_warps=4
        )
        tiles = total // cut.rows + min(self.groups, total)
        hidden = x.new_empty(total, self.width)
        parts = x.new_empty(total, size, dtype=torch.float32)
        sizes = (tiles, self.shared, self.width, self.groups, size)
        how: dict[str, Any] = {"PRECISION": operators.precision_of(x.dtype, operators.vendor())}
        how |= {"BAND": BAND, "GROUPS": operators.power(self.groups)}
        operators.kernel("ffn", "grouped_hidden", x.dtype).launch(
            "", tiles * -(-self.width // hidden_cut.columns), x, *self.matrices, order, bounds,
            x if weights is None else weights, hidden, *sizes, slots, **self.parts, WEIGHTED=weights is not None, **how,
            **hidden_cut.options,
        )  # fmt: skip
        operators.kernel("ffn", "grouped_down", x.dtype).launch(
            "", tiles * -(-size // cut.columns), hidden, self.down, order, bounds, parts, *sizes, **how, **cut.options
        )
        shared = self._replace(down_bias=None).gathered(x, None, None) if self.shared else None
        steps = size, slots * size
        return operators.add_up(parts, torch.empty_like(x), slots, steps, self.down_bias, shared, chosen, self.groups)


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
    """Launcher of ``effcompile::route`` on GPUs."""
    vectors = {"choice_bias": choice_bias, "logit_bias": logit_bias, "scale": scale}
    ffn_ops.check_route(x, gate, up, top_k, score, weigh, activation, **vectors)
    groups, size = gate.shape
    if groups > MAX_ROUTED:
        raise KernelUnavailable(f"a router of {groups} groups; one program ranks {MAX_ROUTED}")
    operators.check(x.dtype, gate=gate, up=up)
    operators.check(torch.float32, **vectors)
    rows = x.numel() // size
    chosen = x.new_empty((rows, top_k), dtype=torch.int32)
    weights = x.new_empty((rows, top_k), dtype=torch.float32)
    counts = x.new_zeros(groups, dtype=torch.int32)
    cut = route_cut(rows, groups, x.dtype)
    # Logits decide which groups are taken: for fp32 no product of fewer bits.
    operators.kernel("route", "route_tokens", x.dtype).launch(
        "", -(-rows // cut.rows), x.contiguous(), gate, gate if up is None else up,
        *(weights if t is None else t for t in vectors.values()), chosen, weights, counts,
        0.0 if threshold is None else threshold, rows, size, groups,
        GATED=up is not None, CHOICE=choice_bias is not None, LOGIT=logit_bias is not None, SCALED=scale is not None,
        LIMITED=threshold is not None, ACT=activation, SCORE=score, WEIGH=weigh, TOP=top_k,
        SLOTS=operators.power(top_k), PRECISION="ieee", GROUPS=cut.columns, ROWS=cut.rows, DEPTH=cut.depth,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return chosen, weights, counts


def _column_parts(
    x: Tensor, gate: Tensor | None, up: Tensor, thresholds: Tensor, gate_scale: Tensor | None, up_scale: Tensor | None
) -> Tensor:
    """``[splits, 1 or 2, rows, outputs]`` fp32: gate, if there is one, and up times rows ``x``, in parts."""
    (rows, inputs), outputs = x.shape, up.shape[1]
    cut = column_cut(operators.power(rows), gate is not None)
    blocks = -(-outputs // cut.columns)
    splits, each = operators.splits(inputs, blocks, cut.depth, x.device)
    parts = x.new_empty((splits, 1 if gate is None else 2, rows, outputs), dtype=torch.float32)
    operators.kernel("columns", "column_product", x.dtype).launch(
        "", splits * blocks, x, up if gate is None else gate, up, thresholds,
        *(thresholds if t is None else t for t in (gate_scale, up_scale)), parts, rows, inputs, outputs, each,
        GATED=gate is not None, GATE_SCALED=gate_scale is not None, UP_SCALED=up_scale is not None, **cut.options,
    )  # fmt: skip
    return parts


def column_linear(
    x: Tensor, weight_t: Tensor, threshold: Tensor, *, scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Launcher of ``effcompile::column_linear`` on GPUs; many tokens are multiplied by the library."""
    inputs, outputs = weight_t.shape
    rows = x.numel() // inputs
    if rows > ffn_ops.COLUMN_ROWS or not rows:
        return ffn_ops.column_linear_reference(x, weight_t, threshold, scale, bias)
    ffn_ops.check_columns(x, weight_t, threshold, 1, scale, bias)
    operators.check(x.dtype, weight_t=weight_t, bias=bias)
    operators.check(torch.float32, threshold=threshold, scale=scale)
    parts = _column_parts(x.contiguous().view(rows, inputs), None, weight_t, threshold, None, scale)
    out = x.new_empty((rows, outputs))
    return operators.add_up(parts, out, len(parts), (rows * outputs, outputs), bias).view(*x.shape[:-1], outputs)


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
    """Launcher of ``effcompile::column_ffn`` on GPUs: gate and up in one product, the activation, down, the sum."""
    scales = {"gate_scale": gate_scale, "up_scale": up_scale, "down_scale": down_scale}
    biases = {"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias}
    size, neurons = up_t.shape
    rows = x.numel() // size
    if rows > ffn_ops.COLUMN_ROWS or not rows:
        return ffn_ops.column_ffn_reference(x, gate_t, up_t, down_t, thresholds, activation, **scales, **biases)
    ffn_ops.check_column_ffn(x, gate_t, up_t, down_t, thresholds, activation, **scales, **biases)
    operators.check(x.dtype, gate_t=gate_t, up_t=up_t, down_t=down_t, **biases)
    operators.check(torch.float32, thresholds=thresholds, **scales)
    first = thresholds if gate_t is not None else thresholds[1:]
    parts = _column_parts(x.contiguous().view(rows, size), gate_t, up_t, first, gate_scale, up_scale)
    hidden = x.new_empty((rows, neurons))
    operators.kernel("columns", "column_middle", x.dtype).launch(
        "", rows * -(-neurons // 128), parts, *(hidden if t is None else t for t in (gate_bias, up_bias)), hidden,
        len(parts), rows, neurons, GATED=gate_t is not None, GATE_BIAS=gate_t is not None and gate_bias is not None,
        UP_BIAS=up_bias is not None, ACT=activation, PARTS=operators.power(len(parts)), COLUMNS=128, num_warps=4,
    )  # fmt: skip
    parts = _column_parts(hidden, None, down_t, thresholds[2:], None, down_scale)
    out = x.new_empty((rows, size))
    return operators.add_up(parts, out, len(parts), (rows * size, size), down_bias).view(x.shape)


def core_votes(hidden: Tensor, counted: Tensor | None, rows: int, alpha: float, magnitude: bool) -> Tensor:
    """Launcher of ``effcompile::core_votes`` on GPUs: each token's last core neuron is found bit by bit, unsorted."""
    core_ops.check_votes(hidden, counted, rows, alpha)
    neurons = hidden.shape[-1]
    if neurons > MAX_VOTED:
        raise KernelUnavailable(f"votes for {neurons} neurons; one program ranks {MAX_VOTED}")
    tokens = hidden.numel() // (rows * neurons)
    counted = None if counted is None else counted.contiguous()
    # In fp64, as the operator means it; an argument of a kernel would be fp32.
    limits = (alpha * torch.arange(neurons + 1, dtype=torch.float64, device=hidden.device)).to(torch.int32)
    votes = limits.new_zeros(rows, neurons)
    room = max(16, operators.power(neurons))
    operators.kernel("core", "token_votes", hidden.dtype).launch(
        "", rows * tokens, hidden.contiguous(), limits if counted is None else counted, limits, votes,
        tokens, 0 if counted is None or len(counted) == 1 else tokens, neurons, MASKED=counted is not None,
        MAGNITUDE=magnitude, NEURONS=room, BITS=room.bit_length(), num_warps=min(16, max(4, room // 1024)),
    )  # fmt: skip
    return votes


for _launcher in (grouped_ffn, route, column_linear, column_ffn, core_votes):
    ops.register_launcher(_launcher.__name__, "cuda", _launcher)
