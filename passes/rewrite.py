"""What a pass answers when it takes a site: a description, and how to emit the replacement."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx

from effcompile.kernels.cost import Cost
from effcompile.kernels.program import OperatorProgram, Program, StoreProgram
from effcompile.kernels.reason import Reason
from effcompile.passes.weight_form import WeightForm
from effcompile.runtime.router_state import What


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """A replacement for the output of a site.

    Parameters
    ----------
    form
        The name of what is put there, for the report.
    emit
        Called by the driver with the graph's insertion point before the site's output; returns the new output node.
    programs
        Kernels that the replacement will launch; their builds can start while Inductor works.
    tokens
        Tokens of a store that attention reads at most, if not all.
    weights
        The user's tensors of which it has prepared others, with the site's module and their nodes: it holds while they
        stay.
    cost
        Of the site as found and as it is now, for ``rows``: the leading sizes of what it reads, a batch and tokens. For
        attention it is known from the site.
    operators
        Those with kernels that serve all sizes, which are built when they are first launched.
    states
        Weights, by their nodes, with what the replacement reads or writes of the state that belongs to them.
    linears
        Those that it has smaller ones for: no other pass finds them there.
    placed
        The replacement reads the old output: ``emit`` has put it behind that, and handed the uses on itself.
    output
        What is replaced, if it is not the site's output but comes after it.
    takes
        Nodes of other sites that the replacement stands for, too: no method is asked about them later.
    kept
        By the linears that it stands for, in which bits it keeps its own, or why not in those that were asked for.
    on
        The method of the site on whose form this one stands. It is put there instead of that, which must be there, too.
    """

    form: str
    emit: Callable[[fx.Graph], fx.Node]
    programs: tuple[Program | StoreProgram, ...] = ()
    tokens: int | None = None
    weights: tuple[tuple[str, fx.Node, Tensor], ...] = ()
    cost: tuple[Cost, Cost] | None = None
    rows: tuple[Any, ...] = ()
    operators: tuple[OperatorProgram, ...] = ()
    states: tuple[tuple[fx.Node, What, Tensor], ...] = ()
    linears: tuple[fx.Node, ...] = ()
    placed: bool = False
    output: fx.Node | None = None
    takes: tuple[fx.Node, ...] = ()
    kept: Mapping[fx.Node, WeightForm | Reason] = dataclasses.field(default_factory=dict)
    on: str = ""
