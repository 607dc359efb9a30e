"""Forms by layer: patterns of module paths, read as in the rules of the back end, and the layers that they name."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from effcompile.kernels.form import FormError, KVForm

Rules = Mapping[str, Mapping[str, Any]] | tuple[object, ...] | None
"""Pattern of module paths -> what differs from the other options there; or the same as pairs."""


def depth(pattern: str, path: str) -> int:
    """Names in the deepest module, of ``path`` and those around it, that ``pattern`` matches; 0 if none does.

    In a pattern ``*``, ``?`` and ``[...]`` stand within one name and ``**`` for any number of names.

    >>> depth('model.layers.*', 'model.layers.0.self_attn'), depth('**.self_attn', 'model.layers.0.self_attn')
    (3, 4)
    """
    parts = path.split(".")
    return next((n for n in range(len(parts), 0, -1) if _matches(tuple(parts[:n]), tuple(pattern.split(".")))), 0)


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[n:], pattern[1:]) for n in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


@dataclasses.dataclass(frozen=True)
class FormRule:
    """The form of the layers in the modules that ``pattern`` names."""

    pattern: str
    form: KVForm


def freeze(rules: Rules) -> Rules:
    """Checked rules as pairs, which are hashable and keep their order in JSON; None if there are none."""
    return tuple((pattern, tuple(options.items())) for pattern, options in _pairs(rules)) or None


def _pairs(rules: Rules) -> list[tuple[str, dict[str, Any]]]:
    """Pattern and options of each rule, given as dictionaries or as what :func:`freeze` or JSON made of them."""
    try:
        given: Mapping[str, Any] = {} if rules is None else dict(rules)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise FormError(f"rules={rules!r}: give a dict of pattern -> options.") from None
    pairs = []
    for pattern, options in given.items():
        try:
            pairs.append((pattern, dict(options)))
        except (TypeError, ValueError):
            raise FormError(f"rules[{pattern!r}]: {options!r}: give a dict such as {{'key_bits': 8}}.") from None
    return pairs


def parse(rules: Rules, base: KVForm) -> tuple[FormRule, ...]:
    """Rules as a user gives them: pattern -> the options that differ from ``base`` there. The order stays.

    Raises :class:`FormError` for anything that is no pattern, no option or no form.
    """
    found = []
    for pattern, options in _pairs(rules):
        where, offered = f"rules[{pattern!r}]", base.options
        if not isinstance(pattern, str) or not pattern:
            raise FormError(f"{where}: a rule is named by a pattern of module paths, such as 'model.layers.*'.")
        for name in options:
            if name not in offered:
                raise FormError(f"{where}: unknown option {name!r}; {nearest(str(name), offered)}.")
        try:
            found.append(FormRule(pattern, KVForm.of_options({**offered, **options})))
        except FormError as wrong:
            raise FormError(f"{where}: {wrong}") from None
    return tuple(found)


def nearest(name: str, offered: Iterable[str]) -> str:
    """The end of a message about a name that is not offered: the nearest ones, or all."""
    offered = list(offered)
    near = difflib.get_close_matches(name, sorted(offered), n=3, cutoff=0.5)
    if near:
        return f"nearest: {', '.join(near)}"
    return f"offered: {', '.join(offered[:20]) or 'none'}" + f", and {len(offered) - 20} more" * (len(offered) > 20)


def choose(rules: Iterable[FormRule], path: str) -> tuple[int, FormRule | None]:
    """The rule for the layer at ``path`` and its depth: the deepest, of equally deep ones the last; or 0 and None."""
    ranked = [(depth(rule.pattern, path), n, rule) for n, rule in enumerate(rules)]
    deepest, _, rule = max(ranked, key=lambda item: item[:2], default=(0, 0, None))
    return (deepest, rule) if deepest else (0, None)


def clean(path: str) -> str:
    """The path of a module without what ``torch.compile(model)`` puts around it."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def layers(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Path and number of each layer in ``module`` that has a place in the cache; a layer may have several paths."""
    for path, inner in module.named_modules():
        index = getattr(inner, "layer_idx", None)
        if isinstance(index, int):
            yield clean(path), index


def check(rules: Iterable[FormRule], module: nn.Module, compressed: Iterable[int] | None = None) -> None:
    """Raise :class:`FormError` for a rule that names no layer of ``module``, or none of the ``compressed`` ones."""
    found = list(layers(module))
    around = {".".join(path.split(".")[:n]) for path, _ in found for n in range(1, path.count(".") + 2)} - {""}
    for rule in rules:
        named = {index for path, index in found if depth(rule.pattern, path)}
        if not named:
            raise FormError(
                f"rule {rule.pattern!r} names no layer of {type(module).__name__} that has a cache; "
                f"{nearest(rule.pattern, around)}."
            )
        if compressed is not None and not named & set(compressed):
            raise FormError(
                f"rule {rule.pattern!r} names only layers that keep the cache that transformers gives them: "
                f"{sorted(named)}; the layers {sorted(compressed)} of {type(module).__name__} are compressed."
            )
