"""Read-ME: experts for domains of text, and one router that reads token ids and decides for all layers.

Paper: Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design (Cai et al., NeurIPS
2024, arXiv 2410.19123), sections 3.1 and 3.2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from sympy import Integer, ceiling  # type: ignore[import-untyped]
from torch import Tensor, fx

from effcompile.kernels import ffn_cost, ffn_ops, token_router
from effcompile.kernels.cost import Cost
from effcompile.kernels.ffn import FeedForward
from effcompile.kernels.reason import Reason
from effcompile.passes.backend_options import clean_path
from effcompile.passes.feed_forward import TOKENS, Calibrated, FeedForwardPass, Found, Put, Sizes, transposed
from effcompile.passes.rewrite import Rewrite
from effcompile.passes.weights import constant, prepared, real
from effcompile.patterns.ffn import FeedForwardSite
from effcompile.patterns.text import Text
from effcompile.patterns.walk import aten, first_mutation, is_call, module_path, operand, same_size, shape, value
from effcompile.runtime.plan import Plan, PlanError, Record, digest
from effcompile.runtime.router_state import What, state_of
from effcompile.runtime.statistics import DomainSizes, Statistic

ROUTER = "#router"
"""Behind the module of token ids: what a plan calls the router."""
SAMPLES = 128
"""Rows of each domain, at most twice as many, on which the error of a block is measured."""


@dataclasses.dataclass(frozen=True)
class ReadMe(FeedForwardPass):
    """Carve each block into one expert for each domain of text; one router chooses a token's expert for all layers.

    Of each block and domain the share ``remain`` of the neurons is kept whose mean size is largest. What all domains
    keep is shared; an expert is the rest of what its domain keeps, and experts may overlap. A router reads the token
    ids, once for the whole model before its first layer, and each token takes one expert, the same domain's in all
    layers. It is a causal transformer block with an embedding of its own, trained while calibrating to prefer the
    domains whose neurons are largest for the token.

    ``ec.calibrate(model, {"code": batches, "prose": batches}, [ec.read_me(0.5)])``: the domains are those of the
    mapping, two or more.

    Parameters
    ----------
    remain
        Share of the neurons that a token uses, above 0, up to 1; 1 keeps all.
    dim, heads, hidden
        Of the router: channels, attention heads, and the width of its SwiGLU.
    window
        Tokens that the router sees, a token itself included.
    steps, lr, batch
        Of its training, with AdamW: steps of so many pieces of text, each of at most ``window`` tokens.
    temperature
        Neurons by which the overlap of a token's largest neurons with two experts must differ, on the mean over layers,
        for odds of e.
    max_batch_size
        Texts that there is room for; larger batches stay dense.
    seed
        Of the router's first weights and the order of its pieces.

    Notes
    -----
    ``remain``, the sizes of the router, ``lr``, the weight decay of 0.01 and the factor of 0.8 on the rate for each 100
    steps are the paper's. It trains for 800 steps of 64 texts of 4,096 tokens and tunes experts in turn, which is not
    done here. Its masks are of one neuron less, and fewer where sizes tie; here exactly as many as asked for are kept,
    the lower index where they tie.
    """

    remain: float = 0.5
    dim: int = 512
    heads: int = 4
    hidden: int = 512
    window: int = 512
    steps: int = 100
    lr: float = 5e-4
    batch: int = 8
    temperature: float = 1.0
    max_batch_size: int = 8
    seed: int = 0

    name: ClassVar[str] = "read_me"
    paper: ClassVar[str] = "Read-ME (Cai et al., NeurIPS 2024)"
    summary: ClassVar[str] = "feed-forward: an expert for each domain, chosen by one router before the first layer"
    limit: ClassVar[dict[str, Any]] = {"remain": 1.0}

    def __post_init__(self) -> None:
        if not 0 < self.remain <= 1:
            raise ValueError(f"remain={self.remain!r}; expected a share above 0, up to 1.")
        for name in ("dim", "heads", "hidden", "window", "batch", "max_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}; expected 1 or more.")
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim={self.dim!r}; expected heads={self.heads!r} of an even size.")
        if self.steps < 0 or not self.lr > 0 or not self.temperature > 0:
            raise ValueError(
                f"steps={self.steps!r}, lr={self.lr!r}, temperature={self.temperature!r}; expected 0 or more steps, "
                "and numbers above 0."
            )

    @classmethod
    def is_common(cls, module: str) -> bool:
        """The router's."""
        return module.endswith(ROUTER)

    def kept(self, width: int) -> int:
        """Of so many neurons, those that a token uses."""
        return max(1, round(self.remain * width))

    def statistics(self, block: FeedForward) -> dict[str, Statistic]:
        """Mean sizes in each domain."""
        return {"sizes": DomainSizes(SAMPLES)}

    def calibrate(self, sites: Sequence[Calibrated]) -> list[Found]:
        """The mask of each domain, bool ``[domains, F]``."""
        found = []
        for site in sites:
            sizes = site.statistics["sizes"]
            assert isinstance(sizes, DomainSizes)
            try:
                means = sizes.means(sizes.domain + 1)
            except ValueError as error:
                raise ValueError(f"{site.module}: {error}") from None
            order = means.sort(dim=-1, descending=True, stable=True).indices[:, : self.kept(site.block.width)]
            masks = torch.zeros_like(means, dtype=torch.bool).scatter(1, order, True).cpu()
            shared = int(masks.all(0).sum())
            found.append(Found({"masks": masks}, {"shared": shared / masks.shape[1]}))
        return found

    def order(self, record: Record, width: int) -> tuple[Tensor, int, int]:
        """The neurons, int64: the shared ones, and then those of each expert; how many are shared, and an expert has.

        Raises :class:`PlanError` for masks that this method does not make.
        """
        masks = record.tensor("masks", -1, width)
        counts = masks.sum(1)
        if masks.dtype is not torch.bool or masks.shape[0] < 2 or not bool((counts == self.kept(width)).all()):
            raise PlanError(
                f"plan: {self.name} at {record.module}: masks should be bool, of two or more domains, with "
                f"{self.kept(width)} neurons each. Calibrate again."
            )
        common = masks.all(0)
        own = [(mask & ~common).nonzero()[:, 0] for mask in masks]
        return torch.cat([common.nonzero()[:, 0], *own]), int(common.sum()), own[0].numel()

    def approximate(self, block: FeedForward, record: Record, expert: int = 0) -> Callable[[Tensor], Tensor]:
        """The operator's reference body, for rows of which all are of one expert."""
        order, shared, own = self.order(record, block.width)
        carved = block.neurons(order)
        chosen = torch.full((1, 1), expert, dtype=torch.int32, device=block.up.device) if own else None

        def run(x: Tensor) -> Tensor:
            return ffn_ops.grouped_reference(
                x, carved.gate, carved.up, carved.down, chosen, None, shared, max(own, 1), block.activation,
                carved.gate_bias, carved.up_bias, carved.down_bias,
            )  # fmt: skip

        return run

    def describes(self, record: Record) -> str:
        """Neurons and experts."""
        masks = record.tensor("masks", -1, -1)
        return f"read_me {int(masks[0].sum())} of {masks.shape[1]} neurons, {masks.shape[0]} experts"

    @property
    def operators(self) -> tuple[str, ...]:
        """That of the blocks; the router is plain PyTorch."""
        return ("grouped_ffn",)

    def cost(self, sizes: Sizes, record: Record) -> Cost:
        """Of the experts that so many tokens are expected to use together; the router is not counted."""
        order, shared, own = self.order(record, sizes.neurons)
        if not own:
            return sizes.dense(shared)
        experts = (order.numel() - shared) // own
        used = ceiling(ffn_cost.groups_used(experts, Integer(1), TOKENS))
        more: dict[str, Any] = {"itemsize": sizes.itemsize, "gated": sizes.gated}
        return ffn_cost.grouped_ffn(TOKENS, sizes.size, shared=shared, width=own, active=used, uses=TOKENS, **more)

    def match(self, site: FeedForwardSite) -> Rewrite | Reason:
        """The experts, with the route that all blocks share, or why the block stays as it is."""
        made = super().match(site)
        if isinstance(made, Reason):
            return made
        record: Record = site.record
        if not self.order(record, record.tensors["masks"].shape[1])[2]:
            return made  # the domains keep the same neurons, so that there is nothing to choose
        router = router_of(site.plan)
        if router is None:
            return Reason("no-router", "the plan has no record of the router; calibrate again", site.source)
        experts = self._experts(router)
        if experts != record.tensors["masks"].shape[0]:
            raise PlanError(
                f"plan: {self.name} at {record.module}: masks of {record.tensors['masks'].shape[0]} domains, and the "
                f"router at {router.module} knows {experts}. Calibrate again."
            )
        found = self._tokens(site, made, router)
        if isinstance(found, Reason):
            return found
        text, lookup = found
        weight = operand(lookup, 0)
        tensor = real(weight)
        assert tensor is not None
        kept = (self.max_batch_size, self.window)
        shapes: dict[What, tuple[int, ...]] = {
            "route_keys": (*kept, self.dim), "route_values": (*kept, self.dim), "route_seen": kept, "route_text": (3,),
        }  # fmt: skip
        state = {what: state_of(what, tensor, *of) for what, of in shapes.items()}
        before = made.emit

        def emit(graph: fx.Graph) -> fx.Node:
            _Route(self, router, text, lookup, tensor, state).place(graph)
            return before(graph)

        return dataclasses.replace(
            made,
            emit=emit,
            weights=(*made.weights, (router.module.removesuffix(ROUTER), weight, tensor)),
            states=tuple((weight, what, t) for what, t in state.items()),
        )

    def _experts(self, router: Record) -> int:
        """How many experts the router knows. Raises :class:`PlanError` if its tensors do not fit."""
        for name in token_router.TENSORS:
            router.tensor(name, *router.tensors.get(name, torch.empty(0)).shape)
        try:
            experts = token_router.check_router(router.tensors, self.heads)
        except ValueError as error:
            raise PlanError(f"plan: {self.name} at {router.module}: {error}") from None
        if router.tensors["embedding"].shape[1] != self.dim:
            raise PlanError(f"plan: {self.name} at {router.module}: its router does not have dim={self.dim}.")
        return experts

    def _tokens(self, site: FeedForwardSite, made: Rewrite, router: Record) -> tuple[Text, fx.Node] | Reason:
        """What the graph says of its text, and where it looks token ids up."""

        def no(code: str, told: str) -> Reason:
            return Reason(code, told, site.source)

        assert site.text is not None
        text = site.text()
        if isinstance(text, Reason):
            return text
        count: Any = 1
        for size in made.rows:
            count = count * size
        if not same_size(count, text.batch * text.tokens) or not site.anchor > text.ready:
            return no("no-text", "the rows of this block are not known to be the tokens that attention sees")
        lookup = _lookup(site.anchor.graph, router)
        if isinstance(lookup, str):
            return no("no-token-ids", lookup)
        ids = operand(lookup, 1)
        sizes = shape(ids)
        if len(sizes) != 2 or not (same_size(sizes[0], text.batch) and same_size(sizes[1], text.tokens)):
            return no("no-token-ids", "the ids that are looked up are not known to be those that attention sees")
        if not site.anchor > lookup or first_mutation(ids) is not None:
            return no("no-token-ids", "the graph writes to the token ids, or looks them up behind this block")
        # With a size that is open this is a guard, so that a larger batch is another graph.
        if text.batch > self.max_batch_size:
            return no("batch-too-large", f"a batch of {text.batch}; choose max_batch_size for as many texts")
        return text, lookup

    def emit(self, put: Put, record: Record) -> fx.Node:
        """``grouped_ffn`` on the neurons of all experts, with the list that :class:`_Route` has put there."""
        block = put.block
        order, shared, own = self.order(record, block.width)
        w = put.weights(lambda: transposed(block.neurons(order)))
        chosen = _routed(put.graph) if own else None
        return put.call(
            torch.ops.effcompile.grouped_ffn.default, put.input, w.get("gate"), w["up"], w["down"], chosen, None,
            shared, max(own, 1), block.activation,
            **{name: w[name] for name in ("gate_bias", "up_bias", "down_bias") if name in w},
        )  # fmt: skip


def router_of(plan: Plan | None) -> Record | None:
    """The record of the router in a plan."""
    records = [] if plan is None else [r for r in plan if r.method == ReadMe.name and r.module.endswith(ROUTER)]
    if len(records) > 1:
        raise PlanError(f"plan: {len(records)} routers of {ReadMe.name}; there is one for a model.")
    return records[0] if records else None


def lookups(graph: fx.Graph) -> list[tuple[fx.Node, Tensor]]:
    """Lookups of integers in a parameter, as embeddings do, with the parameter."""
    found = []
    for node in graph.nodes:
        if is_call(node, aten.embedding.default) and (tensor := real(operand(node, 0))) is not None:
            ids = value(operand(node, 1))
            if isinstance(ids, Tensor) and not ids.is_floating_point():
                found.append((node, tensor))
    return found


def _lookup(graph: fx.Graph, router: Record) -> fx.Node | str:
    """Where token ids are looked up, in the weights that the router was made for; or why there is no such place."""
    expected, module = router.parameters.get("embedding"), router.module.removesuffix(ROUTER)
    near = lookups(graph)
    found = [node for node, tensor in near if digest(tensor) == expected]
    if len({operand(node, 1) for node in found}) > 1:
        return "this graph looks several tensors of token ids up"
    if found:
        return found[0]
    for node, _ in near:
        if clean_path(module_path(node)) == module:
            raise PlanError(
                f"plan: {ReadMe.name} at {module}: the embedding is not that which the plan was made from. Calibrate "
                "this model, or take the records out of the plan."
            )
    return "this graph looks no token ids up: another does, behind a graph break, or the model was given embeddings"


def _routed(graph: fx.Graph) -> fx.Node | None:
    node: fx.Node
    for node in graph.nodes:
        if node.meta.get("effcompile_route"):
            return node
    return None


@dataclasses.dataclass(frozen=True)
class _Route:
    """The call of the router, which a graph has once."""

    method: ReadMe
    record: Record
    text: Text
    lookup: fx.Node
    embedding: Tensor
    state: Mapping[What, Tensor]

    def place(self, graph: fx.Graph) -> None:
        """Put it where the insertion point is, unless an earlier block has."""
        if _routed(graph) is not None:
            return
        ids, device = operand(self.lookup, 1), self.embedding.device

        def make() -> dict[str, Tensor]:
            return {name: self.record.tensors[name].to(device) for name in token_router.TENSORS}

        weights = prepared(self.record.text, [self.embedding], make)
        router = [constant(graph, weights[name], self.lookup) for name in token_router.TENSORS]
        at, counted = self.text.at(graph), self.text.counted(graph)
        names: tuple[What, ...] = ("route_keys", "route_values", "route_seen", "route_text")
        state = [constant(graph, self.state[name], self.lookup) for name in names]
        arguments = (ids, counted, router, *state, at, self.method.heads)
        node = graph.call_function(token_router.ROUTE_TOKENS, arguments)
        with value(self.lookup).fake_mode:
            node.meta["val"] = token_router.ROUTE_TOKENS(*fx.node.map_arg(arguments, value))
        node.meta["effcompile_route"] = True
