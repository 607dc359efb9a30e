"""Linears in few bits and of low rank on a GPU, as far as that can be seen without: as in ``test_block_devices.py``.

The meta device has the launchers of a GPU here, or none; what would be launched is noted.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_block_devices import waits
from test_quantize_weights import IDS, Tiny, codes, compiled, logits

import effcompile as ec
from effcompile import lowering
from effcompile.kernels import low_rank_ops, ops, weight_ops
from effcompile.kernels.program import OperatorProgram
from effcompile.lowering import triton_low_rank, triton_weights
from effcompile.lowering.triton_build import Built
from effcompile.passes import calibrate_linear, feed_forward, weights
from effcompile.passes.quantize_weights import QuantizeWeights


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were launched."""
    launched: list[str] = []
    monkeypatch.setattr(Built, "launch", lambda self, *args, **options: launched.append(self.name))
    for module, name in ((triton_weights, "quantized_linear"), (triton_low_rank, "low_rank_linear")):
        monkeypatch.setitem(ops._launchers, (name, "meta"), getattr(module, name))
    return launched


def tiny(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A compiled model on the meta device, where weights have no magnitude."""
    monkeypatch.setattr(QuantizeWeights, "out_of_range", lambda self, weight: "")
    monkeypatch.setattr(weights, "digest", lambda tensor: str(id(tensor)))
    told = compiled(Tiny().bfloat16().to("meta"), bits=4, group=32)
    logits(told, IDS.to("meta"))
    return told


def test_a_site_is_taken_where_a_kernel_is(
    gpu: list[str], no_inductor: list[Any], no_fallback: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tiny(monkeypatch)
    assert codes(told) == {"lm_head": "head"}
    assert {k.name for k in ec.inspect(told).kernels} == {"quantized_linear_bf16"}


def test_a_site_is_left_where_no_kernel_is(no_inductor: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    told = tiny(monkeypatch)
    assert set(codes(told).values()) == {"head", "no-kernel"}
    (text, *_) = {d.reason.text for d in ec.inspect(told).decisions if d.reason and d.reason.code == "no-kernel"}
    assert text == "there is no kernel for meta"


@pytest.mark.parametrize("rows", [1, 16, 1000, 3000])
def test_a_call_does_not_wait(rows: int, gpu: list[str], no_fallback: None) -> None:
    """The body of an operator, which on the meta device is not what the operator runs."""

    def new(*sizes: int, of: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(sizes, dtype=of, device="meta")

    x, bias = new(rows, 64), new(96)
    assert waits(lambda: low_rank_ops._body(x, new(16, 64), new(96, 16), bias)) == []
    assert gpu == (["few_down", "few_up"] if rows <= triton_low_rank.FEW_ROWS else ["chain"])
    gpu.clear()
    packed = new(6, 2, 16, 16, of=torch.uint8), *[new(6, 2, 16, of=torch.float16)] * 2
    assert waits(lambda: weight_ops._body(x, *packed, bias, 96, 4, 32)) == []
    assert gpu == (["quantized_product"] if rows <= triton_weights.WRITTEN_ROWS else ["write_weight"])


@pytest.mark.parametrize("operator", ["quantized_linear", "low_rank_linear"])
def test_kernels_are_files_with_a_text(operator: str) -> None:
    for device, said in (("cuda", "@triton.jit"), ("cpu", f"int64_t {operator}(")):
        assert said in lowering.written(OperatorProgram(operator, torch.bfloat16), device)[1]


@pytest.mark.slow
def test_a_residual_is_left_on_a_gpu(gpu: list[str], no_inductor: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors alone are taken there."""
    for module in (calibrate_linear, feed_forward, weights):
        monkeypatch.setattr(module, "digest", lambda tensor: "the same")
    model, found = Tiny(), {}
    with torch.no_grad():  # single entries are what stands out of these weights
        for name, weight in model.named_parameters():
            if name.startswith("layers") and weight.ndim == 2:
                weight += 3 * (torch.rand_like(weight) < 0.02)
    for residual in (0.0, 0.3):
        method = ec.low_rank(ratio=0.6, residual=residual, planner="uniform", round_to=8)
        plan = ec.calibrate(model, [torch.arange(128)[None]], [method], progress=False)
        told = copy.deepcopy(model).to("meta")
        told.compile(backend="effcompile", options={"plan": plan})
        logits(told, IDS.to("meta"))
        found[residual] = {
            d.reason.code if d.reason else d.form for d in ec.inspect(told).decisions if "layers" in d.module
        }
    assert found[0.0] == {"low_rank whitened 32 of 96"}
    assert "no-kernel" in found[0.3]
    assert not [text for text in found[0.3] if "entries" in text]
