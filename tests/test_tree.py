"""Rules and the module tree: what names no module is an error, and paths begin at the compiled module after a break."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effcompile as ec
from effcompile.passes.options import OptionError
from models import MODELS

IDS = torch.randint(1, 128, (2, 60), generator=torch.Generator().manual_seed(1))
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
OFF: dict[str, Any] = {"compress_kv": False}

pytestmark = [pytest.mark.filterwarnings("ignore:compress_kv. generate"), pytest.mark.usefixtures("no_inductor")]


def rules(*patterns: str) -> dict[str, Any]:
    return {"rules": dict.fromkeys(patterns, OFF)}


def text_of(error: BaseException) -> str:
    """Dynamo wraps what a back end raises."""
    inner = getattr(error, "inner_exception", None) or error.__cause__ or error
    assert isinstance(inner, OptionError), error
    return str(inner)


def broken(model: Any, layers: tuple[int, ...] = (0, 1)) -> Any:
    """``model`` with a graph break in the middle of some layers."""
    for index in layers:
        attention = model.model.layers[index].self_attn
        attention.register_forward_pre_hook(_break, with_kwargs=True)
    return model


def _break(module: nn.Module, args: Any, kwargs: Any) -> None:
    torch._dynamo.graph_break()


@pytest.mark.one_in(5, rest="exhaustive")
@pytest.mark.parametrize("how", ["method", "function"])
@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("model.layrs.*.self_attn", r"nearest: model\.layers\.\*\.self_attn"),
        ("model.layers.7.self_attn", r"nearest: model\.layers\.1\.self_attn, model\.layers\.0\.self_attn"),
        ("layers.*.self_attn", r"nearest: model\.layers\.\*\.self_attn"),
        ("zzz", "nearest: none, see named_modules"),
    ],
)
@pytest.mark.parametrize("breaks", [False, True])
def test_a_rule_that_names_no_module(pattern: str, near: str, how: str, breaks: bool) -> None:
    model: Any = MODELS["llama"]("sdpa")
    if breaks:
        broken(model)
    given = rules("model.layers.0", pattern)
    if how == "method":
        model.compile(backend="effcompile", options=given)
        fast = model
    else:
        fast = torch.compile(model, backend="effcompile", options=given)
    with torch.no_grad(), pytest.raises(Exception, match="names no module") as caught:
        fast(IDS)
    assert f"options['rules'][{pattern!r}]: names no module of the compiled LlamaForCausalLM" in text_of(caught.value)
    with pytest.raises(OptionError, match=near):
        raise OptionError(text_of(caught.value))


def test_one_that_names_modules_without_a_site_is_a_note() -> None:
    model: Any = MODELS["llama"]("sdpa")
    model.lm_head.register_forward_pre_hook(_break, with_kwargs=True)
    model.compile(backend="effcompile", options=rules("lm_head", "model.layers.*.mlp", "model.layers.0"))
    with torch.no_grad():
        model(IDS)
    notes = [note for graph in ec.inspect(model).graphs for note in graph.unmatched]
    assert any("'lm_head' names no module of this graph" in note for note in notes)
    assert not any("mlp" in note for note in ec.inspect(model).graphs[0].unmatched)


def test_paths_begin_at_the_compiled_module_after_a_break() -> None:
    """And the rule for one layer may hold for others of its kind, which the report says."""
    model: Any = broken(MODELS["llama"]("sdpa"))
    cache = ec.Cache(model, key_bits=16, value_bits=16)
    model.compile(backend="effcompile", options=rules("model.layers.1.self_attn"))
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    found = {d.module: d.reason.code if d.reason else d.action for d in ec.inspect(model).decisions}
    # transformers' attention reads its own number, which Dynamo guards: here each layer has its own graph.
    assert found == {"model.layers.0.self_attn": "rewritten", "model.layers.1.self_attn": "switched-off"}
    notes = [note for graph in ec.inspect(model).graphs for note in graph.unmatched]
    told = "names some LlamaAttention and not others, but after a graph break one graph may serve all of them"
    assert any(told in note for note in notes)


def test_a_rule_for_all_layers_holds_in_every_graph_after_a_break() -> None:
    """Without the whole path the rule would name nothing there, and be ignored without a word."""
    model: Any = broken(MODELS["llama"]("sdpa"))
    cache = ec.Cache(model, key_bits=16, value_bits=16)
    model.compile(backend="effcompile", options=rules("model.layers.*.self_attn"))
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    found = [(d.reason.code if d.reason else d.action) for d in ec.inspect(model).decisions]
    assert found
    assert set(found) == {"switched-off"}
    assert "modeling_llama.py" in ec.inspect(model).decisions[0].source
    assert not any("graph break" in note for graph in ec.inspect(model).graphs for note in graph.unmatched)


def test_each_layer_by_itself() -> None:
    model: Any = MODELS["llama"]("sdpa")
    expected = model.generate(IDS, **GREEDY)
    for layer in model.model.layers:
        layer.compile(backend="effcompile", options=rules("self_attn"))
    cache = ec.Cache(model, key_bits=16, value_bits=16)
    assert torch.equal(model.generate(IDS, past_key_values=cache, **GREEDY), expected)
    assert {d.reason.code for d in ec.inspect(model).decisions if d.reason} == {"switched-off"}
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend="effcompile", options=rules("model.layers.*.self_attn"))
    with pytest.raises(Exception, match="names no module") as caught:
        model.generate(IDS, **GREEDY)
    assert "of the compiled LlamaDecoderLayer, at which paths begin" in text_of(caught.value)


def test_not_knowing_is_no_error() -> None:
    model: Any = MODELS["llama"]("sdpa")
    given = rules("model.layers.0.self_attn", "some.thing")

    def wrapped(ids: Tensor) -> Tensor:
        return model(ids, use_cache=False).logits * 2

    with torch.no_grad():
        torch.compile(wrapped, backend="effcompile", options=given)(IDS)
        torch.compile(model.forward, backend="effcompile", options=given)(IDS)
    notes = [note for graph in ec.inspect(model).graphs for note in graph.unmatched]
    assert any("'some.thing' names no module of this graph" in note for note in notes)


@pytest.mark.exhaustive
def test_changes_after_the_first_compile() -> None:
    """Decorating, other bits, part of a model, other rules, taking off: each at the next call."""
    model: Any = MODELS["llama"]("sdpa")
    plain = copy.deepcopy(model)

    def told() -> tuple[list[str], str]:
        out = model.generate(IDS, **GREEDY, return_dict_in_generate=True)
        cache = out.past_key_values
        forms = [layer.form.name for layer in cache.compressed] if isinstance(cache, ec.Cache) else []
        graphs = [g for g in ec.inspect(model).graphs if g.label == "decode"]
        last = graphs[-1].decisions[0]
        return forms, "_".join(last.form.split("_")[:3]) or last.reason.code

    model.compile(backend="effcompile")
    assert told() == ([], "not-asked")
    ec.compress_kv(key_bits=4, value_bits=4)(model)
    assert told() == (["k4v4g32r128"] * 2, "attend_decode_k4v4g32r128")
    ec.compress_kv(key_bits=8, value_bits=4)(model)
    assert told() == (["k8v4g32r128"] * 2, "attend_decode_k8v4g32r128")
    ec.compress_kv(key_bits=16, value_bits=16)(model.model.layers[1])
    assert told()[0] == ["k8v4g32r128", "k16v16g32r128"]
    model.compile(backend="effcompile", options=rules("model.layers.*"))
    cache = ec.Cache(ec.remove(model), key_bits=8)
    ids = torch.cat([IDS, IDS[:, :1]], 1)
    model.generate(ids, past_key_values=cache, **GREEDY)
    assert {d.reason.code for d in ec.inspect(model).decisions[-2:] if d.reason} == {"switched-off"}
    ec.remove(model)
    assert torch.equal(model.generate(IDS, **GREEDY), plain.generate(IDS, **GREEDY))
