"""Hooks that hand an :class:`~effcompile.runtime.cache.Cache` to a transformers model.

They stand on the *instance*: a forward pre-hook that Dynamo does not trace, and two methods that ``generate`` calls.
All are module-level functions, so a ``deepcopy`` or an unpickled model has them with its own weights.
"""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effcompile.kernels.form import KVForm
from effcompile.kernels.pages import Kept
from effcompile.runtime import rules
from effcompile.runtime.rules import FormRule

if TYPE_CHECKING:
    from effcompile.runtime.cache import Cache

FORM = "_effcompile_form"
"""Instance attribute with the form that a decorator chose for a module and all below it."""
RULES = "_effcompile_rules"
"""Instance attribute with the rules that came with it, for some of the layers below."""
BOUNDS = "_effcompile_bounds"
"""Instance attribute with the number of layers, of those with a compressed cache, before the first that keeps more.

And with what it is to keep of pages of keys, bounds or moments (:data:`effcompile.kernels.pages.Kept`). On a module
that a method for decoding was put on, for the caches that are made from then on.
"""
HOOK = "_effcompile_hook"
"""Instance attribute with the handle of the forward pre-hook, on a model, on the models within it, on attentions."""
_METHODS = ("_prepare_cache_for_generation", "create_masks_for_generate")


def set_form(module: nn.Module, form: KVForm, rules: tuple[FormRule, ...] = ()) -> None:
    """Choose the form for ``module`` and below, and attach the hooks if it is a whole transformers model."""
    module.__dict__[FORM], module.__dict__[RULES] = form, rules
    attach_hooks(module)


def form_of(module: nn.Module) -> KVForm | None:
    """The form chosen on exactly this module."""
    return module.__dict__.get(FORM)


def check_rules(module: nn.Module, found: tuple[FormRule, ...]) -> None:
    """Raise ``FormError`` for a rule that names no layer of ``module``, or none that a cache of it would compress."""
    if not found:
        return
    from transformers import PreTrainedModel

    from effcompile.runtime.cache import compressible

    rules.check(found, module, compressible(module) if isinstance(module, PreTrainedModel) else None)


def layer_forms(model: nn.Module, default: KVForm, count: int, found: tuple[FormRule, ...] = ()) -> list[KVForm]:
    """The form of each cache layer: that of the deepest decorated module around the module with that ``layer_idx``.

    Of the rules that came with that decoration the deepest one decides; without a decoration, of ``found``.
    """
    forms = [form_of(model) or default] * count
    ranks = [(-1, -1)] * count
    chosen = {rules.clean(path): module for path, module in model.named_modules() if form_of(module) is not None}
    for path, index in rules.layers(model):
        if index >= count:
            continue
        # A decorated part below the module that owns the index (a projection, say) does not decide for it.
        above = [p for p in chosen if p == "" or path == p or path.startswith(p + ".")]
        form, here, at = default, found, -1
        if above:
            on = max(above, key=len)
            form, here, at = chosen[on].__dict__[FORM], chosen[on].__dict__[RULES], len(on)
        depth, rule = rules.choose(here, path[max(at, 0) :].removeprefix("."))
        rank = (at, depth)
        # Several modules may have one number: what is said of the deepest holds.
        if rank >= ranks[index]:
            ranks[index], forms[index] = rank, form if rule is None else rule.form
    return forms


def bounded_layers(model: nn.Module, full: list[int]) -> dict[int, Kept]:
    """Those of the layers ``full`` whose caches keep bounds or moments of keys, by what was put on ``model``.

    Of several that ask for a layer the deepest decides, as it does about the layer's attention.
    """
    asked = {
        rules.clean(path): module.__dict__[BOUNDS]
        for path, module in model.named_modules()
        if BOUNDS in module.__dict__
    }
    found: dict[int, tuple[int, Kept]] = {}
    for path, index in rules.layers(model):
        for on, (first, kind) in asked.items():
            if index in full[first:] and (on == "" or path == on or path.startswith(on + ".")):
                found[index] = max(found.get(index, (-1, kind)), (len(on), kind))
    return {index: kind for index, (_, kind) in found.items()}


def attach_hooks(module: nn.Module) -> None:
    """Put the hooks on a transformers model and on those within it, once; other modules are left alone.

    The model within (``model.model``) may be called by itself, on the same cache.
    """
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel):
        return
    for inner in module.modules():
        if isinstance(inner, PreTrainedModel) and HOOK not in inner.__dict__:
            hook = _before_forward if inner is module else _before_inner_forward
            inner.__dict__[HOOK] = inner.register_forward_pre_hook(hook, with_kwargs=True)
    if hasattr(module, "generate"):
        # Not bound methods, which are pickled as the attribute of their name, and would be lost or not be found.
        module.__dict__["_prepare_cache_for_generation"] = functools.partial(_prepare_cache_for_generation, module)
        module.__dict__["create_masks_for_generate"] = functools.partial(_create_masks_for_generate, module)


def angles_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``(cos, sin)`` among the arguments of an attention module, or None."""
    given = kwargs.get("position_embeddings")
    if given is None:
        for value in args:
            if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Tensor):
                return value
    return given


def hidden_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states among the arguments of an attention module, or None."""
    given = kwargs.get("hidden_states", args[0] if args else None)
    return given if isinstance(given, Tensor) else None


def attention_modules(model: nn.Module, layers: Iterable[int]) -> Iterator[tuple[int, str, nn.Module]]:
    """Number, path and module of the attentions of ``layers``: the innermost modules with that ``layer_idx``."""
    wanted = set(layers)
    for path, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or index not in wanted:
            continue
        if not any(getattr(inner, "layer_idx", None) == index for inner in module.modules() if inner is not module):
            yield index, path, module


def attach_angles(model: nn.Module, layers: list[int]) -> None:
    """Have the attention modules of ``layers`` hand cos, sin and hidden states to their layer of a cache; once."""
    for _, _, module in attention_modules(model, layers):
        if HOOK not in module.__dict__:
            module.__dict__[HOOK] = module.register_forward_pre_hook(_before_attention, with_kwargs=True)


def detach(module: nn.Module) -> None:
    """Undo :func:`set_form`, :func:`attach_hooks` and :func:`attach_angles` on exactly this module."""
    module.__dict__.pop(FORM, None)
    module.__dict__.pop(RULES, None)
    handle = module.__dict__.pop(HOOK, None)
    if handle is None:
        return
    # After a deepcopy the handle points at the original's hooks, so the hook is looked up by what it is.
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook in (_before_forward, _before_inner_forward, _before_attention):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    for name in (*_METHODS, "_effcompile_told_eager"):
        module.__dict__.pop(name, None)


def _is_cache(value: Any) -> bool:
    from effcompile.runtime.cache import Cache

    return isinstance(value, Cache)


@functools.cache
def _parameters(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of a class's forward parameters, without ``self``."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def _before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Give the model its cache, check it, and bring the padding mask to a shape that no step changes."""
    names = _parameters(type(module))  # type: ignore[arg-type]
    if "past_key_values" not in names:
        return None
    given = dict(zip(names, args)) | kwargs
    cache: Any = given.get("past_key_values")
    inputs = given.get("inputs_embeds")
    inputs = given.get("input_ids") if inputs is None else inputs
    if inputs is None:
        if form_of(module) is not None:  # an encoder-decoder, whose decoration would be ignored without a word
            from effcompile.runtime.cache import refuse

            refuse(module)  # type: ignore[arg-type]
        return None
    if cache is None:
        cache = _new_cache(module, given)
    if not _is_cache(cache):
        return None
    if not cache.belongs_to(module):
        from effcompile.runtime.cache import CacheError

        raise CacheError(
            f"this cache was made for another model than the {type(module).__name__} that was called; make one with "
            "ec.Cache(model)."
        )
    first = next(module.parameters())
    cache.prepare(inputs.shape[0], inputs.shape[1], first.dtype)
    given["past_key_values"] = cache
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        given["attention_mask"] = _padding(mask, cache)
    elif mask is None and "attention_mask" in names and getattr(getattr(module, "config", None), "alibi", False):
        given["attention_mask"] = _all_tokens(cache, inputs.shape[0], inputs.shape[1])
    positional = {name: given.pop(name) for name in names[: len(args)]}
    return tuple(positional.values()), given


def _before_inner_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """As :func:`_before_forward`, for a model within a model: within the outer one's call there is nothing to do.

    Dynamo traces this one, so that the outer model stays one graph, also on a cache that is not ours and without one.
    """
    if getattr(module, FORM, None) is None and not any(_is_cache(given) for given in (*args, *kwargs.values())):
        return None
    if any(_is_cache(given) and given.call.entry.open for given in (*args, *kwargs.values())):
        return None
    prepared: tuple[Any, Any] | None = _before_forward(module, args, kwargs)
    return prepared


def _before_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Give what it needs of this call to the layer of a cache that will be updated next. Dynamo traces this."""
    for given in (*args, *kwargs.values()):
        if _is_cache(given):
            layer = given.layers[module.layer_idx]
            if getattr(layer, "angles", None) is not None:
                layer.given = angles_in(args, kwargs)
            if getattr(layer, "rebuilds", None):
                layer.hidden = hidden_in(args, kwargs)


def _new_cache(module: nn.Module, given: dict[str, Any]) -> Cache | None:
    """The cache a decorated model makes for itself where transformers would make one in ``forward``."""
    form = form_of(module)
    config = module.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    wanted = given.get("use_cache")
    if form is None or not (getattr(config, "use_cache", False) if wanted is None else wanted):
        return None
    if torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
        warnings.warn(
            "compress_kv: gradients are enabled, and a compressed cache has none, so this call keeps the model's own "
            "cache. Call under torch.no_grad() or torch.inference_mode() to compress, or pass use_cache=False.",
            stacklevel=2,
        )
        return None
    return make_cache(module, form, None)


def make_cache(module: Any, form: KVForm, capacity: int | None) -> Cache:
    """A cache of ``form`` for ``module``."""
    from effcompile.runtime.cache import Cache

    return Cache(module, capacity, **form.options)


def _padding(mask: Tensor, cache: Cache) -> Tensor | None:
    """The 2-D padding mask as the graphs want it: on an empty cache absent if it hides nothing, later of full capacity.

    Without a mask the first call is plain causal attention. Later the mask keeps one shape, so that one compiled graph
    serves every step; keys past the length are hidden by causality. It is not looked at there: that would wait for the
    device.
    """
    if cache.compressed[0].fresh:
        return None if bool(mask.all()) else mask
    short = cache.capacity - mask.shape[1]
    padded = nn.functional.pad(mask, (0, short)) if short > 0 else mask.clone()
    # After a prompt with a 4-D mask Dynamo would take each size of this one for a symbol, and nothing could be proved.
    torch._dynamo.mark_static(padded)
    return padded


def _all_tokens(cache: Cache, batch: int, count: int) -> Tensor | None:
    """The mask ``[B, C]`` that hides no token, for a model that makes its ALiBi from the mask (Falcon).

    Without one it makes biases for the tokens alone, which do not fit keys of the whole capacity.
    """
    if cache.compressed[0].fresh:
        return None
    keys = torch.arange(cache.capacity, device=cache.length.device)
    return (keys < cache.length + count).long().expand(batch, -1).contiguous()


def _prepare_cache_for_generation(
    self: Any, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch: int, length: int, *rest: Any
) -> None:
    """Let ``generate`` prepare its cache, then put an :class:`Cache` in place of one that it made itself."""
    given: Any = model_kwargs.get("past_key_values")
    type(self)._prepare_cache_for_generation(self, generation_config, model_kwargs, mode, batch, length, *rest)
    if _is_cache(given):
        if given.growing:
            given.reserve(length + 1)
        recording = any(layer.record_past for layer in given.compressed)
        _prepare_for_assistance(given, generation_config, mode)
        if not recording and not generation_config.is_assistant:
            # generate works on a copy of the config, which goes when it returns: that is the end of the recording that
            # it began on a cache of the user's. An assistant's cache is cropped after its own generate has returned.
            weakref.finalize(generation_config, _stop_recording, weakref.ref(given)).atexit = False
        return
    form = form_of(self)
    made = model_kwargs.get("past_key_values")
    if form is None or given is not None or made is None:
        return
    if generation_config.cache_implementation not in (None, "dynamic"):
        warnings.warn(
            f"compress_kv: generate was asked for cache_implementation={generation_config.cache_implementation!r}, "
            "which wins over the decorator; leave it out to compress the cache.",
            stacklevel=2,
        )
        return
    if self._compiled_call_impl is None and not self.__dict__.get("_effcompile_told_eager"):
        self.__dict__["_effcompile_told_eager"] = True
        warnings.warn(
            "compress_kv: generate() runs this model eagerly, which is right but slow. Use model.compile(backend="
            "'effcompile'); torch.compile(model, ...) is for calls such as fast(**inputs), its generate() is the eager "
            "one.",
            stacklevel=2,
        )
    # One token more than generate asks for: a deferred stop check may run one step past the end.
    cache = make_cache(self, form, length + 1)
    cache.growing = True
    _prepare_for_assistance(cache, generation_config, mode)
    model_kwargs["past_key_values"] = cache


def _stop_recording(cache: weakref.ref[Cache]) -> None:
    if (found := cache()) is not None:
        found.stop_recording()


def _prepare_for_assistance(cache: Cache, generation_config: Any, mode: Any) -> None:
    """Assisted generation removes what was proposed in vain, from the assistant's cache as from the model's.

    Raises ``CacheError`` for layers that cannot do that, before anything is generated.
    """
    from transformers.generation.configuration_utils import GenerationMode

    if mode != GenerationMode.ASSISTED_GENERATION and not generation_config.is_assistant:
        return
    if theirs := cache.uncroppable:
        from effcompile.runtime.cache import CacheError

        raise CacheError(
            f"assisted generation removes tokens from the cache, and {theirs}, whose window cannot be wound back; "
            "generate without assistant_model and prompt_lookup_num_tokens, or ec.remove(model) for these calls."
        )
    cache.activate_past_recording()


def _create_masks_for_generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Keep the 2-D mask for our cache: about a ready-made 4-D mask nothing could be proved inside the graph."""
    if _is_cache(kwargs.get("past_key_values")):
        return kwargs.get("attention_mask")
    usual = getattr(type(self), "create_masks_for_generate", None)
    if usual is None:
        from transformers.masking_utils import create_masks_for_generate

        return create_masks_for_generate(*args, **kwargs)
    # Models override it as a static method or a plain one; getattr on the class gives the function in both cases.
    static = isinstance(inspect.getattr_static(type(self), "create_masks_for_generate"), staticmethod)
    return usual(*args, **kwargs) if static else usual(self, *args, **kwargs)
