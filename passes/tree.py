"""Which part of the compiled module a graph is of, and rules that name none of its modules.

A back end sees graphs. After a graph break within a layer Dynamo compiles the layer's own ``forward``, where every path
begins at the layer, while the paths in the user's rules begin at the module that was compiled. A back end is called
from within that module's call, so both are found on the stack. Where they are not (a compiled plain function, say),
nothing is assumed.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Iterator

from torch import fx, nn

from effcompile.passes.options import BackendOptions, OptionError, clean_path

_SELF = "L['self']"


@dataclasses.dataclass(frozen=True)
class Place:
    """The module that the user compiled, and the path in it of the module whose ``forward`` a graph is of."""

    root: nn.Module
    path: str

    def rename(self, gm: fx.GraphModule) -> None:
        """Let the module paths of a graph of our own begin at :attr:`root`."""
        prefix = f"{_SELF}.{self.path}"
        # What a module computes itself has no stack in the graph of its own forward.
        whole = {"": (prefix, type(self.root.get_submodule(self.path)))}
        for node in gm.graph.nodes if self.path else ():
            if node.op == "call_function":
                stack = node.meta.get("nn_module_stack") or {}
                node.meta["nn_module_stack"] = whole | {
                    key: (path.replace(_SELF, prefix, 1), kind) for key, (path, kind) in stack.items()
                }

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

    def shared(self, options: BackendOptions) -> tuple[str, ...]:
        """A sentence for each rule that names some, and not all, of the modules that one graph may serve.

        Dynamo keeps compiled code by the code of ``forward``, so the graph of one layer serves its likes.
        """
        if not self.path:
            return ()
        own = self.root.get_submodule(self.path)
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
    callers = _modules_that_call()
    own = next(callers, None)
    if own is None or not all(re.match(rf"{re.escape(_SELF)}(\.|$)", path) for path in paths):
        return None
    inside = {name for name, _ in own.named_modules()}
    if not all(clean_path(path) in inside for path in paths):
        return None
    for outer in (own, *callers):
        if outer._compiled_call_impl is not None or hasattr(outer, "_orig_mod"):
            root = getattr(outer, "_orig_mod", outer)
            found = next((name for name, module in root.named_modules() if module is own), None)
            return None if found is None else Place(root, found)
    return None


def _modules_that_call() -> Iterator[nn.Module]:
    """The modules whose methods are running, innermost first."""
    frame = sys._getframe()
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        module = frame.f_locals.get("self") if "self" in frame.f_code.co_varnames[: frame.f_code.co_argcount] else None
        if isinstance(module, nn.Module):
            yield module
