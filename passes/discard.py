"""``ec.discard_parameters``: the user's copy of weights that compiled code reads in a prepared form is given back."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, fx, nn

from effcompile.kernels.reason import Reason
from effcompile.passes import weights
from effcompile.passes.report import GraphReport, alive, graphs_of
from effcompile.passes.rewrite import Rewrite
from effcompile.runtime import discarded
from effcompile.runtime.discarded import DiscardError


@dataclasses.dataclass(frozen=True)
class Discarded:
    """What :func:`discard_parameters` did.

    Attributes
    ----------
    names
        The parameters that were dropped.
    bytes
        Theirs together.
    kept
        Parameters that have a prepared form and stay all the same, with the reason.
    """

    names: tuple[str, ...]
    bytes: int
    kept: Mapping[str, Reason]


def discard_parameters(model: nn.Module) -> Discarded:
    """Give back the memory of parameters that compiled code reads in a prepared form, and in no other.

    Call it behind a warm-up that has compiled all graphs, those of prompts and of steps. A parameter is dropped if a
    graph has prepared other weights from it and no graph of any model that this back end compiled reads it. It keeps
    its shape, dtype and device; whatever else reads it gets NaN. Compiled code goes on as before, also for new shapes.

    ``state_dict``, ``copy.deepcopy`` and pickling raise :class:`DiscardError` from then on, and so does a new graph
    that would read a dropped parameter, when it is compiled. ``load_state_dict`` brings the parameters and their memory
    back.

    Raises
    ------
    DiscardError
        Where no graph of ``model`` is compiled, or none has prepared weights; on other systems than Linux.
    TypeError
        For anything but a module.
    """
    target = getattr(model, "_orig_mod", model)
    if not isinstance(target, nn.Module):
        raise TypeError(f"ec.discard_parameters takes a torch.nn.Module, not an object of type {type(model).__name__}.")
    discarded.check_system()
    own = graphs_of(target)
    if not own:
        raise DiscardError(
            'ec.discard_parameters: nothing is compiled yet; write model.compile(backend="effcompile", options=...) '
            "and call the model first, with a prompt and a step if it generates."
        )
    found = _prepared_of(target, own)
    if not found:
        raise DiscardError(
            f"ec.discard_parameters: no graph of this {type(target).__name__} has prepared weights from parameters of "
            "its own; ask for a method that does, such as quantize_weights, or see ec.inspect(model)."
        )
    found = {name: entry for name, entry in found.items() if discarded.name_of(entry[1]) is None}
    kept: dict[str, Reason] = {}
    for name, (_, parameter) in list(found.items()):
        reason = _reason(parameter)
        if reason is not None:
            kept[name] = reason
            del found[name]
    kept |= _sharing(target, found)
    total, names = 0, []
    for name, (owners, parameter) in found.items():
        total += discarded.discard(owners, name, parameter, weights.made_of(parameter))
        names.append(name)
    # First of all modules, so that its error can name all of them.
    discarded.guard(target)
    discarded.trim()
    return Discarded(tuple(names), total, kept)


Found = dict[str, tuple[list[tuple[nn.Module, str]], nn.Parameter]]
"""By name: a parameter with the modules that hold it."""


def _prepared_of(model: nn.Module, graphs: Sequence[GraphReport]) -> Found:
    """The parameters of ``model`` of which ``graphs`` have a prepared form."""
    prepared = {id(t) for graph in graphs if graph.use for t in graph.use.prepared()}
    first: dict[int, str] = {}
    found: Found = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) not in prepared:
                continue
            where = first.setdefault(id(parameter), f"{path}.{name}".strip("."))
            found.setdefault(where, ([], parameter))[0].append((module, name))
    return found


def _reason(parameter: Tensor) -> Reason | None:
    """Why a parameter with a prepared form stays, as far as that is known of itself."""
    readers = [graph.label for graph in alive() if graph.use and any(t is parameter for t in graph.use.read())]
    if readers:
        names = ", ".join(sorted(set(readers)))
        return Reason("read", f"a compiled graph ({names}) reads it as it is")
    if parameter.is_inference():
        return Reason("not-supported", "it was made under inference_mode, where writing to it would not be noticed")
    if parameter.device.type != "cpu" or parameter.dtype not in discarded.FLOATS or type(parameter) is not nn.Parameter:
        return Reason("not-supported", f"it is a {type(parameter).__name__} of {parameter.dtype} on {parameter.device}")
    if not weights.made_of(parameter):
        return Reason("not-supported", "it was written to since, or the code that was compiled for it is gone")
    if parameter.numel() * parameter.element_size() < discarded.SMALLEST:
        return Reason("small", f"it has less than {discarded.SMALLEST} bytes, and memory is given back in pages")
    return None


def _sharing(model: nn.Module, found: Found) -> dict[str, Reason]:
    """Take those out of ``found`` whose memory would not become free, since something else lies in it."""
    others: dict[int, str] = {}
    for _, parameter in found.values():
        for t in weights.made_of(parameter):
            others[t.untyped_storage().data_ptr()] = "what was prepared is this very memory"
    chosen = {id(parameter) for _, parameter in found.values()}
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if id(t) not in chosen and t.device.type == "cpu":
            others[t.untyped_storage().data_ptr()] = f"{name} lies in the same storage"
    kept = {}
    for name, (_, parameter) in list(found.items()):
        text = others.get(parameter.untyped_storage().data_ptr())
        if text is not None:
            kept[name] = Reason("shared-memory", text)
            del found[name]
    return kept


class Use:
    """What one compiled graph does with the user's tensors: which it reads, and of which it has prepared others."""

    def __init__(self, graph: fx.GraphModule, rewrites: Iterable[Rewrite] = (), *, checked: bool = False) -> None:
        read = read_by(graph)
        prepared = {id(t): t for made in rewrites for _, _, t in made.weights}
        self._read, self._prepared = _weak(read), _weak(prepared.values())
        self._checked = checked

    def read(self) -> list[Tensor]:
        """Tensors that the graph reads as they are; until it has checked itself (``verify``), all of its sites' too."""
        return _alive([*self._read, *(self._prepared if self._checked else ())])

    def prepared(self) -> list[Tensor]:
        """Tensors of which it has prepared others."""
        return _alive(self._prepared)

    def done(self) -> None:
        """The replaced subgraphs were run for the last time."""
        self._checked = False

    def check(self, where: str) -> None:
        """Raise :class:`DiscardError` if the graph would read what was discarded."""
        discarded.refuse_reads(self.read(), where)


def _weak(tensors: Iterable[Tensor]) -> list[weakref.ref[Tensor]]:
    return [weakref.ref(t) for t in tensors]


def _alive(refs: Iterable[weakref.ref[Tensor]]) -> list[Tensor]:
    return [t for ref in refs if (t := ref()) is not None]


def check_moved(graph: fx.GraphModule) -> None:
    """Raise :class:`DiscardError` for a graph with discarded parameters in another dtype, say, than is prepared."""
    lifted = [weights.parameter_of(node) for node in graph.graph.find_nodes(op="placeholder")]
    discarded.refuse_moved([found[1] for found in lifted if found is not None], "a graph that is compiled now")


def read_by(graph: fx.GraphModule) -> list[Tensor]:
    """The real tensors, parameters, buffers and constants, that a graph reads."""
    nodes = [*graph.graph.find_nodes(op="placeholder"), *graph.graph.find_nodes(op="get_attr")]
    found = [weights.real(node) for node in nodes if node.users]
    return [t for t in found if t is not None]
