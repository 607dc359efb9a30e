"""Decorators, rules, global options: who wins, what they do to a module, and what a mistake says."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, ClassVar, Literal
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import effcompile
from effcompile.passes import backend_options, base, options
from effcompile.passes.backend_options import BackendOptions, clean_path, parse, resolve
from effcompile.passes.base import Pass
from effcompile.passes.options import DecorationError, OptionError, decorator, options_of, remove


@dataclasses.dataclass(frozen=True)
class Toy(Pass):
    """A toy."""

    bits: int = 4
    ratio: float = 0.5
    kind: Literal["a", "b"] = "a"
    window: int | None = None

    name: ClassVar[str] = "toy"
    paper: ClassVar[str] = "none"
    summary: ClassVar[str] = "nothing"
    phases: ClassVar[tuple[str, ...]] = ("decode",)

    def __post_init__(self) -> None:
        if self.bits > 16:
            raise ValueError(f"bits={self.bits} is not offered; choose at most 16.")

    def on_decorate(self, module: nn.Module) -> None:
        module.__dict__["attached"] = self

    def on_remove(self, module: nn.Module) -> None:
        module.__dict__.pop("attached", None)


@dataclasses.dataclass(frozen=True)
class Other(Pass):
    level: int = 1
    name: ClassVar[str] = "other"


REAL = dict(base.REGISTRY)

toy, other = decorator(Toy), decorator(Other)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The registry holds the two passes of this file, and nothing else."""
    with mock.patch.dict(base.REGISTRY, {"toy": f"{__name__}:Toy", "other": f"{__name__}:Other"}, clear=True):
        options.read_annotation.cache_clear()
        yield


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.linear(x).relu() * scale


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Inner() for _ in range(3))
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor, logits_to_keep: int = 0) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


class Spy:
    """A back end that keeps module path -> annotation for every graph it is given."""

    def __init__(self) -> None:
        self.graphs: list[dict[str, dict[str, str]]] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        seen = {}
        for node in gm.graph.nodes:
            if stack := node.meta.get("nn_module_stack"):
                seen[clean_path(list(stack.values())[-1][0])] = dict(node.meta.get("custom", {}))
        self.graphs.append(seen)
        return gm

    def found(self, name: str = "toy", given: BackendOptions | None = None) -> dict[str, Any]:
        """What resolves at every module of the newest graph."""
        given = given or BackendOptions()
        return {path: resolve(name, path, custom, given).options for path, custom in self.graphs[-1].items()}


def test_decorate_returns_the_module_and_reads_back() -> None:
    model = Model()
    assert toy(bits=8)(model) is model
    assert options_of(model) == {"toy": Toy(8)}
    assert options_of(model.layers[0]) == {}
    assert model.__dict__["attached"] == Toy(8)


def test_signature_of_forward_is_kept() -> None:
    model, plain = Model(), Model()
    toy()(model)
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert model.forward.__doc__ == plain.forward.__doc__
    assert inspect.signature(toy) == inspect.signature(Toy)


def test_decorating_changes_no_result_and_no_state_dict() -> None:
    model, x = Model(), torch.randn(2, 4)
    before, keys = model(x), list(model.state_dict())
    toy()(model)
    torch.testing.assert_close(model(x, logits_to_keep=0), before, rtol=0, atol=0)
    assert list(model.state_dict()) == keys


def test_inner_overrides_its_pass_and_inherits_the_others() -> None:
    model, spy = Model(), Spy()
    toy(bits=4)(other(level=2)(model))
    toy(bits=8)(model.layers[1])
    model.compile(backend=spy, fullgraph=True)
    model(torch.randn(2, 4))
    assert spy.found("toy") == {path: Toy(8 if path.startswith("layers.1") else 4) for path in spy.graphs[0]}
    assert set(spy.found("other").values()) == {Other(2)}
    assert {"layers.0.linear", "layers.1.linear", "out"} <= set(spy.graphs[0])


def test_decorating_again_replaces() -> None:
    model = Model()
    toy(bits=4)(model)
    forward = model.forward
    toy(bits=8, ratio=1)(model)
    assert options_of(model) == {"toy": Toy(8, 1)}
    assert model.forward == forward
    assert model.__dict__["attached"] == Toy(8, 1)


@pytest.mark.parametrize("how", ["method", "function"])
def test_a_change_after_the_first_compile_takes_effect(how: str) -> None:
    model, spy, x = Model(), Spy(), torch.randn(2, 4)
    if how == "method":
        model.compile(backend=spy)
    fast: Any = model if how == "method" else torch.compile(model, backend=spy)
    fast(x)
    assert set(spy.found().values()) == {None}
    toy(bits=8)(fast)
    fast(x)
    assert set(spy.found().values()) == {Toy(8)}
    toy(bits=4)(fast)
    fast(x)
    assert set(spy.found().values()) == {Toy(4)}
    toy(bits=2)(model.layers[1])
    fast(x)
    assert set(spy.found().values()) == {Toy(4), Toy(2)}
    assert len(spy.graphs) == 4
    # Options that were compiled before, and none at all, are found again: nothing is compiled anew.
    remove(model.layers[1])
    fast(x)
    remove(fast)
    fast(x)
    assert len(spy.graphs) == 4


def test_equal_layers_share_one_function_and_one_key() -> None:
    model = Model()
    for layer in model.layers:
        toy()(layer)
    assert len({layer.forward.__func__ for layer in model.layers}) == 1
    assert len({json.dumps(options.annotations_of(layer)) for layer in model.layers}) == 1


def test_deepcopy_carries_options_and_uses_its_own_weights() -> None:
    model, x = toy(bits=8)(Model()), torch.randn(2, 4)
    twin = copy.deepcopy(model)
    assert options_of(twin) == {"toy": Toy(8)}
    assert twin.forward.__self__ is twin
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert twin(x).abs().sum() == 0
    assert model(x).abs().sum() > 0
    remove(twin)
    assert options_of(model) == {"toy": Toy(8)}
    toy(bits=2)(copy.copy(model))
    assert options_of(model) == {"toy": Toy(8)}


def test_pickle_keeps_weights_and_decorations() -> None:
    model, x = Model(), torch.randn(2, 4)
    expected = model(x)
    options.decorate(model, Other(3))
    model = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert options_of(model) == {"other": Other(3)}
    other(level=2)(model)
    assert options_of(model) == {"other": Other(2)}
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert "forward" not in vars(remove(model))
    file = io.BytesIO()
    torch.save(other()(model).state_dict(), file)
    file.seek(0)
    Model().load_state_dict(torch.load(file, weights_only=True))


def test_remove_undoes_everything_in_the_tree() -> None:
    model = Model()
    before = [dict(vars(m)) for m in model.modules()]
    other()(toy()(model))
    toy(bits=8)(model.layers[2])
    assert remove(model) is model
    assert [dict(vars(m)) for m in model.modules()] == before
    assert remove(model) is model


@pytest.mark.parametrize("style", ["partial", "method"])
def test_an_instance_forward_that_was_there_before_is_kept(style: str) -> None:
    model, x = Model(), torch.randn(2, 4)
    expected = model(x) + 1

    def hooked(module: Model, x: Tensor, logits_to_keep: int = 0) -> Tensor:
        return type(module).forward(module, x, logits_to_keep) + 1

    own = functools.partial(hooked, model) if style == "partial" else hooked.__get__(model)
    model.forward = own
    signature = inspect.signature(model.forward)
    toy()(model)
    assert inspect.signature(model.forward) == signature
    torch.testing.assert_close(model(x), expected)
    spy = Spy()
    model.compile(backend=spy, fullgraph=True)
    torch.testing.assert_close(model(x), expected)
    assert Toy() in spy.found().values()
    assert remove(model).forward is own


def test_a_hook_that_fails_leaves_the_module_undecorated() -> None:
    class Broken(Toy):
        def on_decorate(self, module: nn.Module) -> None:
            raise RuntimeError("no")

    model = Model()
    with pytest.raises(RuntimeError, match="no"):
        options.decorate(model, Broken())
    assert options_of(model) == {}
    assert "forward" not in vars(model)


@pytest.mark.parametrize(
    ("thing", "said"),
    [
        (torch.relu, "the function"),
        (Model().forward, "the function Model.forward"),
        (3, "an object of type int"),
        (nn.ModuleList(), "which has no forward"),
    ],
)
def test_what_cannot_be_decorated(thing: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        toy()(thing)
    with pytest.raises(TypeError, match=said):
        remove(thing)


def test_only_instances_are_looked_at_and_undone() -> None:
    for look in (remove, options_of):
        with pytest.raises(TypeError, match="the class Model; it works on an instance"):
            look(Model)  # type: ignore[type-var, arg-type]


@pytest.mark.parametrize("thing", [Model, Model(), torch.relu])
def test_options_forgotten(thing: Any) -> None:
    with pytest.raises(DecorationError, match=r"write toy\(\)\(model\)"):
        toy(thing)


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ((), {"bit": 4}, r"toy\(\.\.\.\): unknown option of toy 'bit'; nearest: bits"),
        ((), {"zzz": 4}, "offered: bits, ratio, kind, window"),
        ((), {"bits": "4"}, r"bits='4' is str, but toy takes int there \(default 4\)"),
        ((), {"bits": True}, "is bool"),
        ((), {"kind": "c"}, "takes 'a' | 'b'"),
        ((), {"window": 1.5}, "int | None"),
        ((), {"bits": 32}, "bits=32 is not offered; choose at most 16"),
        ((1, 2, "a", None, 5), {}, "5 values were given, but there are 4"),
        ((4,), {"bits": 4}, "bits was given twice"),
    ],
)
def test_wrong_options_of_a_decorator(args: tuple[Any, ...], kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        toy(*args, **kwargs)


def test_parse_copies_and_freezes() -> None:
    rules = {"layers.*": {"toy": {"bits": 8}}}
    given: dict[str, Any] = {"rules": rules, "toy": {"bits": 2}, "verify": True, "inductor": {"debug": True}}
    before = copy.deepcopy(given)
    parsed = parse(given)
    assert given == before
    rules["layers.*"]["toy"]["bits"] = 3
    assert resolve("toy", "layers.0", None, parsed).options == Toy(8)
    assert hash(parsed) == hash(parse(before))
    assert parsed.verify
    assert parsed.inductor_patches() == {"debug": True}
    assert parse(None) == parse({}) == parse(None, "default") == BackendOptions()


def test_mode_reaches_inductor_and_a_setting_by_name_wins() -> None:
    assert parse(None, "reduce-overhead").inductor_patches() == {"triton.cudagraphs": True}
    both = parse({"mode": "reduce-overhead", "inductor": {"triton.cudagraphs": False}})
    assert both.inductor_patches() == {"triton.cudagraphs": False}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rule": {}}, r"options: unknown option 'rule'; nearest: rules"),
        ({"rules": []}, r"options\['rules'\]: \[\] is list"),
        ({"rules": {"a.*": {"tony": {}}}}, r"options\['rules'\]\['a\.\*'\]: unknown pass 'tony'; nearest: toy"),
        ({"rules": {"a": {"toy": {"bit": 1}}}}, r"options\['rules'\]\['a'\]\['toy'\]: unknown option of toy 'bit'"),
        ({"rules": {"a": 3}}, r"3 is int; give a dict of pass -> options"),
        ({"rules": {3: {}}}, r"a rule is named by a pattern"),
        ({"toy": 3}, r"options\['toy'\]: 3 is int; give a dict"),
        ({"toy": {"bits": 99}}, r"options\['toy'\]: bits=99 is not offered"),
        ({"toy": Other()}, r"options\['toy'\]"),
        ({"verify": 1}, "give True or False"),
        ({"inductor": {"max_autotun": True}}, r"options\['inductor'\]: unknown Inductor setting.*max_autotune"),
        ({"inductor": {"max_autotune": 3}}, "Inductor takes bool"),
        ({"inductor": 3}, "give a dict of Inductor settings"),
        ({"mode": "max-autotun"}, "unknown mode 'max-autotun'; nearest: max-autotune"),
    ],
)
def test_wrong_backend_options(given: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        parse(given)


def test_text_is_the_same_in_every_process_and_differs_with_options() -> None:
    given = "{'inductor': {'debug': True}, 'verify': True}"
    code = f"from effcompile.passes.backend_options import parse; print(parse({given}).text)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == parse({"verify": True, "inductor": {"debug": True}}).text
    texts = {
        parse(o).text for o in ({}, {"toy": {}}, {"toy": {"bits": 8}}, {"toy": False}, {"rules": {"a": {"toy": {}}}})
    }
    assert len(texts) == 5
    assert parse({"toy": True}).text == parse({"toy": {"bits": 4}}).text


@pytest.mark.parametrize(
    ("pattern", "path", "depth"),
    [
        ("model.layers.*.self_attn", "model.layers.3.self_attn", 4),
        ("model.layers.*.self_attn", "model.layers.3.self_attn.q_proj", 4),
        ("model.layers.*.self_attn", "model.layers.3.mlp", 0),
        ("model.layers.*", "model.layers.3.self_attn", 3),
        ("model.layers.[0-3]", "model.layers.4", 0),
        ("model.*.self_attn", "model.layers.3.self_attn", 0),
        ("**.self_attn", "model.layers.3.self_attn", 4),
        ("**", "a.b", 2),
        ("model", "model.layers.0", 1),
        ("model", "models", 0),
    ],
)
def test_patterns(pattern: str, path: str, depth: int) -> None:
    assert backend_options.Rule(pattern, "toy", None).depth(path) == depth


def test_precedence() -> None:
    given = parse(
        {
            "toy": {"bits": 1},
            "rules": {
                "layers.*.attn": {"toy": {"bits": 3}},
                "layers.*": {"toy": {"bits": 2}},
                "layers.7": {"toy": {"bits": 5}},
                "layers.6.attn": {"toy": False},
            },
        }
    )

    def at(path: str, annotation: dict[str, Any] | None = None) -> tuple[int | None, str]:
        found = resolve("toy", path, annotation, given)
        assert found.options is None or isinstance(found.options, Toy)
        return found.options and found.options.bits, found.rule

    assert at("head") == (1, "global option")
    assert at("layers.0.mlp") == (2, "rule 'layers.*'")
    assert at("L['self'].layers.0.forward.__self__.attn.q") == (3, "rule 'layers.*.attn'")
    assert at("layers.7.mlp") == (5, "rule 'layers.7'")
    assert at("layers.6.attn") == (None, "rule 'layers.6.attn' (off)")
    model = toy(bits=9)(Model())
    assert at("layers.6.attn", {**options.annotations_of(model), "_torchdynamo_disable": True}) == (
        9,
        "decorator on Model",
    )
    assert resolve("other", "layers.0", None, given) == backend_options.Resolved(None, "")
    assert resolve("toy", "a", None, parse({"toy": None})) == backend_options.Resolved(None, "global option (off)")


def test_rules_that_name_nothing_are_told() -> None:
    given = parse({"rules": {"layers.*.attn": {"toy": {}}, "layers.*.atn": {"toy": {}, "other": {}}}})
    (note,) = given.unmatched(["L['self'].layers.0.attn.q", "L['self'].layers.1.attn"])
    assert "'layers.*.atn' names no module of this graph; nearest: layers" in note


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("L['self']", ""),
        ("L['s'].layers.0", "layers.0"),
        ("L['self'].forward.__self__.layers.0.forward.__self__.l", "layers.0.l"),
        ("_orig_mod.a", "a"),
        ("a.b", "a.b"),
    ],
)
def test_clean_path(raw: str, clean: str) -> None:
    assert clean_path(raw) == clean


@pytest.mark.parametrize("name", REAL)
def test_every_registered_pass_keeps_the_contract(name: str) -> None:
    with mock.patch.dict(base.REGISTRY, REAL, clear=True):
        cls = base.get(name)
        assert cls.name == name
        assert all((cls.paper, cls.summary, cls.phases, cls.limit, cls.__doc__))
        assert set(cls.limit) <= set(base.fields_of(cls))
        assert hash(cls()) == hash(cls())
        assert REAL[name].startswith(f"effcompile.passes.{name}:")
        assert name in effcompile.__all__
        cls().on_remove(Model())
