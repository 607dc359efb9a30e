"""Find routers: what chooses a few of many experts for each token, and says how much each of them counts.

From the linear that scores the experts the search goes down through arithmetic on the scores, as far as that goes: what
comes out behind the choice is the router's answer. What the arithmetic means is *tried* and not read: it runs on random
scores, and is compared with each router that :class:`Router` can describe. So a spelling does not matter, and what is
like none of them is never taken for one.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import operator
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from effcompile.kernels.reason import Reason
from effcompile.patterns.linear import VIEWS, input_of, operands_of
from effcompile.patterns.moe import ExpertsSite, find_experts
from effcompile.patterns.site import Site
from effcompile.patterns.walk import aten, is_call, mutated_arguments, operand, shape, strip_casts, value

_RESHAPING = (
    *VIEWS,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.repeat_interleave.self_int,
)
"""Views, followed before the choice only: behind it they belong to whoever reads the answer."""
_MADE = (aten.zeros.default, aten.ones.default, aten.full.default)
_LIKE = (aten.type_as.default, aten.to.other)
_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, *_LIKE)
_COPIES = (aten.clone.default, aten.contiguous.default, aten.detach.default)
_SCORES = (aten.softmax, aten.sigmoid, aten.sigmoid_)
_ARITHMETIC = (
    *(aten.add, aten.add_, aten.sub, aten.mul, aten.mul_, aten.div, aten.div_, aten.neg, aten.clamp, aten.clamp_min),
    *(aten.sum, aten.amax, aten.max, aten.topk, aten.gather, aten.scatter, aten.scatter_),
    *(aten.masked_fill, aten.masked_fill_, aten.where, aten.bitwise_not, aten.logical_not, aten.ne, aten.eq),
    *(aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros, aten.new_full),
    *(aten.dropout, operator.getitem),
)
_REACH = 80
"""Calls between the scores and the answer, at most."""
_NEAR = 200
"""Calls behind a router in which experts begin: a mixture of experts is some sixty."""
_ROWS = 16
"""Tokens with random scores, at least, that a description has to hold for."""
_TOLERANCE = 1e-5
"""Of a weight: routers add a small number to the sum that they divide by."""


@dataclasses.dataclass(frozen=True)
class Router:
    """What a router does with the scores of one token, ``[experts]``.

    Parameters
    ----------
    experts, top_k
        How many there are, and how many of them a token gets.
    score
        What makes ``p`` of the logits.
    scored
        ``"all"``: before the choice; ``"chosen"``: only those that are chosen.
    normalised
        Whether the weights of a token are ``p`` over the sum of the chosen ``p``; a softmax over those chosen is the
        same. Otherwise they are ``p``.
    scale
        A factor of all weights.
    bias
        ``"choice"``: a vector is added to ``p`` for choosing, and not for weighing; ``"logits"``: to the logits.
    groups, top_groups, group_score
        The experts are chosen within the ``top_groups`` best of ``groups`` equal parts, a part being worth its best
        ``p`` or the sum of its ``"top2"``.
    """

    experts: int
    top_k: int
    score: Literal["softmax", "sigmoid"]
    scored: Literal["all", "chosen"]
    normalised: bool
    scale: float = 1.0
    bias: Literal["", "choice", "logits"] = ""
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["", "max", "top2"] = ""

    def __str__(self) -> str:
        told = [f"top {self.top_k} of {self.experts} experts", f"{self.score} of {self.scored}"]
        told += ["normalised"] * self.normalised + [f"times {self.scale:g}"] * (self.scale != 1)
        told += [f"bias on the {self.bias}"] * bool(self.bias)
        told += [f"within {self.top_groups} of {self.groups} groups by {self.group_score}"] * (self.groups > 1)
        return ", ".join(told)


@dataclasses.dataclass
class RouterSite(Site):
    """A router. ``anchor`` is the linear that scores, ``choice`` the call of top-k that chooses among the experts.

    Parameters
    ----------
    router
        What it does, or why that cannot be told; then the rest is not there.
    indices, weights
        What comes out: int64 ``[..., k]``, and ``[..., k]`` in the same order, or ``[..., experts]`` with zeros if
        ``dense``.
    inner
        The calls that make these of the scores.
    weight
        The router's rows, a tensor of the graph as it came in; None if they are computed.
    """

    kind: ClassVar[str] = "router"

    choice: fx.Node
    router: Router | Reason
    indices: fx.Node | None = None
    weights: fx.Node | None = None
    dense: bool = False
    inner: frozenset[fx.Node] = frozenset()
    weight: fx.Node | None = None

    @property
    def output(self) -> fx.Node:
        """The weights that come out."""
        assert self.weights is not None
        return self.weights

    @property
    def end(self) -> fx.Node:
        """The last call of the router: behind it the whole answer is there."""
        assert self.indices is not None
        return max(self.indices, self.output, self.choice)

    @property
    def detail(self) -> str:
        """The router in words, for the report."""
        return "" if isinstance(self.router, Reason) else str(self.router)


def find_routers(gm: fx.GraphModule) -> list[RouterSite]:
    """All routers of a normalised graph, in graph order."""
    return [_router(site) for site in find_experts(gm)]


def _router(experts: ExpertsSite) -> RouterSite:
    site = RouterSite(experts.anchor, experts.choice, Reason("not-a-router", ""))

    def no(code: str, text: str) -> RouterSite:
        site.router = Reason(code, text, site.source)
        return site

    inner = _inner(experts)
    if experts.choice not in inner:
        return no("unknown-router", f"between scores and choice stands something that is no router's: {_last(inner)}")
    read = [user for user in experts.choice.users if is_call(user, operator.getitem) and user.args[1] == 1]
    if len(read) != 1 or not read[0].users:
        return no("unknown-router", "the numbers of the chosen experts are not read, or read twice")
    out = [n for n, behind in inner.items() if behind and any(user not in inner for user in n.users)]
    numbers = [n for n in out if n not in (experts.choice, *read)]
    # One answer may come out in two dtypes.
    bases = {strip_casts(n) for n in numbers}
    if len(bases) != 1:
        return no("unknown-router", f"{len(bases) or 'no'} different weights of the chosen experts come out of it")
    site.indices, site.weights = read[0], numbers[0] if len(numbers) == 1 else bases.pop()
    site.inner = _needed(inner, [site.indices, site.weights])
    site.weight = _rows(experts.anchor)
    if not _is_applied(site):
        return no("not-experts", "what is chosen does not meet again what the scores were made of, as experts do")
    found = _tried(site)
    if isinstance(found, str):
        return no("unknown-router", found)
    site.router, site.dense = found
    return site


def _is_applied(site: RouterSite) -> bool:
    """Whether the weights meet something else that is made of the tokens; those that a sampler draws by do not."""
    tokens = input_of(site.anchor)
    made, weighed = _below(tokens, site.inner) | {tokens}, _below(site.output, frozenset())
    return any(a in made and a not in weighed for node in weighed for a in node.all_input_nodes)


def _below(node: fx.Node, without: frozenset[fx.Node]) -> set[fx.Node]:
    """The first calls that depend on ``node``, by other ways than ``without``."""
    found: set[fx.Node] = set()
    queue = list(node.users)
    heapq.heapify(queue)
    while queue and len(found) < _NEAR:
        user = heapq.heappop(queue)
        if user.op != "output" and user not in found and user not in without:
            found.add(user)
            for one in user.users:
                heapq.heappush(queue, one)
    return found


def _rows(linear: fx.Node) -> fx.Node | None:
    """The weight of a linear, seen through casts: routers often compute in fp32."""
    found = operands_of(linear)
    if found is not None or not is_call(linear, aten.linear.default):
        return None if found is None else found.weight
    rows: fx.Node = strip_casts(operand(linear, 1))
    return rows if rows.op in ("placeholder", "get_attr") else None


def _last(inner: dict[fx.Node, bool]) -> str:
    stops = sorted(u for n in inner for u in n.users if u not in inner)
    return str(stops[0].target) if stops else "nothing"


def _inner(experts: ExpertsSite) -> dict[fx.Node, bool]:
    """The arithmetic on the scores, in graph order: each call, and whether it is behind the choice."""
    inner = {experts.anchor: False}
    queue = list(experts.anchor.users)
    heapq.heapify(queue)
    while queue and len(inner) < _REACH:
        node = heapq.heappop(queue)
        if node in inner:
            continue
        behind = node is experts.choice or any(inner.get(a, False) for a in node.all_input_nodes)
        if not _is_inner(node, experts, behind):
            continue
        known = [a for a in node.all_input_nodes if a in inner]
        others = [a for a in node.all_input_nodes if a not in inner]
        if is_call(node, *_LIKE):
            others = others if node.args[0] not in inner else []
        made = [a for a in others if is_call(a, *_MADE)]
        if not known or any(not (a in made or _is_number(a) or _is_vector(a, experts.experts)) for a in others):
            continue
        inner |= dict.fromkeys(made, False)
        inner[node] = behind
        for user in node.users:
            heapq.heappush(queue, user)
    return dict(sorted(inner.items()))


def _is_inner(node: fx.Node, experts: ExpertsSite, behind: bool) -> bool:
    """Whether a call is of a kind that routers make, where it stands."""
    if node is experts.choice:
        return True
    fake = value(node)
    if behind and (is_call(node, aten.topk) or (isinstance(fake, Tensor) and _is_integer(fake))):
        return node.target is operator.getitem and node.args[0] is experts.choice
    return is_call(node, *_SCORES, *_ARITHMETIC, *_CASTS, *_COPIES) or (not behind and is_call(node, *_RESHAPING))


def _is_integer(fake: Tensor) -> bool:
    return not fake.dtype.is_floating_point and fake.dtype is not torch.bool


def _is_number(node: fx.Node) -> bool:
    return not isinstance(value(node), (Tensor, list, tuple))


def _is_vector(node: fx.Node, experts: Any) -> bool:
    """Whether a tensor that is no score is one number for each expert, the same for all tokens."""
    return shape(node) == (experts,)


def _needed(inner: dict[fx.Node, bool], of: list[fx.Node]) -> frozenset[fx.Node]:
    """Of the arithmetic, what ``of`` are made of, and what writes into that."""
    needed: set[fx.Node] = set()
    queue = list(of)
    while queue:
        node = queue.pop()
        if node in inner and node not in needed:
            needed.add(node)
            queue += node.all_input_nodes
            queue += [user for user in node.users if user in inner and node in mutated_arguments(user)]
    return frozenset(needed)


_known: dict[str, tuple[Router, bool] | str] = {}
"""What has been tried: the layers of a model spell their routers alike."""


def _tried(site: RouterSite) -> tuple[Router, bool] | str:
    """What a router does, and whether its weights are dense; or why that cannot be told."""
    numbers: dict[fx.Node, int] = {}

    def spelled(node: fx.Node) -> str:
        sizes = [_hint(size) for size in shape(node)]
        return f"{numbers.setdefault(node, len(numbers))}{sizes}{_hint(value(node))}"

    order = [node for node in sorted(site.inner) if node is not site.anchor]
    calls = [(spelled(n), n.target, fx.node.map_arg((n.args, n.kwargs), spelled)) for n in order]
    key = str((spelled(site.anchor), calls, *(spelled(n) for n in (site.choice, *_answer(site)))))
    if key not in _known:
        if len(_known) > 256:
            _known.clear()
        _known[key] = _Trial(site).result()
    return _known[key]


def _answer(site: RouterSite) -> tuple[fx.Node, fx.Node]:
    assert site.indices is not None
    assert site.weights is not None
    return site.indices, site.weights


def _hint(size: Any) -> Any:
    """A size at the first call, without adding a guard; None for a tensor, and where it is not known."""
    if isinstance(size, torch.SymInt):
        size = size.node.hint
    return size if isinstance(size, (int, float)) else None


class _Trial:
    """A router on random scores, beside those that can be described. In fp64, so that casts do nothing."""

    def __init__(self, site: RouterSite) -> None:
        self.site = site
        self.order = sorted(site.inner)
        outside = {a for node in self.order for a in node.all_input_nodes if node is not site.anchor} - site.inner
        self.bias = {strip_casts(a) for a in outside if isinstance(value(a), Tensor) and self._is_read(a)}
        earlier = [n for n in self.order if is_call(n, aten.topk.default) and n < site.choice]
        self.groups = (shape(operand(earlier[-1], 0))[-1], operand(earlier[-1], 1)) if earlier else (1, 1)
        self.generator = torch.Generator().manual_seed(0)

    def _is_read(self, node: fx.Node) -> bool:
        inner = self.site.inner - {self.site.anchor}
        return any(user in inner and not is_call(user, *_LIKE) for user in node.users)

    def result(self) -> tuple[Router, bool] | str:
        """What the router is; or a sentence that says why it is none of those."""
        sizes = [_hint(size) for size in shape(self.site.anchor)]
        experts, top_k = shape(self.site.anchor)[-1], operand(self.site.choice, 1)
        if not all(isinstance(x, int) for x in (*sizes, experts, top_k)) or not all(sizes):
            return "the number of its tokens or experts is not known when compiling"
        if len(self.bias) > 1:
            return "more than one vector is added to its scores"
        trials = []
        for _ in range(-(-_ROWS // math.prod(sizes[:-1]))):
            logits, bias = 2 * self._random(*sizes), 0.5 * self._random(experts)
            found = self._run(logits, bias)
            if isinstance(found, str):
                return found
            trials.append((logits, bias, *found))
        for router in self._candidates(experts, top_k):
            told = [_compared(router, *trial) for trial in trials]
            if None not in told:
                scales = torch.cat([scale for scale, _ in told])  # type: ignore[misc]
                if scales.max() - scales.min() <= _TOLERANCE * scales.max():
                    scale = float(f"{scales.median():.6g}")
                    return dataclasses.replace(router, scale=scale), told[0][1]  # type: ignore[index]
        return "what it makes of the scores is no router that is known"

    def _random(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=self.generator, dtype=torch.float64, device="cpu")

    def _candidates(self, experts: int, top_k: int) -> Iterator[Router]:
        site = self.site
        before = _needed(dict.fromkeys(site.inner, False), [operand(site.choice, 0)])
        scored: Literal["all", "chosen"] = "all" if any(is_call(n, *_SCORES) for n in before) else "chosen"
        parts, best = self.groups
        scores: tuple[Literal["softmax", "sigmoid"], ...] = ("softmax", "sigmoid")
        worths: tuple[Literal["", "max", "top2"], ...] = ("max", "top2") if parts > 1 else ("",)
        biases: tuple[Literal["", "choice", "logits"], ...] = ("choice", "logits") if self.bias else ("",)
        # With all experts chosen, a softmax is normalised as it is: whether the router does so besides is read.
        sums = any(is_call(n, aten.sum, aten.softmax) for n in site.inner - before)
        for score, bias, worth, normalised in itertools.product(scores, biases, worths, (sums, not sums)):
            yield Router(experts, top_k, score, scored, normalised, 1.0, bias, parts, best if worth else 1, worth)

    def _run(self, logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor] | str:
        """The answer of the router: numbers of experts, and weights."""
        known: dict[fx.Node, Any] = {self.site.anchor: logits.clone()}

        def read(node: fx.Node) -> Any:
            if node in known:
                return known[node]
            if strip_casts(node) in self.bias:
                return bias.clone()
            number = _hint(value(node))
            if number is None:
                raise ValueError(f"{node} is not known when compiling")
            return number

        def plain(x: Any) -> Any:
            if isinstance(x, torch.dtype) and x.is_floating_point:
                return torch.float64
            return torch.device("cpu") if isinstance(x, torch.device) else x

        try:
            for node in self.order:
                if node is self.site.anchor:
                    continue
                target: Any = node.target
                if is_call(node, *_LIKE):
                    # To the dtype of something outside, which for a score is no more than a rounding.
                    known[node] = read(operand(node, 0))
                    continue
                if is_call(node, aten.dropout) and node.args[2] and node.args[1]:
                    return "dropout is active; call model.eval()"
                arguments, keywords = fx.node.map_arg((node.args, dict(node.kwargs)), read)
                arguments, keywords = pytree.tree_map(plain, (arguments, keywords))
                if is_call(node, *_MADE) and value(node).is_floating_point():
                    keywords = {**keywords, "dtype": torch.float64}
                known[node] = target(*arguments, **keywords)
        except Exception as error:
            return f"it cannot be run by itself: {error}"
        indices, weights = (known[node] for node in _answer(self.site))
        return (
            (indices, weights)
            if indices.shape[:-1] == weights.shape[:-1]
            else "its weights are not those of its tokens"
        )


def _compared(
    router: Router, logits: Tensor, bias: Tensor, indices: Tensor, weights: Tensor
) -> tuple[Tensor, bool] | None:
    """The weights over those of ``router`` without its scale, and whether they are dense; None if they do not fit."""
    own = logits + bias if router.bias == "logits" else logits
    p = own.softmax(-1) if router.score == "softmax" else own.sigmoid()
    ranked = p + bias if router.bias == "choice" else p
    if router.groups > 1:
        parts = ranked.unflatten(-1, (router.groups, -1))
        worth = parts.amax(-1) if router.group_score == "max" else parts.topk(2, -1).values.sum(-1)
        best = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, worth.topk(router.top_groups, -1).indices, True)
        ranked = ranked.masked_fill(~best.repeat_interleave(parts.shape[-1], -1), -math.inf)
    expected = ranked.topk(router.top_k, -1).indices
    if indices.shape != expected.shape or not torch.equal(indices.sort(-1).values, expected.sort(-1).values):
        return None
    chosen = p.gather(-1, indices)
    if router.normalised:
        chosen = chosen / chosen.sum(-1, keepdim=True)
    if weights.shape != chosen.shape or not _constant(weights / chosen):
        if weights.shape != p.shape or weights.scatter(-1, indices, 0).any():
            return None
        weights = weights.gather(-1, indices)
        return ((weights / chosen).flatten(), True) if _constant(weights / chosen) else None
    return (weights / chosen).flatten(), False


def _constant(ratio: Tensor) -> bool:
    return bool(ratio.isfinite().all() and ratio.min() > 0 and ratio.max() - ratio.min() <= _TOLERANCE * ratio.max())
