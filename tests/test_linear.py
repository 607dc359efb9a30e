"""The linear of few rows: kernel against fp64 beside the library's own error, odd sizes, and where it is used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import effcompile as ec
from effcompile.kernels import ops
from effcompile.passes import backend, report
from models import MODELS

OP = torch.ops.effcompile.linear


@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize(("outputs", "inputs"), [(192, 576), (63, 65), (1, 500), (49, 16), (130, 1536)])
def test_kernel_against_fp64(rows, outputs, inputs):
    torch.manual_seed(rows)
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    for b in (None, bias):
        exact = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
        with ops.reference_only():
            reference = torch.ops.effcompile.linear(x, weight, b)
        got = torch.ops.effcompile.linear(x, weight, b)
        # Twice what the library loses, plus one rounding of a product's terms: nothing here is tuned.
        unit = torch.finfo(torch.float32).eps * (x.abs() @ weight.abs().T).max()
        assert (got - exact).abs().max() <= 2 * (reference - exact).abs().max() + unit


def test_more_rows_or_another_dtype_run_the_reference():
    x, weight = torch.randn(9, 64), torch.randn(32, 64)
    with pytest.warns(UserWarning, match="reference body"):
        assert torch.equal(torch.ops.effcompile.linear(x, weight, None), torch.nn.functional.linear(x, weight))
    half = torch.ops.effcompile.linear(x[:1].bfloat16(), weight.bfloat16(), None)
    assert half.dtype == torch.bfloat16


def test_inputs_that_are_not_contiguous():
    x, weight = torch.randn(4, 2, 64).transpose(0, 1), torch.randn(64, 32).t()
    torch.testing.assert_close(torch.ops.effcompile.linear(x, weight, None), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("bias", [torch.arange(96.0)[::2], torch.ones(1).expand(48)], ids=["strided", "expanded"])
@pytest.mark.usefixtures("no_fallback")
def test_a_bias_that_is_not_contiguous(bias):
    x, weight = torch.randn(1, 64), torch.randn(48, 64)
    torch.testing.assert_close(OP(x, weight, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


def test_opcheck():
    torch.library.opcheck(torch.ops.effcompile.linear, (torch.randn(1, 2, 64), torch.randn(48, 64), torch.randn(48)))


@pytest.mark.slow
def test_only_graphs_with_a_rewritten_site_use_it(monkeypatch):
    torch._dynamo.reset()
    report._graphs.clear()
    graphs = []
    monkeypatch.setattr(backend, "compile_fx", lambda gm, x, config_patches=None: graphs.append(gm) or gm.forward)
    ids = torch.randint(1, 128, (2, 40))
    plain = MODELS["llama"]("sdpa")
    fast = ec.compress_kv(key_bits=16, value_bits=16)(MODELS["llama"]("sdpa"))
    fast.compile(backend="effcompile")
    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fast.generate(ids, **greedy), plain.generate(ids, **greedy))
    ours = [sum("effcompile.linear" in str(n.target) for n in gm.graph.nodes) for gm in graphs]
    large = sum(isinstance(m, torch.nn.Linear) and m.weight.numel() >= 1 << 14 for m in plain.modules())
    assert large == 5  # q and o in two layers, and the head; k, v and the FFN are below the size where it pays
    assert ours == [1, large]  # of the prompt, only the last token goes through the head
    assert "5 linears of few rows" in str(ec.inspect(fast))
    torch._dynamo.reset()
    undecorated = MODELS["llama"]("sdpa")
    undecorated.compile(backend="effcompile")
    undecorated.generate(ids, **greedy)
    assert not any("effcompile.linear" in str(n.target) for gm in graphs[2:] for n in gm.graph.nodes)
    assert len(graphs) > 2
