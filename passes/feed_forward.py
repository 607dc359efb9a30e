"""What methods for feed-forward blocks share: what they are calibrated on, and the forms they put in their place."""

from __future__ import annotations

import abc
import dataclasses
import functools
import json
import operator
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from effcompile.kernels import cost, ffn_cost
from effcompile.kernels.cost import Cost
from effcompile.kernels.ffn import FeedForward
from effcompile.kernels.heads import Heads
from effcompile.kernels.program import OperatorProgram
from effcompile.kernels.reason import Reason
from effcompile.passes.base import Pass
from effcompile.passes.rewrite import Rewrite
from effcompile.passes.weight_form import DENSE, WeightForm, asked, form_of, told
from effcompile.passes.weights import block_of, constant, nodes_of, originals, prepared
from effcompile.patterns.ffn import BlockParts, FeedForwardSite, describe
from effcompile.patterns.site import Site
from effcompile.patterns.walk import same_shape, shape, value
from effcompile.runtime import discarded
from effcompile.runtime.plan import PlanError, Record, digest
from effcompile.runtime.statistics import Samples, Statistic

TOKENS = cost.B * cost.T
"""Tokens of a call, in the letters of :mod:`effcompile.kernels.cost`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Calibrated:
    """One site after the data: its module, its weights, and what was collected there."""

    module: str
    block: FeedForward
    parameters: Mapping[str, str]
    statistics: Mapping[str, Statistic]
    samples: Samples


@dataclasses.dataclass(frozen=True, eq=False)
class CalibratedHeads:
    """The heads of one attention after the data, likewise."""

    module: str
    block: Heads
    parameters: Mapping[str, str]
    statistics: Mapping[str, Statistic]
    samples: Samples


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """What a pass makes of a site: the tensors of its record, and what was measured besides the error."""

    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the cost of a block depends on besides its tokens, :data:`TOKENS`."""

    size: int
    neurons: int
    itemsize: int
    gated: bool

    def dense(self, neurons: int) -> Cost:
        """The cost of ``neurons`` for every token."""
        return ffn_cost.grouped_ffn(TOKENS, self.size, shared=neurons, itemsize=self.itemsize, gated=self.gated)


@dataclasses.dataclass(frozen=True)
class FeedForwardPass(Pass, abc.ABC):
    """A method for feed-forward blocks that is calibrated first, and applied by a plan."""

    site_kind: ClassVar[str] = "ffn"
    family: ClassVar[str] = "ffn"
    phases: ClassVar[tuple[str, ...]] = ("prefill", "decode")

    @abc.abstractmethod
    def statistics(self, block: Any) -> dict[str, Statistic]:
        """What to collect at a site, by the names under which :meth:`calibrate` finds it."""

    @abc.abstractmethod
    def calibrate(self, sites: Sequence[Calibrated]) -> list[Found]:
        """What to do at each site. Raises ``ValueError`` if that cannot be said; the text names the site."""

    def calibrate_all(
        self, sites: Sequence[Calibrated], heads: Sequence[CalibratedHeads]
    ) -> tuple[list[Found], list[Found]]:
        """The same of blocks and of the heads of attention together, for a pass that takes these."""
        return self.calibrate(sites), []

    @abc.abstractmethod
    def approximate(self, block: FeedForward, record: Record) -> Callable[[Tensor], Tensor]:
        """The form that ``record`` gives to ``block``, for rows ``[n, d]``, in plain PyTorch: its one definition."""

    @abc.abstractmethod
    def emit(self, put: Put, record: Record) -> fx.Node:
        """Put the form of ``record`` into a graph; returns the node with the block's output."""

    def leaves(self, block: FeedForward, record: Record) -> FeedForward | None:
        """The block that every token meets instead, if the form is one: what another method can stand on."""
        return None

    def describes(self, record: Record) -> str:
        """The form by name, for the report."""
        return self.name

    @property
    def operators(self) -> tuple[str, ...]:
        """Those of ours that :meth:`emit` puts in."""
        return ()

    def linears(self, sizes: Sizes, record: Record) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of what :meth:`emit` puts in by :meth:`Put.linear`, by role: these may be in few bits."""
        return {}

    def cost(self, sizes: Sizes, record: Record) -> Cost | None:
        """What the form of ``record`` must move and compute, or None where that is not known."""
        return None

    def told(self, site: Site) -> Record | Reason:
        """What the plan says of a site, made with these options."""
        record: Record | None = getattr(site, "record", None)
        if record is None:
            text = f"no plan says what {self.name} does here; see effcompile.calibrate"
            return Reason("no-plan", text, site.source)
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        # A plan of an earlier version lacks the options that came since.
        if defaults | dict(record.options) != json.loads(self.text):
            told = f"made with {dict(record.options)}, and here {json.loads(self.text)} is asked for"
            return Reason("other-options", f"the plan was {told}", site.source)
        return record

    def match(self, site: Any) -> Rewrite | Reason:
        """The form that the plan gives to this block, or why it stays as it is."""
        record = self.told(site)
        if isinstance(record, Reason):
            return record
        if record.on:
            return Reason("other-block", f"{self.name} cannot stand on {', '.join(record.on)}", site.source)
        found = parts_of(site, self.name)
        if isinstance(found, Reason):
            return found
        parts, own = found
        check_weights(record, own)
        sizes = sizes_of(parts)
        linears = self.linears(sizes, record)
        places = {role: node for role, node in linears_of(parts).items() if role in linears}
        # Weights that are discarded were in range when others were prepared of them.
        weights = {role: [own[role]] if discarded.name_of(own[role]) is None else [] for role in places}
        kept = asked(site, {node: functools.partial(weights.__getitem__, role) for role, node in places.items()})
        forms = {role: form_of(kept.get(node)) for role, node in places.items()}

        def emit(graph: fx.Graph) -> fx.Node:
            return self.emit(Put(graph, parts, own, record.text, forms), record)

        form, after = self.describes(record) + told(forms.values()), self.cost(sizes, record)
        if after is not None:
            after = sum((forms[role].change(*size, sizes.itemsize) for role, size in linears.items()), after)
        operators = (*self.operators, *["quantized_linear"] * any(form != DENSE for form in forms.values()))
        return rewrite_of(form, site, parts, own, emit, after, operators, kept)


def rewrite_of(
    form: str,
    site: FeedForwardSite,
    parts: BlockParts,
    own: Mapping[str, Tensor],
    emit: Callable[[fx.Graph], fx.Node],
    after: Cost | None,
    operators: Sequence[str],
    kept: Mapping[fx.Node, WeightForm | Reason] = types.MappingProxyType({}),
) -> Rewrite:
    """What ``emit`` puts in the place of a block, made from all of its weights ``own``, at the cost ``after``."""
    given, sizes = value(parts.input), sizes_of(parts)
    return Rewrite(
        form,
        emit,
        weights=prepared_from(site, parts, own),
        cost=None if after is None else (sizes.dense(sizes.neurons), after),
        rows=tuple(given.shape[:-1]),
        operators=tuple(OperatorProgram(operator, given.dtype) for operator in operators),
        kept=kept,
    )


def parts_of(site: FeedForwardSite, name: str) -> tuple[BlockParts, dict[str, Tensor]] | Reason:
    """The linears of a block and the user's tensors by role, or why no form of the method ``name`` can stand there."""

    def no(code: str, text: str) -> Reason:
        return Reason(code, text, site.source)

    parts = describe(site)
    if isinstance(parts, Reason):
        return parts
    own = originals(parts)
    if own is None:
        return no("computed-weight", "a weight of this block is no parameter")
    nodes = [parts.up.linear.weight, parts.down.weight, *([parts.gate.linear.weight] if parts.gate else [])]
    if torch.is_grad_enabled() and any(t.requires_grad for t in own.values()):
        return no("gradients", f"gradients are needed, and {name} has none; use torch.no_grad()")
    if len({value(n).dtype for n in (parts.input, *nodes, site.anchor)}) > 1:
        return no("mixed-dtypes", "this block reads and writes different dtypes, as under autocast")
    if not same_shape(shape(parts.input)[:-1], shape(site.anchor)[:-1]):
        return no("not-supported", "a view between the linears of this block folds or unfolds its rows")
    return parts, own


def linears_of(parts: BlockParts) -> dict[str, fx.Node]:
    """The linears of a block by role; one for gate and up is both."""
    gate = {} if parts.gate is None else {"gate": parts.gate.linear.node}
    return gate | {"up": parts.up.linear.node, "down": parts.down.node}


def sizes_of(parts: BlockParts) -> Sizes:
    """What the cost of a block depends on."""
    given, up = value(parts.input), parts.up
    neurons = up.linear.outputs if up.width is None else up.width
    return Sizes(given.shape[-1], neurons, given.dtype.itemsize, parts.gate is not None)


def prepared_from(
    site: FeedForwardSite, parts: BlockParts, own: Mapping[str, Tensor]
) -> tuple[tuple[str, fx.Node, Tensor], ...]:
    """The weights of a rewrite (:class:`~effcompile.passes.rewrite.Rewrite`) that prepares its own from all of them."""
    return tuple((site.module, node, own[role]) for role, node in nodes_of(parts).items())


def check_weights(record: Record, own: Mapping[str, Tensor]) -> None:
    """Raise :class:`PlanError` unless ``own`` are the weights that ``record`` was made from."""
    for role, tensor in own.items():
        if record.parameters.get(role) != digest(tensor):
            raise PlanError(
                f"plan: {record.method} at {record.module}: the {role} weights are not those that the plan was made "
                "from. Calibrate this model, or take the record out of the plan."
            )


@dataclasses.dataclass
class Put:
    """What a pass has in hand while it puts a form into a graph; the insertion point is where the old output is.

    ``forms`` says how weights are kept, by role; the others are dense. ``leaves`` is what another method, on which this
    one stands, makes of the user's weights. ``limits`` gives, for neurons in the order of a form, what leaves out some
    of them for each token (``threshold`` and ``down_scale`` of ``grouped_ffn``).
    """

    graph: fx.Graph
    parts: BlockParts
    originals: Mapping[str, Tensor]
    key: str
    forms: Mapping[str, WeightForm] = dataclasses.field(default_factory=dict)
    leaves: Callable[[FeedForward], FeedForward] = lambda block: block
    limits: Callable[[FeedForward], dict[str, Tensor]] = lambda block: {}

    @property
    def input(self) -> fx.Node:
        """What the block reads: ``[..., d]``."""
        return self.parts.input

    @property
    def block(self) -> FeedForward:
        """The user's weights, or what another method leaves of them."""
        return self.leaves(block_of(self.parts, self.originals))

    def weights(self, make: Callable[[], dict[str, Tensor]]) -> dict[str, fx.Node]:
        """Prepared weights as constants of the graph, each made once for all graphs."""

        def kept() -> dict[str, Tensor]:
            return {name: t for role, made in make().items() for name, t in self.form(role).tensors(role, made).items()}

        key = " ".join((self.key, *(f"{role} {form.text}" for role, form in self.forms.items())))
        made = prepared(key, list(self.originals.values()), kept)
        return {name: constant(self.graph, t, self.input) for name, t in made.items()}

    def form(self, role: str) -> WeightForm:
        """How a weight is kept."""
        return self.forms.get(role, DENSE)

    def linear(self, x: fx.Node, weights: Mapping[str, fx.Node], role: str, outputs: int) -> fx.Node:
        """A linear on prepared weights of this role and, if there is one, the bias beside it, dense or in few bits."""
        return self.call(*self.form(role).call(role, weights, x, outputs, weights.get(f"{role}_bias")))

    def item(self, call: fx.Node, index: int) -> fx.Node:
        """One result of a call that has several."""
        return self.call(operator.getitem, call, index)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call, with the fake value of its result."""

        def fake(x: Any) -> Any:
            return x.meta["val"] if isinstance(x, fx.Node) else x

        node = self.graph.call_function(target, args, kwargs)
        with value(self.input).fake_mode:
            node.meta["val"] = target(*map(fake, args), **{k: fake(x) for k, x in kwargs.items()})
        return node


def transposed(block: FeedForward) -> dict[str, Tensor]:
    """The block's tensors by role, contiguous, each weight with a neuron to a row."""
    roles = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")
    return {role: t.contiguous() for role in roles if (t := getattr(block, role)) is not None}
