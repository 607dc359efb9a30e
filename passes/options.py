"""How a user says what they want with decorators on modules. Rules and options of the back end: ``backend_options``.

A decorator replaces ``forward`` *of the instance* by a function that runs the same forward inside
:func:`torch.fx.traceback.annotate`. Every graph node made there carries ``meta["custom"]["effcompile.<pass>"]``, whose
value is a key: the options as canonical JSON, so equal options give equal keys in every process. There is one entry
for each pass, so an inner module overrides the pass it names and inherits the others. Dynamo guards the key and the
replaced ``forward``: decorating, changing options or removing after a first compile takes effect at the next call.
"""

from __future__ import annotations

import functools
import inspect
import json
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.fx.traceback import annotate

from effcompile.passes.base import REGISTRY, Pass, accepts, fields_of, get, type_name
from effcompile.runtime.rules import nearest

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
        key.removeprefix(PREFIX): read_annotation(key.removeprefix(PREFIX), text)[0]
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
    read_annotation(name, text)[0].on_remove(module)
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
def read_annotation(name: str, key: str) -> tuple[Pass, str]:
    """The options in an annotation key, and the class that was decorated."""
    content = json.loads(key)
    return build(get(name), content["options"], f"annotation on {content['on']}"), content["on"]
