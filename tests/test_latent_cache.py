"""A cache of keys as latents: against the model, compiled, between calls, and what is left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from test_rope import MORE
from torch import Tensor, nn

import effcompile as ec
from effcompile.kernels import cost, latent
from effcompile.kernels.form import FormError, KVForm
from effcompile.kernels.program import Predicate
from effcompile.runtime.cache import CacheError
from models import GQA, MODELS

pytestmark = pytest.mark.filterwarnings("ignore:compress_kv. generate", "ignore:.*runs its PyTorch reference body")

IDS = torch.randint(1, 128, (2, 90), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones(2, 90, dtype=torch.int64)
PADDED[0, :21] = 0
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
EXACT: dict[str, Any] = {"key_bits": 16, "value_bits": 16}
FULL = {"llama": 64, "gemma3": 64, "qwen2": 64, "qwen3": 128, "cohere": 64, "glm": 64, "yarn": 64, "smollm3": 64}
"""Channels of all key heads."""


def model_of(name: str) -> Any:
    return gemma3() if name == "gemma3" else (MODELS | MORE)[name]("sdpa")


def gemma3() -> Any:
    """Norms of keys whose weights are kept around 0."""
    torch.manual_seed(0)
    layers = {"head_dim": 32, "layer_types": ["full_attention"] * 2, "query_pre_attn_scalar": 32}
    config = transformers.Gemma3TextConfig(**GQA, **layers, attn_implementation="sdpa")
    model = transformers.Gemma3ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(-0.5, 0.5)
    return model


# --- a cache ----------------------------------------------------------------------------------------------------------


def run(model: Any, cache: Any, ids: Tensor = IDS, mask: Tensor = PADDED) -> Tensor:
    """Logits of a prompt of 50 tokens, a chunk of 37, and three single tokens."""
    found, positions = [], (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for start, stop in ((0, 50), (50, 87), (87, 88), (88, 89), (89, 90)):
            call = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
            found.append(model(ids[:, start:stop], past_key_values=cache, use_cache=True, **call).logits)
    return torch.cat(found, 1)[mask[:, : ids.shape[1]].bool()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FULL)
def test_full_rank_in_16_bits_is_the_model(name: str, dtype: torch.dtype) -> None:
    """Padding, GQA, biases, norms of keys, both kinds of rotation, part of a head, none: at most what eager loses."""
    model = model_of(name)
    exact = _whole(copy.deepcopy(model).double())
    model = model.to(dtype)
    eager = _whole(model)
    ours = run(model, ec.Cache(model, 512, latent=FULL[name], **EXACT))
    lost, error = (float((x.double() - exact).abs().max()) for x in (eager, ours))
    print(name, dtype, lost, error, float(exact.abs().max()))
    assert error <= 4 * lost, f"{error:.3g}, and eager loses {lost:.3g}"


def _whole(model: Any) -> Tensor:
    positions = (PADDED.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(IDS, attention_mask=PADDED, position_ids=positions, use_cache=False).logits[PADDED.bool()]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "cohere", "smollm3"])
def test_a_lower_rank_is_the_model_with_that_weight(name: str) -> None:
    """Against a copy whose key projections were replaced by their nearest of that rank; only stored keys are of it."""
    model, rank = model_of(name), 32
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(linear := getattr(module, "k_proj", None), nn.Linear):
            basis, down = latent.factorise(linear.weight, rank)
            linear.weight.data = (basis @ down).float()
    cache = ec.Cache(model, 512, latent=rank, **EXACT)
    exact = ec.Cache(other, 512, **EXACT)
    with torch.no_grad():
        # The first layer's keys depend on the tokens alone.
        model(IDS, past_key_values=cache)
        other(IDS, past_key_values=exact)
    layer = cache.compressed[0]
    table = {} if layer.angles is None else {"table": layer.angles.table}
    ours, _ = torch.ops.effcompile.kv_load(
        *layer.state, cache.length, layer.form_name, **table, **layer.factor.rebuilds
    )
    theirs, _ = torch.ops.effcompile.kv_load(*exact.compressed[0].state, exact.length, exact.compressed[0].form_name)
    bound = 64 * torch.finfo(torch.float32).eps * float(theirs.abs().max())
    assert float((ours - theirs).abs().max()) <= bound
    assert not torch.allclose(theirs, _loaded(model, ec.Cache(model, 512, **EXACT)), atol=1e-2)


def _loaded(model: Any, cache: Any) -> Tensor:
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    layer = cache.compressed[0]
    keys: Tensor = torch.ops.effcompile.kv_load(*layer.state, cache.length, layer.form_name)[0]
    return keys


PACKED = {"key_bits": 8, "value_bits": 4, "residual": 32, "latent": 48}


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen2", "qwen3", "cohere"))]
)
def test_compiled_generates_as_eager(name: str, no_inductor: list[Any]) -> None:
    model = ec.compress_kv(**PACKED)(model_of(name))
    expected = model.generate(IDS, attention_mask=PADDED, **GREEDY)
    model.compile(backend="effcompile")
    assert torch.equal(model.generate(IDS, attention_mask=PADDED, **GREEDY), expected)
    rewritten = [d for d in ec.inspect(model).decisions if d.action == "rewritten"]
    decode = [d for d in rewritten if "decode" in d.form]
    assert len(decode) == len([d for d in rewritten if "prefill" in d.form]) == 2
    assert all("k8l48v4" in d.form and ("norm" in d.form) == (name == "qwen3") for d in decode)
    used = {str(node.target) for graph in no_inductor for node in graph.graph.nodes}
    assert not any("kv_load" in target for target in used)
    # Nothing reads the weight that makes whole keys, but for the prompt.
    prompt, step = map(_weights_read, no_inductor[-2:])
    assert any("k_proj" in name for name in prompt)
    assert not any("k_proj" in name for name in step)


def _weights_read(graph: Any) -> set[str]:
    graph.graph.eliminate_dead_code()
    nodes = graph.graph.find_nodes(op="placeholder") + graph.graph.find_nodes(op="get_attr")
    return {str(getattr(node, "_dynamo_source", None) or node.target) + node.name for node in nodes if node.users}


def test_life_of_a_cache() -> None:
    """Rows, copies, growth, removed tokens: buffers of one head are as any others."""
    model = model_of("llama")
    cache = ec.Cache(model, **PACKED)
    first = run(model, cache)
    other = copy.deepcopy(cache)
    assert other.compressed[0].factor is cache.compressed[0].factor
    cache.reset()
    assert torch.equal(run(model, cache), first)
    cache.activate_past_recording()
    before = [x.clone() for layer in cache.compressed for x in layer.buffers()]
    with torch.no_grad():
        model(IDS[:, :70], past_key_values=cache)
    cache.crop(-70)
    mask = torch.ones(2, 600, dtype=torch.int64)
    with torch.no_grad():
        again = [model(IDS[:, :5], attention_mask=mask[:, :95], past_key_values=c).logits for c in (cache, other)]
        assert torch.equal(*again)
        cache.reserve(600)
        assert [x.shape[2] for x in cache.compressed[0].buffers()[-1:]] == [before[-1].shape[2]]
        model(IDS[:, :5], attention_mask=mask[:, :100], past_key_values=cache)
        model(IDS[:, :5], attention_mask=mask[:, :100], past_key_values=other)
    for c in (cache, other):
        c.batch_select_indices(torch.tensor([1, 1, 0]))
        c.reorder_cache(torch.tensor([2, 1, 1]))
    rows = torch.cat([IDS, IDS])[:3, :5]
    with torch.no_grad():
        assert torch.equal(*(model(rows, past_key_values=c).logits for c in (cache, other)))


def test_bytes_are_the_allocated_ones(no_inductor: list[Any]) -> None:
    model = model_of("llama")
    cache = ec.Cache(model, 512, batch_size=3, **PACKED)
    layer = cache.compressed[0]
    allocated = sum(b.untyped_storage().nbytes() for each in cache.compressed for b in each.buffers())
    table = cache.angles.table.untyped_storage().nbytes()
    assert cache.nbytes == allocated + table + 8
    assert table == 3 * 512 * 32 * 4 == cost.at(cost.table(32, latents=True), B=3, C=512)
    sizes = {"B": 3, "G": 2, "C": 512, "D": 32, "E": 32}
    assert layer.nbytes == cost.at(cost.allocation(layer.form, 4), **sizes)
    # K: 48 codes of a byte and a scale and a zero for 32 tokens; V: 64 codes of half a byte, scales for 32 channels.
    assert layer.nbytes == 3 * 512 * (48 + 48 * 4 / 32 + 32 + 2 * 4) + 3 * 64 * (48 + 64) * 4
    moved = cost.attend(layer.form, Predicate(), 4, 32).at(**sizes, H=4, T=1, S=300)
    post = cost.attend(KVForm(8, 4, 32, 32), Predicate(), 4).at(**sizes, H=4, T=1, S=300)
    packed = layer.form.packed(300)
    held = 3 * (packed * (48 - 64) * (1 + 4 / 32) + (300 - packed) * (48 - 64) * 4)
    assert moved.bytes - post.bytes == held + 3 * 300 * 32 * 4 + 2 * 32 * 50 * 4
    rebuilt = 3 * 300 * 2 * (2 * 48 * 32 + 3 * 32)
    assert moved.flops - post.flops == rebuilt + 3 * packed * 2 * (48 - 64)
    ec.compress_kv(**PACKED)(model)
    model.compile(backend="effcompile")
    with torch.no_grad():
        cache = model(IDS).past_key_values
        model(IDS[:, :1], past_key_values=cache)
    decode = [d for d in ec.inspect(model).decisions if "decode" in d.form]
    assert sum(d.cache[0] for d in decode) + decode[0].table_bytes + 8 == cache.nbytes


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [("phi3", r"qkv_proj \(Linear\)"), ("gpt2", "position_embeddings"), ("neox", r"query_key_value \(Linear\)")],
)
def test_fused_projections_are_left_alone(name: str, words: str) -> None:
    model = model_of(name)
    with pytest.raises(CacheError, match=words) as error:
        ec.Cache(model, latent=32)
    assert "layer 0" in str(error.value)


class Clipped(nn.Linear):
    """A subclass, as quantised layers of other libraries are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-50, 50)


def test_projections_that_are_more_than_a_linear_are_left_alone() -> None:
    model = model_of("llama")
    attention = model.model.layers[1].self_attn
    other = Clipped(128, 64, bias=False)
    other.weight = attention.k_proj.weight
    plain, attention.k_proj = attention.k_proj, other
    with pytest.raises(CacheError, match=r"layer 1: .*k_proj \(Clipped\).*quantised by another library.*latent=0"):
        ec.Cache(model, latent=32)
    # The way out that the error names, and the same module where a hook clips it, which no type tells.
    ec.Cache(model, latent=32, rules={"model.layers.1": {"latent": 0}})
    attention.k_proj = plain
    plain.register_forward_hook(lambda module, args, out: out.clamp(-50, 50))
    with pytest.raises(CacheError, match="layer 1: "):
        ec.Cache(model, latent=32)


def test_ranks_out_of_range() -> None:
    model = model_of("llama")
    with pytest.raises(FormError, match=r"layer 0: latent=80 is more than the 64 channels .*layers.0.self_attn"):
        ec.Cache(model, latent=80)
    with pytest.raises(CacheError, match=r"layers \[0\] keep keys before RoPE and layers \[1\] keep latents"):
        ec.Cache(model, rope="pre", rules={"model.layers.1": {"latent": 32}})


def test_tied_weights_stay_tied_and_written_weights_are_seen() -> None:
    model = model_of("llama")
    first, second = (layer.self_attn for layer in model.model.layers)
    second.k_proj.weight = first.k_proj.weight
    before = first.k_proj.weight.clone()
    cache = ec.Cache(model, 512, latent=64, **EXACT)
    found, expected = run(model, cache), _whole(model)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert second.k_proj.weight is first.k_proj.weight
    assert torch.equal(first.k_proj.weight, before)
    factor = cache.compressed[0].factor
    assert ec.Cache(model, 512, latent=64, **EXACT).compressed[0].factor is factor
    with torch.no_grad():
        first.k_proj.weight.mul_(1.5)
        with pytest.raises(CacheError, match="layer 0: the weights that make its keys were changed"):
            model(IDS[:, :1], past_key_values=cache)
    cache = ec.Cache(model, 512, latent=64, **EXACT)
    assert cache.compressed[0].factor is not factor
    torch.testing.assert_close(run(model, cache), _whole(model), rtol=0, atol=1e-3)
    # Equal norms of queries and keys are told apart once they differ.
    other = model_of("qwen3")
    ec.Cache(other, 512, latent=128, **EXACT)
    with torch.no_grad():
        for layer in other.model.layers:
            layer.self_attn.k_norm.weight.mul_(3.0)
    torch.testing.assert_close(run(other, ec.Cache(other, 512, latent=128, **EXACT)), _whole(other), rtol=0, atol=1e-3)
    model.bfloat16()
    assert ec.Cache(model, 512, latent=64).compressed[0].factor.down.dtype == torch.bfloat16


def test_hidden_states_of_one_call_never_serve_another() -> None:
    model = model_of("llama")
    cache = ec.Cache(model, 512, latent=32)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    assert all(layer.hidden is None for layer in cache.compressed)
    key = torch.randn(2, 2, 1, 32)
    with pytest.raises(CacheError, match=r"layer 0: latent=32 needs the hidden states \(2, 1, 128\).*none have"):
        cache.update(key, key, 0)
    ec.remove(model)
    with torch.no_grad(), pytest.raises(CacheError, match=r"after ec\.remove"):
        model(IDS[:, :1], past_key_values=cache)


def test_methods_that_look_at_stored_keys_leave_latents(no_inductor: list[Any]) -> None:
    model = ec.compress_kv(**PACKED)(ec.delta(token_budget=64, recency=16, min_length=0)(model_of("llama")))
    model.compile(backend="effcompile")
    with torch.no_grad():
        cache = model(IDS).past_key_values
        model(IDS[:, :1], past_key_values=cache)
    left = [d.reason.code for d in ec.inspect(model).decisions if d.reason is not None]
    assert left == ["prompt"] * 2 + ["latent-cache"] * 2


@pytest.mark.parametrize(
    ("keys", "values"),
    [(48, 0), pytest.param(48, 32, marks=pytest.mark.slow), pytest.param(0, 32, marks=pytest.mark.slow)],
)
def test_sparse_prefill_over_latents(keys: int, values: int, no_inductor: list[Any]) -> None:
    """A later chunk chooses among the keys that the cache stands for, and visits those: all of them at the limit."""
    # Rotated keys are stored as they are without latents of keys: the last digit, which compiling changes, can move a
    # code of 8 bits.
    form = PACKED | {"latent": keys, "value_latent": values, "key_bits": 8 if keys else 16}
    model = model_of("llama")
    ec.fit_latents(model, [IDS] if values else None)
    model = ec.compress_kv(**form)(model)

    def read(cache: Any) -> Tensor:
        with torch.no_grad():
            logits = [
                model(IDS[:, start:stop], attention_mask=PADDED[:, :stop], past_key_values=cache).logits
                for start, stop in ((0, 50), (50, 90))
            ]
        return torch.cat(logits, 1)[PADDED.bool()]

    expected = read(ec.Cache(model, 512, **form))
    ec.sparse_attention("xattention", min_length=0, block_size=16, stride=8, threshold=1.0)(model)
    model.compile(backend="effcompile")
    torch.testing.assert_close(read(ec.Cache(model, 512, **form)), expected, rtol=0, atol=3e-5)
    decided = ec.inspect(model).decisions
    rewritten = [d for d in decided if d.action == "rewritten"]
    assert all(d.form.startswith("xattention_attend_blocks_k16v16") for d in rewritten)
    assert {d.reason.code for d in decided if d.reason is not None} <= {"taken"}
    later = [d for d in rewritten if d.cache != (0, 0)]
    assert len(later) == 2
    # Rebuilding is counted: it is more than attention to keys of 16 bits alone.
    plain = cost.attend(KVForm(16, 16), Predicate(key_mask=True), 4)
    stored = KVForm(8 if keys else 16, 4, 32, 32, latent=keys, value_latent=values, rope="pre" if keys else "post")
    rebuilding = cost.load(stored, 4, 32 if keys else 0)
    assert all(d.after == plain + rebuilding for d in later)
    targets = [str(node.target) for graph in no_inductor for node in graph.graph.nodes]
    assert sum("select_stored_blocks" in t for t in targets) == sum("kv_load" in t for t in targets) == 2


@pytest.mark.slow
def test_what_is_chosen_over_latents(no_inductor: list[Any]) -> None:
    """Full-rank latents in 16 bits choose as whole keys in 16 bits do, and leave keys out."""
    found = {}
    for name, latents in (("whole", 0), ("latents", 64), ("all", 64)):
        model = model_of("llama")
        limit = 1.0 if name == "all" else 0.3
        ec.sparse_attention("xattention", min_length=0, block_size=16, stride=8, threshold=limit)(model)
        model.compile(backend="effcompile")
        cache = ec.Cache(model, 512, latent=latents, **EXACT)
        with torch.no_grad():
            model(IDS[:, :50], past_key_values=cache)
            found[name] = model(IDS[:, 50:], past_key_values=cache).logits
    torch.testing.assert_close(found["latents"], found["whole"], rtol=0, atol=1e-3)
    assert float((found["all"] - found["latents"]).abs().max()) > 1e-2


# --- a real model -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_at_full_rank_is_the_model(smollm2: tuple[Any, Any]) -> None:
    from effcompile import smollm2 as home

    model, text = smollm2[0], home.topics(smollm2[1])[:, 20_000:20_400]
    cache = ec.Cache(model, 512, latent=192, **EXACT)
    with torch.no_grad():
        expected = model(text).logits
        found = [model(piece, past_key_values=cache).logits for piece in text.split(100, 1)]
    assert float((torch.cat(found, 1) - expected).abs().max()) < 1e-3


@pytest.mark.slow
def test_smollm2_at_two_thirds_of_the_rank_in_few_bits(smollm2: tuple[Any, Any]) -> None:
    """Everything packed: 0.4 of the bytes of bf16, and a perplexity within 15 % of dense."""
    from transformers import DynamicCache

    from effcompile import measure
    from effcompile import smollm2 as home

    model, text = smollm2[0], home.topics(smollm2[1])[:, 20_000:21_024]
    config, form = model.config, {"key_bits": 8, "value_bits": 4, "residual": 0}
    bf16 = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    cache = ec.Cache(model, 8192, batch_size=1, latent=128, **form)
    assert cache.nbytes <= 0.4 * 8192 * bf16
    dense = measure.chunked_perplexity(model, text, DynamicCache(config=config), 256)
    found = {
        rank: measure.chunked_perplexity(model, text, ec.Cache(model, 1024, latent=rank, **form), 256)
        for rank in (192, 128)
    }
    assert found[192] <= 1.01 * dense
    assert found[192] < found[128] <= 1.15 * dense
