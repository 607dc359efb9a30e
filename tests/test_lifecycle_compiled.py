"""The same lives with compiled models: other batches, copies, hybrid models, and transformers' own ways to compile."""

from __future__ import annotations

import copy

import pytest
import torch
from test_lifecycle import GREEDY, IDS, SHORT, hybrid
from transformers import CompileConfig, StaticCache

import effcompile as ec
from models import MODELS

pytestmark = pytest.mark.filterwarnings("ignore:compress_kv. generate")


def compiled(model, bits):
    fast = ec.compress_kv(key_bits=bits, value_bits=bits, **SHORT)(copy.deepcopy(model))
    fast.compile(backend="effcompile")
    return fast


@pytest.mark.parametrize("bits", [16, 4])
def test_a_copied_prompt_continues_the_same_way_twice(bits, no_inductor):
    """And on the same code: a copy's buffers lie elsewhere, which compiles nothing new."""
    model = MODELS["llama"]("sdpa")
    fast = compiled(model, bits)
    cache = ec.Cache(fast, 512)
    with torch.no_grad():
        fast(IDS[:, :200], past_key_values=cache)
    first = fast.generate(IDS[:, :201], past_key_values=copy.deepcopy(cache), **GREEDY)
    graphs = len(no_inductor)
    assert torch.equal(fast.generate(IDS[:, :201], past_key_values=copy.deepcopy(cache), **GREEDY), first)
    assert torch.equal(fast.generate(IDS[:, :201], past_key_values=cache, **GREEDY), first)
    assert len(no_inductor) == graphs
    if bits == 16:
        assert torch.equal(model.generate(IDS[:, :201], **GREEDY), first)


def test_rows_change_and_tokens_go_between_compiled_calls(no_inductor):
    model = MODELS["llama"]("sdpa")
    fast = compiled(model, 16)
    cache = ec.Cache(fast, 512)
    seen = IDS[:, :100]
    with torch.no_grad():
        fast(seen, past_key_values=cache)

        def agrees(seen, new):
            got = fast(new, past_key_values=cache).logits
            expected = model(torch.cat([seen, new], 1)).logits[:, -new.shape[1] :]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=5e-5)

        cache.batch_repeat_interleave(2)
        seen = seen.repeat_interleave(2, 0)
        agrees(seen, IDS[:, 100:101].repeat(2, 1))
        cache.crop(-31)
        agrees(seen[:, :70], IDS[:, 7:8].repeat(2, 1))
        cache.batch_select_indices(torch.tensor([2]))
        agrees(torch.cat([seen[:, :70], IDS[:, 7:8].repeat(2, 1)], 1)[2:3], IDS[:1, 60:61])


def test_four_beams_equal_the_model_without(no_inductor):
    model = MODELS["llama"]("sdpa")
    expected = model.generate(IDS[:, :90], num_beams=4, **GREEDY)
    assert torch.equal(compiled(model, 16).generate(IDS[:, :90], num_beams=4, **GREEDY), expected)


@pytest.mark.parametrize(
    ("beams", "counts", "new"), [pytest.param(1, (20, 100), 40, marks=pytest.mark.exhaustive), (3, (44,), 12)]
)
def test_a_hybrid_model_generates_as_without(beams, counts, new, no_inductor):
    """From below the window to beyond it, where the sliding layers change their way."""
    model = hybrid(window=48)
    how = {**GREEDY, "max_new_tokens": new, "num_beams": beams}
    fast = compiled(model, 16)
    for count in counts:
        assert torch.equal(fast.generate(IDS[:, :count], **how), model.generate(IDS[:, :count], **how))
    # Prefill and decode, below the window and beyond it, lengths as symbols; no graph for each step or reordering.
    assert len(no_inductor) <= 8


def config():
    made = CompileConfig(backend="effcompile", fullgraph=False)
    made._compile_all_devices = True  # generate compiles by itself on accelerators only, unless told
    return made


def test_generates_own_compilation_with_this_back_end_serves_a_decorated_model(no_inductor):
    """CompileConfig(backend="effcompile") and no cache_implementation: the compressed cache, decode compiled."""
    model = MODELS["llama"]("sdpa")
    expected = model.generate(IDS, **GREEDY)
    ec.compress_kv(key_bits=16, value_bits=16)(model)
    out = model.generate(IDS, compile_config=config(), return_dict_in_generate=True, **GREEDY)
    assert isinstance(out.past_key_values, ec.Cache)
    assert torch.equal(out.sequences, expected)
    found = ec.inspect(model).decisions
    assert {(d.action, d.form.split("_k16")[0]) for d in found} == {("rewritten", "attend_decode")}


@pytest.mark.parametrize("decorated", [False, True])
def test_a_static_cache_that_was_asked_for_stays_and_says_so(decorated, no_inductor):
    """cache_implementation="static" wins over the decorator, with a warning; the graphs keep their own attention."""
    model = MODELS["llama"]("sdpa")
    expected = model.generate(IDS, **GREEDY)
    how = {"cache_implementation": "static", "compile_config": config(), "return_dict_in_generate": True, **GREEDY}
    if decorated:
        ec.compress_kv(key_bits=4, value_bits=4)(model)
        with pytest.warns(UserWarning, match="cache_implementation='static', which wins over the decorator"):
            out = model.generate(IDS, **how)
    else:
        out = model.generate(IDS, **how)
    assert type(out.past_key_values) is StaticCache
    assert torch.equal(out.sequences, expected)
    targets = {str(node.target) for graph in no_inductor for node in graph.graph.nodes}
    assert any("scaled_dot_product_attention" in target for target in targets)
    assert not any("effcompile" in target for target in targets)
    # The whole model is one graph, and the report has it.
    assert len(no_inductor) == 1
    assert {d.reason.code for d in ec.inspect(model).decisions} == {"no-compressed-cache" if decorated else "not-asked"}
