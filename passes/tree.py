"""Which part of the compiled module a graph is of, and rules that name none of its modules.

A back end sees graphs. After a graph break within a layer Dynamo compiles the layer's own ``forward``, where every path
begins at the layer, while the paths in the user's rules begin at the module that was compiled; and the annotations of
decorators further out are lost. A back end is called from within that module's call, so both are found on the stack.
Where they are not (a compiled plain function, say), nothing is assumed.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import sys
from collections.abc import Iterator

from torch import fx, nn

from effcompile.passes.backend_options import BackendOptions, clean_path
from effcompile.passes.base import get
from effcompile.passes.options import OptionError, annotations_of
from effcompile.runtime.plan import Plan, PlanError, digest

_SELF = "L['self']"


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """The module that the user compiled, and the path in it of the module whose ``forward`` a graph is of.

    ``above`` are the modules that call :attr:`root` as a part of theirs, outermost first.
    """

    root: nn.Module
    path: str
    above: tuple[nn.Module, ...] = ()

    def complete(self, gm: fx.GraphModule) -> None:
        """Let module paths begin at :attr:`root`, and put back the annotations of decorators that a break has cost.

        Dynamo enters ``annotate`` again only in the graph that it was entered in.
        """
        annotations = functools.cache(self._annotations)  # of this call: a cache of the method would keep the model
        for node in gm.graph.nodes:
            if node.op not in ("call_function", "call_method", "call_module"):
                continue
            # What a module computes itself has no stack in the graph of its own forward.
            stack = node.meta.get("nn_module_stack") or {}
            if self.path:
                stack = {"": (_SELF, type(self._own))} | stack
                stack = node.meta["nn_module_stack"] = {
                    key: (self._whole(path), kind) for key, (path, kind) in stack.items()
                }
            inner = clean_path(list(stack.values())[-1][0]) if stack else ""
            if lost := annotations(inner):
                node.meta["custom"] = {**lost, **(node.meta.get("custom") or {})}

    @property
    def _own(self) -> nn.Module:
        return self.root.get_submodule(self.path)

    def _whole(self, path: str) -> str:
        return path.replace(_SELF, f"{_SELF}.{self.path}", 1)

    def _annotations(self, path: str) -> dict[str, str]:
        """What decorators have put on the modules around ``path``, the inner ones last."""
        names = path.split(".") if path else []
        around = [self.root.get_submodule(".".join(names[:n])) for n in range(len(names) + 1)]
        return {key: text for module in (*self.above, *around) for key, text in annotations_of(module).items()}

    def check(self, options: BackendOptions) -> None:
        """Raise :class:`OptionError` for a rule that names no module of the whole compiled one."""
        paths = [path for path, _ in self.root.named_modules()]
        for rule in options.rules:
            if any(rule.depth(path) for path in paths):
                continue
            spelled = [re.sub(r"(?<![^.])\d+(?![^.])", "*", p) for p in paths] if "*" in rule.pattern else paths
            near = difflib.get_close_matches(rule.pattern, sorted({*spelled} - {""}), n=3, cutoff=0.5)
            raise OptionError(
                f"options['rules'][{rule.pattern!r}]: names no module of the compiled {type(self.root).__name__}, at "
                f"which paths begin; nearest: {', '.join(near) or 'none, see named_modules()'}."
            )

    def check_plan(self, plan: Plan) -> None:
        """Raise :class:`PlanError` for a plan that names modules which are not there, or other weights than these.

        Records of feed-forward blocks are checked against the weights of the block itself, where it is found.
        """
        modules = dict(self.root.named_modules())
        for record in plan:
            where = f"plan: {record.method} at {record.module}"
            module = modules.get(record.module.partition("#")[0])
            if module is None:
                near = difflib.get_close_matches(record.module, modules, n=3, cutoff=0.5)
                raise PlanError(
                    f"{where}: the compiled {type(self.root).__name__} has no such module; nearest: "
                    f"{', '.join(near) or 'none'}. Plans are for the model that was calibrated, compiled as a whole."
                )
            if get(record.method).site_kind != "attention":
                continue
            own = {name: digest(p) for name, p in module.named_parameters()}
            if own != dict(record.parameters):
                changed = next((n for n in {**own, **record.parameters} if own.get(n) != record.parameters.get(n)), "")
                raise PlanError(
                    f"{where}: {changed} is not what the plan was made from. Calibrate this model, or take the record "
                    "out of the plan."
                )

    def shared(self, options: BackendOptions) -> tuple[str, ...]:
        """A sentence for each rule that names some, and not all, of the modules that one graph may serve.

        Dynamo keeps compiled code by the code of ``forward``, so the graph of one layer serves its likes.
        """
        if not self.path:
            return ()
        own = self._own
        likes = [path for path, module in self.root.named_modules() if type(module) is type(own)]
        names = [name for name, _ in own.named_modules()]
        notes: dict[str, None] = {}
        for rule in options.rules:
            if len({tuple(bool(rule.depth(f"{path}.{name}".strip("."))) for name in names) for path in likes}) > 1:
                notes[
                    f"rule {rule.pattern!r} names some {type(own).__name__} and not others, but after a graph break "
                    "one graph may serve all of them, and in it the rule holds for all or for none."
                ] = None
        return tuple(notes)


def place_of(gm: fx.GraphModule) -> Place | None:
    """Where the graph that is being compiled lies, or None where that is not known."""
    stacks = [s for node in gm.graph.nodes if (s := node.meta.get("nn_module_stack"))]
    paths = [path for stack in stacks for path, _ in stack.values()]
    callers = list(_modules_that_call())
    own = callers[0] if callers else None
    if own is None or not all(re.match(rf"{re.escape(_SELF)}(\.|$)", path) for path in paths):
        return None
    inside = {name for name, _ in own.named_modules()}
    if not all(clean_path(path) in inside for path in paths):
        return None
    for n, outer in enumerate(callers):
        if outer._compiled_call_impl is not None or hasattr(outer, "_orig_mod"):
            root = getattr(outer, "_orig_mod", outer)
            found = next((name for name, module in root.named_modules() if module is own), None)
            above = dict.fromkeys(m for m in callers[n:] if any(part is root for part in m.modules()))
            return None if found is None else Place(root, found, tuple(above)[::-1])
    return None


def _modules_that_call() -> Iterator[nn.Module]:
    """The modules whose methods are running, innermost first."""
    frame = sys._getframe()
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        module = frame.f_locals.get("self") if "self" in frame.f_code.co_varnames[: frame.f_code.co_argcount] else None
        if isinstance(module, nn.Module):
            yield module
