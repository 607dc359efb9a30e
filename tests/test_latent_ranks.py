"""Ranks of latents that fall with depth: LoRC's schedule, by hand and on models."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from test_latent_cache import EXACT, model_of
from torch import Tensor, nn

import effcompile as ec
from effcompile.kernels import ops
from effcompile.kernels.form import FormError, KVForm
from effcompile.runtime import progressive
from effcompile.runtime.cache import CacheError
from models import GQA, MODELS

pytestmark = pytest.mark.filterwarnings("ignore:compress_kv. generate")

KEYS, VALUES = (2.0, 3.0, 10.0, 1.5, 4.0, 2.0), (5.0, 2.0, 2.0, 30.0, 1.5, 8.0)
"""Condition numbers of the projections of six layers."""


def conditioned(outputs: int, inputs: int, kappa: float) -> Tensor:
    """A weight with singular values from 1 down to ``1 / kappa``."""
    left, right = (torch.linalg.qr(torch.randn(n, outputs, dtype=torch.float64))[0] for n in (outputs, inputs))
    return left * torch.linspace(0, -math.log(kappa), outputs, dtype=torch.float64).exp() @ right.T


@pytest.fixture(scope="module")
def six() -> Any:
    """Six layers with 128 channels of keys each, and the condition numbers above."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**GQA | {"num_hidden_layers": 6, "num_key_value_heads": 4})
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer, key, value in zip(model.model.layers, KEYS, VALUES):
            layer.self_attn.k_proj.weight.copy_(conditioned(128, 128, key))
            layer.self_attn.v_proj.weight.copy_(conditioned(128, 128, value))
    return model


def by_hand(kept: float, whole: int = 128) -> list[int]:
    """Card and paper: ``d_max`` is all channels, and ``d_min`` the largest within the budget."""
    products = [math.prod(KEYS[i:]) * math.prod(VALUES[i:]) for i in range(6)]
    logs = [math.log(kt) for kt in products]
    best: list[int] = []
    for d_min in range(whole + 1):
        found = []
        for log in logs:
            d = whole * (1 - (max(logs) - log) / (max(logs) - min(logs)) * (1 - d_min / whole))
            found.append(max(16, int(d + 1e-9) // 16 * 16))
        if sum(found) <= kept * 6 * whole:
            best = found
    return best


def ranks_of(cache: Any) -> list[int]:
    return [layer.form.rank("key") for layer in cache.compressed]


@pytest.mark.parametrize("kept", [0.55, 0.67, 0.8, 0.9])
def test_ranks_are_those_of_the_formula(six: Any, kept: float) -> None:
    expected = by_hand(kept)
    assert expected[0] == 128  # all channels of the first layer: whole keys
    found = ranks_of(ec.Cache(six, latent=kept, **EXACT))
    assert found == [0 if rank == 128 else rank for rank in expected]
    assert expected == sorted(expected, reverse=True)
    # What is left of the budget is less than a step a layer, and nothing like the same rank in all of them.
    assert 0 <= kept * 6 * 128 - sum(expected) < 6 * 16
    assert len(set(expected)) >= 2


def test_below_half_no_layer_keeps_all(six: Any) -> None:
    """Then ``d_min`` is the least there is, and ``d_max`` falls."""
    found = ranks_of(ec.Cache(six, latent=0.3, **EXACT))
    assert found == sorted(found, reverse=True)
    assert 16 == found[-1] < found[0] < 128
    assert 0 <= 0.3 * 6 * 128 - sum(found) < 6 * 16


def test_the_depth_of_a_layer_counts_and_not_its_own_condition_alone() -> None:
    logs = [0.0, 0.0, 5.0]
    assert progressive.places(logs) == [0.0, 0.0, 0.0]
    assert progressive.ranks([1.0, 1.0, 1.0, 1.0], [64] * 4, 0.5, [16] * 4) == [64, 32, 16, 16]
    assert progressive.ranks([1.0, 1.0], [64, 64], 0.99, [16, 32]) == [64, 32]
    assert progressive.ranks([1.0], [64], 0.5, [16]) == [32]


def test_condition_numbers() -> None:
    assert progressive.log_condition(conditioned(16, 24, 50.0)) == pytest.approx(math.log(50), rel=1e-9)
    # A vanishing singular value does not decide, nor does a weight of zeros.
    weight = torch.diag(torch.tensor([8.0, 4.0, 1e-12]))
    assert progressive.log_condition(weight) == pytest.approx(math.log(2))
    assert progressive.log_condition(torch.zeros(3, 4)) == 0.0


def test_decorators_rules_and_packing(six: Any) -> None:
    """A share is an option like another; layers that say otherwise are left out of its budget."""
    # Nothing here is about kernels, and building them takes seconds.
    model = ec.compress_kv(latent=0.67, key_bits=8, value_bits=4, rules={"model.layers.[01]": {"latent": 96}})(six)
    try:
        with torch.no_grad(), ops.reference_only():
            cache = model(torch.arange(40)[None]).past_key_values
        found = ranks_of(cache)
        assert found[:2] == [96, 96]
        assert (
            found[2:]
            == ranks_of(ec.Cache(ec.remove(six), latent=0.67, rules={"model.layers.[01]": {"latent": 96}}))[2:]
        )
        whole = [rank or 128 for rank in found[2:]]
        assert whole == sorted(whole, reverse=True)
        assert whole[0] > whole[-1]
        assert sum(whole) <= 0.67 * 4 * 128
        # Where a group of channels shares a scale, ranks are whole groups.
        groups = ranks_of(ec.Cache(six, latent=0.6, key_axis="token", group_size=32))
        assert all(rank % 32 == 0 for rank in groups)
        assert any(groups)
    finally:
        ec.remove(six)
    assert KVForm(latent=0.5).options["latent"] == 0.5


def test_a_share_of_the_ranks_runs(six: Any) -> None:
    """Whole keys, and latents of several ranks, in one cache: each layer's keys are those of its own rank."""
    ids = torch.randint(1, 128, (2, 60), generator=torch.Generator().manual_seed(2))
    planned = ec.Cache(six, latent=0.8, **EXACT)
    rules = {f"model.layers.{i}": {"latent": rank} for i, rank in enumerate(ranks_of(planned))}
    given = ec.Cache(six, **EXACT, rules=rules)
    with torch.no_grad(), ops.reference_only():
        for cache in (planned, given):
            six(ids[:, :50], past_key_values=cache)
        ours, theirs = (six(ids[:, 50:], past_key_values=cache).logits for cache in (planned, given))
        dense = six(ids).logits[:, 50:]
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, dense, atol=1e-3)


def test_what_is_refused(six: Any) -> None:
    for wrong in (1.0, 1.5, -0.5, 0.0, float("nan"), True, 100):
        with pytest.raises(FormError, match=r"latent=.* a share of all layers' channels such as 0\.67"):
            KVForm(latent=wrong)
    with pytest.raises(FormError, match=r"latent=0\.1: the smallest ranks keep 0\.125 .*layers \[0, 1, 2, 3, 4, 5\]"):
        ec.Cache(six, latent=0.1)
    with pytest.raises(FormError, match=r"latent=0\.5 is a share; make a cache"):
        KVForm(16, 16, latent=0.5).buffers("key", 1, 2, 32, 64, torch.float32)
    with pytest.raises(ec.OptionError, match=r"latent=2\.5"):
        ec.compress_kv(latent=2.5)
    with pytest.raises(CacheError, match=r"layer 0: latent=0\.5 needs the projection that makes its keys.*qkv_proj"):
        ec.Cache(model_of("phi3"), latent=0.5)  # type: ignore[arg-type]


def test_values_without_a_projection_are_named() -> None:
    """The schedule counts both projections of a layer, so both have to be known."""
    model: Any = MODELS["llama"]("sdpa")
    model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda module, args, out: out.tanh())
    with pytest.raises(CacheError, match=r"layer 1: latent=0\.5 needs the projection that makes its values"):
        ec.Cache(model, latent=0.5)
    assert ranks_of(ec.Cache(model, latent=32)) == [32, 32]
    assert isinstance(model.model.layers[1].self_attn.v_proj, nn.Linear)


def test_whole_heads_that_a_form_cannot_have(six: Any) -> None:
    """Then the layers that would keep them have latents of full rank."""
    before = ec.Cache(six, latent=0.67, rope="pre", key_bits=8, value_bits=16)
    assert ranks_of(before) == by_hand(0.67)
    model = copy.deepcopy(six)
    ec.fit_latents(model)
    cache = ec.Cache(model, value_latent=0.8, key_bits=16, value_bits=8, group_size=64, residual=0)
    found = [layer.form.rank("value") for layer in cache.compressed]
    assert found[0] == 128  # all of them: heads of 32 do not divide into groups of 64
    assert set(found) == {64, 128}
    with torch.no_grad(), ops.reference_only():
        assert model(torch.arange(7)[None], past_key_values=cache).logits.isfinite().all()
    for layer, copied in zip(cache.compressed, copy.deepcopy(cache).compressed):
        assert copied.rebuilds["value_up"] is layer.rebuilds["value_up"]
