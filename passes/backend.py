"""The driver: what ``torch.compile(model, backend="effcompile")`` calls with each graph.

``Dynamo graph -> normalise -> find sites -> passes -> effcompile operators -> compile_fx``. A pass answers with values;
the driver rewrites, verifies, times and reports. With no rewritten site the original graph goes to ``compile_fx``
untouched.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import logging
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from effcompile import kernels, lowering
from effcompile.kernels import observe
from effcompile.kernels.reason import Reason
from effcompile.passes import backend_options as choices
from effcompile.passes import base, report
from effcompile.passes.decision import Seen
from effcompile.passes.discard import Use, check_moved
from effcompile.passes.join import join_linears
from effcompile.passes.linear import lower_linears
from effcompile.passes.options import PREFIX
from effcompile.passes.rewrite import Rewrite
from effcompile.passes.tree import place_of
from effcompile.passes.weight_form import WeightForm, Weights
from effcompile.passes.weights import Fresh
from effcompile.patterns.attention import AttentionSite, Unmatched, find_attention, hidden_attention
from effcompile.patterns.ffn import FeedForwardSite, find_feed_forward
from effcompile.patterns.layers import find_layers
from effcompile.patterns.linear import LinearSite, find_heads, find_linears
from effcompile.patterns.moe import ExpertsSite, find_experts
from effcompile.patterns.normalize import normalize
from effcompile.patterns.output_projection import HeadsSite, NoHeads, find_output_projections
from effcompile.patterns.router import RouterSite, find_routers
from effcompile.patterns.site import Site
from effcompile.patterns.text import locate
from effcompile.patterns.walk import mutated_arguments, root
from effcompile.runtime.router_state import Owned

log = logging.getLogger(__name__)

Other = FeedForwardSite | RouterSite | LinearSite | HeadsSite | NoHeads
"""A site that is no attention."""


def effcompile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph. Not called by hand: ``model.compile(backend="effcompile", options={...})``.

    Parameters
    ----------
    mode
        As in ``torch.compile``; passed on to Inductor.
    options
        ``rules`` (module pattern -> pass -> options), a pass name -> options for all sites, ``verify``, and
        ``inductor`` (settings of Inductor). See :func:`effcompile.passes.backend_options.parse`.

    Raises
    ------
    OptionError
        For an option, pass or value that does not exist, and for a rule that names no module of the compiled one;
        lists the nearest names.
    DiscardError
        For a graph that reads a parameter which :func:`effcompile.discard_parameters` dropped.
    """
    chosen = choices.parse(options, mode)
    check_moved(gm)
    clock = _Clock()
    place = place_of(gm)
    root = None if place is None else place.root
    notes: tuple[str, ...] = ()
    if place is not None:
        place.check(chosen)
        if chosen.plan is not None:
            place.check_plan(chosen.plan)
        place.complete(gm)
        notes = place.shared(chosen)
    graph = normalize(gm, example_inputs)
    if isinstance(graph, Reason):
        log.warning("compiled without rewriting: %s", graph)
        seen = [report.left(i, site, "", site.reason) for i, site in enumerate(hidden_attention(gm, graph))]
        kept = report.GraphReport(gm, None, seen, chosen, clock.seconds, note=graph, root=root)
        return _unchanged(gm, example_inputs, chosen, kept)
    clock.lap("normalise")
    before = report.Snapshot(graph)
    attention = find_attention(graph)
    blocks = find_feed_forward(graph)
    locate(blocks, attention)
    routers = find_routers(graph)
    # A linear after the block or the heads that it is of: a method that takes these takes it, too.
    linears = find_linears(graph, [site.anchor for site in routers])
    heads = find_output_projections(attention) if _named(chosen, graph, HeadsSite.kind) else []
    sites: list[Other] = [*blocks, *routers, *heads, *linears]
    # Before anything is rewritten: a layer is found by what its attention leads to.
    kinds = _other_kinds(graph, attention, sites)
    decisions, replaced = _rewrite(graph, chosen, attention, sites)
    notes += _unused(chosen, graph, sites, attention)
    told = {decision.site for decision in decisions}
    others = _others(kinds, [site for n, site in enumerate(sites, len(attention)) if n in told])
    clock.lap("match")
    if not replaced:
        log.info("no site was rewritten (%d found); Inductor gets the original graph", len(decisions))
        kept = report.GraphReport(gm, before, decisions, chosen, clock.seconds, others=others, notes=notes, root=root)
        return _unchanged(gm, example_inputs, chosen, kept)
    check = _verifier(graph, replaced) if chosen.verify else None
    _clean(graph, replaced)
    join_linears(graph)
    lowered = lower_linears(graph)
    programs = tuple(dict.fromkeys(p for _, rewrite, _, _ in replaced for p in rewrite.programs))
    operators = tuple(dict.fromkeys(p for _, rewrite, _, _ in replaced for p in rewrite.operators))
    device = next((x.device.type for x in example_inputs if isinstance(x, Tensor)), "cpu")
    use = Use(graph, [made for _, made, _, _ in replaced], checked=check is not None)
    use.check("a graph that is compiled now")
    lowering.prebuild(programs, device)
    after = report.Snapshot(graph)
    record = report.GraphReport(
        gm, before, decisions, chosen, clock.seconds, after=after, programs=(*programs, *operators), others=others,
        notes=notes, root=root,
    )  # fmt: skip
    record.linears, record.use = lowered, use
    report.record(record)
    inputs = {node: n for n, node in enumerate(graph.graph.find_nodes(op="placeholder"))}
    weights = [(inputs[n], module, t) for _, made, _, _ in replaced for module, n, t in made.weights if n in inputs]
    clock.lap("report")
    patches = chosen.inductor_patches() | _cache_key(chosen)
    if check is not None:
        # A wrong compile must not be kept on disk for others while it is being looked for.
        patches |= {"fx_graph_cache": False, "fx_graph_remote_cache": False}
    made: Any = compile_fx(graph, list(example_inputs), config_patches=patches)
    compiled = report.attach(record, made)
    clock.lap("inductor")
    if check is not None:
        compiled = _Verified(compiled, check, record)
    if states := [(inputs[n], what, t) for _, made, _, _ in replaced for n, what, t in made.states if n in inputs]:
        compiled = Owned(compiled, states)
    return Fresh(compiled, weights) if weights else compiled


def _unchanged(
    gm: fx.GraphModule, inputs: Sequence[Any], chosen: choices.BackendOptions, record: report.GraphReport
) -> Callable[..., Any]:
    """Compile the original graph, and keep the report of why."""
    record.use = Use(gm)
    record.use.check("a graph that is compiled now")
    report.record(record)
    made: Any = compile_fx(gm, list(inputs), config_patches=chosen.inductor_patches())
    return report.attach(record, made)


_DEFAULT = "compress_kv"
"""The pass that tells about a site of which nobody asked anything."""
_FEW_BITS = "quantize_weights"
"""The pass that says in which bits other forms keep their linears."""

Replaced = list[tuple[Site, Rewrite, fx.Node, fx.Node]]


def _rewrite(
    gm: fx.GraphModule,
    chosen: choices.BackendOptions,
    attention: Sequence[AttentionSite | Unmatched],
    others: Sequence[Other] = (),
) -> tuple[list[report.Decision], Replaced]:
    """Ask every pass about every site of its kind, and put the replacements in; old nodes stay until :func:`_clean`."""
    decisions: list[report.Decision] = []
    replaced: Replaced = []
    kinds = {name: (base.get(name).site_kind, *base.get(name).also) for name in base.REGISTRY}
    inside: dict[fx.Node, str] = {}
    kept: dict[fx.Node, WeightForm | Reason] = {}
    few_bits = functools.partial(_few_bits, chosen, {s.anchor: s for s in others if isinstance(s, LinearSite)})
    planned = {record.method for record in chosen.plan or ()}
    for index, site in enumerate([*attention, *others]):
        if isinstance(site, Unmatched):
            decisions.append(report.left(index, site, "", site.reason))
            continue
        taken = inside.get(site.anchor, "") if isinstance(site, LinearSite) else ""
        site.few_bits = few_bits
        answers = {}
        for name in [name for name, kind in kinds.items() if site.kind in kind]:
            resolved = choices.resolve(name, site.module, site.anchor.meta.get("custom"), chosen, site.label)
            answers[name] = _ask(name, resolved, site)
        answers = _stacked(answers, site)
        asked = any(rule for _, rule in answers.values())
        for name, (answer, rule) in answers.items():
            if not rule and (asked or name != _DEFAULT):
                continue  # nobody asked for this pass here, and another row tells about the site
            # Of a method that was calibrated on another it is known better why it is not here.
            if taken and not (isinstance(answer, Reason) and _stands_on(chosen, name, site)):
                hint = base.get(name).beside if isinstance(answer, Rewrite) and taken in planned else ""
                answer = _beside(
                    taken + " stands here" + hint, kept.get(site.anchor) if name == _FEW_BITS else None, site
                )
            if isinstance(answer, Reason):
                decisions.append(report.left(index, site, rule, answer))
                continue
            taken = name
            if isinstance(site, FeedForwardSite):
                inside |= dict.fromkeys((*site.ups, site.down), name)
            if isinstance(site, HeadsSite):
                inside |= dict.fromkeys((site.anchor, *answer.linears), name)
            inside |= dict.fromkeys(answer.takes, name)
            kept |= answer.kept
            old = answer.output or site.output
            with gm.graph.inserting_before(old):
                new = answer.emit(gm.graph)
            for key, item in old.meta.items():
                new.meta.setdefault(key, item)
            if not answer.placed:
                old.replace_all_uses_with(new, delete_user_cb=functools.partial(operator.is_not, new))
            replaced.append((site, answer, old, new))
            decisions.append(report.rewritten(index, site, rule, answer))
    gm.graph.lint()
    gm.recompile()
    return decisions, replaced


def _stands_on(chosen: choices.BackendOptions, name: str, site: Site) -> bool:
    """Whether the plan has the method ``name`` on top of another at this site."""
    record = None if chosen.plan is None else chosen.plan.get(choices.clean_path(site.label), name)
    return record is not None and bool(record.on)


Answers = dict[str, tuple[Rewrite | Reason, str]]
"""By method: its answer for a site, and the choice of the user that led to it."""


def _stacked(answers: Answers, site: Site) -> Answers:
    """The same, with a form that stands on another method's in the place of that: one row tells about both."""
    found = dict(answers)
    for name, (answer, rule) in answers.items():
        if not isinstance(answer, Rewrite) or not answer.on:
            continue
        below, other = found[answer.on]
        if isinstance(below, Reason):
            text = f"{name} was calibrated on what {answer.on} leaves of this block, and that is not here: {below.text}"
            found[name] = Reason("other-block", text, site.source), rule
        elif below.on:
            found[name] = Reason("taken", f"{below.form} stands here", site.source), rule
        else:
            found[answer.on] = answer, rule if rule == other else f"{other}, {rule}"
            del found[name]
    return found


def _few_bits(
    chosen: choices.BackendOptions, linears: Mapping[fx.Node, LinearSite], node: fx.Node, weights: Weights
) -> WeightForm | Reason | None:
    """How another form keeps the ``weights`` that it has in the place of a linear; None if nobody asked."""
    site = linears[node]
    options: Any = choices.resolve(_FEW_BITS, site.module, node.meta.get("custom"), chosen, site.label).options
    kept: WeightForm | Reason | None = None if options is None else options.keeps(site, weights)
    return kept


def _beside(text: str, kept: WeightForm | Reason | None, site: Site) -> Reason:
    """Why a site is not asked about where another method stands, as ``text`` says, and in which bits that keeps it."""
    if isinstance(kept, Reason):
        return kept
    return Reason("taken", text + (f", and keeps its weights in {kept.text}" if kept else ""), site.source)


def _unused(
    chosen: choices.BackendOptions, gm: fx.GraphModule, sites: Sequence[Other], attention: Sequence[Site]
) -> tuple[str, ...]:
    """A sentence if a plan speaks of modules of this graph at which there is no site that it speaks of.

    Such a graph computes something else than one in which the sites are found, as a step beside its prompt.
    """
    if chosen.plan is None:
        return ()
    stacks = (node.meta.get("nn_module_stack") for node in gm.graph.nodes)
    inside = {choices.clean_path(list(stack.values())[-1][0]) for stack in stacks if stack}
    kinds = {name: (base.get(name).site_kind, *base.get(name).also) for name in {r.method for r in chosen.plan}}
    every = [(choices.clean_path(site.label), site.kind) for site in (*sites, *attention)]
    found = {(label, name) for label, kind in every for name in kinds if kind in kinds[name]}
    own = [r for r in chosen.plan if not base.get(r.method).is_common(r.module)]
    lost = [r for r in own if r.module.partition("#")[0] in inside and (r.module, r.method) not in found]
    if not lost:
        return ()
    names = ", ".join(f"{r.method} at {r.module}" for r in lost[:3]) + f" and {len(lost) - 3} more" * (len(lost) > 3)
    return (f"plan: {names}: not applied in this graph, in which no such site was found.",)


def _named(chosen: choices.BackendOptions, gm: fx.GraphModule, kind: str) -> bool:
    """Whether the user names a pass that takes sites of ``kind`` beside those that it is for."""
    custom = {key.removeprefix(PREFIX) for node in gm.graph.nodes for key in node.meta.get("custom") or ()}
    named = {rule.pass_name for rule in chosen.rules} | {name for name, _ in chosen.globals} | custom
    named |= {record.method for record in chosen.plan or ()}
    return any(kind in base.get(name).also for name in named & base.REGISTRY.keys())


def _other_kinds(
    gm: fx.GraphModule, attention: Sequence[AttentionSite | Unmatched], found: Sequence[Other]
) -> list[Site]:
    """The sites of kinds beside attention."""
    feed_forward = [site for site in found if isinstance(site, FeedForwardSite)]
    blocks: list[FeedForwardSite | ExpertsSite] = [*feed_forward, *find_experts(gm)]
    # Heads are no place of their own: they are told of where somebody asks for them.
    places = [site for site in found if not isinstance(site, HeadsSite | NoHeads)]
    return [*places, *find_experts(gm), *find_heads(gm), *find_layers(gm, attention, blocks)]


def _others(found: Sequence[Site], told: Sequence[Site]) -> list[report.Decision]:
    """Those of which nothing is ``told``, listed for those who want to know what a model is made of."""
    sites = [site for site in found if all(site is not one for one in told)]

    taken = {base.get(name).site_kind for name in base.REGISTRY}

    def why(site: Site) -> Reason:
        if isinstance(site, RouterSite) and isinstance(site.router, Reason):
            return site.router
        if site.kind in taken:
            return Reason("not-asked", "no decorator, rule or option asks for a pass here", site.source)
        return Reason("no-method", f"no pass takes a site of kind {site.kind}", site.source)

    return [report.left(i, site, "", why(site)) for i, site in enumerate(sites)]


def _ask(name: str, resolved: choices.Resolved, site: Any) -> tuple[Rewrite | Reason, str]:
    """One pass's answer for one site, and the choice of the user that led to it."""
    method = base.get(name)
    silent = resolved.record is None if resolved.options is None else not resolved.options.takes(site.kind)
    if site.kind in method.also and silent:
        return Reason("not-asked", f"{name} is not asked about {site.kind}", site.source), ""
    if resolved.options is None and resolved.rule:
        return Reason("switched-off", f"{name} is switched off here by {resolved.rule}", site.source), resolved.rule
    if resolved.options is not None:
        site.record, site.plan = resolved.record, resolved.plan
        return resolved.options.match(site), resolved.rule
    # Nobody asked by name, but a compressed cache may have been passed: its form is the choice.
    if name == _DEFAULT and site.kind == "attention" and site.store is not None:
        return method().match(site), "ec.Cache"
    return Reason("not-asked", f"no decorator, rule or option asks for {name} here", site.source), ""


def _clean(gm: fx.GraphModule, replaced: Replaced) -> None:
    """Remove what the replacements left without users, up from each old output; whatever writes stays.

    torch's own dead-code elimination keeps SDPA and dropout, because they may draw random numbers; here dropout was
    seen to be off before the site was taken.
    """
    queue = [old for _, _, old, _ in replaced]
    while queue:
        node = queue.pop()
        if node.users or node.op in ("placeholder", "output") or node._erased or next(mutated_arguments(node), None):
            continue
        queue += node.all_input_nodes
        gm.graph.erase_node(node)
    gm.graph.lint()
    gm.recompile()


class _SourceKey(CustomGraphPass):
    """Does nothing to a graph; its uuid puts kernel sources, version and options into Inductor's cache key.

    Node metadata is not in that key, and neither is the body of an operator.
    """

    def __init__(self, text: str, inner: Any) -> None:
        self.text, self.inner = text, inner

    def __call__(self, graph: fx.Graph) -> None:
        if self.inner is not None:
            self.inner(graph)

    def uuid(self) -> Any:
        """The key, or None (do not cache) if the user's own pass has none."""
        if self.inner is None:
            return self.text
        inner = self.inner.uuid() if hasattr(self.inner, "uuid") else None
        return None if inner is None else (self.text, inner)


def _cache_key(chosen: choices.BackendOptions) -> dict[str, Any]:
    digest = hashlib.sha256(get_hash_for_files(lowering.sources()))
    digest.update(f"{torch.__version__} {kernels.__name__} {chosen.text}".encode())
    own = dict(chosen.inductor).get("post_grad_custom_post_pass", torch._inductor.config.post_grad_custom_post_pass)
    return {"post_grad_custom_post_pass": _SourceKey(digest.hexdigest(), own)}


class _Clock:
    """Seconds spent in each of our own steps and in Inductor."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def _verifier(gm: fx.GraphModule, replaced: Replaced) -> Callable[[Sequence[Any]], list[Seen]]:
    """A function that runs every replaced subgraph beside its replacement, on copies of the state.

    It gives fields of a decision for each: the error, and what a sparse replacement leaves of attention.
    """
    both = copy.deepcopy(gm)
    by_name = {node.name: node for node in both.graph.nodes}
    pairs = [(by_name[old.name], by_name[new.name]) for _, _, old, new in replaced]
    output = both.graph.output_node()
    output.args = (tuple((old, new, _observed(new)) for old, new in pairs),)
    both.graph.lint()
    both.recompile()
    written = {root(a) for n in both.graph.nodes for a in mutated_arguments(n)}
    slots = [i for i, p in enumerate(both.graph.find_nodes(op="placeholder")) if p in written]

    def check(args: Sequence[Any]) -> list[Seen]:
        own = list(args)
        for i in slots:
            own[i] = own[i].clone()
        with torch.no_grad():
            return [_seen(*found) for found in both(*own)]

    return check


def _observed(new: fx.Node) -> fx.Node | None:
    """Density and kept mass of the replacement ``new``, emitted behind it; None where it is not sparse."""
    call = new.args[0] if new.target is operator.getitem else new
    if not isinstance(call, fx.Node) or not observe.is_sparse(call.target):
        return None
    with new.graph.inserting_after(new):
        lse = new.graph.call_function(operator.getitem, (call, 1))
    arguments: Any = (call.target, call.args, dict(call.kwargs), lse)
    with new.graph.inserting_after(lse):
        return new.graph.call_function(observe.observe, arguments)


def _seen(old: Tensor, new: Tensor, observed: Tensor | None) -> Seen:
    return Seen(_difference(new, old), *([] if observed is None else observed.tolist()))


def _difference(new: Tensor, old: Tensor) -> float:
    """Largest absolute difference over the largest absolute value."""
    scale = old.float().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((new.float() - old.float()).abs().max() / scale)


class _Verified:
    """The compiled graph, which checks its replacements on the first call."""

    def __init__(self, compiled: Callable[..., Any], check: Callable[[Sequence[Any]], list[Seen]], record: Any) -> None:
        self.compiled, self.check, self.record = compiled, check, record

    def __call__(self, *args: Any) -> Any:
        if self.check is not None:
            self.record.set_seen(self.check(args))
            self.check = None  # type: ignore[assignment]
            self.record.use.done()
        return self.compiled(*args)
