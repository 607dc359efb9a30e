"""What a decorator is put on: an instance, or a class, whose every new instance it then decorates; and pickling.

**A class that is being defined**, as ``@ec.compress_kv()`` above ``class MyModel`` finds it, is changed in place: its
``__init__`` decorates at its end. The classes it derives from stay as they are. Its name is what its own methods refer
to, in ``super(MyModel, self)`` for example, so another class under that name would call itself without end.

**A class that exists**, a library's above all, is never changed: ``ec.compress_kv()(LlamaForCausalLM)`` is a subclass
of the same name. Others who use the library's class get what they always got; ``from_pretrained``, ``isinstance`` and
what ``save_pretrained`` writes are as for the class itself. Equal options give one and the same subclass.

A decorated instance is pickled with its decorations, which are put on again when it is loaded.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import sys
import types
from typing import Any

import torch
from torch import nn

from effcompile.passes import options as choices
from effcompile.passes.base import REGISTRY, Pass, Target, get
from effcompile.passes.options import PREFIX, DecorationError, annotations_of, decorate, describe

_MADE_OF = "_effcompile_made_of"
"""Class attribute of our subclasses: the class they were made of, and the options, as ``_subclass`` takes them."""


def kind_of(thing: object) -> Target | None:
    """What a decorator was put on; ``None`` for what is none of the four."""
    if isinstance(thing, type):
        return "class"
    if isinstance(thing, nn.Module):
        return "instance"
    if inspect.isroutine(thing):
        within = getattr(thing, "__qualname__", "").rpartition("<locals>.")[2]
        return "method" if inspect.ismethod(thing) or "." in within else "function"
    return None


def table() -> dict[str, dict[Target, str]]:
    """Pass x target: ``""`` where a decorator of the pass can stand, else what to do instead."""
    kinds: tuple[Target, ...] = ("class", "instance", "method", "function")
    return {name: {kind: get(name).elsewhere.get(kind, "") for kind in kinds} for name in REGISTRY}


def apply(thing: Any, options: Pass) -> Any:
    """Put ``options`` on ``thing``; returns it, or the subclass of a class that existed before.

    Raises :class:`DecorationError` for what the pass cannot stand on; the text says what to do instead.
    """
    kind = kind_of(thing)
    if kind is not None and kind in options.elsewhere:
        raise DecorationError(f"{options.name}(...) was put on {describe(thing)}. {options.elsewhere[kind]}")
    if isinstance(thing, type):
        return _decorate_class(thing, options)
    decorate(thing, options)  # which raises for anything but a module
    return thing


def _decorate_class(cls: Any, options: Pass) -> Any:
    said = f"{options.name}(...) was put on {describe(cls)}, "
    if not issubclass(cls, nn.Module):
        raise DecorationError(f"{said}which is no torch.nn.Module; decorate the model that it makes.")
    if issubclass(cls, torch.jit.ScriptModule):
        raise DecorationError(f"{said}a ScriptModule, which torch.compile does not trace; decorate the original.")
    if cls.forward is nn.Module.forward:
        raise DecorationError(f"{said}which has no forward of its own; decorate the modules in it.")
    if _MADE_OF in vars(cls):
        base, before = vars(cls)[_MADE_OF]
        return _subclass(base, (*(one for one in before if one.name != options.name), options))
    if _exists(cls):
        return _subclass(cls, (options,))
    cls.__init__ = _decorating(cls, (options,))
    return cls


def _exists(cls: type) -> bool:
    """Whether a class is found under its name, as it is not while it is being defined, nor within a function."""
    found: Any = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is cls


def _decorating(cls: Any, chosen: tuple[Pass, ...]) -> Any:
    """An ``__init__`` for ``cls`` that ends with decorating the instance."""
    own = vars(cls).get("__init__")

    @functools.wraps(cls.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs) if own is not None else super(cls, self).__init__(*args, **kwargs)
        for options in chosen:
            decorate(self, options)

    return __init__


@functools.cache
def _subclass(base: type, chosen: tuple[Pass, ...]) -> type:
    """The subclass of ``base`` whose instances are decorated with ``chosen``; it has the name of ``base``."""
    same = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    # Under this name pickle finds the base, so instances say themselves how they are made.
    made: Any = type(base)(base.__name__, (base,), {**same, _MADE_OF: (base, chosen), "__reduce_ex__": reduce})
    made.__init__ = _decorating(made, chosen)
    return made  # type: ignore[no-any-return]


def reduce(self: Any, protocol: Any) -> Any:
    """``__reduce_ex__`` of decorated instances, for pickle and ``copy.deepcopy``: without what decorating makes."""
    usual: Any = object.__reduce_ex__(self, max(2, int(protocol)))
    cls = type(self)
    if not (usual[0] is copyreg.__newobj__ and usual[1] == (cls,)):  # type: ignore[attr-defined]
        return usual  # a class that has its own way
    state = dict(usual[2])
    state.pop("__reduce_ex__", None)
    if annotations_of(self):
        del state["forward"]
    return _new, (vars(cls).get(_MADE_OF, (cls, ()))), state


def _new(base: Any, chosen: tuple[Pass, ...]) -> Any:
    """An empty instance, which decorates itself once its state is there."""
    cls: Any = _subclass(base, chosen) if chosen else base
    new = cls.__new__(cls)
    new.__dict__["__setstate__"] = types.MethodType(_set_state, new)
    return new


def _set_state(self: Any, state: dict[str, Any]) -> None:
    del self.__dict__["__setstate__"]
    state = dict(state)
    chosen, own = state.pop("_effcompile", {}), state.pop("_effcompile_forward", None)
    type(self).__setstate__(self, state)
    if own is not None:
        self.__dict__["forward"] = own
    for key, text in chosen.items():
        name = key.removeprefix(PREFIX)
        decorate(self, choices.read_annotation(name, text)[0])
