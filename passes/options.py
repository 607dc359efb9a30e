"""How a user says what they want: decorators on modules, rules by module path, global options; and who wins.

A decorator beats a rule, a rule a plan, a plan a global option; within a kind the deepest module wins. :func:`resolve`
answers for one site and names the winner.

A decorator replaces ``forward`` *of the instance* by a function that runs the same forward inside
:func:`torch.fx.traceback.annotate`. Every graph node made there carries ``meta["custom"]["effcompile.<pass>"]``, whose
value is a key: the options as canonical JSON, so equal options give equal keys in every process. There is one entry
for each pass, so an inner module overrides the pass it names and inherits the others. Dynamo guards the key and the
replaced ``forward``: decorating, changing options or removing after a first compile takes effect at the next call.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import inspect
import json
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
import torch._inductor.config
from torch import nn
from torch.fx.traceback import annotate

from effcompile.passes.base import REGISTRY, Pass, accepts, fields_of, get, type_name
from effcompile.runtime.plan import Plan, Record
from effcompile.runtime.rules import depth, nearest

PREFIX = "effcompile."
"""Of every annotation key: ``effcompile.compress_kv``."""

P = ParamSpec("P")
M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


class OptionError(ValueError):
    """An option, pass, rule or value that does not exist. Says where it was given and what is nearest."""


class DecorationError(TypeError):
    """A decorator was put on something it cannot stand on; says what to do instead."""


def unknown(what: str, name: object, offered: Iterable[str], where: str) -> OptionError:
    """The error for a name that is not offered: the nearest ones, or all."""
    return OptionError(f"{where}: unknown {what} {name!r}; {nearest(str(name), offered)}.")


def build(cls: type[Pass], given: Mapping[str, Any], where: str) -> Pass:
    """The pass ``cls`` with the options ``given``. Raises :class:`OptionError` naming ``where`` they were given."""
    known, values = fields_of(cls), {}
    for name, value in given.items():
        if name not in known:
            raise unknown(f"option of {cls.name}", name, known, where)
        hint, default = known[name]
        value = tuple(value) if isinstance(value, list) else value
        if not accepts(value, hint):
            raise OptionError(
                f"{where}: {name}={value!r} is {type(value).__name__}, but {cls.name} takes {type_name(hint)} there "
                f"(default {default!r})."
            )
        values[name] = value
    try:
        return cls(**values)
    except ValueError as wrong:
        raise OptionError(f"{where}: {wrong}") from None


class Decorator:
    """Options of one pass, ready to be put on a module: ``ec.compress_kv(key_bits=4)(model)`` returns the model.

    Above a class, ``@ec.compress_kv(key_bits=4)``, every new instance is decorated; on a class that exists already the
    result is a subclass whose instances are (:mod:`effcompile.passes.targets`).
    """

    def __init__(self, options: Pass) -> None:
        self.options = options

    def __call__(self, thing: T) -> T:
        from effcompile.passes import targets

        applied: T = targets.apply(thing, self.options)
        return applied

    def __repr__(self) -> str:
        return f"<decorator {self.options}>"


def decorator(cls: Callable[P, Pass]) -> Callable[P, Decorator]:
    """The public decorator of a pass, with the pass's own signature."""
    pass_class: type[Pass] = cls  # type: ignore[assignment]
    names = list(fields_of(pass_class))

    def make(*args: P.args, **kwargs: P.kwargs) -> Decorator:
        where = f"{pass_class.name}(...)"
        if args and (isinstance(args[0], (nn.Module, type)) or inspect.isroutine(args[0])):
            raise DecorationError(
                f"{where} takes options and returns a decorator, but got {describe(args[0])}; write "
                f"{pass_class.name}()(model) for the defaults."
            )
        if len(args) > len(names):
            raise OptionError(
                f"{where}: {len(args)} values were given, but there are {len(names)}: {', '.join(names)}."
            )
        given = dict(zip(names, args, strict=False))
        for name in given.keys() & kwargs.keys():
            raise OptionError(f"{where}: {name} was given twice.")
        return Decorator(build(pass_class, {**given, **kwargs}, where))

    make.__name__ = make.__qualname__ = pass_class.name
    make.__doc__ = inspect.getdoc(pass_class)
    make.__signature__ = inspect.signature(pass_class)  # type: ignore[attr-defined]
    return make


@functools.cache
def decorator_of(name: str) -> Callable[..., Decorator]:
    """The public decorator of the registered pass ``name``."""
    return decorator(get(name))


def sparse_attention(method: str, **options: Any) -> Decorator:
    """The decorator of a sparse attention method by name, ``ec.sparse_attention("xattention", threshold=0.9)(model)``.

    The same as the decorator of that name. Raises :class:`OptionError` for a name that is no such method.
    """
    offered = [name for name in REGISTRY if getattr(get(name), "family", None) == "sparse_attention"]
    if method not in offered:
        raise unknown("method", method, offered, "sparse_attention(...)")
    return decorator_of(method)(**options)


def describe(thing: object) -> str:
    """What an error calls the thing that a decorator was put on."""
    if isinstance(thing, type):
        return f"the class {thing.__qualname__}"
    if inspect.isroutine(thing):
        return f"the function {getattr(thing, '__qualname__', thing)}"
    return f"an object of type {type(thing).__qualname__}"


def _target(module: object, name: str) -> nn.Module:
    """The module whose forward is to be replaced; the original one behind ``torch.compile(model)``."""
    if not isinstance(module, nn.Module):
        raise DecorationError(
            f"{name}(...) was put on {describe(module)}; it works on an instance of torch.nn.Module, a whole model or "
            f"one of its sub-modules. Make the model first, then write {name}(...)(model)."
        )
    target = getattr(module, "_orig_mod", module)
    if isinstance(target, torch.jit.ScriptModule):
        raise DecorationError(
            f"{name}(...) was put on a ScriptModule, which torch.compile does not trace; decorate the original."
        )
    if type(target).forward is nn.Module.forward:
        raise DecorationError(
            f"{name}(...) was put on a {type(target).__name__}, which has no forward of its own; decorate the modules "
            "in it."
        )
    assert isinstance(target, nn.Module)
    return target


@functools.lru_cache(maxsize=1024)
def _annotated(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` of a class inside the annotation of the instance. Holds no instance, so ``deepcopy`` is safe."""

    @functools.wraps(forward)
    def annotated(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A copy, here and below: for that Dynamo guards which keys there are, and not only those that it has seen.
        with annotate({**self._effcompile}):
            return type(self).forward(self, *args, **kwargs)

    annotated.effcompile = True  # type: ignore[attr-defined]
    return annotated


def _annotated_own(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same for an instance that came with a ``forward`` of its own, as accelerate's hooks leave it."""

    def annotated(self: Any, *args: Any, **kwargs: Any) -> Any:
        with annotate({**self._effcompile}):
            return self._effcompile_forward(*args, **kwargs)

    own = inspect.signature(forward)
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    if any(p.name == "self" for p in own.parameters.values()):
        this = this.replace(name="_self")
    annotated.__signature__ = own.replace(parameters=[this, *own.parameters.values()])  # type: ignore[attr-defined]
    annotated.effcompile = True  # type: ignore[attr-defined]
    return annotated


def _installed(module: nn.Module) -> bool:
    return getattr(getattr(module.__dict__.get("forward"), "__func__", None), "effcompile", False) is True


def annotations_of(module: nn.Module) -> dict[str, str]:
    """The annotation that decorators have put on ``module`` itself: key of the pass -> key of its options."""
    return dict(module.__dict__["_effcompile"]) if _installed(module) else {}


def options_of(module: nn.Module) -> dict[str, Pass]:
    """The options that decorators have put on ``module`` itself, by pass name."""
    module = _target(module, "options_of")
    return {
        key.removeprefix(PREFIX): _read(key.removeprefix(PREFIX), text)[0]
        for key, text in annotations_of(module).items()
    }


def decorate(module: nn.Module, options: Pass) -> None:
    """Put ``options`` on ``module``, in place of earlier ones of the same pass. Raises :class:`DecorationError`."""
    target = _target(module, options.name)
    options.check(target)
    _take_off(target, options.name)
    options.on_decorate(target)
    key = json.dumps({"on": type(target).__name__, "options": json.loads(options.text)}, sort_keys=True)
    # A new dictionary, never a change in place: a shallow copy of the module keeps its own options.
    target.__dict__["_effcompile"] = {**annotations_of(target), PREFIX + options.name: key}
    if _installed(target):
        return
    from effcompile.passes import targets

    target.__dict__["__reduce_ex__"] = types.MethodType(targets.reduce, target)
    own = target.__dict__.get("forward")
    if own is None or getattr(own, "__func__", None) is type(target).forward:
        function = _annotated(type(target).forward)
    else:
        target.__dict__["_effcompile_forward"] = own
        function = _annotated_own(own)
    target.__dict__["forward"] = types.MethodType(function, target)


def _take_off(module: nn.Module, name: str) -> None:
    """Undo one pass's decoration of ``module`` itself, if there is one."""
    left = annotations_of(module)
    text = left.pop(PREFIX + name, None)
    if text is None:
        return
    _read(name, text)[0].on_remove(module)
    if left:
        module.__dict__["_effcompile"] = left
        return
    del module.__dict__["_effcompile"], module.__dict__["forward"]
    module.__dict__.pop("__reduce_ex__", None)
    if "_effcompile_forward" in module.__dict__:
        module.__dict__["forward"] = module.__dict__.pop("_effcompile_forward")


def remove(module: M) -> M:
    """Undo every decorator on ``module`` and the modules in it; returns ``module``.

    Afterwards ``forward`` is the class's own again, or the one that the instance had before.
    """
    for inner in _target(module, "remove").modules():
        for key in annotations_of(inner):
            _take_off(inner, key.removeprefix(PREFIX))
        # What a pass put there without a decorator, as a cache attaches the hooks it needs.
        for name in REGISTRY:
            get(name)().on_remove(inner)
    return module


@functools.lru_cache(maxsize=1024)
def _read(name: str, key: str) -> tuple[Pass, str]:
    """The options in an annotation key, and the class that was decorated."""
    content = json.loads(key)
    return build(get(name), content["options"], f"annotation on {content['on']}"), content["on"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Options of one pass for the modules that a pattern names; ``options=None`` switches the pass off there.

    In a pattern ``*``, ``?`` and ``[...]`` stand within one name of the path and ``**`` for any number of names.
    """

    pattern: str
    pass_name: str
    options: Pass | None

    def depth(self, path: str) -> int:
        """Names in the deepest module, of ``path`` and those around it, that the pattern matches; 0 if none does."""
        return depth(self.pattern, path)


@dataclasses.dataclass(frozen=True)
class BackendOptions:
    """What was given to ``torch.compile(..., backend="effcompile")``, checked and frozen.

    ``globals`` and ``rules`` are in the order given; ``inductor`` holds name and value of each Inductor setting.
    """

    rules: tuple[Rule, ...] = ()
    globals: tuple[tuple[str, Pass | None], ...] = ()
    verify: bool = False
    mode: str | None = None
    inductor: tuple[tuple[str, Any], ...] = ()
    plan: Plan | None = None

    @property
    def text(self) -> str:
        """Canonical JSON, for reports and cache keys: equal options give equal text in every process."""

        def content(options: Pass | None) -> Any:
            return None if options is None else json.loads(options.text)

        return json.dumps(
            {
                "rules": [[r.pattern, r.pass_name, content(r.options)] for r in self.rules],
                "globals": {name: content(options) for name, options in self.globals},
                "verify": self.verify,
                "mode": self.mode,
                "inductor": dict(self.inductor),
                "plan": None if self.plan is None else hashlib.sha256(self.plan.text.encode()).hexdigest(),
            },
            sort_keys=True,
            default=lambda value: getattr(value, "__qualname__", type(value).__qualname__),
        )

    def inductor_patches(self) -> dict[str, Any]:
        """Settings for ``compile_fx(config_patches=...)``: those of the mode, then those given by name."""
        patches: dict[str, Any] = {}
        if self.mode is not None:
            patches.update(torch._inductor.list_mode_options(self.mode))
        patches.update(self.inductor)
        return patches

    def unmatched(self, paths: Iterable[str]) -> tuple[str, ...]:
        """One sentence for each rule that names none of the modules at ``paths``, with the nearest ones."""
        cleaned = sorted({clean_path(path) for path in paths} - {""})
        around = {".".join(path.split(".")[:n]) for path in cleaned for n in range(1, path.count(".") + 2)}
        notes: dict[str, None] = {}
        for rule in self.rules:
            if any(rule.depth(path) for path in cleaned):
                continue
            near = difflib.get_close_matches(rule.pattern, sorted(around), n=2, cutoff=0.5)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            notes[f"rule {rule.pattern!r} names no module of this graph{hint}."] = None
        return tuple(notes)


def _choice(name: str, value: object, where: str) -> Pass | None:
    """Options of one pass as a user gives them: a dict, True for the defaults, False or None for off, or a pass."""
    if value is None or value is False:
        return None
    if value is True:
        return build(get(name), {}, where)
    if isinstance(value, Pass) and value.name == name:
        return value
    if isinstance(value, Mapping):
        return build(get(name), value, where)
    raise OptionError(
        f"{where}: {value!r} is {type(value).__name__}; give a dict of options, True for the defaults, or False."
    )


def parse(options: Mapping[str, Any] | None = None, mode: str | None = None) -> BackendOptions:
    """Check and freeze what ``torch.compile`` hands to the back end. Raises :class:`OptionError`.

    Parameters
    ----------
    options
        ``rules`` (pattern -> pass -> options), a pass name -> options for every module, ``plan`` (a
        :class:`~effcompile.runtime.plan.Plan`, or the folder of one), ``verify``, ``mode``, and ``inductor`` (settings
        of Inductor). It is only read: torch keeps and changes this dictionary.
    mode
        As in ``torch.compile``, which does not take both; inside ``options`` it can be combined.
    """
    rules: list[Rule] = []
    chosen: dict[str, Pass | None] = {}
    verify, inductor, plan = False, {}, None
    for key, value in (options or {}).items():
        where = f"options[{key!r}]"
        if key == "rules":
            rules = _parse_rules(value, where)
        elif key == "verify":
            if not isinstance(value, bool):
                raise OptionError(f"{where}: {value!r} is {type(value).__name__}; give True or False.")
            verify = value
        elif key == "inductor":
            inductor = _parse_inductor(value, where)
        elif key == "mode":
            mode = value
        elif key == "plan":
            plan = _parse_plan(value, where)
        elif key in REGISTRY:
            chosen[key] = _choice(key, value, where)
        else:
            raise unknown("option", key, ["rules", "plan", "verify", "mode", "inductor", *REGISTRY], "options")
    modes = torch._inductor.list_mode_options()
    if mode is not None and mode not in modes:
        raise unknown("mode", mode, modes, "mode")
    return BackendOptions(
        rules=tuple(rules),
        globals=tuple(sorted(chosen.items())),
        verify=verify,
        mode=None if mode == "default" else mode,
        inductor=tuple(sorted(inductor.items())),
        plan=plan,
    )


def _parse_plan(value: object, where: str) -> Plan | None:
    if isinstance(value, (str, os.PathLike)):
        value = Plan.load(value)
    if value is not None and not isinstance(value, Plan):
        raise OptionError(f"{where}: {value!r} is {type(value).__name__}; give an effcompile.Plan, or its folder.")
    for record in value or ():
        if record.method not in REGISTRY:
            raise unknown("pass", record.method, REGISTRY, f"{where}: the record of {record.module}")
    return value


def _parse_rules(value: object, where: str) -> list[Rule]:
    if not isinstance(value, Mapping):
        raise OptionError(f"{where}: {value!r} is {type(value).__name__}; give a dict of pattern -> pass -> options.")
    rules = []
    for pattern, passes in value.items():
        here = f"{where}[{pattern!r}]"
        if not isinstance(pattern, str) or not pattern:
            raise OptionError(
                f"{here}: a rule is named by a pattern of module paths, such as 'model.layers.*.self_attn'."
            )
        if not isinstance(passes, Mapping):
            raise OptionError(f"{here}: {passes!r} is {type(passes).__name__}; give a dict of pass -> options.")
        for name, options in passes.items():
            if name not in REGISTRY:
                raise unknown("pass", name, REGISTRY, here)
            rules.append(Rule(pattern, name, _choice(name, options, f"{here}[{name!r}]")))
    return rules


def _parse_inductor(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise OptionError(f"{where}: {value!r} is {type(value).__name__}; give a dict of Inductor settings.")
    known = torch._inductor.list_options()
    patches = {}
    for name, setting in value.items():
        name = str(name).replace("-", "_")
        if name not in known:
            raise unknown("Inductor setting", name, known, where)
        hint = torch._inductor.config.get_type(name)  # type: ignore[attr-defined]
        if isinstance(hint, type) and not typing.get_origin(hint) and not isinstance(setting, hint):
            raise OptionError(
                f"{where}: {name}={setting!r} is {type(setting).__name__}, but Inductor takes {type_name(hint)} there."
            )
        patches[name] = setting
    return patches


@dataclasses.dataclass(frozen=True)
class Resolved:
    """The options that hold at a site, ``None`` if the pass is off there, and which choice of the user said so.

    ``rule`` is for people: ``decorator on LlamaForCausalLM``, ``rule 'model.layers.*'``, ``global option``, or ``""``
    where nobody asked for the pass. ``record`` is what the plan says of the site for this pass, if anything.
    """

    options: Pass | None
    rule: str
    record: Record | None = None


def clean_path(path: str) -> str:
    """A module path as the user writes it, from one in ``nn_module_stack``.

    >>> clean_path("L['self'].model.layers.1.self_attn.forward.__self__.q_proj")
    'model.layers.1.self_attn.q_proj'
    """
    path = re.sub(r"^[LG]\[(['\"]).*?\1\]\.?", "", path)
    parts = path.replace(".forward.__self__", "").removeprefix("forward.__self__").split(".")
    return ".".join(part for part in parts if part and part != "_orig_mod")


def resolve(
    pass_name: str,
    module_path: str,
    annotation: Mapping[str, Any] | None,
    options: BackendOptions,
    key: str | None = None,
) -> Resolved:
    """Which options of ``pass_name`` hold at a site.

    Parameters
    ----------
    module_path
        Of the site's module, as in ``nn_module_stack``; it is cleaned here.
    annotation
        ``node.meta.get("custom")`` of the site's anchor: where decorators have left their keys.
    key
        What a plan calls the site, if that is not its module.
    """
    path = clean_path(module_path)
    record = None if options.plan is None else options.plan.get(path if key is None else clean_path(key), pass_name)
    chosen, rule = _choose(pass_name, path, annotation, options, record)
    return Resolved(chosen, rule, record)


def _choose(
    pass_name: str, path: str, annotation: Mapping[str, Any] | None, options: BackendOptions, record: Record | None
) -> tuple[Pass | None, str]:
    key = (annotation or {}).get(PREFIX + pass_name)
    if key is not None:
        decorated, on = _read(pass_name, key)
        return decorated, f"decorator on {on}"
    ranked = [(rule.depth(path), n, rule) for n, rule in enumerate(options.rules) if rule.pass_name == pass_name]
    depth, _, rule = max(ranked, key=lambda item: item[:2], default=(0, 0, None))
    if rule is not None and depth:
        return rule.options, f"rule {rule.pattern!r}" + (" (off)" if rule.options is None else "")
    if record is not None:
        return build(get(pass_name), record.options, f"plan: {pass_name} at {path}"), "plan"
    for name, chosen in options.globals:
        if name == pass_name:
            return chosen, "global option" + (" (off)" if chosen is None else "")
    return None, ""
