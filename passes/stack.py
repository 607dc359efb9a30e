"""A method on another: inputs left out of what a first method has left of a feed-forward block.

Where every token meets the same smaller block (FLAP), the second method takes that as it takes a model's own. Where
tokens choose groups of neurons (CMoE), gate and up are read neuron by neuron, and no input of them can be left out
without being read; the rows of down are the neurons, so there a token leaves out those of its neurons that say little.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, fx

from effcompile.kernels.cost import Cost
from effcompile.kernels.ffn import FeedForward
from effcompile.kernels.reason import Reason
from effcompile.passes.base import REGISTRY, get
from effcompile.passes.carve_moe import CarveMoE
from effcompile.passes.feed_forward import FeedForwardPass, Put, Sizes, check_weights, parts_of, rewrite_of, sizes_of
from effcompile.passes.options import build
from effcompile.passes.rewrite import Rewrite
from effcompile.passes.weights import block_of
from effcompile.runtime.plan import Plan, Record


@dataclasses.dataclass(frozen=True)
class OnTop(FeedForwardPass, abc.ABC):
    """A method for feed-forward blocks that can stand on another."""

    beside: ClassVar[str] = "; to have both, calibrate this one on the plan of that: ec.calibrate(..., on=plan)"

    @abc.abstractmethod
    def limits(self, block: FeedForward, record: Record) -> dict[str, Tensor]:
        """What leaves out neurons of ``block`` for each token, by the arguments of ``grouped_ffn``."""

    @property
    @abc.abstractmethod
    def dropped(self) -> float:
        """The share of the inputs of down that a token leaves out, where it leaves out no others."""

    @property
    @abc.abstractmethod
    def about_all(self) -> str:
        """The option, in words, that is about inputs of gate and up as well; empty if none is."""

    def match(self, site: Any) -> Rewrite | Reason:
        """The form that the plan gives to this block, or to what another method leaves of it."""
        record = self.told(site)
        if isinstance(record, Reason) or not record.on:
            return super().match(site)
        found = parts_of(site, self.name)
        if isinstance(found, Reason):
            return found
        parts, own = found
        below = below_of(record, site.plan)
        if isinstance(below, str):
            return Reason("other-block", below, site.source)
        for one in (record, below.record):
            check_weights(one, own)
        stack, block = Stack(self, record, below), block_of(parts, own)
        if text := refused(self, below, block):
            return Reason("other-block", text, site.source)
        form, after = stack.describes(), stack.cost(sizes_of(parts), block)

        def emit(graph: fx.Graph) -> fx.Node:
            return stack.emit(Put(graph, parts, own, record.text))

        made = rewrite_of(form, site, parts, own, emit, after, stack.operators)
        return dataclasses.replace(made, on=below.method.name)


class Below(NamedTuple):
    """A method at a module, and what a plan says of it there."""

    method: FeedForwardPass
    record: Record

    @property
    def routed(self) -> CarveMoE | None:
        """The method, if tokens choose groups of neurons by it."""
        return self.method if isinstance(self.method, CarveMoE) and self.method.active else None


def lowest(plan: Plan, module: str) -> Below | None:
    """The method that stands at a block of a model by a plan, and on no other; the first in the list of passes."""
    for name in REGISTRY:
        record = plan.get(module, name)
        if record is not None and not record.on and issubclass(get(name), FeedForwardPass):
            method = build(get(name), record.options, f"plan: {name} at {module}")
            assert isinstance(method, FeedForwardPass)
            return Below(method, record)
    return None


def below_of(record: Record, plan: Plan | None) -> Below | str:
    """What ``record`` stands on, or why that is not there."""
    (name, identity), *_ = record.on.items()
    under = None if plan is None else plan.get(record.module, name)
    if under is None or under.identity != identity or not issubclass(get(name), FeedForwardPass):
        told = f"no record of {name} here" if under is None else f"another record of {name} here by now"
        return (
            f"{record.method} was calibrated on what {name} leaves of this block, and the plan has {told}; calibrate "
            f"{record.method} again, with on=plan"
        )
    method = build(get(name), under.options, f"plan: {name} at {record.module}")
    assert isinstance(method, FeedForwardPass)
    return Below(method, under)


def refused(above: OnTop, below: Below, block: FeedForward) -> str:
    """Why ``above`` cannot stand on what ``below`` leaves of a block; empty if it can."""
    if below.routed:
        about = above.about_all
        told = f"of which only inputs of down can be left out, and {about} is about those of gate and up as well"
        return f"{above.name} cannot stand on {below.method.name}, {told}" if about else ""
    small = below.method.leaves(_without_numbers(block), below.record)
    if small is None:
        return f"{above.name} cannot stand on {below.method.name}, which leaves no block of its own"
    return "" if small.width else f"{below.method.name} leaves no neuron here, and {above.name} has nothing to read"


def _without_numbers(block: FeedForward) -> FeedForward:
    """The block on the device that has sizes only."""
    given: dict[str, Any] = {f.name: getattr(block, f.name) for f in dataclasses.fields(block)}
    given |= {name: t.to("meta") for name, t in given.items() if isinstance(t, Tensor)}
    return FeedForward(**given)


@dataclasses.dataclass(frozen=True, eq=False)
class Stack:
    """The method ``above`` on another, and what the plan says of it; not :func:`refused`."""

    above: OnTop
    record: Record
    below: Below

    def _leaves(self, block: FeedForward) -> FeedForward:
        small = self.below.method.leaves(block, self.below.record)
        assert small is not None
        return small

    def _limits(self, block: FeedForward) -> dict[str, Tensor]:
        return self.above.limits(block, self.record)

    def approximate(self, block: FeedForward) -> Callable[[Tensor], Tensor]:
        """The form of both for a block of the model: their one definition."""
        if (routed := self.below.routed) is not None:
            return routed.approximate(block, self.below.record, self._limits)
        return self.above.approximate(self._leaves(block), self.record)

    def emit(self, put: Put) -> fx.Node:
        """Put the form of both into a graph."""
        if self.below.routed:
            return self.below.method.emit(dataclasses.replace(put, limits=self._limits), self.below.record)
        return self.above.emit(dataclasses.replace(put, leaves=self._leaves), self.record)

    def describes(self) -> str:
        """Both forms by name."""
        which = " of down" if self.below.routed else ""
        return f"{self.below.method.describes(self.below.record)}, {self.above.describes(self.record)}{which}"

    def cost(self, sizes: Sizes, block: FeedForward) -> Cost | None:
        """What is read and computed of what the lower method leaves."""
        if (routed := self.below.routed) is not None:
            return routed.cost(sizes, self.below.record, self.above.dropped)
        left = dataclasses.replace(sizes, neurons=self._leaves(_without_numbers(block)).width)
        return self.above.cost(left, self.record)

    @property
    def operators(self) -> tuple[str, ...]:
        """Those of the form."""
        return self.below.method.operators if self.below.routed else self.above.operators


def standing(plan: Plan, module: str) -> Below | Stack | None:
    """What stands at a block by a plan, as in code that is compiled with it and with nothing else; None for nothing."""
    below = lowest(plan, module)
    for name in REGISTRY if below else ():
        record = plan.get(module, name)
        if record is None or not record.on or not issubclass(get(name), OnTop):
            continue
        found = below_of(record, plan)
        if below is not None and isinstance(found, Below) and found.record is below.record:
            above = build(get(name), record.options, f"plan: {name} at {module}")
            assert isinstance(above, OnTop)
            return Stack(above, record, below)
    return below
