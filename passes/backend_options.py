"""Options of the back end: rules by module path, global options and a plan; and who wins at a site.

A decorator beats a rule, a rule a plan, a plan a global option; within a kind the deepest module wins. :func:`resolve`
answers for one site and names the winner.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import re
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch._inductor.config

from effcompile.passes.base import REGISTRY, Pass, get, type_name
from effcompile.passes.options import PREFIX, OptionError, build, read_annotation, unknown
from effcompile.runtime.plan import Plan, Record
from effcompile.runtime.rules import depth


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
    where nobody asked for the pass. ``record`` is what the plan says of the site for this pass, if anything; ``plan``
    is all of it.
    """

    options: Pass | None
    rule: str
    record: Record | None = None
    plan: Plan | None = None


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
    return Resolved(chosen, rule, record, options.plan)


def _choose(
    pass_name: str, path: str, annotation: Mapping[str, Any] | None, options: BackendOptions, record: Record | None
) -> tuple[Pass | None, str]:
    key = (annotation or {}).get(PREFIX + pass_name)
    if key is not None:
        decorated, on = read_annotation(pass_name, key)
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
