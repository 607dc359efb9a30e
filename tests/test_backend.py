"""The back end on whole models: sites against an independent count, limits against eager, what is left untouched."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import transformers
from torch._dynamo.utils import counters

import effcompile as ec
from effcompile.kernels import ops
from effcompile.kernels.form import KVForm
from effcompile.passes import backend, report
from effcompile.passes.options import OptionError
from effcompile.runtime.cache import CacheError
from models import MODELS, NanoGPT, counted

IDS = torch.randint(1, 128, (2, 300), generator=torch.Generator().manual_seed(1))
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    report._graphs.clear()
    yield
    torch._dynamo.reset()


def decisions(model, phase):
    """The decisions about a model's sites in its graphs of ``phase``: "prefill" or "decode"."""
    return [d for graph in ec.inspect(model).graphs for d in graph.decisions if graph.label == phase]


@pytest.mark.one_in(7, rest="exhaustive")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_sites_are_those_of_the_eager_model(name, attention, no_inductor):
    """Found sites == attention calls that a torch-function mode counts on the eager model; decode rewrites them all."""
    model = MODELS[name](attention)
    with torch.no_grad(), counted() as count:
        model(IDS)
    present = count.sdpa if attention == "sdpa" else count.softmax
    assert present == 2
    logits = {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(IDS, **GREEDY, **logits)
    ec.compress_kv(key_bits=16, value_bits=16)(model)
    model.compile(backend="effcompile")
    got = model.generate(IDS, **GREEDY, **logits)
    assert torch.equal(got.sequences, expected.sequences)
    for a, b in zip(got.logits, expected.logits):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    prefill, decode = decisions(model, "prefill"), decisions(model, "decode")
    assert len(prefill) == present
    assert all(d.form.startswith("attend_prefill_k16v16") for d in prefill)
    assert len(decode) == present
    assert all(d.form.startswith("attend_decode_k16v16") for d in decode)
    # The last graph, but of OPT the last but one: by transformers 5.23 its code breaks the graph before the head.
    graphs = [[str(n.target) for n in gm.graph.nodes] for gm in no_inductor[-2:]]
    targets = max(graphs, key=lambda found: found.count("effcompile.attend.default"))
    assert targets.count("effcompile.attend.default") == present
    assert not any("kv_load" in t or "scaled_dot_product" in t or "softmax" in t for t in targets)


@pytest.mark.one_in(2, rest="exhaustive")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_is_recovered_and_generates_the_same(attention, no_inductor):
    model = MODELS["llama"](attention)
    mask = torch.ones_like(IDS)
    mask[0, :37] = 0
    expected = model.generate(IDS, attention_mask=mask, **GREEDY)
    ec.compress_kv(key_bits=16, value_bits=16)(model)
    model.compile(backend="effcompile")
    assert torch.equal(model.generate(IDS, attention_mask=mask, **GREEDY), expected)
    decode, prefill = decisions(model, "decode"), decisions(model, "prefill")
    assert len(decode) == len(prefill) == 2
    assert all(d.form.endswith("causal_pad") for d in decode)
    # A row of padding sees no key. SDPA gives 0 for it, as we do; arithmetic with a finite mask gives a mean.
    assert all(d.form.endswith("causal_pad") if attention == "sdpa" else d.reason.code == "fresh-keys" for d in prefill)


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_prompts_of_any_length_read_their_own_keys(attention, padded, no_inductor):
    """Three lengths: the second graph's length is a symbol. Logits of every token, padding too, are the eager ones."""
    model = MODELS["llama"](attention)
    fast = ec.compress_kv()(copy.deepcopy(model))
    fast.compile(backend="effcompile")
    for count in (33, 300, 71):
        mask = torch.ones(2, count, dtype=torch.long)
        mask[0, : 9 if padded else 0] = 0
        with torch.no_grad():
            ids = IDS[:, :count].contiguous()
            expected = model(ids, attention_mask=mask).logits
            got = fast(ids, attention_mask=mask).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert len(no_inductor) == 2
    found = decisions(fast, "prefill")
    left = padded and attention == "eager"
    assert {d.action for d in found} == {"left" if left else "rewritten"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_heads_without_a_kernel_keep_sdpa_for_the_first_call(attention, no_inductor):
    """Heads of 20 channels have no C++ kernel; the reference body would need all scores at once."""
    config = {"hidden_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 20}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **config, intermediate_size=64, num_hidden_layers=2, vocab_size=128, attn_implementation=attention
        )
    ).eval()
    with torch.no_grad():
        expected = model(IDS).logits
        ec.compress_kv(key_bits=16, value_bits=16)(model)
        model.compile(backend="effcompile")
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    found = {d.form or d.reason.code for d in decisions(model, "prefill")}
    # Some versions of transformers give SDPA a causal mask here, which is not needed; others a flag.
    assert found == {"sdpa_causal"} or (found == {"fresh-keys"} and attention == "sdpa")


@pytest.mark.parametrize("spelling", ["sdpa", "arithmetic"])
def test_nanogpt_is_found_and_left_with_a_reason_that_names_both_ways(spelling, no_inductor):
    model = NanoGPT(spelling)
    ids = IDS[:, :100]
    with torch.no_grad(), counted() as count:
        plain = model(ids)
    ec.compress_kv()(model)
    fast = torch.compile(model, backend="effcompile")
    with torch.no_grad():
        assert torch.equal(fast(ids), plain)
    found = ec.inspect(model).decisions
    assert len(found) == count.sdpa + count.softmax == 2
    assert {d.reason.code for d in found} == {"no-compressed-cache"}
    assert all("ec.Cache(model)" in d.reason.text and "ec.compress_kv" in d.reason.text for d in found)


def test_without_a_rewrite_inductor_gets_the_original_graph(monkeypatch):
    seen = []
    monkeypatch.setattr(backend, "compile_fx", lambda gm, inputs, config_patches=None: seen.append(gm) or gm.forward)
    given = []

    def spy(gm, inputs, **kwargs):
        given.append((gm, gm.print_readable(print_output=False)))
        return backend.effcompile(gm, inputs, **kwargs)

    model = NanoGPT("sdpa")
    with torch.no_grad():
        torch.compile(model, backend=spy)(IDS[:, :50])
    assert seen[0] is given[0][0]
    assert seen[0].print_readable(print_output=False) == given[0][1]


def test_options_alone_give_a_reason_that_names_both(no_inductor):
    model = MODELS["llama"]("sdpa")
    fast = torch.compile(
        model, backend="effcompile", options={"rules": {"model.layers.*": {"compress_kv": {"key_bits": 8}}}}
    )
    with torch.no_grad():
        fast(IDS, use_cache=False)
    found = ec.inspect(model).decisions
    assert len(found) == 2
    assert all(d.reason.code == "no-compressed-cache" and d.rule.startswith("rule") for d in found)


@pytest.mark.slow
def test_a_rule_can_switch_the_fusion_off_and_a_decorator_beats_it(no_inductor):
    model = MODELS["llama"]("sdpa")
    expected = model.generate(IDS, **GREEDY)
    model.compile(backend="effcompile", options={"rules": {"model.layers.0": {"compress_kv": False}}})
    cache = ec.Cache(model, 512, key_bits=16, value_bits=16)
    assert torch.equal(model.generate(IDS, past_key_values=cache, **GREEDY), expected)
    for phase in ("prefill", "decode"):
        found = {d.module: d for d in decisions(model, phase)}
        assert found["model.layers.0.self_attn"].reason.code == "switched-off"
        assert found["model.layers.1.self_attn"].action == "rewritten"
        assert found["model.layers.1.self_attn"].rule == "ec.Cache"


def test_unknown_options_name_the_nearest():
    model = NanoGPT("sdpa")
    for options, words in (
        ({"rule": {}}, "rules"),
        ({"rules": {"*": {"compres_kv": {}}}}, "compress_kv"),
        ({"rules": {"*": {"compress_kv": {"keybits": 4}}}}, "key_bits"),
        ({"compress_kv": {"key_bits": 5}}, "16, 8, 4, 3, 2"),
    ):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=words) as caught, torch.no_grad():
            torch.compile(model, backend="effcompile", options=options)(IDS[:, :10])
        chain = [caught.value, caught.value.__cause__, getattr(caught.value, "inner_exception", None)]
        assert any(isinstance(e, OptionError) for e in chain)


def test_chunked_prefill_and_decode_use_one_cache(no_inductor):
    model = MODELS["llama"]("sdpa")
    with torch.no_grad():
        plain = model(IDS).logits
    ec.compress_kv(key_bits=16, value_bits=16)(model)
    model.compile(backend="effcompile")
    with torch.no_grad():
        cache, out = None, []
        for part in IDS.split([120, 100, 79, 1], dim=1):
            result = model(part, past_key_values=cache)
            cache = result.past_key_values
            out.append(result.logits)
    torch.testing.assert_close(torch.cat(out, 1), plain, rtol=1e-4, atol=2e-5)
    assert {d.form.split("_k16")[0] for d in ec.inspect(model).decisions} == {"attend_prefill", "attend_decode"}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("bits", [(4, 4), (8, 4), (16, 8), (3, 2)])
def test_compiled_equals_the_eager_reference_path_token_by_token(bits, no_inductor):
    """The same store and the same meaning: eager reads it densely, compiled fuses; greedy tokens agree."""
    eager = MODELS["llama"]("sdpa")
    ec.compress_kv(key_bits=bits[0], value_bits=bits[1])(eager)
    fast = copy.deepcopy(eager)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = eager.generate(IDS, **GREEDY, output_logits=True, return_dict_in_generate=True)
    fast.compile(backend="effcompile")
    got = fast.generate(IDS, **GREEDY, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(got.sequences, expected.sequences)
    for a, b in zip(got.logits, expected.logits):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-5)


def test_two_graphs_serve_every_step(no_inductor):
    model = MODELS["llama"]("sdpa")
    ec.compress_kv()(model)
    model.compile(backend="effcompile")
    with torch.no_grad():
        out = model(IDS)
        for step in range(150):
            out = model(IDS[:, step : step + 1], past_key_values=out.past_key_values)
    assert len(no_inductor) == 2


def test_another_cache_and_another_length_compile_nothing_new(no_inductor):
    model = MODELS["llama"]("sdpa")
    ec.compress_kv()(model)
    model.compile(backend="effcompile")
    for new_tokens in (8, 100, 30):
        model.generate(IDS, **{**GREEDY, "max_new_tokens": new_tokens})
        assert len(no_inductor) == 2


def test_verify_records_the_difference_and_leaves_the_state_alone(no_inductor):
    model = MODELS["llama"]("sdpa")
    ec.compress_kv()(model)
    plain = copy.deepcopy(model)
    model.compile(backend="effcompile", options={"verify": True})
    plain.compile(backend="effcompile")
    verified = model.generate(IDS, **GREEDY)
    errors = [d.error for phase in ("prefill", "decode") for d in decisions(model, phase)]
    assert len(errors) == 4
    assert all(e is not None and e < 1e-5 for e in errors)
    assert torch.equal(verified, plain.generate(IDS, **GREEDY))


def test_report_is_json_and_prints(no_inductor):
    model = MODELS["llama"]("sdpa")
    ec.compress_kv()(model)
    model.compile(backend="effcompile")
    model.generate(IDS, **GREEDY)
    seen = ec.inspect(model)
    assert json.loads(seen.to_json())
    assert "attend" in seen.graph("after")
    assert "scaled_dot_product" in seen.graph("before")
    assert "modeling_llama.py" in str(seen.decisions[0].source)
    assert {d.module for d in seen.decisions} == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    assert "4 of 4 sites rewritten" in str(seen)


@pytest.mark.parametrize("same", [True, False])
def test_a_mask_that_counts_from_another_tensor_is_not_taken(same, no_inductor):
    """Causal, but its offset is not proved to be the store's length: fused, it would be the wrong mask."""
    form = KVForm(16, 16)
    state = []
    for kind in ("key", "value"):
        (shape, dtype), *_ = form.buffers(kind, 1, 2, 512, 32, torch.float32)
        state += [torch.randn(shape, dtype=dtype), None, None]
    length, other = torch.tensor(100), torch.tensor(50)
    query, key, value = torch.randn(1, 4, 3, 32), torch.randn(1, 2, 3, 32), torch.randn(1, 2, 3, 32)

    def attention(query, key, value, length, other):
        torch.ops.effcompile.kv_store(*state, length, key, value, form.name)
        keys, values = torch.ops.effcompile.kv_load(*state, length + 3, form.name)
        mask = torch.arange(512) <= (torch.arange(3) + (length if same else other))[:, None]
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask[None, None], enable_gqa=True
        )

    with torch.no_grad():
        expected = attention(query, key, value, length, other)
        got = torch.compile(attention, backend="effcompile")(query, key, value, length, other)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    fused = any("effcompile.attend" in str(n.target) for n in no_inductor[-1].graph.nodes)
    assert fused == same


def test_a_compiled_call_that_failed_half_way_is_not_continued(no_inductor, monkeypatch):
    """Dynamo replays what a graph did to Python objects only after it ran, so all that is known is that it did not."""
    model = ec.compress_kv(key_bits=8, value_bits=8)(MODELS["llama"]("sdpa"))
    model.compile(backend="effcompile")
    attend, calls = ops._launchers["attend", "cpu"], []

    def fails_in_the_second_layer(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("no memory")
        return attend(*args)

    with torch.no_grad():
        cache = model(IDS).past_key_values
        whole = model(IDS[:, :1], past_key_values=cache).logits
        monkeypatch.setitem(ops._launchers, ("attend", "cpu"), fails_in_the_second_layer)
        with pytest.raises(RuntimeError, match="no memory"):
            model(IDS[:, :1], past_key_values=cache)
        with pytest.raises(CacheError, match="half way"):
            model(IDS[:, :1], past_key_values=cache)
        cache.reset()
        model(IDS, past_key_values=cache)
        assert torch.equal(model(IDS[:, :1], past_key_values=cache).logits, whole)


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_autocast(name, attention, no_inductor):
    """Under autocast rotated keys are in fp32 and values are not; results have the type and the values of eager."""
    model = MODELS[name](attention)
    fast = ec.compress_kv(key_bits=16, value_bits=16)(copy.deepcopy(model))
    fast.compile(backend="effcompile")
    plain = compressed = None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for ids in (IDS[:, :100], IDS[:, 100:101], IDS[:, 101:102]):
            expected = model(ids, past_key_values=plain)
            got = fast(ids, past_key_values=compressed)
            plain, compressed = expected.past_key_values, got.past_key_values
            assert got.logits.dtype == expected.logits.dtype
            torch.testing.assert_close(got.logits, expected.logits, rtol=2e-2, atol=2e-2)
    assert isinstance(compressed, ec.Cache)
    assert compressed.tokens == 102


@pytest.mark.exhaustive
def test_flex_attention_decodes_on_the_store(no_inductor):
    """Its operator stands between the first layer's store and the last one's, and Dynamo loses writes around it."""
    config = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**config, vocab_size=128, attn_implementation="flex_attention")
    ).eval()
    with torch.no_grad():
        expected = model(IDS).logits
        fast = ec.compress_kv(key_bits=16, value_bits=16)(copy.deepcopy(model))
        fast.compile(backend="effcompile")
        cache, out = None, []
        for part in IDS.split([298, 1, 1], dim=1):
            result = fast(part, past_key_values=cache)
            cache = result.past_key_values
            out.append(result.logits)
    torch.testing.assert_close(torch.cat(out, 1), expected, rtol=1e-4, atol=2e-5)
    assert cache.tokens == 300


@pytest.mark.slow
def test_batches_of_any_size_decode_on_the_kernel(no_inductor):
    """After two batch sizes the batch is a symbol, and a graph keeps slices of everything."""
    model = MODELS["llama"]("sdpa")
    fast = ec.compress_kv(key_bits=16, value_bits=16)(copy.deepcopy(model))
    fast.compile(backend="effcompile")
    for rows in (2, 4, 3):
        ids = IDS.repeat(2, 1)[:rows, :50].contiguous()
        assert torch.equal(fast.generate(ids, **GREEDY), model.generate(ids, **GREEDY))
    assert len(no_inductor) == 4
    assert {d.action for d in ec.inspect(fast).decisions} == {"rewritten"}
