"""What was decided at every site, and why: the record that the driver fills and ``ec.inspect`` prints.

The driver makes one :class:`GraphReport` for each graph and calls :func:`record`. A report lives as long as the
compiled code it describes (:func:`attach`); it holds weak references to the model's tensors and no fake tensors, so it
keeps nothing else alive. A model finds its graphs by the identity of its tensors, or, since Dynamo shares compiled code
between models of one structure (a ``deepcopy``, say), by their names, shapes and the decorators' keys.

Logging: one line for each graph at INFO, one for each site at DEBUG, on the ``effcompile`` loggers, which
``TORCH_LOGS=effcompile`` and ``TORCH_LOGS=+effcompile`` switch on; tlparse finds the same as the artifact
``effcompile_report``.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import json
import logging
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch._logging._internal import trace_structured_artifact
from torch.fx.passes.shape_prop import TensorMetadata

from effcompile.kernels.program import OperatorProgram
from effcompile.kernels.reason import Reason
from effcompile.passes.backend_options import BackendOptions
from effcompile.passes.decision import Decision, Seen, Which, left, rewritten
from effcompile.passes.options import PREFIX, annotations_of
from effcompile.runtime.discarded import bytes_of
from effcompile.runtime.router_state import unchanged

if TYPE_CHECKING:
    from effcompile.passes.discard import Use

__all__ = [
    "Decision",
    "GraphReport",
    "InspectError",
    "Kernel",
    "Report",
    "Site",
    "Snapshot",
    "alive",
    "attach",
    "graphs_of",
    "inspect",
    "left",
    "record",
    "rewritten",
]

log = logging.getLogger(__name__)


class InspectError(TypeError):
    """``ec.inspect`` was given something that is not a module."""


@dataclasses.dataclass(frozen=True)
class Site:
    """One place where a pass could act, and whether one did."""

    graph: int
    index: int
    kind: str
    module: str
    source: str
    rewritten: bool
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A generated kernel: its program's name, its file (``""`` if it is not built yet), and its text."""

    name: str
    path: str
    source: str


class Snapshot:
    """A graph as it was. Holds no fake tensor and no parameter; later changes do not reach it.

    Copying takes little; the text is made when it is asked for.
    """

    _KEPT = ("nn_module_stack", "stack_trace")

    def __init__(self, gm: fx.GraphModule) -> None:
        self.graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        self._constants: dict[str, Any] = {}
        for node in gm.graph.nodes:
            new = self.graph.node_copy(node, copies.__getitem__)
            new.meta = {key: node.meta[key] for key in self._KEPT if key in node.meta}
            fake = node.meta.get("val", node.meta.get("example_value"))
            if isinstance(fake, Tensor):
                # As text: a symbolic size would keep all of Dynamo's symbols alive.
                sizes: Any = tuple(map(str, fake.shape))
                new.meta["tensor_meta"] = TensorMetadata(sizes, fake.dtype, False, (), None, False, {})
            copies[node] = new
            if node.op in ("get_attr", "call_module"):
                constant = functools.reduce(getattr, node.target.split("."), gm)
                weight = isinstance(constant, nn.Parameter) or node.op == "call_module"
                self._constants[node.target] = nn.Identity() if weight else constant

    @functools.cached_property
    def module(self) -> fx.GraphModule:
        """The graph as a module of its own, to look at."""
        return fx.GraphModule(self._constants, self.graph)

    @functools.cached_property
    def text(self) -> str:
        """The graph, printed with shapes and with the user's lines."""
        printed: str = self.module.print_readable(print_output=False)
        return printed


@dataclasses.dataclass(frozen=True)
class _Input:
    """A tensor of the model that a graph reads: its name within the compiled module, its facts, and itself, weakly."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    tensor: weakref.ref[Tensor]


class GraphReport:
    """One compiled graph.

    Parameters
    ----------
    gm
        The graph as Dynamo handed it over, inside the call of the back end: its inputs tell which model it belongs to.
    before, after
        The normalised graph, and the rewritten one (``None`` if nothing was rewritten). A :class:`Snapshot` is kept as
        it is, a graph module is copied into one.
    decisions
        In the order of the sites.
    options
        What the user gave to the back end.
    seconds
        Time of each step; kept by reference, so that later steps can be added.
    programs
        What the rewritten sites will launch.
    note
        Why the graph was compiled without being looked at.
    others
        Sites of which nobody asked anything.
    notes
        Sentences about the user's rules, beside those on rules that name no module of this graph.
    root
        The module that is being compiled, where that is known: by its class a graph without a parameter is found.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        before: fx.GraphModule | Snapshot | None,
        decisions: Sequence[Decision],
        options: BackendOptions,
        seconds: Mapping[str, float] | None = None,
        *,
        after: fx.GraphModule | Snapshot | None = None,
        programs: Sequence[Any] = (),
        note: Reason | None = None,
        others: Sequence[Decision] = (),
        notes: Sequence[str] = (),
        root: nn.Module | None = None,
    ) -> None:
        self._type = type(root)
        self.decisions = tuple(decisions)
        self.others = tuple(others)
        self.options = options
        self.seconds: Mapping[str, float] = {} if seconds is None else seconds
        self.before = _snapshot(gm if before is None else before)
        self.after = None if after is None else _snapshot(after)
        self.programs = tuple(programs)
        self.linears = 0
        """Linears of few rows that run on our kernel: the same result up to rounding."""
        self.use: Use | None = None
        """What it does with the user's tensors, for :func:`effcompile.discard_parameters`."""
        self.note = note
        self.inputs = tuple(_inputs(gm))
        self.device = next((t.device.type for i in self.inputs if (t := i.tensor()) is not None), "cpu")
        custom = [node.meta.get("custom") or {} for node in gm.graph.nodes]
        self.annotations = frozenset(item for c in custom for item in c.items() if item[0].startswith(PREFIX))
        paths = {list(s.values())[-1][0] for n in gm.graph.nodes if (s := n.meta.get("nn_module_stack"))}
        self.unmatched = (*options.unmatched(paths), *notes)

    @property
    def label(self) -> str:
        """``decode`` for one query at a time, ``prefill`` for more, ``graph`` if there is no attention."""
        rows = next((dict(d.sizes).get("T") for d in self.decisions if d.sizes and d.kind == "attention"), None)
        return "graph" if rows is None else "decode" if rows == 1 else "prefill"

    def set_seen(self, seen: Sequence[Seen]) -> None:
        """Put what ``verify`` saw on the rewritten sites, in their order."""
        left_over = iter(seen)
        decisions = []
        for d in self.decisions:
            if d.action == "rewritten":
                error, density, kept = next(left_over)
                d = dataclasses.replace(d, error=error, density=density, kept=kept)
            decisions.append(d)
        self.decisions = tuple(decisions)

    def belongs_to(self, model: nn.Module, *, compiled: bool = True) -> bool:
        """Whether this is a graph of ``model`` as it is decorated now; ``compiled`` allows sharing by structure."""
        chosen = {item for m in model.modules() for item in annotations_of(m).items()}
        if not self.annotations <= chosen or (annotations_of(model) and not self.annotations):
            return False
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        own = {id(tensor) for _, tensor in named}
        if any(id(t) in own for i in self.inputs if (t := i.tensor()) is not None):
            return True
        facts = {name: (tuple(t.shape), t.dtype) for name, t in named}
        return (
            compiled
            and (bool(self.inputs) or self._type is type(model))
            and all(facts.get(i.name) == (i.shape, i.dtype) for i in self.inputs)
        )

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The generated kernels of the rewritten sites."""
        return tuple(_kernel(program, self.device) for program in self.programs)

    def to_dict(self) -> dict[str, Any]:
        """The report in JSON's types, without the graphs."""
        return {
            "label": self.label,
            "options": json.loads(self.options.text),
            "seconds": dict(self.seconds),
            "note": None if self.note is None else dataclasses.asdict(self.note),
            "unmatched_rules": list(self.unmatched),
            "decisions": [d.to_dict() for d in self.decisions],
            "others": [
                {"kind": d.kind, "module": d.module, "source": d.source, "detail": d.detail} for d in self.others
            ],
        }

    @property
    def others_line(self) -> str:
        """How many sites there are of kinds that no pass takes; empty if there are none."""
        kinds = Counter(f"{d.kind} ({d.detail})" if d.detail else d.kind for d in self.others)
        return "" if not kinds else "no pass takes: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items())


def _snapshot(graph: fx.GraphModule | Snapshot) -> Snapshot:
    return graph if isinstance(graph, Snapshot) else Snapshot(graph)


def _inputs(gm: fx.GraphModule) -> Iterator[_Input]:
    """Parameters and buffers among the inputs. Dynamo lifts them, and keeps the real tensor while a back end runs."""
    for node in gm.graph.find_nodes(op="placeholder"):
        source = getattr(getattr(node, "_dynamo_source", None), "name", "")
        if not re.search(r"_(?:parameters|buffers)\['[^']+'\]$", str(source)):
            continue
        tensor = getattr(node.meta.get("grapharg"), "example", None)
        if isinstance(tensor, Tensor):
            name = ".".join(re.findall(r"_(?:modules|parameters|buffers)\['([^']+)'\]", source))
            yield _Input(name, tuple(tensor.shape), tensor.dtype, weakref.ref(tensor))


def _kernel(program: Any, device: str) -> Kernel:
    if isinstance(program, OperatorProgram):
        from effcompile import lowering

        return Kernel(program.name, *lowering.written(program, device))
    if device == "cpu":
        from effcompile.lowering import cpp

        path = next((k.source_path for k in cpp.kernels() if k.program == program), "")
        return Kernel(program.name, path, cpp.source(program))
    from effcompile.lowering import triton_build

    path = triton_build.build(program).path
    with open(path) as file:
        return Kernel(program.name, path, file.read())


_graphs: list[Callable[[], GraphReport | None]] = []
"""Every report that is alive, in the order of compiling: weak once it is attached to its code, strong before."""


def record(graph: GraphReport) -> None:
    """Keep ``graph`` for ``ec.inspect``, log it, and hand it to tlparse."""
    _graphs[:] = [entry for entry in _graphs if _alive(entry())]
    _graphs.append(lambda: graph)
    done = sum(d.action == "rewritten" for d in graph.decisions)
    log.info(
        "%s: %d of %d sites rewritten%s", graph.label, done, len(graph.decisions), f"; {graph.note}" * bool(graph.note)
    )
    for d in graph.decisions:
        log.debug("site %d %s: %s %s [%s]", d.site, d.module, d.action, d.form or d.reason, d.rule)
    for sentence in graph.unmatched:
        log.warning("%s", sentence)
    trace_structured_artifact("effcompile_report", "json", lambda: json.dumps(graph.to_dict(), default=str))


def _alive(graph: GraphReport | None) -> bool:
    return graph is not None and (not graph.inputs or any(i.tensor() is not None for i in graph.inputs))


def attach(graph: GraphReport, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Tie the life of ``graph`` to the code ``compiled`` from it, and return that code."""
    holder: Any = compiled
    # Dynamo strips such wrappers and drops what is on them.
    while hasattr(holder, "_torchdynamo_orig_callable"):
        holder = holder._torchdynamo_orig_callable
    # A bound method takes no attributes; what it is bound to lives as long.
    getattr(holder, "__self__", holder).effcompile_report = graph
    _graphs[:] = [weakref.ref(graph) if entry() is graph else entry for entry in _graphs]
    return compiled


def graphs_of(model: nn.Module, *, compiled: bool = True) -> list[GraphReport]:
    """The graphs compiled for ``model`` so far, as it is decorated now."""
    return [graph for graph in alive() if graph.belongs_to(model, compiled=compiled)]


def alive() -> list[GraphReport]:
    """Every graph whose compiled code is there, of all models."""
    return [graph for entry in _graphs if (graph := entry()) is not None]


def _bytes(decisions: Sequence[Decision]) -> int:
    """Of the caches of some layers, with the table of angles that they share."""
    return sum(d.cache[0] for d in decisions) + max((d.table_bytes for d in decisions), default=0)


class Report:
    """All graphs of one model. Printing it gives a table; the numbers in it stand for a full cache."""

    def __init__(self, graphs: Sequence[GraphReport], model: str, discarded: int = 0) -> None:
        self.graphs = tuple(graphs)
        self.model = model
        self.discarded = discarded
        """Bytes of the model's parameters that :func:`effcompile.discard_parameters` gave back."""

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """Every decision, with the number of its graph."""
        return tuple(dataclasses.replace(d, graph=n) for n, g in enumerate(self.graphs) for d in g.decisions)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every site of every graph, once; sites of kinds that no pass takes come last."""
        found: dict[tuple[int, int], Site] = {}
        for d in self.decisions:
            before = found.get((d.graph, d.site))
            done = d.action == "rewritten" or (before is not None and before.rewritten)
            found[d.graph, d.site] = Site(d.graph, d.site, d.kind, d.module, d.source, done, d.detail)
        others = [
            Site(n, len({x.site for x in g.decisions}) + d.site, d.kind, d.module, d.source, False, d.detail)
            for n, g in enumerate(self.graphs)
            for d in g.others
        ]
        return (*found.values(), *others)

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The generated kernels, each once."""
        return tuple({kernel.name: kernel for graph in self.graphs for kernel in graph.kernels}.values())

    def graph(self, which: Which = "after", index: int | None = None) -> str:
        """The printed graphs before or after the passes, all of them or one; one that was left is the same in both."""
        if which not in ("before", "after"):
            raise ValueError(f"graph({which!r}): choose 'before' or 'after'.")
        chosen = list(enumerate(self.graphs)) if index is None else [(index, self.graphs[index])]
        return "\n".join(f"# graph {n} ({g.label}), {which}\n{_side(g, which).text}" for n, g in chosen)

    def diff(self, index: int | None = None) -> str:
        """What the passes changed, as a unified diff of the printed graphs; empty if nothing."""
        chosen = list(enumerate(self.graphs)) if index is None else [(index, self.graphs[index])]
        lines: list[str] = []
        for n, g in chosen:
            old, new = (_side(g, which).text.splitlines() for which in ("before", "after"))
            names = f"graph {n} ({g.label}), before", f"graph {n} ({g.label}), after"
            lines += difflib.unified_diff(old, new, *names, n=2, lineterm="")
        return "\n".join(lines)

    def to_json(self, indent: int | None = 2) -> str:
        """Decisions, options, times and kernels as JSON. Sources of kernels and graphs are left out."""
        content = {
            "model": self.model,
            "summary": self.summary,
            "discarded_bytes": self.discarded,
            "graphs": [graph.to_dict() for graph in self.graphs],
            "kernels": [{"name": k.name, "path": k.path} for k in self.kernels],
        }
        return json.dumps(content, indent=indent, default=str)

    @property
    def summary(self) -> str:
        """One line: how many sites were rewritten, and what that saves at a full cache."""
        if not self.graphs:
            return 'nothing is compiled yet; write model.compile(backend="effcompile") and call the model once.'
        taken = {(d.graph, d.site) for d in self.decisions}
        sites = [site for site in self.sites if (site.graph, site.index) in taken]
        done = sum(site.rewritten for site in sites)
        text = f"{done} of {_count(len(sites), 'site')} rewritten in {_count(len(self.graphs), 'graph')}"
        caches = [[d for d in graph.decisions if d.action == "rewritten"] for graph in self.graphs]
        ours, dense = max(((_bytes(one), sum(d.cache[1] for d in one)) for one in caches), default=(0, 0))
        if ours:
            text += f"; cache {quantity(ours)}B instead of {quantity(dense)}B"
        linears = max(graph.linears for graph in self.graphs)
        if linears:
            text += f"; {_count(linears, 'linear')} of few rows on our kernel (exact up to rounding)"
        if self.discarded:
            text += f"; {quantity(self.discarded)}B of parameters discarded"
        return text + "."

    def __rich__(self) -> Any:
        from effcompile.passes.table import render

        return render(self)

    def __str__(self) -> str:
        from effcompile.passes.table import to_text

        return to_text(self)

    __repr__ = __str__


def _side(graph: GraphReport, which: Which) -> Snapshot:
    return graph.before if which == "before" or graph.after is None else graph.after


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def quantity(number: float) -> str:
    """A number with a decimal prefix.

    >>> quantity(12_345_678)
    '12.3 M'
    """
    for prefix in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} P"


def inspect(model: nn.Module, *args: Any, **kwargs: Any) -> Report:
    """What effcompile did to ``model``: sites, decisions, reasons, costs, kernels.

    Without inputs, of everything compiled so far. With inputs, the model is called with them once, under ``no_grad``,
    on a copy of a cache among them and counting nothing, so the user's state stays as it is. A model that is not
    compiled yet is compiled for this call only.

    Raises
    ------
    InspectError
        For anything but a module.
    """
    target = getattr(model, "_orig_mod", model)
    if not isinstance(target, nn.Module):
        raise InspectError(
            f"ec.inspect looks at a torch.nn.Module, but got an object of type {type(model).__qualname__}."
        )
    compiled = target is not model or target._compiled_call_impl is not None
    if args or kwargs:
        run = model if compiled else torch.compile(target, backend="effcompile")
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
        with torch.no_grad(), torch.random.fork_rng(devices), unchanged(target):
            run(*(_copied(a) for a in args), **{name: _copied(value) for name, value in kwargs.items()})
        compiled = True
    return Report(graphs_of(target, compiled=compiled), type(target).__name__, bytes_of(target.parameters()))


def _copied(value: Any) -> Any:
    """A copy of a cache; everything else as it is."""
    return copy.deepcopy(value) if callable(getattr(value, "get_seq_length", None)) else value
