"""Calibrating linears: what each of them reads, what each rank of it loses, and what that does to the model.

Runs as :mod:`effcompile.passes.calibrate` does, on the same kind of watch. Linears that read one tensor share its
second moment. Where the planner wants to know how sensitive the model is, the graphs run again on a part of the first
batch, once for each linear, with the factors of that one in its place.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from effcompile.kernels.reason import Reason
from effcompile.passes.backend_options import clean_path
from effcompile.passes.batches import CalibrationError, call, shown
from effcompile.passes.calibrate import LAST, Looking, See, Watch, plan_of, run_all, watching
from effcompile.passes.factored import Covered
from effcompile.passes.factors import Spectrum, spectrum
from effcompile.passes.low_rank import LowRank
from effcompile.passes.masa import masa_records
from effcompile.passes.ranks import Item, uniform
from effcompile.passes.residual import low_rank_and_sparse, split
from effcompile.passes.timing import Times, measure
from effcompile.patterns.linear import find_linears, operands_of
from effcompile.patterns.router import find_routers
from effcompile.patterns.walk import shape
from effcompile.runtime import progressive
from effcompile.runtime.plan import Plan, Record, digest
from effcompile.runtime.second_moment import SecondMoment

PROBE = 512
"""Tokens of the first batch on which the sensitivity of each linear is measured."""


@dataclasses.dataclass(eq=False)
class _Site:
    """One linear while data goes through it."""

    module: str
    covered: Covered
    inputs: SecondMoment
    head: bool

    def see(self, rows: Tensor) -> None:
        if not rows.isfinite().all():
            raise CalibrationError(f"calibrate(...): activations that {self.module} reads hold NaN or infinity.")
        self.inputs.update(rows)


class _LinearWatch(Watch):
    """Looks at what linears read, and can put another linear in the place of one."""

    kind = "linear"

    def __init__(self, methods: Sequence[LowRank]) -> None:
        super().__init__()
        # Which linears are covered is the same for all methods but for heads.
        self.method = dataclasses.replace(methods[0], head=any(method.head for method in methods))
        self.sites: dict[str, _Site] = {}
        self.instead: dict[str, Callable[[Tensor], Tensor]] = {}
        self.counting = True
        self.left: dict[str, str] = {}
        """Linears that are not covered, with the reason."""
        self.kept: dict[str, tuple[int, int]] = {}
        """Adapters that stay: the rank and the numbers of each."""

    def look(self, graph: fx.GraphModule) -> Looking:
        """The input of each covered linear, once for all that read it."""
        looked_at: dict[fx.Node, list[See]] = {}
        weights: dict[fx.Node, tuple[Tensor, str]] = {}
        places: dict[fx.Node, tuple[str, fx.Node]] = {}
        ends: dict[fx.Node, fx.Node] = {}
        moments: dict[fx.Node, SecondMoment] = {}
        for found in find_linears(graph, {router.anchor for router in find_routers(graph)}):
            module, covered = clean_path(found.label), self.method.covers(found)
            if found.adapter is not None and self.method.adapters == "keep" and found.anchor is found.adapter[0].down:
                sizes = [x.weight for x in map(operands_of, (found.anchor, found.adapter[0].up)) if x is not None]
                self.kept[module] = shape(found.anchor)[-1], sum(math.prod(shape(w)) for w in sizes)
            if isinstance(covered, Reason):
                self.reasons.append(covered)
                self.left[module] = covered.text
                continue
            read = covered.linear.input
            if module not in self.sites:
                channels, device = covered.rows.shape[1], covered.weight.device
                inputs = moments.get(read) or SecondMoment(channels, device)
                self.sites[module] = _Site(module, covered, inputs, found.role == "head")
            site = self.sites[module]
            if moments.setdefault(read, site.inputs) is not site.inputs or read not in looked_at:
                looked_at.setdefault(read, []).append(site.see)
            weights[covered.linear.weight] = covered.weight, module
            places[covered.linear.node] = module, read
            if covered.adapted is not None:
                ends[covered.output] = covered.linear.node
        return _Exchanging(graph, looked_at if self.counting else {}, weights, places, ends, self)


class _Exchanging(Looking):
    """Runs a graph with other linears in the places that the watch names."""

    def __init__(
        self,
        gm: fx.GraphModule,
        looked_at: Mapping[fx.Node, list[See]],
        weights: Mapping[fx.Node, tuple[Tensor, str]],
        places: Mapping[fx.Node, tuple[str, fx.Node]],
        ends: Mapping[fx.Node, fx.Node],
        watch: _LinearWatch,
    ) -> None:
        super().__init__(gm, looked_at, weights, watch)
        self.places, self.ends, self.linears = places, ends, watch
        self.made: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """One node, or what stands in its place."""
        if n in self.places:
            module, read = self.places[n]
            if (other := self.linears.instead.get(module)) is not None:
                self.made[n] = other(self.env[read])
                return self.made[n]
        result = super().run_node(n)
        # With adapters folded, what stands in the place of the linear stands in that of the sum.
        if (made := self.made.pop(self.ends[n], None) if n in self.ends else None) is not None:
            return made.to(result.dtype).view(result.shape)
        return result


def each_linear(
    model: nn.Module, batches: Sequence[Any], methods: Sequence[LowRank], *, progress: bool = True
) -> list[Plan]:
    """A plan for each of ``methods``, which may be settings of one, from one pass over the data."""
    if len({method.adapters for method in methods}) > 1:
        raise CalibrationError("calibrate(...): settings of low_rank in one pass over the data share adapters=.")
    model = getattr(model, "_orig_mod", model)
    watch, started = _LinearWatch(methods), time.time()
    with watching(model, watch) as copied:
        tokens = run_all(copied, batches, watch, progress=progress)
        watch.counting = False
        torch._dynamo.reset()
        copied.compile(backend=watch)
        probe = _Probe(copied, watch, batches, progress)
        plans = []
        spectra: dict[Any, dict[str, Spectrum]] = {}
        for method in methods:
            if method.method == "masa":
                plans.append(_shared(method, watch, model, tokens, started))
                continue
            key = method.method, method.alpha, method.damping, method.bias
            if key not in spectra:
                spectra = {key: _spectra(method, watch, progress)}  # one at a time: they are as large as the model
            times = _times(watch) if method.milliseconds is not None else None
            try:
                records = _records(method, watch, spectra[key], probe, times)
            except ValueError as error:
                raise CalibrationError(f"calibrate(...): {method}: {error}") from None
            plan = plan_of(records, model, tokens, started)
            plan.made["left"] = _left(model, watch)
            if times is not None:
                shown = {f"{m}x{n}": [round(t, 6) for t in dataclasses.astuple(one)] for (m, n), one in times.items()}
                plan.made["milliseconds"] = {"threads": torch.get_num_threads(), "dense, fixed, each": shown}
            plans.append(plan)
    return plans


def _spectra(method: LowRank, watch: _LinearWatch, progress: bool) -> dict[str, Spectrum]:
    """The directions of every linear under the method's metric."""
    how: Any = {"metric": method.method, "alpha": method.alpha, "damping": method.damping, "mean": method.bias}
    sites = shown(list(watch.sites.values()), progress)
    return {site.module: spectrum(site.covered.rows, site.inputs, **how) for site in sites}


def _times(watch: _LinearWatch) -> dict[tuple[int, int], Times]:
    """Of every shape, in the dtype of the first of them."""
    sites = list(watch.sites.values())
    weight = sites[0].covered.weight
    if len({site.covered.weight.dtype for site in sites}) > 1:
        raise CalibrationError("calibrate(...): milliseconds= of linears in several dtypes; give a budget in bytes.")
    return measure((site.covered.size for site in sites), weight.dtype, weight.device)


def _item(method: LowRank, site: _Site, found: Spectrum, times: Mapping[tuple[int, int], Times] | None) -> Item:
    """What the planner has to know of a linear, without its sensitivity."""
    (outputs, inputs), unit = site.covered.size, 1
    if method.unit == "bytes":
        unit = site.covered.weight.element_size()
    log_condition = 0.0
    if method.planner == "lorc":
        log_condition = progressive.log_condition(site.covered.rows)
    shift = outputs if method.bias and site.covered.shift is None else 0
    each, dense = outputs + inputs, outputs * inputs
    if times is not None:
        one = times[outputs, inputs]
        return Item(one.dense, one.each, one.fixed, found.lost, log_condition=log_condition)
    return Item(dense * unit, each * unit, shift * unit, found.lost, log_condition=log_condition)


def _records(
    method: LowRank,
    watch: _LinearWatch,
    spectra: Mapping[str, Spectrum],
    probe: _Probe,
    times: Mapping[tuple[int, int], Times] | None = None,
) -> list[Record]:
    """A record for each covered linear, with factors, or with the numbers that say why it stays dense."""
    sites = [site for site in watch.sites.values() if method.head or not site.head]
    found = [spectra[site.module] for site in sites]
    items = [_item(method, site, one, times) for site, one in zip(sites, found, strict=True)]
    losses: list[float] = []
    if method.planner == "sensitivity" and method.rank is None:
        losses = probe.losses(method, sites, found, items)
        items = [dataclasses.replace(item, sensitivity=loss) for item, loss in zip(items, losses, strict=True)]
    ranks = method.plan_ranks(items, [site.module for site in sites])
    records = []
    for n, (site, one, item, rank) in enumerate(zip(sites, found, items, ranks, strict=True)):
        numbers = {"parameters": float(site.covered.rows.numel()), "dense": item.dense}
        tensors: dict[str, Tensor] = {}
        if rank is None:
            tried = method.rank or max(item.grid(method.round_to), default=method.round_to)
            numbers |= {"tried": tried, "factors": item.cost(tried), "error": 0.0}
        else:
            tensors, made, lost = _made(method, site, one, rank)
            numbers |= made | {"factors": item.cost(rank)}
            numbers["parameters"] = float(sum(t.numel() for t in tensors.values() if t.is_floating_point()))
            if losses:
                numbers["kl"] = losses[n] * lost
        if one.damping:
            numbers["damping"] = one.damping
        parameters = {role: digest(t) for role, t in site.covered.tensors.items()}
        records.append(Record(site.module, method.name, json.loads(method.text), parameters, numbers, tensors))
    return records + _kept(method, watch)


def _kept(method: LowRank, watch: _LinearWatch) -> list[Record]:
    """A record for each adapter that stays: on its own tensors, whatever these hold, so of no weights."""
    records = []
    for module, (rank, count) in watch.kept.items():
        adapter = {"adapter": float(rank), "parameters": float(count)}
        records.append(Record(module, method.name, json.loads(method.text), {}, adapter))
    return records


def _shared(method: LowRank, watch: _LinearWatch, model: nn.Module, tokens: int, started: float) -> Plan:
    """A plan of :mod:`effcompile.passes.masa`, which says what it saves."""
    sites = [site for site in watch.sites.values() if method.head or not site.head]
    try:
        records = masa_records(method, sites)
    except ValueError as error:
        raise CalibrationError(f"calibrate(...): {method}: {error}") from None
    plan = plan_of(records + _kept(method, watch), model, tokens, started)
    plan.made["left"] = _left(model, watch)
    stored = {id(t): t.nbytes for record in records for t in record.tensors.values()}
    dense = sum(site.covered.rows.nbytes for site, r in zip(sites, records, strict=True) if r.tensors)
    plan.made["masa"] = {"bytes of the weights": dense, "bytes of the plan": sum(stored.values())}
    return plan


def _made(
    method: LowRank, site: _Site, found: Spectrum, planned: int
) -> tuple[dict[str, Tensor], dict[str, float], float]:
    """Factors of the planned rank, or of less with a residual for the rest; what is told of them, and what is lost."""
    weight = site.covered.rows
    rank, entries = planned, 0
    if method.residual:
        rank, entries = split(
            planned, method.residual, *site.covered.size, weight.element_size(), method.round_to
        )  # fmt: skip
    if entries:
        how: Any = {"metric": method.method, "alpha": method.alpha, "damping": method.damping, "mean": method.bias}
        tensors, lost, error = low_rank_and_sparse(weight, site.inputs, rank, entries, **how)
        # Where a few directions are all that inputs have, factors alone lose less.
        if lost < found.tail(planned):
            return tensors, {"rank": rank, "entries": tensors["values"].numel(), "error": error}, lost
    return found.factors(planned), {"rank": planned, "error": found.error(planned)}, found.tail(planned)


class _Probe:
    """Measures how far next tokens move when one linear alone is factored."""

    def __init__(self, copied: nn.Module, watch: _LinearWatch, batches: Sequence[Any], progress: bool) -> None:
        self.copied, self.watch, self.progress = copied, watch, progress
        self.text = _start_of(batches[0])

    def losses(
        self, method: LowRank, sites: Sequence[_Site], found: Sequence[Spectrum], items: Sequence[Item]
    ) -> list[float]:
        """KL of each linear over the mean square that its outputs lose: measured at the rank of a uniform plan.

        Near the model's own weights the divergence is a square of what outputs lose, so one measurement of each tells
        about all of its ranks.
        """
        ranks = uniform(items, method.whole(items), method.round_to)
        dense = _next_tokens(self.copied, self.text)
        losses = []
        for site, one, item, rank in shown(list(zip(sites, found, items, ranks, strict=True)), self.progress):
            grid = item.grid(method.round_to)
            rank = rank or (grid[-1] if grid else None)
            if rank is None or one.tail(rank) <= 0:
                losses.append(0.0)
                continue
            self.watch.instead = {site.module: _as_linear(site, one.factors(rank))}
            try:
                ours = _next_tokens(self.copied, self.text)
            finally:
                self.watch.instead = {}
            loss = F.kl_div(ours, dense, reduction="batchmean", log_target=True)
            losses.append(max(float(loss), 0.0) / one.tail(rank))
        return losses


def _next_tokens(model: nn.Module, batch: Any) -> Tensor:
    """Log probabilities of the last tokens, fp32 ``[N, V]``."""
    out = call(model, batch, logits_to_keep=LAST)
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise CalibrationError(
            f"calibrate(...): planner='sensitivity' measures next tokens, and {type(model).__name__} gives no logits "
            "[B, T, V]; choose another planner."
        )
    return logits[:, -LAST:].flatten(0, 1).float().log_softmax(-1)


def _as_linear(site: _Site, factors: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """The linear with factors, for what the graph gives it."""
    given = [t for t in (site.covered.shift, factors.get("shift")) if t is not None]
    both = sum(given[1:], given[0].double()).to(site.covered.weight) if given else None

    def run(x: Tensor) -> Tensor:
        return F.linear(F.linear(x, factors["down"]), factors["up"], both)

    return run


def _start_of(batch: Any) -> Any:
    """:data:`PROBE` tokens of a batch's first row, to the end of its text if a mask says where that is."""
    if isinstance(batch, Tensor):
        return batch[:1, :PROBE] if batch.ndim == 2 and not batch.is_floating_point() else batch
    given = dict(batch)
    ids = next((t for t in given.values() if isinstance(t, Tensor) and t.ndim == 2), None)
    if ids is None or any(isinstance(t, Tensor) and t.shape != ids.shape for t in given.values()):
        return batch
    mask = given.get("attention_mask")
    if not isinstance(mask, Tensor) or not mask[0].any():
        return {name: t[:1, :PROBE] if isinstance(t, Tensor) else t for name, t in given.items()}
    # Padding may stand on either side, and the last tokens have to be of the text.
    end = int(mask[0].nonzero().max()) + 1
    part = slice(max(0, end - PROBE), end)
    return {name: t[:1, part] if isinstance(t, Tensor) else t for name, t in given.items()}


def _left(model: nn.Module, watch: _LinearWatch) -> dict[str, list[str]]:
    """What is not covered, by reason; also modules whose product is in the graph under no name that is known."""
    found: dict[str, list[str]] = {}
    for module, text in watch.left.items():
        if module not in watch.sites:
            found.setdefault(text, []).append(module)
    seen = {*watch.sites, *watch.left}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path not in seen:
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            text = f"{kind}: no linear was seen there; quantised layers of other libraries are left alone"
            found.setdefault(text, []).append(path)
    return found
