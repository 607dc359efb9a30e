"""Forms by layer: rules on the decorator and on the cache, who wins, and what is refused when."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import effcompile as ec
from effcompile.kernels.form import FormError, KVForm
from effcompile.passes import options
from effcompile.runtime import adapter
from effcompile.runtime.rules import parse
from models import GQA

IDS = torch.arange(40)[None] % 128


def make(layers: int = 4, **config: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**GQA | {"num_hidden_layers": layers} | config)
    ).eval()


@pytest.fixture
def llama() -> Any:
    return make()


def forms(cache: Any) -> list[str]:
    return [layer.form_name.removesuffix("g32r128") for layer in cache.compressed]


RULES = {"model.layers.[0-1]": {"key_bits": 8}, "model.layers.1.self_attn": {"value_bits": "fp8"}}


@pytest.mark.parametrize("how", ["decorator", "cache"])
def test_the_deepest_rule_wins_and_says_only_what_differs(llama: Any, how: str) -> None:
    if how == "decorator":
        ec.compress_kv(key_bits=3, value_bits=4, rules=RULES)(llama)
        cache = ec.Cache(llama)
    else:
        cache = ec.Cache(llama, key_bits=3, value_bits=4, rules=RULES)
    assert forms(cache) == ["k8v4", "k3vfp8", "k3v4", "k3v4"]


def test_of_equally_deep_rules_the_last_wins(llama: Any) -> None:
    first, second = {"model.layers.*": {"key_bits": 8}}, {"**.2": {"key_bits": 2}}
    assert forms(ec.Cache(llama, rules=first | second)) == ["k8v4", "k8v4", "k2v4", "k8v4"]
    assert forms(ec.Cache(llama, rules=second | first)) == ["k8v4"] * 4
    for given, expected in ((second | first, "k8v4"), (first | second, "k2v4")):
        ec.compress_kv(rules=given)(llama)
        # Also after the options were read back from what the decorator left on the module.
        again = make()
        options.decorate(again, options.options_of(llama)["compress_kv"])
        assert forms(ec.Cache(again)) == ["k8v4", "k8v4", expected, "k8v4"]


def test_of_modules_with_one_number_the_deepest_choice_decides() -> None:
    """Where a layer's other parts know its number too, as some experts do, nothing is taken back by them."""
    model = nn.ModuleDict({"block": nn.ModuleDict({"attention": nn.Linear(1, 1), "experts": nn.Linear(1, 1)})})
    for part in model["block"].values():
        part.layer_idx = 0
    rule = {"block.attention": {"key_bits": 8}, "*": {"value_bits": 2}}
    assert adapter.layer_forms(model, KVForm(), 1, parse(rule, KVForm())) == [KVForm(8, 4)]
    adapter.set_form(model, KVForm(), parse(rule, KVForm()))
    assert adapter.layer_forms(model, KVForm(), 1) == [KVForm(8, 4)]
    adapter.set_form(model["block"]["attention"], KVForm(3, 3))
    assert adapter.layer_forms(model, KVForm(), 1) == [KVForm(3, 3)]


def test_a_deeper_decorator_beats_a_rule_and_a_decorator_beats_the_cache(llama: Any) -> None:
    ec.compress_kv(rules={"model.layers.*.self_attn": {"key_bits": 8}})(llama)
    ec.compress_kv(key_bits=2)(llama.model.layers[3])
    ec.compress_kv(key_bits=16, rules={"self_attn": {"value_bits": 2}})(llama.model.layers[2])
    assert forms(ec.Cache(llama, rules={"model.layers.0": {"key_bits": 3}})) == ["k8v4", "k8v4", "k16v2", "k2v4"]


def test_paths_are_those_of_the_decorated_module(llama: Any) -> None:
    ec.compress_kv(rules={"layers.1": {"key_bits": 8}})(llama.model)
    assert forms(ec.Cache(llama)) == ["k4v4", "k8v4", "k4v4", "k4v4"]
    assert forms(ec.Cache(torch.compile(llama), rules={"model.layers.1": {"key_bits": 2}})) == forms(ec.Cache(llama))


def test_copies_keep_rules_and_remove_and_another_decoration_end_them(llama: Any) -> None:
    ec.compress_kv(rules={"model.layers.0": {"key_bits": 8}})(llama)
    twin = copy.deepcopy(llama)
    ec.remove(llama)
    assert forms(ec.Cache(llama)) == ["k4v4"] * 4
    assert "_effcompile_rules" not in llama.__dict__
    assert forms(ec.Cache(twin)) == ["k8v4"] + ["k4v4"] * 3
    ec.compress_kv(value_bits=2)(twin)
    assert forms(ec.Cache(twin)) == ["k4v2"] * 4


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"model.layers.0": {"key_bit": 8}}, r"rules\['model.layers.0'\]: unknown option 'key_bit'; nearest: key_bits"),
        ({"model.layers.0": {"key_bits": 5}}, r"rules\['model.layers.0'\]: key_bits=5 is not offered"),
        ({"model.layers.0": {"group_size": 48}}, r"residual=128 does not hold whole groups"),
        ({"model.layers.0": 8}, r"rules\['model.layers.0'\]: 8: give a dict"),
        ({"": {"key_bits": 8}}, r"a rule is named by a pattern"),
        ({0: {"key_bits": 8}}, r"a rule is named by a pattern"),
        ("model.layers.0", r"rules='model.layers.0'"),
    ],
)
def test_rules_that_mean_nothing_are_refused_before_there_is_a_model(llama: Any, rules: Any, words: str) -> None:
    with pytest.raises(ec.OptionError, match=words if isinstance(rules, dict) else "rules='model.layers.0' is str"):
        ec.compress_kv(rules=rules)
    with pytest.raises(FormError, match=words):
        ec.Cache(llama, rules=rules)


@pytest.mark.parametrize(
    "pattern", ["model.layer.0", "model.layers.9", "model.layers.0.mlp", "model.layers.0.self_attn.q_proj"]
)
def test_a_rule_that_names_no_layer_is_refused_at_once(llama: Any, pattern: str) -> None:
    """Also a path below attention: the layer's form is decided around it. What was there before stays."""
    ec.compress_kv(key_bits=8)(llama)
    words = rf"rule '{pattern}' names no layer of LlamaForCausalLM that has a cache; nearest: .*model\.layers"
    with pytest.raises(FormError, match=words):
        ec.compress_kv(rules={pattern: {"key_bits": 2}})(llama)
    assert options.options_of(llama)["compress_kv"].key_bits == 8  # type: ignore[attr-defined]
    assert forms(ec.Cache(llama)) == ["k8v4"] * 4
    with pytest.raises(FormError, match=words):
        ec.Cache(llama, rules={pattern: {"key_bits": 2}})
    with pytest.raises(FormError, match="names no layer of LlamaMLP that has a cache; offered: none"):
        ec.compress_kv(rules={"model.layers.0": {"key_bits": 2}})(llama.model.layers[0].mlp)


def test_a_rule_for_windows_alone_is_refused_at_once() -> None:
    config = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True}
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GQA, **config)).eval()
    for use in (lambda rules: ec.compress_kv(rules=rules)(model), lambda rules: ec.Cache(model, rules=rules)):
        with pytest.raises(FormError, match=r"names only layers that keep the cache .*: \[0\]; the layers \[1\]"):
            use({"model.layers.0": {"key_bits": 8}})
    assert forms(ec.Cache(model, rules={"model.layers.*": {"key_bits": 8}})) == ["k8v4"]


@pytest.mark.exhaustive
def test_the_report_shows_each_layers_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """On reference bodies: what is looked at is the report, and not kernels."""
    from effcompile import lowering
    from effcompile.kernels import ops

    monkeypatch.setattr(lowering, "prebuild", lambda programs, device: None)
    model = make(2)
    ec.compress_kv(residual=0, rules={"model.layers.0": {"key_bits": 8}, "model.layers.1": {"value_bits": "fp8"}})(
        model
    )
    model.compile(backend="effcompile")
    cache = ec.Cache(model)
    with torch.inference_mode(), ops.reference_only():
        model(IDS, past_key_values=cache)
        model(IDS[:, :1], past_key_values=cache)
    found = {d.module: d.form for d in ec.inspect(model).decisions if "decode" in d.form}
    assert [found[f"model.layers.{n}.self_attn"].split("_")[2] for n in range(2)] == ["k8v4g32r0", "k4vfp8g32r0"]
    json.loads(ec.inspect(model).to_json())


@pytest.mark.exhaustive
def test_compiled_layers_of_different_forms_give_what_the_reference_bodies_give() -> None:
    """fp8 and the other axes in one model: prefill, chunk and decode, with padding; no kernel is missing."""
    from effcompile.kernels import ops

    rules = {"model.layers.0": {"key_bits": "fp8", "value_bits": "fp8"}, "model.layers.1": {"key_axis": "token"}}
    rules["model.layers.1.self_attn"] = {"key_axis": "token", "value_axis": "channel", "key_bits": 8, "value_bits": 8}
    model = make(2)
    ids = torch.randint(128, (2, 90), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :11] = 0

    def logits() -> list[torch.Tensor]:
        cache, found, at = ec.Cache(model, 512, group_size=16, residual=16, rules=rules), [], 0
        assert forms(cache) == ["kfp8vfp8g16r16", "k8v8g16r16ktvc"]
        for count in (60, 27, 1, 1, 1):
            seen = at + count
            out = model(ids[:, at:seen], attention_mask=mask[:, :seen], past_key_values=cache)
            at = seen
            found.append(out.logits[1])
        return found

    with torch.inference_mode(), ops.reference_only():
        expected = logits()
    model.compile(backend="effcompile")
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs its PyTorch reference body")
        found = logits()
    assert any("ktvc" in d.form for d in ec.inspect(model).decisions)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_limit_with_rules_is_exact(llama: Any) -> None:
    """Every layer is set to 16 bits by a rule: the tokens are those of the plain model."""
    plain = llama.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0)
    ec.compress_kv(key_bits=2, value_bits=2, residual=0, rules={"**": {"key_bits": 16, "value_bits": 16}})(llama)
    cache = ec.Cache(llama)
    assert forms(cache) == ["k16v16g32r0"] * 4
    assert torch.equal(llama.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0), plain)
