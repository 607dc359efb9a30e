"""``ec.calibrate(..., on=plan)``: a second method, calibrated on what the forms of a plan leave of feed-forward blocks.

The model runs with these forms in it, so that later layers see what they will see, and a method looks at the neurons
that are left: which they are, or which a token has chosen.
"""

from __future__ import annotations

import abc
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from effcompile.kernels.ffn import FeedForward
from effcompile.kernels.reason import Reason
from effcompile.passes.backend_options import clean_path
from effcompile.passes.base import REGISTRY, get
from effcompile.passes.batches import CalibrationError
from effcompile.passes.calibrate import SAMPLES, Looking, Watch, _shared, compared, run_all, watching
from effcompile.passes.feed_forward import Calibrated, check_weights, parts_of
from effcompile.passes.read_me import ReadMe
from effcompile.passes.stack import Below, OnTop, Stack, lowest, refused
from effcompile.passes.weights import block_of, nodes_of
from effcompile.patterns.ffn import find_feed_forward
from effcompile.runtime.plan import Plan, PlanError, Record, digest
from effcompile.runtime.statistics import Rows, Samples, Statistic

Form = Callable[[Tensor], Tensor]
"""A block for rows ``[n, d]``."""


class Standing(Watch, abc.ABC):
    """The back end: runs graphs with the forms of a plan, as reference bodies, in the place of feed-forward blocks."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan

    @abc.abstractmethod
    def form(self, module: str, block: FeedForward, own: dict[str, Tensor]) -> Form | None:
        """What stands in the place of a block of these tensors; None for the block itself, without being looked at."""

    def look(self, graph: fx.GraphModule) -> Looking:
        """The same graph with the forms in it."""
        weights: dict[fx.Node, tuple[Tensor, str]] = {}
        for site in find_feed_forward(graph):
            module = clean_path(site.label)
            # Looked at only now: a block may read what an earlier one, which has been replaced, gives.
            found = parts_of(site, "the form")
            if isinstance(found, Reason):
                self.reasons.append(found)
                continue
            parts, own = found
            form = self.form(module, block_of(parts, own), own)
            if form is None:
                continue

            def whole(x: Tensor, form: Form = form) -> Tensor:
                return form(x.flatten(0, -2)).view(*x.shape[:-1], -1)

            with graph.graph.inserting_before(site.anchor):
                node = graph.graph.call_function(whole, (parts.input,))
            node.meta = dict(site.anchor.meta)
            site.anchor.replace_all_uses_with(node)
            weights |= {n: (own[role], module) for role, n in nodes_of(parts).items()}
        graph.graph.eliminate_dead_code()
        graph.recompile()
        return Looking(graph, {}, weights, self)


def inner(error: torch._dynamo.exc.BackendCompilerFailed) -> Exception:
    """What a back end raised, if it says what a user can do about it: Dynamo's wrapping says nothing of that."""
    told = error.inner_exception
    return told if isinstance(told, PlanError | CalibrationError) else error


@dataclasses.dataclass(eq=False)
class _Left:
    """What a form leaves of the block ``whole``, while data goes through it: ``block``."""

    module: str
    block: FeedForward
    whole: FeedForward
    below: Below | None
    parameters: dict[str, str]
    samples: Samples
    statistics: list[dict[str, Statistic]]
    """Of each method; empty for one that cannot stand there."""

    @property
    def collected(self) -> list[Statistic]:
        """Each statistic once."""
        return [*{id(s): s for named in self.statistics for s in named.values()}.values(), self.samples]

    def see(self, rows: Rows) -> None:
        """Take the rows of one batch in, those without hidden tokens."""
        if not rows.middle.isfinite().all():
            raise CalibrationError(f"calibrate(...): activations of {self.module} hold NaN or infinity.")
        if rows.input.shape[0]:
            for one in self.collected:
                one.update(rows)


class _OnTop(Standing):
    """Looks at what the forms leave."""

    kind = "feed-forward block"

    def __init__(self, plan: Plan, methods: Sequence[OnTop]) -> None:
        super().__init__(plan)
        self.methods = methods
        self.sites: dict[str, _Left] = {}
        self.left: dict[str, list[str]] = {}
        """Blocks on which a method cannot stand, by the reason."""

    def form(self, module: str, block: FeedForward, own: dict[str, Tensor]) -> Form:
        """The form of the plan, or the block itself, which is looked at."""
        below = lowest(self.plan, module)
        routed = None if below is None else below.routed
        left: FeedForward | None = block
        if below is not None:
            check_weights(below.record, own)
            if isinstance(below.method, ReadMe):
                raise CalibrationError(
                    f"calibrate(..., on=plan): {self.methods[0].name} cannot stand on {below.method.name}, as at "
                    f"{module}: its router reads token ids, which no method on it would see."
                )
            # One copy of what is left serves the graphs of all lengths.
            known = self.sites.get(module)
            left = known.block if known else (routed.carved if routed else below.method.leaves)(block, below.record)
        site = self._site(module, left or block, block, own, below)
        run = self._run(block, left, below)

        def form(x: Tensor) -> Tensor:
            out, chosen = run(x)
            if site is not None:
                used = None if routed is None or chosen is None else routed.used(chosen, site.block.width)
                self._see(site, x, used)
            return out

        return form

    def _run(
        self, block: FeedForward, left: FeedForward | None, below: Below | None
    ) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
        """The form, and with its output the groups that tokens have chosen, if they choose."""
        if below is not None and (routed := below.routed) is not None:
            return routed.routed_form(block, below.record)
        fixed: Form
        if left is not None:
            fixed = left  # a copy: no second one for a method that is nothing else
        else:
            assert below is not None
            fixed = below.method.approximate(block, below.record)
        return lambda x: (fixed(x), None)

    def _see(self, site: _Left, x: Tensor, used: Tensor | None) -> None:
        keep = self.keep if self.keep is not None and self.keep.numel() == x.shape[0] else None
        if keep is not None:
            x, used = x[keep], None if used is None else used[keep]
        site.see(Rows(x, site.block.middle(x), site.block, used))

    def _site(
        self, module: str, left: FeedForward, block: FeedForward, own: dict[str, Tensor], below: Below | None
    ) -> _Left | None:
        """Where statistics are collected; None if no method can stand there."""
        if module in self.sites:
            return self.sites[module]
        statistics: list[dict[str, Statistic]] = []
        for method in self.methods:
            why = "" if below is None else refused(method, below, block)
            wanted = {} if why else method.statistics(left)
            if why and module not in self.left.setdefault(why, []):
                self.left[why].append(module)
            statistics.append({"down": wanted["down"]} if wanted and below and below.routed else wanted)
        if not any(statistics):
            self.reasons += [Reason("other-block", why) for why in self.left]
            return None
        parameters = {role: digest(t) for role, t in own.items()}
        site = _Left(module, left, block, below, parameters, Samples(SAMPLES), _shared(statistics))
        for one in site.collected:
            one.prepare(left)
        self.sites[module] = site
        return site


def calibrate_on(
    model: nn.Module, batches: Iterable[Any], methods: Sequence[Any], plan: Plan, *, progress: bool = True
) -> Plan:
    """The plan with records of ``methods`` that stand on its own: :func:`effcompile.calibrate` with ``on``."""
    can = [name for name in REGISTRY if issubclass(get(name), OnTop)]
    for method in methods:
        if not isinstance(method, OnTop):
            raise TypeError(
                f"calibrate(..., on=plan): {method.name} cannot stand on another method; {' and '.join(can)} can."
            )
        if any(record.method == method.name for record in plan):
            raise CalibrationError(
                f"calibrate(..., on=plan): the plan has records of {method.name} already; give one without them."
            )
    model, started = getattr(model, "_orig_mod", model), time.time()
    watch = _OnTop(plan, methods)
    try:
        with watching(model, watch) as copied:
            tokens = run_all(copied, batches, watch, progress=progress)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise inner(error) from None
    records = {(r.module, r.method): r for r in plan}
    for n, method in enumerate(methods):
        sites = [site for site in watch.sites.values() if site.statistics[n]]
        if not sites:
            raise CalibrationError(f"calibrate(..., on=plan): no block for {method.name}: {'; '.join(watch.left)}.")
        records |= {(r.module, r.method): r for r in _records(method, n, sites)}
    told: dict[str, Any] = {"tokens": tokens, "seconds": round(time.time() - started, 1)}
    told |= {"left": watch.left} if watch.left else {}
    return Plan(records, {**plan.made, "on top": told})


def _records(method: OnTop, n: int, sites: Sequence[_Left]) -> list[Record]:
    """What the method, the ``n``-th of those that looked, says of each site; errors are those of both forms."""
    given = [Calibrated(s.module, s.block, s.parameters, s.statistics[n], s.samples) for s in sites]
    try:
        found = method.calibrate(given)
    except ValueError as error:
        raise CalibrationError(f"calibrate(...): {method}: {error}") from None
    records = []
    for site, one in zip(sites, found, strict=True):
        below, whole, x = site.below, site.whole, site.samples.input
        on = {} if below is None else {below.method.name: below.record.identity}
        options = json.loads(method.text)
        record = Record(site.module, method.name, options, site.parameters, dict(one.numbers), dict(one.tensors), on)
        form = method.approximate(whole, record) if below is None else Stack(method, record, below).approximate(whole)
        records.append(compared(record, form(x).float(), whole(x).float()))
    return records
