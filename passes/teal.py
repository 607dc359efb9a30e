"""TEAL: input channels that are small for a token are not multiplied.

Paper: Training-Free Activation Sparsity in Large Language Models (Liu et al., ICLR 2025, arXiv 2408.14690), sections
4.2 (thresholds) and 4.3 (greedy sparsities, algorithm 1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from sympy import Rational, ceiling  # type: ignore[import-untyped]
from torch import Tensor, fx
from torch.nn import functional as F

from effcompile.kernels import ffn_cost, ffn_ops
from effcompile.kernels.cost import Cost
from effcompile.kernels.ffn import FeedForward
from effcompile.passes.feed_forward import TOKENS, Calibrated, Found, Put, Sizes
from effcompile.passes.stack import OnTop
from effcompile.runtime.plan import Record
from effcompile.runtime.statistics import Magnitudes, Statistic

_PARTS = ("gate", "up", "down")

STEP, ROWS = 0.025, 128
"""What the greedy search adds to the sparsity of one linear at a time, and rows of a block that it looks at."""


@dataclasses.dataclass(frozen=True)
class Teal(OnTop):
    """Drop, for each token, the input channels of gate, up and down that are small: ``|x| <= threshold``.

    Parameters
    ----------
    sparsity
        Share of the weights that thresholds leave unread on the calibration text, 0 to 1.
    allocation
        ``"uniform"``: this share of the inputs of every linear; ``"greedy"``: shares of their own for gate, up and
        down, found in small steps, each at the linear where it costs the block least, until they have this mean.
    transform
        Rotate the inputs of gate and up, ``x V`` with weights ``W V``, so that the columns of the first of them are
        orthogonal (``V`` of its singular vectors). That is one more product with a matrix ``[d, d]``, which reads all
        of it: the output stays, and other channels are the small ones.

    Notes
    -----
    Thresholds are quantiles of what was seen; the official code assumes a symmetric distribution. Every token is
    treated alike; the published figures leave half of each prompt dense.
    """

    sparsity: float = 0.25
    allocation: Literal["uniform", "greedy"] = "uniform"
    transform: bool = False

    name: ClassVar[str] = "teal"
    paper: ClassVar[str] = "TEAL (Liu et al., ICLR 2025)"
    summary: ClassVar[str] = "feed-forward: input channels that are small for a token are not multiplied"
    limit: ClassVar[dict[str, Any]] = {"sparsity": 0.0}

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity!r}; expected a share from 0 to below 1.")

    def scales(self, block: FeedForward) -> dict[str, Tensor]:
        """What each channel counts in each linear, fp32 ``[channels]``; empty for ones."""
        return {}

    def statistics(self, block: FeedForward) -> dict[str, Statistic]:
        """Histograms of what the linears read."""
        rotation = rotation_of(block) if self.transform else None
        scales = self.scales(rotated(block, rotation))
        return {
            part: Magnitudes("middle", scales.get(part))
            if part == "down"
            else Magnitudes("input", scales.get(part), rotation=rotation)
            for part in parts_of(block)
        }

    def calibrate(self, sites: Sequence[Calibrated]) -> list[Found]:
        """The thresholds of gate, up and down, and what they are from."""
        return [self._found(site) for site in sites]

    def _found(self, site: Calibrated) -> Found:
        seen = {part: one for part, one in site.statistics.items() if isinstance(one, Magnitudes)}
        # On groups that tokens choose, only inputs of down were looked at.
        rotation = seen["up"].rotation if "up" in seen else None
        levels = dict.fromkeys(seen, self.sparsity)
        if self.allocation == "greedy":
            rows = site.samples.input[:: -(-site.samples.input.shape[0] // ROWS)].float()
            block = rotated(single(site.block), rotation)
            levels = self._allocate(block, rows if rotation is None else rows @ rotation, seen)
        tensors = {"thresholds": torch.zeros(3)}
        for part, level in levels.items():
            tensors["thresholds"][_PARTS.index(part)] = seen[part].quantile(level)
        if self.allocation == "greedy":
            tensors["levels"] = torch.tensor([levels.get(part, 0.0) for part in _PARTS])
        if rotation is not None:
            tensors["rotation"] = rotation.cpu()
        return Found(tensors, {"sparsity": self.sparsity} | {f"sparsity_{p}": level for p, level in levels.items()})

    def _allocate(self, block: FeedForward, x: Tensor, seen: Mapping[str, Magnitudes]) -> dict[str, float]:
        """The sparsity of each linear: step by step where the block's output moves least.

        Measured against the output's own size and averaged over rows. The paper averages the distance itself, over the
        ends of texts: of rows from anywhere, one that draws attention (a first token) is so much larger than all others
        that it alone would decide.
        """
        weights = weights_of(block)
        total = sum(w.numel() for w in weights.values())
        share = {part: w.numel() / total for part, w in weights.items()}
        scales, wanted = self.scales(block), block(x)
        size = wanted.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        levels = dict.fromkeys(weights, 0.0)
        made: dict[tuple[str, float], Tensor] = {}

        def sparse(rows: Tensor, part: str, level: float) -> Tensor:
            limit = rows.new_tensor(seen[part].quantile(level) if level else -1.0)
            bias = getattr(block, f"{part}_bias")
            return ffn_ops.column_linear_reference(rows, weights[part], limit, scales.get(part), bias)

        def first(part: str, level: float) -> Tensor:
            # Of a linear that reads the block's input only the next level is new.
            if (part, level) not in made:
                made[part, level] = sparse(x, part, level)
            return made[part, level]

        def error(tried: Mapping[str, float]) -> float:
            gate = first("gate", tried["gate"]) if "gate" in tried else None
            hidden = ffn_ops.middle(first("up", tried["up"]), gate, block.activation)
            return float(((sparse(hidden, "down", tried["down"]) - wanted).norm(dim=1) / size).mean())

        while (left := self.sparsity - sum(share[p] * levels[p] for p in levels)) > 1e-6:
            # Equal in weights that are left out; the last step is as long as what is left.
            steps = {p: min(STEP / len(share), left) / share[p] for p in levels}
            tried = [{**levels, p: levels[p] + steps[p]} for p in levels if levels[p] + steps[p] < 1]
            if not tried:
                raise ValueError(f"a sparsity of {self.sparsity} leaves nothing of a linear; ask for less.")
            levels = min(tried, key=error)
            made = {key: t for key, t in made.items() if key[1] >= levels[key[0]]}
        return levels

    def _extra(self, block: FeedForward) -> dict[str, Tensor]:
        """Scales and biases by the names of the operator's arguments, of a block that is rotated already."""
        biases = {f"{part}_bias": getattr(block, f"{part}_bias") for part in _PARTS}
        return {f"{part}_scale": t for part, t in self.scales(block).items()} | {
            name: t for name, t in biases.items() if t is not None
        }

    def approximate(self, block: FeedForward, record: Record) -> Callable[[Tensor], Tensor]:
        """The operator's reference body."""
        rotation = self._rotation(block, record)
        turned, thresholds = rotated(block, rotation), record.tensor("thresholds", 3)
        extra, gate = self._extra(turned), None if turned.gate is None else turned.gate.t()
        back = None if rotation is None else rotation.t().to(block.up.dtype)

        def run(x: Tensor) -> Tensor:
            given = x if back is None else F.linear(x, back)
            return ffn_ops.column_ffn_reference(
                given, gate, turned.up.t(), turned.down, thresholds.to(x.device), block.activation, **extra
            )

        return run

    def _rotation(self, block: FeedForward, record: Record) -> Tensor | None:
        size = block.up.shape[1]
        return record.tensor("rotation", size, size).to(block.up.device) if self.transform else None

    def limits(self, block: FeedForward, record: Record) -> dict[str, Tensor]:
        """The threshold of down, and what each neuron counts."""
        threshold = record.tensor("thresholds", 3)[2:].to(block.up.device)
        return {"threshold": threshold} | {f"{p}_scale": t for p, t in self.scales(block).items() if p == "down"}

    @property
    def dropped(self) -> float:
        """The sparsity."""
        return self.sparsity

    @property
    def about_all(self) -> str:
        """Shares of their own, or a rotation."""
        return "transform=True" if self.transform else "allocation='greedy'" if self.allocation == "greedy" else ""

    def describes(self, record: Record) -> str:
        """How much is dropped."""
        more = " greedy" * (self.allocation == "greedy") + " rotated" * self.transform
        return f"{self.name} {self.sparsity:.0%}{more}"

    @property
    def operators(self) -> tuple[str, ...]:
        """Gate, up and down are one."""
        return ("column_ffn",)

    def cost(self, sizes: Sizes, record: Record) -> Cost:
        """With as many inputs as tokens that drop them independently are expected to keep together."""
        levels = record.tensor("levels", 3).tolist() if self.allocation == "greedy" else [self.sparsity] * 3
        kept = [1 - Rational(f"{level:.6f}") ** TOKENS for level in levels]
        widths = (sizes.size if sizes.gated else 0, sizes.size, sizes.neurons)
        first, second, third = (ceiling(width * share) for width, share in zip(widths, kept, strict=True))
        read, size, itemsize = (first, second, third), sizes.size, sizes.itemsize
        found = ffn_cost.column_ffn(TOKENS, size, sizes.neurons, kept=read, itemsize=itemsize)
        if self.transform:
            found = found + ffn_cost.column_linear(TOKENS, size, size, kept=size, itemsize=itemsize)
        return found

    def emit(self, put: Put, record: Record) -> fx.Node:
        """``column_ffn`` on weights with an input channel to a row; a linear that rotates is in front of it."""
        block = put.block

        def make() -> dict[str, Tensor]:
            rotation = self._rotation(block, record)
            turned, thresholds = rotated(block, rotation), record.tensor("thresholds", 3).to(block.up.device)
            rows = {"up": turned.up.t(), "down": turned.down, "thresholds": thresholds}
            rows |= {} if turned.gate is None else {"gate": turned.gate.t()}
            rows |= {} if rotation is None else {"rotation": rotation.t().to(block.up.dtype)}
            return {name: t.contiguous() for name, t in (rows | self._extra(turned)).items()}

        w = put.weights(make)
        fixed = ("up", "down", "gate", "thresholds", "rotation")
        given = put.call(torch.ops.aten.linear.default, put.input, w["rotation"]) if self.transform else put.input
        return put.call(
            torch.ops.effcompile.column_ffn.default,
            given,
            w.get("gate"),
            w["up"],
            w["down"],
            w["thresholds"],
            block.activation,
            **{name: node for name, node in w.items() if name not in fixed},
        )


def parts_of(block: FeedForward) -> tuple[str, ...]:
    """The linears of a block that thresholds are for."""
    return _PARTS if block.gate is not None else _PARTS[1:]


def weights_of(block: FeedForward) -> dict[str, Tensor]:
    """Their weights with an input channel to a row."""
    gate = {} if block.gate is None else {"gate": block.gate.t()}
    return {**gate, "up": block.up.t(), "down": block.down}


def single(block: FeedForward) -> FeedForward:
    """The same in fp32."""
    own: dict[str, Any] = {f.name: getattr(block, f.name) for f in dataclasses.fields(block)}
    own |= {name: t.float() for name, t in own.items() if isinstance(t, Tensor)}
    return FeedForward(**own)


def rotation_of(block: FeedForward) -> Tensor:
    """Right singular vectors of the block's first linear, gate or else up: fp32 ``[d, d]``, orthogonal.

    With them ``W V`` has orthogonal columns (WINA, section 3.3). From the eigenvectors of ``W^T W`` in fp64, which are
    all ``d`` of them also where the linear has fewer outputs than inputs.
    """
    first = (block.up if block.gate is None else block.gate).double()
    found: Tensor = torch.linalg.eigh(first.t() @ first).eigenvectors
    return found.float()


def rotated(block: FeedForward, rotation: Tensor | None) -> FeedForward:
    """The block for inputs ``x @ rotation``; itself for None."""
    if rotation is None:
        return block

    def turn(weight: Tensor) -> Tensor:
        return (weight.float() @ rotation).to(weight.dtype)

    return dataclasses.replace(block, up=turn(block.up), gate=None if block.gate is None else turn(block.gate))
