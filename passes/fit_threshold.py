"""A threshold for each layer, fitted on text: as many blocks in all as one threshold visits, placed where they count.

A layer's loss at a threshold is taken to be what it costs the model at the user's own threshold, measured with that
layer alone made sparse (KL of the next token against dense), times how the error of its attention grows or shrinks
with the threshold. A Lagrange multiplier then finds the thresholds of least loss that visit no more.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from effcompile.kernels import block_ops, blocks
from effcompile.kernels.reason import Reason
from effcompile.passes.backend_options import clean_path
from effcompile.passes.sites import DENSE
from effcompile.passes.sparse_prefill import SparsePrefill
from effcompile.passes.tree import place_of
from effcompile.patterns.attention import AttentionSite, find_attention
from effcompile.patterns.normalize import normalize
from effcompile.runtime.plan import Record

STEPS = tuple(0.35 * n for n in range(-6, 7))
"""Thresholds that are tried, as differences of their log odds from the user's."""


def options_that_fit(method: SparsePrefill) -> list[SparsePrefill]:
    """The method at each threshold that is tried, low to high. Raises ``ValueError`` if there is nothing to fit."""
    name = method.share
    if name is None or method.gathers or method.reorders:
        raise ValueError(f"{method.name} has no share of blocks that could be fitted to a layer.")
    share = getattr(method, name)
    if not 0 < share < 1:
        raise ValueError(f"{name}={share!r} is not between 0 and 1, so there is nothing to fit.")
    odds = math.log(share / (1 - share))
    tried = [round(1 / (1 + math.exp(-(odds + step))), 6) for step in STEPS]
    given: list[dict[str, Any]] = [{"min_length": 0, name: value} for value in tried]
    return [dataclasses.replace(method, **options) for options in given]


@dataclasses.dataclass
class Layer:
    """What was seen at one layer: for each threshold that was tried the density and the squared error; its loss."""

    module: str
    density: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(len(STEPS)))
    """Summed over the texts, as is the error."""
    error: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(len(STEPS), dtype=torch.float64))
    loss: float = 0.0
    texts: int = 0

    @property
    def losses(self) -> Tensor:
        """The loss at each threshold; the middle one is the user's."""
        own = self.error[len(STEPS) // 2]
        return self.loss * self.error / own if own > 0 else torch.zeros_like(self.error)


class Fitter:
    """The back end for fitting: runs graphs as they are, with one layer sparse if :attr:`sparse` says so."""

    def __init__(self, method: SparsePrefill) -> None:
        self.method = method
        self.tried = options_that_fit(method)
        self.layers: dict[str, Layer] = {}
        self.sparse: str | None = None
        """The layer to make sparse; an empty name makes none, and None measures all of them instead."""
        self.reasons: list[str] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        place = place_of(gm)
        if place is not None:
            place.complete(gm)
        graph = normalize(gm, inputs)
        if isinstance(graph, Reason):
            self.reasons.append(str(graph))
            return gm.forward
        sites = []
        for site in find_attention(graph):
            # Not match(): that also asks for a length and a device on which being sparse gains.
            mask = getattr(site, "mask", None)
            if not isinstance(site, AttentionSite) or mask is None or isinstance(mask, Reason):
                self.reasons.append(str(getattr(site, "reason", mask)))
            elif mask.padding is not None or not mask.predicate.causal or mask.predicate.name != "causal":
                self.reasons.append(f"the mask is {mask.predicate.name}; fit on whole texts without padding")
            else:
                sites.append(site)
        return _Sparse(graph, sites, self).run

    def at(self, site: AttentionSite, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> Tensor:
        """Called behind each attention: what it is to give."""
        module = clean_path(site.module)
        if self.sparse is None:
            layer = self.layers.setdefault(module, Layer(module))
            for n, method in enumerate(self.tried):
                tried, density = self._attend(method, site, query, key, value)
                layer.density[n] += density
                layer.error[n] += (tried.double() - out.double()).square().sum()
            layer.texts += 1
        if self.sparse != module:
            return out
        own = dataclasses.replace(self.method, min_length=0)
        return self._attend(own, site, query, key, value)[0].to(out.dtype)

    def _attend(
        self, method: SparsePrefill, site: AttentionSite, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, float]:
        """The output of one layer with one method, and the density of its blocks."""
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        queries, keys, block = query.shape[2], key.shape[2], method.block_size
        keep = method.choose(query, key, site.scale, None)
        keep = keep.expand(query.shape[0], query.shape[1], *keep.shape[2:])
        made = blocks.lists(keep, blocks.whole(queries, keys, block, device=key.device), block)
        state = (key, None, None, value, None, None, torch.tensor(keys, device=key.device), None)
        out, _ = torch.ops.effcompile.attend_blocks(
            query, *state, *block_ops.of(made), DENSE.name, site.scale, True, -1
        )
        return out, float(blocks.density(keep, queries, keys, block).mean())


class _Sparse(fx.Interpreter):
    """Runs a graph node by node, and shows the fitter each attention with what it read."""

    def __init__(self, gm: fx.GraphModule, sites: Sequence[AttentionSite], fitter: Fitter) -> None:
        super().__init__(gm)
        self.at = {site.output: site for site in sites}
        self.read = {node for site in sites for node in (site.query, site.key, site.value)}
        self.seen: dict[fx.Node, Tensor] = {}
        self.fitter = fitter

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.read:
            self.seen[n] = result
        if n in self.at:
            site = self.at[n]
            query, key, value = (self.seen[x] for x in (site.query, site.key, site.value))
            result = self.fitter.at(site, query, key, value, result)
        return result


def allocate(layers: Sequence[Layer]) -> list[int]:
    """Which of the tried thresholds each layer gets: the least loss at no more than the density of the middle one.

    The losses of layers add up and so do the densities, so for each price of density every layer chooses for itself;
    what the last price leaves over goes where it helps most.
    """
    budget = sum(float(layer.density[len(STEPS) // 2]) for layer in layers)

    def chosen(price: float) -> list[int]:
        return [int((layer.losses + price * layer.density).argmin()) for layer in layers]

    def spent(choice: Sequence[int]) -> float:
        return sum(float(layer.density[i]) for layer, i in zip(layers, choice))

    low, high = 0.0, 1.0
    while spent(chosen(high)) > budget and high < 1e12:
        high *= 4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(chosen(middle)) > budget else (low, middle)
    # Choices between the hull's corners are reached by going on from below; from the user's own, too.
    ends = [_filled(layers, start, budget) for start in (chosen(high), [len(STEPS) // 2] * len(layers))]
    return min(ends, key=lambda choice: sum(float(layer.losses[i]) for layer, i in zip(layers, choice)))


def _filled(layers: Sequence[Layer], choice: list[int], budget: float) -> list[int]:
    """``choice`` with thresholds raised, where a step lowers the loss most for its density, while there is room."""
    while True:
        spent = sum(float(layer.density[i]) for layer, i in zip(layers, choice))
        better = []
        for n, (layer, i) in enumerate(zip(layers, choice)):
            if i + 1 == len(STEPS):
                continue
            gain, more = layer.losses[i] - layer.losses[i + 1], layer.density[i + 1] - layer.density[i]
            if gain > 0 and spent + float(more) <= budget:
                better.append((float(gain / more.clamp(min=1e-9)), n))
        if not better:
            return choice
        choice[max(better)[1]] += 1


def records(fitter: Fitter, parameters: Callable[[str], dict[str, str]]) -> list[Record]:
    """The record of each layer: the method's options with the layer's own threshold."""
    method, found = fitter.method, []
    assert method.share is not None
    layers = list(fitter.layers.values())
    for layer, place in zip(layers, allocate(layers), strict=True):
        own = dataclasses.replace(method, **{method.share: getattr(fitter.tried[place], method.share)})
        numbers = {"loss_alone": layer.loss, "density": float(layer.density[place] / layer.texts)}
        found.append(Record(layer.module, method.name, json.loads(own.text), parameters(layer.module), numbers))
    return found
