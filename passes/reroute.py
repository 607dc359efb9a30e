"""Fewer experts for a token in a model that is a mixture of experts, and how often each expert is used.

Paper: Harder Tasks Need More Experts: Dynamic Routing in MoE Models (Huang et al., ACL 2024), for the threshold.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any, ClassVar

from torch import Tensor, fx

from effcompile.kernels import router_ops
from effcompile.kernels.reason import Reason
from effcompile.passes.backend_options import clean_path
from effcompile.passes.base import Pass
from effcompile.passes.options import OptionError
from effcompile.passes.rewrite import Rewrite
from effcompile.passes.weights import constant, real
from effcompile.patterns.linear import VIEWS
from effcompile.patterns.router import Router, RouterSite
from effcompile.patterns.walk import arguments, aten, is_call, value
from effcompile.runtime.router_state import What, state_of

_SAME = (aten.to.dtype, aten._to_copy.default, aten.contiguous.default, aten.clone.default, aten.flatten.using_ints)
"""What hands the numbers of experts on as they are, beside views."""
_COUNTS = (aten.cumsum.default, aten.searchsorted.Tensor, aten.bincount.default, aten.histc.default)
_COMPARES = tuple(
    getattr(getattr(aten, name), kind) for name in ("lt", "le", "gt", "ge") for kind in ("Scalar", "Tensor")
)
_PRODUCTS = (
    aten.mm.default, aten.bmm.default, aten.matmul.default, aten.linear.default, aten.einsum.default,
    aten.addmm.default, aten.baddbmm.default, aten._grouped_mm.default,
)  # fmt: skip
_MIXES = (aten.sum.dim_IntList, aten.index_add.default, aten.scatter_add.default, aten.index_put.default)


@dataclasses.dataclass(frozen=True)
class Reroute(Pass):
    """Give a token fewer experts than its router would, and count how often each expert is used.

    Works on the routers that a model has (:class:`~effcompile.patterns.router.Router`): whatever its experts are, they
    are handed the same number of slots, of which those left out weigh 0. Where experts are read slot by slot, these
    name the token's best expert again, so that no other one is read for them.

    Parameters
    ----------
    top_k
        Experts of a token, at most; None: as many as the model takes. More than that is an error.
    threshold
        The fewest experts, by weight, whose weights reach this share of those of the ``top_k``; 1: all of them.
    count
        Keep for each router how many tokens each expert got; see :func:`effcompile.expert_counts`.
    adapt
        Add to the logits of each router a vector of its own: zeros, until :class:`effcompile.Rewire` adapts them.

    Notes
    -----
    Weights that the model normalises sum to what they did before; others stay as they are. The paper trains its models
    with a threshold on the probability over all experts; here it is a share of the weights that the model's own choice
    has, and nothing is trained.
    """

    top_k: int | None = None
    threshold: float = 1.0
    count: bool = False
    adapt: bool = False

    name: ClassVar[str] = "reroute"
    paper: ClassVar[str] = "Harder Tasks Need More Experts (Huang et al., ACL 2024), without training"
    summary: ClassVar[str] = "mixtures of experts: fewer experts for a token, and counts of their use"
    phases: ClassVar[tuple[str, ...]] = ("prefill", "decode")
    site_kind: ClassVar[str] = "router"
    limit: ClassVar[dict[str, Any]] = {"top_k": None, "threshold": 1.0}

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k!r}; expected 1 or more, or None for as many as the model takes.")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold!r}; expected a share above 0, up to 1.")

    def match(self, site: RouterSite) -> Rewrite | Reason:
        """Fewer experts behind this router's choice, and its count; or why it stays as it is."""
        router = site.router
        if isinstance(router, Reason):
            return router
        top_k = router.top_k if self.top_k is None else self.top_k
        if top_k > router.top_k:
            raise OptionError(
                f"reroute: top_k={top_k}, but {clean_path(site.module)} gives {router.top_k} of {router.experts} "
                f"experts to a token; choose at most {router.top_k} there."
            )
        fewer = top_k < router.top_k or self.threshold < 1
        told = [f"top {top_k} of {router.top_k}"] * (top_k < router.top_k)
        told += [f"threshold {self.threshold:g}"] * (self.threshold < 1)
        told += ["counted"] * self.count + ["adapted"] * self.adapt
        if not told:
            return Reason("nothing-to-do", f"a token has {router.top_k} experts here already", site.source)
        if early := [node for node in _readers(site) if node < site.end]:
            text = f"the choice is read ({early[0].target}) before the weights are there"
            return Reason("read-early", text, site.source)
        if fewer and (why := _not_silent(site)):
            return Reason("slots-not-weighed", f"a slot of weight 0 would still tell here: {why}", site.source)
        weight = None if site.weight is None else real(site.weight)
        if (self.count or self.adapt) and weight is None:
            return Reason("computed-weight", "the weight of this router is no parameter", site.source)
        kept: list[What] = [*["counts"] * self.count, *["vector"] * self.adapt]  # type: ignore[list-item]
        own = {} if weight is None else {what: state_of(what, weight, router.experts) for what in kept}

        def emit(graph: fx.Graph) -> fx.Node:
            if "vector" in own:
                with graph.inserting_before(site.anchor.next):
                    _shift(graph, site, own["vector"])
            with graph.inserting_before(site.end.next):
                return _emit(graph, site, router, (top_k, self.threshold) if fewer else None, own.get("counts"))

        states = () if site.weight is None else tuple((site.weight, what, state) for what, state in own.items())
        return Rewrite(f"reroute {', '.join(told)}", emit, states=states, placed=True)


def _call(graph: fx.Graph, like: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A call, with the fake value of its result; ``like`` is any node with one."""
    node = graph.call_function(target, args)
    with value(like).fake_mode:
        node.meta["val"] = target(*fx.node.map_arg(args, value))
    return node


def _shift(graph: fx.Graph, site: RouterSite, vector: Tensor) -> None:
    """Let the router read its logits with ``vector`` added; what else reads them gets them as they are."""
    logits = site.anchor
    own = _call(graph, logits, aten.to.dtype, constant(graph, vector, logits), value(logits).dtype)
    added = _call(graph, logits, aten.add.Tensor, logits, own)
    for user in [user for user in logits.users if user in site.inner]:
        user.replace_input_with(logits, added)


def _readers(site: RouterSite) -> list[fx.Node]:
    """What reads the router's answer."""
    assert site.indices is not None
    assert site.weights is not None
    return [user for node in (site.indices, site.weights) for user in node.users if user not in site.inner]


def _emit(
    graph: fx.Graph, site: RouterSite, router: Router, fewer: tuple[int, float] | None, count: Tensor | None
) -> fx.Node:
    """Put the operators behind the answer of the router; returns the weights."""
    indices, weights = site.indices, site.weights
    assert indices is not None
    assert weights is not None

    call = functools.partial(_call, graph, indices)
    readers = _readers(site)
    new, own, used = indices, weights, None
    if fewer is not None:
        top_k, threshold = fewer
        # In order of the choice already, or not asked for.
        ranked = arguments(site.choice)["sorted"] or top_k == router.top_k
        values = None if ranked else call(operator.getitem, site.choice, 0)
        slots = call(aten.gather.default, weights, -1, indices) if site.dense else weights
        repeat = not site.dense and _by_slot(readers, indices)
        made = call(router_ops.REROUTE, values, indices, slots, top_k, threshold, router.normalised, repeat)
        new, own, used = (call(operator.getitem, made, n) for n in range(3))
        if site.dense:
            own = call(aten.scatter.src, call(aten.zeros_like.default, weights), -1, indices, own)
        for reader in readers:
            reader.replace_input_with(indices, new)
            reader.replace_input_with(weights, own)
    if count is not None:
        call(router_ops.COUNT_EXPERTS, constant(graph, count, indices), indices, used)
    return own


def _not_silent(site: RouterSite) -> str:
    """Why a slot that is left out would change what others give, or '' if its weight of 0 is all there is to it."""
    assert site.indices is not None
    assert site.weights is not None
    if (node := _limit(site.indices)) is not None:
        return f"experts have room for a number of slots each ({node.target})"
    if (node := _biased(site.weights)) is not None:
        return f"weights multiply what experts read, and a bias is added behind that ({node.target})"
    return ""


def _limit(indices: fx.Node) -> fx.Node | None:
    """Where slots, counted or ranked over tokens, are compared with something: those that are left out count too."""
    found, queue = {indices: False}, [indices]
    while queue:
        node = queue.pop()
        for user in node.users:
            if found[node] and is_call(user, *_COMPARES):
                return user
            counted = found[node] or is_call(user, *_COUNTS)
            val = user.meta.get("val")
            numbers = isinstance(val, Tensor) and val.is_floating_point()
            if numbers and not is_call(user, *_COUNTS, *_SAME, *VIEWS):
                continue  # what experts make of the slots
            if user in found and found[user] >= counted:
                continue
            found[user] = counted
            queue.append(user)
    return None


def _biased(weights: fx.Node) -> fx.Node | None:
    """Where a parameter is added to what experts make of tokens that were weighed before."""
    queue = [(user, False, False) for user in weights.users]
    seen: set[tuple[fx.Node, bool, bool]] = set()
    while queue and len(seen) < 256:
        node, weighed, through = queue.pop()
        if (node, weighed, through) in seen:
            continue
        seen.add((node, weighed, through))
        if is_call(node, aten.mul.Tensor):
            weighed = True
        elif is_call(node, *_PRODUCTS):
            if not weighed:
                continue  # weights that are summed with in one product
            if is_call(node, aten.addmm.default, aten.baddbmm.default) or (
                is_call(node, aten.linear.default) and len(node.args) > 2 and node.args[2] is not None
            ):
                return node
            through = True
        elif is_call(node, aten.add.Tensor):
            if through and any(_is_parameter(a) for a in node.all_input_nodes):
                return node
            if not any(_is_parameter(a) for a in node.all_input_nodes):
                continue  # with other tokens' or other experts' results: the mixture is behind us
        elif is_call(node, *_MIXES):
            continue
        queue += [(user, weighed, through) for user in node.users]
    return None


def _is_parameter(node: fx.Node) -> bool:
    """Whether this is a parameter, or rows of one."""
    while is_call(node, aten.index.Tensor, aten.index_select.default, aten.gather.default, *VIEWS, *_SAME):
        node = node.args[0]  # type: ignore[assignment]
    return node.op in ("placeholder", "get_attr") and real(node) is not None


def _by_slot(readers: list[fx.Node], indices: fx.Node) -> bool:
    """Whether what reads the numbers of experts takes each slot by itself, so that an expert may stand there twice.

    It does if it looks up weights, or sorts the slots by expert. A scatter does not: of two slots one would be lost.
    """
    queue = [node for node in readers if indices in node.all_input_nodes]
    while queue:
        node = queue.pop()
        if is_call(node, *VIEWS, *_SAME):
            queue += node.users
        elif not is_call(node, aten.sort, aten.index.Tensor, aten.index_select.default):
            return False
    return True
