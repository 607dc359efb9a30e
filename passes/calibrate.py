"""``ec.calibrate``: run a model over some text, collect statistics at its sites, and let passes make a plan of them.

The model is compiled with a back end of its own that changes nothing: it finds sites as the real one does, runs the
graph node by node, and looks at what goes into a site and what its last linear reads. So whatever can be rewritten can
be calibrated, under the same path.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import dataclasses
import functools
import inspect
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from effcompile.kernels.ffn import FeedForward
from effcompile.kernels.reason import Reason
from effcompile.passes import heads
from effcompile.passes.backend_options import clean_path
from effcompile.passes.batches import CalibrationError, call, count, mask_of, shown
from effcompile.passes.feed_forward import Calibrated, CalibratedHeads, FeedForwardPass, Found
from effcompile.passes.fit_threshold import Fitter, records
from effcompile.passes.low_rank import LowRank
from effcompile.passes.options import Decorator, remove
from effcompile.passes.quantize_weights import QuantizeWeights
from effcompile.passes.read_me import ReadMe
from effcompile.passes.reconstruct import WINDOW, ReconstructionError, read, reconstruct, rows_of_blocks
from effcompile.passes.sparse_prefill import SparsePrefill
from effcompile.passes.tree import place_of
from effcompile.passes.weights import block_of, nodes_of, originals
from effcompile.patterns.ffn import describe, find_feed_forward
from effcompile.patterns.normalize import normalize
from effcompile.patterns.output_projection import NoHeads
from effcompile.patterns.walk import aten, is_call
from effcompile.runtime import discarded
from effcompile.runtime.plan import Plan, Record, digest
from effcompile.runtime.statistics import Block, Rows, Samples, Statistic

SAMPLES = 256
"""Rows of each site that are kept to measure an error on, at most twice as many."""


def calibrate(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Any]] | Mapping[str, Iterable[Tensor | Mapping[str, Any]]],
    passes: Sequence[Any],
    *,
    on: Plan | None = None,
    progress: bool = True,
) -> Plan:
    """Run ``model`` over ``batches`` and make a plan for ``passes``.

    Parameters
    ----------
    model
        On the device where it is to run. It is not changed: neither its weights, nor its mode, nor what it was compiled
        with. Decorators on it are not applied while it is calibrated.
    batches
        Each ``input_ids`` ``[B, T]``, or keyword arguments of the model. Rows that an ``attention_mask`` ``[B, T]``
        hides do not count, but in a model with a decoder of its own (``decoder_input_ids``). For ``ec.read_me`` a
        mapping of them, by the names of domains; other methods take all of them together.
    passes
        Such as ``ec.flap(ratio=0.25)``; methods that need no data need no calibration.
    on
        A plan whose methods for feed-forward blocks stand in the model meanwhile, as their reference bodies: ``passes``
        are then of what these leave, and such as can stand on them (``ec.teal``, ``ec.wina``).
    progress
        Show a bar on the error output.

    Returns
    -------
    Plan
        One record for each site and pass, with the relative error of the site on some of the rows (``error``). With
        ``on`` the records of that plan, and those that stand on them, whose ``error`` is that of both.

    Raises
    ------
    CalibrationError
        Without batches, without a site that a pass can take, or where activations are not finite.
    DiscardError
        For a model with parameters that :func:`effcompile.discard_parameters` dropped.
    PlanError
        If ``on`` is for other weights.
    TypeError
        For something in ``passes`` that is not calibrated, or cannot stand on another method.
    """
    discarded.refuse(model, "ec.calibrate")
    methods = [_method(thing) for thing in passes]
    if not methods:
        raise TypeError("calibrate(...): passes is empty; give some, such as [ec.flap(ratio=0.25)].")
    names = [method.name for method in methods]
    if twice := {name for name in names if names.count(name) > 1}:
        raise TypeError(
            f"calibrate(...): {', '.join(twice)} is given twice; a plan has one record of a method for a site."
        )
    attention = [method for method in methods if isinstance(method, SparsePrefill)]
    routed = [method for method in methods if isinstance(method, ReadMe)]
    blocks = [method for method in methods if isinstance(method, FeedForwardPass) and method not in routed]
    linears = [method for method in methods if isinstance(method, LowRank)]
    # A fit reads them more than once.
    weights = [method for method in methods if isinstance(method, QuantizeWeights)]
    domains: Any = batches
    if routed or isinstance(batches, Mapping):
        from effcompile.passes.calibrate_read_me import domains_of, each_read_me

        domains = domains_of(batches, 2 if routed else 1)
        batches = [batch for own in domains.values() for batch in own]
    if on is not None:
        from effcompile.passes.calibrate_on import calibrate_on

        return calibrate_on(model, batches, methods, on, progress=progress)
    texts: Any = list(batches) if attention or weights or linears else batches
    plans = [_fitted(model, texts, method, progress) for method in attention]
    plans += [_rounded(model, texts, method, progress) for method in weights]
    plans += each(model, texts, blocks, progress=progress) if blocks else []
    plans += [each_read_me(model, domains, method, progress=progress) for method in routed]
    if linears:
        from effcompile.passes.calibrate_linear import each_linear

        plans += each_linear(model, texts, linears, progress=progress)
    made = {name: value for plan in plans for name, value in plan.made.items()}
    made["seconds"] = round(sum(plan.made["seconds"] for plan in plans), 1)
    return Plan({(r.module, r.method): r for plan in plans for r in plan}, made)


def each(
    model: nn.Module, batches: Iterable[Any], methods: Sequence[FeedForwardPass], *, progress: bool = True
) -> list[Plan]:
    """A plan for each of ``methods``, which may be settings of one method, from one pass over the data."""
    model = getattr(model, "_orig_mod", model)
    watch, started = _Watch(methods), time.time()
    with watching(model, watch) as copied:
        tokens = run_all(copied, batches, watch, progress=progress)
    plans = []
    for n, method in enumerate(methods):
        sites, attention = watch.wanted(n)
        if method.takes("heads") and not attention:
            reasons = "; ".join([*watch.left][:3]) or "no attention was found"
            raise CalibrationError(f"calibrate(...): {method}: no heads that can be removed: {reasons}.")
        plan = plan_of(_records(method, sites, attention), model, tokens, started)
        if method.takes("heads") and watch.left:
            plan.made["left"] = watch.left
        plans.append(plan)
    return plans


@contextlib.contextmanager
def watching(model: nn.Module, watch: Watch) -> Iterator[nn.Module]:
    """Within this context: a copy of ``model`` on the same weights, whose graphs ``watch`` runs and looks at."""
    copied = _shared_copy(model).eval()
    torch._dynamo.reset()
    copied.compile(backend=watch)
    try:
        with torch.no_grad():
            yield copied
    finally:
        torch._dynamo.reset()


def run_all(copied: nn.Module, batches: Iterable[Any], watch: Watch, *, progress: bool) -> int:
    """All batches through what :func:`watching` gives; the tokens that count. Raises if nothing was seen."""
    tokens = sum(run_one(copied, batch, watch) for batch in shown(batches, progress))
    check_seen(tokens, watch)
    return tokens


def check_seen(tokens: int, watch: Watch) -> None:
    """Raise :class:`CalibrationError` if nothing was seen."""
    if not tokens:
        raise CalibrationError("calibrate(...): batches is empty, or every token is hidden; give some text.")
    if not watch.sites:
        reasons = sorted({str(reason) for reason in watch.reasons}) or [f"no {watch.kind} was found"]
        raise CalibrationError(f"calibrate(...): no site that can be calibrated: {'; '.join(reasons[:3])}.")


def plan_of(records: Sequence[Record], model: nn.Module, tokens: int, started: float) -> Plan:
    """A plan that says what it was made from, and how long that took."""
    made = {"tokens": tokens, "seconds": round(time.time() - started, 1), "torch": torch.__version__}
    made |= {"model": type(model).__name__, "date": time.strftime("%Y-%m-%d")}
    return Plan({(r.module, r.method): r for r in records}, made)


LAST = 512
"""Tokens at the end of a text on which a layer's loss is taken: those that see the longest context."""


def _fitted(model: nn.Module, batches: Sequence[Any], method: SparsePrefill, progress: bool) -> Plan:
    """A plan with a threshold for each layer (:mod:`effcompile.passes.fit_threshold`)."""
    model = getattr(model, "_orig_mod", model)
    copied = _shared_copy(model).eval()
    started, tokens = time.time(), 0
    try:
        fitter = Fitter(method)
    except ValueError as error:
        raise CalibrationError(f"calibrate(...): {error}") from None
    torch._dynamo.reset()
    copied.compile(backend=fitter)
    try:
        with torch.no_grad():
            for batch in shown(batches, progress):
                tokens += count(batch)
                call(copied, batch)
            if not fitter.layers:
                reasons = "; ".join(sorted(set(fitter.reasons))[:3]) or "no attention over a whole prompt was found"
                raise CalibrationError(f"calibrate(...): no layer to fit {method.name} to: {reasons}.")
            fitter.sparse = ""
            dense = _last_logits(copied, batches[0])
            for layer in shown(list(fitter.layers.values()), progress):
                fitter.sparse = layer.module
                ours = _last_logits(copied, batches[0])
                layer.loss = float(torch.nn.functional.kl_div(ours, dense, reduction="batchmean", log_target=True))
    finally:
        torch._dynamo.reset()

    def parameters(module: str) -> dict[str, str]:
        return {name: digest(p) for name, p in copied.get_submodule(module).named_parameters()}

    return plan_of(records(fitter, parameters), model, tokens, started)


def _last_logits(model: nn.Module, batch: Any) -> Tensor:
    """Log probabilities of the last tokens, fp32 ``[N, V]``."""
    out = call(model, batch, logits_to_keep=LAST)
    logits: Tensor = out if isinstance(out, Tensor) else out.logits
    return logits[:, -LAST:].flatten(0, 1).float().log_softmax(-1)


def _rounded(model: nn.Module, batches: Sequence[Any], method: QuantizeWeights, progress: bool) -> Plan:
    """A plan with the codes of each linear in the layers (:mod:`effcompile.passes.reconstruct`)."""
    model = getattr(model, "_orig_mod", model)
    copied = _shared_copy(model).eval()
    started, cbq = time.time(), method.method == "cbq"
    try:
        path, layers = rows_of_blocks(copied)
        texts = read(layers, batches, functools.partial(call, copied), mask_of)
        if not texts:
            raise CalibrationError("calibrate(...): batches is empty; give some text.")
        found = reconstruct(
            layers,
            path,
            texts,
            method.make,
            window=WINDOW if cbq else 1,
            iterations=method.iterations,
            lr=method.lr,
            crossed=cbq,
            clipped=method.clipped,
            shown=functools.partial(shown, progress=progress),
        )
    except ReconstructionError as error:
        raise CalibrationError(f"calibrate(...): {method}: {error}.") from None
    options = json.loads(method.text)
    made = []
    for one in found:
        tensors = {name: t for name, t in one.packed._asdict().items() if t is not None}
        made.append(Record(one.module, method.name, options, {"linear": one.digest}, one.numbers, tensors))
    return plan_of(made, model, sum(map(count, batches)), started)


def _method(thing: Any) -> FeedForwardPass | SparsePrefill | QuantizeWeights | LowRank:
    options = thing.options if isinstance(thing, Decorator) else thing
    if not isinstance(options, FeedForwardPass | SparsePrefill | QuantizeWeights | LowRank) or (
        isinstance(options, QuantizeWeights) and (options.method == "rtn" or options.bits == 16)
    ):
        raise TypeError(
            f"calibrate(...): {thing!r} is not calibrated; give passes such as ec.flap(ratio=0.25), with their options."
        )
    return options


def _shared_copy(model: nn.Module) -> nn.Module:
    """The model on the same tensors, without decorators and without what it was compiled with."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, memo)
    copied._compiled_call_impl = None
    return remove(copied)


def run_one(model: Any, batch: Any, watch: Watch) -> int:
    """One batch through the model; returns the tokens that count."""
    mask = mask_of(batch)
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        mask = None  # it is the encoder's alone, and which rows are those of the encoder is not known here
    watch.keep = None if mask is None else mask.flatten()
    call(model, batch)
    return count(batch)


@dataclasses.dataclass(eq=False)
class _Site:
    """One site while data goes through it: statistics that several passes ask for are there once."""

    module: str
    block: Block
    parameters: dict[str, str]
    samples: Samples
    statistics: list[dict[str, Statistic]]
    given: Tensor | None = None

    @property
    def collected(self) -> list[Statistic]:
        """Each statistic once."""
        return [*{id(s): s for named in self.statistics for s in named.values()}.values(), self.samples]

    def see_input(self, rows: Tensor) -> None:
        self.given = rows

    def see_heads(self, rows: Tensor) -> None:
        self.see_input(rows)
        self.see_middle(rows)

    def see_middle(self, rows: Tensor) -> None:
        if not rows.isfinite().all():
            raise CalibrationError(f"calibrate(...): activations of {self.module} hold NaN or infinity.")
        assert self.given is not None
        given, self.given = self.given, None
        if rows.shape[0]:  # a batch may be hidden as a whole
            for one in self.collected:
                one.update(Rows(given, rows, self.block))


See = Callable[[Tensor], None]
"""What is done with the rows ``[n, channels]`` that a node gives, without those that a mask hides."""


class Watch(abc.ABC):
    """The back end: runs graphs as they are, and looks."""

    kind: str
    """What it looks for."""

    def __init__(self) -> None:
        self.sites: dict[str, Any] = {}
        self.reasons: list[Reason] = []
        self.keep: Tensor | None = None

    @abc.abstractmethod
    def look(self, graph: fx.GraphModule) -> Looking:
        """What to look at in a normalised graph."""

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """The way that Dynamo's graph is run."""
        place = place_of(gm)
        if place is not None:
            place.complete(gm)
        graph = normalize(gm, inputs)
        if isinstance(graph, Reason):
            self.reasons.append(graph)
            return gm.forward
        return self.look(graph).run


class _Watch(Watch):
    """Looks at feed-forward blocks, and at the heads of attention if a pass takes them."""

    def __init__(self, methods: Sequence[FeedForwardPass]) -> None:
        super().__init__()
        self.methods = methods
        self.kind = "feed-forward block or head" if self._heads else "feed-forward block"
        self.left: dict[str, list[str]] = {}
        """Attention whose heads are not known, by reason."""

    @property
    def _heads(self) -> bool:
        return any(method.takes("heads") for method in self.methods)

    def wanted(self, n: int) -> tuple[list[Calibrated], list[CalibratedHeads]]:
        """The sites of the pass ``n`` in the order of the model: blocks, and heads."""
        blocks, attention = [], []
        for s in self.sites.values():
            if isinstance(s.block, FeedForward):
                blocks.append(Calibrated(s.module, s.block, s.parameters, s.statistics[n], s.samples))
            elif s.statistics[n]:
                attention.append(CalibratedHeads(s.module, s.block, s.parameters, s.statistics[n], s.samples))
        return blocks, attention

    def look(self, graph: fx.GraphModule) -> Looking:
        """The input of each block, and what its last linear reads; what the linear behind heads reads."""
        looked_at: dict[fx.Node, list[See]] = {}
        weights: dict[fx.Node, tuple[Tensor, str]] = {}
        for found in find_feed_forward(graph):
            parts = describe(found)
            own = None if isinstance(parts, Reason) else originals(parts)
            if isinstance(parts, Reason) or own is None:
                self.reasons.append(
                    parts if isinstance(parts, Reason) else Reason("computed-weight", "no parameter", found.source)
                )
                continue
            site = self._site(clean_path(found.label), block_of(parts, own), own)
            last = found.anchor.args[1 if is_call(found.anchor, aten.addmm.default) else 0]
            assert isinstance(last, fx.Node)
            looked_at.setdefault(parts.input, []).append(site.see_input)
            looked_at.setdefault(last, []).append(site.see_middle)
            weights |= {node: (own[role], site.module) for role, node in nodes_of(parts).items()}
        for some, tensors in heads.found_heads(graph) if self._heads else ():
            if isinstance(some, NoHeads) or isinstance(tensors, Reason):
                assert isinstance(tensors, Reason)
                self.reasons.append(tensors)
                self.left.setdefault(str(tensors), []).append(clean_path(some.label))
                continue
            site = self._site(clean_path(some.label), heads.heads_of(some, tensors), tensors)
            looked_at.setdefault(some.linear.input, []).append(site.see_heads)
            weights[some.linear.weight] = tensors["output"], site.module
        return Looking(graph, looked_at, weights, self)

    def _site(self, module: str, block: Block, own: Mapping[str, Tensor]) -> _Site:
        if module not in self.sites:
            kind = "ffn" if isinstance(block, FeedForward) else "heads"
            statistics = [method.statistics(block) if method.takes(kind) else {} for method in self.methods]
            parameters = {role: digest(t) for role, t in own.items()}
            site = self.sites[module] = _Site(module, block, parameters, Samples(SAMPLES), _shared(statistics))
            for one in site.collected:
                one.prepare(block)
        found: _Site = self.sites[module]
        return found


def _shared(statistics: list[dict[str, Statistic]]) -> list[dict[str, Statistic]]:
    """The same with equal statistics as one object."""
    kept: dict[Any, Statistic] = {}
    return [{name: kept.setdefault(one.key, one) for name, one in named.items()} for named in statistics]


class Looking(fx.Interpreter):
    """Runs a graph node by node, and hands what some nodes give to those who look at them."""

    def __init__(
        self,
        gm: fx.GraphModule,
        looked_at: Mapping[fx.Node, list[See]],
        weights: Mapping[fx.Node, tuple[Tensor, str]],
        watch: Watch,
    ) -> None:
        super().__init__(gm)
        self.looked_at, self.weights, self.watch = looked_at, weights, watch

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        result = super().run_node(n)
        if n in self.weights and n.op == "placeholder":
            weight, module = self.weights[n]
            if result.data_ptr() != weight.data_ptr():
                # Dynamo reuses what it compiled for one layer, so rows would be counted for the wrong one.
                raise CalibrationError(
                    f"calibrate(...): the code of {module} runs with the weights of another module. A graph break "
                    "inside the model lets layers share code; remove it (TORCH_LOGS=graph_breaks shows where)."
                )
        for see in self.looked_at.get(n, ()):
            rows = result.detach().flatten(0, -2)
            keep = self.watch.keep
            see(rows[keep] if keep is not None and keep.numel() == rows.shape[0] else rows)
        return result


def _records(
    method: FeedForwardPass, sites: Sequence[Calibrated], attention: Sequence[CalibratedHeads]
) -> list[Record]:
    try:
        found, kept = method.calibrate_all(sites, attention)
    except ValueError as error:
        raise CalibrationError(f"calibrate(...): {method}: {error}") from None
    every: list[Calibrated | CalibratedHeads] = [*sites, *attention]
    return [_measured(method, site, one) for site, one in zip(every, [*found, *kept], strict=True)]


def _measured(method: FeedForwardPass, site: Calibrated | CalibratedHeads, one: Found) -> Record:
    """The record, with the error of the site on its samples."""
    record = Record(
        site.module, method.name, json.loads(method.text), site.parameters, dict(one.numbers), dict(one.tensors)
    )
    block, x = site.block, site.samples.input
    made = method.approximate(block, record) if isinstance(block, FeedForward) else heads.approximate(block, record)
    return compared(record, made(x).float(), block(x).float())


def compared(record: Record, got: Tensor, wanted: Tensor) -> Record:
    """The record, with the error of ``got`` where ``wanted`` is the block's own output, both fp32 ``[n, d]``."""
    error = float((got - wanted).norm() / wanted.norm().clamp(min=torch.finfo(torch.float32).tiny))
    cosine = float(torch.nn.functional.cosine_similarity(got, wanted, dim=-1).mean())
    return dataclasses.replace(record, numbers={**record.numbers, "error": error, "cosine": cosine})
