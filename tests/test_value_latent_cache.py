"""A cache of values as latents: fitted factors, against the model, compiled, between calls, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_latent_cache import EXACT, FULL, GREEDY, IDS, PADDED, _weights_read, _whole, model_of, run
from torch import Tensor, nn

import effcompile as ec
from effcompile.kernels import cost, ops
from effcompile.kernels.form import FormError, KVForm
from effcompile.kernels.program import Predicate
from effcompile.passes.factors import spectrum
from effcompile.runtime.cache import CacheError
from effcompile.runtime.latent import FITTED
from effcompile.runtime.second_moment import SecondMoment

pytestmark = pytest.mark.filterwarnings("ignore:compress_kv. generate", "ignore:.*runs its PyTorch reference body")

TEXT = torch.randint(1, 128, (3, 200), generator=torch.Generator().manual_seed(5))
PACKED: dict[str, Any] = {"key_bits": 8, "value_bits": 4, "residual": 32, "latent": 48, "value_latent": 32}
slow = pytest.mark.slow


@pytest.fixture
def reference() -> Iterator[None]:
    """Nothing here is about kernels, and building them takes seconds."""
    with ops.reference_only():
        yield


def fitted(name: str) -> Any:
    model = model_of(name)
    ec.fit_latents(model, [TEXT])
    return model


def inputs_of(model: Any, batch: Any) -> list[Tensor]:
    """The hidden states that each attention reads, by layer."""
    seen: list[Tensor] = []
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs.get("hidden_states", args[0] if args else None)),
            with_kwargs=True,
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


# --- factors ----------------------------------------------------------------------------------------------------------


def test_what_is_lost_is_the_tail_of_the_spectrum() -> None:
    """On the text it was fitted to, without its padding: the mean is put back, and no other rank-r map loses less."""
    model, rank = model_of("qwen2"), 32
    batch = {"input_ids": IDS, "attention_mask": PADDED}
    read = inputs_of(model, batch)
    counted = ec.fit_latents(model, [batch], damping=0.0)
    assert counted == {f"model.layers.{i}.self_attn": int(PADDED.sum()) for i in range(2)}
    for layer, hidden in zip(model.model.layers, read):
        rows, moments = hidden[PADDED.bool()].double(), SecondMoment(128)
        moments.update(rows)
        for kind, linear in (("key", layer.self_attn.k_proj), ("value", layer.self_attn.v_proj)):
            weight = linear.weight.double()
            basis, down, shift = layer.self_attn.__dict__[FITTED][kind].factors(linear.weight, rank)
            lost = rows @ (weight - basis @ down).T - shift
            torch.testing.assert_close(lost.mean(0), torch.zeros(64, dtype=torch.float64), rtol=0, atol=1e-9)
            tail = spectrum(linear.weight, moments, "whitened", alpha=0, damping=0.0, mean=True).tail(rank)
            torch.testing.assert_close(float(lost.square().sum(1).mean()), tail, rtol=1e-5, atol=0)
            values = torch.linalg.svdvals(weight @ torch.linalg.cholesky(moments.covariance + 1e-12 * torch.eye(128)))
            assert tail == pytest.approx(float(values[rank:].square().sum()), rel=1e-3)
    ec.fit_latents(model)
    basis, down, shift = model.model.layers[0].self_attn.__dict__[FITTED]["value"].factors(linear.weight, rank)
    assert shift is None
    weight = model.model.layers[0].self_attn.v_proj.weight.double()
    lost = (weight - basis @ (basis.T @ weight)).square().sum()
    torch.testing.assert_close(lost, torch.linalg.svdvals(weight)[rank:].square().sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["llama", pytest.param("qwen2", marks=slow)])
def test_a_lower_rank_is_the_model_with_that_projection(name: str) -> None:
    """Against a copy whose projections of values were replaced; only stored values are of a lower rank."""
    model, rank = fitted(name), 32
    other = copy.deepcopy(model)
    for layer in other.model.layers:
        linear = layer.self_attn.v_proj
        basis, down, shift = layer.self_attn.__dict__[FITTED]["value"].factors(linear.weight, rank)
        bias = shift if linear.bias is None else shift + linear.bias
        linear.weight.data = (basis @ down).float()
        linear.bias = nn.Parameter(bias.float())
    ours = ec.Cache(model, 512, value_latent=rank, **EXACT)
    theirs = ec.Cache(other, 512, **EXACT)
    with torch.no_grad():
        model(IDS, past_key_values=ours)
        other(IDS, past_key_values=theirs)
    # The first layer's values depend on the tokens alone.
    layer, dense = ours.compressed[0], theirs.compressed[0]
    _, found = torch.ops.effcompile.kv_load(*layer.state, ours.length, layer.form_name, **layer.rebuilds)
    _, expected = torch.ops.effcompile.kv_load(*dense.state, theirs.length, dense.form_name)
    bound = 64 * torch.finfo(torch.float32).eps * float(expected.abs().max())
    assert float((found - expected).abs().max()) <= bound
    assert layer.state[3].shape == (2, 1, 512, rank)


# --- a cache ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "keys", "dtype"),
    [
        ("llama", False, torch.float32),
        *(pytest.param(n, True, torch.bfloat16, marks=slow) for n in FULL),
        *(pytest.param(n, True, torch.float32, marks=pytest.mark.exhaustive) for n in FULL),
        *(pytest.param(n, False, torch.bfloat16, marks=pytest.mark.exhaustive) for n in FULL),
    ],
    ids=str,
)
def test_full_rank_in_16_bits_is_the_model(name: str, keys: bool, dtype: torch.dtype) -> None:
    """Padding, GQA, a bias of values, norms of keys: at most what eager loses. At full rank nothing need be fitted."""
    model = model_of(name)
    exact = _whole(copy.deepcopy(model).double())
    model = model.to(dtype)
    eager = _whole(model)
    ours = run(model, ec.Cache(model, 512, latent=FULL[name] if keys else 0, value_latent=FULL[name], **EXACT))
    lost, error = (float((x.double() - exact).abs().max()) for x in (eager, ours))
    assert error <= 4 * lost, f"{error:.3g}, and eager loses {lost:.3g}"


@pytest.mark.one_in(2, rest="exhaustive")
@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=slow) for n in ("qwen2", "qwen3"))])
def test_compiled_generates_as_eager(name: str, no_inductor: list[Any]) -> None:
    model = ec.compress_kv(**PACKED)(fitted(name))
    expected = model.generate(IDS, attention_mask=PADDED, **GREEDY)
    model.compile(backend="effcompile")
    assert torch.equal(model.generate(IDS, attention_mask=PADDED, **GREEDY), expected)
    rewritten = [d for d in ec.inspect(model).decisions if d.action == "rewritten"]
    decode = [d for d in rewritten if "decode" in d.form]
    assert len(decode) == len([d for d in rewritten if "prefill" in d.form]) == 2
    assert all("k8l48v4l32" in d.form for d in decode)
    assert not any("kv_load" in str(node.target) for graph in no_inductor for node in graph.graph.nodes)
    prompt, step = map(_weights_read, no_inductor[-2:])
    for weight in ("k_proj", "v_proj"):
        assert any(weight in name for name in prompt)
        assert not any(weight in name for name in step)


@pytest.mark.usefixtures("reference")
def test_life_of_a_cache() -> None:
    """Rows, copies, growth, removed tokens, odd lengths, a share of the channels: as of any other store."""
    model = fitted("llama")
    cache = ec.Cache(model, **PACKED | {"value_latent": 0.75})
    assert [layer.form.rank("value") for layer in cache.compressed] == [0, 32]
    first = run(model, cache)
    other = copy.deepcopy(cache)
    assert other.compressed[1].value_factor is cache.compressed[1].value_factor
    cache.reset()
    assert torch.equal(run(model, cache), first)
    cache.activate_past_recording()
    with torch.no_grad():
        model(IDS[:, :70], past_key_values=cache)
    cache.crop(-70)
    mask = torch.ones(2, 600, dtype=torch.int64)
    with torch.no_grad():
        again = [model(IDS[:, :5], attention_mask=mask[:, :95], past_key_values=c).logits for c in (cache, other)]
        assert torch.equal(*again)
        cache.reserve(600)
    for c in (cache, other):
        c.batch_select_indices(torch.tensor([1, 1, 0]))
        c.reorder_cache(torch.tensor([2, 1, 1]))
    rows = torch.cat([IDS, IDS])[:3, :5]
    with torch.no_grad():
        assert torch.equal(*(model(rows, past_key_values=c).logits for c in (cache, other)))


@pytest.mark.usefixtures("reference")
def test_packed_latents_of_values_beside_whole_keys() -> None:
    """8 bits are near 16; keys of 16 bits, packed ones and keys before RoPE stay what they are."""
    model, dense = fitted("llama"), {}
    for bits in (16, 8, 4):
        form = {"key_bits": 16, "value_bits": bits, "residual": 0, "value_latent": 32}
        dense[bits] = run(model, ec.Cache(model, 512, **form))
    far = [float((dense[bits] - dense[16]).abs().mean()) for bits in (8, 4)]
    assert 0 < 4 * far[0] < far[1]
    pre = ec.Cache(model, 512, key_bits=8, value_bits=16, rope="pre", residual=0, value_latent=32)
    assert pre.angles.table is None or pre.angles.table.dtype == torch.float16
    near = run(model, pre)
    assert float((near - dense[16]).abs().mean()) < far[1]


def test_bytes_are_the_allocated_ones() -> None:
    model = fitted("llama")
    cache = ec.Cache(model, 512, batch_size=3, **PACKED)
    layer = cache.compressed[0]
    sizes = {"B": 3, "G": 2, "C": 512, "D": 32, "E": 32}
    assert layer.nbytes == sum(b.untyped_storage().nbytes() for b in layer.buffers())
    assert (
        layer.nbytes
        == cost.at(cost.allocation(layer.form, 4), **sizes)
        == layer.form.nbytes(3, 2, 512, 32, 32, torch.float32)
    )
    # K: 48 codes of a byte and a scale and a zero for 32 tokens; V: 32 codes of half a byte and one scale and zero.
    assert layer.nbytes == 3 * 512 * (48 + 48 * 4 / 32 + 16 + 4) + 3 * 64 * (48 + 32) * 4
    half, form = KVForm(8, 16, 32, 32), KVForm(8, 16, 32, 32, value_latent=32)
    ours, whole = (cost.attend(f, Predicate(), 4).at(**sizes, H=4, T=1, S=300) for f in (form, half))
    assert whole.bytes - ours.bytes == 3 * 300 * 32 * 4 - 2 * 32 * 33 * 4
    assert ours.flops - whole.flops == 3 * 4 * 2 * 33 * 32  # sums as wide as a head, and the up-projection of a row
    loaded, plain = (cost.unfused(f, 4).at(**sizes, H=4, T=1, S=300) for f in (form, half))
    assert loaded.flops - plain.flops == 3 * 2 * 300 * 32 * 2 * 33


# --- what is refused --------------------------------------------------------------------------------------------------


def test_values_that_were_not_fitted() -> None:
    model = model_of("llama")
    with pytest.raises(CacheError, match=r"layer 0: value_latent=32: call ec\.fit_latents\(model, batches\) first"):
        ec.Cache(model, value_latent=32)
    ec.Cache(model, value_latent=64)  # of full rank, so nothing is lost
    ec.fit_latents(model)
    ec.Cache(model, value_latent=32)
    twin = copy.deepcopy(model)
    ec.Cache(twin, value_latent=32)
    with torch.no_grad():
        twin.model.layers[1].self_attn.v_proj.weight.mul_(1.5)
    with pytest.raises(CacheError, match=r"layer 1: value_latent=32: ec\.fit_latents was called for other weights"):
        ec.Cache(twin, value_latent=32)
    ec.fit_latents(twin, [TEXT])
    first = ec.Cache(twin, value_latent=32).compressed[1].value_factor
    ec.fit_latents(twin, [TEXT[:1]])
    assert ec.Cache(twin, value_latent=32).compressed[1].value_factor is not first
    assert not any("latent" in name for name in twin.state_dict())


def test_ranks_and_models_that_do_not_fit() -> None:
    model = fitted("llama")
    with pytest.raises(FormError, match=r"layer 0: value_latent=80 is more than the 64 channels that the values of"):
        ec.Cache(model, value_latent=80, value_bits=16)
    with pytest.raises(CacheError, match=r"value_latent=32 needs the projection that makes its values.*qkv_proj"):
        ec.Cache(model_of("phi3"), value_latent=32)
    cache = ec.Cache(model, value_latent=32)
    with pytest.raises(CacheError, match=r"layer 0: value_latent=32 needs the hidden states .*value_latent=0 here"):
        cache.update(torch.randn(2, 2, 1, 32), torch.randn(2, 2, 1, 32), 0)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        model.model.layers[1].self_attn.v_proj.weight.mul_(2.0)
        with pytest.raises(CacheError, match=r"layer 1: the weights that make its values .*\(value_latent=32\)"):
            model(IDS[:, :1], past_key_values=cache)
        other = model_of("llama")
        ec.Cache(other, value_latent=64)
        with pytest.raises(CacheError, match="made for another model"):
            other(IDS, past_key_values=cache)


def test_texts_that_cannot_be_fitted_to() -> None:
    model = model_of("llama")
    with pytest.raises(ec.CalibrationError, match=r"give a list of batches, such as \[ids\]"):
        ec.fit_latents(model, TEXT)
    with pytest.raises(ec.CalibrationError, match=r"layers\.0\.self_attn has read no token"):
        ec.fit_latents(model, [])
    with pytest.raises(ec.CalibrationError, match="no layer of Phi3ForCausalLM makes keys or values"):
        ec.fit_latents(model_of("phi3"), [TEXT])
    assert FITTED not in model.model.layers[0].self_attn.__dict__
    model.model.layers[0].input_layernorm.weight.data[3] = float("nan")
    with pytest.raises(ec.CalibrationError, match=r"layers\.0\.self_attn: the second moment .* NaN"):
        ec.fit_latents(model, [TEXT])


@slow
def test_methods_that_look_at_stored_keys_leave_latents(no_inductor: list[Any]) -> None:
    form = {"value_bits": 8, "value_latent": 32}
    model = ec.compress_kv(**form)(ec.delta(token_budget=64, recency=16, min_length=0)(fitted("llama")))
    model.compile(backend="effcompile")
    with torch.no_grad():
        cache = model(IDS).past_key_values
        model(IDS[:, :1], past_key_values=cache)
    left = [(d.reason.code, d.reason.text) for d in ec.inspect(model).decisions if d.reason is not None]
    assert [code for code, _ in left] == ["prompt"] * 2 + ["latent-cache"] * 2
    assert "latents" in left[-1][1]


# --- a real model -----------------------------------------------------------------------------------------------------


@slow
def test_smollm2_values_at_two_thirds_of_the_rank(smollm2: tuple[Any, Any]) -> None:
    """Fitted on other text they stay near the model; cut by their weights alone they are ruined."""
    from transformers import DynamicCache

    from effcompile import measure
    from effcompile import smollm2 as home

    model, text = copy.deepcopy(smollm2[0]), home.topics(smollm2[1])
    fit, text = text[:, :2048], text[:, 20_000:20_512]
    dense = measure.chunked_perplexity(model, text, DynamicCache(config=model.config), 256)
    ec.fit_latents(model, fit.split(512, 1))
    found = measure.chunked_perplexity(model, text, ec.Cache(model, 512, value_latent=128, **EXACT), 256)
    ec.fit_latents(model)
    plain = measure.chunked_perplexity(model, text, ec.Cache(model, 512, value_latent=128, **EXACT), 256)
    print(dense, found, plain)
    assert found <= 1.3 * dense
    assert plain > 10 * dense
